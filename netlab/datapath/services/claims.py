"""External addresses and ports that several Services name: whose they are.

A cluster IP is one Service's and so is a NodePort, but anybody may name any external IP.  In
iptables mode the rules of all stand one after the other, by name, and the first that translates
wins.  A map has room for one of them; there it is the same Service's, in everything.

(kube-proxy in nftables mode writes them in no order, and the last one replaces the others.)
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping

from msgspec.structs import replace

from netlab.datapath.services.endpoints import (
    ServiceObjects,
    ServicePortInfo,
    Verdict,
    ports_of,
    service_objects,
    service_ports,
)
from netlab.topology.model import Lab, Node, Service

Claim = tuple[str, str, int]
"""Address, protocol (lower case) and port."""

Losses = Mapping[tuple[str, str], Mapping[str, str]]
"""By name and protocol of a Service port: its addresses that another one has, and the other's name.
"""


class Claims:
    """How many Services name each external address and port; follows them as they change."""

    def __init__(self, services: Iterable[ServiceObjects]) -> None:
        self._external: Counter[Claim] = Counter()
        self._cluster_ips: set[str] = set()
        for each in services:
            self._add(each.service)

    def change(self, before: Collection[ServiceObjects], after: Collection[ServiceObjects]) -> bool:
        """Some Services become others; whether one of them shared a claim, or does now."""
        shared = any(self._shares(each.service) for each in before)
        for each in before:
            self._remove(each.service)
        for each in after:
            self._add(each.service)
        return shared or any(self._shares(each.service) for each in after)

    def shared(self, services: Iterable[ServiceObjects]) -> list[ServiceObjects]:
        """Those of all the Services that share a claim with another."""
        if not any(
            count > 1 or claim[0] in self._cluster_ips for claim, count in self._external.items()
        ):
            return []
        return [each for each in services if self._shares(each.service)]

    def _add(self, service: Service) -> None:
        self._cluster_ips.update(_cluster_ips(service))
        if service.external_ips or service.load_balancer_ips:
            self._external.update(_external(service))

    def _remove(self, service: Service) -> None:
        self._cluster_ips.difference_update(_cluster_ips(service))
        for claim in _external(service):
            self._external[claim] -= 1
            if not self._external[claim]:
                del self._external[claim]

    def _shares(self, service: Service) -> bool:
        own, external = _cluster_ips(service), _external(service)
        return any(
            self._external[claim] > 1 or (claim[0] in self._cluster_ips and claim[0] not in own)
            for claim in external
        ) or any(self._external[claim] > (claim in external) for claim in _claims(service, own))


def losses(infos: Iterable[ServicePortInfo]) -> Losses:
    """Who loses what among Service ports, sorted by name, as one node sees them.

    The first that has somewhere to go wins, or the first of all if none has.
    """
    claimants: defaultdict[Claim, list[ServicePortInfo]] = defaultdict(list)
    for info in infos:
        for ip in {info.cluster_ip, *info.external_ips, *info.load_balancer_ips}:
            claimants[ip, info.protocol, info.port].append(info)
    lost: defaultdict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for (ip, _, _), those in claimants.items():
        winner = next((info for info in those if _translates(info, ip)), those[0])
        for info in those:
            if info is not winner:
                lost[info.name, info.protocol][ip] = winner.name
    return lost


def settled(infos: Iterable[ServicePortInfo], lost: Losses) -> list[ServicePortInfo]:
    """Service ports with each of their addresses once, and without those that they lose."""
    return [
        _settled(info, lost.get((info.name, info.protocol), {}))
        if lost or info.external_ips or info.load_balancer_ips
        else info
        for info in infos
    ]


def settled_ports(lab: Lab, node: Node, family: int) -> list[ServicePortInfo]:
    """All Service ports, so; otherwise as :func:`service_ports`."""
    infos = service_ports(lab, node, family)
    return settled(infos, losses(infos))


def sharing(services: Iterable[Service], one: Service) -> tuple[Service, ...]:
    """The Service, and those that have one of its addresses, too."""
    own = {*_addresses(one)}
    return tuple(each for each in services if each is one or not own.isdisjoint(_addresses(each)))


def taken(lab: Lab, node: Node, service: Service) -> list[tuple[ServicePortInfo, str, str]]:
    """Ports of a Service with an address that others have on a node, that address, and who."""
    objects = service_objects(lab)
    some = [objects[each.key] for each in sharing(lab.services, service)]
    found = []
    for family in (4, 6):
        lost = losses(ports_of(some, lab.service_proxy, node, family))
        for info in ports_of((objects[service.key],), lab.service_proxy, node, family):
            of_port = lost.get((info.name, info.protocol), {})
            found += [(info, ip, winner) for ip, winner in of_port.items()]
    return found


def _settled(info: ServicePortInfo, lost: Collection[str]) -> ServicePortInfo:
    taken = {*lost, info.cluster_ip}
    balanced = tuple(dict.fromkeys(ip for ip in info.load_balancer_ips if ip not in taken))
    taken.update(balanced)
    external = tuple(dict.fromkeys(ip for ip in info.external_ips if ip not in taken))
    if (external, balanced) == (info.external_ips, info.load_balancer_ips) and not lost:
        return info
    return replace(
        info,
        has_cluster_ip=info.cluster_ip not in lost,
        external_ips=external,
        load_balancer_ips=balanced,
    )


def _translates(info: ServicePortInfo, ip: str) -> bool:
    return info.internal is Verdict.FORWARD if ip == info.cluster_ip else info.has_any


def _cluster_ips(service: Service) -> tuple[str, ...]:
    if service.cluster_ip in ("", "None"):
        return ()
    return (service.cluster_ip, *service.other_cluster_ips)


def _addresses(service: Service) -> tuple[str, ...]:
    return _cluster_ips(service) + service.external_ips + service.load_balancer_ips


def _external(service: Service) -> set[Claim]:
    if not (service.external_ips or service.load_balancer_ips):
        return set()
    return set(_claims(service, service.external_ips + service.load_balancer_ips))


def _claims(service: Service, addresses: Iterable[str]) -> Iterator[Claim]:
    for ip in addresses:
        for port in service.ports:
            yield ip, port.protocol.lower(), port.port
