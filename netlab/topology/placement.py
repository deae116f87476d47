"""The node and the address of each pod.

* A pod whose node is not given goes to the node in whose pod CIDR its address lies; without an
  address to the node with the fewest pods, the first of equals.  The replicas of one Deployment,
  ReplicaSet or StatefulSet are spread: the node with the fewest of them first.  A DaemonSet has a
  pod on each node.  `nodeSelector` narrows the choice.
* Pods that stand in the file come first, then the replicas that its controllers lack, in order.
* A pod's address is the lowest free one of its node's pod CIDR, from the third on: the first is
  the network's (and the overlay's), the second the bridge's.  In a dual-stack lab it has one of
  each family.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from ipaddress import ip_address

from netlab.problems import suggest
from netlab.topology import kubernetes_pods as k8s
from netlab.topology import node_ports
from netlab.topology.addresses import Address, address_at, family, hosts, width
from netlab.topology.model import Family
from netlab.topology.networks import BRIDGE_PORTS, Networks
from netlab.topology.nodes import DraftNode
from netlab.topology.objects import Objects, Stated
from netlab.topology.places import Complaints, Origin, Path
from netlab.topology.pods import TEMPLATE, DraftPod, made_pods, stated_pods


def decide(objects: Objects, networks: Networks, found: Complaints) -> list[DraftPod]:
    """All pods of a lab, each with its node and addresses (none only after an error)."""
    pods = stated_pods(objects, networks.families, found)
    _Placement(networks, found).place(pods, objects)
    leaving = {ip_address(text) for pod in objects.leaving for text in pod.addresses}
    for each in networks.families:
        _warn_of_outsiders(each, pods, objects.of_cluster, found)
        _allocate_addresses(each, pods, networks.nodes, leaving, found)
    node_ports.check(pods, objects.of_cluster, found)
    return pods


class _Placement:
    """How many pods each node has, and where the next one goes."""

    def __init__(self, networks: Networks, found: Complaints) -> None:
        self._nodes = networks.nodes
        self._found = found
        self._stopped: frozenset[str] = frozenset()
        self._by_name = {node.name: node for node in self._nodes}
        self._pods: Counter[str] = Counter()
        self._links: Counter[str] = Counter()  # pods with a link of their own
        self._room = {
            node.name: min(BRIDGE_PORTS, *(_room(node, each) for each in networks.families))
            for node in self._nodes
        }
        self._ports: dict[str, list[node_ports.NodePort]] = {}  # that are taken
        self._nowhere: list[DraftPod] = []
        self._unknown: dict[str, list[tuple[str, Origin, Path]]] = {}

    def place(self, pods: list[DraftPod], objects: Objects) -> None:
        """Give each pod a node, and add those that the controllers make."""
        self._stopped = objects.stopped
        waiting = [pod for pod in pods if not self._has_node(pod)]
        owned: dict[tuple[str, str], list[DraftPod]] = {}
        for pod in pods:
            if pod.owner and not pod.terminating:
                owned.setdefault((pod.namespace, pod.owner), []).append(pod)
        for pod in waiting:
            siblings = owned.get((pod.namespace, pod.owner), ())
            self._choose(pod, Counter(each.node.name for each in siblings if each.node))
        taken: dict[str, set[str]] = {}
        for pod in pods:
            taken.setdefault(pod.namespace, set()).add(pod.name)
        for leaving in objects.leaving:
            taken.setdefault(leaving.namespace, set()).add(leaving.name)
        for controller in objects.controllers:
            owner = f"{type(controller.item).__name__}/{controller.item.metadata.name}"
            have = owned.get((controller.namespace, owner), [])
            if not _is_owned(controller):
                pods += self._replicas(
                    controller, have, taken.setdefault(controller.namespace, set())
                )
        self._complain()

    def _replicas(
        self, controller: Stated[k8s.Controller], have: list[DraftPod], taken: set[str]
    ) -> list[DraftPod]:
        """The pods that a controller lacks, each on its node."""
        if isinstance(controller.item, k8s.DaemonSet):
            return self._one_on_each(controller, have, taken)
        spec = controller.item.spec
        if (spec.replicas or 0) > BRIDGE_PORTS * len(self._nodes):
            message = f"{controller.title}: a bridge on each node has {BRIDGE_PORTS} ports"
            self._found.error("too-many-pods", message, controller.origin, "spec", "replicas")
            return []
        name = spec.template.spec.nodeName if spec.template.spec else None
        node = self._named(name, controller.title, controller.origin, TEMPLATE) if name else None
        if name and node is None:
            return []
        spread = Counter(pod.node.name for pod in have if pod.node)
        made = []
        for pod in made_pods(controller, have, taken, 0):
            if node is not None:
                self._settle(pod, node)
            else:
                self._choose(pod, spread)
            made.append(pod)
        return made

    def _named(self, name: str, title: str, origin: Origin, path: Path) -> DraftNode | None:
        """The node that a pod's spec names; complains if there is none."""
        if name not in self._by_name:
            self._unknown.setdefault(name, []).append((title, origin, path))
        return self._by_name.get(name)

    def _complain_of_unknown_nodes(self) -> None:
        for name, pods in self._unknown.items():
            near = suggest(name, list(self._by_name))
            known = ", ".join(list(self._by_name)[:5])
            hint = f'did you mean "{near}"?' if near else f"there is {known}"
            title, origin, path = pods[0]
            more = f"; pods that run there: {len(pods)}" if len(pods) > 1 else ""
            message = f'{title}: there is no Node "{name}"{more}'
            self._found.error("unknown-node", message, origin, *path, "nodeName", hint=hint)

    def _has_node(self, pod: DraftPod) -> bool:
        """Settle a pod whose node is given, by name or by its address."""
        if pod.spec.nodeName:
            node = self._named(pod.spec.nodeName, pod.title, pod.origin, pod.path)
            if node is not None:
                self._settle(pod, node)
            return True
        for each, address in pod.addresses.items():
            for node in self._nodes:
                if each in node.pod_cidrs and address in node.pod_cidrs[each]:
                    self._settle(pod, node)
                    return True
        return False

    def _settle(self, pod: DraftPod, node: DraftNode) -> None:
        pod.node = node
        self._pods[node.name] += 1
        if ports := [port for port, _ in node_ports.wanted(pod)]:
            self._ports.setdefault(node.name, []).extend(ports)
        if not pod.host_network:
            self._links[node.name] += 1

    def _choose(self, pod: DraftPod, spread: Counter[str]) -> None:
        """The node with the fewest siblings, then with the fewest pods, then the first."""
        candidates = [
            node
            for node in self._nodes
            if _selects(pod.spec.nodeSelector or {}, node.labels)
            and (pod.host_network or self._links[node.name] < self._room[node.name])
        ]
        candidates = [n for n in candidates if n.name not in self._stopped] or candidates
        # Where every node has one of its ports taken, it is complained of on the first of them.
        ports = [port for port, _ in node_ports.wanted(pod)]
        free = [node for node in candidates if ports and self._has(node, ports)]
        candidates = free or candidates
        if not candidates:
            self._nowhere.append(pod)
            return
        node = min(candidates, key=lambda node: (spread[node.name], self._pods[node.name]))
        spread[node.name] += 1
        self._settle(pod, node)

    def _has(self, node: DraftNode, ports: list[node_ports.NodePort]) -> bool:
        """Whether a node has these ports left."""
        taken = self._ports.get(node.name, ())
        return not any(port.excludes(other) for port in ports for other in taken)

    def _one_on_each(
        self, controller: Stated[k8s.Controller], have: list[DraftPod], taken: set[str]
    ) -> list[DraftPod]:
        """A DaemonSet's pods for the nodes that have none."""
        spec = controller.item.spec.template.spec or k8s.PodSpec()
        covered = {pod.node.name for pod in have if pod.node}
        bare = [
            node
            for node in self._nodes
            if node.name not in covered and _selects(spec.nodeSelector or {}, node.labels)
        ]
        made = list(made_pods(controller, (), taken, len(bare)))
        for pod, node in zip(made, bare, strict=True):
            self._settle(pod, node)
        return made

    def _complain(self) -> None:
        self._complain_of_unknown_nodes()
        for node in self._nodes:
            if self._links[node.name] > BRIDGE_PORTS:
                message = (
                    f"{node.title} has {self._links[node.name]} pods; "
                    f"its bridge has {BRIDGE_PORTS} ports"
                )
                self._found.error("too-many-pods", message, node.origin)
        full: list[DraftPod] = []
        said: set[Path] = set()
        for pod in self._nowhere:
            wanted = pod.spec.nodeSelector or {}
            if any(_selects(wanted, node.labels) for node in self._nodes):
                full.append(pod)
            elif (where := (pod.origin.document, *pod.origin.path)) not in said:
                said.add(where)
                labels = ", ".join(f"{key}={value}" for key, value in wanted.items())
                message = f"{pod.title}: no node has the labels of its nodeSelector, {labels}"
                self._found.error("no-node", message, pod.origin, *pod.path, "nodeSelector")
        if full and all(self._room.values()):
            others = f" (nor has it for {len(full) - 1} more)" if len(full) > 1 else ""
            message = f"{full[0].title}: no node has an address left in its pod CIDR{others}"
            hint = f"a /24 holds 253 pods, a bridge {BRIDGE_PORTS}; add nodes or widen spec.podCIDR"
            self._found.error("exhausted-cidr", message, full[0].origin, hint=hint)


def _is_owned(controller: Stated[k8s.Controller]) -> bool:
    """Whether it is a Deployment's ReplicaSet: the Deployment makes the pods then."""
    references = controller.item.metadata.ownerReferences or ()
    return any(each.controller and each.kind == "Deployment" for each in references)


def _selects(selector: dict[str, str], labels: dict[str, str]) -> bool:
    return all(labels.get(key) == value for key, value in selector.items())


# Addresses


def _pod_hosts(node: DraftNode, of: Family) -> range:
    """The addresses that a node's pods may have, as numbers."""
    if of not in node.pod_cidrs:
        return range(0)
    machines = hosts(node.pod_cidrs[of])
    return range(machines.start + 1, machines.stop)  # (the first is the bridge's)


def _room(node: DraftNode, of: Family) -> int:
    possible = _pod_hosts(node, of)
    return min(possible.stop - possible.start, BRIDGE_PORTS)


def _warn_of_outsiders(
    of: Family, pods: list[DraftPod], of_cluster: bool, found: Complaints
) -> None:
    """Tell which given addresses are routed one by one; of a cluster's pods how many."""
    outside = [
        pod
        for pod in pods
        if pod.node
        and of in pod.addresses
        and of in pod.node.pod_cidrs
        and pod.addresses[of] not in pod.node.pod_cidrs[of]
    ]
    if of_cluster and outside:
        first = outside[0]
        message = (
            f"{len(outside)} pods have addresses outside their nodes' pod CIDRs, such as "
            f"{first.title} ({first.addresses[of]}): each is routed to its node as a /{width(of)}"
        )
        found.warning("outside-cidr", message, first.origin, *first.paths[of])
        return
    for pod in outside:
        assert pod.node is not None
        found.warning(
            "outside-cidr",
            f"{pod.title}: its address {pod.addresses[of]} is outside {pod.node.pod_cidrs[of]}, "
            f"the pod CIDR of its node {pod.node.name}",
            pod.origin,
            *pod.paths[of],
            hint=f"it is kept, and routed to its node as a /{width(of)}",
        )


def _allocate_addresses(
    of: Family,
    pods: list[DraftPod],
    nodes: list[DraftNode],
    leaving: set[Address],
    found: Complaints,
) -> None:
    taken: dict[Address, str] = {
        node.addresses[of]: node.title for node in nodes if of in node.addresses
    }
    for node in nodes:
        if of in node.pod_cidrs:
            cidr = node.pod_cidrs[of]
            taken[cidr.network_address] = f"flannel.1 on {node.name}"
            taken[cidr.network_address + 1] = f"cbr0 on {node.name}"
            if of == "IPv4":
                taken[cidr.broadcast_address] = f"broadcasts on {node.name}"
    for pod in pods:
        given = pod.addresses.get(of)
        if given is None:
            continue
        if given in taken:
            message = f"{pod.title}: {given} is already the address of {taken[given]}"
            found.error("duplicate-address", message, pod.origin, *pod.paths[of])
        taken[given] = pod.title
    free = {node.name: _free_addresses(node, of, taken, leaving) for node in nodes}
    lacking: dict[str, list[DraftPod]] = {}
    for pod in pods:
        if pod.node is None or of in pod.addresses:
            continue
        own = None if pod.host_network else free[pod.node.name]
        chosen = next(own, None) if own else pod.node.addresses.get(of)
        if chosen is not None:
            pod.addresses[of] = chosen
        elif of in pod.node.pod_cidrs:
            lacking.setdefault(pod.node.name, []).append(pod)
    for name, without in lacking.items():
        others = f" and {len(without) - 1} more" if len(without) > 1 else ""
        message = f"the pod CIDR of Node {name} has no address left for {without[0].title}{others}"
        hint = "a /24 holds 253 pods; move some to another node or widen its spec.podCIDR"
        found.error("exhausted-cidr", message, without[0].origin, hint=hint)


def _free_addresses(
    node: DraftNode, of: Family, taken: dict[Address, str], leaving: set[Address]
) -> Iterator[Address]:
    """The free addresses of a node; those of pods that are about to leave come last."""
    possible = _pod_hosts(node, of)
    for number in possible:
        host = address_at(number, of)
        if host not in taken and host not in leaving:
            yield host
    for number in sorted(int(host) for host in leaving if family(host) == of):
        if number in possible and (host := address_at(number, of)) not in taken:
            yield host
