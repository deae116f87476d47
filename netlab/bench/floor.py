"""The floor: what the kernel itself takes for the namespaces and veth pairs of a lab.

Nodes with a bridge `cbr0` each, and for each pod a named network namespace and a veth pair with
both ends up and the outer one in the bridge.  System calls, bind mounts and hand-packed netlink
messages; no addresses, routes, rules or processes.  Nothing of netlab is used here, so that a
change in netlab cannot move the mark that it is measured against.

What made it faster was kept.  A thread builds each node, since the kernel's work overlaps on
several cores.  One message makes a pair with the inner end up and the outer one already in the
node under a known number (veth_newlink() takes a number for the outer end only if the inner one
is given one too); then one send puts all outer ends into the bridge.  An end cannot be up before
it knows its peer (veth_open() answers ENOTCONN), so a pair takes two messages.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

RUN_DIR = "/run/netns"
BRIDGE = "cbr0"

CLONE_NEWNET = 0x40000000
MS_BIND = 0x1000
MNT_DETACH = 0x2

RTM_NEWLINK = 16
NLMSG_ERROR = 2
NLM_F_REQUEST = 0x1
NLM_F_ACK = 0x4
NLM_F_CREATE_EXCL = 0x600
IFF_UP = 0x1
IFLA_IFNAME = 3
IFLA_MASTER = 10
IFLA_LINKINFO = 18
IFLA_NET_NS_FD = 28
IFLA_INFO_KIND = 1
IFLA_INFO_DATA = 2
VETH_INFO_PEER = 1
NESTED = 0x8000

FIRST_INDEX = 1000
# Messages in one send: the acknowledgements of a batch fit the socket's receive buffer.
BATCH = 100

_libc = ctypes.CDLL(None, use_errno=True)


def _call(result: int) -> None:
    if result != 0:
        errno = ctypes.get_errno()
        raise OSError(errno, os.strerror(errno))


def unshare_network() -> int:
    """Move the calling thread into a new network namespace; its descriptor."""
    _call(_libc.unshare(CLONE_NEWNET))
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def named_namespace(name: str) -> int:
    """Move the calling thread into a new network namespace and name it; its descriptor."""
    path = f"{RUN_DIR}/{name}"
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444))
    namespace = unshare_network()
    _call(_libc.mount(b"/proc/thread-self/ns/net", path.encode(), None, MS_BIND, None))
    return namespace


def enter(namespace: int) -> None:
    """Move the calling thread into a network namespace."""
    _call(_libc.setns(namespace, CLONE_NEWNET))


def remove_name(name: str) -> None:
    """Take a name away; the kernel frees the namespace later if nothing else holds it."""
    path = f"{RUN_DIR}/{name}"
    _call(_libc.umount2(path.encode(), MNT_DETACH))
    os.unlink(path)


def attribute(kind: int, payload: bytes) -> bytes:
    """A netlink attribute, padded to four bytes."""
    length = 4 + len(payload)
    return struct.pack("HH", length, kind) + payload + b"\0" * (-length % 4)


def new_link(attributes: bytes, *, up: bool, index: int = 0, create: bool = True) -> bytes:
    """An RTM_NEWLINK that creates a link, or that changes the one with this index."""
    flags = NLM_F_REQUEST | NLM_F_ACK | (NLM_F_CREATE_EXCL if create else 0)
    body = link_header(up, index) + attributes
    return struct.pack("=IHHII", 16 + len(body), RTM_NEWLINK, flags, 0, 0) + body


def link_header(up: bool, index: int = 0) -> bytes:
    """A struct ifinfomsg."""
    state = IFF_UP if up else 0
    return struct.pack("=BxHiII", 0, 0, index, state, state)


def veth(outer: str, index: int, node: int, inner: int = 0) -> bytes:
    """A veth pair: `eth0` here and up, and `outer` with the interface number `index` in `node`.

    `eth0` has the number `inner`, if given, else the same.
    """
    peer = (
        link_header(up=False, index=index)
        + attribute(IFLA_IFNAME, outer.encode() + b"\0")
        + attribute(IFLA_NET_NS_FD, struct.pack("=i", node))
    )
    kind = attribute(IFLA_INFO_KIND, b"veth")
    data = attribute(IFLA_INFO_DATA | NESTED, attribute(VETH_INFO_PEER | NESTED, peer))
    return new_link(
        attribute(IFLA_IFNAME, b"eth0\0") + attribute(IFLA_LINKINFO | NESTED, kind + data),
        up=True,
        index=inner or index,
    )


def port(index: int, bridge: int) -> bytes:
    """Put the link with this number in a bridge and set it up."""
    master = attribute(IFLA_MASTER, struct.pack("=i", bridge))
    return new_link(master, up=True, index=index, create=False)


def bridge(name: str) -> bytes:
    """A message that makes a bridge that is up."""
    kind = attribute(IFLA_INFO_KIND, b"bridge")
    return new_link(
        attribute(IFLA_IFNAME, name.encode() + b"\0") + attribute(IFLA_LINKINFO | NESTED, kind),
        up=True,
    )


def send(channel: socket.socket, messages: list[bytes]) -> None:
    """Send messages at once and read their acknowledgements; OSError if one failed."""
    channel.send(b"".join(messages))
    left = len(messages)
    while left:
        answer = channel.recv(65536)
        offset = 0
        while offset < len(answer):
            length, kind = struct.unpack_from("=IH", answer, offset)
            if kind == NLMSG_ERROR:
                (errno,) = struct.unpack_from("=i", answer, offset + 16)
                if errno:
                    raise OSError(-errno, os.strerror(-errno))
                left -= 1
            offset += (length + 3) & ~3


def route_socket() -> socket.socket:
    """A NETLINK_ROUTE socket in the calling thread's network namespace."""
    channel = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
    channel.bind((0, 0))
    return channel


def names(prefix: str, nodes: int, pods: int) -> Iterator[str]:
    """Every name that `build` makes."""
    for node in range(nodes):
        yield f"{prefix}:n{node}"
        yield from (f"{prefix}:n{node}:p{pod}" for pod in range(pods // nodes))


def build_node(name: str, pods: int) -> None:
    """Make one node and its pods. Leaves the calling thread in one of the new namespaces."""
    node = named_namespace(name)
    with route_socket() as channel:
        send(channel, [bridge(BRIDGE)])
        master = socket.if_nametoindex(BRIDGE)
        for number in range(pods):
            os.close(named_namespace(f"{name}:p{number}"))
            with route_socket() as inside:
                send(inside, [veth(f"veth{number:08x}", FIRST_INDEX + number, node)])
        ports = [port(FIRST_INDEX + number, master) for number in range(pods)]
        for start in range(0, pods, BATCH):
            send(channel, ports[start : start + BATCH])
    os.close(node)


def build(prefix: str, nodes: int = 2, pods: int = 200) -> None:
    """Make `pods` namespaces and veth pairs on `nodes` nodes, named `PREFIX:n0:p0` and so on."""
    with ThreadPoolExecutor(max_workers=nodes) as threads:
        jobs = [
            threads.submit(build_node, f"{prefix}:n{node}", pods // nodes) for node in range(nodes)
        ]
        for job in jobs:
            job.result()


def remove(prefix: str, nodes: int = 2, pods: int = 200) -> None:
    """Take away what `build` made, whole or in part."""
    for name in names(prefix, nodes, pods):
        if os.path.lexists(f"{RUN_DIR}/{name}"):
            remove_name(name)
