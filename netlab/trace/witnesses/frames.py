"""Where the packets witness gets its frames from: BPF programs, or else packet sockets.

Programs cost the traffic of others a quarter of what sockets cost it, and see what comes before the
kernel has begun to stamp for these; they need CAP_BPF, CAP_PERFMON and a kernel that is new enough.
Sockets, one in each namespace, need CAP_NET_RAW alone.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from netlab.kernel import namespaces, socket_filter
from netlab.kernel.frame_events import FrameEvents
from netlab.kernel.packet_sockets import WHOLE, Frame, Tap, close_all
from netlab.kernel.socket_filter import Test
from netlab.trace.place import Place

# A flood on a bridge of a thousand ports is a thousand copies; memory is used only as they come.
_BUFFER = 4 << 20

# Frames that are kept have all that is asked for in one of the ways to be wanted.
Ways = Sequence[Sequence[Test]]


class Source(Protocol):
    """What both have in common."""

    places: list[Place]  # where it sees
    failed: list[str]  # why it does not elsewhere
    stamps: bool  # whether each frame has the time of its passage, and not that of being read

    def read(self, place: Place) -> Frame | None:
        """The next frame of a place, or None if none waits."""

    def now(self) -> int:
        """The time by the clock that frames are stamped by, ns."""

    @property
    def lost(self) -> int:
        """How many frames did not fit the buffer until now."""

    def close(self) -> None:
        """Give everything back."""


class Programs:
    """BPF programs.  Raises as :class:`FrameEvents` does, and OSError if a place is not there."""

    stamps = True

    def __init__(self, places: Sequence[Place], ways: Ways) -> None:
        self.places = list(places)
        self.failed: list[str] = []
        self._by_number = {
            os.stat(namespaces.path(place.namespace)).st_ino: place for place in places
        }
        self._waiting: dict[Place, deque[Frame]] = {place: deque() for place in places}
        self._events = FrameEvents(ways)

    def read(self, place: Place) -> Frame | None:
        waiting = self._waiting[place]
        if not waiting:
            for namespace, frame in self._events.read():
                if namespace in self._by_number:
                    self._waiting[self._by_number[namespace]].append(frame)
        return waiting.popleft() if waiting else None

    def now(self) -> int:
        return self._events.now()

    @property
    def lost(self) -> int:
        return self._events.lost

    def close(self) -> None:
        self._events.close()


class Sockets:
    """Packet sockets, one in each place that can be watched, with a filter of classic BPF."""

    stamps = False  # not before some milliseconds after the first socket asks for it

    def __init__(self, places: Sequence[Place], program: bytes) -> None:
        self.failed: list[str] = []
        self._taps: dict[Place, Tap] = {}
        for place in places:
            try:
                with namespaces.entered(place.namespace):
                    self._taps[place] = Tap(program, _BUFFER)
            except OSError as error:
                self.failed.append(f"{place}: {error.strerror}")
        self.places = list(self._taps)

    def read(self, place: Place) -> Frame | None:
        return self._taps[place].read()

    def now(self) -> int:
        return time.time_ns()

    @property
    def lost(self) -> int:
        return sum(tap.lost for tap in self._taps.values())

    def close(self) -> None:
        close_all(self._taps.values())


def source(places: Sequence[Place], wanted: Ways | bytes) -> Source:
    """The better one of those that work here for what is wanted: ways, or a classic program."""
    if isinstance(wanted, bytes):
        return Sockets(places, wanted)
    try:
        return Programs(places, wanted)
    except (OSError, KeyError, ValueError):
        return Sockets(places, socket_filter.program(wanted, WHOLE))
