"""What a trace costs: itself, each of its witnesses, and the traffic of others meanwhile."""

from __future__ import annotations

import contextlib
import socket
import struct
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec

from netlab.bench import clusters, pods
from netlab.bench.run import Progress, Recorder, turns
from netlab.bench.statistics import figure
from netlab.compare import twins
from netlab.kernel.namespaces import entered
from netlab.kernel.skb_events import pattern_of_word
from netlab.topology.load import load
from netlab.topology.model import Lab
from netlab.trace import canary
from netlab.trace.aim import Request, aim
from netlab.trace.family import IPV4
from netlab.trace.mark import Mark
from netlab.trace.place import Place
from netlab.trace.run import trace
from netlab.trace.series import traces
from netlab.trace.witnesses import Witness
from netlab.trace.witnesses.conntrack import Connections
from netlab.trace.witnesses.kernel import Kernel
from netlab.trace.witnesses.packets import Packets, watched_words, ways
from netlab.trace.witnesses.rules import Rules

TRACE = "a trace"
WITNESS = "a witness, armed and disarmed"
PING = "a ping of others"
NOTHING = "nothing armed"
_WARM_UP = 2
_SERIES = 10  # probes in each round
_PATIENCE = struct.pack("@qq", 2, 0)  # struct timeval


class Options(msgspec.Struct, frozen=True):
    """What to measure."""

    sizes: tuple[int, ...]  # numbers of pods
    rounds: int
    pings: int  # in each round


def tracing(options: Options, recorder: Recorder, progress: Progress) -> None:
    """Measure; figures go into the recorder as they are found."""
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "lab.yaml"
            file.write_text(pods.topology(clusters.name("trace"), size, nodes=2))
            lab = load(file).lab
        with twins.up(lab):
            _lab(lab, size, options, recorder, progress)


def cost(options: Options) -> float:
    """Seconds, about."""
    return sum(1 + options.rounds * (0.6 + options.pings * 1.2e-4) for _ in options.sizes)


def _lab(lab: Lab, size: int, options: Options, recorder: Recorder, progress: Progress) -> None:
    source = lab.pods[0]
    target = next(pod for pod in lab.pods if pod.node != source.node)
    request = Request(source.key, "svc/web", namespace="demo")
    rounds: dict[tuple[str, str, str], list[list[float]]] = {}

    def take(what: str, mode: str, unit: str, samples: Callable[[], list[float]]) -> None:
        rounds.setdefault((what, mode, unit), []).append(samples())

    for _ in range(_WARM_UP):
        trace(lab, request)
    places = aim(lab, Request(source.key, target.key, protocol="icmp")).places
    states = [(), _THREE, (*_THREE, "kernel"), *((name,) for name in (*_THREE, "kernel"))]
    with entered(places[0].namespace):
        pinger = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    try:
        with pinger:
            pinger.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _PATIENCE)
            pinger.connect((target.address, 0))
            round_trips(pinger, options.pings)
            for number in range(options.rounds):
                what = f"{size} pods: round {number + 1} of {options.rounds}"
                progress.step(what)
                take(TRACE, "", "ms", lambda: [_ms(lambda: trace(lab, request))])
                take("a probe of a series", "", "ms", lambda: [_series(lab, request)])
                for names in turns(states, number):
                    mode = ", ".join(names) or NOTHING
                    with ExitStack() as stack:
                        spent = _ms(lambda: _arm(stack, lab, names, places))  # noqa: B023
                        take(PING, mode, "us", lambda: _microseconds(pinger, options.pings))
                        spent += _ms(stack.close)
                    if len(names) == 1:
                        take(WITNESS, mode, "ms", lambda: [spent])  # noqa: B023
                progress.step(what, 0.6 + options.pings * 1.2e-4)
    finally:
        for (what, mode, unit), found in rounds.items():
            recorder.figures.append(figure(f"{what}, {size} pods", mode, 0, found, unit))


_THREE = ("packets", "rules", "conntrack")


def witnesses(lab: Lab, names: Sequence[str]) -> list[Witness]:
    """Some of them, for a mark that no packet bears."""
    mark, cookie, port = Mark.random("icmp", IPV4), canary.new_cookie(), lab.overlay.port
    words = watched_words(mark, cookie)
    made: dict[str, Callable[[], Witness]] = {
        "packets": lambda: Packets(mark, port, ways(words)),
        "rules": lambda: Rules(mark, port, cookie),
        "conntrack": lambda: Connections(IPV4),
        "kernel": lambda: Kernel(
            mark, port, [pattern_of_word(offset, word) for offset, word in words]
        ),
    }
    return [made[name]() for name in names]


def round_trips(pinger: socket.socket, count: int) -> list[float]:
    """Seconds of each of so many pings, one after the other."""
    found = []
    for number in range(count):
        packet = _echo_request(number & 0xFFFF)
        start = time.perf_counter()
        pinger.send(packet)
        pinger.recv(2048)
        found.append(time.perf_counter() - start)
    return found


def _arm(stack: ExitStack, lab: Lab, names: Sequence[str], places: Sequence[Place]) -> None:
    for witness in witnesses(lab, names):
        stack.callback(witness.disarm)
        witness.arm(places)


def _series(lab: Lab, request: Request) -> float:
    """Milliseconds for a probe of a series, the first one not counted."""
    with contextlib.closing(traces(lab, request, _SERIES + 1)) as series:
        next(series)
        return _ms(lambda: [next(series) for _ in range(_SERIES)]) / _SERIES


def _microseconds(pinger: socket.socket, count: int) -> list[float]:
    return [seconds * 1e6 for seconds in round_trips(pinger, count)]


def _ms(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def _echo_request(number: int) -> bytes:
    """56 bytes of data, as ping sends them; RFC 792, RFC 1071."""
    total = (8 << 8) + number
    total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!BBHHH", 8, 0, ~total & 0xFFFF, 0, number) + bytes(56)
