"""Fragments: which frames are pieces of the probe, and whether all pieces of it went by.

Only the first piece carries the mark.  The others are known by what IP puts them together by: both
addresses, the protocol and the identification (RFC 791, RFC 8200), which the node that translates
the first piece's addresses gives them as well.  Inside a tunnel it is the inner packet's pieces
that count, unless the outer one is in pieces itself.
"""

from __future__ import annotations

import struct
from collections.abc import Set

import msgspec

from netlab.kernel.socket_filter import Test, any_bit, equal
from netlab.trace.family import IPV4, IPV6, Family
from netlab.trace.model_steps import Fragments

_MAC_HEADER = 14
_ETHER_TYPE = 12
_UDP_AND_VXLAN = 8 + 8
_UDP, _FRAGMENT = 17, 44  # protocols, next headers
_TYPES = {IPV4: 0x0800, IPV6: 0x86DD}
_OFFSET_4, _MORE_4 = 0x1FFF, 0x2000  # of IPv4's field, in eights of bytes
_OFFSET_6, _MORE_6 = 0xFFF8, 0x0001  # of IPv6's, in bytes
_FRAGMENT_HEADER = struct.Struct("!BxHI")


# Both addresses, the identification, and IPv4's protocol
Key = tuple[bytes, int, int]


class Piece(msgspec.Struct, frozen=True):
    """One piece: `key` is the same for all of a packet; offset and length in bytes of its body."""

    key: Key
    offset: int
    length: int
    more: bool  # whether it is not the last one


def later_pieces(family: Family) -> list[list[Test]]:
    """What holds for a frame that is a piece without the beginning, plain or in a tunnel.

    Each list is one way to be so, and all of its tests hold then.
    """
    inner = _MAC_HEADER + family.header + _UDP_AND_VXLAN
    return [_later(family, 0), _later(family, inner)]


def _later(family: Family, mac: int) -> list[Test]:
    header = mac + _MAC_HEADER
    of_family = equal(mac + _ETHER_TYPE, 2, _TYPES[family])
    if family is IPV4:
        return [of_family, any_bit(header + 6, 2, _OFFSET_4)]
    return [
        of_family,
        equal(header + family.protocol_at, 1, _FRAGMENT),
        any_bit(header + family.header + 2, 2, _OFFSET_6),
    ]


def piece_of(frame: bytes, vxlan_port: int) -> Piece | None:
    """The piece that a frame holds; None if its packet is whole."""
    found = _piece_at(frame, 0)
    if found is not None:
        return found
    header = _body(frame, 0)
    if header is None or frame[header + 2 : header + 4] != vxlan_port.to_bytes(2, "big"):
        return None
    return _piece_at(frame, header + _UDP_AND_VXLAN)


def _piece_at(frame: bytes, mac: int) -> Piece | None:
    ip = mac + _MAC_HEADER
    kind = frame[mac + _ETHER_TYPE : ip]
    try:
        if kind == b"\x08\x00":
            return _piece_4(frame, ip)
        if kind == b"\x86\xdd":
            return _piece_6(frame, ip)
    except (struct.error, IndexError):
        pass  # it ends before its header does
    return None


def _piece_4(frame: bytes, ip: int) -> Piece | None:
    length, number, field = struct.unpack_from("!HHH", frame, ip + 2)
    if not field & (_OFFSET_4 | _MORE_4):
        return None
    header = (frame[ip] & 15) * 4
    key = frame[ip + IPV4.source_at : ip + IPV4.header], number, frame[ip + IPV4.protocol_at]
    return Piece(key, 8 * (field & _OFFSET_4), length - header, bool(field & _MORE_4))


def _piece_6(frame: bytes, ip: int) -> Piece | None:
    (length,) = struct.unpack_from("!H", frame, ip + 4)
    if frame[ip + IPV6.protocol_at] != _FRAGMENT:
        return None
    _, field, number = _FRAGMENT_HEADER.unpack_from(frame, ip + IPV6.header)
    key = frame[ip + IPV6.source_at : ip + IPV6.header], number, _FRAGMENT
    more = bool(field & _MORE_6)
    return Piece(key, field & _OFFSET_6, length - _FRAGMENT_HEADER.size, more)


def _body(frame: bytes, mac: int) -> int | None:
    """Where the UDP header of a frame begins; None if it has none."""
    ip = mac + _MAC_HEADER
    kind = frame[mac + _ETHER_TYPE : ip]
    if kind == b"\x08\x00" and frame[ip + 9 : ip + 10] == bytes([_UDP]):
        return ip + (frame[ip] & 15) * 4
    if kind == b"\x86\xdd" and frame[ip + 6 : ip + 7] == bytes([_UDP]):
        return ip + IPV6.header
    return None


def counted(pieces: Set[Piece]) -> Fragments:
    """How many pieces there are, and whether they make a whole packet."""
    parts = sorted({(each.offset, each.length, each.more) for each in pieces})
    end = 0
    for offset, length, _ in parts:
        if offset > end:
            break  # a gap
        end = max(end, offset + length)
    last = [offset + length for offset, length, more in parts if not more]
    return Fragments(count=len(parts), complete=bool(last) and end >= last[0])
