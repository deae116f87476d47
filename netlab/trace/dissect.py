"""Frames taken apart with scapy: is this the probe, and what do its headers say.

scapy takes a quarter of a second to import, so :func:`load` is for a thread beside the arming of
the witnesses.  Frames of others are told by a substring search before scapy sees them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import msgspec

from netlab.trace.mark import Mark
from netlab.trace.model import Outer, Packet

if TYPE_CHECKING:
    from types import ModuleType

# probe: on its way there; answer, refusal (a TCP reset) and error (ICMP): on the way back; either:
# a UDP datagram, whose echo carries the same bytes, so that only its tuple tells the way.
Role = Literal["probe", "answer", "refusal", "error", "either"]

_UNREACHABLE = {
    0: "net-unreachable",
    1: "host-unreachable",
    2: "protocol-unreachable",
    3: "port-unreachable",
    4: "fragmentation-needed",
    9: "net-prohibited",
    10: "host-prohibited",
    13: "admin-prohibited",
}
_ICMP = {0: "echo-reply", 5: "redirect", 8: "echo-request", 11: "time-exceeded"}
_VXLAN_VALID = 0x08


def load() -> ModuleType:
    """Import what is needed of scapy, without its look at the host's routes."""
    from scapy.config import conf

    conf.route_autoload = False
    conf.route6_autoload = False
    import scapy.layers.inet
    import scapy.layers.vxlan

    module: ModuleType = scapy.layers
    return module


class Dissected(msgspec.Struct, frozen=True):
    """A frame of the probe: its headers, what part it plays, and of an error what it quotes."""

    packet: Packet
    role: Role


def dissect(frame: bytes, mark: Mark, vxlan_port: int) -> Dissected | None:
    """The probe in an Ethernet frame, or None if the frame is somebody else's."""
    if not any(needle in frame for needle in mark.needles):
        return None
    layers = load()
    inet = layers.inet
    ether = layers.l2.Ether(frame)
    if not isinstance(ether.payload, inet.IP):
        return None
    outer = None
    ip = ether.payload
    if isinstance(ip.payload, inet.UDP) and ip.payload.dport == vxlan_port:
        # The port may be any, so the layers are joined here and not by scapy's table of ports.
        vxlan = layers.vxlan.VXLAN(bytes(ip.payload.payload))
        inner = layers.l2.Ether(bytes(vxlan.payload))
        if not isinstance(inner.payload, inet.IP):
            return None
        outer = Outer(
            src=ip.src,
            dst=ip.dst,
            sport=ip.payload.sport,
            dport=ip.payload.dport,
            ttl=ip.ttl,
            length=ip.len,
            id=ip.id,
            vni=vxlan.vni if int(vxlan.flags) & _VXLAN_VALID else 0,
        )
        ip = inner.payload
    role = _role(ip, mark, inet)
    if role is None:
        return None
    return Dissected(_packet(ether, ip, outer, inet), role)


def _role(ip: Any, mark: Mark, inet: Any) -> Role | None:
    body = ip.payload
    if isinstance(body, inet.ICMP):
        if isinstance(body.payload, inet.IPerror):
            quoted = bytes(body.payload.payload)
            return "error" if any(needle in quoted for needle in mark.needles) else None
        if mark.protocol == "icmp" and bytes(body.payload).startswith(mark.cookie):
            return {8: "probe", 0: "answer"}.get(body.type)  # type: ignore[return-value]
        return None
    if isinstance(body, inet.UDP) and mark.protocol == "udp":
        return "either" if bytes(body.payload).startswith(mark.cookie) else None
    if isinstance(body, inet.TCP) and mark.protocol == "tcp":
        flags = str(body.flags)
        if body.seq == mark.sequence and "S" in flags and "A" not in flags:
            return "probe"
        if body.ack == mark.sequence + 1:
            return "refusal" if "R" in flags else "answer" if "S" in flags else None
    return None


def _packet(ether: Any, ip: Any, outer: Outer | None, inet: Any) -> Packet:
    body = ip.payload
    ported = isinstance(body, inet.TCP | inet.UDP)
    protocol = {inet.TCP: "tcp", inet.UDP: "udp", inet.ICMP: "icmp"}.get(type(body), str(ip.proto))
    return Packet(
        src=ip.src,
        dst=ip.dst,
        sport=body.sport if ported else None,
        dport=body.dport if ported else None,
        protocol=protocol,
        ttl=ip.ttl,
        length=ip.len,
        flags=str(body.flags) if isinstance(body, inet.TCP) else None,
        icmp=_icmp(body) if isinstance(body, inet.ICMP) else None,
        src_mac=ether.src,
        dst_mac=ether.dst,
        outer=outer,
    )


def _icmp(body: Any) -> str:
    if body.type == 3:
        return _UNREACHABLE.get(body.code, f"unreachable code {body.code}")
    return _ICMP.get(body.type, f"type {body.type} code {body.code}")
