"""What became of the probe: outcome, receiver, translations, and the reason if it was lost."""

from __future__ import annotations

import msgspec

from netlab.trace.case import Case, answered, first_back, last_seen, receiver
from netlab.trace.findings import loss_of
from netlab.trace.model import Disposition, Loss, Receiver, Socket, Translation


class Explained(msgspec.Struct, frozen=True):
    """The outcome of a trace, in words of the model."""

    disposition: Disposition
    delivered_to: Receiver | None
    seen_source: Socket | None
    translations: list[Translation]
    drop: Loss | None
    answer_to: str | None = None  # who got the answer to an address that the source does not have


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
    answer_to = _answer_to(case) if case.aim.spoofed else None
    if case.answer.outcome == "answered" or answer_to:
        end = case.story.forward[-1].end if case.story.forward else None
        seen = end.source if end else None
        return Explained("delivered", receiver(case), seen, translations, None, answer_to)
    came_back = first_back(case, "refusal") or first_back(case, "error")
    refused = came_back or case.answer.outcome in ("refused", "unreachable")
    loss = loss_of(case)
    # What was lost on the way back did arrive.
    reached = receiver(case) if loss.direction == "reply" else None
    seen = case.story.forward[-1].end.source if reached else None
    return Explained("rejected" if refused else "dropped", reached, seen, translations, loss)


def _answer_to(case: Case) -> str | None:
    """Where an answer to somebody else's address has come to, if it is where that leads.

    That is who has the address; of one outside the lab it is the underlay's gateway.
    """
    if not answered(case):
        return None
    last, address = last_seen(case, "reply"), case.story.reply[-1].end.destination.ip
    arrived = last.direction == "in" and last.place in case.aim.answer_ends
    if not arrived or address != case.aim.source_address:
        return None
    if last.place.kind == "switch":
        return f"the underlay's gateway, the way to {address}"
    return f"{last.place}, which has {address}"
