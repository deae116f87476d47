"""Losses that something came back of: a TCP reset, an ICMP error."""

from __future__ import annotations

from netlab.datapath.overlays import tunnel_from
from netlab.trace.case import Case, first_back, last_seen
from netlab.trace.doubts import NO_ROUTE_FIX, up_again
from netlab.trace.endings import unheard
from netlab.trace.family import IPV4, IPV6
from netlab.trace.model import Leg, Loss
from netlab.trace.place import Place
from netlab.trace.refusals import Doubt
from netlab.trace.virtual_refusals import empty_server
from netlab.trace.witnesses.packets import Sighting

# Fewer routers than this are between any two ends.
_ENOUGH_TTL = 16


def came_back(case: Case) -> list[str]:
    """What came back, in words."""
    found = []
    for role, words in (("refusal", "a TCP reset"), ("error", _icmp(case))):
        first = first_back(case, role)
        if first:
            packet = first[0].packet
            kind = f" {packet.icmp}" if packet.icmp else ""
            found.append(f"{words}{kind} from {packet.src}, sent by {first[0].place}")
    for each in case.story.complaints[:1]:
        packet = each.packet
        found.append(
            f"{_icmp(case)} {packet.icmp} from {packet.src}, sent by {each.place} to "
            f"{packet.dst}, about the answer"
        )
    return found


def _icmp(case: Case) -> str:
    return "ICMPv6" if case.aim.family is IPV6 else "ICMP"


def by_refusal(case: Case) -> Loss | None:
    """A TCP reset."""
    first = first_back(case, "refusal")
    if first is None:
        return None
    sighting, chapter = first
    port = chapter.begin.source.port
    doubt = unheard(case, sighting.place, port) or Doubt(
        "port-closed", f"nothing listens on TCP port {port} there", _listen(case, port)
    )
    return Loss(
        direction="forward",
        node=sighting.place.node,
        device=sighting.device,
        reason=doubt.reason,
        where=str(sighting.place),
        rule=None,
        evidence=came_back(case),
        explanation=f"the SYN reached {sighting.place}, whose kernel answered with a reset: "
        f"{doubt.words}",
        fix=doubt.fix,
    )


def _listen(case: Case, port: int | None) -> str:
    if case.aim.service:
        return f"start what should listen on port {port}, or correct the Service's targetPort"
    return f"start what should listen on port {port}, or trace another port"


_ERRORS = {
    "net-unreachable": ("no-route", "has no route to {destination}"),
    "no-route": ("no-route", "has no route to {destination}"),
    "host-unreachable": ("host-unreachable", "cannot reach {destination} on its link"),
    "address-unreachable": ("host-unreachable", "cannot reach {destination} on its link"),
    "port-unreachable": ("port-closed", "has nothing that listens on {protocol} port {port}"),
    "protocol-unreachable": ("protocol-unreachable", "does not speak {protocol}"),
    "unknown-next-header": ("protocol-unreachable", "does not speak {protocol}"),
    "fragmentation-needed": ("mtu", "cannot pass on {length} bytes in one piece"),
    "packet-too-big": ("mtu", "cannot pass on {length} bytes in one piece"),
    "time-exceeded": ("ttl", "found the {lifetime} used up"),
}


def by_error(case: Case) -> Loss | None:
    """An ICMP error, about the probe or about its answer."""
    first = first_back(case, "error")
    leg: Leg = "forward"
    if first:
        sighting = first[0]
    elif case.story.complaints:
        leg, sighting = "reply", case.story.complaints[0]
    else:
        return None
    place = sighting.place
    kind = sighting.packet.icmp or "error"
    last = last_seen(case, leg) if case.story.leg(leg) else None
    at_tunnel = last and last.packet.outer and last.direction == "in"
    reason, words = _ERRORS.get(kind, (kind, f"sent {_icmp(case)} {kind}"))
    port = last.packet.dport if last else case.aim.port
    fact = words.format(
        destination=last.packet.dst if last else case.aim.destination,
        protocol=case.aim.protocol.upper(),
        port=port,
        length=last.packet.length if last else case.aim.size or 0,
        lifetime="hop limit" if case.aim.family is IPV6 else "time to live",
    )
    fix = _listen(case, port) if reason == "port-closed" else None
    if reason == "no-route":
        fix = NO_ROUTE_FIX
    if reason == "mtu" and last:
        fact, fix = _too_large(case, place, last, fact)
    if reason == "ttl" and case.story.forward and leg == "forward":
        fact, fix = _out_of_time(case, fact)
    if kind == "port-unreachable" and (doubt := empty_server(case, place)):
        reason, fact, fix = doubt
    if kind == "port-unreachable" and last and last.packet.outer and at_tunnel:
        reason = "tunnel-closed"
        outer, version = last.packet.outer, case.aim.family.version
        tunnel, _ = tunnel_from(case.lab, place.node or "", outer.src, version)
        fact = f"does not listen on VXLAN port {outer.dport}: its {tunnel} is down or missing"
        fix = up_again(place, tunnel, case.aim.family)
        if case.aim.family is IPV4:
            fix += ", or `netlab up`"
    return Loss(
        direction=leg,
        node=place.node,
        device=last.device if last and last.place == place else sighting.device,
        reason=reason,
        where=str(place),
        rule=None,
        evidence=came_back(case),
        explanation=f"{place} {fact}" if leg == "forward" else f"of the answer, {place} {fact}",
        fix=fix,
    )


def _too_large(case: Case, place: Place, last: Sighting, fact: str) -> tuple[str, str | None]:
    route = case.tables.route(place, last.packet.dst)
    link = case.tables.link(place, route.device) if route and route.device else None
    if link is None or link.mtu >= last.packet.length:
        return fact, None
    return (
        f"{fact}: {link.name} takes {link.mtu}",
        f"send no more than {link.mtu} bytes, or `ip -n {place.namespace} link set {link.name} mtu "
        f"{last.packet.length}` if what is behind it takes that; `netlab up` sets a lab's own",
    )


def _out_of_time(case: Case, fact: str) -> tuple[str, str]:
    """Sent with too little, or in a circle."""
    source, first = case.aim.source, case.story.forward[0].passage.after
    assert first is not None
    if case.aim.ttl:
        return f"{fact}, which was {case.aim.ttl} as asked for", "trace with a larger --ttl"
    if first.packet.ttl >= _ENOUGH_TTL:
        return (
            f"{fact}, which was {first.packet.ttl} at first: it went in a circle",
            "look where the nodes' routes send it: the route steps above tell",
        )
    if case.aim.family is IPV6:
        setting = f"net.ipv6.conf.{first.device}.hop_limit"
    else:
        setting = "net.ipv4.ip_default_ttl"
    return (
        f"{fact}, which was {first.packet.ttl} as {source} sent it",
        f"`ip netns exec {source.namespace} sysctl {setting}=64`",
    )
