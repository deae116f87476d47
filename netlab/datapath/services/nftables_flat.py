"""Service rules of one node in maps that all Services share: as nftables mode, but in few rules.

kube-proxy's nftables mode has a chain and an anonymous map for each Service, and each such map
costs the kernel a scan of all sets of the table.  Here a Service is nothing but elements of named
maps, and rules depend only on how many endpoints there are behind some Service.  The verdict for
every packet is that of nftables mode.

The tables are `ip netlab` and `ip6 netlab`.  docs/services-nftables-flat.md explains them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from netlab.datapath.services.endpoints import ServiceObjects, ServicePortInfo
from netlab.datapath.services.local import own_addresses
from netlab.datapath.services.nftables import (
    add_base_chains,
    add_node_port_addresses,
    add_postrouting_and_checks,
    masquerade_cluster_ips,
    primary_node_ports,
    settings_of,
)
from netlab.datapath.services.nftables_flat_service import (
    LOCAL_NODEPORT,
    LOCAL_SERVICE,
    NODEPORT,
    SERVICE,
    Elements,
    Numbers,
    Site,
    Way,
    add_service,
    class_id,
    remembering,
    way_of,
)
from netlab.datapath.services.nftables_list import TableText, duration
from netlab.datapath.services.nftables_proxier import Services, TableProxier, TablesProxier, Uses
from netlab.datapath.services.nftables_service import HAIRPINS, Settings, from_pods
from netlab.datapath.state import Table, Tables, Update
from netlab.topology.model import Lab, Node

_NAME = "netlab"
TABLES = (f"ip {_NAME}", f"ip6 {_NAME}")
SITES = (SERVICE, LOCAL_SERVICE, NODEPORT, LOCAL_NODEPORT)

# Clients remembered on a node; room for so many is taken when the set is made, 16 bytes each.
_REMEMBERED = 262144

# Services that are asked for their ways at once: the usual ways are found among few.
_TOGETHER = 200

# NAT of a port wants to know that there is one.
_HAS_PORTS = "meta l4proto { tcp, udp, sctp }"


def render(lab: Lab, node: Node) -> Tables:
    """All rules of a node: a table for each family, written whether the lab uses it or not."""
    return proxier(lab, node).whole()


def proxier(lab: Lab, node: Node) -> TablesProxier:
    """What keeps the rules of a node up to date."""
    return TablesProxier(lab, node, _TableProxier)


class _TableProxier(TableProxier):
    def __init__(self, lab: Lab, node: Node, family: int) -> None:
        super().__init__(lab, node, family, settings_of(lab, node, family))
        self._ways: Uses[Way] | None = None
        self._numbers: Numbers | None = None

    def whole(self, services: Services) -> Table:
        table = _frame(self.lab, self.node, self.family, self.settings)
        elements = self._add(table, self.ports(services), Numbers())
        _add_choices(table, self.settings.ip, set(elements.ways))
        self.hairpins = Uses(table.elements[HAIRPINS])
        self._ways = Uses(elements.ways)
        self._numbers = elements.numbers
        return table.table()

    def update(self, known: Services, before: Services, after: Services) -> Update | None:
        old_ports, new_ports = self.ports(before), self.ports(after)
        old_names, new_names = (
            {name for info in ports for name in remembering(info)}
            for ports in (old_ports, new_ports)
        )
        if (old_names or new_names) and self._numbers is None:
            remember = [each for each in known if each.service.session_affinity == "ClientIP"]
            self._numbers = self._part(self.ports(remember), Numbers()).numbers
        numbers = self._numbers or Numbers()
        old = self._part(old_ports, numbers)
        gone = sorted(numbers.of(name) for name in old_names - new_names)
        numbers.free(old_names - new_names)
        new = self._part(new_ports, numbers)
        if numbers.depend(old_names ^ new_names):
            self.hairpins = self._ways = self._numbers = None
            return None
        if Counter(old.ways) != Counter(new.ways):
            if self._ways is None:
                self._ways = self._count_ways(known, before, old, new)
            if self._ways is not None:
                self._add_changed_ways(self._ways, old, new)
        affinity = f"{self.settings.ip} {_NAME} affinity"
        return Update(
            tables=self.commands(known, old.table, new.table),
            # (the set itself ends with the last endpoint that remembers)
            forget=tuple(f"{affinity} {class_id(n)}" for n in gone if numbers.names),
        )

    def _count_ways(
        self, known: Services, before: Services, old: Elements, new: Elements
    ) -> Uses[Way] | None:
        """The uses of all ways; None if other Services need those anyway that come and go."""
        changing = {id(objects) for objects in before}
        others = [objects for objects in known if id(objects) not in changing]
        ways = self._ways_of(others, set(old.ways) ^ set(new.ways))
        return None if ways is None else Uses((*ways, *old.ways))

    def _add_changed_ways(self, uses: Uses[Way], old: Elements, new: Elements) -> None:
        """Add the choices to both parts, if ways come or go."""
        before = set(uses)
        uses.change(old.ways, new.ways)
        after = set(uses)
        if before != after:
            _add_choices(old.table, self.settings.ip, before)
            _add_choices(new.table, self.settings.ip, after)

    def _ways_of(self, services: Sequence[ServiceObjects], asked: set[Way]) -> list[Way] | None:
        """The ways of Services, as often as they are used; None once those asked for were met."""
        missing = set(asked)
        found: list[Way] = []
        for start in range(0, len(services), _TOGETHER):
            if not missing:
                return None
            some = services[start : start + _TOGETHER]
            ways = self._part(self.ports(some), Numbers()).ways
            missing.difference_update(ways)
            found += ways
        return found if missing else None

    def _part(self, ports: Iterable[ServicePortInfo], numbers: Numbers) -> Elements:
        return self._add(TableText(self.settings.ip, _NAME), ports, numbers)

    def _add(
        self, table: TableText, ports: Iterable[ServicePortInfo], numbers: Numbers
    ) -> Elements:
        elements = Elements(table, numbers)
        for info in ports:
            add_service(elements, self.settings, info)
        return elements


def _frame(lab: Lab, node: Node, family: int, settings: Settings) -> TableText:
    """The table without Services."""
    node_ports = primary_node_ports(lab.service_proxy, node, family)
    table = TableText(settings.ip, _NAME, "rules for Services, by netlab")
    _add_sets(table, settings.ip)
    if not node_ports.match_all:
        add_node_port_addresses(table, node_ports, own_addresses(lab, node, family))
    add_base_chains(table)
    _add_checks(table, settings.ip, node_ports.match_all)
    _add_services(table, lab, settings, node_ports.match_all)
    add_postrouting_and_checks(table, lab, settings)
    for site in SITES:
        key = _key(site, settings.ip)
        table.chain(
            site.name,
            f"meta priority set {key} map @{site.ways} meta priority vmap @{site.chains}",
            f"{_HAS_PORTS} dnat {settings.ip} to {key} . meta priority map @{site.endpoints}",
        )
    return table


def _service(ip: str) -> str:
    """What a Service is found by."""
    return f"{ip} daddr . meta l4proto . th dport"


_NODE_PORT = "meta l4proto . th dport"


def _key(site: Site, ip: str) -> str:
    return _NODE_PORT if site.is_node_port else _service(ip)


def _add_sets(table: TableText, ip: str) -> None:
    address = "ipv4_addr" if ip == "ip" else "ipv6_addr"
    node_port = "inet_proto . inet_service"
    service = f"{address} . {node_port}"
    for name, type_, comment in (
        (HAIRPINS, f"{address} . {service}", "endpoints here that reach themselves"),
        ("cluster-ips", address, "Active ClusterIPs"),
        ("nodeport-ips", address, "IPs that accept NodePort traffic"),
        ("masqueraded-services", service, "external addresses under policy Cluster"),
        ("masqueraded-nodeports", node_port, "NodePorts under policy Cluster"),
        ("local-services", service, "external addresses under policy Local"),
        ("local-nodeports", node_port, "NodePorts under policy Local"),
        ("no-endpoint-services", service, "rejected: no endpoint anywhere"),
        ("no-endpoint-nodeports", node_port, "rejected: no endpoint anywhere"),
        ("no-local-endpoint-services", service, "dropped: no endpoint here"),
        ("no-local-endpoint-nodeports", node_port, "dropped: no endpoint here"),
        ("localhost-nodeports", node_port, "NodePorts rejected on loopback"),
        ("firewall-services", service, "subject to loadBalancerSourceRanges"),
    ):
        table.set(name, type_, f'comment "{comment}"')
    table.set(
        "firewall-sources",
        f"{service} . {address}",
        "flags interval",
        'comment "who may use them"',
    )
    for site in SITES:
        key = node_port if site.is_node_port else service
        table.set(site.ways, f"{key} : classid")
        table.set(site.chains, "classid : verdict")
        table.set(site.endpoints, f"{key} . classid : {address} . inet_service")
        table.set(site.affinity, f"{key} . classid : classid")


def _add_checks(table: TableText, ip: str, match_all: bool) -> None:
    """What is refused, as nftables mode refuses it."""
    loopback = "127.0.0.0/8" if ip == "ip" else "::1"
    to_node = f"{ip} daddr != {loopback}" if match_all else f"{ip} daddr @nodeport-ips"
    service = _service(ip)
    table.chain(
        "firewall-check",
        f"{service} @firewall-services {service} . {ip} saddr != @firewall-sources drop",
    )
    table.chain(
        "nodeport-endpoints-check",
        f"{to_node} {_NODE_PORT} @no-endpoint-nodeports reject",
        f"{to_node} {_NODE_PORT} @no-local-endpoint-nodeports drop",
        f"{ip} daddr {loopback} {_NODE_PORT} @localhost-nodeports reject",
    )
    table.chain(
        "service-endpoints-check",
        f"{service} @no-endpoint-services reject",
        f"{service} @no-local-endpoint-services drop",
    )


def _add_services(table: TableText, lab: Lab, settings: Settings, match_all: bool) -> None:
    """From an address and port to the site that a packet belongs to."""
    ip, mark = settings.ip, settings.masquerade
    service = _service(ip)
    if match_all:
        loopback = "127.0.0.0/8" if ip == "ip" else "::1"
        to_node = f"fib daddr type local {ip} daddr != {loopback}"
    else:
        to_node = f"{ip} daddr @nodeport-ips"
    table.chain(
        "services",
        *masquerade_cluster_ips(lab.service_proxy, settings),
        f"{service} @masqueraded-services {mark}",
        f"{service} @local-services goto external-local",
        f"jump {SERVICE.name}",
        f"{to_node} goto nodeports",
    )
    table.chain(
        "nodeports",
        f"{_NODE_PORT} @masqueraded-nodeports {mark}",
        f"{_NODE_PORT} @local-nodeports goto nodeport-local",
        f"goto {NODEPORT.name}",
    )
    for chain, everywhere, here in (
        ("external-local", SERVICE, LOCAL_SERVICE),
        ("nodeport-local", NODEPORT, LOCAL_NODEPORT),
    ):
        if settings.detector:
            pods = from_pods(settings.detector, ip)
            rule = f'{pods} goto {everywhere.name} comment "short-circuit pod traffic"'
            table.chain(chain, rule)
        table.chain(
            chain,
            f'fib saddr type local {mark} comment "masquerade local traffic"',
            f'fib saddr type local goto {everywhere.name} comment "short-circuit local traffic"',
            f"goto {here.name}",
        )


def _add_choices(table: TableText, ip: str, ways: Collection[Way]) -> None:
    """The chains that choose an endpoint: one for each number of endpoints that there is.

    `meta priority` takes the place of a variable, which nft has none of: first the number of
    endpoints, then that of the chosen one.  Only the first packet of a connection comes here.
    """
    draws: set[int] = set()
    timeouts: set[int] = set()
    for site, way in sorted(ways, key=lambda way: (SITES.index(way[0]), way[1])):
        endpoints, seconds = way_of(way)
        if not seconds:
            draws.add(endpoints)
            table.element(site.chains, f"{class_id(way)} : jump draw-{endpoints}")
            continue
        timeouts.add(seconds)
        chain = f"{site.name}-{endpoints}-{duration(seconds)}"
        table.element(site.chains, f"{class_id(way)} : goto {chain}")
        table.chain(chain, *_remembered(site, ip, endpoints, seconds))
    for endpoints in sorted(draws):
        table.chain(f"draw-{endpoints}", _draw(endpoints))
    _add_affinity(table, ip, sorted(timeouts))


def _draw(endpoints: int) -> str:
    return f"meta priority set numgen random mod {endpoints} offset 1"


def _remembered(site: Site, ip: str, endpoints: int, seconds: int) -> Iterable[str]:
    """As in nftables mode: the first endpoint that remembers the client, or one at random."""
    number = f"meta priority set {_key(site, ip)} . meta priority map @{site.affinity}"
    then = f"goto remember-{duration(seconds)}"
    known = f"{ip} saddr . meta priority @affinity"
    for place in range(1, endpoints + 1):
        yield f"meta priority set {class_id(place)} {number} {known} {then}"
    yield f"{_draw(endpoints)} {number} {then}"


def _add_affinity(table: TableText, ip: str, timeouts: Iterable[int]) -> None:
    """Whom the endpoints remember, by the numbers of the endpoints."""
    if not timeouts:
        return
    address = "ipv4_addr" if ip == "ip" else "ipv6_addr"
    table.set("affinity-endpoints", f"classid : {address} . inet_service")
    # A map from client to endpoint would do with one look-up, but nft 1.0.6 miscompiles its
    # update for addresses of IPv6.
    table.set("affinity", f"{address} . classid", f"size {_REMEMBERED}", "flags dynamic,timeout")
    for seconds in timeouts:
        table.chain(
            f"remember-{duration(seconds)}",
            f"update @affinity {{ {ip} saddr . meta priority timeout {duration(seconds)} }}",
            f"{_HAS_PORTS} dnat {ip} to meta priority map @affinity-endpoints",
        )
