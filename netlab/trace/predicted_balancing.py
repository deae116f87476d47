"""What kube-proxy makes of a new connection in ipvs mode, by its semantics and not by its rules.

Addresses of virtual servers are the node's own there, so that a packet for one is for the node
itself, and is sent on behind the rules for such packets.  Written from what kube-proxy v1.37 does
(pkg/proxy/ipvs/proxier.go and its answers to real packets), as :mod:`predicted_services` is.
"""

from __future__ import annotations

from typing import Literal

from netlab.topology.model import Endpoint, Lab, Service
from netlab.trace.predicted_services import (
    Hit,
    Hook,
    Packet,
    Proxy,
    Refusal,
    Translation,
    external_policy,
)


def virtual_addresses(lab: Lab, served: list[Service]) -> frozenset[str]:
    """Addresses that every node has for these Services."""
    gates = lab.service_proxy.featureGates
    found: set[str] = set()
    for service in served:
        found.update(service.cluster_ips, service.load_balancer_ips)
        if gates.get("AllowServiceExternalIPs", True):
            found.update(service.external_ips)
    return frozenset(found)


class BalancingProxy(Proxy):
    """The proxy of one node in ipvs mode, for one family."""

    kind: Literal["dnat", "ipvs"] = "ipvs"

    def before(self, packet: Packet) -> Refusal | None:
        """Nothing is refused before it is known to be for the node."""
        return None

    def translate(self, packet: Packet) -> Translation | None:
        """No rule translates."""
        return None

    def after(self, packet: Packet, hook: Hook) -> Refusal | None:
        """What is not for the node is nobody's business."""
        return None

    def balance(self, packet: Packet, *, own: bool) -> Translation | Refusal | None:
        """Where a packet for the node goes that arrives, or that the node sends itself (`own`).

        None: no virtual server is meant.
        """
        for hit in self._hits(packet):
            if hit.kind == "balancer" and not self._is_admitted(hit.service, packet.source):
                return Refusal("dropped-by-rule", False)
            endpoints = self._chosen(hit)
            if not endpoints:
                local = self._has_any(hit)
                return Refusal("no-local-endpoints" if local else "no-endpoints", True)
            return Translation(
                service=hit.service.key,
                endpoints=tuple(endpoints),
                always=self._masquerades(hit, packet),
                hairpins=self._hairpins(hit),
            )
        if not own and packet.destination.ip in self._network.virtual_addresses:
            return Refusal("no-such-port", True)
        return None

    def _takes_node_ports(self, address: str) -> bool:
        own = self._network.local_addresses(self._place)
        return address in own and super()._takes_node_ports(address)

    def _chosen(self, hit: Hit) -> list[Endpoint]:
        """Those here under policy Local, or all of them where none is.

        A Service that nobody reaches from outside, under internal policy Local, has no others.
        """
        service, port, kind = hit
        inside = service.internal_traffic_policy == "Local"
        is_local = inside if kind == "cluster" else external_policy(service) == "Local"
        if is_local and (here := self._local(hit)):
            return here
        outside = port.node_port or service.external_ips or service.load_balancer_ips
        return self._cluster(hit) if outside or not inside else []

    def _masquerades(self, hit: Hit, packet: Packet) -> bool:
        if hit.kind != "cluster":
            return external_policy(hit.service) == "Cluster"
        if not self._detects_pods and not self._settings.iptables.masqueradeAll:
            # the node asks from the address that it asks
            return packet.source == packet.destination.ip
        return self._masquerades_cluster_ip(packet)

    def _hairpins(self, hit: Hit) -> frozenset[str]:
        """Every endpoint of the node, of whatever condition."""
        return frozenset(each.address for each in self._known(hit) if each.node == self._node.name)
