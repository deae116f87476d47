"""Packets: one AF_PACKET socket in each namespace sees every device there, both ways.

Bound to no device, the socket also sees devices that come later.  `sll_ifindex` and `sll_pkttype`
name device and direction; the order of arrival on one socket is the kernel's order in that
namespace.  A socket filter keeps out what does not carry the probe's mark, so that the traffic of
others neither fills the buffer nor is slowed down.  Promiscuous mode is not needed and not set.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Sequence

import msgspec

from netlab.kernel.namespaces import entered
from netlab.trace.aim import Place
from netlab.trace.dissect import Role, dissect
from netlab.trace.family import IPV4, IPV6
from netlab.trace.mark import Mark
from netlab.trace.model import Direction, Packet, Socket
from netlab.trace.witnesses import Canary

_ETH_P_ALL = 3
_SO_RCVBUFFORCE = 33
_SO_TIMESTAMPNS = 35
_SO_ATTACH_FILTER = 26
_SOL_PACKET = 263
_PACKET_STATISTICS = 6
_PACKET_OTHERHOST = 3
_PACKET_OUTGOING = 4
_TIMESPEC = struct.Struct("@qq")
_ANCILLARY = socket.CMSG_SPACE(_TIMESPEC.size)
_MAC_HEADER = 14
_UDP_HEADER = 8
_EXTENSION = 8  # the shortest extension header of IPv6, such as that of fragments

# linux/filter.h
_INSTRUCTION = struct.Struct("=HBBI")
_LOAD_WORD, _SKIP_UNLESS_EQUAL, _RETURN = 0x20, 0x15, 0x06

# A flood on a bridge of a thousand ports is a thousand copies; memory is used only as they come.
_BUFFER = 4 << 20
_LONGEST = 2048  # headers and cookies stand in front


class Sighting(msgspec.Struct, frozen=True):
    """The probe on one device.  `stranger`: the frame is addressed to another MAC."""

    place: Place
    device: str
    direction: Direction
    t_ns: int  # wall clock
    packet: Packet
    role: Role
    stranger: bool = False


class _Frame(msgspec.Struct, frozen=True):
    data: bytes
    device: str
    type: int
    t_ns: int


class Packets:
    """The packets witness."""

    name = "packets"

    def __init__(self, mark: Mark, vxlan_port: int, canary: bytes) -> None:
        self._mark = mark
        self._vxlan_port = vxlan_port
        self._filter = program(watched_words(mark, canary))
        self._sockets: dict[Place, socket.socket] = {}
        self._frames: dict[Place, list[_Frame]] = {}
        self._needles = mark.needles
        self._canaries: set[bytes] = set()
        self._stamped = False
        self._lost = 0
        self._failed: list[str] = []

    def arm(self, places: Sequence[Place]) -> None:
        for place in places:
            try:
                with entered(place.namespace):
                    tap = socket.socket(
                        socket.AF_PACKET,
                        socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK,
                        socket.htons(_ETH_P_ALL),
                    )
            except OSError as error:
                self._failed.append(f"{place}: {error.strerror}")
                continue
            attach(tap, self._filter)
            tap.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
            # Without CAP_NET_ADMIN outside the namespace the default size has to do.
            with contextlib.suppress(PermissionError):
                tap.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
            self._sockets[place] = tap
            self._frames[place] = []

    @property
    def stamping(self) -> bool:
        """Whether the kernel stamps arrivals.

        It begins to some milliseconds after the first socket asks for it, from a work queue; until
        then a frame gets the time at which it is read.  Only canaries of after that count.
        """
        return self._stamped

    def saw(self, canary: Canary) -> bool:
        if canary.place not in self._sockets:
            return False  # without packets nothing can be said
        if canary.cookie not in self._canaries:
            self._read(canary.place, canary.cookie)
        return canary.cookie in self._canaries

    def events(self, sent_to: Socket | None = None) -> list[Sighting]:
        """Every sighting of the probe, in time order; that of one namespace is never broken.

        `sent_to` is where the probe went, which the source's own node may turn before any device.
        """
        found: list[tuple[int, Sighting]] = []
        for place in self._sockets:
            self._read(place)
            latest = 0
            for frame in self._frames[place]:
                seen = dissect(frame.data, self._mark, self._vxlan_port)
                if seen is None:
                    continue
                latest = max(latest, frame.t_ns)
                direction: Direction = "out" if frame.type == _PACKET_OUTGOING else "in"
                sighting = Sighting(
                    place,
                    frame.device,
                    direction,
                    latest,
                    seen.packet,
                    seen.role,
                    frame.type == _PACKET_OTHERHOST,
                )
                found.append((latest, sighting))
        found.sort(key=lambda pair: pair[0])
        return _directed([sighting for _, sighting in found], sent_to)

    def arrivals(self) -> Counter[tuple[Place, str]]:
        """How often a frame that may be the probe's came in on each device."""
        return Counter(
            (place, frame.device)
            for place, frames in self._frames.items()
            for frame in frames
            if frame.type != _PACKET_OUTGOING
        )

    def _read(self, place: Place, canary: bytes | None = None) -> None:
        tap = self._sockets[place]
        kept = self._frames[place]
        while True:
            before = time.clock_gettime_ns(time.CLOCK_REALTIME)
            try:
                data, ancillary, _, address = tap.recvmsg(_LONGEST, _ANCILLARY)
            except BlockingIOError:
                return
            if canary and canary in data:
                self._canaries.add(canary)
                self._stamped = _stamp(ancillary) < before
            elif any(needle in data for needle in self._needles):
                device, _, kind = address[:3]
                kept.append(_Frame(data, device, kind, _stamp(ancillary)))

    def disarm(self) -> None:
        for tap in self._sockets.values():
            with contextlib.suppress(OSError):
                _, drops = struct.unpack("=II", tap.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))
                self._lost += drops
        # The kernel waits for a grace period in each close, 8 to 16 ms: all at once.
        closing = [threading.Thread(target=tap.close) for tap in self._sockets.values()]
        for thread in closing:
            thread.start()
        for thread in closing:
            thread.join()
        self._sockets.clear()

    @property
    def report(self) -> str:
        if self._failed and not self._frames:
            return f"unavailable: {self._failed[0]}"
        problems = list(self._failed)
        if not self._stamped:
            problems.append("arrivals were not stamped, so their order between namespaces may err")
        if self._lost:
            problems.append(f"{self._lost} frames of the traffic meanwhile did not fit the buffer")
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
        code += _INSTRUCTION.pack(_LOAD_WORD, 0, 0, _MAC_HEADER + offset)
        code += _INSTRUCTION.pack(_SKIP_UNLESS_EQUAL, 0, 1, int.from_bytes(word, "big"))
        code += _INSTRUCTION.pack(_RETURN, 0, 0, _LONGEST)
    return code + _INSTRUCTION.pack(_RETURN, 0, 0, 0)


def attach(tap: socket.socket, program: bytes) -> None:
    """Have the kernel drop what the program does not keep, before it costs anybody time."""
    import ctypes

    code = ctypes.create_string_buffer(program, len(program))
    count = len(program) // _INSTRUCTION.size
    tap.setsockopt(
        socket.SOL_SOCKET,
        _SO_ATTACH_FILTER,
        struct.pack("@HP", count, ctypes.addressof(code)),
    )


def _stamp(ancillary: list[tuple[int, int, bytes]]) -> int:
    for _, kind, data in ancillary:
        if kind == _SO_TIMESTAMPNS:
            seconds, nanoseconds = _TIMESPEC.unpack_from(data)
            return int(seconds * 1_000_000_000 + nanoseconds)
    return 0


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
