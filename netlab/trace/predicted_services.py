"""What kube-proxy makes of a new connection on one node, by its semantics and not by its rules.

Written from what kube-proxy v1.37 does (pkg/proxy/topology.go, serviceport.go, the READMEs of its
modes and its answers to real packets), without the code of netlab that renders rules, so that a
mistake there is no mistake here.  Three questions are asked in the order in which a packet meets
them: `before` any translation, `translate`, and `after` for what was not translated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from ipaddress import ip_address, ip_network
from typing import Literal, NamedTuple

import msgspec

from netlab.topology.model import (
    ZONE_LABEL,
    Endpoint,
    Lab,
    Node,
    Service,
    ServicePort,
    TrafficPolicy,
)
from netlab.trace.declared_network import DeclaredNetwork, is_loopback
from netlab.trace.family import family_of, first_of
from netlab.trace.model_steps import Socket

_ADDRESSES = {"localhost": ("127.0.0.0/8", "::1/128"), "all": ("0.0.0.0/0", "::/0")}

Hook = Literal["input", "forward", "output"]
Kind = Literal["cluster", "external", "balancer", "node-port"]


class Packet(NamedTuple):
    """The first packet of a connection where a node meets it; `device` is null if it sends it."""

    protocol: str  # "TCP", "UDP", or "ICMP", which no Service has
    source: str
    destination: Socket
    device: str | None


class Refusal(NamedTuple):
    """A connection that goes no further: `answered` with an ICMP error, or not."""

    reason: str
    answered: bool


class Translation(msgspec.Struct, frozen=True):
    """The endpoints that may be chosen, and for which of them the node puts itself in as source."""

    service: str
    endpoints: tuple[Endpoint, ...]
    always: bool  # masquerade, whichever is chosen
    hairpins: frozenset[str] = frozenset()  # addresses that are masqueraded to themselves

    def masquerades(self, source: str, endpoint: Endpoint) -> bool:
        """Whether the chosen endpoint sees the node as its client."""
        return self.always or (source == endpoint.address and source in self.hairpins)


class Hit(NamedTuple):
    """A Service port that a destination belongs to, by which kind of its addresses."""

    service: Service
    port: ServicePort
    kind: Kind


class Proxy:
    """The service proxy of one node, for one family."""

    kind: Literal["dnat", "ipvs"] = "dnat"  # of its translations

    def __init__(self, network: DeclaredNetwork, node: Node) -> None:
        self._network = network
        self._lab: Lab = network.lab
        self._node = node
        self._place = network.place_of(node)
        self._settings = self._lab.service_proxy
        self._mode = self._settings.mode
        # Maps of flat rules answer as kube-proxy's do.
        self._is_nftables = self._mode in ("nftables", "nftables-flat")

    @property
    def drops_invalid(self) -> bool:
        """Whether what connection tracking knows no connection for is not forwarded."""
        return self._mode == "iptables" and not self._settings.conntrack.tcpBeLiberal

    def before(self, packet: Packet) -> Refusal | None:
        """In nftables mode source ranges are asked first, endpoints or none."""
        if not self._is_nftables:
            return None
        for service, _, kind in self._hits(packet):
            if kind == "balancer" and not self._is_admitted(service, packet.source):
                return Refusal("dropped-by-rule", False)
        return None

    def translate(self, packet: Packet) -> Translation | None:
        """Where the connection is sent instead; None: its destination stays."""
        for hit in self._hits(packet):
            found = self._translation(hit, packet)
            if found:
                return found
        return None

    def balance(self, packet: Packet, *, own: bool) -> Translation | Refusal | None:
        """Where a packet for the node itself is sent instead; see ipvs mode."""
        return None

    def after(self, packet: Packet, hook: Hook) -> Refusal | None:
        """What stops a connection that was not translated."""
        if self._is_nftables:
            return self._after_maps(packet, hook)
        return self._after_chains(packet, hook) if self._mode == "iptables" else None

    # --- which Service ---------------------------------------------------------------------------

    def _hits(self, packet: Packet) -> Iterator[Hit]:
        """Service ports that the destination is one of: own addresses, then node ports."""
        if self._mode == "none" or packet.protocol == "ICMP":
            return
        address, number = packet.destination.ip, packet.destination.port
        # Where several Services name one external address, the first by name has it.
        for service in self._network.services_at(address):
            kind = self._kind(service, address)
            for port in service.ports:
                if kind and (port.port, port.protocol) == (number, packet.protocol):
                    yield Hit(service, port, kind)
        if self._takes_node_ports(address):
            yield from self._by_node_port(packet)

    def _by_node_port(self, packet: Packet) -> Iterator[Hit]:
        asked = packet.destination.port, packet.protocol
        for service in self._network.services_of_node_port(packet.destination.port or 0):
            for port in service.ports:
                if (port.node_port, port.protocol) == asked:
                    yield Hit(service, port, "node-port")

    def _kind(self, service: Service, address: str) -> Kind | None:
        if address in service.cluster_ips:
            return "cluster"
        gates = self._settings.featureGates
        if address in service.external_ips and gates.get("AllowServiceExternalIPs", True):
            return "external"
        return "balancer" if address in service.load_balancer_ips else None

    def _takes_node_ports(self, address: str) -> bool:
        """Whether the node answers for its NodePorts at one of its addresses."""
        if not self._network.is_local(self._place, address):
            return False
        version = self._network.family.version
        given = self._settings.nodePortAddresses or (("primary",) if self._is_nftables else ())
        networks = [
            network
            for text in given
            for each in (self._primary() if text == "primary" else _ADDRESSES.get(text, (text,)))
            if (network := ip_network(each.strip(), strict=False)).version == version
        ]
        everywhere = not networks or any(network.prefixlen == 0 for network in networks)
        if is_loopback(address):
            # No route leads from an IPv6 loopback address to a pod.
            return (
                version == 4
                and not self._is_nftables
                and self._settings.iptables.localhostNodePorts
                and (everywhere or any(ip_address(address) in network for network in networks))
            )
        return everywhere or any(ip_address(address) in network for network in networks)

    def _primary(self) -> Sequence[str]:
        """The node's first address of each family."""
        return list({family_of(each): each for each in reversed(self._node.addresses)}.values())

    # --- which endpoints -------------------------------------------------------------------------

    def _known(self, hit: Hit) -> tuple[Endpoint, ...]:
        return self._network.endpoints(hit.service, hit.port)

    def _cluster(self, hit: Hit) -> list[Endpoint]:
        known = self._known(hit)
        ready = [each for each in known if each.ready]
        return self._by_hints(ready) if ready else _draining(known)

    def _local(self, hit: Hit) -> list[Endpoint]:
        here = [each for each in self._known(hit) if each.node == self._node.name]
        return [each for each in here if each.ready] or _draining(here)

    def _by_hints(self, ready: list[Endpoint]) -> list[Endpoint]:
        """Those meant for this node, else for its zone; hints count if every endpoint has one."""
        zone = self._node.labels.get(ZONE_LABEL)
        mine = [each for each in ready if self._node.name in each.for_nodes]
        if mine and all(each.for_nodes for each in ready):
            return mine
        near = [each for each in ready if zone in each.for_zones]
        if near and all(each.for_zones for each in ready):
            return near
        return ready

    def _has_any(self, hit: Hit) -> bool:
        known = self._known(hit)
        return any(each.ready for each in known) or bool(_draining(known))

    # --- translation -----------------------------------------------------------------------------

    def _translation(self, hit: Hit, packet: Packet) -> Translation | None:
        service, _, kind = hit
        if kind == "balancer" and not self._is_admitted(service, packet.source):
            return None
        if kind == "cluster":
            local = service.internal_traffic_policy == "Local"
            return self._to(hit, local=local, always=self._masquerades_cluster_ip(packet))
        if external_policy(service) == "Cluster":
            return self._to(hit, local=False, always=True)
        # Pods and the node itself reach every endpoint under policy Local as well.
        if self._is_from_pod(packet):
            return self._to(hit, local=False, always=False)
        if self._network.is_local(self._place, packet.source):
            return self._to(hit, local=False, always=True)
        return self._to(hit, local=True, always=False)

    def _to(self, hit: Hit, *, local: bool, always: bool) -> Translation | None:
        endpoints = self._local(hit) if local else self._cluster(hit)
        if not endpoints:
            return None
        known = self._known(hit) if self._is_nftables else endpoints
        own = self._node.name
        hairpins = (each for each in known if not self._is_nftables or each.node == own)
        return Translation(
            service=hit.service.key,
            endpoints=tuple(endpoints),
            always=always,
            hairpins=frozenset(each.address for each in hairpins),
        )

    def _masquerades_cluster_ip(self, packet: Packet) -> bool:
        of_mode = self._settings.nftables if self._is_nftables else self._settings.iptables
        return of_mode.masqueradeAll or (self._detects_pods and not self._is_from_pod(packet))

    @property
    def _pod_cidr(self) -> str:
        by_node = self._settings.detectLocalMode == "NodeCIDR"
        cidrs = self._node.pod_cidrs if by_node else self._settings.clusterCIDR.split(",")
        return first_of(self._network.family, tuple(cidr.strip() for cidr in cidrs if cidr)) or ""

    @property
    def _detects_pods(self) -> bool:
        mode, detect = self._settings.detectLocalMode, self._settings.detectLocal
        if mode == "BridgeInterface":
            return bool(detect.bridgeInterface)
        if mode == "InterfaceNamePrefix":
            return bool(detect.interfaceNamePrefix)
        return bool(self._pod_cidr)

    def _is_from_pod(self, packet: Packet) -> bool:
        """Whether the proxy takes the source for a pod; without a way to tell nothing is one."""
        mode, detect = self._settings.detectLocalMode, self._settings.detectLocal
        if not self._detects_pods:
            return False
        if mode == "BridgeInterface":
            return packet.device == detect.bridgeInterface
        if mode == "InterfaceNamePrefix":
            return (packet.device or "").startswith(detect.interfaceNamePrefix)
        return ip_address(packet.source) in ip_network(self._pod_cidr, strict=False)

    def _is_admitted(self, service: Service, source: str) -> bool:
        """Whether the load balancer's source ranges let a source in."""
        version = self._network.family.version
        ranges = [
            network
            for text in service.load_balancer_source_ranges
            if (network := ip_network(text.strip(), strict=False)).version == version
        ]
        if not ranges or any(network.prefixlen == 0 for network in ranges):
            return True
        if any(ip_address(source) in network for network in ranges):
            return True
        # A node in a range may reach the balancer's address from that very address.
        own = first_of(self._network.family, self._node.addresses)
        near = own is not None and any(ip_address(own) in network for network in ranges)
        return near and source in service.load_balancer_ips

    # --- refusal ---------------------------------------------------------------------------------

    def _verdict(self, hit: Hit) -> Refusal | None:
        """What becomes of what could not be translated, if the Service is why."""
        if not self._has_any(hit):
            return Refusal("no-endpoints", True)
        service = hit.service
        policy: TrafficPolicy = (
            service.internal_traffic_policy if hit.kind == "cluster" else external_policy(service)
        )
        if policy == "Local" and not self._local(hit):
            return Refusal("no-local-endpoints", False)
        return None

    def _after_chains(self, packet: Packet, hook: Hook) -> Refusal | None:
        """In iptables mode: filter's chains for the Services, each hooked where it is."""
        hits = list(self._every_hit(packet))
        for hit in hits:
            if hit.kind == "balancer" and self._has_firewall(hit):
                return Refusal("dropped-by-rule", False)
        for hit in hits:
            # Cluster IPs are asked for in FORWARD and OUTPUT, all others in INPUT and FORWARD.
            if hook != ("input" if hit.kind == "cluster" else "output"):
                refusal = self._verdict(hit)
                if refusal:
                    return refusal
        return None

    def _has_firewall(self, hit: Hit) -> bool:
        version = self._network.family.version
        ranges = [
            network
            for text in hit.service.load_balancer_source_ranges
            if (network := ip_network(text.strip(), strict=False)).version == version
        ]
        usable = self._has_any(hit)
        return bool(ranges) and all(network.prefixlen for network in ranges) and usable

    def _every_hit(self, packet: Packet) -> Iterator[Hit]:
        """As `_hits`, and NodePorts at every local address, which the refusing rules do not ask."""
        found = list(self._hits(packet))
        yield from found
        if not self._network.is_local(self._place, packet.destination.ip):
            return
        yield from (hit for hit in self._by_node_port(packet) if hit not in found)

    def _after_maps(self, packet: Packet, hook: Hook) -> Refusal | None:
        """The nftables modes: verdict maps, then what is left for addresses of Services."""
        for hit in self._hits(packet):
            if hit.kind != "node-port" or hook == "input":
                refusal = self._verdict(hit)
                if refusal:
                    return refusal
        if hook == "input":
            return None
        address = packet.destination.ip
        named = self._network.services_at(address)
        if any(address in service.cluster_ips for service in named):
            return Refusal("no-such-port", True)
        number = ip_address(address)
        if any(number in ip_network(cidr) for cidr in self._lab.service_cidrs):
            return Refusal("no-such-service", False)
        return None


def external_policy(service: Service) -> TrafficPolicy:
    """What holds for addresses from outside, which only such Services have."""
    outside = service.type in ("NodePort", "LoadBalancer") or bool(service.external_ips)
    return service.external_traffic_policy if outside else "Cluster"


def _draining(endpoints: Sequence[Endpoint]) -> list[Endpoint]:
    """Those that terminate and still serve, for want of ready ones."""
    return [each for each in endpoints if each.serving and each.terminating]
