"""All witnesses of one trace together: armed, proved by canaries, read, disarmed.

What takes time without using the processor goes on beside the rest: scapy is imported while the
witnesses are armed, and sockets are closed, each of which waits for a grace period of the kernel,
while rules are looked up.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

from netlab.topology.model import Lab
from netlab.trace import canary, dissect
from netlab.trace.aim import Aim
from netlab.trace.canary import Blind
from netlab.trace.correlate import Observed
from netlab.trace.mark import Mark
from netlab.trace.model import Socket, Tuple, Witnesses
from netlab.trace.probe import Answer
from netlab.trace.witnesses import Witness
from netlab.trace.witnesses.conntrack import Connections, of_probe
from netlab.trace.witnesses.decisions import Decisions
from netlab.trace.witnesses.kernel import Kernel
from netlab.trace.witnesses.packets import Packets, Sighting, watched_words
from netlab.trace.witnesses.rule_text import RuleTexts
from netlab.trace.witnesses.rules import Rules

# Until the kernel stamps packets, which begins some milliseconds after it is asked to.
_FIRST_CANARIES = 50
_LAST_CANARY = 255


class Watch:
    """Witnesses on the way of a probe, from `with` to the end of its body."""

    def __init__(self, lab: Lab, aim: Aim, mark: Mark) -> None:
        self._aim = aim
        self._cookie = canary.new_cookie()
        self._family = mark.family
        self._packets = Packets(mark, lab.overlay.port, self._cookie)
        self._rules = Rules(mark, lab.overlay.port, self._cookie)
        self._connections = Connections(mark.family)
        self._kernel = Kernel(mark, lab.overlay.port, watched_words(mark, self._cookie))
        self.decisions = Decisions(mark.family)
        self._witnesses: list[Witness] = [
            self._packets,
            self._rules,
            self._connections,
            self._kernel,
            self.decisions,
        ]
        self._missed: dict[str, list[str]] = {}
        self._threads: list[threading.Thread] = []
        self._text_problems: list[str] = []
        self.blind: list[Blind] = []

    def __enter__(self) -> Watch:
        self._beside(dissect.load)
        try:
            for witness in self._witnesses:
                witness.arm(self._aim.places)
            for number in range(_FIRST_CANARIES):
                self.blind = self._fly(number)
                if self.blind or self._packets.stamping:
                    break
        except BaseException:
            self._disarm()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._disarm()

    @property
    def descriptors(self) -> list[int]:
        """Readable where an event waits that :meth:`dropped` may know more by."""
        return [*self._rules.descriptors, *self._kernel.descriptors]

    def dropped(self) -> bool:
        """Whether, for all that is known now, the probe or its answer was lost."""
        return self._rules.dropped() or self._kernel.dropped()

    def observed(self, answer: Answer) -> Observed:
        """Read all witnesses; called once, when the probe has had its answer or its time."""
        self.blind += self._fly(_LAST_CANARY)
        self._join()
        now = time.monotonic_ns()
        sent_to = Socket(ip=self._aim.destination, port=self._aim.port)
        sightings = _without_complaints(self._packets.events(sent_to), self._aim)
        runs = self._rules.events()
        moments = self._kernel.events(sightings)
        self._compare(now)
        self._beside(self._packets.disarm)
        self._beside(self._rules.disarm)
        self._beside(self._kernel.disarm)
        texts = RuleTexts(runs)
        self._text_problems = texts.failed
        seen = {(each.place, each.packet.flow) for each in sightings}
        seen |= {(run.place, run.flow) for run in runs}
        return Observed(
            sent=Tuple(
                source=answer.source,
                destination=Socket(ip=self._aim.destination, port=self._aim.port),
            ),
            sightings=sightings,
            runs=runs,
            entries=of_probe(
                self._connections.events(), self._family.number_of(self._aim.protocol), seen
            ),
            tables=self.decisions,
            texts=texts,
            moments=moments,
        )

    def reports(self) -> Witnesses:
        """What the witnesses say of themselves, at the end."""
        packets = self._packets.report
        if self._aim.unwatched:
            packets = f"partial: {self._aim.unwatched} more pods may receive it and are not watched"
        rules = self._rules.report
        kernel = self._kernel.report
        if packets == "ok" and "packets" in self._missed:
            packets = f"partial: {'; '.join(self._missed['packets'])}"
        if kernel == "ok" and "kernel" in self._missed:
            kernel = f"partial: {'; '.join(self._missed['kernel'])}"
        if rules == "ok" and self._text_problems:
            rules = f"partial: {'; '.join(self._text_problems)}"
        return Witnesses(
            packets=packets,
            rules=rules,
            conntrack=self._connections.report,
            kernel=kernel,
            decisions=self.decisions.report,
        )

    def _compare(self, until_ns: int) -> None:
        """Two witnesses see packets come in: who saw fewer missed some."""
        if self._packets.report != "ok" or self._kernel.report != "ok":
            return
        seen, told = self._packets.arrivals(), self._kernel.arrivals(until_ns)
        for who, other, missed in (
            ("packets", "kernel", told - seen),
            ("kernel", "packets", seen - told),
        ):
            for (place, device), count in missed.items():
                words = f"the {other} witness saw {count} more come in on {device} of {place}"
                self._missed.setdefault(who, []).append(words)

    def _fly(self, number: int) -> list[Blind]:
        return canary.fly(self._aim.places, self._witnesses, self._family, self._cookie, number)

    def _beside(self, work: Callable[[], object]) -> None:
        thread = threading.Thread(target=work)
        thread.start()
        self._threads.append(thread)

    def _join(self) -> None:
        while self._threads:
            self._threads.pop().join()

    def _disarm(self) -> None:
        self._join()
        for witness in self._witnesses:
            witness.disarm()


def _without_complaints(sightings: list[Sighting], aim: Aim) -> list[Sighting]:
    """Leave out the source's own errors, of an answer that no socket of its own waits for."""
    own = aim.source.addresses
    answered = {
        (each.packet.dst, each.packet.src)
        for each in sightings
        if each.role == "answer" and each.packet.dst in own
    }
    return [
        each
        for each in sightings
        if each.role != "error" or (each.packet.src, each.packet.dst) not in answered
    ]
