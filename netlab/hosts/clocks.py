"""Sightings of one packet on machines whose clocks differ, put on one time line.

No clock is trusted.  A frame that left one machine and came in on another left before it came in,
there and on the way back: each bounds how far the two clocks are apart, as NTP's four stamps do
(RFC 5905), with the probe itself as the exchange.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from netlab.trace.witnesses.packets import Sighting

# What a frame is taken to need where only one way was seen.
_WIRE_NS = 1000


def offsets(seen: Mapping[str, Sequence[Sighting]], first: str) -> dict[str, int]:
    """How many nanoseconds each machine's clock is ahead of that of the `first`.

    Of machines without a frame in common with the others nothing can be said: they are left out.
    """
    found = {first: 0}
    while True:
        for node in seen:
            if node in found:
                continue
            ahead = _ahead(seen[node], [(seen[known], by) for known, by in found.items()])
            if ahead is not None:
                found[node] = ahead
                break
        else:
            return found


def _ahead(
    sightings: Sequence[Sighting], known: Sequence[tuple[Sequence[Sighting], int]]
) -> int | None:
    most: list[int] = []
    least: list[int] = []
    for others, by in known:
        most += (came.t_ns - (left.t_ns - by) for left, came in _crossings(others, sightings))
        least += (left.t_ns - (came.t_ns - by) for left, came in _crossings(sightings, others))
    if most and least:
        return (min(most) + max(least)) // 2
    if most:
        return min(most) - _WIRE_NS
    return max(least) + _WIRE_NS if least else None


def _crossings(
    here: Sequence[Sighting], there: Sequence[Sighting]
) -> Iterator[tuple[Sighting, Sighting]]:
    """Frames that left here and came in there."""
    arrived = {(each.role, each.packet): each for each in there if each.direction == "in"}
    for each in here:
        if each.direction == "out" and (came := arrived.get((each.role, each.packet))):
            yield each, came
