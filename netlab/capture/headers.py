"""The headers of any frame, as far as they were kept.

A trace has its few frames taken apart by scapy, which manages some thousands of packets a second;
a capture meets ten times that, and needs no more than what stands at fixed places.  All lengths are
in bytes.
"""

from __future__ import annotations

import struct

import msgspec

from netlab.trace.dissect import icmp_name
from netlab.trace.family import IPV4, IPV6, Family
from netlab.trace.model_steps import Outer, Packet

ARP, _IPV4, _IPV6 = 0x0806, 0x0800, 0x86DD
ICMP, TCP, UDP, ICMPV6 = 1, 6, 17, 58
_NAMES = {ICMP: "icmp", TCP: "tcp", UDP: "udp", ICMPV6: "icmpv6"}
_HOP_BY_HOP, _ROUTING, _FRAGMENT, _DESTINATION = 0, 43, 44, 60
_VXLAN_VALID = 0x08
_FLAGS = "FSRPAUEC"  # scapy's letters, from the lowest bit


class Ethernet(msgspec.Struct, frozen=True):
    """A frame: `type` is the EtherType, `body` what stands behind the header."""

    destination: str
    source: str
    type: int
    body: bytes


class Network(msgspec.Struct, frozen=True):
    """An IP header: `length` of the whole packet, `size` of what is behind the header.

    `body` is as much of that as was kept.  `offset` and `more` are those of a fragment.
    """

    family: Family
    source: str
    destination: str
    ttl: int
    length: int
    id: int  # over IPv6 the flow label
    protocol: int
    size: int
    body: bytes
    offset: int = 0
    more: bool = False

    @property
    def has_transport(self) -> bool:
        """Whether the transport header is in this packet, which it is in a first fragment."""
        return self.offset == 0

    @property
    def ports(self) -> tuple[int, int] | None:
        """Source and destination port, if there are any."""
        if self.protocol not in (TCP, UDP) or not self.has_transport or len(self.body) < 4:
            return None
        source, destination = struct.unpack_from("!HH", self.body)
        return source, destination


class Tunnelled(msgspec.Struct, frozen=True):
    """What VXLAN carries; `vni` is None if the header says that it is not valid."""

    vni: int | None
    frame: bytes


def ethernet(frame: bytes) -> Ethernet | None:
    """The Ethernet header, or None if it was cut off."""
    if len(frame) < 14:
        return None
    kind = int.from_bytes(frame[12:14], "big")
    return Ethernet(frame[:6].hex(":"), frame[6:12].hex(":"), kind, frame[14:])


def network(ether: Ethernet) -> Network | None:
    """The IP header; None if there is none, or it was cut off."""
    body = ether.body
    if ether.type == _IPV4 and len(body) >= 20 and body[0] >> 4 == 4:
        return _ipv4(body)
    if ether.type == _IPV6 and len(body) >= 40 and body[0] >> 4 == 6:
        return _ipv6(body)
    return None


def _ipv4(body: bytes) -> Network:
    first, _, length, identity, place, ttl, protocol = struct.unpack_from("!BBHHHBB", body)
    header = 4 * (first & 15)
    source, destination = IPV4.ends(body)
    return Network(
        family=IPV4,
        source=source,
        destination=destination,
        ttl=ttl,
        length=length,
        id=identity,
        protocol=protocol,
        size=length - header,
        # Ethernet pads short packets.
        body=body[header:length],
        offset=8 * (place & 0x1FFF),
        more=bool(place & 0x2000),
    )


def _ipv6(body: bytes) -> Network:
    first, size, protocol, ttl = struct.unpack_from("!IHBB", body)
    source, destination = IPV6.ends(body)
    rest, offset, more, left = body[40 : 40 + size], 0, False, size
    while protocol in (_HOP_BY_HOP, _ROUTING, _DESTINATION, _FRAGMENT) and len(rest) >= 8:
        header = 8 if protocol == _FRAGMENT else 8 * (1 + rest[1])
        if protocol == _FRAGMENT:
            place = int.from_bytes(rest[2:4], "big")
            offset, more = place & 0xFFF8, bool(place & 1)
        protocol, rest, left = rest[0], rest[header:], left - header
        if offset:
            break
    return Network(
        family=IPV6,
        source=source,
        destination=destination,
        ttl=ttl,
        length=size + IPV6.header,
        id=first & 0xFFFFF,
        protocol=protocol,
        size=left,
        body=rest,
        offset=offset,
        more=more,
    )


def tunnelled(ip: Network, vxlan_port: int) -> Tunnelled | None:
    """What is in a packet to the port of VXLAN (RFC 7348)."""
    ports = ip.ports
    if ip.protocol != UDP or not ports or ports[1] != vxlan_port or len(ip.body) < 16:
        return None
    vni = int.from_bytes(ip.body[12:15], "big") if ip.body[8] & _VXLAN_VALID else None
    return Tunnelled(vni, ip.body[16:])


def flags(ip: Network) -> str:
    """TCP flags in scapy's letters, "SA"."""
    bits = ip.body[13]
    return "".join(letter for number, letter in enumerate(_FLAGS) if bits >> number & 1)


def packet(frame: bytes, vxlan_port: int) -> Packet | None:
    """A frame's packet as traces have it, the inner one of a tunnel; None if it is not IP."""
    ether = ethernet(frame)
    ip = network(ether) if ether else None
    if ether is None or ip is None:
        return None
    outer = None
    if inside := tunnelled(ip, vxlan_port):
        inner = ethernet(inside.frame)
        carried = network(inner) if inner else None
        if carried and ip.ports:
            outer = Outer(
                src=ip.source,
                dst=ip.destination,
                sport=ip.ports[0],
                dport=ip.ports[1],
                ttl=ip.ttl,
                length=ip.length,
                id=ip.id,
                vni=inside.vni or 0,
            )
            ip = carried
    source, destination = ip.ports or (None, None)
    is_icmp = ip.protocol == ip.family.icmp_number and ip.has_transport and len(ip.body) >= 2
    return Packet(
        src=ip.source,
        dst=ip.destination,
        sport=source,
        dport=destination,
        protocol=_NAMES.get(ip.protocol, str(ip.protocol)),
        ttl=ip.ttl,
        length=ip.length,
        flags=flags(ip) if ip.protocol == TCP and ip.ports and len(ip.body) >= 14 else None,
        icmp=icmp_name(ip.family, ip.body[0], ip.body[1]) if is_icmp else None,
        src_mac=ether.source,
        dst_mac=ether.destination,
        outer=outer,
    )


def carried(frame: bytes, vxlan_port: int) -> bytes | None:
    """The frame that a frame carries in VXLAN, if it does."""
    ether = ethernet(frame)
    ip = network(ether) if ether else None
    inside = tunnelled(ip, vxlan_port) if ip else None
    return inside.frame if inside else None
