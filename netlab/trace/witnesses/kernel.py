"""The kernel's own word: where each buffer of the probe was, and where and why it was freed.

It sees packets come in as the packets witness does, and beyond that what no device shows: the
function that gave a packet up, and the reason.  See :mod:`netlab.kernel.skb_events`.

Where BPF is refused, tracefs tells the reasons (:mod:`netlab.kernel.tracefs`).  It shows neither
namespaces nor bytes, so that the probe is known there by device, length and time of its arrivals.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence

import msgspec

from netlab.kernel import namespaces, tracefs
from netlab.kernel.skb_events import Kind, Pattern, SkbEvent, SkbEvents
from netlab.trace.dissect import Role, dissect
from netlab.trace.mark import Mark
from netlab.trace.model_steps import Packet
from netlab.trace.place import Place
from netlab.trace.witnesses import Canary
from netlab.trace.witnesses.packets import Sighting, words_of

# Freed as lost, but nothing is: what belongs to sockets that end, copies for taps, and frames for
# another MAC, which a flooding bridge sends to everybody.
_HARMLESS = ("QUEUE_PURGE", "PACKET_SOCK_ERROR", "OTHERHOST", "SOCKET_FILTER")

_MAC_HEADER = 14

# How far the stamp of a packet and the line of tracefs about it may lie apart.
_APART_NS = 1_000_000


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

    def __init__(self, mark: Mark, vxlan_port: int, patterns: Sequence[Pattern]) -> None:
        self._mark = mark
        self._marking = words_of(mark)
        self._vxlan_port = vxlan_port
        self._patterns = patterns
        self._events: SkbEvents | None = None
        self._kept: list[tuple[SkbEvent, Place]] = []
        self._old = 0
        self._lost_then = self._lost_now = 0
        self._canaries: list[tuple[Place, bytes]] = []
        self._places: dict[int, Place] = {}
        self._owners: dict[int, Place] = {}
        self._instance: tracefs.Instance | None = None
        self._lines: list[tracefs.Line] = []
        self._to_wall_ns = 0
        self._failed: str | None = None
        self._lost = 0
        self._since = 0

    def arm(self, places: Sequence[Place]) -> None:
        try:
            self._places = {
                os.stat(namespaces.path(place.namespace)).st_ino: place for place in places
            }
            self._events = SkbEvents(self._patterns)
        except OSError as error:
            self._failed = f"BPF: {error.strerror or error}"
        except (KeyError, ValueError) as error:
            self._failed = f"BTF: {error}"
        if self._failed:
            self._arm_tracefs()

    def _arm_tracefs(self) -> None:
        try:
            self._instance = tracefs.Instance()
            # Packets are stamped by the wall clock.
            self._to_wall_ns = time.time_ns() - time.monotonic_ns()
        except OSError as error:
            self._failed = f"{self._failed}; tracefs: {error.strerror or error}"

    def saw(self, canary: Canary) -> bool:
        self._read()
        if self._instance:
            return any(line.device == "lo" for line in self._lines)
        return self._events is None or any(
            place == canary.place and canary.cookie in frame for place, frame in self._canaries
        )

    def age(self) -> None:
        """Drop what was read before the last call, and what was lost before it is no matter."""
        self._read()
        if self._events:
            self._lost_then, self._lost_now = self._lost_now, self._events.lost
        del self._kept[: self._old]
        self._old = len(self._kept)
        self._owners = {event.buffer: place for event, place in self._kept}
        self._canaries.clear()

    def adopt(self, mark: Mark) -> None:
        """Of what was seen, and from now on, only what bears a mark is the probe."""
        self._read()
        self._mark = mark
        self._marking = words_of(mark)
        self._kept = [pair for pair in self._kept if self._bears(pair[0].frame)]

    def events(self, sightings: Sequence[Sighting] = ()) -> list[Moment]:
        """Every moment of the probe, in time order.

        `sightings` are what tracefs' lines are compared with; BPF needs none.
        """
        self._read()
        if self._lines:
            return traced(self._lines, sightings, self._to_wall_ns)
        moments = [self._moment(event, place) for event, place in self._kept]
        return [moment for moment in moments if moment]

    def _read(self) -> None:
        if self._instance:
            self._lines += self._instance.read()
        if self._events is None:
            return
        for event in self._events.read():
            if event.t_ns < self._since:
                continue
            place = self._places.get(event.namespace)
            if place is None and event.kind == "in" and event.namespace:
                # It has left what is watched: on this kernel another lab, or machine, may have it.
                self._owners.pop(event.buffer, None)
                continue
            place = place or self._owners.get(event.buffer)
            if place is None:
                continue
            self._owners[event.buffer] = place
            if self._bears(event.frame):
                self._kept.append((event, place))
            elif event.kind == "in":
                self._canaries.append((place, event.frame))
        self._kept.sort(key=lambda pair: pair[0].t_ns)

    def _bears(self, frame: bytes) -> bool:
        """Whether a frame has the mark where it may stand.

        The programs look behind the end of short packets too, where others may have left it.
        """
        if not self._marking:
            return self._mark.is_in(frame)
        return any(frame.startswith(word, _MAC_HEADER + at) for at, word in self._marking)

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

    def forget(self) -> None:
        # What is still being written, or stands behind that, is read later.
        self._since = time.monotonic_ns()
        self._read()
        for each in (self._kept, self._canaries, self._lines):
            each.clear()
        self._owners.clear()
        self._lost = -self._events.lost if self._events else 0

    def disarm(self) -> None:
        if self._events:
            self._lost += self._events.lost
            self._events.close()
            self._events = None
        if self._instance:
            instance, self._instance = self._instance, None
            instance.close()

    @property
    def report(self) -> str:
        if self._lines or self._instance:
            return f"partial: {self._failed}; tracefs tells drops by device, length and time"
        if self._failed:
            return f"unavailable: {self._failed}"
        lost = self._lost + (self._events.lost if self._events else 0) - self._lost_then
        return f"partial: {lost} events did not fit the buffer" if lost else "ok"


def traced(
    lines: Sequence[tracefs.Line], sightings: Sequence[Sighting], to_wall_ns: int
) -> list[Moment]:
    """The probe's drops among the lines of everybody: those of buffers that came in as it did.

    A buffer's address serves another packet later, which comes in as something else first.
    """
    found = []
    holders: dict[str, Sighting] = {}
    for line in sorted(lines, key=lambda line: line.t_us):
        holder = holders.pop(line.buffer, None)
        if line.device:
            arrived = _arrival(line, sightings, to_wall_ns)
            if arrived:
                holders[line.buffer] = arrived
        elif holder:
            moment = Moment(
                kind="drop",
                place=holder.place,
                t_ns=line.t_us * 1000,
                device=holder.device,
                buffer=int(line.buffer, 16),
                reason=line.reason,
                function=line.function,
                packet=holder.packet,
                role=holder.role,
            )
            found.append(moment)
    return found


def _arrival(line: tracefs.Line, sightings: Sequence[Sighting], to_wall_ns: int) -> Sighting | None:
    """The sighting that a line tells of: on that device, as long, and next to it in time."""
    apart = {
        abs(line.t_us * 1000 + to_wall_ns - each.t_ns): each
        for each in sightings
        if each.direction == "in"
        and each.device == line.device
        and (each.packet.outer or each.packet).length == line.length
    }
    nearest = min(apart, default=_APART_NS)
    return apart[nearest] if nearest < _APART_NS else None
