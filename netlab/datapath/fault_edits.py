"""What a fault makes of a lab: edits of the state of its namespaces, and of its Services.

Each takes what the lab should hold and gives it back with something wrong in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, ip_network
from pathlib import Path
from typing import overload

from msgspec.structs import replace

from netlab.datapath import podnet
from netlab.datapath.fault_places import pod_of, service_of, tcp_port
from netlab.datapath.overlay import vtep_mac
from netlab.datapath.state import (
    Address,
    Balancing,
    Connection,
    File,
    LabState,
    Link,
    Namespace,
    Process,
    Rules,
    Ruleset,
    Server,
    Sysctl,
    Table,
    Tables,
    namespace_name,
)
from netlab.topology.model import Fault, Lab, Node, Pod, Service, ServiceEndpoints

TABLE = "netlab-fault-"
"""What the names of nftables tables begin with that are faults."""


# Documentation addresses (RFC 5737): nobody has them.
_NOBODY, _NOBODYS_RANGE = "192.0.2.1", "192.0.2.0/24"


STALE_PORT = 20053
"""What the client of a stale connection sends from: the kernel gives out others."""


def _on(lab: Lab, node: str) -> str:
    return namespace_name(lab.name, node)


def _in_pod(lab: Lab, key: str) -> str:
    return namespace_name(lab.name, *key.split("/"))


def in_namespace(state: LabState, name: str, edit: Callable[[Namespace], Namespace]) -> LabState:
    """The state with one namespace edited."""
    if state.switch and state.switch.name == name:
        return replace(state, switch=edit(state.switch))
    nodes = []
    for node in state.nodes:
        if node.namespace.name == name:
            node = replace(node, namespace=edit(node.namespace))
        elif any(pod.name == name for pod in node.pods):
            pods = tuple(edit(pod) if pod.name == name else pod for pod in node.pods)
            node = replace(node, pods=pods)
        nodes.append(node)
    return replace(state, nodes=tuple(nodes))


def with_sysctl(namespace: Namespace, sysctl: Sysctl) -> Namespace:
    others = (each for each in namespace.sysctls if each.path != sysctl.path)
    return replace(namespace, sysctls=(*others, sysctl))


def _with_link(namespace: Namespace, name: str, edit: Callable[[Link], Link]) -> Namespace:
    links = tuple(edit(link) if link.name == name else link for link in namespace.links)
    return replace(namespace, links=links)


def sysctl_is(path: str, value: str, in_client: bool = False, in_server: bool = False) -> _Edit:
    """A sysctl of the fault's node, or of a pod."""

    def edit(state: LabState, lab: Lab, fault: Fault) -> LabState:
        pod = fault.client if in_client else fault.server if in_server else None
        name = _in_pod(lab, pod) if pod else _on(lab, fault.node)
        return in_namespace(state, name, lambda ns: with_sysctl(ns, Sysctl(path=path, value=value)))

    return edit


_Edit = Callable[[LabState, Lab, Fault], LabState]


def fault_table(chains: str, family: str = "ip", on_switch: bool = False) -> _Edit:
    """A firewall's table on the fault's node, or on the underlay switch."""

    def edit(state: LabState, lab: Lab, fault: Fault) -> LabState:
        name = f"{TABLE}{fault.name}"
        values = {"client": pod_of(lab, fault.client).address, "port": lab.overlay.port}
        body = re.sub(r"\$(\w+)", lambda match: str(values[match[1]]), chains)
        table = Table(family=family, name=name, text=f"table {family} {name} {{\n{body}}}\n")
        where = state.switch.name if on_switch and state.switch else _on(lab, fault.node)
        return in_namespace(state, where, lambda ns: replace(ns, tables=(*ns.tables, table)))

    return edit


def drop_chain(hook: str, *rules: str, policy: str = "accept") -> str:
    lines = "".join(f"\t\t{rule}\n" for rule in rules)
    return (
        f"\tchain {hook} {{\n\t\ttype filter hook {hook} priority 10; policy {policy};\n"
        f"{lines}\t}}\n"
    )


def no_route(state: LabState, lab: Lab, fault: Fault) -> LabState:
    cidr = lab.node(pod_of(lab, fault.server).node).pod_cidr

    def edit(namespace: Namespace) -> Namespace:
        routes = (route for route in namespace.routes if route.destination != cidr)
        return replace(namespace, routes=tuple(routes))

    return in_namespace(state, _on(lab, fault.node), edit)


def asymmetric(state: LabState, lab: Lab, fault: Fault) -> LabState:
    """Answers leave by eth0, requests come by the tunnel, and the filter is strict."""
    peer = lab.node(pod_of(lab, fault.client).node)

    def edit(namespace: Namespace) -> Namespace:
        routes = tuple(
            replace(route, link="eth0", via=peer.address, onlink=False)
            if route.destination == peer.pod_cidr
            else route
            for route in namespace.routes
        )
        strict = Sysctl(path="net/ipv4/conf/all/rp_filter", value="1")
        return replace(with_sysctl(namespace, strict), routes=routes)

    return in_namespace(state, _on(lab, fault.node), edit)


def _server_node(lab: Lab, fault: Fault) -> Node:
    return lab.node(pod_of(lab, fault.server).node)


def no_neighbour(state: LabState, lab: Lab, fault: Fault) -> LabState:
    address = _server_node(lab, fault).overlay_address

    def edit(namespace: Namespace) -> Namespace:
        entries = (each for each in namespace.neighbours if each.address != address)
        return replace(namespace, neighbours=tuple(entries))

    return in_namespace(state, _on(lab, fault.node), edit)


def no_fdb(state: LabState, lab: Lab, fault: Fault) -> LabState:
    mac = vtep_mac(_server_node(lab, fault))

    def edit(namespace: Namespace) -> Namespace:
        return replace(namespace, fdb=tuple(each for each in namespace.fdb if each.mac != mac))

    return in_namespace(state, _on(lab, fault.node), edit)


def wrong_vtep(state: LabState, lab: Lab, fault: Fault) -> LabState:
    there = _server_node(lab, fault)
    others = [n.address for n in lab.nodes if n.name not in (there.name, fault.node)]
    wrong = (*others, _NOBODY)[0]

    def edit(namespace: Namespace) -> Namespace:
        fdb = (
            replace(each, destination=wrong) if each.mac == vtep_mac(there) else each
            for each in namespace.fdb
        )
        return replace(namespace, fdb=tuple(fdb))

    return in_namespace(state, _on(lab, fault.node), edit)


def tunnel_is(edit: Callable[[Link], Link]) -> _Edit:
    """Something else about the VXLAN device of the fault's node that carries IPv4."""

    def edited(state: LabState, lab: Lab, fault: Fault) -> LabState:
        name = f"flannel.{lab.overlay.vni}"
        return in_namespace(state, _on(lab, fault.node), lambda ns: _with_link(ns, name, edit))

    return edited


def other_vni(link: Link) -> Link:
    assert link.vxlan is not None
    return replace(link, vxlan=replace(link.vxlan, vni=link.vxlan.vni + 98))


def pod_link_is(edit: Callable[[Link], Link]) -> _Edit:
    """Something else about the server's veth on its node."""

    def edited(state: LabState, lab: Lab, fault: Fault) -> LabState:
        pod = pod_of(lab, fault.server)
        name = podnet.outer_link(pod)
        return in_namespace(state, _on(lab, pod.node), lambda ns: _with_link(ns, name, edit))

    return edited


def second_owner(state: LabState, lab: Lab, fault: Fault) -> LabState:
    """The client's address is the server's node's, too."""
    address = Address(link="eth0", address=f"{pod_of(lab, fault.client).address}/32")
    return in_namespace(
        state,
        _on(lab, fault.node),
        lambda ns: replace(ns, addresses=(*ns.addresses, address)),
    )


def server_is(edit: Callable[[Server, int], Iterator[Server]]) -> _Edit:
    """What answers in the server, other than it should on its first TCP port."""

    def edited(state: LabState, lab: Lab, fault: Fault) -> LabState:
        pod = pod_of(lab, fault.server)
        servers: list[Server] = []
        for server in state.servers:
            if server.namespace == _in_pod(lab, pod.key):
                servers += edit(server, tcp_port(pod))
            else:
                servers.append(server)
        return replace(state, servers=tuple(servers))

    return edited


def not_listening(server: Server, port: int) -> Iterator[Server]:
    yield replace(server, listen=tuple(each for each in server.listen if each != ("TCP", port)))


def on_loopback(server: Server, port: int) -> Iterator[Server]:
    yield from not_listening(server, port)
    yield replace(server, listen=(("TCP", port),), addresses=("127.0.0.1",))


def not_accepting(server: Server, port: int) -> Iterator[Server]:
    yield from not_listening(server, port)
    yield replace(server, listen=(("TCP", port),), stuck=True)


def unmasqueraded(state: LabState, lab: Lab, fault: Fault) -> LabState:
    nodes = (
        replace(node, rules=_without_masquerade(node.rules))
        if node.name == fault.node and node.rules
        else node
        for node in state.nodes
    )
    return replace(state, nodes=tuple(nodes))


@overload
def _without_masquerade(rules: Ruleset) -> Ruleset: ...


@overload
def _without_masquerade(rules: Rules) -> Rules: ...


def _without_masquerade(rules: Rules) -> Rules:
    if isinstance(rules, Ruleset):
        text = re.sub(r"(?m)^-A KUBE-POSTROUTING .*-j MASQUERADE.*\n", "", rules.ipv4)
        return replace(rules, ipv4=text)
    if isinstance(rules, Balancing):
        return replace(rules, rules=_without_masquerade(rules.rules))
    tables = (
        replace(table, text=table.text.replace(" masquerade fully-random", ""))
        for table in rules.tables
    )
    return Tables(tables=tuple(tables))


def stale_connection(state: LabState, lab: Lab, fault: Fault) -> LabState:
    """A connection from before, when the Service had an endpoint that is gone."""
    service, server = service_of(lab, fault), pod_of(lab, fault.server)
    port = service.ports[0]
    connection = Connection(
        protocol="UDP" if port.protocol == "UDP" else "TCP",
        source=(pod_of(lab, fault.client).address, STALE_PORT),
        destination=(service.cluster_ip, port.port),
        to=(_unused(lab, lab.node(server.node)), _target_port(lab, service, server)),
    )
    return in_namespace(
        state,
        _on(lab, fault.node),
        lambda ns: replace(ns, connections=(*ns.connections, connection)),
    )


def _target_port(lab: Lab, service: Service, server: Pod) -> int:
    ends = lab.endpoints_of(service, service.ports[0])
    return next(end.port for end in ends if end.pod == server.key)


def _unused(lab: Lab, node: Node) -> str:
    """An address of a node's pods that none has."""
    used = {pod.address for pod in lab.pods} | {node.bridge_address}
    last = int(ip_network(node.pod_cidr).broadcast_address)
    return next(text for n in range(1, 1 << 16) if (text := str(IPv4Address(last - n))) not in used)


def crowded(state: LabState, lab: Lab, fault: Fault) -> LabState:
    return in_namespace(state, _on(lab, fault.node), lambda ns: replace(ns, crowded=True))


_QUEUE = 20054
_RACER = Path(__file__).parents[1] / "lab" / "racer.py"


def outraced(state: LabState, lab: Lab, fault: Fault) -> LabState:
    """The node's masquerade keeps ports, and netlab.lab.racer has somebody be faster."""
    client, namespace = pod_of(lab, fault.client), _on(lab, fault.node)
    state = fault_table(
        "\tchain postrouting {\n\t\ttype filter hook postrouting priority 200; policy accept;\n"
        "\t\tct state new ct status snat meta l4proto { tcp, udp } ct original ip saddr $client "
        f"queue flags bypass to {_QUEUE}\n\t}}\n"
    )(state, lab, fault)
    state = in_namespace(
        state,
        namespace,
        lambda ns: replace(ns, tables=tuple(_keeping_ports(table) for table in ns.tables)),
    )
    script = File(path="/run/racer.py", text=_RACER.read_text(encoding="utf-8"))
    racer = Process(
        name="racer",
        namespace=namespace,
        command=("python3", script.path, str(_QUEUE), _unused(lab, lab.node(client.node))),
        package="python3-minimal",
        files=(script,),
        listens=(("UDP", _QUEUE),),
    )
    nodes = (
        replace(node, processes=(*node.processes, racer)) if node.name == fault.node else node
        for node in state.nodes
    )
    return replace(state, nodes=tuple(nodes))


def _keeping_ports(table: Table) -> Table:
    return replace(table, text=table.text.replace("masquerade fully-random", "masquerade"))


def _with_endpoints(lab: Lab, fault: Fault, unready: Callable[[str | None], bool]) -> Lab:
    """The Service's endpoints on those nodes are not ready."""

    def edit(entry: ServiceEndpoints) -> ServiceEndpoints:
        if f"{entry.namespace}/{entry.service}" != fault.service:
            return entry
        ends = (
            replace(end, ready=False, serving=False) if unready(end.node) else end
            for end in entry.endpoints
        )
        return replace(entry, endpoints=tuple(ends))

    return replace(lab, endpoints=tuple(edit(entry) for entry in lab.endpoints))


def _with_service(lab: Lab, fault: Fault, edit: Callable[[Service], Service]) -> Lab:
    services = (edit(each) if each.key == fault.service else each for each in lab.services)
    return replace(lab, services=tuple(services))


def no_endpoints(lab: Lab, fault: Fault) -> Lab:
    return _with_endpoints(lab, fault, lambda node: True)


def remote_only(lab: Lab, fault: Fault) -> Lab:
    lab = _with_endpoints(lab, fault, lambda node: node == fault.node)
    return _with_service(lab, fault, lambda s: replace(s, internal_traffic_policy="Local"))


def other_sources(lab: Lab, fault: Fault) -> Lab:
    ranges = (_NOBODYS_RANGE,)
    return _with_service(lab, fault, lambda s: replace(s, load_balancer_source_ranges=ranges))
