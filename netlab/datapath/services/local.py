"""What is local to a node: its pods' traffic, its own addresses, and those that take NodePorts.

Shared by all modes of kube-proxy.  Sources: pkg/proxy/util/localdetector.go and
nodeport_addresses.go of kube-proxy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

from netlab.datapath.state import Sysctl
from netlab.topology.model import Lab, Node, ServiceProxy

_KEYWORDS = {"localhost": ("127.0.0.0/8", "::1/128"), "all": ("0.0.0.0/0", "::/0")}


@dataclass(frozen=True, slots=True)
class LocalDetector:
    """How traffic of this node's (or the cluster's) pods is told: by one of the three."""

    cidr: str = ""  # source network
    interface: str = ""  # the bridge that it comes from
    prefix: str = ""  # what the names of the interfaces that it comes from begin with


def local_detector(proxy: ServiceProxy, node: Node, family: int) -> LocalDetector | None:
    """The detector of `detectLocalMode`; None: nothing counts as local."""
    if proxy.detectLocalMode == "BridgeInterface":
        detector = LocalDetector(interface=proxy.detectLocal.bridgeInterface)
    elif proxy.detectLocalMode == "InterfaceNamePrefix":
        detector = LocalDetector(prefix=proxy.detectLocal.interfaceNamePrefix)
    else:
        by_node = proxy.detectLocalMode == "NodeCIDR"
        networks = node.pod_cidrs if by_node else proxy.clusterCIDR.split(",")
        of_family = (cidr.strip() for cidr in networks if (":" in cidr) == (family == 6))
        first = next(of_family, "")
        # iptables and nft print networks without host bits
        detector = LocalDetector(cidr=str(ip_network(first, strict=False)) if first else "")
    return detector if detector != LocalDetector() else None


def conntrack_sysctls(proxy: ServiceProxy) -> Iterator[Sysctl]:
    """What `conntrack` sets on the node.  Sizes are the machine's: a namespace has no own."""
    conntrack = proxy.conntrack
    for name, value in (
        ("tcp_be_liberal", int(conntrack.tcpBeLiberal)),
        ("tcp_timeout_established", conntrack.tcpEstablishedTimeout),
        ("tcp_timeout_close_wait", conntrack.tcpCloseWaitTimeout),
        ("udp_timeout", conntrack.udpTimeout),
        ("udp_timeout_stream", conntrack.udpStreamTimeout),
    ):
        if value:
            yield Sysctl(path=f"net/netfilter/nf_conntrack_{name}", value=str(value))


def node_ip(node: Node, family: int) -> str | None:
    """The node's first address of a family."""
    return next((ip for ip in node.addresses if ip_address(ip).version == family), None)


def own_addresses(lab: Lab, node: Node, family: int) -> list[str]:
    """Every address on the node's links, loopback first."""
    addresses = ["127.0.0.1", "::1", *node.addresses, *node.bridge_addresses]
    if lab.overlay.type == "vxlan":
        addresses += node.overlay_addresses
    return [ip for ip in addresses if ip_address(ip).version == family]


@dataclass(frozen=True, slots=True)
class NodePortAddresses:
    """Networks whose addresses on the node take NodePorts; none means every local address."""

    networks: tuple[IPv4Network | IPv6Network, ...]

    @property
    def match_all(self) -> bool:
        """Whether every local address takes NodePorts."""
        return not self.networks or any(network.prefixlen == 0 for network in self.networks)

    @property
    def ipv4_loopback(self) -> bool:
        """Whether 127.0.0.0/8 is among them, so that NodePorts may work on loopback."""
        if not self.networks:
            return True
        return any(
            network.version == 4
            and (network.network_address.is_loopback or ip_address("127.0.0.0") in network)
            for network in self.networks
        )

    def of(self, addresses: list[str]) -> list[str]:
        """Those of the addresses that take NodePorts, sorted as text."""
        return sorted(
            ip for ip in addresses if any(ip_address(ip) in network for network in self.networks)
        )


def node_port_addresses(proxy: ServiceProxy, node: Node, family: int) -> NodePortAddresses:
    """`nodePortAddresses` of a family: CIDRs and the words "primary", "localhost" and "all"."""
    primary = [ip for ip in (node_ip(node, 4), node_ip(node, 6)) if ip]
    texts = [
        text
        for entry in proxy.nodePortAddresses
        for text in (primary if entry == "primary" else _KEYWORDS.get(entry, (entry,)))
    ]
    networks = (ip_network(text.strip(), strict=False) for text in texts)
    return NodePortAddresses(tuple(network for network in networks if network.version == family))
