"""What one Service port puts on a node in ipvs mode: virtual servers, addresses, entries of sets.

Source: kube-proxy pkg/proxy/ipvs/proxier.go (syncProxyRules, syncEndpoint).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network

from netlab.datapath.services import ipvs_sets as sets
from netlab.datapath.services.endpoints import Endpoints, ServicePortInfo
from netlab.datapath.services.local import LocalDetector
from netlab.datapath.state import RealServer, VirtualServer


@dataclass(frozen=True, slots=True)
class Settings:
    """What the rules of one family depend on but the Services."""

    family: sets.Family
    node: str
    node_ip: str | None
    own_addresses: frozenset[str]  # on other links of the node
    node_port_addresses: tuple[str, ...]
    scheduler: str
    detector: LocalDetector | None
    masquerade_all: bool
    mark: str


@dataclass(slots=True)
class Parts:
    """What Service ports put on a node; the same may be there for several of them."""

    servers: list[VirtualServer] = field(default_factory=list)
    addresses: list[str] = field(default_factory=list)  # of the dummy device
    entries: list[tuple[str, str]] = field(default_factory=list)  # role of the set, and entry
    # Load balancers that the node itself may not use: address, protocol, port
    barred: list[tuple[str, str, int]] = field(default_factory=list)


def parts(settings: Settings, infos: Iterable[ServicePortInfo]) -> Parts:
    """What these Service ports, all of one family, put on the node."""
    made = Parts()
    for info in infos:
        _add_loop_back(made, settings, info)
        if info.has_cluster_ip:
            entry = f"{info.cluster_ip},{info.protocol}:{info.port}"
            made.entries.append((sets.CLUSTER_IP, entry))
            real = _chosen(info, local=info.internal_local)
            _serve(made, settings, info, info.cluster_ip, real, bind=True)
        _add_external_ips(made, settings, info)
        _add_load_balancers(made, settings, info)
        _add_node_port(made, settings, info)
    return made


def _chosen(info: ServicePortInfo, *, local: bool) -> tuple[RealServer, ...]:
    """Policy Local takes all endpoints where the node has none."""
    return _real(info.local if local and info.local else info.cluster)


def _real(endpoints: Endpoints) -> tuple[RealServer, ...]:
    return tuple([RealServer(address=each.address, port=each.port) for each in endpoints])


def _serve(
    made: Parts,
    settings: Settings,
    info: ServicePortInfo,
    address: str,
    real: tuple[RealServer, ...],
    *,
    bind: bool,
) -> None:
    made.servers.append(_server(settings, info, address, info.port, real))
    if bind:
        made.addresses.append(address)
        made.entries.append((sets.IPVS_IPS, address))


def _server(
    settings: Settings,
    info: ServicePortInfo,
    address: str,
    port: int,
    real: tuple[RealServer, ...],
) -> VirtualServer:
    return VirtualServer(
        protocol=info.protocol,
        address=address,
        port=port,
        scheduler=settings.scheduler,
        persistent_s=info.affinity_s,
        by_port=settings.scheduler == "mh",
        real=real,
    )


def _add_loop_back(made: Parts, settings: Settings, info: ServicePortInfo) -> None:
    """Endpoints of any condition that may reach themselves."""
    for each in info.known:
        if each.node == settings.node:
            entry = f"{each.address},{info.protocol}:{each.port},{each.address}"
            made.entries.append((sets.LOOP_BACK, entry))


def _add_external_ips(made: Parts, settings: Settings, info: ServicePortInfo) -> None:
    role = sets.EXTERNAL_IP_LOCAL if info.external_local else sets.EXTERNAL_IP
    for address in info.external_ips:
        made.entries.append((role, f"{address},{info.protocol}:{info.port}"))
        real = _chosen(info, local=info.external_local)
        bind = address not in settings.own_addresses
        _serve(made, settings, info, address, real, bind=bind)


def _add_load_balancers(made: Parts, settings: Settings, info: ServicePortInfo) -> None:
    near = settings.node_ip is not None and any(
        ip_address(settings.node_ip) in ip_network(each) for each in info.source_ranges
    )
    for address in info.load_balancer_ips:
        entry = f"{address},{info.protocol}:{info.port}"
        made.entries.append((sets.LOAD_BALANCER, entry))
        if info.external_local:
            made.entries.append((sets.LOAD_BALANCER_LOCAL, entry))
        if info.source_ranges:
            made.entries.append((sets.FIREWALL, entry))
            made.entries += ((sets.SOURCE_CIDR, f"{entry},{each}") for each in info.source_ranges)
            if near:
                made.entries.append((sets.SOURCE_IP, f"{entry},{address}"))
            else:
                made.barred.append((address, info.protocol, info.port))
        real = _chosen(info, local=info.external_local)
        bind = address not in settings.own_addresses
        _serve(made, settings, info, address, real, bind=bind)


def _add_node_port(made: Parts, settings: Settings, info: ServicePortInfo) -> None:
    if info.node_port:
        if not settings.node_port_addresses:
            return
        made.entries += _node_port_entries(settings, info, info.node_port)
        real = _chosen(info, local=info.external_local)
        made.servers += (
            _server(settings, info, address, info.node_port, real)
            for address in settings.node_port_addresses
        )
    if info.health_check_node_port:
        made.entries.append((sets.HEALTH_CHECK, str(info.health_check_node_port)))


def _node_port_entries(
    settings: Settings, info: ServicePortInfo, port: int
) -> Iterator[tuple[str, str]]:
    entries = [str(port)]
    if info.protocol == "sctp":
        entries = [f"{address},sctp:{port}" for address in settings.node_port_addresses]
    for local in (False, True) if info.external_local else (False,):
        role = sets.node_ports(info.protocol, local=local)
        yield from ((role, entry) for entry in entries)
