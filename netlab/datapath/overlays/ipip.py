"""`ipip`: as flannel's ipip backend, which puts an IPv4 packet as it is into another (RFC 2003).

One device has no far end of its own: the gateway of a route, the peer's address on the underlay, is
where the outer packet goes.  So there is nothing to resolve, and no MAC inside
(pkg/backend/ipip/ipip.go).
"""

from __future__ import annotations

from netlab.datapath import podnet
from netlab.datapath.overlay import OverlayType, Part, PodsByNode, link_mtu, networks, of, peers
from netlab.datapath.state import Ipip, Link, Route
from netlab.topology.model import Lab, Node

DEVICE = "flannel.ipip"


def _part(lab: Lab, node: Node, pods: PodsByNode) -> Part:
    return Part(
        links=(
            Link(
                name=DEVICE,
                kind="ipip",
                mtu=link_mtu(lab, 4),
                ipip=Ipip(local=of(4, node.addresses), device="eth0"),
            ),
        ),
        addresses=podnet.link_addresses(DEVICE, "", [of(4, node.overlay_addresses)], ()),
        routes=tuple(
            Route(destination=network, link=DEVICE, via=of(4, peer.addresses), onlink=True)
            for peer in peers(lab, node, 4)
            for network in networks(peer, pods, 4)
        ),
    )


TYPE = OverlayType(part=_part, device=lambda lab, node, peer, family: DEVICE, feature="ipip")
