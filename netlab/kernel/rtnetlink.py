"""State as rtnetlink messages: what a link, an address or a route looks like on the wire.

Each function packs one message for :meth:`netlab.kernel.netlink.Socket.request`.  Numbers are those
of linux/if_link.h, linux/rtnetlink.h, linux/neighbour.h; `index` is an interface's number in the
namespace that the message is sent in.
"""

from __future__ import annotations

import socket
import struct

from netlab.datapath.state import MAIN_TABLE, Address, FdbEntry, Link, Neighbour, Policy, Route
from netlab.kernel.netlink import (
    NLM_F_APPEND,
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    Socket,
    attribute,
    attribute_list,
    attributes,
    message,
    nested,
    number,
    text,
)

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK = 16, 17, 18
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH = 28, 29, 30
RTM_NEWRULE, RTM_DELRULE, RTM_GETRULE = 32, 33, 34
RTM_NEWQDISC, RTM_DELQDISC, RTM_GETQDISC = 36, 37, 38
RTM_NEWLINKPROP = 108
RTM_DELLINKPROP = 109

IFF_UP = 0x1

IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_LINK, IFLA_MASTER = 1, 3, 4, 5, 10
IFLA_LINKINFO, IFLA_NET_NS_FD, IFLA_EXT_MASK = 18, 28, 29
IFLA_NUM_TX_QUEUES, IFLA_NUM_RX_QUEUES = 31, 32
IFLA_PROP_LIST, IFLA_ALT_IFNAME = 52, 53
IFLA_AF_SPEC, IFLA_INET6_CONF, DEVCONF_DISABLE_IPV6 = 26, 2, 26
IFLA_INFO_KIND, IFLA_INFO_DATA, IFLA_INFO_SLAVE_KIND, IFLA_INFO_SLAVE_DATA = 1, 2, 4, 5
IFLA_QDISC = 6
IFLA_BRPORT_STATE, IFLA_BRPORT_MODE = 1, 4
BR_STATE_FORWARDING = 3
RTMGRP_LINK, RTMGRP_IPV4_ROUTE = 1, 0x40
VETH_INFO_PEER = 1
IFLA_VXLAN_ID, IFLA_VXLAN_GROUP, IFLA_VXLAN_LINK, IFLA_VXLAN_LOCAL = 1, 2, 3, 4
IFLA_VXLAN_LEARNING, IFLA_VXLAN_PORT, IFLA_VXLAN_GROUP6, IFLA_VXLAN_LOCAL6 = 7, 15, 16, 17
IFLA_IPTUN_LINK, IFLA_IPTUN_LOCAL = 1, 2

IFA_ADDRESS, IFA_LOCAL, IFA_BROADCAST, IFA_PROTO = 1, 2, 4, 11
IFA_F_NODAD = 0x02
IFAPROT_KERNEL_RA, IFAPROT_KERNEL_LL = 2, 3
RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_TABLE = 1, 4, 5, 15
NDA_DST, NDA_LLADDR, NDA_MASTER = 1, 2, 9

FRA_DST, FRA_SRC, FRA_PRIORITY, FRA_FWMARK, FRA_TABLE, FRA_PROTOCOL = 1, 2, 6, 10, 15, 21
FR_ACT_TO_TBL = 1

RT_TABLE_MAIN = MAIN_TABLE
RTPROT_KERNEL, RTPROT_BOOT, RTPROT_STATIC = 2, 3, 4
RT_SCOPE_UNIVERSE, RT_SCOPE_LINK = 0, 253
RTN_UNICAST = 1
RTNH_F_ONLINK = 4
NUD_PERMANENT, NUD_NOARP = 0x80, 0x40
NTF_SELF = 0x02
TC_H_ROOT = 0xFFFFFFFF
TCA_KIND, TCA_OPTIONS = 1, 2
NETEM = "netem"

_LINK = struct.Struct("=BxHiII")  # ifinfomsg: family, type, index, flags, change
_ADDRESS = struct.Struct("=BBBBI")  # ifaddrmsg: family, prefix length, flags, scope, index
_ROUTE = struct.Struct("=BBBBBBBBI")  # rtmsg
_RULE = struct.Struct("=BBBBBxxBI")  # fib_rule_hdr: family, lengths, tos, table, action, flags
_NEIGHBOUR = struct.Struct("=BxxxiHBB")  # ndmsg: family, index, state, flags, type
_QUEUE = struct.Struct("=BxxxiIII")  # tcmsg: family, index, handle, parent, info
_NETEM = struct.Struct("=IIIIII")  # tc_netem_qopt: latency, packets, loss, gap, duplicates, jitter
_CERTAIN = 0xFFFFFFFF  # a probability
_WAITING = 1000  # packets in a queue, as tc has it

_NEW = NLM_F_CREATE | NLM_F_EXCL


def family_of(address: str) -> socket.AddressFamily:
    """The family of an address or a network, told by its colons."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _packed(address: str) -> bytes:
    return socket.inet_pton(family_of(address), address)


def mac_bytes(mac: str) -> bytes:
    """Six bytes of "0a:58:0a:f4:01:04"."""
    return bytes.fromhex(mac.replace(":", ""))


def link_message(index: int, up: bool | None = None) -> bytes:
    """The fixed part of a link message; without `up` the link stays up or down."""
    return _LINK.pack(socket.AF_UNSPEC, 0, index, IFF_UP if up else 0, 0 if up is None else IFF_UP)


def _named(link: Link, master: int | None) -> bytes:
    packed = text(IFLA_IFNAME, link.name) + number(IFLA_MTU, link.mtu)
    if link.kind == "veth":
        # The default is a pair of queues for each CPU, each a kernel object: half of the cost.
        packed += number(IFLA_NUM_TX_QUEUES, 1) + number(IFLA_NUM_RX_QUEUES, 1)
    if link.mac:
        packed += attribute(IFLA_ADDRESS, mac_bytes(link.mac))
    if master:
        packed += number(IFLA_MASTER, master)
    return packed


def add_bridge(link: Link, index: int) -> bytes:
    """A bridge, up."""
    info = nested(IFLA_LINKINFO, text(IFLA_INFO_KIND, "bridge"))
    return message(RTM_NEWLINK, _NEW, link_message(index, up=True) + _named(link, None) + info)


def add_veth(
    link: Link, index: int, master: int | None, peer: Link, peer_index: int, peer_namespace: int
) -> bytes:
    """A veth pair: `link` here and up, `peer` in the namespace behind that descriptor and down.

    The far end can be given neither a master in this message (veth_newlink ignores it) nor be
    brought up (ENOTCONN: the ends are not tied together yet).
    """
    far = link_message(peer_index) + _named(peer, None) + number(IFLA_NET_NS_FD, peer_namespace)
    info = nested(
        IFLA_LINKINFO,
        text(IFLA_INFO_KIND, "veth"),
        nested(IFLA_INFO_DATA, attribute(VETH_INFO_PEER, far)),
    )
    return message(RTM_NEWLINK, _NEW, link_message(index, up=True) + _named(link, master) + info)


def add_vxlan(link: Link, index: int, device: int) -> bytes:
    """A VXLAN device, up."""
    assert link.vxlan is not None
    six = family_of(link.vxlan.local) == socket.AF_INET6
    remote = b""
    if link.vxlan.remote:  # a group is told by the same attribute
        kind = IFLA_VXLAN_GROUP6 if six else IFLA_VXLAN_GROUP
        remote = attribute(kind, _packed(link.vxlan.remote))
    data = nested(
        IFLA_INFO_DATA,
        number(IFLA_VXLAN_ID, link.vxlan.vni),
        number(IFLA_VXLAN_LINK, device),
        attribute(IFLA_VXLAN_LOCAL6 if six else IFLA_VXLAN_LOCAL, _packed(link.vxlan.local)),
        attribute(IFLA_VXLAN_LEARNING, bytes([link.vxlan.learning])),
        attribute(IFLA_VXLAN_PORT, struct.pack("!H", link.vxlan.port)),
        remote,
    )
    info = nested(IFLA_LINKINFO, text(IFLA_INFO_KIND, "vxlan"), data)
    return message(RTM_NEWLINK, _NEW, link_message(index, up=True) + _named(link, None) + info)


def add_ipip(link: Link, index: int, device: int) -> bytes:
    """A device for IPv4 in IPv4 to whatever gateway a route has, up."""
    assert link.ipip is not None
    data = nested(
        IFLA_INFO_DATA,
        number(IFLA_IPTUN_LINK, device),
        attribute(IFLA_IPTUN_LOCAL, _packed(link.ipip.local)),
    )
    info = nested(IFLA_LINKINFO, text(IFLA_INFO_KIND, "ipip"), data)
    return message(RTM_NEWLINK, _NEW, link_message(index, up=True) + _named(link, None) + info)


def set_link(link: Link, found: Link, index: int, master: int | None) -> bytes:
    """Give a link that was found the settings that it should have, and bring it up, or down.

    Only what differs is set: a MAC that is set again, even the same one, flushes neighbours.
    """
    body = link_message(index, up=link.up)
    if link.mtu != found.mtu:
        body += number(IFLA_MTU, link.mtu)
    if link.mac and link.mac != found.mac:
        body += attribute(IFLA_ADDRESS, mac_bytes(link.mac))
    if link.master != found.master:
        body += number(IFLA_MASTER, master or 0)
    return message(RTM_NEWLINK, 0, body)


def set_hairpin(index: int, on: bool) -> bytes:
    """Whether a bridge port may send a frame back to where it came from."""
    info = nested(
        IFLA_LINKINFO,
        text(IFLA_INFO_SLAVE_KIND, "bridge"),
        nested(IFLA_INFO_SLAVE_DATA, attribute(IFLA_BRPORT_MODE, bytes([on]))),
    )
    return message(RTM_NEWLINK, 0, link_message(index) + info)


def set_up(index: int, up: bool = True) -> bytes:
    """Bring a link up, or down."""
    return message(RTM_NEWLINK, 0, link_message(index, up=up))


def add_altname(index: int, name: str) -> bytes:
    """Another name for a link: our mark of ownership."""
    names = nested(IFLA_PROP_LIST, text(IFLA_ALT_IFNAME, name))
    return message(RTM_NEWLINKPROP, _NEW | NLM_F_APPEND, link_message(index) + names)


def delete_altname(index: int, name: str) -> bytes:
    """Take such a name away."""
    names = nested(IFLA_PROP_LIST, text(IFLA_ALT_IFNAME, name))
    return message(RTM_DELLINKPROP, 0, link_message(index) + names)


def delete_link(index: int) -> bytes:
    """Remove a link; of a veth pair both ends go."""
    return message(RTM_DELLINK, 0, link_message(index))


def _network(text: str) -> tuple[bytes, int]:
    """Address and prefix length of "10.244.1.1/24" (ipaddress takes twenty times as long)."""
    address, _, length = text.partition("/")
    return _packed(address), int(length)


def _address(address: Address, index: int) -> bytes:
    packed, length = _network(address.address)
    family = family_of(address.address)
    # Nobody else can have it: an IPv6 address need not wait a second or two to find that out.
    flags = IFA_F_NODAD if family == socket.AF_INET6 else 0
    body = _ADDRESS.pack(family, length, flags, RT_SCOPE_UNIVERSE, index)
    body += attribute(IFA_LOCAL, packed) + attribute(IFA_ADDRESS, packed)
    if family == socket.AF_INET and length < 31:
        host = 0xFFFFFFFF >> length
        broadcast = int.from_bytes(packed, "big") | host
        body += attribute(IFA_BROADCAST, broadcast.to_bytes(4, "big"))
    return body


def add_address(address: Address, index: int) -> bytes:
    """An address on a link."""
    return message(RTM_NEWADDR, _NEW, _address(address, index))


def delete_address(address: Address, index: int) -> bytes:
    """Take an address away."""
    return message(RTM_DELADDR, 0, _address(address, index))


def _route(route: Route, index: int) -> bytes:
    destination, length = _network(route.destination)
    body = _ROUTE.pack(
        family_of(route.destination),
        length,
        0,
        0,
        route.table if route.table < 256 else 0,
        RTPROT_BOOT,
        RT_SCOPE_UNIVERSE if route.via else RT_SCOPE_LINK,
        RTN_UNICAST,
        RTNH_F_ONLINK if route.onlink else 0,
    )
    if length:
        body += attribute(RTA_DST, destination)
    if route.via:
        body += attribute(RTA_GATEWAY, _packed(route.via))
    return body + number(RTA_TABLE, route.table) + number(RTA_OIF, index)


def add_route(route: Route, index: int) -> bytes:
    """A route; one to the same destination is replaced."""
    return message(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, _route(route, index))


def delete_route(route: Route, index: int) -> bytes:
    """Take a route away."""
    return message(RTM_DELROUTE, 0, _route(route, index))


def _policy(policy: Policy) -> bytes:
    source, source_length = _network(policy.source) if policy.source else (b"", 0)
    destination, length = _network(policy.destination) if policy.destination else (b"", 0)
    family = family_of(policy.source or policy.destination)
    table = policy.table if policy.table < 256 else 0
    body = _RULE.pack(family, length, source_length, 0, table, FR_ACT_TO_TBL, 0)
    if source:
        body += attribute(FRA_SRC, source)
    if destination:
        body += attribute(FRA_DST, destination)
    if policy.mark:
        body += number(FRA_FWMARK, policy.mark)
    body += number(FRA_PRIORITY, policy.priority) + number(FRA_TABLE, policy.table)
    return body + attribute(FRA_PROTOCOL, bytes([RTPROT_BOOT]))


def add_policy(policy: Policy) -> bytes:
    """A rule of policy routing."""
    return message(RTM_NEWRULE, _NEW, _policy(policy))


def delete_policy(policy: Policy) -> bytes:
    """Take a rule of policy routing away."""
    return message(RTM_DELRULE, 0, _policy(policy))


def _neighbour(entry: Neighbour, index: int) -> bytes:
    return (
        _NEIGHBOUR.pack(family_of(entry.address), index, NUD_PERMANENT, 0, 0)
        + attribute(NDA_DST, _packed(entry.address))
        + attribute(NDA_LLADDR, mac_bytes(entry.mac))
    )


def add_neighbour(entry: Neighbour, index: int) -> bytes:
    """A permanent neighbour entry; one for the same address is replaced."""
    return message(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, _neighbour(entry, index))


def delete_neighbour(entry: Neighbour, index: int) -> bytes:
    """Take a neighbour entry away."""
    return message(RTM_DELNEIGH, 0, _neighbour(entry, index))


def forget_neighbour(found: bytes) -> bytes:
    """Take away a neighbour entry that a dump has told."""
    address = next(
        value for kind, value in attribute_list(found[_NEIGHBOUR.size :]) if kind == NDA_DST
    )
    return message(RTM_DELNEIGH, 0, found[: _NEIGHBOUR.size] + attribute(NDA_DST, address))


def _fdb(entry: FdbEntry, index: int) -> bytes:
    return (
        _NEIGHBOUR.pack(socket.AF_BRIDGE, index, NUD_NOARP | NUD_PERMANENT, NTF_SELF, 0)
        + attribute(NDA_LLADDR, mac_bytes(entry.mac))
        + attribute(NDA_DST, _packed(entry.destination))
    )


def add_fdb(entry: FdbEntry, index: int) -> bytes:
    """A static entry of a VXLAN device; one for the same MAC is replaced."""
    return message(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, _fdb(entry, index))


def add_own_entry(mac: str, index: int) -> bytes:
    """The entry by which a bridge takes what is sent to its MAC; one that is there is kept."""
    entry = _NEIGHBOUR.pack(socket.AF_BRIDGE, index, NUD_NOARP | NUD_PERMANENT, NTF_SELF, 0)
    body = entry + attribute(NDA_LLADDR, mac_bytes(mac))
    return message(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, body)


def get_bridge_entry(mac: str, bridge: int) -> bytes:
    """The body of a question (RTM_GETNEIGH) for what a bridge knows of a MAC."""
    entry = _NEIGHBOUR.pack(socket.AF_BRIDGE, 0, 0, 0, 0)
    return entry + attribute(NDA_LLADDR, mac_bytes(mac)) + number(NDA_MASTER, bridge)


def delete_fdb(entry: FdbEntry, index: int) -> bytes:
    """Take an entry of a VXLAN device away."""
    return message(RTM_DELNEIGH, 0, _fdb(entry, index))


def add_loss(percent: int, index: int) -> bytes:
    """A queue that loses that much of what the link is to send, in place of one that is there."""
    settings = _NETEM.pack(0, _WAITING, percent * _CERTAIN // 100, 0, 0, 0)
    body = _QUEUE.pack(0, index, 0, TC_H_ROOT, 0)
    body += text(TCA_KIND, NETEM) + attribute(TCA_OPTIONS, settings)
    return message(RTM_NEWQDISC, NLM_F_CREATE | NLM_F_REPLACE, body)


def delete_loss(index: int) -> bytes:
    """Give the link the queue that it had by itself."""
    return message(RTM_DELQDISC, 0, _QUEUE.pack(0, index, 0, TC_H_ROOT, 0))


def lossy_links(netlink: Socket) -> dict[int, int]:
    """Links that have such a queue by their numbers, with the percent that it loses."""
    found = {}
    for body in netlink.dump(RTM_GETQDISC, _QUEUE.pack(0, 0, 0, 0, 0)):
        told = attributes(body, _QUEUE.size)
        if told[TCA_KIND].rstrip(b"\0").decode() == NETEM:
            (loss,) = struct.unpack_from("=8xI", told[TCA_OPTIONS])
            found[_QUEUE.unpack_from(body)[1]] = round(loss * 100 / _CERTAIN)
    return found
