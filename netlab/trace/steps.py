"""What happened in a passage, as steps in the order in which the kernel takes them.

Rewrites are read off the headers on both sides of the passage, which also holds for answers, whose
packets never traverse nat chains; rules and connections say why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import msgspec

from netlab.trace.model import Leg
from netlab.trace.model_steps import (
    AnyStep,
    Bridge,
    Conntrack,
    Decapsulate,
    Encapsulate,
    Ipvs,
    Nat,
    Neighbour,
    Route,
    Rule,
    Tuple,
)
from netlab.trace.path import Passage, Tables
from netlab.trace.place import Place
from netlab.trace.witnesses.conntrack import Entry
from netlab.trace.witnesses.rules import Match, Run
from netlab.trace.witnesses.virtual_servers import Balanced

# What a rule says, from a run and one of its matches.
Texts = Callable[[Run, Match], Rule]


_FIRST_HOOKS = ("PREROUTING", "OUTPUT")
_LAST_HOOK = "POSTROUTING"


class Chapter(msgspec.Struct):
    """A passage with what happened in it; `end` is the tuple that the packet left it with."""

    passage: Passage
    begin: Tuple
    end: Tuple
    runs: list[Run] = []
    steps: list[AnyStep] = []


class Narrator:
    """Tells the steps of chapters, those of the way there before those of the way back."""

    def __init__(
        self,
        tables: Tables,
        texts: Texts,
        entries: Sequence[Entry],
        balanced: Sequence[Balanced] = (),
    ) -> None:
        self._tables = tables
        self._balanced = balanced
        self._texts = texts
        self._entries = entries
        self._shown: set[tuple[Place, int, Leg]] = set()
        self._masqueraded: set[tuple[Place | None, int]] = set()
        self._current: dict[tuple[Place | None, Leg], Entry] = {}

    def rules(self, run: Run) -> list[Rule]:
        """The rules of a run; a chain's policy that drops counts as its last rule."""
        found = [self._texts(run, match) for match in run.matches]
        if run.policy == "drop":
            fallen = self._texts(run, Match(run.chain, 0, "drop"))
            # iptables calls base chains by their hooks, in capitals.
            builtin = fallen.hook == run.chain and run.chain.isupper()
            policy = f"-P {run.chain} DROP" if builtin else "policy drop"
            found.append(msgspec.structs.replace(fallen, rule=policy))
        return found

    def steps(self, chapter: Chapter) -> Iterable[AnyStep]:
        """The steps of a passage."""
        passage = chapter.passage
        rules = [rule for run in chapter.runs for rule in self.rules(run)]
        if len({rule.legacy for rule in rules}) > 1:
            # Two reporters, neither of which tells when: those of one hook stay together.
            rules.sort(key=lambda rule: (rule.hook not in _FIRST_HOOKS) + (rule.hook == _LAST_HOOK))
        outer = [rule for rule in rules if rule.outer]
        if not _enters_tunnel(passage):
            yield from outer
            yield from _decapsulate(passage)
        inner = [rule for rule in rules if not rule.outer]
        yield from _until_dropped(self._in_the_stack(chapter, inner), passage)
        yield from _bridge(passage, self._tables)
        if _enters_tunnel(passage):
            yield from _encapsulate(passage, self._tables)
            yield from outer

    def _in_the_stack(self, chapter: Chapter, rules: list[Rule]) -> Iterable[AnyStep]:
        """Rules, rewrites, routing: what IP does, on each side of the routing decision."""
        passage = chapter.passage
        if passage.place is None:
            return
        entry = self._entry(chapter)
        first = [rule for rule in rules if rule.hook in _FIRST_HOOKS]
        later = [rule for rule in rules if rule.hook not in _FIRST_HOOKS]
        rewrites = list(self._nat(chapter, rules, entry, of_destination=True))
        if (balanced := self._of_ipvs(chapter)) and not _translator(rules, True):
            # It comes behind the rules of INPUT, and of OUTPUT too for what the node itself sends.
            rewrites = [_by_ipvs(each) for each in rewrites]
            if chapter.passage.leg == "forward":
                yield from self._chosen_by_ipvs(chapter, first, later, rewrites, balanced)
                return
        yield from _with(rewrites, _translator(first, True), first)
        route = _route(chapter, self._tables)
        if route:
            yield route
        rewrites = list(self._nat(chapter, rules, entry, of_destination=False))
        if balanced and chapter.passage.leg == "reply":
            rewrites = [_by_ipvs(each) for each in rewrites]
        yield from _with(rewrites, _translator(later, False), later)
        if entry:
            yield from self._connection(chapter, entry)
        if route:
            yield from _neighbour(passage.place, route, self._tables)

    def _chosen_by_ipvs(
        self,
        chapter: Chapter,
        first: list[Rule],
        later: list[Rule],
        rewrites: list[Nat],
        balanced: Balanced,
    ) -> Iterable[AnyStep]:
        """A virtual server takes a packet behind the rules of INPUT, and sends it on itself.

        What the node itself sends is taken behind nat OUTPUT.
        """
        arriving = [rule for rule in first if rule.hook != "OUTPUT"]
        arriving += [rule for rule in later if rule.hook == "INPUT"]
        own = [rule for rule in first if rule.hook == "OUTPUT"]
        if not arriving:
            arriving = [rule for rule in own if rule.table == "nat"]
        leaving = [rule for rule in (*own, *later) if rule not in arriving]
        yield from arriving
        yield Ipvs(
            client=balanced.client,
            virtual=balanced.virtual,
            real=balanced.real,
            state=balanced.state,
            expires_s=balanced.expires_s,
        )
        yield from rewrites
        route = _route(chapter, self._tables)
        if route:
            yield route
        entry = self._entry(chapter)
        masqueraded = list(self._nat(chapter, leaving, entry, of_destination=False))
        yield from _with(masqueraded, _translator(leaving, False), leaving)
        if entry:
            yield from self._connection(chapter, entry)
        if route and chapter.passage.place:
            yield from _neighbour(chapter.passage.place, route, self._tables)

    def _of_ipvs(self, chapter: Chapter) -> Balanced | None:
        """The connection by which IPVS turned the destination, or gives an answer its source."""
        begin, end, leg = chapter.begin, chapter.end, chapter.passage.leg
        for each in self._balanced:
            if each.place != chapter.passage.place:
                continue
            if leg == "forward":
                turned = (begin.source, begin.destination, end.destination)
                if turned == (each.client, each.virtual, each.real):
                    return each
            elif (begin.source, end.source, end.destination) == (
                each.real,
                each.virtual,
                each.client,
            ):
                return each
        return None

    def _nat(
        self, chapter: Chapter, rules: list[Rule], entry: Entry | None, of_destination: bool
    ) -> Iterable[Nat]:
        """The rewrite of one end, if it differs on both sides.

        On the way back the destination is what SNAT had changed, the source what DNAT had.
        """
        begin, end = chapter.begin, chapter.end
        first, last = (
            (begin.destination, end.destination) if of_destination else (begin.source, end.source)
        )
        if first == last:
            return
        back = chapter.passage.leg == "reply"
        rule = None if back else _translator(rules, of_destination)
        key = chapter.passage.place, entry.id if entry else 0
        if rule and rule.action.lower() == "masquerade":
            self._masqueraded.add(key)
        source = "masquerade" if key in self._masqueraded else "snat"
        yield Nat(
            translation="dnat" if of_destination != back else source,  # type: ignore[arg-type]
            reverse=back,
            before=first,
            after=last,
            rule=(rule.rule or str(rule)) if rule else None,
            conntrack=entry.id if entry else None,
        )

    def _entry(self, chapter: Chapter) -> Entry | None:
        """The connection that the packet of a passage belongs to.

        It is known by the tuple that the packet comes with, and kept until it leaves.
        """
        passage = chapter.passage
        key = passage.place, passage.leg
        for entry in self._entries:
            expected = entry.original if passage.leg == "forward" else entry.reply
            if entry.place == passage.place and expected == chapter.begin:
                self._current[key] = entry
        return self._current.get(key)

    def _connection(self, chapter: Chapter, entry: Entry) -> Iterable[Conntrack]:
        """Shown where its last rewrite is done, once; on the way back only if there was one."""
        key = entry.place, entry.id, chapter.passage.leg
        back = key[2] == "reply"
        done = chapter.end == (entry.original if back else entry.reply).reversed
        if key in self._shown or not done or (back and chapter.begin == chapter.end):
            return
        self._shown.add(key)
        yield Conntrack(
            id=entry.id,
            original=entry.original,
            reply=entry.reply,
            status=list(entry.status),
        )


def _until_dropped(steps: Iterable[AnyStep], passage: Passage) -> Iterable[AnyStep]:
    """Nothing follows a drop, unless it was that of another copy of the packet."""
    for step in steps:
        yield step
        if isinstance(step, Rule) and step.verdict == "drop" and passage.after is None:
            return


def _with(rewrites: list[Nat], translator: Rule | None, rules: list[Rule]) -> Iterable[AnyStep]:
    """Rules, and behind the one that translates its rewrite; later chains see what it wrote."""
    for rule in rules:
        yield rule
        if rule is translator:
            yield from rewrites
    if translator is None:
        yield from rewrites


def _by_ipvs(rewrite: Nat) -> Nat:
    """A rewrite that was no rule's but IPVS's."""
    is_its = rewrite.translation == "dnat"
    return msgspec.structs.replace(rewrite, translation="ipvs") if is_its else rewrite


def _translator(rules: list[Rule], of_destination: bool) -> Rule | None:
    actions = ("dnat", "redirect") if of_destination else ("masquerade", "snat")
    return next((rule for rule in reversed(rules) if rule.action.lower() in actions), None)


def _route(chapter: Chapter, tables: Tables) -> Route | None:
    """The routing decision of a passage, if there was one."""
    passage = chapter.passage
    before, after, place = passage.before, passage.after, passage.place
    assert place is not None
    if after is not None and after.direction == "in":
        return None  # further up the stack on the same way in
    if before is not None and before.direction == "out":
        return None  # further down
    if before is not None and after is None and before.packet.outer:
        return None  # it is the tunnel that takes it
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
        if after is None and (before.device == "lo" or _is_own(chapter, tables)):
            return None  # delivered
    # The first chain behind the routing decision saw the mark that it was taken with.
    mark = next((run.mark for run in chapter.runs if run.oif and not run.outer), 0)
    to, source = chapter.end.destination.ip, chapter.begin.source.ip
    route = tables.route(place, to, source, iif, mark)
    if route and route.refuses and before is None and after is not None:
        # It was sent from an address that the place does not have, of which no route may be asked.
        return tables.route(place, to, None, None, mark)
    return route


def _is_own(chapter: Chapter, tables: Tables) -> bool:
    """Whether the namespace has the destination's address; if it cannot say, whether it should."""
    place, address = chapter.passage.place, chapter.end.destination.ip
    assert place is not None
    route = tables.route(place, address)
    return route.type in ("local", "anycast") if route else address in place.addresses


def _neighbour(place: Place, route: Route, tables: Tables) -> Iterable[Neighbour]:
    """The next hop's link-layer address; an entry that is not there was never looked for."""
    if route.device is None or route.type != "unicast" or route.device == "lo":
        return
    found = tables.neighbour(place, route.via or route.destination, route.device)
    # On a device without MACs, such as one for IP in IP, the kernel has an entry for form's sake.
    if found and found.state not in ("none", "noarp"):
        yield found


def _bridge(passage: Passage, tables: Tables) -> Iterable[AnyStep]:
    """A bridge's choice of the port that the packet left by."""
    after, place = passage.after, passage.place
    if place is None:
        return
    if after is None:
        yield from _lost_in_tunnel(passage, place, tables)
        return
    link = tables.link(place, after.device)
    mac = after.packet.dst_mac
    if after.direction == "in" or link is None or link.master is None or mac is None:
        return
    if passage.flooded:
        yield Bridge(device=link.master, mac=mac, port=after.device, flooded=True)
        return
    found = tables.port(place, link.master, mac)
    # The table may have changed since; what the packet did counts.
    if found and found.port == after.device:
        yield found


def _lost_in_tunnel(passage: Passage, place: Place, tables: Tables) -> Iterable[AnyStep]:
    """What a VXLAN device knows of a MAC whose frame was not seen to leave, and the way there."""
    before = passage.before
    if before is None or before.direction == "in" or before.packet.dst_mac is None:
        return
    link = tables.link(place, before.device)
    if link and link.kind == "vxlan":
        found = tables.tunnel(place, before.device, before.packet.dst_mac)
        if found:
            yield found
        if found and found.remote:
            yield from _outer_way(place, found.remote, tables)


def _enters_tunnel(passage: Passage) -> bool:
    before, after = passage.before, passage.after
    return bool(after and after.packet.outer and not (before and before.packet.outer))


def _encapsulate(passage: Passage, tables: Tables) -> Iterable[AnyStep]:
    before, after, place = passage.before, passage.after, passage.place
    if place is None or before is None or after is None or after.packet.outer is None:
        return
    outer, mac = after.packet.outer, before.packet.dst_mac
    found = tables.tunnel(place, before.device, mac) if mac and outer.tunnel == "vxlan" else None
    if found:
        yield found
    yield Encapsulate(
        device=before.device,
        vni=outer.vni,
        local=outer.src,
        remote=outer.dst,
        mac=mac if outer.tunnel == "vxlan" else None,
        tunnel=outer.tunnel,
    )
    yield from _outer_way(place, outer.dst, tables)


def _outer_way(place: Place, remote: str, tables: Tables) -> Iterable[AnyStep]:
    """The route and the next hop of the packet that carries another."""
    route = tables.route(place, remote)
    if route:
        yield route
        yield from _neighbour(place, route, tables)


def _decapsulate(passage: Passage) -> Iterable[Decapsulate]:
    before, after = passage.before, passage.after
    if before and before.packet.outer and after and not after.packet.outer:
        outer = before.packet.outer
        yield Decapsulate(
            device=after.device,
            vni=outer.vni,
            local=outer.dst,
            remote=outer.src,
            tunnel=outer.tunnel,
        )
