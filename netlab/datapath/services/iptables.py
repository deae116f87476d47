"""Service rules of one node as kube-proxy writes them in iptables mode.

The text is what `iptables-save` prints for rules that kube-proxy v1.37.2 has loaded, argument
order and spacing included, so that a node's rules can be compared with it line by line; and it
is a complete input for `iptables-restore`.  Loaded without `--noflush` it replaces the tables
mangle, filter and nat as a whole: rules and chains that anybody else put there are gone, those of
kube-proxy are as when it starts.

Source: kube-proxy pkg/proxy/iptables/proxier.go (syncProxyRules); docs/services.md explains it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from ipaddress import ip_address
from itertools import chain as chained
from typing import TypeVar

from msgspec import structs

from netlab.datapath.services.collecting import no_collecting
from netlab.datapath.services.endpoints import ServiceObjects, ports_of, service_objects
from netlab.datapath.services.iptables_save import Table, comment, host, nfacct
from netlab.datapath.services.iptables_service import (
    LOCALHOST_ACCEPTED,
    Settings,
    add_filter_rules,
    add_nat_rules,
    chain_texts,
)
from netlab.datapath.services.listeners import health_checks
from netlab.datapath.services.local import (
    conntrack_sysctls,
    local_detector,
    node_ip,
    node_port_addresses,
    own_addresses,
)
from netlab.datapath.services.names import prepare_chain_hashes
from netlab.datapath.state import Ruleset, Server, Sysctl, Update
from netlab.topology.model import Lab, Node

INVALID_DROPPED = "ct_state_invalid_dropped_pkts"
ROUTE_LOCALNET = "net/ipv4/conf/all/route_localnet"
LARGE_CLUSTER = 1000  # endpoints
R = TypeVar("R", bound=Ruleset | Update)


def render(lab: Lab, node: Node) -> Ruleset:
    """All rules of a node, and the accounting objects that must exist before they are loaded.

    Both families are always written, as kube-proxy does: an IPv4-only lab has the empty frame
    of chains in `ip6tables`.
    """
    return render_services(lab, node, service_objects(lab).values())


def render_services(lab: Lab, node: Node, services: Collection[ServiceObjects]) -> Ruleset:
    """The same, of these Services in place of the lab's."""
    return Ruleset(
        ipv4=_tables(lab, node, 4, services),
        ipv6=_tables(lab, node, 6, services),
        nfacct=(INVALID_DROPPED, LOCALHOST_ACCEPTED),
        backend=lab.iptables_backend,
    )


def without_counting(rules: R) -> R:
    """The same for a kernel that has no accounting objects, as kube-proxy writes it there."""
    ipv4, ipv6 = (
        "".join(
            line.replace(f" {nfacct(INVALID_DROPPED)}", "")
            for line in text.splitlines(keepends=True)
            if nfacct(LOCALHOST_ACCEPTED) not in line  # the rule behind it does the same
        )
        for text in (rules.ipv4, rules.ipv6)
    )
    if isinstance(rules, Ruleset):
        rules = structs.replace(rules, nfacct=())
    return structs.replace(rules, ipv4=ipv4, ipv6=ipv6)


def sysctls(lab: Lab, node: Node) -> tuple[Sysctl, ...]:
    """Sysctls that kube-proxy sets on the node."""
    settings = [*conntrack_sysctls(lab.service_proxy)]
    if _localhost_node_ports(lab, node, 4):
        # without it the kernel calls packets from 127.0.0.1 to a pod martian
        settings.append(Sysctl(path=ROUTE_LOCALNET, value="1"))
    return tuple(settings)


def servers(lab: Lab, node: Node) -> list[Server]:
    """What kube-proxy itself answers on the node."""
    return health_checks(lab, node, node_port_addresses)


def _localhost_node_ports(lab: Lab, node: Node, family: int) -> bool:
    """Whether NodePorts work on 127.0.0.1; never on ::1, which the kernel does not route."""
    proxy = lab.service_proxy
    if family == 6 or not proxy.iptables.localhostNodePorts:
        return False
    return node_port_addresses(proxy, node, family).ipv4_loopback


def settings_of(lab: Lab, node: Node, family: int) -> Settings:
    """What the rules of all Services depend on, in a cluster that is not large."""
    proxy = lab.service_proxy
    return Settings(
        family=family,
        node_ip=node_ip(node, family),
        detector=local_detector(proxy, node, family),
        masquerade_all=proxy.iptables.masqueradeAll,
        localhost_node_ports=_localhost_node_ports(lab, node, family),
        large_cluster=False,
    )


@no_collecting()
def _tables(lab: Lab, node: Node, family: int, services: Iterable[ServiceObjects]) -> str:
    proxy = lab.service_proxy
    infos = ports_of(services, proxy, node, family)
    large = sum(len(info.known) for info in infos) > LARGE_CLUSTER
    settings = replace(settings_of(lab, node, family), large_cluster=large)
    mark = f"{1 << proxy.iptables.masqueradeBit:#x}"
    mangle = Table("mangle", "PREROUTING INPUT FORWARD OUTPUT POSTROUTING", "KUBE-PROXY-CANARY")
    filters = _filter_frame(mark, settings.localhost_node_ports, proxy.conntrack.tcpBeLiberal)
    nat = _nat_frame(mark)
    prepare_chain_hashes(chained.from_iterable(map(chain_texts, infos)))
    for info in infos:
        add_filter_rules(filters, settings, info)
        add_nat_rules(nat, settings, info)
    for match in _node_port_destinations(lab, node, settings):
        nat.add("KUBE-SERVICES", *match, "-j KUBE-NODEPORTS")
    return mangle.text() + filters.text() + nat.text()


def _filter_frame(mark: str, localhost_node_ports: bool, be_liberal: bool) -> Table:
    table = Table(
        "filter",
        "INPUT FORWARD OUTPUT",
        "KUBE-EXTERNAL-SERVICES KUBE-FIREWALL KUBE-FORWARD KUBE-NODEPORTS KUBE-PROXY-CANARY "
        "KUBE-PROXY-FIREWALL KUBE-SERVICES",
    )
    new = "-m conntrack --ctstate NEW"
    firewall = comment("kubernetes load balancer firewall")
    health = comment("kubernetes health check service ports")
    portals = comment("kubernetes service portals")
    external = comment("kubernetes externally-visible service portals")
    forwarding = comment("kubernetes forwarding rules")
    table.add("INPUT", "-j KUBE-FIREWALL")
    table.add("INPUT", new, firewall, "-j KUBE-PROXY-FIREWALL")
    table.add("INPUT", health, "-j KUBE-NODEPORTS")
    table.add("INPUT", new, external, "-j KUBE-EXTERNAL-SERVICES")
    table.add("FORWARD", new, firewall, "-j KUBE-PROXY-FIREWALL")
    table.add("FORWARD", forwarding, "-j KUBE-FORWARD")
    table.add("FORWARD", new, portals, "-j KUBE-SERVICES")
    table.add("FORWARD", new, external, "-j KUBE-EXTERNAL-SERVICES")
    table.add("OUTPUT", "-j KUBE-FIREWALL")
    table.add("OUTPUT", new, firewall, "-j KUBE-PROXY-FIREWALL")
    table.add("OUTPUT", new, portals, "-j KUBE-SERVICES")
    if localhost_node_ports:
        # route_localnet lets in packets to 127.0.0.1 from outside: keep them out
        table.add(
            "KUBE-FIREWALL",
            "! -s 127.0.0.0/8 -d 127.0.0.0/8",
            comment("block incoming localnet connections"),
            "-m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP",
        )
    if not be_liberal:
        invalid = "-m conntrack --ctstate INVALID"
        table.add("KUBE-FORWARD", invalid, nfacct(INVALID_DROPPED), "-j DROP")
    table.add("KUBE-FORWARD", forwarding, f"-m mark --mark {mark}/{mark} -j ACCEPT")
    table.add(
        "KUBE-FORWARD",
        comment("kubernetes forwarding conntrack rule"),
        "-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
    )
    return table


def _nat_frame(mark: str) -> Table:
    table = Table(
        "nat",
        "PREROUTING INPUT OUTPUT POSTROUTING",
        "KUBE-MARK-MASQ KUBE-NODEPORTS KUBE-POSTROUTING KUBE-PROXY-CANARY KUBE-SERVICES",
    )
    portals = comment("kubernetes service portals")
    table.add("PREROUTING", portals, "-j KUBE-SERVICES")
    table.add("OUTPUT", portals, "-j KUBE-SERVICES")
    table.add("POSTROUTING", comment("kubernetes postrouting rules"), "-j KUBE-POSTROUTING")
    table.add("KUBE-MARK-MASQ", f"-j MARK --set-xmark {mark}/{mark}")
    table.add("KUBE-POSTROUTING", f"-m mark ! --mark {mark}/{mark} -j RETURN")
    # the outer packet of an overlay inherits the mark, and must not be masqueraded for it
    table.add("KUBE-POSTROUTING", f"-j MARK --set-xmark {mark}/0x0")
    table.add(
        "KUBE-POSTROUTING",
        comment("kubernetes service traffic requiring SNAT"),
        "-j MASQUERADE --random-fully",
    )
    return table


def _node_port_destinations(lab: Lab, node: Node, settings: Settings) -> list[tuple[str, ...]]:
    """Matches on packets to the node itself, which may be for a NodePort."""
    what = comment("kubernetes service nodeports; NOTE: this must be the last rule in this chain")
    chosen = node_port_addresses(lab.service_proxy, node, settings.family)
    if chosen.match_all:
        loopback = "::1/128" if settings.family == 6 else "127.0.0.0/8"
        but = "" if settings.localhost_node_ports else f"! -d {loopback}"
        return [(but, what, "-m addrtype --dst-type LOCAL")]
    return [
        (f"-d {host(address)}", what)
        for address in chosen.of(own_addresses(lab, node, settings.family))
        if settings.localhost_node_ports or not ip_address(address).is_loopback
    ]
