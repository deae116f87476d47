"""A comparison from beginning to end: twins up, traces, timed probes in turns, twins down."""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import msgspec
from msgspec.structs import replace

from netlab.compare import twins
from netlab.compare.differences import agree, differences
from netlab.compare.model import (
    Column,
    Comparison,
    Cost,
    Measured,
    RuleSet,
    Variant,
)
from netlab.datapath.faults import faulty
from netlab.datapath.state import namespace_name
from netlab.kernel import conntrack, xtables
from netlab.kernel.nft_contents import Contents, contents
from netlab.lab import rules
from netlab.problems import Exit, NetlabError
from netlab.topology.model import Lab
from netlab.trace.aim import Aim, Request, aim
from netlab.trace.correlate import Observed
from netlab.trace.effort import Chain, efforts, places_of
from netlab.trace.model import Trace
from netlab.trace.run import traced
from netlab.trace.timing import Stopwatch

DEFAULT_COUNT = 20
# Among two endpoints the right one is missed so often once in 4000 times.
MOST_TRIES = 12
# The ports that Linux gives to clients by itself.
_EPHEMERAL = (32768, 60999)
# Batches of timed probes: those that reach another node than the trace do not count.
_MOST_BATCHES = 5
_LOADS = 3
_LONG_LOAD_S = 0.3


class _Twin(msgspec.Struct):
    """A twin that is up, and the probe in it."""

    variant: Variant
    declared: Lab
    decided: Aim
    trace: Trace
    observed: Observed
    tries: int = 1
    samples: list[int] = []

    @property
    def lab(self) -> Lab:
        return faulty(self.declared)


def compare(
    lab: Lab, request: Request, variants: Sequence[Variant], count: int = DEFAULT_COUNT
) -> Comparison:
    """Trace one probe in a twin of a lab for each variant, and time `count` more of each.

    `lab` is as it is declared (its faults not yet applied); it is not touched, and need not be up.
    Needs root.  Raises NetlabError: exit code 2 if the request cannot be meant.
    """
    decided = aim(faulty(lab), request)
    if decided.protocol != "icmp" and not request.source_port:
        request = replace(request, source_port=random.randint(*_EPHEMERAL))
    lacking: dict[Variant, str] = {}
    with ExitStack() as stack:
        declared: dict[Variant, Lab] = {}
        for variant in variants:
            twin = twins.twin(lab, variant, decided)
            try:
                stack.enter_context(twins.up(twin))
                declared[variant] = twin
            except NetlabError as error:
                if error.exit_code != Exit.MACHINE:
                    raise
                lacking[variant] = "; ".join(problem.message for problem in error.problems)
        found: dict[Variant, _Twin] = {}
        for variant, twin in declared.items():
            found[variant] = _traced(variant, twin, request, next(iter(found.values()), None))
        _time(list(found.values()), count)
        columns = [
            Column(
                mode=variant.mode,
                backend=variant.backend,
                lacking=lacking.get(variant),
                measured=_measured(found[variant]) if variant in found else None,
            )
            for variant in variants
        ]
    return Comparison(
        lab=lab.name,
        from_=decided.source.name,
        to=decided.to,
        node=decided.source.node or "",
        columns=columns,
        agree=agree(columns),
        differences=differences(columns),
    )


def _traced(variant: Variant, declared: Lab, request: Request, first: _Twin | None) -> _Twin:
    """The trace in a twin, again and again until it goes to the endpoint of the first one."""
    lab = faulty(declared)
    decided = aim(lab, request)
    tries = 1
    trace, observed = traced(lab, request, declared=declared)
    while tries < MOST_TRIES and first and _only_another_endpoint(trace, first.trace, declared):
        _forget(decided)
        tries += 1
        trace, observed = traced(lab, request, declared=declared)
    return _Twin(variant, declared, decided, trace, observed, tries)


def _only_another_endpoint(trace: Trace, first: Trace, lab: Lab) -> bool:
    """Whether chance has chosen another one.

    With faults it stays so: one of them may lie in what connection tracking remembers.
    """
    one, other = trace.delivered_to, first.delivered_to
    return one is not None and other is not None and one.ip != other.ip and not lab.faults


def _forget(aim: Aim) -> None:
    """Connections of the nodes, so that the same source port is a new one."""
    for place in aim.places:
        if place.kind == "node":
            conntrack.delete(place.namespace, conntrack.dump(place.namespace))


def _time(found: Sequence[_Twin], count: int) -> None:
    """Time probes in turns, so that what else the machine does meanwhile disturbs all alike."""
    with ExitStack() as stack:
        watches = [
            (twin, stack.enter_context(Stopwatch(twin.lab, twin.decided, receiver)))
            for twin in found
            if twin.trace.disposition == "delivered" and (receiver := twin.trace.delivered_to)
        ]
        for _ in range(_MOST_BATCHES):
            unfinished = [watch for twin, watch in watches if len(twin.samples) < count]
            for turn in range(count if unfinished else 0):
                first = turn % len(unfinished)  # who comes after the pause may find caches cold
                for watch in (*unfinished[first:], *unfinished[:first]):
                    watch.send()
            for twin, watch in watches:
                if watch in unfinished:
                    twin.samples = watch.samples_ns()[:count]


def _measured(twin: _Twin) -> Measured:
    lab, decided = twin.lab, twin.decided
    version = decided.family.address_family
    held = {
        place.namespace: contents(place.namespace, version)
        for place in decided.places
        if place.kind == "node"
    }
    legacy = {
        namespace: places_of(
            dict(zip(_LEGACY, xtables.save(namespace, backend="legacy"), strict=True))[version],
            version,
        )
        for namespace in held
        if xtables.in_use(namespace, "legacy")
    }
    at_client = namespace_name(lab.name, decided.source.node or "")
    untold = not _reports_rules(twin.trace)
    found = efforts(
        twin.trace,
        twin.observed.runs,
        {namespace: each.chains for namespace, each in held.items()},
        legacy,
    )
    return Measured(
        twin=lab.name,
        trace=twin.trace,
        tries=twin.tries,
        there=None if untold else found["forward"],
        back=None if untold or not twin.trace.reply else found["reply"],
        ruleset=_ruleset(held[at_client], legacy.get(at_client, {})),
        load_ms=_load_ms(lab, decided.source.node or ""),
        cost=Cost.of(twin.samples),
    )


def _reports_rules(trace: Trace) -> bool:
    return trace.witnesses.rules == "ok"


def _ruleset(there: Contents, legacy: Mapping[Chain, Sequence[int]]) -> RuleSet:
    """Of nf_tables and of iptables-legacy together."""
    return RuleSet(
        chains=len(there.chains) + len(legacy),
        rules=sum(map(len, (*there.chains.values(), *legacy.values()))),
        sets=there.sets,
        elements=there.elements,
    )


_LEGACY = (2, 10)  # AF_INET and AF_INET6: what `xtables.save` returns, in this order


def _load_ms(lab: Lab, node: str) -> float:
    """The median of some loads; one that takes long scatters little."""
    taken = [rules.load_time(lab, lab.node(node))]
    while len(taken) < _LOADS and taken[0] < _LONG_LOAD_S:
        taken.append(rules.load_time(lab, lab.node(node)))
    return round(statistics.median(taken) * 1000, 1)
