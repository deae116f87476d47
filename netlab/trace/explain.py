"""What became of the probe: outcome, receiver, translations, and the reason if it was lost."""

from __future__ import annotations

import msgspec

from netlab.trace.case import Case, answered, first_back, last_seen, receiver
from netlab.trace.findings import loss_of
from netlab.trace.model import Disposition, Loss, Receiver, Translation
from netlab.trace.model_steps import Socket


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
    if case.answer.outcome == "answered" and not case.story.forward:
        return Explained("unobserved", None, None, translations, _unrecognised(case))
    answer_to = _answer_to(case) if case.aim.spoofed else None
    if case.answer.outcome == "answered" or answer_to:
        at_the_end = case.story.forward[-1].end.source
        return Explained("delivered", receiver(case), at_the_end, translations, None, answer_to)
    came_back = first_back(case, "refusal") or first_back(case, "error")
    refused = came_back or case.answer.outcome in ("refused", "unreachable")
    loss = loss_of(case)
    # What was lost on the way back did arrive.
    reached = receiver(case) if loss.direction == "reply" else None
    seen = case.story.forward[-1].end.source if reached else None
    return Explained("rejected" if refused else "dropped", reached, seen, translations, loss)


def _unrecognised(case: Case) -> Loss:
    """Nothing that has the mark was seen, and all the same there was an answer."""
    source, port = case.aim.source, case.answer.source.port
    return Loss(
        direction="forward",
        node=source.node,
        device=None,
        reason="unobserved",
        where=str(source),
        rule=None,
        evidence=["there was an answer, and no device saw the probe"],
        explanation=f"{source} sent the probe so that it could not be known again: if an earlier "
        f"connection from port {port} was closed a short time ago (TIME_WAIT), its sequence number "
        "is that one's",
        fix="send from another --source-port, or again after a minute",
    )


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
