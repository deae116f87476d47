"""What `netlab verify` asks and finds: JSON under `netlab.verify/v1`."""

from __future__ import annotations

from typing import Literal

import msgspec

from netlab.topology.model import Outcome

SCHEMA = "netlab.verify/v1"

Demand = Literal["pod-to-pod", "node-to-pod", "own-address", "outside", "service"]

TITLES: dict[Demand, str] = {
    "pod-to-pod": "pods reach pods without NAT",
    "node-to-pod": "nodes reach pods without NAT",
    "own-address": "nodes see pods by the pods' own addresses",
    "outside": "pods and nodes reach hosts outside",
    "service": "Services are reached from everywhere",
}
"""The demands of the network model, then hosts and Services, where translation is no fault.

That pods see each other by their own addresses is what pod-to-pod says of both ends.
"""


class End(msgspec.Struct, frozen=True):
    """Who asks or is asked."""

    kind: Literal["pod", "node", "host", "svc"]
    name: str  # "demo/pod1", "k8s-slave1"
    namespace: str = ""  # file under /run/netns
    node: str = ""  # that it is, or is on
    addresses: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind}/{self.name}"


class Question(msgspec.Struct, frozen=True):
    """One client that asks one address and port whom it speaks with, and who is seen there."""

    demand: Demand
    source: End
    target: End
    address: str
    port: int  # 0: where this command itself answers in the target
    protocol: Literal["TCP", "UDP"]
    names: frozenset[str] = frozenset()  # who may answer
    near: tuple[End, ...] = ()  # who may be spoken with, where that is not the target itself
    dns: bool = False  # a name server is asked, in its own words

    @property
    def family(self) -> int:
        """4 or 6."""
        return 6 if ":" in self.address else 4


class Answer(msgspec.Struct, frozen=True):
    """What came of a question."""

    outcome: Outcome
    detail: str = ""  # why it was not reached, or how it was translated
    own: str = ""  # the source's address, as its socket has it
    seen: str = ""  # the same, as the target saw it
    answered_by: str = ""


class Result(msgspec.Struct, frozen=True, kw_only=True, rename={"source": "from", "target": "to"}):
    """A question and its answer, as JSON has it."""

    demand: Demand
    source: str
    target: str
    address: str
    port: int | None
    protocol: str
    outcome: Outcome
    expected: Outcome
    as_declared: bool
    why_expected: str  # "" if it is what the demand says
    own: str
    seen: str
    answered_by: str
    detail: str


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """A demand: how many pairs there are, and how many of them are how."""

    demand: Demand
    title: str
    pairs: int
    reached: int
    translated: int
    unreachable: int
    not_as_declared: int


class Verified(msgspec.Struct, frozen=True, kw_only=True):
    """All of it."""

    schema: str = SCHEMA
    lab: str
    as_declared: bool
    demands: list[Part]
    left_out: list[str]  # what was not asked, and why
    rounds: int
    elapsed_s: float
    results: list[Result]


def encode(verified: Verified) -> bytes:
    """JSON, indented."""
    return msgspec.json.format(msgspec.json.encode(verified), indent=2)
