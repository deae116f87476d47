"""What a load balancer makes of a predicted packet: which nodes it may choose, and what it changes.

Written from docs/outside.md, without the code that renders its rules.  It takes the nodes that its
health checks find healthy when they have had their time.
"""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import NamedTuple

from netlab.topology.model import Endpoint, LoadBalancer, Node, Service, ServicePort
from netlab.trace.declared_network import DeclaredNetwork
from netlab.trace.family import first_of
from netlab.trace.model_steps import Socket, Tuple
from netlab.trace.place import Place
from netlab.trace.predicted_services import Packet, Proxy

# Proxies that answer at no healthCheckNodePort: there is none, or it is older than that.
_WITHOUT_HEALTH_CHECKS = ("none", "userspace")


class Asked(NamedTuple):
    """A Service's port that a packet is for."""

    service: Service
    port: ServicePort


class PredictedBalancer:
    """One load balancer, for one family."""

    def __init__(self, network: DeclaredNetwork, place: Place) -> None:
        self._network = network
        self.box: LoadBalancer = next(b for b in network.lab.balancers if b.name == place.name)

    @property
    def translates(self) -> bool:
        """Whether it sends to node ports, and not the packets themselves."""
        return self.box.mode == "nat"

    @property
    def address(self) -> str:
        """Its own."""
        found = first_of(self._network.family, self.box.addresses)
        assert found is not None
        return found

    def has(self, address: str) -> bool:
        """Whether an address is of its pool."""
        return any(ip_address(address) in ip_network(pool) for pool in self.box.pools)

    def asked(self, destination: Socket, protocol: str) -> Asked | None:
        """What a packet is for; None if that is nothing that it serves."""
        for service in self._network.lab.services:
            if destination.ip not in self.box.serves(service):
                continue
            for port in service.ports:
                if (port.port, port.protocol) == (destination.port, protocol.upper()):
                    return Asked(service, port) if port.node_port or not self.translates else None
        return None

    def admits(self, asked: Asked, source: str) -> bool:
        """Whether a client may ask; where packets are passed on the nodes look at that."""
        version = self._network.family.version
        ranges = [
            each
            for text in asked.service.load_balancer_source_ranges
            if (each := ip_network(text)).version == version
        ]
        return not self.translates or not ranges or any(ip_address(source) in r for r in ranges)

    def healthy(self, asked: Asked) -> list[Node]:
        """Nodes that pass the check: by the healthCheckNodePort, else by a node port over TCP."""
        lab, service = self._network.lab, asked.service
        nodes = [
            node
            for node in lab.nodes
            if first_of(self._network.family, node.addresses) and node.name not in lab.stopped
        ]
        mode = lab.service_proxy.mode
        if service.health_check_node_port:
            if mode in _WITHOUT_HEALTH_CHECKS:
                return []
            return [node for node in nodes if self._has_local(service, node)]
        tcp = [port for port in (asked.port, *service.ports) if port.protocol == "TCP"]
        checked = next((port for port in tcp if port.node_port), None)
        if checked is None:
            return nodes
        if mode == "none":
            return []
        ends = self._network.endpoints(service, checked)
        usable = any(end.ready or (end.serving and end.terminating) for end in ends)
        return nodes if usable else []

    def _has_local(self, service: Service, node: Node) -> bool:
        ends = (end for port in service.ports for end in self._network.endpoints(service, port))
        return any(end.ready and end.node == node.name for end in ends)

    def sent(self, flow: Tuple, asked: Asked, node: Node) -> Tuple:
        """What a node gets: itself as destination and the box as source, or the packet as it is."""
        if not self.translates:
            return flow
        address = first_of(self._network.family, node.addresses)
        assert address is not None
        to = Socket(ip=address, port=asked.port.node_port)
        return Tuple(source=Socket(ip=self.address), destination=to)

    def offered(
        self, flow: Tuple, asked: Asked, nodes: list[Node], proxies: type[Proxy]
    ) -> list[tuple[Endpoint, Node]]:
        """All endpoints that the healthy nodes may choose, each with the first node that may."""
        found: dict[Endpoint, Node] = {}
        for node in nodes:
            sent = self.sent(flow, asked, node)
            protocol = asked.port.protocol
            packet = Packet(protocol, sent.source.ip, sent.destination, "eth0")
            proxy = proxies(self._network, node)
            offer = proxy.translate(packet) or proxy.balance(packet, own=False)
            for endpoint in getattr(offer, "endpoints", ()):
                found.setdefault(endpoint, node)
        return list(found.items())
