"""Two runs compared, figure by figure, with their noise taken into account.

A run of another minute may have met another machine, as it were: slower by what else was going on.
Figures of mode "none", the same way without rules, tell by how much, and what was measured beside
them is judged by both measures: what is worse is worse with and without it.  Reports of
pytest-benchmark are taken as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import msgspec
from msgspec.structs import replace

from netlab.bench import lookup
from netlab.bench.model import Figure, Report
from netlab.bench.schema import bad, contents, decode, parsed
from netlab.bench.statistics import differs, interval, noise

COMPARED = "netlab.bench.compare/v1"

Verdict = Literal["better", "worse", "no difference", "new", "gone", "not comparable"]
DEFAULT_LEAST = 0.05
_CONTROLS = (lookup.FIRST, lookup.ESTABLISHED)
_CONTROLLED = {lookup.PAST: lookup.FIRST, lookup.FIRST_AGAIN: lookup.FIRST}
_SECONDS = "ms"


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One figure in both runs; `ratio` is new over old, as far as the machine is not the reason."""

    what: str
    mode: str
    services: int
    unit: str
    old: float | None
    new: float | None
    ratio: float | None
    explained: float | None  # by which ratio apart noise could have brought them
    verdict: Verdict


class Run(msgspec.Struct, frozen=True):
    """What is compared of a run."""

    name: str
    figures: list[Figure]
    machine: str
    complete: bool = True


def read(path: str) -> Run:
    """A report of ours or of pytest-benchmark; NetlabError (exit 2) if it is neither."""
    data = contents(path)
    found = parsed(data, path)
    if isinstance(found, dict) and "benchmarks" in found and "machine_info" in found:
        return _of_pytest(found, path)
    report = decode(data, path)
    return Run(path, report.figures, _machine(report), report.complete)


def compare(old: Run, new: Run, least: float = DEFAULT_LEAST) -> list[Row]:
    """A row for each figure of either; differences below `least` are none."""
    before = {each.key: each for each in old.figures}
    after = {each.key: each for each in new.figures}
    scales = _scales(before, after)
    return [
        _row(before.get(key), after.get(key), scales, least)
        for key in dict.fromkeys((*before, *after))
    ]


def sentences(old: Run, new: Run, rows: Sequence[Row]) -> list[str]:
    """What is to be known of the comparison as a whole."""
    found = []
    if old.machine != new.machine:
        found.append(f"Measured on two machines: {old.machine}; {new.machine}.")
    for run in (old, new):
        if not run.complete:
            found.append(f"{run.name} is of a run that was not completed.")
    scales = _scales({f.key: f for f in old.figures}, {f.key: f for f in new.figures})
    for what, scale in scales.items():
        found.append(
            f"{what}: without rules the way takes {scale:.2f} times what it did, which is the "
            "machine's doing and is left out of the ratios."
        )
    worse = [row for row in rows if row.verdict == "worse"]
    better = [row for row in rows if row.verdict == "better"]
    found.append(
        f"{len(rows)} figures: {len(worse)} worse, {len(better)} better, "
        f"{len(rows) - len(worse) - len(better)} others."
    )
    return found


def _scales(
    before: dict[tuple[str, str, int], Figure], after: dict[tuple[str, str, int], Figure]
) -> dict[str, float]:
    """By how much the machine alone is slower in the new run, by what was measured."""
    found = {}
    for what in _CONTROLS:
        key = what, "none", 0
        if key in before and key in after and before[key].value > 0:
            found[what] = after[key].value / before[key].value
    return found


def _row(old: Figure | None, new: Figure | None, scales: dict[str, float], least: float) -> Row:
    one = old or new
    assert one
    ratio = explained = None
    verdict: Verdict = "new" if old is None else "gone"
    if old and new:
        ratio, explained, verdict = _judged(old, new, scales, least)
    return Row(
        what=one.what,
        mode=one.mode,
        services=one.services,
        unit=one.unit,
        old=old.value if old else None,
        new=new.value if new else None,
        ratio=ratio,
        explained=explained,
        verdict=verdict,
    )


def _judged(
    old: Figure, new: Figure, scales: dict[str, float], least: float
) -> tuple[float | None, float | None, Verdict]:
    if old.unit != new.unit or old.better != new.better or old.value <= 0 or new.value <= 0:
        same = old.value == new.value and old.unit == new.unit
        return None, None, "no difference" if same else "not comparable"
    scale = scales.get(_CONTROLLED.get(old.what, old.what), 1.0)
    if old.mode == "none" and old.what in scales:
        scale = 1.0  # it is the measure itself
    scaled = replace(old, value=old.value * scale, low=old.low * scale, high=old.high * scale)
    ratio = new.value / scaled.value
    explained = max(
        least, old.noise or 0.0, new.noise or 0.0, old.high / old.low - 1, new.high / new.low - 1
    )
    # What only one of both measures says may be the machine's doing: not all is slowed alike.
    slower = new.value > old.value
    certain = all(differs(new, each, least) for each in (old, scaled)) and slower == (ratio > 1)
    if not certain or old.better == "neither" or (old.mode == "none" and old.what in scales):
        return ratio, explained, "no difference"
    return ratio, explained, "worse" if slower == (old.better == "less") else "better"


def _of_pytest(found: dict[str, Any], path: str) -> Run:
    """A report of pytest-benchmark: medians of rounds, in milliseconds."""
    figures = []
    try:
        for each in found["benchmarks"]:
            stats = each["stats"]
            figures.append(_figure(each.get("fullname") or each["name"], stats))
        cpu = found["machine_info"].get("cpu", {})
        machine = f"{found['machine_info'].get('node', '')} {cpu.get('brand_raw', '')}".strip()
    except (KeyError, TypeError, AttributeError) as error:
        raise bad(path, f"is no report of pytest-benchmark: {error!r}") from None
    return Run(path, figures, machine)


def _figure(name: str, stats: dict[str, Any]) -> Figure:
    rounds = [float(second) * 1e3 for second in stats.get("data") or ()]
    value = float(stats["median"]) * 1e3
    if len(rounds) > 1:
        low, high = interval(rounds)
    else:  # McGill, Tukey and Larsen, Variations of Box Plots, 1978
        half = 1.57 * float(stats.get("iqr", 0)) * 1e3 / math.sqrt(stats.get("rounds") or 1)
        low, high = max(value - half, value / 2), value + half
    return Figure(
        what=name,
        mode="",
        unit=_SECONDS,
        value=value,
        low=min(low, value),
        high=max(high, value),
        count=int(stats.get("rounds") or 1),
        rounds=rounds or [value],
        noise=noise([[each] for each in rounds]) if len(rounds) > 1 else None,
    )


def _machine(report: Report) -> str:
    here = report.machine
    return f"{here.processors} × {here.processor}, {here.system.split(' #')[0]}"


def regressions(rows: Iterable[Row]) -> list[Row]:
    """What is worse."""
    return [row for row in rows if row.verdict == "worse"]
