"""Who is chosen for a new connection to a Service on a node, and why nobody else is.

The decision is that of :mod:`netlab.datapath.services.endpoints`, which the rules are made of; here
it is told in words.  Each endpoint of a chosen set has the same share, in every mode.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import msgspec
from msgspec.structs import replace

from netlab.datapath.services.endpoints import (
    Endpoints,
    ServiceObjects,
    ServicePortInfo,
    Verdict,
    ports_of,
)
from netlab.datapath.services.local import local_detector
from netlab.datapath.services.names import service_port_name
from netlab.topology.model import ZONE_LABEL, Endpoint, Lab, Node, Pod, Service, ServicePort

Wanted = Literal["cluster", "local"]
"""The sets of endpoints of which one is meant: all that may serve, or those on the node."""


class LeftOut(msgspec.Struct, frozen=True):
    """An endpoint that is not chosen."""

    endpoint: Endpoint
    why: str


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """What a new connection meets on a node."""

    to: tuple[str, ...]  # "10.99.174.93:80", "NodePort 30080"
    client: str  # whose connection: "anybody", "pods and this node", ...
    verdict: Verdict
    reason: str  # why these, or why nobody
    endpoints: Endpoints  # each is chosen with the same probability
    left_out: tuple[LeftOut, ...]


def choices(lab: Lab, service: Service, port: ServicePort, node: Node) -> list[Choice]:
    """Every way to reach a Service's port on a node; empty if its Service is not proxied."""
    behind = tuple(
        entry
        for entry in lab.endpoints
        if (entry.namespace, entry.service) == (service.namespace, service.name)
    )
    name = service_port_name(service.namespace, service.name, port.name), port.protocol.lower()
    found: list[Choice] = []
    for family in (4, 6):
        objects = ServiceObjects(service, behind)
        for info in ports_of([objects], lab.service_proxy, node, family):
            if (info.name, info.protocol) == name:
                stated = lab.endpoints_of(service, port)
                both = len(service.cluster_ips) > 1
                found += _Ways(lab, node, family, info, stated, both).all()
    return found


class _Ways:
    """The ways to one port by the addresses of one family."""

    def __init__(
        self,
        lab: Lab,
        node: Node,
        family: int,
        info: ServicePortInfo,
        stated: Endpoints,
        both: bool,
    ) -> None:
        self._node, self._info, self._stated = node, info, stated
        self._family, self._both = family, both  # whether the Service is of both families
        self._mode = lab.service_proxy.mode
        self._knows_pods = local_detector(lab.service_proxy, node, family) is not None

    def all(self) -> Iterator[Choice]:
        info = self._info
        if self._mode == "userspace":
            yield from self._by_proxy()
            return
        wanted: Wanted = "local" if info.internal_local else "cluster"
        policy = "internalTrafficPolicy"
        own = self._at(info.cluster_ip)
        if self._mode == "ipvs":
            yield self._of_virtual_server(own, policy, is_local=info.internal_local)
        else:
            yield self._way(own, "anybody", wanted, info.internal, policy)
        others, balanced = self._at(*info.external_ips), self._at(*info.load_balancer_ips)
        if info.node_port:
            of = f" over IPv{self._family}" if self._both else ""
            others += (f"NodePort {info.node_port}{of}",)
        if info.source_ranges:
            yield from self._from_outside(balanced)
        else:
            others = balanced + others
        yield from self._from_outside(others)
        # (iptables rejects before it asks who it is)
        if balanced and info.source_ranges and (info.has_any or self._mode != "iptables"):
            ranges = ", ".join(info.source_ranges)
            yield Choice(
                to=balanced,
                client=f"anybody outside {ranges}",
                verdict=Verdict.DROP,
                reason="loadBalancerSourceRanges do not have the client",
                endpoints=(),
                left_out=(),
            )

    def _at(self, *addresses: str) -> tuple[str, ...]:
        shown = (f"[{ip}]" if ":" in ip else ip for ip in addresses)
        return tuple(f"{ip}:{self._info.port}" for ip in shown)

    def _from_outside(self, to: tuple[str, ...]) -> Iterator[Choice]:
        """At addresses that externalTrafficPolicy rules."""
        if not to:
            return
        info, policy = self._info, "externalTrafficPolicy"
        if self._mode == "ipvs":
            yield self._of_virtual_server(to, policy, is_local=info.external_local)
            return
        if not info.external_local:
            yield self._way(to, "anybody", "cluster", info.external, policy)
            return
        pods = ("pods and this node", "others") if self._knows_pods else ("this node", "others")
        short_cut = Verdict.FORWARD if info.has_any else Verdict.REJECT
        yield self._way(to, pods[0], "cluster", short_cut, policy)
        yield self._way(to, pods[1], "local", info.external, policy)

    def _by_proxy(self) -> Iterator[Choice]:
        """In userspace mode everybody has the same, and there were neither policies nor hints."""
        info = self._info
        if info.protocol == "sctp":
            return
        to = self._at(info.cluster_ip, *info.external_ips, *info.load_balancer_ips)
        if info.node_port:
            to += (f"NodePort {info.node_port}",)
        ready = tuple(endpoint for endpoint in info.known if endpoint.ready)
        reason = "every endpoint that is ready, in turn"
        if not ready:
            reason = "no endpoint is ready: the proxy takes a connection, and closes it"
        if ready and info.affinity_s is not None:
            reason = "every endpoint that is ready, each client's own"
        yield Choice(
            to=to,
            client="anybody",
            verdict=Verdict.FORWARD if ready else Verdict.REJECT,
            reason=reason,
            endpoints=ready,
            left_out=(
                *(LeftOut(each, "it is not ready") for each in info.known if not each.ready),
                *self._unknown(to[0]),
            ),
        )

    def _of_virtual_server(self, to: tuple[str, ...], policy: str, *, is_local: bool) -> Choice:
        """In ipvs mode everybody has the same, and policy Local takes all if there is none here."""
        info = self._info
        wanted: Wanted = "local" if is_local and info.local else "cluster"
        chosen = info.local if wanted == "local" else info.cluster
        verdict = Verdict.FORWARD if chosen else Verdict.REJECT
        way = self._way(to, "anybody", wanted, verdict, policy)
        if not is_local or wanted == "local" or not info.has_any:
            return way
        reason = f"{policy} is Local, and none is on this node: "
        if way.endpoints:
            return replace(way, reason=f"{reason}ipvs mode then takes all")
        return replace(way, reason=f"{reason}the virtual server has no real server")

    def _way(
        self, to: tuple[str, ...], client: str, wanted: Wanted, verdict: Verdict, policy: str
    ) -> Choice:
        known = self._info.known
        chosen = self._info.local if wanted == "local" else self._info.cluster
        return Choice(
            to=to,
            client=client,
            verdict=verdict,
            reason=self._reason(wanted, verdict, chosen, policy),
            endpoints=chosen,
            left_out=(
                *(
                    LeftOut(endpoint, why)
                    for endpoint in known
                    if (why := why_not(endpoint, wanted, known, self._node))
                ),
                *self._unknown(to[0]),
            ),
        )

    def _reason(self, wanted: Wanted, verdict: Verdict, chosen: Endpoints, policy: str) -> str:
        here = " on this node" if wanted == "local" else ""
        if verdict is Verdict.REJECT:
            if not self._info.known:
                return "it has no endpoint"
            return "no endpoint is ready, and none that terminates still serves"
        if verdict is Verdict.DROP:
            return f"{policy} is Local, and no endpoint{here} may serve, but elsewhere one may"
        if not chosen[0].ready:
            return f"no endpoint{here} is ready: those that terminate and still serve"
        if wanted == "local":
            return f"{policy} is Local: endpoints on this node"
        ready = [endpoint for endpoint in self._info.known if endpoint.ready]
        if len(chosen) < len(ready):
            return f"hints of the EndpointSlices for {_hinted(ready, self._node)}"
        return "every endpoint that is ready"

    def _unknown(self, to: str) -> Iterator[LeftOut]:
        """Endpoints that the proxy of this family does not see, or that stand twice."""
        known = {id(endpoint) for endpoint in self._info.known}
        for endpoint in self._stated:
            own = 6 if ":" in endpoint.address else 4
            if own != self._family:
                yield LeftOut(endpoint, f"it is IPv{own}, and {to} is IPv{self._family}")
            elif id(endpoint) not in known:
                yield LeftOut(endpoint, "the same endpoint stands in another EndpointSlice")


def why_not(endpoint: Endpoint, wanted: Wanted, known: Endpoints, node: Node) -> str | None:
    """Why an endpoint is not in a set, of all of the family that are known; None if it is in."""
    if wanted == "local" and endpoint.node != node.name:
        return f"it is on node {endpoint.node}" if endpoint.node else "it names no node"
    rivals = [each for each in known if wanted == "cluster" or each.node == node.name]
    ready = [each for each in rivals if each.ready]
    if not endpoint.ready:
        if endpoint.terminating and not endpoint.serving:
            return "it terminates and no longer serves"
        if not endpoint.terminating:
            return "it is not ready"
        return "it terminates, and others are ready" if ready else None
    if wanted == "local":
        return None
    by = _hinted(ready, node)
    if by.startswith("node") and node.name not in endpoint.for_nodes:
        return f"its hint is for node {', '.join(endpoint.for_nodes)}"
    zone = node.labels.get(ZONE_LABEL)
    if by.startswith("zone") and zone not in endpoint.for_zones:
        return f"its hint is for zone {', '.join(endpoint.for_zones)}"
    return None


def _hinted(ready: list[Endpoint], node: Node) -> str:
    """What the hints of ready endpoints that count are for: "node n1", "zone a", or nothing."""
    if all(each.for_nodes for each in ready) and any(node.name in e.for_nodes for e in ready):
        return f"node {node.name}"
    zone = node.labels.get(ZONE_LABEL)
    if all(each.for_zones for each in ready) and any(zone in e.for_zones for e in ready):
        return f"zone {zone}"
    return ""


def without_endpoint(lab: Lab, service: Service, port: ServicePort) -> Iterator[tuple[Pod, str]]:
    """Pods that a Service selects and that are no endpoint of a port of it, and why."""
    behind = {endpoint.pod for endpoint in lab.endpoints_of(service, port)}
    for pod in selected(lab, service):
        if pod.key in behind:
            continue
        named = {each.name for each in pod.ports if each.protocol == port.protocol}
        if isinstance(port.target_port, str) and port.target_port not in named:
            yield pod, f'it has no {port.protocol} port named "{port.target_port}"'
        else:
            yield pod, "the EndpointSlices of the Service do not have it"


def selected(lab: Lab, service: Service) -> list[Pod]:
    """The pods that a Service selects."""
    wanted = service.selector.items()
    return [
        pod
        for pod in lab.pods
        if wanted and pod.namespace == service.namespace and wanted <= pod.labels.items()
    ]


def condition(endpoint: Endpoint) -> str:
    """`ready`, `not ready`, `terminating, serving`, ... as its EndpointSlice has it."""
    if endpoint.terminating:
        return "terminating, serving" if endpoint.serving else "terminating"
    if endpoint.ready:
        return "ready" if endpoint.serving else "ready, not serving"
    return "not ready"
