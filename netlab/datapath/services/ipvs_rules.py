"""The iptables rules of ipvs mode: the same few however many Services there are.

They ask the sets.  kube-proxy leaves out those of the nat table that ask a set which is empty.

Source: kube-proxy pkg/proxy/ipvs/proxier.go (writeIptablesRules, ipsetWithIptablesChain).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from netlab.datapath.services import ipvs_sets as sets
from netlab.datapath.services.iptables_save import Table, comment, host
from netlab.datapath.services.ipvs_service import Settings
from netlab.datapath.services.local import LocalDetector

Barred = tuple[str, str, int]

_NUMBERS = {"tcp": 6, "udp": 17, "sctp": 132}
_ADDRESSED = "dst,dst"
_FROM_OUTSIDE = "-m physdev ! --physdev-is-in -m addrtype ! --src-type LOCAL"

_FILTER_CHAINS = (
    "KUBE-FORWARD KUBE-IPVS-FILTER KUBE-IPVS-OUT-FILTER KUBE-NODE-PORT KUBE-PROXY-FIREWALL "
    "KUBE-SOURCE-RANGES-FIREWALL"
)
_NAT_CHAINS = "KUBE-LOAD-BALANCER KUBE-MARK-MASQ KUBE-NODE-PORT KUBE-POSTROUTING KUBE-SERVICES"


def ruleset(settings: Settings, filled: Collection[str], barred: Iterable[Barred]) -> str:
    """The tables filter and nat as `iptables-save` prints them.

    `filled` are the roles of the sets that have entries, `barred` the load balancers that the node
    itself may not use.
    """
    return _filter(settings, filled, barred).text() + _nat(settings, filled).text()


def own_chains(text: str) -> str:
    """Of such a text what rewrites the chains of ours, for `iptables-restore --noflush`."""
    return "".join(
        line
        for line in text.splitlines(keepends=True)
        if line.startswith(("*", ":KUBE-", "-A KUBE-", "COMMIT"))
    )


def _filter(settings: Settings, filled: Collection[str], barred: Iterable[Barred]) -> Table:
    table = Table("filter", "INPUT FORWARD OUTPUT", _FILTER_CHAINS)
    access = comment("kubernetes ipvs access filter")
    firewall = comment("kube-proxy firewall rules")
    forwarding = comment("kubernetes forwarding rules")
    table.add("INPUT", access, "-j KUBE-IPVS-FILTER")
    table.add("INPUT", firewall, "-j KUBE-PROXY-FIREWALL")
    table.add("INPUT", comment("kubernetes health check rules"), "-j KUBE-NODE-PORT")
    table.add("FORWARD", firewall, "-j KUBE-PROXY-FIREWALL")
    table.add("FORWARD", forwarding, "-j KUBE-FORWARD")
    table.add("OUTPUT", access, "-j KUBE-IPVS-OUT-FILTER")
    mark = settings.mark
    table.add("KUBE-FORWARD", forwarding, f"-m mark --mark {mark}/{mark} -j ACCEPT")
    table.add(
        "KUBE-FORWARD",
        comment("kubernetes forwarding conntrack rule"),
        "-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
    )
    for role in (
        sets.LOAD_BALANCER,
        sets.CLUSTER_IP,
        sets.EXTERNAL_IP,
        sets.EXTERNAL_IP_LOCAL,
    ):
        table.add("KUBE-IPVS-FILTER", _match(settings, role), "-j RETURN")
    health = _match(settings, sets.HEALTH_CHECK, "dst")
    table.add("KUBE-IPVS-FILTER", health, "-j RETURN")
    # What is addressed to a virtual server's address and is for none of the servers there
    refused = "icmp" if settings.family == 4 else "icmp6"
    table.add(
        "KUBE-IPVS-FILTER",
        "-m conntrack --ctstate NEW",
        _match(settings, sets.IPVS_IPS, "dst"),
        f"-j REJECT --reject-with {refused}-port-unreachable",
    )
    for address, protocol, port in barred:
        table.add(
            "KUBE-IPVS-OUT-FILTER",
            f"-s {host(address)} -m ipvs --vproto {_NUMBERS[protocol]} --vaddr {address}",
            f"--vport {port} -j DROP",
        )
    table.add("KUBE-NODE-PORT", comment("Kubernetes health check node port"), health, "-j ACCEPT")
    _add_source_ranges(table, settings, filled)
    return table


def _add_source_ranges(table: Table, settings: Settings, filled: Collection[str]) -> None:
    chain = "KUBE-SOURCE-RANGES-FIREWALL"
    balancer = "Kubernetes service load balancer ip + port"
    if sets.FIREWALL in filled:
        words = comment(f"{balancer} for load balancer with sourceRange")
        table.add("KUBE-PROXY-FIREWALL", words, _match(settings, sets.FIREWALL), f"-j {chain}")
    for role, words in ((sets.SOURCE_CIDR, "source cidr"), (sets.SOURCE_IP, "source IP")):
        if role in filled:
            told = comment(f"{balancer} + {words} for packet filter purpose")
            table.add(chain, told, _match(settings, role, "dst,dst,src"), "-j RETURN")
    table.add(chain, "-j DROP")


def _nat(settings: Settings, filled: Collection[str]) -> Table:
    table = Table("nat", "PREROUTING INPUT OUTPUT POSTROUTING", _NAT_CHAINS)
    portals = comment("kubernetes service portals")
    table.add("PREROUTING", portals, "-j KUBE-SERVICES")
    table.add("OUTPUT", portals, "-j KUBE-SERVICES")
    table.add("POSTROUTING", comment("kubernetes postrouting rules"), "-j KUBE-POSTROUTING")
    if sets.LOAD_BALANCER_LOCAL in filled:
        told = comment(
            "Kubernetes service load balancer ip + port with externalTrafficPolicy=local"
        )
        local = _match(settings, sets.LOAD_BALANCER_LOCAL)
        table.add("KUBE-LOAD-BALANCER", told, local, "-j RETURN")
    table.add("KUBE-LOAD-BALANCER", "-j KUBE-MARK-MASQ")
    mark = settings.mark
    table.add("KUBE-MARK-MASQ", f"-j MARK --set-xmark {mark}/{mark}")
    _add_node_ports(table, settings, filled)
    if sets.LOOP_BACK in filled:
        hairpin = comment("Kubernetes endpoints dst ip:port, source ip for solving hairpin purpose")
        loop_back = _match(settings, sets.LOOP_BACK, "dst,dst,src")
        table.add("KUBE-POSTROUTING", hairpin, loop_back, "-j MASQUERADE")
    table.add("KUBE-POSTROUTING", f"-m mark ! --mark {mark}/{mark} -j RETURN")
    table.add("KUBE-POSTROUTING", f"-j MARK --set-xmark {mark}/0x0")
    snat = comment("kubernetes service traffic requiring SNAT")
    table.add("KUBE-POSTROUTING", snat, "-j MASQUERADE --random-fully")
    _add_services(table, settings, filled)
    return table


def _add_node_ports(table: Table, settings: Settings, filled: Collection[str]) -> None:
    for protocol in ("tcp", "udp", "sctp"):
        kind, direction = ("", "dst")
        if protocol == "sctp":
            kind, direction = r" with type \'hash ip:port\'", _ADDRESSED
        for local, words, target in (
            (True, "with externalTrafficPolicy=local", "RETURN"),
            (False, "for masquerade purpose", "KUBE-MARK-MASQ"),
        ):
            role = sets.node_ports(protocol, local=local)
            if role in filled:
                told = comment(f"Kubernetes nodeport {protocol.upper()} port {words}{kind}")
                match = _match(settings, role, direction)
                table.add("KUBE-NODE-PORT", f"-p {protocol}", told, match, f"-j {target}")


def _add_services(table: Table, settings: Settings, filled: Collection[str]) -> None:
    chain = "KUBE-SERVICES"
    loopback = "127.0.0.0/8" if settings.family == 4 else "::1/128"
    table.add(chain, f"-s {loopback} -j RETURN")
    if sets.LOAD_BALANCER in filled:
        told = comment("Kubernetes service lb portal")
        balancer = _match(settings, sets.LOAD_BALANCER)
        table.add(chain, told, balancer, "-j KUBE-LOAD-BALANCER")
    if sets.CLUSTER_IP in filled:
        _add_cluster_ips(table, settings)
    _add_external_ips(table, settings, filled)
    table.add(chain, "-m addrtype --dst-type LOCAL -j KUBE-NODE-PORT")
    for role in (sets.CLUSTER_IP, sets.LOAD_BALANCER):
        if role in filled:
            table.add(chain, _match(settings, role), "-j ACCEPT")


def _add_cluster_ips(table: Table, settings: Settings) -> None:
    told = comment("Kubernetes service cluster ip + port for masquerade purpose")
    outside, direction = "", _ADDRESSED
    if not settings.masquerade_all:
        if settings.detector:
            outside = _not_from(settings.detector)
        else:
            # Packets from a cluster IP are those of the node itself, which chose that source
            direction = "src,dst"
    match = _match(settings, sets.CLUSTER_IP, direction)
    table.add("KUBE-SERVICES", outside, told, match, "-j KUBE-MARK-MASQ")


def _add_external_ips(table: Table, settings: Settings, filled: Collection[str]) -> None:
    chain = "KUBE-SERVICES"
    for role, words in (
        (sets.EXTERNAL_IP, "for masquerade and filter purpose"),
        (sets.EXTERNAL_IP_LOCAL, "with externalTrafficPolicy=local"),
    ):
        if role in filled:
            told = comment(f"Kubernetes service external ip + port {words}")
            match = _match(settings, role)
            if role == sets.EXTERNAL_IP:
                table.add(chain, told, match, "-j KUBE-MARK-MASQ")
            table.add(chain, told, match, _FROM_OUTSIDE, "-j ACCEPT")
            table.add(chain, told, match, "-m addrtype --dst-type LOCAL -j ACCEPT")


def _not_from(detector: LocalDetector) -> str:
    if detector.cidr:
        return f"! -s {detector.cidr}"
    return f"! -i {detector.interface or f'{detector.prefix}+'}"


def _match(settings: Settings, role: str, direction: str = _ADDRESSED) -> str:
    return f"-m set --match-set {sets.set_name(role, settings.family)} {direction}"
