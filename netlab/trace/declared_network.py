"""What each namespace of a lab should hold, by the lab alone: addresses, routes, who is on a link.

This is the network that :mod:`netlab.trace.predicted_path` walks through.  It is written from what
docs/design.md says of a lab, beside the code that builds one and not from it, so that the two check
each other; only names of devices are those of the builder.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

import msgspec

from netlab.datapath.overlays import tunnel, tunnels, vni
from netlab.datapath.podnet import outer_link, switch_port
from netlab.topology.model import Endpoint, Lab, Node, Pod, Service, ServicePort
from netlab.trace import declared_docker, declared_outside
from netlab.trace.declared_outside import Attached
from netlab.trace.family import Family, family_of, first_of
from netlab.trace.model_steps import TunnelKind
from netlab.trace.place import Place, place_of_node, place_of_pod, place_of_switch
from netlab.trace.predicted_policies import Policies

BRIDGE, UPLINK, SWITCH_BRIDGE, LOOPBACK = "cbr0", "eth0", "br0", "lo"
NOWHERE = ""  # the device of a route that leads nowhere: a block's address that no pod has


_ANOTHER_PROXYS = "service.kubernetes.io/service-proxy-name"
# Ethernet, VXLAN, UDP and IP around a packet: 14 + 8 + 8 and 20, or 40.
_VXLAN_HEADERS = {4: 50, 6: 70}
_TUNNEL_HEADERS = {
    "vxlan": _VXLAN_HEADERS,
    "vxlan-multicast": _VXLAN_HEADERS,
    "mesh": _VXLAN_HEADERS,
    "ipip": {4: 20},
}
_ROUTED = ("bgp", "eni")  # overlays without a bridge: each pod is a route of its node's
_LINK_GATEWAY = "169.254.1.1"  # what pods have as their gateway there


class Way(msgspec.Struct, frozen=True):
    """A route: the network that matched, the device, the next hop's address if it is another's."""

    matched: str
    device: str
    via: str | None = None


class DeclaredNetwork:
    """Questions to the tables that a lab should have; a place is one of its namespaces."""

    def __init__(self, lab: Lab, family: Family) -> None:
        self.lab = lab
        self.family = family
        self.overlay = lab.overlay.type
        self.is_routed = self.overlay in _ROUTED
        self._headers = _TUNNEL_HEADERS.get(self.overlay, {})
        self._services_at: dict[str, list[Service]] = {}
        self._endpoints: dict[tuple[str, str, str], tuple[Endpoint, ...]] = {}
        self.switch = place_of_switch(lab)

    @functools.cached_property
    def _pods(self) -> dict[str, Pod]:
        return {
            address: pod
            for pod in self.lab.pods
            if not pod.host_network
            for address in pod.addresses
        }

    @functools.cached_property
    def virtual_addresses(self) -> frozenset[str]:
        """Addresses that Services give to every node: in ipvs mode all that they have."""
        if self.lab.service_proxy.mode != "ipvs":
            return frozenset()
        from netlab.trace.predicted_balancing import virtual_addresses

        return virtual_addresses(self.lab, self._served(self.lab.services))

    def services_at(self, address: str) -> list[Service]:
        """Services with an address that kube-proxy serves in the family, by name."""
        if address not in self._services_at:
            found = [
                service
                for service in self.lab.services
                if address == service.cluster_ip
                or address in service.other_cluster_ips
                or address in service.external_ips
                or address in service.load_balancer_ips
            ]
            self._services_at[address] = self._served(found)
        return self._services_at[address]

    def services_of_node_port(self, number: int) -> list[Service]:
        """The same for a NodePort."""
        return self._served(
            service
            for service in self.lab.services
            if any(port.node_port == number for port in service.ports)
        )

    def _served(self, services: Iterable[Service]) -> list[Service]:
        served = (
            service
            for service in services
            if service.type != "ExternalName"
            and service.cluster_ip != "None"
            and first_of(self.family, service.cluster_ips) is not None
            and _ANOTHER_PROXYS not in service.labels
        )
        return sorted(served, key=lambda service: service.key)

    def endpoints(self, service: Service, port: ServicePort) -> tuple[Endpoint, ...]:
        """All endpoints of the family, in order, each address and port once.

        Of two with one address and port it is the one that stays, if any.
        """
        key = service.key, port.name, port.protocol
        if key not in self._endpoints:
            found: dict[tuple[str, int], Endpoint] = {}
            for each in self.lab.endpoints_of(service, port):
                end = each.address, each.port
                if self._is_ours(each.address) and (end not in found or found[end].terminating):
                    found[end] = each
            self._endpoints[key] = tuple(found[end] for end in sorted(found))
        return self._endpoints[key]

    def pod_at(self, address: str) -> Pod | None:
        """The pod with an address of its own."""
        return self._pods.get(address)

    def node_at(self, address: str) -> Node | None:
        """The node whose uplink has an address."""
        return next((node for node in self.lab.nodes if address in node.addresses), None)

    @functools.cached_property
    def policies(self) -> Policies:
        """The NetworkPolicies of the lab."""
        return Policies(self.lab)

    @functools.cached_property
    def _attached(self) -> list[Attached]:
        return list(declared_outside.attached(self.lab))

    def link_of(self, place: Place, device: str) -> Attached:
        """How a node, a host or the gateway is on a switch by one of its devices."""
        return next(each for each in self._attached if each[:2] == (place, device))

    def neighbour_on(self, switch: Place, address: str) -> Attached | None:
        """Who on a switch has an address."""
        return next(
            (e for e in self._attached if e.switch == switch and address in e.addresses), None
        )

    def node_of(self, place: Place) -> Node:
        """The node that a place is, or that its pod runs on."""
        assert place.node is not None
        return self.lab.node(place.node)

    def pod_of(self, place: Place) -> Pod:
        """The pod that a place is."""
        return next(pod for pod in self._pods.values() if pod.key == place.name)

    def place_of(self, owner: Node | Pod) -> Place:
        """The namespace of a node or a pod."""
        if isinstance(owner, Node):
            return place_of_node(self.lab, owner)
        return place_of_pod(self.lab, owner)

    def port_of(self, owner: Node | Pod) -> str:
        """The bridge port that leads to a pod on its node, or to a node on the switch."""
        return switch_port(owner) if isinstance(owner, Node) else outer_link(owner)

    def bridge_of(self, place: Place) -> str:
        """The bridge of its node that a pod's or a container's link leads to."""
        home = declared_docker.home_of(self.lab, place) if place.kind == "container" else None
        return home.bridge if home else BRIDGE

    def is_bridge(self, place: Place, device: str) -> bool:
        """Whether a device of a node is a bridge of pods or containers."""
        is_dockers = declared_docker.network_of(self.lab, place.node, device) is not None
        return place.kind == "node" and (device == BRIDGE or is_dockers)

    def bridge_port_of(self, place: Place) -> str:
        """The port of that bridge."""
        if place.kind == "container":
            return declared_docker.port_of(self.lab, place)
        return outer_link(self.pod_of(place))

    def on_bridge(self, node: Place, bridge: str, address: str) -> Place | None:
        """The pod or container on a bridge of a node that has an address."""
        net = declared_docker.network_of(self.lab, node.node, bridge)
        if net:
            return declared_docker.member(self.lab, net, address)
        pod = self.pod_at(address)
        return self.place_of(pod) if pod and pod.node == node.node else None

    def mtu(self, place: Place, device: str) -> int:
        """Bytes of an IP packet that a device takes; pods have one link for both families."""
        if place.kind == "container" or declared_docker.network_of(self.lab, place.node, device):
            return declared_docker.MTU
        underlay = self.lab.underlay.mtu
        if not self._headers or device == SWITCH_BRIDGE:
            return underlay
        if place.kind in ("host", "gateway", "balancer") or (
            place.kind == "node" and device == UPLINK
        ):
            return underlay
        if self.is_tunnel(place, device):
            return underlay - self._headers[self.family.version]
        return underlay - max(self._headers[4 if f == "IPv4" else 6] for f in self.lab.families)

    def is_tunnel(self, place: Place, device: str) -> bool:
        """Whether a device of a node leads to others' pods."""
        if place.kind != "node":
            return False
        return device in tunnels(self.lab, self.node_of(place), self.family.version)

    @property
    def tunnel_kind(self) -> TunnelKind:
        """What packets are carried in."""
        return "ipip" if self.overlay == "ipip" else "vxlan"

    def tunnel_to(self, place: Place, peer: Node) -> str:
        """The device by which a node sends to a peer's pods."""
        return tunnel(self.lab, self.node_of(place), peer, self.family.version)

    def vni(self, place: Place, peer: Node) -> int:
        """The VNI between a node and a peer."""
        return vni(self.lab, self.node_of(place), peer)

    def is_local(self, place: Place, address: str) -> bool:
        """Whether a packet to the address is for the place itself."""
        return (
            is_loopback(address)
            or (place.kind == "node" and address in self.virtual_addresses)
            or any(address == own for _, own in self._own(place))
            or self._is_any_routers(place, address)
        )

    def address_on(self, place: Place, device: str) -> str:
        """The first address of a device: what the place sends from by that device.

        Without one it is the unspecified address.
        """
        own = list(self._own(place))
        found = [address for name, address in own if name == device]
        if not found and self.is_routed and place.kind == "node":
            # Links of pods have none: then it is the node's first, whatever device has it.
            found = [address for _, address in own]
        return found[0] if found else self.family.unspecified

    def local_addresses(self, place: Place) -> list[str]:
        """Every address of a place but loopback's."""
        return [own for _, own in self._own(place)]

    def _own(self, place: Place) -> Iterator[tuple[str, str]]:
        """Devices and their addresses, of the family."""
        if place.kind == "node":
            node = self.node_of(place)
            yield from ((UPLINK, each) for each in node.addresses if self._is_ours(each))
            if not self.is_routed:
                yield from ((BRIDGE, each) for each in node.bridge_addresses if self._is_ours(each))
            for device in tunnels(self.lab, node, self.family.version):
                yield from (
                    (device, each) for each in node.overlay_addresses if self._is_ours(each)
                )
            for net in self.lab.docker_networks:
                if net.node == node.name and self._is_ours(net.gateway):
                    yield net.bridge, net.gateway
        elif place.kind in ("host", "gateway", "balancer"):
            for each in self._attached:
                if each.place == place:
                    yield from ((each.device, own) for own in each.addresses if self._is_ours(own))
        else:
            device = UPLINK if place.kind in ("pod", "container") else SWITCH_BRIDGE
            yield from ((device, each) for each in place.addresses if self._is_ours(each))

    def _is_ours(self, text: str) -> bool:
        return family_of(text) is self.family

    def _is_any_routers(self, place: Place, address: str) -> bool:
        """The first address of an IPv6 network is that of any of its routers (RFC 4291, 2.6.1)."""
        if self.family.version == 4 or place.kind in ("pod", "host"):
            return False
        networks = list(self.lab.underlay.cidrs)
        if place.kind == "gateway" and self.lab.gateway:
            networks += self.lab.gateway.cidrs
        if place.kind == "switch" and self.lab.gateway:
            return False
        if place.kind == "node":
            networks += self.node_of(place).pod_cidrs
        return any(self._is_ours(each) and address == str(_network(each)[0]) for each in networks)

    # --- routes ----------------------------------------------------------------------------------

    def route(self, place: Place, address: str, source: str = "") -> Way | None:
        """The route of the longest prefix; None if there is none.

        Who sends it counts with overlay eni alone: pods have a table of their own there.
        """
        number = _address(address)
        routes = self._routes(place)
        if (
            self.overlay == "eni"
            and place.kind == "node"
            and self._asks_pods_table(place, address, source)
        ):
            gateway = self.lab.underlay.gateway
            alone = Way(f"{gateway}/{self.family.bits}", UPLINK)
            routes = iter((alone, Way(self.family.every_address, UPLINK, gateway)))
        found = [way for way in routes if number in _network(way.matched)]
        return max(found, key=lambda way: _network(way.matched).prefixlen, default=None)

    def _asks_pods_table(self, place: Place, address: str, source: str) -> bool:
        to, by = self._pods.get(address), self._pods.get(source)
        return bool(by and by.node == place.node and not (to and to.node == place.node))

    def _routes(self, place: Place) -> Iterator[Way]:
        if place.kind == "switch":
            yield from (Way(each, SWITCH_BRIDGE) for each in self.lab.underlay.cidrs)
        elif place.kind == "pod":
            yield from self._pod_routes(self.pod_of(place))
        elif place.kind == "container":
            home = declared_docker.home_of(self.lab, place)
            if home and self._is_ours(home.cidr):
                yield Way(home.cidr, UPLINK)
                yield Way(self.family.every_address, UPLINK, home.gateway)
        elif place.kind in ("host", "gateway", "balancer"):
            yield from self._outside_routes(place)
        else:
            yield from self._outside_routes(place)
            yield from self._node_routes(self.node_of(place))
            for net in self.lab.docker_networks:
                if net.node == place.node and self._is_ours(net.cidr):
                    yield Way(net.cidr, net.bridge)

    def _outside_routes(self, place: Place) -> Iterator[Way]:
        yield from (Way(*each) for each in declared_outside.routes(self.lab, place, self.family))

    def _pod_routes(self, pod: Pod) -> Iterator[Way]:
        node = self.lab.node(pod.node)
        if self.is_routed:
            yield Way(f"{_LINK_GATEWAY}/{self.family.bits}", UPLINK)
            yield Way(self.family.every_address, UPLINK, _LINK_GATEWAY)
            return
        for address in pod.addresses:
            if self._is_ours(address):
                yield from (Way(each, UPLINK) for each in node.pod_cidrs if _within(address, each))
                gateway = first_of(self.family, node.bridge_addresses)
                yield Way(self.family.every_address, UPLINK, gateway)

    def _node_routes(self, node: Node) -> Iterator[Way]:
        for network in self.lab.underlay.cidrs:
            if any(_within(each, network) for each in node.addresses):
                yield Way(network, UPLINK)
        for gateway in self.lab.underlay.gateways:
            if self._is_ours(gateway):
                yield Way(self.family.every_address, UPLINK, gateway)
        if self.is_routed:
            yield from self._routed_ways(node)
            return
        yield from (Way(each, BRIDGE) for each in node.pod_cidrs)
        if first_of(self.family, node.pod_cidrs) is None:
            return
        peers = {
            peer.name: (cidr, peer)
            for peer in self.lab.nodes
            if peer is not node and (cidr := first_of(self.family, peer.pod_cidrs))
        }
        yield from (self._to_peer(cidr, node, peer) for cidr, peer in peers.values())
        for address, home in self._strays:
            alone = f"{address}/{self.family.bits}"
            if home is node:
                yield Way(alone, BRIDGE)
            elif home.name in peers:
                yield self._to_peer(alone, node, home)

    @functools.cached_property
    def _strays(self) -> list[tuple[str, Node]]:
        """Addresses of pods that are not of their node's networks, and that node."""
        return [
            (address, home)
            for address, pod in self._pods.items()
            for home in (self.lab.node(pod.node),)
            if self._is_ours(address) and not any(_within(address, cidr) for cidr in home.pod_cidrs)
        ]

    def _routed_ways(self, node: Node) -> Iterator[Way]:
        """Each pod of the node's own; with BGP the blocks of others that have pods in them."""
        for address, pod in self._pods.items():
            if pod.node == node.name:
                yield Way(f"{address}/{self.family.bits}", outer_link(pod))
        if self.overlay != "bgp":
            return
        for block, home in self._blocks.items():
            if home is node:
                yield Way(block, NOWHERE)
            else:
                yield Way(block, UPLINK, first_of(self.family, home.addresses))

    @functools.cached_property
    def _blocks(self) -> dict[str, Node]:
        """What nodes announce with BGP."""
        found: dict[str, Node] = {}
        size = self.lab.overlay.block_size
        strays = dict(self._strays)
        for node in self.lab.nodes:
            of_pods = [
                address
                for address, pod in self._pods.items()
                if pod.node == node.name and address not in strays
            ]
            for address in (node.overlay_address, *of_pods):
                found[str(ip_network(f"{address}/{size}", strict=False))] = node
        for address, home in strays.items():
            found[f"{address}/{self.family.bits}"] = home
        return found

    def pod_behind(self, place: Place, device: str) -> Pod | None:
        """The pod of a node that a link of its own leads to."""
        if not self.is_routed or place.kind != "node":
            return None
        return next(
            (p for p in self._pods.values() if p.node == place.node and outer_link(p) == device),
            None,
        )

    def answerer(self, switch: Place, address: str) -> Attached | None:
        """Who answers on a switch for an address; with eni a node also for its pods'."""
        owner = self.neighbour_on(switch, address)
        pod = self.pod_at(address) if self.overlay == "eni" and switch == self.switch else None
        if owner or pod is None:
            return owner
        return self.link_of(self.place_of(self.lab.node(pod.node)), UPLINK)

    def _to_peer(self, network: str, node: Node, peer: Node) -> Way:
        device = tunnel(self.lab, node, peer, self.family.version)
        if device and self.overlay != "ipip":
            return Way(network, device, first_of(self.family, peer.overlay_addresses))
        return Way(network, device or UPLINK, first_of(self.family, peer.addresses))

    def peer_behind(self, hop: str) -> Node:
        """The node that a tunnel leads to, by the next hop of the route into it."""
        return next(n for n in self.lab.nodes if hop in (*n.overlay_addresses, *n.addresses))


@functools.cache
def _network(text: str) -> IPv4Network | IPv6Network:
    return ip_network(text)


@functools.cache
def _address(text: str) -> IPv4Address | IPv6Address:
    return ip_address(text)


def _within(address: str, network: str) -> bool:
    return _address(address) in _network(network)


def is_loopback(address: str) -> bool:
    """Whether an address never leaves the namespace."""
    return _address(address).is_loopback
