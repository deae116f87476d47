"""What each question should find: what the lab declares, else what its demand says.

`spec.verify.expect` comes first, the last entry that matches.  Then what the declared lab foretells
(`netlab trace --predict`): a Service without endpoints refuses, a NetworkPolicy lets nobody else
through.  Pairs that nothing stands between are not foretold: they have to be reached.

Of pods that are alike (of one node, and of one part in every policy) one is foretold for all.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from ipaddress import ip_address, ip_network
from typing import Literal

from netlab.problems import NetlabError
from netlab.topology.model import Lab, Outcome, Pod
from netlab.trace.aim import Aim, Request, aim
from netlab.trace.model import PredictedWay
from netlab.trace.model_steps import Socket
from netlab.trace.prediction import predict, unpredictable
from netlab.verify.ask import RESPONDER_PORT
from netlab.verify.model import End, Question

CHANCE: Literal["chance"] = "chance"
"""Due where it depends on the endpoint that is chosen."""

Due = Outcome | Literal["chance"]
_Kind = tuple[object, ...]
_NONE = Socket(ip="", port=None)  # no endpoint: the first one is taken


class Expected:
    """Asked for each question: the outcome, and why it is not what the demand says."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._isolated = {key for policy in lab.policies for key in policy.selected}
        self._pods = {pod.key: pod for pod in lab.pods if not pod.host_network}
        self._kinds: dict[End, _Kind] = {}
        self._known: dict[tuple[object, ...], tuple[Due, str]] = {}

    def of(self, question: Question) -> tuple[Due, str]:
        """The outcome that is due, and why, "" if it is what the demand says."""
        for each in reversed(self._lab.expected):
            if fnmatchcase(str(question.source), each.source) and fnmatchcase(
                str(question.target), each.destination
            ):
                why = f"spec.verify.expect: {each.source} to {each.destination}"
                return each.outcome, why
        if question.demand == "service" or self._is_isolated(question) or self._is_off(question):
            return self._foretold(question)
        return "reached", ""

    def _is_isolated(self, question: Question) -> bool:
        return question.source.name in self._isolated or question.target.name in self._isolated

    def _is_off(self, question: Question) -> bool:
        return bool({question.source.node, question.target.node} & set(self._lab.stopped))

    def _foretold(self, question: Question) -> tuple[Due, str]:
        target = question.target
        key = (
            self._kind(question.source),
            self._kind(target),
            # One of several that are alike, or one alone.
            None if target.kind == "pod" else question.address,
            question.source in question.near,
            (question.port, question.protocol, question.family),
        )
        if key not in self._known:
            self._known[key] = self._foretell(question)
        return self._known[key]

    def _ways(self, question: Question, decided: Aim) -> Iterator[PredictedWay]:
        """What becomes of it by each kind of endpoint that may be chosen, or without any."""
        anyhow = predict(self._lab, decided, taken=_NONE)
        seen = set()
        for each in anyhow.endpoints:
            pod = self._pods.get(each.name)
            itself = each.ip in question.source.addresses
            kind = (itself, each.node, *(self._parts(pod) if pod else (each.name,)))
            if kind not in seen:
                seen.add(kind)
                yield predict(self._lab, decided, taken=Socket(ip=each.ip, port=each.port))
        if not seen:
            yield anyhow

    def _kind(self, end: End) -> _Kind:
        """What two ends have in common for which the same is foretold."""
        if end not in self._kinds:
            pod = self._pods.get(end.name) if end.kind == "pod" else None
            mine = (end.kind, end.node, "" if pod else end.name)
            self._kinds[end] = (mine, *(self._parts(pod) if pod else ()))
        return self._kinds[end]

    def _parts(self, pod: Pod) -> Iterator[object]:
        """The pod's part in each policy: selected, named, within a block; and its named ports."""
        addresses = [ip_address(address) for address in pod.addresses]
        for policy in self._lab.policies:
            yield pod.key in policy.selected
            for rule in (*(policy.ingress or ()), *(policy.egress or ())):
                yield pod.key in (rule.pods or ())
                networks = [ip_network(cidr) for cidr in rule.cidrs]
                yield tuple(any(own in cidr for cidr in networks) for own in addresses)
        if self._lab.policies:
            yield pod.ports

    def _foretell(self, question: Question) -> tuple[Due, str]:
        source = str(question.source)
        address = f"[{question.address}]" if question.family == 6 else question.address
        port = question.port or RESPONDER_PORT
        request = Request(source, f"{address}:{port}", protocol=question.protocol.lower())  # type: ignore[arg-type]
        try:
            decided = aim(self._lab, request)
        except NetlabError:
            return "reached", ""
        if unpredictable(self._lab, decided):
            return "reached", ""
        ways = list(self._ways(question, decided))
        # Where this command itself listens, the declared lab knows of nobody.
        arrives = ("port-closed",) if question.port == 0 else (None,)
        lost = [way.reason or way.disposition for way in ways if way.reason not in arrives]
        if not lost:
            return "reached", ""
        return ("unreachable" if len(lost) == len(ways) else CHANCE), f"foretold: {lost[0]}"
