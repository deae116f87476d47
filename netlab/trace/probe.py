"""The probe: one packet that is really sent, and the answer to it.

TCP is a real handshake of the kernel's, with the initial sequence number that the mark asks for
(set through TCP_REPAIR before connect, tcp(7) does not tell of it; CRIU works so).  It is closed at
once and politely.  UDP and ICMP are built by scapy and sent on a raw IP socket in the source's
namespace, so that they pass the source's own OUTPUT hooks; frames put on a device would not.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import sys
import time
from typing import Literal

import msgspec

from netlab.kernel.namespaces import entered
from netlab.trace import dissect
from netlab.trace.aim import Aim
from netlab.trace.mark import Mark
from netlab.trace.model import Socket
from netlab.trace.witnesses.rules import Rules

_TCP_REPAIR, _TCP_REPAIR_QUEUE, _TCP_QUEUE_SEQ = 19, 20, 21
_TCP_SEND_QUEUE = 2
_IP_RECVERR = 11
_DISCARD = 9  # a port that is only named, never sent to
_ECHO_REPLY = 0
# What an answer may take after a rule has dropped the probe, which should mean that none comes.
_GRACE_S = 0.05
_ICMP_ERRORS = (3, 11, 12)  # destination unreachable, time exceeded, parameter problem

# With these connect() says that it found no way, and has sent nothing.
_UNSENT = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EINVAL, errno.EACCES)

# What the source's kernel reported, if anything.
Outcome = Literal["answered", "refused", "unreachable", "no-route", "no-answer"]

_ERRORS: dict[int, Outcome] = {
    errno.ECONNREFUSED: "refused",
    errno.ENETUNREACH: "unreachable",
    errno.EHOSTUNREACH: "unreachable",
    errno.EACCES: "unreachable",
}


class Answer(msgspec.Struct, frozen=True):
    """What came of a probe; `error` is the kernel's word for it."""

    source: Socket
    outcome: Outcome
    elapsed_us: int
    error: str | None = None


def send(aim: Aim, mark: Mark, timeout_s: float, rules: Rules) -> Answer:
    """Send the probe and wait for the answer, an error, or the end of `timeout_s`.

    Where the rules witness reports that the probe was dropped, there is little left to wait for.
    """
    probe = _tcp if aim.protocol == "tcp" else _datagram
    begin = time.monotonic()
    try:
        return probe(aim, mark, timeout_s, rules)
    except OSError as error:
        # The address to send from is not there, or no port is free.
        source = Socket(ip=aim.source_address or (*aim.source.addresses, "0.0.0.0")[0])
        return _answer(source, begin, error.errno, unsent=True)


def _tcp(aim: Aim, mark: Mark, timeout_s: float, rules: Rules) -> Answer:
    with entered(aim.source.namespace):
        connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, 1)
        connection.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR_QUEUE, _TCP_SEND_QUEUE)
        connection.setsockopt(
            socket.IPPROTO_TCP, _TCP_QUEUE_SEQ, mark.sequence.to_bytes(4, sys.byteorder)
        )
        connection.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, 0)
        if aim.source_address:
            connection.bind((aim.source_address, 0))
        # An ICMP error that comes back while connect() still holds the socket, as it does over
        # veth, is not reported by connect(); the error queue has it.
        connection.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, 1)
        begin = time.monotonic()
        code = connection.connect_ex((aim.destination, aim.port))
        source = _source(aim, connection)
        if code in _UNSENT:
            return _answer(source, begin, code, unsent=True)
        if code == errno.EINPROGRESS:
            if not _Wait(connection, select.POLLOUT, begin + timeout_s, rules).ready():
                return _answer(source, begin, None)
            code = _queued_error(connection) or connection.getsockopt(
                socket.SOL_SOCKET, socket.SO_ERROR
            )
        return _answer(source, begin, code)


def _queued_error(connection: socket.socket) -> int:
    """The errno in the error queue's `struct sock_extended_err`, 0 if it is empty."""
    with contextlib.suppress(BlockingIOError):
        _, ancillary, _, _ = connection.recvmsg(1, 256, socket.MSG_ERRQUEUE)
        for level, kind, data in ancillary:
            if (level, kind) == (socket.IPPROTO_IP, _IP_RECVERR):
                return int.from_bytes(data[:4], sys.byteorder)
    return 0


def _datagram(aim: Aim, mark: Mark, timeout_s: float, rules: Rules) -> Answer:
    with entered(aim.source.namespace):
        raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
        # It holds the source port of a UDP probe, so that the kernel does not answer the answer
        # with "port unreachable"; for ICMP its connect() only tells the source address.
        held = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        receiver = (
            held
            if aim.protocol == "udp"
            else socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
        )
    with raw, held, receiver:
        if aim.source_address:
            held.bind((aim.source_address, 0))
        code = held.connect_ex((aim.destination, aim.port or _DISCARD))
        source = _source(aim, held)
        if code:
            return _answer(source, time.monotonic(), code, unsent=True)
        packet = _build(aim, mark, held.getsockname())
        begin = time.monotonic()
        try:
            raw.sendto(packet, (aim.destination, 0))
        except OSError as error:
            return _answer(source, begin, error.errno, unsent=error.errno in _UNSENT)
        wait = _Wait(receiver, select.POLLIN, begin + timeout_s, rules)
        return _answer(source, begin, _receive(aim, mark, receiver, wait))


def _build(aim: Aim, mark: Mark, source: tuple[str, int]) -> bytes:
    inet = dissect.load().inet
    address, port = source
    ip = inet.IP(src=address, dst=aim.destination, ttl=64, flags="DF")
    if aim.protocol == "udp":
        body = inet.UDP(sport=port, dport=aim.port)
    else:
        body = inet.ICMP(type="echo-request", id=os.getpid() & 0xFFFF, seq=1)
    return bytes(ip / body / mark.cookie)


class _Wait:
    """Waiting for a socket until `end` (monotonic seconds), or until a rule has dropped the probe.

    A drop is not the end at once: the copy of a packet that a flooding bridge sent elsewhere may be
    what was dropped.
    """

    def __init__(self, awaited: socket.socket, event: int, end: float, rules: Rules) -> None:
        self._awaited = awaited.fileno()
        self._end = end
        self._rules = rules
        self._poll = select.poll()
        self._poll.register(awaited, event)
        for descriptor in rules.descriptors:
            self._poll.register(descriptor, select.POLLIN)

    def ready(self) -> bool:
        """Whether the socket is ready; False if the time is over."""
        while (left := self._end - time.monotonic()) > 0:
            found = self._poll.poll(left * 1000)
            if any(descriptor == self._awaited for descriptor, _ in found):
                return True
            if found and self._rules.dropped():
                self._end = min(self._end, time.monotonic() + _GRACE_S)
        return False


def _receive(aim: Aim, mark: Mark, receiver: socket.socket, wait: _Wait) -> int | None:
    """0 for an answer, the errno of an error, None if nothing came."""
    while wait.ready():
        try:
            data = receiver.recv(2048)
        except OSError as error:
            return error.errno
        if aim.protocol == "udp":
            return 0
        header = (data[0] & 15) * 4
        if data[header] == _ECHO_REPLY and data[header + 8 :].startswith(mark.cookie):
            return 0
        if data[header] in _ICMP_ERRORS and mark.cookie in data:
            return errno.EHOSTUNREACH
    return None


def _source(aim: Aim, used: socket.socket) -> Socket:
    """Where a socket sends from; before a route was found, the source's own address."""
    address, port = used.getsockname()
    if address == "0.0.0.0":
        address = aim.source_address or (*aim.source.addresses, address)[0]
    return Socket(ip=address, port=None if aim.protocol == "icmp" else port)


def _answer(source: Socket, begin: float, code: int | None, unsent: bool = False) -> Answer:
    outcome: Outcome = "no-answer"
    if code == 0:
        outcome = "answered"
    elif code is not None:
        outcome = "no-route" if unsent else _ERRORS.get(code, "no-answer")
    return Answer(
        source=source,
        outcome=outcome,
        elapsed_us=round((time.monotonic() - begin) * 1_000_000),
        error=os.strerror(code) if code else None,
    )
