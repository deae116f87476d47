"""A trace for Wireshark: its frames, each with a comment that says what was done with it there."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO

from netlab.kernel.packet_sockets import WHOLE
from netlab.report.pcapng import Writer, interface_of
from netlab.report.terminal import headline, summary, told
from netlab.trace.model import Direction, Hop, Trace
from netlab.trace.model_steps import Drop
from netlab.trace.run import Recorded

# Namespace, device and direction of a sight, and the time since the first one.
_Sight = tuple[str, str, Direction, int]
_COMPLAINT = "an ICMP error about the answer, to who sent that"
_ASIDE = "beside the way: a copy that nobody took here"


def write(trace: Trace, recorded: Sequence[Recorded], stream: BinaryIO) -> None:
    """Write the frames of a trace, in time order; the file's own comment has the answer."""
    answer = " ".join(filter(None, (headline(trace), summary(trace))))
    writer = Writer(stream, snaplen=WHOLE, comment=answer)
    comments: dict[_Sight, deque[str]] = {}
    for sight, comment in _comments(trace):
        comments.setdefault(sight, deque()).append(comment)
    for each in recorded:
        seen = each.sighting
        since = seen.t_ns - recorded[0].sighting.t_ns
        known = comments.get((seen.place.namespace, seen.device, seen.direction, since))
        aside = _COMPLAINT if seen.role == "error" else _ASIDE
        writer.write(
            interface_of(seen.place, seen.device),
            seen.t_ns,
            each.data,
            len(each.data),
            seen.direction,
            [known.popleft() if known else aside],
        )
    writer.flush()


def _comments(trace: Trace) -> Iterator[tuple[_Sight, str]]:
    for leg, hops in (("there", trace.forward), ("back", trace.reply)):
        for number, hop in enumerate(hops, 1):
            sight = hop.namespace, hop.device, hop.direction, hop.t_ns
            title = f"{leg} {number} {hop.device} {hop.direction}"
            steps = "; ".join(_sentences(hop, trace))
            yield sight, f"{title}: {steps}" if steps else title


def _sentences(hop: Hop, trace: Trace) -> Iterable[str]:
    yield from told(hop)
    if trace.drop and any(isinstance(step, Drop) for step in hop.steps):
        yield trace.drop.explanation
        if trace.drop.fix:
            yield f"fix: {trace.drop.fix}"
