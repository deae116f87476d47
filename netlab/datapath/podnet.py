"""The pod network of one node: cbr0, or routed links, a veth pair for each pod, forwarding.

What kubelet and the CNI plugin `bridge` (flannel's, kubenet's) leave behind, with one address for
each family of the lab.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from ipaddress import ip_network
from socket import AF_INET, AF_INET6, inet_aton, inet_ntop, inet_pton

from netlab.datapath.state import (
    Address,
    Link,
    Namespace,
    Neighbour,
    Peer,
    Route,
    Sysctl,
    namespace_name,
)
from netlab.topology.model import Lab, Node, Pod

# What routed pods have as their gateway, which no machine has: the other end of the link answers
# for it (Calico's and the AWS VPC CNI's; RFC 3927 has such addresses never leave the link).
LINK_GATEWAY = "169.254.1.1"
LINK_MAC = "ee:ee:ee:ee:ee:ee"  # Calico's for all outer ends: each is alone on its link

EVERY_ADDRESS = {4: "0.0.0.0", 6: "::"}
DEFAULT_ROUTES = {4: "0.0.0.0/0", 6: "::/0"}

# An IPv4-only lab has no IPv6 at all: on a bridge each new port would otherwise make every other
# one answer neighbour discovery.
_NO_IPV6 = (Sysctl(path="net/ipv6/conf/all/disable_ipv6", value="1"),)

_IPV6 = (
    # Link-local addresses are given like all others, where they are of use: what the kernel makes
    # by itself is late, and checked for duplicates.
    Sysctl(path="net/ipv6/conf/all/addr_gen_mode", value="1"),
    Sysctl(path="net/ipv6/conf/default/accept_ra", value="0"),
    Sysctl(path="net/ipv6/conf/all/disable_ipv6", value="0"),
)

_FORWARDING = {
    4: Sysctl(path="net/ipv4/ip_forward", value="1"),
    6: Sysctl(path="net/ipv6/conf/all/forwarding", value="1"),
}

_NODE_SYSCTLS = (
    # Loose: a Service's answer may come back another way than the strict filter expects.
    Sysctl(path="net/ipv4/conf/all/rp_filter", value="2"),
    # Without it a Service that sends a pod to a pod on the same bridge answers past the NAT.
    Sysctl(path="net/bridge/bridge-nf-call-iptables", value="1"),
    Sysctl(path="net/bridge/bridge-nf-call-ip6tables", value="1"),
)


def family_of(text: str) -> int:
    """4 or 6: the family of an address or a network."""
    return 6 if ":" in text else 4


def of_family(texts: Iterable[str], family: int) -> str | None:
    """The first address or network of a family."""
    return next((text for text in texts if family_of(text) == family), None)


def host_network(address: str) -> str:
    """The network of one address."""
    return f"{address}/{128 if family_of(address) == 6 else 32}"


def has_ipv6(lab: Lab) -> bool:
    """Whether a lab has IPv6; without it nothing in it has any."""
    return 6 in _families(lab)


def any_addresses(lab: Lab) -> tuple[str, ...]:
    """What a server binds to that is there for everybody: the unspecified address of a family."""
    return tuple(EVERY_ADDRESS[family] for family in _families(lab))


def addresses_of(lab: Lab, owner: Node | Pod) -> tuple[str, ...]:
    """Addresses of a node or a pod, as far as the lab has their family."""
    families = _families(lab)
    return tuple(address for address in owner.addresses if family_of(address) in families)


def _families(lab: Lab) -> tuple[int, ...]:
    return tuple(family_of(cidr) for cidr in (lab.pod_cidr, *lab.other_pod_cidrs))


def pod_sysctls(lab: Lab) -> tuple[Sysctl, ...]:
    """IPv6 as the lab needs it, in every namespace."""
    return _IPV6 if has_ipv6(lab) else _NO_IPV6


def router_sysctls(lab: Lab) -> tuple[Sysctl, ...]:
    """The same and forwarding, in a namespace that packets pass through."""
    six = (_FORWARDING[6],) if has_ipv6(lab) else ()
    return (*pod_sysctls(lab), _FORWARDING[4], *six)


def node_sysctls(lab: Lab) -> tuple[Sysctl, ...]:
    """Everything that a node needs to carry pods' packets."""
    return (*router_sysctls(lab), *_NODE_SYSCTLS)


def mac_of(address: str) -> str:
    """The MAC of a link by its primary address: 0a:58 and four bytes.

    For IPv4 they are the address, as the CNI plugin bridge had it; for IPv6 the first of its
    SHA-256, as OVN-Kubernetes has it (go-controller/pkg/util/net.go, IPAddrToHWAddr).
    """
    if family_of(address) == 6:
        return (b"\x0a\x58" + hashlib.sha256(address.encode()).digest()[:4]).hex(":")
    return (b"\x0a\x58" + inet_aton(address)).hex(":")


def link_addresses(
    link: str, mac: str, addresses: Iterable[str], networks: tuple[str, ...]
) -> tuple[Address, ...]:
    """Addresses of a link, each with the prefix length of the network that it is in, else alone.

    With IPv6 comes the link-local address that the kernel would make of the MAC (RFC 4291,
    appendix A): from that one a router asks for its neighbours' MACs.
    """
    given = tuple(
        Address(link=link, address=_with_length(address, networks)) for address in addresses
    )
    if of_family((each.address for each in given), 6) is None:
        return given
    six = bytes.fromhex(mac.replace(":", ""))
    packed = b"\xfe\x80" + bytes(6) + bytes([six[0] ^ 2]) + six[1:3] + b"\xff\xfe" + six[3:]
    return (*given, Address(link=link, address=f"{inet_ntop(AF_INET6, packed)}/64"))


def outer_link(pod: Pod) -> str:
    """Name of a pod's veth in its node: `veth` and eight hexadecimal digits, always the same."""
    return "veth" + hashlib.sha1(pod.key.encode()).hexdigest()[:8]


def switch_port(node: Node) -> str:
    """Name of a node's port on the underlay switch: its own if it fits into 15 characters."""
    if len(node.name) <= 15:
        return node.name
    return f"{node.name[:8]}-{hashlib.sha1(node.name.encode()).hexdigest()[:6]}"


def in_cidr(address: str, node: Node) -> bool:
    """Whether a pod's address is one of its node's CIDR; one that is not is routed by itself."""
    return _length(address, node.pod_cidrs) is not None


def is_within(address: str, networks: Iterable[str]) -> bool:
    """Whether an address is one of some networks."""
    return _length(address, networks) is not None


def _with_length(address: str, networks: Iterable[str]) -> str:
    length = _length(address, networks)
    return host_network(address) if length is None else f"{address}/{length}"


def _length(address: str, networks: Iterable[str]) -> int | None:
    family = AF_INET6 if family_of(address) == 6 else AF_INET
    number = int.from_bytes(inet_pton(family, address), "big")
    for text in networks:
        base, mask, length = _cidr(text)
        if number & mask == base and family_of(text) == family_of(address):
            return length
    return None


@functools.cache
def _cidr(text: str) -> tuple[int, int, int]:
    """Network address, mask and prefix length; asked for once for each pod."""
    network = ip_network(text)
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
    """The pods' gateways."""
    mac = mac_of(node.bridge_address)
    return link_addresses("cbr0", mac, node.bridge_addresses, node.pod_cidrs)


def bridge_routes(lab: Lab, node: Node, pods: tuple[Pod, ...]) -> tuple[Route, ...]:
    """Routes to pods' addresses that are not of the node's CIDR."""
    return tuple(
        Route(destination=host_network(address), link="cbr0")
        for pod in pods
        for address in addresses_of(lab, pod)
        if not in_cidr(address, node)
    )


def pod_namespace(lab: Lab, node: Node, pod: Pod, mtu: int) -> Namespace:
    """A pod: `eth0`, its addresses, a default route by way of `cbr0` for each family."""
    mac = mac_of(pod.address)
    addresses = addresses_of(lab, pod)
    return Namespace(
        name=namespace_name(lab.name, pod.namespace, pod.name),
        links=(_pod_link(lab, node, pod, mtu),),
        addresses=link_addresses("eth0", mac, addresses, node.pod_cidrs),
        routes=tuple(
            Route(
                destination=DEFAULT_ROUTES[family_of(address)],
                link="eth0",
                via=of_family(node.bridge_addresses, family_of(address)),
                onlink=not in_cidr(address, node),
            )
            for address in addresses
        ),
        sysctls=pod_sysctls(lab),
    )


def _pod_link(lab: Lab, node: Node, pod: Pod, mtu: int) -> Link:
    """A pod's own end of its pair."""
    return Link(
        name="eth0",
        kind="veth",
        mtu=mtu,
        mac=mac_of(pod.address),
        peer=Peer(namespace=namespace_name(lab.name, node.name), link=outer_link(pod)),
    )


def routed_links(lab: Lab, pods: tuple[Pod, ...], mtu: int) -> tuple[Link, ...]:
    """The outer ends of the pods' pairs where there is no bridge."""
    return tuple(
        Link(
            name=outer_link(pod),
            kind="veth",
            mtu=mtu,
            mac=LINK_MAC,
            routed=True,
            peer=Peer(namespace=namespace_name(lab.name, pod.namespace, pod.name), link="eth0"),
        )
        for pod in pods
    )


def routed_routes(pods: tuple[Pod, ...]) -> tuple[Route, ...]:
    """Each pod's address is a route of its own."""
    return tuple(Route(destination=host_network(pod.address), link=outer_link(pod)) for pod in pods)


def routed_sysctls(pods: tuple[Pod, ...]) -> Iterable[Sysctl]:
    """The node answers ARP for its pods' gateway, which it does not have, and at once."""
    for pod in pods:
        link = outer_link(pod)
        yield Sysctl(path=f"net/ipv4/conf/{link}/proxy_arp", value="1")
        # The kernel would answer for others after a random time of up to 0.8 s.
        yield Sysctl(path=f"net/ipv4/neigh/{link}/proxy_delay", value="0")


def routed_pod_namespace(
    lab: Lab, node: Node, pod: Pod, mtu: int, knows_gateway: bool
) -> Namespace:
    """A pod without a network of its own: its address alone, and all else by way of the link."""
    mac = mac_of(pod.address)
    return Namespace(
        name=namespace_name(lab.name, pod.namespace, pod.name),
        links=(_pod_link(lab, node, pod, mtu),),
        addresses=link_addresses("eth0", mac, [pod.address], ()),
        routes=(
            Route(destination=host_network(LINK_GATEWAY), link="eth0"),
            Route(destination=DEFAULT_ROUTES[4], link="eth0", via=LINK_GATEWAY),
        ),
        neighbours=(Neighbour(link="eth0", address=LINK_GATEWAY, mac=LINK_MAC),)
        if knows_gateway
        else (),
        sysctls=pod_sysctls(lab),
    )
