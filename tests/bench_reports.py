"""Reports of benchmarks that were never run, for tests of what is made of reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from msgspec.structs import replace

from netlab.bench import lookup
from netlab.bench.conclusions import conclude
from netlab.bench.model import Figure, Kind, Machine, Report, Skipped
from netlab.bench.statistics import figure, fit

SIZES = (1000, 5000, 10_000, 30_000)
MODES: Mapping[str, Callable[[int], float]] = {
    "iptables:legacy": lambda services: 7 + 0.008 * services,
    "nftables": lambda services: 7.5,
    "nftables-flat": lambda services: 8.0,
}


def rounds(value: float, spread: float = 0.02, count: int = 10) -> list[list[float]]:
    """Rounds of three samples around a value, no two of which are the same."""
    return [
        [
            value * (1 - spread / 2 + spread * number / count + spread * sample / 50)
            for sample in range(3)
        ]
        # odd rounds and even ones have the same middle
        for number in (0, 1, 3, 2, 4, 5, 7, 6, 8, 9)[:count]
    ]


def machine() -> Machine:
    return Machine(
        system="Linux 6.18",
        architecture="x86_64",
        processor="A processor",
        processors=2,
        caches="L2 2048K",
        memory_mib=1024,
        governor=None,
        virtualisation="none",
        load_before=0.0,
        tools={"nft": "1.0.6"},
    )


def report(kind: Kind, figures: Sequence[Figure], skipped: Sequence[Skipped] = ()) -> Report:
    return Report(
        netlab="0.1.0",
        kind=kind,
        started="2026-12-01T00:00:00Z",
        elapsed_s=1.0,
        options={},
        machine=machine(),
        noise=0.01,
        figures=list(figures),
        fits=[],
        skipped=list(skipped),
        sentences=[],
        claims=[],
    )


def lookup_report(
    scale: float = 1.0, modes: Mapping[str, Callable[[int], float]] = MODES
) -> Report:
    """What a run would find where the modes cost so many microseconds."""
    figures = [
        figure(lookup.FIRST, "none", 0, rounds(3.0 * scale)),
        figure(lookup.ESTABLISHED, "none", 0, rounds(2.5 * scale)),
    ]
    fits = []
    for mode, cost in modes.items():
        curve = [
            figure(lookup.FIRST, mode, services, rounds(cost(services) * scale))
            for services in SIZES
        ]
        figures += curve
        line = fit(lookup.FIRST, mode, "Services", [(each.services, each.value) for each in curve])
        assert line
        fits.append(line)
        figures += [
            figure(lookup.ESTABLISHED, mode, services, rounds(4.0 * scale)) for services in SIZES
        ]
    made = report("lookup", figures, [Skipped(mode="ipvs", reason="no module ip_vs")])
    return conclude(replace(made, fits=fits))
