"""What figures say in words: slopes, what is flat, where curves cross, what noise explains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise, permutations
from statistics import median

from msgspec.structs import replace

from netlab.bench import lifecycle, lookup, sync, tracing
from netlab.bench.claims import FLAT, claims, settled
from netlab.bench.model import Figure, Fit, Report, number
from netlab.bench.statistics import apart, crossing, differs
from netlab.topology.overlays import KINDS

_SURE = 0.03


def conclude(report: Report) -> Report:
    """The report with sentences and claims."""
    return replace(report, sentences=list(_sentences(report)), claims=claims(report))


def curves(report: Report, what: str) -> dict[str, list[Figure]]:
    """Figures of one thing by mode, in the order of sizes."""
    found: dict[str, list[Figure]] = {}
    for each in report.figures:
        if each.what == what:
            found.setdefault(each.mode, []).append(each)
    return {mode: sorted(each, key=lambda f: f.services) for mode, each in found.items()}


def explained_by_noise(one: Figure, other: Figure) -> bool:
    """Whether the difference of two figures is none that one can be sure of."""
    return not differs(one, other)


def _sentences(report: Report) -> Iterator[str]:
    if not report.complete:
        yield f"The run was not completed ({report.ended_by}); what was done by then is here."
    if report.kind == "lookup":
        yield from _of_lookup(report)
    elif report.kind == "sync":
        for what in (sync.LOAD, *sync.CHANGES.values()):
            yield from _crossings(curves(report, f"{what}: time"), what)
    elif report.kind == "throughput":
        yield from _of_throughput(report)
    elif report.kind == "lifecycle":
        yield from _against(report, lifecycle.WHOLE)
    elif report.kind == "trace":
        yield from _against(report, tracing.NOTHING)
    if report.noise is not None:
        yield (
            f"The same thing measured twice within a run differs by {100 * report.noise:.1f} % "
            "(A/A, the median of all figures)."
        )
    for each in report.skipped:
        where = f" with {each.services:,} Services" if each.services else ""
        yield f"Not measured: {each.mode}{where}: {each.reason}."


def _of_lookup(report: Report) -> Iterator[str]:
    first = {mode: each for mode, each in curves(report, lookup.FIRST).items() if mode != "none"}
    for mode, figures in first.items():
        yield from _growth(mode, figures, report.fits)
    yield from _crossings(first, "The first packet")
    yield from _past(report, first)
    if _encapsulates(report) and any(mode.startswith("iptables") for mode in first):
        yield (
            f"Over {report.options['overlay']} the packet that carries a first packet is a new "
            "connection of the node itself, and is compared with the whole list, too, whatever the "
            "Service: `--overlay host-gw` measures without."
        )
    yield from _established(report)
    yield from _labs(report)


def _against(report: Report, base: str) -> Iterator[str]:
    """How many times as long the others take as one."""
    for what in dict.fromkeys(each.what for each in report.figures):
        one = report.figure(what, base)
        for other in report.figures if one else ():
            if one is None or other.what != what or other.mode == base:
                continue
            times = f"{other.value / one.value:.2f} times what {base} takes"
            doubt = "" if differs(other, one) else ", which noise could explain"
            yield f"{what}: {other.mode} takes {number(other.value)} {other.unit}, {times}{doubt}."


def _of_throughput(report: Report) -> Iterator[str]:
    """What is left of what passes without rules, where noise does not explain what is not."""
    for what in dict.fromkeys(each.what for each in report.figures if each.better == "more"):
        found = curves(report, what)
        for mode, figures in found.items():
            last = figures[-1]
            bare = report.figure(what, "none", last.services)
            if mode == "none" or bare is None or not differs(bare, last):
                continue
            yield (
                f"{what}: {mode} with {last.services:,} Services {number(last.value)} {last.unit}, "
                f"{100 * last.value / bare.value:.0f} % of the {number(bare.value)} without rules."
            )


def _growth(mode: str, figures: Sequence[Figure], fits: Sequence[Fit]) -> Iterator[str]:
    if len(figures) < 2:
        return
    chosen = settled(figures)
    least, most = chosen[0], chosen[-1]
    span = f"{least.services:,} to {most.services:,} Services"
    if not differs(most, least) or apart(most, least) <= FLAT - 1:
        noise = "" if differs(most, least) else ", which noise could explain"
        yield (
            f"{mode}: flat from {span}, {number(least.value)} and {number(most.value)} µs "
            f"({most.value / least.value:.2f} times{noise})."
        )
        return
    line = next((f for f in fits if f.what == lookup.FIRST and f.mode == mode), None)
    slope = f": {number(line.slope_ns)} ns for each Service (R² {line.r2:.4f})" if line else ""
    yield (
        f"{mode}: from {span} the first packet takes {number(least.value)} to "
        f"{number(most.value)} µs"
        f"{slope}."
    )
    yield from _steps(mode, figures)
    for each in fits:
        if each.mode == mode and each.what == f"{lookup.BY_POSITION}, {most.services} Services":
            yield (
                f"{mode}: with {most.services:,} Services each place in the list before a Service "
                f"costs {number(each.slope_ns)} ns (R² {each.r2:.4f}): the last one is met after "
                f"{number(each.intercept_us + each.slope_ns * most.services / 1000)} µs, the first "
                f"after {number(each.intercept_us)}."
            )


def _steps(mode: str, figures: Sequence[Figure]) -> Iterator[str]:
    """Where the line is none: more Services, and each costs more than those before."""
    large = settled(figures)
    slopes = [
        1000 * (after.value - before.value) / (after.services - before.services)
        for before, after in pairwise(large)
    ]
    if len(slopes) > 1 and min(slopes) > 0 and max(slopes) > 2 * min(slopes):
        steps = ", ".join(
            f"{number(slope)} ns from {before.services:,} to {after.services:,}"
            for slope, (before, after) in zip(slopes, pairwise(large), strict=True)
        )
        yield f"{mode}: a Service more costs {steps}."


def _crossings(found: dict[str, list[Figure]], what: str) -> Iterator[str]:
    for one, other in permutations(found, 2):
        where = crossing(found[one], found[other])
        if where is None:
            continue
        services, slow, fast = where
        yield (
            f"{what}: {one} is ahead of {other} up to about {_round(services):,} Services and "
            f"behind from there on; with {slow.services:,} it takes {number(slow.value)} against "
            f"{number(fast.value)} {slow.unit} ({slow.value / fast.value:.1f} times)."
        )


def _past(report: Report, first: dict[str, list[Figure]]) -> Iterator[str]:
    """New connections to no Service meet the whole list."""
    for mode, figures in curves(report, lookup.PAST).items():
        through = first.get(mode)
        if through and figures[-1].services == through[-1].services:
            direct, there = figures[-1], through[-1]
            if direct.value > there.value and differs(direct, there):
                yield (
                    f"{mode}: a new connection past the Services, to a pod itself, takes "
                    f"{number(direct.value)} µs with {direct.services:,} Services on the node, "
                    f"longer than one to a Service ({number(there.value)}): it is compared with "
                    "all of them."
                )


def _encapsulates(report: Report) -> bool:
    kind = KINDS.get(report.options.get("overlay", ""))
    return kind is not None and kind.overhead.get("IPv4", 0) > 0


def _established(report: Report) -> Iterator[str]:
    """Whether the mode matters, and whether the number of Services does.

    Labs of one mode with other numbers of Services are the same to such packets, unless what they
    cost grows: so what those differ by is what two labs may differ by for no reason.
    """
    found = curves(report, lookup.ESTABLISHED)
    modes = {mode: each for mode, each in found.items() if mode != "none"}
    if not modes:
        return
    for mode, figures in modes.items():
        values = [each.value for each in figures]
        if len(values) > 2 and values == sorted(values) and differs(figures[-1], figures[0], _SURE):
            yield (
                f"{mode}: a packet of an established connection takes {number(values[0])} µs with "
                f"{figures[0].services:,} Services and {number(values[-1])} with "
                f"{figures[-1].services:,}."
            )
    typical = {mode: median(each.value for each in figures) for mode, figures in modes.items()}
    low, high = min(typical, key=typical.__getitem__), max(typical, key=typical.__getitem__)
    alike = max(
        max(each.value for each in figures) / min(each.value for each in figures) - 1
        for figures in modes.values()
    )
    apart_by = typical[high] / typical[low] - 1
    noisy = median(each.noise or 0.0 for figures in modes.values() for each in figures)
    bare = report.figure(lookup.ESTABLISHED, "none", 0)
    without = f", {number(bare.value)} without rules" if bare else ""
    told = "no more" if apart_by <= max(alike, noisy) else "more"
    yield (
        f"Packets of established connections, the median of all numbers of Services: "
        f"{number(typical[low])} ({low}) to {number(typical[high])} µs ({high}){without}: "
        f"modes are {100 * apart_by:.1f} % apart, {told} than labs of one mode are "
        f"among themselves (up to {100 * alike:.1f} %; A/A {100 * noisy:.1f} %)."
    )


def _labs(report: Report) -> Iterator[str]:
    """What two labs of the same kind differ by."""
    one = report.figure(lookup.FIRST, "none", 0)
    other = report.figure(lookup.FIRST_AGAIN, "none", 0)
    if one and other:
        yield f"Two labs without a service proxy differ by {100 * apart(one, other):.1f} %."


def _round(value: float) -> int:
    return int(float(f"{value:.2g}"))
