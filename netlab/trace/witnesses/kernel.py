"""The kernel's own word: where each buffer of the probe was, and where and why it was freed.

It sees packets come in as the packets witness does, and beyond that what no device shows: the
function that gave a packet up, and the reason.  See :mod:`netlab.kernel.skb_events`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

import msgspec

from netlab.kernel import namespaces
from netlab.kernel.skb_events import Kind, SkbEvent, SkbEvents
from netlab.trace.aim import Place
from netlab.trace.dissect import Role, dissect
from netlab.trace.mark import Mark
from netlab.trace.model import Packet
from netlab.trace.witnesses import Canary

# Freed as lost, but nothing is: what belongs to sockets that end, copies for taps, and frames for
# another MAC, which a flooding bridge sends to everybody.
_HARMLESS = ("QUEUE_PURGE", "PACKET_SOCK_ERROR", "OTHERHOST", "SOCKET_FILTER")


class Moment(msgspec.Struct, frozen=True):
    """What the kernel did with a buffer of the probe.

    `in`: it entered `device`; `drop`: it was given up, in `function` and for `reason`.
    `packet` and `role` are told of drops alone.
    """

    kind: Kind
    place: Place
    t_ns: int  # CLOCK_MONOTONIC
    device: str
    buffer: int
    reason: str | None = None
    function: str | None = None
    packet: Packet | None = None
    role: Role | None = None

    @property
    def is_loss(self) -> bool:
        """Whether a packet was lost by it, for all that the reason says."""
        return self.kind == "drop" and self.reason not in _HARMLESS

    @property
    def where(self) -> str:
        """Device and place; a packet that is not routed yet has no device."""
        return f"{self.device} of {self.place}" if self.device else str(self.place)

    @property
    def code(self) -> str:
        """The function, without the offset in it."""
        return (self.function or "an unknown function").partition("+")[0]

    def __str__(self) -> str:
        return f"the kernel dropped it on {self.where}: {self.reason} in {self.code}"


class Kernel:
    """The kernel witness."""

    name = "kernel"

    def __init__(self, mark: Mark, vxlan_port: int, words: Sequence[tuple[int, bytes]]) -> None:
        self._mark = mark
        self._vxlan_port = vxlan_port
        self._words = words
        self._events: SkbEvents | None = None
        self._kept: list[tuple[SkbEvent, Place]] = []
        self._canaries: list[tuple[Place, bytes]] = []
        self._places: dict[int, Place] = {}
        self._owners: dict[int, Place] = {}
        self._failed: str | None = None
        self._lost = 0

    def arm(self, places: Sequence[Place]) -> None:
        try:
            self._places = {
                os.stat(namespaces.path(place.namespace)).st_ino: place for place in places
            }
            self._events = SkbEvents(self._words)
        except OSError as error:
            self._failed = f"BPF: {error.strerror or error}"
        except (KeyError, ValueError) as error:
            self._failed = f"BTF: {error}"

    def saw(self, canary: Canary) -> bool:
        if self._events is None:
            return True
        self._read()
        return any(
            place == canary.place and canary.cookie in frame for place, frame in self._canaries
        )

    def events(self) -> list[Moment]:
        """Every moment of the probe, in time order."""
        self._read()
        moments = [self._moment(event, place) for event, place in self._kept]
        return [moment for moment in moments if moment]

    def _read(self) -> None:
        if self._events is None:
            return
        for event in self._events.read():
            place = self._places.get(event.namespace) or self._owners.get(event.buffer)
            if place is None:
                continue
            self._owners[event.buffer] = place
            if any(needle in event.frame for needle in self._mark.needles):
                self._kept.append((event, place))
            elif event.kind == "in":
                self._canaries.append((place, event.frame))
        self._kept.sort(key=lambda pair: pair[0].t_ns)

    def _moment(self, event: SkbEvent, place: Place) -> Moment | None:
        seen = None
        if event.kind == "drop":
            seen = dissect(event.frame, self._mark, self._vxlan_port)
            if seen is None:
                return None
        return Moment(
            kind=event.kind,
            place=place,
            t_ns=event.t_ns,
            device=event.device,
            buffer=event.buffer,
            reason=event.reason,
            function=event.function,
            packet=seen.packet if seen else None,
            role=seen.role if seen else None,
        )

    def arrivals(self, until_ns: int) -> Counter[tuple[Place, str]]:
        """How often a packet that may be the probe's came in on each device, until a moment."""
        return Counter(
            (place, event.device)
            for event, place in self._kept
            if event.kind == "in" and event.t_ns < until_ns
        )

    @property
    def descriptors(self) -> list[int]:
        """Readable where an event waits."""
        return [self._events.ring.fileno()] if self._events else []

    def dropped(self) -> bool:
        """Whether the last that happened to the probe or its answer was that it was lost."""
        self._read()
        if not self._kept:
            return False
        last, _ = self._kept[-1]
        return last.kind == "drop" and last.reason not in _HARMLESS

    def disarm(self) -> None:
        if self._events:
            self._lost += self._events.lost
            self._events.close()
            self._events = None

    @property
    def report(self) -> str:
        if self._failed:
            return f"unavailable: {self._failed}"
        lost = self._lost + (self._events.lost if self._events else 0)
        return f"partial: {lost} events did not fit the buffer" if lost else "ok"
