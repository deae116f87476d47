"""One round of questions: a socket for each, opened in its client's namespace, none of which waits.

Over TCP a pod's workload is asked by two requests on one connection, whom it sees and who it is;
over UDP by two datagrams.  Where nothing listens, a socket of this command answers: it says who it
stands for, and whom it sees.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from netlab.kernel import dns_message, namespaces
from netlab.verify.model import Answer, End, Question

_REQUESTS = (
    b"GET /clientip HTTP/1.1\r\nHost: verify\r\n\r\n"
    b"GET /hostname HTTP/1.1\r\nHost: verify\r\nConnection: close\r\n\r\n"
)
_DNS = dns_message.query("", "SOA")
_DATAGRAMS = (b"clientip", b"hostname")
_AGAIN_S = 0.3  # a datagram may be lost where much is sent at once
_RESET = struct.pack("ii", 1, 0)  # struct linger: leave nothing behind that waits for a minute
_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
_PIECE = 4096

RESPONDER_PORT = 9
"""Where this command answers, if nobody else has that port: a policy may let some ports through."""


class Responders:
    """Sockets of this command in namespaces where nothing listens; a context."""

    def __init__(self, wanted: Iterable[tuple[End, str]]) -> None:
        """`wanted`: who should answer, and at which address of theirs."""
        self._wanted = sorted(set(wanted), key=lambda each: (each[0].namespace, each[1]))
        self.sockets: dict[int, tuple[socket.socket, str]] = {}
        self._ports: dict[tuple[str, str], int] = {}

    def __enter__(self) -> Responders:
        try:
            for end, address in self._wanted:
                with namespaces.entered(end.namespace):
                    opened = _datagrams(address)
                self.sockets[opened.fileno()] = opened, str(end)
                try:
                    opened.bind((address, RESPONDER_PORT))
                except OSError:  # somebody else's
                    opened.bind((address, 0))
                self._ports[end.namespace, address] = opened.getsockname()[1]
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for opened, _name in self.sockets.values():
            opened.close()
        self.sockets.clear()

    def port(self, question: Question) -> int:
        """Where the target of a question is asked."""
        return question.port or self._ports[question.target.namespace, question.address]

    def answer(self, descriptor: int) -> None:
        """Answer all that waits at a socket."""
        opened, name = self.sockets[descriptor]
        with contextlib.suppress(BlockingIOError, ConnectionError):
            while True:
                _, client = opened.recvfrom(_PIECE)
                opened.sendto(f"{_text(client)}\n{name}\n".encode(), client)


def ask(
    part: Sequence[Question],
    responders: Responders,
    timeout_s: float,
    done: Callable[[int], None] = lambda count: None,
) -> list[Answer]:
    """The answers, in the order of the questions; who has not answered in time is not reached.

    Needs root.  FileNotFoundError if a namespace is missing.
    """
    return _Round(part, responders, timeout_s).run(done)


class _Asking:
    """A question that is under way."""

    def __init__(self, question: Question, opened: socket.socket, port: int) -> None:
        self.question = question
        self.socket = opened
        self.port = port
        self.own = ""
        self.heard = b""
        self.datagrams: list[bytes] = []

    @property
    def is_to_workload(self) -> bool:
        return self.question.port != 0


class _Round:
    def __init__(self, part: Sequence[Question], responders: Responders, timeout_s: float) -> None:
        self._part = part
        self._responders = responders
        self._timeout_s = timeout_s
        self._answers: dict[int, Answer] = {}
        self._asking: dict[int, tuple[int, _Asking]] = {}  # by descriptor
        self._poll = select.epoll()

    def run(self, done: Callable[[int], None]) -> list[Answer]:
        try:
            for descriptor in self._responders.sockets:
                self._poll.register(descriptor, select.EPOLLIN)
            self._send_all()
            self._await()
        finally:
            for _, asking in self._asking.values():
                _leave(asking.socket)
            self._poll.close()
        done(len(self._part))
        nothing = Answer("unreachable", "no answer came")
        return [self._answers.get(index, nothing) for index in range(len(self._part))]

    def _send_all(self) -> None:
        here = ""
        with contextlib.ExitStack() as inside:
            for index, question in enumerate(self._part):
                if question.source.namespace != here:
                    inside.close()
                    here = question.source.namespace
                    inside.enter_context(namespaces.entered(here))
                self._send(index, question)
                if index % 64 == 63:
                    self._progress(0.0)

    def _send(self, index: int, question: Question) -> None:
        port = self._responders.port(question)
        if question.protocol == "UDP":
            opened = _datagrams(question.address)
        else:
            kind = socket.SOCK_STREAM | socket.SOCK_NONBLOCK
            opened = socket.socket(_FAMILIES[question.family], kind)
        asking = _Asking(question, opened, port)
        code = opened.connect_ex((question.address, port))
        if code not in (0, errno.EINPROGRESS):
            opened.close()
            self._answers[index] = Answer("unreachable", os.strerror(code))
            return
        asking.own = _text(opened.getsockname())
        self._asking[opened.fileno()] = index, asking
        if question.protocol == "UDP":
            self._poll.register(opened, select.EPOLLIN)
            self._say(index, asking)
        else:
            self._poll.register(opened, select.EPOLLOUT)

    def _say(self, index: int, asking: _Asking) -> None:
        """The datagrams of a question."""
        try:
            words = _DATAGRAMS if asking.is_to_workload else _DATAGRAMS[:1]
            for each in (_DNS,) if asking.question.dns else words:
                asking.socket.send(each)
        except BlockingIOError:
            pass
        except OSError as error:
            self._lost(index, asking, error)

    def _await(self) -> None:
        start = time.monotonic()
        again = start + _AGAIN_S
        while self._asking and (now := time.monotonic()) < start + self._timeout_s:
            if now >= again:
                again = start + self._timeout_s
                for index, asking in list(self._asking.values()):
                    if asking.question.protocol == "UDP":
                        self._say(index, asking)
            self._progress(min(again, start + self._timeout_s) - now)

    def _progress(self, timeout_s: float) -> None:
        for descriptor, events in self._poll.poll(max(0.0, timeout_s), 512):
            if descriptor in self._responders.sockets:
                self._responders.answer(descriptor)
            elif descriptor in self._asking:
                index, asking = self._asking[descriptor]
                try:
                    self._hear(index, asking, events)
                except BlockingIOError:
                    pass
                except OSError as error:
                    self._lost(index, asking, error)

    def _hear(self, index: int, asking: _Asking, events: int) -> None:
        opened = asking.socket
        if asking.question.dns and (asking.question.protocol == "UDP" or asking.heard):
            opened.recv(_PIECE)
            self._decide(index, asking, "", "")
        elif asking.question.protocol == "UDP":
            asking.datagrams.append(opened.recv(_PIECE))
            texts = [each.decode(errors="replace").strip() for each in asking.datagrams]
            if asking.is_to_workload:
                seen = next((each for each in texts if _is_end(each)), "")
                name = next((each for each in texts if not _is_end(each)), "")
                if seen and name:
                    self._decide(index, asking, seen, name)
            else:
                seen, _, name = texts[-1].partition("\n")
                self._decide(index, asking, seen, name)
        elif events & select.EPOLLOUT and not asking.heard:
            code = opened.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise OSError(code, os.strerror(code))
            asking.own = _text(opened.getsockname())
            if asking.question.dns:
                opened.send(struct.pack("!H", len(_DNS)) + _DNS)
                asking.heard = _DNS
            else:
                opened.send(_REQUESTS)
            self._poll.modify(opened, select.EPOLLIN)
        else:
            data = opened.recv(_PIECE)
            asking.heard += data
            if not data:
                self._decide(index, asking, *_said(asking.heard))

    def _decide(self, index: int, asking: _Asking, seen: str, name: str) -> None:
        question, own = asking.question, asking.own
        if not name:
            # A program of the pod's own: it can be spoken with, whoever it thinks that speaks.
            answer = Answer("reached", "what answers there does not say whom it sees", own)
        elif question.names and name not in question.names:
            answer = Answer("unreachable", f"{name} answered in its place", own, seen, name)
        elif question.demand not in ("outside", "service") and seen != own:
            answer = Answer("translated", f"{own} was seen as {seen}", own, seen, name)
        else:
            answer = Answer("reached", "", own, seen, name)
        self._end(index, asking, answer)

    def _lost(self, index: int, asking: _Asking, error: OSError) -> None:
        words = os.strerror(error.errno) if error.errno else str(error)
        self._end(index, asking, Answer("unreachable", words, asking.own))

    def _end(self, index: int, asking: _Asking, answer: Answer) -> None:
        if asking.socket.fileno() in self._asking:
            del self._asking[asking.socket.fileno()]
            self._answers[index] = answer
            _leave(asking.socket)


def _leave(opened: socket.socket) -> None:
    if opened.type == socket.SOCK_STREAM:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    opened.close()


def _datagrams(address: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)


def _said(heard: bytes) -> tuple[str, str]:
    """The bodies of two answers over HTTP: whom it sees, and who it is."""
    bodies = list(_bodies(heard))
    return (bodies[0], bodies[1]) if len(bodies) == 2 and _is_end(bodies[0]) else ("", "")


def _bodies(heard: bytes) -> Iterator[str]:
    while heard:
        head, found, rest = heard.partition(b"\r\n\r\n")
        lengths = [
            line.split(b":")[1]
            for line in head.split(b"\r\n")
            if line.lower().startswith(b"content-length:")
        ]
        if not found or not lengths or not lengths[0].strip().isdigit():
            return
        length = int(lengths[0])
        yield rest[:length].decode(errors="replace").strip()
        heard = rest[length:]


def _is_end(text: str) -> bool:
    """Whether a text is an address and a port."""
    host, _, port = text.rpartition(":")
    return port.isdecimal() and bool(host) and not host.strip("0123456789abcdef.:[]")


def _text(address: tuple[str, int] | tuple[str, int, int, int]) -> str:
    """An address and a port as the workload writes them."""
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
