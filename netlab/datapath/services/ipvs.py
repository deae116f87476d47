"""Services of one node as kube-proxy leaves them in ipvs mode.

The kernel's IPVS chooses among endpoints: a virtual server for each address and port, with the
endpoints as its real servers.  The addresses are on the dummy device `kube-ipvs0`, ipsets tell the
few iptables rules which packets are for Services, and those rules only masquerade and refuse.

Source: kube-proxy v1.37.2, pkg/proxy/ipvs/proxier.go (syncProxyRules); docs/services-ipvs.md
explains it.
"""

from __future__ import annotations

from collections.abc import Collection

from netlab.datapath.services import ipvs_sets as sets
from netlab.datapath.services.claims import losses, settled
from netlab.datapath.services.endpoints import ServiceObjects, ports_of, service_objects
from netlab.datapath.services.ipvs_rules import ruleset
from netlab.datapath.services.ipvs_service import Parts, Settings, parts
from netlab.datapath.services.listeners import health_checks
from netlab.datapath.services.local import (
    conntrack_sysctls,
    local_detector,
    node_ip,
    node_port_addresses,
    own_addresses,
)
from netlab.datapath.state import Balancing, Ruleset, Server, Sysctl
from netlab.topology.model import Lab, Node

DEVICE = "kube-ipvs0"
FAMILIES: tuple[sets.Family, ...] = (4, 6)
_LOOPBACK = frozenset({"127.0.0.1", "::1"})


def render(lab: Lab, node: Node) -> Balancing:
    """All of a node, of both families whether the lab uses them or not."""
    services = service_objects(lab).values()
    return rendered(
        lab, node, {family: parts_of(lab, node, family, services) for family in FAMILIES}
    )


def rendered(lab: Lab, node: Node, by_family: dict[sets.Family, Parts]) -> Balancing:
    """The same of what Service ports put there, by family."""
    made: list[tuple[dict[str, dict[str, None]], str]] = []
    for family, each in by_family.items():
        entries: dict[str, dict[str, None]] = {role: {} for role in sets.ROLES}
        for role, entry in each.entries:
            entries[role][entry] = None
        filled = {role for role, found in entries.items() if found}
        barred = dict.fromkeys(each.barred)
        made.append((entries, ruleset(settings_of(lab, node, family), filled, barred)))
    ipvs = lab.service_proxy.ipvs
    return Balancing(
        device=DEVICE,
        addresses=tuple(dict.fromkeys(ip for each in by_family.values() for ip in each.addresses)),
        servers=tuple(server for each in by_family.values() for server in each.servers),
        sets=tuple(
            sets.ip_set(role, family, tuple(found))
            for family, (entries, _) in zip(by_family, made, strict=True)
            for role, found in entries.items()
        ),
        rules=Ruleset(ipv4=made[0][1], ipv6=made[1][1], backend=lab.iptables_backend),
        timeouts_s=(ipvs.tcpTimeout, ipvs.tcpFinTimeout, ipvs.udpTimeout),
    )


def parts_of(
    lab: Lab, node: Node, family: sets.Family, services: Collection[ServiceObjects]
) -> Parts:
    """What Services put on a node; an address that several of them name is the first one's."""
    infos = ports_of(services, lab.service_proxy, node, family)
    return parts(settings_of(lab, node, family), settled(infos, losses(infos)))


def settings_of(lab: Lab, node: Node, family: sets.Family) -> Settings:
    """What the rules of all Services of a family depend on."""
    proxy = lab.service_proxy
    own = [ip for ip in own_addresses(lab, node, family) if ip not in _LOOPBACK]
    chosen = node_port_addresses(proxy, node, family)
    return Settings(
        family=family,
        node=node.name,
        node_ip=node_ip(node, family),
        own_addresses=frozenset(own),
        node_port_addresses=tuple(sorted(own) if chosen.match_all else chosen.of(own)),
        scheduler=proxy.ipvs.scheduler,
        detector=local_detector(proxy, node, family),
        masquerade_all=proxy.iptables.masqueradeAll,
        mark=f"{1 << proxy.iptables.masqueradeBit:#x}",
    )


def sysctls(lab: Lab, node: Node) -> tuple[Sysctl, ...]:
    """Sysctls that kube-proxy sets on the node."""
    settings = {
        "net/ipv4/vs/conntrack": "1",  # NAT rules see what IPVS has translated
        "net/ipv4/vs/expire_nodest_conn": "1",
        "net/ipv4/vs/expire_quiescent_template": "1",
        "net/ipv4/ip_forward": "1",
    }
    if lab.service_proxy.ipvs.strictARP:
        settings["net/ipv4/conf/all/arp_ignore"] = "1"
        settings["net/ipv4/conf/all/arp_announce"] = "2"
    found = (Sysctl(path=path, value=value) for path, value in settings.items())
    return (*conntrack_sysctls(lab.service_proxy), *found)


def servers(lab: Lab, node: Node) -> list[Server]:
    """What kube-proxy itself answers on the node."""
    return health_checks(lab, node, node_port_addresses)
