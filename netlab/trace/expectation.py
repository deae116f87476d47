"""What a trace is expected to show, and in which ways it shows something else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from netlab.problems import NetlabError, Problem
from netlab.topology.model import Lab
from netlab.topology.references import resolve
from netlab.trace.model import Trace

Expected = Literal["delivered", "rejected", "dropped"]


class Expectation(msgspec.Struct, frozen=True):
    """What is to happen: nodes that the way there passes, and `namespace/name` of who receives."""

    disposition: Expected = "delivered"
    via: tuple[str, ...] = ()
    to: str | None = None

    def differences(self, trace: Trace) -> list[str]:
        """What was otherwise, in words that follow "it"; empty if all is as expected.

        Of what could not be observed nothing is known, and nothing differs.
        """
        if trace.disposition == "unobserved":
            return []
        found = []
        if trace.disposition != self.disposition:
            found.append(f"was {_outcome(trace)}, not {self.disposition}")
        passed = trace.via
        way = f"passed {' and '.join(passed)}" if passed else "passed no node"
        missed = [node for node in self.via if node not in passed]
        if missed:
            found.append(f"{way}, not {' nor '.join(missed)}")
        if self.to not in (None, trace.endpoint):
            found.append(f"was received by {trace.endpoint or 'nobody'}, not by {self.to}")
        return found


def expectation(
    lab: Lab,
    disposition: Expected | None,
    via: Sequence[str] = (),
    to: str | None = None,
    namespace: str | None = None,
) -> Expectation | None:
    """What references of a user mean; None if nothing is expected.

    A way or a receiver without a disposition is that of a delivery.  Raises NetlabError (exit
    code 2) for names of nothing, and for what is no node or cannot receive.
    """
    if disposition is None and not via and to is None:
        return None
    return Expectation(
        disposition or "delivered",
        tuple(_node(lab, text) for text in via),
        None if to is None else _receiver(lab, to, namespace),
    )


def _node(lab: Lab, text: str) -> str:
    node = resolve(lab, f"node/{text.removeprefix('node/')}").node
    assert node is not None
    return node.name


def _receiver(lab: Lab, text: str, namespace: str | None) -> str:
    meant = resolve(lab, text, namespace)
    if meant.pod and not meant.pod.host_network:
        return meant.pod.key
    if meant.node and not meant.service:
        return meant.node.name
    raise NetlabError(
        Problem(
            "bad-receiver",
            f'"{text}" is neither a pod nor a node, and nobody else receives a probe',
            hint="`netlab describe svc/NAME` lists the endpoints of a Service"
            if meant.service
            else "`netlab get pods` lists pods",
        )
    )


def _outcome(trace: Trace) -> str:
    if trace.drop is None:
        return trace.disposition
    where = f" on {trace.drop.node}" if trace.drop.node else ""
    return f"{trace.disposition}{where} ({trace.drop.reason})"
