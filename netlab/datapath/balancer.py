"""A load balancer as a namespace: its rules, and the program that checks the nodes' health.

    client ── underlay switch ── eth0 load balancer
                     └────────── eth0 node, node, node

Everybody has a route to the pool by way of the box.  It chooses a node at random for each
connection, out of a map of slots for each port of a Service: all nodes at first, as many slots each
as can be, then those that the health checks find healthy (:mod:`netlab.lab.health_checks`).  The
maps are `dynamic`, so that what is in them does not count when tables are compared.

* `nat`: the destination becomes the node's port, the source the box, or the node would answer past
  it.
* `passthrough`: a mark for each node, and a routing table for each mark.  The answer comes from the
  node directly, so that connection tracking would see one direction only and call the rest invalid:
  it is left out (`notrack`), and sets of the table remember which node a connection went to.

What there is no healthy node for, and what no Service has, is refused in both.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

import netlab
from netlab.datapath import podnet
from netlab.datapath.outside_names import balancer_namespace, balancer_port
from netlab.datapath.services.nftables_list import TableText, addresses
from netlab.datapath.state import (
    File,
    Link,
    Namespace,
    Peer,
    Policy,
    Process,
    Route,
    Sysctl,
    Table,
    namespace_name,
)
from netlab.topology.model import Lab, LoadBalancer, Node, Service, ServicePort

TABLE = "netlab-balancer"
COMMENT = "made by netlab"
NO_NODE = "no node that is healthy, or no Service"
NOT_ADMITTED = "loadBalancerSourceRanges"
PROCESS = "health-checks"
CONFIG = "/run/netlab/health-checks.json"
FIRST_TABLE = 100  # of routing: one for each node follows
_PRIORITY = 1000
_FEW_SLOTS = 60  # a multiple of every number up to six: that many nodes get the same share
_REMEMBERED = "5m"  # as long as a connection may be silent in mode passthrough
_ADDRESS_TYPE = {4: "ipv4_addr", 6: "ipv6_addr"}
_PROTOCOL = {4: "ip", 6: "ip6"}
_ICMP = {4: "icmp", 6: "icmpv6"}


class Served(NamedTuple):
    """A port of a Service at an address that the box has for it."""

    service: Service
    port: ServicePort
    address: str

    @property
    def map_name(self) -> str:
        service, port = self.service, self.port
        return f"slots/{service.namespace}/{service.name}/{port.protocol.lower()}/{port.port}"


def served(lab: Lab, box: LoadBalancer, family: int) -> Iterator[Served]:
    """What a box serves.  In mode nat a port without a node port is served by nobody."""
    for service in lab.services:
        for address in box.serves(service):
            if podnet.family_of(address) == family:
                for port in service.ports:
                    if port.node_port or box.mode == "passthrough":
                        yield Served(service, port, address)


def slots(lab: Lab) -> int:
    """How many slots there are for each port."""
    return _FEW_SLOTS if len(lab.nodes) <= _FEW_SLOTS // 4 else 4 * len(lab.nodes)


def namespace(lab: Lab, box: LoadBalancer) -> Namespace:
    """The box."""
    mac = podnet.mac_of(box.addresses[0])
    peer = Peer(namespace=namespace_name(lab.name, "_switch"), link=balancer_port(box))
    return Namespace(
        name=balancer_namespace(lab, box),
        links=(Link(name="eth0", kind="veth", mtu=lab.underlay.mtu, mac=mac, peer=peer),),
        addresses=podnet.link_addresses("eth0", mac, box.addresses, lab.underlay.cidrs),
        routes=tuple(_routes(lab, box)),
        policies=tuple(_policies(lab, box)),
        sysctls=(
            *podnet.router_sysctls(lab),
            # Clients are on the same link as nodes: they are not to be told so.
            Sysctl(path="net/ipv4/conf/all/send_redirects", value="0"),
            Sysctl(path="net/ipv4/conf/eth0/send_redirects", value="0"),
        ),
        tables=tuple(_table(lab, box, family) for family in _families(box)),
    )


def routes_to(lab: Lab) -> Iterator[Route]:
    """Routes of who is on the underlay to the pools."""
    for box in lab.balancers:
        for pool in box.pools:
            if via := podnet.of_family(box.addresses, podnet.family_of(pool)):
                yield Route(destination=pool, link="eth0", via=via)


def _families(box: LoadBalancer) -> Iterator[int]:
    yield from (podnet.family_of(pool) for pool in box.pools)


def _routes(lab: Lab, box: LoadBalancer) -> Iterator[Route]:
    for gateway in lab.underlay.gateways:
        yield Route(
            destination=podnet.DEFAULT_ROUTES[podnet.family_of(gateway)], link="eth0", via=gateway
        )
    yield from (route for route in routes_to(lab) if route.via not in box.addresses)
    if box.mode != "passthrough":
        return
    for mark, node in _marks(lab):
        for family in _families(box):
            if via := podnet.of_family(node.addresses, family):
                yield Route(
                    destination=podnet.DEFAULT_ROUTES[family],
                    link="eth0",
                    via=via,
                    table=FIRST_TABLE + mark,
                )


def _policies(lab: Lab, box: LoadBalancer) -> Iterator[Policy]:
    if box.mode != "passthrough":
        return
    for mark, _ in _marks(lab):
        for pool in box.pools:
            yield Policy(priority=_PRIORITY, table=FIRST_TABLE + mark, destination=pool, mark=mark)


def _marks(lab: Lab) -> Iterator[tuple[int, Node]]:
    return enumerate(lab.nodes, 1)


# Rules


def _table(lab: Lab, box: LoadBalancer, family: int) -> Table:
    table = TableText(_PROTOCOL[family], TABLE, COMMENT)
    if box.mode == "nat":
        _translate(table, lab, box, family)
    else:
        _pass_on(table, lab, box, family)
    (pool,) = (pool for pool in box.pools if podnet.family_of(pool) == family)
    refused = f"{_PROTOCOL[family]} daddr {pool} meta mark 0x00000000 "
    table.chain(
        "forward",
        "type filter hook forward priority filter; policy accept;",
        f'{refused}reject with {_ICMP[family]} admin-prohibited comment "{NO_NODE}"',
    )
    return table.table()


def _slots(
    table: TableText, lab: Lab, box: LoadBalancer, each: Served, family: int, kind: str
) -> None:
    """The map that a node is chosen from: every node that could be, until checks say more."""
    table.sets[each.map_name] = [f"typeof numgen random mod {slots(lab)} : {kind}", "flags dynamic"]
    values = [value for _, value in _values(lab, box, each, family)]
    for slot in range(slots(lab) if values else 0):
        table.element(each.map_name, f"{slot} : {values[slot % len(values)]}")


def _values(lab: Lab, box: LoadBalancer, each: Served, family: int) -> Iterator[tuple[Node, str]]:
    """What stands for a node in a map."""
    for mark, node in _marks(lab):
        if address := podnet.of_family(node.addresses, family):
            to_port = f"{address} . {each.port.node_port}"
            yield node, to_port if box.mode == "nat" else f"0x{mark:08x}"


def _translate(table: TableText, lab: Lab, box: LoadBalancer, family: int) -> None:
    ip, own = _PROTOCOL[family], podnet.of_family(box.addresses, family)
    rules = []
    for each in served(lab, box, family):
        protocol = each.port.protocol.lower()
        _slots(table, lab, box, each, family, f"{ip} daddr . {protocol} dport")
        asked = f"{ip} daddr {each.address} {protocol} dport {each.port.port}"
        if ranges := _admitted(each.service, family):
            # To the nodes everybody is the box: it is the one to look at who asks.
            rules.append(f'{asked} {ip} saddr != {ranges} drop comment "{NOT_ADMITTED}"')
        choice = f"numgen random mod {slots(lab)}"
        if each.service.session_affinity == "ClientIP":
            choice = f"jhash {ip} saddr mod {slots(lab)}"
        rules.append(f"{asked} dnat {ip} to {choice} map @{each.map_name}")
    table.chain("prerouting", "type nat hook prerouting priority dstnat; policy accept;", *rules)
    table.chain(
        "postrouting",
        "type nat hook postrouting priority srcnat; policy accept;",
        f"ct status dnat snat {ip} to {own}",
    )


def _admitted(service: Service, family: int) -> str:
    ranges = [r for r in service.load_balancer_source_ranges if podnet.family_of(r) == family]
    return addresses(ranges) if ranges and not any(r.endswith("/0") for r in ranges) else ""


def _pass_on(table: TableText, lab: Lab, box: LoadBalancer, family: int) -> None:
    ip, kind = _PROTOCOL[family], _ADDRESS_TYPE[family]
    (pool,) = (pool for pool in box.pools if podnet.family_of(pool) == family)
    key = f"{ip} saddr . {ip} daddr . meta l4proto . th sport . th dport"
    known, remember = [], []
    for mark, node in _marks(lab):
        table.set(
            remembered(node),
            f"{kind} . {kind} . inet_proto . inet_service . inet_service",
            "size 65535",
            "flags dynamic,timeout",
            f"timeout {_REMEMBERED}",
        )
        known.append(f"{key} @{remembered(node)} meta mark set 0x{mark:08x}")
        remember.append(f"meta mark 0x{mark:08x} update @{remembered(node)} {{ {key} }}")
    choose = []
    for each in served(lab, box, family):
        protocol = each.port.protocol.lower()
        _slots(table, lab, box, each, family, "meta mark")
        asked = f"{ip} daddr {each.address} {protocol} dport {each.port.port}"
        choice = f"numgen random mod {slots(lab)}"
        if each.service.session_affinity == "ClientIP":
            choice = f"jhash {ip} saddr mod {slots(lab)}"
        choose.append(f"meta mark 0x00000000 {asked} meta mark set {choice} map @{each.map_name}")
    table.chain(
        "prerouting",
        "type filter hook prerouting priority raw; policy accept;",
        f"{ip} daddr {pool} notrack goto balance",
    )
    table.chain("balance", *known, *choose, *remember)
    if family == 6:
        # IPv6 has no switch for these: clients are not to go to a node past the box.
        redirect = "icmpv6 type nd-redirect drop"
        table.chain("output", "type filter hook output priority filter; policy accept;", redirect)


def remembered(node: Node) -> str:
    """Name of the set of connections that go to a node."""
    return f"connections/{node.name}"


# Health checks


class Check(msgspec.Struct, frozen=True):
    """What is asked of a node: `http` wants the answer 200, `tcp` a connection, `none` nothing."""

    kind: str
    address: str
    port: int


def checks(
    lab: Lab, box: LoadBalancer, each: Served, family: int
) -> Iterator[tuple[Node, str, Check]]:
    """For each node what stands for it in the map, and how one sees that it may be sent to.

    Policy Local: what kube-proxy answers at the healthCheckNodePort, 200 where it has endpoints.
    Else the node port, or that of another port of the Service over TCP.
    """
    service, port = each.service, each.port
    for node, value in _values(lab, box, each, family):
        address = podnet.of_family(node.addresses, family)
        assert address is not None
        ports = (port, *service.ports)
        tcp = next((p.node_port for p in ports if p.node_port and p.protocol == "TCP"), None)
        if service.health_check_node_port:
            yield node, value, Check("http", address, service.health_check_node_port)
        elif tcp:
            yield node, value, Check("tcp", address, tcp)
        else:
            yield node, value, Check("none", address, 0)


def process(lab: Lab, box: LoadBalancer) -> Process:
    """The program that keeps the maps to nodes that are healthy."""
    config = json.dumps(_config(lab, box), indent=1)
    digest = hashlib.sha256(config.encode()).hexdigest()[:16]
    root = os.path.dirname(next(iter(netlab.__path__)))
    code = (
        f"import sys; sys.path.append({root!r}); "
        f"from netlab.lab.health_checks import main; main({CONFIG!r})"
    )
    return Process(
        name=PROCESS,
        namespace=balancer_namespace(lab, box),
        command=(sys.executable, "-I", "-S", "-c", code),
        package="python3",
        files=(File(path=CONFIG, text=config),),
        reload="SIGHUP",
        names=(f"netlab-health-checks:{digest}",),
    )


def _config(lab: Lab, box: LoadBalancer) -> dict[str, object]:
    maps = []
    for family in _families(box):
        for each in served(lab, box, family):
            nodes = [
                {
                    "value": value,
                    "check": [check.kind, check.address, check.port],
                    "remembered": remembered(node) if box.mode == "passthrough" else "",
                }
                for node, value, check in checks(lab, box, each, family)
            ]
            table = f"{_PROTOCOL[family]} {TABLE}"
            maps.append({"table": table, "map": each.map_name, "nodes": nodes})
    return {
        "table": TABLE,
        "slots": slots(lab),
        "period_s": box.checks.period_s,
        "timeout_s": box.checks.timeout_s,
        "healthy": box.checks.healthy,
        "unhealthy": box.checks.unhealthy,
        "maps": maps,
    }
