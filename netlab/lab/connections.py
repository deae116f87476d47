"""Connections of a lab's nodes, once their rules have changed."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Container

from netlab.datapath.services.conntrack import UdpServices, is_cleaning_due
from netlab.datapath.state import LabState, namespace_name
from netlab.kernel import conntrack
from netlab.kernel.listeners import destroy_connections
from netlab.problems import NetlabError
from netlab.topology.model import Lab, Node


def forget_stale(before: Lab | None, after: Lab, namespaces: Container[str]) -> None:
    """Do with the nodes that were there before what kube-proxy does after it has written its rules.

    `before` is what the nodes held, None if nobody knows.  A kernel that does not tell of its
    connections keeps them, as under kube-proxy.
    """
    if not is_cleaning_due(before, after):
        return
    for node in after.nodes:
        namespace = namespace_name(after.name, node.name)
        if namespace in namespaces:
            with contextlib.suppress(NetlabError):
                forget_stale_on(after, node, namespace)


# "netlab f", as much of it as a mark holds: kube-proxy's marks are none of connections.
_OF_FAULTS = 0x6E6C6266


def remember(state: LabState, namespaces: Container[str]) -> None:
    """Let the nodes remember just those connections that faults made up, known by their mark."""
    for node in state.nodes:
        name, wanted = node.namespace.name, node.namespace.connections
        if name in namespaces:
            with contextlib.suppress(NetlabError):
                conntrack.delete_marked(name, _OF_FAULTS)
        for each in wanted:
            original = conntrack.Tuple(
                each.source[0], each.destination[0], each.source[1], each.destination[1]
            )
            number = socket.getprotobyname(each.protocol.lower())
            conntrack.create(name, number, original, each.to, _OF_FAULTS)
        if node.namespace.crowded:
            conntrack.flush(name)  # (one that ends soon would make room)
            conntrack.fill(name, _OF_FAULTS)


def forget_stale_on(lab: Lab, node: Node, namespace: str | int) -> int:
    """Delete UDP connections of one node that its Services no longer mean; how many there were.

    Raises NetlabError (exit 3) if the kernel refuses.
    """
    deleted = 0
    for family in (4, 6):
        services = UdpServices(lab, node, family)
        if not services:
            continue
        stale = (
            entry
            for entry in conntrack.dump(namespace, family)
            if entry.protocol == socket.IPPROTO_UDP and _is_stale(services, entry)
        )
        deleted += conntrack.delete(namespace, stale)
    return deleted


def _is_stale(services: UdpServices, entry: conntrack.Entry) -> bool:
    to, answering = entry.original, entry.reply
    ports = to.destination_port or 0, answering.source_port or 0
    return services.is_stale(to.destination, ports[0], (answering.source, ports[1]))


def end_where_stopped(lab: Lab, state: LabState) -> None:
    """End TCP connections on nodes that are stopped, which are off already: no one is told.

    What closes them later would have a FIN sent when the node is back.
    """
    for node in state.nodes:
        if node.name in lab.stopped:
            for namespace in (node.namespace, *node.pods):
                destroy_connections(namespace.name)
