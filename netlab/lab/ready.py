"""Whether declared programs are ready: what each is to bring about in its namespace is there."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from netlab.datapath.state import Process, Route
from netlab.kernel import dns_message, namespaces, observe, rtnetlink
from netlab.kernel.listeners import listeners
from netlab.kernel.netlink import Socket

TIMEOUT_S = 10.0
_LOOK_S = 0.05  # sockets that begin to listen tell nobody
_PROTOCOLS = {"TCP": 6, "UDP": 17}


class Lacking(NamedTuple):
    """A program that is not ready, and what of it is not there."""

    name: str
    namespace: str
    what: tuple[str, ...]

    def __str__(self) -> str:
        shown = ", ".join(self.what[:3])
        more = f" and {len(self.what) - 3} more" if len(self.what) > 3 else ""
        return f"{self.name} of {self.namespace}: not there yet: {shown}{more}"


def lacking(programs: Sequence[Process]) -> tuple[Lacking, ...]:
    """Those that are not ready now."""
    found = []
    for program in programs:
        with contextlib.suppress(FileNotFoundError):
            if what := tuple(_missing(program)):
                found.append(Lacking(program.name, program.namespace, what))
    return tuple(found)


def await_ready(
    programs: Sequence[Process],
    tell: Callable[[str], None] = lambda line: None,
    timeout_s: float = TIMEOUT_S,
) -> tuple[Lacking, ...]:
    """Wait until all are ready; those that are not after the timeout are returned.

    `tell` gets a line whenever there is less to wait for.
    """
    deadline = time.monotonic() + timeout_s
    waiting = [
        program for program in programs if program.routes or program.listens or program.names
    ]
    said = 0
    while waiting:
        with _events(waiting[0]) as events:
            left = lacking(waiting)
            count = sum(len(each.what) for each in left)
            if count and count != said:
                names = ", ".join(sorted({each.name for each in left}))
                tell(f"waiting for {names}: {count} to come")
                said = count
            remaining = deadline - time.monotonic()
            if not left or remaining <= 0:
                return left
            late = {(each.name, each.namespace) for each in left}
            waiting = [each for each in waiting if (each.name, each.namespace) in late]
            events.await_event(min(remaining, _LOOK_S))
    return ()


@contextlib.contextmanager
def _events(program: Process) -> Iterator[Socket]:
    """A socket that hears of new routes where a program runs."""
    with namespaces.entered(program.namespace):
        events = Socket(groups=rtnetlink.RTMGRP_IPV4_ROUTE)
    with events:
        yield events


def _missing(program: Process) -> Iterator[str]:
    if program.routes:
        there = _routes(program.namespace)
        for route in program.routes:
            if route not in there:
                yield f"route {route.destination} via {route.via}"
    for protocol, port in program.listens:
        if not listeners(program.namespace, _PROTOCOLS[protocol], port):
            yield f"{protocol} port {port}"
    if program.zone_serial is not None and not _serves(program.namespace, program.zone_serial):
        yield f"version {program.zone_serial} of its zone"
    for name in program.names:
        if not _is_bound(program.namespace, name):
            yield f"socket @{name}"


def _serves(namespace: str, serial: int) -> bool:
    """Whether the name server of a namespace has that version of the root's zone."""
    with namespaces.entered(namespace):
        asking = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with asking, contextlib.suppress(OSError):
        asking.settimeout(_LOOK_S)
        asking.connect(("127.0.0.1", 53))
        asking.send(dns_message.query("", "SOA"))
        answer = dns_message.decode(asking.recv(dns_message.LARGEST))
        return any(each.serial == serial for each in answer.answers)
    return False


def _is_bound(namespace: str, name: str) -> bool:
    """Whether a Unix socket of the network namespace has an abstract name."""
    with namespaces.entered(namespace):
        probe = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    with probe, contextlib.suppress(ConnectionRefusedError):
        probe.connect(f"\0{name}")
        return True
    return False


def _routes(namespace: str) -> set[Route]:
    with namespaces.entered(namespace), Socket() as netlink:
        return set(observe.every_route(netlink))
