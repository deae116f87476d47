"""What was seen of a packet, and the steps: what the kernel did with it between two sights.

One small class for each kind of step, plain frozen data; a step in words is its `str`.  What they
make together is in :mod:`netlab.trace.model`.
"""

from __future__ import annotations

import re
from typing import Literal

import msgspec


class Data(msgspec.Struct, frozen=True, kw_only=True):
    """Base of everything in a trace."""


class Socket(Data, frozen=True, kw_only=True):
    """An address and a port; port is null for ICMP."""

    ip: str
    port: int | None = None

    def __str__(self) -> str:
        if self.port is None:
            return self.ip
        return f"[{self.ip}]:{self.port}" if ":" in self.ip else f"{self.ip}:{self.port}"


class Tuple(Data, frozen=True, kw_only=True):
    """One direction of a connection, as conntrack keeps it."""

    source: Socket
    destination: Socket

    def __str__(self) -> str:
        return f"{self.source} → {self.destination}"

    @property
    def reversed(self) -> Tuple:
        """The tuple of a packet that goes the other way."""
        return Tuple(source=self.destination, destination=self.source)


TunnelKind = Literal["vxlan", "ipip"]


def vni_words(tunnel: TunnelKind, vni: int) -> str:
    """The network inside a tunnel, for behind its ends: of IP in IP there is but one."""
    return f" VNI {vni}" if tunnel == "vxlan" else ""


class Outer(Data, frozen=True, kw_only=True):
    """The headers that an encapsulated packet travels in."""

    src: str
    dst: str
    sport: int
    dport: int
    ttl: int
    length: int  # of the outer IP packet, bytes
    id: int  # IP identification; of IPv6 the flow label
    vni: int
    tunnel: TunnelKind = "vxlan"  # of ipip ports and VNI are 0

    def __str__(self) -> str:
        return f"{self.src} → {self.dst}{vni_words(self.tunnel, self.vni)}"


class Fragments(Data, frozen=True, kw_only=True):
    """In how many pieces a packet went by on a device, and whether that was all of it."""

    count: int
    complete: bool

    def __str__(self) -> str:
        word = "fragment" if self.count == 1 else "fragments"
        return f"{self.count} {word}{'' if self.complete else ', not all'}"


class Packet(Data, frozen=True, kw_only=True):
    """The packet as it was on one device; inside a tunnel the inner one, with `outer`.

    `ttl` is the hop limit of IPv6, `length` that of the IP packet in bytes, `flags` the TCP flags
    in scapy's letters ("SA"), `icmp` type and code in words, `quotes` the ends of the packet that
    an ICMP error is about.  Of a packet in `fragments` all else is said of the first; null: it was
    whole.
    """

    src: str
    dst: str
    sport: int | None = None
    dport: int | None = None
    protocol: str
    ttl: int
    length: int
    flags: str | None = None
    icmp: str | None = None
    quotes: Tuple | None = None
    src_mac: str | None = None
    dst_mac: str | None = None
    outer: Outer | None = None
    fragments: Fragments | None = None

    @property
    def flow(self) -> Tuple:
        return Tuple(
            source=Socket(ip=self.src, port=self.sport),
            destination=Socket(ip=self.dst, port=self.dport),
        )


class Step(Data, frozen=True, tag_field="kind", tag=str.lower):
    """Base of the steps; the tag is the class name in lower case."""


# Types of routes, and actions of routing rules, that end a packet's way.
REFUSING = ("blackhole", "unreachable", "prohibit")
_NO_ROUTE = {
    "martian": "no packet to {} from there can be right (martian)",
    "reverse-path": "no route to {}: the way back is another one (rp_filter)",
}


class Route(Step, frozen=True, kw_only=True):
    """The kernel's route for `destination`, and the prefix of the table that matched.

    `type` is that of the route, or why there is none: `no-route`, `martian`, `reverse-path`; or
    `forwarding-off`, where the route is good for the host's own packets alone.
    """

    destination: str
    matched: str | None  # null: no route
    device: str | None = None
    via: str | None = None
    source: str | None = None
    table: str = "main"
    type: str = "unicast"
    rule: str | None = None  # the rule of `ip rule` that refuses, without a route

    @property
    def refuses(self) -> bool:
        """Whether the packet ends here."""
        return self.matched is None or self.type in (*REFUSING, "forwarding-off")

    def __str__(self) -> str:
        if self.rule:
            return f"{self.destination} is refused by rule {self.rule}"
        if self.matched is None:
            return _NO_ROUTE.get(self.type, "no route to {}").format(self.destination)
        if self.type not in ("unicast", "forwarding-off"):
            return f"{self.destination} matches {self.type} route {self.matched}"
        way = f"via {self.via} dev {self.device}" if self.via else f"dev {self.device}"
        off = "" if self.type == "unicast" else ", but forwarding is off"
        return f"{self.destination} matches {self.matched} {way}{off}"


class Neighbour(Step, frozen=True, kw_only=True):
    """The link-layer address of the next hop; `mac` is null if it is not resolved."""

    address: str
    device: str
    mac: str | None
    state: str

    def __str__(self) -> str:
        return (
            f"{self.address} is at {self.mac or 'an unknown MAC'} on {self.device} ({self.state})"
        )


class Bridge(Step, frozen=True, kw_only=True):
    """A forwarding database's answer for a MAC.

    Of a bridge the port (without an entry it floods them all), of a VXLAN device the remote tunnel
    end (without an entry the packet is lost).
    """

    device: str
    mac: str
    port: str | None = None
    remote: str | None = None
    flooded: bool = False

    def __str__(self) -> str:
        if self.flooded:
            return f"{self.device} has no entry for {self.mac} and floods all ports"
        if self.remote:
            return f"{self.device} FDB: {self.mac} is behind {self.remote}"
        if self.port:
            return f"{self.device} forwards {self.mac} to port {self.port}"
        return f"{self.device} has no FDB entry for {self.mac}"


# What a rule of nftables may end with; that of iptables stands behind `-j`.
_ACTION = re.compile(r"\b(?:dnat|snat|masquerade|redirect|reject|drop|accept|queue)\b")
_TARGET = re.compile(r"-j (\S+)")
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')


class Rule(Step, frozen=True, kw_only=True):
    """A rule that matched, as `iptables-save` or `nft` prints it, and its verdict.

    `handle` is nftables' number of the rule, of iptables-legacy (`legacy`) its place in the chain;
    `rule` is null if the rule went away before its text could be read.  `element` is what the rule
    found for the packet in a verdict map of nftables, unless that leads to a chain which is named
    after its Service, or in a set of refusals.
    `object` is the Kubernetes object that the rule serves.
    """

    hook: str
    table: str
    chain: str
    handle: int
    verdict: str
    rule: str | None = None
    element: str | None = None
    comment: str | None = None
    object: str | None = None
    family: str = "ip"  # of the table
    outer: bool = False  # whether it matched the outer packet of a tunnel
    legacy: bool = False

    @property
    def action(self) -> str:
        """What it does with the packet, in its own language: "DNAT", "dnat"; else the verdict."""
        text = _QUOTED.sub("", self.rule or "")
        # `ct status dnat ... masquerade`: matches come first.
        found = _TARGET.findall(text)[:1] or _ACTION.findall(text)[-1:]
        return found[0] if found else self.verdict

    def __str__(self) -> str:
        return f"{self.table} {self.chain}: {self.rule or self.number}"

    @property
    def number(self) -> str:
        """The rule by its number: "rule with handle 7", of iptables-legacy "rule 7"."""
        return f"rule {'' if self.legacy else 'with handle '}{self.handle}"


class Nat(Step, frozen=True, kw_only=True):
    """A rewrite of one end.  `reverse`: the answer gets back what the first packet lost."""

    translation: Literal["dnat", "snat", "masquerade"]
    reverse: bool
    before: Socket
    after: Socket
    rule: str | None = None
    conntrack: int | None = None  # id of the entry that remembers it

    def __str__(self) -> str:
        if not self.reverse:
            return f"{self.translation.upper()} {self.before} → {self.after}"
        end = "source" if self.translation == "dnat" else "destination"
        return f"{self.translation.upper()} undone, {end} {self.before} → {self.after}"


class Conntrack(Step, frozen=True, kw_only=True):
    """The connection tracking entry of the packet, as the kernel announced it."""

    id: int
    original: Tuple
    reply: Tuple
    status: list[str]

    def __str__(self) -> str:
        return f"original {self.original}, expects answers {self.reply}"


class Encapsulate(Step, frozen=True, kw_only=True):
    """The packet enters a tunnel; `mac` is the FDB entry that chose `remote`."""

    device: str
    vni: int
    local: str
    remote: str
    mac: str | None = None
    tunnel: TunnelKind = "vxlan"

    def __str__(self) -> str:
        what = f"VNI {self.vni}" if self.tunnel == "vxlan" else "IP in IP"
        return f"{self.device} encapsulates: {what}, outer {self.local} → {self.remote}"


class Decapsulate(Step, frozen=True, kw_only=True):
    """The packet leaves the tunnel."""

    device: str
    vni: int
    local: str
    remote: str
    tunnel: TunnelKind = "vxlan"

    def __str__(self) -> str:
        what = f"VNI {self.vni}" if self.tunnel == "vxlan" else "IP in IP"
        return f"{self.device} decapsulates: {what}, outer was {self.remote} → {self.local}"


class Deliver(Step, frozen=True, kw_only=True):
    """The packet reached a socket or its own kernel: the end of the leg."""

    to: str

    def __str__(self) -> str:
        return f"delivered to {self.to}"


class Drop(Step, frozen=True, kw_only=True):
    """Nothing followed this hop."""

    reason: str

    def __str__(self) -> str:
        return f"stopped: {self.reason}"


AnyStep = (
    Route | Neighbour | Bridge | Rule | Nat | Conntrack | Encapsulate | Decapsulate | Deliver | Drop
)
