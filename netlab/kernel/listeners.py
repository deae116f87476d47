"""Sockets that listen or are connected, as the kernel's socket diagnosis tells them.

Source: linux/inet_diag.h, sock_diag(7).
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Collection, Iterator

import msgspec

from netlab.kernel.namespaces import entered
from netlab.kernel.netlink import NetlinkError, Socket, message

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY, _SOCK_DESTROY = 20, 21
_REQUEST = struct.Struct("=BBBxI48x")  # inet_diag_req_v2: family, protocol, extensions, states
_TCP_CLOSE, _TCP_LISTEN = 7, 10  # net/tcp_states.h; a UDP socket without a peer is "closed"
_TCP_OPEN = 1 << 1 | 1 << 3 | 1 << 4 | 1 << 8 | 1 << 9  # established, or not all of it is said
_TCP_ANY = 0xFFF & ~(1 << _TCP_LISTEN)
_STATES = {socket.IPPROTO_TCP: 1 << _TCP_LISTEN, socket.IPPROTO_UDP: 1 << _TCP_CLOSE}
# inet_diag_msg: family, state, timer, retransmits; inet_diag_sockid; expires; queues
_SOCKID = 48  # bytes
_PORT_AT, _ADDRESS_AT, _QUEUES_AT = 4, 8, 4 + 48 + 4


class Listener(msgspec.Struct, frozen=True):
    """A socket that waits for whoever comes.  Of TCP the queue is that of connections to accept."""

    address: str  # "0.0.0.0" or "::": every one
    port: int
    waiting: int = 0
    room: int = 0

    @property
    def is_full(self) -> bool:
        """Whether no more connections are let in: sk_acceptq_is_full() of net/sock.h."""
        return self.waiting > self.room


def listeners(namespace: str, protocol: int, port: int) -> list[Listener]:
    """What listens on a port of a namespace, `protocol` as IANA numbers them."""
    with entered(namespace):
        netlink = Socket(_NETLINK_SOCK_DIAG)
    with netlink:
        found = [
            each
            for family in (socket.AF_INET, socket.AF_INET6)
            for each in _of_family(netlink, family, protocol)
        ]
    return [each for each in found if each.port == port]


def connected(namespace: str, ports: Collection[int]) -> int:
    """How many TCP connections to ports of a namespace are open."""
    with entered(namespace):
        netlink = Socket(_NETLINK_SOCK_DIAG)
    with netlink:
        return sum(
            each.port in ports
            for family in (socket.AF_INET, socket.AF_INET6)
            for each in _of_family(netlink, family, socket.IPPROTO_TCP, _TCP_OPEN)
        )


def destroy_connections(namespace: str) -> None:
    """End every TCP connection of a namespace, on this side alone; not in kernels that cannot.

    (CONFIG_INET_DIAG_DESTROY.)
    """
    with entered(namespace):
        netlink = Socket(_NETLINK_SOCK_DIAG)
    with netlink:
        for family in (socket.AF_INET, socket.AF_INET6):
            wanted = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, _TCP_ANY)
            with contextlib.suppress(NetlinkError):
                for body in list(netlink.dump(_SOCK_DIAG_BY_FAMILY, wanted)):
                    which = wanted[:8] + body[_PORT_AT : _PORT_AT + _SOCKID]
                    # (What it says of one that has ended by itself, or cannot be, does not matter.)
                    netlink.request([message(_SOCK_DESTROY, 0, which)])


def _of_family(netlink: Socket, family: int, protocol: int, states: int = 0) -> Iterator[Listener]:
    wanted = states or _STATES[protocol]
    try:
        found = netlink.dump(_SOCK_DIAG_BY_FAMILY, _REQUEST.pack(family, protocol, 0, wanted))
    except NetlinkError:  # a kernel without inet_diag
        return
    size = 4 if family == socket.AF_INET else 16
    for body in found:
        (port,) = struct.unpack_from("!H", body, _PORT_AT)
        waiting, room = struct.unpack_from("=II", body, _QUEUES_AT)
        address = socket.inet_ntop(family, body[_ADDRESS_AT : _ADDRESS_AT + size])
        if protocol == socket.IPPROTO_TCP:
            yield Listener(address, port, waiting, room)
        else:
            yield Listener(address, port)
