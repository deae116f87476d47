"""Many devices captured at once: packet sockets opened, read, and merged in time order."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import socket
import time
from collections.abc import Iterator, Sequence
from types import TracebackType

import msgspec

from netlab.capture.merging import Merging
from netlab.capture.targets import Target, require_device
from netlab.kernel import namespaces
from netlab.kernel.packet_sockets import Frame, Tap, await_stamps, close_all
from netlab.problems import Exit, NetlabError, Problem
from netlab.trace.place import Place

# Of all sockets together; memory is used only as packets come.
_BUFFERS = 256 << 20
_LEAST_BUFFER, _MOST_BUFFER = 1 << 20, 32 << 20
# How often it is looked whether the lab is still there.
_LOOK_S = 1.0
_DESCRIPTORS = 64  # of a process beside its sockets


class Seen(msgspec.Struct, frozen=True):
    """A frame on a device of a namespace."""

    place: Place
    frame: Frame


class _Source:
    """One socket of a namespace."""

    def __init__(self, place: Place, tap: Tap) -> None:
        self.place = place
        self.tap = tap

    def read(self) -> Frame | None:
        while frame := self.tap.read():
            # On lo every packet goes out and comes in again.
            if frame.device != "lo" or frame.direction == "in":
                return frame
        return None


class Capture:
    """Sockets in the namespaces of targets, from `with` to the end of its body.

    `program` is the filter of all of them.  NetlabError: exit 2 if a target has no such device, 3
    if a namespace is missing.  :meth:`stop` may be called by a signal handler.
    """

    def __init__(self, targets: Sequence[Target], program: bytes) -> None:
        self._sources: dict[int, _Source] = {}
        self._program = program
        self._targets = targets
        self._there: dict[Place, int | None] = {}
        self.devices: list[tuple[Place, str]] = []
        self._stopped = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._waiting = select.epoll()
        self._lost = 0

    def __enter__(self) -> Capture:
        try:
            self._open()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close()

    @property
    def lost(self) -> int:
        """How many packets the kernel could not keep for us."""
        return self._lost + sum(source.tap.lost for source in self._sources.values())

    @property
    def is_down(self) -> bool:
        """Whether none of the namespaces is there any more, so that nothing more will come."""
        return not any(_identity(place) == there for place, there in self._there.items())

    def stop(self) -> None:
        """End :meth:`batches`, with what came until now."""
        os.eventfd_write(self._stopped, 1)

    def batches(self, duration_s: float | None, reader: int | None = None) -> Iterator[list[Seen]]:
        """Frames in time order, as they come, until the end of the time, of the lab, or a stop.

        BrokenPipeError as soon as nobody reads the descriptor `reader` any more.
        """
        merging = Merging(list(self._sources.values()))
        deadline = None if duration_s is None else time.monotonic() + duration_s
        look = time.monotonic() + _LOOK_S
        if reader is not None:
            self._watch(reader)
        while True:
            before = time.clock_gettime_ns(time.CLOCK_REALTIME)
            ends = look if deadline is None else min(look, deadline)
            wait = 0.002 if merging.waiting else max(0.0, ends - time.monotonic())
            ready = [descriptor for descriptor, _ in self._waiting.poll(wait)]
            if reader in ready:
                raise BrokenPipeError
            over = self._stopped in ready or (deadline and time.monotonic() >= deadline)
            if not over and time.monotonic() >= look:
                look = time.monotonic() + _LOOK_S
                over = self.is_down
            if over:
                now = time.clock_gettime_ns(time.CLOCK_REALTIME)
                rest = merging.finish(self._sources.values(), now)
                yield [Seen(source.place, frame) for source, frame in rest]
                return
            found = merging.collect([self._sources[each] for each in ready], before)
            if batch := [Seen(source.place, frame) for source, frame in found]:
                yield batch

    def _watch(self, reader: int) -> None:
        # A file can always be written, and there is nothing to watch.
        with contextlib.suppress(PermissionError):
            self._waiting.register(reader, 0)  # errors alone: a pipe without a reader

    def _open(self) -> None:
        wanted = sum(len(target.devices) or 1 for target in self._targets)
        _allow_descriptors(wanted + _DESCRIPTORS)
        buffer = max(_LEAST_BUFFER, min(_MOST_BUFFER, _BUFFERS // wanted))
        problems = []
        for target in self._targets:
            try:
                with namespaces.entered(target.place.namespace):
                    self._open_here(target, buffer)
            except FileNotFoundError:
                problems.append(
                    Problem(
                        "namespace-missing",
                        f"{target.place} has no network namespace: "
                        f"{namespaces.path(target.place.namespace)} is not there",
                        hint="the lab is not complete: `netlab up` completes it",
                    )
                )
        if problems:
            raise NetlabError(problems, Exit.MACHINE)
        with namespaces.entered(self._targets[0].place.namespace):
            await_stamps()
        self._waiting.register(self._stopped, select.EPOLLIN)
        for descriptor, source in self._sources.items():
            source.tap.forget()
            self._waiting.register(descriptor, select.EPOLLIN)

    def _open_here(self, target: Target, buffer: int) -> None:
        known = [name for _, name in socket.if_nameindex()]
        require_device(target, known)
        narrowed = sorted(target.devices)
        for device in narrowed or (None,):
            tap = Tap(self._program, buffer, device)
            self._sources[tap.fileno()] = _Source(target.place, tap)
        self.devices += [(target.place, name) for name in narrowed or known]
        self._there[target.place] = _identity(target.place)

    def _close(self) -> None:
        self._lost = self.lost
        close_all(source.tap for source in self._sources.values())
        self._sources.clear()
        self._waiting.close()
        os.close(self._stopped)


def _identity(place: Place) -> int | None:
    """What tells a namespace from a later one of the same name; None if it is not there."""
    try:
        return os.stat(namespaces.path(place.namespace)).st_ino
    except FileNotFoundError:
        return None


def _allow_descriptors(count: int) -> None:
    """Let this process have that many, as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        limit = count if hard == resource.RLIM_INFINITY else min(count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
