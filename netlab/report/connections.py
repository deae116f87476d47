"""Connections of a lab's nodes in the words of its objects: what `netlab conntrack` shows."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from netlab.datapath.services.local import own_addresses
from netlab.kernel.conntrack import Counters, Entry, Icmp, Tuple
from netlab.topology.model import Lab, Node, Pod
from netlab.topology.references import Reference

SCHEMA = "netlab.conntrack/v1"

_PROTOCOLS = {
    socket.IPPROTO_TCP: "TCP",
    socket.IPPROTO_UDP: "UDP",
    socket.IPPROTO_SCTP: "SCTP",
    socket.IPPROTO_ICMP: "ICMP",
    socket.IPPROTO_ICMPV6: "ICMPv6",
    socket.IPPROTO_IGMP: "IGMP",
}
_Target = tuple[str, int | None]  # an address and a port


class End(msgspec.Struct, frozen=True):
    """One end of a connection in one direction, and whose the address is: "pod/demo/pod1"."""

    address: str
    port: int | None = None
    name: str | None = None


class Direction(msgspec.Struct, frozen=True):
    """Packets that are sent, or that answer."""

    source: End
    destination: End
    icmp: Icmp | None = None


class Through(msgspec.Struct, frozen=True, rename="camel"):
    """The Service that a connection goes through, and by which of its addresses."""

    namespace: str
    name: str
    port: int
    port_name: str
    by: str  # "ClusterIP", "ExternalIP", "LoadBalancer", "NodePort"


class Connection(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """An entry of connection tracking on a node.

    `endpoint` is the pod that answers (or the address, if it is no pod's) where the destination is
    translated; if `masqueraded`, it sees the reply's destination as the source.
    """

    node: str
    id: int
    protocol: str
    state: str
    timeout_seconds: int | None
    status: tuple[str, ...]
    mark: int
    zone: int
    original: Direction
    reply: Direction
    service: Through | None
    endpoint: str | None
    masqueraded: bool
    sent: Counters | None
    answered: Counters | None


class Watched:
    """Connections from one event to the next: those that concern somebody, and then always."""

    def __init__(self, concerns: Callable[[Connection], bool]) -> None:
        self._concerns = concerns
        self._known: dict[tuple[str, int], Connection] = {}

    def event(self, found: Connection, is_there: bool) -> str | None:
        """`ADDED`, `MODIFIED` or `DELETED`; None if it is nobody's, or only time has passed."""
        key = found.node, found.id
        before = self._known.pop(key, None)
        if before is None and not (is_there and self._concerns(found)):
            return None
        if not is_there:
            return "DELETED"
        self._known[key] = found
        if before is None:
            return "ADDED"
        same = msgspec.structs.replace(before, timeout_seconds=found.timeout_seconds) == found
        return None if same else "MODIFIED"


class Connections:
    """What the entries on a lab's nodes are in the words of its objects."""

    def __init__(self, lab: Lab) -> None:
        self._names = _names(lab)
        self._services: dict[tuple[str, int, str], Through] = {}
        self._node_ports: dict[tuple[int, str], Through] = {}
        self._local = {
            node.name: {ip for family in (4, 6) for ip in own_addresses(lab, node, family)}
            for node in lab.nodes
        }
        for service in lab.services:
            addresses = (
                ("ClusterIP", (service.cluster_ip, *service.other_cluster_ips)),
                ("ExternalIP", service.external_ips),
                ("LoadBalancer", service.load_balancer_ips),
            )
            for port in service.ports:
                about = service.namespace, service.name, port.port, port.name
                for by, each in addresses:
                    for ip in each:
                        self._services[ip, port.port, port.protocol] = Through(*about, by)
                if port.node_port:
                    self._node_ports[port.node_port, port.protocol] = Through(*about, "NodePort")

    def of(self, node: Node, entry: Entry) -> Connection:
        """An entry on a node."""
        original, reply = entry.original, entry.reply
        protocol = _PROTOCOLS.get(entry.protocol, str(entry.protocol))
        to, answering = _destination(original), _source(reply)
        translated = to != answering
        return Connection(
            node=node.name,
            id=entry.id,
            protocol=protocol,
            state=entry.state,
            timeout_seconds=entry.timeout_s,
            status=entry.status,
            mark=entry.mark,
            zone=entry.zone,
            original=self._direction(original),
            reply=self._direction(reply),
            service=self._through(node, original, protocol),
            endpoint=(self._names.get(reply.source) or reply.source) if translated else None,
            masqueraded=_source(original) != _destination(reply),
            sent=entry.sent,
            answered=entry.answered,
        )

    def _direction(self, ends: Tuple) -> Direction:
        source, destination = (
            End(address, port, self._names.get(address))
            for address, port in (_source(ends), _destination(ends))
        )
        return Direction(source, destination, ends.icmp)

    def _through(self, node: Node, to: Tuple, protocol: str) -> Through | None:
        port = to.destination_port or 0
        found = self._services.get((to.destination, port, protocol))
        if found is None and to.destination in self._local[node.name]:
            found = self._node_ports.get((port, protocol))
        return found


def concerns(reference: Reference | None) -> Callable[[Connection], bool]:
    """Whether a connection is one of what a reference means; without one each is.

    Of a pod: one of its addresses is at an end, before or after translation (of one in the host's
    network: with a port that it answers on).  Of a Service: it goes through it.  Of an address: it
    is at an end.  Of a node: it is on it.
    """
    if reference is None:
        return lambda found: True
    if reference.kind == "service" and reference.service is not None:
        service, number = reference.service, reference.port_number
        return lambda found: (
            found.service is not None
            and (found.service.namespace, found.service.name) == (service.namespace, service.name)
            and number in (None, found.service.port)
        )
    if reference.kind == "pod" and reference.pod is not None:
        return _of_pod(reference.pod)
    if reference.kind == "node" and reference.node is not None:
        name = reference.node.name
        return lambda found: found.node == name
    address, number = reference.address, reference.port_number
    return lambda found: any(
        end.address == address and number in (None, end.port) for end in _ends(found)
    )


def _of_pod(pod: Pod) -> Callable[[Connection], bool]:
    if not pod.host_network:
        return lambda found: any(end.address in pod.addresses for end in _ends(found))
    ports = set(pod.listen)
    return lambda found: any(
        end.address in pod.addresses and (found.protocol, end.port) in ports for end in _ends(found)
    )


def _ends(found: Connection) -> Iterable[End]:
    for direction in (found.original, found.reply):
        yield direction.source
        yield direction.destination


def _source(ends: Tuple) -> _Target:
    return ends.source, ends.source_port


def _destination(ends: Tuple) -> _Target:
    return ends.destination, ends.destination_port


def _names(lab: Lab) -> dict[str, str]:
    """Whose an address is: a pod's in the host's network is the node's."""
    names: dict[str, str] = {}
    for service in lab.services:
        clusters = (service.cluster_ip, *service.other_cluster_ips)
        for ip in (*clusters, *service.external_ips, *service.load_balancer_ips):
            names[ip] = f"svc/{service.key}"
    for pod in lab.pods:
        names |= dict.fromkeys(pod.addresses, f"pod/{pod.key}")
    for node in lab.nodes:
        own = (*node.addresses, *node.bridge_addresses, *node.overlay_addresses)
        names |= dict.fromkeys(own, f"node/{node.name}")
    return names


def as_json(lab: Lab, found: Iterable[Connection]) -> dict[str, Any]:
    """`netlab.conntrack/v1`."""
    return {
        "schema": SCHEMA,
        "lab": lab.name,
        "connections": [msgspec.to_builtins(connection) for connection in found],
    }
