"""Where the pods of a cluster live, which need not be in their nodes' pod CIDRs.

Calico gives nodes blocks of its own, whatever their pod CIDRs are; a cloud gives pods addresses of
the nodes' network.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address, ip_network

from msgspec.structs import replace

from netlab.topology import kubernetes as k8s
from netlab.topology import kubernetes_pods as k8s_pods
from netlab.topology.addresses import (
    Address,
    Network,
    family,
    first_of,
    inside,
    last_of,
    smallest_network,
)
from netlab.topology.model import Family
from netlab.topology.objects import Objects, Stated
from netlab.topology.places import Complaints
from netlab.topology.usual import USUAL


@dataclass(frozen=True, slots=True)
class PodNetwork:
    """A pod CIDR (one for each family) that no setting names, and why it is that."""

    cidr: str
    why: str
    of_nodes: bool = False  # pods have addresses of the nodes' own network


def drop_foreign_cidrs(objects: Objects, found: Complaints) -> None:
    """Take the pod CIDRs away from nodes in whose pod CIDRs pods of other nodes live.

    Such a node's bridge would take those pods for its own.
    """
    ranges: dict[Family, list[tuple[int, int, str]]] = {}
    for node in objects.nodes:
        for cidr in _node_cidrs(node.item):
            entry = (first_of(cidr), last_of(cidr), node.item.metadata.name)
            ranges.setdefault(family(cidr), []).append(entry)
    for listed in ranges.values():
        listed.sort()
    foreign: dict[str, Address] = {}
    for address, runs_on in _pod_addresses(objects):
        listed = ranges.get("IPv4" if address.version == 4 else "IPv6", [])
        at = bisect_right(listed, (int(address), 1 << 128, "")) - 1
        if at >= 0 and int(address) <= listed[at][1] and runs_on not in ("", listed[at][2]):
            foreign.setdefault(listed[at][2], address)
    for index, node in enumerate(objects.nodes):
        stranger = foreign.get(node.item.metadata.name)
        if stranger is None or node.item.spec is None:
            continue
        cidrs = ", ".join(map(str, _node_cidrs(node.item)))
        message = (
            f"{node.title}: its bridge has another network than its pod CIDR {cidrs}, "
            f"in which pods of other nodes live ({stranger})"
        )
        found.assumption(message, node.origin, "spec")
        spec = replace(node.item.spec, podCIDR=None, podCIDRs=None)
        objects.nodes[index] = Stated(replace(node.item, spec=spec), node.origin)


def derived(objects: Objects) -> PodNetwork | None:
    """The network that pods live in, from the nodes' pod CIDRs and the pods' addresses."""
    of_nodes: dict[Family, list[Network]] = {}
    of_pods: dict[Family, list[Network]] = {}
    for node in objects.nodes:
        for cidr in _node_cidrs(node.item):
            of_nodes.setdefault(family(cidr), []).append(cidr)
    for address, _ in _pod_addresses(objects):
        alone = ip_network(address)
        of_pods.setdefault(family(alone), []).append(alone)
    chosen: list[Network] = []
    why = "it holds the nodes' pod CIDRs"
    for of in dict.fromkeys((*of_nodes, *of_pods)):
        held = _holding(of, of_nodes.get(of, []))
        if held is None or not all(inside(each, held) for each in of_pods.get(of, ())):
            held, why = _holding(of, of_pods[of]), "it holds the pods' addresses"
        if held is not None:
            chosen.append(held)
    if not chosen:
        return None
    if any(holds_nodes(cidr, objects) for cidr in chosen):
        usual = ",".join(str(USUAL[family(cidr)].pod_cidr) for cidr in chosen)
        return PodNetwork(usual, "of bridges; the pods live in the nodes' network", of_nodes=True)
    return PodNetwork(",".join(map(str, chosen)), why)


def _holding(of: Family, parts: list[Network]) -> Network | None:
    usual = USUAL[of].pod_cidr
    if not parts or all(inside(each, usual) for each in parts):
        return usual if parts else None
    return smallest_network(parts, usual.prefixlen)


def holds_nodes(cidr: Network, objects: Objects) -> bool:
    """Whether a node has an address in a network."""
    return any(
        entry.type == "InternalIP" and (ip := _address(entry.address)) and ip in cidr
        for node in objects.nodes
        for entry in (node.item.status.addresses if node.item.status else None) or ()
    )


def _node_cidrs(node: k8s.Node) -> Iterator[Network]:
    """What is no network is complained of elsewhere."""
    spec = node.spec or k8s.NodeSpec()
    for text in dict.fromkeys(filter(None, (spec.podCIDR, *(spec.podCIDRs or ())))):
        try:
            yield ip_network(text)
        except ValueError:
            continue


def _pod_addresses(objects: Objects) -> Iterator[tuple[Address, str]]:
    """Each pod's own addresses, and the node that it runs on ("" if it is not given)."""
    for pod in objects.pods:
        spec, status = pod.item.spec or k8s_pods.PodSpec(), pod.item.status or k8s_pods.PodStatus()
        if spec.hostNetwork or status.phase in ("Succeeded", "Failed"):
            continue
        texts = (status.podIP, *(each.ip for each in status.podIPs or ()))
        for text in dict.fromkeys(filter(None, texts)):
            if address := _address(text):
                yield address, spec.nodeName or ""


def _address(text: str) -> Address | None:
    try:
        return ip_address(text)
    except ValueError:
        return None
