"""In what modes differ, in sentences."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence

from netlab.compare.model import Column, Cost
from netlab.trace.model import Trace, Translation
from netlab.trace.model_steps import OF_SERVICES

# From where a ratio of medians may mean something, of so many probes each.
_NOTABLE = 1.1
_ENOUGH = 10

Told = tuple[str, Trace]  # the name of a mode, and the trace in its twin


def agree(columns: Sequence[Column]) -> bool:
    """Whether all modes that were measured have the same disposition and translations.

    Which endpoint chance chose does not count.
    """
    return len({(t.disposition, _translations(t)) for _, t in _told(columns)}) < 2


def differences(columns: Sequence[Column]) -> list[str]:
    """A sentence for each difference worth knowing."""
    told = _told(columns)
    found = list(_of_outcome(told))
    found += _of_translations(told)
    found += _of_endpoints(columns)
    found += _of_cost(columns)
    return found


def _told(columns: Sequence[Column]) -> list[Told]:
    return [(each.name, each.measured.trace) for each in columns if each.measured]


def _groups(told: Sequence[Told], key: Callable[[Trace], Hashable]) -> list[tuple[str, Trace]]:
    """Modes with the same key, joined by words, and a trace of theirs."""
    found: dict[Hashable, list[Told]] = {}
    for each in told:
        found.setdefault(key(each[1]), []).append(each)
    return [(_listed([name for name, _ in group]), group[0][1]) for group in found.values()]


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _of_outcome(told: Sequence[Told]) -> Iterator[str]:
    groups = _groups(told, lambda t: (t.disposition, t.drop and (t.drop.reason, t.drop.node)))
    if len(groups) > 1:
        for names, trace in groups:
            yield f"With {names} it is {_outcome(trace)}."


def _outcome(trace: Trace) -> str:
    """`rejected on n1: svc/demo/myblog has no port 81`."""
    drop = trace.drop
    if drop is None:
        to = trace.delivered_to
        return f"delivered to {to}" if to else trace.disposition
    where = f" on {drop.node}" if drop.node else ""
    return f"{trace.disposition}{where}: {drop.explanation.rstrip('.')}"


def _translations(trace: Trace) -> tuple[Hashable, ...]:
    """What was translated where, but for the endpoint that chance may have chosen."""
    return tuple(
        (
            # (what IPVS does is what a rule of other modes does)
            "dnat" if step.kind in OF_SERVICES else step.kind,
            step.node,
            step.before.ip,
            None if step.kind in OF_SERVICES else step.after.ip,
        )
        for step in trace.translations
    )


def _of_translations(told: Sequence[Told]) -> Iterator[str]:
    groups = _groups(told, _translations)
    if len(groups) > 1:
        for names, trace in groups:
            done = [_translation(step) for step in trace.translations]
            yield f"With {names}: {_listed(done) if done else 'nothing is translated'}."


def _translation(step: Translation) -> str:
    where = f" on {step.node}" if step.node else ""
    verb = "masquerade" if step.kind == "masquerade" else step.kind.upper()
    return f"{verb}{where}, {step.before} → {step.after}"


def _of_endpoints(columns: Sequence[Column]) -> Iterator[str]:
    """Another endpoint than the first mode's, which makes the ways hard to compare."""
    measured = [(each.name, each.measured) for each in columns if each.measured]
    first = next((m.trace.delivered_to for _, m in measured if m.trace.delivered_to), None)
    for name, each in measured:
        to = each.trace.delivered_to
        if first and to and to.ip != first.ip:
            tries = f"{each.tries} tries" if each.tries > 1 else "one try"
            yield (
                f"With {name} it went to {to.name}, not to {first.name}, in {tries}: endpoints are "
                "chosen at random, and the ways may differ for that."
            )


def _of_cost(columns: Sequence[Column]) -> Iterator[str]:
    """Times that differ by less than they scatter."""
    costs = [
        (each.name, cost) for each in columns if each.measured and (cost := each.measured.cost)
    ]
    costs.sort(key=lambda pair: pair[1].median_us)
    if len(costs) < 2:
        return
    (least, low), (most, high) = costs[0], costs[-1]
    ratio = high.median_us / low.median_us
    if low.high_us >= high.low_us or ratio < _NOTABLE or _few(low, high):
        yield (
            "The times say nothing for or against a mode: they are small, scatter, and differ by "
            "no more than that."
        )
    else:
        yield (
            f"With {most} the first packet of a connection takes {ratio:.1f} times as long as with "
            f"{least} from the client's device to the endpoint's."
        )


def _few(*costs: Cost) -> bool:
    return any(len(cost.samples_ns) < _ENOUGH for cost in costs)
