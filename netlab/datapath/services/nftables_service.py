"""What one Service port adds to the tables of nftables mode: elements, chains, affinity sets.

Nearly all of a Service is elements of maps that all Services share, so a packet finds its Service
in one look-up, however many there are.  Chains of its own hold what is left: the choice.

Source: kube-proxy pkg/proxy/nftables/settings.go (syncProxyRules); docs/services-nftables.md
explains it.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address, ip_network

from netlab.datapath.services.endpoints import Endpoints, ServicePortInfo, Verdict
from netlab.datapath.services.iptables_save import host
from netlab.datapath.services.local import LocalDetector
from netlab.datapath.services.names import address_port, nftables_name
from netlab.datapath.services.nftables_list import TableText, addresses, duration
from netlab.topology.model import Endpoint

HAIRPINS = "hairpin-connections"

_COMMENT = 128  # bytes that nft takes


@dataclass(frozen=True, slots=True)
class Settings:
    """What the rules of all Services of one family on one node depend on."""

    ip: str  # "ip" or "ip6"
    node: str
    node_ip: str | None
    detector: LocalDetector | None
    masquerade: str  # the statement that marks
    rejected_on_localhost: tuple[str, ...]  # protocols of NodePorts


def from_pods(detector: LocalDetector, ip: str, negation: str = "") -> str:
    """A match on packets of pods; `negation` is "" or "!= "."""
    if detector.cidr:
        return f"{ip} saddr {negation}{detector.cidr}"
    return f'iifname {negation}"{detector.interface or detector.prefix + "*"}"'


def add_service(table: TableText, settings: Settings, info: ServicePortInfo) -> None:
    """Everything of one Service port."""
    names = _Names(nftables_name(info.name, info.protocol))
    _add_addresses(table, settings, info, names)
    if info.externally_accessible and info.has_any:
        table.chain(names.external, *_external(settings, info, names))
    if has_firewall(info):
        sources = addresses(allowed_sources(settings, info))
        table.chain(names.firewall, f"{settings.ip} saddr != {sources} drop")
    if info.cluster:
        table.chain(names.cluster, *_choice(settings, info, info.cluster))
    if info.local:
        table.chain(names.local, *_choice(settings, info, info.local))
    table.elements[HAIRPINS] += hairpins(settings, info)
    if info.affinity_s is not None:
        for endpoint in info.reachable:
            _add_affinity(table, settings, info, endpoint, info.affinity_s)


def hairpins(settings: Settings, info: ServicePortInfo) -> list[str]:
    """Connections of endpoints here to themselves; several Services may have one in common."""
    found = []
    for endpoint in info.reachable:
        if endpoint.node == settings.node:
            itself = f"{endpoint.address} . {endpoint.address}"
            found.append(f"{itself} . {info.protocol} . {endpoint.port}")
    return found


def comment(info: ServicePortInfo) -> str:
    """The name of a Service port, for an element of a set."""
    return info.name.encode()[:_COMMENT].decode()


class _Names:
    """Names of a Service port's chains."""

    def __init__(self, name: str) -> None:
        self.cluster = f"service-{name}"
        self.local = f"local-{name}"
        self.external = f"external-{name}"
        self.firewall = f"firewall-{name}"


def _add_addresses(
    table: TableText, settings: Settings, info: ServicePortInfo, names: _Names
) -> None:
    """Elements that lead from an address and port of the Service to a chain or to a refusal."""
    why = f' comment "{comment(info)}" : '
    refusals = {Verdict.REJECT: f"{why}goto reject-chain", Verdict.DROP: f"{why}drop"}
    to_port = f"{info.protocol} . {info.port}"
    cluster_ip = f"{info.cluster_ip} . {to_port}"
    table.element("cluster-ips", info.cluster_ip)
    if not info.has_cluster_ip:
        pass
    elif info.internal is Verdict.FORWARD:
        chain = names.local if info.internal_local else names.cluster
        table.element("service-ips", f"{cluster_ip} : goto {chain}")
    else:
        table.element("no-endpoint-services", cluster_ip + refusals[info.internal])

    external = [f"{ip} . {to_port}" for ip in info.external_ips + info.load_balancer_ips]
    # Under policy Local a destination may be in both maps: pods and the node are translated
    # before anything is refused.
    for key in external:
        if info.has_any:
            table.element("service-ips", f"{key} : goto {names.external}")
        if info.external is not Verdict.FORWARD:
            table.element("no-endpoint-services", key + refusals[info.external])
    if has_firewall(info):
        for ip in info.load_balancer_ips:
            table.element("firewall-ips", f"{ip} . {to_port} : goto {names.firewall}")
    if info.node_port:
        key = f"{info.protocol} . {info.node_port}"
        if info.has_any:
            table.element("service-nodeports", f"{key} : goto {names.external}")
        if info.external is not Verdict.FORWARD:
            table.element("no-endpoint-nodeports", key + refusals[info.external])
        if info.protocol in settings.rejected_on_localhost:
            refuse = f"goto localhost-nodeport-reject-{info.protocol}"
            table.element("localhost-nodeport-reject-ports", f"{key} : {refuse}")


def _external(settings: Settings, info: ServicePortInfo, names: _Names) -> list[str]:
    """Rules for external addresses and NodePorts."""
    if not info.external_local:
        # the endpoint may be on another node, and must answer through this one
        return [f'{settings.masquerade} comment "masquerade"', f"goto {names.cluster}"]
    rules = []
    if settings.detector:
        pods = from_pods(settings.detector, settings.ip)
        rules.append(f'{pods} goto {names.cluster} comment "short-circuit pod traffic"')
    from_node = "fib saddr type local"
    rules.append(f'{from_node} {settings.masquerade} comment "masquerade local traffic"')
    rules.append(f'{from_node} goto {names.cluster} comment "short-circuit local traffic"')
    if info.local:
        rules.append(f"goto {names.local}")
    return rules


def has_firewall(info: ServicePortInfo) -> bool:
    """Whether not everybody may use the Service's load balancer."""
    return bool(info.load_balancer_ips and info.source_ranges)


def allowed_sources(settings: Settings, info: ServicePortInfo) -> list[str]:
    """Networks that may use the load balancer."""
    sources = list(info.source_ranges)
    ip = settings.node_ip
    if ip and any(ip_address(ip) in ip_network(text) for text in sources):
        # what the node sends to a load balancer IP that is its own has that IP as its source
        sources += [host(address) for address in info.load_balancer_ips]
    return sources


def _choice(settings: Settings, info: ServicePortInfo, endpoints: Endpoints) -> list[str]:
    """Rules of service- and local-: one endpoint of a set, the one remembered or one at random."""
    protocol = f"meta l4proto {info.protocol}"
    ways = f"numgen random mod {len(endpoints)}"
    if info.affinity_s is not None:
        names = [_endpoint_name(info, endpoint) for endpoint in endpoints]
        remembered = [f"{settings.ip} saddr @affinity-{n} goto endpoint-{n}" for n in names]
        chains = ", ".join(f"{i} : goto endpoint-{name}" for i, name in enumerate(names))
        return [*remembered, f"{ways} vmap {{ {chains} }}"]
    if len(endpoints) == 1:
        return [f"{protocol} dnat to {address_port(endpoints[0])}"]
    targets = ", ".join(f"{i} : {e.address} . {e.port}" for i, e in enumerate(endpoints))
    return [f"{protocol} dnat {settings.ip} to {ways} map {{ {targets} }}"]


def _add_affinity(
    table: TableText, settings: Settings, info: ServicePortInfo, endpoint: Endpoint, seconds: int
) -> None:
    """Clients that an endpoint is remembered for; the chain that remembers and translates."""
    name = _endpoint_name(info, endpoint)
    table.set(
        f"affinity-{name}",
        "ipv4_addr" if settings.ip == "ip" else "ipv6_addr",
        "size 65535",
        "flags dynamic,timeout",
        f"timeout {duration(seconds)}",
    )
    table.chain(
        f"endpoint-{name}",
        f"update @affinity-{name} {{ {settings.ip} saddr }}",
        f"meta l4proto {info.protocol} dnat to {address_port(endpoint)}",
    )


def _endpoint_name(info: ServicePortInfo, endpoint: Endpoint) -> str:
    return nftables_name(info.name, info.protocol, address_port(endpoint))
