"""Medians, how sure they are, straight lines, and what noise explains.

No distribution is assumed: where the medians of rounds lie says how sure a median is.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Literal

from netlab.bench.model import Figure, Fit, Quantiles

_SURE = 0.95


def figure(
    what: str,
    mode: str,
    services: int,
    rounds: Sequence[Sequence[float]],
    unit: str = "us",
    better: Literal["less", "more", "neither"] = "less",
) -> Figure:
    """A figure of samples by round; at least one round, each with at least one sample."""
    samples = sorted(sample for each in rounds for sample in each)
    medians = [statistics.median(each) for each in rounds]
    low, high = interval(medians)
    value = statistics.median(samples)
    return Figure(
        what=what,
        mode=mode,
        services=services,
        unit=unit,
        value=_short(value),
        low=_short(min(low, value)),
        high=_short(max(high, value)),
        better=better,
        count=len(samples),
        rounds=[_short(each) for each in medians],
        quantiles=quantiles(samples) if len(samples) > len(rounds) else None,
        noise=noise(rounds),
    )


def quantiles(ordered: Sequence[float]) -> Quantiles:
    """Of samples in order: the least value that so many are not above."""

    def at(part: float) -> float:
        return _short(ordered[max(0, math.ceil(part * len(ordered)) - 1)])

    return Quantiles(
        min=_short(ordered[0]),
        p01=at(0.01),
        p50=_short(statistics.median(ordered)),
        p90=at(0.9),
        p99=at(0.99),
        max=_short(ordered[-1]),
    )


def interval(medians: Sequence[float]) -> tuple[float, float]:
    """Where the true median lies with a probability of 95 %, by the medians of rounds.

    Each of n independent rounds is above it or below with the same chance, so that it lies between
    the k-th least and the k-th greatest unless fewer than k are on one side (David and Nagaraja,
    Order Statistics, 7.1).  Below six rounds not even all of them are so sure: then all are taken.
    """
    ordered, count = sorted(medians), len(medians)
    outside, least = 0.0, 0
    while least < (count - 1) // 2:
        outside += 2 * math.comb(count, least) / 2**count
        if outside > 1 - _SURE:
            break
        least += 1
    inner = max(0, least - 1)
    return ordered[inner], ordered[count - 1 - inner]


def noise(rounds: Sequence[Sequence[float]]) -> float | None:
    """How far the same thing is from itself: odd rounds against even ones.  None of one round."""
    halves = [[sample for each in rounds[start::2] for sample in each] for start in (0, 1)]
    if not all(halves):
        return None
    first, second = map(statistics.median, halves)
    return _short(abs(first - second) / min(first, second)) if min(first, second) > 0 else None


def fit(what: str, mode: str, over: str, points: Iterable[tuple[float, float]]) -> Fit | None:
    """The line through points (x, microseconds); None of fewer than three different x."""
    found = sorted(points)
    xs, ys = [x for x, _ in found], [y for _, y in found]
    if len(set(xs)) < 3:
        return None
    slope, intercept = statistics.linear_regression(xs, ys)
    mean = statistics.fmean(ys)
    total = sum((y - mean) ** 2 for y in ys)
    left = sum((y - intercept - slope * x) ** 2 for x, y in found)
    return Fit(
        what=what,
        mode=mode,
        over=over,
        first=xs[0],
        last=xs[-1],
        slope_ns=_short(slope * 1000),
        intercept_us=_short(intercept),
        r2=_short(1 - left / total) if total else 1.0,
        points=[(x, _short(y)) for x, y in found],
    )


def differs(one: Figure, other: Figure, least: float = 0.0) -> bool:
    """Whether noise does not explain the difference of two figures.

    Their intervals do not meet, and they are further apart than either is from itself, and than
    `least` of the smaller one.
    """
    if one.low <= other.high and other.low <= one.high:
        return False
    return apart(one, other) > max(least, one.noise or 0.0, other.noise or 0.0)


def apart(one: Figure, other: Figure) -> float:
    """How far two values are apart, as a part of the smaller one."""
    small, large = sorted((abs(one.value), abs(other.value)))
    if small == 0:
        return 0.0 if large == 0 else math.inf
    return large / small - 1


def crossing(one: Sequence[Figure], other: Sequence[Figure]) -> tuple[float, Figure, Figure] | None:
    """Where one curve over the number of Services comes to lie above the other for good.

    The number of Services, and the figures of both behind it.  None if they do not cross, or if
    noise explains that they do.  Between sizes both are taken for straight lines of logarithms.
    """
    there = {each.services: each for each in other}
    pairs = [(each, there[each.services]) for each in one if each.services in there]
    pairs.sort(key=lambda pair: pair[0].services)
    for (a, b), (later_a, later_b) in pairwise(pairs):
        before, after = math.log(a.value / b.value), math.log(later_a.value / later_b.value)
        if before < 0 < after and differs(later_a, later_b) and differs(a, b):
            part = before / (before - after)
            first, last = math.log(a.services), math.log(later_a.services)
            return math.exp(first + part * (last - first)), later_a, later_b
    return None


def _short(value: float) -> float:
    """Five digits tell all that was measured."""
    return float(f"{value:.5g}")
