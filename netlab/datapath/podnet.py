"""The pod network of one node: cbr0, a veth pair for each pod, forwarding.

What kubelet and the CNI plugin `bridge` (flannel's, kubenet's) leave behind.
"""

from __future__ import annotations

import functools
import hashlib
from ipaddress import IPv4Network
from socket import inet_aton

from netlab.datapath.state import (
    Address,
    Link,
    Namespace,
    Peer,
    Route,
    Sysctl,
    namespace_name,
)
from netlab.topology.model import Lab, Node, Pod

DEFAULT_ROUTE = "0.0.0.0/0"

# An IPv4-only lab has no IPv6 at all: on a bridge each new port would otherwise make every other
# one answer neighbour discovery.
NO_IPV6 = Sysctl(path="net/ipv6/conf/all/disable_ipv6", value="1")

NODE_SYSCTLS = (
    NO_IPV6,
    Sysctl(path="net/ipv4/ip_forward", value="1"),
    # Loose: a Service's answer may come back another way than the strict filter expects.
    Sysctl(path="net/ipv4/conf/all/rp_filter", value="2"),
    # Without it a Service that sends a pod to a pod on the same bridge answers past the NAT.
    Sysctl(path="net/bridge/bridge-nf-call-iptables", value="1"),
    Sysctl(path="net/bridge/bridge-nf-call-ip6tables", value="1"),
)


def mac_of(address: str) -> str:
    """The MAC that the CNI plugin bridge gives an IPv4 address: 0a:58 and its four bytes."""
    return (b"\x0a\x58" + inet_aton(address)).hex(":")


def outer_link(pod: Pod) -> str:
    """Name of a pod's veth in its node: `veth` and eight hexadecimal digits, always the same."""
    return "veth" + hashlib.sha1(pod.key.encode()).hexdigest()[:8]


def in_cidr(pod: Pod, node: Node) -> bool:
    """Whether a pod's address is one of its node's CIDR; one that is not is routed by itself."""
    base, mask, _ = _cidr(node.pod_cidr)
    return int.from_bytes(inet_aton(pod.address), "big") & mask == base


@functools.cache
def _cidr(text: str) -> tuple[int, int, int]:
    """Network address, mask and prefix length; asked for once for each pod."""
    network = IPv4Network(text)
    return int(network.network_address), int(network.netmask), network.prefixlen


def bridge_links(lab: Lab, node: Node, pods: tuple[Pod, ...], mtu: int) -> tuple[Link, ...]:
    """`cbr0` and the outer ends of the pods' pairs."""
    bridge = Link(name="cbr0", kind="bridge", mtu=mtu, mac=mac_of(node.bridge_address))
    outer = (
        Link(
            name=outer_link(pod),
            kind="veth",
            mtu=mtu,
            master="cbr0",
            hairpin=True,
            peer=Peer(namespace=namespace_name(lab.name, pod.namespace, pod.name), link="eth0"),
        )
        for pod in pods
    )
    return (bridge, *outer)


def bridge_addresses(node: Node) -> tuple[Address, ...]:
    """The pods' gateway."""
    length = _cidr(node.pod_cidr)[2]
    return (Address(link="cbr0", address=f"{node.bridge_address}/{length}"),)


def bridge_routes(node: Node, pods: tuple[Pod, ...]) -> tuple[Route, ...]:
    """Routes to pods whose address is not one of the node's CIDR."""
    return tuple(
        Route(destination=f"{pod.address}/32", link="cbr0")
        for pod in pods
        if not in_cidr(pod, node)
    )


def pod_namespace(lab: Lab, node: Node, pod: Pod, mtu: int) -> Namespace:
    """A pod: `eth0`, its address, a default route by way of `cbr0`."""
    inside = in_cidr(pod, node)
    length = _cidr(node.pod_cidr)[2] if inside else 32
    return Namespace(
        name=namespace_name(lab.name, pod.namespace, pod.name),
        links=(
            Link(
                name="eth0",
                kind="veth",
                mtu=mtu,
                mac=mac_of(pod.address),
                peer=Peer(namespace=namespace_name(lab.name, node.name), link=outer_link(pod)),
            ),
        ),
        addresses=(Address(link="eth0", address=f"{pod.address}/{length}"),),
        routes=(
            Route(
                destination=DEFAULT_ROUTE, link="eth0", via=node.bridge_address, onlink=not inside
            ),
        ),
        sysctls=(NO_IPV6,),
    )
