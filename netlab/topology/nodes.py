"""Nodes as the file gives them; what they lack is decided in `networks` and `underlay`."""

from __future__ import annotations

from dataclasses import dataclass, field

from netlab.topology import kubernetes as k8s
from netlab.topology.addresses import Address, Network, address, family_of, network, of_families
from netlab.topology.model import Family
from netlab.topology.places import Complaints, Origin, Path
from netlab.topology.usual import USUAL


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


def stated_node(
    node: k8s.Node, families: tuple[Family, ...], origin: Origin, found: Complaints
) -> DraftNode:
    """What a Node of the file gives."""
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
