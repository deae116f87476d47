"""The forms of a probe: its TTL, whose address it comes from, what it asks for above."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from labs import dual_stack_lab
from netlab.kernel.namespaces import entered
from netlab.kernel.packet_sockets import attach
from netlab.lab import lifecycle
from netlab.problems import Exit, NetlabError
from netlab.report.terminal import summary
from netlab.topology.model import Lab
from netlab.trace.aim import Request, aim
from netlab.trace.application import query, question, understood_dns
from netlab.trace.dissect import dissect, load
from netlab.trace.family import IPV4, IPV6, Family
from netlab.trace.form import Dns
from netlab.trace.mark import Mark
from netlab.trace.model import Trace
from netlab.trace.model_steps import Deliver, Rule
from netlab.trace.run import trace
from netlab.trace.witnesses.packets import program, watched_words
from test_trace_kernel import all_ok, in_node, places, run
from trace_labs import lab, namespace, trace_lab

__all__ = ["lab"]

kernel = pytest.mark.kernel


@pytest.fixture
def both() -> Iterator[Lab]:
    """A trace lab of both families that is up."""
    made = dual_stack_lab(trace_lab())
    try:
        lifecycle.up(made)
        yield made
    finally:
        lifecycle.down(made.name)


def delivered_at(found: Trace) -> str:
    """What the last step of the way back says."""
    last = found.reply[-1].steps[-1]
    assert isinstance(last, Deliver)
    return last.to


# --- TTL -----------------------------------------------------------------------------------------


@kernel
@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("protocol", ["tcp", "udp", "icmp"])
def test_a_ttl_runs_out_at_the_node_that_it_reaches(both: Lab, protocol: Any, family: Any) -> None:
    to = "p1" if protocol == "icmp" else "p1:8002"
    for ttl, node in ((1, "n1"), (2, "n2")):
        request = Request("p0", to, protocol=protocol, family=family, ttl=ttl)
        found = trace(both, request)
        assert found.forward[0].packet.ttl == ttl
        assert (found.disposition, found.drop and found.drop.reason) == ("rejected", "ttl")
        assert found.drop is not None
        assert (found.drop.node, found.drop.where) == (node, f"node {node}")
        assert (found.drop.fix or "").startswith("trace with a larger --ttl")
    found = trace(both, Request("p0", to, protocol=protocol, family=family, ttl=3))
    assert found.disposition == "delivered"
    assert [hop.packet.ttl for hop in found.forward][-1] == 1


# --- from another address ------------------------------------------------------------------------


@kernel
@pytest.mark.parametrize("protocol", ["tcp", "udp", "icmp"])
@pytest.mark.parametrize("family", [4, 6])
def test_the_answer_goes_to_who_has_the_address(both: Lab, protocol: Any, family: Any) -> None:
    (p2,) = [pod for pod in both.pods if pod.name == "p2"]
    address = p2.addresses[family == 6]
    to = "p1" if protocol == "icmp" else "p1:8002"
    found = trace(both, Request("p0", to, protocol=protocol, from_address=address))
    assert found.disposition == "delivered", found.drop
    assert all_ok(found)
    assert found.probe.spoofed
    assert found.probe.source.ip == address
    assert found.seen_source == found.probe.source
    assert places(found.forward) == ["demo:p0", "n1", "_switch", "n2", "demo:p1"]
    assert places(found.reply) == ["demo:p1", "n2", "_switch", "n1", "demo:p2"]
    assert delivered_at(found) == f"pod demo/p2, which has {address}"
    assert "to " + address in summary(found)


@kernel
def test_an_address_outside_is_masqueraded_and_its_answer_leaves_by_the_gateway(lab: Lab) -> None:
    found = trace(lab, Request("p0", "svc/remote", from_address="203.0.113.7"))
    assert found.disposition == "delivered"
    # ! -s 10.244.0.0/16
    assert [step.kind for step in found.translations] == ["dnat", "masquerade"]
    assert places(found.reply)[-2:] == ["n1", "_switch"]
    assert delivered_at(found) == "the underlay's gateway, the way to 203.0.113.7"


@kernel
def test_from_outside_one_comes_by_the_gateway() -> None:
    made = trace_lab()
    services = tuple(
        replace(service, type="NodePort", ports=(replace(service.ports[0], node_port=30080),))
        if service.name == "remote"
        else service
        for service in made.services
    )
    made = replace(made, services=services)
    try:
        lifecycle.up(made)
        beyond = trace(made, Request("203.0.113.9", "node/n1:30080"))
        gateway = trace(made, Request("172.21.32.1", "node/n1:30080", protocol="http"))
        pod = trace(made, Request("203.0.113.9", "p1:8002", timeout_s=0.3))
    finally:
        lifecycle.down(made.name)
    for found in (beyond, gateway):
        assert found.disposition == "delivered", found.drop
        assert places(found.forward) == ["_switch", "n1", "_switch", "n2", "demo:p1"]
        assert places(found.reply) == ["demo:p1", "n2", "_switch", "n1", "_switch"]
        assert [step.kind for step in found.translations] == ["dnat", "masquerade"]
    assert (beyond.probe.from_, beyond.probe.spoofed) == ("203.0.113.9", True)
    assert (gateway.probe.from_, gateway.probe.spoofed) == ("172.21.32.1", False)
    assert gateway.application is not None
    assert gateway.application.status == 200
    assert (pod.disposition, pod.drop and pod.drop.reason) == ("dropped", "no-route")


def _filter_sources(lab: Lab) -> None:
    in_node(lab, "n1", "sysctl", "net.ipv4.conf.all.rp_filter=1")


def _nothing(lab: Lab) -> None:
    pass


@kernel
@pytest.mark.parametrize(
    ("prepare", "address", "reason", "direction"),
    [
        # A node's own; another node's pod's, where n1 looks at that; nobody's
        (_nothing, "10.244.1.1", "martian", "forward"),
        (_filter_sources, "10.244.2.4", "reverse-path", "forward"),
        (_nothing, "10.244.2.77", "neighbour-unresolved", "forward"),
        # The request stays on n1, so that n2 never saw the SYN that this answers.
        (_nothing, "10.244.2.4", "conntrack-invalid", "reply"),
    ],
)
def test_what_is_lost_for_its_source_is_explained(
    lab: Lab, prepare: Callable[[Lab], None], address: str, reason: str, direction: str
) -> None:
    prepare(lab)
    to = "p2:8002" if reason == "conntrack-invalid" else "p1:8002"
    found = trace(lab, Request("p0", to, from_address=address, timeout_s=0.3))
    assert found.drop is not None
    assert found.disposition == "dropped"
    assert (found.drop.reason, found.drop.direction) == (reason, direction), found.drop


@kernel
@pytest.mark.parametrize("mode", ["iptables", "nftables"])
def test_source_ranges_are_tried_from_within_and_from_without(mode: str) -> None:
    made = trace_lab()
    balanced = {
        "type": "LoadBalancer",
        "load_balancer_ips": ("192.0.2.80",),
        "load_balancer_source_ranges": ("198.51.100.0/24",),
    }
    services = tuple(
        replace(service, **balanced, ports=(replace(service.ports[0], node_port=30080),))
        if service.name == "remote"
        else service
        for service in made.services
    )
    made = replace(made, services=services, service_proxy=replace(made.service_proxy, mode=mode))
    try:
        lifecycle.up(made)
        within = trace(made, Request("p0", "192.0.2.80:80", from_address="198.51.100.7"))
        without = trace(made, Request("p0", "192.0.2.80:80", from_address="203.0.113.7"))
    finally:
        lifecycle.down(made.name)
    assert within.disposition == "delivered", within.drop
    assert (without.disposition, without.drop and without.drop.node) == ("dropped", "n1")
    assert without.drop is not None
    assert "loadBalancerSourceRanges of svc/demo/remote" in without.drop.explanation


@kernel
def test_an_own_address_is_no_other(lab: Lab) -> None:
    found = trace(lab, Request("node/n1", "svc/remote", from_address="10.244.1.1"))
    assert found.disposition == "delivered"
    assert not found.probe.spoofed
    assert found.probe.source.ip == "10.244.1.1"


@kernel
def test_a_spoofed_probe_changes_no_setting(lab: Lab) -> None:
    def settings() -> str:
        words = ("sysctl", "net.ipv4.ip_nonlocal_bind", "net.ipv4.conf.all.accept_local")
        return in_node(lab, "n1", *words) + in_node(lab, "n1", "ip", "address")

    before = settings()
    trace(lab, Request("node/n1", "p1:8002", from_address="203.0.113.7"))
    assert settings() == before


# --- HTTP ----------------------------------------------------------------------------------------


class Server:
    """A program in a pod that speaks to one client after the other, or to one datagram."""

    def __init__(
        self, lab: Lab, pod: str, port: int, answer: Callable[[bytes], bytes], kind: int, v: int
    ) -> None:
        family = socket.AF_INET6 if v == 6 else socket.AF_INET
        with entered(namespace(lab, "demo", pod)):
            self.socket = socket.socket(family, kind)
        self.socket.bind(("", port))
        self._answer = answer
        if kind == socket.SOCK_STREAM:
            self.socket.listen()
        serve = self._accept if kind == socket.SOCK_STREAM else self._receive
        self.thread = threading.Thread(target=serve)
        self.thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.socket.accept()
                with client:
                    client.sendall(self._answer(client.recv(4096)))

    def _receive(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                data, client = self.socket.recvfrom(4096)
                if client is None:
                    return  # it was shut down
                self.socket.sendto(self._answer(data), client)

    def close(self) -> None:
        # Wakes accept and recvfrom, which close would not.
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.thread.join()
        self.socket.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """Start a server in a pod that ends with the test."""
    started: list[Server] = []

    def start(
        lab: Lab,
        pod: str,
        port: int,
        answer: Callable[[bytes], bytes],
        kind: int = socket.SOCK_STREAM,
        version: int = 4,
    ) -> Server:
        started.append(Server(lab, pod, port, answer, kind, version))
        return started[-1]

    yield start
    for each in started:
        each.close()


@kernel
@pytest.mark.parametrize("family", [4, 6])
def test_http_is_asked_behind_the_handshake(both: Lab, family: Any) -> None:
    request = Request("p0", "svc/remote", protocol="http", path="/echo?msg=hi", family=family)
    found = trace(both, request)
    assert found.disposition == "delivered"
    assert all_ok(found)
    assert found.probe.protocol == "tcp"
    assert [hop.packet.flags for hop in found.forward] == ["S"] * 12
    assert [hop.packet.flags for hop in found.reply] == ["SA"] * 12
    said = found.application
    assert said is not None
    assert (said.protocol, said.request) == ("http", "GET /echo?msg=hi HTTP/1.1")
    assert (said.status, said.answer, said.problem) == (200, "HTTP/1.1 200 OK", None)
    assert said.size > len("HTTP/1.1 200 OK")


@kernel
@pytest.mark.parametrize(
    ("answer", "status", "shown", "problem"),
    [
        (b"HTTP/1.0 503 Busy\r\n\r\n", 503, "HTTP/1.0 503 Busy", None),
        (b"SSH-2.0-x\x1b[1m\r\n", None, r"SSH-2.0-x\x1b[1m", "that is no answer of HTTP"),
        (b"", None, None, "the connection was closed without one"),
    ],
)
def test_what_is_answered_instead_of_a_page_is_told(
    lab: Lab,
    serve: Callable[..., Server],
    answer: bytes,
    status: int | None,
    shown: str | None,
    problem: str | None,
) -> None:
    serve(lab, "p1", 8080, lambda heard: answer)
    found = trace(lab, Request("p0", "p1:8080", protocol="http"))
    assert found.disposition == "delivered"
    said = found.application
    assert said is not None
    assert (said.status, said.answer, said.problem) == (status, shown, problem)


@kernel
def test_a_server_that_does_not_answer_http_is_told(lab: Lab, serve: Callable[..., Server]) -> None:
    over = threading.Event()

    def silent(heard: bytes) -> bytes:
        over.wait(30)
        return b""

    serve(lab, "p1", 8080, silent)
    found = trace(lab, Request("p0", "p1:8080", protocol="http", timeout_s=0.2))
    over.set()
    # The packet was delivered, whatever the program does.
    assert found.disposition == "delivered"
    assert found.application is not None
    assert found.application.problem == "no answer within 0.2 s"
    assert found.application.status is None


@kernel
def test_without_a_connection_nothing_is_asked(lab: Lab) -> None:
    found = trace(lab, Request("p0", "svc/empty", protocol="http"))
    assert (found.disposition, found.application) == ("rejected", None)


# --- DNS -----------------------------------------------------------------------------------------


def named(query: bytes) -> bytes:
    """An answer with one address of each family, for the name that is asked for."""
    load()
    from scapy.layers.dns import DNS, DNSRR

    asked = DNS(query)
    name = asked.qd[0].qname
    answers = [DNSRR(rrname=name, type=t, rdata=a) for t, a in ((1, "10.96.0.1"), (28, "fd00::1"))]
    return bytes(DNS(id=asked.id, qr=1, ra=1, qd=asked.qd, an=answers))


def nobody(query: bytes) -> bytes:
    """The answer that there is no such name, with the question in capitals."""
    return query[:2] + b"\x85\x83" + query[4:]


@kernel
@pytest.mark.parametrize(("family", "address"), [(4, "10.96.0.1"), (6, "fd00::1")])
def test_a_query_is_followed_there_and_its_answer_back(
    both: Lab, serve: Callable[..., Server], family: Any, address: str
) -> None:
    serve(both, "p1", 53, named, socket.SOCK_DGRAM, family)
    found = trace(both, Request("p0", "p1", protocol="dns", family=family))
    assert found.disposition == "delivered", found.drop
    assert all_ok(found)
    assert found.witnesses.kernel == "ok"
    assert (found.probe.protocol, found.probe.destination.port) == ("udp", 53)
    assert places(found.forward) == ["demo:p0", "n1", "_switch", "n2", "demo:p1"]
    assert places(found.reply) == ["demo:p1", "n2", "_switch", "n1", "demo:p0"]
    assert any(step.kind == "rule" for hop in found.forward for step in _tagged(hop.steps))
    said = found.application
    assert said is not None
    assert said.request.startswith("kubernetes.default.svc.cluster.local A")
    assert (said.status, said.answer, said.addresses) == (0, "NOERROR", [address])


def _tagged(steps: list[Any]) -> Iterator[Any]:
    for step in steps:
        yield type("Tagged", (), {"kind": type(step).__name__.lower()})


@kernel
def test_other_answers_to_a_query(lab: Lab, serve: Callable[..., Server]) -> None:
    serve(lab, "p1", 53, nobody, socket.SOCK_DGRAM)
    found = trace(lab, Request("p0", "p1", protocol="dns", query="No.Such.Name."))
    assert found.disposition == "delivered"
    assert found.application is not None
    assert found.application.request == "no.such.name A"
    assert (found.application.status, found.application.answer) == (3, "NXDOMAIN")
    echo = trace(lab, Request("p0", "svc/datagrams", protocol="dns", query="a.example"))
    assert echo.disposition == "delivered"
    assert echo.application is not None
    assert echo.application.problem == "what came back is no answer of DNS"
    closed = trace(lab, Request("p0", "p3", protocol="dns"))
    assert (closed.disposition, closed.drop and closed.drop.reason) == ("rejected", "port-closed")
    assert closed.application is not None
    assert closed.application.problem == os.strerror(111)


@kernel
def test_others_who_ask_the_same_are_left_out(lab: Lab, serve: Callable[..., Server]) -> None:
    """The same name, at the same server, at the same time, but with other numbers."""
    serve(lab, "p1", 53, named, socket.SOCK_DGRAM)
    stop = threading.Event()
    asked = Dns("kubernetes.default.svc.cluster.local")

    def ask() -> None:
        with entered(namespace(lab, "demo", "p0")):
            client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with client:
            client.connect(("10.244.2.2", 53))
            client.settimeout(5)
            while not stop.is_set():
                client.send(query(asked, Mark.of_query(question(asked, 4), IPV4), 4))
                client.recv(4096)

    asker = threading.Thread(target=ask)
    asker.start()
    try:
        found = [trace(lab, Request("p0", "p1", protocol="dns")) for _ in range(5)]
    finally:
        stop.set()
        asker.join()
    for each in found:
        assert each.disposition == "delivered"
        assert {hop.packet.sport for hop in each.forward} == {each.probe.source.port}
        assert (len(each.forward), len(each.reply)) == (12, 12)


_names = st.lists(
    st.text("abcdefghijklmnopqrstuvwxyz0123456789-_", min_size=1, max_size=63),
    min_size=1,
    max_size=3,
).map(".".join)


@given(_names, st.sampled_from([IPV4, IPV6]), st.binary(max_size=80))
def test_a_query_is_known_by_its_number_and_question(name: str, ip: Family, rest: bytes) -> None:
    layers = load()
    from scapy.layers.dns import DNS

    mark = Mark.of_query(question(Dns(name), ip.version), ip)
    sent = query(Dns(name), mark, ip.version)
    dissected = DNS(sent)
    assert dissected.qd[0].qname.decode() == f"{name}."
    inet = layers.inet.IP() if ip is IPV4 else layers.inet6.IPv6()
    frame = bytes(layers.l2.Ether() / inet / layers.inet.UDP(sport=40000, dport=53) / sent)
    found = dissect(frame, mark, 8472)
    assert found is not None
    assert (found.role, found.packet.dport) == ("either", 53)
    assert _kept(frame, program(watched_words(mark, b"canary..")))
    # Another number, another question
    number = bytes([sent[0] ^ 1]) + sent[1:]
    other = query(Dns(f"x{name}"[-60:]), mark, ip.version)
    for strange in (number, other, rest):
        if strange != sent:
            assert not mark.begins(strange)
    # Whatever is answered, something can be told of it.
    told = understood_dns(Dns(name), ip.version, sent[:2] + rest, None, 1)
    assert told.status is None or 0 <= told.status < 16


def _kept(frame: bytes, code: bytes) -> bool:
    """Whether a socket filter keeps a frame."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with near, far:
        attach(far, code)
        near.send(frame)
        far.setblocking(False)
        try:
            return bool(far.recv(4096))
        except BlockingIOError:
            return False


# --- fragments -----------------------------------------------------------------------------------


def fragments(found: Trace, leg: str = "forward") -> list[tuple[str, int | None]]:
    """Node and device of each hop, and in how many pieces the packet was seen there."""
    hops = found.forward if leg == "forward" else found.reply
    assert all(hop.packet.fragments is None or hop.packet.fragments.complete for hop in hops)
    return [
        (f"{hop.node} {hop.device}", hop.packet.fragments.count if hop.packet.fragments else None)
        for hop in hops
    ]


@kernel
@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("protocol", ["udp", "icmp"])
def test_fragments_are_followed_there_and_back(both: Lab, protocol: Any, family: Any) -> None:
    """In three pieces through veth and VXLAN, put together by the connection tracking of nodes."""
    to = "p1" if protocol == "icmp" else "svc/datagrams"
    request = Request("p0", to, protocol=protocol, family=family, size=4000, fragment=True)
    found = trace(both, request)
    assert found.disposition == "delivered", found.drop
    assert all_ok(found)
    assert found.witnesses.kernel == "ok"
    for leg, hops in (("forward", found.forward), ("reply", found.reply)):
        counts = fragments(found, leg)
        # The bridge device sees the whole packet, as PREROUTING on the bridge left it.
        assert counts[2][0].endswith("cbr0")
        assert hops[2].packet.length == 4000
        assert [count for _, count in counts] == [3, 3, None, *[3] * 9]
    assert found.forward[0].packet.length < 1500
    assert places(found.forward) == ["demo:p0", "n1", "_switch", "n2", "demo:p1"]


@kernel
def test_what_is_small_or_whole_has_no_fragments(lab: Lab) -> None:
    small = trace(lab, Request("p0", "p1:8002", protocol="udp", size=400, fragment=True))
    usual = trace(lab, Request("p0", "p1:8002", protocol="udp", size=1400))
    for found in (small, usual):
        assert found.disposition == "delivered"
        assert {count for _, count in fragments(found)} == {None}


@kernel
def test_a_size_that_may_not_be_fragmented_is_not(lab: Lab) -> None:
    found = trace(lab, Request("p0", "p1:8002", protocol="udp", size=4000, timeout_s=0.3))
    assert found.drop is not None
    assert found.drop.reason == "mtu"


@kernel
def test_a_lost_fragment_is_told(lab: Lab) -> None:
    """The network between the nodes loses what has no ports."""
    switch = namespace(lab, "_switch")
    chain = "{ type filter hook forward priority 0; }"
    # Inside VXLAN: the inner packet's offset of fragments
    later = "udp dport 8472 @th,288,16 & 0x1fff != 0 drop"
    commands = f"add table bridge t; add chain bridge t c {chain}; add rule bridge t c {later}"
    run("ip", "netns", "exec", switch, "nft", commands)
    request = Request("p0", "p1:8002", protocol="udp", size=4000, fragment=True, timeout_s=0.3)
    found = trace(lab, request)
    assert found.disposition == "dropped"
    assert found.drop is not None
    assert (found.drop.reason, found.drop.direction) == ("fragment-lost", "forward")
    assert found.drop.where == "n1 of the underlay switch"
    last = found.forward[-1].packet.fragments
    assert last is not None
    assert (last.count, last.complete) == (1, False)


@kernel
def test_fragments_that_are_kept_from_their_reassembly_are_told(lab: Lab) -> None:
    in_node(lab, "n2", "nft", "add table ip early")
    in_node(lab, "n2", "nft", "add chain ip early c { type filter hook prerouting priority -450; }")
    in_node(lab, "n2", "nft", "add rule ip early c ip frag-off & 0x1fff != 0 drop")
    request = Request("p0", "p1:8002", protocol="udp", size=4000, fragment=True, timeout_s=0.3)
    found = trace(lab, request)
    assert found.disposition == "dropped"
    assert found.drop is not None
    assert (found.drop.reason, found.drop.node) == ("fragment-lost", "n2")
    assert found.drop.device == "flannel.1"
    assert "were not put together there" in found.drop.explanation
    assert "nft list chain ip early c" in str(found.drop.fix)
    in_node(lab, "n2", "nft", "delete table ip early")
    assert trace(lab, request).delivered
    in_node(lab, "n1", "nft", "add table bridge early")
    in_node(
        lab, "n1", "nft", "add chain bridge early c { type filter hook prerouting priority -9; }"
    )
    in_node(lab, "n1", "nft", "add rule bridge early c ip frag-off & 0x1fff != 0 drop")
    found = trace(lab, request)
    assert (found.reason, found.lost_on) == ("fragment-lost", "n1")


_cuts = st.lists(st.integers(1, 400), max_size=6, unique=True).map(sorted)


@given(_cuts, st.sampled_from([IPV4, IPV6]), st.booleans(), st.randoms())
def test_pieces_of_a_packet_are_counted(
    cuts: list[int], ip: Family, tunnelled: bool, random: Any
) -> None:
    layers = load()
    from netlab.trace.witnesses.fragments import counted, later_pieces, piece_of

    length, number = 8 * 401, random.randrange(1 << 16)
    bounds = [0, *(8 * cut for cut in cuts), length]
    frames = []
    for begin, end in pairwise(bounds):
        more = end < length
        if ip is IPV4:
            header = layers.inet.IP(id=number, flags="MF" if more else 0, frag=begin // 8, proto=17)
        else:
            header = layers.inet6.IPv6(nh=44) / layers.inet6.IPv6ExtHdrFragment(
                nh=17, id=number, offset=begin // 8, m=more
            )
        frame = layers.l2.Ether() / header / bytes(end - begin)
        if tunnelled:
            outer = layers.inet.IP() if ip is IPV4 else layers.inet6.IPv6()
            frame = (
                layers.l2.Ether()
                / outer
                / layers.inet.UDP(dport=8472)
                / layers.vxlan.VXLAN()
                / frame
            )
        frames.append(bytes(frame))
    pieces = [piece_of(frame, 8472) for frame in frames]
    if not cuts:
        # IPv6 may carry a fragment header on a whole packet.
        assert pieces[0] is None or counted({pieces[0]}).complete
        return
    assert len({piece.key for piece in pieces if piece}) == 1
    found = counted({piece for piece in pieces if piece})
    assert (found.count, found.complete) == (len(cuts) + 1, True)
    missing = random.randrange(len(pieces))
    left = counted({piece for i, piece in enumerate(pieces) if piece and i != missing})
    assert (left.count, left.complete) == (len(cuts), False)
    mark = Mark("udp", b"8 bytes.", ip, fragmented=True)
    kept = program(watched_words(mark, b"canary.."), later_pieces(ip))
    assert [_kept(frame, kept) for frame in frames] == [False] + [True] * len(cuts)
    for at in range(len(frames[0])):
        piece_of(frames[0][:at], 8472)  # cut short, and no error


# --- others with the same tuple ------------------------------------------------------------------


@pytest.fixture
def beside() -> Iterator[Callable[[Callable[[], None]], None]]:
    """Do something again and again beside the test; it has been done once when this returns."""
    over = threading.Event()
    threads = []

    def start(work: Callable[[], None]) -> None:
        begun = threading.Event()

        def repeat() -> None:
            while not over.is_set():
                work()
                begun.set()

        threads.append(threading.Thread(target=repeat))
        threads[-1].start()
        assert begun.wait(10)

    yield start
    over.set()
    for thread in threads:
        thread.join()


def datagrams_of_another(lab: Lab, port: int, destination: str) -> Callable[[], None]:
    """Send datagrams from p0 as a socket with this port would that is not ours."""
    inet = load().inet
    datagram = inet.UDP(sport=port, dport=8002) / b"other"
    packet = bytes(inet.IP(src="10.244.1.2", dst=destination) / datagram)

    def send() -> None:
        with entered(namespace(lab, "demo", "p0")):
            raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
        with raw:
            raw.sendto(packet, (destination, 0))
        time.sleep(0.001)  # more than a thousand a second would fill the probe's own socket

    return send


@kernel
def test_datagrams_with_the_same_tuple_do_not_mix_in(lab: Lab, beside: Any) -> None:
    beside(datagrams_of_another(lab, 40000, "10.244.2.2"))
    request = Request("p0", "p1:8002", protocol="udp", source_port=40000)
    for _ in range(3):
        found = trace(lab, request)
        assert found.disposition == "delivered"
        assert (len(found.forward), len(found.reply)) == (12, 12)
        assert {hop.packet.length for hop in (*found.forward, *found.reply)} == {36}
        assert len([s for hop in found.forward for s in hop.steps if isinstance(s, Rule)]) < 40


@kernel
def test_an_answer_to_another_with_the_same_tuple_is_none_to_the_probe(
    lab: Lab, beside: Any
) -> None:
    """The others' datagrams get through and are answered, the probe does not."""
    in_node(lab, "n2", "iptables", "-I", "FORWARD", "-m", "length", "--length", "500", "-j", "DROP")
    beside(datagrams_of_another(lab, 40000, "10.244.2.2"))
    request = Request("p0", "p1:8002", protocol="udp", source_port=40000, size=500, timeout_s=0.4)
    found = trace(lab, request)
    assert found.disposition == "dropped"
    assert found.drop is not None
    assert (found.drop.reason, found.drop.node) == ("dropped-by-rule", "n2")
    assert found.reply == []


@kernel
def test_an_answer_without_the_cookie_counts(lab: Lab, serve: Callable[..., Server]) -> None:
    """At once to a port of its own, at the end of the wait to one that others may use."""
    serve(lab, "p1", 9000, lambda heard: b"pong", socket.SOCK_DGRAM)
    own = trace(lab, Request("p0", "p1:9000", protocol="udp"))
    shared = trace(lab, Request("p0", "p1:9000", protocol="udp", source_port=40005, timeout_s=0.3))
    assert (own.disposition, shared.disposition) == ("delivered", "delivered")
    assert own.elapsed_us < 300_000 <= shared.elapsed_us


@kernel
def test_on_the_command_line(lab: Lab) -> None:
    def netlab(*words: str) -> subprocess.CompletedProcess[str]:
        command = str(Path(sys.executable).parent / "netlab")
        whole = [command, "trace", "--lab", lab.name, *words]
        return subprocess.run(whole, capture_output=True, text=True, check=False)

    asked = netlab("p0", "svc/remote", "--protocol", "http", "--path", "/hostname")
    assert asked.returncode == Exit.YES
    assert "HTTP: GET /hostname HTTP/1.1: HTTP/1.1 200 OK, " in asked.stdout
    found = json.loads(netlab("p0", "p1", "--protocol", "http", "-o", "json").stdout)
    assert (found["probe"]["protocol"], found["application"]["status"]) == ("tcp", 200)
    ended = netlab("p0", "p1:8002", "--ttl", "1", "--protocol", "udp")
    assert ended.returncode == Exit.NO
    assert "found the time to live used up, which was 1 as asked for" in ended.stdout
    size = ("--size", "3000", "--fragment")
    pieces = netlab("p0", "p1:8002", "--protocol", "udp", *size)
    assert pieces.returncode == Exit.YES
    assert "(3 fragments)" in pieces.stdout
    assert "(one piece)" in pieces.stdout
    spoofed = netlab("p0", "p1:8002", "--from-address", "10.244.1.3")
    assert spoofed.returncode == Exit.YES
    assert "✓ delivered to pod demo/p2, which has 10.244.1.3" in spoofed.stdout
    for words in (("--ttl", "0"), ("--from-address", "fd00::1"), ("--protocol", "dns", *size)):
        wrong = netlab("p0", "p1", *words)
        assert (wrong.returncode, wrong.stdout) == (Exit.USAGE, "")
        assert wrong.stderr.startswith("error[")


@kernel
def test_a_client_with_the_same_port_and_connections_that_are_tried_again(
    lab: Lab, beside: Any
) -> None:
    """To another Service, and to the same one from other ports, while it cannot be reached."""

    def talk() -> None:
        with entered(namespace(lab, "demo", "p0")):
            other = socket.socket()
        with other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # The next connection may have the port at once.
            other.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            other.bind(("", 40001))
            other.settimeout(5)
            with contextlib.suppress(OSError):
                other.connect(("10.99.0.2", 80))

    beside(talk)
    for _ in range(3):
        found = trace(lab, Request("p0", "svc/remote", source_port=40001))
        assert found.disposition == "delivered", found.drop
        assert {str(hop.packet.flow.source) for hop in found.forward} == {"10.244.1.2:40001"}
        assert (len(found.forward), len(found.reply)) == (12, 12)


@kernel
def test_a_port_of_a_connection_that_was_just_closed(lab: Lab) -> None:
    """It is in TIME_WAIT: who has left it for others hands its sequence number on, too."""
    for port, reused in ((40002, 0), (40003, 1)):
        with entered(namespace(lab, "demo", "p0")):
            other = socket.socket()
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reused)
        other.bind(("", port))
        other.connect(("10.99.0.1", 80))
        other.close()
    found = trace(lab, Request("p0", "svc/remote", source_port=40002))
    assert found.drop is not None
    assert (found.disposition, found.drop.reason) == ("dropped", "port-in-use")
    found = trace(lab, Request("p0", "svc/remote", source_port=40003))
    assert found.drop is not None
    assert found.disposition == "unobserved"
    assert "TIME_WAIT" in found.drop.explanation
    for _ in range(2):
        found = trace(lab, Request("p0", "svc/remote", source_port=40004))
        assert (found.disposition, len(found.forward)) == ("delivered", 12)


@kernel
def test_a_probe_is_given_up_before_it_is_sent_again(lab: Lab) -> None:
    """Others' SYNs are sent again meanwhile."""
    # It waits on n2 for a MAC that nobody tells, and is not dropped.
    run("ip", "-n", namespace(lab, "demo", "p1"), "link", "set", "eth0", "arp", "off")
    in_node(lab, "n2", "ip", "neigh", "flush", "dev", "cbr0")
    with entered(namespace(lab, "demo", "p0")):
        other = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    with other:
        other.connect_ex(("10.244.2.2", 8002))
        found = trace(lab, Request("p0", "p1:8002", timeout_s=0.95))
    assert found.disposition == "dropped"
    assert found.drop is not None
    assert found.drop.reason == "neighbour-unresolved"
    assert len(found.forward) == 9
    assert {hop.packet.sport for hop in found.forward} == {found.probe.source.port}


@kernel
def test_pings_at_the_same_time_do_not_mix(lab: Lab) -> None:
    with ThreadPoolExecutor() as pool:
        traces = pool.map(lambda _: trace(lab, Request("p0", "p1", protocol="icmp")), range(4))
    for found in traces:
        assert found.disposition == "delivered"
        assert (len(found.forward), len(found.reply)) == (12, 12)


# --- what cannot be meant ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (Request("p0", "p1", ttl=0), "bad-ttl"),
        (Request("p0", "p1", ttl=256), "bad-ttl"),
        (Request("p0", "p1", from_address="fd00::1"), "no-address"),
        (Request("p0", "10.244.2.2", from_address="fd00::1"), "two-families"),
        (Request("p0", "p1", from_address="p2"), "bad-address"),
        (Request("p0", "p1", from_address="10.0.0.0/8"), "bad-address"),
        (Request("p0", "p1", from_address="224.0.0.1"), "bad-address"),
        (Request("p0", "p1", from_address="127.0.0.1"), "bad-address"),
        (Request("p0", "p1", from_address="fe80::1"), "no-address"),
        (Request("127.0.0.1", "node/n1"), "bad-address"),
        (Request("0.0.0.0", "node/n1"), "bad-address"),
        (Request("10.244.9.9", "node/n1"), "bad-source"),
        (Request("2001:db8::1", "node/n1"), "no-address"),
        (Request("p0", "p1", from_address="10.244.1.3", protocol="http"), "answer-elsewhere"),
        (Request("p0", "p1", from_address="10.244.1.3", protocol="dns"), "answer-elsewhere"),
        (Request("p0", "svc/datagrams", protocol="http"), "other-transport"),
        (Request("p0", "svc/remote", protocol="dns"), "other-transport"),
        (Request("p0", "svc/remote", protocol="http", size=100), "tcp-size"),
        (Request("p0", "p1", protocol="dns", size=100), "dns-size"),
        (Request("p0", "p1", protocol="tcp", path="/"), "path-without-http"),
        (Request("p0", "p1", protocol="http", path="x"), "bad-path"),
        (Request("p0", "p1", protocol="http", path="/a b"), "bad-path"),
        (Request("p0", "p1", protocol="http", path="/\r\nHost: x"), "bad-path"),
        (Request("p0", "p1", protocol="http", query="x"), "query-without-dns"),
        (Request("p0", "p1", protocol="dns", query=""), "bad-name"),
        (Request("p0", "p1", protocol="dns", query="a..b"), "bad-name"),
        (Request("p0", "p1", protocol="dns", query="a" * 64), "bad-name"),
        (Request("p0", "p1", protocol="dns", query=".".join(["a" * 60] * 5)), "bad-name"),
        (Request("p0", "p1", protocol="dns", query="ä.example"), "bad-name"),
        (Request("p0", "p1", protocol="udp", fragment=True), "nothing-to-fragment"),
        (Request("p0", "p1", protocol="tcp", fragment=True, size=3000), "tcp-size"),
        (Request("p0", "p1", protocol="http", timeout_s=2), "timeout-too-long"),
    ],
)
def test_forms_that_cannot_be_meant(request_: Request, code: str) -> None:
    with pytest.raises(NetlabError) as raised:
        aim(trace_lab("some"), request_)
    assert raised.value.exit_code == Exit.USAGE
    assert [problem.code for problem in raised.value.problems] == [code]


def test_usual_ports() -> None:
    made = trace_lab("some")
    assert aim(made, Request("p0", "10.9.9.9", protocol="http")).port == 80
    assert aim(made, Request("p0", "p1", protocol="http")).port == 8002
    assert aim(made, Request("p0", "p1", protocol="dns")).port == 53
    assert aim(made, Request("p0", "svc/datagrams", protocol="dns")).port == 80
    assert aim(made, Request("p0", "p1:99", protocol="http")).port == 99
