"""What the declared lab alone says of a probe, before it is sent or after it was.

No kernel, no root and no rule is asked: a `Walker` walks through the network that is declared, with
what kube-proxy would do on each node.  It is a second opinion on what netlab builds and on what a
trace tells.
"""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import msgspec

from netlab.datapath.docker_names import RESOLVER
from netlab.problems import NetlabError, Problem
from netlab.topology.model import Endpoint, Lab
from netlab.trace import declared_docker
from netlab.trace.aim import Aim, Request, aim, in_lab
from netlab.trace.declared_network import UPLINK, DeclaredNetwork
from netlab.trace.declared_outside import host_of
from netlab.trace.family import IPV6
from netlab.trace.model import (
    Disposition,
    Foretold,
    PredictedHop,
    PredictedWay,
    Prediction,
    Probe,
    Receiver,
)
from netlab.trace.model_steps import OF_SERVICES, AnyStep, Deliver, Drop, Socket, Tuple
from netlab.trace.place import Place
from netlab.trace.predicted_hooks import Stop
from netlab.trace.predicted_path import Arrival, Walker
from netlab.trace.predicted_redirection import closed, joined
from netlab.trace.predicted_story import Role, relabelled
from netlab.trace.proxies import proxies, second_aim

MOST_WAYS = 32


def foretell(lab: Lab, request: Request) -> Foretold:
    """A probe that is not sent, and what should become of it.

    Raises NetlabError (exit code 2) if the request cannot be meant, or is of what is not predicted.
    """
    decided = aim(lab, request)
    why = unpredictable(lab, decided)
    if why:
        raise NetlabError(Problem("not-predicted", why, hint="trace it: `netlab trace`"))
    network = DeclaredNetwork(lab, decided.family)
    return Foretold(
        lab=lab.name,
        probe=Probe(
            from_=decided.source.name,
            to=decided.to,
            protocol=decided.protocol,
            source=Socket(ip=_source(network, decided), port=_port(decided)),
            destination=Socket(ip=decided.destination, port=decided.port),
        ),
        prediction=_by_proxies(lab, decided, predict(lab, decided)),
    )


def _by_proxies(lab: Lab, decided: Aim, first: Prediction) -> Prediction:
    """The same with what a proxy does that takes the connection: it opens one to each endpoint."""
    at = first.delivered_to
    proxy = next(
        (each for each in proxies(lab, decided) if at and each.place.name == at.name), None
    )
    if proxy is None:
        return first
    if not proxy.backends:
        return with_way(first, closed(first, proxy))
    network = DeclaredNetwork(lab, decided.family)
    ways: list[PredictedWay] = []
    receivers: list[Receiver] = []
    for address, port in proxy.backends[:MOST_WAYS]:
        to = Socket(ip=address, port=port)
        way, _ = _walk(network, second_aim(lab, proxy, to, decided.protocol), None)
        ways.append(joined(first, way, proxy, to))
        receivers.append(_receiver_at(network, Endpoint(address=address, port=port)))
    found = with_way(first, ways[0])
    return msgspec.structs.replace(found, endpoints=receivers, others=ways[1:])


def with_way(prediction: Prediction, way: PredictedWay) -> Prediction:
    """A prediction with another way in it."""
    fields = {name: getattr(way, name) for name in PredictedWay.__struct_fields__}
    return msgspec.structs.replace(prediction, **fields)


def unpredictable(lab: Lab, decided: Aim) -> str | None:
    """Why nothing is predicted for a probe; None if it is."""
    routers = [*lab.underlay.cidrs, *(cidr for node in lab.nodes for cidr in node.pod_cidrs)]
    if decided.family is IPV6 and decided.destination in {each.split("/")[0] for each in routers}:
        return (
            f"{decided.destination} is the address of any router of its network, and who answers, "
            "and from which address, is not predicted"
        )
    if decided.source.kind == "container" and decided.destination == RESOLVER:
        return "what a container's own name server makes of a question is not predicted"
    if decided.source.kind == "switch":
        return "what comes from outside is not predicted"
    if decided.ttl or decided.fragment:
        return "what a chosen TTL and fragments lead to is not predicted"
    if decided.source_address and decided.source_address not in decided.source.addresses:
        return f"{decided.source_address} is no address of {decided.source}"
    return None


def predict(
    lab: Lab, decided: Aim, taken: Socket | None = None, via: str | None = None
) -> Prediction:
    """What should become of a probe; `taken` is the endpoint that it went to, if it was sent.

    `via` is the node that a load balancer sent it to.

    Without it there is a way for each endpoint that its Service may choose, as far as they are no
    more than MOST_WAYS.  Only for what is not
    `unpredictable`.
    """
    network = DeclaredNetwork(lab, decided.family)
    first, offered = _walk(network, decided, taken, via)
    others = []
    if not taken:
        ends = [Socket(ip=each.address, port=each.port) for each in offered[1:MOST_WAYS]]
        others = [_walk(network, decided, each)[0] for each in ends]
    fields = {name: getattr(first, name) for name in first.__struct_fields__}
    return Prediction(
        **fields,
        endpoints=[_receiver_at(network, each) for each in offered],
        others=others,
        differs=[],
    )


def _walk(
    network: DeclaredNetwork, decided: Aim, choice: Socket | None, via: str | None = None
) -> tuple[PredictedWay, list[Endpoint]]:
    """The way by one endpoint, and all that may be chosen where one is chosen first."""
    walker = Walker(network, decided.protocol, decided.size or 0, choice, via)
    sent = Tuple(
        source=Socket(ip=_source(network, decided), port=_port(decided)),
        destination=Socket(ip=decided.destination, port=decided.port),
    )
    end = walker.send(decided.source, sent, "probe")
    offered = list(walker.hooks.offered[0][1]) if walker.hooks.offered else []
    if isinstance(end, Stop):
        return _stopped(walker, decided, sent, end), offered
    return _arrived(walker, decided, sent, end), offered


def _arrived(walker: Walker, decided: Aim, sent: Tuple, end: Arrival) -> PredictedWay:
    """It reached its destination's namespace: who listens there, and the way back."""
    receiver = _receiver(end)
    role: Role = "answer"
    if not _listens(walker.network, decided, end):
        role = "reset" if decided.protocol == "tcp" else "error"
    closed = role != "answer"
    loss: str | None = "port-closed" if closed else None
    forward = walker.story.end(Drop(reason="port-closed") if loss else Deliver(to=str(receiver)))
    back = walker.send(end.place, end.flow.reversed, role)
    came = isinstance(back, Arrival)
    where = str(end.place) if closed else None
    if isinstance(back, Stop) and not closed:
        loss, where = back.reason, str(back.place)
        if not walker.story.hops:
            # Nobody answers who knows no way to.
            forward = relabelled(forward, Drop(reason=loss))
    elif isinstance(back, Arrival) and not closed and back.flow != sent.reversed:
        came, loss, where = False, _astray(walker), str(back.place)
    reached = receiver if not closed and walker.story.hops else None
    disposition: Disposition = "dropped" if not came else "rejected" if closed else "delivered"
    last = Deliver(to=str(decided.source)) if came else Drop(reason=loss or "")
    return PredictedWay(
        disposition=disposition,
        reason=loss,
        limited=role == "error" and came,
        reason_unsaid=loss if role == "error" else None,
        where=where,
        delivered_to=reached,
        seen_source=end.flow.source if reached else None,
        translations=walker.story.translations,
        forward=forward,
        reply=walker.story.end(last),
    )


def _stopped(walker: Walker, decided: Aim, sent: Tuple, end: Stop) -> PredictedWay:
    """It ended on its way; an ICMP error may tell its source."""
    unsaid = _unsaid(end, walker, decided)
    hops = walker.story.end(Drop(reason=unsaid))
    told = False
    reply: list[PredictedHop] = []
    # Who waits for a MAC says so after seconds.
    if end.answered and end.reason != "neighbour-unresolved":
        lost = hops[-1] if hops else sent
        back_again = Tuple(source=lost.destination, destination=lost.source)
        back = walker.send(end.place, back_again, "error")
        told = isinstance(back, Arrival) and back.place == decided.source
        step: AnyStep = Deliver(to=str(decided.source)) if told else Drop(reason=unsaid)
        reply = walker.story.end(step)
    # What a rule refuses is known by the rule, a route only by what it says.
    reason = end.reason if told and end.reason == "no-route" else unsaid
    return PredictedWay(
        disposition="rejected" if told else "dropped",
        reason=reason,
        limited=told,
        reason_unsaid=unsaid if told else None,
        where=str(end.place),
        delivered_to=None,
        seen_source=None,
        translations=walker.story.translations,
        forward=relabelled(hops, Drop(reason=reason)),
        reply=reply,
    )


def _unsaid(end: Stop, walker: Walker, decided: Aim) -> str:
    """The reason in the words of a trace that saw no error come back."""
    lab, address = walker.network.lab, decided.destination
    if end.reason in ("no-such-service", "no-such-port"):
        return _missing(lab, decided)
    if end.reason != "no-route" or end.place.kind != "switch" or walker.story.translations:
        return end.reason
    if any(ip_address(address) in ip_network(cidr) for cidr in lab.service_cidrs):
        return _missing(lab, decided)
    return end.reason if in_lab(lab, address) else "outside-lab"


def _missing(lab: Lab, decided: Aim) -> str:
    """Why an address of a Service CIDR leads nowhere."""
    asked = decided.port, decided.protocol.upper()
    for service in lab.services:
        if decided.destination in service.cluster_ips:
            known = [(port.port, port.protocol) for port in service.ports]
            return "not-translated" if asked in known else "no-such-port"
    return "no-such-service"


def _astray(walker: Walker) -> str:
    """The answer came from another address than was asked."""
    translations = walker.story.translations
    turned = {each.node for each in translations if each.kind in OF_SERVICES and each.node}
    passed = {hop.node for hop in walker.story.hops if hop.node}
    return "not-masqueraded" if turned - passed else "answer-not-expected"


# --- ends ----------------------------------------------------------------------------------------


def _source(network: DeclaredNetwork, decided: Aim) -> str:
    """What the source sends from: an address of the device that its route names."""
    if decided.source_address:
        return decided.source_address
    place = decided.source
    if network.is_local(place, decided.destination):
        return decided.destination
    way = network.route(place, decided.destination)
    return network.address_on(place, way.device if way else UPLINK)


def _port(decided: Aim) -> int | None:
    return decided.source_port or None


def _receiver(end: Arrival) -> Receiver:
    place, destination = end.place, end.flow.destination
    if place.kind == "switch":
        return Receiver(
            kind="unknown", name=destination.ip, node=None, ip=destination.ip, port=destination.port
        )
    return Receiver(
        kind=place.kind,
        name=place.name,
        node=place.node,
        ip=destination.ip,
        port=destination.port,
    )


def _receiver_at(network: DeclaredNetwork, endpoint: Endpoint) -> Receiver:
    pod, node = network.pod_at(endpoint.address), network.node_at(endpoint.address)
    owner = pod or node
    host = next((each for each in network.lab.hosts if endpoint.address in each.addresses), None)
    if host and owner is None:
        ip, port = endpoint.address, endpoint.port
        return Receiver(kind="host", name=host.name, node=None, ip=ip, port=port)
    for container in network.lab.docker_containers:
        if owner is None and (container.node, container.address) == (
            endpoint.node,
            endpoint.address,
        ):
            return Receiver(
                kind="container",
                name=container.name,
                node=container.node,
                ip=endpoint.address,
                port=endpoint.port,
            )
    return Receiver(
        kind="pod" if pod else "node" if node else "unknown",
        name=pod.key if pod else node.name if node else endpoint.address,
        node=network.place_of(owner).node if owner else None,
        ip=endpoint.address,
        port=endpoint.port or None,
    )


def _listens(network: DeclaredNetwork, decided: Aim, end: Arrival) -> bool:
    """Whether something declared listens on the port; everybody answers a ping."""
    if decided.protocol == "icmp":
        return True
    asked = decided.protocol.upper(), end.flow.destination.port
    place: Place = end.place
    if place.kind == "pod":
        return asked in network.pod_of(place).listen
    if place.kind == "container":
        return asked in declared_docker.container_of(network.lab, place).listen
    if place.kind == "host":
        return asked in host_of(network.lab, place).listen
    if place.kind in ("switch", "gateway", "balancer"):
        return False
    if place in (each.place for each in proxies(network.lab, decided)):
        return True
    on_host = (p for p in network.lab.pods if p.host_network and p.node == place.node)
    if declared_docker.listens(network.lab, place.node, asked):
        return True
    return any(asked in pod.listen for pod in on_host) or any(
        ("TCP", service.health_check_node_port) == asked
        for service in network.lab.services
        if service.type == "LoadBalancer" and service.external_traffic_policy == "Local"
    )
