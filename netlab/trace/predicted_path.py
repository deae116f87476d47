"""The walk of a packet through the declared network, there and back, without a kernel.

A walk crosses namespaces as Linux does: a frame comes in by a device, netfilter's first hook may
turn its destination, routing says where it goes, the last hook may put the node in as its source
(:mod:`netlab.trace.predicted_hooks`).

Client ports and those that masquerading chooses are not known: they are null.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from netlab.topology.model import Node
from netlab.trace.declared_network import (
    BRIDGE,
    LOOPBACK,
    NOWHERE,
    SWITCH_BRIDGE,
    UPLINK,
    DeclaredNetwork,
    Way,
)
from netlab.trace.declared_outside import (
    INSIDE,
    NO_HEALTHY_NODE,
    NOT_BALANCED,
    OUTSIDE,
    UNINVITED,
    UNKNOWN_TO_GATEWAY,
    Attached,
    is_balanced,
)
from netlab.trace.family import first_of
from netlab.trace.model import PredictedOuter
from netlab.trace.model_steps import Decapsulate, Encapsulate, Route, Socket, Tuple
from netlab.trace.place import Place
from netlab.trace.predicted_balancer import PredictedBalancer
from netlab.trace.predicted_hooks import Passing, PredictedHooks, Stop
from netlab.trace.predicted_story import PredictedStory, Role

NODE_STOPPED = "node-stopped"


class Arrival(NamedTuple):
    """A packet at a place that has its destination's address."""

    place: Place
    flow: Tuple


class Walker:
    """Walks the legs of one probe; remembers on each node what its connection tracking would.

    `size` is that of the IP packet in bytes, 0 if it is small; `choice` is the endpoint to take
    wherever a Service offers it, `via` the node where a load balancer does.
    """

    def __init__(
        self,
        network: DeclaredNetwork,
        protocol: str,
        size: int,
        choice: Socket | None,
        via: str | None = None,
    ) -> None:
        self.network = network
        self.via = via
        self.protocol = protocol
        self._size = size
        self.story = PredictedStory()
        self.hooks = PredictedHooks(network, protocol, choice, self.story)

    # --- legs ------------------------------------------------------------------------------------

    def send(self, place: Place, flow: Tuple, role: Role) -> Arrival | Stop:
        """Walk one leg from a place's own socket; `story` has its hops."""
        self.story.begin(role)
        if place.kind == "node":
            return self._from_node(place, flow)
        return self._onward(place, flow)

    def _from_node(self, node: Place, flow: Tuple) -> Arrival | Stop:
        passing, flow, stop = self.hooks.first(node, flow, None)
        if stop:
            return stop
        balanced = self.hooks.balanced(node, flow, None, passing)
        if isinstance(balanced, Stop):
            return balanced
        flow, passing, _ = balanced
        way = self._way(node, flow)
        if way is None:
            return Stop(node, "no-route")
        if way.device == NOWHERE:
            return Stop(node, "blackhole")
        refusal = self.hooks.refusal(node, flow, None, "output", passing)
        if refusal:
            return Stop(node, *refusal)
        flow = self.hooks.last(node, flow, way.device, passing)
        if way.device == LOOPBACK:
            self.story.hop(node, LOOPBACK, "out", flow)
            self.story.hop(node, LOOPBACK, "in", flow)
            return self._into_node(node, flow, LOOPBACK, passing)
        return self._leave(node, flow, way)

    def _onward(self, place: Place, flow: Tuple) -> Arrival | Stop:
        """A pod, or the switch, sends without any rules."""
        way = self._way(place, flow)
        if way is None:
            return Stop(place, "no-route")
        if way.device == LOOPBACK:
            self.story.hop(place, LOOPBACK, "out", flow)
            self.story.hop(place, LOOPBACK, "in", flow)
            return Arrival(place, flow)
        return self._leave(place, flow, way)

    def _way(self, place: Place, flow: Tuple) -> Way | None:
        """The routing decision, told as a step unless the packet is for the place itself."""
        address = flow.destination.ip
        if self.network.is_local(place, address):
            return Way(address, LOOPBACK)
        way = self.network.route(place, address, flow.source.ip)
        if way and way.device != NOWHERE:
            self.story.step(
                Route(destination=address, matched=way.matched, device=way.device, via=way.via)
            )
        return way

    def _leave(self, place: Place, flow: Tuple, way: Way) -> Arrival | Stop:
        """A packet goes out of a device to the next hop."""
        if place.node in self.network.lab.stopped:
            return Stop(place, NODE_STOPPED)
        if self.story.role in ("probe", "answer") and self._size > self.network.mtu(
            place, way.device
        ):
            # It may not be fragmented; who wants to send it is told by its own kernel.
            return Stop(place, "mtu", bool(self.story.hops))
        hop = way.via or flow.destination.ip
        if place.kind in ("pod", "container"):
            return self._from_pod(place, flow, hop)
        if self.network.is_bridge(place, way.device):
            end = self.network.on_bridge(place, way.device, hop)
            if end is None:
                return Stop(place, "neighbour-unresolved", True)
            before = self.story.hops[-1] if self.story.hops else None
            turned = before and (before.namespace, before.device) == (place.namespace, way.device)
            sure = not (turned and self._tells_pods(way))
            self.story.hop(place, way.device, "out", flow, sure=sure)
            return self._to_pod(place, flow, end)
        if pod := self.network.pod_behind(place, way.device):
            return self._to_pod(place, flow, self.network.place_of(pod))
        if self.network.is_tunnel(place, way.device):
            return self._through_tunnel(place, flow, way.device, self.network.peer_behind(hop))
        return self._over_underlay(place, flow, hop, way.device)

    # --- links -----------------------------------------------------------------------------------

    def _from_pod(self, place: Place, flow: Tuple, hop: str) -> Arrival | Stop:
        """Out of a link into its node's bridge, addressed to the node or to another of its ports.

        It is a pod's or a container's.
        """
        node = self.network.place_of(self.network.node_of(place))
        if self.network.is_routed and place.kind == "pod":
            return self._from_routed_pod(place, node, flow)
        bridge = self.network.bridge_of(place)
        other = self.network.on_bridge(node, bridge, hop)
        if other is None and not self.network.is_local(node, hop):
            return Stop(place, "neighbour-unresolved", True)
        self.story.hop(place, UPLINK, "out", flow)
        self.story.hop(node, self.network.bridge_port_of(place), "in", flow)
        # Bridge netfilter runs the first hook on the port itself.
        passing, turned, stop = self.hooks.first(node, flow, bridge)
        if stop:
            return stop
        if turned.destination != flow.destination:
            address = turned.destination.ip
            way = self.network.route(node, address)
            other = self.network.on_bridge(node, bridge, address)
            if other is None or way is None or way.device != bridge:
                return self._up_from_bridge(node, turned, bridge, passing)
            passed = self._past_bridge(node, turned, bridge, passing)
            if isinstance(passed, Stop):
                # While the bridge looks for the MAC of whom it was translated to.
                self.story.hop(node, bridge, "out", turned, sure=False)
                return passed
            self.story.hop(node, bridge, "out", passed, sure=False)
            return self._to_pod(node, passed, other)
        if other:
            passed = self._past_bridge(node, turned, bridge, passing)
            return passed if isinstance(passed, Stop) else self._to_pod(node, passed, other)
        return self._up_from_bridge(node, turned, bridge, passing)

    def _from_routed_pod(self, place: Place, node: Place, flow: Tuple) -> Arrival | Stop:
        """Out of a pod's link into its node's routing."""
        port = self.network.port_of(self.network.pod_of(place))
        self.story.hop(place, UPLINK, "out", flow)
        self.story.hop(node, port, "in", flow)
        return self._into(node, flow, port)

    def _is_local(self, place: Place, flow: Tuple) -> bool:
        return self.network.is_local(place, flow.destination.ip)

    def _is_martian(self, place: Place, flow: Tuple) -> bool:
        """Whether IPv4 takes a source for impossible: its own, from outside.  IPv6 does not ask."""
        return self.network.family.version == 4 and self.network.is_local(place, flow.source.ip)

    def _past_bridge(self, node: Place, flow: Tuple, bridge: str, passing: Passing) -> Tuple | Stop:
        """From port to port of a bridge, whose netfilter still meets the node's other hooks."""
        refusal = self.hooks.refusal(node, flow, bridge, "forward", passing, bridge)
        return Stop(node, *refusal) if refusal else self.hooks.last(node, flow, bridge, passing)

    def _up_from_bridge(
        self, node: Place, flow: Tuple, bridge: str, passing: Passing
    ) -> Arrival | Stop:
        way = None if self._is_local(node, flow) else self.network.route(node, flow.destination.ip)
        self.story.hop(node, bridge, "in", flow, sure=not (way and self._tells_pods(way)))
        return self._route(node, flow, bridge, passing)

    def _tells_pods(self, way: Way) -> bool:
        """Whether a pod is told that another is on its own link, after which it sends there.

        It heeds such a redirect over IPv6 alone (RFC 4861, 8).
        """
        return way.device == BRIDGE and self.network.family.version == 6

    def _to_pod(self, node: Place, flow: Tuple, place: Place) -> Arrival | Stop:
        self.story.hop(node, self.network.bridge_port_of(place), "out", flow)
        self.story.hop(place, UPLINK, "in", flow)
        return Stop(place, "martian") if self._is_martian(place, flow) else Arrival(place, flow)

    def _through_tunnel(self, node: Place, flow: Tuple, tunnel: str, peer: Node) -> Arrival | Stop:
        family, there = self.network.family, self.network.place_of(peer)
        vni, kind = self.network.vni(node, peer), self.network.tunnel_kind
        local = self.network.address_on(node, UPLINK)
        remote = first_of(family, peer.addresses)
        assert remote is not None
        self.story.hop(node, tunnel, "out", flow)
        self.story.step(
            Encapsulate(device=tunnel, vni=vni, local=local, remote=remote, tunnel=kind)
        )
        self._way(node, Tuple(source=Socket(ip=local), destination=Socket(ip=remote)))
        carried = PredictedOuter(src=local, dst=remote, vni=vni, tunnel=kind)
        end, near = self.network.link_of(there, UPLINK), self.network.link_of(node, UPLINK)
        if there.name in self.network.lab.stopped:
            return self._into_the_void(node, flow, carried, near)
        self._across(node, end, flow, carried, near)
        far = self.network.tunnel_to(there, self.network.node_of(node))
        self.story.step(Decapsulate(device=far, vni=vni, local=remote, remote=local, tunnel=kind))
        self.story.hop(there, far, "in", flow)
        return self._into(there, flow, far)

    def _into_the_void(
        self, place: Place, flow: Tuple, outer: PredictedOuter | None, link: Attached | None
    ) -> Stop:
        """To a node whose machine is off: as far as the switch, while its MAC is known."""
        if link:
            self.story.hop(place, link.device, "out", flow, outer, sure=False)
            self.story.hop(link.switch, link.port, "in", flow, outer, sure=False)
        return Stop(place, NODE_STOPPED)

    def _over_underlay(self, place: Place, flow: Tuple, hop: str, device: str) -> Arrival | Stop:
        """From a node, a host, the gateway or the switch to who has the next hop's address."""
        link = None if place.kind == "switch" else self.network.link_of(place, device)
        switch = link.switch if link else self.network.switch
        owner = self.network.answerer(switch, hop)
        if owner and owner.place.kind == "node" and owner.place.name in self.network.lab.stopped:
            return self._into_the_void(place, flow, None, link)
        if owner and owner.place != place:
            self._across(place, owner, flow, None, link)
            return self._arrived(owner.place, flow, owner.device)
        if link is None or hop not in switch.addresses:
            return Stop(place, "neighbour-unresolved", True)
        self.story.hop(place, device, "out", flow)
        self.story.hop(switch, link.port, "in", flow)
        self.story.hop(switch, SWITCH_BRIDGE, "in", flow)
        if self._is_local(switch, flow):
            return Arrival(switch, flow)
        if self.network.route(switch, flow.destination.ip) is None:
            return Stop(switch, "no-route", True)
        return self._onward(switch, flow)

    def _arrived(self, there: Place, flow: Tuple, device: str) -> Arrival | Stop:
        """A packet at the end of the underlay, or of the internet."""
        if there.kind == "node":
            return self._into(there, flow, device)
        if there.kind == "gateway":
            return self._through_gateway(there, flow, device)
        if there.kind == "balancer":
            return self._through_balancer(there, flow)
        if self._is_martian(there, flow):
            return Stop(there, "martian")
        return Arrival(there, flow) if self._is_local(there, flow) else Stop(there, "not-mine")

    def _across(
        self,
        place: Place,
        there: Attached,
        flow: Tuple,
        outer: PredictedOuter | None,
        link: Attached | None,
    ) -> None:
        """From one end of a switch, or from the switch itself, to another."""
        if link is None:
            self.story.hop(there.switch, SWITCH_BRIDGE, "out", flow)
        else:
            self.story.hop(place, link.device, "out", flow, outer)
            self.story.hop(link.switch, link.port, "in", flow, outer)
        self.story.hop(there.switch, there.port, "out", flow, outer)
        self.story.hop(there.place, there.device, "in", flow, outer)

    # --- the gateway -----------------------------------------------------------------------------

    def _through_gateway(self, gateway: Place, flow: Tuple, device: str) -> Arrival | Stop:
        """Out with the gateway's own address for a node's; back in only what was asked for."""
        if self._is_martian(gateway, flow):
            return Stop(gateway, "martian")
        inside = self.hooks.back_by_gateway(gateway, flow)
        if inside:
            way = self._way(gateway, inside)
            assert way is not None
            return self._leave(gateway, inside, way)
        if self._is_local(gateway, flow):
            return Arrival(gateway, flow)
        way = self._way(gateway, flow)
        if way is None:
            return Stop(gateway, "no-route", True)
        ways = (device, way.device)
        if ways == (OUTSIDE, INSIDE) and not is_balanced(self.network.lab, flow.destination.ip):
            return Stop(gateway, UNINVITED)
        if ways == (INSIDE, OUTSIDE) and is_balanced(self.network.lab, flow.source.ip):
            return self._leave(gateway, flow, way)
        if ways != (INSIDE, OUTSIDE):
            return self._leave(gateway, flow, way)
        if self.network.node_at(flow.source.ip) is None:
            return Stop(gateway, UNKNOWN_TO_GATEWAY)
        return self._leave(gateway, self.hooks.out_by_gateway(gateway, flow), way)

    # --- a load balancer -------------------------------------------------------------------------

    def _through_balancer(self, place: Place, flow: Tuple) -> Arrival | Stop:
        """To a node that it finds healthy; back what it translated itself."""
        if self._is_martian(place, flow):
            return Stop(place, "martian")
        back = self.hooks.back_by_balancer(place, flow)
        if back:
            way = self._way(place, back)
            return self._leave(place, back, way) if way else Stop(place, "no-route", True)
        box = PredictedBalancer(self.network, place)
        if self._is_local(place, flow):
            return Arrival(place, flow)
        asked = box.asked(flow.destination, self.protocol)
        if asked and not box.admits(asked, flow.source.ip):
            return Stop(place, "dropped-by-rule")
        node = self.hooks.node_chosen(box, asked, flow, self.via) if asked else None
        if asked and node:
            turned = self.hooks.out_by_balancer(place, box, asked, flow, node)
            if box.translates:
                way = self._way(place, turned)
                assert way is not None
                return self._leave(place, turned, way)
            via = first_of(self.network.family, node.addresses)
            way = Way(self.network.family.every_address, UPLINK, via)
            self.story.step(
                Route(
                    destination=flow.destination.ip,
                    matched=way.matched,
                    device=way.device,
                    via=way.via,
                )
            )
            return self._leave(place, turned, way)
        if box.has(flow.destination.ip):
            return Stop(place, NO_HEALTHY_NODE if asked else NOT_BALANCED, True)
        way = self._way(place, flow)
        return self._leave(place, flow, way) if way else Stop(place, "no-route", True)

    # --- a node ----------------------------------------------------------------------------------

    def _into(self, node: Place, flow: Tuple, device: str) -> Arrival | Stop:
        passing, flow, stop = self.hooks.first(node, flow, device)
        return stop or self._route(node, flow, device, passing)

    def _route(self, node: Place, flow: Tuple, device: str, passing: Passing) -> Arrival | Stop:
        if self._is_martian(node, flow):
            return Stop(node, "martian")
        if self._is_local(node, flow):
            return self._into_node(node, flow, device, passing)
        way = self._way(node, flow)
        if way is None:
            return Stop(node, "no-route", True)
        if way.device == NOWHERE:
            return Stop(node, "blackhole")
        refusal = self.hooks.refusal(node, flow, device, "forward", passing, way.device)
        if refusal:
            return Stop(node, *refusal)
        return self._leave(node, self.hooks.last(node, flow, way.device, passing), way)

    def _into_node(self, node: Place, flow: Tuple, device: str, passing: Passing) -> Arrival | Stop:
        balanced = self.hooks.balanced(node, flow, device, passing)
        if isinstance(balanced, Stop):
            return balanced
        flow, passing, is_sent_on = balanced
        if is_sent_on:
            way = self._way(node, flow)
            if way is None:
                return Stop(node, "no-route", True)
            return self._leave(node, self.hooks.last(node, flow, way.device, passing), way)
        refusal = self.hooks.refusal(node, flow, device, "input", passing)
        if refusal:
            return Stop(node, *refusal)
        if passing.is_reply and passing.connection:
            flow = msgspec.structs.replace(flow, source=passing.connection.original.destination)
        return Arrival(node, flow)
