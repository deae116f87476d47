"""`up` inside one process, from the loaded topology to ready, against the kernel's floor."""

from __future__ import annotations

from pathlib import Path

from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.conftest import Figures, Times
from netlab.bench import floor, pods, settle
from netlab.lab.lifecycle import down, up
from netlab.topology.load import load

PODS, NODES, ROUNDS = 200, 2, 11


def test_up_and_down_of_200_pods(
    benchmark: BenchmarkFixture, figures: Figures, tmp_path: Path
) -> None:
    """In turns: the floor, `up`, a second `up`, `down`; the kernel is done between them."""
    file = tmp_path / "lab.yaml"
    file.write_text(pods.topology("bench", PODS, NODES))
    lab = load(file).lab
    bare, again, removed = Times(), Times(), Times()

    def before() -> None:
        try:
            bare.of(lambda: floor.build("floor", NODES, PODS))
        finally:
            floor.remove("floor", NODES, PODS)
        settle.wait()

    def after(_: object) -> None:
        again.of(lambda: up(lab))
        removed.of(lambda: down("bench"))
        settle.wait()

    try:
        benchmark.pedantic(up, args=(lab,), setup=before, teardown=after, rounds=ROUNDS)
    finally:
        down("bench")
    first = Times(list(benchmark.stats.stats.data))
    figures.ratio("up, a pod, against the floor", first.ms(PODS), bare.ms(PODS), 2)
    figures.ratio("a second up, against the first", again.ms(), first.ms(), 1)
    figures.limit("down, a pod", removed.ms(PODS), 1, "ms")
