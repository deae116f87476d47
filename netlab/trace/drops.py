"""What the kernel says of a packet that it gave up, beside what else was found.

Other findings know the rule, the table and the way to mend it, so they go first, and the kernel's
word is evidence.  Where they know nothing it is the answer.  Where it means something else than
they say, both are told.

Source of the reasons: include/net/dropreason-core.h.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from netlab.trace.case import Case
from netlab.trace.doubts import neighbour_fix
from netlab.trace.model import Leg, Loss
from netlab.trace.place import place_of_node
from netlab.trace.queues import lossy_devices
from netlab.trace.witnesses.kernel import Moment

_BY_RULE = (
    "dropped-by-rule",
    "rejected-by-rule",
    "no-endpoints",
    "no-local-endpoints",
    "no-such-service",
    "no-such-port",
    "conntrack-invalid",
    "conntrack-full",
    "conntrack-clash",
    "underlay-blocked",
    "egress-policy",
    "ingress-policy",
    "unknown-to-gateway",
    "uninvited",
    "no-healthy-node",
    "not-balanced",
)
_STRAY = ("answer-not-expected", "not-masqueraded", "bridge-netfilter-off")
_NO_ROUTE = (
    "no-route",
    "outside-lab",
    "fdb-wrong",
    "stale-conntrack",
    "blackhole",
    "unreachable",
    "prohibit",
    "host-unreachable",
    # A cluster IP that nothing translates has no route.
    "no-such-service",
    "no-such-port",
    "not-translated",
)
_NEIGHBOUR = (
    "neighbour-unresolved",
    "arp-ignored",
    "stale-conntrack",
    "address-missing",
    "link-down",
    "node-stopped",
    "host-unreachable",
)


class _Meaning(NamedTuple):
    """Codes that say the same, this reason's own first, and words behind the place."""

    codes: tuple[str, ...]
    words: str
    fix: str | None = None


def _martian(words: str) -> _Meaning:
    return _Meaning(("martian",), f"took its {words} (a martian)")


def _neighbour(words: str) -> _Meaning:
    return _Meaning(_NEIGHBOUR, words, "{neighbour_fix}")


def _checksum(header: str) -> _Meaning:
    return _Meaning(("bad-checksum",), f"found a wrong {header} checksum in it")


_FULL = "make the receiver read faster, or its buffer larger (net.core.rmem_max)"

_MEANINGS = {
    "NETFILTER_DROP": _Meaning(
        _BY_RULE,
        "dropped it by a netfilter rule, one that reports no trace",
        "look for it with `ip netns exec {namespace} nft list ruleset`, and with iptables-legacy",
    ),
    "IP_RPFILTER": _Meaning(
        ("reverse-path",),
        "would send the answer out of another device (rp_filter)",
        "`ip netns exec {namespace} sysctl net.ipv4.conf.all.rp_filter=0`, or correct the route "
        "to the source",
    ),
    "IP_OUTNOROUTES": _Meaning(_NO_ROUTE, "has no route for it"),
    "IP_INNOROUTES": _Meaning(_NO_ROUTE, "has no route for it"),
    "IP_INADDRERRORS": _Meaning(
        ("forwarding-off", *_NO_ROUTE, "address-missing"),
        "is not its destination and may not pass it on: no route, or forwarding is off",
        "`ip netns exec {namespace} sysctl -w {forwarding}=1`, or `netlab up`",
    ),
    "IPV6DISABLED": _Meaning(
        ("ipv6-off",),
        "has IPv6 switched off on the device that it came in by",
        "`ip netns exec {namespace} sysctl net/ipv6/conf/{device}/disable_ipv6=0`, and `netlab up`",
    ),
    "IP_INVALID_SOURCE": _martian("source address for impossible"),
    "IP_INVALID_DEST": _martian("destination address for impossible"),
    "IP_LOCALNET": _martian("loopback address for impossible outside"),
    "IP_LOCAL_SOURCE": _martian("source address for its own"),
    "IP_INHDR": _Meaning(("ttl",), "found its IP header faulty, or its time to live used up"),
    "PKT_TOO_BIG": _Meaning(("mtu",), "cannot pass it on in one piece"),
    "NEIGH_FAILED": _neighbour("got no MAC for the next hop"),
    "NEIGH_CREATEFAIL": _neighbour("could make no entry for the next hop: its table is full"),
    "NEIGH_QUEUEFULL": _neighbour("had too many packets waiting for the next hop's MAC"),
    "NEIGH_DEAD": _neighbour("lost the entry of the next hop"),
    "NO_SOCKET": _Meaning(
        ("port-closed", "tunnel-closed", *_STRAY), "has no socket for it: nothing listens there"
    ),
    "NO_TX_TARGET": _Meaning(
        ("fdb-missing", "neighbour-wrong"),
        "does not know which node to send it to (no FDB entry)",
        "`netlab up` puts the entries back",
    ),
    "VXLAN_VNI_NOT_FOUND": _Meaning(
        ("vni-unknown",),
        "has no VXLAN device with the VNI that it came with",
        "give both ends the same VNI: `netlab up` makes the device again",
    ),
    "VXLAN_INVALID_HDR": _Meaning(("vxlan-header",), "found its VXLAN header faulty"),
    "BRIDGE_INGRESS_STP_STATE": _Meaning(
        ("port-blocked",),
        "has the port blocked that it came in by",
        "`bridge -n {namespace} link set dev {device} state 3`",
    ),
    "BRIDGE_NO_EGRESS_PORT": _Meaning(
        ("no-egress-port", "hairpin-off"),
        "has no other port to send it out of",
        "if it should go back where it came from: "
        "`bridge -n {namespace} link set dev {device} hairpin on`",
    ),
    "DEV_READY": _Meaning(("link-down",), "has the device down that it should leave by"),
    "SOCKET_RCVBUFF": _Meaning(("socket-full",), "found the socket's buffer full", _FULL),
    "SOCKET_BACKLOG": _Meaning(("socket-full",), "found the socket's backlog full", _FULL),
    "QDISC_DROP": _Meaning(("queue-drop",), "dropped it in the queue of the device"),
    "FULL_RING": _Meaning(("queue-drop",), "found the device's queue full"),
    "XFRM_POLICY": _Meaning(
        ("xfrm-policy",),
        "has an IPsec policy (xfrm) that lets it through with IPsec alone, or not at all",
        "`ip -n {namespace} xfrm policy` shows the policies",
    ),
    "IP_CSUM": _checksum("IP"),
    "TCP_CSUM": _checksum("TCP"),
    "UDP_CSUM": _checksum("UDP"),
    "ICMP_CSUM": _checksum("ICMP"),
}
# Of a queue that is told to lose packets the kernel says the same as of a full one.
_LOSSY = _Meaning(
    ("loss",),
    "lost it in the queue of {device}: netem is set to lose packets there",
    "`tc -s -n {namespace} qdisc show dev {device}` shows how many; if that is not meant, "
    "`tc -n {namespace} qdisc del dev {device} root`",
)
# The probe's own socket is closed by then.
_LATE = _Meaning(
    ("late",),
    "got the answer after the probe had given up waiting for it",
    "wait longer (`--timeout`); if it is late each time, look for what delays it: questions for "
    "MACs that are asked again after a second, or a queue",
)
_UNKNOWN = ("unknown", "no-answer")
_UNANSWERED = ("neighbour-unresolved", "host-unreachable")


def with_kernel(loss: Loss, case: Case) -> Loss:
    """A loss with what the kernel said of it."""
    if loss.reason in (*_UNANSWERED, *_UNKNOWN):
        loss = _with_lossy_devices(loss, case)
    word = _last_word(loss.direction, case)
    if word is None:
        return loss
    meaning = _MEANINGS.get(word.reason or "") or _Meaning(
        (str(word.reason).lower().replace("_", "-"),),
        f"gave it up: {word.reason} in {word.code}",
    )
    if meaning.codes == ("queue-drop",) and word.device in lossy_devices(word.place):
        meaning = _LOSSY
    if word.reason == "NO_SOCKET" and word.role == "answer" and word.place == case.aim.source:
        meaning = _LATE
    if loss.reason in _UNKNOWN and word.reason != "NOT_SPECIFIED":
        return _said(word, meaning, loss, case)
    differs = word.reason in _MEANINGS and loss.reason not in (*meaning.codes, *_UNKNOWN)
    note = f"{word}, which means something else" if differs else str(word)
    return msgspec.structs.replace(loss, evidence=[*loss.evidence, note])


def _with_lossy_devices(loss: Loss, case: Case) -> Loss:
    """What may have been lost is the question for a MAC, or its answer."""
    place = next(
        (place_of_node(case.lab, node) for node in case.lab.nodes if node.name == loss.node), None
    )
    notes = [
        f"the queue of {device} on {place} is set to lose packets (netem), and so questions for "
        "MACs and answers to them"
        for device in (lossy_devices(place) if place else ())
    ]
    return msgspec.structs.replace(loss, evidence=[*loss.evidence, *notes])


def _said(word: Moment, meaning: _Meaning, loss: Loss, case: Case) -> Loss:
    """The loss that only the kernel knows of."""
    place = word.place
    family = case.aim.family
    fill = {
        "namespace": place.namespace,
        "device": word.device or "DEVICE",
        "neighbour_fix": neighbour_fix(family),
        "forwarding": family.forwarding,
    }
    return msgspec.structs.replace(
        loss,
        direction=_leg(word, case),
        node=place.node,
        device=word.device or None,
        reason=meaning.codes[0],
        where=word.where,
        evidence=[str(word), *loss.evidence],
        explanation=f"{place} {meaning.words.format(**fill)}",
        fix=meaning.fix.format(**fill) if meaning.fix else None,
    )


def _last_word(leg: Leg, case: Case) -> Moment | None:
    """The last drop on a leg; where that has none, the last of the other."""
    losses = case.moments_of_loss
    on_leg = [moment for moment in losses if _leg(moment, case) == leg]
    found = on_leg or losses
    return found[-1] if found else None


def _leg(moment: Moment, case: Case) -> Leg:
    if moment.role == "either" and moment.packet:
        # An echo carries the same bytes: only its tuple tells it from the probe.
        flow = moment.packet.flow
        return "forward" if any(flow in (c.begin, c.end) for c in case.story.forward) else "reply"
    return "forward" if moment.role == "probe" else "reply"
