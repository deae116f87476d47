"""What a trace is: a probe, the hops of the packet there and back, and the steps between them.

Everything here is plain frozen data, written as JSON by :func:`encode` under the schema
`netlab.trace/v1` (docs/trace.md).  Keys are never taken away from it; fields that later work
fills are null until then.

A hop is one sight of the packet on one device.  Its steps are what the kernel did with the packet
between this sight and the next, in order; the last hop ends with what became of it (`deliver`,
`drop`).  A leg's first hop begins with the steps that brought the packet to its device.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from netlab.datapath.state import namespace_name
from netlab.trace.model_steps import AnyStep, Data, Packet, Rule, Socket, TunnelKind, vni_words

SCHEMA = "netlab.trace/v1"
PREDICTION_SCHEMA = "netlab.prediction/v1"

ProbeProtocol = Literal["tcp", "udp", "icmp"]
Disposition = Literal["delivered", "rejected", "dropped", "unobserved"]
Direction = Literal["in", "out"]
Leg = Literal["forward", "reply"]


class Hop(Data, frozen=True, kw_only=True):
    """One sight of the packet.  `node` is null outside nodes and pods."""

    node: str | None
    namespace: str  # file under /run/netns
    device: str
    direction: Direction
    t_ns: int  # since the first sight of the probe
    packet: Packet
    steps: list[AnyStep] = msgspec.field(default_factory=list)


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
    addresses: list[str] = msgspec.field(default_factory=list)  # DNS: those that the name has
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


class NameAsked(Data, frozen=True, kw_only=True):
    """A question for the destination's name, put by the sender before the probe.

    `answer` is the code of DNS, None if none came; `data` what the records say, an alias first.
    Of the last question, which was traced, `by` is who answered and `via` where it went.
    """

    name: str
    type: str
    server: str  # or /etc/hosts
    answer: str | None
    data: list[str] = msgspec.field(default_factory=list)
    elapsed_us: int | None = None
    by: Receiver | None = None
    via: list[str] = msgspec.field(default_factory=list)

    def __str__(self) -> str:
        said = ", ".join(self.data) or self.answer or "no answer"
        took = "" if self.elapsed_us is None else f", {self.elapsed_us / 1000:.1f} ms"
        way = f", by {self.by} ({' → '.join(self.via)})" if self.by else ""
        return f"{self.name} {self.type} from {self.server}: {said}{took}{way}"


class Receiver(Data, frozen=True, kw_only=True):
    """Who received the probe."""

    kind: Literal["pod", "node", "host", "container", "gateway", "balancer", "unknown"]
    name: str  # `namespace/name` of a pod
    node: str | None
    ip: str
    port: int | None

    def __str__(self) -> str:
        port = "" if self.port is None else f" port {self.port}"
        where = f" on {self.node}" if self.kind == "pod" and self.node else ""
        kind = "load balancer" if self.kind == "balancer" else self.kind
        return f"{kind} {self.name}{where}{port}"


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
    object: str | None = None  # that says so: "NetworkPolicy demo/db"


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
    tunnel: TunnelKind = "vxlan"

    def __str__(self) -> str:
        return f"{self.src} → {self.dst}{vni_words(self.tunnel, self.vni)}"


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
    steps: list[AnyStep] = msgspec.field(default_factory=list)


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
    connections: list[PredictedWay] | None = None  # those that proxies should open for it


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
    resolution: list[NameAsked] | None = None
    disposition: Disposition
    delivered_to: Receiver | None
    seen_source: Socket | None
    translations: list[Translation]
    drop: Loss | None
    forward: list[Hop]
    reply: list[Hop]
    connections: list[Trace] | None = None  # those that proxies on its way opened for it
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
