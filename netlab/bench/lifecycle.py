"""Pods up and down: netlab against the kernel's floor, the CNI plugins and Mininet, in turns.

Between turns it is waited until the kernel has freed the namespaces of the one before.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from netlab.bench import clusters, peers, pods, settle
from netlab.bench.peers import Seconds
from netlab.bench.run import Progress, Recorder, turns
from netlab.bench.statistics import figure
from netlab.lab.lifecycle import down, up
from netlab.problems import Exit, NetlabError, Problem
from netlab.topology.load import load

NODES = 2
WHOLE, IN_PROCESS = "netlab", "netlab, in one process"
_CLI = "from netlab.cli import main; main()"
# The plugins and Mininet take pods one after the other, and so long that fewer have to do.
_FEW = {"CNI bridge": 50, "Mininet": 50}
_COST_MS = {"CNI bridge": 55, "Mininet": 60, WHOLE: 6, IN_PROCESS: 3, "the kernel's floor": 2}


class Options(msgspec.Struct, frozen=True):
    """What to measure."""

    sizes: tuple[int, ...]  # numbers of pods
    rounds: int


def lifecycle(options: Options, recorder: Recorder, progress: Progress) -> None:
    """Measure; figures go into the recorder as they are found."""
    who: dict[str, Callable[[Path, str, int], Seconds]] = {WHOLE: _command, IN_PROCESS: _calls}
    for peer in peers.PEERS:
        if reason := peers.lacking(peer):
            recorder.skip(peer, reason)
        else:
            who[peer] = _peer(peer)
    for size in options.sizes:
        _size(size, who, options, recorder, progress)


def cost(options: Options) -> float:
    """Seconds, about."""
    return sum(_cost(who, size) for size in options.sizes for who in _COST_MS) * options.rounds


def _cost(who: str, size: int) -> float:
    return 0.3 + _COST_MS[who] * min(size, _FEW.get(who, size)) / 1000


def _size(
    size: int,
    who: dict[str, Callable[[Path, str, int], Seconds]],
    options: Options,
    recorder: Recorder,
    progress: Progress,
) -> None:
    taken: dict[str, list[Seconds]] = {name: [] for name in who}
    lab = clusters.name("pods")
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "lab.yaml"
        file.write_text(pods.topology(lab, size, NODES))
        try:
            for number in range(options.rounds):
                for name in turns(list(who), number):
                    what = f"{size} pods: {name}, round {number + 1} of {options.rounds}"
                    progress.step(what)
                    settle.wait()
                    count = min(size, _FEW.get(name, size))
                    found = who[name](file, lab, count)
                    taken[name].append(Seconds(found.up / count, found.down / count))
                    progress.step(what, _cost(name, size))
        finally:
            with contextlib.suppress(NetlabError):
                down(lab)
            for part in ("up", "down"):
                for name, found_all in taken.items():
                    rounds = [[getattr(each, part) * 1e3] for each in found_all]
                    if rounds:
                        what = f"a pod {part}, of {size}"
                        recorder.figures.append(figure(what, name, 0, rounds, "ms"))


def _command(file: Path, lab: str, count: int) -> Seconds:
    """As whole processes."""
    return Seconds(_timed(lambda: _netlab("up", str(file))), _timed(lambda: _netlab("down", lab)))


def _calls(file: Path, lab: str, count: int) -> Seconds:
    """From the loaded topology to ready."""
    made = load(file).lab
    return Seconds(_timed(lambda: up(made)), _timed(lambda: down(lab)))


def _peer(name: str) -> Callable[[Path, str, int], Seconds]:
    return lambda file, lab, count: peers.seconds(name, count)


def _netlab(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-c", _CLI, *arguments], capture_output=True)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()
        raise NetlabError(Problem("up-failed", f"netlab {arguments[0]}: {said}"), Exit.MACHINE)


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
