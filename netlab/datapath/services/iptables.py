"""Service rules of one node as kube-proxy writes them in iptables mode.

The text is what `iptables-save` prints for rules that kube-proxy v1.37.2 has loaded, argument
order and spacing included, so that a node's rules can be compared with it line by line; and it
is a complete input for `iptables-restore`.  Without `--noflush` that replaces the tables mangle,
filter and nat as a whole: rules and chains that anybody else put there are gone, everything of
kube-proxy's is as on its first day.

Source: kube-proxy pkg/proxy/iptables/proxier.go (syncProxyRules); docs/services.md explains it.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address, ip_network

from netlab.datapath.services.endpoints import Endpoints, ServicePortInfo, Verdict, service_ports
from netlab.datapath.services.local import (
    LocalDetector,
    NodePortAddresses,
    local_detector,
    node_ip,
    node_port_addresses,
    own_addresses,
)
from netlab.datapath.services.names import address_port, chain_hash, service_port_name
from netlab.datapath.state import Ruleset, Sysctl
from netlab.topology.model import Endpoint, Lab, Node

INVALID_DROPPED = "ct_state_invalid_dropped_pkts"
LOCALHOST_ACCEPTED = "localhost_nps_accepted_pkts"

# More endpoints than this and kube-proxy saves the comments that are there once an endpoint.
LARGE_CLUSTER = 1000

_LAST = "kubernetes service nodeports; NOTE: this must be the last rule in this chain"


def render(lab: Lab, node: Node) -> Ruleset:
    """All rules of a node, and the accounting objects that must exist before they are loaded.

    Both families are always written, as kube-proxy does: an IPv4-only lab has the empty frame
    of chains in `ip6tables`.
    """
    return Ruleset(
        ipv4=_render(lab, node, 4),
        ipv6=_render(lab, node, 6),
        nfacct=(INVALID_DROPPED, LOCALHOST_ACCEPTED),
    )


def sysctls(lab: Lab, node: Node) -> tuple[Sysctl, ...]:
    """Sysctls that kube-proxy sets on the node."""
    settings = []
    if _localhost_node_ports(lab, node, 4):
        # without it the kernel calls packets from 127.0.0.1 to a pod martian
        settings.append(Sysctl(path="net/ipv4/conf/all/route_localnet", value="1"))
    if lab.service_proxy.conntrack.tcpBeLiberal:
        settings.append(Sysctl(path="net/netfilter/nf_conntrack_tcp_be_liberal", value="1"))
    return tuple(settings)


def purpose(lab: Lab) -> dict[str, str]:
    """What each chain of a Service is for: "demo/myblog", "demo/myblog → 10.244.2.5:8002".

    Holds the chains of every node, whether they exist there or not.
    """
    found: dict[str, str] = {}
    for service in lab.services:
        for port in service.ports:
            name = service_port_name(service.namespace, service.name, port.name)
            digest = chain_hash(name, port.protocol.lower())
            found[f"KUBE-SVC-{digest}"] = name
            found[f"KUBE-SVL-{digest}"] = f"{name}, endpoints on this node"
            found[f"KUBE-EXT-{digest}"] = f"{name}, from outside"
            found[f"KUBE-FW-{digest}"] = f"{name}, loadBalancerSourceRanges"
    for entry in lab.endpoints:
        name, protocol = (
            service_port_name(entry.namespace, entry.service, entry.port_name),
            entry.protocol.lower(),
        )
        for endpoint in entry.endpoints:
            text = address_port(endpoint)
            digest = chain_hash(name, protocol, text)
            found[f"KUBE-SEP-{digest}"] = f"{name} → {text}"
    return found


def _localhost_node_ports(lab: Lab, node: Node, family: int) -> bool:
    """Whether NodePorts work on 127.0.0.1; never on ::1, which the kernel does not route."""
    proxy = lab.service_proxy
    if family == 6 or not proxy.iptables.localhostNodePorts:
        return False
    return node_port_addresses(proxy, node, family).ipv4_loopback


def probability(ways: int) -> str:
    """One in so many, as `iptables-save` prints it.

    kube-proxy sends ten decimals, the kernel keeps a multiple of 2^-31, eleven are printed.
    """
    kept = round(float(f"{1 / ways:.10f}") * 2**31)
    return f"{kept / 2**31:.11f}"


class _Table:
    """A table under construction: chains with their rules, in the order of `iptables-save`."""

    def __init__(self, name: str, hooks: str, own: str) -> None:
        self._name = name
        self._hooks: dict[str, list[str]] = {hook: [] for hook in hooks.split()}
        self._chains: dict[str, list[str]] = {chain: [] for chain in own.split()}

    def add(self, chain: str, *parts: str) -> None:
        """Append a rule, given in parts of which some may be empty, and make its chain."""
        rules = self._hooks.get(chain)
        if rules is None:
            rules = self._chains.setdefault(chain, [])
        rules.append(" ".join(("-A", chain, *filter(None, parts))) + "\n")

    def text(self) -> str:
        """Built-in chains first, the others by name; the rules chain by chain."""
        own = sorted(self._chains)
        return "".join(
            (
                f"*{self._name}\n",
                *(f":{hook} ACCEPT [0:0]\n" for hook in self._hooks),
                *(f":{chain} - [0:0]\n" for chain in own),
                *(rule for rules in self._hooks.values() for rule in rules),
                *(rule for chain in own for rule in self._chains[chain]),
                "COMMIT\n",
            )
        )


@dataclass(frozen=True, slots=True)
class _Proxier:
    """Everything that the rules of one family on one node depend on."""

    family: int
    node_ip: str | None
    detector: LocalDetector | None
    node_port_addresses: NodePortAddresses
    own_addresses: list[str]
    localhost_node_ports: bool
    masquerade_all: bool
    be_liberal: bool
    mark: str
    large: bool


def _render(lab: Lab, node: Node, family: int) -> str:
    proxy = lab.service_proxy
    infos = service_ports(lab, node, family)
    proxier = _Proxier(
        family=family,
        node_ip=node_ip(node, family),
        detector=local_detector(proxy, node, family),
        node_port_addresses=node_port_addresses(proxy, node, family),
        own_addresses=own_addresses(lab, node, family),
        localhost_node_ports=_localhost_node_ports(lab, node, family),
        masquerade_all=proxy.iptables.masqueradeAll,
        be_liberal=proxy.conntrack.tcpBeLiberal,
        mark=f"{1 << proxy.iptables.masqueradeBit:#x}",
        large=sum(info.known for info in infos) > LARGE_CLUSTER,
    )
    mangle = _Table("mangle", "PREROUTING INPUT FORWARD OUTPUT POSTROUTING", "KUBE-PROXY-CANARY")
    filters, nat = _filter_frame(proxier), _nat_frame(proxier)
    for info in infos:
        _filter_rules(filters, proxier, info)
        _nat_rules(nat, proxier, info)
    _node_ports_last(nat, proxier)
    return mangle.text() + filters.text() + nat.text()


def _filter_frame(proxier: _Proxier) -> _Table:
    table = _Table(
        "filter",
        "INPUT FORWARD OUTPUT",
        "KUBE-EXTERNAL-SERVICES KUBE-FIREWALL KUBE-FORWARD KUBE-NODEPORTS KUBE-PROXY-CANARY "
        "KUBE-PROXY-FIREWALL KUBE-SERVICES",
    )
    new = "-m conntrack --ctstate NEW"
    balancer = f"{new} {_comment('kubernetes load balancer firewall')} -j KUBE-PROXY-FIREWALL"
    portals = f"{new} {_comment('kubernetes service portals')} -j KUBE-SERVICES"
    external = (
        f"{new} {_comment('kubernetes externally-visible service portals')} "
        "-j KUBE-EXTERNAL-SERVICES"
    )
    forwarding = _comment("kubernetes forwarding rules")
    health = _comment("kubernetes health check service ports")
    table.add("INPUT", "-j KUBE-FIREWALL")
    table.add("INPUT", balancer)
    table.add("INPUT", health, "-j KUBE-NODEPORTS")
    table.add("INPUT", external)
    table.add("FORWARD", balancer)
    table.add("FORWARD", forwarding, "-j KUBE-FORWARD")
    table.add("FORWARD", portals)
    table.add("FORWARD", external)
    table.add("OUTPUT", "-j KUBE-FIREWALL")
    table.add("OUTPUT", balancer)
    table.add("OUTPUT", portals)
    if proxier.localhost_node_ports:
        # route_localnet lets in packets to 127.0.0.1 from outside: keep them out
        table.add(
            "KUBE-FIREWALL",
            "! -s 127.0.0.0/8 -d 127.0.0.0/8",
            _comment("block incoming localnet connections"),
            "-m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP",
        )
    if not proxier.be_liberal:
        table.add(
            "KUBE-FORWARD",
            f"-m conntrack --ctstate INVALID {_nfacct(INVALID_DROPPED)} -j DROP",
        )
    marked = f"-m mark --mark {proxier.mark}/{proxier.mark}"
    table.add("KUBE-FORWARD", forwarding, marked, "-j ACCEPT")
    table.add(
        "KUBE-FORWARD",
        _comment("kubernetes forwarding conntrack rule"),
        "-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
    )
    return table


def _nat_frame(proxier: _Proxier) -> _Table:
    table = _Table(
        "nat",
        "PREROUTING INPUT OUTPUT POSTROUTING",
        "KUBE-MARK-MASQ KUBE-NODEPORTS KUBE-POSTROUTING KUBE-PROXY-CANARY KUBE-SERVICES",
    )
    mark = proxier.mark
    portals = _comment("kubernetes service portals")
    table.add("PREROUTING", portals, "-j KUBE-SERVICES")
    table.add("OUTPUT", portals, "-j KUBE-SERVICES")
    table.add("POSTROUTING", _comment("kubernetes postrouting rules"), "-j KUBE-POSTROUTING")
    table.add("KUBE-MARK-MASQ", f"-j MARK --set-xmark {mark}/{mark}")
    table.add("KUBE-POSTROUTING", f"-m mark ! --mark {mark}/{mark} -j RETURN")
    # the mark is taken off, so that a packet that comes by again (an overlay's) is not masqueraded
    table.add("KUBE-POSTROUTING", f"-j MARK --set-xmark {mark}/0x0")
    table.add(
        "KUBE-POSTROUTING",
        _comment("kubernetes service traffic requiring SNAT"),
        "-j MASQUERADE --random-fully",
    )
    return table


def _filter_rules(table: _Table, proxier: _Proxier, info: ServicePortInfo) -> None:
    """Refusals, the load balancer's firewall and the health check port of one Service port."""
    if info.internal is not Verdict.FORWARD:
        refusal = _refusal(proxier, info.internal)
        comment = _why_refused(info, info.internal)
        table.add("KUBE-SERVICES", _to(info, info.cluster_ip, comment), refusal)
    if info.external is not Verdict.FORWARD:
        refusal = _refusal(proxier, info.external)
        comment = _why_refused(info, info.external)
        for address in info.external_ips + info.load_balancer_ips:
            table.add("KUBE-EXTERNAL-SERVICES", _to(info, address, comment), refusal)
        if info.node_port:
            table.add(
                "KUBE-EXTERNAL-SERVICES",
                f"-p {info.protocol} {comment} -m addrtype --dst-type LOCAL",
                f"-m {info.protocol} --dport {info.node_port}",
                refusal,
            )
    if _has_firewall(info):
        name = f"KUBE-FW-{chain_hash(info.name, info.protocol)}"
        comment = _comment(f"{info.name} traffic not accepted by {name}")
        for address in info.load_balancer_ips:
            table.add("KUBE-PROXY-FIREWALL", _to(info, address, comment), "-j DROP")
    if info.health_check_node_port:
        table.add(
            "KUBE-NODEPORTS",
            f"-p tcp {_comment(f'{info.name} health check node port')} -m tcp",
            f"--dport {info.health_check_node_port} -j ACCEPT",
        )


def _nat_rules(table: _Table, proxier: _Proxier, info: ServicePortInfo) -> None:
    """The way of a new connection from an address of the Service to one of its endpoints."""
    digest = chain_hash(info.name, info.protocol)
    cluster, local = f"KUBE-SVC-{digest}", f"KUBE-SVL-{digest}"
    external, firewall = f"KUBE-EXT-{digest}", f"KUBE-FW-{digest}"

    if info.internal is Verdict.FORWARD:
        internal = local if info.internal_local else cluster
        to_cluster_ip = _to(info, info.cluster_ip, _comment(f"{info.name} cluster IP"))
        table.add("KUBE-SERVICES", to_cluster_ip, f"-j {internal}")
        _masquerade_cluster_ip(table, proxier, info, internal)
    if info.has_any and info.externally_accessible:
        for address in info.external_ips:
            comment = _comment(f"{info.name} external IP")
            table.add("KUBE-SERVICES", _to(info, address, comment), f"-j {external}")
        for address in info.load_balancer_ips:
            comment = _comment(f"{info.name} loadbalancer IP")
            target = firewall if _has_firewall(info) else external
            table.add("KUBE-SERVICES", _to(info, address, comment), f"-j {target}")
        _external_chain(table, proxier, info, external, cluster, local)
    if _has_firewall(info):
        _firewall_chain(table, proxier, info, firewall, external)
    if info.has_any and info.node_port:
        _node_port(table, proxier, info, external)

    if info.cluster:
        _choice(table, proxier, info, cluster, info.cluster)
    if info.local:
        _choice(table, proxier, info, local, info.local)
    for endpoint in info.reachable:
        _endpoint_chain(table, proxier, info, endpoint)


def _masquerade_cluster_ip(
    table: _Table, proxier: _Proxier, info: ServicePortInfo, chain: str
) -> None:
    """Mark what comes to the ClusterIP from elsewhere than a pod: its reply must come back here."""
    if proxier.masquerade_all:
        source, interface = "", ""
    elif proxier.detector:
        source, interface = _from_pods(proxier.detector, "! ")
    else:
        return
    comment = _comment(f"{info.name} cluster IP")
    to_cluster_ip = _to(info, info.cluster_ip, comment, interface)
    table.add(chain, source, to_cluster_ip, "-j KUBE-MARK-MASQ")


def _external_chain(
    table: _Table,
    proxier: _Proxier,
    info: ServicePortInfo,
    chain: str,
    cluster: str,
    local: str,
) -> None:
    """KUBE-EXT: what policy Cluster or Local means for traffic to external addresses."""
    what = f"{info.name} external destinations"
    if not info.external_local:
        # the endpoint may be on another node, and must answer through this one
        table.add(chain, _comment(f"masquerade traffic for {what}"), "-j KUBE-MARK-MASQ")
        table.add(chain, f"-j {cluster}")
        return
    if proxier.detector:
        pods = " ".join(filter(None, _from_pods(proxier.detector)))
        table.add(chain, pods, _comment(f"pod traffic for {what}"), f"-j {cluster}")
    from_node = "-m addrtype --src-type LOCAL"
    masquerade = _comment(f"masquerade LOCAL traffic for {what}")
    table.add(chain, masquerade, from_node, "-j KUBE-MARK-MASQ")
    table.add(chain, _comment(f"route LOCAL traffic for {what}"), from_node, f"-j {cluster}")
    if info.local:
        table.add(chain, f"-j {local}")


def _firewall_chain(
    table: _Table, proxier: _Proxier, info: ServicePortInfo, chain: str, external: str
) -> None:
    """KUBE-FW: who may use the load balancer.

    The rest is not translated, and so meets KUBE-PROXY-FIREWALL in the filter table.
    """
    ranges = [ip_network(text) for text in info.source_ranges]
    sources = list(info.source_ranges)
    if proxier.node_ip and any(ip_address(proxier.node_ip) in network for network in ranges):
        # a load balancer that routes may leave its own address as the source of the node's packets
        sources += [_host(address) for address in info.load_balancer_ips]
    for source in sources:
        comment = _comment(f"{info.name} loadbalancer IP")
        table.add(chain, f"-s {source} {comment} -j {external}")
    end = f"other traffic to {info.name} will be dropped by KUBE-PROXY-FIREWALL"
    table.add(chain, _comment(end))


def _node_port(table: _Table, proxier: _Proxier, info: ServicePortInfo, external: str) -> None:
    protocol, comment = info.protocol, _comment(info.name)
    to_port = f"-p {protocol} {comment} -m {protocol} --dport {info.node_port}"
    if proxier.localhost_node_ports:
        table.add(
            "KUBE-NODEPORTS",
            f"-d 127.0.0.0/8 {to_port} {_nfacct(LOCALHOST_ACCEPTED)} -j {external}",
        )
    table.add("KUBE-NODEPORTS", f"{to_port} -j {external}")


def _choice(
    table: _Table, proxier: _Proxier, info: ServicePortInfo, chain: str, endpoints: Endpoints
) -> None:
    """KUBE-SVC and KUBE-SVL: one endpoint of a set, the one remembered or one at random."""
    targets = []
    for endpoint in endpoints:
        text = address_port(endpoint)
        comment = "" if proxier.large else _comment(f"{info.name} -> {text}")
        targets.append((comment, _endpoint_chain_name(info, text)))
    if info.affinity_s is not None:
        remembered = f"--rcheck --seconds {info.affinity_s} --reap"
        for comment, target in targets:
            table.add(chain, comment, _recent(proxier, remembered, target), f"-j {target}")
    for position, (comment, target) in enumerate(targets):
        ways = len(targets) - position
        chance = f"-m statistic --mode random --probability {probability(ways)}" * (ways > 1)
        table.add(chain, comment, chance, f"-j {target}")


def _endpoint_chain(
    table: _Table, proxier: _Proxier, info: ServicePortInfo, endpoint: Endpoint
) -> None:
    """KUBE-SEP: the translation to one endpoint."""
    text = address_port(endpoint)
    chain = _endpoint_chain_name(info, text)
    comment = "" if proxier.large else _comment(info.name)
    # An endpoint that reaches itself would answer itself directly, past the translation back.
    table.add(chain, f"-s {_host(endpoint.address)}", comment, "-j KUBE-MARK-MASQ")
    table.add(
        chain,
        f"-p {info.protocol}",
        comment,
        "" if info.affinity_s is None else _recent(proxier, "--set", chain),
        f"-m {info.protocol} -j DNAT --to-destination {text}",
    )


def _node_ports_last(table: _Table, proxier: _Proxier) -> None:
    """What is for the node itself and no Service address may be for a NodePort."""
    if proxier.node_port_addresses.match_all:
        but = "! -d ::1/128" if proxier.family == 6 else "! -d 127.0.0.0/8"
        if proxier.localhost_node_ports:
            but = ""
        local = "-m addrtype --dst-type LOCAL"
        table.add("KUBE-SERVICES", but, _comment(_LAST), local, "-j KUBE-NODEPORTS")
        return
    for address in proxier.node_port_addresses.of(proxier.own_addresses):
        if not ip_address(address).is_loopback or proxier.localhost_node_ports:
            table.add("KUBE-SERVICES", f"-d {_host(address)} {_comment(_LAST)} -j KUBE-NODEPORTS")


def _has_firewall(info: ServicePortInfo) -> bool:
    return bool(info.has_any and info.load_balancer_ips and info.source_ranges)


def _refusal(proxier: _Proxier, verdict: Verdict) -> str:
    if verdict is Verdict.DROP:
        return "-j DROP"
    version = "" if proxier.family == 4 else "6"
    return f"-j REJECT --reject-with icmp{version}-port-unreachable"


def _why_refused(info: ServicePortInfo, verdict: Verdict) -> str:
    missing = "endpoints" if verdict is Verdict.REJECT else "local endpoints"
    return _comment(f"{info.name} has no {missing}")


def _from_pods(detector: LocalDetector, negation: str = "") -> tuple[str, str]:
    """A match on packets of pods, as the source and the interface part of a rule."""
    if detector.cidr:
        return f"{negation}-s {detector.cidr}", ""
    return "", f"{negation}-i {detector.interface or detector.prefix + '+'}"


def _to(info: ServicePortInfo, address: str, comment: str, interface: str = "") -> str:
    """A match on packets to the Service port at one address."""
    interface += " " * bool(interface)
    protocol = info.protocol
    return (
        f"-d {_host(address)} {interface}-p {protocol} {comment} -m {protocol} --dport {info.port}"
    )


def _endpoint_chain_name(info: ServicePortInfo, text: str) -> str:
    return f"KUBE-SEP-{chain_hash(info.name, info.protocol, text)}"


def _recent(proxier: _Proxier, action: str, name: str) -> str:
    mask = "255.255.255.255" if proxier.family == 4 else ":".join(["ffff"] * 8)
    return f"-m recent {action} --name {name} --mask {mask} --rsource"


def _nfacct(name: str) -> str:
    # iptables-save prints two blanks here
    return f"-m nfacct --nfacct-name  {name}"


def _host(address: str) -> str:
    return f"{address}/128" if ":" in address else f"{address}/32"


def _comment(text: str) -> str:
    return f'-m comment --comment "{text}"'
