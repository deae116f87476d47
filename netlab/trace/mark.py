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

    def conditions(self, vxlan_port: int) -> list[str]:
        """Matches of nftables that hold for the probe, its answers and its errors alone.

        Each begins with what hardly any other packet is: others are slowed by what it takes to
        find that out.
        """
        quoted = f"{self.family.icmp} type {{ {self.family.icmp_errors} }}"
        inner = f"udp dport {vxlan_port}"
        if self.protocol == "tcp":
            first, answer = self.needles
            plain = [
                bytes_at(_SEQUENCE, first, "meta l4proto tcp tcp flags & (syn | ack) == syn"),
                bytes_at(_SEQUENCE + 4, answer, "meta l4proto tcp tcp flags & (syn | rst) != 0"),
            ]
            words = [(_SEQUENCE, first), (_SEQUENCE + 4, answer)]
        else:
            protocol = self.family.icmp if self.protocol == "icmp" else self.protocol
            plain = [bytes_at(_PAYLOAD, self.cookie, f"meta l4proto {protocol}")]
            words = [(_PAYLOAD, self.cookie)]
        at, cookie = words[0]
        return [
            *plain,
            bytes_at(self._quoted + at, cookie, quoted),
            *(f"{inner} {_raw(self._tunnelled + offset, word)}" for offset, word in words),
            f"{inner} {_raw(self._tunnelled + self._quoted + at, cookie)}",
        ]

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


def bytes_at(offset: int, value: bytes, condition: str) -> str:
    """Matches of nftables: a value at an offset (a multiple of 4), and a condition.

    The kernel is quickest at comparing four bytes that stand there, so four come first.
    Source: nft_payload_select_ops() of net/netfilter/nft_payload.c.
    """
    first, rest = value[:4], value[4:]
    behind = f" {_raw(offset + 4, rest)}" if rest else ""
    return f"{_raw(offset, first)} {condition}{behind}"


def _raw(offset: int, value: bytes) -> str:
    return f"@th,{8 * offset},{8 * len(value)} 0x{value.hex()}"
