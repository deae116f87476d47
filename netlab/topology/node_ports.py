"""Ports that pods have on their nodes: each can be only one pod's.

A pod of its node's network has there what its containers declare, another one what they call a
`hostPort`; with a `hostIP` only at that address.  The scheduler places no pod where one of its
ports is taken (pkg/scheduler/framework/plugins/nodeports).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from ipaddress import ip_address
from typing import NamedTuple

from netlab.topology.addresses import address
from netlab.topology.model import Protocol
from netlab.topology.places import Complaints, Path
from netlab.topology.pods import DraftPod


class NodePort(NamedTuple):
    """A port of a node, at one of its addresses or, with "", at all of them."""

    protocol: Protocol
    number: int
    address: str

    def excludes(self, other: NodePort) -> bool:
        """Whether both cannot be had."""
        return self[:2] == other[:2] and (
            self.address == other.address or not (self.address and other.address)
        )


def wanted(pod: DraftPod) -> Iterator[tuple[NodePort, Path]]:
    """What a pod has on its node, each with where in the pod's spec it stands."""
    for index, container in enumerate(pod.spec.containers or ()):
        for number, port in enumerate(container.ports or ()):
            name = "hostPort" if port.hostPort else "containerPort"
            own = port.hostPort or (port.containerPort if pod.host_network else 0)
            if own:
                path = ("containers", index, "ports", number, name)
                yield NodePort(port.protocol or "TCP", own, _at(port.hostIP)), path


def _at(text: str | None) -> str:
    """An address; "" for the unspecified one, and for what is none."""
    try:
        number = ip_address(text or "0.0.0.0")
    except ValueError:
        return ""
    return "" if number.is_unspecified else str(number)


def check(pods: Iterable[DraftPod], of_cluster: bool, found: Complaints) -> None:
    """Complain of ports that two pods of a node want; of a cluster's only by a warning."""
    owners: dict[tuple[str, Protocol, int], list[tuple[NodePort, DraftPod]]] = {}
    for pod in pods:
        _check_addresses(pod, found)
        for port, path in wanted(pod) if pod.node else ():
            assert pod.node is not None
            there = owners.setdefault((pod.node.name, port.protocol, port.number), [])
            first = next((own for other, own in there if port.excludes(other)), None)
            there.append((port, pod))
            # (Two containers of one pod are complained of elsewhere.)
            if first is None or first is pod or (of_cluster and pod.host_network):
                continue
            say = found.warning if of_cluster else found.error
            say(
                "port-taken",
                f"{pod.title}: {port.protocol} {port.number} on node {pod.node.name} is already "
                f"{first.title}'s",
                pod.origin,
                *pod.path,
                *path,
                hint="take another port, or another node (spec.nodeName)",
            )


def _check_addresses(pod: DraftPod, found: Complaints) -> None:
    for index, container in enumerate(pod.spec.containers or ()):
        for number, port in enumerate(container.ports or ()):
            if port.hostIP:
                path = (*pod.path, "containers", index, "ports", number, "hostIP")
                address(port.hostIP, pod.title, found, pod.origin, path)
