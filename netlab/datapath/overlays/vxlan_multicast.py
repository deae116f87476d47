"""`vxlan-multicast`: VXLAN as RFC 7348 has it, where nobody tells the nodes of each other.

A frame whose MAC the device does not know goes to a multicast group that all nodes are in: an ARP
request reaches every one, and each learns from what comes in where the sender is.  So there is a
route for each peer, and neither a neighbour nor an FDB entry until the first packet.
"""

from __future__ import annotations

from netlab.datapath import podnet
from netlab.datapath.overlay import (
    OverlayType,
    Part,
    PodsByNode,
    checked_name,
    link_mtu,
    of,
    vtep_mac,
)
from netlab.datapath.overlays.vxlan import routes_by
from netlab.datapath.state import Link, Vxlan
from netlab.topology.model import Lab, Node


def _device(lab: Lab) -> str:
    vni = lab.overlay.vni
    return checked_name(lab, f"vxlan.{vni}", f"overlay.vni {vni}")


def _part(lab: Lab, node: Node, pods: PodsByNode) -> Part:
    device, mac = _device(lab), vtep_mac(node)
    vxlan = Vxlan(
        vni=lab.overlay.vni,
        port=lab.overlay.port,
        local=of(4, node.addresses),
        device="eth0",
        learning=True,
        remote=lab.overlay.group,
    )
    return Part(
        links=(Link(name=device, kind="vxlan", mtu=link_mtu(lab, 4), mac=mac, vxlan=vxlan),),
        addresses=podnet.link_addresses(device, mac, [of(4, node.overlay_addresses)], ()),
        routes=tuple(routes_by(device, lab, node, pods, 4)),
    )


TYPE = OverlayType(
    part=_part,
    device=lambda lab, node, peer, family: _device(lab),
    vni=lambda lab, node, peer: lab.overlay.vni,
    feature="vxlan",
)
