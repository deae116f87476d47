"""What a node makes of a connection to one of its own addresses and a pod's `hostPort`.

Written from the documentation of the CNI plugin portmap, without the code of netlab that renders
its rules.
"""

from __future__ import annotations

from ipaddress import ip_address, ip_network

from netlab.topology.model import Endpoint, Node
from netlab.trace.declared_network import DeclaredNetwork
from netlab.trace.family import first_of
from netlab.trace.predicted_services import Packet, Translation


def translate(network: DeclaredNetwork, node: Node, packet: Packet) -> Translation | None:
    """Where the connection, which is to an address of the node, is sent; None: it stays."""
    asked = packet.protocol, packet.destination.port
    for pod in network.lab.with_host_ports.get(node.name, ()):
        own = first_of(network.family, pod.addresses)
        for port in pod.ports if own else ():
            if (port.protocol, port.host_port) == asked and _is_at(port.host_ip, packet):
                assert own is not None
                end = Endpoint(address=own, port=port.port, node=node.name, pod=pod.key)
                return Translation(
                    service="", endpoints=(end,), always=_is_masqueraded(node, own, packet)
                )
    return None


def _is_at(host_ip: str, packet: Packet) -> bool:
    if not host_ip or ip_address(host_ip).is_unspecified:
        return not host_ip or _version(host_ip) == _version(packet.destination.ip)
    return ip_address(host_ip) == ip_address(packet.destination.ip)


def _is_masqueraded(node: Node, own: str, packet: Packet) -> bool:
    """Pods of the same network may be the pod itself; nobody answers to 127.0.0.1."""
    if packet.source == "127.0.0.1":
        return True
    source = ip_address(packet.source)
    networks = [ip_network(cidr) for cidr in node.pod_cidrs]
    near = [network for network in networks if ip_address(own) in network]
    return any(source in network for network in near) or packet.source == own


def _version(text: str) -> int:
    return ip_address(text).version
