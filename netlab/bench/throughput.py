"""What passes through a Service: new connections, small packets, bulk data, and the CPU they take.

Modes take turns, each with a lab of its own.  Connections and small packets are made by a loop of
Python on one processor, the same for each mode: compare modes, not absolute rates.  Each Service
has one endpoint, for iperf3 opens several connections that must meet at one place.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack

import msgspec

from netlab.bench import clusters
from netlab.bench.run import Progress, Recorder, on_one_processor, turns
from netlab.bench.stage import NO_PROXY, Stage, staged
from netlab.bench.statistics import figure
from netlab.compare.model import Variant
from netlab.kernel import conntrack
from netlab.kernel.namespaces import entered
from netlab.kernel.syscalls import die_with_parent
from netlab.problems import Exit, NetlabError, Problem

CONNECTIONS = "new connections"
PACKETS = "small packets of a connection"
BULK = "TCP bulk"
_CPU = "CPU of each"
_ENDPOINTS = 1
_SERVICES = 50  # that connections are made to, in turns
_RST_ON_CLOSE = struct.pack("ii", 1, 0)  # struct linger
_BACKLOG = 4096
_BURST = 64
_PATIENCE_S = 5.0
_SEGMENT = 1398  # bytes of data in a packet over VXLAN with time stamps


class Options(msgspec.Struct, frozen=True):
    """What to measure."""

    sizes: tuple[int, ...]
    modes: tuple[Variant, ...]
    overlays: tuple[str, ...]
    rounds: int
    seconds: float  # of each round
    force: bool
    seed: int


class _Way:
    """From the client's pod to some Services, chosen at random, or straight to their endpoints."""

    def __init__(self, stage: Stage, mode: str, services: int, chance: random.Random) -> None:
        self.mode = mode
        self._stage = stage
        chosen = chance.sample(range(services), min(_SERVICES, services))
        self._ports = [clusters.endpoint_ports(service, _ENDPOINTS)[0] for service in chosen]
        if mode == str(NO_PROXY):
            self._targets = [(clusters.SERVER_ADDRESS, port) for port in self._ports]
        else:
            self._targets = [(clusters.cluster_ip(each), clusters.PORT) for each in chosen]
        self.rounds: dict[tuple[str, str, bool], list[list[float]]] = {}

    def connections(self, seconds: float) -> None:
        """Connect and reset, one after the other, to each Service in turn."""
        conntrack.flush(self._stage.client_node)
        with ExitStack() as stack:
            with entered(self._stage.server):
                listeners = [stack.enter_context(self._listener(port)) for port in self._ports]
            for listener in listeners:
                listener.settimeout(_PATIENCE_S)
            stack.enter_context(entered(self._stage.client))
            ways = itertools.cycle(zip(self._targets, listeners, strict=True))

            def some() -> int:
                for target, listener in itertools.islice(ways, _BURST):
                    with socket.socket() as client:
                        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST_ON_CLOSE)
                        client.settimeout(_PATIENCE_S)
                        client.connect(target)
                        listener.accept()[0].close()
                return _BURST

            self._rate(CONNECTIONS, some, seconds)

    def packets(self, seconds: float) -> None:
        """64 bytes each, on one connection, read at the other end now and then."""
        with ExitStack() as stack:
            with entered(self._stage.server):
                listener = stack.enter_context(self._listener(self._ports[0]))
            with entered(self._stage.client):
                client = stack.enter_context(socket.socket())
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                client.settimeout(_PATIENCE_S)
                client.connect(self._targets[0])
            server = stack.enter_context(listener.accept()[0])
            data = bytes(64)

            def some() -> int:
                for _ in range(_BURST):
                    client.send(data)
                left = _BURST * len(data)
                while left:
                    left -= len(server.recv(left))
                return _BURST

            self._rate(PACKETS, some, seconds)

    def bulk(self, program: str, seconds: float) -> None:
        """One stream of iperf3; CPU is that of both ends and all between, for each packet."""
        with entered(self._stage.server):
            server = subprocess.Popen(
                [program, "-s", "-1", "-p", str(self._ports[0]), "--forceflush"],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                preexec_fn=lambda: die_with_parent(signal.SIGKILL),
            )
        try:
            assert server.stdout
            while b"listening" not in server.stdout.readline():
                if server.poll() is not None:
                    raise _failed(f"its server ended with status {server.returncode}")
            address, port = self._targets[0]
            command = [program, "-c", address, "-p", str(port), "-J", "-t", f"{seconds:g}"]
            with entered(self._stage.client):
                done = subprocess.run(command, capture_output=True, timeout=seconds + 30)
            found = json.loads(done.stdout or b"{}")
            if "error" in found or not found:
                raise _failed(str(found.get("error", f"status {done.returncode}")))
            end = found["end"]
            received = end["sum_received"]
            self._note(BULK, "Gbit/s", True, [received["bits_per_second"] / 1e9])
            used = end["cpu_utilization_percent"]
            cpu_s = (used["host_total"] + used["remote_total"]) / 100 * received["seconds"]
            packets = max(1, received["bytes"] // _SEGMENT)
            self._note(f"{BULK}: {_CPU} packet", "us", False, [cpu_s / packets * 1e6])
        finally:
            server.kill()
            server.communicate()

    def _listener(self, port: int) -> socket.socket:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((clusters.SERVER_ADDRESS, port))
        listener.listen(_BACKLOG)
        return listener

    def _rate(self, what: str, some: Callable[[], int], seconds: float) -> None:
        """Run for so long; the rate and the processor time of each."""
        some()
        count, spent, start, cpu = 0, 0.0, time.perf_counter(), time.thread_time()
        while spent < seconds or not count:
            count += some()
            spent = time.perf_counter() - start
        used = time.thread_time() - cpu
        self._note(what, "a second", True, [count / spent])
        self._note(f"{what}: {_CPU}", "us", False, [used / count * 1e6])

    def _note(self, what: str, unit: str, more: bool, values: list[float]) -> None:
        self.rounds.setdefault((what, unit, more), []).append(values)


def throughput(options: Options, recorder: Recorder, progress: Progress) -> None:
    """Measure; figures go into the recorder as they are found."""
    chance = random.Random(options.seed)
    program = shutil.which("iperf3")
    if program is None:
        recorder.skip(
            BULK, "iperf3 is not installed: `apt-get install iperf3` on Debian and Ubuntu"
        )
    lacking: set[Variant] = set()
    for overlay in options.overlays:
        for services in options.sizes:
            with ExitStack() as stack:
                ways = _ways(stack, overlay, services, options, recorder, chance, lacking)
                try:
                    for number in range(options.rounds):
                        for way in turns(ways, number):
                            what = f"{services:,} Services over {overlay}: {way.mode}"
                            progress.step(f"{what}, round {number + 1} of {options.rounds}")
                            with on_one_processor():
                                way.connections(options.seconds)
                                way.packets(options.seconds)
                            if program:
                                way.bulk(program, max(1, round(options.seconds)))
                            progress.step(what, 3 * options.seconds)
                finally:
                    _record(ways, overlay, services, recorder)


def cost(options: Options) -> float:
    """Seconds, about."""
    points = len(options.overlays) * len(options.sizes) * (len(options.modes) + 1)
    return points * options.rounds * 3 * options.seconds


def _ways(
    stack: ExitStack,
    overlay: str,
    services: int,
    options: Options,
    recorder: Recorder,
    chance: random.Random,
    lacking: set[Variant],
) -> list[_Way]:
    ways = []
    for variant in (NO_PROXY, *options.modes):
        if variant in lacking or recorder.leaves_out(variant, services, options.force):
            continue
        try:
            stage = stack.enter_context(staged(variant, services, _ENDPOINTS, overlay))
        except NetlabError as error:
            if variant == NO_PROXY:
                raise
            lacking.add(variant)
            recorder.skip(str(variant), error)
            continue
        ways.append(_Way(stage, str(variant), services, chance))
    return ways


def _record(ways: list[_Way], overlay: str, services: int, recorder: Recorder) -> None:
    for way in ways:
        for (what, unit, more), rounds in way.rounds.items():
            recorder.figures.append(
                figure(
                    f"{what} over {overlay}",
                    way.mode,
                    services,
                    rounds,
                    unit,
                    "more" if more else "less",
                )
            )


def _failed(said: str) -> NetlabError:
    return NetlabError(Problem("iperf3", f"iperf3: {said}"), Exit.UNOBSERVED)
