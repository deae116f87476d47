"""NetworkPolicies: whom each one selects, and whom it lets through.

Selectors are decided here, so that what is built and what is predicted need no labels: a policy
names pods.  The rest follows the API: `policyTypes` left out means Ingress, and Egress if there are
egress rules; a peer with a `namespaceSelector` alone means all pods of these namespaces; an
`ipBlock` without its exceptions is the networks that remain.  Each namespace has the label
`kubernetes.io/metadata.name`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from ipaddress import ip_network

from netlab.topology import kubernetes_networking as k8s
from netlab.topology import model
from netlab.topology.addresses import Network, inside, network
from netlab.topology.objects import Objects, Stated
from netlab.topology.places import Complaints, Path
from netlab.topology.pods import DraftPod

_NAME_LABEL = "kubernetes.io/metadata.name"

_Rule = k8s.NetworkPolicyIngressRule | k8s.NetworkPolicyEgressRule


def decide(
    objects: Objects, pods: Sequence[DraftPod], found: Complaints
) -> list[model.NetworkPolicy]:
    """All policies, in the file's order."""
    if not objects.policies:
        return []
    stated = (each.item.metadata for each in objects.namespaces)
    namespaces = {metadata.name: dict(metadata.labels or {}) for metadata in stated}
    for name in {pod.namespace for pod in pods}:
        namespaces.setdefault(name, {})
    for name, labels in namespaces.items():
        labels[_NAME_LABEL] = name
    # The policies of a cluster have no say over what is in a node's own network.
    own = [pod for pod in pods if not pod.host_network]
    return [_Policy(stated, own, namespaces, found).decided() for stated in objects.policies]


def matches(selector: k8s.LabelSelector | None, labels: Mapping[str, str]) -> bool:
    """Whether a selector takes labels; one that is empty takes all."""
    if selector is None:
        return True
    if any(labels.get(key) != text for key, text in (selector.matchLabels or {}).items()):
        return False
    return all(_holds(each, labels) for each in selector.matchExpressions or ())


def _holds(requirement: k8s.LabelSelectorRequirement, labels: Mapping[str, str]) -> bool:
    there, values = labels.get(requirement.key), requirement.values or ()
    match requirement.operator:
        case "In":
            return there in values
        case "NotIn":
            return there not in values
        case "Exists":
            return there is not None
        case "DoesNotExist":
            return there is None


class _Policy:
    def __init__(
        self,
        stated: Stated[k8s.NetworkPolicy],
        pods: Sequence[DraftPod],
        namespaces: Mapping[str, Mapping[str, str]],
        found: Complaints,
    ) -> None:
        self._stated = stated
        self._pods = pods
        self._namespaces = namespaces
        self._found = found

    def decided(self) -> model.NetworkPolicy:
        stated = self._stated
        spec = stated.item.spec or k8s.NetworkPolicySpec()
        types = set(spec.policyTypes or (("Ingress", "Egress") if spec.egress else ("Ingress",)))
        selected = [
            pod.key
            for pod in self._pods
            if pod.namespace == stated.namespace and matches(spec.podSelector, pod.labels)
        ]
        return model.NetworkPolicy(
            namespace=stated.namespace,
            name=stated.item.metadata.name,
            selected=tuple(selected),
            ingress=self._rules("ingress", spec.ingress or ()) if "Ingress" in types else None,
            egress=self._rules("egress", spec.egress or ()) if "Egress" in types else None,
        )

    def _rules(self, direction: str, rules: Sequence[_Rule]) -> tuple[model.PolicyRule, ...]:
        return tuple(
            self._rule(rule, ("spec", direction, index)) for index, rule in enumerate(rules)
        )

    def _rule(self, rule: _Rule, path: Path) -> model.PolicyRule:
        inward = isinstance(rule, k8s.NetworkPolicyIngressRule)
        peers = rule.from_ if isinstance(rule, k8s.NetworkPolicyIngressRule) else rule.to
        ports = tuple(
            each
            for index, port in enumerate(rule.ports or ())
            if (each := self._ports(port, (*path, "ports", index)))
        )
        if not peers:
            return model.PolicyRule(ports=ports)
        pods: dict[str, None] = {}
        cidrs: dict[str, None] = {}
        for index, peer in enumerate(peers):
            at = (*path, "from" if inward else "to", index)
            if peer.ipBlock is not None:
                if peer.podSelector or peer.namespaceSelector:
                    self._complain("bad-peer", "has an ipBlock and a selector beside it", at)
                cidrs |= dict.fromkeys(self._block(peer.ipBlock, (*at, "ipBlock")))
            elif peer.podSelector is None and peer.namespaceSelector is None:
                hint = "podSelector, namespaceSelector or ipBlock"
                self._complain("bad-peer", "has a peer that names nobody", at, hint)
            else:
                pods |= dict.fromkeys(pod.key for pod in self._peers(peer))
        return model.PolicyRule(pods=tuple(pods), cidrs=tuple(cidrs), ports=ports)

    def _peers(self, peer: k8s.NetworkPolicyPeer) -> Iterator[DraftPod]:
        for pod in self._pods:
            if peer.namespaceSelector is None:
                near = pod.namespace == self._stated.namespace
            else:
                near = matches(peer.namespaceSelector, self._namespaces[pod.namespace])
            if near and matches(peer.podSelector, pod.labels):
                yield pod

    def _block(self, block: k8s.IPBlock, path: Path) -> Iterable[str]:
        title, origin = self._stated.title, self._stated.origin
        whole = network(block.cidr, title, self._found, origin, (*path, "cidr"))
        if whole is None:
            return ()
        rest: list[Network] = [whole]
        for index, text in enumerate(block.except_ or ()):
            at = (*path, "except", index)
            hole = network(text, title, self._found, origin, at)
            if hole is None:
                continue
            if not inside(hole, whole):
                self._complain("outside-cidr", f"excepts {hole}, which is not in {whole}", at)
            rest = [part for each in rest for part in _without(each, hole)]
        return map(str, rest)

    def _ports(self, port: k8s.NetworkPolicyPort, path: Path) -> model.Ports | None:
        protocol = port.protocol or "TCP"
        if isinstance(port.port, str):
            if port.endPort is not None:
                self._complain("bad-port", "has an endPort behind a name", (*path, "endPort"))
            return model.Ports(protocol=protocol, name=port.port)
        if port.port is None:
            if port.endPort is not None:
                self._complain("bad-port", "has an endPort and no port", (*path, "endPort"))
            return model.Ports(protocol=protocol)
        last = port.port if port.endPort is None else port.endPort
        if last < port.port:
            words = f"has an endPort {last} before its port {port.port}"
            self._complain("bad-port", words, (*path, "endPort"))
            return None
        return model.Ports(protocol=protocol, first=port.port, last=last)

    def _complain(self, code: str, words: str, path: Path, hint: str | None = None) -> None:
        stated = self._stated
        self._found.error(code, f"{stated.title} {words}", stated.origin, *path, hint=hint)


def _without(whole: Network, hole: Network) -> Iterable[Network]:
    """What remains of a network."""
    if whole.version != hole.version or not whole.overlaps(hole):
        return (whole,)
    if inside(whole, hole):
        return ()
    return (ip_network(str(each)) for each in whole.address_exclude(hole))  # type: ignore[arg-type]
