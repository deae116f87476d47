"""Where benchmarks run, and the table of figures at their end.

Everything happens in a mount and a network namespace of their own, with a /run/netns and a
/run/netlab that nobody else sees: labs of the machine's user are not met, what a broken run leaves
vanishes with it, and names lie on a tmpfs as on a distribution, whatever the machine's /run is.
"""

from __future__ import annotations

import contextlib
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from netlab.kernel.syscalls import CLONE_NEWNET, CLONE_NEWNS, MS_PRIVATE, MS_REC, mount, unshare


@dataclass
class Figures:
    """What was found, one line for each claim."""

    lines: list[tuple[str, str, str, str, bool]] = field(default_factory=list)

    def ratio(self, what: str, ours: float, theirs: float, most: float, unit: str = "ms") -> None:
        """Ours is to be at most `most` times theirs."""
        ratio = ours / theirs
        self.lines.append(
            (
                what,
                f"{ours:.2f} {unit}",
                f"{theirs:.2f} {unit}",
                f"{ratio:.2f}x, at most {most:g}x",
                ratio <= most,
            )
        )

    def faster(self, what: str, ours: float, theirs: float, least: float) -> None:
        """Theirs is to be at least `least` times ours; milliseconds."""
        ratio = theirs / ours
        self.lines.append(
            (
                what,
                f"{ours:.2f} ms",
                f"{theirs:.2f} ms",
                f"{ratio:.1f}x faster, at least {least:g}x",
                ratio >= least,
            )
        )

    def limit(self, what: str, value: float, most: float, unit: str) -> None:
        """A value is to be at most `most`."""
        self.lines.append(
            (what, f"{value:.3g} {unit}", "", f"at most {most:g} {unit}", value <= most)
        )

    def note(self, what: str, value: str) -> None:
        """A value that is held to nothing."""
        self.lines.append((what, value, "", "", True))


@dataclass
class Times:
    """Durations of one thing, in seconds."""

    seconds: list[float] = field(default_factory=list)

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Measure the body."""
        start = time.perf_counter()
        yield
        self.seconds.append(time.perf_counter() - start)

    def of(self, function: Callable[[], object]) -> None:
        """Measure a call."""
        with self.taken():
            function()

    def ms(self, count: int = 1) -> float:
        """The median in milliseconds, for each of `count` objects."""
        return statistics.median(self.seconds) / count * 1e3


_FIGURES = Figures()


@pytest.fixture
def figures() -> Figures:
    """Where a benchmark puts what it found."""
    return _FIGURES


@pytest.fixture(autouse=True)
def _no_garbage_collection() -> Iterator[None]:
    """As in the command `netlab up`; pytest's own objects would be walked through otherwise."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def pytest_configure() -> None:
    if os.geteuid() != 0:
        raise pytest.UsageError("benchmarks need root: make bench")
    unshare(CLONE_NEWNS | CLONE_NEWNET)
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    for directory in ("/run/netns", "/run/netlab"):
        os.makedirs(directory, exist_ok=True)
        mount("tmpfs", directory, "tmpfs", 0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _FIGURES.lines:
        return
    header = ("", "netlab", "against", "target")
    rows = [header, *(line[:4] for line in _FIGURES.lines)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    terminalreporter.section("figures (medians, in turns)")
    for row, line in zip(rows, [None, *_FIGURES.lines], strict=True):
        sign = " " if line is None else "✓" if line[4] else "✗"
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        terminalreporter.write_line(f"{sign} {'  '.join(cells)}".rstrip())
