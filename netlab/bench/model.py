"""What a run of a benchmark found: plain frozen data, JSON under the schema `netlab.bench/v1`.

A figure is told by what was measured, in which mode, with how many Services.  Its value is the
median of all samples, with an interval that the medians of the rounds give; nothing is thrown away.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

SCHEMA = "netlab.bench/v1"

Kind = Literal["lookup", "sync", "throughput", "lifecycle", "trace"]
KINDS: tuple[Kind, ...] = ("lookup", "sync", "throughput", "lifecycle", "trace")
Verdict = Literal["reproduced", "not reproduced", "cannot be measured here"]


class Data(msgspec.Struct, frozen=True, kw_only=True):
    """Base of everything in a report."""


class Machine(Data, frozen=True, kw_only=True):
    """Where it was measured."""

    system: str  # kernel name, release and version
    architecture: str
    processor: str
    processors: int
    caches: str  # of one processor, "L1d 48K, L2 2048K"; "" if nobody tells
    memory_mib: int
    governor: str | None  # None: the system has none to tell
    virtualisation: str  # "none" on bare metal, "unknown" if nobody tells
    load_before: float  # how many processes ran on average in the minute before
    tools: dict[str, str]  # versions by name


class Quantiles(Data, frozen=True, kw_only=True):
    """Of all samples, outliers among them, in the figure's unit."""

    min: float
    p01: float
    p50: float
    p90: float
    p99: float
    max: float


class Figure(Data, frozen=True, kw_only=True):
    """One thing that was measured, in one mode, with so many Services."""

    what: str
    mode: str  # "none": without a service proxy; "" where there is none to choose
    services: int = 0
    unit: str
    value: float  # the median
    low: float  # where the median lies with a probability of 95 %, or as near as the rounds allow
    high: float
    better: Literal["less", "more", "neither"] = "less"
    count: int  # of samples
    rounds: list[float]  # the median of each round, in order
    quantiles: Quantiles | None = None  # where a round has more than one sample
    noise: float | None = None  # |A/A - 1|: the medians of odd and even rounds compared

    @property
    def key(self) -> tuple[str, str, int]:
        """What tells it from the others of a report."""
        return self.what, self.mode, self.services


class Fit(Data, frozen=True, kw_only=True):
    """A straight line through figures, by least squares: value = intercept + slope * x."""

    what: str
    mode: str
    over: str  # what x is: "Services", or "position in the list"
    first: float  # the least x
    last: float
    slope_ns: float  # for each x
    intercept_us: float
    r2: float  # 1: the points lie on the line
    points: list[tuple[float, float]]  # x, microseconds


class Skipped(Data, frozen=True, kw_only=True):
    """What was asked for and not measured."""

    mode: str
    services: int | None = None  # None: any number
    reason: str


class Claim(Data, frozen=True, kw_only=True):
    """What somebody says of service rules, and what this run says of it."""

    source: str
    text: str
    verdict: Verdict
    figure: str  # the numbers that it rests on, or why there are none


class Report(Data, frozen=True, kw_only=True):
    """A run.  `complete` is false if it was interrupted; then it holds what was done by then."""

    schema: str = SCHEMA
    netlab: str  # version
    kind: Kind
    started: str  # RFC 3339, UTC
    elapsed_s: float
    complete: bool = True
    ended_by: str = ""  # what interrupted it
    options: dict[str, Any]
    machine: Machine
    noise: float | None  # the median of the figures' A/A noise
    figures: list[Figure]
    fits: list[Fit]
    skipped: list[Skipped]
    sentences: list[str]  # what the figures say: slopes, crossing points
    claims: list[Claim]

    def figure(self, what: str, mode: str, services: int = 0) -> Figure | None:
        """The figure, if it is there."""
        return next((each for each in self.figures if each.key == (what, mode, services)), None)


def number(value: float, digits: int = 3) -> str:
    """A measured value as people read it: "7.69", "12.3", "1,096"."""
    return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def encode(report: Report) -> bytes:
    """A report as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(report), indent=2)
