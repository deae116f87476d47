"""One machine's witnesses of a trace, as the agent there has them.

All that they saw goes back as plain data; what the tables there say is asked for bit by bit.
"""

from __future__ import annotations

import time
from typing import Any

import msgspec

from netlab.problems import Exit, NetlabError, Problem
from netlab.topology.model import Lab
from netlab.trace import probe
from netlab.trace.aim import Aim
from netlab.trace.canary import Blind
from netlab.trace.family import IPV4, IPV6
from netlab.trace.mark import Mark
from netlab.trace.model import Witnesses
from netlab.trace.model_steps import Rule
from netlab.trace.probe import Answer
from netlab.trace.watch import Watch
from netlab.trace.witnesses.conntrack import Entry
from netlab.trace.witnesses.kernel import Moment
from netlab.trace.witnesses.packets import Sighting
from netlab.trace.witnesses.rules import Run
from netlab.trace.witnesses.virtual_servers import Balanced


class Wish(msgspec.Struct, frozen=True):
    """What a machine is to watch for; of the aim only its own places."""

    lab: Lab
    aim: Aim
    mark: dict[str, Any]


class Seen(msgspec.Struct, frozen=True):
    """All that one machine's witnesses saw; `rules` are the texts of each run's matches."""

    sightings: list[Sighting]
    runs: list[Run]
    rules: list[list[Rule]]
    entries: list[Entry]
    moments: list[Moment]
    balanced: list[Balanced]
    frames: list[bytes]
    blind: list[Blind]
    monotonic_to_wall_ns: int


def plain_mark(mark: Mark) -> dict[str, Any]:
    """A mark as data: a family is known by its version."""
    return {
        "protocol": mark.protocol,
        "cookie": mark.cookie,
        "version": mark.family.version,
        "question": mark.question,
        "fragmented": mark.fragmented,
    }


class Watching:
    """A watch that began; it ends with :meth:`end`."""

    def __init__(self, data: bytes) -> None:
        wish = msgspec.msgpack.decode(data, type=Wish)
        given = dict(wish.mark)
        family = IPV4 if given.pop("version") == 4 else IPV6
        self._aim = wish.aim
        self._mark = Mark(family=family, **given)
        _require_places(wish.aim)
        self._watch = Watch(wish.lab, wish.aim, self._mark)
        self._watch.__enter__()

    def send(self, timeout_s: float) -> Answer:
        """Send the probe: the source is here."""
        return probe.send(self._aim, self._mark, timeout_s, self._watch)

    def seen(self, answer: Answer) -> Seen:
        """Everything that was seen."""
        observed = self._watch.observed(answer)
        return Seen(
            sightings=list(observed.sightings),
            runs=list(observed.runs),
            rules=[[observed.texts(run, match) for match in run.matches] for run in observed.runs],
            entries=list(observed.entries),
            moments=list(observed.moments),
            balanced=list(observed.balanced),
            frames=self._watch.frames,
            blind=self._watch.blind,
            monotonic_to_wall_ns=time.time_ns() - time.monotonic_ns(),
        )

    def answer(self, question: str, arguments: list[Any]) -> Any:
        """What the tables here say: a question of `trace.path.Tables`, a place first."""
        from netlab.hosts.tables import QUESTIONS

        decoded = msgspec.convert(arguments, type=QUESTIONS[question].arguments, strict=False)
        return getattr(self._watch.decisions, question)(*decoded)

    def reports(self) -> Witnesses:
        """What the witnesses say of themselves."""
        return self._watch.reports()

    def end(self) -> None:
        """Give everything back."""
        self._watch.__exit__(None, None, None)


def _require_places(aim: Aim) -> None:
    from netlab.hosts.machine import namespaces_missing

    missing = namespaces_missing(tuple(place.namespace for place in aim.places))
    if missing:
        raise NetlabError(
            Problem(
                "namespace-missing",
                f"{', '.join(missing)} is not there",
                hint="the lab is not complete: `netlab up` with the same files completes it",
            ),
            Exit.MACHINE,
        )
