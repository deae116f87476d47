"""What is outside the cluster: machines, and the way to the internet.

* A Gateway has the underlay's gateway address towards the nodes.  Outside it has `spec.address`,
  else the first one of `spec.cidr`, which is 203.0.113.0/24 (2001:db8:cb00:7100::/64), the networks
  for documentation of RFC 5737 and RFC 3849.
* A Host has `spec.address`.  With `network: internet` that is one of the Gateway's network, else it
  may be any that is nobody's; one of the underlay needs no route.  It answers on `spec.ports`, and
  where it is the endpoint of a Service.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import ip_address, ip_network

from netlab.topology import lab_document, model
from netlab.topology.addresses import Network, address, network, split
from netlab.topology.model import Family, Protocol
from netlab.topology.networks import Networks
from netlab.topology.objects import Objects, Own
from netlab.topology.places import Complaints, Path
from netlab.topology.pods import DraftPod

INTERNET: dict[Family, str] = {"IPv4": "203.0.113.0/24", "IPv6": "2001:db8:cb00:7100::/64"}
SOURCES = ("pod", "node", "host")
DESTINATIONS = (*SOURCES, "svc")
"""What patterns of `spec.verify.expect` begin with."""

_ADDRESS: Path = ("spec", "address")
_CIDR: Path = ("spec", "cidr")


def gateway(objects: Objects, networks: Networks, found: Complaints) -> model.Gateway | None:
    """The way to the internet, if there is one."""
    if not objects.gateways:
        return None
    stated = objects.gateways[0]
    spec = stated.item.spec or lab_document.GatewaySpec()
    where = stated.title, found, stated.origin
    given = split(spec.address, *where, _ADDRESS) if spec.address else {}
    cidrs = split(spec.cidr, *where, _CIDR) if spec.cidr else {}
    made: list[tuple[str, str]] = []
    for family in networks.families:
        cidr = network(cidrs.get(family, INTERNET[family]), *where, _CIDR)
        if cidr is None:
            continue
        underlays = map(ip_network, networks.underlay.cidrs)
        for other in (*networks.pod_cidrs, *networks.service_cidrs, *underlays):
            if other.version == cidr.version and other.overlaps(cidr):
                message = f"{stated.title}: the internet's {cidr} overlaps with {other} of the lab"
                found.error("overlapping-cidr", message, stated.origin, *_CIDR)
        own = address(given.get(family, str(cidr[1])), *where, _ADDRESS)
        if own is not None and own not in cidr:
            message = f"{stated.title}: its address {own} is not in the internet's {cidr}"
            found.error("outside-cidr", message, stated.origin, *_ADDRESS)
        made.append((str(own), str(cidr)))
    return model.Gateway(
        name=stated.item.metadata.name,
        addresses=tuple(own for own, _ in made),
        cidrs=tuple(cidr for _, cidr in made),
    )


def hosts(
    objects: Objects,
    networks: Networks,
    way: model.Gateway | None,
    boxes: Iterable[model.LoadBalancer],
    pods: Iterable[DraftPod],
    endpoints: Iterable[model.ServiceEndpoints],
    found: Complaints,
) -> list[model.Host]:
    """The machines outside; endpoints with their addresses are theirs to answer for."""
    if not objects.hosts:
        return []
    owners = _owners(networks, way, pods)
    boxes = tuple(boxes)
    pools = [ip_network(pool) for box in boxes for pool in box.pools]
    for box in boxes:
        owners |= dict.fromkeys(box.addresses, f"LoadBalancer {box.name}")
    served: dict[str, dict[tuple[Protocol, int], None]] = {}
    for entry in endpoints:
        for end in entry.endpoints:
            served.setdefault(end.address, {})[entry.protocol, end.port] = None
    decided = []
    for stated in objects.hosts:
        addresses = _addresses(stated, networks, way, owners, pools, found)
        listen: dict[tuple[Protocol, int], None] = {
            (port.protocol or "TCP", port.port): None for port in stated.item.spec.ports or ()
        }
        for each in addresses:
            listen |= served.get(each, {})
        decided.append(
            model.Host(
                name=stated.item.metadata.name,
                addresses=tuple(addresses),
                names=tuple(stated.item.spec.names or ()),
                internet=stated.item.spec.network == "internet",
                listen=tuple(listen),
            )
        )
    return decided


def _addresses(
    stated: Own[lab_document.Host],
    networks: Networks,
    way: model.Gateway | None,
    owners: dict[str, str],
    pools: Iterable[Network],
    found: Complaints,
) -> list[str]:
    spec, title, origin = stated.item.spec, stated.title, stated.origin
    internet = spec.network == "internet"
    if internet and way is None:
        hint = "add an object of kind: Gateway"
        message = f"{title} is in the internet, and there is no Gateway to it"
        found.error("no-gateway", message, origin, "spec", "network", hint=hint)
        return []
    reserved = [*networks.pod_cidrs, *networks.service_cidrs, *pools]
    if not internet and way is not None:
        reserved += map(ip_network, way.cidrs)
    decided = []
    for family, text in split(spec.address, title, found, origin, _ADDRESS).items():
        own = address(text, title, found, origin, _ADDRESS)
        if own is None:
            continue
        within = [cidr for cidr in reserved if own in cidr]
        if family not in networks.families:
            message = f"{title}: its address {own} is {family}, and the lab has none of that"
            found.error("other-family", message, origin, *_ADDRESS)
        elif internet and way and not any(own in ip_network(cidr) for cidr in way.cidrs):
            message = f"{title}: its address {own} is not in the internet's {', '.join(way.cidrs)}"
            found.error("outside-cidr", message, origin, *_ADDRESS)
        elif str(own) in owners:
            message = f"{title}: {own} is already the address of {owners[str(own)]}"
            found.error("duplicate-address", message, origin, *_ADDRESS)
        elif within:
            message = f"{title}: its address {own} is in {within[0]}, which is the cluster's"
            found.error("inside-cidr", message, origin, *_ADDRESS)
        owners[str(own)] = title
        decided.append(str(ip_address(str(own))))
    return decided


def _owners(
    networks: Networks, way: model.Gateway | None, pods: Iterable[DraftPod]
) -> dict[str, str]:
    """Who has which address."""
    found = {str(each): pod.title for pod in pods for each in pod.addresses.values()}
    for node in networks.nodes:
        found |= {str(each): node.title for each in node.addresses.values()}
    found |= dict.fromkeys(networks.underlay.gateways, "the underlay's gateway")
    return found | dict.fromkeys(way.addresses if way else (), "the Gateway")
