"""Packets that open or refuse a TCP connection (SYN, RST), pings, ICMP errors, also inside VXLAN.

The same in three languages: pcap's, nft's, and patterns for BPF.  As in :mod:`netlab.trace.mark`
nothing but plain headers is expected before them.  `datagrams_but`: those of UDP as well, but for
one port, that of VXLAN.
"""

from __future__ import annotations

from collections.abc import Iterator

from netlab.kernel.skb_events import Half, Pattern
from netlab.trace.family import IPV4, Family
from netlab.trace.mark import Mark

SYN, RST, ACK = 0x02, 0x04, 0x10
_TCP, _UDP = 6, 17
_FLAGS_AT = 13  # in a TCP header
_TUNNEL = 8 + 8 + 14  # from the outer UDP header to the inner IP header
# Types of ICMP: errors, echo request, echo reply.
_ICMP_TYPES = {4: (3, 11, 12, 8, 0), 6: (1, 2, 3, 4, 128, 129)}
_ECHO_REQUEST = {4: 8, 6: 128}


class Openings(Mark, frozen=True):
    """What a probe is known by before it is known: everything of that sort, or nothing yet.

    `ends`: the addresses that its source may have, its own and those of nodes, which masquerade.
    The trace of nf_tables, which costs most by far, is switched on for these alone.
    """

    everything: bool = False
    ends: tuple[str, ...] = ()
    datagrams_but: int | None = None

    @property
    def needles(self) -> tuple[bytes, ...]:
        return (b"",) if self.everything else ()

    def words(self) -> list[tuple[int, bytes]]:
        return []

    def in_transport(self, header: bytes, protocol: int) -> bool:
        return False

    def conditions(self) -> list[str]:
        family = self.family
        ends = ", ".join(self.ends)
        conditions = [
            f"{family.nft} daddr {{ {ends} }} {family.icmp} type {{ {family.icmp_errors} }}",
        ]
        # There they come from it, back they go to it.
        for side in ("saddr", "daddr"):
            plain = f"{family.nft} {side} {{ {ends} }}"
            conditions += [
                f"{plain} tcp flags & (syn | rst) != 0x0",
                f"{plain} {family.icmp} type {{ echo-request, echo-reply }}",
            ]
            if self.datagrams_but:
                conditions.append(f"{plain} udp dport != {self.datagrams_but}")
        return conditions

    def tunnelled_conditions(self) -> list[str]:
        family = self.family
        size = family.bits // 8
        number = f"@th,{8 * (_TUNNEL + family.protocol_at)},8"
        flags = 8 * (_TUNNEL + family.header + _FLAGS_AT)
        raw = ", ".join(f"0x{family.packed(end).hex()}" for end in self.ends)
        conditions = []
        for at in (family.source_at, family.source_at + size):
            end = f"@th,{8 * (_TUNNEL + at)},{8 * size} {{ {raw} }}"
            conditions += [
                f"{number} {_TCP} {end} @th,{flags},8 & {SYN | RST} != 0x0",
                f"{number} {family.icmp_number} {end}",
            ]
            if self.datagrams_but:
                conditions.append(f"{number} {_UDP} {end}")
        return conditions


def pcap_opening(family: Family, datagrams_but: int | None = None) -> str:
    """A filter for the first packet of a TCP connection, and for a ping."""
    ip, number, transport = _pcap_name(family), family.protocol_at, family.header
    echo = _ECHO_REQUEST[family.version]
    return (
        f"(({ip}[{number}] = {_TCP} and {ip}[{transport + _FLAGS_AT}] & {SYN | RST | ACK} = {SYN}) "
        f"or ({ip}[{number}] = {family.icmp_number} and {ip}[{transport}] = {echo})"
        f"{_or_datagram(family, datagrams_but)})"
    )


def pcap(family: Family, datagrams_but: int | None = None) -> str:
    """A filter for all of them that are not in a tunnel."""
    ip, number = _pcap_name(family), family.protocol_at
    flags = family.header + _FLAGS_AT
    return (
        f"({ip}[{number}] = {_TCP} and {ip}[{flags}] & {SYN | RST} != 0) "
        f"or ({ip}[{number}] = {family.icmp_number}){_or_datagram(family, datagrams_but)}"
    )


def _or_datagram(family: Family, datagrams_but: int | None) -> str:
    if datagrams_but is None:
        return ""
    ip, udp = _pcap_name(family), family.header
    is_udp = f"{ip}[{family.protocol_at}] = {_UDP}"
    return f" or ({is_udp} and {ip}[{udp + 2}:2] != {datagrams_but})"


def pcap_tunnelled(family: Family, vxlan_port: int, datagrams: bool = False) -> str:
    """A filter for all of them that VXLAN carries."""
    ip, udp = _pcap_name(family), family.header
    inner = udp + _TUNNEL
    number = inner + family.protocol_at
    flags = inner + family.header + _FLAGS_AT
    return (
        f"{ip}[{family.protocol_at}] = {_UDP} and {ip}[{udp + 2}:2] = {vxlan_port} and "
        f"(({ip}[{number}] = {_TCP} and {ip}[{flags}] & {SYN | RST} != 0) "
        f"or {ip}[{number}] = {family.icmp_number}"
        f"{f' or {ip}[{number}] = {_UDP}' if datagrams else ''})"
    )


def pcap_word(family: Family, offset: int, word: bytes) -> str:
    """A filter for four bytes at an offset from the start of the IP header."""
    return f"{_pcap_name(family)}[{offset}:4] = 0x{word.hex()}"


def patterns(family: Family, vxlan_port: int, datagrams: bool = False) -> list[Pattern]:
    """The same for BPF, both in a tunnel and not."""
    tunnel = [
        _protocol(family, 0, _UDP),
        Half(family.header + 2, 0xFFFF, vxlan_port),
    ]
    inner = family.header + _TUNNEL
    found: list[Pattern] = [
        *_plain(family, 0),
        *([*tunnel, *each] for each in _plain(family, inner)),
    ]
    if datagrams:
        # A pattern says what is there: another port is one of which some bit is the other way.
        for bit in (1 << number for number in range(16)):
            other = Half(family.header + 2, bit, ~vxlan_port & bit)
            found.append([_protocol(family, 0, _UDP), other])
        found.append([*tunnel, _protocol(family, inner, _UDP)])
    return found


def _plain(family: Family, base: int) -> Iterator[list[Half]]:
    for flag in (SYN, RST):
        flags = Half(base + family.header + _FLAGS_AT - 1, flag, flag)
        yield [_protocol(family, base, _TCP), flags]
    for kind in _ICMP_TYPES[family.version]:
        message = Half(base + family.header, 0xFF00, kind << 8)
        yield [_protocol(family, base, family.icmp_number), message]


def _protocol(family: Family, base: int, number: int) -> Half:
    at = base + family.protocol_at
    return Half(at - 1, 0x00FF, number) if at % 2 else Half(at, 0xFF00, number << 8)


def _pcap_name(family: Family) -> str:
    return "ip" if family is IPV4 else "ip6"
