"""A dummy device of ours that only holds addresses, in the calling thread's namespace.

It is down, so that nobody outside hears of the addresses; they are local all the same.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterable, Iterator

from netlab.datapath.state import Address
from netlab.kernel import rtnetlink
from netlab.kernel.namespaces import mark
from netlab.kernel.netlink import (
    NLM_F_CREATE,
    NLM_F_EXCL,
    Socket,
    attribute_list,
    attributes,
    message,
    nested,
    text,
)
from netlab.problems import Exit, NetlabError, Problem

# Links are given numbers one after the other by whoever makes the others at the same time.
_INDEX = 1 << 20


def _links() -> Iterator[tuple[str, int, dict[int, bytes]]]:
    with Socket() as netlink:
        for body in netlink.dump(rtnetlink.RTM_GETLINK, rtnetlink.link_message(0)):
            found = attributes(body, 16)
            name = found[rtnetlink.IFLA_IFNAME].rstrip(b"\0").decode()
            (index,) = struct.unpack_from("=i", body, 4)
            yield name, index, found


def _is_marked(found: dict[int, bytes], name: str, lab: str) -> bool:
    wanted = mark(lab, name).encode() + b"\0"
    names = found.get(rtnetlink.IFLA_PROP_LIST, b"")
    return any(value == wanted for _, value in attribute_list(names))


def find(name: str, lab: str) -> int | None:
    """The number of our device, if it is there."""
    for each, index, found in _links():
        if each == name:
            if _is_marked(found, name, lab):
                return index
            raise NetlabError(
                Problem(
                    "foreign-device",
                    f"there is a device {name} that netlab did not make",
                    hint=f"if nobody needs it: `ip link del {name}` in that namespace",
                ),
                Exit.MACHINE,
            )
    return None


def is_there(name: str, lab: str) -> bool:
    """Whether there is a device of that name, and it is ours."""
    return any(each == name and _is_marked(found, name, lab) for each, _, found in _links())


def make(name: str, lab: str) -> int:
    """A dummy device, down.  Its mark comes with it: both messages are sent at once."""
    info = nested(rtnetlink.IFLA_LINKINFO, text(rtnetlink.IFLA_INFO_KIND, "dummy"))
    body = rtnetlink.link_message(_INDEX) + text(rtnetlink.IFLA_IFNAME, name) + info
    new = message(rtnetlink.RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body)
    with Socket() as netlink:
        for refused in netlink.request([new, rtnetlink.add_altname(_INDEX, mark(lab, name))]):
            raise NetlabError(
                Problem(
                    "missing-module",
                    f"the dummy device {name} cannot be made: {refused.strerror}",
                    hint="`sudo modprobe dummy` (on Debian in linux-image-amd64)",
                ),
                Exit.MACHINE,
            )
    return _INDEX


def addresses_of(index: int | None) -> frozenset[str]:
    """All addresses of a device; none of none."""
    if index is None:
        return frozenset()
    found = set()
    with Socket() as netlink:
        for family in (socket.AF_INET, socket.AF_INET6):
            for body in netlink.dump(
                rtnetlink.RTM_GETADDR, struct.pack("=BBBBI", family, 0, 0, 0, index)
            ):
                told = attributes(body, 8)
                packed = told.get(rtnetlink.IFA_LOCAL) or told[rtnetlink.IFA_ADDRESS]
                found.add(socket.inet_ntop(family, packed))
    return frozenset(found)


def change_addresses(index: int, addresses: Iterable[str], *, add: bool = True) -> None:
    """Give a device addresses, or take them away; those that are there, or gone, are fine.

    Raises NetlabError (exit 3) with what the kernel refuses.
    """
    pack = rtnetlink.add_address if add else rtnetlink.delete_address
    messages = [
        pack(Address(link="", address=f"{each}/{128 if ':' in each else 32}"), index)
        for each in addresses
    ]
    if not messages:
        return
    with Socket() as netlink:
        refused = netlink.request(messages)
    gone = (errno.EEXIST,) if add else (errno.EADDRNOTAVAIL,)
    for each in refused:
        if each.errno not in gone:
            words = f"an address of a virtual server cannot be set: {each.strerror}"
            raise NetlabError(Problem("address-refused", words), Exit.MACHINE)
