"""Nodes and the networks of a lab: what the objects give is kept, the rest is decided here.

Everything is decided for each family of the lab (`families`) by itself, IPv6 in parentheses:

* Pod CIDR: `spec.podCIDR`; else 10.244.0.0/16 (fd00:10:244::/48), or, if nodes have pod CIDRs
  outside it, the smallest network of at least a /16 (/48) that holds them all.
* Service CIDRs: `spec.serviceCIDR` and ServiceCIDR objects, whose families are those that Services
  have; else 10.96.0.0/12 (fd00:10:96::/112), or, for the objects of a cluster that has another one
  (its Service default/kubernetes tells), the smallest network of at least a /16 (/112) that holds
  all cluster IPs.
* Underlay: `spec.underlay.cidr`; else the smallest network of at least a /24 (/64) that holds all
  given node addresses; else 172.21.32.0/24 (fd00:172:21:32::/64).  The gateway is its first free
  address.
* A node's pod CIDR: the lowest free /24 (/64) of the pod CIDR, in the order of the nodes; the first
  one is used last, so that node i has 10.244.(i+1).0/24 (fd00:10:244:(i+1)::/64).
* A node's address: the lowest free one of the underlay.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network
from itertools import chain

from netlab.topology import families as address_families
from netlab.topology import kubernetes as k8s
from netlab.topology import lab_document, model
from netlab.topology.addresses import (
    Address,
    Network,
    address,
    address_at,
    family,
    family_of,
    first_of,
    hosts,
    inside,
    last_of,
    network,
    network_at,
    not_of_lab,
    of_families,
    overlap,
    smallest_network,
    split,
    width,
)
from netlab.topology.model import Family
from netlab.topology.objects import Objects
from netlab.topology.places import Complaints, Origin, Path

BRIDGE_PORTS = 1023  # the kernel's BR_MAX_PORTS less port 0, net/bridge/br_private.h


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


@dataclass(slots=True)
class DraftNode:
    """A node while it is decided; `paths` tells where its pod CIDRs stand."""

    name: str
    labels: dict[str, str] = field(default_factory=dict)
    addresses: dict[Family, Address] = field(default_factory=dict)
    pod_cidrs: dict[Family, Network] = field(default_factory=dict)
    paths: dict[Family, Path] = field(default_factory=dict)
    origin: Origin | None = None

    @property
    def title(self) -> str:
        """As messages call it."""
        return f"Node {self.name}"


@dataclass(frozen=True, slots=True)
class Networks:
    """The networks of a lab and its nodes; a part that was wrong is missing."""

    families: tuple[Family, ...]
    pod_cidrs: tuple[Network, ...]
    service_cidrs: tuple[Network, ...]
    underlay: model.Underlay
    nodes: list[DraftNode]


@dataclass(frozen=True, slots=True)
class _Given:
    """A network, how messages call it, and where it stands (if it stands anywhere)."""

    network: Network
    title: str
    origin: Origin | None = None
    path: Path = ()


_Each = dict[Family, _Given]


def decide(objects: Objects, found: Complaints) -> Networks:
    """All networks and nodes of a lab."""
    families = address_families.decide(objects)
    nodes = [_stated_node(node.item, families, node.origin, found) for node in objects.nodes]
    nodes = nodes or [DraftNode("node1", {"kubernetes.io/hostname": "node1"})]
    if len(nodes) > BRIDGE_PORTS:
        message = f"there are {len(nodes)} nodes; the underlay's bridge has {BRIDGE_PORTS} ports"
        found.error("too-many-nodes", message, nodes[BRIDGE_PORTS].origin)
    pods = _pod_cidrs(objects, families, nodes, found)
    services = _service_cidrs(objects, families, found)
    underlays = _underlays(objects, families, nodes, found)
    for each in families:
        _check_overlaps(each, pods, services, underlays, nodes, found)
        if each in pods:
            _allocate_pod_cidrs(pods[each], nodes, found)
    return Networks(
        families,
        tuple(given.network for given in pods.values()),
        tuple(dict.fromkeys(given.network for given in services)),
        _allocate_underlay(objects, families, underlays, nodes, found),
        nodes,
    )


def _spec(objects: Objects) -> tuple[lab_document.LabSpec, str, Origin | None]:
    if objects.lab is None:
        return lab_document.LabSpec(), "Lab", None
    lab = objects.lab.item
    return lab.spec or lab_document.LabSpec(), f"Lab {lab.metadata.name}", objects.lab.origin


# What is given


def _stated_node(
    node: k8s.Node, families: tuple[Family, ...], origin: Origin, found: Complaints
) -> DraftNode:
    name = node.metadata.name
    draft = DraftNode(
        name, {"kubernetes.io/hostname": name, **(node.metadata.labels or {})}, origin=origin
    )
    spec = node.spec or k8s.NodeSpec()
    cidrs: list[tuple[str | None, Path]] = [(spec.podCIDR, ("spec", "podCIDR"))]
    cidrs += [(cidr, ("spec", "podCIDRs", i)) for i, cidr in enumerate(spec.podCIDRs or ())]
    for each, (text, path) in of_families(cidrs, families, draft.title, found, origin).items():
        cidr = network(text, draft.title, found, origin, path)
        if cidr and cidr.prefixlen > (longest := USUAL[each].smallest_node_prefix):
            message = f"{draft.title}: pod CIDR {text} holds no pod"
            hint = f"a /{longest} is the smallest: it has room for the network, its bridge, a pod"
            found.error("bad-cidr", message, origin, *path, hint=hint)
        elif cidr:
            draft.pod_cidrs[each] = cidr
            draft.paths[each] = path
    candidates = _node_addresses(node)
    for each, (text, path) in of_families(candidates, families, draft.title, found, origin).items():
        given = address(text, draft.title, found, origin, path)
        if given:
            draft.addresses[each] = given
    return draft


def _node_addresses(node: k8s.Node) -> list[tuple[str | None, Path]]:
    """The addresses that count: of each family the first InternalIP, else the first ExternalIP."""
    first: dict[Family, tuple[str | None, Path]] = {}
    for wanted in ("InternalIP", "ExternalIP"):
        for index, entry in enumerate((node.status.addresses if node.status else None) or ()):
            if entry.type == wanted:
                path: Path = ("status", "addresses", index, "address")
                first.setdefault(family_of(entry.address), (entry.address, path))
    return list(first.values())


def _stated_cidrs(
    text: str,
    families: tuple[Family, ...],
    what: str,
    where: tuple[str, Origin | None, Path],
    found: Complaints,
) -> tuple[_Each, bool]:
    """The networks of one of the Lab's fields, in the order of the text; whether all are right."""
    title, origin, path = where
    stated: _Each = {}
    parts = split(text, title, found, origin, path)
    for each, part in parts.items():
        if each not in families:
            not_of_lab(part, families, title, found, origin, path)
        elif cidr := network(part, title, found, origin, path):
            stated[each] = _Given(cidr, f"{what} {cidr}", origin, path)
    return stated, len(stated) == len(parts)


def _pod_cidrs(
    objects: Objects, families: tuple[Family, ...], nodes: list[DraftNode], found: Complaints
) -> _Each:
    spec, title, origin = _spec(objects)
    if spec.podCIDR is None:
        return {each: _usual_pod_cidr(each, nodes) for each in families}
    where = (title, origin, ("spec", "podCIDR"))
    stated, _ = _stated_cidrs(spec.podCIDR, families, "the pod CIDR", where, found)
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


def _usual_pod_cidr(of: Family, nodes: list[DraftNode]) -> _Given:
    usual = USUAL[of].pod_cidr
    given = [node.pod_cidrs[of] for node in nodes if of in node.pod_cidrs]
    if not all(inside(cidr, usual) for cidr in given):
        usual = smallest_network(given, usual.prefixlen)
    return _Given(usual, f"the pod CIDR {usual}")


def _service_cidrs(
    objects: Objects, families: tuple[Family, ...], found: Complaints
) -> list[_Given]:
    spec, title, origin = _spec(objects)
    stated: list[_Given] = []
    right = True
    if spec.serviceCIDR is not None:
        where = (title, origin, ("spec", "serviceCIDR"))
        cidrs, right = _stated_cidrs(spec.serviceCIDR, families, "the Service CIDR", where, found)
        stated += cidrs.values()
    for each in objects.service_cidrs:
        candidates: list[tuple[str | None, Path]] = [
            (text, ("spec", "cidrs", i)) for i, text in enumerate(each.item.spec.cidrs)
        ]
        kept = of_families(candidates, families, each.title, found, each.origin)
        for text, path in kept.values():
            cidr = network(text, each.title, found, each.origin, path)
            right = right and cidr is not None
            if cidr:
                stated.append(_Given(cidr, f"the Service CIDR {cidr}", each.origin, path))
        right = right and bool(kept)
    if stated or not right:
        return stated
    usual = (_usual_service_cidr(each, objects) for each in families)
    return [_Given(cidr, f"the Service CIDR {cidr}") for cidr in usual]


def _usual_service_cidr(of: Family, objects: Objects) -> Network:
    """What a file without Service CIDR has: the default, or that of the cluster it comes from."""
    usual = USUAL[of].service_cidr
    kind = IPv4Network if of == "IPv4" else IPv6Network
    cluster_ips: list[Network] = []
    foreign = False
    for service in objects.services:
        spec = service.item.spec or k8s.ServiceSpec()
        for text in dict.fromkeys((spec.clusterIP, *(spec.clusterIPs or ()))):
            try:
                cluster_ip = kind(text or "")
            except ValueError:
                continue
            cluster_ips.append(cluster_ip)
            if service.title == "Service default/kubernetes":
                foreign = not inside(cluster_ip, usual)
    return smallest_network(cluster_ips, USUAL[of].service_prefix) if foreign else usual


def _underlays(
    objects: Objects, families: tuple[Family, ...], nodes: list[DraftNode], found: Complaints
) -> _Each:
    spec, title, origin = _spec(objects)
    stated: _Each = {}
    wrong: set[Family] = set()
    if spec.underlay and spec.underlay.cidr is not None:
        where = (title, origin, ("spec", "underlay", "cidr"))
        stated, right = _stated_cidrs(spec.underlay.cidr, families, "the underlay", where, found)
        wrong = set() if right else set(families)
    return {
        each: stated.get(each) or _usual_underlay(each, nodes)
        for each in families
        if each in stated or each not in wrong
    }


def _usual_underlay(of: Family, nodes: list[DraftNode]) -> _Given:
    usual = USUAL[of].underlay
    given = [node.addresses[of] for node in nodes if of in node.addresses]
    if not given:
        return _Given(usual, f"the underlay {usual}")
    parts = [network_at(int(each), width(of), of) for each in given]
    cidr = smallest_network(parts, usual.prefixlen)
    while not all(int(each) in hosts(cidr) for each in given):
        cidr = cidr.supernet()
    return _Given(cidr, f"the underlay {cidr} (it holds all node addresses)")


# What must not overlap


def _check_overlaps(
    of: Family,
    pods: _Each,
    services: list[_Given],
    underlays: _Each,
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
    widest: _Given | None = None
    for each in sorted(given, key=lambda each: first_of(each.network)):
        if widest and overlap(each.network, widest.network):
            _overlap(each, widest, found)
        if not widest or last_of(each.network) > last_of(widest.network):
            widest = each


def _check_against(one: _Given, others: list[_Given], found: Complaints) -> None:
    for other in others:
        if overlap(one.network, other.network):
            _overlap(one, other, found)


def _of_node(node: DraftNode, of: Family) -> _Given:
    cidr = node.pod_cidrs[of]
    title = f"the pod CIDR {cidr} of {node.title}"
    return _Given(cidr, title, node.origin, node.paths[of])


def _overlap(one: _Given, other: _Given, found: Complaints) -> None:
    if one.origin is None and other.origin is not None:
        one, other = other, one
    message = f"{one.title} overlaps {other.title}"
    found.error("overlapping-cidr", message, one.origin, *one.path, hint="give one of them another")


# What is decided


def _allocate_pod_cidrs(pods: _Given, nodes: list[DraftNode], found: Complaints) -> None:
    of = family(pods.network)
    prefix = USUAL[of].node_prefix
    waiting = [node for node in nodes if of not in node.pod_cidrs]
    taken = [node.pod_cidrs[of] for node in nodes if of in node.pod_cidrs]
    free = _free_pod_cidrs(pods.network, prefix, taken)
    for served, node in enumerate(waiting):
        chosen = next(free, None)
        if chosen is None:
            message = (
                f"{pods.title} has no /{prefix} left for {node.title}"
                f"{_and_more(len(waiting) - served - 1)}"
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


def _allocate_underlay(
    objects: Objects,
    families: tuple[Family, ...],
    underlays: _Each,
    nodes: list[DraftNode],
    found: Complaints,
) -> model.Underlay:
    spec, title, origin = _spec(objects)
    stated = spec.underlay or lab_document.UnderlaySpec()
    path: Path = ("spec", "underlay", "gateway")
    gateways = split(stated.gateway, title, found, origin, path) if stated.gateway else {}
    for each, text in gateways.items():
        if each not in families:
            not_of_lab(text, families, title, found, origin, path)
    made: list[tuple[str, str]] = []
    for each in families:
        cidr = underlays[each].network if each in underlays else USUAL[each].underlay
        owner = _check_node_addresses(each, underlays.get(each), nodes, found)
        gateway = None
        if each in gateways:
            gateway = address(gateways[each], title, found, origin, path)
            if gateway and gateway in owner:
                message = (
                    f"{title}: the gateway {gateway} is already the address of {owner[gateway]}"
                )
                found.error("duplicate-address", message, origin, *path)
            elif gateway and each in underlays and int(gateway) not in hosts(cidr):
                message = f"{title}: the gateway {gateway} is no host's in {underlays[each].title}"
                found.error("outside-cidr", message, origin, *path)
            if gateway:
                owner[gateway] = "the gateway"
        free = (host for number in hosts(cidr) if (host := address_at(number, each)) not in owner)
        gateway = gateway or next(free, None)
        _allocate_node_addresses(cidr, free, nodes, found)
        if gateway is None:
            message = f"the underlay {cidr} has no address left for the gateway"
            found.error("exhausted-cidr", message, origin, hint="give the lab a wider one")
        made.append((str(cidr), str(gateway)))
    (cidr_text, gateway_text), *rest = made
    other_cidr, other_gateway = rest[0] if rest else ("", "")
    return model.Underlay(
        cidr=cidr_text,
        gateway=gateway_text,
        other_cidr=other_cidr,
        other_gateway=other_gateway,
        mtu=stated.mtu or 1500,
    )


def _check_node_addresses(
    of: Family, underlay: _Given | None, nodes: list[DraftNode], found: Complaints
) -> dict[Address, str]:
    """Who has which of the given addresses."""
    owner: dict[Address, str] = {}
    for node in nodes:
        given = node.addresses.get(of)
        if given is None:
            continue
        where = (node.origin, "status", "addresses")
        if given in owner:
            message = f"{node.title}: {given} is already the address of {owner[given]}"
            found.error("duplicate-address", message, *where)
        elif underlay and int(given) not in hosts(underlay.network):
            message = f"{node.title}: its address {given} is no host's in {underlay.title}"
            found.error("outside-cidr", message, *where)
        owner[given] = node.title
    return owner


def _allocate_node_addresses(
    cidr: Network, free: Iterator[Address], nodes: list[DraftNode], found: Complaints
) -> None:
    of = family(cidr)
    waiting = [node for node in nodes if of not in node.addresses]
    for served, node in enumerate(waiting):
        chosen = next(free, None)
        if chosen is None:
            message = (
                f"the underlay {cidr} has no address left for {node.title}"
                f"{_and_more(len(waiting) - served - 1)}"
            )
            hint = "give the lab a wider spec.underlay.cidr"
            found.error("exhausted-cidr", message, node.origin, hint=hint)
            break
        node.addresses[of] = chosen


def _and_more(count: int) -> str:
    return f" and {count} more" if count > 0 else ""
