"""Every message packed by hand says to pyroute2's classes what it should say."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from netlab.datapath.state import Address, FdbEntry, Link, Neighbour, Peer, Route, Vxlan
from netlab.kernel import rtnetlink

VETH = Link(
    name="veth0a1b2c3d",
    kind="veth",
    mtu=1450,
    mac="0a:58:0a:f4:01:04",
    master="cbr0",
    hairpin=True,
    peer=Peer(namespace="l:demo:pod1", link="eth0"),
)
FAR = Link(name="eth0", kind="veth", mtu=1450, mac="0a:58:0a:f4:01:05")
VXLAN = Link(
    name="flannel.1",
    kind="vxlan",
    mtu=1450,
    mac="0e:11:22:33:44:55",
    vxlan=Vxlan(vni=1, port=8472, local="172.21.32.11", device="eth0"),
)


def decoded(packed: bytes) -> Any:
    """The message as pyroute2 reads it."""
    from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
    from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
    from pyroute2.netlink.rtnl.ndmsg import ndmsg
    from pyroute2.netlink.rtnl.rtmsg import rtmsg

    classes = {16: ifinfmsg, 17: ifinfmsg, 108: ifinfmsg, 20: ifaddrmsg, 21: ifaddrmsg}
    classes |= {24: rtmsg, 25: rtmsg, 28: ndmsg, 29: ndmsg}
    message = classes[int.from_bytes(packed[4:6], "little")](packed)
    message.decode()
    return message


def values(message: Any, *path: str) -> Any:
    """A nested attribute."""
    for name in path:
        message = message.get_attr(name)
    return message


def test_bridge() -> None:
    message = decoded(rtnetlink.add_bridge(Link(name="cbr0", kind="bridge", mtu=1450), 3))
    assert message["index"] == 3
    assert message["flags"] & 1
    assert values(message, "IFLA_IFNAME") == "cbr0"
    assert values(message, "IFLA_MTU") == 1450
    assert values(message, "IFLA_LINKINFO", "IFLA_INFO_KIND") == "bridge"
    assert message["header"]["flags"] == 0x601  # request, create, excl


def test_veth_pair() -> None:
    message = decoded(rtnetlink.add_veth(VETH, 7, 3, FAR, 2, 42))
    assert message["index"] == 7
    assert values(message, "IFLA_MASTER") == 3
    assert values(message, "IFLA_ADDRESS") == VETH.mac
    assert values(message, "IFLA_LINKINFO", "IFLA_INFO_KIND") == "veth"
    far = values(message, "IFLA_LINKINFO", "IFLA_INFO_DATA", "VETH_INFO_PEER")
    assert far["index"] == 2
    assert values(far, "IFLA_IFNAME") == "eth0"
    assert values(far, "IFLA_ADDRESS") == FAR.mac
    assert values(far, "IFLA_MTU") == 1450
    assert values(far, "IFLA_NET_NS_FD") == 42
    assert values(far, "IFLA_NUM_TX_QUEUES") == values(message, "IFLA_NUM_RX_QUEUES") == 1


def test_vxlan() -> None:
    message = decoded(rtnetlink.add_vxlan(VXLAN, 4, 2))
    data = values(message, "IFLA_LINKINFO", "IFLA_INFO_DATA")
    assert values(data, "IFLA_VXLAN_ID") == 1
    assert values(data, "IFLA_VXLAN_LINK") == 2
    assert values(data, "IFLA_VXLAN_LOCAL") == "172.21.32.11"
    assert values(data, "IFLA_VXLAN_PORT") == 8472
    assert values(data, "IFLA_VXLAN_LEARNING") == 0


def test_vxlan_over_ipv6() -> None:
    assert VXLAN.vxlan
    six = replace(VXLAN, vxlan=replace(VXLAN.vxlan, local="fd00:172:21:32::b"))
    message = decoded(rtnetlink.add_vxlan(six, 4, 2))
    data = values(message, "IFLA_LINKINFO", "IFLA_INFO_DATA")
    assert values(data, "IFLA_VXLAN_LOCAL6") == "fd00:172:21:32::b"
    assert data.get_attr("IFLA_VXLAN_LOCAL") is None


def test_set_link_sets_only_what_differs() -> None:
    found = replace(VETH, mtu=1400)
    message = decoded(rtnetlink.set_link(VETH, found, 7, 3))
    assert message["index"] == 7
    assert message["flags"] & message["change"] & 1
    assert values(message, "IFLA_MTU") == 1450
    assert message.get_attr("IFLA_ADDRESS") is message.get_attr("IFLA_MASTER") is None
    message = decoded(rtnetlink.set_link(replace(VETH, master=None), VETH, 7, None))
    assert values(message, "IFLA_MASTER") == 0
    message = decoded(rtnetlink.set_link(VETH, replace(VETH, mac="02:00:00:00:00:01"), 7, 3))
    assert values(message, "IFLA_ADDRESS") == VETH.mac


@pytest.mark.parametrize("on", [True, False])
def test_hairpin(on: bool) -> None:
    info = values(decoded(rtnetlink.set_hairpin(7, on)), "IFLA_LINKINFO")
    assert values(info, "IFLA_INFO_SLAVE_KIND") == "bridge"
    assert values(info, "IFLA_INFO_SLAVE_DATA", "IFLA_BRPORT_MODE") == int(on)


def test_altname() -> None:
    message = decoded(rtnetlink.add_altname(5, "netlab:l:eth0"))
    assert message["index"] == 5
    assert values(message, "IFLA_PROP_LIST", "IFLA_ALT_IFNAME") == "netlab:l:eth0"


def test_link_up_and_deleted() -> None:
    assert decoded(rtnetlink.set_up(9))["flags"] & 1
    gone = decoded(rtnetlink.delete_link(9))
    assert (gone["header"]["type"], gone["index"]) == (17, 9)


@pytest.mark.parametrize("pack", [rtnetlink.add_address, rtnetlink.delete_address])
def test_address(pack: Any) -> None:
    message = decoded(pack(Address(link="cbr0", address="10.244.1.1/24"), 3))
    assert (message["prefixlen"], message["index"]) == (24, 3)
    assert values(message, "IFA_LOCAL") == values(message, "IFA_ADDRESS") == "10.244.1.1"
    assert values(message, "IFA_BROADCAST") == "10.244.1.255"


def test_host_address_has_no_broadcast() -> None:
    message = decoded(rtnetlink.add_address(Address(link="f", address="10.244.1.0/32"), 3))
    assert message.get_attr("IFA_BROADCAST") is None


@pytest.mark.parametrize("pack", [rtnetlink.add_address, rtnetlink.delete_address])
def test_address_of_ipv6(pack: Any) -> None:
    message = decoded(pack(Address(link="cbr0", address="fd00:10:244:1::1/64"), 3))
    assert (message["family"], message["prefixlen"], message["index"]) == (10, 64, 3)
    assert message["flags"] == 2  # no duplicate detection
    assert values(message, "IFA_LOCAL") == values(message, "IFA_ADDRESS") == "fd00:10:244:1::1"
    assert message.get_attr("IFA_BROADCAST") is None


@pytest.mark.parametrize("pack", [rtnetlink.add_route, rtnetlink.delete_route])
def test_route(pack: Any) -> None:
    route = Route(destination="10.244.2.0/24", link="flannel.1", via="10.244.2.0", onlink=True)
    message = decoded(pack(route, 4))
    assert message["dst_len"] == 24
    assert values(message, "RTA_DST") == "10.244.2.0"
    assert values(message, "RTA_GATEWAY") == "10.244.2.0"
    assert values(message, "RTA_OIF") == 4
    assert message["flags"] == 4  # onlink
    assert message["scope"] == 0


@pytest.mark.parametrize("pack", [rtnetlink.add_route, rtnetlink.delete_route])
def test_route_of_ipv6(pack: Any) -> None:
    there = "fd00:10:244:2::"
    message = decoded(pack(Route(destination=f"{there}/64", link="f", via=there, onlink=True), 4))
    assert (message["family"], message["dst_len"], message["flags"]) == (10, 64, 4)
    assert values(message, "RTA_DST") == values(message, "RTA_GATEWAY") == there
    default = decoded(pack(Route(destination="::/0", link="e", via="fd00::1"), 2))
    assert (default["family"], default["dst_len"]) == (10, 0)
    assert default.get_attr("RTA_DST") is None


def test_default_route_and_route_on_link() -> None:
    default = decoded(
        rtnetlink.add_route(Route(destination="0.0.0.0/0", link="e", via="10.0.0.1"), 2)
    )
    assert default["dst_len"] == 0
    assert default.get_attr("RTA_DST") is None
    on_link = decoded(rtnetlink.add_route(Route(destination="10.9.9.9/32", link="cbr0"), 3))
    assert on_link["scope"] == 253


@pytest.mark.parametrize(("family", "address"), [(2, "10.244.2.0"), (10, "fd00:10:244:2::")])
@pytest.mark.parametrize("pack", [rtnetlink.add_neighbour, rtnetlink.delete_neighbour])
def test_neighbour(pack: Any, family: int, address: str) -> None:
    message = decoded(pack(Neighbour(link="f", address=address, mac="0e:00:00:00:00:01"), 4))
    assert (message["family"], message["state"], message["ifindex"]) == (family, 0x80, 4)
    assert values(message, "NDA_DST") == address
    assert values(message, "NDA_LLADDR") == "0e:00:00:00:00:01"


@pytest.mark.parametrize("destination", ["172.21.32.9", "fd00:172:21:32::9"])
@pytest.mark.parametrize("pack", [rtnetlink.add_fdb, rtnetlink.delete_fdb])
def test_fdb(pack: Any, destination: str) -> None:
    entry = FdbEntry(link="f", mac="0e:00:00:00:00:01", destination=destination)
    message = decoded(pack(entry, 4))
    assert (message["family"], message["flags"], message["ifindex"]) == (7, 2, 4)
    assert message["state"] & 0x80
    assert values(message, "NDA_LLADDR") == "0e:00:00:00:00:01"
    assert values(message, "NDA_DST") == destination
