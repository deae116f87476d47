"""Packets of many devices in one pcapng stream, as Wireshark opens it.

A section header, then for each device an interface block before its first packet, then the packets:
with the device, the time in nanoseconds, the direction and comments.  Written little-endian, which
every reader takes.

Source: draft-ietf-opsawg-pcapng.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, BinaryIO

import msgspec

from netlab.trace.model import Direction

if TYPE_CHECKING:
    from netlab.trace.place import Place

_SECTION, _INTERFACE, _PACKET = 0x0A0D0D0A, 1, 6
_BYTE_ORDER = 0x1A2B3C4D
_LENGTH_UNKNOWN = -1
_ETHERNET = 1  # LINKTYPE_ETHERNET
_COMMENT = 1
_USER_APPLICATION = 4  # of a section
_NAME, _DESCRIPTION, _RESOLUTION, _FILTER = 2, 3, 9, 11  # of an interface
_FLAGS = 2  # of a packet
_NANOSECONDS = b"\x09"  # 10^-9 s
_LIBPCAP_FILTER = b"\0"
_LONGEST_TEXT = 0xFFF0  # of an option, whose length has 16 bits
_DIRECTION_FLAGS: dict[Direction, int] = {"in": 1, "out": 2}


class Interface(msgspec.Struct, frozen=True):
    """A device: "k8s-slave1/flannel.1", and a sentence about it."""

    name: str
    description: str


def interface_of(place: Place, device: str) -> Interface:
    """A device in one of a lab's namespaces, by a name that no other in the lab has."""
    where = "switch" if place.name == "_switch" else place.name
    return Interface(
        name=f"{where}/{device}",
        description=f"{device} of {place}, network namespace {place.namespace}",
    )


class Writer:
    """Writes packets to a stream, each as soon as it is given."""

    def __init__(
        self, stream: BinaryIO, snaplen: int, comment: str = "", filter_: str = ""
    ) -> None:
        self._stream = stream
        self._snaplen = snaplen
        self._filter = filter_
        self._numbers: dict[Interface, int] = {}
        stream.write(section(comment))

    def declare(self, device: Interface) -> int:
        """The number of a device in this stream, which has its block from now on."""
        if device not in self._numbers:
            self._numbers[device] = len(self._numbers)
            self._stream.write(interface(device, self._snaplen, self._filter))
        return self._numbers[device]

    def write(
        self,
        device: Interface,
        t_ns: int,
        data: bytes,
        length: int,
        direction: Direction,
        comments: Sequence[str] = (),
    ) -> None:
        """Write a frame of `length` bytes, of which `data` was kept, seen at `t_ns` since 1970."""
        number = self.declare(device)
        self._stream.write(packet(number, t_ns, data, length, direction, comments))

    def flush(self) -> None:
        """Hand over what was written to whoever reads."""
        self._stream.flush()


def section(comment: str = "") -> bytes:
    """A section header block."""
    body = struct.pack("<IHHq", _BYTE_ORDER, 1, 0, _LENGTH_UNKNOWN)
    options = [(_USER_APPLICATION, b"netlab")]
    if comment:
        options.insert(0, (_COMMENT, _text(comment)))
    return _block(_SECTION, body, options)


def interface(device: Interface, snaplen: int, filter_: str = "") -> bytes:
    """An interface description block; its time stamps are in nanoseconds."""
    options = [
        (_NAME, _text(device.name)),
        (_DESCRIPTION, _text(device.description)),
        (_RESOLUTION, _NANOSECONDS),
    ]
    if filter_:
        options.append((_FILTER, _LIBPCAP_FILTER + _text(filter_)))
    return _block(_INTERFACE, struct.pack("<HHI", _ETHERNET, 0, snaplen), options)


def packet(
    number: int,
    t_ns: int,
    data: bytes,
    length: int,
    direction: Direction,
    comments: Sequence[str] = (),
) -> bytes:
    """An enhanced packet block of the interface with that number."""
    high, low = t_ns >> 32, t_ns & 0xFFFFFFFF
    body = struct.pack("<IIIII", number, high, low, len(data), length) + _padded(data)
    options = [(_COMMENT, _text(comment)) for comment in comments]
    options.append((_FLAGS, struct.pack("<I", _DIRECTION_FLAGS[direction])))
    return _block(_PACKET, body, options)


def _block(kind: int, body: bytes, options: Sequence[tuple[int, bytes]]) -> bytes:
    for code, value in options:
        body += struct.pack("<HH", code, len(value)) + _padded(value)
    body += struct.pack("<HH", 0, 0)
    length = struct.pack("<I", 12 + len(body))
    return struct.pack("<I", kind) + length + body + length


def _text(text: str) -> bytes:
    """UTF-8, cut between two characters where an option would be too long."""
    return text.encode()[:_LONGEST_TEXT].decode(errors="ignore").encode()


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
