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

from netlab.kernel.frame_events import LONGEST
from netlab.kernel.skb_events import pattern_of_word
from netlab.topology.model import Lab
from netlab.trace import canary, dissect
from netlab.trace.aim import Aim
from netlab.trace.canary import Blind
from netlab.trace.correlate import Observed
from netlab.trace.mark import Mark
from netlab.trace.model import Witnesses
from netlab.trace.model_steps import Socket, Tuple
from netlab.trace.probe import Answer
from netlab.trace.witnesses import Witness, together
from netlab.trace.witnesses.conntrack import Connections, of_probe
from netlab.trace.witnesses.decisions import Decisions
from netlab.trace.witnesses.fragments import later_pieces
from netlab.trace.witnesses.kernel import Kernel
from netlab.trace.witnesses.legacy_rules import LegacyRules
from netlab.trace.witnesses.packets import (
    Packets,
    Sighting,
    carried_words,
    program,
    watched_words,
    ways,
)
from netlab.trace.witnesses.rule_text import RuleTexts
from netlab.trace.witnesses.rules import Rules
from netlab.trace.witnesses.virtual_servers import balanced

# The kernel tells of a frame before the sockets get it; meanwhile the processor may be taken away.
_LATE_S = 0.02

# Ethernet's, and a tunnel's over IPv6.
_HEADERS = 14 + 40 + 8 + 8 + 14


class Watch:
    """Witnesses on the way of a probe, from `with` to the end of its body."""

    def __init__(self, lab: Lab, aim: Aim, mark: Mark) -> None:
        self._aim = aim
        self._is_balancing = lab.service_proxy.mode == "ipvs"
        self._cookie = canary.new_cookie()
        self._family = mark.family
        words = watched_words(mark, self._cookie)
        is_ipip = lab.overlay.type == "ipip"
        if is_ipip:
            words = carried_words(words)
        wanted = words, later_pieces(mark.family) if mark.fragmented else ()
        # (An IP in IP device has frames without a header of Ethernet.)
        whole = (aim.size or 0) + _HEADERS <= LONGEST and not is_ipip
        self._packets = Packets(
            mark, lab.overlay.port, ways(*wanted) if whole else program(*wanted)
        )
        self._rules = Rules(mark, lab.overlay.port, self._cookie, is_ipip)
        self._legacy_rules = LegacyRules(lab.name, mark, lab.overlay.port, self._cookie)
        self._connections = Connections(mark.family)
        patterns = [pattern_of_word(offset, word) for offset, word in words]
        self._kernel = Kernel(mark, lab.overlay.port, patterns)
        self.decisions = Decisions(mark.family)
        self._witnesses: list[Witness] = [
            self._packets,
            self._rules,
            self._legacy_rules,
            self._connections,
            self._kernel,
            self.decisions,
        ]
        self._missed: dict[str, list[str]] = {}
        self._threads: list[threading.Thread] = []
        self._texts: RuleTexts | None = None
        self.blind: list[Blind] = []
        # The frames of the sightings that `observed` told, whole and in the same order.
        self.frames: list[bytes] = []

    def __enter__(self) -> Watch:
        self._beside(dissect.load)
        try:
            for witness in self._witnesses:
                witness.arm(self._aim.places)
            self.blind = canary.fly_until_stamped(
                self._aim.places,
                self._witnesses,
                lambda: self._packets.stamping,
                self._family,
                self._cookie,
            )
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

    def translated(self, source: Socket) -> Socket | None:
        """Where a node has turned the probe from `source` to; None if none is known to have."""
        sent = Socket(ip=self._aim.destination, port=self._aim.port)
        for entry in self._connections.events():
            turned = entry.reply.source
            if entry.original == Tuple(source=source, destination=sent) and turned != sent:
                return turned
        return None

    def renew(self) -> None:
        """Forget the probe that was observed: the next one has the same mark."""
        for witness in self._witnesses:
            witness.forget()
        self._missed.clear()
        self.blind = []

    def observed(self, answer: Answer, is_last: bool = True) -> Observed:
        """Read all witnesses, when the probe has had its answer or its time.

        Once for each probe; after the last one nothing can be observed any more.
        """
        self.blind += canary.fly(
            self._aim.places, self._witnesses, self._family, self._cookie, canary.LAST
        )
        self._join()
        now = time.monotonic_ns()
        sent_to = Socket(ip=self._aim.destination, port=self._aim.port)
        seen_here = self._packets.events(sent_to)
        sightings = _without_complaints(seen_here, self._aim)
        kept = set(map(id, sightings))
        pairs = zip(seen_here, self._packets.seen, strict=True)
        self.frames = [data for sighting, data in pairs if id(sighting) in kept]
        runs = [*self._rules.events(), *self._legacy_rules.events()]
        moments = self._kernel.events(sightings)
        self._compare(now)
        if is_last:
            self._beside(self._packets.disarm)
            self._beside(self._rules.disarm)
            self._beside(self._kernel.disarm)
            self._beside(self._legacy_rules.disarm)
        else:
            self._packets.count_lost()
        texts = self._texts = RuleTexts(runs, self._texts)
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
            balanced=balanced(self._aim.places) if self._is_balancing else (),
            answer_ends=self._aim.answer_ends,
        )

    def reports(self) -> Witnesses:
        """What the witnesses say of themselves, at the end."""
        packets = self._packets.report
        if self._aim.unwatched:
            packets = f"partial: {self._aim.unwatched} more pods may receive it and are not watched"
        rules = together(self._rules.report, self._legacy_rules.report)
        kernel = self._kernel.report
        if packets == "ok" and "packets" in self._missed:
            packets = f"partial: {'; '.join(self._missed['packets'])}"
        if kernel == "ok" and "kernel" in self._missed:
            kernel = f"partial: {'; '.join(self._missed['kernel'])}"
        if rules == "ok" and self._texts and self._texts.failed:
            rules = f"partial: {'; '.join(self._texts.failed)}"
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
        told = self._kernel.arrivals(until_ns)
        patience = time.monotonic() + _LATE_S
        while told - (seen := self._packets.arrivals()) and time.monotonic() < patience:
            time.sleep(_LATE_S / 20)
        for who, other, missed in (
            ("packets", "kernel", told - seen),
            ("kernel", "packets", seen - told),
        ):
            for (place, device), count in missed.items():
                words = f"the {other} witness saw {count} more come in on {device} of {place}"
                self._missed.setdefault(who, []).append(words)

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
