"""A trace to a name: the questions for it first, the path of the last one, then the probe."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec.structs import replace

from netlab.topology.model import Lab
from netlab.trace import run
from netlab.trace.aim import Request
from netlab.trace.model import NameAsked, Probe, Trace
from netlab.trace.resolution import is_name, question_to, resolved

if TYPE_CHECKING:
    from netlab.trace.run import Recorded

__all__ = ["is_name", "trace"]


def trace(
    lab: Lab, request: Request, recorded: list[Recorded] | None, declared: Lab | None
) -> Trace:
    """As :func:`netlab.trace.run.trace`; where no server answered, the question's own trace.

    NetlabError (exit code 1) if there is no such name.
    """
    found = resolved(lab, request)
    if found.unanswered:
        lost = run.traced(lab, found.unanswered, recorded, declared)[0]
        return replace(lost, resolution=found.questions)
    assert found.request is not None
    *others, last = found.questions
    if question := question_to(lab, request, last):
        last = _with_path(last, run.traced(lab, question, None, declared)[0])
    told = run.traced(lab, found.request, recorded, declared)[0]
    return replace(told, resolution=[*others, last], probe=_named(told.probe, request.destination))


def _with_path(asked: NameAsked, traced: Trace) -> NameAsked:
    by = traced.delivered_to
    via = [traced.probe.from_, *traced.via, *([by.name] if by else [])]
    return replace(asked, by=by, via=via)


def _named(probe: Probe, name: str) -> Probe:
    return replace(probe, to=f"{name} ({probe.to})")
