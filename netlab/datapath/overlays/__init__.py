"""How a node reaches the pods of the others: one module for each `overlay.type`."""

from __future__ import annotations

from collections.abc import Mapping

from netlab.datapath import podnet
from netlab.datapath.overlay import OverlayType, peers
from netlab.datapath.overlays import bgp, eni, host_gw, ipip, mesh, vxlan, vxlan_multicast
from netlab.topology.model import Lab, Node

TYPES: Mapping[str, OverlayType] = {
    "vxlan": vxlan.TYPE,
    "vxlan-multicast": vxlan_multicast.TYPE,
    "host-gw": host_gw.TYPE,
    "ipip": ipip.TYPE,
    "bgp": bgp.TYPE,
    "mesh": mesh.TYPE,
    "eni": eni.TYPE,
}


def type_of(lab: Lab) -> OverlayType:
    """The overlay of a lab."""
    return TYPES[lab.overlay.type]


def tunnel(lab: Lab, node: Node, peer: Node, family: int) -> str:
    """The device by which a node sends to a peer's pods; "" if it is its uplink."""
    device = type_of(lab).device
    return device(lab, node, peer, family) if device else ""


def tunnels(lab: Lab, node: Node, family: int) -> tuple[str, ...]:
    """All of a node's tunnel devices of a family; each has the node's overlay address."""
    if podnet.of_family(node.pod_cidrs, family) is None or type_of(lab).device is None:
        return ()
    found = (tunnel(lab, node, peer, family) for peer in peers(lab, node, family))
    return tuple(dict.fromkeys(found))


def vni(lab: Lab, node: Node, peer: Node) -> int:
    """The VNI between two nodes; 0 where nothing has one."""
    number = type_of(lab).vni
    return number(lab, node, peer) if number else 0


def tunnel_from(lab: Lab, node_name: str, sender: str, family: int) -> tuple[str, int]:
    """The device and the VNI by which a node hears a peer, which has the address `sender`."""
    node = lab.node(node_name)
    others = [peer for peer in lab.nodes if peer is not node]
    peer = next((each for each in others if sender in each.addresses), None)
    peer = peer or next(iter(others), node)
    return tunnel(lab, node, peer, family), vni(lab, node, peer)
