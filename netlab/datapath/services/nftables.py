"""Service rules of one node as kube-proxy writes them in nftables mode.

Two tables of one layout, `ip kube-proxy` and `ip6 kube-proxy`.  The text of each is what `nft list
table` of nftables 1.0.6 prints for the rules of kube-proxy v1.37.2, and is valid input for nft.

Source: kube-proxy pkg/proxy/nftables/proxier.go (setupNFTables, syncProxyRules);
docs/services-nftables.md explains it.
"""

from __future__ import annotations

from ipaddress import ip_address, ip_network

from msgspec.structs import replace

from netlab.datapath.services.listeners import health_checks, passed_on
from netlab.datapath.services.local import (
    NodePortAddresses,
    conntrack_sysctls,
    local_detector,
    node_ip,
    node_port_addresses,
    own_addresses,
)
from netlab.datapath.services.nftables_list import TableText, addresses
from netlab.datapath.services.nftables_proxier import (
    Services,
    TableProxier,
    TablesProxier,
    Uses,
)
from netlab.datapath.services.nftables_service import HAIRPINS, Settings, add_service, from_pods
from netlab.datapath.state import Server, Sysctl, Table, Tables, Update
from netlab.topology.model import Lab, Node, ServiceProxy

_NAME = "kube-proxy"
TABLES = (f"ip {_NAME}", f"ip6 {_NAME}")
LOCALHOST_GATE = "KubeProxyNFTablesLocalhostNodePorts"


def render(lab: Lab, node: Node) -> Tables:
    """All rules of a node: a table for each family, written whether the lab uses it or not."""
    return proxier(lab, node).whole()


def proxier(lab: Lab, node: Node) -> TablesProxier:
    """What keeps the rules of a node up to date."""
    return TablesProxier(lab, node, _TableProxier)


def sysctls(lab: Lab, node: Node) -> tuple[Sysctl, ...]:
    """Sysctls that kube-proxy sets on the node."""
    return tuple(conntrack_sysctls(lab.service_proxy))


def servers(lab: Lab, node: Node) -> list[Server]:
    """What kube-proxy itself answers on the node."""
    found = health_checks(lab, node, primary_node_ports)
    for family in (4, 6):
        node_ports = primary_node_ports(lab.service_proxy, node, family)
        if _listens_on_localhost(lab.service_proxy, node_ports):
            found += passed_on(lab, node, family)
    return found


class _TableProxier(TableProxier):
    def __init__(self, lab: Lab, node: Node, family: int) -> None:
        super().__init__(lab, node, family, settings_of(lab, node, family))

    def whole(self, services: Services) -> Table:
        table = _frame(self.lab, self.node, self.family, self.settings)
        self._add(table, services)
        self.hairpins = Uses(table.elements[HAIRPINS])
        return table.table()

    def update(self, known: Services, before: Services, after: Services) -> Update:
        return Update(tables=self.commands(known, self._part(before), self._part(after)))

    def _part(self, services: Services) -> TableText:
        part = TableText(self.settings.ip, _NAME)
        self._add(part, services)
        return part

    def _add(self, table: TableText, services: Services) -> None:
        for info in self.ports(services):
            add_service(table, self.settings, info)


def _frame(lab: Lab, node: Node, family: int, settings: Settings) -> TableText:
    """The table without Services."""
    proxy = lab.service_proxy
    ip = settings.ip
    node_ports = primary_node_ports(proxy, node, family)
    rejected = rejected_on_localhost(proxy, node_ports)
    table = TableText(ip, _NAME, "rules for kube-proxy")
    _add_sets(table, ip, match_all=node_ports.match_all, localhost=rejected)
    if not node_ports.match_all:
        add_node_port_addresses(table, node_ports, own_addresses(lab, node, family))
    add_base_chains(table)
    _add_chains(table, lab, settings, node_ports.match_all, localhost=rejected is not None)
    for protocol in rejected or ():
        counter = f"localhost-nodeport-rejected-{protocol}"
        table.counter(counter)
        table.chain(f"localhost-nodeport-reject-{protocol}", f'counter name "{counter}" reject')
    return table


def settings_of(lab: Lab, node: Node, family: int) -> Settings:
    """What the rules of all Services of one family (4 or 6) on one node depend on."""
    proxy = lab.service_proxy
    node_ports = primary_node_ports(proxy, node, family)
    return Settings(
        ip="ip" if family == 4 else "ip6",
        node=node.name,
        node_ip=node_ip(node, family),
        detector=local_detector(proxy, node, family),
        masquerade=f"meta mark set meta mark | {mark(proxy)}",
        rejected_on_localhost=rejected_on_localhost(proxy, node_ports) or (),
    )


def add_node_port_addresses(
    table: TableText, node_ports: NodePortAddresses, own: list[str]
) -> None:
    """Elements of nodeport-ips: those of the node's addresses that take NodePorts."""
    for address in node_ports.of(own):
        if not ip_address(address).is_loopback:
            table.element("nodeport-ips", address)


def mark(proxy: ServiceProxy) -> str:
    """The bit of the packet mark that means: masquerade."""
    return f"{1 << proxy.nftables.masqueradeBit:#010x}"


def primary_node_ports(proxy: ServiceProxy, node: Node, family: int) -> NodePortAddresses:
    """Unlike in iptables mode the default is the node's primary address, not every one."""
    if not proxy.nodePortAddresses:
        proxy = replace(proxy, nodePortAddresses=("primary",))
    return node_port_addresses(proxy, node, family)


def rejected_on_localhost(
    proxy: ServiceProxy, node_ports: NodePortAddresses
) -> tuple[str, ...] | None:
    """Protocols whose NodePorts are refused on loopback; None without the feature gate.

    Where loopback is among the addresses, kube-proxy itself listens on the TCP ports.
    """
    if not proxy.featureGates.get(LOCALHOST_GATE, False):
        return None
    if _listens_on_localhost(proxy, node_ports):
        return ("udp", "sctp")
    return ("tcp", "udp", "sctp")


def _listens_on_localhost(proxy: ServiceProxy, node_ports: NodePortAddresses) -> bool:
    gate = proxy.featureGates.get(LOCALHOST_GATE, False)
    return gate and any(network.is_loopback for network in node_ports.networks)


def _add_sets(
    table: TableText, ip: str, *, match_all: bool, localhost: tuple[str, ...] | None
) -> None:
    address = "ipv4_addr" if ip == "ip" else "ipv6_addr"
    by_address = f"{address} . inet_proto . inet_service : verdict"
    by_port = "inet_proto . inet_service : verdict"
    for name, type_, comment in (
        (
            HAIRPINS,
            f"{address} . {address} . inet_proto . inet_service",
            "service hairpin connections",
        ),
        ("cluster-ips", address, "Active ClusterIPs"),
        ("nodeport-ips", address, "IPs that accept NodePort traffic"),
        (
            "no-endpoint-services",
            by_address,
            "vmap to drop or reject packets to services with no endpoints",
        ),
        (
            "no-endpoint-nodeports",
            by_port,
            "vmap to drop or reject packets to service nodeports with no endpoints",
        ),
        ("localhost-nodeport-reject-ports", by_port, "localhost NodePorts rejected by kube-proxy"),
        (
            "firewall-ips",
            by_address,
            "destinations that are subject to LoadBalancerSourceRanges",
        ),
        ("service-ips", by_address, "ClusterIP, ExternalIP and LoadBalancer IP traffic"),
        ("service-nodeports", by_port, "NodePort traffic"),
    ):
        if name == "nodeport-ips" and match_all:
            continue
        if name == "localhost-nodeport-reject-ports" and localhost is None:
            continue
        table.set(name, type_, f'comment "{comment}"')


def add_base_chains(table: TableText) -> None:
    """The chains on the hooks, which only jump."""
    new = "ct state new jump "
    for chain, hook, rules in (
        (
            "filter-prerouting-pre-dnat",
            "filter hook prerouting priority dstnat - 10",
            [f"{new}firewall-check"],
        ),
        (
            "filter-output-pre-dnat",
            "filter hook output priority -110",
            [f"{new}firewall-check"],
        ),
        (
            "filter-input",
            "filter hook input priority filter",
            [f"{new}nodeport-endpoints-check", f"{new}service-endpoints-check"],
        ),
        (
            "filter-forward",
            "filter hook forward priority filter",
            [f"{new}service-endpoints-check", f"{new}cluster-ips-check"],
        ),
        (
            "filter-output",
            "filter hook output priority filter",
            [f"{new}service-endpoints-check", f"{new}cluster-ips-check"],
        ),
        ("nat-prerouting", "nat hook prerouting priority dstnat", ["jump services"]),
        ("nat-output", "nat hook output priority -100", ["jump services"]),
        ("nat-postrouting", "nat hook postrouting priority srcnat", ["jump masquerading"]),
    ):
        table.chain(chain, f"type {hook}; policy accept;", *rules)


def _add_chains(
    table: TableText, lab: Lab, settings: Settings, match_all: bool, *, localhost: bool
) -> None:
    """The chains that all Services share."""
    ip = settings.ip
    service = f"{ip} daddr . meta l4proto . th dport vmap"
    port = "meta l4proto . th dport vmap"
    loopback = "127.0.0.0/8" if ip == "ip" else "::1"
    # filter-input sees packets to the node alone: no need to ask the routes again
    to_node = f"{ip} daddr != {loopback}" if match_all else f"{ip} daddr @nodeport-ips"
    table.chain("nodeport-endpoints-check", f"{to_node} {port} @no-endpoint-nodeports")
    if localhost:
        refuse = f"{ip} daddr {loopback} {port} @localhost-nodeport-reject-ports"
        table.chain("nodeport-endpoints-check", refuse)
    table.chain("service-endpoints-check", f"{service} @no-endpoint-services")
    table.chain("firewall-check", f"{service} @firewall-ips")
    table.chain(
        "services",
        *masquerade_cluster_ips(lab.service_proxy, settings),
        f"{service} @service-ips",
        f"{'fib daddr type local ' if match_all else ''}{to_node} {port} @service-nodeports",
    )
    add_postrouting_and_checks(table, lab, settings)
    helps = "helper for @no-endpoint-services / @no-endpoint-nodeports"
    table.chain("reject-chain", f'comment "{helps}"', "reject")


def add_postrouting_and_checks(table: TableText, lab: Lab, settings: Settings) -> None:
    """The chains that masquerade, and that stop what is still for a ClusterIP."""
    ip = settings.ip
    bit = mark(lab.service_proxy)
    table.chain(
        "masquerading",
        # the mark goes first: the outer packet of an overlay would inherit it
        f"meta mark & {bit} != 0x00000000 meta mark set meta mark ^ {bit} masquerade fully-random",
        f"ct status dnat {ip} saddr . {ip} daddr . meta l4proto . th dport @hairpin-connections "
        "masquerade fully-random",
    )
    table.chain(
        "cluster-ips-check",
        f'{ip} daddr @cluster-ips reject comment "Reject traffic to invalid ports of ClusterIPs"',
    )
    version = 4 if ip == "ip" else 6
    if cidrs := [cidr for cidr in lab.service_cidrs if ip_network(cidr).version == version]:
        what = "Drop traffic to unallocated ClusterIPs"
        rule = f'{ip} daddr {addresses(cidrs)} drop comment "{what}"'
        table.chain("cluster-ips-check", rule)


def masquerade_cluster_ips(proxy: ServiceProxy, settings: Settings) -> list[str]:
    """Mark what comes to a ClusterIP from elsewhere than a pod: its reply must come back here."""
    to = f"{settings.ip} daddr @cluster-ips"
    if proxy.nftables.masqueradeAll:
        return [f'{to} {settings.masquerade} comment "masquerade all clusterIP traffic"']
    if settings.detector is None:
        return []
    outside = from_pods(settings.detector, settings.ip, "!= ")
    what = "masquerade clusterIP traffic from outside cluster"
    return [f'{to} {outside} {settings.masquerade} comment "{what}"']
