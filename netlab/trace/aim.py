"""What a request means in a lab: who sends, to which address, who may receive, and where to watch.

A *place* is a network namespace of the lab.  The places on the way are the source, the nodes and
pods that may receive the probe, the nodes of all of these, and the underlay's switch.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Literal

import msgspec

from netlab.problems import NetlabError, Problem
from netlab.topology.model import Endpoint, Lab, Service, ServicePort
from netlab.topology.references import Reference, resolve
from netlab.trace.family import IPV4, IPV6, Family, family_of, first_of
from netlab.trace.form import (
    TRANSPORTS,
    AskedProtocol,
    Dns,
    Http,
    application,
    check_form,
    require_fields,
    sent_from,
)
from netlab.trace.model import ProbeProtocol
from netlab.trace.place import (
    Place,
    place_of_balancer,
    place_of_container,
    place_of_gateway,
    place_of_host,
    place_of_internet,
    place_of_node,
    place_of_pod,
    place_of_switch,
)
from netlab.trace.ports import named, port_of, protocol_of, require_one_port, service_of
from netlab.trace.url import is_url, meant

# Every watched namespace costs a packet socket; a pod's veth on its node is seen anyway.
MOST_PODS = 32
# Where any node may be on the way: each costs a table of rules, which takes milliseconds.
MOST_NODES = 8
DEFAULT_TIMEOUT_S = 0.8
# The kernel sends an unanswered SYN again after one second, and DNAT may then choose another way.
LONGEST_TCP_S = 0.95


class Request(msgspec.Struct, frozen=True):
    """What the user asked for; `namespace` is where bare names are looked for."""

    source: str
    destination: str
    namespace: str | None = None
    protocol: AskedProtocol | None = None
    port: int | None = None
    family: Literal[4, 6] | None = None  # None: that of an address, else the primary one
    timeout_s: float = DEFAULT_TIMEOUT_S
    size: int | None = None  # of the IP packet, bytes; None: as small as it can be
    source_port: int | None = None  # None: the kernel's choice
    ttl: int | None = None  # hop limit of IPv6; None: the kernel's choice
    from_address: str | None = None  # to send from, whether the source has it or not
    fragment: bool = False  # it may be sent, and passed on, in fragments
    path: str | None = None  # of an HTTP request; None: /
    host: str | None = None  # of an HTTP request; None: the address
    query: str | None = None  # name that a DNS query asks for; None: that of the API server

    @property
    def transport(self) -> ProbeProtocol | None:
        """What the protocol that was asked for is sent over."""
        return TRANSPORTS[self.protocol] if self.protocol else None


class Aim(msgspec.Struct, frozen=True):
    """A request, decided."""

    source: Place
    source_address: str | None  # None: the kernel's choice
    destination: str
    port: int | None
    protocol: ProbeProtocol
    places: tuple[Place, ...]  # the source first
    unwatched: int = 0  # candidate pods beyond MOST_PODS
    service: str | None = None  # "demo/myblog" if the destination is one
    to: str = ""  # the destination as it was asked for, and the port that was left open
    size: int | None = None
    source_port: int = 0
    ttl: int | None = None
    spoofed: bool = False  # whether the source does not have `source_address`
    answer_ends: tuple[Place, ...] = ()  # who then gets the answer; nobody if it is lost
    fragment: bool = False
    application: Http | Dns | None = None  # what is asked for on top
    outside: str | None = None  # a source that is beyond the underlay's gateway

    @property
    def sender(self) -> str:
        """The source's name, or its address outside."""
        return self.outside or self.source.name

    @property
    def family(self) -> Family:
        """What the probe is sent over."""
        return family_of(self.destination)


def aim(lab: Lab, request: Request) -> Aim:
    """Decide a request.  Raises NetlabError (exit code 2) if it cannot be meant."""
    require_fields(request)
    source = resolve(lab, request.source, request.namespace)
    written = request.destination
    if is_url(written):
        request = meant(lab, request, source.host is not None)
    target = resolve(lab, request.destination, request.namespace)
    require_one_port(request, target)
    said = application(request.protocol, request.path, request.query, request.host)
    sender = _sender(lab, request, source)
    claimed = resolve(lab, sent_from(request.from_address)) if request.from_address else None
    destination = _destination(request, (source, *([claimed] if claimed else [])), target)
    family = family_of(destination)
    _require_unicast(destination)
    if family.name not in lab.families:
        raise _error(
            "other-family", f"{destination} is {family.name}, and lab {lab.name} has none of that"
        )
    service, service_port = service_of(lab, target, request, family)
    protocol = protocol_of(request, target, service_port)
    port = None if protocol == "icmp" else port_of(request, target, protocol)
    if protocol == "tcp" and request.timeout_s > LONGEST_TCP_S:
        raise _error(
            "timeout-too-long",
            f"a TCP probe can wait {LONGEST_TCP_S} s, not {request.timeout_s:g}: "
            "the kernel would send its SYN again, and that is another packet",
        )
    address = (claimed or source).address if claimed or source.kind == "address" else None
    if address:
        _require_unicast(address)
    spoofed = address is not None and address not in sender.addresses
    check_form(request, protocol, family, said, spoofed)
    if request.source_port and protocol == "icmp":
        raise _error("icmp-port", "an ICMP probe has no source port", "take TCP or UDP")
    receivers = _receivers(lab, request, sender, target, service, service_port, family)
    pods = [place for place in receivers if place.kind == "pod"]
    unwatched = set(pods[MOST_PODS:])
    ends = _answer_ends(lab, address) if address and spoofed else []
    asked = _nodes_for(lab, address) if address and spoofed and not ends else []
    return Aim(
        source=sender,
        source_address=address,
        destination=destination,
        port=port,
        protocol=protocol,
        places=_places(
            lab,
            [
                sender,
                *(place for place in receivers if place not in unwatched),
                *ends,
                *asked,
                *_by_balancer(lab, destination),
            ],
            destination,
        ),
        unwatched=len(unwatched),
        service=service.key if service else None,
        to=written if is_url(written) else named(request, target, port),
        size=request.size,
        source_port=request.source_port or 0,
        ttl=request.ttl,
        spoofed=spoofed,
        answer_ends=tuple(ends),
        fragment=request.fragment,
        application=said,
        outside=request.source if sender.kind == "switch" else None,
    )


def in_lab(lab: Lab, address: str) -> bool:
    """Whether an address is one that a pod, a node or a Service of the lab could have."""
    internet = lab.gateway.cidrs if lab.gateway else ()
    cidrs = [*lab.underlay.cidrs, *lab.pod_cidrs, *lab.service_cidrs, *internet]
    ours = {each for node in lab.nodes for each in node.addresses}
    ours |= {each for pod in lab.pods for each in pod.addresses}
    ours |= {each for host in lab.hosts for each in host.addresses}
    ours |= {each for container in lab.docker_containers for each in container.addresses}
    ours |= {net.gateway for net in lab.docker_networks}
    ours |= {each for box in lab.balancers for each in box.addresses}
    for service in lab.services:
        ours |= {*service.cluster_ips, *service.external_ips, *service.load_balancer_ips}
    number = ip_address(address)
    return address in ours or _within(number, cidrs)


def sender(lab: Lab, request: Request) -> Place:
    """Where the source of a request is.  NetlabError (exit 2) if it cannot send."""
    return _sender(lab, request, resolve(lab, request.source, request.namespace))


def _sender(lab: Lab, request: Request, source: Reference) -> Place:
    if source.pod:
        return place_of_pod(lab, source.pod)
    if source.container:
        return place_of_container(lab, source.container)
    if source.node:
        return place_of_node(lab, source.node)
    if source.host:
        return place_of_host(lab, source.host)
    if source.address and not source.service and not lab.gateway:
        # From outside one comes by the underlay's gateway.
        gateways = lab.underlay.gateways
        if source.address in gateways or not in_lab(lab, sent_from(source.address)):
            return place_of_switch(lab)
    what = "a Service" if source.service else "an address of no pod and no node of this lab"
    raise _error(
        "bad-source",
        f'"{request.source}" cannot send a probe: it is {what}',
        "a source is a pod, a node, a host, an address of one, or one outside the lab: "
        "`netlab get pods` lists pods; --from-address sends from what SRC does not have",
    )


def _answer_ends(lab: Lab, address: str) -> list[Place]:
    """Who gets the answer to an address: its owner; outside the lab the underlay's gateway."""
    places = [place_of_node(lab, node) for node in lab.nodes]
    places += [place_of_host(lab, host) for host in lab.hosts]
    way_out = place_of_gateway(lab) if lab.gateway else place_of_switch(lab)
    owners = [place for place in (*places, way_out) if address in place.addresses]
    owners = owners or [place_of_pod(lab, pod) for pod in lab.pods if address in pod.addresses]
    return owners or ([] if in_lab(lab, address) else [way_out])


def _destination(request: Request, sources: tuple[Reference, ...], target: Reference) -> str:
    """The address to send to: of the family asked for, or of an address that stands in the request.

    Else it is the one that its owner has first, that of the primary family.
    """
    wanted = {
        family_of(each.address): each.address
        for each in (*sources, target)
        if each.kind == "address" and each.address
    }
    if request.family:
        wanted.setdefault(IPV6 if request.family == 6 else IPV4, "what was asked for")
    if len(wanted) > 1:
        (family, first), (other, second) = wanted.items()
        raise _error(
            "two-families",
            f"{first} is {family.name}, and {second} is {other.name}: a packet is of one family",
        )
    outside = sources[0].host is not None
    addresses = _addresses(target, outside)
    if not addresses:
        raise _error(
            "no-address",
            f'"{request.destination}" has no cluster IP to send to',
            "trace to one of its pods: `netlab get pods` lists them",
        )
    for family in wanted:
        address = first_of(family, addresses)
        if address is None:
            raise _error(
                "no-address",
                f'"{request.destination}" has no {family.name} address',
                f"it has {', '.join(addresses)}",
            )
        return address
    return addresses[0]


def _require_unicast(destination: str) -> None:
    """Refuse those addresses that are no host's, or say nothing of where a packet goes."""
    address = ip_address(destination)
    if address.is_multicast or address.is_unspecified or destination == "255.255.255.255":
        raise _error("not-unicast", f"{destination} is the address of no single host")
    if address.version == 4:
        return
    if address.is_link_local:
        raise _error(
            "link-local",
            f"{destination} is link-local: each link has hosts of its own by such addresses",
            "trace to the other address of that pod or node: `netlab get pods -o yaml`",
        )
    if address.ipv4_mapped:
        raise _error(
            "mapped-address",
            f"{destination} is the IPv4 address {address.ipv4_mapped} in IPv6's clothes: no packet "
            "bears it",
            f"trace to {address.ipv4_mapped}",
        )


def _addresses(target: Reference, outside: bool) -> tuple[str, ...]:
    """What a destination can be reached by, from inside or outside; the primary family first."""
    if target.kind == "address":
        return (target.address,) if target.address else ()
    if target.service and outside and target.service.load_balancer_ips:
        return target.service.load_balancer_ips
    if target.service:
        return tuple(each for each in target.service.cluster_ips if each != "None")
    if target.container and target.container.mode != "host":
        return target.container.addresses
    owner = target.pod or target.node or target.host
    return owner.addresses if owner else ()


def _receivers(
    lab: Lab,
    request: Request,
    sender: Place,
    target: Reference,
    service: Service | None,
    port: ServicePort | None,
    family: Family,
) -> list[Place]:
    """Where the probe may end: the destination itself, and the endpoints of its Service."""
    found: list[Place] = []
    if target.pod:
        found.append(place_of_pod(lab, target.pod))
    elif target.container:
        found.append(place_of_container(lab, target.container))
    elif target.node:
        found.append(place_of_node(lab, target.node))
    elif target.host:
        found.append(place_of_host(lab, target.host))
    if service:
        ports = (port,) if port else service.ports
        endpoints = {end for each in ports for end in lab.endpoints_of(service, each)}
        found += _places_of_endpoints(
            lab, (end for end in endpoints if family_of(end.address) is family)
        )
    own = target.pod or target.container
    node = target.node.name if target.node and not own else None
    if target.address and ip_address(target.address).is_loopback:
        node = sender.node if sender.kind == "node" else None
    number = request.port or target.port_number
    found += [
        place_of_pod(lab, pod)
        for pod in lab.with_host_ports.get(node or "", ())
        if any(each.host_port == number for each in pod.ports)
    ]
    found += [
        place_of_container(lab, container)
        for container in lab.docker_containers
        if container.node == node and any(each.host_port == number for each in container.published)
    ]
    if not found and target.address and not target.service:
        found += _nodes_for(lab, target.address)
    return list(dict.fromkeys(found))


def _by_balancer(lab: Lab, destination: str) -> list[Place]:
    """The load balancer that an address is of, and nodes that it may choose."""
    for box in lab.balancers:
        if _within(ip_address(destination), box.pools):
            nodes = [place_of_node(lab, node) for node in lab.nodes[:MOST_NODES]]
            return [place_of_balancer(lab, box), *nodes]
    return []


def _nodes_for(lab: Lab, address: str) -> list[Place]:
    """Where a packet goes to an address that nobody has: by the pod CIDRs, else anywhere."""
    number = ip_address(address)
    if not _within(number, lab.pod_cidrs):
        return []
    nodes = [node for node in lab.nodes if _within(number, node.pod_cidrs)]
    return [place_of_node(lab, node) for node in nodes or lab.nodes[:MOST_NODES]]


def _within(number: IPv4Address | IPv6Address, cidrs: Iterable[str]) -> bool:
    return any(number in ip_network(cidr) for cidr in cidrs)


def _places_of_endpoints(lab: Lab, endpoints: Iterable[Endpoint]) -> list[Place]:
    pods = {pod.key: pod for pod in lab.pods}
    nodes = {address: node for node in lab.nodes for address in node.addresses}
    hosts = {address: host for host in lab.hosts for address in host.addresses}
    found = []
    for endpoint in sorted(endpoints, key=lambda end: (end.address, end.port)):
        if endpoint.pod in pods:
            found.append(place_of_pod(lab, pods[endpoint.pod]))
        elif endpoint.address in nodes:
            found.append(place_of_node(lab, nodes[endpoint.address]))
        elif endpoint.address in hosts:
            found.append(place_of_host(lab, hosts[endpoint.address]))
    return found


def _places(lab: Lab, ends: list[Place], destination: str) -> tuple[Place, ...]:
    nodes = {
        name: place_of_node(lab, lab.node(name)) for name in (end.node for end in ends) if name
    }
    between = [place_of_switch(lab)]
    if lab.gateway:
        hosts = [host for host in lab.hosts if place_of_host(lab, host) in ends]
        inside = in_lab(lab, destination) and destination not in lab.underlay.gateways
        if not inside or _within(ip_address(destination), lab.gateway.cidrs) or hosts:
            between += [place_of_gateway(lab), place_of_internet(lab)]
    return tuple(dict.fromkeys((ends[0], *nodes.values(), *between, *ends[1:])))


def _error(code: str, message: str, hint: str | None = None) -> NetlabError:
    return NetlabError(Problem(code, message, hint=hint))
