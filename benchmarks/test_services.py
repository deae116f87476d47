"""Service rules of a node: rendered and loaded whole, against `nft -f` of the same text."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.conftest import Figures, Times
from benchmarks.services import lab
from netlab.datapath.services import iptables, nftables, nftables_flat
from netlab.datapath.services.names import forget_chain_hashes
from netlab.datapath.state import Backend
from netlab.kernel import nft, xtables
from netlab.kernel.namespaces import open_current
from netlab.kernel.syscalls import CLONE_NEWNET, setns, unshare
from netlab.topology.model import Lab

MANY, FEW, ROUNDS = 10_000, 1_000, 7


@pytest.fixture
def scratch() -> Iterator[int]:
    """The calling thread is in a network namespace of its own, of which this is a descriptor."""
    home = open_current()
    unshare(CLONE_NEWNET)
    here = open_current()
    yield here
    setns(home, CLONE_NEWNET)
    os.close(home)
    os.close(here)


def test_full_load_of_flat_maps(
    benchmark: BenchmarkFixture, figures: Figures, scratch: int, tmp_path: Path
) -> None:
    """In turns: rendered and loaded, and `nft -f`; each into a namespace without rules."""
    made = lab(MANY)
    node = made.nodes[0]
    file = tmp_path / "flat.nft"
    file.write_text(nftables_flat.render(made, node).transaction)
    program, rendering = Times(), Times()

    def before() -> tuple[tuple[Lab], dict[str, object]]:
        nft.delete(scratch, nftables_flat.TABLES)
        with program.taken():
            subprocess.run(["nft", "-f", file], check=True)
        nft.delete(scratch, nftables_flat.TABLES)
        rendering.of(lambda: nftables_flat.render(replace(made), node))
        return (replace(made),), {}  # without its indexes, which belong to the rendering

    def render_and_load(fresh: Lab) -> None:
        nft.load(scratch, nftables_flat.render(fresh, node))

    benchmark.pedantic(render_and_load, setup=before, rounds=ROUNDS)
    ours = Times(list(benchmark.stats.stats.data))
    what = f"nftables-flat, {MANY:,} Services rendered and loaded, against nft -f"
    figures.ratio(what, ours.ms(), program.ms(), 1.3)
    figures.ratio("  of it the rendering", rendering.ms(), program.ms(), 0.3)


@pytest.mark.parametrize("backend", xtables.BACKENDS)
def test_full_load_of_iptables(
    backend: Backend,
    benchmark: BenchmarkFixture,
    figures: Figures,
    scratch: int,
    tmp_path: Path,
) -> None:
    """In turns: rendered and loaded, and the tool; each into tables without rules."""
    made = replace(lab(MANY), iptables_backend=backend)
    node = made.nodes[0]
    rules = iptables.render(made, node)
    file = tmp_path / "rules"
    file.write_text(rules.ipv4)
    empty = "".join(f"*{table}\nCOMMIT\n" for table in ("mangle", "filter", "nat"))
    clear = replace(rules, ipv4=empty, ipv6=empty)
    program, rendering = Times(), Times()

    def before() -> tuple[tuple[Lab], dict[str, object]]:
        xtables.restore(scratch, clear)
        with program.taken():
            subprocess.run([f"iptables-{backend}-restore", file], check=True)
        xtables.restore(scratch, clear)
        forget_chain_hashes()
        rendering.of(lambda: iptables.render(replace(made), node))
        forget_chain_hashes()
        return (replace(made),), {}

    def render_and_load(fresh: Lab) -> None:
        xtables.restore(scratch, iptables.render(fresh, node))

    benchmark.pedantic(render_and_load, setup=before, rounds=ROUNDS)
    ours = Times(list(benchmark.stats.stats.data))
    what = f"iptables ({backend}), {MANY:,} Services rendered and loaded, against the tool"
    figures.ratio(what, ours.ms(), program.ms(), 1.3)
    figures.note("  of it the rendering", f"{rendering.ms():.0f} ms")


def test_full_load_against_the_layout_of_kube_proxy(
    benchmark: BenchmarkFixture, figures: Figures, scratch: int
) -> None:
    """In turns, both rendered and loaded by netlab."""
    made = lab(FEW)
    node = made.nodes[0]
    theirs = Times()

    def clear() -> None:
        nft.delete(scratch, (*nftables.TABLES, *nftables_flat.TABLES))

    def before() -> None:
        clear()
        theirs.of(lambda: nft.load(scratch, nftables.render(made, node)))
        clear()

    def render_and_load() -> None:
        nft.load(scratch, nftables_flat.render(made, node))

    benchmark.pedantic(render_and_load, setup=before, rounds=ROUNDS)
    ours = Times(list(benchmark.stats.stats.data))
    what = f"nftables-flat against nftables, {FEW:,} Services rendered and loaded"
    figures.faster(what, ours.ms(), theirs.ms(), 2)
