"""Where and why a probe did not get through, and what shows it.

Findings are tried from the surest to the least sure; what nothing explains is said to be unknown.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from ipaddress import ip_address, ip_network

import msgspec

from netlab.trace.aim import in_lab
from netlab.trace.came_back import by_error, by_refusal, came_back
from netlab.trace.case import (
    Case,
    answered,
    last_seen,
    last_steps,
    place_of,
    receiver,
    rules,
)
from netlab.trace.conntrack_drops import untracked
from netlab.trace.doubts import (
    NO_ROUTE_FIX,
    doubts,
    down,
    off_at,
    refused,
    switched_off,
    unanswered,
    wrong_tunnel,
)
from netlab.trace.drops import with_kernel
from netlab.trace.endings import astray, stale, unheard
from netlab.trace.ipsec import by_policy
from netlab.trace.link_layer import misdirected
from netlab.trace.model import Leg, Loss
from netlab.trace.model_steps import REFUSING, Bridge, Route, Rule
from netlab.trace.place import Place
from netlab.trace.policy_refusals import policy_object
from netlab.trace.refusals import Doubt, missing_service, said_by
from netlab.trace.steps import Chapter
from netlab.trace.virtual_refusals import said_by_set_rule
from netlab.trace.witnesses.packets import Sighting

_IN_USE = (os.strerror(errno.EADDRINUSE), os.strerror(errno.EADDRNOTAVAIL))


def loss_of(case: Case) -> Loss:
    """The best explanation of a probe that was not answered."""
    findings = (
        _by_stale_connection,
        _by_rule,
        _by_no_entry,
        by_refusal,
        _by_mac,
        _by_route,
        _by_tunnel,
        by_error,
        _by_ipsec,
        _never_sent,
        _by_fragments,
        _by_missing_service,
        _by_default_route,
        _by_tables,
    )
    for finding in findings:
        loss = finding(case)
        if loss:
            return _with_devices(with_kernel(loss, case), case)
    return with_kernel(_by_silence(case), case)


def _with_devices(loss: Loss, case: Case) -> Loss:
    """A route is missing where a device of its node is off: with that went its routes."""
    if loss.reason == "no-route":
        # What a node has no route for it may send to the underlay's gateway, which has none.
        passed = [each.passage.before.place for each in case.story.forward if each.passage.before]
        nodes = [place for place in passed if place.kind == "node"]
        for place in (*(each for each in nodes if str(each) == loss.where), *nodes[-1:]):
            for doubt in off_at(case, place):
                return msgspec.structs.replace(
                    loss,
                    node=place.node,
                    where=str(place),
                    reason=doubt.reason,
                    explanation=f"{doubt.words}, and {loss.explanation}",
                    fix=doubt.fix,
                )
    return loss


def _by_stale_connection(case: Case) -> Loss | None:
    """A connection that is remembered; all that happened behind it follows from that."""
    found = stale(case)
    if found is None:
        return None
    place, doubt, evidence = found
    return _loss_at(case, "forward", place, doubt, [evidence])


def _by_no_entry(case: Case) -> Loss | None:
    """A connection that could not be remembered."""
    found = untracked(case)
    if found is None:
        return None
    place, doubt, evidence = found
    return _loss_at(case, "reply" if answered(case) else "forward", place, doubt, [evidence])


# --- by a rule -----------------------------------------------------------------------------------


def _by_rule(case: Case) -> Loss | None:
    """A rule's verdict, or a chain's policy."""
    legs: tuple[Leg, ...] = ("reply", "forward")
    for leg in legs:
        before: Rule | None = None
        for chapter, rule in rules(case, leg):
            if rule.verdict == "drop":
                return _dropped_by(rule, before, leg, chapter, case)
            before = rule
    return None


def _dropped_by(
    rule: Rule, before: Rule | None, leg: Leg, chapter: Chapter | None, case: Case
) -> Loss:
    place = place_of(chapter, case)
    sighting = chapter.passage.before if chapter else None
    whose = f"the {rule.number}" if rule.handle else f"{rule.chain}'s policy"
    # x_tables tells which rule matched; its verdict stands in it.
    reporter = "x_tables" if rule.legacy else "nf_tables"
    # A chain for all refusals has no reasons: who sent the packet there has.
    decider = before if _led_by_element(before, rule) else rule
    assert decider is not None
    reason, explanation, fix = said_by_set_rule(decider, place, case) or said_by(
        decider, place, case
    )
    kind = "map" if "vmap" in (decider.rule or "") else "set"
    found = [f"the {kind} has its destination: {decider.element}"] if decider.element else []
    return Loss(
        direction=leg,
        node=place.node,
        device=sighting.device if sighting and sighting.place == place else None,
        reason=reason,
        where=f"chain {decider.chain} of table {decider.table} on {place}",
        rule=decider.rule,
        evidence=[*found, f"{reporter} reported the verdict drop of {whose}", *came_back(case)],
        explanation=explanation,
        fix=fix,
        object=policy_object(decider, case) or decider.object,
    )


def _led_by_element(before: Rule | None, rule: Rule) -> bool:
    return bool(before and before.element and before.verdict == f"goto {rule.chain}")


# --- by what the tables say ----------------------------------------------------------------------


def _by_mac(case: Case) -> Loss | None:
    """A frame that went to a MAC whose owner it was not for, or that its owner did not take."""
    for leg in ("reply", "forward"):
        for place, doubt in misdirected(case, leg):
            return _loss_at(case, leg, place, doubt, came_back(case))
    return None


def _by_route(case: Case) -> Loss | None:
    """A route or a rule that refuses; the ICMP error that may follow says less."""
    leg: Leg = "reply" if answered(case) else "forward"
    if not case.story.leg(leg):
        return None
    last = last_seen(case, leg)
    for step in last_steps(case, leg):
        if isinstance(step, Route) and (step.type in REFUSING and (step.matched or step.rule)):
            doubt = refused(step, last.place)
            return _loss(case, leg, last, doubt, [str(step), *came_back(case)])
    return None


def _by_tunnel(case: Case) -> Loss | None:
    """A tunnel's entry that leads to another node; what is said there of the packet is no news."""
    leg: Leg = "reply" if answered(case) else "forward"
    for chapter in case.story.leg(leg):
        entering = chapter.passage.after
        for step in chapter.steps:
            if entering and isinstance(step, Bridge) and step.remote:
                for doubt in wrong_tunnel(case, entering.place, step):
                    return _loss(case, leg, entering, doubt, came_back(case))
    return None


def _never_sent(case: Case) -> Loss | None:
    """No device saw it: the source's kernel had no way, or waits for a neighbour."""
    if case.story.forward:
        return None
    source = case.aim.source
    doubt = Doubt("unknown", f"the probe was sent on no device of {source}; why is not known", None)
    route = case.tables.route(source, case.aim.destination)
    off = next(iter((*switched_off(case, source, "eth0"), *down(case, source, "eth0"))), None)
    if off:
        doubt = off
    elif route and route.refuses and route.type != "no-route":
        doubt = refused(route, source)
    elif case.answer.error == os.strerror(errno.EMSGSIZE):
        doubt = Doubt(
            "mtu",
            f"{source} cannot send {case.aim.size} bytes in one piece: that is more than its link "
            "takes, or than it was told that the path does",
            "trace with a smaller --size",
        )
    elif case.aim.source_port and case.answer.error in _IN_USE:
        doubt = Doubt(
            "port-in-use",
            f"port {case.aim.source_port} of {source} is in use: by a socket, or for a minute by a "
            "connection that was closed (TIME_WAIT)",
            f"send from another port; `ip netns exec {source.namespace} ss -anp` shows who has it",
        )
    elif case.aim.outside and route and route.refuses:
        doubt = Doubt(
            "no-route",
            f"the underlay's gateway has no route to {case.aim.destination}: from outside only the "
            "nodes can be reached",
            "trace to a node, such as a node port: `node/NAME:PORT`",
        )
    elif case.answer.outcome == "no-route" or (route and route.refuses):
        doubt = Doubt(
            "no-route",
            f"{source} has no route to {case.aim.destination}, and sent nothing",
            NO_ROUTE_FIX,
        )
    elif route and route.device:
        hop = route.via or case.aim.destination
        neighbour = case.tables.neighbour(source, hop, route.device)
        if neighbour and neighbour.mac is None and neighbour.state != "none":
            doubt = unanswered(case, source, neighbour)
    return _not_sent(case, source, doubt)


def _not_sent(case: Case, source: Place, doubt: Doubt) -> Loss:
    """A loss before the first device."""
    route = case.tables.route(source, case.aim.destination)
    said = [f"the kernel's answer: {case.answer.error}"] if case.answer.error else []
    return Loss(
        direction="forward",
        node=source.node,
        device=route.device if route else None,
        reason=doubt.reason,
        where=str(source),
        rule=None,
        evidence=[*said, *([str(route)] if route else []), "no device saw the probe"],
        explanation=doubt.words,
        fix=doubt.fix,
    )


def _by_ipsec(case: Case) -> Loss | None:
    """A policy that lets nothing through."""
    leg: Leg = "reply" if answered(case) else "forward"
    for place, doubt in by_policy(case, leg):
        if case.story.leg(leg):
            return _loss(case, leg, last_seen(case, leg), doubt)
        return _not_sent(case, place, doubt)
    return None


def _by_fragments(case: Case) -> Loss | None:
    """Pieces of the packet that were not seen any more: nobody puts the others together."""
    leg: Leg = "reply" if answered(case) else "forward"
    last = last_seen(case, leg)
    left = last.packet.fragments
    if left is None:
        return None
    if left.complete:
        return _by_reassembly(case, leg, last)
    whole = [
        sighting
        for sighting in (each.passage.before for each in case.story.leg(leg))
        if sighting and sighting.packet.fragments and sighting.packet.fragments.complete
    ]
    if not whole:
        return None
    before, all_of_it = whole[-1], whole[-1].packet.fragments
    doubt = Doubt(
        "fragment-lost",
        f"of {all_of_it} that were seen on {before.device} of {before.place} {left.count} came to "
        f"{last.device} of {last.place}: what is there waits for the others",
        "look for a rule on the way that matches ports, which only the first fragment has, or "
        f"fragments as such: `ip netns exec {before.place.namespace} nft list ruleset`",
    )
    return _loss(case, leg, before, doubt)


def _by_reassembly(case: Case, leg: Leg, last: Sighting) -> Loss | None:
    """All pieces came in, and no rule behind their reassembly saw the packet: some were dropped."""
    place = last.place
    waits = last.direction == "in" and not case.story.leg(leg)[-1].runs and not case.moments_of_loss
    early = case.tables.early_chains(place) if waits and place.kind == "node" else None
    if not early:
        return None
    first = early[0]
    doubt = Doubt(
        "fragment-lost",
        f"all fragments came in on {last.device} of {place}, and were not put together there: of "
        f"what comes before that, chain {' and chain '.join(early)}, something drops some of them",
        f"look for what drops fragments: `ip netns exec {place.namespace} nft list chain {first}`",
    )
    return _loss(case, leg, last, doubt)


def _by_missing_service(case: Case) -> Loss | None:
    """An address of the Service CIDR that no rule translated: nobody is there."""
    address = case.aim.destination
    ours = any(ip_address(address) in ip_network(cidr) for cidr in case.lab.service_cidrs)
    if not ours or case.story.nats("forward") or answered(case):
        return None
    if any(rule.action.lower() == "dnat" for _, rule in rules(case, "forward")):
        return None  # translated, and seen no more
    return _loss(case, "forward", last_seen(case, "forward"), missing_service(case))


def _by_default_route(case: Case) -> Loss | None:
    """A node had nothing better than its default route, and the underlay's gateway is the end."""
    if answered(case) or last_seen(case, "forward").place.kind != "switch":
        return None
    for chapter in reversed(case.story.forward):
        sent = chapter.passage.after
        routes = [step for step in chapter.steps if isinstance(step, Route)]
        if sent is None or not routes:
            continue
        route = routes[-1]
        if route.matched != case.aim.family.every_address:
            return None
        if not in_lab(case.lab, route.destination):
            doubt = Doubt(
                "outside-lab",
                f"{route.destination} is outside the lab: {sent.place} sends it to the underlay's "
                f"gateway, {route.via}, and a lab has no way out of it",
                "trace to an address of the lab: `netlab get pods`, `netlab get services`",
            )
            return _loss(case, "forward", last_seen(case, "forward"), doubt, [str(route)])
        doubt = Doubt(
            "no-route",
            f"{sent.place} has no route for {route.destination} but its default route, and "
            f"nothing behind {route.via} knows that address",
            NO_ROUTE_FIX,
        )
        return _loss(case, "forward", sent, doubt, [str(route)])
    return None


def _by_tables(case: Case) -> Loss | None:
    """What the kernel's tables say of the step that did not happen."""
    leg: Leg = "reply" if answered(case) else "forward"
    last = last_seen(case, leg)
    for doubt in doubts(case, leg, last):
        return _loss(case, leg, last, doubt)
    return None


# --- nothing explains it -------------------------------------------------------------------------


def _by_silence(case: Case) -> Loss:
    """The last place where it was seen."""
    leg: Leg = "reply" if answered(case) else "forward"
    last = last_seen(case, leg)
    end = case.story.leg(leg)[-1].end
    where = f"going {last.direction} on {last.device} of {last.place}"
    if leg == "reply" and last.place == case.aim.source:
        stranger = end.source.ip != case.aim.destination
        if stranger and (found := astray(case)):
            return _loss_at(case, leg, *found)
        doubt = Doubt(
            "answer-not-expected" if stranger else "unknown",
            f"an answer came back to {last.place}, but from {end.source}, where "
            f"{case.aim.destination} was asked: no socket waits for that"
            if stranger
            else f"the answer came back to {last.place}, whose socket did not take it; why is not "
            "known",
            None,
        )
    elif leg == "forward" and last.direction == "in" and end.destination.ip in last.place.addresses:
        doubt = unheard(case, last.place, end.destination.port) or Doubt(
            "no-answer",
            f"{receiver(case)} received it, and no answer was seen; why is not known",
            None,
        )
    else:
        what = "the answer" if leg == "reply" else "the packet"
        doubt = Doubt(
            "unknown",
            f"{what} was last seen {where}; what became of it there is not known",
            None,
        )
    return _loss(case, leg, last, doubt)


def _loss_at(
    case: Case, leg: Leg, place: Place, doubt: Doubt, evidence: Iterable[str] = ()
) -> Loss:
    """A loss that was decided elsewhere than where the packet was last seen."""
    loss = _loss(case, leg, last_seen(case, leg), doubt, evidence)
    return msgspec.structs.replace(loss, node=place.node, device=None, where=str(place))


def _loss(case: Case, leg: Leg, last: Sighting, doubt: Doubt, evidence: Iterable[str] = ()) -> Loss:
    """A loss after the last sight of the packet."""
    end = last_seen(case, leg)
    return Loss(
        direction=leg,
        node=last.place.node,
        device=last.device,
        reason=doubt.reason,
        where=f"{last.device} of {last.place}",
        rule=None,
        evidence=[*evidence, f"last seen going {end.direction} on {end.device} of {end.place}"],
        explanation=doubt.words,
        fix=doubt.fix,
    )
