"""Which endpoints serve a Service on one node, and what becomes of a packet when none does.

This is the part of kube-proxy that all its modes share (pkg/proxy/serviceport.go, topology.go):
the addresses that a Service port is reached at, the *cluster* set and the *local* set of its
endpoints, and a verdict for traffic from inside and from outside.  How a verdict becomes rules is
the business of the modes.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from ipaddress import ip_network
from operator import attrgetter
from typing import NamedTuple

import msgspec

from netlab.datapath.services.names import address_port, service_port_name
from netlab.topology.model import (
    ZONE_LABEL,
    Endpoint,
    Lab,
    Node,
    Service,
    ServiceEndpoints,
    ServicePort,
    ServiceProxy,
)

PROXY_NAME_LABEL = "service.kubernetes.io/service-proxy-name"

Endpoints = tuple[Endpoint, ...]


class Verdict(enum.Enum):
    """What happens to a new connection to a Service."""

    FORWARD = "forward"
    REJECT = "reject"  # no endpoint anywhere: the client hears of it at once
    DROP = "drop"  # policy Local and no endpoint on this node: another node may have one


class ServicePortInfo(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One port of a Service as the proxy of one family on one node sees it.

    Addresses are those of the family.  `cluster` and `local` are sorted by the text `ip:port`, and
    empty where no policy makes use of them.
    """

    name: str  # namespace/name:port
    protocol: str  # "tcp", "udp", "sctp"
    port: int
    cluster_ip: str
    has_cluster_ip: bool = True  # False: another Service is reached there, see `claims`
    external_ips: tuple[str, ...]
    load_balancer_ips: tuple[str, ...]
    source_ranges: tuple[str, ...]  # networks; empty: everybody may use the load balancer
    node_port: int | None
    health_check_node_port: int | None
    externally_accessible: bool
    internal_local: bool
    external_local: bool
    affinity_s: int | None
    cluster: Endpoints
    local: Endpoints
    has_any: bool
    known: Endpoints  # of any condition

    @property
    def internal(self) -> Verdict:
        """What happens at the ClusterIP."""
        return self._verdict(self.internal_local)

    @property
    def external(self) -> Verdict:
        """What happens at external IPs, load balancer IPs and the NodePort.

        Under policy Local, pods and the node itself reach the cluster set whatever this says.
        """
        return self._verdict(self.external_local)

    @property
    def reachable(self) -> Endpoints:
        """Endpoints in either set, sorted."""
        if not self.local:
            return self.cluster
        if not self.cluster:
            return self.local
        both = {address_port(endpoint): endpoint for endpoint in self.cluster + self.local}
        return tuple(both[text] for text in sorted(both))

    def _verdict(self, local: bool) -> Verdict:
        if not self.has_any:
            return Verdict.REJECT
        return Verdict.DROP if local and not self.local else Verdict.FORWARD


class ServiceObjects(NamedTuple):
    """A Service and what stands behind its ports: the objects that its rules are made of."""

    service: Service
    endpoints: tuple[ServiceEndpoints, ...] = ()


def service_objects(lab: Lab) -> dict[str, ServiceObjects]:
    """The objects of every Service, by its key (`namespace/name`)."""
    behind: dict[str, tuple[ServiceEndpoints, ...]] = {}
    for entry in lab.endpoints:
        key = f"{entry.namespace}/{entry.service}"
        behind[key] = (*behind[key], entry) if key in behind else (entry,)
    return {
        (key := service.key): ServiceObjects(service, behind.get(key, ()))
        for service in lab.services
    }


def service_ports(lab: Lab, node: Node, family: int) -> list[ServicePortInfo]:
    """Every proxied Service port with an address of the family (4 or 6), sorted by name."""
    return ports_of(service_objects(lab).values(), lab.service_proxy, node, family)


def ports_of(
    services: Iterable[ServiceObjects], proxy: ServiceProxy, node: Node, family: int
) -> list[ServicePortInfo]:
    """Those of some Services.

    Headless and ExternalName Services, and those labelled for another proxy, are not proxied.
    """
    gate = proxy.featureGates.get("AllowServiceExternalIPs", True)
    found = []
    for service, behind in services:
        cluster_ip = cluster_ip_of(service, family)
        if cluster_ip is None:
            continue
        by_port = {(entry.port_name, entry.protocol): entry.endpoints for entry in behind}
        for port in service.ports:
            endpoints = _distinct(by_port.get((port.name, port.protocol), ()), family)
            found.append(_info(service, port, cluster_ip, endpoints, node, family, gate))
    found.sort(key=attrgetter("name", "protocol"))
    return found


def cluster_ip_of(service: Service, family: int) -> str | None:
    """The Service's ClusterIP of a family; None if a proxy has nothing to do for it there."""
    cluster_ip = service.cluster_ip
    of_family = (":" in cluster_ip) is (family == 6)
    if not (of_family or service.other_cluster_ips):
        return None
    if service.type == "ExternalName" or cluster_ip in ("", "None"):
        return None
    if PROXY_NAME_LABEL in service.labels:
        return None
    if of_family:
        return cluster_ip
    return next((ip for ip in service.other_cluster_ips if _is_of(ip, family)), None)


def _info(
    service: Service,
    port: ServicePort,
    cluster_ip: str,
    endpoints: Endpoints,
    node: Node,
    family: int,
    allow_external_ips: bool,
) -> ServicePortInfo:
    # (All this is asked of each of thousands of Services, most of which have nothing of it.)
    external_ips = service.external_ips and _of(family, service.external_ips)
    load_balancer_ips = service.load_balancer_ips and _of(family, service.load_balancer_ips)
    accessible = bool(port.node_port or external_ips or load_balancer_ips)
    external = service.type in ("NodePort", "LoadBalancer") or bool(service.external_ips)
    internal_local = service.internal_traffic_policy == "Local"
    external_local = external and service.external_traffic_policy == "Local"
    # Under eTP Local the cluster set is still what pods and the node are short-cut to.
    uses_cluster = not internal_local or accessible
    uses_local = internal_local or (external_local and accessible)
    cluster = _cluster(endpoints, node) if uses_cluster else ()
    return ServicePortInfo(
        name=service_port_name(service.namespace, service.name, port.name),
        protocol=port.protocol.lower(),
        port=port.port,
        cluster_ip=cluster_ip,
        external_ips=external_ips if allow_external_ips else (),
        load_balancer_ips=load_balancer_ips,
        source_ranges=service.load_balancer_source_ranges and _source_ranges(service, family),
        node_port=port.node_port or None,
        health_check_node_port=(
            service.health_check_node_port
            if service.type == "LoadBalancer" and external_local
            else None
        ),
        externally_accessible=accessible,
        internal_local=internal_local,
        external_local=external_local,
        affinity_s=service.affinity_timeout_s if service.session_affinity == "ClientIP" else None,
        cluster=cluster,
        local=_ready_or_draining(e for e in endpoints if e.node == node.name) if uses_local else (),
        has_any=bool(cluster or _ready_or_draining(endpoints)),
        known=endpoints,
    )


def _cluster(endpoints: Endpoints, node: Node) -> Endpoints:
    for e in endpoints:
        if not e.ready or e.for_nodes or e.for_zones:
            break
    else:
        return endpoints
    ready = tuple(e for e in endpoints if e.ready)
    return _hinted(ready, node) if ready else _ready_or_draining(endpoints)


def _ready_or_draining(endpoints: Iterable[Endpoint]) -> Endpoints:
    """The ready ones; if there are none, those that terminate and still serve."""
    known = tuple(endpoints)
    return tuple(e for e in known if e.ready) or tuple(
        e for e in known if e.serving and e.terminating
    )


def _hinted(ready: Endpoints, node: Node) -> Endpoints:
    """Ready endpoints that the slices' hints mean for this node, else for its zone, else all.

    Hints of one sort count only if every ready endpoint has one and some endpoint's fits.
    """
    for_node = tuple(e for e in ready if node.name in e.for_nodes)
    if for_node and all(e.for_nodes for e in ready):
        return for_node
    zone = node.labels.get(ZONE_LABEL)
    for_zone = tuple(e for e in ready if zone in e.for_zones)
    if for_zone and all(e.for_zones for e in ready):
        return for_zone
    return ready


def _distinct(endpoints: Endpoints, family: int) -> Endpoints:
    """Endpoints of a family, each `ip:port` once, sorted by that text.

    Where two slices name the same one, the one that does not terminate counts.
    """
    six = family == 6
    found: dict[str, Endpoint] = {}
    for endpoint in endpoints:
        if (":" in endpoint.address) is six:
            text = address_port(endpoint)
            if text not in found or found[text].terminating:
                found[text] = endpoint
    ordered = sorted(found)
    if ordered == [*found]:
        return tuple(found.values())
    return tuple([found[text] for text in ordered])


def _source_ranges(service: Service, family: int) -> tuple[str, ...]:
    """Networks that may use the load balancer; none if one of them is everybody."""
    networks = [ip_network(text.strip(), False) for text in service.load_balancer_source_ranges]
    mine = [network for network in networks if network.version == family]
    if any(network.prefixlen == 0 for network in mine):
        return ()
    return tuple(str(network) for network in mine)


def _of(family: int, addresses: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(ip for ip in addresses if _is_of(ip, family))


def _is_of(address: str, family: int) -> bool:
    return (":" in address) == (family == 6)
