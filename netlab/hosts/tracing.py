"""A trace through a lab whose nodes are machines.

The witnesses of each machine watch there; the probe is sent where its source is; what all saw is
joined here, where it is explained as any other trace is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import msgspec
from msgspec.structs import replace

from netlab.hosts.clocks import offsets
from netlab.hosts.gateways import Gateways, raise_all
from netlab.hosts.tables import RemoteTables
from netlab.hosts.watching import Seen, Wish, plain_mark
from netlab.problems import NetlabError, Problem
from netlab.topology.model import Lab
from netlab.trace import probe
from netlab.trace.aim import Aim, Request, aim
from netlab.trace.canary import Blind
from netlab.trace.correlate import Observed
from netlab.trace.mark import Mark
from netlab.trace.model import Trace, Witnesses
from netlab.trace.model_steps import Rule, Socket, Tuple
from netlab.trace.probe import Answer
from netlab.trace.run import Recorded, follow, tell
from netlab.trace.witnesses.packets import Sighting
from netlab.trace.witnesses.rules import Match, Run


def trace(
    gateways: Gateways, lab: Lab, request: Request, recorded: list[Recorded] | None = None
) -> Trace:
    """Send one probe and tell what happened to it, there and back.

    To `recorded` the frames of the probe are appended, and those of what came back, in time order.
    Raises NetlabError: exit code 2 if the request cannot be meant, 3 if a machine does not answer.
    """
    decided = aim(lab, request)
    if decided.source.node is None or any(place.kind == "host" for place in decided.places):
        raise NetlabError(
            Problem("not-on-hosts", f'"{request.source}" to "{request.destination}" leaves the lab')
        )
    decided = replace(decided, places=tuple(each for each in decided.places if each.node))
    with _watched(gateways, lab, decided, probe.new_mark(decided)) as watch:
        answer = watch.send(request.timeout_s)
        followed = follow(lab, decided, answer, watch)
        if recorded is not None:
            recorded += map(Recorded, followed.observed.sightings, watch.frames)
        # What is predicted is told of an underlay that is a switch of the lab's own.
        return tell(lab, followed, watch, predicted=False)


class _Watch:
    """The witnesses of all machines, as those of one are asked elsewhere."""

    def __init__(self, gateways: Gateways, decided: Aim, nodes: tuple[str, ...]) -> None:
        self._gateways = gateways
        self._aim = decided
        self._nodes = nodes
        self.decisions = RemoteTables(self._ask_table)
        self.blind: list[Blind] = []
        self.frames: list[bytes] = []

    def send(self, timeout_s: float) -> Answer:
        node = self._aim.source.node
        assert node is not None
        data = self._gateways.open[node].ask("send", msgspec.json.encode(timeout_s))
        return msgspec.msgpack.decode(data, type=Answer)

    def observed(self, answer: Answer, is_last: bool = True) -> Observed:
        data = msgspec.msgpack.encode(answer)
        answers, errors = self._gateways.ask("seen", data, self._nodes)
        raise_all(errors)
        seen = {node: msgspec.msgpack.decode(data, type=Seen) for node, data in answers.items()}
        self.blind = [blind for each in seen.values() for blind in each.blind]
        ahead = offsets({node: each.sightings for node, each in seen.items()}, self._nodes[0])
        pairs = joined(seen, ahead)
        self.frames = [frame for _, frame in pairs]
        texts = _Texts(seen)
        return Observed(
            sent=Tuple(
                source=answer.source,
                destination=Socket(ip=self._aim.destination, port=self._aim.port),
            ),
            sightings=[sighting for sighting, _ in pairs],
            runs=[run for each in seen.values() for run in each.runs],
            entries=[entry for each in seen.values() for entry in each.entries],
            tables=self.decisions,
            texts=texts,
            moments=_moments(seen, ahead, self._nodes[0]),
            balanced=[entry for each in seen.values() for entry in each.balanced],
            answer_ends=self._aim.answer_ends,
        )

    def reports(self) -> Witnesses:
        answers, errors = self._gateways.ask("reports", nodes=self._nodes)
        raise_all(errors)
        found = {n: msgspec.msgpack.decode(data, type=Witnesses) for n, data in answers.items()}
        fields = ("packets", "rules", "conntrack", "kernel", "decisions")
        return Witnesses(
            **{
                field: _together({node: getattr(each, field) for node, each in found.items()})
                for field in fields
            }
        )

    def _ask_table(self, node: str, question: str, arguments: list[Any]) -> bytes:
        data = msgspec.msgpack.encode((question, arguments))
        return self._gateways.open[node].ask("table", data)


@contextmanager
def _watched(gateways: Gateways, lab: Lab, decided: Aim, mark: Mark) -> Iterator[_Watch]:
    """The machines that the probe may pass, watching; the source's is the first."""
    nodes = tuple(dict.fromkeys(each.node for each in decided.places if each.node))
    missing = [node for node in nodes if node not in gateways.open]
    raise_all({node: gateways.failed[node] for node in missing if node in gateways.failed})

    def wish(node: str) -> bytes:
        places = tuple(each for each in decided.places if each.node == node)
        found = Wish(lab, replace(decided, places=places), plain_mark(mark))
        return msgspec.msgpack.encode(found)

    answers, errors = gateways.ask("watch", wish, nodes)
    try:
        raise_all(errors)
        yield _Watch(gateways, decided, nodes)
    finally:
        gateways.ask("unwatch", nodes=list(answers))


def joined(seen: Mapping[str, Seen], ahead: Mapping[str, int]) -> list[tuple[Sighting, bytes]]:
    """Sightings of all machines with their frames, in the time of the first one."""
    found = [
        (replace(sighting, t_ns=sighting.t_ns - ahead.get(node, 0)), frame)
        for node, each in seen.items()
        for sighting, frame in zip(each.sightings, each.frames, strict=True)
    ]
    return sorted(found, key=lambda pair: pair[0].t_ns)


def _moments(seen: Mapping[str, Seen], ahead: Mapping[str, int], first: str) -> list[Any]:
    """What the kernels did, in the monotonic time of the first machine."""
    here = seen[first].monotonic_to_wall_ns
    moments = [
        replace(moment, t_ns=moment.t_ns + each.monotonic_to_wall_ns - ahead.get(node, 0) - here)
        for node, each in seen.items()
        for moment in each.moments
    ]
    return sorted(moments, key=lambda moment: moment.t_ns)


class _Texts:
    """The texts of rules, which came with the runs that matched them."""

    def __init__(self, seen: Mapping[str, Seen]) -> None:
        self._runs = [run for each in seen.values() for run in each.runs]
        self._rules = [rules for each in seen.values() for rules in each.rules]

    def __call__(self, run: Run, match: Match) -> Rule:
        for known, rules in zip(self._runs, self._rules, strict=True):
            if known is run:
                return rules[run.matches.index(match)]
        raise KeyError(match)


def _together(reports: Mapping[str, str]) -> str:
    """What the same witness of several machines says: it is partial if one is blind."""
    words = [f"{node}: {text.partition(': ')[2]}" for node, text in reports.items() if text != "ok"]
    if not words:
        return "ok"
    all_blind = all(text.startswith("unavailable") for text in reports.values())
    return f"{'unavailable' if all_blind else 'partial'}: {'; '.join(words)}"
