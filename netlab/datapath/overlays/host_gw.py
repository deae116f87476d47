"""`host-gw`: as flannel's host-gw backend, where the peer itself is the gateway to its pods."""

from __future__ import annotations

from netlab.datapath import podnet
from netlab.datapath.overlay import OverlayType, Part, PodsByNode, networks, of, peers
from netlab.datapath.state import Route
from netlab.topology.model import Lab, Node


def _part(lab: Lab, node: Node, pods: PodsByNode) -> Part:
    return Part(
        routes=tuple(
            Route(destination=network, link="eth0", via=of(family, peer.addresses))
            for family in map(podnet.family_of, node.pod_cidrs)
            for peer in peers(lab, node, family)
            for network in networks(peer, pods, family)
        ),
    )


TYPE = OverlayType(part=_part)
