"""TCP streams that are passed on: what comes in goes to one of several backends, and back.

Like the workload that runs it, it knows no namespaces: who connects to a backend is in the right
one already.
"""

from __future__ import annotations

import errno
import os
import random
import select
import socket
import time
from collections.abc import Callable
from typing import NamedTuple

_CONNECT_MS = 5000  # a backend that does not answer is given up after this, as by kube-proxy
_PIECE = 64 * 1024
_UNSENT_LIMIT = 4 * _PIECE  # who sends faster than the other side reads has to wait

Backend = tuple[str, int]  # address, port


class Backends(NamedTuple):
    """Where streams go to; one that was chosen is kept as long as it is chosen within `sticky_s`.

    That is for everybody together: all who come by way of loopback have one address.
    """

    addresses: tuple[Backend, ...]
    sticky_s: float | None = None


class Choice:
    """Which backend is next."""

    def __init__(self, backends: Backends, clock: Callable[[], float] = time.monotonic) -> None:
        self._backends = backends
        self._clock = clock
        self._last: tuple[Backend, float] | None = None

    def change(self, backends: Backends) -> None:
        """Choose among others from now on."""
        if backends.sticky_s != self._backends.sticky_s:
            self._last = None
        self._backends = backends

    def next(self) -> Backend:
        """One at random, or the remembered one."""
        addresses, sticky_s = self._backends
        now = self._clock()
        kept = self._last
        if kept and sticky_s and kept[0] in addresses and now - kept[1] <= sticky_s:
            chosen = kept[0]
        else:
            chosen = random.choice(addresses)
        self._last = (chosen, now)
        return chosen


def connect(backend: Backend) -> socket.socket:
    """A socket that begins to connect from the namespace that this thread is in; OSError."""
    family = socket.AF_INET6 if ":" in backend[0] else socket.AF_INET
    opened = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _CONNECT_MS)
    error = opened.connect_ex(backend)
    if error not in (0, errno.EINPROGRESS):
        opened.close()
        raise OSError(error, os.strerror(error))
    return opened


class Side:
    """One of the two sockets of a stream.

    `events` are those to wait for now.  The stream is over when neither side waits for any.
    """

    other: Side

    def __init__(self, opened: socket.socket, *, connecting: bool = False) -> None:
        self.socket = opened
        self._connecting = connecting
        self._unsent = bytearray()
        self._heard_all = False
        self._said_all = False

    @property
    def events(self) -> int:
        """EPOLLIN as long as the other side takes more, EPOLLOUT if there is something to say."""
        if self._connecting:
            return select.EPOLLOUT
        hears = not self._heard_all and len(self.other._unsent) < _UNSENT_LIMIT
        return select.EPOLLIN * hears | select.EPOLLOUT * bool(self._unsent)

    def progress(self, events: int) -> None:
        """Read and write what can be; OSError if the stream is broken."""
        if self._connecting:
            if error := self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise OSError(error, os.strerror(error))
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 0)
            self._connecting = False
        elif events & ~select.EPOLLOUT and not self._heard_all:
            self._read()
        self._write()
        self.other._write()

    def _read(self) -> None:
        try:
            data = self.socket.recv(_PIECE)
        except BlockingIOError:
            return
        if data:
            self.other._unsent += data
        else:
            self._heard_all = True

    def _write(self) -> None:
        if self._connecting:
            return
        if self._unsent:
            try:
                sent = self.socket.send(self._unsent)
            except BlockingIOError:
                return
            del self._unsent[:sent]
        if self.other._heard_all and not self._unsent and not self._said_all:
            self._said_all = True
            self.socket.shutdown(socket.SHUT_WR)


def stream(accepted: socket.socket, backend: socket.socket) -> tuple[Side, Side]:
    """The two sides of a stream whose backend begins to connect."""
    near, far = Side(accepted), Side(backend, connecting=True)
    near.other, far.other = far, near
    return near, far
