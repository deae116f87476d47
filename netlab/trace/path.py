"""The probe's path: sightings of two legs put in order, without the copies of a flooding bridge.

A leg is the list of sightings on the way there (`forward`) or back (`reply`; what comes back may
be the answer, a TCP reset or an ICMP error).  Between two sightings, before the first and after the
last lies a :class:`Passage`; rules and decisions belong to passages.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol

import msgspec

from netlab.kernel.listeners import Listener
from netlab.kernel.xfrm import Policy
from netlab.trace.model import Leg
from netlab.trace.model_steps import Bridge, Neighbour, Route, Socket, Tuple
from netlab.trace.place import Place
from netlab.trace.witnesses.decisions import Link
from netlab.trace.witnesses.packets import Sighting


class Tables(Protocol):
    """The questions that correlation asks; answered by the decisions witness, or by a record."""

    def link(self, place: Place, device: str | int) -> Link | None: ...

    def route(
        self,
        place: Place,
        destination: str,
        source: str | None = None,
        iif: str | None = None,
        mark: int = 0,
    ) -> Route | None: ...

    def neighbour(self, place: Place, address: str, device: str) -> Neighbour | None: ...

    def port(self, place: Place, bridge: str, mac: str) -> Bridge | None: ...

    def tunnel(self, place: Place, device: str, mac: str) -> Bridge | None: ...

    def ports(self, place: Place, bridge: str) -> list[Link]: ...

    def early_chains(self, place: Place) -> list[str] | None: ...

    def policies(self, place: Place) -> list[Policy] | None: ...

    def bridge_netfilter(self, place: Place) -> bool: ...

    def off_by(self, place: Place, device: str) -> str | None: ...

    def setting(self, place: Place, path: str) -> str | None: ...

    def failed_inserts(self, place: Place) -> int: ...

    def remembered(self, place: Place, protocol: str, flow: Tuple) -> Socket | None: ...

    def listeners(self, place: Place, protocol: str, port: int) -> list[Listener] | None: ...


class Passage(msgspec.Struct, frozen=True):
    """From one sighting to the next of a leg.

    Without `before` the packet was sent at `after`; without `after` nothing more was seen of it.
    `flooded`: the bridge on the way sent copies out of all its ports.
    """

    leg: Leg
    before: Sighting | None
    after: Sighting | None
    flooded: bool = False

    @property
    def place(self) -> Place | None:
        """The namespace that the packet passed through; None where it crossed a veth pair."""
        ends = {end.place for end in (self.before, self.after) if end}
        return ends.pop() if len(ends) == 1 else None


def legs(
    sightings: Sequence[Sighting], tables: Tables, ends: Sequence[Place] = ()
) -> tuple[list[Passage], list[Passage]]:
    """The passages there and back; each list is empty if that leg was not seen at all.

    `ends`: who gets an answer that does not go to the sender.  What they say to it is not followed.
    """
    there = [each for each in sightings if each.role == "probe"]
    back = [each for each in sightings if each.role != "probe"]
    answers = [each for each in back if each.role == "answer"]
    if any(each.place in ends and each.direction == "in" for each in answers):
        back = answers
    return _passages("forward", there, tables), _passages("reply", back, tables)


def of_answers(sightings: Sequence[Sighting]) -> list[Sighting]:
    """ICMP errors about the answer, which go to who answered: no part of either leg."""
    there = {each.packet.flow for each in sightings if each.role == "probe"}
    back = {each.packet.flow for each in sightings if each.role == "answer"}
    found = []
    for each in sightings:
        about = each.packet.quotes
        if each.role != "error" or about is None or about in there:
            continue
        # It may have been translated behind the last sight of it.
        if about in back or about.reversed in there:
            found.append(each)
    return found


def _passages(leg: Leg, sightings: list[Sighting], tables: Tables) -> list[Passage]:
    path, flooded = _without_copies(sightings, tables)
    if not path:
        return []
    ends: list[Sighting | None] = [None, *path, None]
    return [
        Passage(leg, before, after, after in flooded) for before, after in itertools.pairwise(ends)
    ]


def _without_copies(
    sightings: list[Sighting], tables: Tables
) -> tuple[list[Sighting], list[Sighting]]:
    """The sightings on the path, and those of them that a flooding bridge sent among others."""
    # A device that is no bridge port throws away what is addressed to another MAC.
    path = [
        each
        for each in sightings
        if each.direction == "out" or not each.stranger or _bridge(each, tables)
    ]
    flooded = []
    for group in _groups(path, tables):
        taken = [each for each in group if _received(each, path, tables)] or _learned(group, tables)
        for each in group:
            if taken and each not in taken:
                path.remove(each)
        flooded += taken
    return path, flooded


def _groups(path: list[Sighting], tables: Tables) -> list[list[Sighting]]:
    """Sightings that left several ports of one bridge, with nothing entering it in between."""
    groups: dict[tuple[Place, str, int], list[Sighting]] = {}
    entered: dict[Place, int] = {}
    for each in path:
        bridge = _bridge(each, tables)
        if each.direction == "in":
            entered[each.place] = entered.get(each.place, 0) + 1
        elif bridge:
            key = each.place, bridge, entered.get(each.place, 0)
            groups.setdefault(key, []).append(each)
    return [group for group in groups.values() if len(group) > 1]


def _received(sent: Sighting, path: list[Sighting], tables: Tables) -> bool:
    """Whether the far end of a veth pair took what left the near one."""
    near = tables.link(sent.place, sent.device)
    for each in path:
        if each.direction == "in" and each.place != sent.place and near:
            far = tables.link(each.place, each.device)
            if far and (far.peer, near.peer) == (near.index, far.index):
                return True
    return False


def _learned(group: list[Sighting], tables: Tables) -> list[Sighting]:
    """The port that the bridge knows for the MAC by now."""
    bridge, mac = _bridge(group[0], tables), group[0].packet.dst_mac
    known = tables.port(group[0].place, bridge, mac) if bridge and mac else None
    return [each for each in group if known and each.device == known.port]


def _bridge(sighting: Sighting, tables: Tables) -> str | None:
    link = tables.link(sighting.place, sighting.device)
    return link.master if link else None
