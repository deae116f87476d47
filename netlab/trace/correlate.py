"""One story from independent witnesses: hops with their steps.

Packets give the hops.  Rules carry no time stamp: a run of rules belongs to the passage that its
hook and devices name.  Rewrites are read off the headers on both sides of a passage, which also
holds for answers, whose packets never traverse nat chains; rules and connections say why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import msgspec

from netlab.trace.aim import Place
from netlab.trace.model import (
    AnyStep,
    Bridge,
    Conntrack,
    Decapsulate,
    Encapsulate,
    Hop,
    Leg,
    Nat,
    Neighbour,
    Packet,
    Route,
    Rule,
    Tuple,
)
from netlab.trace.path import Passage, Tables, legs
from netlab.trace.witnesses.conntrack import Entry
from netlab.trace.witnesses.packets import Sighting
from netlab.trace.witnesses.rules import Match, Run

# What a rule says, from a run and one of its matches.
Texts = Callable[[Run, Match], Rule]


class Observed(msgspec.Struct, frozen=True):
    """What the witnesses saw of one probe.  `sent` is its tuple as its socket had it."""

    sent: Tuple
    sightings: Sequence[Sighting]
    runs: Sequence[Run]
    entries: Sequence[Entry]
    tables: Tables
    texts: Texts


class Chapter(msgspec.Struct):
    """A passage with what happened in it; `end` is the tuple that the packet left it with."""

    passage: Passage
    begin: Tuple
    end: Tuple
    runs: list[Run] = []
    steps: list[AnyStep] = []


class Story(msgspec.Struct, frozen=True):
    """Both legs.  `loose`: runs of rules that no passage explains (the packet was never seen)."""

    forward: list[Chapter]
    reply: list[Chapter]
    loose: list[Rule]

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
    there, back = legs(observed.sightings, observed.tables)
    forward = _chapters(there, observed.sent, observed)
    arrived = forward[-1].end if forward else observed.sent
    reply = _chapters(back, arrived.reversed, observed)
    loose = _place_runs(forward, reply, observed)
    told: set[tuple[Place, int, Leg]] = set()
    for chapter in [*forward, *reply]:
        chapter.steps = list(_steps(chapter, observed, told))
    return Story(forward, reply, loose)


def hops(chapters: Sequence[Chapter], origin_ns: int) -> list[Hop]:
    """Chapters as hops: each with the steps before it, the last one also with those after it."""
    found: list[Hop] = []
    for chapter, following in zip(chapters, [*chapters[1:], None], strict=False):
        sighting = chapter.passage.after
        if sighting is None:
            continue
        last = following is not None and following.passage.after is None
        found.append(
            Hop(
                node=sighting.place.node,
                namespace=sighting.place.namespace,
                device=sighting.device,
                direction=sighting.direction,
                t_ns=sighting.t_ns - origin_ns,
                packet=sighting.packet,
                steps=chapter.steps + (following.steps if last and following else []),
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


def _place_runs(forward: list[Chapter], reply: list[Chapter], observed: Observed) -> list[Rule]:
    loose: list[Rule] = []
    for run in observed.runs:
        leg = _leg_of(run, forward, reply, observed)
        chapters = forward if leg == "forward" else reply
        chapter = _chapter_of(run, chapters, observed.tables)
        if chapter:
            chapter.runs.append(run)
        else:
            loose += _rules(run, observed.texts)
    return loose


def _rules(run: Run, texts: Texts) -> list[Rule]:
    """The rules of a run; a chain's policy that drops counts as its last rule."""
    found = [texts(run, match) for match in run.matches]
    if run.policy == "drop":
        policy = f"-P {run.chain} DROP"
        fallen = texts(run, Match(run.chain, 0, "drop"))
        found.append(msgspec.structs.replace(fallen, rule=policy))
    return found


def _leg_of(run: Run, forward: list[Chapter], reply: list[Chapter], observed: Observed) -> Leg:
    if run.outer:
        for leg, chapters in (("forward", forward), ("reply", reply)):
            for chapter in chapters:
                sighting = chapter.passage.after
                outer = sighting.packet.outer if sighting else None
                if outer and (outer.id, outer.sport) == (run.ip_id, run.flow.source.port):
                    return leg  # type: ignore[return-value]
        return "reply" if reply else "forward"
    if run.quoted:
        return "reply"
    # Between two rewrites a packet has a tuple that no device saw; its ends are known all the same.
    there = [observed.sent, *(end for each in forward for end in (each.begin, each.end))]
    sources, destinations = {each.source for each in there}, {each.destination for each in there}
    if run.flow.source in sources and run.flow.destination in destinations:
        return "forward"
    return "reply"


def _chapter_of(run: Run, chapters: list[Chapter], tables: Tables) -> Chapter | None:
    here = [each for each in chapters if _passes(each.passage, run)]
    entering = [each for each in here if _is_on(each.passage.before, "in", run.iif, run, tables)]
    leaving = [each for each in here if _is_on(each.passage.after, "out", run.oif, run, tables)]
    ended = [each for each in here if each.passage.after is None]
    if run.oif is None:
        # A frame enters a bridge before it enters the IP stack: PREROUTING runs at the first sight
        # of it, INPUT at the last.
        return _at(entering or ended, -1 if run.chain.upper() == "INPUT" else 0)
    if run.iif is None and not leaving:
        # Sent from here: the output route of before DNAT may have named another device.
        sent = [
            each
            for each in here
            if each.passage.before is None
            or (run.outer and each.passage.after and each.passage.after.packet.outer)
        ]
        return _at(sent or ended, 0)
    return _at(leaving or entering or ended, 0)


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


# --- what happened in a passage ------------------------------------------------------------------

_FIRST_HOOKS = ("PREROUTING", "OUTPUT")


def _steps(
    chapter: Chapter, observed: Observed, told: set[tuple[Place, int, Leg]]
) -> Iterable[AnyStep]:
    """The steps of a passage in the order in which the kernel takes them.

    `told` are the connections that earlier steps have shown.
    """
    passage = chapter.passage
    before = passage.before.packet if passage.before else None
    after = passage.after.packet if passage.after else None
    rules = [rule for run in chapter.runs for rule in _rules(run, observed.texts)]
    inner = [rule for rule in rules if not rule.outer]
    outer = [rule for rule in rules if rule.outer]
    enters_tunnel = after is not None and after.outer is not None and not (before and before.outer)
    leaves_tunnel = before is not None and before.outer is not None and not (after and after.outer)
    place = passage.place
    if leaves_tunnel or not enters_tunnel:
        yield from outer
    if leaves_tunnel and after and before and before.outer and passage.after:
        yield Decapsulate(
            device=passage.after.device,
            vni=before.outer.vni,
            local=before.outer.dst,
            remote=before.outer.src,
        )
    yield from (rule for rule in inner if rule.hook in _FIRST_HOOKS)
    entry = _entry(chapter, observed.entries) if place else None
    yield from _nat(chapter, rules, entry, of_destination=True)
    route = _route(chapter, observed.tables) if place and not enters_tunnel else None
    if route:
        yield route
    yield from (rule for rule in inner if rule.hook not in _FIRST_HOOKS)
    yield from _nat(chapter, rules, entry, of_destination=False)
    key = (entry.place, entry.id, passage.leg) if entry else None
    if entry and key and key not in told and _shows(chapter):
        told.add(key)
        yield Conntrack(
            id=entry.id,
            original=entry.original,
            reply=entry.reply,
            status=list(entry.status),
        )
    if route:
        yield from _neighbour(passage, route, observed.tables)
    if place:
        yield from _bridge(passage, observed.tables)
    if enters_tunnel and after:
        yield from _into_tunnel(passage, after, observed.tables)
        yield from outer


def _nat(
    chapter: Chapter, rules: list[Rule], entry: Entry | None, of_destination: bool
) -> Iterable[Nat]:
    """The rewrite of one end, if its header differs on both sides.

    On the way back the destination is what SNAT had changed, the source what DNAT had.
    """
    begin, end = chapter.begin, chapter.end
    first, last = (
        (begin.destination, end.destination) if of_destination else (begin.source, end.source)
    )
    if first == last or chapter.passage.place is None:
        return
    back = chapter.passage.leg == "reply"
    rule = None if back else _translator(rules, of_destination)
    masquerades = rule is not None and "masquerade" in (rule.rule or "").lower()
    yield Nat(
        translation="dnat" if of_destination != back else "masquerade" if masquerades else "snat",
        reverse=back,
        before=first,
        after=last,
        rule=str(rule) if rule else None,
        conntrack=entry.id if entry else None,
    )


def _translator(rules: list[Rule], of_destination: bool) -> Rule | None:
    words = ("dnat", "redirect") if of_destination else ("masquerade", "snat")
    for rule in reversed(rules):
        text = (rule.rule or "").lower()
        if any(f"-j {word}" in text or f"{word} to" in text or text == word for word in words):
            return rule
    return None


def _entry(chapter: Chapter, entries: Sequence[Entry]) -> Entry | None:
    """The connection that the packet of a passage belongs to."""
    passage = chapter.passage
    for entry in entries:
        if entry.place != passage.place:
            continue
        if passage.leg == "forward" and entry.original == chapter.begin:
            return entry
        if passage.leg == "reply" and entry.reply == chapter.begin:
            return entry
    return None


def _shows(chapter: Chapter) -> bool:
    """On the way there wherever a connection begins, on the way back where it rewrites."""
    return chapter.passage.leg == "forward" or chapter.begin != chapter.end


def _route(chapter: Chapter, tables: Tables) -> Route | None:
    """The routing decision of a passage, if there was one."""
    passage = chapter.passage
    before, after, place = passage.before, passage.after, passage.place
    assert place is not None
    if after is not None and after.direction == "in":
        return None  # further up the stack on the same way in
    if before is not None and before.direction == "out":
        return None  # further down
    iif = before.device if before else None
    if before:
        link = tables.link(place, before.device)
        bridge = link.master if link else None
        onward = tables.link(place, after.device) if after else None
        if bridge and after and (onward and onward.master == bridge):
            return None  # bridged, port to port
        if bridge and after is None:
            return None
        iif = bridge or before.device
        if after is None and any(chapter.end.destination.ip == own for own in place.addresses):
            return None
    destination = chapter.end.destination.ip
    source = chapter.begin.source.ip
    return tables.route(place, destination, source, iif)


def _neighbour(passage: Passage, route: Route, tables: Tables) -> Iterable[Neighbour]:
    if route.device is None or route.type != "unicast" or route.device == "lo":
        return
    assert passage.place is not None
    found = tables.neighbour(passage.place, route.via or route.destination, route.device)
    if found:
        yield found


def _bridge(passage: Passage, tables: Tables) -> Iterable[Bridge]:
    """A bridge's choice of the port that the packet left by."""
    before, after, place = passage.before, passage.after, passage.place
    if place is None:
        return
    if after is None:
        yield from _lost_in_tunnel(before, place, tables)
        return
    link = tables.link(place, after.device)
    mac = after.packet.dst_mac
    if after.direction == "in" or link is None or link.master is None or mac is None:
        return
    if passage.flooded:
        yield Bridge(device=link.master, mac=mac, port=after.device, flooded=True)
        return
    found = tables.port(place, link.master, mac)
    if found and found.port == after.device:
        yield found


def _lost_in_tunnel(before: Sighting | None, place: Place, tables: Tables) -> Iterable[Bridge]:
    """What a VXLAN device knows of a MAC that it did not send on."""
    if before is None or before.direction == "in" or before.packet.dst_mac is None:
        return
    link = tables.link(place, before.device)
    if link and link.kind == "vxlan":
        found = tables.tunnel(place, before.device, before.packet.dst_mac)
        if found:
            yield found


def _into_tunnel(passage: Passage, after: Packet, tables: Tables) -> Iterable[AnyStep]:
    before, place = passage.before, passage.place
    if place is None or after.outer is None:
        return
    mac = before.packet.dst_mac if before else None
    if before and mac:
        found = tables.tunnel(place, before.device, mac)
        if found:
            yield found
    yield Encapsulate(
        device=before.device if before else "",
        vni=after.outer.vni,
        local=after.outer.src,
        remote=after.outer.dst,
        mac=mac,
    )
    route = tables.route(place, after.outer.dst)
    if route:
        yield route
        yield from _neighbour(passage, route, tables)
