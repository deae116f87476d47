"""What service rules cost the first packet of a connection, and those of an established one.

Each mode has a lab of its own for each number of Services, all up at once, and each takes its turn
in each round: what else the machine does slows all alike.  Beside them are two labs without a
service proxy: the same way without Services, twice, so that what two labs differ by is known too.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

import msgspec

from netlab.bench import clusters
from netlab.bench.packets import Established, FirstPackets, Sample
from netlab.bench.proxied_packets import ProxiedEstablished, ProxiedFirstPackets
from netlab.bench.run import Progress, Recorder, on_one_processor
from netlab.bench.stage import NO_PROXY, Stage, staged
from netlab.bench.statistics import figure, fit
from netlab.compare.model import Variant
from netlab.datapath.state import Rules, Ruleset
from netlab.problems import NetlabError

FIRST = "first packet"
FIRST_AGAIN = "first packet, in a second lab"
PAST = "first packet, past the Services"
ESTABLISHED = "established packet"
BY_POSITION = "first packet, by position"

_CONNECTIONS = 12  # that are established in each lab
_WARM_UP = 0.1  # of a round
_OF_A_PROXY = 10  # connections of others for one that a proxy takes, which is a millisecond
_BINS = 10
_LISTED = re.compile(r"^-A KUBE-SERVICES .*?-d ([0-9.]+)/32", re.MULTILINE)


class Options(msgspec.Struct, frozen=True):
    """What to measure."""

    sizes: tuple[int, ...]
    modes: tuple[Variant, ...]
    endpoints: int  # of each Service
    connections: int  # new ones at each point
    rounds: int
    overlay: str
    force: bool
    seed: int

    @property
    def of_round(self) -> int:
        return max(1, self.connections // self.rounds)


class _Turn:
    """One thing that takes turns with others: what it sends, and its samples by round."""

    def __init__(
        self, what: str, variant: Variant, services: int, send: Callable[[int], list[Sample]]
    ) -> None:
        self.what, self.variant, self.services, self._send = what, variant, services, send
        self.rounds: list[list[Sample]] = []

    def warm_up(self, count: int) -> None:
        self._send(count)

    def take(self, count: int) -> None:
        self.rounds.append(self._send(count))


def lookup(options: Options, recorder: Recorder, progress: Progress) -> None:
    """Measure; figures and fits go into the recorder as they are found."""
    chance = random.Random(options.seed)
    with ExitStack() as stack:
        stages = _stages(stack, options, recorder, progress)
        again = stack.enter_context(staged(NO_PROXY, 0, 0, options.overlay))
        with on_one_processor():
            try:
                with ExitStack() as lanes:
                    firsts = _first_packets(lanes, stages, again, options, chance)
                    _take(FIRST, firsts, stages, options, recorder, progress, chance)
                for each in firsts:
                    if each.what == FIRST:
                        _fit_position(each, stages, recorder)
                with ExitStack() as lanes:
                    established = _established(lanes, stages, options, chance)
                    _take(ESTABLISHED, established, stages, options, recorder, progress, chance)
            finally:
                _fit(options, recorder)


def cost(options: Options) -> float:
    """Seconds, about, on the machine that the weights were found on."""
    return sum(
        _staging(services, variant) + 1.2 * _sending(services, variant, options)
        for services in options.sizes
        for variant in options.modes
    )


Stages = dict[tuple[Variant, int], Stage]


def _stages(stack: ExitStack, options: Options, recorder: Recorder, progress: Progress) -> Stages:
    """A lab for each mode and number of Services, and one without either."""
    made = {
        (NO_PROXY, 0): stack.enter_context(staged(NO_PROXY, 0, 0, options.overlay)),
    }
    for variant in options.modes:
        for services in options.sizes:
            progress.step(f"rules of {variant} for {services:,} Services")
            if recorder.leaves_out(variant, services, options.force):
                continue
            try:
                stage = staged(variant, services, options.endpoints, options.overlay)
                made[variant, services] = stack.enter_context(stage)
            except NetlabError as error:
                recorder.skip(str(variant), error)
                break
            finally:
                progress.step("rules", _staging(services, variant))
    return made


def _first_packets(
    stack: ExitStack, stages: Stages, again: Stage, options: Options, chance: random.Random
) -> list[_Turn]:
    most = options.sizes[-1]

    def straight(lane: FirstPackets, count: int) -> list[Sample]:
        """To endpoints, without a Service between."""
        chosen = [chance.randrange(most) for _ in range(count)]
        ports = [clusters.endpoint_ports(one, options.endpoints) for one in chosen]
        targets = [(clusters.SERVER_ADDRESS, chance.choice(each)) for each in ports]
        return lane.send(chosen, targets)

    def through(lane: FirstPackets, services: int, count: int) -> list[Sample]:
        chosen = [chance.randrange(services) for _ in range(count)]
        targets = [(clusters.cluster_ip(one), clusters.PORT) for one in chosen]
        if isinstance(lane, ProxiedFirstPackets):
            few = max(1, count // _OF_A_PROXY)
            return lane.send_through(chosen[:few], targets[:few])
        return lane.send(chosen, targets)

    found = []
    for (variant, services), stage in stages.items():
        by_proxy = variant.mode == "userspace"
        lane = stack.enter_context((ProxiedFirstPackets if by_proxy else FirstPackets)(stage))
        past = partial(straight, lane)
        if variant == NO_PROXY:
            found.append(_Turn(FIRST, variant, 0, past))
        else:
            found.append(_Turn(FIRST, variant, services, partial(through, lane, services)))
            found.append(_Turn(PAST, variant, services, past))
    lane = stack.enter_context(FirstPackets(again))
    found.append(_Turn(FIRST_AGAIN, NO_PROXY, 0, partial(straight, lane)))
    return found


def _established(
    stack: ExitStack, stages: Stages, options: Options, chance: random.Random
) -> list[_Turn]:
    found = []
    for (variant, services), stage in stages.items():
        chosen = [chance.randrange(services or options.sizes[0]) for _ in range(_CONNECTIONS)]
        ports = {port for one in chosen for port in clusters.endpoint_ports(one, options.endpoints)}
        if variant == NO_PROXY:
            first = [clusters.endpoint_ports(one, options.endpoints)[0] for one in chosen]
            targets = [(clusters.SERVER_ADDRESS, port) for port in first]
        else:
            targets = [(clusters.cluster_ip(one), clusters.PORT) for one in chosen]
        kind = ProxiedEstablished if variant.mode == "userspace" else Established
        lane = stack.enter_context(kind(stage, chosen, targets, sorted(ports)))
        found.append(_Turn(ESTABLISHED, variant, services, lane.send))
    return found


def _take(
    what: str,
    lanes: list[_Turn],
    stages: Stages,
    options: Options,
    recorder: Recorder,
    progress: Progress,
    chance: random.Random,
) -> None:
    """Rounds; what they gave is recorded also if they are interrupted."""
    share = 1.0 if what == FIRST else 0.2
    each_costs = share * sum(
        _sending(services, variant, options) / options.rounds for variant, services in stages
    )
    try:
        for lane in lanes:
            lane.warm_up(max(1, int(_WARM_UP * options.of_round)))
        for number in range(options.rounds):
            progress.step(f"{what}, round {number + 1} of {options.rounds}")
            for lane in chance.sample(lanes, len(lanes)):
                lane.take(options.of_round)
            progress.step(what, each_costs)
    finally:
        whole = min(len(lane.rounds) for lane in lanes)
        if whole:
            for lane in lanes:
                samples = [[one.ns / 1000 for one in each] for each in lane.rounds[:whole]]
                recorder.figures.append(
                    figure(lane.what, str(lane.variant), lane.services, samples)
                )


def listed(rules: Rules | None) -> list[str]:
    """Cluster addresses in the order of kube-proxy's list in mode iptables; else none."""
    return _LISTED.findall(rules.ipv4) if isinstance(rules, Ruleset) else []


def _fit_position(lane: _Turn, stages: Stages, recorder: Recorder) -> None:
    """The time over the position in the list: medians of tenths of it."""
    there = listed(stages[lane.variant, lane.services].rules)
    place = {address: number for number, address in enumerate(there, start=1)}
    bins: list[list[tuple[int, float]]] = [[] for _ in range(_BINS)]
    for each in lane.rounds if there else []:
        for sample in each:
            at = place[clusters.cluster_ip(sample.service)]
            bins[(at - 1) * _BINS // len(there)].append((at, sample.ns / 1000))
    points = [
        (_middle([at for at, _ in each]), _middle([us for _, us in each])) for each in bins if each
    ]
    what = f"{BY_POSITION}, {lane.services} Services"
    found = fit(what, str(lane.variant), "position in the list", points)
    if found:
        recorder.fits.append(found)


def _middle(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def _fit(options: Options, recorder: Recorder) -> None:
    for what in (FIRST, PAST):
        for variant in options.modes:
            points = [
                (each.services, each.value)
                for each in recorder.figures
                if each.what == what and each.mode == str(variant)
            ]
            found = fit(what, str(variant), "Services", points)
            if found:
                recorder.fits.append(found)


# Milliseconds to load a Service, and nanoseconds that one costs a packet; measured once.
_LOAD_MS = {"legacy": 0.15, "nft": 0.3}
_LIST_NS = {"legacy": 15.0, "nft": 40.0}


def _staging(services: int, variant: Variant) -> float:
    if variant == NO_PROXY:
        return 0.3
    if variant.mode == "nftables":
        return 0.2 + services * 1e-4 + (services / 1000) ** 2 * 0.05
    return 0.2 + services * _LOAD_MS.get(variant.backend or "", 0.1) / 1000


def _sending(services: int, variant: Variant, options: Options) -> float:
    listing = _LIST_NS.get(variant.backend or "", 0.0) * services * 1.5
    return options.connections * (150e-6 + 1.5 * listing * 1e-9)
