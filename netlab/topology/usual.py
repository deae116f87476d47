"""The networks that a lab has if nothing says otherwise, and those that its Lab object states."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network

from netlab.topology import lab_document
from netlab.topology.addresses import Network, left_out, network, not_of_lab, split
from netlab.topology.model import Family
from netlab.topology.objects import Objects
from netlab.topology.places import Complaints, Origin, Path


@dataclass(frozen=True, slots=True)
class Usual:
    """The networks of a family that a lab has if nothing says otherwise."""

    pod_cidr: Network
    service_cidr: Network
    underlay: Network
    node_prefix: int  # length of a node's pod CIDR, kube-controller-manager's default
    smallest_node_prefix: int  # with room for the overlay, the bridge and a pod
    service_prefix: int  # the longest that a Service CIDR has which is found from cluster IPs


USUAL: dict[Family, Usual] = {
    "IPv4": Usual(
        pod_cidr=IPv4Network("10.244.0.0/16"),
        service_cidr=IPv4Network("10.96.0.0/12"),
        underlay=IPv4Network("172.21.32.0/24"),
        node_prefix=24,
        smallest_node_prefix=30,
        service_prefix=16,
    ),
    "IPv6": Usual(
        pod_cidr=IPv6Network("fd00:10:244::/48"),
        service_cidr=IPv6Network("fd00:10:96::/112"),
        underlay=IPv6Network("fd00:172:21:32::/64"),
        node_prefix=64,
        smallest_node_prefix=126,
        service_prefix=112,
    ),
}


@dataclass(frozen=True, slots=True)
class Given:
    """A network, how messages call it, and where it stands (if it stands anywhere)."""

    network: Network
    title: str
    origin: Origin | None = None
    path: Path = ()


Each = dict[Family, Given]
"""A network for each family; one that was wrong is missing."""


def spec_of(objects: Objects) -> tuple[lab_document.LabSpec, str, Origin | None]:
    """The Lab's spec, how messages call the Lab, and where it stands."""
    if objects.lab is None:
        return lab_document.LabSpec(), "Lab", None
    lab = objects.lab.item
    return lab.spec or lab_document.LabSpec(), f"Lab {lab.metadata.name}", objects.lab.origin


def stated_cidrs(
    text: str,
    families: tuple[Family, ...],
    what: str,
    where: tuple[str, Origin | None, Path],
    found: Complaints,
) -> tuple[Each, bool]:
    """The networks of one of the Lab's fields, in the order of the text; whether all are right."""
    title, origin, path = where
    stated: Each = {}
    parts = split(text, title, found, origin, path)
    kept = {each: part for each, part in parts.items() if each in families}
    for each, part in parts.items():
        if each not in kept:
            complain = left_out if kept else not_of_lab
            complain(part, families, title, found, origin, path)
        elif cidr := network(part, title, found, origin, path):
            stated[each] = Given(cidr, f"{what} {cidr}", origin, path)
    return stated, bool(kept) and len(stated) == len(kept)


def and_more(count: int) -> str:
    """How a message ends that stands for more than one thing."""
    return f" and {count} more" if count > 0 else ""
