"""Containers that Docker runs on a node, beside its pods, and the networks that they are in.

* A node that has such a container has Docker's default bridge, `docker0` 172.17.0.0/16.  A
  ContainerNetwork is a bridge of its own, with the lowest network from 172.18.0.0/16 on that its
  node has free; its first address is the bridge's.
* Containers get the lowest free addresses of their network in the file's order.
* Networks are a node's own: two nodes have the same ones, and nobody else knows a way into them.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network

from netlab.problems import suggest
from netlab.topology import lab_document
from netlab.topology.addresses import address, network
from netlab.topology.containers import Containers
from netlab.topology.model import (
    Container,
    ContainerPort,
    DockerContainer,
    DockerMode,
    DockerNetwork,
    Node,
    Protocol,
    Variable,
)
from netlab.topology.networks import Networks
from netlab.topology.node_ports import NodePort, wanted
from netlab.topology.objects import Objects, Own
from netlab.topology.places import Complaints
from netlab.topology.pods import DraftPod

DEFAULT = "bridge"
DEFAULT_BRIDGE = "docker0"
_DEFAULT_CIDR = IPv4Network("172.17.0.0/16")
_POOL = [IPv4Network(f"172.{number}.0.0/16") for number in range(18, 32)]
_MODES: dict[str, DockerMode] = {"none": "none", "host": "host"}


_Stated = Own[lab_document.Container] | Own[lab_document.ContainerNetwork]


def networks(
    objects: Objects, decided: Networks, nodes: tuple[Node, ...], found: Complaints
) -> list[DockerNetwork]:
    """Docker's networks on all nodes, each node's default one first."""
    if not objects.containers and not objects.container_networks:
        return []
    users: list[_Stated] = [*objects.container_networks, *objects.containers]
    for each in users:
        _check_node(each, nodes, found)
    here = [_node(each, nodes) for each in users]
    if "IPv4" not in decided.families:
        message = f"{users[0].title}: Docker's networks are IPv4, and the lab has none of that"
        found.error("other-family", message, users[0].origin)
    made = [
        DockerNetwork(name=DEFAULT, node=node.name, cidr=str(_DEFAULT_CIDR), bridge=DEFAULT_BRIDGE)
        for node in nodes
        if node.name in here
    ]
    used: dict[str, list[IPv4Network]] = {node.name: [_DEFAULT_CIDR] for node in nodes}
    for stated in objects.container_networks:
        name, node = stated.item.metadata.name, _node(stated, nodes)
        if name in (DEFAULT, *_MODES):
            message = f'{stated.title}: "{name}" is a network that Docker has itself'
            found.error("bad-name", message, stated.origin, "metadata", "name")
        cidr = _cidr(stated, used.setdefault(node, []), decided, found)
        if cidr is not None:
            used[node].append(cidr)
            made.append(DockerNetwork(name=name, node=node, cidr=str(cidr), bridge=_bridge(stated)))
    for text in dict.fromkeys(net.cidr for net in made):
        _check_overlap(IPv4Network(text), users[0], decided, found)
    return made


def _bridge(stated: Own[lab_document.ContainerNetwork]) -> str:
    """`br-` and what stands for the first twelve digits of the network's identifier."""
    digest = hashlib.sha256(stated.item.metadata.name.encode()).hexdigest()
    return f"br-{digest[:12]}"


def _cidr(
    stated: Own[lab_document.ContainerNetwork],
    used: list[IPv4Network],
    decided: Networks,
    found: Complaints,
) -> IPv4Network | None:
    text = stated.item.spec.subnet if stated.item.spec else None
    at = ("spec", "subnet")
    if text is None:
        taken = [*used, *_of_lab(decided)]
        free = (each for each in _POOL if not any(each.overlaps(other) for other in taken))
        chosen = next(free, None)
        if chosen is None:
            message = f"{stated.title}: no network from 172.18.0.0/16 to 172.31.0.0/16 is free"
            found.error("exhausted-cidr", message, stated.origin)
        return chosen
    given = network(text, stated.title, found, stated.origin, at)
    if given is None:
        return None
    if not isinstance(given, IPv4Network) or given.prefixlen > 29:
        message = f"{stated.title}: its subnet {given} is no network of IPv4 of at least a /29"
        found.error("bad-cidr", message, stated.origin, *at)
        return None
    for other in used:
        if given.overlaps(other):
            message = f"{stated.title}: its subnet {given} overlaps with {other} of the same node"
            found.error("overlapping-cidr", message, stated.origin, *at)
    return given


def _of_lab(decided: Networks) -> list[IPv4Network]:
    texts = map(str, (*decided.pod_cidrs, *decided.service_cidrs, *decided.underlay.cidrs))
    return [IPv4Network(text) for text in texts if ":" not in text]


def _check_overlap(cidr: IPv4Network, user: _Stated, decided: Networks, found: Complaints) -> None:
    for other in _of_lab(decided):
        if cidr.overlaps(other):
            message = f"{user.title}: Docker's network {cidr} overlaps with {other} of the lab"
            found.error("overlapping-cidr", message, user.origin)


def _node(stated: _Stated, nodes: tuple[Node, ...]) -> str:
    """The node that an object is on: the first one, if it names none that there is."""
    name = stated.item.spec.node if stated.item.spec else None
    return name if name and any(node.name == name for node in nodes) else nodes[0].name


def _check_node(stated: _Stated, nodes: tuple[Node, ...], found: Complaints) -> None:
    name = stated.item.spec.node if stated.item.spec else None
    known = [node.name for node in nodes]
    if name is None or name in known:
        return
    near = suggest(name, known)
    hint = f'did you mean "{near}"?' if near else f"there is {', '.join(known[:5])}"
    message = f'{stated.title}: there is no Node "{name}"'
    found.error("unknown-node", message, stated.origin, "spec", "node", hint=hint)


def containers(
    objects: Objects,
    nets: list[DockerNetwork],
    nodes: tuple[Node, ...],
    pods: list[DraftPod],
    programs: Containers,
    found: Complaints,
) -> list[DockerContainer]:
    """The containers, each in its network with its address."""
    known = {(net.node, net.name): net for net in nets}
    taken: dict[tuple[str, str], set[IPv4Address]] = {}
    for each in objects.containers:  # what is given is kept
        _given(each, known, nodes, taken, found)
    ports = _Ports(pods, found)
    made = []
    for each in objects.containers:
        spec = each.item.spec or lab_document.ContainerSpec()
        node, name = _node(each, nodes), spec.network or DEFAULT
        mode = _MODES.get(name, "bridge")
        net = known.get((node, name))
        if mode == "bridge" and net is None:
            _complain_of_network(each, name, node, known, found)
            continue
        ports.check(each, node, mode)
        own = ""
        if net is not None:
            own = spec.address or _free(net, taken.setdefault((node, name), set()), each, found)
        made.append(
            DockerContainer(
                name=each.item.metadata.name,
                node=node,
                mode=mode,
                network=net.name if net else "",
                address=own,
                container=_container(each, spec, programs),
            )
        )
    return made


def _given(
    stated: Own[lab_document.Container],
    known: dict[tuple[str, str], DockerNetwork],
    nodes: tuple[Node, ...],
    taken: dict[tuple[str, str], set[IPv4Address]],
    found: Complaints,
) -> None:
    """Keep the address that a container asks for."""
    spec, at = stated.item.spec, ("spec", "address")
    if spec is None or spec.address is None:
        return
    key = _node(stated, nodes), spec.network or DEFAULT
    own, net = address(spec.address, stated.title, found, stated.origin, at), known.get(key)
    if net is None or not isinstance(own, IPv4Address):
        message = f"{stated.title}: an address is for a container in a network, and of IPv4"
        found.error("bad-address", message, stated.origin, *at)
        return
    cidr = IPv4Network(net.cidr)
    if own not in cidr or own in (cidr[0], cidr[1], cidr[-1]):
        message = f"{stated.title}: its address {own} is not one of {cidr} for containers"
        found.error("outside-cidr", message, stated.origin, *at)
    elif own in taken.setdefault(key, set()):
        message = f"{stated.title}: its address {own} is already another container's"
        found.error("duplicate-address", message, stated.origin, *at)
    taken.setdefault(key, set()).add(own)


def _free(
    net: DockerNetwork,
    taken: set[IPv4Address],
    stated: Own[lab_document.Container],
    found: Complaints,
) -> str:
    hosts = IPv4Network(net.cidr).hosts()
    next(hosts)  # (the bridge's)
    own = next((each for each in hosts if each not in taken), None)
    if own is None:
        message = f"{stated.title}: {net.cidr} of network {net.name} has no address left"
        found.error("exhausted-cidr", message, stated.origin)
        return net.gateway
    taken.add(own)
    return str(own)


def _complain_of_network(
    stated: Own[lab_document.Container],
    name: str,
    node: str,
    known: dict[tuple[str, str], DockerNetwork],
    found: Complaints,
) -> None:
    there = [DEFAULT, *_MODES, *(net for at, net in known if at == node and net != DEFAULT)]
    near = suggest(name, there)
    elsewhere = [at for at, net in known if net == name]
    message = f'{stated.title}: node {node} has no network "{name}"'
    hint = f'did you mean "{near}"?' if near else f"it has {', '.join(there)}"
    if elsewhere:
        hint = f"it is on node {elsewhere[0]}: a network is a node's own"
    found.error("unknown-network", message, stated.origin, "spec", "network", hint=hint)


def _container(
    stated: Own[lab_document.Container], spec: lab_document.ContainerSpec, programs: Containers
) -> Container:
    name = stated.item.metadata.name
    return Container(
        name=name,
        image=spec.image or "",
        command=tuple(spec.command or ()),
        args=tuple(spec.args or ()),
        directory=spec.workingDir or "",
        env=tuple(Variable(name=each.name, value=each.value) for each in spec.env or ()),
        ports=tuple(
            ContainerPort(
                port=port.port,
                protocol=port.protocol or "TCP",
                host_port=port.hostPort or 0,
                host_ip=port.hostIP or "",
            )
            for port in spec.ports or ()
        ),
        runs=bool(spec.command) and programs.is_run(stated.title, (spec.command or [""])[0]),
    )


class _Ports:
    """Whose the ports of nodes are, when containers publish some."""

    def __init__(self, pods: list[DraftPod], found: Complaints) -> None:
        self._found = found
        self._owners: dict[str, list[tuple[NodePort, str]]] = {}
        self._names: Counter[str] = Counter()
        for pod in pods:
            for port, _ in wanted(pod) if pod.node else ():
                assert pod.node is not None
                self._owners.setdefault(pod.node.name, []).append((port, pod.title))

    def check(self, stated: Own[lab_document.Container], node: str, mode: DockerMode) -> None:
        """Complain of a port that somebody else has on the node."""
        there = self._owners.setdefault(node, [])
        for index, (port, name) in enumerate(_on_node(stated, mode)):
            first = next((who for other, who in there if port.excludes(other)), None)
            there.append((port, stated.title))
            if first is not None:
                self._found.error(
                    "port-taken",
                    f"{stated.title}: {port.protocol} {port.number} on node {node} is already "
                    f"{first}'s",
                    stated.origin,
                    *("spec", "ports", index, name),
                    hint="take another port, or another node (spec.node)",
                )


def _on_node(
    stated: Own[lab_document.Container], mode: DockerMode
) -> Iterator[tuple[NodePort, str]]:
    spec = stated.item.spec
    for port in (spec.ports if spec else None) or ():
        protocol: Protocol = port.protocol or "TCP"
        if mode == "host":
            yield NodePort(protocol, port.port, ""), "port"
        elif port.hostPort and mode == "bridge":
            yield NodePort(protocol, port.hostPort, port.hostIP or ""), "hostPort"
