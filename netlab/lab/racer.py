"""The program of the fault `source-port-race`: it lets connections lose a race, each time.

Two connections that a node gives its own address keep their source ports if nobody has them.  That
is decided before a connection is remembered, so of two that do it at the same moment the second one
finds its tuple taken, and connection tracking drops its packet (insert_failed).  The rules of the
fault hold the first packet of a connection just there (NFQUEUE); this program sends another one
from the same port of another pod meanwhile.

It is copied into the node's mount namespace and imports the standard library alone.
Source: uapi/linux/netfilter/nfnetlink_queue.h.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
from typing import NamedTuple

_NETLINK_NETFILTER, _SUBSYSTEM = 12, 3
_PACKET, _VERDICT, _CONFIG = (_SUBSYSTEM << 8 | kind for kind in range(3))
_COMMAND, _PARAMETERS = 1, 2  # of _CONFIG
_HEADER, _VERDICT_HEADER, _PAYLOAD = 1, 2, 10  # of _PACKET and _VERDICT
_BIND, _COPY_PACKET, _ACCEPT = 1, 2, 1
_NLM_F_REQUEST, _NLM_F_ACK, _NLMSG_ERROR = 1, 4, 2
_COPIED = 128  # bytes of a packet
_RECEIVE = 1 << 16
_FIRST_BYTES = {socket.IPPROTO_TCP: 20, socket.IPPROTO_UDP: 8}


class _Held(NamedTuple):
    """A packet that waits for its verdict."""

    number: int
    packet: bytes


class _Queue:
    """Packets that rules hold, and what becomes of them."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
        self._socket.bind((0, 0))
        family = socket.htons(socket.AF_INET)
        self._configure(_attribute(_COMMAND, struct.pack("=BxH", _BIND, family)))
        self._configure(_attribute(_PARAMETERS, struct.pack("!IB", _COPIED, _COPY_PACKET)))

    def _configure(self, body: bytes) -> None:
        self._send(_CONFIG, _NLM_F_ACK, body)
        answer = self._socket.recv(_RECEIVE)
        kind, error = struct.unpack_from("=4xH10xi", answer)
        if kind == _NLMSG_ERROR and error:
            raise OSError(-error, "the queue is not to be had")

    def _send(self, kind: int, flags: int, body: bytes) -> None:
        about = struct.pack("!BBH", socket.AF_UNSPEC, 0, self._number)
        size = 16 + len(about) + len(body)
        header = struct.pack("=IHHII", size, kind, flags | _NLM_F_REQUEST, 0, 0)
        self._socket.send(header + about + body)

    def next(self) -> _Held:
        """The next packet."""
        while True:
            data = self._socket.recv(_RECEIVE)
            if struct.unpack_from("=4xH", data)[0] == _PACKET:
                found = _attributes(data[20:])
                return _Held(struct.unpack_from("!I", found[_HEADER])[0], found[_PAYLOAD])

    def accept(self, held: _Held) -> None:
        verdict = struct.pack("!II", _ACCEPT, held.number)
        self._send(_VERDICT, 0, _attribute(_VERDICT_HEADER, verdict))


def _attribute(kind: int, data: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)


def _attributes(data: bytes) -> dict[int, bytes]:
    found, offset = {}, 0
    while offset + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, offset)
        found[kind] = data[offset + 4 : offset + length]
        offset += (length + 3) & ~3
    return found


def rival(packet: bytes, source: str) -> bytes:
    """The first packet of a connection like that of `packet`, from another source.

    It gets no further than the next router, and nobody takes it: its checksum is wrong.
    """
    header, protocol = (packet[0] & 15) * 4, packet[9]
    payload = bytearray(packet[header : header + _FIRST_BYTES[protocol]])
    struct.pack_into("!H", payload, 16 if protocol == socket.IPPROTO_TCP else 6, 1)
    if protocol == socket.IPPROTO_TCP:
        payload[12] = 5 << 4  # no options
        struct.pack_into("!I", payload, 4, 0)  # a sequence number of its own
    else:
        struct.pack_into("!H", payload, 4, len(payload))
    first = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 0, 0, 1, protocol, 0)
    return first + socket.inet_aton(source) + packet[16:20] + payload


def main(queue: int, source: str) -> None:
    """Race against whatever is held in a queue, as `source`.

    That it has begun is told by a UDP socket with the number of the queue.
    """
    packets = _Queue(queue)
    raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    with raw as sender, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sign:
        sign.bind(("127.0.0.1", queue))
        while True:
            held = packets.next()
            destination = socket.inet_ntoa(held.packet[16:20])
            with contextlib.suppress(OSError):  # (no route: there is no race)
                # It is remembered when this returns.
                sender.sendto(rival(held.packet, source), (destination, 0))
            packets.accept(held)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
