"""What traces say where a lab is broken: the reason, the place, the way to mend it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from netlab.datapath.overlay import vtep_mac
from netlab.report.terminal import _headline, _told
from netlab.topology.model import Lab, ServicePort
from netlab.trace.aim import Request
from netlab.trace.model import Hop, Probe, Trace, Witnesses
from netlab.trace.model_steps import Conntrack, Nat, Neighbour, Route, Rule, Socket
from netlab.trace.run import trace
from test_trace_kernel import in_node, run
from trace_labs import lab, namespace, trace_lab

__all__ = ["lab"]

kernel = pytest.mark.kernel


def lost(lab: Lab, source: str, destination: str, **options: str) -> tuple[Trace, str]:
    """A trace of a probe that is lost, and what it says of that in one text."""
    found = trace(lab, Request(source, destination, timeout_s=0.3, **options))  # type: ignore[arg-type]
    assert found.drop is not None
    assert all(not isinstance(step, Neighbour) or step.state != "none" for step in _steps(found))
    return found, f"{found.drop.explanation} | {found.drop.fix}"


def _steps(found: Trace) -> Iterator[object]:
    for hop in (*found.forward, *found.reply):
        yield from hop.steps


def lines(hop: Hop) -> list[str]:
    """What the terminal tells below a hop."""
    return [words for words, _ in _told(hop.steps, hop)]


def in_pod(lab: Lab, pod: str, *words: str) -> str:
    return run("ip", "netns", "exec", namespace(lab, "demo", pod), *words)


@kernel
def test_a_refused_service_is_refused_behind_routing(lab: Lab) -> None:
    found, _ = lost(lab, "p0", "svc/empty")
    assert found.drop is not None
    assert found.drop.device == "cbr0"
    port, bridge = found.forward[-2:]
    assert lines(port) == ["passes nat PREROUTING"]
    assert [line.split(":")[0] for line in lines(bridge)] == [
        "route",
        "filter FORWARD → KUBE-SERVICES",
        "✗ stopped",
    ]


@kernel
@pytest.mark.parametrize("calls", ["0", "1"])
def test_prerouting_stands_where_bridges_call_iptables_or_do_not(lab: Lab, calls: str) -> None:
    in_node(lab, "n1", "sysctl", f"net.bridge.bridge-nf-call-iptables={calls}")
    in_node(
        lab, "n1", "iptables", "-t", "raw", "-I", "PREROUTING", "-d", "10.244.2.2", "-j", "DROP"
    )
    found, _ = lost(lab, "p0", "p1:8002")
    last = found.forward[-1]
    assert found.drop is not None
    assert (last.device == "cbr0") == (calls == "0")
    assert found.drop.device == last.device
    assert [line.split(":")[0] for line in lines(last)] == ["raw PREROUTING", "✗ stopped"]


@kernel
def test_hooks_stand_in_the_order_of_the_kernel(lab: Lab) -> None:
    found = trace(lab, Request("p0", "p1:8002"))
    entered = next(hop for hop in found.forward if hop.device == "flannel.1" and hop.node == "n2")
    assert [line.split(":")[0] for line in lines(entered)] == [
        "passes nat PREROUTING",
        "route",
        "passes filter FORWARD, nat POSTROUTING",
        "neighbour",
    ]
    found = trace(lab, Request("node/n1", "svc/remote"))
    kinds = [
        step.hook if isinstance(step, Rule) else type(step).__name__
        for step in found.forward[0].steps
    ]
    order = ["OUTPUT", "Nat", "Route", "POSTROUTING", "Conntrack", "Neighbour"]
    first = [kinds.index(kind) for kind in order]
    assert first == sorted(first)


@kernel
def test_a_connection_is_told_where_its_last_rewrite_is_done(lab: Lab) -> None:
    found = trace(lab, Request("p0", "svc/itself"))
    (hop,) = [hop for hop in found.forward if any(isinstance(s, Conntrack) for s in hop.steps)]
    rewrites = [step.translation for step in hop.steps if isinstance(step, Nat)]
    assert rewrites == ["masquerade"]


@kernel
@pytest.mark.parametrize("flushed", ["KUBE-SEP", "all"])
def test_rules_that_do_not_translate_a_port_that_the_service_has(lab: Lab, flushed: str) -> None:
    if flushed == "all":
        in_node(lab, "n1", "iptables", "-t", "nat", "-F")
    else:
        saved = in_node(lab, "n1", "iptables", "-t", "nat", "-S")
        (chain,) = re.findall(r"-A (KUBE-SEP-\w+) .*--to-destination 10.244.2.2:8002", saved)[:1]
        in_node(lab, "n1", "iptables", "-t", "nat", "-F", chain)
    found, said = lost(lab, "p0", "svc/remote")
    assert found.drop is not None
    assert found.drop.reason == "not-translated"
    assert "has port 80/TCP" in said
    assert "`netlab up`" in said
    assert ("KUBE-SEP-" in said) == (flushed != "all")


def _blackhole_route(lab: Lab) -> None:
    in_node(lab, "n1", "ip", "route", "add", "blackhole", "10.244.2.2/32")


def _blackhole_rule(lab: Lab) -> None:
    in_node(lab, "n1", "ip", "rule", "add", "from", "10.244.1.2", "blackhole")


def _unreachable(lab: Lab) -> None:
    in_node(lab, "n1", "ip", "route", "add", "unreachable", "10.244.2.2/32")


def _prohibit(lab: Lab) -> None:
    in_node(lab, "n1", "ip", "route", "add", "prohibit", "10.244.2.2/32")


def _no_forwarding(lab: Lab) -> None:
    in_node(lab, "n1", "sysctl", "net.ipv4.ip_forward=0")


def _no_pod_address(lab: Lab) -> None:
    trace(lab, Request("p0", "p1:8002"))  # so that its MAC is known
    in_pod(lab, "p1", "ip", "addr", "flush", "dev", "eth0")


def _port_down(lab: Lab) -> None:
    for link in in_node(lab, "n2", "ip", "-o", "link", "show", "master", "cbr0").splitlines():
        in_node(lab, "n2", "ip", "link", "set", link.split(": ")[1].split("@")[0], "down")


def _wrong_fdb(lab: Lab) -> None:
    mac = vtep_mac(lab.node("n2"))
    entry = [mac, "dev", "flannel.1", "dst", "172.21.32.77", "self", "permanent"]
    in_node(lab, "n1", "bridge", "fdb", "replace", *entry)


def _switch_port_down(lab: Lab) -> None:
    run("ip", "-n", namespace(lab, "_switch"), "link", "set", "n2", "down")
    in_node(lab, "n1", "ip", "neigh", "flush", "dev", "eth0")


def _no_node_address(lab: Lab) -> None:
    in_node(lab, "n2", "ip", "addr", "del", "172.21.32.12/24", "dev", "eth0")
    in_node(lab, "n1", "ip", "neigh", "flush", "dev", "eth0")


def _no_way_back(lab: Lab) -> None:
    in_pod(lab, "p1", "ip", "route", "del", "default")


@kernel
@pytest.mark.parametrize(
    ("break_it", "reason", "node", "words"),
    [
        (_blackhole_route, "blackhole", "n1", "route del blackhole 10.244.2.2/32"),
        (_blackhole_rule, "blackhole", "n1", "rule del from 10.244.1.2/32 blackhole"),
        (_unreachable, "unreachable", "n1", "route del unreachable 10.244.2.2/32"),
        (_prohibit, "prohibit", "n1", "route del prohibit 10.244.2.2/32"),
        (_no_forwarding, "forwarding-off", "n1", "ip_forward=1"),
        (_no_pod_address, "address-missing", "n2", "pod demo/p1 does not have"),
        (_port_down, "link-down", "n2", "a port of cbr0, is down"),
        (_wrong_fdb, "fdb-wrong", "n1", "172.21.32.77, an address that no node has"),
        (_switch_port_down, "link-down", "n1", "n2 of the underlay switch"),
        (_no_node_address, "address-missing", "n1", "node n2 does not have"),
        (_no_way_back, "no-route", "n2", "it arrived, and cannot be answered"),
    ],
)
def test_what_is_broken_is_named(
    lab: Lab, break_it: object, reason: str, node: str, words: str
) -> None:
    break_it(lab)  # type: ignore[operator]
    found, said = lost(lab, "p0", "p1:8002")
    assert found.drop is not None
    assert (found.drop.reason, found.drop.node) == (reason, node), said
    assert words in said
    assert found.drop.fix
    assert found.delivered_to is None or "arrived" in words


@kernel
def test_a_route_of_a_type_is_told_with_its_prefix(lab: Lab) -> None:
    _blackhole_route(lab)
    found, _ = lost(lab, "p0", "p1:8002")
    routes = [str(step) for step in _steps(found) if isinstance(step, Route)]
    assert routes[-1] == "10.244.2.2 matches blackhole route 10.244.2.2/32"
    _no_forwarding(lab)
    in_node(lab, "n1", "ip", "route", "del", "blackhole", "10.244.2.2/32")
    found, _ = lost(lab, "p0", "p1:8002")
    routes = [str(step) for step in _steps(found) if isinstance(step, Route)]
    assert routes[-1].startswith("10.244.2.2 matches 10.244.2.0/24 via")
    assert routes[-1].endswith("but forwarding is off")


@kernel
def test_loopback_and_the_internet(lab: Lab) -> None:
    found = trace(lab, Request("p0", "127.0.0.1"))
    assert found.disposition == "delivered"
    assert all(step.matched for step in _steps(found) if isinstance(step, Route))
    found, said = lost(lab, "p0", "8.8.8.8:53")
    assert found.drop is not None
    assert (found.drop.reason, found.drop.node) == ("outside-lab", None)
    assert "netlab up" not in said


@kernel
def test_a_pod_address_that_nobody_has_is_followed_to_its_node(lab: Lab) -> None:
    found, said = lost(lab, "p0", "10.244.2.77:80")
    assert found.drop is not None
    assert (found.drop.reason, found.drop.node) == ("neighbour-unresolved", "n2")
    assert "cbr0" in said
    assert "no pod and no node of the lab has that address" in said


@kernel
def test_a_bridge_waits_for_the_mac_of_whom_it_was_translated_to(lab: Lab) -> None:
    in_pod(lab, "p2", "sysctl", "-q", "net.ipv4.conf.eth0.arp_ignore=8")
    in_node(lab, "n1", "ip", "neigh", "flush", "dev", "cbr0")
    found, said = lost(lab, "p0", "svc/local")
    assert found.reason == "arp-ignored"
    assert "pod demo/p2 does not answer ARP for 10.244.1.3" in said


@kernel
def test_with_a_device_go_its_routes(lab: Lab) -> None:
    in_node(lab, "n2", "ip", "link", "set", "cbr0", "down")
    found, said = lost(lab, "p0", "p1:8002")
    assert found.drop
    assert (found.drop.reason, found.drop.node) == ("link-down", "n2")
    assert said.startswith("cbr0 of node n2 is down, and ")
    assert "link set cbr0 up" in said
    in_pod(lab, "p0", "ip", "link", "set", "eth0", "down")
    found, said = lost(lab, "p0", "p1:8002")
    assert found.reason == "link-down"
    assert "eth0 of pod demo/p0 is down" in said


@kernel
@pytest.mark.parametrize(
    ("where", "policy", "node", "direction"),
    [
        ("n2", "dst 10.244.2.2 dir fwd action block", "n2", "fwd"),
        ("n2", "src 10.244.2.0/24 dst 10.244.1.2 dir out action block", "n2", "out"),
        ("p1", "src 10.244.1.2 dir in action block", "n2", "in"),
        ("p0", "dst 10.244.2.2 dir out action block", "n1", "out"),
        ("p0", "dst 10.244.2.2 dir out tmpl proto esp mode transport", "n1", "out"),
    ],
)
def test_an_ipsec_policy_is_named_and_can_be_deleted(
    lab: Lab, where: str, policy: str, node: str, direction: str
) -> None:
    command = in_node if where.startswith("n") else in_pod
    command(lab, where, "ip", "xfrm", "policy", "add", *policy.split())
    found, said = lost(lab, "p0", "p1:8002")
    assert (found.reason, found.lost_on) == ("xfrm-policy", node)
    assert ("blocks it" if "block" in policy else "with IPsec alone") in said
    assert f"dir {direction}" in said
    *_, remove = re.findall("`([^`]+)`", said)
    run(*remove.split())
    assert trace(lab, Request("p0", "p1:8002")).delivered


@kernel
def test_who_answers_no_ping_is_named(lab: Lab) -> None:
    in_pod(lab, "p1", "sysctl", "-q", "net.ipv4.icmp_echo_ignore_all=1")
    found, said = lost(lab, "p0", "p1", protocol="icmp")
    assert found.reason == "echo-ignored"
    assert "sysctl net.ipv4.icmp_echo_ignore_all=0" in said


@kernel
def test_a_policy_and_a_foreign_rule_come_with_a_fix(lab: Lab) -> None:
    in_node(lab, "n1", "iptables", "-P", "FORWARD", "DROP")
    _, said = lost(lab, "p0", "p1:8002")
    assert "iptables -t filter -P FORWARD ACCEPT" in said
    in_node(lab, "n1", "iptables", "-P", "FORWARD", "ACCEPT")
    in_node(lab, "n1", "nft", "add table inet filter")
    chain = "{ type filter hook forward priority 5; }"
    in_node(lab, "n1", "nft", f"add chain inet filter mine {chain}")
    in_node(lab, "n1", "nft", "add rule inet filter mine tcp dport 8002 drop")
    found, said = lost(lab, "p0", "p1:8002")
    assert found.drop is not None
    assert found.drop.rule == "tcp dport 8002 drop"
    assert "nft delete rule inet filter mine handle" in said


@kernel
def test_a_cluster_ip_does_not_answer_ping(lab: Lab) -> None:
    _, said = lost(lab, "p0", "svc/remote", protocol="icmp")
    assert "does not answer ping" in said


@kernel
def test_of_several_ports_the_tcp_one_is_taken_and_named() -> None:
    from netlab.lab import lifecycle

    made = trace_lab()
    names = ServicePort(port=53, protocol="UDP", name="names", target_port=8002)
    first, *others = made.services
    web = replace(first.ports[0], name="web")
    ends = [
        replace(each, port_name="web") if each.service == first.name else each
        for each in made.endpoints
    ]
    services = (replace(first, ports=(names, web)), *others)
    made = replace(made, services=services, endpoints=tuple(ends))
    try:
        lifecycle.up(made)
        found = trace(made, Request("p0", "svc/remote"))
    finally:
        lifecycle.down(made.name)
    assert found.disposition == "delivered"
    assert (found.probe.protocol, found.probe.to) == ("tcp", "svc/remote:80")


def test_the_headline_breaks_between_question_and_answer() -> None:
    end = Socket(ip="10.244.1.2", port=1)
    made = Trace(
        lab="small",
        probe=Probe(
            from_="demo/client",
            to="svc/a-service-name",
            protocol="tcp",
            source=end,
            destination=end,
        ),
        disposition="delivered",
        delivered_to=None,
        seen_source=None,
        translations=[],
        drop=None,
        forward=[],
        reply=[],
        witnesses=Witnesses(packets="ok", rules="ok", conntrack="ok", kernel=None, decisions="ok"),
        elapsed_us=1500,
    )
    assert str(_headline(made, 80)).count("\n") == 0
    assert str(_headline(made, 50)).splitlines()[1] == "  1.5 ms"


def test_every_reason_stands_in_the_documentation() -> None:
    from netlab.trace import came_back, doubts, endings, findings, ipsec, link_layer, refusals, run
    from netlab.trace.witnesses import decisions

    said = set(decisions._REFUSALS.values()) | {code for code, _ in came_back._ERRORS.values()}
    said |= {ipsec.REASON, "blackhole", "forwarding-off", "dropped-by-rule", "rejected-by-rule"}
    for module in (came_back, doubts, endings, findings, link_layer, refusals, run):
        text = Path(module.__file__ or "").read_text()
        said |= set(re.findall(r'(?:Doubt\(\s*|reason=|reason = )"([a-z-]+)"', text))
    page = (Path(__file__).parents[1] / "docs" / "trace.md").read_text()
    table = page[page.index("| reason | what |") :]
    assert {"no-answer", "link-down", "port-closed", "unobserved"} <= said
    assert {reason for reason in said if f"`{reason}`" not in table} == set()
