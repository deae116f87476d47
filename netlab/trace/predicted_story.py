"""What is told of a predicted walk: hops with their steps, and translations."""

from __future__ import annotations

from typing import Literal

import msgspec

from netlab.trace.model import PredictedHop, PredictedOuter, Translation
from netlab.trace.model_steps import AnyStep, Nat, Socket, Tuple
from netlab.trace.place import Place

Role = Literal["probe", "answer", "reset", "error"]
Kind = Literal["dnat", "ipvs", "snat", "masquerade"]


class PredictedStory:
    """The leg that is walked, and the translations of all legs.

    A step is told of the hop that it came after; the first hop has those before it, too.
    """

    def __init__(self) -> None:
        self.role: Role = "probe"
        self.hops: list[PredictedHop] = []
        self.translations: list[Translation] = []
        self._pending: list[AnyStep] = []

    def begin(self, role: Role) -> None:
        """Another leg, by what kind of packet."""
        self.role, self.hops, self._pending = role, [], []

    def step(self, step: AnyStep) -> None:
        """Something that happens between two devices."""
        self._pending.append(step)

    def hop(
        self,
        place: Place,
        device: str,
        direction: Literal["in", "out"],
        flow: Tuple,
        outer: PredictedOuter | None = None,
        sure: bool = True,
    ) -> None:
        """The packet crosses a device; whether it surely does."""
        first = not self.hops
        if not first:
            self.hops[-1] = msgspec.structs.replace(
                self.hops[-1], steps=[*self.hops[-1].steps, *self._pending]
            )
        source, destination = flow.source, flow.destination
        if self.role == "error":
            # Whose address it bears is the kernel's choice among a node's own; ICMP has no ports.
            source, destination = Socket(ip=""), Socket(ip=destination.ip)
        self.hops.append(
            PredictedHop(
                node=place.node,
                namespace=place.namespace,
                device=device,
                direction=direction,
                source=source,
                destination=destination,
                outer=outer,
                sure=sure,
                steps=[*self._pending] if first else [],
            )
        )
        self._pending = []

    def end(self, step: AnyStep) -> list[PredictedHop]:
        """The hops of the leg, the last of which ends with `step`."""
        if self.hops:
            last = self.hops[-1]
            self.hops[-1] = msgspec.structs.replace(last, steps=[*last.steps, *self._pending, step])
        return self.hops

    def translated(
        self,
        kind: Kind,
        node: Place,
        before: Socket,
        after: Socket,
    ) -> None:
        """A node gives a packet another address."""
        self.translations.append(
            Translation(kind=kind, node=node.node, before=before, after=after, rule=None)
        )
        self._pending.append(Nat(translation=kind, reverse=False, before=before, after=after))

    def undone(self, kind: Kind, before: Socket, after: Socket) -> None:
        """It gives an answer the address back."""
        self._pending.append(Nat(translation=kind, reverse=True, before=before, after=after))


def relabelled(hops: list[PredictedHop], step: AnyStep) -> list[PredictedHop]:
    """The hops of an ended leg with another end."""
    if not hops:
        return []
    last = msgspec.structs.replace(hops[-1], steps=[*hops[-1].steps[:-1], step])
    return [*hops[:-1], last]
