"""A story with everything that bears on it, and the questions that explanations ask of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from netlab.topology.model import Lab
from netlab.trace.aim import Aim
from netlab.trace.correlate import Story
from netlab.trace.model import Leg, Receiver
from netlab.trace.model_steps import AnyStep, Rule
from netlab.trace.path import Tables
from netlab.trace.place import Place
from netlab.trace.probe import Answer
from netlab.trace.steps import Chapter
from netlab.trace.witnesses.kernel import Moment
from netlab.trace.witnesses.packets import Sighting


class Case(msgspec.Struct, frozen=True):
    """All that an explanation looks at."""

    lab: Lab
    aim: Aim
    answer: Answer
    story: Story
    tables: Tables
    moments: Sequence[Moment] = ()  # what the kernel did with it, in time order

    @property
    def moments_of_loss(self) -> list[Moment]:
        """Where the kernel gave it up."""
        return [moment for moment in self.moments if moment.is_loss]


def receiver(case: Case) -> Receiver | None:
    """Who the probe was for where it was last seen; None if it was not seen at all."""
    if not case.story.forward:
        return None
    end = case.story.forward[-1].end.destination
    last = last_seen(case, "forward")
    if last.direction == "in" and last.place.kind != "switch":
        place = last.place
        return Receiver(kind=place.kind, name=place.name, node=place.node, ip=end.ip, port=end.port)  # type: ignore[arg-type]
    for pod in case.lab.pods:
        if end.ip in pod.addresses and not pod.host_network:
            return Receiver(kind="pod", name=pod.key, node=pod.node, ip=end.ip, port=end.port)
    for node in case.lab.nodes:
        if end.ip in node.addresses:
            return Receiver(kind="node", name=node.name, node=node.name, ip=end.ip, port=end.port)
    return Receiver(kind="unknown", name=end.ip, node=None, ip=end.ip, port=end.port)


def last_seen(case: Case, leg: Leg) -> Sighting:
    """The last sight of a leg that was seen."""
    last = case.story.leg(leg)[-1].passage.before
    assert last is not None
    return last


def last_steps(case: Case, leg: Leg) -> list[AnyStep]:
    """What is known of the passage after the last sight of a leg that was seen."""
    return case.story.leg(leg)[-1].steps


def rules(case: Case, leg: Leg) -> Iterable[tuple[Chapter | None, Rule]]:
    """All rules that matched, with their chapters; None for those before any sight."""
    for chapter in case.story.leg(leg):
        for step in chapter.steps:
            if isinstance(step, Rule):
                yield chapter, step
    if leg == "forward":
        for rule in case.story.loose:
            yield None, rule


def place_of(chapter: Chapter | None, case: Case) -> Place:
    """The place that the rules of a chapter stand in."""
    if chapter and chapter.runs:
        return chapter.runs[0].place
    return case.aim.source


def answered(case: Case) -> bool:
    """Whether an answer was sent at all."""
    return any(
        chapter.passage.after and chapter.passage.after.role == "answer"
        for chapter in case.story.reply
    )


def first_back(case: Case, role: str) -> tuple[Sighting, Chapter] | None:
    """The first sight of a refusal or an error: where it was sent."""
    for chapter in case.story.reply:
        if chapter.passage.after and chapter.passage.after.role == role:
            return chapter.passage.after, chapter
    return None
