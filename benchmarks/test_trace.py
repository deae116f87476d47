"""What a trace costs in a process that already runs, and what the traffic of others meanwhile."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import socket
import statistics
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import labs, settle
from benchmarks.conftest import Figures, Times
from benchmarks.traffic import Traffic
from netlab.datapath.state import namespace_name
from netlab.kernel import nft
from netlab.kernel.namespaces import entered
from netlab.kernel.skb_events import pattern_of_word
from netlab.lab import lifecycle
from netlab.topology.load import load
from netlab.topology.model import Lab
from netlab.trace import canary
from netlab.trace.aim import Request, aim
from netlab.trace.family import IPV4
from netlab.trace.mark import Mark
from netlab.trace.model import Trace
from netlab.trace.run import trace
from netlab.trace.series import traces
from netlab.trace.witnesses import Witness
from netlab.trace.witnesses.conntrack import Connections
from netlab.trace.witnesses.kernel import Kernel
from netlab.trace.witnesses.packets import Packets, watched_words, ways
from netlab.trace.witnesses.rules import Rules

TRACES = 30
WARM_UP = 50
ROUNDS, PINGS = 20, 1000
UNDER_LOAD, OTHERS_A_SECOND, MOST_SECONDS = 500, 10_000, 600
# Among four endpoints one is seen less than twice by so many once in 100,000 times.
QUIET = 60


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    """Two nodes with two pods each."""
    file = tmp_path / "lab.yaml"
    file.write_text(labs.topology("bench", pods=4, nodes=2))
    made = load(file).lab
    lifecycle.up(made)
    yield made
    lifecycle.down(made.name)
    settle.wait()


def test_a_second_trace(benchmark: BenchmarkFixture, figures: Figures, lab: Lab) -> None:
    request = Request(lab.pods[0].key, "svc/web", namespace="demo")
    benchmark.pedantic(trace, args=(lab, request), rounds=TRACES, warmup_rounds=2)
    times = Times(list(benchmark.stats.stats.data))
    figures.limit("a further trace in one process", times.ms(), 60, "ms")


def test_probes_of_a_series(figures: Figures, lab: Lab) -> None:
    """In turns with single traces."""
    request = Request(lab.pods[0].key, "svc/web", namespace="demo")
    single, probe = Times(), Times()
    for _ in range(3):
        single.of(lambda: trace(lab, request))
        with contextlib.closing(traces(lab, request, TRACES)) as series:
            next(series)
            for _ in range(TRACES - 1):
                probe.of(lambda: next(series))
        for _ in range(TRACES // 3):
            single.of(lambda: trace(lab, request))
    figures.faster("a probe of a series, against a trace", probe.ms(), single.ms(), 2.5)


def test_a_thousand_traces_leave_nothing(figures: Figures, lab: Lab) -> None:
    """Half of them single ones, half of them in series."""
    request = Request(lab.pods[0].key, "svc/web", namespace="demo")
    gc.enable()  # as in a process that lives so long

    def some(count: int) -> None:
        for _ in range(count):
            assert trace(lab, request).delivered
        for each in traces(lab, request, count):
            assert each.delivered
        gc.collect()

    some(WARM_UP)
    before = _Held.now(lab)
    some(1000 // 2)
    after = _Held.now(lab)
    figures.limit("memory of 1,000 traces", after.memory_mib - before.memory_mib, 2, "MiB")
    for name, most in (("descriptors", 0), ("tables", 0), ("programs", 0), ("instances", 0)):
        more = len(getattr(after, name)) - len(getattr(before, name))
        figures.limit(f"{name} left by 1,000 traces", more, most, "")


class _Held(msgspec.Struct):
    """What this process has of the kernel, and its resident memory."""

    memory_mib: float
    descriptors: list[str]
    tables: list[str]
    programs: list[str]  # of BPF
    instances: list[str]  # of tracefs

    @classmethod
    def now(cls, lab: Lab) -> _Held:
        status = Path("/proc/self/status").read_text()
        (resident,) = re.findall(r"^VmRSS:\s+(\d+) kB", status, re.MULTILINE)
        instances = Path("/sys/kernel/tracing/instances")
        return cls(
            memory_mib=int(resident) / 1024,
            descriptors=os.listdir("/proc/self/fd"),
            tables=[
                table
                for node in lab.nodes
                for table in nft.names(namespace_name(lab.name, node.name))
            ],
            programs=_programs(),
            instances=os.listdir(instances) if instances.is_dir() else [],
        )


def _programs() -> list[str]:
    """Numbers of the BPF programs that descriptors of this process keep at work."""
    found = []
    for entry in os.listdir("/proc/self/fdinfo"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing
            text = Path(f"/proc/self/fdinfo/{entry}").read_text()
            found += re.findall(r"^prog_id:\s*(\d+)", text, re.MULTILINE)
    return found


def test_pings_of_others(figures: Figures, lab: Lab) -> None:
    """Pings over VXLAN in turns: nothing armed, three witnesses armed, the kernel witness too."""
    source, target = lab.pods[0], next(pod for pod in lab.pods if pod.node != lab.pods[0].node)
    places = aim(lab, Request(source.key, target.key, protocol="icmp")).places
    found: dict[str, list[float]] = {"none": [], "three": [], "four": [], "after": []}
    with entered(places[0].namespace):
        pinger = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    with pinger:
        assert target.address
        pinger.connect((target.address, 0))
        _round_trips(pinger)
        for _ in range(ROUNDS):
            found["none"] += _round_trips(pinger)
            for name, with_kernel in (("three", False), ("four", True)):
                with ExitStack() as stack:
                    for witness in _witnesses(lab, with_kernel):
                        stack.callback(witness.disarm)
                        witness.arm(places)
                        assert not witness.report.startswith("unavailable")
                    found[name] += _round_trips(pinger)
            found["after"] += _round_trips(pinger)
    trips = {name: statistics.fmean(_typical(each)) * 1e6 for name, each in found.items()}
    for name, words, most in (
        ("three", "packets, rules and conntrack", 1.15),
        ("four", "the kernel witness too", 1.5),
        ("after", "nothing any more", 1.05),
    ):
        what = f"a ping of others, armed: {words}"
        figures.ratio(what, trips[name], trips["none"], most, "us")


def test_traces_under_load(figures: Figures, lab: Lab) -> None:
    """Each trace is what it is on idle nodes while others send through the same ones."""
    client = lab.pods[0]
    request = Request(client.key, "svc/web", namespace="demo")
    others = [pod for pod in lab.pods if pod != client]
    there = next(pod for pod in others if pod.node != client.node)
    here = next(pod for pod in others if pod.node == client.node)
    quiet: dict[str, _Shape] = {}
    for _ in range(QUIET):
        shape = _shape(trace(lab, request))
        quiet[shape.endpoint] = shape  # bridges know all of them by then
    assert len(quiet) == len(lab.pods)
    wrong: list[dict[str, object]] = []
    names = [place.namespace for place in aim(lab, Request(here.key, there.key)).places]
    with Traffic(names[0], names[-1], there.address, OTHERS_A_SECOND, MOST_SECONDS) as traffic:
        for _ in range(UNDER_LOAD):
            shape = _shape(trace(lab, request))
            usual = quiet.get(shape.endpoint)
            if shape != usual:
                told = shape._asdict().items()
                wrong.append({key: each for key, each in told if each != getattr(usual, key, None)})
    what = f"traces that are wrong or incomplete, of {UNDER_LOAD} under load"
    figures.limit(what, len(wrong), 0, "")
    figures.note("packets of others meanwhile", f"{traffic.rate:.0f} a second")
    assert not wrong, wrong


class _Shape(NamedTuple):
    """What is the same for each trace to one endpoint."""

    endpoint: str
    disposition: str
    witnesses: tuple[str | None, ...]
    translations: tuple[tuple[str, str | None], ...]
    hops: tuple[tuple[str, str, str], ...]


def _shape(found: Trace) -> _Shape:
    seen = found.witnesses
    return _Shape(
        str(found.delivered_to),
        found.disposition,
        (seen.packets, seen.rules, seen.conntrack, seen.kernel, seen.decisions),
        tuple((step.kind, step.node) for step in found.translations),
        tuple(
            (hop.namespace, hop.device, hop.direction)
            for hop in (*found.forward, *found.reply)
            # Whether what stays on its node is routed or passed on by the bridge is a question of
            # how long ago the neighbour was heard of (br_nf_pre_routing_finish_bridge).
            if (hop.device, hop.direction) != ("cbr0", "out")
        ),
    )


def _witnesses(lab: Lab, with_kernel: bool) -> Sequence[Witness]:
    mark, cookie, port = Mark.random("icmp", IPV4), canary.new_cookie(), lab.overlay.port
    words = watched_words(mark, cookie)
    found: list[Witness] = [
        Packets(mark, port, ways(words)),
        Rules(mark, port, cookie),
        Connections(IPV4),
    ]
    if not with_kernel:
        return found
    return [*found, Kernel(mark, port, [pattern_of_word(offset, word) for offset, word in words])]


def _round_trips(pinger: socket.socket) -> list[float]:
    """Seconds of each of `PINGS` pings."""
    found = []
    for number in range(PINGS):
        packet = _echo_request(number)
        start = time.perf_counter()
        pinger.send(packet)
        pinger.recv(2048)
        found.append(time.perf_counter() - start)
    return found


def _typical(seconds: list[float]) -> list[float]:
    """Without the hundredth that took longest, where something else had the processor."""
    return sorted(seconds)[: -len(seconds) // 100]


def _echo_request(number: int) -> bytes:
    """56 bytes of data, as ping sends them; RFC 792, RFC 1071."""
    body = bytes(56)
    total = (8 << 8) + number
    return struct.pack("!BBHHH", 8, 0, ~total & 0xFFFF, 0, number) + body
