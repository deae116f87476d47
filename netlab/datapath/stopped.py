"""Nodes whose machine is off: what of them is otherwise than in a lab where all run.

The node's port on the switch and the links of its pods are down; nothing runs or answers there.
What others know of the node (routes, neighbours, tunnel ends) stays as it is.  Pure.
"""

from __future__ import annotations

from msgspec.structs import replace

from netlab.datapath.podnet import outer_link, switch_port
from netlab.datapath.state import LabState, Link, Namespace, NodeState
from netlab.topology.model import Lab


def without_stopped(state: LabState, lab: Lab) -> LabState:
    """The state of a lab while some of its nodes are stopped."""
    if not lab.stopped:
        return state
    ports = {switch_port(lab.node(name)) for name in lab.stopped}
    nodes = tuple(_off(node, lab) if node.name in lab.stopped else node for node in state.nodes)
    silent = {
        each.name
        for node in state.nodes
        if node.name in lab.stopped
        for each in (node.namespace, *node.pods)
    }
    return replace(
        state,
        switch=state.switch and _with_down(state.switch, ports),
        nodes=nodes,
        servers=tuple(each for each in state.servers if each.namespace not in silent),
    )


def _off(node: NodeState, lab: Lab) -> NodeState:
    links = {outer_link(pod) for pod in lab.pods if pod.node == node.name and not pod.host_network}
    return replace(node, namespace=_with_down(node.namespace, links), processes=())


def _with_down(namespace: Namespace, names: set[str]) -> Namespace:
    """With links down; the kernel keeps no route, no neighbour and no address of IPv6 on them."""
    return replace(
        namespace,
        links=tuple(_down(link) if link.name in names else link for link in namespace.links),
        routes=tuple(route for route in namespace.routes if route.link not in names),
        neighbours=tuple(each for each in namespace.neighbours if each.link not in names),
        addresses=tuple(
            each
            for each in namespace.addresses
            if each.link not in names or ":" not in each.address
        ),
    )


def _down(link: Link) -> Link:
    return replace(link, up=False)
