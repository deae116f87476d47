"""`vxlan`: as flannel's VXLAN backend, with a route, a neighbour and an FDB entry for each peer.

Each family has a device of its own, `flannel.1` and `flannel-v6.1`, of the same VNI and port, and
is carried by packets of its own kind (pkg/backend/vxlan/vxlan.go, vxlan_network.go).
"""

from __future__ import annotations

from collections.abc import Iterable

from netlab.datapath import podnet
from netlab.datapath.overlay import (
    OverlayType,
    Part,
    PodsByNode,
    checked_name,
    link_mtu,
    networks,
    of,
    peers,
    vtep_mac,
)
from netlab.datapath.state import FdbEntry, Link, Neighbour, Route, Vxlan
from netlab.topology.model import Lab, Node

_DEVICES = {4: "flannel", 6: "flannel-v6"}


def vxlan_device(lab: Lab, family: int) -> str:
    """Name of the VXLAN device of a family.  Raises NetlabError if the VNI makes it too long."""
    vni = lab.overlay.vni
    return checked_name(lab, f"{_DEVICES[family]}.{vni}", f"overlay.vni {vni}")


def _part(lab: Lab, node: Node, pods: PodsByNode) -> Part:
    parts = [_of_family(lab, node, pods, podnet.family_of(cidr)) for cidr in node.pod_cidrs]
    return Part(
        links=tuple(link for part in parts for link in part.links),
        addresses=tuple(address for part in parts for address in part.addresses),
        routes=tuple(route for part in parts for route in part.routes),
        neighbours=tuple(neighbour for part in parts for neighbour in part.neighbours),
        fdb=tuple(entry for part in parts for entry in part.fdb),
    )


def _of_family(lab: Lab, node: Node, pods: PodsByNode, family: int) -> Part:
    device, mac = vxlan_device(lab, family), vtep_mac(node, family)
    vxlan = Vxlan(
        vni=lab.overlay.vni,
        port=lab.overlay.port,
        local=of(family, node.addresses),
        device="eth0",
    )
    own = of(family, node.overlay_addresses)
    neighbours: list[Neighbour] = []
    fdb: list[FdbEntry] = []
    for peer in peers(lab, node, family):
        there, peer_mac = of(family, peer.overlay_addresses), vtep_mac(peer, family)
        neighbours.append(Neighbour(link=device, address=there, mac=peer_mac))
        fdb.append(FdbEntry(link=device, mac=peer_mac, destination=of(family, peer.addresses)))
    return Part(
        links=(Link(name=device, kind="vxlan", mtu=link_mtu(lab, family), mac=mac, vxlan=vxlan),),
        addresses=podnet.link_addresses(device, mac, [own], ()),
        routes=tuple(routes_by(device, lab, node, pods, family)),
        neighbours=tuple(neighbours),
        fdb=tuple(fdb),
    )


def routes_by(device: str, lab: Lab, node: Node, pods: PodsByNode, family: int) -> Iterable[Route]:
    """Routes to the peers' pods through one device that all of them are behind."""
    for peer in peers(lab, node, family):
        there = of(family, peer.overlay_addresses)
        for network in networks(peer, pods, family):
            yield Route(destination=network, link=device, via=there, onlink=True)


TYPE = OverlayType(
    part=_part,
    device=lambda lab, node, peer, family: vxlan_device(lab, family),
    vni=lambda lab, node, peer: lab.overlay.vni,
    feature="vxlan",
)
