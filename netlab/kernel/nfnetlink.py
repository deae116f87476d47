"""Listening to netfilter's netlink groups (linux/netfilter/nfnetlink.h).

pyroute2 knows these messages or can be taught them, but its import alone costs a quarter of the
time that a whole trace may take; what is needed of it here is the framing in `kernel.netlink`.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from collections.abc import Iterator, Sequence

_NETLINK_NETFILTER = 12
_SOL_NETLINK = 270
_NETLINK_ADD_MEMBERSHIP = 1
_SO_RCVBUFFORCE = 33
_HEADER = struct.Struct("=IHHII")
_NFGENMSG_BYTES = 4

# Memory is used only as events arrive; a trace is some dozen events.
_BUFFER = 8 << 20
_RECEIVE = 1 << 17

SUBSYSTEM_NFTABLES = 10


def request_body(attributes: bytes, family: int, resource: int = 0) -> bytes:
    """What follows the netlink header of a request: `struct nfgenmsg` (NFPROTO_*), attributes."""
    return struct.pack("!BBH", family, 0, resource) + attributes


def messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(subsystem << 8 | message, family, attributes) of each event in some datagrams."""
    offset = 0
    while offset + _HEADER.size <= len(data):
        length, kind, _, _, _ = _HEADER.unpack_from(data, offset)
        if length < _HEADER.size:
            break
        start = offset + _HEADER.size + _NFGENMSG_BYTES
        yield kind, data[offset + _HEADER.size], data[start : offset + length]
        offset += (length + 3) & ~3


class Listener:
    """Events of some groups in the network namespace of the thread that opens it."""

    def __init__(self, groups: Sequence[int]) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK,
            socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK,
            _NETLINK_NETFILTER,
        )
        with contextlib.suppress(PermissionError):
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
        self._socket.bind((0, 0))
        for group in groups:
            self._socket.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, group)
        self.overrun = False

    def read(self) -> Iterator[tuple[int, int, bytes]]:
        """(subsystem << 8 | message, family, attributes) of each event that waits."""
        for data in self.datagrams():
            yield from messages(data)

    def datagrams(self) -> Iterator[bytes]:
        """What waits, as :func:`messages` reads it.

        No more than fits the buffer: more may come faster than it is read.
        """
        left = _BUFFER
        while left > 0:
            try:
                data = self._socket.recv(_RECEIVE)
                left -= len(data)
                yield data
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self.overrun = True

    def fileno(self) -> int:
        """The descriptor, as the select module asks for it."""
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()
