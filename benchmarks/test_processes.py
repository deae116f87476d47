"""`netlab` as whole processes: against the CNI plugins and Mininet, and against the clock."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.conftest import Figures, Times
from netlab.bench import cni, settle
from netlab.bench.pods import topology

PODS, NODES = 200, 2
CNI_PODS = 50
MININET_HOSTS = 100
PEER_ROUNDS = 5
ROUNDS = 11

NETLAB = Path(sys.executable).with_name("netlab")
# Mininet belongs to the distribution's interpreter, not to this environment.
SYSTEM_PYTHON = "/usr/bin/python3"


def netlab(*arguments: str) -> None:
    """Run a command to its end."""
    subprocess.run([NETLAB, *arguments], check=True, capture_output=True)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    """A place for a topology; everything is down at the end."""
    yield tmp_path / "lab.yaml"
    netlab("down", "--all")
    settle.wait()


def test_pods_against_cni(benchmark: BenchmarkFixture, figures: Figures, file: Path) -> None:
    plugins = cni.directory()
    if plugins is None:
        pytest.skip("the CNI plugins are not installed: ./bootstrap.sh bench")

    def peer(up: Times, down: Times) -> int:
        # In memory, so that host-local's reservations wait for no disk.
        with tempfile.TemporaryDirectory(dir="/dev/shm") as data:
            node = cni.Node("cni", plugins, Path(data), CNI_PODS)
            try:
                up.of(node.up)
                down.of(node.down)
            finally:
                node.close()
        return CNI_PODS

    _in_turns(benchmark, figures, file, "CNI bridge", peer, least=4)


def test_pods_against_mininet(benchmark: BenchmarkFixture, figures: Figures, file: Path) -> None:
    if subprocess.run([SYSTEM_PYTHON, "-c", "import mininet"], capture_output=True).returncode:
        pytest.skip("Mininet is not installed: ./bootstrap.sh bench")
    script = Path(cni.__file__).with_name("mininet_bridge.py")

    def peer(up: Times, down: Times) -> int:
        # A network namespace stands for the host, where Mininet puts its bridge.
        answer = subprocess.run(
            ["unshare", "--net", SYSTEM_PYTHON, str(script), str(MININET_HOSTS)],
            check=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        seconds = json.loads(answer.stdout)
        up.seconds.append(seconds["up"])
        down.seconds.append(seconds["down"])
        return MININET_HOSTS

    _in_turns(benchmark, figures, file, "Mininet", peer, least=6)


def _in_turns(
    benchmark: BenchmarkFixture,
    figures: Figures,
    file: Path,
    name: str,
    peer: Callable[[Times, Times], int],
    least: float,
) -> None:
    """The peer and netlab one after the other; `peer` records its times and returns its pods."""
    file.write_text(topology("bench", PODS, NODES))
    peer_up, peer_down, down = Times(), Times(), Times()
    pods = 0

    def before() -> None:
        nonlocal pods
        pods = peer(peer_up, peer_down)
        settle.wait()

    def after(*_: object) -> None:
        down.of(lambda: netlab("down", "bench"))
        settle.wait()

    benchmark.pedantic(
        netlab, args=("up", str(file)), setup=before, teardown=after, rounds=PEER_ROUNDS
    )
    up = Times(list(benchmark.stats.stats.data))
    figures.faster(f"netlab up, a pod, against {name}", up.ms(PODS), peer_up.ms(pods), least)
    figures.faster(f"netlab down, a pod, against {name}", down.ms(PODS), peer_down.ms(pods), least)


def test_netlab_up_of_two_nodes(benchmark: BenchmarkFixture, figures: Figures, file: Path) -> None:

    def remove(*_: object) -> None:
        netlab("down", "--all")
        settle.wait()

    benchmark.pedantic(netlab, args=("up", "two-node-vxlan"), teardown=remove, rounds=ROUNDS)
    figures.limit("netlab up two-node-vxlan", _seconds(benchmark), 0.8, "s")


def test_netlab_trace(benchmark: BenchmarkFixture, figures: Figures, file: Path) -> None:
    netlab("up", "two-node-vxlan")
    arguments = ("trace", "pod1", "svc/myblog")
    benchmark.pedantic(netlab, args=arguments, rounds=ROUNDS, warmup_rounds=1)
    figures.limit("netlab trace pod1 svc/myblog", _seconds(benchmark), 0.8, "s")


def test_netlab_help(benchmark: BenchmarkFixture, figures: Figures) -> None:
    benchmark.pedantic(netlab, args=("--help",), rounds=2 * ROUNDS, warmup_rounds=1)
    figures.limit("netlab --help", _seconds(benchmark), 0.15, "s")


def _seconds(benchmark: BenchmarkFixture) -> float:
    return Times(list(benchmark.stats.stats.data)).ms() / 1e3


_PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def test_memory_of_1000_pods(figures: Figures, file: Path) -> None:
    file.write_text(topology("bench", pods=1000, nodes=5))
    # Started by a small process: whoever forks hands its own peak on, and this one is large.
    answer = subprocess.run(
        [sys.executable, "-c", _PEAK, NETLAB, "up", file], check=True, capture_output=True
    )
    # The largest of it and of what it ran and waited for, iptables-restore included.
    figures.limit("netlab up of 1,000 pods, peak memory", int(answer.stdout) / 1024, 150, "MB")
    figures.limit("workload of 1,000 pods, peak memory", _workload_peak("bench"), 60, "MB")


def _workload_peak(name: str) -> float:
    """VmHWM of the largest process of a lab, in MiB."""
    from netlab.lab import control

    init = control.connect(name)
    assert init is not None
    peaks = []
    for process in init.status().processes:
        text = Path(f"/proc/{process.pid}/status").read_text()
        line = next(line for line in text.splitlines() if line.startswith("VmHWM:"))
        peaks.append(int(line.split()[1]))
    return max(peaks) / 1024
