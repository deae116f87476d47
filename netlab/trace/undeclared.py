"""What a trace saw that is not as declared: the objects, in sentences.

First come entries of tables that the packet met, each compared with the declared one; then the
endpoint, the loss and the translations; the hops last, and only if nothing else explains them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

from netlab.datapath.overlay import vtep_mac
from netlab.topology.model import Lab
from netlab.trace.aim import Aim
from netlab.trace.declared_network import NOWHERE, DeclaredNetwork, Way
from netlab.trace.model import Hop, Leg, PredictedHop, Prediction, Trace, Translation
from netlab.trace.model_steps import OF_SERVICES, Bridge, Encapsulate, Neighbour, Route, Socket
from netlab.trace.place import Place, place_of_balancer

# Waiting for a MAC ends with an ICMP error, or before.
_UNRESOLVED = ("neighbour-unresolved", "host-unreachable")

# What is wrong where the reason is another than expected.
_OBJECTS = {
    "forwarding-off": "forwarding",
    "reverse-path": "the way back to the source, or rp_filter,",
    "martian": "an address of the namespace",
    "address-missing": "an address of the namespace",
    "link-down": "a link",
    "node-stopped": "a machine that is off",
    "mtu": "the MTU of a link",
    "ttl": "the TTL that packets begin with",
    "port-closed": "what listens",
    "accept-queue-full": "what listens",
    "arp-ignored": "the answer to ARP",
    "hairpin-off": "hairpin mode of a bridge port",
    "bridge-netfilter-off": "bridge netfilter",
    "not-masqueraded": "masquerading",
    "stale-conntrack": "a remembered connection",
    "conntrack-invalid": "what connection tracking knows",
    "conntrack-full": "what connection tracking has room for",
    "conntrack-clash": "translation of the source",
    "vni-unknown": "the VNI of a tunnel",
    "tunnel-closed": "a tunnel",
    "underlay-blocked": "the network between the nodes",
    "ipv6-off": "IPv6",
    "no-endpoints": "the rules' set of endpoints",
    "no-local-endpoints": "the rules' set of endpoints",
    "not-translated": "the rules for the Service",
    "dropped-by-rule": "a rule",
    "egress-policy": "a NetworkPolicy's rules",
    "ingress-policy": "a NetworkPolicy's rules",
    "unknown-to-gateway": "masquerading",
    "no-healthy-node": "the nodes that a load balancer finds healthy",
    "not-balanced": "a load balancer's rules",
    "rejected-by-rule": "a rule",
    "neighbour-unresolved": "a neighbour",
    "neighbour-wrong": "a neighbour entry",
    "fdb-missing": "the FDB of a bridge",
    "host-unreachable": "a neighbour",
    "no-route": "a route",
    "xfrm-policy": "an IPsec policy",
    "echo-ignored": "the answer to pings",
    "blackhole": "a route",
    "unreachable": "a route",
    "prohibit": "a route",
}

# Of these the object is not where the packet was seen last.
_FURTHER_ON = ("link-down", "address-missing", "arp-ignored")


def undeclared(lab: Lab, decided: Aim, trace: Trace, expected: Prediction) -> list[str]:
    """Sentences on what a trace saw that is not as predicted; none if all is.

    `lab` is the declared one.  Nothing is said of what could not be observed.
    """
    if trace.disposition == "unobserved":
        return []
    network = DeclaredNetwork(lab, decided.family)
    found = list(dict.fromkeys(_tables(network, decided, trace, expected)))
    found += _endpoint(trace, expected)
    found += _ending(network, decided, trace, expected, found)
    if not found:
        found += _translations(trace.translations, expected.translations)
    if not found:
        found += _receiver(trace, expected)
    if not found and trace.witnesses.packets == "ok":
        found += _hops("forward", trace.forward, expected.forward)
        # Of errors it is not sure that they come.
        if expected.reason not in _UNRESOLVED and not _is_unsaid(trace, expected):
            found += _hops("reply", trace.reply, expected.reply)
    return found


def taken_endpoint(trace: Trace) -> Socket | None:
    """The endpoint that a trace's packet was first sent to instead of its destination."""
    return next((each.after for each in _by_nodes(trace)), None)


def taken_node(lab: Lab, trace: Trace) -> str | None:
    """The node that a load balancer sent a trace's packet to."""
    boxes = {place_of_balancer(lab, box).namespace for box in lab.balancers}
    behind = itertools.dropwhile(lambda hop: hop.namespace not in boxes, trace.forward)
    return next((hop.node for hop in behind if hop.node), None)


def _by_nodes(trace: Trace) -> Iterator[Translation]:
    """What service proxies translated; a load balancer is no node."""
    return (each for each in trace.translations if each.kind in OF_SERVICES and each.node)


# --- tables --------------------------------------------------------------------------------------


def _tables(
    network: DeclaredNetwork, decided: Aim, trace: Trace, expected: Prediction
) -> Iterator[str]:
    places = {place.namespace: place for place in decided.places}
    for hop in (*trace.forward, *trace.reply):
        place = places.get(hop.namespace)
        if place is None or place.kind == "switch":
            continue
        for step in hop.steps:
            if isinstance(step, Route):
                # (in ipvs mode each node has the addresses of Services that others ask from)
                if step.type != expected.reason:
                    yield from _route(network, place, step, hop.packet.src)
            elif isinstance(step, Neighbour):
                yield from _neighbour(network, place, step)
            elif isinstance(step, Bridge) and network.is_tunnel(place, step.device):
                yield from _fdb(network, place, step)
            elif isinstance(step, Encapsulate):
                peer = network.node_at(step.remote)
                vni = network.vni(place, peer) if peer else step.vni
                if step.vni != vni:
                    yield f"{step.device} of {place} is of VNI {step.vni}; declared is {vni}"


def _route(network: DeclaredNetwork, place: Place, step: Route, source: str) -> Iterator[str]:
    if network.is_local(place, step.destination):
        return
    if place.kind == "balancer" and step.via and network.node_at(step.via):
        return  # the choice of a node, which the hops tell
    due = _due(network, place, step.destination, source)
    declared = _declared(due)
    if step.type == "reverse-path":
        back = _declared(_due(network, place, source, step.destination))
        yield f"{place}'s route back to {source} is not that by which this came; {back}"
    elif step.type == "forwarding-off":
        yield f"forwarding on {place} is off; declared is on"
    elif (None if step.refuses else (step.device, step.via)) != (due and (due.device, due.via)):
        yield f"{place}'s route to {step.destination}: {step}; {declared}"


def _due(network: DeclaredNetwork, place: Place, destination: str, source: str) -> Way | None:
    """The declared route; None also if it is one that leads nowhere."""
    way = network.route(place, destination, source)
    return None if way and way.device == NOWHERE else way


def _declared(due: Way | None) -> str:
    if due is None:
        return "none is declared"
    way = f"via {due.via} dev {due.device}" if due.via else f"dev {due.device}"
    return f"declared is {due.matched} {way}"


def _neighbour(network: DeclaredNetwork, place: Place, step: Neighbour) -> Iterator[str]:
    """Entries for tunnel ends, where they are declared; all others are learned."""
    if network.overlay == "vxlan-multicast" or not network.is_tunnel(place, step.device):
        return
    peer = next((n for n in network.lab.nodes if step.address in n.overlay_addresses), None)
    due = vtep_mac(peer, network.family.version) if peer else None
    if due and step.mac != due:
        assert peer is not None
        is_now = f"is {step.mac}" if step.mac else "is missing"
        yield (
            f"{place}'s neighbour entry for node {peer.name}'s tunnel end, {step.address} on "
            f"{step.device}, {is_now}; declared is {due}"
        )


def _fdb(network: DeclaredNetwork, place: Place, step: Bridge) -> Iterator[str]:
    version = network.family.version
    peer = next((n for n in network.lab.nodes if vtep_mac(n, version) == step.mac), None)
    if peer is None or network.overlay != "vxlan":
        return
    due = network.address_on(network.place_of(peer), "eth0")
    if step.remote != due:
        is_now = f"leads to {step.remote}" if step.remote else "is missing"
        yield (
            f"{place}'s FDB entry for node {peer.name}, {step.mac} on {step.device}, {is_now}; "
            f"declared is {due}"
        )


# --- what became of it ---------------------------------------------------------------------------


def _endpoint(trace: Trace, expected: Prediction) -> Iterator[str]:
    taken = taken_endpoint(trace)
    due = [Socket(ip=each.ip, port=each.port) for each in expected.endpoints]
    # (which port of a node its proxy listens on is not declared)
    is_due = any(taken == each or each == Socket(ip=taken.ip) for each in due) if taken else True
    if taken and not is_due:
        node = next(each.node for each in _by_nodes(trace))
        among = f"declared are {_listed(due)}" if due else "declared is no translation"
        yield f"node {node} sent it to {taken}; {among}"


def _listed(ends: Sequence[Socket]) -> str:
    shown = ", ".join(str(each) for each in ends[:5])
    return shown if len(ends) <= 5 else f"{shown} and {len(ends) - 5} more"


def _ending(
    network: DeclaredNetwork,
    decided: Aim,
    trace: Trace,
    expected: Prediction,
    found: Sequence[str],
) -> Iterator[str]:
    """What became of it otherwise than it should; of what object, if none was found yet."""
    loss = trace.drop
    reason = loss.reason if loss else None
    if reason == expected.reason and trace.disposition == expected.disposition:
        return
    if reason in _UNRESOLVED and expected.reason in _UNRESOLVED:
        return
    if _is_unsaid(trace, expected) and reason == expected.reason_unsaid:
        return
    was = f"{trace.disposition} ({_words(reason)})" if reason else trace.disposition
    if expected.reason:
        how = f"{expected.disposition} at {expected.where} ({_words(expected.reason)})"
    else:
        how = f"{expected.disposition} to {expected.delivered_to}"
    ending = f"it should have been {how}, and was {was}"
    thing = None if found else _object(network, decided, trace, expected)
    yield f"{thing}: {ending}" if thing else ending


def _object(
    network: DeclaredNetwork, decided: Aim, trace: Trace, expected: Prediction
) -> str | None:
    """What is wrong by the reason of a loss, where, and what of it is declared."""
    loss = trace.drop
    thing = _OBJECTS.get(loss.reason) if loss else None
    if loss is None or thing is None:
        return None
    declared = None
    if loss.reason == "mtu":
        declared = _declared_mtu(network, decided, trace)
    elif loss.reason == "address-missing":
        declared = _declared_address(decided, trace)
    elif loss.reason == "not-translated" and expected.endpoints:
        ends = [Socket(ip=each.ip, port=each.port) for each in expected.endpoints]
        declared = f"is a translation to {_listed(ends)}"
    near = "behind" if loss.reason in _FURTHER_ON else "at"
    return f"{thing} ({near} {loss.where}{f'; declared {declared}' if declared else ''})"


def _last(trace: Trace) -> Hop | None:
    assert trace.drop is not None
    leg = trace.forward if trace.drop.direction == "forward" else trace.reply
    return leg[-1] if leg else None


def _declared_mtu(network: DeclaredNetwork, decided: Aim, trace: Trace) -> str | None:
    """Of the device that it was to leave by."""
    last = _last(trace)
    place, device = decided.source, "eth0"
    if last:
        place = next((each for each in decided.places if each.namespace == last.namespace), place)
        routes = [step.device for step in last.steps if isinstance(step, Route)]
        device = next((each for each in reversed(routes) if each), last.device)
    return f"are {network.mtu(place, device)} bytes on {device} of {place}"


def _declared_address(decided: Aim, trace: Trace) -> str | None:
    """Of who should have taken it, or told its MAC."""
    last = _last(trace)
    if last is None:
        return None
    sought = [step.address for step in last.steps if isinstance(step, Neighbour) and not step.mac]
    sought.append(last.packet.outer.dst if last.packet.outer else last.packet.dst)
    for address in sought:
        for place in decided.places:
            if address in place.addresses:
                return f"is {address} on {place}"
    return None


def _words(reason: str) -> str:
    return reason.replace("-", " ")


def _is_unsaid(trace: Trace, expected: Prediction) -> bool:
    """Whether only an ICMP error did not come, of which the kernel sends few."""
    return expected.limited and trace.disposition == "dropped" and not trace.reply


def _receiver(trace: Trace, expected: Prediction) -> Iterator[str]:
    if trace.delivered_to != expected.delivered_to:
        yield f"{trace.delivered_to} received it; declared is {expected.delivered_to}"
    elif trace.seen_source and not _is(trace.seen_source, expected.seen_source):
        yield (
            f"{trace.delivered_to} saw {trace.seen_source} as its source; declared is "
            f"{expected.seen_source}"
        )


def _translations(seen: Sequence[Translation], due: Sequence[Translation]) -> Iterator[str]:
    found = [_change(each) for each in seen]
    wanted = [_change(each) for each in due]
    for each in wanted:
        if each not in found:
            node, kind, to = each
            yield f"node {node} did not do the {kind} to {to} that is declared"
    for each, one in zip(found, seen, strict=True):
        # Where another connection has the port, the kernel takes the next one: nf_nat_used_tuple().
        only_port = one.kind not in OF_SERVICES and one.before.ip == one.after.ip
        if each not in wanted and not only_port:
            node, kind, to = each
            by = f", by {one.rule}" if one.rule else ""
            yield f"node {node} did a {kind} to {to}{by}; none is declared"


def _change(translation: Translation) -> tuple[str | None, str, str]:
    """Ports are those of DNAT: the kernel chooses them when it masquerades."""
    source = translation.kind in ("snat", "masquerade")
    kind = "masquerade" if source else translation.kind
    after = translation.after
    return translation.node, kind, after.ip if source else str(after)


# --- hops ----------------------------------------------------------------------------------------


def _hops(leg: Leg, seen: Sequence[Hop], due: Sequence[PredictedHop]) -> Iterator[str]:
    """The first hop of a leg that is not the predicted one."""
    rest = list(seen)
    way = "on its way there" if leg == "forward" else "on its way back"
    last = "at its source"
    for hop in due:
        found = rest[0] if rest else None
        if found is None or _key(found) != _key(hop):
            if not hop.sure:
                continue
            was = f"it was seen {_where(found)}" if found else "it was not seen again"
            yield f"{way}, after it was {last}, it should have been {_where(hop)}; {was}"
            return
        del rest[0]
        last = _where(found)
        # How far the frame is translated on a bridge's own device is the bridge's business.
        if hop.sure:
            yield from (f"{way}, {last}, {words}" for words in _ends(found, hop))
    if rest:
        yield f"{way}, it was seen {_where(rest[0])}; it should have ended {last}"


def _key(hop: Hop | PredictedHop) -> tuple[str, str, str]:
    return hop.namespace, hop.device, hop.direction


def _where(hop: Hop | PredictedHop) -> str:
    place = hop.namespace.partition(":")[2].replace(":", "/")
    return f"going {hop.direction} on {hop.device} of {place}"


def _ends(seen: Hop, due: PredictedHop) -> Iterable[str]:
    flow, outer = seen.packet.flow, seen.packet.outer
    if not (_is(flow.source, due.source) and _is(flow.destination, due.destination)):
        yield f"it was {flow}; it should have been {due.source} → {due.destination}"
    if str(outer) != str(due.outer):
        carried = f"carried {outer}" if outer else "carried by nothing"
        yield f"it was {carried}; it should have been carried {due.outer or 'by nothing'}"


def _is(seen: Socket, due: Socket | None) -> bool:
    """Whether an end is as predicted, as far as it is."""
    if due is None:
        return False
    return due.ip in ("", seen.ip) and (due.port is None or due.port == seen.port)
