"""A decided lab as Kubernetes objects, `status` included: what `netlab get -o json` shows.

An object that stands in the file is shown as it stands there, completed by what was decided; one
that was made from another (a Deployment's pods, EndpointSlices) is written out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from netlab.topology.model import (
    ZONE_LABEL,
    Endpoint,
    Lab,
    Node,
    Pod,
    Service,
    ServiceEndpoints,
)

Object = dict[str, Any]


def nodes(lab: Lab) -> list[Object]:
    """Nodes, `v1`."""
    declared = _declared(lab, "Node")
    return [
        _merged(
            declared.get(("", node.name)),
            {
                "apiVersion": "v1",
                "kind": "Node",
                "metadata": {"name": node.name, "labels": dict(node.labels)},
                "spec": {"podCIDR": node.pod_cidr, "podCIDRs": [node.pod_cidr]},
                "status": {"addresses": _node_addresses(node)},
            },
        )
        for node in lab.nodes
    ]


def pods(lab: Lab) -> list[Object]:
    """Pods, `v1`."""
    declared = _declared(lab, "Pod")
    addresses = {node.name: node.address for node in lab.nodes}
    return [
        _merged(declared.get((pod.namespace, pod.name)), _pod(pod, addresses[pod.node]))
        for pod in lab.pods
    ]


def services(lab: Lab) -> list[Object]:
    """Services, `v1`."""
    declared = _declared(lab, "Service")
    return [
        _merged(declared.get((service.namespace, service.name)), _service(service))
        for service in lab.services
    ]


def endpoint_slices(lab: Lab) -> list[Object]:
    """EndpointSlices of each port of each Service, `discovery.k8s.io/v1`.

    There is one for each family, and, where a named target port is not the same number in all pods,
    for each number.
    """
    services = {(service.namespace, service.name): service for service in lab.services}
    zones = {node.name: node.labels.get(ZONE_LABEL) for node in lab.nodes}
    return [
        _slice(entry, number, services[entry.namespace, entry.service], zones)
        for entry, number in _numbered(lab.endpoints)
    ]


def _declared(lab: Lab, kind: str) -> dict[tuple[str, str], Object]:
    found = {}
    for item in lab.declared:
        if item.get("kind") == kind:
            metadata = item["metadata"]
            namespace = "" if kind == "Node" else metadata.get("namespace", "default")
            found[namespace, metadata["name"]] = item
    return found


def _merged(declared: Object | None, decided: Object) -> Object:
    """`decided` laid over `declared`, mapping by mapping; empty mappings say nothing."""
    if declared is None:
        return decided
    merged = dict(declared)
    for key, value in decided.items():
        below = merged.get(key)
        if isinstance(value, dict) and isinstance(below, dict):
            merged[key] = _merged(below, value)
        elif value not in ({}, []) or key not in merged:
            merged[key] = value
    return merged


def _node_addresses(node: Node) -> list[Object]:
    return [
        *(
            {"type": "InternalIP", "address": address}
            for address in (node.address, *node.other_addresses)
        ),
        {"type": "Hostname", "address": node.name},
    ]


def _pod(pod: Pod, host: str) -> Object:
    metadata: Object = {"name": pod.name, "namespace": pod.namespace, "labels": dict(pod.labels)}
    if pod.owner:
        kind, _, name = pod.owner.partition("/")
        metadata["ownerReferences"] = [
            {"apiVersion": "apps/v1", "kind": kind, "name": name, "controller": True}
        ]
    spec: Object = {"nodeName": pod.node}
    if pod.host_network:
        spec["hostNetwork"] = True
    if pod.owner:
        ports = [
            {"containerPort": port.port, "protocol": port.protocol}
            | ({"name": port.name} if port.name else {})
            for port in pod.ports
        ]
        spec["containers"] = [{"name": pod.owner.partition("/")[2], "ports": ports}]
    ready = "True" if pod.ready else "False"
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": metadata,
        "spec": spec,
        "status": {
            "phase": "Running",
            "podIP": pod.address,
            "podIPs": [{"ip": pod.address}],
            "hostIP": host,
            "conditions": [{"type": "Ready", "status": ready}],
        },
    }


def _service(service: Service) -> Object:
    spec: Object = {
        "type": service.type,
        "selector": dict(service.selector),
        "ports": [
            {"port": port.port, "protocol": port.protocol, "targetPort": port.target_port}
            | ({"name": port.name} if port.name else {})
            | ({"nodePort": port.node_port} if port.node_port else {})
            for port in service.ports
        ],
    }
    if service.cluster_ip:
        spec["clusterIP"] = service.cluster_ip
        spec["clusterIPs"] = [service.cluster_ip, *service.other_cluster_ips]
        spec["sessionAffinity"] = service.session_affinity
        spec["internalTrafficPolicy"] = service.internal_traffic_policy
    if service.type in ("NodePort", "LoadBalancer") or service.external_ips:
        spec["externalTrafficPolicy"] = service.external_traffic_policy
    if service.health_check_node_port:
        spec["healthCheckNodePort"] = service.health_check_node_port
    ingress = [{"ip": address} for address in service.load_balancer_ips]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": service.name,
            "namespace": service.namespace,
            "labels": dict(service.labels),
        },
        "spec": spec,
        "status": {"loadBalancer": {"ingress": ingress} if ingress else {}},
    }


def _numbered(
    entries: tuple[ServiceEndpoints, ...],
) -> Iterator[tuple[ServiceEndpoints, int]]:
    """What each slice is made of, and its number within its Service."""
    count: dict[tuple[str, str], int] = {}
    for entry in entries:
        parts: dict[tuple[bool, int], list[Endpoint]] = {}
        for endpoint in entry.endpoints:
            parts.setdefault((":" in endpoint.address, endpoint.port), []).append(endpoint)
        for _, endpoints in sorted(parts.items()) or ((None, []),):
            key = entry.namespace, entry.service
            count[key] = count.get(key, 0) + 1
            yield msgspec.structs.replace(entry, endpoints=tuple(endpoints)), count[key]


def _slice(
    entry: ServiceEndpoints, number: int, service: Service, zones: Mapping[str, str | None]
) -> Object:
    labels = {"kubernetes.io/service-name": entry.service}
    if service.cluster_ip == "None":
        labels["service.kubernetes.io/headless"] = ""
    first = entry.endpoints[0] if entry.endpoints else None
    port = {"name": entry.port_name, "protocol": entry.protocol}
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": f"{entry.service}-{number}",
            "namespace": entry.namespace,
            "labels": labels,
        },
        "addressType": "IPv6"
        if ":" in (first.address if first else service.cluster_ip)
        else "IPv4",
        "ports": [{**port, "port": first.port}] if first else [],
        "endpoints": [_endpoint(endpoint, zones) for endpoint in entry.endpoints],
    }


def _endpoint(endpoint: Endpoint, zones: Mapping[str, str | None]) -> Object:
    shown: Object = {
        "addresses": [endpoint.address],
        "conditions": {
            "ready": endpoint.ready,
            "serving": endpoint.serving,
            "terminating": endpoint.terminating,
        },
    }
    if endpoint.node:
        shown["nodeName"] = endpoint.node
        if zone := zones.get(endpoint.node):
            shown["zone"] = zone
    hints = (("forZones", endpoint.for_zones), ("forNodes", endpoint.for_nodes))
    if any(names for _, names in hints):
        shown["hints"] = {
            kind: [{"name": name} for name in names] for kind, names in hints if names
        }
    if endpoint.pod:
        namespace, _, name = endpoint.pod.partition("/")
        shown["targetRef"] = {"kind": "Pod", "namespace": namespace, "name": name}
    return shown
