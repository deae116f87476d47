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

    def conditions(self, vxlan_port: int) -> list[str]:
        """Matches of nftables that hold for the probe, its answers and its errors alone."""
        if self.protocol == "tcp":
            first = f"tcp sequence {self.sequence} tcp flags & (syn | ack) == syn"
            answer = f"tcp ackseq {self.sequence + 1} tcp flags & (syn | rst) != 0"
            # Inside VXLAN only raw offsets reach.
            inner = [
                f"@th,{8 * (self._tunnelled + _SEQUENCE)},32 {self.sequence}",
                f"@th,{8 * (self._tunnelled + _SEQUENCE + 4)},32 {self.sequence + 1}",
                self._cookie_at(self._tunnelled + self._quoted + _SEQUENCE),
            ]
            quoted = self._cookie_at(self._quoted + _SEQUENCE)
            plain = [first, answer]
        else:
            protocol = self.family.icmp if self.protocol == "icmp" else self.protocol
            plain = [f"meta l4proto {protocol} {self._cookie_at(_PAYLOAD)}"]
            inner = [
                self._cookie_at(self._tunnelled + _PAYLOAD),
                self._cookie_at(self._tunnelled + self._quoted + _PAYLOAD),
            ]
            if self.fragmented and self.family is IPV6:
                inner.append(self._cookie_at(self._tunnelled + _FRAGMENT_HEADER + _PAYLOAD))
            quoted = self._cookie_at(self._quoted + _PAYLOAD)
        return [
            *plain,
            f"{self.family.icmp} type {{ {self.family.icmp_errors} }} {quoted}",
            *(f"udp dport {vxlan_port} {match}" for match in inner),
        ]

    @property
    def _quoted(self) -> int:
        """ICMP error: the quoted transport header."""
        return _ICMP + self.family.header

    @property
    def _tunnelled(self) -> int:
        """VXLAN: the inner transport header."""
        return _VXLAN + self.family.header

    def _cookie_at(self, offset: int) -> str:
        found = f"@th,{8 * offset},{8 * len(self.cookie)} 0x{self.cookie.hex()}"
        if self.question:
            at = 8 * (offset + _QUESTION)
            found += f" @th,{at},{8 * len(self.question)} 0x{self.question.hex()}"
        return found

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
