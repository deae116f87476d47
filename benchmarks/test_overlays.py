"""A full mesh of many nodes, against the links, routes and FDB entries themselves."""

from __future__ import annotations

from pathlib import Path

from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import floor, floor_overlay, labs, settle
from benchmarks.conftest import Figures, Times
from netlab.lab.lifecycle import down, up
from netlab.topology.load import load

NODES, PODS, ROUNDS = 50, 1000, 3


def test_fifty_nodes_in_a_vxlan_full_mesh(
    benchmark: BenchmarkFixture, figures: Figures, tmp_path: Path
) -> None:
    """In turns: the floor, `up`, a second `up`; the kernel is done between them."""
    file = tmp_path / "lab.yaml"
    file.write_text(labs.topology("bench", PODS, NODES))
    lab = load(file).lab
    bare, again = Times(), Times()

    def build_floor() -> None:
        floor.build("floor", NODES, PODS)
        floor_overlay.build("floor", NODES)

    def before() -> None:
        try:
            bare.of(build_floor)
        finally:
            floor_overlay.remove("floor")
            floor.remove("floor", NODES, PODS)
        settle.wait()

    def after(_: object) -> None:
        again.of(lambda: up(lab))
        down("bench")
        settle.wait()

    try:
        benchmark.pedantic(up, args=(lab,), setup=before, teardown=after, rounds=ROUNDS)
    finally:
        down("bench")
    first = Times(list(benchmark.stats.stats.data))
    figures.ratio("up of 50 nodes in a VXLAN mesh, against the floor", first.ms(), bare.ms(), 2.5)
    figures.ratio("a second up of it, against the first", again.ms(), first.ms(), 1)
