"""ipvs mode: what a full load and one changed endpoint cost, beside the native tools.

It needs a kernel with IPVS: `netlab vm -- .venv/bin/python -m pytest benchmarks/test_balancing.py`.
NETLAB_BENCH_LARGE=1 adds 30,000 Services.
"""

from __future__ import annotations

import os

import pytest

from benchmarks.balancing import measured
from benchmarks.conftest import Figures
from netlab.kernel import features

SIZES = (1_000, 10_000, *((30_000,) if os.environ.get("NETLAB_BENCH_LARGE") else ()))

pytestmark = pytest.mark.skipif(
    not features.attempt(["ip_vs"])["ip_vs"].ok, reason="this kernel has no IPVS: `netlab vm`"
)


def test_virtual_servers(figures: Figures) -> None:
    found = measured(SIZES)
    for each in found:
        what = f"ipvs, {each.services:,} Services"
        figures.ratio(f"{what}: full load, against the tools", each.load, each.tools, 1.3)
        figures.note(f"{what}: its rules", f"{each.rules:.0f} ms")
        figures.note(f"{what}: one endpoint replaced", f"{each.change:.1f} ms")
    first, last = found[0], found[-1]
    what = f"ipvs, one endpoint replaced: {last.services:,} against {first.services:,} Services"
    figures.ratio(what, last.change, first.change, 1.5)
