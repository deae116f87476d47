"""What became of a probe that arrived: who listens there, and where its answer went."""

from __future__ import annotations

from collections.abc import Iterator

from netlab.trace.case import Case, last_seen, rules
from netlab.trace.family import IPV6
from netlab.trace.model_steps import OF_SERVICES, Route, Socket, Tuple
from netlab.trace.place import Place
from netlab.trace.refusals import Doubt


def unheard(case: Case, place: Place, port: int | None) -> Doubt | None:
    """Why what came to a port is not heard there, as its sockets tell; or why a ping is not."""
    if case.aim.protocol == "icmp":
        return _echo_ignored(case, place)
    if port is None:
        return None
    protocol = case.aim.protocol.upper()
    target = case.story.forward[-1].end.destination.ip
    there = case.tables.listeners(place, case.aim.protocol, port) or []
    # A socket of IPv6 may hear IPv4 as well, but none the other way round.
    hears = {target, case.aim.family.unspecified, IPV6.unspecified}
    every = [each for each in there if each.address in hears]
    if there and not every:
        addresses = " and ".join(sorted({each.address for each in there}))
        return Doubt(
            "port-closed",
            f"what listens on {protocol} port {port} of {place} does so on {addresses} alone, and "
            f"this came to {target}",
            f"let it listen on {case.aim.family.unspecified}, or on {target}",
        )
    full = [each for each in every if each.is_full]
    if full:
        return Doubt(
            "accept-queue-full",
            f"what listens on {protocol} port {port} of {place} does not accept: its queue is full "
            f"({full[0].waiting} waiting, listen({full[0].room}))",
            f"find out why it does not: `ip netns exec {place.namespace} ss -ltn` shows the queue; "
            "a longer one (net.core.somaxconn, and the backlog of listen) only helps in a rush",
        )
    return None


def _echo_ignored(case: Case, place: Place) -> Doubt | None:
    setting = case.aim.family.echo_ignored
    if case.tables.setting(place, setting.replace(".", "/")) in ("0", None):
        return None
    return Doubt(
        "echo-ignored",
        f"{place} received it and answers no ping: {setting} is not 0",
        f"`ip netns exec {place.namespace} sysctl {setting}=0`",
    )


def stale(case: Case) -> tuple[Place, Doubt, str] | None:
    """A node that translated the destination by no rule, to what is no endpoint; the evidence."""
    service = next((each for each in case.lab.services if each.key == case.aim.service), None)
    if service is None:
        return None
    ends = {
        (end.address, end.port)
        for port in service.ports
        for end in case.lab.endpoints_of(service, port)
    }
    for place, flow, to in _unruled(case):
        if (to.ip, to.port) in ends:
            continue
        entry = (
            f"-p {case.aim.protocol} --orig-src {flow.source.ip} --orig-dst {flow.destination.ip} "
            f"--orig-port-src {flow.source.port} --orig-port-dst {flow.destination.port}"
        )
        doubt = Doubt(
            "stale-conntrack",
            f"{place} sent it to {to}, which is no endpoint of svc/{service.key}, and by no rule: "
            f"connection tracking remembers an earlier connection from {flow.source}",
            f"`ip netns exec {place.namespace} conntrack -D {entry}`, or send from another port",
        )
        return place, doubt, f"{flow.destination} became {to}, and no rule of nat was met"
    return None


def _unruled(case: Case) -> Iterator[tuple[Place, Tuple, Socket]]:
    """Where a destination was translated without a rule, whose, and to what."""
    for chapter, nat in case.story.nats("forward"):
        if nat.translation == "dnat" and nat.rule is None and chapter.passage.place:
            yield chapter.passage.place, chapter.begin, nat.after
    if case.story.nats("forward") or not case.story.forward:
        return
    # Translated, and seen no more.
    last, flow = last_seen(case, "forward"), case.story.forward[-1].begin
    ruled = any(rule.action.lower() == "dnat" for _, rule in rules(case, "forward"))
    if last.place.kind == "node" and not ruled:
        to = case.tables.remembered(last.place, case.aim.protocol, flow)
        if to and to != flow.destination:
            yield last.place, flow, to


def astray(case: Case) -> tuple[Place, Doubt] | None:
    """Where an answer was to get its source back, if it came to the client without."""
    for chapter, nat in case.story.nats("forward"):
        place = chapter.passage.place
        if nat.translation not in OF_SERVICES or place is None:
            continue
        back = [
            end.place
            for passage in (each.passage for each in case.story.reply)
            for end in (passage.before, passage.after)
            if end
        ]
        source = case.story.reply[-1].end.source
        what = f"the answer came from {source}, where {case.aim.destination} was asked"
        if place not in back:
            return place, Doubt(
                "not-masqueraded",
                f"{what}: {place} had translated the destination, and the answer went past it, "
                f"for {place} had not put itself in as the source",
                f"let {place} masquerade what it passes on: `netlab up` puts kube-proxy's rules "
                "back, with externalTrafficPolicy Local there is nothing to masquerade",
            )
        routed = any(
            isinstance(step, Route)
            for each in case.story.reply
            for step in each.steps
            if each.passage.place == place
        )
        if not routed and not case.tables.bridge_netfilter(place):
            setting = case.aim.family.bridge_netfilter
            return place, Doubt(
                "bridge-netfilter-off",
                f"{what}: the bridge of {place} passed it from port to port without connection "
                f"tracking, which knows the translation, since {setting} is 0",
                f"`ip netns exec {place.namespace} sysctl {setting}=1`, or `netlab up`",
            )
    return None
