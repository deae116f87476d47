"""Frames of many sources in one order of time, with little held back.

Each source hands out its own frames in order.  A frame is told once no source can have an earlier
one: a source that had nothing more to read when the clock said `now` has told all of before, but
for a margin that the kernel takes between stamping a frame and queueing it.  A source that is
behind holds the others back, which are then not read on, so that memory is bounded; what does not
fit their buffers the kernel counts as dropped.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

from netlab.kernel.packet_sockets import Frame

MARGIN_NS = 2_000_000
MOST_HELD = 1024  # frames of one source
_BATCH = 256


class Source(Protocol):
    """Where frames come from."""

    def read(self) -> Frame | None:
        """The next frame, or None if none waits."""


S = TypeVar("S", bound=Source)


class Merging(Generic[S]):
    """Frames with their sources, in time order; that of one source is never broken."""

    def __init__(self, sources: Sequence[S]) -> None:
        self._latest = dict.fromkeys(sources, 0)
        self._held = dict.fromkeys(sources, 0)
        self._heap: list[tuple[int, int, S, Frame]] = []
        self._number = 0

    @property
    def waiting(self) -> bool:
        """Whether frames are held back."""
        return bool(self._heap)

    def collect(self, ready: Iterable[S], now_ns: int) -> Iterator[tuple[S, Frame]]:
        """Read from the sources that have something, and tell what may be told.

        All other sources must have been empty at `now_ns`, wall clock.
        """
        horizon = now_ns - MARGIN_NS
        for source in ready:
            if not self._read(source):
                horizon = min(horizon, self._latest[source])
        return self._told(horizon)

    def finish(self, sources: Iterable[S], until_ns: int) -> Iterator[tuple[S, Frame]]:
        """What is left from before a time, when nothing more is wanted."""
        left = set(sources)
        while left:
            left = {
                source
                for source in left
                if self._latest[source] <= until_ns and not self._read(source)
            }
            behind = min((self._latest[source] for source in left), default=until_ns)
            yield from self._told(min(behind, until_ns))

    def _read(self, source: S) -> bool:
        """Whether nothing is left to read of a source."""
        for _ in range(min(_BATCH, MOST_HELD - self._held[source])):
            frame = source.read()
            if frame is None:
                return True
            self._latest[source] = max(self._latest[source], frame.t_ns)
            self._held[source] += 1
            self._number += 1
            heapq.heappush(self._heap, (self._latest[source], self._number, source, frame))
        return False

    def _told(self, horizon_ns: int) -> Iterator[tuple[S, Frame]]:
        while self._heap and self._heap[0][0] <= horizon_ns:
            _, _, source, frame = heapq.heappop(self._heap)
            self._held[source] -= 1
            yield source, frame
