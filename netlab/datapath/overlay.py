"""How a node reaches the pods of the others, one function for each `overlay.type`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping

import msgspec

from netlab.datapath.podnet import in_cidr
from netlab.datapath.state import Address, FdbEntry, Link, Neighbour, Route, Vxlan
from netlab.topology.model import Lab, Node, Pod

# Outer Ethernet, IPv4, UDP and VXLAN headers: 14 + 20 + 8 + 8.
VXLAN_OVERHEAD = 50

PodsByNode = Mapping[str, tuple[Pod, ...]]


class Part(msgspec.Struct, frozen=True):
    """What an overlay adds to a node's namespace, and the MTU that it leaves to pods."""

    mtu: int
    links: tuple[Link, ...] = ()
    addresses: tuple[Address, ...] = ()
    routes: tuple[Route, ...] = ()
    neighbours: tuple[Neighbour, ...] = ()
    fdb: tuple[FdbEntry, ...] = ()


def overlay(lab: Lab, node: Node, pods: PodsByNode) -> Part:
    """The node's part of the lab's overlay."""
    return TYPES[lab.overlay.type](lab, node, pods)


def vtep_mac(node: Node) -> str:
    """MAC of a node's `flannel.1`: random in flannel, here always the same."""
    digest = hashlib.sha1(f"flannel.1 {node.name}".encode()).digest()[:5]
    return (b"\x0e" + digest).hex(":")


def vxlan(lab: Lab, node: Node, pods: PodsByNode) -> Part:
    """As flannel's VXLAN backend: no learning; route, neighbour and FDB entry for each peer."""
    mtu = lab.underlay.mtu - VXLAN_OVERHEAD
    device = f"flannel.{lab.overlay.vni}"
    peers = [peer for peer in lab.nodes if peer.name != node.name]
    return Part(
        mtu=mtu,
        links=(
            Link(
                name=device,
                kind="vxlan",
                mtu=mtu,
                mac=vtep_mac(node),
                vxlan=Vxlan(
                    vni=lab.overlay.vni,
                    port=lab.overlay.port,
                    local=node.address,
                    device="eth0",
                ),
            ),
        ),
        addresses=(Address(link=device, address=f"{node.overlay_address}/32"),),
        neighbours=tuple(
            Neighbour(link=device, address=peer.overlay_address, mac=vtep_mac(peer))
            for peer in peers
        ),
        fdb=tuple(
            FdbEntry(link=device, mac=vtep_mac(peer), destination=peer.address) for peer in peers
        ),
        routes=tuple(
            Route(destination=network, link=device, via=peer.overlay_address, onlink=True)
            for peer in peers
            for network in _networks(peer, pods)
        ),
    )


def host_gw(lab: Lab, node: Node, pods: PodsByNode) -> Part:
    """As flannel's host-gw backend: the peer itself is the gateway to its pods."""
    return Part(
        mtu=lab.underlay.mtu,
        routes=tuple(
            Route(destination=network, link="eth0", via=peer.address)
            for peer in lab.nodes
            if peer.name != node.name
            for network in _networks(peer, pods)
        ),
    )


TYPES: dict[str, Callable[[Lab, Node, PodsByNode], Part]] = {
    "vxlan": vxlan,
    "host-gw": host_gw,
}


def _networks(peer: Node, pods: PodsByNode) -> Iterable[str]:
    yield peer.pod_cidr
    for pod in pods.get(peer.name, ()):
        if not pod.host_network and not in_cidr(pod, peer):
            yield f"{pod.address}/32"
