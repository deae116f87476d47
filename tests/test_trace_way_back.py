"""Answers that are lost: what is said of routes that refuse them, and of errors about them."""

from __future__ import annotations

import io

import pytest

from netlab.report import trace_pcapng
from netlab.topology.model import Lab
from netlab.trace.aim import Request
from netlab.trace.dissect import dissect
from netlab.trace.family import IPV4, IPV6
from netlab.trace.mark import Mark
from netlab.trace.model_steps import Socket, Tuple
from netlab.trace.run import Recorded, trace
from test_trace_kernel import in_node
from test_trace_losses import lost
from trace_labs import lab

__all__ = ["lab"]

kernel = pytest.mark.kernel


@pytest.mark.parametrize("family", [IPV4, IPV6], ids=["IPv4", "IPv6"])
def test_an_error_has_the_ends_of_the_packet_that_it_is_about(family: object) -> None:
    from scapy.layers.inet import ICMP, IP, TCP
    from scapy.layers.inet6 import ICMPv6DestUnreach, IPv6
    from scapy.layers.l2 import Ether

    mark = Mark("tcp", b"\x01\x02\x03\x04", IPV4 if family is IPV4 else IPV6)
    a, b, router = ("10.0.0.1", "10.0.0.2", "10.0.0.9")
    header, error = IP, ICMP(type=3, code=13)
    if family is IPV6:
        a, b, router = ("fd00::1", "fd00::2", "fd00::9")
        header, error = IPv6, ICMPv6DestUnreach(code=1)
    answer = header(src=b, dst=a) / TCP(sport=80, dport=1234, flags="SA", ack=mark.sequence + 1)
    seen = dissect(bytes(Ether() / header(src=router, dst=b) / error / answer), mark, 8472)
    assert seen is not None
    assert (seen.role, seen.packet.icmp) == ("error", "admin-prohibited")
    assert seen.packet.quotes == Tuple(
        source=Socket(ip=b, port=80), destination=Socket(ip=a, port=1234)
    )


@kernel
@pytest.mark.parametrize("protocol", ["tcp", "udp", "icmp"])
@pytest.mark.parametrize("kind", ["unreachable", "prohibit"])
def test_a_route_that_refuses_the_answer_is_quoted(lab: Lab, kind: str, protocol: str) -> None:
    in_node(lab, "n2", "sysctl", "-q", "net.ipv4.conf.all.rp_filter=0")
    in_node(lab, "n2", "ip", "route", "add", kind, "10.244.1.2/32")
    port = None if protocol == "icmp" else 8002
    recorded: list[Recorded] = []
    request = Request("p0", "p1", protocol=protocol, port=port, timeout_s=0.3)  # type: ignore[arg-type]
    found = trace(lab, request, recorded)
    assert found.drop is not None
    assert (found.disposition, found.drop.reason) == ("dropped", kind)
    assert (found.drop.direction, found.drop.node) == ("reply", "n2")
    assert f"{kind} route for 10.244.1.2/32" in found.drop.explanation
    assert f"route del {kind} 10.244.1.2/32" in str(found.drop.fix)
    assert any("sent by node n2 to 10.244.2.2, about the answer" in e for e in found.drop.evidence)
    assert found.delivered_to is not None
    assert found.delivered_to.name == "demo/p1"
    assert (found.reply[0].namespace, found.reply[-1].device) == (f"{lab.name}:demo:p1", "cbr0")
    assert all(hop.packet.quotes is None for hop in found.reply)
    stream = io.BytesIO()
    trace_pcapng.write(found, recorded, stream)
    assert b"an ICMP error about the answer" in stream.getvalue()


@kernel
@pytest.mark.parametrize("kind", ["blackhole", "unreachable", "prohibit"])
def test_who_could_not_answer_takes_nothing(lab: Lab, kind: str) -> None:
    in_node(lab, "n2", "ip", "route", "add", kind, "10.244.1.2/32")
    found, said = lost(lab, "p0", "p1:8002")
    assert (found.reason, found.lost_on) == ("reverse-path", "n2")
    assert f"{kind} route for 10.244.1.2/32, so node n2 takes nothing from there" in said
    assert f"route del {kind} 10.244.1.2/32" in said
    assert found.prediction is not None
    assert found.prediction.differs[0] == (
        "node n2's route back to 10.244.1.2 is not that by which this came; "
        "declared is 10.244.1.0/24 via 10.244.1.0 dev flannel.1"
    )
