"""Read a namespace back into the classes that describe what it should hold."""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from collections.abc import Container, Iterable
from socket import AddressFamily

from msgspec.structs import replace

from netlab.datapath.state import (
    Address,
    FdbEntry,
    Found,
    Ipip,
    Link,
    LinkKind,
    Namespace,
    Neighbour,
    Policy,
    Route,
    Sysctl,
    Vxlan,
)
from netlab.kernel import rtnetlink as rt
from netlab.kernel.namespaces import entered
from netlab.kernel.netlink import NetlinkError, Socket, attribute_list, attributes, number

RTEXT_FILTER_SKIP_STATS = 8
_PERMANENT = rt.NUD_PERMANENT
_FAMILIES = (socket.AF_INET, socket.AF_INET6)
_ANY = {socket.AF_INET: bytes(4), socket.AF_INET6: bytes(16)}
_NETEM = rt.NETEM.encode() + b"\0"
_BY_ITSELF = (bytes([rt.IFAPROT_KERNEL_RA]), bytes([rt.IFAPROT_KERNEL_LL]))
_KINDS: dict[bytes, LinkKind] = {
    b"veth": "veth",
    b"bridge": "bridge",
    b"vxlan": "vxlan",
    b"ipip": "ipip",
}


def observe(name: str, marks: str, desired: Namespace | None) -> Found:
    """Everything of ours in a namespace; `marks` is what our altnames begin with.

    Of sysctls only those are read that `desired` names.  IPv6 is looked at where it wants some;
    elsewhere it is switched off, and with it all that was there.
    """
    wanted = desired.addresses if desired else ()
    families = _FAMILIES if any(":" in each.address for each in wanted) else _FAMILIES[:1]
    with entered(name), Socket() as netlink:
        links, index, marked, without_ipv6 = _links(netlink, marks)
        names = {number: link for link, number in index.items()}
        policies = tuple(each for family in families for each in _policies(netlink, family))
        tables = {rt.RT_TABLE_MAIN, *(each.table for each in policies)}
        if desired:
            tables |= {route.table for route in desired.routes}
        namespace = Namespace(
            name=name,
            links=links,
            addresses=tuple(
                each for family in families for each in _addresses(netlink, names, family, wanted)
            ),
            routes=tuple(
                each
                for family in families
                for table in sorted(tables)
                for each in _routes(netlink, names, family, table)
            ),
            neighbours=tuple(
                each for family in families for each in _neighbours(netlink, names, family)
            ),
            fdb=tuple(_fdb(netlink, names, links)),
            policies=policies,
            sysctls=tuple(_sysctls(desired.sysctls)) if desired else (),
        )
    return Found(
        namespace=namespace,
        index=index,
        marked=frozenset(marked),
        without_ipv6=frozenset(without_ipv6) if len(families) == len(_FAMILIES) else frozenset(),
    )


def links_there(netlink: Socket) -> dict[str, int]:
    """Numbers of all links of a namespace, whoever made them, by name."""
    return _links(netlink, "")[1]


def links_marked(netlink: Socket, marks: str) -> dict[str, int]:
    """Numbers of the links whose altnames begin so, by name."""
    _, index, marked, _ = _links(netlink, marks)
    return {name: number for name, number in index.items() if name in marked}


def altnames(netlink: Socket, index: int) -> list[str]:
    """Further names of a link, marks among them."""
    return _altnames(attributes(netlink.get(rt.RTM_GETLINK, rt.link_message(index)), 16))


def await_ports(descriptor: int, timeout_s: float) -> None:
    """Wait until the bridges of a namespace and the ports in them carry frames.

    A carrier that came up is made known to the bridge by a work queue of the kernel, which may be
    late; until then frames are lost.  Ports without a carrier at the far end are waited for, too,
    but not those that are down.
    """
    deadline = time.monotonic() + timeout_s
    with entered(descriptor):
        events = Socket(groups=rt.RTMGRP_LINK)
    with entered(descriptor), Socket() as netlink, events:
        while _idle_ports(netlink) and (left := deadline - time.monotonic()) > 0:
            events.await_event(left)


def _idle_ports(netlink: Socket) -> bool:
    idle, masters = set(), set()
    for body in netlink.dump(
        rt.RTM_GETLINK, rt.link_message(0) + number(rt.IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS)
    ):
        index, flags = struct.unpack_from("=iI", body, 4)
        found = attributes(body, 16)
        if not flags & rt.IFF_UP:
            continue
        if found.get(rt.IFLA_QDISC) == b"noop\0":
            idle.add(index)
        if rt.IFLA_MASTER not in found:
            continue
        masters.add(_u32(found[rt.IFLA_MASTER]))
        info = attributes(found.get(rt.IFLA_LINKINFO, b""))
        port = attributes(info.get(rt.IFLA_INFO_SLAVE_DATA, b""))
        state = port.get(rt.IFLA_BRPORT_STATE, b"\0")
        if index in idle or state[0] != rt.BR_STATE_FORWARDING:
            return True
    return bool(idle & masters)


def _altnames(found: dict[int, bytes]) -> list[str]:
    return [
        value.rstrip(b"\0").decode()
        for kind, value in attribute_list(found.get(rt.IFLA_PROP_LIST, b""))
        if kind == rt.IFLA_ALT_IFNAME
    ]


def _links(
    netlink: Socket, marks: str
) -> tuple[tuple[Link, ...], dict[str, int], set[str], set[str]]:
    """Links, their numbers by name, those with our mark, those that IPv6 is switched off on."""
    raw = []
    index: dict[str, int] = {}
    for body in netlink.dump(
        rt.RTM_GETLINK, rt.link_message(0) + number(rt.IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS)
    ):
        number_, flags = struct.unpack_from("=iI", body, 4)
        found = attributes(body, 16)
        name = found[rt.IFLA_IFNAME].rstrip(b"\0").decode()
        index[name] = number_
        raw.append((name, flags, found))
    names = {number_: name for name, number_ in index.items()}
    marked = {name for name, _, found in raw if any(a.startswith(marks) for a in _altnames(found))}
    links = (_link(name, flags, found, names) for name, flags, found in raw)
    known = (_with_own_entry(netlink, link, index) for link in links if link)
    if any(found.get(rt.IFLA_QDISC) == _NETEM for _, _, found in raw):
        losses = rt.lossy_links(netlink)
        known = (replace(link, loss=losses.get(index[link.name], 0)) for link in known)
    off = {name for name, _, found in raw if _is_without_ipv6(found)}
    return tuple(known), index, marked, off


def _is_without_ipv6(found: dict[int, bytes]) -> bool:
    of_family = attributes(found.get(rt.IFLA_AF_SPEC, b"")).get(socket.AF_INET6, b"")
    settings = attributes(of_family).get(rt.IFLA_INET6_CONF, b"")
    at = 4 * rt.DEVCONF_DISABLE_IPV6
    return _u32(settings[at : at + 4]) != 0 if len(settings) >= at + 4 else False


def _with_own_entry(netlink: Socket, link: Link, index: dict[str, int]) -> Link:
    """A link; of a bridge whether it knows its own MAC, without which it floods what is for it."""
    if link.kind != "bridge" or link.mac is None:
        return link
    try:
        netlink.get(rt.RTM_GETNEIGH, rt.get_bridge_entry(link.mac, index[link.name]))
    except NetlinkError as error:
        if error.errno == errno.ENOENT:
            return replace(link, own_entry=False)
    return link


def _link(name: str, flags: int, found: dict[int, bytes], names: dict[int, str]) -> Link | None:
    info = attributes(found.get(rt.IFLA_LINKINFO, b""))
    kind = _KINDS.get(info.get(rt.IFLA_INFO_KIND, b"").rstrip(b"\0"))
    if kind is None:
        return None
    master = found.get(rt.IFLA_MASTER)
    slave = attributes(info.get(rt.IFLA_INFO_SLAVE_DATA, b"")) if master else {}
    return Link(
        name=name,
        kind=kind,
        mtu=_u32(found[rt.IFLA_MTU]),
        mac=found[rt.IFLA_ADDRESS].hex(":"),
        master=names.get(_u32(master)) if master else None,
        hairpin=slave.get(rt.IFLA_BRPORT_MODE) == b"\1",
        up=bool(flags & rt.IFF_UP),
        vxlan=_vxlan(attributes(info.get(rt.IFLA_INFO_DATA, b"")), names)
        if kind == "vxlan"
        else None,
        ipip=_ipip(attributes(info.get(rt.IFLA_INFO_DATA, b"")), names) if kind == "ipip" else None,
    )


def _vxlan(data: dict[int, bytes], names: dict[int, str]) -> Vxlan:
    local = data.get(rt.IFLA_VXLAN_LOCAL) or data.get(rt.IFLA_VXLAN_LOCAL6)
    device = data.get(rt.IFLA_VXLAN_LINK)
    remote = data.get(rt.IFLA_VXLAN_GROUP) or data.get(rt.IFLA_VXLAN_GROUP6)
    return Vxlan(
        vni=_u32(data[rt.IFLA_VXLAN_ID]),
        port=struct.unpack("!H", data[rt.IFLA_VXLAN_PORT])[0],
        local=_text(local) if local else "",
        device=names.get(_u32(device), "") if device else "",
        learning=data.get(rt.IFLA_VXLAN_LEARNING) == b"\1",
        remote=_text(remote) if remote else "",
    )


def _ipip(data: dict[int, bytes], names: dict[int, str]) -> Ipip:
    local, device = data.get(rt.IFLA_IPTUN_LOCAL), data.get(rt.IFLA_IPTUN_LINK)
    return Ipip(
        local=_text(local) if local else "",
        device=names.get(_u32(device), "") if device else "",
    )


def _text(address: bytes) -> str:
    """An address as text (ipaddress takes twenty times as long)."""
    return socket.inet_ntop(_FAMILIES[len(address) == 16], address)


def _addresses(
    netlink: Socket, names: dict[int, str], family: AddressFamily, wanted: Container[Address]
) -> Iterable[Address]:
    for body in netlink.dump(rt.RTM_GETADDR, struct.pack("=BBBBI", family, 0, 0, 0, 0)):
        _, length, _, _, index = struct.unpack_from("=BBBBI", body)
        found = attributes(body, 8)
        local = found.get(rt.IFA_LOCAL) or found[rt.IFA_ADDRESS]
        address = Address(link=names[index], address=f"{_text(local)}/{length}")
        if names[index] == "lo":
            continue
        # What the kernel gave itself is nobody's, unless it is just what is wanted.
        if found.get(rt.IFA_PROTO) not in _BY_ITSELF or address in wanted:
            yield address


def _routes(
    netlink: Socket, names: dict[int, str], family: AddressFamily, table: int
) -> Iterable[Route]:
    for answer in _dumped_routes(netlink, family, table):
        _, length, _, _, _, protocol, _, kind, flags = struct.unpack_from("=BBBBBBBBI", answer)
        found = attributes(answer, 12)
        if protocol not in (rt.RTPROT_BOOT, rt.RTPROT_STATIC) or kind != rt.RTN_UNICAST:
            continue
        if rt.RTA_OIF in found:
            yield _route(names, family, table, length, flags, found)


def every_route(netlink: Socket) -> Iterable[Route]:
    """Unicast routes of IPv4 in the main table, whoever made them."""
    family = socket.AF_INET
    _, index, _, _ = _links(netlink, "")
    names = {number: link for link, number in index.items()}
    for answer in _dumped_routes(netlink, family, rt.RT_TABLE_MAIN):
        _, length, _, _, _, _, _, kind, flags = struct.unpack_from("=BBBBBBBBI", answer)
        found = attributes(answer, 12)
        if kind == rt.RTN_UNICAST and rt.RTA_OIF in found:
            yield _route(names, family, rt.RT_TABLE_MAIN, length, flags, found)


def _dumped_routes(netlink: Socket, family: AddressFamily, table: int) -> Iterable[bytes]:
    small = table if table < 256 else 0
    body = struct.pack("=BBBBBBBBI", family, 0, 0, 0, small, 0, 0, 0, 0)
    try:
        yield from netlink.dump(rt.RTM_GETROUTE, body + number(rt.RTA_TABLE, table))
    except NetlinkError as error:
        if error.errno != errno.ENOENT:  # nobody has put a route into the table yet
            raise


def _route(
    names: dict[int, str],
    family: AddressFamily,
    table: int,
    length: int,
    flags: int,
    found: dict[int, bytes],
) -> Route:
    destination = _text(found.get(rt.RTA_DST, _ANY[family]))
    via = found.get(rt.RTA_GATEWAY)
    return Route(
        destination=f"{destination}/{length}",
        link=names.get(_u32(found[rt.RTA_OIF]), ""),
        via=_text(via) if via else None,
        onlink=bool(flags & rt.RTNH_F_ONLINK),
        table=table,
    )


def _policies(netlink: Socket, family: AddressFamily) -> Iterable[Policy]:
    """Rules of policy routing that are not the kernel's own."""
    for body in netlink.dump(rt.RTM_GETRULE, struct.pack("=BBBBBxxBI", family, 0, 0, 0, 0, 0, 0)):
        _, length, source_length, _, table, action, _ = struct.unpack_from("=BBBBBxxBI", body)
        found = attributes(body, 12)
        protocol = found.get(rt.FRA_PROTOCOL, b"\0")[0]
        if protocol not in (rt.RTPROT_BOOT, rt.RTPROT_STATIC) or action != rt.FR_ACT_TO_TBL:
            continue
        source, destination = found.get(rt.FRA_SRC), found.get(rt.FRA_DST)
        yield Policy(
            priority=_u32(found[rt.FRA_PRIORITY]) if rt.FRA_PRIORITY in found else 0,
            table=_u32(found[rt.FRA_TABLE]) if rt.FRA_TABLE in found else table,
            source=f"{_text(source)}/{source_length}" if source else "",
            destination=f"{_text(destination)}/{length}" if destination else "",
            mark=_u32(found[rt.FRA_FWMARK]) if rt.FRA_FWMARK in found else 0,
        )


def _neighbours(
    netlink: Socket, names: dict[int, str], family: AddressFamily
) -> Iterable[Neighbour]:
    for index, state, found in _entries(netlink, family):
        if state & _PERMANENT and rt.NDA_LLADDR in found:
            yield Neighbour(
                link=names.get(index, ""),
                address=_text(found[rt.NDA_DST]),
                mac=found[rt.NDA_LLADDR].hex(":"),
            )


def learned_neighbours(netlink: Socket) -> Iterable[bytes]:
    """Entries that are neither given nor needless, as the kernel tells them."""
    for family in _FAMILIES:
        body = struct.pack("=BxxxiHBB", family, 0, 0, 0, 0)
        for found in netlink.dump(rt.RTM_GETNEIGH, body):
            (state,) = struct.unpack_from("=H", found, 8)
            if not state & (_PERMANENT | rt.NUD_NOARP):
                yield found


def _fdb(netlink: Socket, names: dict[int, str], links: tuple[Link, ...]) -> Iterable[FdbEntry]:
    overlays = {link.name for link in links if link.kind == "vxlan"}
    if not overlays:
        return
    for index, state, found in _entries(netlink, socket.AF_BRIDGE):
        mine = state & _PERMANENT and rt.NDA_DST in found and names.get(index) in overlays
        # The entry of no MAC is where the device itself was told to send what it does not know.
        if mine and any(found[rt.NDA_LLADDR]):
            yield FdbEntry(
                link=names[index],
                mac=found[rt.NDA_LLADDR].hex(":"),
                destination=_text(found[rt.NDA_DST]),
            )


def _entries(netlink: Socket, family: AddressFamily) -> Iterable[tuple[int, int, dict[int, bytes]]]:
    for body in netlink.dump(rt.RTM_GETNEIGH, struct.pack("=BxxxiHBB", family, 0, 0, 0, 0)):
        index, state = struct.unpack_from("=iH", body, 4)
        yield index, state, attributes(body, 12)


def _sysctls(wanted: Iterable[Sysctl]) -> Iterable[Sysctl]:
    for sysctl in wanted:
        try:
            descriptor = os.open(f"/proc/sys/{sysctl.path}", os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            yield Sysctl(path=sysctl.path, value=os.read(descriptor, 256).decode().strip())
        finally:
            os.close(descriptor)


def _u32(data: bytes) -> int:
    (value,) = struct.unpack("=I", data)
    return int(value)
