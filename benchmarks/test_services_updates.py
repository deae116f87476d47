"""What a change of one Service costs, and what stays in memory, for each mode and many Services.

NETLAB_BENCH_LARGE=1 adds 30,000 and 100,000 Services, where the mode takes them.
"""

from __future__ import annotations

import os

import pytest

from benchmarks.conftest import Figures
from benchmarks.services import Measured, measured

LARGE = bool(os.environ.get("NETLAB_BENCH_LARGE"))
SIZES = {
    # 30,000 Services in kube-proxy's layout take the kernel minutes
    "nftables": (1_000, 3_000, 10_000),
    "iptables-nft": (1_000, 10_000, *((30_000,) if LARGE else ())),
    "iptables-legacy": (1_000, 10_000, *((30_000,) if LARGE else ())),
    "nftables-flat": (1_000, 10_000, *((30_000, 100_000) if LARGE else ())),
}


@pytest.mark.parametrize("mode", SIZES)
def test_changes(mode: str, figures: Figures) -> None:
    found = [measured(mode, services) for services in SIZES[mode]]
    for each in found:
        what = f"{mode}, {each.services:,} Services"
        HELD_TO[mode](what, each, figures)
        figures.note(f"{what}: the first change after a load", f"{each.first:.1f} ms")
        figures.note(f"{what}: lines for one endpoint", f"{each.commands[REPLACED]}")
        figures.note(
            f"{what}: memory of the process, its sender, the loader",
            f"{each.resident:.0f}, {each.sender:.0f}, {each.loader:.0f} MB",
        )
    if mode == "nftables-flat":
        for kind in found[0].changes:
            first, last = found[0], found[-1]
            what = f"{mode}, {kind}: {last.services:,} against {first.services:,} Services"
            figures.ratio(what, last.changes[kind], first.changes[kind], 1.5)


REPLACED = "one endpoint replaced"


def _flat(what: str, found: Measured, figures: Figures) -> None:
    figures.ratio(f"{what}: full load, against nft -f", found.load, found.tool_load, 1.3)
    for kind, taken in found.changes.items():
        figures.limit(f"{what}: {kind}", taken, 5, "ms")
    figures.limit(f"{what}: a process that stays", found.resident + found.sender, 250, "MB")


def _nftables(what: str, found: Measured, figures: Figures) -> None:
    most = {1_000: 1.3, 3_000: 1, 10_000: 0.6}[found.services]
    figures.ratio(f"{what}: full load, against nft -f", found.load, found.tool_load, most)
    for kind, taken in found.changes.items():
        figures.ratio(f"{what}: {kind}, against nft -f", taken, found.tool_changes[kind], 1.3)


def _iptables(what: str, found: Measured, figures: Figures) -> None:
    if found.services > 10_000:  # up to there test_services.py takes turns
        figures.ratio(f"{what}: full load, against the tool", found.load, found.tool_load, 1.3)
    for kind, taken in found.changes.items():
        figures.ratio(f"{what}: {kind}, against the tool", taken, found.tool_changes[kind], 1.3)


HELD_TO = {
    "nftables": _nftables,
    "iptables-nft": _iptables,
    "iptables-legacy": _iptables,
    "nftables-flat": _flat,
}
