"""Frames taken apart with scapy: is this the probe, and what do its headers say.

scapy takes a quarter of a second to import, so :func:`load` is for a thread beside the arming of
the witnesses.  Frames of others are told by a substring search before scapy sees them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import msgspec

from netlab.trace.family import IPV4, IPV6, Family
from netlab.trace.mark import Mark
from netlab.trace.model_steps import Outer, Packet, Socket, Tuple

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
# RFC 4443
_UNREACHABLE_6 = {
    0: "no-route",
    1: "admin-prohibited",
    2: "beyond-scope",
    3: "address-unreachable",
    4: "port-unreachable",
    5: "policy-failed",
    6: "reject-route",
}
_PARAMETER_6 = {0: "bad-header", 1: "unknown-next-header", 2: "unknown-option"}
_ICMP_6 = {
    2: "packet-too-big",
    3: "time-exceeded",
    128: "echo-request",
    129: "echo-reply",
    133: "router-solicitation",
    134: "router-advertisement",
    135: "neighbor-solicitation",
    136: "neighbor-advertisement",
    137: "redirect",
    143: "multicast-listener-report",
}
_ECHOES: dict[int, Role] = {8: "probe", 0: "answer", 128: "probe", 129: "answer"}
_REDIRECTS = {4: 5, 6: 137}
_VXLAN_VALID = 0x08


def load() -> ModuleType:
    """Import what is needed of scapy, without its look at the host's routes."""
    from scapy.config import conf

    conf.route_autoload = False
    conf.route6_autoload = False
    import scapy.layers.inet
    import scapy.layers.inet6
    import scapy.layers.vxlan

    module: ModuleType = scapy.layers
    return module


class Dissected(msgspec.Struct, frozen=True):
    """A frame of the probe: its headers, what part it plays, and of an error what it quotes."""

    packet: Packet
    role: Role


def dissect(frame: bytes, mark: Mark, vxlan_port: int) -> Dissected | None:
    """The probe in an Ethernet frame, or None if the frame is somebody else's."""
    if not mark.is_in(frame):
        return None
    layers = load()
    inet = layers.inet
    ether = layers.l2.Ether(frame)
    headers = _headers(ether, layers)
    if headers is None:
        return None
    outer = None
    ip, body = headers
    if isinstance(body, inet.UDP) and body.dport == vxlan_port:
        # The port may be any, so the layers are joined here and not by scapy's table of ports.
        vxlan = layers.vxlan.VXLAN(bytes(body.payload))
        inner = _headers(layers.l2.Ether(bytes(vxlan.payload)), layers)
        if inner is None:
            return None
        outer = Outer(
            src=ip.src,
            dst=ip.dst,
            sport=body.sport,
            dport=body.dport,
            ttl=_ttl(ip),
            length=_length(ip),
            id=ip.id if ip.version == 4 else ip.fl,
            vni=vxlan.vni if int(vxlan.flags) & _VXLAN_VALID else 0,
        )
        ip, body = inner
    elif isinstance(ip, inet.IP) and isinstance(body, inet.IP):
        outer = Outer(
            src=ip.src,
            dst=ip.dst,
            sport=0,
            dport=0,
            ttl=_ttl(ip),
            length=_length(ip),
            id=ip.id,
            vni=0,
            tunnel="ipip",
        )
        ip, body = body, body.payload
    role = _role(body, mark, layers)
    if role is None:
        return None
    return Dissected(_packet(ether, ip, body, outer, layers), role)


def _headers(ether: Any, layers: Any) -> tuple[Any, Any] | None:
    """A frame's IP header and the one of its transport, behind IPv6's extension headers."""
    ip = ether.payload
    if isinstance(ip, layers.inet.IP):
        return ip, ip.payload
    if not isinstance(ip, layers.inet6.IPv6):
        return None
    body = ip.payload
    while isinstance(body, layers.inet6._IPv6ExtHdr):
        body = body.payload
    return ip, body


def _ttl(ip: Any) -> int:
    return int(ip.ttl if ip.version == 4 else ip.hlim)


def _length(ip: Any) -> int:
    """Of the whole packet in bytes; IPv6 counts without its own header."""
    return int(ip.len if ip.version == 4 else ip.plen + IPV6.header)


def _role(body: Any, mark: Mark, layers: Any) -> Role | None:
    inet, inet6 = layers.inet, layers.inet6
    if isinstance(body, inet.ICMP | inet6._ICMPv6):
        if isinstance(body.payload, inet.IPerror | inet6.IPerror6):
            if body.type == _REDIRECTS[4 if isinstance(body, inet.ICMP) else 6]:
                return None  # it tells of a shorter way, and the packet went on
            quoted = bytes(body.payload.payload)
            return "error" if mark.is_in(quoted) else None
        said = body.data if isinstance(body, inet6._ICMPv6) else body.payload
        if mark.protocol == "icmp" and mark.begins(bytes(said)):
            return _ECHOES.get(body.type)
        return None
    if isinstance(body, inet.UDP) and mark.protocol == "udp":
        return "either" if mark.begins(bytes(body.payload)) else None
    if isinstance(body, inet.TCP) and mark.protocol == "tcp":
        flags = str(body.flags)
        if body.seq == mark.sequence and "S" in flags and "A" not in flags:
            return "probe"
        if body.ack == mark.sequence + 1:
            return "refusal" if "R" in flags else "answer" if "S" in flags else None
    return None


def _packet(ether: Any, ip: Any, body: Any, outer: Outer | None, layers: Any) -> Packet:
    inet, family = layers.inet, IPV4 if ip.version == 4 else IPV6
    ported = isinstance(body, inet.TCP | inet.UDP)
    is_icmp = isinstance(body, inet.ICMP | layers.inet6._ICMPv6)
    return Packet(
        src=ip.src,
        dst=ip.dst,
        sport=body.sport if ported else None,
        dport=body.dport if ported else None,
        protocol=family.icmp if is_icmp else "tcp" if isinstance(body, inet.TCP) else "udp",
        ttl=_ttl(ip),
        length=_length(ip),
        flags=str(body.flags) if isinstance(body, inet.TCP) else None,
        icmp=icmp_name(family, body.type, body.code) if is_icmp else None,
        quotes=_quoted(body.payload, layers) if is_icmp else None,
        src_mac=ether.src,
        dst_mac=ether.dst,
        outer=outer,
    )


def _quoted(ip: Any, layers: Any) -> Tuple | None:
    """The ends of the packet that an ICMP message quotes, if it quotes one."""
    if not isinstance(ip, layers.inet.IPerror | layers.inet6.IPerror6):
        return None
    body = ip.payload
    while isinstance(body, layers.inet6._IPv6ExtHdr):
        body = body.payload
    ported = isinstance(body, layers.inet.TCP | layers.inet.UDP)
    return Tuple(
        source=Socket(ip=ip.src, port=body.sport if ported else None),
        destination=Socket(ip=ip.dst, port=body.dport if ported else None),
    )


def icmp_name(family: Family, kind: int, code: int) -> str:
    """Type and code of an ICMP message in words."""
    unreachable = 3 if family is IPV4 else 1
    if kind == unreachable:
        names = _UNREACHABLE if family is IPV4 else _UNREACHABLE_6
        return names.get(code, f"unreachable code {code}")
    if family is IPV6 and kind == 4:
        return _PARAMETER_6.get(code, f"parameter-problem code {code}")
    return (_ICMP if family is IPV4 else _ICMP_6).get(kind, f"type {kind} code {code}")
