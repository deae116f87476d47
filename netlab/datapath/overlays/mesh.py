"""`mesh`: a tunnel of its own between each two nodes, the shape of Weave's network.

Each pair has a VXLAN device at either end that knows the other one alone, and a VNI of its own:
two devices of one VNI and port cannot be in one namespace.  Where Weave bridges (its router tells
which peer a MAC is behind), each tunnel here is a next hop of a route, so that tables grow with the
nodes and not with the pods.
"""

from __future__ import annotations

from netlab.datapath import podnet
from netlab.datapath.overlay import (
    OverlayType,
    Part,
    PodsByNode,
    link_mtu,
    networks,
    of,
    peers,
    vtep_mac,
)
from netlab.datapath.state import Address, Link, Neighbour, Route, Vxlan
from netlab.topology.model import Lab, Node


def _number(lab: Lab, node: Node) -> int:
    """Which of the lab's nodes it is."""
    return next(i for i, each in enumerate(lab.nodes) if each.name == node.name)


def _device(lab: Lab, peer: Node) -> str:
    """Named after the peer as it stands in the file, the first of which is 1."""
    return f"mesh{_number(lab, peer) + 1}"


def _vni(lab: Lab, node: Node, peer: Node) -> int:
    """The number of a pair, which stays what it is when nodes come after the others."""
    low, high = sorted((_number(lab, node), _number(lab, peer)))
    return lab.overlay.vni + high * (high - 1) // 2 + low


def _part(lab: Lab, node: Node, pods: PodsByNode) -> Part:
    mac, mtu, own = vtep_mac(node), link_mtu(lab, 4), of(4, node.overlay_addresses)
    links: list[Link] = []
    addresses: list[Address] = []
    routes: list[Route] = []
    neighbours: list[Neighbour] = []
    for peer in peers(lab, node, 4):
        device, there = _device(lab, peer), of(4, peer.overlay_addresses)
        vxlan = Vxlan(
            vni=_vni(lab, node, peer),
            port=lab.overlay.port,
            local=of(4, node.addresses),
            device="eth0",
            remote=of(4, peer.addresses),
        )
        links.append(Link(name=device, kind="vxlan", mtu=mtu, mac=mac, vxlan=vxlan))
        addresses += podnet.link_addresses(device, mac, [own], ())
        neighbours.append(Neighbour(link=device, address=there, mac=vtep_mac(peer)))
        routes += (
            Route(destination=network, link=device, via=there, onlink=True)
            for network in networks(peer, pods, 4)
        )
    return Part(
        links=tuple(links),
        addresses=tuple(addresses),
        routes=tuple(routes),
        neighbours=tuple(neighbours),
    )


TYPE = OverlayType(
    part=_part,
    device=lambda lab, node, peer, family: _device(lab, peer),
    vni=_vni,
    feature="vxlan",
)
