"""Connections: what connection tracking announced about the probe in each node's namespace.

The entry holds the original tuple and the one that answers are expected to have, which is all that
the way back is translated by.  Source: linux/netfilter/nfnetlink_conntrack.h.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Collection, Sequence

import msgspec

from netlab.kernel.namespaces import entered
from netlab.kernel.netlink import NLA_F_NESTED, attribute, attributes, message
from netlab.kernel.netlink import Socket as Netlink
from netlab.trace.aim import Place
from netlab.trace.model import Socket, Tuple
from netlab.trace.nfnetlink import SUBSYSTEM_CTNETLINK, Listener, request_body
from netlab.trace.witnesses import Canary

_GROUPS = (1, 2, 3)  # new, update, destroy
_NETLINK_NETFILTER = 12
_MESSAGE_NEW = SUBSYSTEM_CTNETLINK << 8  # IPCTNL_MSG_CT_NEW, of updates too
_MESSAGE_DELETE = SUBSYSTEM_CTNETLINK << 8 | 2

# enum ctattr_type, ctattr_tuple, ctattr_ip, ctattr_l4proto
_ORIGINAL, _REPLY, _STATUS, _ID = 1, 2, 3, 12
_TUPLE_IP, _TUPLE_PROTOCOL = 1, 2
_IPV4_SOURCE, _IPV4_DESTINATION = 1, 2
_PROTOCOL_NUMBER, _SOURCE_PORT, _DESTINATION_PORT = 1, 2, 3

# enum ip_conntrack_status, the bits that explain something
_STATUS_BITS = {
    0x2: "seen-reply",
    0x4: "assured",
    0x8: "confirmed",
    0x10: "src-nat",
    0x20: "dst-nat",
}
_PROTOCOL_NUMBERS = {"icmp": 1, "tcp": 6, "udp": 17}


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

    def __init__(self) -> None:
        self._listeners: dict[Place, Listener] = {}
        self._entries: dict[tuple[Place, int], Entry] = {}
        self._originals: dict[tuple[Place, int], bytes] = {}
        self._canaries: set[tuple[Place, int]] = set()
        self._untracked: list[str] = []
        self._failed: list[str] = []
        self._overrun = False

    def arm(self, places: Sequence[Place]) -> None:
        for place in places:
            if place.kind != "node":
                continue
            try:
                with entered(place.namespace):
                    self._listeners[place] = Listener(_GROUPS)
            except OSError as error:
                self._failed.append(f"{place.name}: {error.strerror or error}")

    def saw(self, canary: Canary) -> bool:
        listener = self._listeners.get(canary.place)
        if listener is None:
            return True
        self._read(canary.place, listener)
        end = Socket(ip="127.0.0.1", port=canary.port)
        for key, entry in self._entries.items():
            if entry.place == canary.place and entry.original.source == end:
                self._canaries.add(key)
                return True
        if _tracks(canary.place):
            return False
        if canary.place.name not in self._untracked:
            self._untracked.append(canary.place.name)
        return True

    def events(self) -> list[Entry]:
        """All entries that were announced since :meth:`arm`, whosever they are."""
        for place, listener in self._listeners.items():
            self._read(place, listener)
        return list(self._entries.values())

    def _read(self, place: Place, listener: Listener) -> None:
        for kind, _, payload in listener.read():
            if kind != _MESSAGE_NEW:
                continue
            entry = decode(place, payload)
            if entry:
                self._entries[place, entry.id] = entry
                self._originals[place, entry.id] = attributes(payload)[_ORIGINAL]

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
            body = request_body(attribute(_ORIGINAL | NLA_F_NESTED, self._originals[key]))
            # The namespace, or the entry, may be gone already.
            with (
                contextlib.suppress(OSError),
                entered(key[0].namespace),
                Netlink(_NETLINK_NETFILTER) as netlink,
            ):
                netlink.request([message(_MESSAGE_DELETE, 0, body)])

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


def _tracks(place: Place) -> bool:
    """Whether anything is tracked in a namespace that has just sent a canary.

    Tracking begins when a rule asks for it.  The table's size is known without events; if it is
    empty, nobody tracked the canary.
    """
    with entered(place.namespace), open("/proc/sys/net/netfilter/nf_conntrack_count") as file:
        return file.read().strip() != "0"


def of_probe(
    entries: Sequence[Entry], protocol: str, seen: Collection[tuple[Place, Tuple]]
) -> list[Entry]:
    """The entries of a probe: those whose original tuple a packet of it had in their namespace."""
    number = _PROTOCOL_NUMBERS[protocol]
    return [
        entry
        for entry in entries
        if entry.protocol == number and (entry.place, entry.original) in seen
    ]


def decode(place: Place, payload: bytes) -> Entry | None:
    """An IPv4 entry from the attributes of a message, else None."""
    found = attributes(payload)
    if _ORIGINAL not in found or _REPLY not in found:
        return None
    original, reply = _tuple(found[_ORIGINAL]), _tuple(found[_REPLY])
    if original is None or reply is None:
        return None
    status = int.from_bytes(found.get(_STATUS, b""), "big")
    return Entry(
        place=place,
        id=int.from_bytes(found.get(_ID, b""), "big"),
        protocol=original[0],
        original=original[1],
        reply=reply[1],
        status=tuple(name for bit, name in _STATUS_BITS.items() if status & bit),
    )


def _tuple(data: bytes) -> tuple[int, Tuple] | None:
    parts = attributes(data)
    ip, protocol = (
        attributes(parts.get(_TUPLE_IP, b"")),
        attributes(parts.get(_TUPLE_PROTOCOL, b"")),
    )
    if _IPV4_SOURCE not in ip:
        return None
    source, destination = (
        Socket(
            ip=socket.inet_ntoa(ip[address]),
            port=int.from_bytes(protocol[port], "big") if port in protocol else None,
        )
        for address, port in (
            (_IPV4_SOURCE, _SOURCE_PORT),
            (_IPV4_DESTINATION, _DESTINATION_PORT),
        )
    )
    return protocol[_PROTOCOL_NUMBER][0], Tuple(source=source, destination=destination)
