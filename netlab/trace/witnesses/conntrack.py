"""Connections: what connection tracking announced about the probe in each node's namespace.

The entry holds the original tuple and the one that answers are expected to have, which is all that
the way back is translated by.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence

import msgspec

from netlab.kernel import conntrack
from netlab.kernel.namespaces import entered
from netlab.kernel.nfnetlink import Listener
from netlab.problems import NetlabError
from netlab.trace.family import Family
from netlab.trace.model_steps import Socket, Tuple
from netlab.trace.place import Place
from netlab.trace.witnesses import Canary

_GROUPS = (1, 2)  # new, update
_MOST = 4096  # entries that are remembered while a probe is waited for


class Entry(msgspec.Struct, frozen=True):
    """A connection tracking entry in one namespace, as last announced."""

    place: Place
    id: int
    protocol: int
    original: Tuple
    reply: Tuple
    status: tuple[str, ...]


class Connections:
    """The conntrack witness."""

    name = "conntrack"

    def __init__(self, family: Family) -> None:
        self._family = family
        self._listeners: dict[Place, Listener] = {}
        self._entries: dict[tuple[Place, int], conntrack.Entry] = {}
        # Who sent to itself, and of those the canaries.
        self._on_loopback: dict[tuple[Place, int | None], tuple[Place, int]] = {}
        self._canaries: set[tuple[Place, int]] = set()
        self._untracked: list[str] = []
        self._failed: list[str] = []
        self._overrun = False

    def arm(self, places: Sequence[Place]) -> None:
        for place in places:
            if place.kind not in ("node", "container", "gateway", "balancer"):
                continue
            try:
                with entered(place.namespace):
                    self._listeners[place] = Listener(_GROUPS)
            except OSError as error:
                self._failed.append(f"{place.name}: {error.strerror or error}")

    def saw(self, canary: Canary) -> bool:
        listener = self._listeners.get(canary.place)
        other_family = canary.end.ip != self._family.loopback
        if listener is None or other_family or canary.refused:
            return True
        self._read(canary.place, listener)
        key = self._on_loopback.get((canary.place, canary.end.port))
        if key is not None:
            self._canaries.add(key)
            return True
        if _tracks(canary, self._family):
            return False
        # (A load balancer that passes packets on tracks none, nor do containers without rules.)
        tracks = canary.place.kind not in ("balancer", "container")
        if tracks and canary.place.name not in self._untracked:
            self._untracked.append(canary.place.name)
        return True

    def events(self) -> list[Entry]:
        """All entries of the family that were announced since :meth:`arm`, whosever they are."""
        for place, listener in self._listeners.items():
            self._read(place, listener)
        return [_of_trace(place, entry) for (place, _), entry in self._entries.items()]

    def _read(self, place: Place, listener: Listener) -> None:
        for kind, family, payload in listener.read():
            if kind != conntrack.MESSAGE_NEW or family != self._family.address_family:
                continue
            entry = conntrack.decode(family, payload)
            if entry:
                self._entries[place, entry.id] = entry
                if entry.original.source == self._family.loopback:
                    key = place, entry.original.source_port
                    self._on_loopback[key] = place, entry.id

    def forget(self) -> None:
        for place, listener in self._listeners.items():
            self._read(place, listener)
            listener.overrun = False
        # Those of canaries are still to be deleted.
        self._entries = {key: self._entries[key] for key in self._canaries}

    def age(self) -> None:
        """Drop what was announced long ago, and what was lost before the last call is no matter."""
        self._overrun = any(listener.overrun for listener in self._listeners.values())
        for listener in self._listeners.values():
            listener.overrun = False
        self.events()
        for key in list(self._entries)[:-_MOST]:
            if key not in self._canaries:
                del self._entries[key]
        self._on_loopback = {
            end: key for end, key in self._on_loopback.items() if key in self._entries
        }

    def disarm(self) -> None:
        self._forget_canaries()
        for listener in self._listeners.values():
            self._overrun |= listener.overrun
            listener.close()
        self._listeners.clear()

    def _forget_canaries(self) -> None:
        """Delete their entries, which would stay for half a minute."""
        while self._canaries:
            key = self._canaries.pop()
            # The namespace may be gone already.
            with contextlib.suppress(OSError, NetlabError):
                conntrack.delete(key[0].namespace, [self._entries[key]])

    @property
    def report(self) -> str:
        problems = list(self._failed)
        if self._untracked:
            problems.append(f"no rule asks for tracking on {', '.join(self._untracked)}")
        if self._overrun or any(each.overrun for each in self._listeners.values()):
            problems.append("events came faster than they were read")
        if not problems:
            return "ok"
        return f"{'partial' if self._entries else 'unavailable'}: {'; '.join(problems)}"


def _tracks(canary: Canary, family: Family) -> bool:
    """Whether a namespace that has just sent a canary tracks connections, or cannot: it has enough.

    Tracking begins when a rule of that family asks for it, and ends with the last one; entries of
    before stay.  The table's size is known without events; if it is empty, nobody tracked.
    """
    count, most = conntrack.sizes(canary.place.namespace)
    if count in (0, most):
        return count != 0
    return any(
        (entry.original.source, entry.original.source_port) == (canary.end.ip, canary.end.port)
        for entry in conntrack.dump(canary.place.namespace, family.version)
    )


def of_probe(
    entries: Sequence[Entry], protocol: int, seen: Collection[tuple[Place, Tuple]]
) -> list[Entry]:
    """The entries of a probe: those whose original tuple a packet of it had in their namespace."""
    return [
        entry
        for entry in entries
        if entry.protocol == protocol and (entry.place, entry.original) in seen
    ]


def _of_trace(place: Place, entry: conntrack.Entry) -> Entry:
    return Entry(
        place=place,
        id=entry.id,
        protocol=entry.protocol,
        original=_tuple(entry.original),
        reply=_tuple(entry.reply),
        status=entry.status,
    )


def _tuple(end: conntrack.Tuple) -> Tuple:
    return Tuple(
        source=Socket(ip=end.source, port=end.source_port),
        destination=Socket(ip=end.destination, port=end.destination_port),
    )
