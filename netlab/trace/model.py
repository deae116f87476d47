"""What a trace is: a probe, the hops of the packet there and back, and the steps between them.

Everything here is plain frozen data, written as JSON by :func:`encode` under the schema
`netlab.trace/v1` (docs/trace.md).  Keys are never taken away from it; fields that later work
fills are null until then.

A hop is one sight of the packet on one device.  Its steps are what the kernel did with the packet
between this sight and the next, in order; the last hop ends with what became of it (`deliver`,
`drop`).  A leg's first hop begins with the steps that brought the packet to its device.
"""

from __future__ import annotations

import re
from typing import Literal

import msgspec

from netlab.datapath.state import namespace_name

SCHEMA = "netlab.trace/v1"
PREDICTION_SCHEMA = "netlab.prediction/v1"

ProbeProtocol = Literal["tcp", "udp", "icmp"]
Disposition = Literal["delivered", "rejected", "dropped", "unobserved"]
Direction = Literal["in", "out"]
Leg = Literal["forward", "reply"]


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

    def __str__(self) -> str:
        return f"{self.src} → {self.dst} VNI {self.vni}"


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
    in scapy's letters ("SA"), `icmp` type and code in words.  Of a packet in `fragments` all else
    is said of the first; null: it was whole.
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
    """The packet enters a VXLAN tunnel; `mac` is the FDB entry that chose `remote`."""

    device: str
    vni: int
    local: str
    remote: str
    mac: str | None = None

    def __str__(self) -> str:
        return f"{self.device} encapsulates: VNI {self.vni}, outer {self.local} → {self.remote}"


class Decapsulate(Step, frozen=True, kw_only=True):
    """The packet leaves the tunnel."""

    device: str
    vni: int
    local: str
    remote: str

    def __str__(self) -> str:
        return f"{self.device} decapsulates: VNI {self.vni}, outer was {self.remote} → {self.local}"


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


class Hop(Data, frozen=True, kw_only=True):
    """One sight of the packet.  `node` is null on the underlay switch, which is no node's."""

    node: str | None
    namespace: str  # file under /run/netns
    device: str
    direction: Direction
    t_ns: int  # since the first sight of the probe
    packet: Packet
    steps: list[AnyStep] = []


class Probe(Data, frozen=True, kw_only=True):
    """What was sent: the source as the kernel chose it; `spoofed`: the sender does not have it."""

    from_: str = msgspec.field(name="from")
    to: str
    protocol: ProbeProtocol
    source: Socket
    destination: Socket
    spoofed: bool = False


class Application(Data, frozen=True, kw_only=True):
    """What was asked for above the transport, and what was answered.

    `status` is HTTP's status code or DNS's response code, `answer` the status line or that code's
    name; of anything else what it begins with, and `problem` says what was wrong.  `size` of all
    that was answered is in bytes, `elapsed_us` from the request until its end, or until giving up.
    """

    protocol: Literal["http", "dns"]
    request: str
    status: int | None = None
    answer: str | None = None
    addresses: list[str] = []  # DNS: those that the name has
    size: int = 0
    elapsed_us: int
    problem: str | None = None

    def __str__(self) -> str:
        said = [self.answer, self.problem]
        if self.status is not None:
            said += [", ".join(self.addresses)]
        if self.size:
            said += [f"{self.size} bytes"]
        told = ", ".join(filter(None, said))
        return f"{self.request}: {told}, {self.elapsed_us / 1000:.1f} ms"


class Receiver(Data, frozen=True, kw_only=True):
    """Who received the probe."""

    kind: Literal["pod", "node", "unknown"]
    name: str  # `namespace/name` of a pod
    node: str | None
    ip: str
    port: int | None

    def __str__(self) -> str:
        port = "" if self.port is None else f" port {self.port}"
        where = f" on {self.node}" if self.kind == "pod" and self.node else ""
        return f"{self.kind} {self.name}{where}{port}"


class Translation(Data, frozen=True, kw_only=True):
    """One rewrite on the way there."""

    kind: Literal["dnat", "snat", "masquerade", "ipvs", "proxy"]
    node: str | None
    before: Socket
    after: Socket
    rule: str | None


class Loss(Data, frozen=True, kw_only=True):
    """Where and why the packet did not get through: the `drop` of a trace."""

    direction: Leg
    node: str | None
    device: str | None
    reason: str  # a code, "no-endpoints"
    where: str
    rule: str | None
    evidence: list[str]
    explanation: str
    fix: str | None


class Witnesses(Data, frozen=True, kw_only=True):
    """What each witness says of itself: `ok`, `partial: why` or `unavailable: why`."""

    packets: str
    rules: str
    conntrack: str
    kernel: str | None
    decisions: str


class PredictedOuter(Data, frozen=True, kw_only=True):
    """The tunnel that a packet should be in."""

    src: str
    dst: str
    vni: int

    def __str__(self) -> str:
        return f"{self.src} → {self.dst} VNI {self.vni}"


class PredictedHop(Data, frozen=True, kw_only=True):
    """A device that the packet should cross, with its ends there; a null port is any.

    `source.ip` is "" where it is not predicted, as of ICMP errors.  `sure` is false for a bridge's
    own device where a packet goes from one of its ports to another, and crosses it only while a MAC
    is not known.
    """

    node: str | None
    namespace: str
    device: str
    direction: Direction
    source: Socket
    destination: Socket
    outer: PredictedOuter | None = None
    sure: bool = True
    steps: list[AnyStep] = []


class PredictedWay(Data, frozen=True, kw_only=True):
    """What should become of a probe, and its way there and back.

    `limited`: it is an ICMP error that comes back, of which the kernel sends few in a second
    (icmp(7), icmp_ratelimit); without it the probe is dropped, for `reason_unsaid`.
    """

    disposition: Disposition
    reason: str | None  # of the loss, as in `drop`
    limited: bool = False
    reason_unsaid: str | None = None
    where: str | None  # the place of the loss
    delivered_to: Receiver | None
    seen_source: Socket | None
    translations: list[Translation]
    forward: list[PredictedHop]
    reply: list[PredictedHop]


class Prediction(PredictedWay, frozen=True, kw_only=True):
    """What the declared lab alone says of a probe: one way, by one of the endpoints.

    After a trace it is the way by the endpoint that was taken, and `differs` has a sentence for
    each object that is not as declared.  `others` are the ways by the other endpoints, 31 at most;
    after a trace there are none.
    """

    endpoints: list[Receiver]  # those that the Service may choose; none: it is no Service's
    others: list[PredictedWay]
    differs: list[str]


class Foretold(Data, frozen=True, kw_only=True):
    """A probe that was not sent, and what should become of it: `netlab trace --predict -o json`."""

    schema: str = PREDICTION_SCHEMA
    lab: str
    probe: Probe
    prediction: Prediction


class Trace(Data, frozen=True, kw_only=True):
    """One probe, told."""

    schema: str = SCHEMA
    lab: str
    probe: Probe
    resolution: None = None
    disposition: Disposition
    delivered_to: Receiver | None
    seen_source: Socket | None
    translations: list[Translation]
    drop: Loss | None
    forward: list[Hop]
    reply: list[Hop]
    connections: None = None
    witnesses: Witnesses
    prediction: Prediction | None = None
    elapsed_us: int  # from sending until the answer, or until giving up
    application: Application | None = None
    tries: int | None = None  # source ports until the endpoint that was asked for was chosen

    @property
    def delivered(self) -> bool:
        """Whether it arrived and the answer came back."""
        return self.disposition == "delivered"

    @property
    def rejected(self) -> bool:
        """Whether a reset or an ICMP error came back."""
        return self.disposition == "rejected"

    @property
    def dropped(self) -> bool:
        """Whether nothing came back."""
        return self.disposition == "dropped"

    @property
    def endpoint(self) -> str | None:
        """Who received the probe: `namespace/name` of a pod, or a node's name."""
        return self.delivered_to.name if self.delivered_to else None

    @property
    def via(self) -> list[str]:
        """The nodes whose namespace it was seen in on its way there, in order, each once."""
        passed = (
            hop.node
            for hop in self.forward
            if hop.node and hop.namespace == namespace_name(self.lab, hop.node)
        )
        return list(dict.fromkeys(passed))

    @property
    def reason(self) -> str | None:
        """Why it was lost, as a code: "no-endpoints"."""
        return self.drop.reason if self.drop else None

    @property
    def lost_on(self) -> str | None:
        """The node that it was lost on, or whose pod it was lost in; None on the switch, too."""
        return self.drop.node if self.drop else None

    @property
    def rules(self) -> list[str]:
        """The texts of the rules that it met on its way there, in order."""
        steps = (step for hop in self.forward for step in hop.steps)
        return [step.rule for step in steps if isinstance(step, Rule) and step.rule]

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from netlab.report.html import trace_html

        return trace_html(self)


def encode(told: Data) -> bytes:
    """A trace, or what is told of several, as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(told), indent=2)


def encode_line(told: Data) -> bytes:
    """The same in one line, for a stream of them."""
    return msgspec.json.encode(told)
