"""Docker's networks on a node, as the declared lab has them, and what their rules do.

Written from Docker's documentation ("Packet filtering and firewalls"), without the code of netlab
that renders its rules; only names of devices are those of the builder.
"""

from __future__ import annotations

from netlab.datapath.docker_names import outer_link
from netlab.topology.model import DockerContainer, DockerNetwork, Endpoint, Lab, Node
from netlab.trace.model_steps import Socket
from netlab.trace.place import Place, place_of_container
from netlab.trace.predicted_services import Packet, Refusal, Translation

MTU = 1500


def network_of(lab: Lab, node: str | None, device: str | None) -> DockerNetwork | None:
    """The network of a node that a bridge of its is."""
    found = (net for net in lab.docker_networks if (net.node, net.bridge) == (node, device))
    return next(found, None)


def container_of(lab: Lab, place: Place) -> DockerContainer:
    """The container that a place is."""
    return next(each for each in lab.docker_containers if each.name == place.name)


def home_of(lab: Lab, place: Place) -> DockerNetwork | None:
    """The network that a container is in."""
    return lab.docker_network(container_of(lab, place))


def port_of(lab: Lab, place: Place) -> str:
    """The port of the bridge that leads to a container."""
    return outer_link(container_of(lab, place))


def member(lab: Lab, net: DockerNetwork, address: str) -> Place | None:
    """Who has an address in a network."""
    for container in lab.docker_containers:
        if container.address == address and lab.docker_network(container) == net:
            return place_of_container(lab, container)
    return None


def translate(lab: Lab, node: Node, packet: Packet) -> Translation | None:
    """Where a connection to a published port of the node is sent instead; its address is local."""
    if packet.device is None and packet.destination.ip.startswith("127."):
        return None  # docker-proxy takes it
    if network_of(lab, node.name, packet.device):
        return None
    for container in lab.docker_containers:
        for port in container.published if container.node == node.name else ():
            is_asked = (port.protocol, port.host_port) == (
                packet.protocol,
                packet.destination.port,
            )
            if is_asked and port.host_ip in ("", "0.0.0.0", packet.destination.ip):
                end = Endpoint(address=container.address, port=port.port, node=node.name)
                return Translation(service="", endpoints=(end,), always=False)
    return None


def masquerades(lab: Lab, node: str | None, source: str, device: str) -> bool:
    """Whether what a container sends leaves its network."""
    for container in lab.docker_containers:
        net = lab.docker_network(container)
        if net and (net.node, container.address) == (node, source):
            return device != net.bridge
    return False


def refusal(lab: Lab, node: str | None, came_by: str | None, goes_by: str) -> Refusal | None:
    """Two networks of Docker's do not reach each other."""
    one, other = network_of(lab, node, came_by), network_of(lab, node, goes_by)
    return Refusal("dropped-by-rule", False) if one and other and one != other else None


def accepts(lab: Lab, node: str | None, came_by: str | None, goes_by: str, to: Socket) -> bool:
    """Whether Docker's rules let a new connection pass before anybody else's are asked."""
    if network_of(lab, node, came_by):
        return True
    net = network_of(lab, node, goes_by)
    return net is not None and any(
        container.address == to.ip and any(port.port == to.port for port in container.published)
        for container in lab.docker_containers
        if lab.docker_network(container) == net
    )


def listens(lab: Lab, node: str | None, asked: tuple[str, int | None]) -> bool:
    """Whether a container in the node's own namespace, or docker-proxy, listens on a port."""
    return any(
        (container.mode == "host" and asked in container.listen)
        or any((port.protocol, port.host_port) == asked for port in container.published)
        for container in lab.docker_containers
        if container.node == node and asked[0] in ("TCP", "UDP")
    )
