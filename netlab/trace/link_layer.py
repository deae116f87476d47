"""Frames on their way to a MAC that is not its owner's, and bridges that do not know their own.

A next hop's MAC is that of a device of its owner; a bridge takes the frames itself that are for
its own MAC, by an entry of its table that is there since the bridge is.
"""

from __future__ import annotations

from collections.abc import Iterator

from netlab.datapath.overlays import tunnels
from netlab.trace.case import Case
from netlab.trace.model import Leg
from netlab.trace.model_steps import Neighbour
from netlab.trace.place import Place
from netlab.trace.refusals import Doubt
from netlab.trace.steps import Chapter
from netlab.trace.witnesses.decisions import Link

_ADDRESSED = {
    "pod": ["eth0"],
    "node": ["eth0", "cbr0"],
    "switch": ["br0"],
    "host": ["eth0"],
    "container": ["eth0"],
    "gateway": ["eth0", "eth1"],
    "balancer": ["eth0"],
}


def misdirected(case: Case, leg: Leg) -> Iterator[tuple[Place, Doubt]]:
    """Where a frame was sent astray on a leg: first by whom, then by which bridge."""
    chapters = case.story.leg(leg)
    for chapter in chapters:
        for step in chapter.steps:
            if isinstance(step, Neighbour) and step.mac and chapter.passage.place:
                yield from _wrong_mac(case, chapter.passage.place, step)
    if chapters:
        yield from _flooded(case, chapters[-1])


def _wrong_mac(case: Case, place: Place, step: Neighbour) -> Iterator[tuple[Place, Doubt]]:
    """An entry with a MAC that is not that of who has the address."""
    for owner in case.aim.places:
        if step.address not in owner.addresses or owner == place:
            continue
        theirs = {link.name: link.mac for link in _devices(case, owner) if link.mac}
        if not theirs or step.mac in theirs.values():
            return
        fix = f"neigh del {step.address} dev {step.device}"
        if step.device in theirs and step.device in _tunnels(case, owner):
            # Nobody would tell it again.
            entry = f"{step.address} lladdr {theirs[step.device]} dev {step.device}"
            fix = f"neigh replace {entry} nud permanent"
        yield (
            place,
            Doubt(
                "neighbour-wrong",
                f"{place} sends what is for {step.address} to {step.mac} on {step.device} "
                f"({step.state}), and {owner}, which has that address, has no such MAC",
                f"`ip -n {place.namespace} {fix}`, or `netlab up`",
            ),
        )


def _tunnels(case: Case, place: Place) -> tuple[str, ...]:
    if place.kind != "node":
        return ()
    return tunnels(case.lab, case.lab.node(place.name), case.aim.family.version)


def _devices(case: Case, place: Place) -> list[Link]:
    """The devices of a place that have addresses."""
    names = _ADDRESSED[place.kind]
    names += _tunnels(case, place)
    return [link for link in (case.tables.link(place, name) for name in names) if link]


def _flooded(case: Case, last: Chapter) -> Iterator[tuple[Place, Doubt]]:
    """A bridge that sent out of its ports what is for itself."""
    seen = last.passage.before
    if seen is None or seen.direction != "out":
        return
    port = case.tables.link(seen.place, seen.device)
    bridge = case.tables.link(seen.place, port.master) if port and port.master else None
    if bridge and bridge.mac and bridge.mac == seen.packet.dst_mac:
        yield from ((seen.place, doubt) for doubt in unknown_to_itself(case, seen.place, bridge))


def unknown_to_itself(case: Case, place: Place, bridge: Link | None) -> Iterator[Doubt]:
    """A bridge that does not take what is sent to its own MAC."""
    if bridge is None or bridge.kind != "bridge" or bridge.mac is None:
        return
    known = case.tables.port(place, bridge.name, bridge.mac)
    if known and known.port != bridge.name:
        fix = f"fdb replace {bridge.mac} dev {bridge.name} self permanent"
        yield Doubt(
            "fdb-missing",
            f"{bridge.name} of {place} has no FDB entry for its own MAC, {bridge.mac}, so it sends "
            "out of its ports what is for itself",
            f"`bridge -n {place.namespace} {fix}`, or `netlab up`",
        )
