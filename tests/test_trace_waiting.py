"""`netlab trace --watch`: the traffic of others, traced without a packet of our own."""

from __future__ import annotations

import contextlib
import multiprocessing
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from labs import ipv6_lab
from netlab.kernel.namespaces import entered
from netlab.kernel.packet_sockets import WHOLE
from netlab.kernel.pcap_filter import Filter
from netlab.kernel.skb_events import Pattern
from netlab.lab import lifecycle
from netlab.problems import Exit, NetlabError
from netlab.topology.model import Lab
from netlab.trace.aim import Request
from netlab.trace.dissect import load
from netlab.trace.family import IPV4, IPV6, Family
from netlab.trace.model import Trace
from netlab.trace.model_steps import Rule
from netlab.trace.openings import patterns, pcap, pcap_opening, pcap_tunnelled
from netlab.trace.place import Place
from netlab.trace.run import Recorded, trace
from netlab.trace.waiting import Wait, trace_next
from test_cli import netlab
from test_trace_kernel import all_ok, in_node, places
from trace_labs import lab, namespace, trace_lab

__all__ = ["lab"]

REMOTE, EMPTY = "10.99.0.1", "10.99.0.4"


def connect(lab: Lab, pod: str, address: str, port: int = 80, wait_s: float = 5.0) -> None:
    """What a client does, whatever comes of it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with entered(namespace(lab, "demo", pod)):
        client = socket.socket(family)
    with client, contextlib.suppress(OSError):
        client.settimeout(wait_s)
        client.connect((address, port))


def ping(lab: Lab, pod: str, address: str, wait_s: float = 5.0) -> None:
    """An echo request of the kernel's own ICMP sockets."""
    with entered(namespace(lab, "demo", pod)):
        Path("/proc/sys/net/ipv4/ping_group_range").write_text("0 0")
        client = socket.socket(type=socket.SOCK_DGRAM, proto=socket.IPPROTO_ICMP)
    with client:
        client.settimeout(wait_s)
        client.sendto(b"\x08\0\0\0\0\0\0\1" + b"something", (address, 0))
        client.recv(1024)


def watched(lab: Lab, wait: Wait, act: Callable[[], None]) -> tuple[Trace, list[Recorded]]:
    """The trace of what `act` does as soon as all witnesses watch."""
    recorded: list[Recorded] = []
    acting = threading.Thread(target=act)

    def armed(place: Place) -> None:
        acting.start()

    try:
        return trace_next(lab, replace(wait, wait_s=20), recorded, armed), recorded
    finally:
        acting.join()


def met(found: Trace) -> list[tuple[str | None, str, str, int, bool]]:
    """The rules that a packet met on its way there, node by node."""
    return [
        (hop.node, step.table, step.chain, step.handle, step.outer)
        for hop in found.forward
        for step in hop.steps
        if isinstance(step, Rule)
    ]


@pytest.mark.kernel
def test_the_first_packet_of_a_connection_is_traced_with_all_witnesses(lab: Lab) -> None:
    wait = Wait("p0", "tcp dst port 80")
    found, recorded = watched(lab, wait, lambda: connect(lab, "p0", REMOTE))
    assert found.disposition == "delivered", found.drop
    assert all_ok(found)
    assert found.witnesses.kernel == "ok"
    assert places(found.forward) == ["demo:p0", "n1", "_switch", "n2", "demo:p1"]
    assert places(found.reply) == ["demo:p1", "n2", "_switch", "n1", "demo:p0"]
    assert found.probe.to == "svc/demo/remote:80"
    assert [str(step.after) for step in found.translations] == ["10.244.2.2:8002"]
    assert met(found) == met(trace(lab, Request("p0", "svc/remote")))
    assert len(recorded) == len(found.forward) + len(found.reply)


@pytest.mark.kernel
def test_what_others_send_and_what_the_filter_leaves_out_does_not_mix_in(lab: Lab) -> None:
    def crowd() -> None:
        while True:
            time.sleep(0.05)
            connect(lab, "p2", REMOTE)
            connect(lab, "p3", "10.244.2.2", 8002)
            connect(lab, "p0", "10.244.2.2", 8002)

    # Of its own interpreter, which would else wait for ours.
    crowding = multiprocessing.get_context("fork").Process(target=crowd, daemon=True)
    crowding.start()
    try:
        wait = Wait("p0", f"dst host {REMOTE}")
        found, recorded = watched(lab, wait, lambda: connect(lab, "p0", REMOTE))
    finally:
        crowding.kill()
        crowding.join()
    assert found.disposition == "delivered", found.drop
    assert all_ok(found), found.witnesses
    assert places(found.forward) == ["demo:p0", "n1", "_switch", "n2", "demo:p1"]
    assert found.probe.destination.ip == REMOTE
    sources = {found.probe.source.port, 80, 8002}
    assert {each.sighting.packet.sport for each in recorded} <= sources
    assert met(found) == met(trace(lab, Request("p0", "svc/remote")))


@pytest.mark.kernel
def test_a_ping_is_traced(lab: Lab) -> None:
    found, _ = watched(lab, Wait("p0", "icmp"), lambda: ping(lab, "p0", "10.244.2.2"))
    assert found.disposition == "delivered", found.drop
    assert all_ok(found)
    assert (found.probe.protocol, found.probe.to) == ("icmp", "10.244.2.2")
    # (Of two pings between the same pods the tunnel makes one connection.)
    probe = trace(lab, Request("p0", "p1", protocol="icmp"))
    assert [rule for rule in met(found) if not rule[-1]] == [r for r in met(probe) if not r[-1]]
    assert [hop.packet.icmp for hop in found.reply][:1] == ["echo-reply"]


@pytest.mark.kernel
def test_a_refusal_is_explained(lab: Lab) -> None:
    found, _ = watched(lab, Wait("p0"), lambda: connect(lab, "p0", EMPTY))
    assert (found.disposition, found.drop and found.drop.reason) == ("rejected", "no-endpoints")


@pytest.mark.kernel
def test_of_what_is_sent_twice_the_loss_is_explained(lab: Lab) -> None:
    in_node(lab, "n2", "iptables", "-I", "FORWARD", "-p", "tcp", "--dport", "8002", "-j", "DROP")

    def clients() -> None:
        connect(lab, "p0", "10.99.0.2")  # which is answered, so that it is not meant
        connect(lab, "p0", REMOTE, wait_s=2.5)

    found, _ = watched(lab, Wait("p0", lost=True), clients)
    assert found.disposition == "dropped"
    assert found.drop is not None
    assert (found.drop.reason, found.drop.node) == ("dropped-by-rule", "n2")
    assert found.probe.to == "svc/demo/remote:80"
    # It is another packet for connection tracking, which had forgotten the first.
    assert [step.kind for step in found.translations] == ["dnat"]


@pytest.mark.kernel
def test_over_ipv6() -> None:
    made = ipv6_lab(trace_lab())
    try:
        lifecycle.up(made)
        address = made.services[0].cluster_ip
        found, _ = watched(made, Wait("p0"), lambda: connect(made, "p0", address))
    finally:
        lifecycle.down(made.name)
    assert found.disposition == "delivered", found.drop
    assert all_ok(found)
    assert places(found.forward) == ["demo:p0", "n1", "_switch", "n2", "demo:p1"]


@pytest.mark.kernel
def test_of_a_node_its_own_connections_count(lab: Lab) -> None:
    def clients() -> None:
        connect(lab, "p0", REMOTE)
        with entered(namespace(lab, "n1")), socket.socket() as client:
            client.settimeout(5)
            client.connect((REMOTE, 80))

    found, _ = watched(lab, Wait("node/n1"), clients)
    assert found.disposition == "delivered", found.drop
    assert found.probe.from_ == "n1"
    assert [step.kind for step in found.translations] == ["dnat", "masquerade"]


SYN, SYN_ACK, ACK, RST = "S", "SA", "A", "RA"


@pytest.mark.parametrize("family", [IPV4, IPV6], ids=lambda family: family.name)
def test_three_languages_say_the_same_of_a_packet(family: Family) -> None:
    layers = load()
    inet, inet6, l2, vxlan = layers.inet, layers.inet6, layers.l2, layers.vxlan
    ip = inet.IP if family is IPV4 else inet6.IPv6
    ends = ("10.0.0.1", "10.0.0.2") if family is IPV4 else ("fd00::1", "fd00::2")
    head = ip(src=ends[0], dst=ends[1])
    asked, gone, other = (
        (inet.ICMP(), inet.ICMP(type=3), inet.ICMP(type=13))
        if family is IPV4
        else (inet6.ICMPv6EchoRequest(), inet6.ICMPv6DestUnreach(), inet6.ICMPv6ND_NS())
    )
    bodies = [
        *(
            (inet.TCP(flags=flags), flags in (SYN, SYN_ACK, RST))
            for flags in (SYN, SYN_ACK, ACK, RST)
        ),
        (asked / b"data", True),
        (gone / b"data", True),
        (inet.UDP(dport=53) / bytes(60), False),
    ]
    opening = Filter(pcap_opening(family), WHOLE)
    plain, carried = Filter(pcap(family), WHOLE), Filter(pcap_tunnelled(family, 8472), WHOLE)
    bpf = patterns(family, 8472)
    for body, wanted in bodies:
        frame = l2.Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02") / head / body
        tunnel = head / inet.UDP(dport=8472) / vxlan.VXLAN(vni=1) / frame
        outer = l2.Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02") / tunnel
        assert plain.matches(bytes(frame)) is wanted, frame.summary()
        assert carried.matches(bytes(outer)) is wanted, frame.summary()
        assert not plain.matches(bytes(outer))
        for each in (frame, outer):
            assert any(holds(pattern, bytes(each)[14:]) for pattern in bpf) is wanted
        is_first = body is bodies[0][0] or body is bodies[4][0]
        assert opening.matches(bytes(frame)) is is_first
    assert not any(holds(pattern, bytes(head / other)) for pattern in bpf)
    with_datagrams = patterns(family, 8472, datagrams=True)
    plain, opening = (Filter(each(family, 8472), WHOLE) for each in (pcap, pcap_opening))
    carried = Filter(pcap_tunnelled(family, 8472, datagrams=True), WHOLE)
    ether = l2.Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02")
    for port in (53, 8472, 8473, 65535):
        frame = ether / head / inet.UDP(dport=port) / bytes(60)
        inside = ether / head / inet.UDP(dport=8472) / vxlan.VXLAN(vni=1) / frame
        wanted = port != 8472
        assert plain.matches(bytes(frame)) is opening.matches(bytes(frame)) is wanted
        assert any(holds(pattern, bytes(frame)[14:]) for pattern in with_datagrams) is wanted
        assert carried.matches(bytes(inside))
        assert any(holds(pattern, bytes(inside)[14:]) for pattern in with_datagrams)


def holds(pattern: Pattern, packet: bytes) -> bool:
    """What the program of BPF does."""
    return all(
        int.from_bytes(packet[half.offset : half.offset + 2], "big") & half.mask == half.value
        for half in pattern
    )


@pytest.mark.kernel
def test_none_in_time_is_not_observed(lab: Lab) -> None:
    done = netlab("trace", "p0", "--watch", "--timeout", "0.3", "--lab", lab.name)
    assert done.returncode == Exit.UNOBSERVED
    assert "waiting for pod demo/p0 to send" in done.stderr
    assert "pod demo/p0 opened no TCP connection and sent no ping in 0.3 s" in done.stderr


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("p0",), "a probe needs a DST"),
        (("p0", "p1", "--dropped"), "--dropped tells --watch what to wait for"),
        (("p0", "p1", "--watch", "tcp"), "only SRC goes with --watch"),
        (("p0", "--watch", "tcp prt 80"), '"tcp prt 80" is no filter'),
        (("svc/remote", "--watch", "tcp"), "cannot send a probe"),
    ],
)
def test_what_cannot_be_meant(lab: Lab, arguments: tuple[str, ...], said: str) -> None:
    done = netlab("trace", *arguments, "--lab", lab.name)
    assert done.returncode == 2
    assert said in done.stderr


@pytest.mark.kernel
def test_a_family_that_the_lab_lacks_is_an_error(lab: Lab) -> None:
    with pytest.raises(NetlabError, match="has no IPv6"):
        trace_next(lab, Wait("p0", family=6))


def send_datagram(lab: Lab, pod: str, address: str, port: int, data: bytes, times: int = 1) -> None:
    """Datagrams of one socket, a quarter of a second apart, whatever comes back."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with entered(namespace(lab, "demo", pod)):
        client = socket.socket(family, socket.SOCK_DGRAM)
    with client:
        client.settimeout(0.25)
        client.connect((address, port))
        for _ in range(times):
            with contextlib.suppress(ConnectionRefusedError, TimeoutError):
                client.send(data)
                client.recv(1024)


@pytest.mark.kernel
def test_a_datagram_is_traced_with_all_witnesses(lab: Lab) -> None:
    wait = Wait("p0", "udp dst port 80")

    def clients() -> None:
        send_datagram(lab, "p2", "10.99.0.5", 80, b"of somebody else")
        send_datagram(lab, "p0", "10.244.2.2", 8002, b"to another port")
        send_datagram(lab, "p0", "10.99.0.5", 80, b"what is asked for")

    found, recorded = watched(lab, wait, clients)
    assert found.disposition == "delivered", found.drop
    assert all_ok(found)
    assert found.witnesses.kernel == "ok"
    assert (found.probe.protocol, found.probe.to) == ("udp", "svc/demo/datagrams:80")
    assert places(found.forward) == ["demo:p0", "n1", "_switch", "n2", "demo:p1"]
    assert places(found.reply) == ["demo:p1", "n2", "_switch", "n1", "demo:p0"]
    assert [str(step.after) for step in found.translations] == ["10.244.2.2:8002"]
    assert met(found) == met(trace(lab, Request("p0", "svc/datagrams")))
    assert len(recorded) == len(found.forward) + len(found.reply)


@pytest.mark.kernel
def test_a_lost_datagram_is_one_that_follows_another_without_an_answer(lab: Lab) -> None:
    in_node(lab, "n2", "iptables", "-I", "FORWARD", "-d", "10.244.2.3", "-j", "DROP")

    def clients() -> None:
        send_datagram(lab, "p0", "10.99.0.5", 80, b"answered by it", times=3)
        send_datagram(lab, "p0", "10.244.2.2", 99, b"refused by it", times=3)
        send_datagram(lab, "p0", "10.244.2.3", 8002, b"dropped by it", times=3)

    found, _ = watched(lab, Wait("p0", "udp", lost=True), clients)
    assert found.disposition == "dropped"
    assert found.drop is not None
    assert (found.drop.reason, found.drop.node) == ("dropped-by-rule", "n2")
    assert found.probe.to == "10.244.2.3:8002"


@pytest.mark.kernel
def test_a_lost_ping_is_one_that_follows_another_without_an_answer(lab: Lab) -> None:
    in_node(lab, "n2", "iptables", "-I", "FORWARD", "-d", "10.244.2.3", "-j", "DROP")

    def clients() -> None:
        for address in ("10.244.2.2", "10.244.2.3"):
            for _ in range(3):
                with contextlib.suppress(TimeoutError):
                    ping(lab, "p0", address, wait_s=0.25)

    found, _ = watched(lab, Wait("p0", lost=True), clients)
    assert (found.disposition, found.probe.to) == ("dropped", "10.244.2.3")
    assert found.reason == "dropped-by-rule"


@pytest.mark.kernel
def test_a_query_is_known_by_its_number_and_its_question(lab: Lab) -> None:
    query = b"\x12\x34\x01\0\0\1\0\0\0\0\0\0\4name\4test\0\0\1\0\1"

    def client() -> None:
        send_datagram(lab, "p0", "10.244.2.2", 53, query)

    found, _ = watched(lab, Wait("p0", "udp port 53"), client)
    assert (found.disposition, found.reason) == ("rejected", "port-closed")
    assert found.probe.destination.port == 53
    assert places(found.forward) == ["demo:p0", "n1", "_switch", "n2", "demo:p1"]
