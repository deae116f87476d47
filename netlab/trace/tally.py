"""What a series of probes came to: who received how many, what was lost and why, how long it took.

Written as JSON under the schema `netlab.trace-series/v1` (docs/trace.md), of which keys are never
taken away.
"""

from __future__ import annotations

import statistics
from collections import Counter

import msgspec

from netlab.datapath.services.choices import choices
from netlab.datapath.services.endpoints import Endpoints
from netlab.topology.model import Lab, Service, ServicePort
from netlab.trace.aim import Aim
from netlab.trace.expectation import Expectation
from netlab.trace.model import Disposition, Leg, ProbeProtocol, Trace
from netlab.trace.model_steps import Data, Socket
from netlab.trace.series import chosen, endpoints, known_port

SCHEMA = "netlab.trace-series/v1"

_DISPOSITIONS: tuple[Disposition, ...] = ("delivered", "rejected", "dropped", "unobserved")


class SeriesProbe(Data, frozen=True, kw_only=True):
    """What was sent, each time from another source port."""

    from_: str = msgspec.field(name="from")
    to: str
    protocol: ProbeProtocol
    destination: Socket


class Share(Data, frozen=True, kw_only=True):
    """How many probes an endpoint was chosen for; shares are parts of 1.

    `declared_share` is null where the Service leaves no equal chances (session affinity), where it
    depends on who asks, and where there is no Service.  `delivered` of the `count` were answered.
    """

    name: str | None  # `namespace/name` of a pod, a node's name; null: an address of neither
    node: str | None
    ip: str
    port: int | None
    count: int
    share: float
    declared_share: float | None
    delivered: int


class Losses(Data, frozen=True, kw_only=True):
    """Probes that were lost on the same leg, on the same node and for the same reason."""

    direction: Leg
    node: str | None
    reason: str
    count: int
    explanation: str  # that of the first one
    fix: str | None


class Elapsed(Data, frozen=True, kw_only=True):
    """Microseconds from sending until the answer."""

    min: int
    median: int
    max: int


class Unexpected(Data, frozen=True, kw_only=True):
    """Probes of which something was otherwise than expected; `first` counts from 1."""

    count: int
    first: int
    differences: list[str]
    trace: Trace


class Series(Data, frozen=True, kw_only=True):
    """A series of probes, told; `count` of the `asked` were sent."""

    schema: str = SCHEMA
    lab: str
    probe: SeriesProbe
    asked: int
    count: int
    interrupted: bool
    dispositions: dict[Disposition, int]
    endpoints: list[Share]
    losses: list[Losses]
    elapsed_us: Elapsed | None  # of what was delivered
    expectation: Expectation | None
    unexpected: Unexpected | None


class Tally:
    """Counts traces; what stays of them is a few numbers for each."""

    def __init__(
        self, lab: Lab, aim: Aim, asked: int, expectation: Expectation | None = None
    ) -> None:
        self._lab, self._aim, self._asked = lab, aim, asked
        self._expectation = expectation
        self._dispositions: Counter[Disposition] = Counter()
        self._chosen: Counter[Socket] = Counter()
        self._delivered: Counter[Socket] = Counter()
        self._losses: dict[tuple[Leg, str | None, str], Losses] = {}
        self._elapsed: list[int] = []
        self._unexpected: Unexpected | None = None
        self._declared = declared(lab, aim)

    def add(self, trace: Trace) -> None:
        """Count one more."""
        self._dispositions[trace.disposition] += 1
        end = chosen(trace)
        if end:
            self._chosen[end] += 1
            self._delivered[end] += trace.delivered
        if trace.delivered:
            self._elapsed.append(trace.elapsed_us)
        if trace.drop:
            drop = trace.drop
            key = drop.direction, drop.node, drop.reason
            before = self._losses.get(key)
            self._losses[key] = Losses(
                direction=drop.direction,
                node=drop.node,
                reason=drop.reason,
                count=before.count + 1 if before else 1,
                explanation=before.explanation if before else drop.explanation,
                fix=before.fix if before else drop.fix,
            )
        differences = self._expectation.differences(trace) if self._expectation else []
        if differences:
            self._differs(trace, differences)

    def _differs(self, trace: Trace, differences: list[str]) -> None:
        first = self._unexpected or Unexpected(
            count=0, first=self._dispositions.total(), differences=differences, trace=trace
        )
        self._unexpected = msgspec.structs.replace(first, count=first.count + 1)

    def series(self) -> Series:
        """What it came to until now; interrupted if that is less than was asked for."""
        count, aim = self._dispositions.total(), self._aim
        return Series(
            lab=self._lab.name,
            probe=SeriesProbe(
                from_=aim.source.name,
                to=aim.to,
                protocol=aim.protocol,
                destination=Socket(ip=aim.destination, port=aim.port),
            ),
            asked=self._asked,
            count=count,
            interrupted=count < self._asked,
            dispositions={each: self._dispositions[each] for each in _DISPOSITIONS},
            endpoints=self._shares(count),
            losses=sorted(self._losses.values(), key=lambda each: -each.count),
            elapsed_us=Elapsed(
                min=min(self._elapsed),
                median=round(statistics.median(self._elapsed)),
                max=max(self._elapsed),
            )
            if self._elapsed
            else None,
            expectation=self._expectation,
            unexpected=self._unexpected,
        )

    def _shares(self, count: int) -> list[Share]:
        """Whoever was chosen, and whoever should have been."""
        declared = self._declared or ()
        ends = dict.fromkeys(Socket(ip=each.address, port=each.port) for each in declared)
        part = 1 / len(ends) if ends else 0.0
        found = []
        for end in dict.fromkeys([*ends, *sorted(self._chosen, key=str)]):
            name, node = self._whose(end)
            found.append(
                Share(
                    name=name,
                    node=node,
                    ip=end.ip,
                    port=end.port,
                    count=self._chosen[end],
                    share=round(self._chosen[end] / count, 4) if count else 0.0,
                    declared_share=None
                    if self._declared is None
                    else round(part, 4)
                    if end in ends
                    else 0.0,
                    delivered=self._delivered[end],
                )
            )
        return found

    def _whose(self, end: Socket) -> tuple[str | None, str | None]:
        for pod in self._lab.pods:
            if end.ip in pod.addresses and not pod.host_network:
                return pod.key, pod.node
        for node in self._lab.nodes:
            if end.ip in (*node.addresses, *node.bridge_addresses):
                return node.name, node.name
        return None, None


def declared(lab: Lab, aim: Aim) -> Endpoints | None:
    """The endpoints that have equal chances of being chosen, by what the lab declares.

    None where there is no Service that chooses, where the first choice of a client is kept, and
    where the choice depends on more than on the destination (externalTrafficPolicy Local).
    """
    found_port = known_port(lab, aim)
    if found_port is None or not endpoints(lab, aim):
        return None
    service, port = found_port
    if service.session_affinity == "ClientIP":
        return None
    found = _chosen_at(lab, aim, service, port)
    return found[0] if len(set(found)) == 1 else None


def _chosen_at(lab: Lab, aim: Aim, service: Service, port: ServicePort) -> list[Endpoints]:
    """What each way to the destination's address or node port leads to."""
    ip = f"[{aim.destination}]" if ":" in aim.destination else aim.destination
    # A node port is that of the node which has the address, all else is translated at the source.
    owner = next((node for node in lab.nodes if aim.destination in node.addresses), None)
    at = {f"{ip}:{aim.port}"} if owner is None else {f"NodePort {aim.port}"}
    node = owner.name if owner else aim.source.node
    if node is None:
        return []
    is_six = ":" in aim.destination
    return [
        choice.endpoints
        for choice in choices(lab, service, port, lab.node(node))
        if at & {*choice.to} and all((":" in end.address) is is_six for end in choice.endpoints)
    ]
