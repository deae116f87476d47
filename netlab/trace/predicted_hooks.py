"""What netfilter makes of a predicted packet on the nodes and at the gateway that it passes.

Each node's first hook may turn a packet's destination, the last one may put the node in as its
source; a virtual server does so where the packet is for the node.  Each remembers the connections
that it saw begin, which is what brings an answer back.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import msgspec

from netlab.topology.model import Endpoint, Node
from netlab.trace import declared_docker, predicted_host_ports
from netlab.trace.declared_network import LOOPBACK, UPLINK, DeclaredNetwork
from netlab.trace.declared_outside import OUTSIDE, masquerades
from netlab.trace.model_steps import Socket, Tuple
from netlab.trace.place import Place
from netlab.trace.predicted_balancer import Asked, PredictedBalancer
from netlab.trace.predicted_balancing import BalancingProxy
from netlab.trace.predicted_redirection import RedirectingProxy
from netlab.trace.predicted_services import Hook, Packet, Proxy, Refusal
from netlab.trace.predicted_services import Translation as Offer
from netlab.trace.predicted_story import PredictedStory


class Stop(NamedTuple):
    """Where a packet ends on its way: a reason; whether an ICMP error tells its sender."""

    place: Place
    reason: str
    answered: bool = False


class Connection(msgspec.Struct):
    """A connection that a node saw begin; `reply` is what its answers are expected to have."""

    original: Tuple
    reply: Tuple
    kind: Literal["dnat", "ipvs"] = "dnat"  # of what turned its destination


class Passing(NamedTuple):
    """A packet between a node's first hook and its last."""

    connection: Connection | None
    is_reply: bool
    is_new: bool
    masquerade: bool = False


class PredictedHooks:
    """Netfilter of all nodes, for one probe.

    `choice` is the endpoint to take wherever a Service offers it; `offered` is what Services did.
    """

    def __init__(
        self, network: DeclaredNetwork, protocol: str, choice: Socket | None, story: PredictedStory
    ) -> None:
        self.offered: list[tuple[str, tuple[Endpoint, ...]]] = []  # service, endpoints
        self._network = network
        self._protocol = protocol
        self._choice = choice
        self._story = story
        self._known: dict[Place, list[Connection]] = {}

    def first(
        self, node: Place, flow: Tuple, device: str | None
    ) -> tuple[Passing, Tuple, Stop | None]:
        """Connection tracking and the choice of an endpoint, where a packet enters a node."""
        for known in self._known.get(node, ()):
            if known.original == flow and self._story.role == "probe":
                return Passing(known, False, False), flow, None
            if known.reply == flow and self._story.role != "probe":
                if flow.destination != known.original.source:
                    client = known.original.source
                    self._story.undone("masquerade", flow.destination, client)
                    flow = msgspec.structs.replace(flow, destination=client)
                return Passing(known, True, False), flow, None
        if self._story.role != "probe":
            return Passing(None, True, False), flow, None
        connection = Connection(flow, flow.reversed)
        self._known.setdefault(node, []).append(connection)
        proxy, packet = self._proxy(node), self._packet(flow, device)
        refusal = proxy.before(packet)
        passing = Passing(connection, False, True)
        if refusal:
            return passing, flow, Stop(node, *refusal)
        found = proxy.translate(packet)
        connection.kind = proxy.kind
        if found is None:
            found = self._of_node_ports(node, packet)
            connection.kind = "dnat" if found else proxy.kind
        if found is None:
            return passing, flow, None
        turned, masquerade = self._chosen(node, flow, found, connection)
        return Passing(connection, False, True, masquerade), turned, None

    def _of_node_ports(self, node: Place, packet: Packet) -> Offer | None:
        """What Docker publishes on the node, and pods' ports there."""
        if not self._network.is_local(node, packet.destination.ip):
            return None
        of_node = self._network.node_of(node)
        return declared_docker.translate(
            self._network.lab, of_node, packet
        ) or predicted_host_ports.translate(self._network, of_node, packet)

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
        to = Socket(ip=chosen.address, port=chosen.port or self._any_port(chosen.address))
        self._story.translated(connection.kind, node, flow.destination, to)
        turned = msgspec.structs.replace(flow, destination=to)
        connection.reply = turned.reversed
        return turned, found.masquerades(flow.source.ip, chosen)

    def _any_port(self, address: str) -> int | None:
        """The port of a node's proxy, if it is known which one was taken."""
        return self._choice.port if self._choice and self._choice.ip == address else None

    def balanced(
        self, node: Place, flow: Tuple, device: str | None, passing: Passing
    ) -> tuple[Tuple, Passing, bool] | Stop:
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

    def last(self, node: Place, flow: Tuple, device: str, passing: Passing) -> Tuple:
        """Masquerading, or the undoing of the first hook's work, where a packet leaves a node."""
        connection = passing.connection
        if connection is None:
            return flow
        if passing.is_reply:
            if flow.source != connection.original.destination:
                self._story.undone(connection.kind, flow.source, connection.original.destination)
            return msgspec.structs.replace(flow, source=connection.original.destination)
        dockers = passing.is_new and declared_docker.masquerades(
            self._network.lab, node.node, flow.source.ip, device
        )
        if not (passing.masquerade or dockers or self._leaves_cluster(flow, passing)):
            return flow
        name = UPLINK if device == LOOPBACK else device
        source = Socket(ip=self._network.address_on(node, name))
        self._story.translated("masquerade", node, flow.source, source)
        connection.reply = msgspec.structs.replace(connection.reply, destination=source)
        return msgspec.structs.replace(flow, source=source)

    def _leaves_cluster(self, flow: Tuple, passing: Passing) -> bool:
        """Whether the node translates a new connection to beyond the cluster."""
        return passing.is_new and masquerades(
            self._network.lab, flow.source.ip, flow.destination.ip
        )

    def refusal(
        self,
        node: Place,
        flow: Tuple,
        device: str | None,
        hook: Hook,
        passing: Passing,
        goes_by: str = "",
    ) -> Refusal | None:
        """What stops a packet; `goes_by` is the device by which it would be passed on."""
        lab = self._network.lab
        if goes_by and (refused := declared_docker.refusal(lab, node.node, device, goes_by)):
            return refused
        proxy = self._proxy(node)
        if passing.connection is None:
            # A SYN-ACK of a connection that was not seen to begin.
            invalid = self._story.role in ("answer", "reset") and self._protocol == "tcp"
            if invalid and hook == "forward" and proxy.drops_invalid:
                return Refusal("conntrack-invalid", False)
            return None
        untranslated = passing.connection.reply.source == passing.connection.original.destination
        is_dockers = goes_by and declared_docker.accepts(
            lab, node.node, device, goes_by, flow.destination
        )
        if passing.is_new and untranslated and not is_dockers:
            refusal = proxy.after(self._packet(flow, device), hook)
            if refusal:
                return refusal
        if passing.is_new and hook == "forward":
            return self._policy(node, flow)
        return None

    def _policy(self, node: Place, flow: Tuple) -> Refusal | None:
        reason = self._network.policies.refuses(
            node.name,
            self._protocol.upper(),
            flow.source.ip,
            flow.destination.ip,
            flow.destination.port,
        )
        return Refusal(reason, False) if reason else None

    def _proxy(self, node: Place) -> Proxy:
        return self._proxies(self._network, self._network.node_of(node))

    @property
    def _proxies(self) -> type[Proxy]:
        special = {"ipvs": BalancingProxy, "userspace": RedirectingProxy}
        return special.get(self._network.lab.service_proxy.mode, Proxy)

    def _packet(self, flow: Tuple, device: str | None) -> Packet:
        return Packet(self._protocol.upper(), flow.source.ip, flow.destination, device)

    # --- the gateway -----------------------------------------------------------------------------

    def back_by_gateway(self, gateway: Place, flow: Tuple) -> Tuple | None:
        """An answer to what the gateway let out, with the address that it had before."""
        for known in self._known.get(gateway, ()):
            if known.reply == flow and self._story.role != "probe":
                client = known.original.source
                if flow.destination != client:
                    self._story.undone("snat", flow.destination, client)
                return msgspec.structs.replace(flow, destination=client)
        return None

    def out_by_gateway(self, gateway: Place, flow: Tuple) -> Tuple:
        """What goes out, with the gateway's own address; it is remembered."""
        own = Socket(ip=self._network.address_on(gateway, OUTSIDE))
        self._story.translated("snat", gateway, flow.source, own)
        turned = msgspec.structs.replace(flow, source=own)
        self._known.setdefault(gateway, []).append(Connection(flow, turned.reversed))
        return turned

    # --- load balancers --------------------------------------------------------------------------

    def node_chosen(
        self, box: PredictedBalancer, asked: Asked, flow: Tuple, via: str | None
    ) -> Node | None:
        """The node that a connection is sent to: `via` if it may be, one that has the choice."""
        nodes = box.healthy(asked)
        offered = box.offered(flow, asked, nodes, self._proxies)
        if offered:
            self.offered.append((asked.service.key, tuple(end for end, _ in offered)))
        named = [node for node in nodes if node.name == via]
        wanted = (self._choice.ip, self._choice.port) if self._choice else None
        having = [node for end, node in offered if (end.address, end.port) == wanted]
        return next(iter((*named, *having, *nodes)), None)

    def out_by_balancer(
        self, place: Place, box: PredictedBalancer, asked: Asked, flow: Tuple, node: Node
    ) -> Tuple:
        """What goes on to a node; what is translated is remembered."""
        turned = box.sent(flow, asked, node)
        if turned != flow:
            self._story.translated("dnat", place, flow.destination, turned.destination)
            self._story.translated("snat", place, flow.source, turned.source)
            self._known.setdefault(place, []).append(Connection(flow, turned.reversed))
        return turned

    def back_by_balancer(self, place: Place, flow: Tuple) -> Tuple | None:
        """An answer to what it translated, with the addresses that the client knows."""
        for known in self._known.get(place, ()):
            if known.reply == flow and self._story.role != "probe":
                asked, client = known.original.destination, known.original.source
                self._story.undone("dnat", flow.source, asked)
                self._story.undone("snat", flow.destination, client)
                return known.original.reversed
        return None
