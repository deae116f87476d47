"""How the probe is known again, whatever happens to its addresses and ports.

A TCP probe is known by its initial sequence number, which we choose: its SYN carries it, the
answer acknowledges the number after it.  UDP and ICMP probes carry a random cookie in their
payload, which echoes return.  Both survive NAT and encapsulation, and ICMP errors quote them.
Nobody else's packet carries them but by one chance in 2^32 or 2^64.
"""

from __future__ import annotations

import os
import struct

import msgspec

from netlab.trace.family import Family
from netlab.trace.model import ProbeProtocol

# Byte offsets from the start of the transport header, where nothing but plain headers comes
# before: IP without options, VXLAN over UDP with Ethernet and IP of the same family inside
# (RFC 7348).
_SEQUENCE = 4
_PAYLOAD = 8  # of UDP and of ICMP echo
_ICMP = 8  # ICMP error: the quoted IP header
_VXLAN = 8 + 8 + 14  # the inner IP header

COOKIE_BYTES = 8


class Mark(msgspec.Struct, frozen=True):
    """What the probe is known by: for TCP four bytes, else eight."""

    protocol: ProbeProtocol
    cookie: bytes
    family: Family

    @classmethod
    def random(cls, protocol: ProbeProtocol, family: Family) -> Mark:
        """A new one.  TCP: neither 0, which asks the kernel to choose, nor the last number."""
        cookie = os.urandom(COOKIE_BYTES)
        if protocol == "tcp":
            cookie = (1 + int.from_bytes(cookie, "big") % 0xFFFFFFFE).to_bytes(4, "big")
        return cls(protocol, cookie, family)

    @property
    def sequence(self) -> int:
        """Initial sequence number of a TCP probe."""
        return int.from_bytes(self.cookie, "big")

    @property
    def needles(self) -> tuple[bytes, ...]:
        """One of these bytes is in every packet of the probe: a cheap test before dissection."""
        if self.protocol == "tcp":
            return self.cookie, struct.pack("!I", self.sequence + 1)
        return (self.cookie,)

    def words(self) -> list[tuple[int, bytes]]:
        """(Offset from the start of the IP header, four bytes): one holds for each of its packets.

        In ascending order of offsets.
        """
        if self.protocol == "tcp":
            first, answer = self.needles
            plain = [(_SEQUENCE, first), (_SEQUENCE + 4, answer)]
        else:
            plain = [(_PAYLOAD, self.cookie[:4])]
        quoted = [(self._quoted + offset, word) for offset, word in plain]
        inner = [(self._tunnelled + offset, word) for offset, word in plain + quoted]
        return [(self.family.header + offset, word) for offset, word in plain + quoted + inner]

    def conditions(self) -> list[str]:
        """Matches of nftables that hold for the probe, its answers and its errors alone.

        Those in a tunnel do not count here.  Each begins with what hardly any other packet is:
        others are slowed by what it takes to find that out.
        """
        quoted = f"{self.family.icmp} type {{ {self.family.icmp_errors} }}"
        if self.protocol == "tcp":
            first, answer = self.needles
            return [
                bytes_at(_SEQUENCE, first, "meta l4proto tcp tcp flags & (syn | ack) == syn"),
                bytes_at(_SEQUENCE + 4, answer, "meta l4proto tcp tcp flags & (syn | rst) != 0"),
                bytes_at(self._quoted + _SEQUENCE, first, quoted),
            ]
        protocol = self.family.icmp if self.protocol == "icmp" else self.protocol
        return [
            bytes_at(_PAYLOAD, self.cookie, f"meta l4proto {protocol}"),
            bytes_at(self._quoted + _PAYLOAD, self.cookie, quoted),
        ]

    def tunnelled_conditions(self) -> list[str]:
        """The same of outer packets that are known to carry VXLAN."""
        at = _SEQUENCE if self.protocol == "tcp" else _PAYLOAD
        values = [(at, self.cookie), (self._quoted + at, self.cookie)]
        if self.protocol == "tcp":
            values.append((_SEQUENCE + 4, self.needles[1]))
        return [bytes_at(self._tunnelled + offset, value) for offset, value in values]

    @property
    def _quoted(self) -> int:
        """ICMP error: the quoted transport header."""
        return _ICMP + self.family.header

    @property
    def _tunnelled(self) -> int:
        """VXLAN: the inner transport header."""
        return _VXLAN + self.family.header

    def in_transport(self, header: bytes, protocol: int) -> bool:
        """Whether the first 20 bytes of a transport header are the probe's or its answer's.

        Errors and tunnelled packets carry the mark further behind and cannot be told by so little.
        """
        if protocol == 6:
            return self.protocol == "tcp" and (
                header[4:8] == self.cookie or header[8:12] == self.needles[1]
            )
        return protocol in (self.family.icmp_number, 17) and header[8:16] == self.cookie


def bytes_at(offset: int, value: bytes, condition: str = "") -> str:
    """Matches of nftables: a value at an even offset, and a condition.

    The kernel is quickest at comparing four bytes that stand at a multiple of four, or two at one
    of two.  One such comparison comes first, and the rest, a part of it behind the condition, is
    such that nft does not make one load of it all.

    Source: nft_payload_select_ops() of net/netfilter/nft_payload.c.
    """
    if offset % 4 == 0:
        parts = [_raw(offset, value[:4]), condition, _raw(offset + 4, value[4:])]
    elif len(value) == 4:
        # (Two other bytes and the first two: behind the value the packet may end.)
        before = _raw(offset - 2, bytes(2) + value[:2], "& 0x0000ffff ==")
        parts = [_raw(offset + 2, value[2:]), condition, before]
    else:
        first, middle, last = value[:2], value[2:6], value[6:]
        parts = [_raw(offset + 2, middle), condition, _raw(offset, first), _raw(offset + 6, last)]
    return " ".join(filter(None, parts))


def _raw(offset: int, value: bytes, compared: str = "==") -> str:
    return f"@th,{8 * offset},{8 * len(value)} {compared} 0x{value.hex()}" if value else ""
