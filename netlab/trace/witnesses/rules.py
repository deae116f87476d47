"""Rules: the nf_tables trace, which tells every rule that the probe matched and its verdict.

In each node's namespace a table of our own, before connection tracking in prerouting and output,
sets `nftrace` on the probe, its answers and errors, plain or inside VXLAN, and on nothing else.
The kernel then reports each rule over netlink (group NFNLGRP_NFTRACE).  Rules loaded with
iptables-nft are nf_tables rules and are reported like any other; what iptables-legacy does with the
same packets, `legacy_rules` tells.

The table is owned by the process (`flags owner`): it goes with it, `kill -9` included.

Source: linux/netfilter/nf_tables.h, net/netfilter/nf_tables_trace.c.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Sequence
from typing import Any

import msgspec

from netlab.kernel.namespaces import entered
from netlab.kernel.netlink import attributes
from netlab.kernel.nfnetlink import SUBSYSTEM_NFTABLES, Listener
from netlab.trace.family import IPV4
from netlab.trace.mark import Mark, bytes_at
from netlab.trace.model_steps import Socket, Tuple
from netlab.trace.place import Place
from netlab.trace.witnesses import Canary

_GROUP_NFTRACE = 9
_MESSAGE_TRACE = SUBSYSTEM_NFTABLES << 8 | 17

# enum nft_trace_attributes
_TABLES = "netlab_trace_"  # what the names of ours begin with
_TABLE, _CHAIN, _HANDLE, _TYPE, _VERDICT, _ID = 1, 2, 3, 4, 5, 6
_NETWORK, _TRANSPORT, _IIF, _OIF, _MARK, _POLICY = 8, 9, 10, 12, 14, 16
_TYPE_POLICY, _TYPE_RULE = 1, 3
_UDP_HEADER = 8
_IPIP = 4  # the protocol of IPv4 inside another packet

_VERDICTS = {0: "drop", 1: "accept", 2: "stolen", 3: "queue", 4: "repeat"} | {
    -1: "continue",
    -2: "break",
    -3: "jump",
    -4: "goto",
    -5: "return",
}
_PROTOCOL_NAMES = {1: "icmp", 6: "tcp", 17: "udp", 58: "icmpv6"}
_PROTOCOL_NUMBERS = {name: number for number, name in _PROTOCOL_NAMES.items()}

TABLE = """\
table {family} {name} {{
  flags owner;
  comment "netlab trace";
  chain tunnelled {{
    {tunnelled}
  }}
  chain prerouting {{
    type filter hook prerouting priority -350; policy accept;
    {rules}
    {carrier} jump tunnelled
  }}
  chain output {{
    type filter hook output priority -350; policy accept;
    {rules}
    {carrier} jump tunnelled
  }}
}}
"""


class Match(msgspec.Struct, frozen=True):
    """One rule that matched; `target` is the chain of a jump or goto.

    `handle` is nftables' number of it; of iptables-legacy the place in the chain, and `text` the
    rule as it is printed.
    """

    chain: str
    handle: int
    verdict: str
    target: str | None = None
    text: str | None = None


class Run(msgspec.Struct):
    """One packet's way through one base chain, from its headers there to the verdict."""

    place: Place
    table: str
    chain: str  # the base chain: iptables calls it by the hook, "PREROUTING"
    iif: str | None
    oif: str | None
    protocol: str
    flow: Tuple
    ip_id: int  # of IPv6 the flow label
    quoted: bytes  # of an ICMP error what its header and the quoted one begin with, else empty
    outer: bool  # whether this is the outer packet of a tunnel
    ours: bool  # known by its transport header
    transport: bytes = b""  # as much of that as was reported
    mark: int = 0  # when it entered the chain
    family: int = IPV4.address_family  # of the table, NFPROTO_*
    matches: list[Match] = []
    policy: str | None = None
    legacy: bool = False  # whether these are rules of iptables-legacy

    @property
    def dropped(self) -> bool:
        """Whether the packet ended here."""
        verdict = self.matches[-1].verdict if self.matches else None
        return "drop" in (verdict, self.policy)

    @property
    def key(self) -> tuple[object, ...]:
        """What stays the same through all hooks for a packet that cannot be told by its mark."""
        return self.protocol, self.ip_id, self.quoted, self.flow if self.outer else None


class Rules:
    """The rules witness."""

    name = "rules"

    def __init__(self, mark: Mark, vxlan_port: int, canary: bytes, in_ip: bool = False) -> None:
        """`in_ip`: what is in a tunnel is there as IP in IP, and not as VXLAN."""
        self._mark = mark
        self._vxlan_port = vxlan_port
        self._in_ip = in_ip
        self._canary = canary
        self._table = f"{_TABLES}{os.urandom(4).hex()}"
        self._listeners: dict[Place, Listener] = {}
        self._owners: dict[Place, Any] = {}
        self._runs: dict[Place, list[Run]] = {}
        self._open: dict[tuple[Place, int], Run] = {}
        self._canaries: set[tuple[Place, bytes]] = set()
        self._devices = DeviceNames()
        self._old: dict[Place, int] = {}
        self._adopted = False
        self._failed: list[str] = []
        self._overrun = False

    def arm(self, places: Sequence[Place]) -> None:
        for place in places:
            if place.kind not in ("node", "container", "gateway", "balancer"):
                continue
            try:
                with entered(place.namespace):
                    self._arm_here(place)
            except OSError as error:
                self._failed.append(f"{place.name}: {error.strerror or error}")

    def _arm_here(self, place: Place) -> None:
        import nftables

        listener = Listener([_GROUP_NFTRACE])
        # The library's own netlink socket owns the table, so the object is kept until disarm.
        owner = nftables.Nftables()
        canary = bytes_at(_UDP_HEADER, self._canary, "meta l4proto udp")
        carrier, inside = f"udp dport {self._vxlan_port}", self._mark.tunnelled_conditions()
        if self._in_ip:
            carrier, inside = f"meta l4proto {_IPIP}", self._mark.carried_conditions()
        status, _, refused = owner.cmd(
            TABLE.format(
                family=self._mark.family.nft,
                name=self._table,
                rules=_marking([*self._mark.conditions(), canary]),
                carrier=carrier,
                tunnelled=_marking(inside),
            )
        )
        if status:
            listener.close()
            self._failed.append(f"{place.name}: nftables: {refused.splitlines()[0]}")
            return
        self._listeners[place] = listener
        self._owners[place] = owner
        self._runs[place] = []

    def saw(self, canary: Canary) -> bool:
        other_family = canary.end.ip != self._mark.family.loopback
        if canary.place not in self._listeners or other_family:
            return True
        self._read(canary.place)
        return (canary.place, canary.cookie) in self._canaries

    def age(self) -> None:
        """Drop what was read before the last call, and what was lost before it is no matter."""
        self._overrun = any(listener.overrun for listener in self._listeners.values())
        for listener in self._listeners.values():
            listener.overrun = False
        for place, runs in self._runs.items():
            self._read(place)
            del runs[: self._old.get(place, 0)]
            self._old[place] = len(runs)
        recent = {id(run) for runs in self._runs.values() for run in runs}
        self._open = {key: run for key, run in self._open.items() if id(run) in recent}

    def adopt(self, mark: Mark) -> None:
        """Of what was seen, and from now on, what bears a mark is the probe."""
        for place, runs in self._runs.items():
            self._read(place)
            for run in runs:
                number = _PROTOCOL_NUMBERS.get(run.protocol, 0)
                run.ours = mark.in_transport(run.transport, number)
                run.quoted = b"" if run.ours else run.quoted
        self._mark = mark
        self._adopted = True

    def events(self) -> list[Run]:
        """What the probe met, run by run, in the order of each namespace."""
        return [
            run
            for place in self._runs
            for run in self._of_probe(place)
            # (nor are those of another trace, which goes on meanwhile)
            if not run.table.startswith(_TABLES)
        ]

    def _of_probe(self, place: Place) -> list[Run]:
        if place in self._listeners:
            self._read(place)
        runs = self._runs[place]
        # Packets that carry the mark too far behind for the reported header are known by our own
        # table, which let through nothing else.
        keys = {run.key for run in runs if run.table == self._table}
        if self._adopted:
            # It let through others too, of which those that the header tells are known by now.
            runs = [run for run in runs if run.ours or run.outer or run.quoted]
        return [run for run in runs if run.ours or run.key in keys]

    @property
    def descriptors(self) -> list[int]:
        """Readable where an event waits."""
        return [listener.fileno() for listener in self._listeners.values()]

    def dropped(self) -> bool:
        """Whether, for all that is known now, a rule has ended the probe's way or its answer's."""
        return any(ended(self._of_probe(place)) for place in self._runs)

    def _read(self, place: Place) -> None:
        for kind, family, payload in self._listeners[place].read():
            if kind == _MESSAGE_TRACE:
                self._event(place, family, attributes(payload))

    def _event(self, place: Place, family: int, event: dict[int, bytes]) -> None:
        identity = place, int.from_bytes(event.get(_ID, b""), "big")
        if _NETWORK in event:
            run = self._run(place, family, event)
            if run is None:
                self._open.pop(identity, None)
                return
            self._open[identity] = run
            self._runs[place].append(run)
        elif identity not in self._open:
            return
        run = self._open[identity]
        kind = int.from_bytes(event.get(_TYPE, b""), "big")
        if kind == _TYPE_RULE and _HANDLE in event:
            verdict, target = _verdict(event.get(_VERDICT, b""))
            handle = int.from_bytes(event[_HANDLE], "big")
            run.matches.append(Match(text_of(event[_CHAIN]), handle, verdict, target))
        elif kind == _TYPE_POLICY:
            run.policy = _VERDICTS.get(int.from_bytes(event.get(_POLICY, b""), "big"))

    def _run(self, place: Place, family: int, event: dict[int, bytes]) -> Run | None:
        network, transport = event[_NETWORK], event.get(_TRANSPORT, b"")
        ip = self._mark.family
        if len(network) < ip.header or network[0] >> 4 != ip.version:
            return None
        protocol = network[ip.protocol_at]
        if protocol == 17 and self._canary == transport[8:16]:
            self._canaries.add((place, transport[8:]))
            return None
        return run_of(
            self._mark,
            self._vxlan_port,
            network,
            transport,
            place=place,
            table=text_of(event[_TABLE]),
            chain=text_of(event[_CHAIN]),
            iif=self._devices(place, event.get(_IIF)),
            oif=self._devices(place, event.get(_OIF)),
            mark=int.from_bytes(event.get(_MARK, b""), "big"),
            family=family,
        )

    def forget(self) -> None:
        for place, listener in self._listeners.items():
            self._read(place)
            self._runs[place] = []
            listener.overrun = False
        self._open.clear()
        self._canaries.clear()

    def disarm(self) -> None:
        for listener in self._listeners.values():
            self._overrun |= listener.overrun
            listener.close()
        self._listeners.clear()
        # Closing the owner's socket removes its table and waits for a grace period: all at once.
        places = list(self._owners)
        closing = [threading.Thread(target=self._owners.pop, args=(place,)) for place in places]
        for thread in closing:
            thread.start()
        for thread in closing:
            thread.join()

    @property
    def report(self) -> str:
        problems = list(self._failed)
        if self._overrun or any(each.overrun for each in self._listeners.values()):
            problems.append("events came faster than they were read")
        if not problems:
            return "ok"
        return f"{'partial' if self._runs else 'unavailable'}: {'; '.join(problems)}"


class DeviceNames:
    """Names of devices, each asked for once."""

    def __init__(self) -> None:
        self._names: dict[tuple[Place, int], str] = {}

    def __call__(self, place: Place, index: bytes | None) -> str | None:
        """The name behind an index as netfilter's messages have it; None if they have none."""
        if index is None:
            return None
        key = place, int.from_bytes(index, "big")
        if key not in self._names:
            with entered(place.namespace):
                self._names[key] = socket.if_indextoname(key[1])
        return self._names[key]


def run_of(probe: Mark, vxlan_port: int, network: bytes, transport: bytes, /, **known: Any) -> Run:
    """A run that begins; `known` is what the packet's headers do not tell."""
    ip = probe.family
    protocol = network[ip.protocol_at]
    sport, dport = struct.unpack_from("!HH", transport.ljust(4, b"\0"))
    ported = protocol in (6, 17)
    ours = probe.in_transport(transport, protocol)
    source, destination = ip.ends(network)
    error = protocol == ip.icmp_number and not ours
    return Run(
        protocol=_PROTOCOL_NAMES.get(protocol, str(protocol)),
        flow=Tuple(
            source=Socket(ip=source, port=sport if ported else None),
            destination=Socket(ip=destination, port=dport if ported else None),
        ),
        ip_id=_identity(network),
        quoted=transport[:2] + transport[8:14] if error else b"",
        outer=protocol == _IPIP or (protocol == 17 and not ours and dport == vxlan_port),
        ours=ours,
        transport=transport,
        **known,
    )


def ended(runs: Sequence[Run]) -> bool:
    """Whether what a probe met in one place, in order, ends with a drop that nothing follows.

    Another run may be that of the copy which counts of those that a bridge flooded.  `reject` sends
    its answer before its verdict is reported, so that one may stand before the drop.
    """
    if not runs or not runs[-1].dropped:
        return False
    back = runs[-1].flow.source.ip
    return not any(run.iif is None and run.flow.destination.ip == back for run in runs)


def _marking(conditions: Sequence[str]) -> str:
    return "\n    ".join(f"{condition} meta nftrace set 1" for condition in conditions)


def _identity(network: bytes) -> int:
    """The identification of IPv4, the flow label of IPv6."""
    if network[0] >> 4 == 4:
        return int.from_bytes(network[4:6], "big")
    return int.from_bytes(network[:4], "big") & 0xFFFFF


def text_of(value: bytes) -> str:
    """A string of netlink, which ends with a zero."""
    return value.rstrip(b"\0").decode(errors="replace")


def _verdict(data: bytes) -> tuple[str, str | None]:
    inside = attributes(data)
    (code,) = struct.unpack("!i", inside.get(1, b"\0\0\0\0"))
    target = inside.get(2)
    return _VERDICTS.get(code, str(code)), text_of(target) if target else None
