"""A decided lab as the state of its namespaces."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from netlab.datapath import (
    docker,
    faults,
    host_ports,
    name_server,
    outside,
    own_chains,
    own_tables,
    podnet,
    programs,
)
from netlab.datapath.overlay import PodsByNode, pod_mtu
from netlab.datapath.overlays import type_of
from netlab.datapath.services.modes import mode_of
from netlab.datapath.state import (
    Address,
    LabState,
    Link,
    Namespace,
    NodeState,
    Peer,
    Process,
    Route,
    Server,
    Sysctl,
    namespace_name,
)
from netlab.datapath.stopped import without_stopped
from netlab.topology.model import Lab, Node, Pod

SWITCH = "_switch"
SWITCH_BRIDGE = "br0"


def build(lab: Lab, *, rules: bool = True, only: str | None = None) -> LabState:
    """Everything that `up` makes true for this lab; without the nodes' rules if not wanted.

    `only` names the one node whose state is wanted.
    """
    lab = faults.faulty(lab)
    pods, running = _pods_by_node(lab), _programs(lab)
    state = LabState(
        lab=lab.name,
        switch=_switch(lab),
        nodes=tuple(
            _node(lab, node, pods, rules, running.get(node.name, ()))
            for node in lab.nodes
            if only in (None, node.name)
        ),
        outside=tuple(outside.namespaces(lab)),
        servers=tuple(_servers(lab)),
        outside_processes=tuple(outside.processes(lab)),
    )
    return without_stopped(faults.with_faults(state, lab), lab)


def pod_namespace_name(lab: Lab, pod: Pod) -> str:
    """The namespace that a pod lives in: its own, or its node's with `hostNetwork`."""
    if pod.host_network:
        return namespace_name(lab.name, pod.node)
    return namespace_name(lab.name, pod.namespace, pod.name)


def _servers(lab: Lab) -> Iterator[Server]:
    """What answers in the pods, and what the service proxies of the nodes answer themselves."""
    everywhere = podnet.any_addresses(lab)
    for pod in lab.pods:
        if pod.served:
            yield Server(
                namespace=pod_namespace_name(lab, pod),
                identity=pod.name,
                node=pod.node,
                listen=pod.served,
                addresses=everywhere,
            )
    yield from outside.servers(lab)
    yield from docker.servers(lab)
    mode = mode_of(lab)
    for node in lab.nodes:
        yield from mode.servers(lab, node)


def _pods_by_node(lab: Lab) -> PodsByNode:
    found: dict[str, list[Pod]] = {node.name: [] for node in lab.nodes}
    for pod in lab.pods:
        if not pod.host_network:
            found[pod.node].append(pod)
    return {name: tuple(pods) for name, pods in found.items()}


def _switch(lab: Lab) -> Namespace:
    """The network between the nodes: a bridge that is also the way out, and knows none."""
    # With a Gateway the way out is there, and the switch is one alone, of a MAC that nobody has.
    gateways = () if lab.gateway else lab.underlay.gateways
    mac = podnet.mac_of(next(iter(gateways), lab.underlay.cidr.split("/")[0]))
    bridge = Link(name=SWITCH_BRIDGE, kind="bridge", mtu=lab.underlay.mtu, mac=mac)
    ports = (
        Link(
            name=podnet.switch_port(node),
            kind="veth",
            mtu=lab.underlay.mtu,
            master=SWITCH_BRIDGE,
            peer=Peer(namespace=namespace_name(lab.name, node.name), link="eth0"),
        )
        for node in lab.nodes
    )
    return Namespace(
        name=namespace_name(lab.name, SWITCH),
        links=(bridge, *ports, *outside.underlay_ports(lab, SWITCH_BRIDGE)),
        addresses=podnet.link_addresses(SWITCH_BRIDGE, mac, gateways, lab.underlay.cidrs),
        sysctls=(*podnet.router_sysctls(lab), *outside.frames_only(lab)),
    )


def _programs(lab: Lab) -> dict[str, tuple[Process, ...]]:
    """What runs in the pods of each node, and in the containers of its Docker."""
    found = name_server.processes(
        lab, {pod.key: pod_namespace_name(lab, pod) for pod in lab.pods if pod.name_server}
    )
    for pod in lab.pods:
        if pod.ingress_controller or any(container.runs for container in pod.containers):
            own = programs.of_pod(lab, pod, pod_namespace_name(lab, pod))
            found[pod.node] = (*found.get(pod.node, ()), *own)
    for node in lab.nodes if lab.docker_containers else ():
        found[node.name] = (*found.get(node.name, ()), *docker.processes(lab, node))
    return found


def _node(
    lab: Lab, node: Node, pods: PodsByNode, rules: bool, running: tuple[Process, ...]
) -> NodeState:
    name = namespace_name(lab.name, node.name)
    own = pods[node.name]
    overlay, mtu = type_of(lab), pod_mtu(lab)
    part = overlay.part(lab, node, pods)
    mac = podnet.mac_of(node.address)
    uplink = Link(
        name="eth0",
        kind="veth",
        mtu=lab.underlay.mtu,
        mac=mac,
        peer=Peer(namespace=namespace_name(lab.name, SWITCH), link=podnet.switch_port(node)),
    )
    pod_net = _routed(lab, node, own, mtu) if overlay.routed_pods else _bridged(lab, node, own, mtu)
    mode = mode_of(lab)
    return NodeState(
        name=node.name,
        namespace=Namespace(
            name=name,
            links=(uplink, *part.links, *pod_net.links, *docker.links(lab, node)),
            addresses=(
                *podnet.link_addresses(
                    "eth0", mac, podnet.addresses_of(lab, node), lab.underlay.cidrs
                ),
                *part.addresses,
                *pod_net.addresses,
                *docker.addresses(lab, node),
            ),
            routes=(
                *(
                    Route(
                        destination=podnet.DEFAULT_ROUTES[podnet.family_of(gateway)],
                        link="eth0",
                        via=gateway,
                    )
                    for gateway in lab.underlay.gateways
                ),
                *outside.node_routes(lab),
                *part.routes,
                *pod_net.routes,
            ),
            neighbours=part.neighbours,
            fdb=part.fdb,
            policies=part.policies,
            sysctls=(
                *podnet.node_sysctls(lab),
                *mode.sysctls(lab, node),
                *part.sysctls,
                *pod_net.sysctls,
                *host_ports.sysctls(lab, node),
            ),
            tables=own_tables.of_node(lab, node),
            chains=own_chains.of_node(lab, node),
        ),
        pods=(*pod_net.pods, *docker.namespaces(lab, node, own_chains.of_resolver(lab))),
        rules=mode.render(lab, node) if rules else None,
        processes=(*part.processes, *mode.processes(lab, node), *running),
    )


class _PodNet(NamedTuple):
    """A node's pods, and what it has for them."""

    pods: tuple[Namespace, ...]
    links: tuple[Link, ...]
    addresses: tuple[Address, ...]
    routes: tuple[Route, ...]
    sysctls: tuple[Sysctl, ...] = ()


def _bridged(lab: Lab, node: Node, pods: tuple[Pod, ...], mtu: int) -> _PodNet:
    return _PodNet(
        tuple(podnet.pod_namespace(lab, node, pod, mtu) for pod in pods),
        podnet.bridge_links(lab, node, pods, mtu),
        podnet.bridge_addresses(node),
        podnet.bridge_routes(lab, node, pods),
    )


def _routed(lab: Lab, node: Node, pods: tuple[Pod, ...], mtu: int) -> _PodNet:
    knows = type_of(lab).routed_pods == "permanent"
    return _PodNet(
        tuple(podnet.routed_pod_namespace(lab, node, pod, mtu, knows) for pod in pods),
        podnet.routed_links(lab, pods, mtu),
        (),
        podnet.routed_routes(pods),
        () if knows else tuple(podnet.routed_sysctls(pods)),
    )
