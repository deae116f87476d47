"""What service rules cost the first packet of a connection: `netlab bench lookup`, held to figures.

NETLAB_BENCH_LARGE=1 adds 30,000 Services.
"""

from __future__ import annotations

import io
import os

from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.conftest import Figures
from netlab.bench import lookup
from netlab.bench.model import Report
from netlab.bench.options import modes
from netlab.bench.run import Progress, run

LARGE = bool(os.environ.get("NETLAB_BENCH_LARGE"))
SIZES = (1_000, 5_000, 10_000, *((20_000, 30_000) if LARGE else ()))
MODES = "iptables:legacy,iptables:nft,nftables,nftables-flat"


def test_first_packets(benchmark: BenchmarkFixture, figures: Figures) -> None:
    options = lookup.Options(
        sizes=SIZES,
        modes=modes(MODES),
        endpoints=2,
        connections=4_000,
        rounds=40,
        overlay="vxlan",
        force=False,
        seed=1,
    )
    progress = Progress(lookup.cost(options), io.StringIO())

    def measure() -> Report:
        return run("lookup", {}, lambda found: lookup.lookup(options, found, progress), _as_it_is)

    report = benchmark.pedantic(measure, rounds=1)
    assert report.complete, report.ended_by
    for mode in MODES.split(","):
        first = [_value(report, mode, size) for size in SIZES if _has(report, mode, size)]
        what = f"first packet, {mode}, {len(first)} sizes from {SIZES[0]:,} Services on"
        if mode.startswith("iptables"):
            (line,) = (fit for fit in report.fits if (fit.what, fit.mode) == (lookup.FIRST, mode))
            figures.note(f"{what}: for each Service", f"{line.slope_ns:.3g} ns, R² {line.r2:.3f}")
        else:
            figures.ratio(f"{what}: the last against the first", first[-1], first[0], 1.15, "us")
    assert report.noise is not None
    figures.limit("A/A noise of first packets", 100 * report.noise, 5, "%")


def _as_it_is(report: Report) -> Report:
    return report


def _has(report: Report, mode: str, size: int) -> bool:
    return report.figure(lookup.FIRST, mode, size) is not None


def _value(report: Report, mode: str, size: int) -> float:
    found = report.figure(lookup.FIRST, mode, size)
    assert found
    return found.value
