"""What it takes to bring the rules of many Services into the kernel, and to change a few of them.

Each mode has a process that stays (`sync_process`), in a node of a lab of its own; they take turns.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack

import msgspec

from netlab.bench.run import Progress, Recorder, turns
from netlab.bench.stage import NO_PROXY, staged
from netlab.bench.statistics import figure
from netlab.bench.sync_process import Done
from netlab.compare.model import Variant
from netlab.datapath.services.modes import MODES
from netlab.lab.change import no_such_mode
from netlab.problems import Exit, NetlabError, Problem

LOAD = "full load"
CHANGES = {
    "replace": "one endpoint replaced",
    "add": "one Service added",
    "remove": "one Service removed",
    "many": "100 Services changed at once",
}
# What is told of each, its unit, and where it stands.
_OF_ALL: tuple[tuple[str, str, Callable[[Done], float | None]], ...] = (
    ("time", "ms", lambda done: done.seconds * 1000),
    ("CPU", "ms", lambda done: done.cpu_s * 1000),
    ("operations", "lines", lambda done: done.operations),
)
_OF_LOAD: tuple[tuple[str, str, Callable[[Done], float | None]], ...] = (
    *_OF_ALL,
    ("kernel memory", "MiB", lambda done: _mib(done.kernel_kib)),
    ("peak memory of the loader", "MiB", lambda done: _mib(done.peak_kib)),
)
_OF_CHANGE: tuple[tuple[str, str, Callable[[Done], float | None]], ...] = (
    *_OF_ALL,
    ("memory of the process that stays", "MiB", lambda done: _mib(done.resident_kib)),
)


class Options(msgspec.Struct, frozen=True):
    """What to measure."""

    sizes: tuple[int, ...]
    modes: tuple[Variant, ...]
    endpoints: int
    loads: int  # rounds of full loads
    rounds: int  # of changes
    force: bool


class _Child:
    """The process of one mode."""

    def __init__(self, stack: ExitStack, variant: Variant, services: int, endpoints: int) -> None:
        self.mode = str(variant)
        if variant.mode not in MODES:
            raise no_such_mode(variant.mode)
        if MODES[variant.mode].proxier is None:
            message = f'mode "{variant}" has its rules loaded whole at each change'
            raise NetlabError(Problem("unsupported", message))
        stage = stack.enter_context(staged(NO_PROXY, 0, 0, "vxlan"))
        command = [sys.executable, "-m", "netlab.bench.sync_process"]
        command += [stage.client_node, self.mode, str(services), str(endpoints)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        stack.callback(self._end)
        assert self._process.stdout
        self._process.stdout.readline()
        self.rounds: dict[str, list[Done]] = {}

    def take(self, job: str, counts: bool = True) -> None:
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.write(f"{job}\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            message = f"{self.mode}: its process ended with status {self._process.wait()}"
            raise NetlabError(Problem("sync-failed", message), Exit.MACHINE)
        done = msgspec.json.decode(line, type=Done)
        if done.problem:
            raise NetlabError(Problem("sync-failed", done.problem), Exit.MACHINE)
        if counts:
            self.rounds.setdefault(job, []).append(done)

    def _end(self) -> None:
        self._process.kill()
        self._process.communicate()


def sync(options: Options, recorder: Recorder, progress: Progress) -> None:
    """Measure; figures go into the recorder as they are found."""
    lacking: set[Variant] = set()
    for services in options.sizes:
        with ExitStack() as stack:
            children: list[_Child] = []
            for variant in options.modes:
                if variant in lacking or recorder.leaves_out(variant, services, options.force):
                    continue
                try:
                    child = _Child(stack, variant, services, options.endpoints)
                    child.take("load", counts=False)  # so that it can
                    children.append(child)
                except NetlabError as error:
                    lacking.add(variant)
                    recorder.skip(str(variant), error)
            if children:
                _measure(children, services, options, recorder, progress)


def cost(options: Options) -> float:
    """Seconds, about."""
    return sum(
        _cost(services, str(variant), options)
        for services in options.sizes
        for variant in options.modes
    )


def _cost(services: int, mode: str, options: Options) -> float:
    load = {"iptables:legacy": 0.15e-3, "nftables-flat": 0.05e-3}.get(mode, 0.25e-3) * services
    if mode == "nftables":
        load += (services / 1000) ** 2 * 0.05
    change = 0.03e-3 * services if mode.startswith("iptables:legacy") else 0.01e-3 * services
    return load * (options.loads + 1) + change * options.rounds * 6 + 0.5


def _measure(
    children: list[_Child],
    services: int,
    options: Options,
    recorder: Recorder,
    progress: Progress,
) -> None:
    whole = sum(_cost(services, child.mode, options) for child in children)
    steps = options.loads + options.rounds
    try:
        for number in range(options.loads):
            what = f"{services:,} Services: {LOAD}, round {number + 1} of {options.loads}"
            for child in turns(children, number):
                progress.step(f"{what}, {child.mode}")
                child.take("load")
            progress.step(what, whole / steps)
        for job in CHANGES:
            for child in children:
                child.take(job, counts=False)
        for number in range(options.rounds):
            what = f"{services:,} Services: changes, round {number + 1} of {options.rounds}"
            progress.step(what)
            for job in CHANGES:
                for child in turns(children, number):
                    child.take(job)
            progress.step(what, whole / steps)
    finally:
        for child in children:
            _record(child, services, recorder)


def _record(child: _Child, services: int, recorder: Recorder) -> None:
    for job, dones in child.rounds.items():
        name = LOAD if job == "load" else CHANGES[job]
        for part, unit, value in _OF_LOAD if job == "load" else _OF_CHANGE:
            rounds = [[found] for done in dones if (found := value(done)) is not None]
            if rounds:
                recorder.figures.append(
                    figure(f"{name}: {part}", child.mode, services, rounds, unit)
                )


def _mib(kib: int | None) -> float | None:
    return None if kib is None else kib / 1024
