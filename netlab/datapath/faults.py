"""Faults to practise with: each is what a lab should hold, with something wrong in it.

A fault is declared like everything else of a lab (`Lab.faults`): `build` gives the state of the lab
with its faults, so that injecting one is a change of a running lab, clearing it another, and an
`up` of the file, which has none, repairs it.  Pure; one line in `FAULTS` for each.

A fault is met by the packets from one pod, the client, to another, the server, or to a Service.
They are of IPv4.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from ipaddress import IPv4Address, ip_network

import msgspec
from msgspec.structs import replace

from netlab.datapath import podnet
from netlab.datapath.overlay import vtep_mac
from netlab.datapath.state import (
    Address,
    Connection,
    LabState,
    Link,
    Namespace,
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

# Sysctls that a lab has no word for but in a fault, as the kernel has them by itself.
_DEFAULTS = {"net/ipv4/ip_default_ttl": "64", "net/ipv4/conf/all/arp_ignore": "0"}
# Documentation addresses (RFC 5737): nobody has them.
_NOBODY, _NOBODYS_RANGE = "192.0.2.1", "192.0.2.0/24"
STALE_PORT = 20053
"""What the client of a stale connection sends from: the kernel gives out others."""
_SMALLER = 100  # bytes that an MTU is too small by

Choices = Callable[[Lab], Iterator[Fault]]
"""Every way to put a fault into a lab; the name is filled in by the caller."""


class Kind(msgspec.Struct, frozen=True):
    """A sort of fault.

    `edit` makes the lab's state wrong, `declare` the lab itself.  `options` are those of the trace
    that meets it.
    """

    sentence: str
    needs: str
    choices: Choices
    edit: Callable[[LabState, Lab, Fault], LabState] | None = None
    declare: Callable[[Lab, Fault], Lab] | None = None
    options: Callable[[Lab, Fault], Sequence[str]] = lambda lab, fault: ()
    destination: Callable[[Lab, Fault], str] | None = None


def faulty(lab: Lab) -> Lab:
    """A lab as its faults make it appear: the Services that they concern.  Idempotent."""
    for fault in lab.faults:
        declare = FAULTS[fault.name].declare
        lab = declare(lab, fault) if declare else lab
    return lab


def with_faults(state: LabState, lab: Lab) -> LabState:
    """The state of a lab with its faults in it."""
    for fault in lab.faults:
        edit = FAULTS[fault.name].edit
        state = edit(state, lab, fault) if edit else state
    return state


def without_faults(state: LabState, before: Lab | None) -> LabState:
    """The state with the kernel's defaults where `before` had faults that it has no more."""
    for fault in before.faults if before else ():
        edit = FAULTS[fault.name].edit
        was = edit(state, before, fault) if edit and before else state
        for old, new in zip(was.namespaces(), state.namespaces(), strict=True):
            paths = {sysctl.path for sysctl in new.sysctls}
            for sysctl in old.sysctls:
                if sysctl.path in _DEFAULTS and sysctl.path not in paths:
                    default = Sysctl(path=sysctl.path, value=_DEFAULTS[sysctl.path])
                    state = _in(state, new.name, functools.partial(_set, sysctl=default))
    return state


def lasting(lab: Lab) -> tuple[Fault, ...]:
    """The faults of what is still there."""
    there = {"", *(node.name for node in lab.nodes), *(pod.key for pod in lab.pods)}
    services = {"", *(service.key for service in lab.services)}
    return tuple(
        fault
        for fault in lab.faults
        if {fault.node, fault.client, fault.server} <= there and fault.service in services
    )


def trace_of(lab: Lab, fault: Fault) -> list[str]:
    """The arguments of a `netlab trace` that meets a fault."""
    kind = FAULTS[fault.name]
    if kind.destination:
        to = kind.destination(lab, fault)
    elif fault.service:
        to = f"svc/{fault.service}:{_service(lab, fault).ports[0].port}"
    else:
        to = f"{fault.server}:{_tcp_port(_pod(lab, fault.server))}"
    return [fault.client, to, *kind.options(lab, fault)]


# --- where a fault may be ------------------------------------------------------------------------


def _clients(lab: Lab) -> list[Pod]:
    return [pod for pod in lab.pods if not pod.host_network]


def _servers(lab: Lab) -> list[Pod]:
    return [pod for pod in _clients(lab) if any(name == "TCP" for name, _ in pod.listen)]


def _between_nodes(lab: Lab) -> Iterator[Fault]:
    """From each node to a pod on another one; the fault is where the packet comes from."""
    servers = _servers(lab)
    for client in _one_of_each_node(lab):
        for server in servers:
            if server.node != client.node:
                yield Fault(node=client.node, client=client.key, server=server.key)
                break


def _to_nodes(lab: Lab) -> Iterator[Fault]:
    """To each node from a pod on another one; the fault is where the packet arrives."""
    clients, reached = _one_of_each_node(lab), set()
    for server in _servers(lab):
        client = next((pod for pod in clients if pod.node != server.node), None)
        if client and server.node not in reached:
            reached.add(server.node)
            yield Fault(node=server.node, client=client.key, server=server.key)


def _through_vxlan(ways: Choices) -> Choices:
    return lambda lab: ways(lab) if lab.overlay.type == "vxlan" else iter(())


def _to_pods(lab: Lab) -> Iterator[Fault]:
    """To each pod that listens on TCP, from another one; the fault is in the pod that listens."""
    clients = _one_of_each_node(lab) + _clients(lab)[:2]
    for server in _servers(lab):
        client = next((pod for pod in clients if pod != server), None)
        if client:
            yield Fault(node=server.node, client=client.key, server=server.key)


def _from_pods(lab: Lab) -> Iterator[Fault]:
    """From each pod to one on another node; the fault is in the pod that sends."""
    servers = _servers(lab)
    for client in _clients(lab):
        server = next((pod for pod in servers if pod.node != client.node), None)
        if server:
            yield Fault(node=client.node, client=client.key, server=server.key)


def _one_of_each_node(lab: Lab) -> list[Pod]:
    first: dict[str, Pod] = {}
    for pod in _clients(lab):
        first.setdefault(pod.node, pod)
    return list(first.values())


def _services(lab: Lab) -> Iterator[tuple[Service, list[Pod]]]:
    """Services with a cluster IP of IPv4, with the pods behind their first port."""
    pods = {pod.key: pod for pod in _clients(lab)}
    for service in lab.services:
        if "." not in service.cluster_ip or not service.ports:
            continue
        ready = [
            end
            for end in lab.endpoints_of(service, service.ports[0])
            if end.ready and "." in end.address
        ]
        if ready and all(end.pod in pods for end in ready):
            yield service, [pods[end.pod] for end in ready if end.pod]


def _fault(service: Service, client: Pod, server: Pod, node: str | None = None) -> Fault:
    return Fault(
        node=node or client.node, client=client.key, server=server.key, service=service.key
    )


def _to_services(lab: Lab) -> Iterator[Fault]:
    """To each Service that has endpoints."""
    for service, behind in _services(lab):
        client = next((pod for pod in _clients(lab) if pod not in behind), None)
        if client and service.ports[0].protocol != "SCTP":
            yield _fault(service, client, behind[0])


def _to_own_service(lab: Lab) -> Iterator[Fault]:
    """From a pod to a Service that has no other endpoint."""
    for service, behind in _services(lab):
        if len(behind) == 1:
            yield _fault(service, behind[0], behind[0])


def _to_a_neighbour(lab: Lab) -> Iterator[Fault]:
    """To a Service all of whose endpoints are on the client's own node."""
    for service, behind in _services(lab):
        for client in _clients(lab):
            if client not in behind and {pod.node for pod in behind} == {client.node}:
                yield _fault(service, client, behind[0])
                break


def _to_remote_endpoints(lab: Lab) -> Iterator[Fault]:
    """To a Service that has endpoints on other nodes than the client's."""
    for service, behind in _services(lab):
        for client in _clients(lab):
            if client not in behind and any(pod.node != client.node for pod in behind):
                server = next(pod for pod in behind if pod.node != client.node)
                yield _fault(service, client, server)
                break


def _to_balancers(lab: Lab) -> Iterator[Fault]:
    for fault in _to_services(lab):
        if any("." in address for address in _service(lab, fault).load_balancer_ips):
            yield fault


def _by_another_node(lab: Lab) -> Iterator[Fault]:
    """By the NodePort of a node to endpoints on the client's own."""
    for service, behind in _services(lab):
        if not service.ports[0].node_port or len({pod.node for pod in behind}) != 1:
            continue
        client = next(
            (p for p in _clients(lab) if p.node == behind[0].node and p not in behind), None
        )
        for node in lab.nodes:
            if client and node.name != client.node:
                yield _fault(service, client, behind[0], node.name)


# --- small parts ---------------------------------------------------------------------------------


def _pod(lab: Lab, key: str) -> Pod:
    return next(pod for pod in lab.pods if pod.key == key)


def _service(lab: Lab, fault: Fault) -> Service:
    return next(service for service in lab.services if service.key == fault.service)


def _tcp_port(pod: Pod) -> int:
    return next(port for name, port in pod.listen if name == "TCP")


def _on(lab: Lab, node: str) -> str:
    return namespace_name(lab.name, node)


def _in_pod(lab: Lab, key: str) -> str:
    return namespace_name(lab.name, *key.split("/"))


def _in(state: LabState, name: str, edit: Callable[[Namespace], Namespace]) -> LabState:
    """The state with one namespace edited."""
    if state.switch.name == name:
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


def _set(namespace: Namespace, sysctl: Sysctl) -> Namespace:
    others = (each for each in namespace.sysctls if each.path != sysctl.path)
    return replace(namespace, sysctls=(*others, sysctl))


def _with_link(namespace: Namespace, name: str, edit: Callable[[Link], Link]) -> Namespace:
    links = tuple(edit(link) if link.name == name else link for link in namespace.links)
    return replace(namespace, links=links)


def _sysctl(path: str, value: str, in_client: bool = False, in_server: bool = False) -> _Edit:
    """A sysctl of the fault's node, or of a pod."""

    def edit(state: LabState, lab: Lab, fault: Fault) -> LabState:
        pod = fault.client if in_client else fault.server if in_server else None
        name = _in_pod(lab, pod) if pod else _on(lab, fault.node)
        return _in(state, name, lambda ns: _set(ns, Sysctl(path=path, value=value)))

    return edit


_Edit = Callable[[LabState, Lab, Fault], LabState]


def _table(chains: str, family: str = "ip", on_switch: bool = False) -> _Edit:
    """A firewall's table on the fault's node, or on the underlay switch."""

    def edit(state: LabState, lab: Lab, fault: Fault) -> LabState:
        name = f"{TABLE}{fault.name}"
        values = {"client": _pod(lab, fault.client).address, "port": lab.overlay.port}
        body = re.sub(r"\$(\w+)", lambda match: str(values[match[1]]), chains)
        table = Table(family=family, name=name, text=f"table {family} {name} {{\n{body}}}\n")
        where = state.switch.name if on_switch else _on(lab, fault.node)
        return _in(state, where, lambda ns: replace(ns, tables=(*ns.tables, table)))

    return edit


def _drop_chain(hook: str, *rules: str, policy: str = "accept") -> str:
    lines = "".join(f"\t\t{rule}\n" for rule in rules)
    return (
        f"\tchain {hook} {{\n\t\ttype filter hook {hook} priority 10; policy {policy};\n"
        f"{lines}\t}}\n"
    )


# --- the edits -----------------------------------------------------------------------------------


def _no_route(state: LabState, lab: Lab, fault: Fault) -> LabState:
    cidr = lab.node(_pod(lab, fault.server).node).pod_cidr

    def edit(namespace: Namespace) -> Namespace:
        routes = (route for route in namespace.routes if route.destination != cidr)
        return replace(namespace, routes=tuple(routes))

    return _in(state, _on(lab, fault.node), edit)


def _asymmetric(state: LabState, lab: Lab, fault: Fault) -> LabState:
    """Answers leave by eth0, requests come by the tunnel, and the filter is strict."""
    peer = lab.node(_pod(lab, fault.client).node)

    def edit(namespace: Namespace) -> Namespace:
        routes = tuple(
            replace(route, link="eth0", via=peer.address, onlink=False)
            if route.destination == peer.pod_cidr
            else route
            for route in namespace.routes
        )
        strict = Sysctl(path="net/ipv4/conf/all/rp_filter", value="1")
        return replace(_set(namespace, strict), routes=routes)

    return _in(state, _on(lab, fault.node), edit)


def _server_node(lab: Lab, fault: Fault) -> Node:
    return lab.node(_pod(lab, fault.server).node)


def _no_neighbour(state: LabState, lab: Lab, fault: Fault) -> LabState:
    address = _server_node(lab, fault).overlay_address

    def edit(namespace: Namespace) -> Namespace:
        entries = (each for each in namespace.neighbours if each.address != address)
        return replace(namespace, neighbours=tuple(entries))

    return _in(state, _on(lab, fault.node), edit)


def _no_fdb(state: LabState, lab: Lab, fault: Fault) -> LabState:
    mac = vtep_mac(_server_node(lab, fault))

    def edit(namespace: Namespace) -> Namespace:
        return replace(namespace, fdb=tuple(each for each in namespace.fdb if each.mac != mac))

    return _in(state, _on(lab, fault.node), edit)


def _wrong_vtep(state: LabState, lab: Lab, fault: Fault) -> LabState:
    there = _server_node(lab, fault)
    others = [n.address for n in lab.nodes if n.name not in (there.name, fault.node)]
    wrong = (*others, _NOBODY)[0]

    def edit(namespace: Namespace) -> Namespace:
        fdb = (
            replace(each, destination=wrong) if each.mac == vtep_mac(there) else each
            for each in namespace.fdb
        )
        return replace(namespace, fdb=tuple(fdb))

    return _in(state, _on(lab, fault.node), edit)


def _tunnel(edit: Callable[[Link], Link]) -> _Edit:
    """Something else about the VXLAN device of the fault's node that carries IPv4."""

    def edited(state: LabState, lab: Lab, fault: Fault) -> LabState:
        name = f"flannel.{lab.overlay.vni}"
        return _in(state, _on(lab, fault.node), lambda ns: _with_link(ns, name, edit))

    return edited


def _other_vni(link: Link) -> Link:
    assert link.vxlan is not None
    return replace(link, vxlan=replace(link.vxlan, vni=link.vxlan.vni + 98))


def _pod_link(edit: Callable[[Link], Link]) -> _Edit:
    """Something else about the server's veth on its node."""

    def edited(state: LabState, lab: Lab, fault: Fault) -> LabState:
        pod = _pod(lab, fault.server)
        name = podnet.outer_link(pod)
        return _in(state, _on(lab, pod.node), lambda ns: _with_link(ns, name, edit))

    return edited


def _second_owner(state: LabState, lab: Lab, fault: Fault) -> LabState:
    """The client's address is the server's node's, too."""
    address = Address(link="eth0", address=f"{_pod(lab, fault.client).address}/32")
    return _in(
        state,
        _on(lab, fault.node),
        lambda ns: replace(ns, addresses=(*ns.addresses, address)),
    )


def _server(edit: Callable[[Server, int], Iterator[Server]]) -> _Edit:
    """What answers in the server, other than it should on its first TCP port."""

    def edited(state: LabState, lab: Lab, fault: Fault) -> LabState:
        pod = _pod(lab, fault.server)
        servers: list[Server] = []
        for server in state.servers:
            if server.namespace == _in_pod(lab, pod.key):
                servers += edit(server, _tcp_port(pod))
            else:
                servers.append(server)
        return replace(state, servers=tuple(servers))

    return edited


def _closed(server: Server, port: int) -> Iterator[Server]:
    yield replace(server, listen=tuple(each for each in server.listen if each != ("TCP", port)))


def _on_loopback(server: Server, port: int) -> Iterator[Server]:
    yield from _closed(server, port)
    yield replace(server, listen=(("TCP", port),), addresses=("127.0.0.1",))


def _stuck(server: Server, port: int) -> Iterator[Server]:
    yield from _closed(server, port)
    yield replace(server, listen=(("TCP", port),), stuck=True)


def _unmasqueraded(state: LabState, lab: Lab, fault: Fault) -> LabState:
    nodes = (
        replace(node, rules=_without_masquerade(node.rules))
        if node.name == fault.node and node.rules
        else node
        for node in state.nodes
    )
    return replace(state, nodes=tuple(nodes))


def _without_masquerade(rules: Rules) -> Rules:
    if isinstance(rules, Ruleset):
        text = re.sub(r"(?m)^-A KUBE-POSTROUTING .*-j MASQUERADE.*\n", "", rules.ipv4)
        return replace(rules, ipv4=text)
    tables = (
        replace(table, text=table.text.replace(" masquerade fully-random", ""))
        for table in rules.tables
    )
    return Tables(tables=tuple(tables))


def _remembered(state: LabState, lab: Lab, fault: Fault) -> LabState:
    """A connection from before, when the Service had an endpoint that is gone."""
    service, server = _service(lab, fault), _pod(lab, fault.server)
    port = service.ports[0]
    connection = Connection(
        protocol="UDP" if port.protocol == "UDP" else "TCP",
        source=(_pod(lab, fault.client).address, STALE_PORT),
        destination=(service.cluster_ip, port.port),
        to=(_unused(lab, lab.node(server.node)), _target_port(lab, service, server)),
    )
    return _in(
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


# --- Services as they are declared ---------------------------------------------------------------


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


def _no_endpoints(lab: Lab, fault: Fault) -> Lab:
    return _with_endpoints(lab, fault, lambda node: True)


def _remote_only(lab: Lab, fault: Fault) -> Lab:
    lab = _with_endpoints(lab, fault, lambda node: node == fault.node)
    return _with_service(lab, fault, lambda s: replace(s, internal_traffic_policy="Local"))


def _other_sources(lab: Lab, fault: Fault) -> Lab:
    ranges = (_NOBODYS_RANGE,)
    return _with_service(lab, fault, lambda s: replace(s, load_balancer_source_ranges=ranges))


def _balancer_address(lab: Lab, fault: Fault) -> str:
    service = _service(lab, fault)
    address = next(address for address in service.load_balancer_ips if "." in address)
    return f"{address}:{service.ports[0].port}"


def _node_port(lab: Lab, fault: Fault) -> str:
    return f"node/{fault.node}:{_service(lab, fault).ports[0].node_port}"


def _server_itself(lab: Lab, fault: Fault) -> str:
    return fault.server


def _large(lab: Lab, fault: Fault) -> Sequence[str]:
    overhead = 50 if lab.overlay.type == "vxlan" else 0
    return ("--protocol", "icmp", "--size", str(lab.underlay.mtu - overhead - 20))


_TWO_NODES = "pods on two nodes, one of which listens"
_TUNNEL = "overlay vxlan, and pods on two nodes, one of which listens"
_LISTENER = "two pods, one of which listens on TCP"

FAULTS: Mapping[str, Kind] = {
    "no-route": Kind(
        "A node has no route to the pods of another one.", _TWO_NODES, _between_nodes, _no_route
    ),
    "forwarding-off": Kind(
        "A node does not forward packets.",
        _TWO_NODES,
        _between_nodes,
        _sysctl("net/ipv4/ip_forward", "0"),
    ),
    "rp-filter": Kind(
        "A node checks strictly that answers would leave by where requests come from, and they "
        "would not.",
        _TUNNEL,
        _through_vxlan(_to_nodes),
        _asymmetric,
    ),
    "neighbour-unresolved": Kind(
        "A node does not know the MAC of another one's tunnel end.",
        _TUNNEL,
        _through_vxlan(_between_nodes),
        _no_neighbour,
    ),
    "fdb-missing": Kind(
        "A node does not know behind which node a tunnel end is.",
        _TUNNEL,
        _through_vxlan(_between_nodes),
        _no_fdb,
    ),
    "wrong-vtep": Kind(
        "A node takes the wrong address for another one's tunnel end.",
        _TUNNEL,
        _through_vxlan(_between_nodes),
        _wrong_vtep,
    ),
    "wrong-vni": Kind(
        "A node's tunnel is of another VXLAN network than those of the others.",
        _TUNNEL,
        _through_vxlan(_between_nodes),
        _tunnel(_other_vni),
    ),
    "underlay-port-blocked": Kind(
        "The network between the nodes lets no VXLAN through.",
        _TUNNEL,
        _through_vxlan(_between_nodes),
        _table(_drop_chain("forward", "udp dport $port drop"), "bridge", on_switch=True),
    ),
    "link-down": Kind(
        "The link of a pod is down.",
        _LISTENER,
        _to_pods,
        _pod_link(lambda link: replace(link, up=False)),
    ),
    "small-mtu": Kind(
        "A node's tunnel takes smaller packets than the pods send.",
        _TUNNEL,
        _through_vxlan(_between_nodes),
        _tunnel(lambda link: replace(link, mtu=link.mtu - _SMALLER)),
        options=_large,
    ),
    "policy-drop": Kind(
        "A node's firewall drops what it does not know.",
        _TWO_NODES,
        _to_nodes,
        _table(_drop_chain("forward", "ct state established,related accept", policy="drop")),
    ),
    "source-range": Kind(
        "A load balancer's address serves only sources that the client is none of.",
        "a Service of type LoadBalancer with an address and endpoints",
        _to_balancers,
        declare=_other_sources,
        destination=_balancer_address,
    ),
    "no-endpoints": Kind(
        "No pod of a Service is ready.",
        "a Service with endpoints, and a pod that is none",
        _to_services,
        declare=_no_endpoints,
    ),
    "remote-only-local-policy": Kind(
        "A Service keeps to the client's node, and has no endpoint there.",
        "a Service with endpoints on another node than the client's",
        _to_remote_endpoints,
        declare=_remote_only,
    ),
    "missing-masquerade": Kind(
        "A node passes on what comes to a NodePort without putting itself in as the source.",
        "a NodePort whose endpoints are all on one node, and another pod there",
        _by_another_node,
        _unmasqueraded,
        destination=_node_port,
    ),
    "bridge-nf-off": Kind(
        "A node's bridge passes answers on without connection tracking.",
        "a Service whose endpoints are all on one node, and another pod there",
        _to_a_neighbour,
        _sysctl("net/bridge/bridge-nf-call-iptables", "0"),
    ),
    "stale-conntrack": Kind(
        "A node remembers a client's connection to a pod that is gone.",
        "a Service over TCP or UDP with endpoints, and a pod that is none",
        _to_services,
        _remembered,
        options=lambda lab, fault: ("--source-port", str(STALE_PORT)),
    ),
    "conntrack-invalid": Kind(
        "A node tracks the answers of connections, but not their beginning.",
        _TWO_NODES,
        _to_nodes,
        _table(
            "\tchain prerouting {\n\t\ttype filter hook prerouting priority -300; policy accept;\n"
            "\t\tip saddr $client tcp flags & (syn | ack) == syn notrack\n\t}\n"
            + _drop_chain("forward", "ct state invalid drop")
        ),
    ),
    "port-closed": Kind("Nothing listens on a pod's port.", _LISTENER, _to_pods, _server(_closed)),
    "wrong-listen-address": Kind(
        "A server listens on its loopback address alone.",
        _LISTENER,
        _to_pods,
        _server(_on_loopback),
    ),
    "accept-queue-full": Kind(
        "A server listens, and accepts no connection.", _LISTENER, _to_pods, _server(_stuck)
    ),
    "icmp-filtered": Kind(
        "A node's firewall drops ICMP.",
        _TWO_NODES,
        _to_nodes,
        _table(_drop_chain("forward", "meta l4proto icmp drop")),
        options=lambda lab, fault: ("--protocol", "icmp"),
        destination=_server_itself,
    ),
    "ttl": Kind(
        "A pod's packets may cross no router.",
        _TWO_NODES,
        _from_pods,
        _sysctl("net/ipv4/ip_default_ttl", "1", in_client=True),
    ),
    "martian": Kind(
        "A node has the address of a pod elsewhere.", _TWO_NODES, _to_nodes, _second_owner
    ),
    "arp-ignored": Kind(
        "A pod does not tell its MAC.",
        _LISTENER,
        _to_pods,
        _sysctl("net/ipv4/conf/all/arp_ignore", "8", in_server=True),
    ),
    "hairpin-off": Kind(
        "A bridge does not send a packet back to the pod that it came from.",
        "a Service whose only endpoint is a pod of the lab",
        _to_own_service,
        _pod_link(lambda link: replace(link, hairpin=False)),
    ),
}
