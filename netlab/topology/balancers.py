"""Load balancers outside the cluster, and the addresses that they give to Services.

* A LoadBalancer has `spec.address` on the underlay, else the highest free one of it.
* A Service of type LoadBalancer keeps the addresses that its status has.  Without any it gets one
  of each of its families: its `spec.loadBalancerIP`; else the one that it had before a change; else
  the lowest free one of the first LoadBalancer whose pool has one left.  A `loadBalancerClass` of
  `netlab/NAME` asks for that LoadBalancer; any other class is somebody else's business.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from ipaddress import ip_address, ip_network

from msgspec.structs import replace

from netlab.topology import kubernetes as k8s
from netlab.topology import lab_document, model
from netlab.topology.addresses import (
    Network,
    address,
    address_at,
    family,
    family_of,
    first_of,
    hosts,
    last_of,
    network,
    not_of_lab,
    split,
)
from netlab.topology.convert import shown
from netlab.topology.model import Family
from netlab.topology.networks import Networks
from netlab.topology.objects import Objects, Own, Stated
from netlab.topology.places import Complaints, Path

_POOL: Path = ("spec", "pool")
_ADDRESS: Path = ("spec", "address")
_GIVEN: Path = ("spec", "loadBalancerIP")
CLASS_PREFIX = "netlab/"

_Box = Own[lab_document.LoadBalancer]


def decide(
    objects: Objects, networks: Networks, way: model.Gateway | None, found: Complaints
) -> list[model.LoadBalancer]:
    """The load balancers of a lab, in the file's order."""
    if not objects.balancers:
        return []
    taken = _taken(objects, networks)
    used = list(_networks(networks, way))
    given = [_stated_addresses(stated, networks, taken, found) for stated in objects.balancers]
    decided = []
    for stated, addresses in zip(objects.balancers, given, strict=True):
        spec = stated.item.spec
        pools = _pools(stated, networks, used, found)
        check = spec.healthCheck or lab_document.HealthCheckSpec()
        usual = model.HealthChecks()
        decided.append(
            model.LoadBalancer(
                name=stated.item.metadata.name,
                addresses=tuple(_complete(stated, addresses, networks, taken, found)),
                pools=tuple(map(str, pools)),
                mode=spec.mode or "nat",
                checks=model.HealthChecks(
                    period_s=check.periodSeconds or usual.period_s,
                    timeout_s=check.timeoutSeconds or usual.timeout_s,
                    healthy=check.healthyThreshold or usual.healthy,
                    unhealthy=check.unhealthyThreshold or usual.unhealthy,
                ),
            )
        )
    return decided


# The boxes


def _taken(objects: Objects, networks: Networks) -> dict[str, str]:
    """Who has which address of the underlay."""
    taken = {str(each): node.title for node in networks.nodes for each in node.addresses.values()}
    taken |= dict.fromkeys(networks.underlay.gateways, "the underlay's gateway")
    for host in objects.hosts:
        taken |= dict.fromkeys(map(str.strip, host.item.spec.address.split(",")), host.title)
    return taken


def _networks(networks: Networks, way: model.Gateway | None) -> Iterator[tuple[Network, str]]:
    yield from ((cidr, f"the pod CIDR {cidr}") for cidr in networks.pod_cidrs)
    for node in networks.nodes:
        yield from ((each, f"the pod CIDR of {node.title}") for each in node.pod_cidrs.values())
    yield from ((cidr, f"the Service CIDR {cidr}") for cidr in networks.service_cidrs)
    yield from ((ip_network(each), f"the underlay {each}") for each in networks.underlay.cidrs)
    for cidr in way.cidrs if way else ():
        yield ip_network(cidr), f"the internet's {cidr}"


def _stated_addresses(
    stated: _Box, networks: Networks, taken: dict[str, str], found: Complaints
) -> dict[Family, str]:
    text = stated.item.spec.address
    if text is None:
        return {}
    where = stated.title, found, stated.origin
    decided: dict[Family, str] = {}
    for of, part in split(text, *where, _ADDRESS).items():
        own = address(part, *where, _ADDRESS)
        if own is None:
            continue
        if of not in networks.families:
            not_of_lab(str(own), networks.families, *where, _ADDRESS)
        elif not any(own in ip_network(cidr) for cidr in networks.underlay.cidrs):
            cidrs = ", ".join(networks.underlay.cidrs)
            message = f"{stated.title}: its address {own} is not in the underlay {cidrs}"
            found.error("outside-cidr", message, stated.origin, *_ADDRESS)
        elif str(own) in taken:
            message = f"{stated.title}: {own} is already the address of {taken[str(own)]}"
            found.error("duplicate-address", message, stated.origin, *_ADDRESS)
        taken[str(own)] = stated.title
        decided[of] = str(own)
    return decided


def _complete(
    stated: _Box,
    given: dict[Family, str],
    networks: Networks,
    taken: dict[str, str],
    found: Complaints,
) -> Iterator[str]:
    """Its address in each family of the lab."""
    for of, text in zip(networks.families, networks.underlay.cidrs, strict=True):
        if of in given:
            yield given[of]
            continue
        cidr = ip_network(text)
        free = (
            each
            for number in reversed(hosts(cidr))
            if (each := str(address_at(number, of))) not in taken
        )
        chosen = next(free, None)
        if chosen is None:
            message = f"the underlay {cidr} has no address left for {stated.title}"
            found.error("exhausted-cidr", message, stated.origin, hint="give the lab a wider one")
            continue
        taken[chosen] = stated.title
        yield chosen


def _pools(
    stated: _Box, networks: Networks, used: list[tuple[Network, str]], found: Complaints
) -> Iterator[Network]:
    where = stated.title, found, stated.origin
    for of, text in split(stated.item.spec.pool, *where, _POOL).items():
        cidr = network(text, *where, _POOL)
        if cidr is None:
            continue
        if of not in networks.families:
            not_of_lab(str(cidr), networks.families, *where, _POOL)
            continue
        for other, title in used:
            if other.version == cidr.version and other.overlaps(cidr):
                message = f"{stated.title}: its pool {cidr} overlaps {title}"
                hint = (
                    "a pool is a network of its own, such as 192.0.2.0/28: everybody has a route "
                    "to it by way of the load balancer"
                )
                found.error("overlapping-cidr", message, stated.origin, *_POOL, hint=hint)
                break
        used.append((cidr, f"the pool {cidr} of {stated.title}"))
        yield cidr


# Addresses of Services


def with_addresses(
    objects: Objects,
    services: list[model.Service],
    boxes: list[model.LoadBalancer],
    found: Complaints,
) -> list[model.Service]:
    """The Services, those that a load balancer serves with the addresses that it gives them."""
    if not boxes:
        return services
    owners = {
        ip: service.key for service in services for ip in service.load_balancer_ips
    }  # what a status says is kept
    waiting = [
        (index, stated)
        for index, stated in enumerate(objects.services)
        if services[index].type == "LoadBalancer" and not _has_status(stated.item)
    ]
    decided: dict[int, dict[Family, str]] = {index: {} for index, _ in waiting}
    for index, stated in waiting:
        _give_stated(stated, services[index], boxes, owners, decided[index], found)
    for index, stated in waiting:  # what each had goes before what others get anew
        service, own = services[index], decided[index]
        for ip in objects.balanced.get(service.key, ()):
            of = family_of(ip)
            if of in own or of not in service.ip_families or ip in owners:
                continue
            if any(_is_of(ip, box) for box in _asked(stated, boxes)):
                own[of], owners[ip] = ip, service.key
    for index, stated in waiting:
        _give_free(stated, services[index], boxes, owners, decided[index], found)
    return [
        replace(service, load_balancer_ips=tuple(_in_order(service, decided[index])))
        if index in decided
        else service
        for index, service in enumerate(services)
    ]


def _has_status(item: k8s.Service) -> bool:
    balanced = item.status.loadBalancer if item.status else None
    return bool(balanced and balanced.ingress)


def _in_order(service: model.Service, own: dict[Family, str]) -> Iterator[str]:
    yield from (own[of] for of in service.ip_families if of in own)


def _asked(
    stated: Stated[k8s.Service], boxes: Iterable[model.LoadBalancer]
) -> list[model.LoadBalancer]:
    """The load balancers that a Service may be served by."""
    spec = stated.item.spec or k8s.ServiceSpec()
    wanted = spec.loadBalancerClass
    return [box for box in boxes if wanted in (None, f"{CLASS_PREFIX}{box.name}")]


def _is_of(ip: str, box: model.LoadBalancer) -> bool:
    return any(ip_address(ip) in ip_network(pool) for pool in box.pools)


def _give_stated(
    stated: Stated[k8s.Service],
    service: model.Service,
    boxes: list[model.LoadBalancer],
    owners: dict[str, str],
    own: dict[Family, str],
    found: Complaints,
) -> None:
    """What `spec.loadBalancerIP` asks for."""
    spec = stated.item.spec or k8s.ServiceSpec()
    text = spec.loadBalancerIP
    if not text:
        return
    ip = address(text, stated.title, found, stated.origin, _GIVEN)
    if ip is None:
        return
    of = family_of(str(ip))
    if of not in service.ip_families:
        message = f"{stated.title}: loadBalancerIP {ip} is {of}, and the Service has none of that"
        found.error("other-family", message, stated.origin, *_GIVEN)
    elif not any(_is_of(str(ip), box) for box in _asked(stated, boxes)):
        pools = ", ".join(pool for box in _asked(stated, boxes) for pool in box.pools)
        message = f"{stated.title}: loadBalancerIP {ip} is in no load balancer's pool"
        hint = f"the pools are {pools}" if pools else None
        found.error("outside-cidr", message, stated.origin, *_GIVEN, hint=hint)
    elif str(ip) in owners:
        message = f"{stated.title}: loadBalancerIP {ip} is already that of {owners[str(ip)]}"
        found.error("duplicate-address", message, stated.origin, *_GIVEN)
    else:
        own[of], owners[str(ip)] = str(ip), service.key


def _give_free(
    stated: Stated[k8s.Service],
    service: model.Service,
    boxes: list[model.LoadBalancer],
    owners: dict[str, str],
    own: dict[Family, str],
    found: Complaints,
) -> None:
    """The lowest free address, for each family that lacks one."""
    spec = stated.item.spec or k8s.ServiceSpec()
    asked = _asked(stated, boxes)
    wanted = spec.loadBalancerClass or ""
    if not asked and wanted.startswith(CLASS_PREFIX):
        message = f"{stated.title}: loadBalancerClass {shown(wanted)} is that of no LoadBalancer"
        hint = f"there is {', '.join(CLASS_PREFIX + box.name for box in boxes)}"
        at = ("spec", "loadBalancerClass")
        found.error("unknown-load-balancer", message, stated.origin, *at, hint=hint)
    for of in service.ip_families:
        if of in own:
            continue
        pools = [
            (cidr, box)
            for box in asked
            for cidr in map(ip_network, box.pools)
            if family(cidr) == of
        ]
        free = (
            ip
            for cidr, _ in pools
            for number in _numbers(cidr)
            if (ip := str(address_at(number, of))) not in owners
        )
        chosen = next(free, None)
        if chosen:
            own[of], owners[chosen] = chosen, service.key
        elif pools:
            names = " and ".join(f"{cidr} of LoadBalancer {box.name}" for cidr, box in pools)
            message = f"{stated.title}: no address is left in the pool {names}"
            hint = "give the LoadBalancer a wider spec.pool"
            found.error("exhausted-pool", message, stated.origin, hint=hint)


def _numbers(cidr: Network) -> range:
    """A pool of one or two addresses is used up whole."""
    return hosts(cidr) or range(first_of(cidr), last_of(cidr) + 1)
