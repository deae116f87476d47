"""What differs between IPv4 and IPv6 for a trace; all else asks these."""

from __future__ import annotations

import socket

import msgspec


class Family(msgspec.Struct, frozen=True):
    """An address family, as sockets, headers, rules and commands have it."""

    version: int
    address_family: int  # AF_*, which NFPROTO_* equals
    header: int  # bytes of an IP header without options or extension headers
    protocol_at: int  # offset of the transport protocol in it
    source_at: int  # of the source, which the destination follows
    icmp: str  # "icmp" or "icmpv6", as nft and conntrack call it
    icmp_number: int
    icmp_errors: str  # types of nft, those that quote a packet
    nft: str  # family of nft's tables
    iptables: str
    option: str  # of the command ip
    loopback: str
    unspecified: str
    neighbours: str  # how MACs are asked for
    forwarding: str  # sysctl
    echo_ignored: str
    bridge_netfilter: str

    @property
    def name(self) -> str:
        """`IPv4` or `IPv6`."""
        return f"IPv{self.version}"

    @property
    def bits(self) -> int:
        """Length of an address."""
        return 8 * len(self.packed(self.unspecified))

    @property
    def every_address(self) -> str:
        """The prefix of default routes."""
        return f"{self.unspecified}/0"

    def number_of(self, protocol: str) -> int:
        """The number of a probe's protocol, `tcp`, `udp` or `icmp`."""
        numbers = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP, "icmp": self.icmp_number}
        return numbers[protocol]

    def packed(self, address: str) -> bytes:
        """An address as headers have it."""
        return socket.inet_pton(self.address_family, address)

    def text(self, address: bytes) -> str:
        """The same back."""
        return socket.inet_ntop(self.address_family, address)

    def ends(self, header: bytes) -> tuple[str, str]:
        """Source and destination of an IP header."""
        size = self.bits // 8
        middle, end = self.source_at + size, self.source_at + 2 * size
        return self.text(header[self.source_at : middle]), self.text(header[middle:end])


IPV4 = Family(
    version=4,
    address_family=socket.AF_INET,
    header=20,
    protocol_at=9,
    source_at=12,
    icmp="icmp",
    icmp_number=socket.IPPROTO_ICMP,
    icmp_errors="destination-unreachable, time-exceeded, parameter-problem, redirect",
    nft="ip",
    iptables="iptables",
    option="",
    loopback="127.0.0.1",
    unspecified="0.0.0.0",
    neighbours="ARP",
    forwarding="net.ipv4.ip_forward",
    echo_ignored="net.ipv4.icmp_echo_ignore_all",
    bridge_netfilter="net.bridge.bridge-nf-call-iptables",
)
IPV6 = Family(
    version=6,
    address_family=socket.AF_INET6,
    header=40,
    protocol_at=6,
    source_at=8,
    icmp="icmpv6",
    icmp_number=socket.IPPROTO_ICMPV6,
    icmp_errors=(
        "destination-unreachable, packet-too-big, time-exceeded, parameter-problem, nd-redirect"
    ),
    nft="ip6",
    iptables="ip6tables",
    option=" -6",
    loopback="::1",
    unspecified="::",
    neighbours="neighbour discovery",
    forwarding="net.ipv6.conf.all.forwarding",
    echo_ignored="net.ipv6.icmp.echo_ignore_all",
    bridge_netfilter="net.bridge.bridge-nf-call-ip6tables",
)


def family_of(address: str) -> Family:
    """The family of an address or a network."""
    return IPV6 if ":" in address else IPV4


def first_of(family: Family, addresses: tuple[str, ...]) -> str | None:
    """The first address of a family, of which a node or a pod has one at most."""
    return next((each for each in addresses if family_of(each) is family), None)
