"""The floor of a VXLAN full mesh: the links, routes and FDB entries themselves.

On top of the nodes and pods of :mod:`benchmarks.floor`: a switch, a link of each node to it, and in
each node the VXLAN device with, for each other node, one neighbour, one FDB entry and one route.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from benchmarks.floor import (
    BATCH,
    BRIDGE,
    FIRST_INDEX,
    IFLA_IFNAME,
    IFLA_INFO_DATA,
    IFLA_INFO_KIND,
    IFLA_LINKINFO,
    NESTED,
    NLM_F_ACK,
    NLM_F_REQUEST,
    RUN_DIR,
    attribute,
    bridge,
    enter,
    named_namespace,
    new_link,
    port,
    remove_name,
    route_socket,
    send,
    veth,
)

RTM_NEWADDR, RTM_NEWROUTE, RTM_NEWNEIGH = 20, 24, 28
NLM_F_CREATE_REPLACE = 0x500
UPLINK, VXLAN = 5000, 5001
NUD_PERMANENT, NTF_SELF = 0x80, 2


def message(kind: int, body: bytes) -> bytes:
    """A message that creates or replaces."""
    flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE_REPLACE
    return struct.pack("=IHHII", 16 + len(body), kind, flags, 0, 0) + body


def address(index: int, number: bytes, length: int) -> bytes:
    """An IPv4 address on a link."""
    head = struct.pack("=BBBBI", socket.AF_INET, length, 0, 0, index)
    return message(RTM_NEWADDR, head + attribute(1, number) + attribute(2, number))


def neighbour(family: int, index: int, state: int, flags: int, *pairs: tuple[int, bytes]) -> bytes:
    """A permanent neighbour, or with AF_BRIDGE an FDB entry."""
    head = struct.pack("=BxxxiHBB", family, index, state, flags, 0)
    return message(RTM_NEWNEIGH, head + b"".join(attribute(*pair) for pair in pairs))


def route(index: int, network: bytes, length: int, via: bytes) -> bytes:
    """A route by way of a gateway on the link, whatever the addresses say."""
    head = struct.pack("=BBBBBBBBI", socket.AF_INET, length, 0, 0, 254, 3, 0, 1, 4)
    attributes = attribute(1, network) + attribute(5, via) + attribute(4, struct.pack("=I", index))
    return message(RTM_NEWROUTE, head + attributes)


def vxlan(local: bytes) -> bytes:
    """The VXLAN device, up."""
    data = (
        attribute(1, struct.pack("=I", 1))
        + attribute(3, struct.pack("=I", UPLINK))
        + attribute(4, local)
        + attribute(7, b"\0")
        + attribute(15, struct.pack("!H", 8472))
    )
    kind = attribute(IFLA_INFO_KIND, b"vxlan")
    info = attribute(IFLA_LINKINFO | NESTED, kind + attribute(IFLA_INFO_DATA | NESTED, data))
    return new_link(attribute(IFLA_IFNAME, b"flannel.1\0") + info, up=True, index=VXLAN)


def mesh(number: int, nodes: int) -> Iterator[bytes]:
    """What one node has for the overlay, its link to the switch being there."""
    yield address(UPLINK, bytes([172, 21, 32, number + 2]), 24)
    yield vxlan(bytes([172, 21, 32, number + 2]))
    yield address(VXLAN, bytes([10, 244, number, 0]), 32)
    for peer in range(nodes):
        if peer != number:
            mac, end = bytes([0x0E, 0, 0, 0, 0, peer]), bytes([10, 244, peer, 0])
            outer = bytes([172, 21, 32, peer + 2])
            yield neighbour(socket.AF_INET, VXLAN, NUD_PERMANENT, 0, (1, end), (2, mac))
            yield neighbour(7, VXLAN, NUD_PERMANENT | 0x40, NTF_SELF, (2, mac), (1, outer))
            yield route(VXLAN, end, 24, end)


def build(prefix: str, nodes: int) -> None:
    """Join nodes that `floor.build` has made, at most 250, with a full mesh."""
    switch = named_namespace(f"{prefix}:switch")
    with route_socket() as channel:
        send(channel, [bridge(BRIDGE)])
        master = socket.if_nametoindex(BRIDGE)
    with ThreadPoolExecutor(max_workers=8) as threads:
        jobs = [
            threads.submit(_join, f"{RUN_DIR}/{prefix}:n{number}", number, nodes, switch)
            for number in range(nodes)
        ]
        for job in jobs:
            job.result()
    enter(switch)
    with route_socket() as channel:
        ports = [port(FIRST_INDEX + number, master) for number in range(nodes)]
        for start in range(0, nodes, BATCH):
            send(channel, ports[start : start + BATCH])
    os.close(switch)


def _join(path: str, number: int, nodes: int, switch: int) -> None:
    node = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    enter(node)
    os.close(node)
    with route_socket() as channel:
        outer = f"port{number}"
        send(channel, [veth(outer, FIRST_INDEX + number, switch, UPLINK)])
        messages = list(mesh(number, nodes))
        for start in range(0, len(messages), BATCH):
            send(channel, messages[start : start + BATCH])


def remove(prefix: str) -> None:
    """Take the switch's name away; `floor.remove` does the rest."""
    remove_name(f"{prefix}:switch")
