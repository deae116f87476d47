"""Who may take a probe's connection and open one of its own: proxies on nodes and in pods.

What a trace does with them is :mod:`netlab.trace.second_connection`.  A kind of proxy is a function
in `_KINDS`, which says for a probe that is aimed at something where it may be met by such a one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec

from netlab.topology.model import Lab
from netlab.trace.aim import MOST_NODES, Aim, Request, aim
from netlab.trace.family import family_of
from netlab.trace.form import Http
from netlab.trace.model import ProbeProtocol
from netlab.trace.model_steps import Socket
from netlab.trace.place import Place, place_of_node


class Proxy(msgspec.Struct, frozen=True):
    """A proxy that a probe may meet, and whom it opens connections to.

    `needs_request`: a connection alone does not make it open another one.
    """

    place: Place
    name: str  # of the program: "HAProxy"
    serves: str  # what it stands for: "svc/demo/myblog"
    backends: tuple[tuple[str, int], ...]
    needs_request: bool = False

    def __str__(self) -> str:
        return f"{self.name} of {self.place}"


def proxies(lab: Lab, decided: Aim) -> tuple[Proxy, ...]:
    """Those that may take a probe's connection, each in a place of its own; none: nobody does."""
    return tuple(proxy for kind in _KINDS for proxy in kind(lab, decided))


def second_aim(lab: Lab, proxy: Proxy, to: Socket, protocol: ProbeProtocol) -> Aim:
    """What a probe from a proxy to one of its backends would be."""
    place = proxy.place
    source = f"node/{place.name}" if place.kind == "node" else place.name
    return aim(lab, Request(source, str(to), None, protocol))


_Kind = Callable[[Lab, Aim], Iterator[Proxy]]
_PROGRAMS = {"tcp": "HAProxy", "udp": "nginx"}


def _of_userspace(lab: Lab, decided: Aim) -> Iterator[Proxy]:
    """In userspace mode the node that a packet for a Service comes to first has a proxy for it."""
    if (
        lab.service_proxy.mode != "userspace"
        or decided.protocol not in _PROGRAMS
        or not decided.service
    ):
        return
    service = next(each for each in lab.services if each.key == decided.service)
    protocol = decided.protocol.upper()
    by_node_port = any(decided.destination in node.addresses for node in lab.nodes)
    ports = [
        port
        for port in service.ports
        if port.protocol == protocol
        and decided.port == (port.node_port if by_node_port else port.port)
    ]
    backends = [
        (end.address, end.port)
        for port in ports
        for end in lab.endpoints_of(service, port)
        if end.ready and family_of(end.address) is decided.family
    ]
    if not ports:
        return
    first = [node for node in lab.nodes if node.name == decided.source.node]
    asked = [node for node in lab.nodes if decided.destination in node.addresses]
    for node in asked or first or lab.nodes[:MOST_NODES]:
        yield Proxy(
            place=place_of_node(lab, node),
            name=_PROGRAMS[decided.protocol],
            serves=f"svc/{service.key}",
            backends=tuple(dict.fromkeys(backends)),
        )


def _of_ingress(lab: Lab, aim: Aim) -> Iterator[Proxy]:
    """The controller's pods, for a request over HTTP whose host and path have endpoints."""
    if not isinstance(aim.application, Http):
        return
    pods = {pod.key: pod for pod in lab.pods if pod.ingress_controller}
    places = [place for place in aim.places if place.kind == "pod" and place.name in pods]
    if not places:
        return
    from netlab.trace.ingress import backend_for

    asked = Socket(ip=aim.destination, port=None if aim.port == 80 else aim.port)
    host = aim.application.host or str(asked)
    found = backend_for(lab, host, aim.application.path)
    service = next((s for s in lab.services if found and s.key == found[1].service), None)
    if found is None or service is None or found[1].port is None:
        return
    ingress, backend = found
    port = next(each for each in service.ports if each == backend.port)
    first = next(iter(service.ip_families or lab.families))
    if first != aim.family.name:
        return  # a connection of the other family, which the witnesses of this one do not see
    ends = [
        (end.address, end.port)
        for end in lab.endpoints_of(service, port)
        if end.ready and family_of(end.address) is aim.family
    ]
    for place in places if ends else ():
        yield Proxy(
            place=place,
            name="nginx",
            serves=f"Ingress {ingress.key} and svc/{service.key}",
            backends=tuple(dict.fromkeys(ends)),
            needs_request=True,
        )


_KINDS: tuple[_Kind, ...] = (_of_userspace, _of_ingress)
