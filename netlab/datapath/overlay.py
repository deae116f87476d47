"""How a node reaches the pods of the others, one function for each `overlay.type`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping

import msgspec

from netlab.datapath import podnet
from netlab.datapath.state import Address, FdbEntry, Link, Neighbour, Route, Vxlan
from netlab.problems import NetlabError, Problem
from netlab.topology.model import Lab, Node, Pod

# Outer Ethernet, IP, UDP and VXLAN headers: 14 + 20 + 8 + 8, and 20 more for IPv6.
VXLAN_OVERHEAD = {4: 50, 6: 70}
_DEVICES = {4: "flannel", 6: "flannel-v6"}
_LEAST_MTU = 1280  # RFC 8200, 5; on a link with less the kernel has no IPv6
_LONGEST_NAME = 15  # IFNAMSIZ of linux/if.h, less the closing zero

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
    """The node's part of the lab's overlay; NetlabError if it leaves too little for IPv6."""
    part = TYPES[lab.overlay.type](lab, node, pods)
    if podnet.has_ipv6(lab) and part.mtu < _LEAST_MTU:
        raise NetlabError(
            Problem(
                "mtu-too-small",
                f"Lab {lab.name}: underlay.mtu {lab.underlay.mtu} leaves {part.mtu} bytes to pods, "
                f"and IPv6 needs {_LEAST_MTU}",
                hint=f"take {lab.underlay.mtu - part.mtu + _LEAST_MTU} or more",
            )
        )
    return part


def vtep_mac(node: Node, family: int = 4) -> str:
    """MAC of a node's VXLAN device: random in flannel, here always the same."""
    digest = hashlib.sha1(f"{_DEVICES[family]}.1 {node.name}".encode()).digest()[:5]
    return (b"\x0e" + digest).hex(":")


def vxlan(lab: Lab, node: Node, pods: PodsByNode) -> Part:
    """As flannel's VXLAN backend: no learning; route, neighbour and FDB entry for each peer.

    Each family has a device of its own, `flannel.1` and `flannel-v6.1`, of the same VNI and port,
    and is carried by packets of its own kind (pkg/backend/vxlan/vxlan.go, vxlan_network.go).
    flannel takes 50 bytes off the MTU of both, the kernel 70 for IPv6.  Pods have one link for
    both, so the smaller one counts.
    """
    parts = [_vxlan(lab, node, pods, podnet.family_of(cidr)) for cidr in node.pod_cidrs]
    return Part(
        mtu=min(part.mtu for part in parts),
        links=tuple(link for part in parts for link in part.links),
        addresses=tuple(address for part in parts for address in part.addresses),
        routes=tuple(route for part in parts for route in part.routes),
        neighbours=tuple(neighbour for part in parts for neighbour in part.neighbours),
        fdb=tuple(entry for part in parts for entry in part.fdb),
    )


def _vxlan(lab: Lab, node: Node, pods: PodsByNode, family: int) -> Part:
    mtu = lab.underlay.mtu - VXLAN_OVERHEAD[family]
    device = vxlan_device(lab, family)
    mac = vtep_mac(node, family)
    vxlan = Vxlan(
        vni=lab.overlay.vni,
        port=lab.overlay.port,
        local=_of(family, node.addresses),
        device="eth0",
    )
    own = _of(family, node.overlay_addresses)
    neighbours: list[Neighbour] = []
    fdb: list[FdbEntry] = []
    routes: list[Route] = []
    for peer in _peers(lab, node, family):
        there, peer_mac = _of(family, peer.overlay_addresses), vtep_mac(peer, family)
        neighbours.append(Neighbour(link=device, address=there, mac=peer_mac))
        fdb.append(FdbEntry(link=device, mac=peer_mac, destination=_of(family, peer.addresses)))
        routes += (
            Route(destination=network, link=device, via=there, onlink=True)
            for network in _networks(peer, pods, family)
        )
    return Part(
        mtu=mtu,
        links=(Link(name=device, kind="vxlan", mtu=mtu, mac=mac, vxlan=vxlan),),
        addresses=podnet.link_addresses(device, mac, [own], ()),
        routes=tuple(routes),
        neighbours=tuple(neighbours),
        fdb=tuple(fdb),
    )


def vxlan_device(lab: Lab, family: int) -> str:
    """Name of the VXLAN device of a family.  Raises NetlabError if the VNI makes it too long."""
    name = f"{_DEVICES[family]}.{lab.overlay.vni}"
    if len(name) > _LONGEST_NAME:
        raise NetlabError(
            Problem(
                "device-name",
                f"Lab {lab.name}: overlay.vni {lab.overlay.vni} makes a device {name}, and Linux "
                f"has names of at most {_LONGEST_NAME} characters",
                hint="take a smaller VNI",
            )
        )
    return name


def host_gw(lab: Lab, node: Node, pods: PodsByNode) -> Part:
    """As flannel's host-gw backend: the peer itself is the gateway to its pods."""
    return Part(
        mtu=lab.underlay.mtu,
        routes=tuple(
            Route(destination=network, link="eth0", via=_of(family, peer.addresses))
            for family in map(podnet.family_of, node.pod_cidrs)
            for peer in _peers(lab, node, family)
            for network in _networks(peer, pods, family)
        ),
    )


TYPES: dict[str, Callable[[Lab, Node, PodsByNode], Part]] = {
    "vxlan": vxlan,
    "host-gw": host_gw,
}


def _of(family: int, addresses: Iterable[str]) -> str:
    """The first of a family, of which every node of a lab with that family has one."""
    return next(address for address in addresses if podnet.family_of(address) == family)


def _peers(lab: Lab, node: Node, family: int) -> Iterable[Node]:
    """The other nodes that have pods of a family."""
    for peer in lab.nodes:
        if peer.name != node.name and podnet.of_family(peer.pod_cidrs, family):
            yield peer


def _networks(peer: Node, pods: PodsByNode, family: int) -> Iterable[str]:
    yield _of(family, peer.pod_cidrs)
    for pod in pods.get(peer.name, ()):
        for address in pod.addresses:
            if podnet.family_of(address) == family and not podnet.in_cidr(address, peer):
                yield podnet.host_network(address)
