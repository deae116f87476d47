"""IPsec policies (xfrm) that let no packet through: by blocking it, or for want of keys."""

from __future__ import annotations

from collections.abc import Iterator

from netlab.kernel.xfrm import Direction, Policy
from netlab.trace.case import Case, last_seen
from netlab.trace.family import first_of
from netlab.trace.model import Leg
from netlab.trace.place import Place
from netlab.trace.refusals import Doubt

# The kernel's word for all of them, in lower case as reasons are.
REASON = "xfrm-policy"


def by_policy(case: Case, leg: Leg) -> Iterator[tuple[Place, Doubt]]:
    """A policy of the place that a packet did not leave, or where it was not taken."""
    if not case.story.leg(leg):
        sender = case.aim.source
        source = case.aim.source_address or first_of(case.aim.family, sender.addresses)
        if source:
            yield from _refusing(case, sender, source, case.aim.destination, ("out",))
        return
    last, end = last_seen(case, leg), case.story.leg(leg)[-1].end
    if last.direction != "in" or last.packet.outer:
        return
    directions: tuple[Direction, ...] = ("fwd", "out")
    if end.destination.ip in last.place.addresses:
        directions = ("in",)
    yield from _refusing(case, last.place, end.source.ip, end.destination.ip, directions)


def _refusing(
    case: Case, place: Place, source: str, destination: str, directions: tuple[Direction, ...]
) -> Iterator[tuple[Place, Doubt]]:
    word = "XFRM_POLICY" in [each.reason for each in case.moments_of_loss if each.place == place]
    unsent = not case.story.forward
    for policy in case.tables.policies(place) or ():
        ours = policy.direction in directions and policy.covers(source, destination)
        # A policy that asks for IPsec lets through what is encrypted, so more must be known.
        if ours and (policy.blocks or word or unsent):
            yield place, _doubt(place, policy)


def _doubt(place: Place, policy: Policy) -> Doubt:
    remove = f"`ip -n {place.namespace} xfrm policy delete {policy}`"
    if policy.blocks:
        words = f"an IPsec policy (xfrm) of {place} blocks it: {policy}"
        return Doubt(REASON, words, f"if that is not meant: {remove}")
    return Doubt(
        REASON,
        f"an IPsec policy (xfrm) of {place} lets it through with IPsec alone: {policy}",
        f"give both ends the keys (`ip -n {place.namespace} xfrm state` shows which there are); if "
        f"that is not meant: {remove}",
    )
