"""The probe: one packet that is really sent, and the answer to it.

TCP is a real handshake of the kernel's, with the initial sequence number that the mark asks for
(set through TCP_REPAIR before connect, tcp(7) does not tell of it; CRIU works so).  It is closed at
once, and politely unless its port was asked for and may be wanted again.  UDP and ICMP are built by
scapy and sent on a raw IP socket in the source's namespace, so that they pass the source's own
OUTPUT hooks; frames put on a device would not.  A raw IP socket never fragments, so what may be is
sent on an ordinary one.

An address that the source does not have is sent from by IP_TRANSPARENT, which is a setting of the
socket alone; IP_FREEBIND binds to it, but finds no route from there.  A raw SYN would need no such
thing, but the kernel would answer its answer with a reset.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
import sys
import time
from collections.abc import Callable
from typing import Literal

import msgspec

from netlab.kernel.namespaces import entered
from netlab.problems import Exit, NetlabError, Problem
from netlab.trace import application, dissect
from netlab.trace.aim import Aim
from netlab.trace.family import IPV4, Family, first_of
from netlab.trace.form import Dns, Http
from netlab.trace.mark import Mark
from netlab.trace.model import Application
from netlab.trace.model_steps import Socket
from netlab.trace.witnesses import News

_TCP_REPAIR, _TCP_REPAIR_QUEUE, _TCP_QUEUE_SEQ = 19, 20, 21
_TCP_SEND_QUEUE = 2
# Level, option to have errors queued, which is also their kind: ip(7), ipv6(7)
_ERROR_QUEUE = {4: (socket.IPPROTO_IP, 11), 6: (socket.IPPROTO_IPV6, 25)}
# Level and option for the TTL, for addresses of others, for leave to fragment: ip(7), ipv6(7)
_TTL = {4: (socket.IPPROTO_IP, socket.IP_TTL), 6: (socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS)}
_TRANSPARENT = {4: (socket.IPPROTO_IP, 19), 6: (socket.IPPROTO_IPV6, 75)}
_MTU_DISCOVER = {4: (socket.IPPROTO_IP, 10), 6: (socket.IPPROTO_IPV6, 23)}
_PMTUDISC_DONT = 0
_USUAL_TTL = 64
_RESET_ON_CLOSE = struct.pack("@ii", 1, 0)  # struct linger
_DISCARD = 9  # a port that is only named, never sent to
# What an answer may take after the probe was dropped, which should mean that none comes.
_GRACE_S = 0.05
_ECHO_REPLY = {4: 0, 6: 129}
_UDP_HEADER = 8
# Destination unreachable, packet too big (IPv6), time exceeded, parameter problem
_ICMP_ERRORS = {4: (3, 11, 12), 6: (1, 2, 3, 4)}

# Of datagrams, and of TCP.
_NOT_PERMITTED = (
    Problem(
        "not-permitted",
        "such a probe is made byte by byte and sent on a raw socket, and this process may have "
        "none: it lacks CAP_NET_RAW",
        hint="`--protocol tcp` does without",
    ),
    Problem(
        "not-permitted",
        "a TCP probe chooses its sequence number, by which it is known again, and this process may "
        "not: it lacks CAP_NET_ADMIN",
        hint="`--protocol udp` and `icmp` do without",
    ),
)
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
    application: Application | None = None


def send(
    aim: Aim,
    mark: Mark,
    timeout_s: float,
    news: News,
    meanwhile: Callable[[socket.socket], object] | None = None,
) -> Answer:
    """Send the probe and wait for the answer, an error, or the end of `timeout_s`.

    Where a witness tells that the probe was dropped, there is little left to wait for.
    `meanwhile` is called with a TCP connection that was answered, before it is closed.
    """
    begin = time.monotonic()
    try:
        if aim.protocol == "tcp":
            return _tcp(aim, mark, timeout_s, news, meanwhile)
        return _datagram(aim, mark, timeout_s, news)
    except OSError as error:
        if error.errno == errno.EPERM:
            raise NetlabError(_NOT_PERMITTED[aim.protocol == "tcp"], Exit.MACHINE) from None
        # The address to send from is not there, or no port is free.
        source = Socket(ip=_own_address(aim))
        return _answer(source, begin, error.errno, unsent=True)


def _tcp(
    aim: Aim,
    mark: Mark,
    timeout_s: float,
    news: News,
    meanwhile: Callable[[socket.socket], object] | None,
) -> Answer:
    with entered(aim.source.namespace):
        connection = socket.socket(
            aim.family.address_family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK
        )
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, 1)
        connection.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR_QUEUE, _TCP_SEND_QUEUE)
        connection.setsockopt(
            socket.IPPROTO_TCP, _TCP_QUEUE_SEQ, mark.sequence.to_bytes(4, sys.byteorder)
        )
        connection.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, 0)
        _form(aim, connection)
        if aim.source_port:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # A connection after one in TIME_WAIT gets its sequence number from that
            # (tcp_twsk_unique), so the next probe from this port had better find none.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        if aim.source_address or aim.source_port:
            connection.bind((aim.source_address or "", aim.source_port))
        # An ICMP error that comes back while connect() still holds the socket, as it does over
        # veth, is not reported by connect(); the error queue has it.
        connection.setsockopt(*_ERROR_QUEUE[aim.family.version], 1)
        begin = time.monotonic()
        code = connection.connect_ex((aim.destination, aim.port))
        source = _source(aim, connection)
        if code in _UNSENT:
            return _answer(source, begin, code, unsent=True)
        if code == errno.EINPROGRESS:
            if not _Wait(connection, select.POLLOUT, begin + timeout_s, news).ready():
                return _answer(source, begin, None)
            code = _queued_error(connection, aim.family) or connection.getsockopt(
                socket.SOL_SOCKET, socket.SO_ERROR
            )
        answer = _answer(source, begin, code)
        if code:
            return answer
        if isinstance(aim.application, Http):
            said = application.get(connection, aim.application, aim, timeout_s)
            answer = msgspec.structs.replace(answer, application=said)
        if meanwhile:
            meanwhile(connection)
        return answer


def _form(aim: Aim, used: socket.socket) -> None:
    """Set on a socket what the probe should be like."""
    version = aim.family.version
    if aim.ttl:
        used.setsockopt(*_TTL[version], aim.ttl)
    if aim.spoofed:
        used.setsockopt(*_TRANSPARENT[version], 1)
    if aim.fragment:
        used.setsockopt(*_MTU_DISCOVER[version], _PMTUDISC_DONT)


def _queued_error(connection: socket.socket, family: Family) -> int:
    """The errno in the error queue's `struct sock_extended_err`, 0 if it is empty."""
    with contextlib.suppress(BlockingIOError):
        _, ancillary, _, _ = connection.recvmsg(1, 256, socket.MSG_ERRQUEUE)
        for level, kind, data in ancillary:
            if (level, kind) == _ERROR_QUEUE[family.version]:
                return int.from_bytes(data[:4], sys.byteorder)
    return 0


def _datagram(aim: Aim, mark: Mark, timeout_s: float, news: News) -> Answer:
    family = aim.family
    with entered(aim.source.namespace):
        raw = socket.socket(family.address_family, socket.SOCK_RAW, socket.IPPROTO_RAW)
        # It holds the source port of a UDP probe, so that the kernel does not answer the answer
        # with "port unreachable"; for ICMP its connect() only tells the source address.
        held = socket.socket(family.address_family, socket.SOCK_DGRAM)
        receiver = (
            held
            if aim.protocol == "udp"
            else socket.socket(family.address_family, socket.SOCK_RAW, family.icmp_number)
        )
    with raw, held, receiver:
        _form(aim, held)
        _form(aim, receiver)
        if aim.source_address or aim.source_port:
            held.bind((aim.source_address or "", aim.source_port))
        code = held.connect_ex((aim.destination, aim.port or _DISCARD))
        source = _source(aim, held)
        if code:
            return _answer(source, time.monotonic(), code, unsent=True)
        packet = _build(aim, mark, *held.getsockname()[:2])
        if aim.fragment and aim.protocol == "icmp":
            receiver.bind((source.ip, 0))
        begin = time.monotonic()
        try:
            if aim.fragment:
                headers = aim.family.header + (_UDP_HEADER if aim.protocol == "udp" else 0)
                receiver.sendto(packet[headers:], (aim.destination, aim.port or 0))
            else:
                raw.sendto(packet, (aim.destination, 0))
        except OSError as error:
            return _answer(source, begin, error.errno, unsent=error.errno in _UNSENT)
        wait = _Wait(receiver, select.POLLIN, begin + timeout_s, news)
        error_number, data = _receive(aim, mark, receiver, wait)
        answer = _answer(source, begin, error_number)
        if not isinstance(aim.application, Dns):
            return answer
        said = application.understood_dns(
            aim.application, aim.family.version, data, answer.error, answer.elapsed_us
        )
        return msgspec.structs.replace(answer, application=said)


def new_mark(aim: Aim) -> Mark:
    """What a probe will be known by."""
    if isinstance(aim.application, Dns):
        return Mark.of_query(application.question(aim.application, aim.family.version), aim.family)
    return Mark.random(aim.protocol, aim.family, aim.fragment)


def _build(aim: Aim, mark: Mark, address: str, port: int) -> bytes:
    layers = dissect.load()
    inet, inet6 = layers.inet, layers.inet6
    # What connection tracking tells one ping from another by, as it does TCP by ports.
    identity = int.from_bytes(os.urandom(2), "big")
    ttl = aim.ttl or _USUAL_TTL
    if aim.family is IPV4:
        ip = inet.IP(src=address, dst=aim.destination, ttl=ttl, flags="DF")
        echo = inet.ICMP(type="echo-request", id=identity, seq=1)
    else:
        # The flow label is what an error that quotes the packet is told from others by.
        label = int.from_bytes(os.urandom(4), "big") % (1 << 20)
        ip = inet6.IPv6(src=address, dst=aim.destination, hlim=ttl, fl=label)
        echo = inet6.ICMPv6EchoRequest(id=identity, seq=1)
    body = inet.UDP(sport=port, dport=aim.port) if aim.protocol == "udp" else echo
    payload = mark.cookie
    if isinstance(aim.application, Dns):
        payload = application.query(aim.application, mark, aim.family.version)
    packet = ip / body / payload
    return bytes(packet / bytes(max(0, (aim.size or 0) - len(packet))))


class _Wait:
    """Waiting for a socket until `end` (monotonic seconds), or until a witness tells of a drop.

    A drop is not the end at once: the copy of a packet that a flooding bridge sent elsewhere may be
    what was dropped.
    """

    def __init__(self, awaited: socket.socket, event: int, end: float, news: News) -> None:
        self._awaited = awaited.fileno()
        self._end = end
        self._news = news
        self.lost = False  # whether a witness told of a drop
        self._poll = select.poll()
        self._poll.register(awaited, event)
        for descriptor in news.descriptors:
            self._poll.register(descriptor, select.POLLIN)

    def ready(self) -> bool:
        """Whether the socket is ready; False if the time is over."""
        while (left := self._end - time.monotonic()) > 0:
            found = self._poll.poll(left * 1000)
            if any(descriptor == self._awaited for descriptor, _ in found):
                return True
            if found and self._news.dropped():
                self.lost = True
                self._end = min(self._end, time.monotonic() + _GRACE_S)
        return False


def _receive(
    aim: Aim, mark: Mark, receiver: socket.socket, wait: _Wait
) -> tuple[int | None, bytes | None]:
    """0 and an answer, the errno of an error, or None if nothing came."""
    other: bytes | None = None
    while wait.ready():
        try:
            data = receiver.recv(1 << 16)
        except OSError as error:
            return error.errno, None
        if aim.protocol == "udp":
            if mark.begins(data) or not (aim.source_port or mark.question):
                return 0, data
            # To a port that others use too this may be what they are answered.
            other = data
            continue
        # A raw socket of IPv6 gives the message without its header: raw(7), ipv6(7)
        header = (data[0] & 15) * 4 if aim.family is IPV4 else 0
        version = aim.family.version
        if data[header] == _ECHO_REPLY[version] and mark.begins(data[header + 8 :]):
            return 0, data
        if data[header] in _ICMP_ERRORS[version] and mark.is_in(data):
            return errno.EHOSTUNREACH, None
    lost = mark.question or wait.lost
    return (None, None) if other is None or lost else (0, other)


def _source(aim: Aim, used: socket.socket) -> Socket:
    """Where a socket sends from; before a route was found, the source's own address."""
    address, port = used.getsockname()[:2]
    if address == aim.family.unspecified:
        address = _own_address(aim)
    return Socket(ip=address, port=None if aim.protocol == "icmp" else port)


def _own_address(aim: Aim) -> str:
    return (
        aim.source_address or first_of(aim.family, aim.source.addresses) or aim.family.unspecified
    )


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
