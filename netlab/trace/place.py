"""Where a trace can watch: the network namespaces of a lab."""

from __future__ import annotations

from typing import Literal

import msgspec

from netlab.datapath.docker_names import container_namespace
from netlab.datapath.outside_names import (
    balancer_namespace,
    gateway_namespace,
    host_namespace,
    internet_namespace,
)
from netlab.datapath.overlays import type_of
from netlab.datapath.state import namespace_name
from netlab.topology.model import DockerContainer, Host, Lab, LoadBalancer, Node, Pod


class Place(msgspec.Struct, frozen=True):
    """A network namespace of the lab; `name` is `namespace/name` of a pod, or the node's name."""

    namespace: str  # file under /run/netns
    kind: Literal["pod", "node", "host", "container", "gateway", "balancer", "switch"]
    name: str
    node: str | None
    addresses: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.kind == "switch":
            which = "underlay" if self.name == "_switch" else "internet"
            return f"the {which} switch"
        if self.kind == "balancer":
            return f"load balancer {self.name}"
        return "the internet gateway" if self.kind == "gateway" else f"{self.kind} {self.name}"


def place_of_node(lab: Lab, node: Node) -> Place:
    """The namespace of a node."""
    overlay = type_of(lab)
    # Without a tunnel there is no end of one, and routed pods have no bridge.
    tunnel = node.overlay_addresses if overlay.device else ()
    bridge = () if overlay.routed_pods else node.bridge_addresses
    dockers = (net.gateway for net in lab.docker_networks if net.node == node.name)
    addresses = (*node.addresses, *bridge, *tunnel, *dockers)
    return Place(namespace_name(lab.name, node.name), "node", node.name, node.name, addresses)


def place_of_pod(lab: Lab, pod: Pod) -> Place:
    """The namespace of a pod: its node's if it is on the host network."""
    if pod.host_network:
        return place_of_node(lab, lab.node(pod.node))
    name = namespace_name(lab.name, pod.namespace, pod.name)
    return Place(name, "pod", pod.key, pod.node, pod.addresses)


def place_of_container(lab: Lab, container: DockerContainer) -> Place:
    """The namespace of a container of Docker's: its node's with mode host."""
    if container.mode == "host":
        return place_of_node(lab, lab.node(container.node))
    name = container_namespace(lab, container)
    return Place(name, "container", container.name, container.node, container.addresses)


def place_of_switch(lab: Lab) -> Place:
    """The namespace of the underlay's switch, which is its gateway where nothing else is."""
    name = namespace_name(lab.name, "_switch")
    addresses = () if lab.gateway else lab.underlay.gateways
    return Place(name, "switch", "_switch", None, addresses)


def place_of_host(lab: Lab, host: Host) -> Place:
    """The namespace of a host."""
    return Place(host_namespace(lab, host), "host", host.name, None, host.addresses)


def place_of_gateway(lab: Lab) -> Place:
    """The namespace of the gateway to the internet."""
    assert lab.gateway
    addresses = (*lab.underlay.gateways, *lab.gateway.addresses)
    return Place(gateway_namespace(lab), "gateway", lab.gateway.name, None, addresses)


def place_of_balancer(lab: Lab, box: LoadBalancer) -> Place:
    """The namespace of a load balancer."""
    return Place(balancer_namespace(lab, box), "balancer", box.name, None, box.addresses)


def place_of_internet(lab: Lab) -> Place:
    """The namespace of the internet's switch."""
    return Place(internet_namespace(lab), "switch", "_internet", None, ())
