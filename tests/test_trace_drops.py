"""What the kernel itself says of lost packets: reasons and places, and what is made of them."""

from __future__ import annotations

import os
import socket
from collections import Counter

import msgspec
import pytest

from netlab.kernel import bpf, skb_events, tracefs
from netlab.kernel.namespaces import entered
from netlab.topology.model import Lab
from netlab.trace.aim import Request
from netlab.trace.model import Trace
from netlab.trace.place import Place
from netlab.trace.run import trace
from netlab.trace.witnesses.kernel import Kernel, Moment, traced
from netlab.trace.witnesses.packets import Packets
from test_trace_kernel import in_node
from test_trace_losses import in_pod
from trace_labs import lab, namespace
from trace_records import read, retold

__all__ = ["lab"]

kernel = pytest.mark.kernel


# --- from records --------------------------------------------------------------------------------


def test_a_drop_that_nothing_else_explains_is_told_in_the_kernels_word() -> None:
    _, explained = retold(read("kernel-drop"))
    drop = explained.drop
    assert drop is not None
    assert (drop.reason, drop.node, drop.device) == ("dropped-by-rule", "n2", "eth0")
    assert drop.where == "eth0 of pod demo/p1"
    assert drop.evidence[0] == (
        "the kernel dropped it on eth0 of pod demo/p1: NETFILTER_DROP in nft_do_chain"
    )
    assert "ip netns exec recorded:demo:p1 nft list ruleset" in (drop.fix or "")


def test_without_the_kernels_word_the_same_drop_is_not_known() -> None:
    record = read("kernel-drop")
    record.moments = []
    _, explained = retold(record)
    assert explained.drop is not None
    assert explained.drop.reason == "no-answer"


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        ("NO_TX_TARGET", "NO_TX_TARGET in vxlan_xmit"),
        ("NETFILTER_DROP", "NETFILTER_DROP in vxlan_xmit, which means something else"),
        ("OTHERHOST", None),
    ],
)
def test_the_kernels_word_stands_beside_what_the_tables_say(reason: str, told: str | None) -> None:
    record = read("fdb-missing")
    last = record.sightings[-1]
    record.moments = [
        Moment(
            "drop",
            last.place,
            1,
            "flannel.1",
            1,
            reason,
            "vxlan_xmit+0x1/0x2",
            last.packet,
            "probe",
        )
    ]
    _, explained = retold(record)
    assert explained.drop is not None
    assert explained.drop.reason == "fdb-missing"
    words = [each for each in explained.drop.evidence if each.startswith("the kernel dropped")]
    assert words == ([f"the kernel dropped it on flannel.1 of node n1: {told}"] if told else [])


def test_a_reason_without_a_meaning_of_ours_is_told_as_it_is() -> None:
    record = read("kernel-drop")
    record.moments = [
        msgspec.structs.replace(moment, reason="TCP_FLAGS") if moment.is_loss else moment
        for moment in record.moments
    ]
    _, explained = retold(record)
    assert explained.drop is not None
    assert explained.drop.reason == "tcp-flags"
    assert "TCP_FLAGS in nft_do_chain" in explained.drop.explanation


# --- on the kernel -------------------------------------------------------------------------------


def word(found: Trace) -> str:
    """What the kernel said of a loss."""
    assert found.drop is not None
    (said,) = [each for each in found.drop.evidence if each.startswith("the kernel dropped")]
    return said.removeprefix("the kernel dropped it on ")


@kernel
def test_no_route_and_forwarding_off_are_the_routers_word(lab: Lab) -> None:
    in_node(lab, "n1", "ip", "route", "del", "10.244.2.0/24")
    in_node(lab, "n1", "ip", "route", "del", "default")
    found = trace(lab, Request("p0", "p1:8002"))
    assert found.drop is not None
    assert found.drop.reason == "no-route"
    assert word(found) == "cbr0 of node n1: IP_INNOROUTES in ip_error"
    in_node(lab, "n1", "ip", "route", "add", "default", "dev", "eth0")
    in_node(lab, "n1", "sysctl", "net.ipv4.ip_forward=0")
    found = trace(lab, Request("p0", "p1:8002"))
    assert found.drop is not None
    assert found.drop.reason == "forwarding-off"
    assert word(found) == "cbr0 of node n1: IP_INADDRERRORS in ip_error"


@kernel
def test_the_reverse_path_filter_is_told(lab: Lab) -> None:
    in_pod(lab, "p1", "sysctl", "net.ipv4.conf.all.rp_filter=1")
    in_pod(lab, "p1", "ip", "route", "add", "10.244.1.2", "dev", "lo")
    found = trace(lab, Request("p0", "p1:8002"))
    assert found.drop is not None
    assert (found.disposition, found.drop.reason) == ("dropped", "reverse-path")
    assert "eth0 of pod demo/p1: IP_RPFILTER in ip_rcv" in word(found)


@kernel
def test_a_closed_port_is_told_though_no_error_comes_back(lab: Lab) -> None:
    in_pod(lab, "p1", "ip", "route", "add", "blackhole", "10.244.1.2")
    found = trace(lab, Request("p0", "p1:99", protocol="udp"))
    assert found.drop is not None
    assert word(found).startswith("eth0 of pod demo/p1: NO_SOCKET in __udp4_lib_rcv")


@kernel
@pytest.mark.parametrize(
    ("tables", "code"), [("iptables-legacy", "nf_hook_slow"), ("nft", "nft_do_chain")]
)
def test_rules_that_report_nothing_are_told_where_they_drop(
    lab: Lab, tables: str, code: str
) -> None:
    if tables == "nft":
        chain = "{ type filter hook input priority 0; policy drop; }"
        in_pod(lab, "p1", "nft", f"add table ip closed; add chain ip closed input {chain}")
    else:
        in_node(lab, "n2", "iptables-legacy", "-I", "FORWARD", "-d", "10.244.2.2", "-j", "DROP")
    found = trace(lab, Request("p0", "p1:8002"))
    assert found.drop is not None
    assert (found.disposition, found.drop.reason, found.drop.node) == (
        "dropped",
        "dropped-by-rule",
        "n2",
    )
    assert word(found).endswith(f"NETFILTER_DROP in {code}")


@kernel
def test_an_answer_that_is_dropped_is_told_as_one(lab: Lab) -> None:
    chain = "{ type filter hook input priority 0; policy drop; }"
    in_pod(lab, "p0", "nft", f"add table ip closed; add chain ip closed input {chain}")
    found = trace(lab, Request("p0", "p1:8002", protocol="udp"))
    assert found.drop is not None
    assert (found.drop.direction, found.drop.reason) == ("reply", "dropped-by-rule")
    assert word(found) == "eth0 of pod demo/p0: NETFILTER_DROP in nft_do_chain"


@kernel
def test_without_bpf_the_other_witnesses_go_on(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(bpf, "load", refused)
    monkeypatch.setattr(tracefs, "_call", refused)
    found = trace(lab, Request("p0", "svc/remote"))
    assert found.disposition == "delivered"
    assert found.witnesses.kernel == (
        "unavailable: BPF: Operation not permitted; tracefs: Operation not permitted"
    )
    assert found.witnesses.packets == "ok"


def _instances() -> list[str]:
    """Instances of tracing that netlab made in this process."""
    root = tracefs._mount()
    try:
        directory = os.open("instances", os.O_RDONLY, dir_fd=root)
        try:
            return [each for each in os.listdir(directory) if f"netlab-{os.getpid()}-" in each]
        finally:
            os.close(directory)
    finally:
        os.close(root)


@kernel
def test_without_bpf_tracefs_tells_why_a_packet_was_dropped(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(code: bytes) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(bpf, "load", refused)
    in_pod(lab, "p1", "sysctl", "net.ipv4.conf.all.rp_filter=1")
    in_pod(lab, "p1", "ip", "route", "add", "10.244.1.2", "dev", "lo")
    found = trace(lab, Request("p0", "p1:8002", timeout_s=0.2))
    assert found.drop is not None
    assert found.drop.reason == "reverse-path"
    assert "eth0 of pod demo/p1: IP_RPFILTER in ip_rcv" in word(found)
    assert found.witnesses.kernel == (
        "partial: BPF: Operation not permitted; tracefs tells drops by device, length and time"
    )
    assert _instances() == []


@kernel
def test_an_instance_of_a_process_that_is_gone_is_removed() -> None:
    left = tracefs.Instance()
    # As if another process had begun at that number since.
    root, name = left._root, left._name
    orphan = f"instances/netlab-{os.getpid()}-1-orphan"
    os.mkdir(orphan, dir_fd=root)
    try:
        tracefs.Instance().close()
        assert _instances() == [name.removeprefix("instances/")]
    finally:
        left.close()
    assert _instances() == []


def test_a_line_of_tracefs_is_read() -> None:
    head = "     python-123     [001] b.s1.  8010.952541: "
    came = tracefs.parse(head + "netif_receive_skb: dev=lo skbaddr=000000001301ae1e len=105")
    assert came == tracefs.Line(8010952541, "000000001301ae1e", device="lo", length=105)
    dropped = tracefs.parse(
        head + "kfree_skb: skbaddr=000000001301ae1e rx_sk=0000000000000000 protocol=2048 "
        "location=ip_error+0x1c2/0x2f0 reason: IP_INNOROUTES"
    )
    assert dropped is not None
    assert (dropped.reason, dropped.function) == ("IP_INNOROUTES", "ip_error+0x1c2/0x2f0")
    assert tracefs.parse(head + "consume_skb: skbaddr=000000001301ae1e") is None


def test_a_buffer_that_serves_another_packet_later_is_not_taken_for_the_probe() -> None:
    record = read("kernel-drop")
    arrived = next(
        each
        for each in record.sightings
        if each.device == "eth0"
        and each.role == "probe"
        and each.direction == "in"
        and each.place.kind == "pod"
    )
    at = arrived.t_ns // 1000
    probe = tracefs.Line(at + 3, "ab", device="eth0", length=arrived.packet.length)
    other = tracefs.Line(at + 9, "ab", device="eth0", length=arrived.packet.length + 1)
    lost = tracefs.Line(at + 12, "ab", reason="NETFILTER_DROP", function="nft_do_chain+0x1/0x2")
    (found,) = traced([probe, lost], record.sightings, 0)
    assert (found.place, found.device, found.role) == (arrived.place, "eth0", "probe")
    assert str(found) == (
        "the kernel dropped it on eth0 of pod demo/p1: NETFILTER_DROP in nft_do_chain"
    )
    assert traced([probe, other, lost], record.sightings, 0) == []
    late = tracefs.Line(at + 5_000, "ab", device="eth0", length=arrived.packet.length)
    later = msgspec.structs.replace(lost, t_us=at + 5_001)
    assert traced([late, later], record.sightings, 0) == []


@kernel
def test_only_packets_with_the_words_are_reported_and_nothing_stays(lab: Lab) -> None:
    def descriptors() -> set[str]:
        return {
            os.readlink(f"/proc/self/fd/{each.name}")
            for each in os.scandir("/proc/self/fd")
            if os.path.exists(each.path)
        }

    events = skb_events.SkbEvents([skb_events.pattern_of_word(28, b"ours")])
    try:
        assert any("bpf" in each for each in descriptors())
        with entered(namespace(lab, "demo", "p1")):
            sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            inode = os.stat("/proc/thread-self/ns/net").st_ino
        with sender:
            for payload in (b"others", b"ours", b"others"):
                sender.sendto(payload, ("127.0.0.1", 9))
        seen = events.read()
    finally:
        events.close()
    assert [event.kind for event in seen] == ["in", "drop"]
    assert {(event.namespace, event.device, event.frame[42:]) for event in seen} == {
        (inode, "lo", b"ours")
    }
    assert len({event.buffer for event in seen}) == 1
    assert [event.t_ns for event in seen] == sorted(event.t_ns for event in seen)
    assert (seen[-1].reason, (seen[-1].function or "").split("+")[0]) == (
        "NO_SOCKET",
        "__udp4_lib_rcv",
    )
    assert not any("bpf" in each for each in descriptors())


@kernel
@pytest.mark.parametrize("who", ["packets", "kernel"])
def test_two_witnesses_that_differ_say_so(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    found = trace(lab, Request("p0", "svc/remote")).witnesses
    assert (found.packets, found.kernel) == ("ok", "ok")
    if who == "packets":
        arrivals = Packets.arrivals
        monkeypatch.setattr(Packets, "arrivals", lambda self: _without(arrivals(self)))
    else:
        told = Kernel.arrivals
        monkeypatch.setattr(Kernel, "arrivals", lambda self, until: _without(told(self, until)))
    found = trace(lab, Request("p0", "svc/remote")).witnesses
    other = "kernel" if who == "packets" else "packets"
    said = {"packets": found.packets, "kernel": found.kernel}
    assert said[who] == f"partial: the {other} witness saw 1 more come in on flannel.1 of node n2"
    assert said[other] == "ok"


def _without(arrivals: Counter[tuple[Place, str]]) -> Counter[tuple[Place, str]]:
    """As if one had been missed."""
    (missed,) = [each for each in arrivals if each[1] == "flannel.1" and each[0].name == "n2"]
    return arrivals - Counter([missed])
