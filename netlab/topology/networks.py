"""Nodes and the networks of a lab: what the objects give is kept, the rest is decided here.

Everything is decided for each family of the lab (`families`) by itself, IPv6 in parentheses:

* Pod CIDR: `spec.podCIDR`; else 10.244.0.0/16 (fd00:10:244::/48), or, if nodes have pod CIDRs
  outside it, the smallest network of at least a /16 (/48) that holds them all.
* Service CIDRs: `spec.serviceCIDR` and ServiceCIDR objects, whose families are those that Services
  have; else 10.96.0.0/12 (fd00:10:96::/112), or, for the objects of a cluster that has another one
  (its cluster IPs tell, or its Service default/kubernetes in a file of one's own), the smallest
  network of at least a /16 (/112) that holds all cluster IPs.
* A node's pod CIDR: the lowest free /24 (/64) of the pod CIDR, in the order of the nodes; the first
  one is used last, so that node i has 10.244.(i+1).0/24 (fd00:10:244:(i+1)::/64).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address
from itertools import chain

from netlab.topology import families as address_families
from netlab.topology import kubernetes as k8s
from netlab.topology import model
from netlab.topology.addresses import (
    Network,
    family,
    family_of,
    first_of,
    inside,
    last_of,
    network,
    network_at,
    not_of_lab,
    of_families,
    overlap,
    smallest_network,
    width,
)
from netlab.topology.model import Family
from netlab.topology.nodes import DraftNode, stated_node
from netlab.topology.objects import Objects
from netlab.topology.places import Complaints, Path
from netlab.topology.underlay import allocate_underlay, stated_underlays
from netlab.topology.usual import USUAL, Each, Given, and_more, spec_of, stated_cidrs

BRIDGE_PORTS = 1023  # the kernel's BR_MAX_PORTS less port 0, net/bridge/br_private.h


@dataclass(frozen=True, slots=True)
class Networks:
    """The networks of a lab and its nodes; a part that was wrong is missing."""

    families: tuple[Family, ...]
    pod_cidrs: tuple[Network, ...]
    service_cidrs: tuple[Network, ...]
    underlay: model.Underlay
    nodes: list[DraftNode]


def decide(objects: Objects, found: Complaints) -> Networks:
    """All networks and nodes of a lab."""
    families = address_families.decide(objects)
    nodes = [stated_node(node.item, families, node.origin, found) for node in objects.nodes]
    nodes = nodes or [DraftNode("node1", {"kubernetes.io/hostname": "node1"})]
    if len(nodes) > BRIDGE_PORTS:
        message = f"there are {len(nodes)} nodes; the underlay's bridge has {BRIDGE_PORTS} ports"
        found.error("too-many-nodes", message, nodes[BRIDGE_PORTS].origin)
    pods = _pod_cidrs(objects, families, nodes, found)
    services = _service_cidrs(objects, families, found)
    underlays = stated_underlays(objects, families, nodes, found)
    apart = underlays
    overlay = spec_of(objects)[0].overlay
    if overlay and overlay.type == "eni":
        apart = {}  # there pods have addresses of the nodes' network
    for each in families:
        _check_overlaps(each, pods, services, apart, nodes, found)
        if each in pods:
            lacking = any(each not in node.pod_cidrs for node in nodes)
            used = _used_by_pods(objects, each) if lacking and objects.of_cluster else []
            _allocate_pod_cidrs(pods[each], nodes, used, found)
    return Networks(
        families,
        tuple(given.network for given in pods.values()),
        tuple(dict.fromkeys(given.network for given in services)),
        allocate_underlay(objects, families, underlays, nodes, found),
        nodes,
    )


# What is given


def _pod_cidrs(
    objects: Objects, families: tuple[Family, ...], nodes: list[DraftNode], found: Complaints
) -> Each:
    spec, title, origin = spec_of(objects)
    if spec.podCIDR is None:
        return {each: _usual_pod_cidr(each, nodes) for each in families}
    where = (title, origin, ("spec", "podCIDR"))
    stated, _ = stated_cidrs(spec.podCIDR, families, "the pod CIDR", where, found)
    for node in nodes:
        for each, cidr in node.pod_cidrs.items():
            if each in stated and not inside(cidr, stated[each].network):
                found.warning(
                    "outside-cidr",
                    f"{node.title}: its pod CIDR {cidr} is outside the lab's, "
                    f"{stated[each].network}",
                    node.origin,
                    "spec",
                    hint="where kube-proxy goes by clusterCIDR it takes these pods for strangers",
                )
    return stated


def _usual_pod_cidr(of: Family, nodes: list[DraftNode]) -> Given:
    usual = USUAL[of].pod_cidr
    given = [node.pod_cidrs[of] for node in nodes if of in node.pod_cidrs]
    if not all(inside(cidr, usual) for cidr in given):
        usual = smallest_network(given, usual.prefixlen)
    return Given(usual, f"the pod CIDR {usual}")


def _service_cidrs(
    objects: Objects, families: tuple[Family, ...], found: Complaints
) -> list[Given]:
    """Those of a family that the lab lacks too, behind the others: kube-proxy heeds them."""
    spec, title, origin = spec_of(objects)
    every = tuple(dict.fromkeys((*families, *USUAL)))
    stated: list[tuple[str, Given]] = []  # with the title of who states it
    right = True
    if spec.serviceCIDR is not None:
        where = (title, origin, ("spec", "serviceCIDR"))
        cidrs, right = stated_cidrs(spec.serviceCIDR, every, "the Service CIDR", where, found)
        stated += [(title, given) for given in cidrs.values()]
    for each in objects.service_cidrs:
        candidates: list[tuple[str | None, Path]] = [
            (text, ("spec", "cidrs", i)) for i, text in enumerate(each.item.spec.cidrs)
        ]
        kept = of_families(candidates, every, each.title, found, each.origin)
        for text, path in kept.values():
            cidr = network(text, each.title, found, each.origin, path)
            right = right and cidr is not None
            if cidr:
                given = Given(cidr, f"the Service CIDR {cidr}", each.origin, path)
                stated.append((each.title, given))
    ours = [given for _, given in stated if family(given.network) in families]
    if right and stated and not ours:
        title, given = stated[0]
        not_of_lab(str(given.network), families, title, found, given.origin, given.path)
    if stated or not right:
        return ours + [given for _, given in stated if family(given.network) not in families]
    usual = (_usual_service_cidr(each, objects) for each in families)
    return [Given(cidr, f"the Service CIDR {cidr}") for cidr in usual]


def _usual_service_cidr(of: Family, objects: Objects) -> Network:
    """What a file without Service CIDR has: the default, or that of the cluster it comes from."""
    usual = USUAL[of].service_cidr
    kind = IPv4Network if of == "IPv4" else IPv6Network
    cluster_ips: list[Network] = []
    foreign, of_cluster = False, objects.of_cluster
    for service in objects.services:
        spec = service.item.spec or k8s.ServiceSpec()
        for text in dict.fromkeys((spec.clusterIP, *(spec.clusterIPs or ()))):
            try:
                cluster_ip = kind(text or "")
            except ValueError:
                continue
            cluster_ips.append(cluster_ip)
            if of_cluster or service.title == "Service default/kubernetes":
                foreign = foreign or not inside(cluster_ip, usual)
    return smallest_network(cluster_ips, USUAL[of].service_prefix) if foreign else usual


# What must not overlap


def _check_overlaps(
    of: Family,
    pods: Each,
    services: list[Given],
    underlays: Each,
    nodes: list[DraftNode],
    found: Complaints,
) -> None:
    others = [*services, *([underlays[of]] if of in underlays else [])]
    if of in pods:
        _check_against(pods[of], others, found)
    if of in underlays:
        _check_against(underlays[of], services, found)
    given = [_of_node(node, of) for node in nodes if of in node.pod_cidrs]
    for each in given:
        if of not in pods or not inside(each.network, pods[of].network):
            _check_against(each, others, found)
    widest: Given | None = None
    for each in sorted(given, key=lambda each: first_of(each.network)):
        if widest and overlap(each.network, widest.network):
            _overlap(each, widest, found)
        if not widest or last_of(each.network) > last_of(widest.network):
            widest = each


def _check_against(one: Given, others: list[Given], found: Complaints) -> None:
    for other in others:
        if overlap(one.network, other.network):
            _overlap(one, other, found)


def _of_node(node: DraftNode, of: Family) -> Given:
    cidr = node.pod_cidrs[of]
    title = f"the pod CIDR {cidr} of {node.title}"
    return Given(cidr, title, node.origin, node.paths[of])


def _overlap(one: Given, other: Given, found: Complaints) -> None:
    if one.origin is None and other.origin is not None:
        one, other = other, one
    message = f"{one.title} overlaps {other.title}"
    found.error("overlapping-cidr", message, one.origin, *one.path, hint="give one of them another")


# What is decided


def _used_by_pods(objects: Objects, of: Family) -> list[Network]:
    """Networks of a node's size in which pods have addresses, whatever node they are on."""
    prefix = USUAL[of].node_prefix
    networks: dict[Network, None] = {}
    for text in address_families.pod_addresses(objects):
        with contextlib.suppress(ValueError):
            if family_of(text) == of:
                networks[network_at(int(ip_address(text)), prefix, of)] = None
    return list(networks)


def _allocate_pod_cidrs(
    pods: Given, nodes: list[DraftNode], used: list[Network], found: Complaints
) -> None:
    of = family(pods.network)
    prefix = USUAL[of].node_prefix
    waiting = [node for node in nodes if of not in node.pod_cidrs]
    taken = [*used, *(node.pod_cidrs[of] for node in nodes if of in node.pod_cidrs)]
    free = _free_pod_cidrs(pods.network, prefix, taken)
    for served, node in enumerate(waiting):
        chosen = next(free, None)
        if chosen is None:
            message = (
                f"{pods.title} has no /{prefix} left for {node.title}"
                f"{and_more(len(waiting) - served - 1)}"
            )
            hint = "give the lab a wider spec.podCIDR, or the nodes smaller ones (spec.podCIDR)"
            found.error(
                "exhausted-cidr", message, pods.origin or node.origin, *pods.path, hint=hint
            )
            return
        node.pod_cidrs[of] = chosen


def _free_pod_cidrs(pool: Network, prefix: int, taken: list[Network]) -> Iterator[Network]:
    """The free networks of a pool with that prefix length: from the second on, the first last."""
    if pool.prefixlen > prefix:
        return
    of = family(pool)
    shift = width(of) - prefix
    occupied = sorted(
        (first_of(each) >> shift, last_of(each) >> shift) for each in taken if overlap(each, pool)
    )
    first, last = first_of(pool) >> shift, last_of(pool) >> shift
    for number in chain(_gaps(occupied, first + 1, last), _gaps(occupied, first, first)):
        yield network_at(number << shift, prefix, of)


def _gaps(occupied: Sequence[tuple[int, int]], first: int, last: int) -> Iterator[int]:
    """The numbers from `first` to `last` that no range holds; `occupied` are sorted ranges."""
    for start, end in occupied:
        yield from range(first, min(start, last + 1))
        first = max(first, end + 1)
    yield from range(first, last + 1)
