"""The interface of an overlay: what each `overlay.type` says of how nodes reach others' pods.

Each type is one module of `netlab.datapath.overlays`, which defines one :class:`OverlayType`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import msgspec

from netlab.datapath import podnet
from netlab.datapath.state import (
    Address,
    FdbEntry,
    Link,
    Neighbour,
    Policy,
    Process,
    Route,
    Sysctl,
)
from netlab.problems import NetlabError, Problem
from netlab.topology.model import Lab, Node, Pod
from netlab.topology.overlays import KINDS

_LONGEST_NAME = 15  # IFNAMSIZ of linux/if.h, less the closing zero

PodsByNode = Mapping[str, tuple[Pod, ...]]


class Part(msgspec.Struct, frozen=True):
    """What an overlay adds to a node's namespace."""

    links: tuple[Link, ...] = ()
    addresses: tuple[Address, ...] = ()
    routes: tuple[Route, ...] = ()
    policies: tuple[Policy, ...] = ()
    neighbours: tuple[Neighbour, ...] = ()
    fdb: tuple[FdbEntry, ...] = ()
    sysctls: tuple[Sysctl, ...] = ()
    processes: tuple[Process, ...] = ()


class OverlayType(msgspec.Struct, frozen=True):
    """One `overlay.type`."""

    part: Callable[[Lab, Node, PodsByNode], Part]
    # The device by which a node sends to a peer's pods, by family; None where there is no tunnel.
    device: Callable[[Lab, Node, Node, int], str] | None = None
    # The VNI that a node and its peer speak with; None where nothing has one.
    vni: Callable[[Lab, Node, Node], int] | None = None
    # Pods have links of their own into their node's routing, instead of ports of cbr0; whose MAC is
    # at the other end is told them for good ("permanent") or when they ask ("proxy").
    routed_pods: Literal["permanent", "proxy"] | None = None
    feature: str = ""  # what the kernel must have, by its name in `kernel.features`
    programs: tuple[tuple[str, str], ...] = ()  # what must be installed: program, Debian package


def pod_mtu(lab: Lab) -> int:
    """Bytes of an IP packet that the overlay leaves to pods, which have one link for all families.

    RFC 7348 for VXLAN; flannel takes 50 bytes off for both families, the kernel 70 for IPv6.
    """
    overhead = KINDS[lab.overlay.type].overhead
    taken = max(overhead["IPv6" if ":" in cidr else "IPv4"] for cidr in lab.pod_cidrs)
    return lab.underlay.mtu - taken


def link_mtu(lab: Lab, family: int) -> int:
    """The same of a tunnel that carries one family."""
    return lab.underlay.mtu - KINDS[lab.overlay.type].overhead["IPv6" if family == 6 else "IPv4"]


def vtep_mac(node: Node, family: int = 4) -> str:
    """MAC of a node's VXLAN devices: random in flannel, here always the same."""
    device = "flannel-v6" if family == 6 else "flannel"
    digest = hashlib.sha1(f"{device}.1 {node.name}".encode()).digest()[:5]
    return (b"\x0e" + digest).hex(":")


def checked_name(lab: Lab, name: str, why: str) -> str:
    """A device's name.  Raises NetlabError if it is too long for one."""
    if len(name) > _LONGEST_NAME:
        raise NetlabError(
            Problem(
                "device-name",
                f"Lab {lab.name}: {why} makes a device {name}, and Linux has names of at most "
                f"{_LONGEST_NAME} characters",
                hint="take a smaller VNI",
            )
        )
    return name


def of(family: int, addresses: Iterable[str]) -> str:
    """The first of a family, of which every node of a lab with that family has one."""
    return next(address for address in addresses if podnet.family_of(address) == family)


def peers(lab: Lab, node: Node, family: int) -> Iterable[Node]:
    """The other nodes that have pods of a family."""
    for peer in lab.nodes:
        if peer.name != node.name and podnet.of_family(peer.pod_cidrs, family):
            yield peer


def networks(peer: Node, pods: PodsByNode, family: int) -> Iterable[str]:
    """A node's pod CIDR, and each address of its pods outside it."""
    yield of(family, peer.pod_cidrs)
    yield from strays(peer, pods, family)


def strays(peer: Node, pods: PodsByNode, family: int) -> Iterable[str]:
    """Addresses of a node's pods that are not of its CIDR, as networks."""
    for pod in pods.get(peer.name, ()):
        for address in pod.addresses:
            if podnet.family_of(address) == family and not podnet.in_cidr(address, peer):
                yield podnet.host_network(address)
