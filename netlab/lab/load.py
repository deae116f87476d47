"""A client that keeps connecting, and what becomes of each of its connections.

Every one is new, over TCP, asks once over HTTP and waits for the end of the answer; a server of
another protocol that says anything at all has answered, too.  Sockets do not wait for each other:
one that is slow does not make the next one late.
"""

from __future__ import annotations

import errno
import select
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal

import msgspec

from netlab.kernel import namespaces

Result = Literal["answered", "refused", "reset", "closed", "unreachable", "timed-out", "failed"]

_RESULTS: dict[int, Result] = {
    errno.ECONNREFUSED: "refused",
    errno.ECONNRESET: "reset",
    errno.EPIPE: "reset",
    errno.EHOSTUNREACH: "unreachable",
    errno.ENETUNREACH: "unreachable",
    errno.ETIMEDOUT: "timed-out",
}
_PIECE = 64 * 1024


class Attempt(msgspec.Struct, frozen=True):
    """One connection: when it was begun, s after the first one, and how it ended.

    `closed`: it was, without an answer.
    """

    at_s: float
    result: Result
    elapsed_ms: float


class Summary(msgspec.Struct, frozen=True):
    """What became of all; times in seconds after the first connection was begun."""

    connections: int
    answered: int
    lost: int
    results: dict[str, int]
    first_lost_s: float | None
    last_lost_s: float | None
    slowest_ms: float


def summarized(attempts: Sequence[Attempt]) -> Summary:
    """What became of connections."""
    lost = [each for each in attempts if each.result != "answered"]
    return Summary(
        connections=len(attempts),
        answered=len(attempts) - len(lost),
        lost=len(lost),
        results=dict(sorted(Counter(each.result for each in attempts).items())),
        first_lost_s=min((each.at_s for each in lost), default=None),
        last_lost_s=max((each.at_s for each in lost), default=None),
        slowest_ms=max((each.elapsed_ms for each in attempts), default=0.0),
    )


def connect_again_and_again(
    namespace: str, address: str, port: int, rate: float, duration_s: float, timeout_s: float
) -> Iterator[Attempt]:
    """Begin `rate` connections a second for so long; each is told when it has ended."""
    with namespaces.entered(namespace):
        yield from _Client(address, port, timeout_s).run(rate, duration_s)


class _Open:
    """A connection that is under way."""

    def __init__(self, address: str, port: int, began: float) -> None:
        self.began = began
        self.events = select.POLLOUT
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.socket = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self.result: Result | None = None
        host = f"[{address}]" if ":" in address else address
        self._request = f"GET / HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n"
        self._heard = False
        error = self.socket.connect_ex((address, port))
        if error not in (0, errno.EINPROGRESS):
            self.result = _RESULTS.get(error, "failed")

    def progress(self) -> None:
        """Go on; `result` is set when it has ended."""
        try:
            if self.events == select.POLLOUT:
                if error := self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                    raise OSError(error, "")
                self.socket.send(self._request.encode())
                self.events = select.POLLIN
                return
            while data := self.socket.recv(_PIECE):
                self._heard = self._heard or bool(data)
            self.result = "answered" if self._heard else "closed"
        except BlockingIOError:
            pass
        except OSError as error:
            self.result = _RESULTS.get(error.errno or 0, "failed")


class _Client:
    def __init__(self, address: str, port: int, timeout_s: float) -> None:
        self._to = address, port
        self._timeout_s = timeout_s
        self._poll = select.poll()
        self._open: dict[int, _Open] = {}  # by descriptor, the oldest first

    def run(self, rate: float, duration_s: float) -> Iterator[Attempt]:
        start = time.monotonic()
        number = 0
        total = max(1, round(rate * duration_s))
        try:
            while number < total or self._open:
                now = time.monotonic()
                if number < total and now >= start + number / rate:
                    number += 1
                    self._begin(now)
                for ended in self._ended(now):
                    elapsed_ms = round((time.monotonic() - ended.began) * 1000, 3)
                    assert ended.result is not None
                    yield Attempt(round(ended.began - start, 3), ended.result, elapsed_ms)
                self._wait(start + number / rate if number < total else None)
        finally:
            for each in self._open.values():
                each.socket.close()

    def _begin(self, now: float) -> None:
        opened = _Open(*self._to, now)
        self._open[opened.socket.fileno()] = opened
        self._poll.register(opened.socket, opened.events)

    def _ended(self, now: float) -> Iterator[_Open]:
        for descriptor, each in list(self._open.items()):
            if each.result is None and now >= each.began + self._timeout_s:
                each.result = "timed-out"
            if each.result is not None:
                del self._open[descriptor]
                self._poll.unregister(descriptor)
                each.socket.close()
                yield each

    def _wait(self, next_at: float | None) -> None:
        now = time.monotonic()
        times = [each.began + self._timeout_s for each in self._open.values()][:1]
        times += [] if next_at is None else [next_at]
        left = max(0.0, min(times, default=now) - now)
        for descriptor, _ in self._poll.poll(left * 1000):
            opened = self._open[descriptor]
            before = opened.events
            opened.progress()
            if opened.events != before:
                self._poll.modify(descriptor, opened.events)
