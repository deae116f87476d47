"""A part of a lab: what the path to some Services needs, or what some nodes hold.

The whole topology is decided before: what stays has the addresses, routes and rules that it has in
the whole lab.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from msgspec.structs import replace

from netlab.problems import NetlabError, Problem, suggest
from netlab.topology import kubernetes as k8s
from netlab.topology import kubernetes_pods as k8s_pods
from netlab.topology.earlier import Key, key_of
from netlab.topology.model import Lab, Pod, Service, ServiceEndpoints
from netlab.topology.references import resolve
from netlab.topology.status import endpoint_slices


def select(lab: Lab, only: Sequence[str], nodes: Sequence[str]) -> tuple[Lab, tuple[Problem, ...]]:
    """The part of a lab that is asked for, and warnings.

    `only` are Services ("svc/myblog"), which bring the pods behind them, and pods ("pod/shop/cart")
    for the ends of a path; `nodes` are names.  Without `only` all Services stay.  Raises
    NetlabError (exit code 2) for what the lab does not have.
    """
    _check_nodes(lab, nodes)
    services, pods = _named(lab, only)
    endpoints = [
        each for each in lab.endpoints if not only or f"{each.namespace}/{each.service}" in services
    ]
    if only:
        pods |= {end.pod for each in endpoints for end in each.endpoints if end.pod}
    kept = [
        pod
        for pod in lab.pods
        if (not only or pod.key in pods) and (not nodes or pod.node in nodes)
    ]
    wanted = set(nodes) or {pod.node for pod in kept} or {lab.nodes[0].name}
    if not nodes:
        wanted |= {end.node for each in endpoints for end in each.endpoints if end.node}
    kept_services = [each for each in lab.services if not only or each.key in services]
    part = _with_only(lab, wanted, kept, kept_services, endpoints)
    declared = (*_declared(lab, part), *_slices(lab, part))
    return replace(part, declared=declared), tuple(_warnings(lab, part))


def for_path(lab: Lab, nodes: Collection[str], pods: Collection[str]) -> Lab:
    """These nodes and pods ("namespace/name") of a lab, and all its Services.

    It is no lab to change: what it declares is the whole lab's.
    """
    kept = [pod for pod in lab.pods if pod.key in pods]
    return _with_only(lab, nodes, kept, lab.services, lab.endpoints)


def _with_only(
    lab: Lab,
    nodes: Collection[str],
    pods: Sequence[Pod],
    services: Sequence[Service],
    endpoints: Sequence[ServiceEndpoints],
) -> Lab:
    there = {pod.key for pod in pods}
    return replace(
        lab,
        nodes=tuple(node for node in lab.nodes if node.name in nodes),
        pods=tuple(pods),
        services=tuple(services),
        endpoints=tuple(_without_others(each, there) for each in endpoints),
    )


def _check_nodes(lab: Lab, nodes: Sequence[str]) -> None:
    known = [node.name for node in lab.nodes]
    for name in nodes:
        if name not in known:
            near = suggest(name, known)
            hint = f'did you mean "{near}"?' if near else f"there is {', '.join(known[:5])}"
            raise NetlabError(Problem("unknown-node", f'there is no node "{name}"', hint=hint))


def _named(lab: Lab, only: Sequence[str]) -> tuple[set[str], set[str]]:
    """Keys of the Services and of the pods that are named."""
    services, pods = set(), set()
    for text in only:
        reference = resolve(lab, text)
        if reference.service is not None:
            services.add(reference.service.key)
        elif reference.pod is not None:
            pods.add(reference.pod.key)
        else:
            message = f'"{text}" is neither a Service nor a pod'
            hint = "--only svc/NAME or pod/NAME; --nodes takes nodes"
            raise NetlabError(Problem("bad-reference", message, hint=hint))
    return services, pods


def _without_others(entry: ServiceEndpoints, there: Collection[str]) -> ServiceEndpoints:
    """Endpoints whose pod is left out stay, as addresses that nobody here has."""
    if all(end.pod is None or end.pod in there for end in entry.endpoints):
        return entry
    ends = tuple(end if end.pod in there else replace(end, pod=None) for end in entry.endpoints)
    return replace(entry, endpoints=ends)


def _warnings(lab: Lab, part: Lab) -> list[Problem]:
    served = {service.key for service in part.services}
    there = {pod.key for pod in part.pods}
    away = {
        end.pod
        for each in lab.endpoints
        if f"{each.namespace}/{each.service}" in served
        for end in each.endpoints
        if end.pod and end.pod not in there
    }
    if not away:
        return []
    message = f"endpoints that are left out: {len(away)} pods; what is sent there is lost"
    return [Problem("no-pod", message, warning=True)]


# What a later change of the lab is decided from


def _declared(lab: Lab, part: Lab) -> tuple[dict[str, Any], ...]:
    """The objects of what stays; a controller has as many replicas as are left of its pods."""
    here = {"Node": {("", node.name) for node in part.nodes}}
    here["Pod"] = {(pod.namespace, pod.name) for pod in part.pods}
    here["Service"] = {(service.namespace, service.name) for service in part.services}
    left = Counter(_controller(pod) for pod in part.pods)
    found = []
    for value in lab.declared:
        key = key_of(value)
        if key[0] in here:
            if key[1:] in here[key[0]]:
                found.append(value)
        elif key[0] in ("Endpoints", "EndpointSlice"):
            if (key[1], _service_of(key, value)) in here["Service"]:
                found.append(value)
        elif key[0] in _CONTROLLERS:
            if left[key]:
                found.append(_with_replicas(value, left[key]))
        else:
            found.append(value)
    return tuple(found)


def _slices(lab: Lab, part: Lab) -> Iterator[dict[str, Any]]:
    """EndpointSlices of Services that follow from pods which are left out."""
    here = {pod.key for pod in part.pods}
    told = {
        (key[1], _service_of(key, value))
        for value in lab.declared
        if (key := key_of(value))[0] == "EndpointSlice"
    }
    away = {
        (each.namespace, each.service)
        for each in lab.endpoints
        if any(end.pod and end.pod not in here for end in each.endpoints)
    }
    of = [each for each in part.services if (each.namespace, each.name) in away - told]
    yield from endpoint_slices(replace(part, services=tuple(of)))


_CONTROLLERS = tuple(
    kind.__name__ for kind in k8s.KINDS.values() if issubclass(kind, k8s_pods.Controller)
)


def _controller(pod: Pod) -> Key:
    kind, _, name = pod.owner.partition("/")
    return kind, pod.namespace, name


def _service_of(key: Key, value: dict[str, Any]) -> str:
    if key[0] == "Endpoints":
        return key[2]
    labels = value["metadata"].get("labels") or {}
    return str(labels.get(k8s.SERVICE_NAME))


def _with_replicas(value: dict[str, Any], count: int) -> dict[str, Any]:
    if value["kind"] == "DaemonSet":  # has one on each node
        return value
    return {**value, "spec": {**value["spec"], "replicas": count}}
