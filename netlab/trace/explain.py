"""What became of the probe, and where it did not get through: why, and what shows it.

Findings are tried from the surest to the least sure; what nothing explains is said to be unknown.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from netlab.topology.model import Lab
from netlab.trace.aim import Aim, Place
from netlab.trace.correlate import Chapter, Story
from netlab.trace.model import (
    Bridge,
    Disposition,
    Leg,
    Loss,
    Neighbour,
    Packet,
    Receiver,
    Route,
    Rule,
    Socket,
    Translation,
)
from netlab.trace.path import Tables
from netlab.trace.probe import Answer
from netlab.trace.witnesses.packets import Sighting


class Case(msgspec.Struct, frozen=True):
    """All that an explanation looks at."""

    lab: Lab
    aim: Aim
    answer: Answer
    story: Story
    tables: Tables


class Explained(msgspec.Struct, frozen=True):
    """The outcome of a trace, in words of the model."""

    disposition: Disposition
    delivered_to: Receiver | None
    seen_source: Socket | None
    translations: list[Translation]
    drop: Loss | None


def explain(case: Case) -> Explained:
    """Say what became of the probe."""
    translations = [
        Translation(
            kind=nat.translation,
            node=chapter.passage.place.node if chapter.passage.place else None,
            before=nat.before,
            after=nat.after,
            rule=nat.rule,
        )
        for chapter, nat in case.story.nats("forward")
    ]
    if case.answer.outcome == "answered":
        end = case.story.forward[-1].end if case.story.forward else None
        return Explained(
            "delivered", receiver(case), end.source if end else None, translations, None
        )
    came_back = any(
        chapter.passage.after and chapter.passage.after.role in ("refusal", "error")
        for chapter in case.story.reply
    )
    refused = came_back or case.answer.outcome in ("refused", "unreachable")
    loss = _loss(case)
    reached = receiver(case) if loss.direction == "reply" else None
    seen = case.story.forward[-1].end.source if reached else None
    return Explained("rejected" if refused else "dropped", reached, seen, translations, loss)


def receiver(case: Case) -> Receiver | None:
    """Who the probe was for where it was last seen; None if it was not seen at all."""
    if not case.story.forward:
        return None
    chapter = case.story.forward[-1]
    last = chapter.passage.before
    assert last is not None
    end = chapter.end.destination
    if last.direction == "in" and last.place.kind != "switch":
        kind, name, node = last.place.kind, last.place.name, last.place.node
        return Receiver(kind=kind, name=name, node=node, ip=end.ip, port=end.port)
    for pod in case.lab.pods:
        if pod.address == end.ip and not pod.host_network:
            return Receiver(kind="pod", name=pod.key, node=pod.node, ip=end.ip, port=end.port)
    for each in case.lab.nodes:
        if each.address == end.ip:
            return Receiver(kind="node", name=each.name, node=each.name, ip=end.ip, port=end.port)
    return Receiver(kind="unknown", name=end.ip, node=None, ip=end.ip, port=end.port)


# --- where and why it stopped --------------------------------------------------------------------


def _loss(case: Case) -> Loss:
    for finding in (_by_rule, _by_refusal, _by_error, _unsent, _by_tables, _by_silence):
        loss = finding(case)
        if loss:
            return loss
    raise AssertionError("the last finding always finds")


def _by_rule(case: Case) -> Loss | None:
    """A rule's verdict, or a chain's policy."""
    for leg in ("reply", "forward"):
        for chapter, rule in _rules(case.story, leg):
            if rule.verdict != "drop":
                continue
            place = _place_of(chapter, case)
            rejects = "REJECT" in (rule.rule or "") or "reject" in (rule.rule or "").split()
            reason, explanation, fix = _said_by(rule, rejects, place, case)
            sighting = chapter.passage.before if chapter else None
            return Loss(
                direction=leg,
                node=place.node,
                device=sighting.device if sighting and sighting.place == place else None,
                reason=reason,
                where=f"chain {rule.chain} of table {rule.table} in {place}",
                rule=rule.rule,
                evidence=[
                    f"the kernel reported verdict drop of the rule with handle {rule.handle}"
                    if rule.handle
                    else f"the kernel reported that the policy of {rule.chain} dropped it",
                    *_came_back(case),
                ],
                explanation=explanation,
                fix=fix,
            )
    return None


def _said_by(rule: Rule, rejects: bool, place: Place, case: Case) -> tuple[str, str, str | None]:
    comment = rule.comment or ""
    served = rule.object or "the Service"
    if "has no endpoints" in comment:
        return (
            "no-endpoints",
            f"{comment}: kube-proxy on {place.node} refuses what is sent to {served}, "
            "because no ready endpoint is behind it",
            f"make a pod that the selector of {served} matches, or make one ready: "
            f"`netlab get endpoints`",
        )
    if "has no local endpoints" in comment:
        return (
            "no-local-endpoints",
            f"{comment}: the traffic policy of {served} is Local, and no ready endpoint is on "
            f"{place.node}",
            f"run an endpoint on {place.node}, or set the policy to Cluster",
        )
    what = "rejected" if rejects else "dropped"
    text = rule.rule or f"the rule with handle {rule.handle}"
    return (
        f"{what}-by-rule",
        f"a rule in chain {rule.chain} of table {rule.table} in {place} {what} it: {text}",
        f"if that is not meant: `ip netns exec {place.namespace} iptables -t {rule.table} "
        f"-D {text[3:]}`"
        if text.startswith("-A ")
        else None,
    )


def _by_refusal(case: Case) -> Loss | None:
    """A TCP reset."""
    first = _first_back(case, "refusal")
    if first is None:
        return None
    sighting, chapter = first
    whose = receiver(case) if sighting.place.kind != "switch" else None
    port = chapter.begin.source.port
    return Loss(
        direction="forward",
        node=sighting.place.node,
        device=sighting.device,
        reason="port-closed",
        where=str(sighting.place),
        rule=None,
        evidence=[f"{sighting.place} sent a TCP reset ({_flags(sighting.packet)})"],
        explanation=f"the SYN reached {whose or sighting.place}, and its kernel answered with a "
        f"reset: nothing listens on TCP port {port} there",
        fix=f"start what should listen on port {port}, or correct the targetPort of the Service"
        if case.aim.service
        else f"start what should listen on port {port}, or trace another port",
    )


_ERRORS = {
    "net-unreachable": ("no-route", "has no route to {destination}"),
    "host-unreachable": ("host-unreachable", "cannot reach {destination} on its link"),
    "port-unreachable": ("port-closed", "has nothing that listens there"),
    "protocol-unreachable": ("protocol-unreachable", "does not speak the protocol"),
    "fragmentation-needed": ("mtu", "cannot send on a packet of {length} bytes unfragmented"),
    "time-exceeded": ("ttl", "found its time to live used up"),
}


def _by_error(case: Case) -> Loss | None:
    """An ICMP error."""
    first = _first_back(case, "error")
    if first is None:
        return None
    sighting, _ = first
    kind = sighting.packet.icmp or "error"
    reason, words = _ERRORS.get(kind, (kind, f"sent ICMP {kind}"))
    last = case.story.forward[-1].passage.before if case.story.forward else None
    destination = last.packet.dst if last else case.aim.destination
    length = last.packet.length if last else 0
    fact = words.format(destination=destination, length=length)
    return Loss(
        direction="forward",
        node=sighting.place.node,
        device=last.device if last and last.place == sighting.place else sighting.device,
        reason=reason,
        where=str(sighting.place),
        rule=None,
        evidence=[f"ICMP {kind} from {sighting.packet.src}, sent by {sighting.place}"]
        + [str(step) for step in _last_steps(case, "forward", (Route, Neighbour))],
        explanation=f"{sighting.place} {fact}",
        fix=_ERROR_FIXES.get(reason),
    )


_ERROR_FIXES = {
    "no-route": "add the route that is missing; `netlab up` puts a lab's own routes back",
    "port-closed": "start what should listen there, or trace another port",
}


def _unsent(case: Case) -> Loss | None:
    """The source's own kernel did not send it."""
    if case.story.forward:
        return None
    source = case.aim.source
    known = case.answer.outcome == "no-route"
    return Loss(
        direction="forward",
        node=source.node,
        device=None,
        reason="no-route" if known else "unknown",
        where=str(source),
        rule=None,
        evidence=[f"the kernel of {source} answered: {case.answer.error}"]
        if case.answer.error
        else ["the probe was sent on a socket and no device saw it"],
        explanation=f"{source} has no way to {case.aim.destination}: nothing was sent"
        if known
        else f"the probe left no device of {source}; why is not known",
        fix=_ERROR_FIXES["no-route"] if known else None,
    )


def _by_tables(case: Case) -> Loss | None:
    """What the kernel's tables say of the step that did not happen."""
    leg: Leg = "reply" if _answered(case) else "forward"
    chapter = case.story.leg(leg)[-1]
    last = chapter.passage.before
    assert last is not None
    for reason, words, fix in _doubts(case, chapter, last):
        return Loss(
            direction=leg,
            node=last.place.node,
            device=last.device,
            reason=reason,
            where=f"{last.device} of {last.place}",
            rule=None,
            evidence=[f"last seen going {last.direction} on {last.device} of {last.place}", words],
            explanation=f"on {last.place} {words}, so it went no further than {last.device}",
            fix=fix,
        )
    return None


def _doubts(case: Case, chapter: Chapter, last: Sighting) -> Iterable[tuple[str, str, str | None]]:
    for step in chapter.steps:
        if isinstance(step, Bridge) and not (step.port or step.remote or step.flooded):
            yield (
                "fdb-missing",
                str(step),
                f"`bridge -n {last.place.namespace} fdb add {step.mac} dev {step.device} dst "
                "ADDRESS_OF_THE_NODE self`, or `netlab up`, which puts it back",
            )
        if isinstance(step, Route) and step.matched is None:
            yield (
                step.type,
                f"the kernel refuses to route it ({step.type})",
                _ERROR_FIXES["no-route"] if step.type == "no-route" else None,
            )
        if isinstance(step, Route) and step.device:
            link = case.tables.link(last.place, step.device)
            if link and not (link.up and link.carrier):
                yield _down(last.place, step.device, link.up)
        if isinstance(step, Neighbour) and step.mac is None:
            yield (
                "neighbour-unresolved",
                str(step),
                "find out why ARP is not answered: is the address there, is the link up?",
            )
    if last.direction == "out":
        near = case.tables.link(last.place, last.device)
        for place in case.aim.places:
            far = case.tables.link(place, "eth0") if place.kind != "switch" else None
            if near and far and (near.peer, far.peer) == (far.index, near.index) and not far.up:
                yield _down(place, far.name, far.up)


def _down(place: Place, device: str, up: bool) -> tuple[str, str, str]:
    state = "is up but has no carrier" if up else "is down"
    return (
        "link-down",
        f"{device} of {place} {state}",
        f"`ip -n {place.namespace} link set {device} up`",
    )


def _by_silence(case: Case) -> Loss:
    """The last place where it was seen, and nothing that explains it."""
    answered = _answered(case)
    chapters = case.story.reply if answered else case.story.forward
    last = chapters[-1].passage.before
    assert last is not None
    back = answered and last.place == case.aim.source
    arrived = not answered and last.direction == "in" and _is_for(chapters[-1], last.place)
    if back:
        reason = "answer-not-expected"
        explanation = (
            f"an answer came back to {last.place}, but from {chapters[-1].end.source}, where "
            f"{case.aim.destination} was asked: no socket waits for that"
            if chapters[-1].end.source.ip != case.aim.destination
            else f"the answer came back to {last.place}, whose socket did not take it; "
            "why is not known"
        )
    elif arrived:
        reason = "no-answer"
        explanation = (
            f"{last.place} received it on {last.device} and sent no answer that was seen; "
            "why is not known"
        )
    else:
        reason = "unknown"
        what = "the answer" if answered else "the packet"
        explanation = (
            f"{what} was last seen going {last.direction} on {last.device} of {last.place}; "
            "what became of it there is not known"
        )
    return Loss(
        direction="reply" if answered else "forward",
        node=last.place.node,
        device=last.device,
        reason=reason,
        where=f"{last.device} of {last.place}",
        rule=None,
        evidence=[f"last seen going {last.direction} on {last.device} of {last.place}"],
        explanation=explanation,
        fix=None,
    )


# --- looking things up in a story ----------------------------------------------------------------


def _rules(story: Story, leg: Leg) -> Iterable[tuple[Chapter | None, Rule]]:
    for chapter in story.leg(leg):
        for step in chapter.steps:
            if isinstance(step, Rule):
                yield chapter, step
    if leg == "forward":
        for rule in story.loose:
            yield None, rule


def _place_of(chapter: Chapter | None, case: Case) -> Place:
    """The place that a rule stands in."""
    if chapter and chapter.runs:
        return chapter.runs[0].place
    return case.aim.source


def _answered(case: Case) -> bool:
    return any(
        chapter.passage.after and chapter.passage.after.role == "answer"
        for chapter in case.story.reply
    )


def _first_back(case: Case, role: str) -> tuple[Sighting, Chapter] | None:
    for chapter in case.story.reply:
        if chapter.passage.after and chapter.passage.after.role == role:
            return chapter.passage.after, chapter
    return None


def _came_back(case: Case) -> list[str]:
    found = []
    for role, words in (("refusal", "a TCP reset"), ("error", "ICMP")):
        first = _first_back(case, role)
        if first:
            packet = first[0].packet
            kind = f" {packet.icmp}" if packet.icmp else ""
            found.append(f"{words}{kind} from {packet.src} came back from {first[0].place}")
    return found


def _last_steps(case: Case, leg: Leg, kinds: tuple[type, ...]) -> list[object]:
    chapters = case.story.leg(leg)
    return [step for step in chapters[-1].steps if isinstance(step, kinds)] if chapters else []


def _is_for(chapter: Chapter, place: Place) -> bool:
    return chapter.end.destination.ip in place.addresses


def _flags(packet: Packet) -> str:
    return f"flags {packet.flags}"
