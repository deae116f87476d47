"""How the probe is known again, whatever happens to its addresses and ports.

A TCP probe is known by its initial sequence number, which we choose: its SYN carries it, the
answer acknowledges the number after it.  UDP and ICMP probes carry a random cookie in their
payload, which echoes return.  Both survive NAT and encapsulation, and ICMP errors quote them.
Nobody else's packet carries them but by one chance in 2^32 or 2^64.

A DNS query has no room for a cookie: it is known by its number, which is random, and its question,
which the answer repeats.  Another's query for the same name is taken for it once in 2^16.
"""

from __future__ import annotations

import os
import re
import struct

import msgspec

from netlab.trace.family import IPV6, Family
from netlab.trace.model import ProbeProtocol

# Byte offsets from the start of the transport header, where nothing but plain headers comes
# before: IP without options, VXLAN over UDP with Ethernet and IP of the same family inside
# (RFC 7348).
_SEQUENCE = 4
_PAYLOAD = 8  # of UDP and of ICMP echo
_ICMP = 8  # ICMP error: the quoted IP header
_VXLAN = 8 + 8 + 14  # the inner IP header
_QUESTION = 12  # of a DNS message: its question (RFC 1035)
_FRAGMENT_HEADER = 8  # of IPv6

# What is compared of a question: no more than is seen inside a tunnel and an error.
_QUESTION_BYTES = 16

COOKIE_BYTES = 8


class Mark(msgspec.Struct, frozen=True):
    """What the probe is known by: for TCP four bytes, for a DNS query two, else eight.

    `question` is what the question of a query begins with; else empty.  `fragmented`: the probe may
    come in fragments, the first of which has the mark.
    """

    protocol: ProbeProtocol
    cookie: bytes
    family: Family
    question: bytes = b""
    fragmented: bool = False

    @classmethod
    def random(cls, protocol: ProbeProtocol, family: Family, fragmented: bool = False) -> Mark:
        """A new one.  TCP: neither 0, which asks the kernel to choose, nor the last number."""
        cookie = os.urandom(COOKIE_BYTES)
        if protocol == "tcp":
            cookie = (1 + int.from_bytes(cookie, "big") % 0xFFFFFFFE).to_bytes(4, "big")
        return cls(protocol, cookie, family, fragmented=fragmented)

    @classmethod
    def of_query(cls, question: bytes, family: Family) -> Mark:
        """A new one for a query with this question (RFC 1035, 4.1.2)."""
        return cls("udp", os.urandom(2), family, question[:_QUESTION_BYTES])

    @property
    def sequence(self) -> int:
        """Initial sequence number of a TCP probe."""
        return int.from_bytes(self.cookie, "big")

    def is_in(self, frame: bytes) -> bool:
        """Whether a frame may be one of the probe's: a cheap test before dissection."""
        if self.question:
            return self._query.search(frame) is not None
        return any(needle in frame for needle in self.needles)

    def begins(self, payload: bytes) -> bool:
        """Whether the payload of a datagram or an echo is the probe's or its answer's."""
        if self.question:
            return self._query.match(payload) is not None
        return payload.startswith(self.cookie)

    @property
    def _query(self) -> re.Pattern[bytes]:
        """A message with this number and one question, which is this one."""
        number, question = re.escape(self.cookie), re.escape(self.question)
        return re.compile(number + rb"..\x00\x01.{6}" + question, re.DOTALL)

    @property
    def needles(self) -> tuple[bytes, ...]:
        """One of these bytes is in every packet of the probe but a DNS query."""
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
        elif self.question:
            plain = [(_PAYLOAD + _QUESTION, self.question[:4])]
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
            self._cookie_at(_PAYLOAD, f"meta l4proto {protocol}"),
            self._cookie_at(self._quoted + _PAYLOAD, quoted),
        ]

    def tunnelled_conditions(self) -> list[str]:
        """The same of outer packets that are known to carry VXLAN."""
        at = _SEQUENCE if self.protocol == "tcp" else _PAYLOAD
        offsets = [at, self._quoted + at]
        if self.fragmented and self.family is IPV6:
            offsets.append(_FRAGMENT_HEADER + at)
        found = [self._cookie_at(self._tunnelled + offset) for offset in offsets]
        if self.protocol == "tcp":
            found.append(bytes_at(self._tunnelled + _SEQUENCE + 4, self.needles[1]))
        return found

    def carried_conditions(self) -> list[str]:
        """The same of outer packets that are known to carry IP in IP (RFC 2003)."""
        at = _SEQUENCE if self.protocol == "tcp" else _PAYLOAD
        inner = self.family.header
        found = [self._cookie_at(inner + offset) for offset in (at, self._quoted + at)]
        if self.protocol == "tcp":
            found.append(bytes_at(inner + _SEQUENCE + 4, self.needles[1]))
        return found

    @property
    def _quoted(self) -> int:
        """ICMP error: the quoted transport header."""
        return _ICMP + self.family.header

    @property
    def _tunnelled(self) -> int:
        """VXLAN: the inner transport header."""
        return _VXLAN + self.family.header

    def _cookie_at(self, offset: int, condition: str = "") -> str:
        found = bytes_at(offset, self.cookie, condition)
        return f"{found} {_raw(offset + _QUESTION, self.question)}".rstrip()

    def in_transport(self, header: bytes, protocol: int) -> bool:
        """Whether the first 20 bytes of a transport header are the probe's or its answer's.

        Errors and tunnelled packets carry the mark further behind and cannot be told by so little.
        """
        if protocol == 6:
            return self.protocol == "tcp" and (
                header[4:8] == self.cookie or header[8:12] == self.needles[1]
            )
        if self.question:
            # Number and count of questions: the question itself lies beyond 20 bytes.
            return protocol == 17 and header[8:10] + header[12:14] == self.cookie + b"\0\1"
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
