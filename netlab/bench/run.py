"""A run: what it has found so far, how far it is, and what stays of one that is interrupted."""

from __future__ import annotations

import contextlib
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, TextIO

from netlab.bench.machine import machine
from netlab.bench.model import Figure, Fit, Kind, Report, Skipped
from netlab.compare.model import Variant
from netlab.problems import NetlabError


class Progress:
    """How much is done, on stderr: a line that changes on a terminal, else one now and then.

    `total` is in seconds as they were on some machine; the rest is told by how long this one took
    for what is done.
    """

    _PAUSE_S = 10.0

    def __init__(self, total: float, stream: TextIO | None = None) -> None:
        self._total = total
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty() and "NO_COLOR" not in os.environ
        self._begun = time.monotonic()
        self._told = 0.0
        self._done = 0.0
        self._width = 0

    def step(self, what: str, cost: float = 0.0) -> None:
        """Begin `what`; something that costs so much has just been done."""
        self._done += cost
        now = time.monotonic()
        # Soon at first, then less and less often.
        pause = min(self._PAUSE_S, max(1.0, self._told - self._begun))
        if not self._terminal and self._told and now - self._told < pause:
            return
        self._told = now
        spent = now - self._begun
        rest = ""
        if self._done > 0:
            left = spent * max(0.0, self._total - self._done) / self._done
            rest = f", about {_duration(left)} left"
        part = min(99, int(100 * self._done / self._total)) if self._total else 0
        self._write(f"{part:3d} %  {what}  ({_duration(spent)}{rest})")

    def close(self) -> None:
        """Leave the last line alone."""
        if self._terminal and self._width:
            self._stream.write(f"\r{' ' * self._width}\r")
            self._stream.flush()
            self._width = 0

    def _write(self, line: str) -> None:
        if self._terminal:
            self._stream.write(f"\r{line.ljust(self._width)}")
            self._width = len(line)
        else:
            self._stream.write(f"{line}\n")
        self._stream.flush()


# kube-proxy's layout of nftables beyond takes the kernel minutes to load.
_SLOW_TO_LOAD = {"nftables": 10_000}

# What is counted, not timed, says nothing of noise.
_EXACT = ("lines", "MiB")


def _duration(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole} s" if whole < 100 else f"{whole // 60} min {whole % 60:02d} s"


class Recorder:
    """Where a benchmark puts what it finds, as it finds it."""

    def __init__(self) -> None:
        self.figures: list[Figure] = []
        self.fits: list[Fit] = []
        self.skipped: list[Skipped] = []

    def skip(self, mode: str, error: NetlabError | str, services: int | None = None) -> None:
        """Note that something is not measured, and why."""
        reason = (
            error
            if isinstance(error, str)
            else "; ".join(problem.message for problem in error.problems)
        )
        self.skipped.append(Skipped(mode=mode, services=services, reason=reason))

    def leaves_out(self, variant: Variant, services: int, force: bool) -> bool:
        """Whether a mode takes too long to load at a size, unless forced; if so it is noted."""
        most = _SLOW_TO_LOAD.get(variant.mode)
        too_slow = most is not None and services > most and not force
        if too_slow:
            reason = "loading takes the kernel minutes; --force does it"
            self.skip(str(variant), reason, services)
        return too_slow


def run(
    kind: Kind,
    options: dict[str, Any],
    benchmark: Callable[[Recorder], None],
    conclude: Callable[[Report], Report],
) -> Report:
    """Run a benchmark; interrupted, what it has found by then, marked so.

    NetlabError of the benchmark itself comes through if nothing was found.
    """
    begun, started = time.monotonic(), datetime.now(UTC)
    here = machine()
    recorder = Recorder()
    ended_by = ""
    try:
        with quiet():
            benchmark(recorder)
    except KeyboardInterrupt:
        ended_by = "interrupted"
    except NetlabError as error:
        if not recorder.figures:
            raise
        ended_by = "; ".join(problem.message for problem in error.problems)
    found = [
        each.noise
        for each in recorder.figures
        if each.noise is not None and each.unit not in _EXACT
    ]
    report = Report(
        netlab=version("netlab-datapath"),
        kind=kind,
        started=started.isoformat(timespec="seconds").replace("+00:00", "Z"),
        elapsed_s=round(time.monotonic() - begun, 1),
        complete=not ended_by,
        ended_by=ended_by,
        options=options,
        machine=here,
        noise=float(f"{statistics.median(found):.3g}") if found else None,
        figures=recorder.figures,
        fits=recorder.fits,
        skipped=recorder.skipped,
        sentences=[],
        claims=[],
    )
    return conclude(report)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Collect no garbage during the body."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextlib.contextmanager
def on_one_processor() -> Iterator[None]:
    """Stay on one processor during the body, the last one, where fewest interrupts are handled."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def turns(lanes: Sequence[Any], number: int) -> list[Any]:
    """Lanes in the order of a round: another one begins each time."""
    first = number % len(lanes) if lanes else 0
    return [*lanes[first:], *lanes[:first]]
