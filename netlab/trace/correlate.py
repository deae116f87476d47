"""One story from independent witnesses.

Packets give the hops.  Rules carry no time stamp: a run of rules belongs to the passage that its
hook and devices name.  What happened in each passage then is told by :mod:`netlab.trace.steps`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import msgspec

from netlab.trace.family import IPV4, family_of
from netlab.trace.model import Hop, Leg
from netlab.trace.model_steps import Nat, Outer, Rule, Tuple
from netlab.trace.path import Passage, Tables, legs, of_answers
from netlab.trace.place import Place
from netlab.trace.steps import Chapter, Narrator, Texts
from netlab.trace.witnesses.conntrack import Entry
from netlab.trace.witnesses.kernel import Moment
from netlab.trace.witnesses.packets import Sighting
from netlab.trace.witnesses.rules import Run
from netlab.trace.witnesses.virtual_servers import Balanced


class Observed(msgspec.Struct, frozen=True):
    """What the witnesses saw of one probe.  `sent` is its tuple as its socket had it."""

    sent: Tuple
    sightings: Sequence[Sighting]
    runs: Sequence[Run]
    entries: Sequence[Entry]
    tables: Tables
    texts: Texts
    moments: Sequence[Moment] = ()
    balanced: Sequence[Balanced] = ()  # connections of IPVS, whosever they are
    answer_ends: Sequence[Place] = ()  # who gets an answer that does not go to the sender


class Story(msgspec.Struct, frozen=True):
    """Both legs.  `loose`: runs of rules that no passage explains (the packet was never seen).

    `complaints`: sightings of ICMP errors about the answer.
    """

    forward: list[Chapter]
    reply: list[Chapter]
    loose: list[Rule]
    complaints: Sequence[Sighting] = ()

    def leg(self, leg: Leg) -> list[Chapter]:
        return self.forward if leg == "forward" else self.reply

    def nats(self, leg: Leg) -> list[tuple[Chapter, Nat]]:
        return [
            (chapter, step)
            for chapter in self.leg(leg)
            for step in chapter.steps
            if isinstance(step, Nat)
        ]


def correlate(observed: Observed) -> Story:
    """Put the story together."""
    complaints = of_answers(observed.sightings)
    if complaints:
        observed = _without(observed, complaints)
    there, back = legs(observed.sightings, observed.tables, observed.answer_ends)
    forward = _chapters(there, observed.sent, observed)
    arrived = forward[-1].end if forward else observed.sent
    reply = _chapters(back, arrived.reversed, observed)
    loose = _place_runs(forward, reply, observed)
    if forward:
        _end_where_dropped(forward[-1])
    narrator = Narrator(observed.tables, observed.texts, observed.entries, observed.balanced)
    for chapter in [*forward, *reply]:
        chapter.steps = list(narrator.steps(chapter))
    rules = [rule for run in loose for rule in narrator.rules(run)]
    return Story(forward, reply, rules, complaints)


def _without(observed: Observed, complaints: Sequence[Sighting]) -> Observed:
    """What was seen but for some ICMP errors, and the rules that these met."""
    flows = {each.packet.flow for each in complaints}
    return msgspec.structs.replace(
        observed,
        sightings=[each for each in observed.sightings if each not in complaints],
        runs=[run for run in observed.runs if not (run.quoted and run.flow in flows)],
    )


def hops(chapters: Sequence[Chapter], origin_ns: int) -> list[Hop]:
    """Chapters as hops: each with the steps after it, the first one also with those before it."""
    found: list[Hop] = []
    for chapter, following in itertools.pairwise(chapters):
        sighting = chapter.passage.after
        assert sighting is not None
        found.append(
            Hop(
                node=sighting.place.node,
                namespace=sighting.place.namespace,
                device=sighting.device,
                direction=sighting.direction,
                t_ns=sighting.t_ns - origin_ns,
                packet=sighting.packet,
                steps=(chapter.steps if not found else []) + following.steps,
            )
        )
    return found


def _chapters(passages: list[Passage], first: Tuple, observed: Observed) -> list[Chapter]:
    """Chapters with the tuples on both sides; `first` is what the sending socket had."""
    found = []
    for passage in passages:
        begin = passage.before.packet.flow if passage.before else first
        if passage.before is None and passage.after and passage.after.role == "error":
            begin = passage.after.packet.flow
        end = passage.after.packet.flow if passage.after else _last(passage, begin, observed)
        found.append(Chapter(passage, begin, end))
    return found


def _last(passage: Passage, begin: Tuple, observed: Observed) -> Tuple:
    """The tuple that the receiving socket sees, rewritten after the last sighting or not."""
    assert passage.before is not None
    if passage.before.direction == "out" or passage.before.role == "error":
        return begin
    for entry in observed.entries:
        if entry.place != passage.before.place:
            continue
        if passage.leg == "forward" and entry.original == begin:
            return entry.reply.reversed
        if passage.leg == "reply" and entry.reply == begin:
            return entry.original.reversed
    return begin


# --- which rules belong to which passage ---------------------------------------------------------


def _place_runs(forward: list[Chapter], reply: list[Chapter], observed: Observed) -> list[Run]:
    """Give the chapters their runs; returns those of packets that no device saw."""
    loose = []
    for run in observed.runs:
        leg = _leg_of(run, forward, reply, observed)
        chapter = _chapter_of(run, forward if leg == "forward" else reply, observed.tables)
        if chapter:
            chapter.runs.append(run)
        else:
            loose.append(run)
    return loose


def _end_where_dropped(last: Chapter) -> None:
    """What was dropped behind DNAT was seen by no device: the rules that it met say where to."""
    inner = [run for run in last.runs if not run.outer]
    if last.passage.after is None and inner and inner[-1].dropped and last.end == last.begin:
        last.end = inner[-1].flow


def _leg_of(run: Run, forward: list[Chapter], reply: list[Chapter], observed: Observed) -> Leg:
    if run.outer:
        for leg, chapters in (("forward", forward), ("reply", reply)):
            for chapter in chapters:
                sighting = chapter.passage.after
                outer = sighting.packet.outer if sighting else None
                if outer and _carries(outer, run):
                    return leg  # type: ignore[return-value]
        return "reply" if reply else "forward"
    if run.quoted:
        return "reply"
    # Between two rewrites a packet has a tuple that no device saw; its ends are known all the same.
    there = [observed.sent, *(end for each in forward for end in (each.begin, each.end))]
    sources, destinations = {each.source for each in there}, {each.destination for each in there}
    if run.flow.source in sources and run.flow.destination in destinations:
        return "forward"
    # What is dropped behind DNAT is of a connection that is never announced: nobody else knows
    # where it was sent instead.
    client = observed.sent.source
    return "forward" if run.flow.source == client != run.flow.destination else "reply"


def _carries(outer: Outer, run: Run) -> bool:
    """Whether the outer headers of a sighting are those of a run."""
    if (outer.id, outer.sport) != (run.ip_id, run.flow.source.port or 0):
        return False
    # IPv6 has no identification, and the answer may be carried from the same port.
    return family_of(outer.src) is IPV4 or outer.src == run.flow.source.ip


def _chapter_of(run: Run, chapters: list[Chapter], tables: Tables) -> Chapter | None:
    here = [each for each in chapters if _passes(each.passage, run)]
    entering = [each for each in here if _is_on(each.passage.before, "in", run.iif, run, tables)]
    leaving = [each for each in here if _is_on(each.passage.after, "out", run.oif, run, tables)]
    ended = [each for each in here if each.passage.after is None]
    if run.oif is None:
        # A frame enters a bridge before it enters the IP stack: PREROUTING runs at the first sight
        # of it if bridges call iptables, else at the last, as INPUT does.
        late = run.chain.upper() == "INPUT" or not tables.bridge_netfilter(run.place)
        return _at(entering or ended, -1 if late else 0)
    if run.iif is None and not leaving:
        # Sent from here: the output route of before DNAT may have named another device.
        sent = [
            each
            for each in here
            if each.passage.before is None
            or (run.outer and each.passage.after and each.passage.after.packet.outer)
        ]
        return _at(sent or ended, 0)
    if leaving and _is_bridged(leaving[0].passage, tables):
        return leaving[-1]
    # Forwarding is decided behind the last sight of the frame on its way in.
    return _at(leaving or entering[-1:] or ended, 0)


def _is_bridged(passage: Passage, tables: Tables) -> bool:
    """Whether a frame went from a port to its own bridge's device and on to a port.

    A bridge sends what DNAT turned to one of its own ports through its own device; the hooks run
    behind that.
    """
    if passage.before is None or passage.after is None or passage.before.direction != "in":
        return False
    link = tables.link(passage.before.place, passage.before.device)
    return bool(link and link.master == passage.after.device)


def _at(chapters: list[Chapter], index: int) -> Chapter | None:
    return chapters[index] if chapters else None


def _passes(passage: Passage, run: Run) -> bool:
    return run.place in [end.place for end in (passage.before, passage.after) if end]


def _is_on(
    sighting: Sighting | None, direction: str, device: str | None, run: Run, tables: Tables
) -> bool:
    """Whether a run's device is the sighting's, or its bridge: netfilter names the bridge."""
    if sighting is None or sighting.place != run.place or sighting.direction != direction:
        return False
    if bool(sighting.packet.outer) != run.outer:
        return False
    link = tables.link(sighting.place, sighting.device)
    return device in (sighting.device, link.master if link else None)
