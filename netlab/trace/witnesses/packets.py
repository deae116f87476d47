"""Packets: one AF_PACKET socket in each namespace sees every device there, both ways.

Bound to no device, the socket also sees devices that come later.  `sll_ifindex` and `sll_pkttype`
name device and direction; the order of arrival on one socket is the kernel's order in that
namespace.  A socket filter keeps out what does not carry the probe's mark, so that the traffic of
others neither fills the buffer nor is slowed down.  Promiscuous mode is not needed and not set.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

import msgspec

from netlab.kernel.namespaces import entered
from netlab.kernel.packet_sockets import INSTRUCTION, RETURN, WHOLE, Frame, Tap, close_all
from netlab.trace.aim import Place
from netlab.trace.dissect import Role, dissect
from netlab.trace.family import IPV4, IPV6
from netlab.trace.mark import Mark
from netlab.trace.model import Direction, Packet
from netlab.trace.witnesses import Canary

_MAC_HEADER = 14
_UDP_HEADER = 8
_EXTENSION = 8  # the shortest extension header of IPv6, such as that of fragments

# linux/filter.h
_LOAD_WORD, _SKIP_UNLESS_EQUAL = 0x20, 0x15

# A flood on a bridge of a thousand ports is a thousand copies; memory is used only as they come.
_BUFFER = 4 << 20


class Sighting(msgspec.Struct, frozen=True):
    """The probe on one device.  `stranger`: the frame is addressed to another MAC."""

    place: Place
    device: str
    direction: Direction
    t_ns: int  # wall clock
    packet: Packet
    role: Role
    stranger: bool = False


class Packets:
    """The packets witness."""

    name = "packets"

    def __init__(self, mark: Mark, vxlan_port: int, filter_: bytes) -> None:
        self._mark = mark
        self._vxlan_port = vxlan_port
        self._filter = filter_
        self._taps: dict[Place, Tap] = {}
        self._frames: dict[Place, list[Frame]] = {}
        self._seen: list[bytes] = []
        self._old: dict[Place, int] = {}
        self._canaries: set[bytes] = set()
        self._stamped = False
        self._lost = self._lost_then = self._lost_now = 0
        self._failed: list[str] = []

    def arm(self, places: Sequence[Place]) -> None:
        for place in places:
            try:
                with entered(place.namespace):
                    self._taps[place] = Tap(self._filter, _BUFFER)
            except OSError as error:
                self._failed.append(f"{place}: {error.strerror}")
                continue
            self._frames[place] = []

    @property
    def stamping(self) -> bool:
        """Whether the kernel stamps arrivals.

        It begins to some milliseconds after the first socket asks for it, from a work queue; until
        then a frame gets the time at which it is read.  Only canaries of after that count.
        """
        return self._stamped

    def saw(self, canary: Canary) -> bool:
        if canary.place not in self._taps:
            return False  # without packets nothing can be said
        if canary.cookie not in self._canaries:
            self._read(canary.place, canary.cookie)
        return canary.cookie in self._canaries

    def age(self) -> None:
        """Drop what was read before the last call, and what was lost before it is no matter."""
        lost = sum(tap.lost for tap in self._taps.values())
        self._lost_then, self._lost_now = self._lost_now, lost
        for place, kept in self._frames.items():
            self._read(place)
            del kept[: self._old.get(place, 0)]
            self._old[place] = len(kept)

    def adopt(self, mark: Mark) -> None:
        """Of what was seen, and from now on, only what bears a mark is the probe."""
        for place in self._taps:
            self._read(place)
        self._mark = mark
        self._frames = {
            place: [each for each in kept if any(needle in each.data for needle in mark.needles)]
            for place, kept in self._frames.items()
        }

    def events(self) -> list[Sighting]:
        """Every sighting of the probe, in time order; that of one namespace is never broken."""
        found: list[tuple[Sighting, bytes]] = []
        for place in self._taps:
            self._read(place)
            latest = 0
            for frame in self._frames[place]:
                seen = dissect(frame.data, self._mark, self._vxlan_port)
                if seen is None:
                    continue
                latest = max(latest, frame.t_ns)
                sighting = Sighting(
                    place,
                    frame.device,
                    frame.direction,
                    latest,
                    seen.packet,
                    seen.role,
                    frame.stranger,
                )
                found.append((sighting, frame.data))
        found.sort(key=lambda pair: pair[0].t_ns)
        self._seen = [data for _, data in found]
        return _directed([sighting for sighting, _ in found])

    @property
    def seen(self) -> list[bytes]:
        """The frames of the sightings that :meth:`events` told, whole and in the same order."""
        return self._seen

    def arrivals(self) -> Counter[tuple[Place, str]]:
        """How often a frame that may be the probe's came in on each device."""
        return Counter(
            (place, frame.device)
            for place, frames in self._frames.items()
            for frame in frames
            if frame.direction == "in"
        )

    def _read(self, place: Place, canary: bytes | None = None) -> None:
        tap = self._taps[place]
        kept = self._frames[place]
        before = time.clock_gettime_ns(time.CLOCK_REALTIME)
        while frame := tap.read():
            if canary and canary in frame.data:
                self._canaries.add(canary)
                self._stamped = frame.t_ns < before
            elif any(needle in frame.data for needle in self._mark.needles):
                kept.append(frame)
            before = time.clock_gettime_ns(time.CLOCK_REALTIME)

    def disarm(self) -> None:
        for tap in self._taps.values():
            self._lost += tap.lost
        close_all(self._taps.values())
        self._taps.clear()

    @property
    def report(self) -> str:
        if self._failed and not self._frames:
            return f"unavailable: {self._failed[0]}"
        problems = list(self._failed)
        if not self._stamped:
            problems.append("arrivals were not stamped, so their order between namespaces may err")
        if lost := self._lost - self._lost_then:
            problems.append(f"{lost} frames of the traffic meanwhile did not fit the buffer")
        return f"partial: {'; '.join(problems)}" if problems else "ok"


def watched_words(mark: Mark, canary: bytes) -> list[tuple[int, bytes]]:
    """(Offset from the start of an IP header, four bytes): those of the probe and of canaries."""
    words = mark.words()
    if mark.family is IPV6:
        words += [(offset + _EXTENSION, word) for offset, word in words]
    canaries = {family.header + _UDP_HEADER for family in (IPV4, mark.family)}
    return words + [(offset, canary[:4]) for offset in sorted(canaries)]


def program(words: list[tuple[int, bytes]]) -> bytes:
    """A classic BPF program that keeps frames with one of these words behind their MAC header.

    A load from behind the end of a frame ends the program, so the offsets ascend.
    """
    code = b""
    for offset, word in sorted(words):
        code += INSTRUCTION.pack(_LOAD_WORD, 0, 0, _MAC_HEADER + offset)
        code += INSTRUCTION.pack(_SKIP_UNLESS_EQUAL, 0, 1, int.from_bytes(word, "big"))
        code += INSTRUCTION.pack(RETURN, 0, 0, WHOLE)
    return code + INSTRUCTION.pack(RETURN, 0, 0, 0)


def _directed(sightings: list[Sighting]) -> list[Sighting]:
    """Tell a datagram from its echo: an answer's tuple is one of the probe's turned round."""
    there = set()
    directed = []
    for sighting in sightings:
        if sighting.role == "either":
            back = sighting.packet.flow.reversed in there
            if not back:
                there.add(sighting.packet.flow)
            sighting = msgspec.structs.replace(sighting, role="answer" if back else "probe")
        directed.append(sighting)
    return directed
