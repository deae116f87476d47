"""What is outside the cluster, as namespaces: hosts, the internet's switch, the gateway to it.

    nodes ── underlay switch ── eth0 gateway eth1 ── internet switch ── hosts of the internet
                   └── hosts of the underlay

A host of the underlay whose address is of another network is on the link all the same: nodes have a
route to it, and it has one to them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from netlab.datapath import balancer, podnet
from netlab.datapath.outside_names import (
    GATEWAY_PORT,
    balancer_namespace,
    balancer_port,
    gateway_namespace,
    host_namespace,
    host_port,
    internet_namespace,
)
from netlab.datapath.services.nftables_list import TableText
from netlab.datapath.state import (
    Link,
    Namespace,
    Peer,
    Process,
    Route,
    Server,
    Sysctl,
    Table,
    namespace_name,
)
from netlab.topology.model import Gateway, Host, Lab

INTERNET_BRIDGE = "br0"
TABLE = "netlab-gateway"
COMMENT = balancer.COMMENT
_INSIDE, _OUTSIDE = "eth0", "eth1"

REFUSES_STRANGERS = "the gateway knows no address but the nodes'"
REFUSES_CALLERS = "from outside come answers only"
_BALANCED = "load balancers are known outside"


def namespaces(lab: Lab) -> Iterator[Namespace]:
    """The internet's switch, the gateway, the hosts."""
    if lab.gateway:
        yield _internet(lab, lab.gateway)
        yield _gateway(lab, lab.gateway)
    for host in lab.hosts:
        yield _host(lab, host)
    for box in lab.balancers:
        yield balancer.namespace(lab, box)


def processes(lab: Lab) -> Iterator[Process]:
    """Programs that run in what is outside."""
    yield from (balancer.process(lab, box) for box in lab.balancers)


def servers(lab: Lab) -> Iterator[Server]:
    """What answers on the hosts."""
    for host in lab.hosts:
        if host.listen:
            yield Server(
                namespace=host_namespace(lab, host),
                identity=host.name,
                node="",
                listen=host.listen,
                addresses=podnet.any_addresses(lab),
            )


def underlay_ports(lab: Lab, bridge: str) -> Iterator[Link]:
    """Ports of the underlay's switch that lead to what is no node."""
    if lab.gateway:
        yield _port(lab, GATEWAY_PORT, bridge, Peer(namespace=gateway_namespace(lab), link=_INSIDE))
    yield from _host_ports(lab, (host for host in lab.hosts if not host.internet), bridge)
    for box in lab.balancers:
        peer = Peer(namespace=balancer_namespace(lab, box), link="eth0")
        yield _port(lab, balancer_port(box), bridge, peer)


def node_routes(lab: Lab) -> Iterator[Route]:
    """Routes of a node to hosts whose addresses are not of the underlay, and to pools."""
    yield from balancer.routes_to(lab)
    for host in lab.hosts:
        for address in _strange(lab, host):
            yield Route(destination=podnet.host_network(address), link="eth0")


def table_of_gateway(lab: Lab, family: int) -> Table | None:
    """What the gateway lets through, and the address that it gives it; None without the family."""
    assert lab.gateway
    own = podnet.of_family(lab.gateway.addresses, family)
    if own is None:
        return None
    protocol = {4: "ip", 6: "ip6"}[family]
    table = TableText(protocol, TABLE, COMMENT)
    kind = {4: "ipv4_addr", 6: "ipv6_addr"}[family]
    table.set("nodes", kind)
    for node in lab.nodes:
        for address in node.addresses:
            if podnet.family_of(address) == family:
                table.element("nodes", address)
    balanced: tuple[str, ...] = ()
    if known := list(_balanced(lab, family)):
        table.set("balanced", kind, "flags interval")
        for each in known:
            table.element("balanced", each)
        balanced = (
            f'iifname "{_INSIDE}" oifname "{_OUTSIDE}" {protocol} saddr @balanced accept '
            f'comment "{_BALANCED}"',
            f'iifname "{_OUTSIDE}" oifname "{_INSIDE}" {protocol} daddr @balanced accept '
            f'comment "{_BALANCED}"',
        )
    table.chain(
        "forward",
        "type filter hook forward priority filter; policy accept;",
        *balanced,
        f'iifname "{_INSIDE}" oifname "{_OUTSIDE}" {protocol} saddr != @nodes drop '
        f'comment "{REFUSES_STRANGERS}"',
        f'iifname "{_OUTSIDE}" oifname "{_INSIDE}" ct state new drop comment "{REFUSES_CALLERS}"',
    )
    table.chain(
        "postrouting",
        "type nat hook postrouting priority srcnat; policy accept;",
        f'oifname "{_OUTSIDE}" {protocol} saddr @nodes snat to {own}',
    )
    return table.table()


def _balanced(lab: Lab, family: int) -> Iterator[str]:
    """Networks of load balancers' Services, and their own addresses, by which they refuse."""
    for box in lab.balancers:
        for each in (*box.pools, *box.addresses):
            if podnet.family_of(each) == family:
                yield each


def _internet(lab: Lab, gateway: Gateway) -> Namespace:
    bridge = Link(
        name=INTERNET_BRIDGE,
        kind="bridge",
        mtu=lab.underlay.mtu,
        mac=podnet.mac_of(gateway.cidrs[0].split("/")[0]),
    )
    outside = Peer(namespace=gateway_namespace(lab), link=_OUTSIDE)
    hosts = (host for host in lab.hosts if host.internet)
    return Namespace(
        name=internet_namespace(lab),
        links=(
            bridge,
            _port(lab, GATEWAY_PORT, INTERNET_BRIDGE, outside),
            *_host_ports(lab, hosts, INTERNET_BRIDGE),
        ),
        sysctls=(*podnet.pod_sysctls(lab), *frames_only(lab)),
    )


def frames_only(lab: Lab) -> Iterator[Sysctl]:
    """A switch looks at frames only."""
    yield Sysctl(path="net/bridge/bridge-nf-call-iptables", value="0")
    if podnet.has_ipv6(lab):
        yield Sysctl(path="net/bridge/bridge-nf-call-ip6tables", value="0")


def _gateway(lab: Lab, gateway: Gateway) -> Namespace:
    inside, outside = podnet.mac_of(lab.underlay.gateway), podnet.mac_of(gateway.addresses[0])
    switches = namespace_name(lab.name, "_switch"), internet_namespace(lab)
    tables = (table_of_gateway(lab, family) for family in (4, 6))
    return Namespace(
        name=gateway_namespace(lab),
        links=(
            _uplink(lab, _INSIDE, inside, Peer(namespace=switches[0], link=GATEWAY_PORT)),
            _uplink(lab, _OUTSIDE, outside, Peer(namespace=switches[1], link=GATEWAY_PORT)),
        ),
        addresses=(
            *podnet.link_addresses(_INSIDE, inside, lab.underlay.gateways, lab.underlay.cidrs),
            *podnet.link_addresses(_OUTSIDE, outside, gateway.addresses, gateway.cidrs),
        ),
        routes=tuple(balancer.routes_to(lab)),
        sysctls=podnet.router_sysctls(lab),
        tables=tuple(table for table in tables if table),
    )


def _host(lab: Lab, host: Host) -> Namespace:
    switch = internet_namespace(lab) if host.internet else namespace_name(lab.name, "_switch")
    mac = podnet.mac_of(host.addresses[0])
    return Namespace(
        name=host_namespace(lab, host),
        links=(_uplink(lab, "eth0", mac, Peer(namespace=switch, link=host_port(host))),),
        addresses=podnet.link_addresses("eth0", mac, host.addresses, _networks(lab, host)),
        routes=tuple(_host_routes(lab, host)),
        sysctls=podnet.pod_sysctls(lab),
    )


def _host_routes(lab: Lab, host: Host) -> Iterator[Route]:
    """A host of the internet knows that network, and the way to load balancers' Services."""
    families = {podnet.family_of(address) for address in host.addresses}
    if host.internet:
        for box in lab.balancers if lab.gateway else ():
            for pool in box.pools:
                family = podnet.family_of(pool)
                via = podnet.of_family(lab.gateway.addresses, family) if lab.gateway else None
                if via and family in families:
                    yield Route(destination=pool, link="eth0", via=via)
        return
    strange = {podnet.family_of(address) for address in _strange(lab, host)}
    for cidr in lab.underlay.cidrs:
        if podnet.family_of(cidr) in strange:
            yield Route(destination=cidr, link="eth0")
    for other in lab.hosts:
        for address in _strange(lab, other) if other != host else ():
            if podnet.family_of(address) in families:
                yield Route(destination=podnet.host_network(address), link="eth0")
    for gateway in lab.underlay.gateways:
        if (family := podnet.family_of(gateway)) in families:
            yield Route(destination=podnet.DEFAULT_ROUTES[family], link="eth0", via=gateway)
    for route in balancer.routes_to(lab):
        if podnet.family_of(route.destination) in families:
            yield route


def _strange(lab: Lab, host: Host) -> Iterator[str]:
    """Addresses of a host of the underlay that are not of its networks."""
    for address in host.addresses if not host.internet else ():
        if not podnet.is_within(address, lab.underlay.cidrs):
            yield address


def _networks(lab: Lab, host: Host) -> tuple[str, ...]:
    if host.internet and lab.gateway:
        return lab.gateway.cidrs
    return lab.underlay.cidrs


def _host_ports(lab: Lab, hosts: Iterable[Host], bridge: str) -> Iterator[Link]:
    for host in hosts:
        peer = Peer(namespace=host_namespace(lab, host), link="eth0")
        yield _port(lab, host_port(host), bridge, peer)


def _port(lab: Lab, name: str, bridge: str, peer: Peer) -> Link:
    return Link(name=name, kind="veth", mtu=lab.underlay.mtu, master=bridge, peer=peer)


def _uplink(lab: Lab, name: str, mac: str, peer: Peer) -> Link:
    return Link(name=name, kind="veth", mtu=lab.underlay.mtu, mac=mac, peer=peer)
