"""Netlink by hand, for where hundreds of messages go at once.

pyroute2's classes encode a message in about 0.35 ms; a pod takes six.  Here a message is packed
with struct in a few microseconds, and many travel in one `send`.  Only the framing of netlink(7)
lives in this module; what the messages say is in `rtnetlink`.  A test decodes every kind of message
with pyroute2's classes.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator, Sequence

NLM_F_REQUEST = 0x1
NLM_F_ACK = 0x4
NLM_F_DUMP = 0x300
NLM_F_REPLACE = 0x100
NLM_F_EXCL = 0x200
NLM_F_CREATE = 0x400
NLM_F_APPEND = 0x800
NLM_F_DUMP_INTR = 0x10

NLMSG_ERROR = 2
NLMSG_DONE = 3
NLA_F_NESTED = 0x8000
NLA_TYPE_MASK = 0x3FFF

SOL_NETLINK = 270
NETLINK_CAP_ACK = 10
NETLINK_EXT_ACK = 11
NETLINK_GET_STRICT_CHK = 12
NLM_F_ACK_TLVS = 0x200
NLMSGERR_ATTR_MSG = 1

_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_ERRNO = struct.Struct("=i")

# The kernel works a whole datagram off before `send` returns; 32 KiB hold some 200 messages and
# stay far below the default send buffer.
_CHUNK = 32 * 1024
_RECEIVE = 256 * 1024


class NetlinkError(OSError):
    """A message that the kernel refused: errno, the kernel's own words, and which message."""

    def __init__(self, errno: int, detail: str, index: int) -> None:
        super().__init__(errno, detail or os.strerror(errno))
        self.index = index


def attribute(kind: int, payload: bytes) -> bytes:
    """One attribute with its padding."""
    length = 4 + len(payload)
    return _ATTRIBUTE.pack(length, kind) + payload + bytes(-length % 4)


def text(kind: int, value: str) -> bytes:
    """An attribute that is a string with a closing zero."""
    return attribute(kind, value.encode() + b"\0")


def number(kind: int, value: int) -> bytes:
    """A 32-bit attribute in host order."""
    return _ATTRIBUTE.pack(8, kind) + struct.pack("=I", value)


def nested(kind: int, *attributes: bytes) -> bytes:
    """An attribute that holds attributes."""
    return attribute(kind | NLA_F_NESTED, b"".join(attributes))


def message(kind: int, flags: int, body: bytes) -> bytes:
    """A request without a sequence number, which :meth:`Socket.request` fills in."""
    return _HEADER.pack(16 + len(body), kind, flags | NLM_F_REQUEST, 0, 0) + body


def attributes(data: bytes, offset: int = 0) -> dict[int, bytes]:
    """The attributes in `data` from `offset` on, by kind; of equal kinds the last one."""
    found: dict[int, bytes] = {}
    end = len(data)
    while offset + 4 <= end:
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if length < 4:
            break
        found[kind & NLA_TYPE_MASK] = data[offset + 4 : offset + length]
        offset += (length + 3) & ~3
    return found


def attribute_list(data: bytes, offset: int = 0) -> Iterator[tuple[int, bytes]]:
    """Like :func:`attributes`, in order and with repetitions."""
    end = len(data)
    while offset + 4 <= end:
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if length < 4:
            break
        yield kind & NLA_TYPE_MASK, data[offset + 4 : offset + length]
        offset += (length + 3) & ~3


class Socket:
    """A netlink socket in the network namespace of the thread that opens it.

    `groups` are those of bind(2), as a mask; their messages are what :meth:`await_event` awaits.
    """

    def __init__(self, protocol: int = socket.NETLINK_ROUTE, groups: int = 0) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol
        )
        # Refusals come with the kernel's sentence and without a copy of the request; dumps are
        # filtered by the kernel.
        for option in (NETLINK_CAP_ACK, NETLINK_EXT_ACK, NETLINK_GET_STRICT_CHK):
            self._socket.setsockopt(SOL_NETLINK, option, 1)
        if groups:
            self._socket.bind((0, groups))
        self._sequence = 0

    def await_event(self, timeout_s: float) -> bool:
        """Wait until something happens in our groups, and forget it; False if nothing does."""
        self._socket.settimeout(timeout_s)
        try:
            self._socket.recv(_RECEIVE)
        except TimeoutError:
            return False
        finally:
            self._socket.settimeout(None)
        return True

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Socket:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def request(self, messages: Sequence[bytes]) -> list[NetlinkError]:
        """Send messages, many at once, and wait until the kernel has done them all.

        Every message is tried, also after one that failed.  Returns the refusals, each with the
        index of its message.
        """
        refused: list[NetlinkError] = []
        start = 0
        while start < len(messages):
            size = 0
            stop = start
            while stop < len(messages) and (stop == start or size + len(messages[stop]) <= _CHUNK):
                size += (len(messages[stop]) + 3) & ~3
                stop += 1
            refused += self._chunk(messages[start:stop], start)
            start = stop
        return refused

    def _chunk(self, messages: Sequence[bytes], base: int) -> list[NetlinkError]:
        first = self._sequence + 1
        packet = bytearray()
        for packed in messages:
            self._sequence += 1
            offset = len(packet)
            packet += packed
            packet += bytes(-len(packed) % 4)
            struct.pack_into("=I", packet, offset + 8, self._sequence)
        # Errors are always answered; success only where asked for, so one answer suffices.
        last = len(packet) - ((len(messages[-1]) + 3) & ~3)
        (flags,) = struct.unpack_from("=H", packet, last + 6)
        struct.pack_into("=H", packet, last + 6, flags | NLM_F_ACK)
        self._socket.send(packet)
        refused = []
        while True:
            data = self._socket.recv(_RECEIVE)
            for kind, flags, sequence, payload in _messages(data):
                if kind != NLMSG_ERROR or sequence < first:
                    continue
                (errno,) = _ERRNO.unpack_from(payload)
                if errno:
                    detail = ""
                    if flags & NLM_F_ACK_TLVS:
                        words = attributes(payload, 20).get(NLMSGERR_ATTR_MSG, b"")
                        detail = words.rstrip(b"\0").decode(errors="replace")
                    refused.append(NetlinkError(-errno, detail, base + sequence - first))
                if sequence == self._sequence:
                    return refused

    def dump(self, kind: int, body: bytes) -> list[bytes]:
        """The bodies of all answers to a dump request.  Asked again if it was interrupted."""
        while True:
            self._sequence += 1
            packed = bytearray(message(kind, NLM_F_DUMP, body))
            struct.pack_into("=I", packed, 8, self._sequence)
            self._socket.send(packed)
            found: list[bytes] = []
            interrupted = done = False
            while not done:
                for answer, flags, sequence, payload in _messages(self._socket.recv(_RECEIVE)):
                    if sequence != self._sequence:
                        continue
                    interrupted |= bool(flags & NLM_F_DUMP_INTR)
                    if answer == NLMSG_DONE:
                        done = True
                    elif answer == NLMSG_ERROR:
                        (errno,) = _ERRNO.unpack_from(payload)
                        raise NetlinkError(-errno, "", 0)
                    else:
                        found.append(payload)
            if not interrupted:
                return found

    def get(self, kind: int, body: bytes) -> bytes:
        """The body of the single answer to a request; NetlinkError if there is none."""
        self._sequence += 1
        packed = bytearray(message(kind, 0, body))
        struct.pack_into("=I", packed, 8, self._sequence)
        self._socket.send(packed)
        while True:
            for answer, _, sequence, payload in _messages(self._socket.recv(_RECEIVE)):
                if sequence != self._sequence:
                    continue
                if answer == NLMSG_ERROR:
                    (errno,) = _ERRNO.unpack_from(payload)
                    raise NetlinkError(-errno, "", 0)
                return payload


def _messages(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """(kind, flags, sequence, body) of each message in a datagram."""
    offset = 0
    while offset + 16 <= len(data):
        length, kind, flags, sequence, _ = _HEADER.unpack_from(data, offset)
        if length < 16:
            return
        yield kind, flags, sequence, data[offset + 16 : offset + length]
        offset += (length + 3) & ~3
