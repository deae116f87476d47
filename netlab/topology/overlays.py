"""`spec.overlay`: what a lab may say of it, and what must hold for each type.

The types themselves are built in `netlab.datapath.overlays`, one module each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from ipaddress import ip_address
from typing import NamedTuple

from netlab.problems import suggest
from netlab.topology import lab_document, model
from netlab.topology.addresses import Network, family, inside
from netlab.topology.model import Family
from netlab.topology.networks import Networks
from netlab.topology.nodes import DraftNode
from netlab.topology.objects import Stated
from netlab.topology.places import Complaints, Path

_LARGEST_VNI = 0xFFFFFF  # RFC 7348, 5
_LEAST_MTU: Mapping[Family, int] = {
    "IPv4": 576,  # RFC 791: what every host must take
    "IPv6": 1280,  # RFC 8200, 5: on a link with less the kernel has no IPv6
}
# Outer Ethernet, IP, UDP and VXLAN headers: 14 + 20 + 8 + 8, and 20 more for IPv6.
_VXLAN = {"IPv4": 50, "IPv6": 70}
_BOTH: tuple[Family, ...] = ("IPv4", "IPv6")


class Kind(NamedTuple):
    """A type of overlay: the bytes it puts around a packet of each family that it carries."""

    overhead: Mapping[Family, int]


KINDS: Mapping[str, Kind] = {
    "vxlan": Kind(_VXLAN),  # type: ignore[arg-type]
    "vxlan-multicast": Kind({"IPv4": 50}),
    "host-gw": Kind({"IPv4": 0, "IPv6": 0}),
    "ipip": Kind({"IPv4": 20}),  # RFC 2003: one more IPv4 header
    "bgp": Kind({"IPv4": 0}),
    "mesh": Kind({"IPv4": 50}),
    "eni": Kind({"IPv4": 0}),
}


class _Stated(NamedTuple):
    """A lab's overlay and where it stands."""

    lab: Stated[lab_document.Lab] | None
    overlay: model.Overlay
    networks: Networks
    found: Complaints

    def error(self, code: str, message: str, *path: str | int, hint: str) -> None:
        origin = self.lab.origin if self.lab else None
        title = f"Lab {self.lab.item.metadata.name}" if self.lab else "the lab"
        self.found.error(code, f"{title}: {message}", origin, *path, hint=hint)


def decide(
    lab: Stated[lab_document.Lab] | None, networks: Networks, found: Complaints
) -> model.Overlay:
    """The overlay of a lab; what is wrong with it is complained of, with its place."""
    spec = (lab.item.spec.overlay if lab and lab.item.spec else None) or lab_document.OverlaySpec()
    usual = model.Overlay()
    overlay = model.Overlay(
        type=spec.type or usual.type,
        vni=spec.vni or usual.vni,
        port=spec.port or usual.port,
        masquerade=spec.masquerade or usual.masquerade,
        group=spec.group or usual.group,
        block_size=spec.blockSize or usual.block_size,
        as_number=spec.asNumber or usual.as_number,
    )
    stated = _Stated(lab, overlay, networks, found)
    if overlay.type not in KINDS:
        near = suggest(overlay.type, list(KINDS))
        mean = f'did you mean "{near}"? ' if near else ""
        stated.error(
            "unsupported",
            f'the overlay type "{overlay.type}" is not built by this version',
            *("spec", "overlay", "type"),
            hint=f"{mean}it builds {', '.join(KINDS)}",
        )
        return overlay
    _check_families(stated)
    _check_mtu(stated)
    check = _CHECKS.get(overlay.type)
    if check:
        check(stated)
    return overlay


def _check_families(stated: _Stated) -> None:
    carried = KINDS[stated.overlay.type].overhead
    for each in stated.networks.families:
        if each not in carried:
            able = [name for name, kind in KINDS.items() if each in kind.overhead]
            stated.error(
                "overlay-family",
                f"overlay {stated.overlay.type} carries no {each}",
                *("spec", "overlay", "type"),
                hint=f"{' and '.join(able)} carry it; or leave it out of podCIDR",
            )


def _check_mtu(stated: _Stated) -> None:
    mtu = stated.networks.underlay.mtu
    carried = KINDS[stated.overlay.type].overhead
    # Pods have one link for both families, so what the larger header leaves counts.
    taken = max((carried.get(each, 0) for each in stated.networks.families), default=0)
    least = max((_LEAST_MTU[each] for each in stated.networks.families), default=0)
    if mtu - taken < least:
        families = " and ".join(stated.networks.families)
        stated.error(
            "mtu-too-small",
            f"underlay.mtu {mtu} leaves {mtu - taken} bytes to pods, and {families} needs {least}",
            *("spec", "underlay", "mtu"),
            hint=f"take {least + taken} or more",
        )


def _check_group(stated: _Stated) -> None:
    group = stated.overlay.group
    try:
        good = ip_address(group).is_multicast and ":" not in group
    except ValueError:
        good = False
    if not good:
        stated.error(
            "bad-group",
            f'overlay.group "{group}" is no IPv4 multicast address',
            *("spec", "overlay", "group"),
            hint="one of 224.0.0.0/4; 239.0.0.0/8 is for networks of one's own (RFC 2365)",
        )


def _check_pairs(stated: _Stated) -> None:
    nodes = len(stated.networks.nodes)
    last = stated.overlay.vni + nodes * (nodes - 1) // 2 - 1
    if last > _LARGEST_VNI:
        stated.error(
            "vni-out-of-range",
            f"{nodes} nodes have tunnels with VNIs from {stated.overlay.vni} to {last}, and the "
            f"largest is {_LARGEST_VNI}",
            *("spec", "overlay", "vni"),
            hint="take a smaller overlay.vni",
        )


def _check_blocks(stated: _Stated) -> None:
    """Each node announces blocks of its own, so its pod CIDR must be made of whole ones."""
    size = stated.overlay.block_size
    for node in stated.networks.nodes:
        cidr = node.pod_cidrs.get("IPv4")
        if cidr is not None and cidr.prefixlen > size:
            message = (
                f"{node.title}: its pod CIDR {cidr} is a part of a block, /{size}, of which other "
                "nodes may have the rest: it cannot be routed"
            )
            hint = f"give it a /{size} or wider, or the overlay a blockSize of {cidr.prefixlen}"
            stated.found.error("unroutable-block", message, node.origin, *_of(node), hint=hint)


def _check_in_underlay(stated: _Stated) -> None:
    """Pods' addresses are further ones of their nodes, so they are of the nodes' network."""
    underlay = {family(each): each for each in _underlays(stated.networks)}
    for node in stated.networks.nodes:
        cidr = node.pod_cidrs.get("IPv4")
        if cidr is not None and "IPv4" in underlay and not inside(cidr, underlay["IPv4"]):
            message = (
                f"{node.title}: its pod CIDR {cidr} is outside the nodes' network "
                f"{underlay['IPv4']}, which with overlay eni pods are in: it cannot be routed"
            )
            hint = "give the lab a podCIDR inside underlay.cidr"
            stated.found.error("unroutable-block", message, node.origin, *_of(node), hint=hint)
        for other in stated.networks.nodes:
            address = other.addresses.get("IPv4")
            if cidr is not None and address is not None and address in cidr:
                message = (
                    f"{other.title}: its address {address} is one of the pods' of {node.title}, "
                    f"{cidr}"
                )
                hint = "give it one outside podCIDR"
                stated.found.error("overlapping-cidr", message, other.origin, hint=hint)


def _of(node: DraftNode) -> Path:
    return node.paths.get("IPv4", ())


def _underlays(networks: Networks) -> list[Network]:
    from ipaddress import ip_network

    return [ip_network(cidr) for cidr in networks.underlay.cidrs]


_CHECKS: Mapping[str, Callable[[_Stated], None]] = {
    "vxlan-multicast": _check_group,
    "mesh": _check_pairs,
    "bgp": _check_blocks,
    "eni": _check_in_underlay,
}
