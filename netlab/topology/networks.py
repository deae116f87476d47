"""Nodes and the networks of a lab: what the objects give is kept, the rest is decided here.

* Pod CIDR: `spec.podCIDR`; else 10.244.0.0/16, or, if nodes have pod CIDRs outside it, the
  smallest network of at least a /16 that holds them all.
* Service CIDRs: `spec.serviceCIDR` and ServiceCIDR objects; else 10.96.0.0/12, or, for the objects
  of a cluster that has another one (its Service default/kubernetes tells), the smallest network of
  at least a /16 that holds all cluster IPs.
* Underlay: `spec.underlay.cidr`; else the smallest network of at least a /24 that holds all given
  node addresses; else 172.21.32.0/24.  The gateway is its first free address.
* A node's pod CIDR: the lowest free /24 of the pod CIDR, in the order of the nodes; the first /24
  is used last, so that node i has 10.244.(i+1).0/24.
* A node's address: the lowest free one of the underlay.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network

from netlab.topology import kubernetes as k8s
from netlab.topology import lab_document, model
from netlab.topology.addresses import address, ipv4_of, network, smallest_network
from netlab.topology.objects import Objects
from netlab.topology.places import Complaints, Origin, Path

POD_CIDR = IPv4Network("10.244.0.0/16")
SERVICE_CIDR = IPv4Network("10.96.0.0/12")
UNDERLAY = IPv4Network("172.21.32.0/24")
NODE_PREFIX = 24
BRIDGE_PORTS = 1023  # the kernel's BR_MAX_PORTS less port 0, net/bridge/br_private.h


@dataclass(slots=True)
class DraftNode:
    """A node while it is decided."""

    name: str
    labels: dict[str, str] = field(default_factory=dict)
    address: IPv4Address | None = None
    pod_cidr: IPv4Network | None = None
    origin: Origin | None = None

    @property
    def title(self) -> str:
        """As messages call it."""
        return f"Node {self.name}"


@dataclass(frozen=True, slots=True)
class Networks:
    """The networks of a lab and its nodes; a part that was wrong is missing."""

    pod_cidr: IPv4Network
    service_cidrs: tuple[IPv4Network, ...]
    underlay: model.Underlay
    nodes: list[DraftNode]


@dataclass(frozen=True, slots=True)
class _Given:
    """A network, how messages call it, and where it stands (if it stands anywhere)."""

    network: IPv4Network
    title: str
    origin: Origin | None = None
    path: Path = ()


def decide(objects: Objects, found: Complaints) -> Networks:
    """All networks and nodes of a lab."""
    nodes = [_stated_node(node.item, node.origin, found) for node in objects.nodes]
    nodes = nodes or [DraftNode("node1", {"kubernetes.io/hostname": "node1"})]
    if len(nodes) > BRIDGE_PORTS:
        message = f"there are {len(nodes)} nodes; the underlay's bridge has {BRIDGE_PORTS} ports"
        found.error("too-many-nodes", message, nodes[BRIDGE_PORTS].origin)
    pods = _pod_cidr(objects, nodes, found)
    services = _service_cidrs(objects, found)
    underlay = _underlay(objects, nodes, found)
    _check_overlaps(pods, services, underlay, nodes, found)
    if pods:
        _allocate_pod_cidrs(pods, nodes, found)
    reachable = _allocate_underlay(objects, underlay, nodes, found)
    return Networks(
        pods.network if pods else POD_CIDR,
        tuple(dict.fromkeys(each.network for each in services)),
        reachable,
        nodes,
    )


def _spec(objects: Objects) -> tuple[lab_document.LabSpec, str, Origin | None]:
    if objects.lab is None:
        return lab_document.LabSpec(), "Lab", None
    lab = objects.lab.item
    return lab.spec or lab_document.LabSpec(), f"Lab {lab.metadata.name}", objects.lab.origin


# What is given


def _stated_node(node: k8s.Node, origin: Origin, found: Complaints) -> DraftNode:
    name = node.metadata.name
    title = f"Node {name}"
    draft = DraftNode(
        name, {"kubernetes.io/hostname": name, **(node.metadata.labels or {})}, origin=origin
    )
    spec = node.spec or k8s.NodeSpec()
    cidrs: list[tuple[str, Path]] = [(spec.podCIDR or "", ("spec", "podCIDR"))]
    cidrs += [(cidr, ("spec", "podCIDRs", i)) for i, cidr in enumerate(spec.podCIDRs or ())]
    cidr = ipv4_of(cidrs, title, found, origin)
    if cidr:
        draft.pod_cidr = network(cidr[0], title, found, origin, cidr[1])
        if draft.pod_cidr and draft.pod_cidr.prefixlen > 30:
            message = f"{title}: pod CIDR {cidr[0]} holds no pod"
            hint = "a /30 is the smallest: the network, its bridge, one pod, the broadcast address"
            found.error("bad-cidr", message, origin, *cidr[1], hint=hint)
            draft.pod_cidr = None
    listed = (node.status.addresses if node.status else None) or []
    for wanted in ("InternalIP", "ExternalIP"):
        candidates: list[tuple[str, Path]] = [
            (entry.address, ("status", "addresses", i, "address"))
            for i, entry in enumerate(listed)
            if entry.type == wanted
        ]
        chosen = ipv4_of(candidates, title, found, origin)
        if chosen:
            draft.address = address(chosen[0], title, found, origin, chosen[1])
            break
    return draft


def _pod_cidr(objects: Objects, nodes: list[DraftNode], found: Complaints) -> _Given | None:
    spec, title, origin = _spec(objects)
    path: Path = ("spec", "podCIDR")
    given = [node.pod_cidr for node in nodes if node.pod_cidr]
    if spec.podCIDR is None:
        inside = all(cidr.subnet_of(POD_CIDR) for cidr in given)
        decided = POD_CIDR if inside else smallest_network(given, 16)
        return _Given(decided, f"the pod CIDR {decided}")
    cidr = network(spec.podCIDR, title, found, origin, path)
    if cidr is None:
        return None
    for node in nodes:
        if node.pod_cidr and not node.pod_cidr.subnet_of(cidr):
            found.warning(
                "outside-cidr",
                f"{node.title}: its pod CIDR {node.pod_cidr} is outside the lab's, {cidr}",
                node.origin,
                "spec",
                hint="where kube-proxy goes by clusterCIDR it takes these pods for strangers",
            )
    return _Given(cidr, f"the pod CIDR {cidr}", origin, path)


def _service_cidrs(objects: Objects, found: Complaints) -> list[_Given]:
    spec, title, origin = _spec(objects)
    stated: list[_Given] = []
    wrong = False
    if spec.serviceCIDR is not None:
        path: Path = ("spec", "serviceCIDR")
        cidr = network(spec.serviceCIDR, title, found, origin, path)
        wrong = cidr is None
        if cidr:
            stated.append(_Given(cidr, f"the Service CIDR {cidr}", origin, path))
    for each in objects.service_cidrs:
        cidrs: list[tuple[str, Path]] = [
            (text, ("spec", "cidrs", i)) for i, text in enumerate(each.item.spec.cidrs)
        ]
        chosen = ipv4_of(cidrs, each.title, found, each.origin)
        cidr = network(chosen[0], each.title, found, each.origin, chosen[1]) if chosen else None
        wrong = wrong or cidr is None
        if chosen and cidr:
            stated.append(_Given(cidr, f"the Service CIDR {cidr}", each.origin, chosen[1]))
    if stated or wrong:
        return stated
    decided = _usual_service_cidr(objects)
    return [_Given(decided, f"the Service CIDR {decided}")]


def _usual_service_cidr(objects: Objects) -> IPv4Network:
    """What a file without Service CIDR has: the default, or that of the cluster it comes from."""
    cluster_ips = []
    foreign = False
    for service in objects.services:
        spec = service.item.spec or k8s.ServiceSpec()
        try:
            cluster_ip = IPv4Network(spec.clusterIP or "")
        except ValueError:
            continue
        cluster_ips.append(cluster_ip)
        if service.title == "Service default/kubernetes":
            foreign = not cluster_ip.subnet_of(SERVICE_CIDR)
    return smallest_network(cluster_ips, 16) if foreign else SERVICE_CIDR


def _underlay(objects: Objects, nodes: list[DraftNode], found: Complaints) -> _Given | None:
    spec, title, origin = _spec(objects)
    given = [node.address for node in nodes if node.address]
    if spec.underlay and spec.underlay.cidr is not None:
        path: Path = ("spec", "underlay", "cidr")
        cidr = network(spec.underlay.cidr, title, found, origin, path)
        return _Given(cidr, f"the underlay {cidr}", origin, path) if cidr else None
    if not given:
        return _Given(UNDERLAY, f"the underlay {UNDERLAY}")
    cidr = smallest_network([IPv4Network(each) for each in given], 24)
    while not all(_is_host(each, cidr) for each in given):
        cidr = cidr.supernet()
    return _Given(cidr, f"the underlay {cidr} (it holds all node addresses)")


# What must not overlap


def _check_overlaps(
    pods: _Given | None,
    services: list[_Given],
    underlay: _Given | None,
    nodes: list[DraftNode],
    found: Complaints,
) -> None:
    others = [*services, *([underlay] if underlay else [])]
    if pods:
        _check_against(pods, others, found)
    if underlay:
        _check_against(underlay, services, found)
    given = [_of_node(node, node.pod_cidr) for node in nodes if node.pod_cidr]
    for each in given:
        if pods is None or not each.network.subnet_of(pods.network):
            _check_against(each, others, found)
    widest: _Given | None = None
    for each in sorted(given, key=lambda each: int(each.network.network_address)):
        if widest and each.network.overlaps(widest.network):
            _overlap(each, widest, found)
        if not widest or each.network.broadcast_address > widest.network.broadcast_address:
            widest = each


def _check_against(one: _Given, others: list[_Given], found: Complaints) -> None:
    for other in others:
        if one.network.overlaps(other.network):
            _overlap(one, other, found)


def _of_node(node: DraftNode, cidr: IPv4Network) -> _Given:
    title = f"the pod CIDR {cidr} of {node.title}"
    return _Given(cidr, title, node.origin, ("spec", "podCIDR"))


def _overlap(one: _Given, other: _Given, found: Complaints) -> None:
    if one.origin is None and other.origin is not None:
        one, other = other, one
    message = f"{one.title} overlaps {other.title}"
    found.error("overlapping-cidr", message, one.origin, *one.path, hint="give one of them another")


# What is decided


def _allocate_pod_cidrs(pods: _Given, nodes: list[DraftNode], found: Complaints) -> None:
    waiting = [node for node in nodes if node.pod_cidr is None]
    free = _free_pod_cidrs(pods.network, [node.pod_cidr for node in nodes if node.pod_cidr])
    for served, node in enumerate(waiting):
        node.pod_cidr = next(free, None)
        if node.pod_cidr is None:
            message = (
                f"{pods.title} has no /{NODE_PREFIX} left for {node.title}"
                f"{_and_more(len(waiting) - served - 1)}"
            )
            hint = "give the lab a wider spec.podCIDR, or the nodes smaller ones (spec.podCIDR)"
            found.error(
                "exhausted-cidr", message, pods.origin or node.origin, *pods.path, hint=hint
            )
            return


def _free_pod_cidrs(pool: IPv4Network, taken: list[IPv4Network]) -> Iterator[IPv4Network]:
    """The free /24 of a pool: from the second on, and the first one last."""
    if pool.prefixlen > NODE_PREFIX:
        return
    shift = 32 - NODE_PREFIX
    first = int(pool.network_address) >> shift
    occupied: set[int] = set()
    for each in taken:
        if each.overlaps(pool):
            last = min(int(each.broadcast_address), int(pool.broadcast_address)) >> shift
            start = max(int(each.network_address), int(pool.network_address)) >> shift
            occupied.update(range(start, last + 1))
    count = 1 << (NODE_PREFIX - pool.prefixlen)
    for index in (*range(1, count), 0):
        if first + index not in occupied:
            yield IPv4Network(((first + index) << shift, NODE_PREFIX))


def _allocate_underlay(
    objects: Objects, underlay: _Given | None, nodes: list[DraftNode], found: Complaints
) -> model.Underlay:
    spec, title, origin = _spec(objects)
    stated = spec.underlay or lab_document.UnderlaySpec()
    cidr = underlay.network if underlay else UNDERLAY
    owner: dict[IPv4Address, str] = {}
    for node in nodes:
        if node.address is None:
            continue
        where = (node.origin, "status", "addresses")
        if node.address in owner:
            message = f"{node.title}: {node.address} is already the address of "
            found.error("duplicate-address", message + owner[node.address], *where)
        elif underlay and not _is_host(node.address, cidr):
            message = f"{node.title}: its address {node.address} is no host's in {underlay.title}"
            found.error("outside-cidr", message, *where)
        owner[node.address] = node.title
    gateway = None
    if stated.gateway is not None:
        path: Path = ("spec", "underlay", "gateway")
        gateway = address(stated.gateway, title, found, origin, path)
        if gateway and gateway in owner:
            message = f"{title}: the gateway {gateway} is already the address of {owner[gateway]}"
            found.error("duplicate-address", message, origin, *path)
        elif gateway and underlay and not _is_host(gateway, cidr):
            message = f"{title}: the gateway {gateway} is no host's in {underlay.title}"
            found.error("outside-cidr", message, origin, *path)
        if gateway:
            owner[gateway] = "the gateway"
    free = (host for host in _hosts(cidr) if host not in owner)
    gateway = gateway or next(free, None)
    waiting = [node for node in nodes if node.address is None]
    for served, node in enumerate(waiting):
        node.address = next(free, None)
        if node.address is None:
            message = (
                f"the underlay {cidr} has no address left for {node.title}"
                f"{_and_more(len(waiting) - served - 1)}"
            )
            hint = "give the lab a wider spec.underlay.cidr"
            found.error("exhausted-cidr", message, node.origin, hint=hint)
            break
    if gateway is None:
        message = f"the underlay {cidr} has no address left for the gateway"
        found.error("exhausted-cidr", message, origin, hint="give the lab a wider one")
    return model.Underlay(cidr=str(cidr), gateway=str(gateway), mtu=stated.mtu or 1500)


def _is_host(host: IPv4Address, cidr: IPv4Network) -> bool:
    return host in cidr and host not in (cidr.network_address, cidr.broadcast_address)


def _hosts(cidr: IPv4Network) -> Iterator[IPv4Address]:
    first, last = int(cidr.network_address) + 1, int(cidr.broadcast_address)
    return (IPv4Address(value) for value in range(first, last))


def _and_more(count: int) -> str:
    return f" and {count} more" if count > 0 else ""
