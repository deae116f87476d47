"""Independent witnesses of a trace.

Each watches the namespaces that it is given and reports what it saw of the probe; each works
without the others.  A canary (a datagram that a namespace sends to itself, before and after the
probe) proves that a witness sees: an empty answer is not a clean answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from netlab.trace.model_steps import Socket
from netlab.trace.place import Place


class Canary(msgspec.Struct, frozen=True):
    """A datagram from a loopback address and port to itself in one namespace.

    One that netfilter refused begins no connection; it was sent again below netfilter.
    """

    place: Place
    cookie: bytes  # the payload
    end: Socket
    refused: bool = False


class Witness(Protocol):
    """What all witnesses have in common."""

    name: str

    def arm(self, places: Sequence[Place]) -> None:
        """Begin to watch.  What cannot be watched shows in :attr:`report`."""

    def saw(self, canary: Canary) -> bool:
        """Whether a canary was seen until now; True where this witness need not watch."""

    def events(self) -> Sequence[Any]:
        """What was seen of the probe, in order within each namespace."""

    def forget(self) -> None:
        """Forget what was seen until now, and go on watching: the next probe has the same mark."""

    def disarm(self) -> None:
        """Give everything back.  Can be called more than once."""

    @property
    def report(self) -> str:
        """`ok`, `partial: reason` or `unavailable: reason`."""


class News(Protocol):
    """What may tell, while the answer is awaited, that none will come."""

    @property
    def descriptors(self) -> Sequence[int]:
        """Readable where an event waits."""

    def dropped(self) -> bool:
        """Whether, for all that is known now, the probe or its answer was lost."""


def together(report: str, other: str) -> str:
    """The report of two that watch the same: it is partial if either is blind."""
    if "ok" in (report, other):
        return other if report == "ok" else report
    both = report.startswith("unavailable") and other.startswith("unavailable")
    reasons = "; ".join(each.partition(": ")[2] for each in (report, other))
    return f"{'unavailable' if both else 'partial'}: {reasons}"
