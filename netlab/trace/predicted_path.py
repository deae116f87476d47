"""The walk of a packet through the declared network, there and back, without a kernel.

A walk crosses namespaces as Linux does: a frame comes in by a device, netfilter's first hook may
turn its destination, routing says where it goes, the last hook may put the node in as its source.
Each node remembers the connections that it saw begin, which is what brings an answer back.

Client ports and those that masquerading chooses are not known: they are null.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import msgspec

from netlab.topology.model import Endpoint, Node, Pod
from netlab.trace.aim import Place
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
    OUTSIDE,
    UNINVITED,
    UNKNOWN_TO_GATEWAY,
    Attached,
    masquerades,
)
from netlab.trace.family import first_of
from netlab.trace.model import PredictedHop, PredictedOuter, Translation
from netlab.trace.model_steps import AnyStep, Decapsulate, Encapsulate, Nat, Route, Socket, Tuple
from netlab.trace.predicted_balancing import BalancingProxy
from netlab.trace.predicted_services import Hook, Packet, Proxy, Refusal
from netlab.trace.predicted_services import Translation as Offer

Role = Literal["probe", "answer", "reset", "error"]


class Stop(NamedTuple):
    """Where a packet ends on its way: a reason; whether an ICMP error tells its sender."""

    place: Place
    reason: str
    answered: bool = False


class Arrival(NamedTuple):
    """A packet at a place that has its destination's address."""

    place: Place
    flow: Tuple


class Connection(msgspec.Struct):
    """A connection that a node saw begin; `reply` is what its answers are expected to have."""

    original: Tuple
    reply: Tuple


class _Passing(NamedTuple):
    """A packet between a node's first hook and its last."""

    connection: Connection | None
    is_reply: bool
    is_new: bool
    masquerade: bool = False


class Walker:
    """Walks the legs of one probe; remembers on each node what its connection tracking would.

    `size` is that of the IP packet in bytes, 0 if it is small; `choice` is the endpoint to take
    wherever a Service offers it.
    """

    def __init__(
        self, network: DeclaredNetwork, protocol: str, size: int, choice: Socket | None
    ) -> None:
        self.network = network
        self.protocol = protocol
        self._size = size
        self.offered: list[tuple[str, tuple[Endpoint, ...]]] = []  # service, endpoints
        self.translations: list[Translation] = []
        self.hops: list[PredictedHop] = []
        self._choice = choice
        self._known: dict[Place, list[Connection]] = {}
        self._pending: list[AnyStep] = []
        self._role: Role = "probe"

    # --- legs ------------------------------------------------------------------------------------

    def send(self, place: Place, flow: Tuple, role: Role) -> Arrival | Stop:
        """Walk one leg from a place's own socket; `hops` are its hops."""
        self.hops, self._pending, self._role = [], [], role
        if place.kind == "node":
            return self._from_node(place, flow)
        return self._onward(place, flow)

    def _from_node(self, node: Place, flow: Tuple) -> Arrival | Stop:
        passing, flow, stop = self._first_hook(node, flow, None)
        if stop:
            return stop
        balanced = self._balanced(node, flow, None, passing)
        if isinstance(balanced, Stop):
            return balanced
        flow, passing, _ = balanced
        way = self._way(node, flow)
        if way is None:
            return Stop(node, "no-route")
        if way.device == NOWHERE:
            return Stop(node, "blackhole")
        refusal = self._refusal(node, flow, None, "output", passing)
        if refusal:
            return Stop(node, *refusal)
        flow = self._last_hook(node, flow, way.device, passing)
        if way.device == LOOPBACK:
            self._hop(node, LOOPBACK, "out", flow)
            self._hop(node, LOOPBACK, "in", flow)
            return self._into_node(node, flow, LOOPBACK, passing)
        return self._leave(node, flow, way)

    def _onward(self, place: Place, flow: Tuple) -> Arrival | Stop:
        """A pod, or the switch, sends without any rules."""
        way = self._way(place, flow)
        if way is None:
            return Stop(place, "no-route")
        if way.device == LOOPBACK:
            self._hop(place, LOOPBACK, "out", flow)
            self._hop(place, LOOPBACK, "in", flow)
            return Arrival(place, flow)
        return self._leave(place, flow, way)

    def _way(self, place: Place, flow: Tuple) -> Way | None:
        """The routing decision, told as a step unless the packet is for the place itself."""
        address = flow.destination.ip
        if self.network.is_local(place, address):
            return Way(address, LOOPBACK)
        way = self.network.route(place, address, flow.source.ip)
        if way and way.device != NOWHERE:
            self._pending.append(
                Route(destination=address, matched=way.matched, device=way.device, via=way.via)
            )
        return way

    def _leave(self, place: Place, flow: Tuple, way: Way) -> Arrival | Stop:
        """A packet goes out of a device to the next hop."""
        if self._role in ("probe", "answer") and self._size > self.network.mtu(place, way.device):
            # It may not be fragmented; who wants to send it is told by its own kernel.
            return Stop(place, "mtu", bool(self.hops))
        hop = way.via or flow.destination.ip
        if place.kind == "pod":
            return self._from_pod(place, flow, hop)
        if way.device == BRIDGE:
            pod = self._pod_on(place, hop)
            if pod is None:
                return Stop(place, "neighbour-unresolved", True)
            before = self.hops[-1] if self.hops else None
            turned = before and (before.namespace, before.device) == (place.namespace, BRIDGE)
            self._hop(place, BRIDGE, "out", flow, sure=not (turned and self._tells_pods(way)))
            return self._to_pod(place, flow, pod)
        if pod := self.network.pod_behind(place, way.device):
            return self._to_pod(place, flow, pod)
        if self.network.is_tunnel(place, way.device):
            return self._through_tunnel(place, flow, way.device, self.network.peer_behind(hop))
        return self._over_underlay(place, flow, hop, way.device)

    # --- links -----------------------------------------------------------------------------------

    def _pod_on(self, node: Place, address: str) -> Pod | None:
        pod = self.network.pod_at(address)
        return pod if pod and pod.node == node.node else None

    def _from_pod(self, place: Place, flow: Tuple, hop: str) -> Arrival | Stop:
        """Out of a pod's link into its node's bridge, addressed to the node or to another pod."""
        node = self.network.place_of(self.network.node_of(place))
        if self.network.is_routed:
            return self._from_routed_pod(place, node, flow)
        other = self._pod_on(node, hop)
        if other is None and not self.network.is_local(node, hop):
            return Stop(place, "neighbour-unresolved", True)
        port = self.network.port_of(self.network.pod_of(place))
        self._hop(place, UPLINK, "out", flow)
        self._hop(node, port, "in", flow)
        # Bridge netfilter runs the first hook on the port itself.
        passing, turned, stop = self._first_hook(node, flow, BRIDGE)
        if stop:
            return stop
        if turned.destination != flow.destination:
            address = turned.destination.ip
            way = self.network.route(node, address)
            other = self._pod_on(node, address)
            if other is None or way is None or way.device != BRIDGE:
                return self._up_from_bridge(node, turned, passing)
            passed = self._past_bridge(node, turned, passing)
            if isinstance(passed, Stop):
                # While the bridge looks for the MAC of whom it was translated to.
                self._hop(node, BRIDGE, "out", turned, sure=False)
                return passed
            self._hop(node, BRIDGE, "out", passed, sure=False)
            return self._to_pod(node, passed, other)
        if other:
            passed = self._past_bridge(node, turned, passing)
            return passed if isinstance(passed, Stop) else self._to_pod(node, passed, other)
        return self._up_from_bridge(node, turned, passing)

    def _from_routed_pod(self, place: Place, node: Place, flow: Tuple) -> Arrival | Stop:
        """Out of a pod's link into its node's routing."""
        port = self.network.port_of(self.network.pod_of(place))
        self._hop(place, UPLINK, "out", flow)
        self._hop(node, port, "in", flow)
        return self._into(node, flow, port)

    def _is_local(self, place: Place, flow: Tuple) -> bool:
        return self.network.is_local(place, flow.destination.ip)

    def _is_martian(self, place: Place, flow: Tuple) -> bool:
        """Whether IPv4 takes a source for impossible: its own, from outside.  IPv6 does not ask."""
        return self.network.family.version == 4 and self.network.is_local(place, flow.source.ip)

    def _past_bridge(self, node: Place, flow: Tuple, passing: _Passing) -> Tuple | Stop:
        """From port to port of a bridge, whose netfilter still meets the node's other hooks."""
        refusal = self._refusal(node, flow, BRIDGE, "forward", passing)
        return Stop(node, *refusal) if refusal else self._last_hook(node, flow, BRIDGE, passing)

    def _up_from_bridge(self, node: Place, flow: Tuple, passing: _Passing) -> Arrival | Stop:
        way = None if self._is_local(node, flow) else self.network.route(node, flow.destination.ip)
        self._hop(node, BRIDGE, "in", flow, sure=not (way and self._tells_pods(way)))
        return self._route(node, flow, BRIDGE, passing)

    def _tells_pods(self, way: Way) -> bool:
        """Whether a pod is told that another is on its own link, after which it sends there.

        It heeds such a redirect over IPv6 alone (RFC 4861, 8).
        """
        return way.device == BRIDGE and self.network.family.version == 6

    def _to_pod(self, node: Place, flow: Tuple, pod: Pod) -> Arrival | Stop:
        self._hop(node, self.network.port_of(pod), "out", flow)
        place = self.network.place_of(pod)
        self._hop(place, UPLINK, "in", flow)
        return Stop(place, "martian") if self._is_martian(place, flow) else Arrival(place, flow)

    def _through_tunnel(self, node: Place, flow: Tuple, tunnel: str, peer: Node) -> Arrival | Stop:
        family, there = self.network.family, self.network.place_of(peer)
        vni, kind = self.network.vni(node, peer), self.network.tunnel_kind
        local = self.network.address_on(node, UPLINK)
        remote = first_of(family, peer.addresses)
        assert remote is not None
        self._hop(node, tunnel, "out", flow)
        self._pending.append(
            Encapsulate(device=tunnel, vni=vni, local=local, remote=remote, tunnel=kind)
        )
        self._way(node, Tuple(source=Socket(ip=local), destination=Socket(ip=remote)))
        carried = PredictedOuter(src=local, dst=remote, vni=vni, tunnel=kind)
        end, near = self.network.link_of(there, UPLINK), self.network.link_of(node, UPLINK)
        self._across(node, end, flow, carried, near)
        far = self.network.tunnel_to(there, self.network.node_of(node))
        self._pending.append(
            Decapsulate(device=far, vni=vni, local=remote, remote=local, tunnel=kind)
        )
        self._hop(there, far, "in", flow)
        return self._into(there, flow, far)

    def _over_underlay(self, place: Place, flow: Tuple, hop: str, device: str) -> Arrival | Stop:
        """From a node, a host, the gateway or the switch to who has the next hop's address."""
        link = None if place.kind == "switch" else self.network.link_of(place, device)
        switch = link.switch if link else self.network.switch
        owner = self.network.answerer(switch, hop)
        if owner and owner.place != place:
            self._across(place, owner, flow, None, link)
            return self._arrived(owner.place, flow, owner.device)
        if link is None or hop not in switch.addresses:
            return Stop(place, "neighbour-unresolved", True)
        self._hop(place, device, "out", flow)
        self._hop(switch, link.port, "in", flow)
        self._hop(switch, SWITCH_BRIDGE, "in", flow)
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
            self._hop(there.switch, SWITCH_BRIDGE, "out", flow)
        else:
            self._hop(place, link.device, "out", flow, outer)
            self._hop(link.switch, link.port, "in", flow, outer)
        self._hop(there.switch, there.port, "out", flow, outer)
        self._hop(there.place, there.device, "in", flow, outer)

    # --- the gateway -----------------------------------------------------------------------------

    def _through_gateway(self, gateway: Place, flow: Tuple, device: str) -> Arrival | Stop:
        """Out with the gateway's own address for a node's; back in only what was asked for."""
        if self._is_martian(gateway, flow):
            return Stop(gateway, "martian")
        for known in self._known.get(gateway, ()):
            if known.reply == flow and self._role != "probe":
                if flow.destination != known.original.source:
                    self._undone("snat", flow.destination, known.original.source)
                flow = msgspec.structs.replace(flow, destination=known.original.source)
                way = self._way(gateway, flow)
                assert way is not None
                return self._leave(gateway, flow, way)
        if self._is_local(gateway, flow):
            return Arrival(gateway, flow)
        way = self._way(gateway, flow)
        if way is None:
            return Stop(gateway, "no-route", True)
        if device == OUTSIDE and way.device == INSIDE:
            return Stop(gateway, UNINVITED)
        if (device, way.device) != (INSIDE, OUTSIDE):
            return self._leave(gateway, flow, way)
        if self.network.node_at(flow.source.ip) is None:
            return Stop(gateway, UNKNOWN_TO_GATEWAY)
        own = Socket(ip=self.network.address_on(gateway, OUTSIDE))
        self._translated("snat", gateway, flow.source, own)
        turned = msgspec.structs.replace(flow, source=own)
        self._known.setdefault(gateway, []).append(Connection(flow, turned.reversed))
        return self._leave(gateway, turned, way)

    # --- a node ----------------------------------------------------------------------------------

    def _into(self, node: Place, flow: Tuple, device: str) -> Arrival | Stop:
        passing, flow, stop = self._first_hook(node, flow, device)
        return stop or self._route(node, flow, device, passing)

    def _route(self, node: Place, flow: Tuple, device: str, passing: _Passing) -> Arrival | Stop:
        if self._is_martian(node, flow):
            return Stop(node, "martian")
        if self._is_local(node, flow):
            return self._into_node(node, flow, device, passing)
        way = self._way(node, flow)
        if way is None:
            return Stop(node, "no-route", True)
        if way.device == NOWHERE:
            return Stop(node, "blackhole")
        refusal = self._refusal(node, flow, device, "forward", passing)
        if refusal:
            return Stop(node, *refusal)
        return self._leave(node, self._last_hook(node, flow, way.device, passing), way)

    def _into_node(
        self, node: Place, flow: Tuple, device: str, passing: _Passing
    ) -> Arrival | Stop:
        balanced = self._balanced(node, flow, device, passing)
        if isinstance(balanced, Stop):
            return balanced
        flow, passing, is_sent_on = balanced
        if is_sent_on:
            way = self._way(node, flow)
            if way is None:
                return Stop(node, "no-route", True)
            return self._leave(node, self._last_hook(node, flow, way.device, passing), way)
        refusal = self._refusal(node, flow, device, "input", passing)
        if refusal:
            return Stop(node, *refusal)
        if passing.is_reply and passing.connection:
            flow = msgspec.structs.replace(flow, source=passing.connection.original.destination)
        return Arrival(node, flow)

    def _first_hook(
        self, node: Place, flow: Tuple, device: str | None
    ) -> tuple[_Passing, Tuple, Stop | None]:
        """Connection tracking and the choice of an endpoint, where a packet enters a node."""
        for known in self._known.get(node, ()):
            if known.original == flow and self._role == "probe":
                return _Passing(known, False, False), flow, None
            if known.reply == flow and self._role != "probe":
                if flow.destination != known.original.source:
                    client = known.original.source
                    self._undone("masquerade", flow.destination, client)
                    flow = msgspec.structs.replace(flow, destination=client)
                return _Passing(known, True, False), flow, None
        if self._role != "probe":
            return _Passing(None, True, False), flow, None
        connection = Connection(flow, flow.reversed)
        self._known.setdefault(node, []).append(connection)
        proxy, packet = self._proxy(node), self._packet(flow, device)
        refusal = proxy.before(packet)
        passing = _Passing(connection, False, True)
        if refusal:
            return passing, flow, Stop(node, *refusal)
        found = proxy.translate(packet)
        if found is None:
            return passing, flow, None
        turned, masquerade = self._chosen(node, flow, found, connection)
        return _Passing(connection, False, True, masquerade), turned, None

    def _chosen(
        self, node: Place, flow: Tuple, found: Offer, connection: Connection
    ) -> tuple[Tuple, bool]:
        """A packet sent to one of the endpoints that are offered; whether it is masqueraded."""
        self.offered.append((found.service, found.endpoints))
        wanted = (self._choice.ip, self._choice.port) if self._choice else None
        chosen = next(
            (each for each in found.endpoints if (each.address, each.port) == wanted),
            found.endpoints[0],
        )
        to = Socket(ip=chosen.address, port=chosen.port)
        self._translated(self._proxy(node).kind, node, flow.destination, to)
        turned = msgspec.structs.replace(flow, destination=to)
        connection.reply = turned.reversed
        return turned, found.masquerades(flow.source.ip, chosen)

    def _balanced(
        self, node: Place, flow: Tuple, device: str | None, passing: _Passing
    ) -> tuple[Tuple, _Passing, bool] | Stop:
        """What a virtual server makes of a packet for the node, and whether one did.

        `device` is null for what the node sends itself.
        """
        connection = passing.connection
        sent_on = connection is not None and connection.reply.source != flow.destination
        if connection is None or passing.is_reply or not passing.is_new or sent_on:
            return flow, passing, False
        found = self._proxy(node).balance(self._packet(flow, device), own=device is None)
        if found is None:
            return flow, passing, False
        if isinstance(found, Refusal):
            return Stop(node, *found)
        turned, masquerade = self._chosen(node, flow, found, connection)
        return turned, passing._replace(masquerade=masquerade), True

    def _last_hook(self, node: Place, flow: Tuple, device: str, passing: _Passing) -> Tuple:
        """Masquerading, or the undoing of the first hook's work, where a packet leaves a node."""
        connection = passing.connection
        if connection is None:
            return flow
        if passing.is_reply:
            if flow.source != connection.original.destination:
                kind = self._proxy(node).kind
                self._undone(kind, flow.source, connection.original.destination)
            return msgspec.structs.replace(flow, source=connection.original.destination)
        if not passing.masquerade and not self._leaves_cluster(flow, passing):
            return flow
        name = UPLINK if device == LOOPBACK else device
        source = Socket(ip=self.network.address_on(node, name))
        self._translated("masquerade", node, flow.source, source)
        connection.reply = msgspec.structs.replace(connection.reply, destination=source)
        return msgspec.structs.replace(flow, source=source)

    def _leaves_cluster(self, flow: Tuple, passing: _Passing) -> bool:
        """Whether the node translates a new connection to beyond the cluster."""
        return passing.is_new and masquerades(self.network.lab, flow.source.ip, flow.destination.ip)

    def _refusal(
        self, node: Place, flow: Tuple, device: str | None, hook: Hook, passing: _Passing
    ) -> Refusal | None:
        proxy = self._proxy(node)
        if passing.connection is None:
            # A SYN-ACK of a connection that was not seen to begin.
            invalid = self._role in ("answer", "reset") and self.protocol == "tcp"
            if invalid and hook == "forward" and proxy.drops_invalid:
                return Refusal("conntrack-invalid", False)
            return None
        untranslated = passing.connection.reply.source == passing.connection.original.destination
        if passing.is_new and untranslated:
            refusal = proxy.after(self._packet(flow, device), hook)
            if refusal:
                return refusal
        if passing.is_new and hook == "forward":
            return self._policy(node, flow)
        return None

    def _policy(self, node: Place, flow: Tuple) -> Refusal | None:
        reason = self.network.policies.refuses(
            node.name,
            self.protocol.upper(),
            flow.source.ip,
            flow.destination.ip,
            flow.destination.port,
        )
        return Refusal(reason, False) if reason else None

    def _proxy(self, node: Place) -> Proxy:
        balances = self.network.lab.service_proxy.mode == "ipvs"
        proxy = BalancingProxy if balances else Proxy
        return proxy(self.network, self.network.node_of(node))

    def _packet(self, flow: Tuple, device: str | None) -> Packet:
        return Packet(self.protocol.upper(), flow.source.ip, flow.destination, device)

    # --- what is told ----------------------------------------------------------------------------

    def _hop(
        self,
        place: Place,
        device: str,
        direction: Literal["in", "out"],
        flow: Tuple,
        outer: PredictedOuter | None = None,
        sure: bool = True,
    ) -> None:
        first = not self.hops
        if not first:
            self.hops[-1] = msgspec.structs.replace(
                self.hops[-1], steps=[*self.hops[-1].steps, *self._pending]
            )
        source, destination = flow.source, flow.destination
        if self._role == "error":
            # Whose address it bears is the kernel's choice among a node's own; ICMP has no ports.
            source, destination = Socket(ip=""), Socket(ip=destination.ip)
        self.hops.append(
            PredictedHop(
                node=place.node,
                namespace=place.namespace,
                device=device,
                direction=direction,
                source=source,
                destination=destination,
                outer=outer,
                sure=sure,
                steps=[*self._pending] if first else [],
            )
        )
        self._pending = []

    def end(self, step: AnyStep) -> list[PredictedHop]:
        """The hops of the leg, the last of which ends with `step`."""
        if self.hops:
            last = self.hops[-1]
            self.hops[-1] = msgspec.structs.replace(last, steps=[*last.steps, *self._pending, step])
        return self.hops

    @staticmethod
    def relabelled(hops: list[PredictedHop], step: AnyStep) -> list[PredictedHop]:
        """The hops of an ended leg with another end."""
        if not hops:
            return []
        last = msgspec.structs.replace(hops[-1], steps=[*hops[-1].steps[:-1], step])
        return [*hops[:-1], last]

    def _translated(
        self,
        kind: Literal["dnat", "ipvs", "snat", "masquerade"],
        node: Place,
        before: Socket,
        after: Socket,
    ) -> None:
        self.translations.append(
            Translation(kind=kind, node=node.node, before=before, after=after, rule=None)
        )
        self._pending.append(Nat(translation=kind, reverse=False, before=before, after=after))

    def _undone(
        self, kind: Literal["dnat", "ipvs", "snat", "masquerade"], before: Socket, after: Socket
    ) -> None:
        self._pending.append(Nat(translation=kind, reverse=True, before=before, after=after))
