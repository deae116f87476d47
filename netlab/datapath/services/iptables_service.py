"""The rules of one Service port in iptables mode.

A new connection goes from KUBE-SERVICES (or KUBE-NODEPORTS) through KUBE-EXT if it is for an
external address, then KUBE-SVC (all endpoints) or KUBE-SVL (this node's) to one KUBE-SEP, which
translates.  What has no endpoint to go to is refused in the filter table.

Source: kube-proxy pkg/proxy/iptables/settings.go (syncProxyRules).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address, ip_network

from netlab.datapath.services.endpoints import Endpoints, ServicePortInfo, Verdict
from netlab.datapath.services.iptables_save import (
    Table,
    chance,
    comment,
    host,
    nfacct,
    recent,
)
from netlab.datapath.services.local import LocalDetector
from netlab.datapath.services.names import address_port, chain_hash

LOCALHOST_ACCEPTED = "localhost_nps_accepted_pkts"


@dataclass(frozen=True, slots=True)
class Settings:
    """What the rules of all Services of one family on one node depend on."""

    family: int
    node_ip: str | None
    detector: LocalDetector | None
    masquerade_all: bool
    localhost_node_ports: bool
    large_cluster: bool  # comments that are there once an endpoint are left out


def add_filter_rules(table: Table, settings: Settings, info: ServicePortInfo) -> None:
    """Refusals, the load balancer's firewall and the health check port of one Service port."""
    if info.internal is not Verdict.FORWARD:
        why, target = _refusal(settings, info, info.internal)
        table.add("KUBE-SERVICES", _to(info, info.cluster_ip, why), target)
    if info.external is not Verdict.FORWARD:
        why, target = _refusal(settings, info, info.external)
        for address in info.external_ips + info.load_balancer_ips:
            table.add("KUBE-EXTERNAL-SERVICES", _to(info, address, why), target)
        if info.node_port:
            table.add(
                "KUBE-EXTERNAL-SERVICES",
                f"-p {info.protocol} {comment(why)} -m addrtype --dst-type LOCAL",
                f"-m {info.protocol} --dport {info.node_port}",
                target,
            )
    if _has_firewall(info):
        firewall = f"KUBE-FW-{chain_hash(info.name, info.protocol)}"
        why = f"{info.name} traffic not accepted by {firewall}"
        for address in info.load_balancer_ips:
            table.add("KUBE-PROXY-FIREWALL", _to(info, address, why), "-j DROP")
    if info.health_check_node_port:
        table.add(
            "KUBE-NODEPORTS",
            f"-p tcp {comment(f'{info.name} health check node port')} -m tcp",
            f"--dport {info.health_check_node_port} -j ACCEPT",
        )


def chain_texts(info: ServicePortInfo) -> Iterator[str]:
    """What the names of its chains are hashes of."""
    name = f"{info.name}{info.protocol}"
    yield name
    for endpoint in info.reachable:
        yield f"{name}{address_port(endpoint)}"


def add_nat_rules(table: Table, settings: Settings, info: ServicePortInfo) -> None:
    """The way of a new connection from an address of the Service to one of its endpoints."""
    digest = chain_hash(info.name, info.protocol)
    cluster, local = f"KUBE-SVC-{digest}", f"KUBE-SVL-{digest}"
    external, firewall = f"KUBE-EXT-{digest}", f"KUBE-FW-{digest}"
    if info.internal is Verdict.FORWARD:
        _cluster_ip(table, settings, info, local if info.internal_local else cluster)
    if info.externally_accessible and info.has_any:
        for address in info.external_ips:
            what = f"{info.name} external IP"
            table.add("KUBE-SERVICES", _to(info, address, what), f"-j {external}")
        for address in info.load_balancer_ips:
            what = f"{info.name} loadbalancer IP"
            target = firewall if _has_firewall(info) else external
            table.add("KUBE-SERVICES", _to(info, address, what), f"-j {target}")
        if info.node_port:
            _node_port(table, settings, info, external)
        if info.external_local:
            _external_local(table, settings, info, external, cluster, local)
        else:
            what = f"masquerade traffic for {info.name} external destinations"
            # the endpoint may be on another node, and must answer through this one
            table.add(external, comment(what), "-j KUBE-MARK-MASQ")
            table.add(external, f"-j {cluster}")
    if _has_firewall(info):
        _firewall(table, settings, info, firewall, external)
    reachable = info.reachable
    targets = {}
    for endpoint in reachable:
        text = address_port(endpoint)
        targets[text] = chain = f"KUBE-SEP-{chain_hash(info.name, info.protocol, text)}"
        table.chains[chain] = _translation(settings, info, endpoint.address, text, chain)
    if info.cluster:
        _choice(table, settings, info, cluster, _of(info.cluster, reachable, targets))
    if info.local:
        _choice(table, settings, info, local, _of(info.local, reachable, targets))


def _cluster_ip(table: Table, settings: Settings, info: ServicePortInfo, chain: str) -> None:
    """The ClusterIP.  What comes there from elsewhere than a pod has to get its reply here."""
    what = f"{info.name} cluster IP"
    to_cluster_ip = _to(info, info.cluster_ip, what)
    table.rules("KUBE-SERVICES").append(f"-A KUBE-SERVICES {to_cluster_ip} -j {chain}\n")
    detector = settings.detector
    if settings.masquerade_all:
        source = ""
    elif detector is None:
        return
    elif detector.cidr:
        source = f"! -s {detector.cidr} "
    else:
        source, (_, interface) = "", _from_pods(detector, "! ")
        to_cluster_ip = _to(info, info.cluster_ip, what, interface)
    table.rules(chain).append(f"-A {chain} {source}{to_cluster_ip} -j KUBE-MARK-MASQ\n")


def _external_local(
    table: Table, settings: Settings, info: ServicePortInfo, chain: str, cluster: str, local: str
) -> None:
    """KUBE-EXT under policy Local: pods and the node reach every endpoint, others this node's."""
    what = f"{info.name} external destinations"
    if settings.detector:
        source, interface = _from_pods(settings.detector)
        table.add(chain, source, interface, comment(f"pod traffic for {what}"), f"-j {cluster}")
    from_node = "-m addrtype --src-type LOCAL"
    masquerade = comment(f"masquerade LOCAL traffic for {what}")
    table.add(chain, masquerade, from_node, "-j KUBE-MARK-MASQ")
    table.add(chain, comment(f"route LOCAL traffic for {what}"), from_node, f"-j {cluster}")
    if info.local:
        table.add(chain, f"-j {local}")


def _firewall(
    table: Table, settings: Settings, info: ServicePortInfo, chain: str, external: str
) -> None:
    """KUBE-FW: who may use the load balancer.

    The rest is not translated, and so meets KUBE-PROXY-FIREWALL in the filter table.
    """
    sources = list(info.source_ranges)
    ip = settings.node_ip
    if ip and any(ip_address(ip) in ip_network(text) for text in info.source_ranges):
        # what the node sends to a load balancer IP that is its own has that IP as its source
        sources += [host(address) for address in info.load_balancer_ips]
    for source in sources:
        what = comment(f"{info.name} loadbalancer IP")
        table.add(chain, f"-s {source} {what} -j {external}")
    end = f"other traffic to {info.name} will be dropped by KUBE-PROXY-FIREWALL"
    table.add(chain, comment(end))


def _node_port(table: Table, settings: Settings, info: ServicePortInfo, external: str) -> None:
    protocol = info.protocol
    to_port = f"-p {protocol} {comment(info.name)} -m {protocol} --dport {info.node_port}"
    if settings.localhost_node_ports:
        counted = nfacct(LOCALHOST_ACCEPTED)
        table.add("KUBE-NODEPORTS", f"-d 127.0.0.0/8 {to_port} {counted} -j {external}")
    table.add("KUBE-NODEPORTS", f"{to_port} -j {external}")


def _of(endpoints: Endpoints, reachable: Endpoints, chains: dict[str, str]) -> dict[str, str]:
    """Chains of some endpoints of those that are reachable, by `ip:port`."""
    if endpoints is reachable:
        return chains
    return {text: chains[text] for text in map(address_port, endpoints)}


def _choice(
    table: Table, settings: Settings, info: ServicePortInfo, chain: str, chains: dict[str, str]
) -> None:
    """KUBE-SVC and KUBE-SVL: one endpoint of a set, the one remembered or one at random."""
    targets = [
        ("" if settings.large_cluster else f' -m comment --comment "{info.name} -> {text}"', target)
        for text, target in chains.items()
    ]
    rules = table.rules(chain)
    if info.affinity_s is not None:
        within = f"--rcheck --seconds {info.affinity_s} --reap"
        for what, target in targets:
            remembered = recent(within, target, settings.family)
            rules.append(f"-A {chain}{what} {remembered} -j {target}\n")
    ways = len(targets)
    for what, target in targets:
        rules.append(f"-A {chain}{what}{chance(ways)} -j {target}\n")
        ways -= 1


def _translation(
    settings: Settings, info: ServicePortInfo, address: str, text: str, chain: str
) -> list[str]:
    """KUBE-SEP: the translation to one endpoint."""
    what = "" if settings.large_cluster else f' -m comment --comment "{info.name}"'
    remember = "" if info.affinity_s is None else f" {recent('--set', chain, settings.family)}"
    protocol = info.protocol
    return [
        # An endpoint that reaches itself would answer itself, past the translation back.
        f"-A {chain} -s {host(address)}{what} -j KUBE-MARK-MASQ\n",
        f"-A {chain} -p {protocol}{what}{remember} -m {protocol} -j DNAT --to-destination {text}\n",
    ]


def _has_firewall(info: ServicePortInfo) -> bool:
    return bool(info.has_any and info.load_balancer_ips and info.source_ranges)


def _refusal(settings: Settings, info: ServicePortInfo, verdict: Verdict) -> tuple[str, str]:
    """Comment and target of the rules that refuse."""
    if verdict is Verdict.DROP:
        return f"{info.name} has no local endpoints", "-j DROP"
    version = "" if settings.family == 4 else "6"
    return (
        f"{info.name} has no endpoints",
        f"-j REJECT --reject-with icmp{version}-port-unreachable",
    )


def _from_pods(detector: LocalDetector, negation: str = "") -> tuple[str, str]:
    """A match on packets of pods, as the source and the interface part of a rule."""
    if detector.cidr:
        return f"{negation}-s {detector.cidr}", ""
    return "", f"{negation}-i {detector.interface or detector.prefix + '+'}"


def _to(info: ServicePortInfo, address: str, what: str, interface: str = "") -> str:
    """A match on packets to the Service port at one address."""
    between = f" {interface} " if interface else " "
    protocol = info.protocol
    return (
        f'-d {host(address)}{between}-p {protocol} -m comment --comment "{what}" '
        f"-m {protocol} --dport {info.port}"
    )
