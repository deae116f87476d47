"""Where a fault may be in a lab: on which node, between which pod and which other or Service."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from netlab.topology.model import Fault, Lab, Pod, Service

Choices = Callable[[Lab], Iterator[Fault]]
"""Every way to put a fault into a lab; the name is filled in by the caller."""


def pod_of(lab: Lab, key: str) -> Pod:
    return next(pod for pod in lab.pods if pod.key == key)


def service_of(lab: Lab, fault: Fault) -> Service:
    return next(service for service in lab.services if service.key == fault.service)


def tcp_port(pod: Pod) -> int:
    return next(port for name, port in pod.listen if name == "TCP")


def _clients(lab: Lab) -> list[Pod]:
    return [pod for pod in lab.pods if not pod.host_network]


def _servers(lab: Lab) -> list[Pod]:
    return [pod for pod in _clients(lab) if any(name == "TCP" for name, _ in pod.listen)]


def between_nodes(lab: Lab) -> Iterator[Fault]:
    """From each node to a pod on another one; the fault is where the packet comes from."""
    servers = _servers(lab)
    for client in _one_of_each_node(lab):
        for server in servers:
            if server.node != client.node:
                yield Fault(node=client.node, client=client.key, server=server.key)
                break


def to_nodes(lab: Lab) -> Iterator[Fault]:
    """To each node from a pod on another one; the fault is where the packet arrives."""
    clients, reached = _one_of_each_node(lab), set()
    for server in _servers(lab):
        client = next((pod for pod in clients if pod.node != server.node), None)
        if client and server.node not in reached:
            reached.add(server.node)
            yield Fault(node=server.node, client=client.key, server=server.key)


def through_vxlan(ways: Choices) -> Choices:
    return lambda lab: ways(lab) if lab.overlay.type == "vxlan" else iter(())


def to_pods(lab: Lab) -> Iterator[Fault]:
    """To each pod that listens on TCP, from another one; the fault is in the pod that listens."""
    clients = _one_of_each_node(lab) + _clients(lab)[:2]
    for server in _servers(lab):
        client = next((pod for pod in clients if pod != server), None)
        if client:
            yield Fault(node=server.node, client=client.key, server=server.key)


def from_pods(lab: Lab) -> Iterator[Fault]:
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


def to_services(lab: Lab) -> Iterator[Fault]:
    """To each Service that has endpoints."""
    for service, behind in _services(lab):
        client = next((pod for pod in _clients(lab) if pod not in behind), None)
        if client and service.ports[0].protocol != "SCTP":
            yield _fault(service, client, behind[0])


def to_own_service(lab: Lab) -> Iterator[Fault]:
    """From a pod to a Service that has no other endpoint."""
    for service, behind in _services(lab):
        if len(behind) == 1:
            yield _fault(service, behind[0], behind[0])


def to_a_neighbour(lab: Lab) -> Iterator[Fault]:
    """To a Service all of whose endpoints are on the client's own node."""
    for service, behind in _services(lab):
        for client in _clients(lab):
            if client not in behind and {pod.node for pod in behind} == {client.node}:
                yield _fault(service, client, behind[0])
                break


def to_remote_endpoints(lab: Lab) -> Iterator[Fault]:
    """To a Service that has endpoints on other nodes than the client's."""
    for service, behind in _services(lab):
        for client in _clients(lab):
            if client not in behind and any(pod.node != client.node for pod in behind):
                server = next(pod for pod in behind if pod.node != client.node)
                yield _fault(service, client, server)
                break


def to_balancers(lab: Lab) -> Iterator[Fault]:
    for fault in to_services(lab):
        if any("." in address for address in service_of(lab, fault).load_balancer_ips):
            yield fault


def to_strangers(lab: Lab) -> Iterator[Fault]:
    """From each node to a host outside that listens on TCP and sees the node in the pod's place."""
    for client in _one_of_each_node(lab) if lab.overlay.masquerade != "none" else ():
        for host in lab.hosts:
            if "." in host.addresses[0] and any(name == "TCP" for name, _ in host.listen):
                yield Fault(node=client.node, client=client.key, host=host.name)
                break


def by_another_node(lab: Lab) -> Iterator[Fault]:
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
