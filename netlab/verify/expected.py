"""What each question should find: what the lab declares, else what its demand says.

`spec.verify.expect` comes first, the last entry that matches.  Then what the declared lab foretells
(`netlab trace --predict`): a Service without endpoints refuses, a NetworkPolicy lets nobody else
through.  Pairs that nothing stands between are not foretold: they have to be reached.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Literal

from netlab.problems import NetlabError
from netlab.topology.model import Lab, Outcome
from netlab.trace.aim import Request, aim
from netlab.trace.prediction import predict, unpredictable
from netlab.verify.model import Question

CHANCE: Literal["chance"] = "chance"
"""Due where it depends on the endpoint that is chosen."""

Due = Outcome | Literal["chance"]


class Expected:
    """Asked for each question: the outcome, and why it is not what the demand says."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._isolated = {key for policy in lab.policies for key in policy.selected}
        self._known: dict[tuple[str, ...], tuple[Due, str]] = {}

    def of(self, question: Question) -> tuple[Due, str]:
        """The outcome that is due, and why, "" if it is what the demand says."""
        for each in reversed(self._lab.expected):
            if fnmatchcase(str(question.source), each.source) and fnmatchcase(
                str(question.target), each.destination
            ):
                why = f"spec.verify.expect: {each.source} to {each.destination}"
                return each.outcome, why
        if question.demand == "service" or self._is_isolated(question):
            return self._foretold(question)
        return "reached", ""

    def _is_isolated(self, question: Question) -> bool:
        return question.source.name in self._isolated or question.target.name in self._isolated

    def _foretold(self, question: Question) -> tuple[Due, str]:
        """What is foretold of a client: without policies the same for all pods of a node."""
        source = question.source
        who = source.name if self._lab.policies or source.kind == "host" else source.node
        key = (source.kind, who, question.address, str(question.port), question.protocol)
        if key not in self._known:
            self._known[key] = self._foretell(question)
        return self._known[key]

    def _foretell(self, question: Question) -> tuple[Due, str]:
        source = str(question.source)
        address = f"[{question.address}]" if question.family == 6 else question.address
        port = question.port or 9
        request = Request(source, f"{address}:{port}", protocol=question.protocol.lower())  # type: ignore[arg-type]
        try:
            decided = aim(self._lab, request)
        except NetlabError:
            return "reached", ""
        if unpredictable(self._lab, decided):
            return "reached", ""
        found = predict(self._lab, decided)
        ways = [found, *found.others]
        # Where this command itself listens, the declared lab knows of nobody.
        arrives = ("port-closed",) if question.port == 0 else (None,)
        lost = [way.reason or way.disposition for way in ways if way.reason not in arrives]
        if not lost:
            return "reached", ""
        return ("unreachable" if len(lost) == len(ways) else CHANCE), f"foretold: {lost[0]}"
