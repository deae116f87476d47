"""Traces over IPv6: the same questions, the same answers, in the words of IPv6."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import pytest
from msgspec.structs import replace

from labs import dual_stack_lab, ipv6_lab, six
from netlab.datapath.overlay import vtep_mac
from netlab.datapath.podnet import outer_link
from netlab.kernel.namespaces import entered
from netlab.kernel.packet_sockets import attach
from netlab.lab import lifecycle
from netlab.problems import Exit, NetlabError
from netlab.topology.model import Lab
from netlab.trace.aim import Request, aim
from netlab.trace.case import Case
from netlab.trace.correlate import Observed, correlate
from netlab.trace.dissect import dissect, load
from netlab.trace.explain import explain
from netlab.trace.family import IPV6, family_of
from netlab.trace.mark import Mark
from netlab.trace.model import ProbeProtocol, Trace
from netlab.trace.model_steps import Bridge, Encapsulate, Neighbour, Rule
from netlab.trace.run import trace
from netlab.trace.witnesses.packets import program, watched_words
from test_trace_kernel import all_ok, in_node, places, run
from test_trace_losses import in_pod, lines
from trace_labs import namespace, trace_lab
from trace_records import Replayed, told

kernel = pytest.mark.kernel
TUNNEL = "flannel-v6.1"
MODES = ("iptables", "nftables", "nftables-flat")


def in_mode(lab: Lab, mode: str) -> Lab:
    if mode == "iptables-legacy":
        return replace(lab, iptables_backend="legacy")
    return replace(lab, service_proxy=replace(lab.service_proxy, mode=mode))


@pytest.fixture
def lab() -> Iterator[Lab]:
    """A trace lab of both families that is up."""
    made = dual_stack_lab(trace_lab())
    try:
        lifecycle.up(made)
        yield made
    finally:
        lifecycle.down(made.name)


def over_ipv6(lab: Lab, source: str, destination: str, **options: object) -> Trace:
    """A trace in which everything is of IPv6."""
    found = trace(lab, Request(source, destination, family=6, **options))  # type: ignore[arg-type]
    for hop in (*found.forward, *found.reply):
        outer = hop.packet.outer
        assert ":" in hop.packet.src
        assert outer is None or ":" in outer.src
        assert all(step.family != "ip" for step in hop.steps if isinstance(step, Rule))
    return found


def lost(lab: Lab, source: str, destination: str, **options: object) -> tuple[Trace, str]:
    """A trace of a probe that is lost, and what it says of that in one text."""
    found = over_ipv6(lab, source, destination, timeout_s=0.3, **options)
    assert found.drop is not None
    said = f"{found.drop.explanation} | {found.drop.fix} | {found.drop.evidence}"
    assert "ARP" not in said
    assert "iptables " not in said.replace("ip6tables ", "")
    return found, said


@kernel
@pytest.mark.parametrize("mode", [*MODES, "iptables-legacy"])
@pytest.mark.parametrize("stack", [ipv6_lab, dual_stack_lab], ids=["IPv6", "dual"])
def test_services_in_each_mode(stack: Callable[[Lab], Lab], mode: str) -> None:
    """To another node, to the own one, to oneself, from a node; without endpoints; over UDP."""
    made = in_mode(stack(trace_lab()), mode)
    try:
        lifecycle.up(made)
        remote = over_ipv6(made, "p0", "svc/remote")
        local = over_ipv6(made, "p0", "svc/local")
        itself = over_ipv6(made, "p0", "svc/itself")
        node = over_ipv6(made, "node/n1", "svc/remote")
        datagram = over_ipv6(made, "p0", "svc/datagrams")
        empty, said = lost(made, "p0", "svc/empty")
    finally:
        lifecycle.down(made.name)
    for found in (remote, local, itself, node, datagram):
        assert found.disposition == "delivered", found.drop
        assert all_ok(found)
    assert places(remote.forward) == ["demo:p0", "n1", "_switch", "n2", "demo:p1"]
    assert places(remote.reply) == ["demo:p1", "n2", "_switch", "n1", "demo:p0"]
    assert [str(step.after) for step in remote.translations] == ["[fd00:10:244:2::2]:8002"]
    assert remote.seen_source == remote.probe.source
    assert str(remote.reply[-1].packet.flow.source) == "[fd00:10:99::1]:80"
    served = [s.object for hop in remote.forward for s in hop.steps if isinstance(s, Rule)]
    # Rules that all Services share name none: in flat maps there are no others.
    assert ("svc/demo/remote" in served) == (mode != "nftables-flat")
    tunnels = [s for hop in remote.forward for s in hop.steps if isinstance(s, Encapsulate)]
    assert [(step.device, step.local, step.remote) for step in tunnels] == [
        ("flannel-v6.1", six("172.21.32.11"), six("172.21.32.12"))
    ]
    assert places(local.forward) == ["demo:p0", "n1", "demo:p2"]
    assert places(itself.forward) == ["demo:p0", "n1", "demo:p0"]
    assert [step.kind for step in itself.translations] == ["dnat", "masquerade"]
    assert itself.seen_source is not None
    assert itself.seen_source.ip == six("10.244.1.1")
    assert [step.kind for step in node.translations] == ["dnat", "masquerade"]
    assert node.seen_source is not None
    assert node.seen_source.ip == "fd00:10:244:1::"
    assert datagram.probe.protocol == "udp"
    assert empty.disposition == "rejected"
    assert empty.drop is not None
    assert (empty.drop.reason, empty.drop.node) == ("no-endpoints", "n1")
    assert "svc/demo/empty has no ready endpoint" in said
    assert "ICMPv6 port-unreachable" in said
    assert empty.reply[0].packet.icmp == "port-unreachable"


@kernel
@pytest.mark.parametrize("mode", MODES)
def test_a_node_port_of_another_node_leads_back_masqueraded(mode: str) -> None:
    made = trace_lab()
    services = tuple(
        replace(service, type="NodePort", ports=(replace(service.ports[0], node_port=30080),))
        if service.name == "local"
        else service
        for service in made.services
    )
    made = in_mode(dual_stack_lab(replace(made, services=services)), mode)
    try:
        lifecycle.up(made)
        found = over_ipv6(made, "p0", "node/n2:30080")
    finally:
        lifecycle.down(made.name)
    assert found.disposition == "delivered"
    assert places(found.forward) == ["demo:p0", "n1", "_switch", "n2", "_switch", "n1", "demo:p2"]
    assert [(step.kind, step.node) for step in found.translations] == [
        ("dnat", "n2"),
        ("masquerade", "n2"),
    ]
    assert found.seen_source is not None
    assert found.seen_source.ip == "fd00:10:244:2::"


@kernel
def test_without_a_tunnel(lab: Lab) -> None:
    made = replace(lab, overlay=replace(lab.overlay, type="host-gw"))
    lifecycle.up(made)
    found = over_ipv6(made, "p0", "svc/remote")
    assert found.disposition == "delivered"
    assert all_ok(found)
    assert places(found.forward) == ["demo:p0", "n1", "_switch", "n2", "demo:p1"]
    assert not any(hop.packet.outer for hop in found.forward)


@kernel
def test_which_family_is_traced(lab: Lab) -> None:
    assert ":" not in trace(lab, Request("p0", "svc/remote")).probe.destination.ip
    for request in (
        Request("p0", "svc/remote", family=6),
        Request("p0", "[fd00:10:99::1]:80"),
        Request("fd00:10:244:1::2", "svc/remote"),
    ):
        found = trace(lab, request)
        assert found.disposition == "delivered"
        assert (found.probe.source.ip, found.probe.destination.ip) == (
            "fd00:10:244:1::2",
            "fd00:10:99::1",
        )
    echo = trace(lab, Request("p0", "p1", family=6, protocol="icmp"))
    assert echo.disposition == "delivered"
    assert echo.probe.protocol == "icmp"
    assert {hop.packet.protocol for hop in (*echo.forward, *echo.reply)} == {"icmpv6"}
    assert (echo.forward[0].packet.icmp, echo.reply[0].packet.icmp) == (
        "echo-request",
        "echo-reply",
    )
    assert trace(lab, Request("p0", "::1")).disposition == "delivered"


def _shape(found: Trace) -> list[object]:
    """What does not depend on the family, nor on what neighbours and bridges know by then."""
    shape: list[object] = [found.disposition, found.drop and (found.drop.reason, found.drop.node)]
    for hop in (*found.forward, *found.reply):
        device = hop.device.replace("flannel-v6.", "flannel.")
        kinds = [
            (step.chain, step.action) if isinstance(step, Rule) else type(step).__name__
            for step in hop.steps
            if not isinstance(step, Neighbour | Bridge)
            # A tunnel's packets meet nat rules only if theirs is not tracked from before.
            and not (isinstance(step, Rule) and step.outer)
        ]
        shape.append((hop.namespace, device, hop.direction, kinds))
    return shape


WAYS: tuple[tuple[str, str, ProbeProtocol], ...] = (
    ("p0", "svc/remote", "tcp"),
    ("p0", "10.244.2.1", "icmp"),
    ("p0", "node/n2", "icmp"),
    ("p0", "node/n2:81", "udp"),
    ("p0", "172.21.32.1", "icmp"),
    ("p0", "p0:8002", "udp"),
    ("172.21.32.11", "p1", "icmp"),
    ("node/n1", "svc/empty", "tcp"),
    ("node/n1", "node/n1", "icmp"),
)


@kernel
def test_both_families_tell_the_same(lab: Lab) -> None:
    for source, destination, protocol in WAYS:
        request = Request(source, destination, protocol=protocol, family=4, timeout_s=0.3)
        of_six = replace(request, source=six(source), destination=six(destination), family=6)
        four, other = _shape(trace(lab, request)), _shape(trace(lab, of_six))
        # Chains of endpoints are called by a hash of their addresses.
        assert re.sub(r"KUBE-SEP-\w+", "", str(four)) == re.sub(r"KUBE-SEP-\w+", "", str(other))


@kernel
@pytest.mark.parametrize(("protocol", "answer"), [("tcp", "RA"), ("udp", "port-unreachable")])
def test_a_closed_port_rejects(lab: Lab, protocol: str, answer: str) -> None:
    found, _ = lost(lab, "p0", "p1:99", protocol=protocol)
    assert found.disposition == "rejected"
    assert found.drop is not None
    assert (found.drop.reason, found.drop.where) == ("port-closed", "pod demo/p1")
    assert answer in (found.reply[0].packet.flags, found.reply[0].packet.icmp)
    assert places(found.reply)[-1] == "demo:p0"


@kernel
@pytest.mark.parametrize(
    ("node", "rule", "direction"),
    [
        ("n1", ("FORWARD", "-d", "fd00:10:244:2::2", "-j", "DROP"), "forward"),
        ("n2", ("INPUT", "-p", "udp", "--dport", "8472", "-j", "DROP"), "forward"),
        ("n1", ("FORWARD", "-s", "fd00:10:244:2::2", "-j", "DROP"), "reply"),
    ],
)
def test_a_rule_that_drops_can_be_removed_as_told(
    lab: Lab, node: str, rule: tuple[str, ...], direction: str
) -> None:
    in_node(lab, node, "ip6tables", "-I", *rule)
    found, _ = lost(lab, "p0", "p1:8002")
    assert found.disposition == "dropped"
    assert found.drop is not None
    assert (found.drop.node, found.drop.direction) == (node, direction)
    assert found.drop.reason == "dropped-by-rule"
    assert (found.drop.rule or "").startswith(f"-A {rule[0]} ")
    run(*(found.drop.fix or "").partition("`")[2].rstrip("`").split())
    assert over_ipv6(lab, "p0", "p1:8002").disposition == "delivered"


def _policy(lab: Lab) -> None:
    in_node(lab, "n1", "ip6tables", "-P", "FORWARD", "DROP")


def _reject(lab: Lab) -> None:
    rule = ["-d", six("10.244.2.2"), "-j", "REJECT", "--reject-with", "icmp6-adm-prohibited"]
    in_node(lab, "n1", "ip6tables", "-I", "FORWARD", *rule)


def _foreign(lab: Lab) -> None:
    in_node(lab, "n1", "nft", "add table inet mine")
    in_node(lab, "n1", "nft", "add chain inet mine c { type filter hook forward priority 5; }")
    in_node(lab, "n1", "nft", "add rule inet mine c tcp dport 8002 drop")


def _no_entry(lab: Lab) -> None:
    entry = [vtep_mac(lab.node("n2"), 6), "dev", "flannel-v6.1"]
    in_node(lab, "n1", "bridge", "fdb", "del", *entry, "dst", six("172.21.32.12"))


def _wrong_entry(lab: Lab) -> None:
    entry = [vtep_mac(lab.node("n2"), 6), "dev", "flannel-v6.1", "dst", six("172.21.32.77")]
    in_node(lab, "n1", "bridge", "fdb", "replace", *entry, "self", "permanent")


def _no_route(lab: Lab) -> None:
    in_node(lab, "n1", "ip", "route", "del", "fd00:10:244:2::/64")


def _of_type(kind: str) -> Callable[[Lab], None]:
    return lambda lab: _run_route(lab, kind)


def _run_route(lab: Lab, kind: str) -> None:
    in_node(lab, "n1", "ip", "-6", "route", "add", kind, "fd00:10:244:2::2/128")


def _blackhole_rule(lab: Lab) -> None:
    in_node(lab, "n1", "ip", "-6", "rule", "add", "from", "fd00:10:244:1::2", "blackhole")


def _no_forwarding(lab: Lab) -> None:
    in_node(lab, "n1", "sysctl", "net.ipv6.conf.all.forwarding=0")


def _link_down(lab: Lab) -> None:
    run("ip", "-n", namespace(lab, "demo", "p1"), "link", "set", "eth0", "down")


def _port_down(lab: Lab) -> None:
    for link in in_node(lab, "n2", "ip", "-o", "link", "show", "master", "cbr0").splitlines():
        in_node(lab, "n2", "ip", "link", "set", link.split(": ")[1].split("@")[0], "down")


def _tunnel_down(lab: Lab) -> None:
    in_node(lab, "n2", "ip", "link", "set", "flannel-v6.1", "down")


def _no_pod_address(lab: Lab) -> None:
    over_ipv6(lab, "p0", "p1:8002")  # so that its MAC is known
    in_pod(lab, "p1", "ip", "-6", "addr", "del", "fd00:10:244:2::2/64", "dev", "eth0")


def _unheard_neighbour(lab: Lab) -> None:
    asked = ["-p", "icmpv6", "--icmpv6-type", "neighbour-solicitation", "-j", "DROP"]
    in_pod(lab, "p1", "ip6tables", "-A", "INPUT", *asked)
    in_node(lab, "n2", "ip", "-6", "neigh", "flush", "dev", "cbr0")


def _switch_port_down(lab: Lab) -> None:
    run("ip", "-n", namespace(lab, "_switch"), "link", "set", "n2", "down")
    in_node(lab, "n1", "ip", "-6", "neigh", "flush", "dev", "eth0")


def _no_node_address(lab: Lab) -> None:
    in_node(lab, "n2", "ip", "addr", "del", "fd00:172:21:32::c/64", "dev", "eth0")
    in_node(lab, "n1", "ip", "-6", "neigh", "flush", "dev", "eth0")


def _no_way_back(lab: Lab) -> None:
    in_pod(lab, "p1", "ip", "-6", "route", "del", "default")


def _off_in(*parts: str, device: str = "all") -> Callable[[Lab], None]:
    def switch(lab: Lab) -> None:
        name = namespace(lab, *parts)
        run("ip", "netns", "exec", name, "sysctl", f"net/ipv6/conf/{device}/disable_ipv6=1")

    return switch


def _off_in_node(lab: Lab) -> None:
    over_ipv6(lab, "p0", "p1:8002")  # so that its MAC is known
    _off_in("n1")(lab)


@kernel
@pytest.mark.parametrize(
    ("break_it", "disposition", "reason", "node", "words"),
    [
        (_policy, "dropped", "dropped-by-rule", "n1", "ip6tables -t filter -P FORWARD ACCEPT"),
        (_reject, "rejected", "rejected-by-rule", "n1", "ICMPv6 admin-prohibited"),
        (_foreign, "dropped", "dropped-by-rule", "n1", "nft delete rule inet mine c handle"),
        (_no_entry, "dropped", "fdb-missing", "n1", "dst fd00:172:21:32::c self permanent"),
        (_wrong_entry, "dropped", "fdb-wrong", "n1", "fd00:172:21:32::4d, an address that no"),
        (_no_route, "dropped", "no-route", "n1", "has no route"),
        (_of_type("blackhole"), "dropped", "blackhole", "n1", "-6 route del blackhole fd00:"),
        (_of_type("unreachable"), "rejected", "unreachable", "n1", "-6 route del unreachable"),
        (_of_type("prohibit"), "rejected", "prohibit", "n1", "-6 route del prohibit"),
        (_blackhole_rule, "dropped", "blackhole", "n1", "-6 rule del from fd00:10:244:1::2/128"),
        (_no_forwarding, "dropped", "forwarding-off", "n1", "net.ipv6.conf.all.forwarding=1"),
        (_link_down, "dropped", "link-down", "n2", "eth0 of pod demo/p1 is down"),
        (_port_down, "dropped", "link-down", "n2", "a port of cbr0, is down"),
        (_tunnel_down, "rejected", "tunnel-closed", "n2", "link set flannel-v6.1 up"),
        (_no_pod_address, "dropped", "address-missing", "n2", "pod demo/p1 does not have"),
        (_unheard_neighbour, "dropped", "neighbour-unresolved", "n2", "neighbour discovery"),
        (_switch_port_down, "dropped", "link-down", "n1", "n2 of the underlay switch"),
        (_no_node_address, "dropped", "address-missing", "n1", "node n2 does not have"),
        (_no_way_back, "dropped", "no-route", "n2", "it arrived, and cannot be answered"),
        (_off_in("demo", "p0"), "dropped", "ipv6-off", "n1", "off on eth0 of pod demo/p0"),
        (_off_in("demo", "p1"), "dropped", "ipv6-off", "n2", "off on eth0 of pod demo/p1"),
        (_off_in("n2"), "dropped", "ipv6-off", "n1", "off on eth0 of node n2"),
        (_off_in_node, "dropped", "ipv6-off", "n1", "net/ipv6/conf/all/disable_ipv6=0"),
        (_off_in("n2", device=TUNNEL), "dropped", "ipv6-off", "n2", f"{TUNNEL}/disable_ipv6=0"),
    ],
)
def test_what_is_broken_is_named(
    lab: Lab,
    break_it: Callable[[Lab], None],
    disposition: str,
    reason: str,
    node: str,
    words: str,
) -> None:
    break_it(lab)
    found, said = lost(lab, "p0", "p1:8002")
    assert found.drop is not None
    assert (found.disposition, found.drop.reason, found.drop.node) == (disposition, reason, node)
    assert words in said
    assert found.drop.fix
    if "`netlab up`" in found.drop.fix:
        for command in re.findall(r"`(ip netns exec \S+ sysctl [^`]+)`, and", found.drop.fix):
            run(*command.split())
        lifecycle.up(lab)
        # What was asked for in vain is asked for again only a second later.
        for parts in (("n1",), ("n2",), ("demo", "p0"), ("demo", "p1")):
            run("ip", "-n", namespace(lab, *parts), "-6", "neigh", "flush", "all")
        assert over_ipv6(lab, "p0", "p1:8002").disposition == "delivered"


@kernel
@pytest.mark.parametrize("calls", ["0", "1"])
def test_prerouting_stands_where_bridges_call_ip6tables_or_do_not(lab: Lab, calls: str) -> None:
    in_node(lab, "n1", "sysctl", f"net.bridge.bridge-nf-call-ip6tables={calls}")
    dropped = ["PREROUTING", "-d", six("10.244.2.2"), "-j", "DROP"]
    in_node(lab, "n1", "ip6tables", "-t", "raw", "-I", *dropped)
    found, _ = lost(lab, "p0", "p1:8002")
    last = found.forward[-1]
    assert found.drop is not None
    assert (last.device == "cbr0") == (calls == "0")
    assert found.drop.device == last.device
    assert [line.split(":")[0] for line in lines(last)] == ["raw PREROUTING", "✗ stopped"]


@kernel
def test_a_family_that_no_rule_tracks_is_no_blindness() -> None:
    made = in_mode(dual_stack_lab(trace_lab()), "none")
    try:
        lifecycle.up(made)
        in_node(made, "n1", "iptables", "-A", "FORWARD", "-m", "conntrack", "--ctstate", "NEW")
        assert trace(made, Request("p0", "p1:8002")).disposition == "delivered"
        found = over_ipv6(made, "p0", "p1:8002")
    finally:
        lifecycle.down(made.name)
    assert found.disposition == "delivered"
    assert found.witnesses.conntrack == "unavailable: no rule asks for tracking on n1, n2"


@kernel
def test_traces_of_both_families_at_once_do_not_mix(lab: Lab) -> None:
    asked: list[Literal[4, 6]] = [4, 6, 6]
    with ThreadPoolExecutor(3) as threads:
        requests = [Request("p0", "svc/remote", family=family) for family in asked]
        traces = list(threads.map(lambda request: trace(lab, request), requests))
    for family, found in zip(asked, traces, strict=True):
        assert found.disposition == "delivered"
        assert all_ok(found)
        assert len(found.forward) == 12
        assert {hop.packet.sport for hop in found.forward} == {found.probe.source.port}
        assert (":" in found.probe.source.ip) == (family == 6)


@kernel
def test_what_is_no_address_of_a_service_or_of_the_lab(lab: Lab) -> None:
    found, said = lost(lab, "p0", "[fd00:10:99::99]:80")
    assert found.drop is not None
    assert found.drop.reason == "no-such-service"
    found, said = lost(lab, "p0", "[fd00:10:99::1]:81")
    assert found.drop is not None
    assert found.drop.reason == "no-such-port"
    assert "no rule translates [fd00:10:99::1]:81 over tcp: svc/demo/remote has 80/TCP" in said
    found, _ = lost(lab, "p0", "2001:db8::1")
    assert found.drop is not None
    assert found.drop.reason == "outside-lab"
    found, said = lost(lab, "p0", "[fd00:10:244:2::77]:80")
    assert found.drop is not None
    assert (found.drop.reason, found.drop.node) == ("neighbour-unresolved", "n2")
    assert "no pod and no node of the lab has that address" in said
    _, said = lost(lab, "p0", "svc/remote", protocol="icmp")
    assert "does not answer ping" in said


@kernel
def test_a_packet_that_is_too_big_for_a_router_or_for_its_sender(lab: Lab) -> None:
    in_node(lab, "n1", "ip", "link", "set", "flannel-v6.1", "mtu", "1280")
    found, said = lost(lab, "p0", "p1", protocol="icmp", size=1400)
    assert found.disposition == "rejected"
    assert found.drop is not None
    assert (found.drop.reason, found.drop.where) == ("mtu", "node n1")
    assert "ICMPv6 packet-too-big from fd00:10:244:1::1" in said
    # The sender remembers that, and tells itself.
    found, said = lost(lab, "p0", "p1", protocol="icmp", size=1400)
    assert found.drop is not None
    assert (found.drop.reason, found.drop.where) == ("mtu", "pod demo/p0")
    assert "cannot pass on 1400 bytes in one piece" in said
    found, said = lost(lab, "p0", "p1", protocol="icmp", size=1431)
    assert found.drop is not None
    assert (found.drop.reason, found.drop.where) == ("mtu", "pod demo/p0")
    assert "cannot send 1431 bytes in one piece" in said


def _listen(lab: Lab, pod: str, address: str, backlog: int) -> socket.socket:
    """A server on port 99 of a pod, of the address's family alone."""
    family = family_of(address).address_family
    with entered(namespace(lab, "demo", pod)):
        server = socket.socket(family)
    if family == socket.AF_INET6:
        server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    server.bind((address, 99))
    server.listen(backlog)
    return server


@kernel
def test_who_listens_at_the_end_and_where(lab: Lab) -> None:
    with _listen(lab, "p1", "::1", 1), _listen(lab, "p2", "0.0.0.0", 1):
        _, said = lost(lab, "p0", "p1:99")
        assert "does so on ::1 alone, and this came to fd00:10:244:2::2" in said
        _, said = lost(lab, "p0", "p2:99")
        assert "does so on 0.0.0.0 alone, and this came to fd00:10:244:1::3" in said
        assert "let it listen on ::" in said
    with _listen(lab, "p1", "::", 0), ExitStack() as clients:
        for _ in range(2):
            with entered(namespace(lab, "demo", "p1")):
                client = clients.enter_context(socket.socket(socket.AF_INET6))
            client.setblocking(False)
            client.connect_ex(("::1", 99))
        found, _ = lost(lab, "p0", "p1:99")
        assert found.drop is not None
        assert found.drop.reason == "accept-queue-full"


def _no_bridge_netfilter(lab: Lab) -> None:
    in_node(lab, "n1", "sysctl", "net.bridge.bridge-nf-call-ip6tables=0")


def _no_hairpin(lab: Lab) -> None:
    link = outer_link(lab.pods[0])
    in_node(lab, "n1", "bridge", "link", "set", "dev", link, "hairpin", "off")


def _one_hop(lab: Lab) -> None:
    in_pod(lab, "p0", "sysctl", "net.ipv6.conf.eth0.hop_limit=1")


def _untracked(lab: Lab) -> None:
    source = ["-s", "fd00:10:244:1::2", "-j", "CT", "--notrack"]
    in_node(lab, "n1", "ip6tables", "-t", "raw", "-A", "PREROUTING", *source)
    invalid = ["-m", "conntrack", "--ctstate", "INVALID", "-j", "DROP"]
    in_node(lab, "n1", "ip6tables", "-I", "FORWARD", *invalid)


@kernel
@pytest.mark.parametrize(
    ("break_it", "destination", "reason", "words"),
    [
        (_no_bridge_netfilter, "svc/local", "bridge-netfilter-off", "call-ip6tables=1"),
        (_no_hairpin, "svc/itself", "hairpin-off", "hairpin on"),
        (_one_hop, "p1:8002", "ttl", "net.ipv6.conf.eth0.hop_limit=64"),
        (_untracked, "p1:8002", "conntrack-invalid", "ip6tables -t raw -D PREROUTING"),
    ],
)
def test_what_is_told_can_be_done(
    lab: Lab, break_it: Callable[[Lab], None], destination: str, reason: str, words: str
) -> None:
    break_it(lab)
    found, said = lost(lab, "p0", destination)
    assert found.drop is not None
    assert (found.drop.reason, found.drop.node) == (reason, "n1")
    assert words in said
    run(*(found.drop.fix or "").split("`")[1].split())
    assert over_ipv6(lab, "p0", destination).disposition == "delivered"


@kernel
def test_a_connection_that_is_remembered_too_long(lab: Lab) -> None:
    asked = Request("p0", "svc/datagrams", family=6, source_port=40000, timeout_s=0.3)
    assert trace(lab, asked).disposition == "delivered"
    _link_down(lab)
    ends = tuple(each for each in lab.endpoints if each.service != "datagrams")
    found = trace(replace(lab, endpoints=ends), asked)
    assert found.drop is not None
    assert (found.drop.reason, found.drop.node) == ("stale-conntrack", "n1")
    assert "--orig-dst fd00:10:99::5" in (found.drop.fix or "")


@pytest.mark.parametrize(
    ("stack", "request_", "code"),
    [
        (dual_stack_lab, Request("p0", "fe80::1"), "link-local"),
        (dual_stack_lab, Request("p0", "fe80::1%eth0"), "link-local"),
        (dual_stack_lab, Request("p0", "::ffff:10.99.0.1"), "mapped-address"),
        (dual_stack_lab, Request("p0", "10.244.2.2:80", family=6), "two-families"),
        (dual_stack_lab, Request("10.244.1.2", "[fd00:10:99::1]:80"), "two-families"),
        (dual_stack_lab, Request("10.244.1.2", "svc/remote", family=6), "two-families"),
        (dual_stack_lab, Request("p0", "svc/old", family=6), "no-address"),
        (lambda lab: lab, Request("p0", "p1", family=6), "no-address"),
        (lambda lab: lab, Request("p0", "[fd00:10:99::1]:80"), "other-family"),
        (ipv6_lab, Request("p0", "p1", family=4), "no-address"),
        (ipv6_lab, Request("p0", "10.99.0.1:80"), "other-family"),
    ],
)
def test_requests_that_cannot_be_meant(
    stack: Callable[[Lab], Lab], request_: Request, code: str
) -> None:
    lab = stack(trace_lab())
    old = replace(lab.services[0], name="old", other_cluster_ips=())
    with pytest.raises(NetlabError) as raised:
        aim(replace(lab, services=(*lab.services, old)), request_)
    assert raised.value.exit_code == Exit.USAGE
    assert [problem.code for problem in raised.value.problems] == [code]


@kernel
def test_on_the_command_line(lab: Lab) -> None:
    netlab = str(Path(sys.executable).parent / "netlab")
    words = [netlab, "trace", "--lab", lab.name, "p0", "svc/remote"]

    def said(*options: str) -> str:
        asked = subprocess.run([*words, *options], capture_output=True, text=True, check=True)
        return asked.stdout

    assert "DNAT [fd00:10:99::1]:80 → [fd00:10:244:2::2]:8002" in said("-6")
    probe = json.loads(said("-4", "-o", "json"))["probe"]
    assert probe["destination"] == {"ip": "10.99.0.1", "port": 80}


# --- without a kernel ----------------------------------------------------------------------------

CLIENT, POD = "fd00:10:244:1::2", "fd00:10:244:2::2"
MARK = Mark("tcp", b"\x01\x02\x03\x04", IPV6)
ECHO = Mark("icmp", b"8 bytes.", IPV6)


def _syn(inet: Any) -> Any:
    return inet.TCP(sport=41000, dport=8002, seq=MARK.sequence, flags="S")


def _error(layers: Any, error: Any, *extensions: Any) -> Any:
    """An ICMPv6 error to the client that quotes its SYN."""
    six_, packet = layers.inet6, layers.inet6.IPv6(src=CLIENT, dst=POD, nh=6)
    for extension in extensions:
        packet /= extension
    return six_.IPv6(src=POD, dst=CLIENT) / error / packet / _syn(layers.inet)


def _frames(layers: Any) -> dict[str, tuple[Any, Mark]]:
    six_, inet = layers.inet6, layers.inet
    there = six_.IPv6(src=CLIENT, dst=POD)
    vxlan = six_.IPv6(src="fd00:172:21:32::b", dst="fd00:172:21:32::c", hlim=64, fl=7)
    vxlan /= inet.UDP(sport=50000, dport=8472) / layers.vxlan.VXLAN(vni=5, flags=8)
    return {
        "SYN": (there / _syn(inet), MARK),
        "SYN in VXLAN": (vxlan / layers.l2.Ether() / there / _syn(inet), MARK),
        "SYN behind a fragment header": (there / six_.IPv6ExtHdrFragment() / _syn(inet), MARK),
        "SYN behind options": (there / six_.IPv6ExtHdrDestOpt() / _syn(inet), MARK),
        "echo": (there / six_.ICMPv6EchoRequest(id=1, data=ECHO.cookie), ECHO),
        "too big": (_error(layers, six_.ICMPv6PacketTooBig(mtu=1280)), MARK),
        "unreachable": (_error(layers, six_.ICMPv6DestUnreach(code=3)), MARK),
        "hop limit": (_error(layers, six_.ICMPv6TimeExceeded()), MARK),
        "next header": (_error(layers, six_.ICMPv6ParamProblem(code=1)), MARK),
    }


@pytest.mark.parametrize(
    ("name", "role", "icmp"),
    [
        ("SYN", "probe", None),
        ("SYN in VXLAN", "probe", None),
        ("SYN behind a fragment header", "probe", None),
        ("SYN behind options", "probe", None),
        ("echo", "probe", "echo-request"),
        ("too big", "error", "packet-too-big"),
        ("unreachable", "error", "address-unreachable"),
        ("hop limit", "error", "time-exceeded"),
        ("next header", "error", "unknown-next-header"),
    ],
)
def test_frames_pass_the_filter_and_are_known(name: str, role: str, icmp: str | None) -> None:
    layers = load()
    packet, mark = _frames(layers)[name]
    frame = bytes(layers.l2.Ether() / packet)
    assert passes(frame, mark)
    found = dissect(frame, mark, 8472)
    assert found is not None
    assert (found.role, found.packet.icmp) == (role, icmp)
    inner = 40 + len(bytes(_syn(layers.inet)))
    if found.role == "probe" and mark is MARK:
        assert str(found.packet.flow) == f"[{CLIENT}]:41000 → [{POD}]:8002"
        assert (found.packet.protocol, found.packet.flags, found.packet.ttl) == ("tcp", "S", 64)
        assert found.packet.length == inner + (8 if "behind" in name else 0)
    else:
        assert found.packet.protocol == "icmpv6"
    outer = found.packet.outer
    assert (outer is not None) == ("VXLAN" in name)
    if outer:
        assert str(outer) == "fd00:172:21:32::b → fd00:172:21:32::c VNI 5"
        assert (outer.id, outer.length) == (7, 40 + 8 + 8 + 14 + inner)


def test_neighbour_discovery_and_others_are_left_out() -> None:
    layers = load()
    asked = layers.inet6.IPv6(src=CLIENT, dst="ff02::1:ff00:2")
    asked /= layers.inet6.ICMPv6ND_NS(tgt=POD) / layers.inet6.ICMPv6NDOptSrcLLAddr()
    other = layers.inet6.IPv6(src=CLIENT, dst=POD) / layers.inet.TCP(seq=5, flags="S")
    for packet in (asked, other):
        frame = bytes(layers.l2.Ether() / packet)
        assert not passes(frame, MARK)
        assert dissect(frame, MARK, 8472) is None


def passes(frame: bytes, mark: Mark) -> bool:
    """Whether a frame passes the socket filter; sockets of any kind can have one."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with here, there:
        attach(there, program(watched_words(mark, b"canary..")))
        there.setblocking(False)
        try:
            here.send(frame)
            return there.recv(4096) == frame
        except (BlockingIOError, PermissionError):
            return False


def test_a_packet_that_is_too_big_is_said_to_be() -> None:
    """A probe is small; so what a router says to larger ones is put into a record."""
    record, _, _ = told("ipv6-port-closed")
    reset = next(each for each in record.sightings if each.role == "refusal")
    too_big = replace(
        reset.packet, src=six("10.244.2.1"), protocol="icmpv6", icmp="packet-too-big", flags=None
    )
    node = next(each for each in record.aim.places if each.name == "n2")
    sightings = [each for each in record.sightings if each.role == "probe"]
    sightings = [
        each for each in sightings if each.place.name in ("demo/p0", "n1", "_switch", "n2")
    ]
    error = replace(reset, place=node, device="cbr0", direction="out", packet=too_big, role="error")
    tables: Any = Replayed(record)
    observed = Observed(
        sent=record.sent,
        sightings=[*sightings, error],
        runs=[],
        entries=[],
        tables=tables,
        texts=lambda run, match: pytest.fail("no rule was seen"),
    )
    explained = explain(Case(record.lab, record.aim, record.answer, correlate(observed), tables))
    assert explained.disposition == "rejected"
    assert explained.drop is not None
    assert (explained.drop.reason, explained.drop.node) == ("mtu", "n2")
    assert "cannot pass on 80 bytes in one piece" in explained.drop.explanation
    assert explained.drop.evidence == [f"ICMPv6 packet-too-big from {too_big.src}, sent by node n2"]


@kernel
def test_the_kernels_word_is_told_over_ipv6_too(lab: Lab) -> None:
    pod = namespace(lab, "demo", "p1")
    closed, said = lost(lab, "p0", "p1:99", protocol="udp")
    assert closed.drop is not None
    assert closed.drop.reason == "port-closed"
    assert "the kernel dropped it on eth0 of pod demo/p1: NO_SOCKET in __udp6_lib_rcv" in said
    chain = "{ type filter hook input priority 0; policy accept; }"
    table = f"add table ip6 closed; add chain ip6 closed input {chain}"
    run("ip", "netns", "exec", pod, "nft", table)
    rule = "add rule ip6 closed input tcp dport 8002 drop"
    run("ip", "netns", "exec", pod, "nft", rule)
    dropped, said = lost(lab, "p0", "svc/remote")
    assert dropped.drop is not None
    assert (dropped.drop.reason, dropped.drop.node) == ("dropped-by-rule", "n2")
    assert "the kernel dropped it on eth0 of pod demo/p1: NETFILTER_DROP in nft_do_chain" in said
