"""What became of the probe: outcome, receiver, translations, and the reason if it was lost."""

from __future__ import annotations

import msgspec

from netlab.trace.case import Case, first_back, receiver
from netlab.trace.findings import loss_of
from netlab.trace.model import Disposition, Loss, Receiver, Socket, Translation


class Explained(msgspec.Struct, frozen=True):
    """The outcome of a trace, in words of the model."""

    disposition: Disposition
    delivered_to: Receiver | None
    seen_source: Socket | None
    translations: list[Translation]
    drop: Loss | None


def explain(case: Case) -> Explained:
    """Say what became of the probe."""
    translations = [
        Translation(
            kind=nat.translation,
            node=chapter.passage.place.node if chapter.passage.place else None,
            before=nat.before,
            after=nat.after,
            rule=nat.rule,
        )
        for chapter, nat in case.story.nats("forward")
    ]
    if case.answer.outcome == "answered":
        end = case.story.forward[-1].end if case.story.forward else None
        seen = end.source if end else None
        return Explained("delivered", receiver(case), seen, translations, None)
    came_back = first_back(case, "refusal") or first_back(case, "error")
    refused = came_back or case.answer.outcome in ("refused", "unreachable")
    loss = loss_of(case)
    # What was lost on the way back did arrive.
    reached = receiver(case) if loss.direction == "reply" else None
    seen = case.story.forward[-1].end.source if reached else None
    return Explained("rejected" if refused else "dropped", reached, seen, translations, loss)
