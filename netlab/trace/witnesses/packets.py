"""Packets: every frame of the probe on every device of each namespace, in and out.

Frames come from BPF programs or, where those are refused, from one AF_PACKET socket in each
namespace (:mod:`netlab.trace.witnesses.frames`).  Both name device and direction, see devices that
come later, and keep out what does not carry the probe's mark, so that the traffic of others neither
fills the buffer nor is slowed down.  Promiscuous mode is not needed and not set.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

import msgspec

from netlab.kernel import socket_filter
from netlab.kernel.packet_sockets import WHOLE, Frame
from netlab.kernel.socket_filter import equal
from netlab.trace.dissect import Role, dissect
from netlab.trace.family import IPV4, IPV6
from netlab.trace.mark import Mark
from netlab.trace.model import Direction
from netlab.trace.model_steps import Packet, Socket
from netlab.trace.place import Place
from netlab.trace.witnesses import Canary
from netlab.trace.witnesses.fragments import Key, counted, piece_of
from netlab.trace.witnesses.frames import Source, Ways, source

_MAC_HEADER = 14
_UDP_HEADER = 8
_EXTENSION = 8  # the shortest extension header of IPv6, such as that of fragments


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

    def __init__(self, mark: Mark, vxlan_port: int, wanted: Ways | bytes) -> None:
        self._mark = mark
        self._vxlan_port = vxlan_port
        self._wanted = wanted
        self._source: Source | None = None
        self._frames: dict[Place, list[Frame]] = {}
        self._pieces: dict[Place, list[Frame]] = {}
        self._seen: list[bytes] = []
        self._old: dict[Place, int] = {}
        self._canaries: set[bytes] = set()
        self._stamped = False
        self._since = 0
        self._lost = self._lost_before = self._lost_then = self._lost_now = 0
        self._failed: list[str] = []

    def arm(self, places: Sequence[Place]) -> None:
        self._source = source(places, self._wanted)
        self._stamped = self._source.stamps
        self._failed = self._source.failed
        self._frames = {place: [] for place in self._source.places}
        self._pieces = {place: [] for place in self._source.places}

    @property
    def stamping(self) -> bool:
        """Whether the kernel stamps arrivals.

        For sockets it begins to some milliseconds after the first one asks for it, from a work
        queue; until then a frame gets the time at which it is read.  Only canaries of after that
        count.
        """
        return self._stamped

    def saw(self, canary: Canary) -> bool:
        if canary.place not in self._frames:
            return False  # without packets nothing can be said
        if canary.cookie not in self._canaries:
            self._read(canary.place, canary.cookie)
        return canary.cookie in self._canaries

    def age(self) -> None:
        """Drop what was read before the last call, and what was lost before it is no matter."""
        lost = self._source.lost if self._source else 0
        self._lost_then, self._lost_now = self._lost_now, lost
        for place, kept in self._frames.items():
            self._read(place)
            del kept[: self._old.get(place, 0)]
            self._old[place] = len(kept)

    def adopt(self, mark: Mark) -> None:
        """Of what was seen, and from now on, only what bears a mark is the probe."""
        for place in self._frames:
            self._read(place)
        self._mark = mark
        self._frames = {
            place: [each for each in kept if mark.is_in(each.data)]
            for place, kept in self._frames.items()
        }

    def events(self, sent_to: Socket | None = None) -> list[Sighting]:
        """Every sighting of the probe, in time order; that of one namespace is never broken.

        `sent_to` is where the probe went, which the source's own node may turn before any device.
        """
        found: list[tuple[Sighting, Frame]] = []
        for place in self._frames:
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
                found.append((sighting, frame))
        found.sort(key=lambda pair: pair[0].t_ns)
        self._seen = [frame.data for _, frame in found]
        directed = _directed([sighting for sighting, _ in found], sent_to)
        if not self._mark.fragmented:
            return directed
        return self._with_fragments(directed, [frame for _, frame in found])

    @property
    def seen(self) -> list[bytes]:
        """The frames of the sightings that :meth:`events` told, whole and in the same order."""
        return self._seen

    def _with_fragments(
        self, sightings: Sequence[Sighting], frames: Sequence[Frame]
    ) -> list[Sighting]:
        """Sightings with the number of pieces that the packet of each was in.

        By the time that a frame is read, a node further on may have written new headers into those
        pieces that are not the first.  So a piece belongs to a sighting if it is of the same leg.
        """
        firsts = [piece_of(frame.data, self._vxlan_port) for frame in frames]
        keys: dict[bool, set[Key]] = {True: set(), False: set()}
        for sighting, first in zip(sightings, firsts, strict=True):
            if first:
                keys[sighting.role == "probe"].add(first.key)
        others = {
            place: [
                (frame.device, frame.kind, piece_of(frame.data, self._vxlan_port)) for frame in seen
            ]
            for place, seen in self._pieces.items()
        }
        told = []
        for sighting, frame, first in zip(sightings, frames, firsts, strict=True):
            if first:
                of_leg = keys[sighting.role == "probe"]
                pieces = {first} | {
                    piece
                    for device, kind, piece in others[sighting.place]
                    if piece
                    and (device, kind) == (frame.device, frame.kind)
                    and piece.key in of_leg
                }
                packet = msgspec.structs.replace(sighting.packet, fragments=counted(pieces))
                sighting = msgspec.structs.replace(sighting, packet=packet)
            told.append(sighting)
        return told

    def arrivals(self) -> Counter[tuple[Place, str]]:
        """How often a frame that may be the probe's came in on each device, until now."""
        for place in self._frames:
            self._read(place)
        return Counter(
            (place, frame.device)
            for place, frames in self._frames.items()
            for frame in frames
            if frame.direction == "in"
        )

    def _read(self, place: Place, canary: bytes | None = None) -> None:
        if self._source is None:
            return
        kept = self._frames[place]
        before = time.clock_gettime_ns(time.CLOCK_REALTIME)
        while frame := self._source.read(place):
            if canary and canary in frame.data:
                self._canaries.add(canary)
                self._stamped = self._source.stamps or frame.t_ns < before
            elif frame.t_ns < self._since:
                pass
            elif self._mark.is_in(frame.data):
                kept.append(frame)
            elif self._mark.fragmented:
                self._pieces[place].append(frame)
            before = time.clock_gettime_ns(time.CLOCK_REALTIME)

    def forget(self) -> None:
        if self._source is None:
            return
        self._since = self._source.now()
        for place in self._frames:
            self._read(place)
            self._frames[place] = []
            self._pieces[place] = []
        self._canaries.clear()
        self._lost_before = self._source.lost
        self._lost = 0

    def count_lost(self) -> None:
        """Have :attr:`report` know what did not fit the buffers until now."""
        if self._source:
            self._lost = self._source.lost - self._lost_before

    def disarm(self) -> None:
        self.count_lost()
        if self._source:
            source_, self._source = self._source, None
            source_.close()

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


def words_of(mark: Mark) -> list[tuple[int, bytes]]:
    """(Offset from the start of an IP header, four bytes): one holds for each of its packets."""
    words = mark.words()
    if mark.family is IPV6:
        words += [(offset + _EXTENSION, word) for offset, word in words]
    return words


def carried_words(words: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    """The same where IP may be in IP (RFC 2003), and where no MAC header is before it."""
    places = (0, IPV4.header, -_MAC_HEADER)
    return [(offset + more, word) for more in places for offset, word in words]


def watched_words(mark: Mark, canary: bytes) -> list[tuple[int, bytes]]:
    """(Offset from the start of an IP header, four bytes): those of the probe and of canaries."""
    words = words_of(mark)
    canaries = {family.header + _UDP_HEADER for family in (IPV4, mark.family)}
    return words + [(offset, canary[:4]) for offset in sorted(canaries)]


def ways(words: list[tuple[int, bytes]], others: Ways = ()) -> Ways:
    """What holds for frames with one of these words behind their MAC header; and for `others`."""
    marked = [[equal(_MAC_HEADER + at, 4, int.from_bytes(word, "big"))] for at, word in words]
    return [*marked, *others]


def program(words: list[tuple[int, bytes]], others: Ways = ()) -> bytes:
    """The same for packet sockets alone, as classic BPF: they keep the longest packets whole."""
    return socket_filter.program(ways(words, others), WHOLE)


def _directed(sightings: list[Sighting], sent_to: Socket | None) -> list[Sighting]:
    """Tell a datagram from its echo: an answer's source is one that the probe was sent to.

    Its destination need not be one that was seen as a source: where a node had put itself in, its
    bridge sees the answer with the client's address again, and still with the endpoint's.
    """
    reached = {sent_to}
    directed = []
    for sighting in sightings:
        if sighting.role == "either":
            back = sighting.packet.flow.source in reached
            if not back:
                reached.add(sighting.packet.flow.destination)
            sighting = msgspec.structs.replace(sighting, role="answer" if back else "probe")
        directed.append(sighting)
    return directed
