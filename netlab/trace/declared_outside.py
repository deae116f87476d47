"""What is outside the cluster, by the lab alone: hosts, the gateway, who is on which switch."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address, ip_network
from typing import NamedTuple

from netlab.datapath.outside_names import GATEWAY_PORT, balancer_port, host_port
from netlab.datapath.podnet import switch_port
from netlab.topology.model import Host, Lab
from netlab.trace.family import Family, family_of, first_of
from netlab.trace.place import (
    Place,
    place_of_balancer,
    place_of_gateway,
    place_of_host,
    place_of_internet,
    place_of_node,
    place_of_switch,
)

UNKNOWN_TO_GATEWAY, UNINVITED = "unknown-to-gateway", "uninvited"
"""Reasons for which the gateway drops."""

NO_HEALTHY_NODE, NOT_BALANCED = "no-healthy-node", "not-balanced"
"""Reasons for which a load balancer refuses."""

INSIDE, OUTSIDE, UPLINK = "eth0", "eth1", "eth0"


class Attached(NamedTuple):
    """A device on one of the two switches, and the switch's port to it."""

    place: Place
    device: str
    switch: Place
    port: str
    addresses: tuple[str, ...]


def attached(lab: Lab) -> Iterator[Attached]:
    """Everything on the underlay's switch and on the internet's."""
    switch = place_of_switch(lab)
    for node in lab.nodes:
        place = place_of_node(lab, node)
        yield Attached(place, UPLINK, switch, switch_port(node), node.addresses)
    if lab.gateway:
        way = place_of_gateway(lab)
        yield Attached(way, INSIDE, switch, GATEWAY_PORT, lab.underlay.gateways)
        internet = place_of_internet(lab)
        yield Attached(way, OUTSIDE, internet, GATEWAY_PORT, lab.gateway.addresses)
    for host in lab.hosts:
        where = place_of_internet(lab) if host.internet else switch
        yield Attached(place_of_host(lab, host), UPLINK, where, host_port(host), host.addresses)
    for box in lab.balancers:
        place = place_of_balancer(lab, box)
        yield Attached(place, UPLINK, switch, balancer_port(box), place.addresses)


def host_of(lab: Lab, place: Place) -> Host:
    """The host that a place is."""
    return next(host for host in lab.hosts if host.name == place.name)


class Hop(NamedTuple):
    """A route: network, device, next hop."""

    matched: str
    device: str
    via: str | None = None


def routes(lab: Lab, place: Place, family: Family) -> Iterator[Hop]:
    """Routes of a host, a box or the gateway; of a node those to what is of other networks."""
    if place.kind == "node":
        yield from _to_strangers(lab, family)
        yield from _to_pools(lab, family)
        return
    if place.kind == "balancer":
        yield from (Hop(cidr, UPLINK) for cidr in lab.underlay.cidrs)
        yield from (hop for hop in _to_pools(lab, family) if hop.via not in place.addresses)
        yield from _to_gateway(lab, family)
        return
    if place.kind == "gateway":
        assert lab.gateway
        yield from (Hop(cidr, INSIDE) for cidr in lab.underlay.cidrs)
        yield from (Hop(cidr, OUTSIDE) for cidr in lab.gateway.cidrs)
        yield from _to_pools(lab, family)
        return
    host = host_of(lab, place)
    if first_of(family, host.addresses) is None:
        return
    if host.internet:
        assert lab.gateway
        yield from (Hop(cidr, UPLINK) for cidr in lab.gateway.cidrs)
        via = first_of(family, lab.gateway.addresses)
        yield from (Hop(hop.matched, UPLINK, via) for hop in _to_pools(lab, family))
        return
    yield from (Hop(cidr, UPLINK) for cidr in lab.underlay.cidrs)
    yield from _to_strangers(lab, family)
    yield from _to_pools(lab, family)
    yield from _to_gateway(lab, family)


def _to_gateway(lab: Lab, family: Family) -> Iterator[Hop]:
    gateway = first_of(family, lab.underlay.gateways)
    if gateway:
        yield Hop(family.every_address, UPLINK, gateway)


def _to_pools(lab: Lab, family: Family) -> Iterator[Hop]:
    """Routes to the addresses of load balancers' Services."""
    for box in lab.balancers:
        pool, via = first_of(family, box.pools), first_of(family, box.addresses)
        if pool and via:
            yield Hop(pool, UPLINK, via)


def is_balanced(lab: Lab, address: str) -> bool:
    """Whether an address is of a load balancer: one of its Services', or its own."""
    return any(_within(address, box.pools) or address in box.addresses for box in lab.balancers)


def _to_strangers(lab: Lab, family: Family) -> Iterator[Hop]:
    """Routes to hosts on the underlay whose addresses are of other networks."""
    for host in lab.hosts:
        for address in host.addresses if not host.internet else ():
            if family_of(address) is family and not _within(address, lab.underlay.cidrs):
                yield Hop(f"{address}/{family.bits}", UPLINK)


def masquerades(lab: Lab, source: str, destination: str) -> bool:
    """Whether a node puts itself in as the source of what leaves it, Services aside."""
    how = lab.overlay.masquerade
    if how == "none" or ip_address(destination).is_multicast:
        return False
    if not _within(source, lab.pod_cidrs) or _within(destination, lab.pod_cidrs):
        return False
    nodes = {address for node in lab.nodes for address in node.addresses}
    inside = destination in nodes or _within(destination, lab.service_cidrs)
    return how == "all" or not inside


def _within(address: str, cidrs: tuple[str, ...]) -> bool:
    number = ip_address(address)
    return any(number in ip_network(cidr) for cidr in cidrs)
