"""A large cluster's objects: read, checked and decided, against the parse of the C loader alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.conftest import Figures, Times
from netlab.topology.load import load

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from cluster_dumps import Object, dump, endpoint_slice, node, pod, service

PODS, SERVICES, NODES = 5000, 2000, 50
ROUNDS = 5


def cluster() -> Object:
    """A cluster's List, with all that an API server adds."""
    hosts = [f"192.168.0.{i + 1}" for i in range(NODES)]
    nodes = [node(f"n{i}", hosts[i], f"10.244.{i}.0/24") for i in range(NODES)]
    pods = []
    for i in range(PODS):
        app, on = f"app{i % SERVICES}", i % NODES
        address = f"10.244.{on}.{i // NODES + 2}"
        pods.append(pod(f"{app}-5c97d-x{i}", f"n{on}", hosts[on], address, app=app))
    made = []
    for i in range(SERVICES):
        made.append(service(f"app{i}", f"10.96.{i // 250}.{i % 250 + 1}"))
        made.append(endpoint_slice(f"app{i}", 8080, *pods[i::SERVICES]))
    return dump(*nodes, *pods, *made)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same cluster in both formats."""
    directory = tmp_path_factory.mktemp("dump")
    value = cluster()
    found = {suffix: directory / f"cluster.{suffix}" for suffix in ("json", "yaml")}
    found["json"].write_text(json.dumps(value))
    found["yaml"].write_text(yaml.dump(value, Dumper=yaml.CSafeDumper))
    return found


def test_json(benchmark: BenchmarkFixture, figures: Figures, files: dict[str, Path]) -> None:
    """The whole way from the file to a decided lab."""
    benchmark.pedantic(load, (files["json"],), rounds=ROUNDS)
    what = f"a dump of {PODS:,} pods and {SERVICES:,} Services loaded, JSON"
    figures.limit(what, benchmark.stats.stats.median, 3, "s")


def test_yaml(benchmark: BenchmarkFixture, figures: Figures, files: dict[str, Path]) -> None:
    """In turns with PyYAML's C loader, which only parses."""
    ours, parse = Times(), Times()
    text = files["yaml"].read_bytes()
    for _ in range(2):
        parse.of(lambda: yaml.load(text, Loader=yaml.CSafeLoader))
        ours.of(lambda: load(files["yaml"]))
    benchmark.pedantic(load, (files["yaml"],), rounds=1)
    figures.ratio("the same as YAML, against the parse of the C loader", ours.ms(), parse.ms(), 1.2)
