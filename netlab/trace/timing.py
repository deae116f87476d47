"""How long the kernel has a packet between the device of who sends it and that of who receives it.

Measured without the witnesses of a trace, for the rules' trace costs the packet time with each rule
that matches: only packet sockets at both ends, whose stamps are the kernel's.  Each probe is a new
connection, as only the first packet of one meets the rules of Services.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from types import TracebackType

from msgspec.structs import replace

from netlab.kernel import conntrack
from netlab.topology.model import Lab
from netlab.trace import canary, dissect, probe
from netlab.trace.aim import Aim
from netlab.trace.mark import Mark
from netlab.trace.model import Receiver
from netlab.trace.place import Place
from netlab.trace.witnesses.packets import Packets, Sighting, program, watched_words

_TIMEOUT_S = 0.5


class _NoNews:
    descriptors: Sequence[int] = ()

    def dropped(self) -> bool:
        return False


class Stopwatch:
    """Probes of one aim, timed from `with` to the end of its body."""

    def __init__(self, lab: Lab, aim: Aim, receiver: Receiver) -> None:
        # Each connection has a port of its own.
        self._aim = replace(aim, source_port=0)
        self._mark = Mark.random(aim.protocol, aim.family)
        self._cookie = canary.new_cookie()
        self._ends = _ends(aim, receiver)
        self._packets = Packets(
            self._mark, lab.overlay.port, program(watched_words(self._mark, self._cookie))
        )
        self._begun: list[int] = []

    def __enter__(self) -> Stopwatch:
        dissect.load()
        watched = list(dict.fromkeys((self._aim.source, *self._ends)))
        try:
            self._packets.arm(watched)
            canary.fly_until_stamped(
                watched,
                [self._packets],
                lambda: self._packets.stamping,
                self._aim.family,
                self._cookie,
            )
        except BaseException:
            self._packets.disarm()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._packets.disarm()

    def send(self) -> None:
        """Send one more probe and wait for its answer."""
        if self._aim.protocol == "icmp":
            self._forget()
        self._begun.append(time.clock_gettime_ns(time.CLOCK_REALTIME))
        probe.send(self._aim, self._mark, _TIMEOUT_S, _NoNews())

    def _forget(self) -> None:
        """Echo requests of one process are one connection to the kernel, which is to be new."""
        for place in self._aim.places:
            if place.kind == "node":
                conntrack.delete(place.namespace, conntrack.dump(place.namespace))

    def samples_ns(self) -> list[int]:
        """The time of each probe so far that reached the receiver, or another on its node.

        None of them if the kernel does not stamp.
        """
        if not self._packets.stamping:
            return []
        seen = [each for each in self._packets.events() if each.role == "probe"]
        bounds = zip(self._begun, [*self._begun[1:], time.time_ns()], strict=True)
        found = []
        for begin, end in bounds:
            with contextlib.suppress(ValueError):  # it went elsewhere
                found.append(self._sample([each for each in seen if begin <= each.t_ns < end]))
        return found

    def _sample(self, seen: Sequence[Sighting]) -> int:
        first = min(
            each.t_ns for each in seen if each.place == self._aim.source and each.direction == "out"
        )
        last = max(
            each.t_ns
            for each in seen
            if each.place in self._ends and each.direction == "in" and not each.stranger
        )
        return last - first


def _ends(aim: Aim, receiver: Receiver) -> list[Place]:
    """Places to which the way is as long: the receiver, of a pod those on its node too."""
    return [
        place
        for place in aim.places
        if (place.kind, place.node) == (receiver.kind, receiver.node)
        and (place.kind == "pod" or place.name == receiver.name)
    ]
