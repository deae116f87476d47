"""A trace from beginning to end: aim, watch, send the probe, put together what was seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from netlab.datapath.name_files import serves_names
from netlab.kernel import namespaces
from netlab.problems import Exit, NetlabError, Problem
from netlab.topology.model import Lab
from netlab.trace import probe
from netlab.trace.aim import Aim, Request, aim
from netlab.trace.canary import Blind
from netlab.trace.case import Case
from netlab.trace.correlate import Observed, Story, correlate, hops
from netlab.trace.explain import Explained, explain
from netlab.trace.model import Hop, Leg, Loss, Probe, Trace, Witnesses
from netlab.trace.model_steps import AnyStep, Deliver, Drop, Socket
from netlab.trace.path import Tables
from netlab.trace.prediction import predict, unpredictable
from netlab.trace.probe import Answer
from netlab.trace.proxies import proxies
from netlab.trace.undeclared import taken_endpoint, taken_node, undeclared
from netlab.trace.watch import Watch
from netlab.trace.witnesses.packets import Sighting


class Recorded(msgspec.Struct, frozen=True):
    """One sighting's frame, whole."""

    sighting: Sighting
    data: bytes


def trace(
    lab: Lab,
    request: Request,
    recorded: list[Recorded] | None = None,
    declared: Lab | None = None,
) -> Trace:
    """Send one probe through a running lab and tell what happened to it, there and back.

    To `recorded` the frames of the probe are appended, and those of what came back, in time order.
    `declared` is the lab without its faults, which the outcome is compared with.

    Needs root.  Raises NetlabError: exit code 2 if the request cannot be meant, 3 if a namespace on
    the way is missing.  What could not be observed is no error but the disposition `unobserved`.
    """
    if serves_names(lab):
        from netlab.trace import by_name

        if by_name.is_name(lab, request):
            return by_name.trace(lab, request, recorded, declared)
    return traced(lab, request, recorded, declared)[0]


def traced(
    lab: Lab,
    request: Request,
    recorded: list[Recorded] | None = None,
    declared: Lab | None = None,
) -> tuple[Trace, Observed]:
    """A trace, and what the witnesses saw."""
    decided = aim(lab, request)
    require_namespaces(lab, decided)
    if behind := proxies(lab, decided):
        from netlab.trace.second_connection import through

        return through(lab, request, decided, behind, recorded, declared or lab)
    with Watch(lab, decided, mark := probe.new_mark(decided)) as watch:
        answer = probe.send(decided, mark, request.timeout_s, watch)
        followed = follow(lab, decided, answer, watch)
    if recorded is not None:
        recorded += map(Recorded, followed.observed.sightings, watch.frames)
    return tell(declared or lab, followed, watch), followed.observed


class Watching(Protocol):
    """Witnesses that watch, on this machine or on others."""

    blind: list[Blind]

    @property
    def decisions(self) -> Tables: ...

    def observed(self, answer: Answer, is_last: bool = True) -> Observed: ...

    def reports(self) -> Witnesses: ...


class Followed(msgspec.Struct, frozen=True):
    """A probe that was sent, and what became of it."""

    aim: Aim
    answer: Answer
    observed: Observed
    story: Story
    explained: Explained


def follow(
    lab: Lab, decided: Aim, answer: Answer, watch: Watching, is_last: bool = True
) -> Followed:
    """Put together what was seen of a probe that has had its answer or its time."""
    return understand(lab, decided, answer, watch.observed(answer, is_last), watch.decisions)


def understand(
    lab: Lab, decided: Aim, answer: Answer, observed: Observed, tables: Tables
) -> Followed:
    """Put together what witnesses saw of one connection."""
    story = correlate(observed)
    case = Case(lab, decided, answer, story, tables, observed.moments)
    return Followed(decided, answer, observed, story, explain(case))


def tell(declared: Lab, followed: Followed, watch: Watching, predicted: bool = True) -> Trace:
    """The trace of a probe, with what the witnesses say of themselves until now.

    `declared` is the lab without its faults, which the outcome is compared with, if it is to be.
    """
    decided, observed, story = followed.aim, followed.observed, followed.story
    explained = followed.explained
    origin = observed.sightings[0].t_ns if observed.sightings else 0
    blind = watch.blind
    found = Trace(
        lab=declared.name,
        probe=Probe(
            from_=decided.sender,
            to=decided.to,
            protocol=decided.protocol,
            source=observed.sent.source,
            destination=Socket(ip=decided.destination, port=decided.port),
            spoofed=decided.spoofed,
        ),
        disposition="unobserved" if blind else explained.disposition,
        delivered_to=explained.delivered_to,
        seen_source=explained.seen_source,
        translations=explained.translations,
        drop=_blindness(blind) if blind else explained.drop,
        forward=_ended("forward", hops(story.forward, origin), explained, decided),
        reply=_ended("reply", hops(story.reply, origin), explained, decided),
        witnesses=watch.reports(),
        elapsed_us=_elapsed_us(followed.answer, observed.sightings, explained),
        application=followed.answer.application,
    )
    return _compared(found, declared, decided) if predicted else found


def _compared(found: Trace, declared: Lab, decided: Aim) -> Trace:
    """A trace with what was to be expected of it."""
    if unpredictable(declared, decided):
        return found
    expected = predict(declared, decided, taken_endpoint(found), taken_node(declared, found))
    differs = undeclared(declared, decided, found, expected)
    expected = msgspec.structs.replace(expected, differs=differs)
    return msgspec.structs.replace(found, prediction=expected)


def _elapsed_us(answer: Answer, sightings: Sequence[Sighting], explained: Explained) -> int:
    """Until the answer; where that went elsewhere, until it was there."""
    answers = [each.t_ns for each in sightings if each.role == "answer"]
    if explained.answer_to and answers:
        return (answers[-1] - sightings[0].t_ns) // 1000
    return answer.elapsed_us


def require_namespaces(lab: Lab, decided: Aim) -> None:
    """NetlabError (exit code 3) if a place on the way is not there."""
    missing = [place for place in decided.places if not namespaces.is_mounted(place.namespace)]
    if missing:
        raise NetlabError(
            [
                Problem(
                    "namespace-missing",
                    f"{place} has no network namespace: {namespaces.path(place.namespace)} "
                    "is not there",
                    hint=f"lab {lab.name} is not complete: `netlab up` completes it",
                )
                for place in missing
            ],
            Exit.MACHINE,
        )


def _ended(leg: Leg, found: list[Hop], explained: Explained, decided: Aim) -> list[Hop]:
    """Hops whose last one says what became of the packet there."""
    if not found:
        return found
    loss = explained.drop
    step: AnyStep
    if loss and leg == loss.direction:
        step = Drop(reason=loss.reason)
    elif leg == "forward":
        step = Deliver(to=str(explained.delivered_to))
    else:
        step = Deliver(to=explained.answer_to or str(decided.source))
    last = msgspec.structs.replace(found[-1], steps=[*found[-1].steps, step])
    return [*found[:-1], last]


def _blindness(blind: Sequence[Blind]) -> Loss:
    """Why nothing can be said: an empty answer is not a clean answer."""
    first = blind[0]
    return Loss(
        direction="forward",
        node=first.place.node,
        device=None,
        reason="unobserved",
        where=str(first.place),
        rule=None,
        evidence=[str(each) for each in blind],
        explanation=f"{first}, so what it did not report may have happened all the same",
        fix="`netlab doctor` tells what this machine lacks",
    )
