"""Who asks whom: every pair of the network model's demands, and every Service from everywhere.

A pod is asked where it listens, else a socket that this command opens in it answers; nodes have
only that.  Pods in their node's network are that node.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from netlab.datapath.outside_names import host_namespace
from netlab.datapath.state import namespace_name
from netlab.topology.model import Lab, Pod, Service, ServicePort
from netlab.verify.model import Demand, End, Question


def family_of(address: str) -> int:
    """4 or 6."""
    return 6 if ":" in address else 4


def families_of(lab: Lab) -> list[int]:
    """Those of a lab."""
    return [family_of(cidr) for cidr in lab.pod_cidrs]


class Ends:
    """Pods, nodes and hosts of a lab."""

    def __init__(self, lab: Lab) -> None:
        self.pods = [
            (
                pod,
                End(
                    "pod",
                    pod.key,
                    namespace_name(lab.name, pod.namespace, pod.name),
                    pod.node,
                    pod.addresses,
                ),
            )
            for pod in lab.pods
            if not pod.host_network
        ]
        self.nodes = [
            End("node", node.name, namespace_name(lab.name, node.name), node.name, node.addresses)
            for node in lab.nodes
        ]
        self.hosts = [
            End("host", host.name, host_namespace(lab, host), "", host.addresses)
            for host in lab.hosts
        ]
        self.inner_hosts = [
            end for end, host in zip(self.hosts, lab.hosts, strict=True) if not host.internet
        ]

    def at(self, address: str) -> End | None:
        """Who has an address."""
        for end in (*(end for _, end in self.pods), *self.nodes, *self.hosts):
            if address in end.addresses:
                return end
        return None


def demands(lab: Lab, ends: Ends) -> Iterator[Question]:
    """The questions of the three demands, for each family."""
    for family in families_of(lab):
        targets = [
            (pod, end, address)
            for pod, end in ends.pods
            if (address := _of(family, end.addresses)) is not None
        ]
        for _, source in ends.pods:
            for pod, target, address in targets:
                if target is not source:
                    yield _to_pod(source, pod, target, address)
            for node in ends.nodes:
                own = _of(family, node.addresses)
                if own is not None:
                    names = frozenset((str(node),))
                    yield Question("own-address", source, node, own, 0, "UDP", names)
        for node in ends.nodes:
            for pod, target, address in targets:
                yield _to_pod(node, pod, target, address)


def _to_pod(source: End, pod: Pod, target: End, address: str) -> Question:
    demand: Demand = "pod-to-pod" if source.kind == "pod" else "node-to-pod"
    for protocol in ("TCP", "UDP"):
        # (A name server understands nothing else; where that is all, a socket of ours answers.)
        for name, port in pod.served if pod.name_server else pod.listen:
            if name == protocol:
                names = frozenset((pod.name,))
                return Question(demand, source, target, address, port, protocol, names)
    return Question(demand, source, target, address, 0, "UDP", frozenset((str(target),)))


def outside(lab: Lab, ends: Ends) -> Iterator[Question]:
    """Pods and nodes ask each host that listens."""
    clients = [*(end for _, end in ends.pods), *ends.nodes]
    for host, target in zip(lab.hosts, ends.hosts, strict=True):
        port = next(((name, port) for name, port in host.listen if name in ("TCP", "UDP")), None)
        if port is None:
            continue
        for address in host.addresses:
            names = frozenset((host.name,))
            yield from (
                Question("outside", client, target, address, port[1], port[0], names)
                for client in clients
            )


def services(lab: Lab, ends: Ends, left_out: list[str]) -> Iterator[Question]:
    """Each Service's ports at each of its addresses: cluster IPs and others, and node ports.

    Hosts of the nodes' network ask for node ports, all hosts for what a load balancer serves; what
    is left out is told.
    """
    families = families_of(lab)
    clients = [*(end for _, end in ends.pods), *ends.nodes]
    for service in lab.services:
        if service.cluster_ip in ("", "None"):
            left_out.append(f"svc/{service.key}: it has no cluster IP")
            continue
        target = End("svc", service.key)
        inside = [*service.cluster_ips, *service.external_ips, *service.load_balancer_ips]
        for port in service.ports:
            if port.protocol == "SCTP":
                left_out.append(f"svc/{service.key} port {port.port}: SCTP is not asked")
                continue
            for family in families:
                if not any(family_of(each) == family for each in service.cluster_ips):
                    continue
                names, near = _behind(lab, ends, service, port, family)
                dns = _is_name_server(lab, service, port)
                addresses = [each for each in inside if family_of(each) == family]
                balanced = {ip for box in lab.balancers for ip in box.serves(service)}
                yield from (
                    Question(
                        "service", client, target, each, port.port, port.protocol, names, near, dns
                    )
                    for each in addresses
                    for client in (*clients, *(ends.hosts if each in balanced else ()))
                )
                if port.node_port is None:
                    continue
                yield from (
                    Question(
                        "service",
                        client,
                        target,
                        own,
                        port.node_port,
                        port.protocol,
                        names,
                        near,
                        dns,
                    )
                    for node in ends.nodes
                    if (own := _of(family, node.addresses)) is not None
                    for client in (*clients, *ends.inner_hosts)
                )


def _behind(
    lab: Lab, ends: Ends, service: Service, port: ServicePort, family: int
) -> tuple[frozenset[str], tuple[End, ...]]:
    """Names of those who may answer, and who they are."""
    found = [
        end
        for endpoint in lab.endpoints_of(service, port)
        if family_of(endpoint.address) == family
        if (end := ends.at(endpoint.address)) is not None
    ]
    pods = {pod.key: pod.name for pod, _ in ends.pods}
    names = {pods.get(end.name, end.name) for end in found if end.kind != "node"}
    # On a node pods of its own network answer, each by its name.
    nodes = {end.node for end in found if end.kind == "node"}
    names |= {pod.name for pod in lab.pods if pod.host_network and pod.node in nodes}
    return frozenset(names), tuple(found)


def _is_name_server(lab: Lab, service: Service, port: ServicePort) -> bool:
    servers = {pod.key for pod in lab.pods if pod.name_server}
    behind = lab.endpoints_of(service, port)
    return any(end.port == 53 and end.pod in servers for end in behind)


def _of(family: int, addresses: Iterable[str]) -> str | None:
    return next((each for each in addresses if family_of(each) == family), None)
