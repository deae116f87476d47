"""Connections of IPVS: which real server a virtual server chose for the probe, and until when.

Connection tracking tells that a destination became another one; that it was IPVS which chose, and
what it remembers, stands in a table of its own.  Source: ip_vs_conn_seq_show in the kernel's
net/netfilter/ipvs/ip_vs_conn.c.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterable, Sequence

import msgspec

from netlab.kernel.namespaces import entered
from netlab.trace.model_steps import Socket
from netlab.trace.place import Place


class Balanced(msgspec.Struct, frozen=True):
    """An entry of the table in one namespace."""

    place: Place
    protocol: str  # "TCP"
    client: Socket
    virtual: Socket
    real: Socket
    state: str
    expires_s: int


def balanced(places: Iterable[Place]) -> Sequence[Balanced]:
    """All entries of nodes; none where the kernel has no IPVS."""
    found: list[Balanced] = []
    for place in places:
        if place.kind == "node":
            with (
                contextlib.suppress(OSError),
                entered(place.namespace),
                open("/proc/thread-self/net/ip_vs_conn") as table,
            ):
                next(table, None)
                found += (_entry(place, line.split()) for line in table)
    return found


def _entry(place: Place, fields: list[str]) -> Balanced:
    protocol, client, client_port, virtual, port, real, real_port, state, expires, *_ = fields
    return Balanced(
        place=place,
        protocol=protocol,
        client=_socket(client, client_port),
        virtual=_socket(virtual, port),
        real=_socket(real, real_port),
        state=state,
        expires_s=int(expires),
    )


def _socket(address: str, port: str) -> Socket:
    if ":" in address:
        ip = socket.inet_ntop(socket.AF_INET6, socket.inet_pton(socket.AF_INET6, address))
    else:
        ip = socket.inet_ntoa(bytes.fromhex(address))
    return Socket(ip=ip, port=int(port, 16))
