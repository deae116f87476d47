"""What `netlab describe` tells of a Service, a pod or a node, as data: its JSON is this."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

from netlab.datapath.services.choices import (
    Choice,
    choices,
    condition,
    selected,
    without_endpoint,
)
from netlab.datapath.services.claims import taken
from netlab.datapath.services.endpoints import PROXY_NAME_LABEL
from netlab.datapath.services.names import address_port
from netlab.topology import status
from netlab.topology.model import ZONE_LABEL, Endpoint, Lab, Node, Pod, Service, ServicePort

SCHEMA = "netlab.describe/v1"

Facts = dict[str, Any]


def service(lab: Lab, described: Service, nodes: Iterable[Node]) -> Facts:
    """A Service, what stands behind each port, and who is chosen on these nodes."""
    shown = list(nodes)
    chosen = {pod.key for pod in selected(lab, described)}
    others = [
        {"name": pod.name, "labels": pod.labels}
        for pod in lab.pods
        if described.selector and pod.namespace == described.namespace and pod.key not in chosen
    ]
    return _about(lab, "Service", status.services(lab), described.namespace, described.name) | {
        "mode": lab.service_proxy.mode,
        "notProxied": _not_proxied(lab, described),
        "taken": [
            {"address": ip, "port": info.port, "protocol": info.protocol.upper(), "by": winner}
            for info, ip, winner in taken(lab, (shown or lab.nodes)[0], described)
        ],
        "ports": [_port(lab, described, port, shown) for port in described.ports],
        "notSelected": others,
    }


def pod(lab: Lab, described: Pod) -> Facts:
    """A pod, what it answers on, and the Services in which it is, or should be, an endpoint."""
    services: list[Facts] = []
    for each in lab.services:
        for port in each.ports:
            missing = {other.key: why for other, why in without_endpoint(lab, each, port)}
            about = {
                "namespace": each.namespace,
                "name": each.name,
                "port": port.port,
                "portName": port.name,
                "protocol": port.protocol,
            }
            for endpoint in lab.endpoints_of(each, port):
                if endpoint.pod == described.key:
                    services.append({**about, **_endpoint(lab, endpoint)})
            if described.key in missing:
                services.append({**about, "why": missing[described.key]})
    return _about(lab, "Pod", status.pods(lab), described.namespace, described.name) | {
        "addresses": list(described.addresses),
        "owner": described.owner or None,
        "listens": [
            {"protocol": protocol, "port": number} for protocol, number in described.listen
        ],
        "services": services,
    }


def node(lab: Lab, described: Node) -> Facts:
    """A node and its pods."""
    return _about(lab, "Node", status.nodes(lab), "", described.name) | {
        "mode": lab.service_proxy.mode,
        "addresses": list(described.addresses),
        "podCIDRs": list(described.pod_cidrs),
        "zone": described.labels.get(ZONE_LABEL),
        "pods": [
            {
                "namespace": each.namespace,
                "name": each.name,
                "addresses": list(each.addresses),
                "ready": each.ready,
                "hostNetwork": each.host_network,
            }
            for each in lab.pods
            if each.node == described.name
        ],
    }


def _about(lab: Lab, kind: str, objects: list[Facts], namespace: str, name: str) -> Facts:
    found = next(
        item
        for item in objects
        if item["metadata"]["name"] == name and item["metadata"].get("namespace", "") == namespace
    )
    return {"schema": SCHEMA, "lab": lab.name, "kind": kind, "object": found}


def _not_proxied(lab: Lab, described: Service) -> str | None:
    """Why no rule serves a Service."""
    if described.type == "ExternalName":
        return "ExternalName: a name for something outside, told by DNS"
    if described.cluster_ip in ("", "None"):
        return "headless: DNS tells its endpoints, and clients choose"
    if PROXY_NAME_LABEL in described.labels:
        return f"left to another proxy by its label {PROXY_NAME_LABEL}"
    if lab.service_proxy.mode == "none":
        return "the mode is none: no rule of ours; kube-proxy would choose as follows"
    return None


def _port(lab: Lab, described: Service, port: ServicePort, nodes: list[Node]) -> Facts:
    alike: list[tuple[list[str], list[Choice]]] = []
    for each in nodes:
        found = choices(lab, described, port, each)
        same = next((names for names, known in alike if known == found), None)
        if same is None:
            alike.append(([each.name], found))
        else:
            same.append(each.name)
    return {
        "name": port.name,
        "protocol": port.protocol,
        "port": port.port,
        "targetPort": port.target_port,
        "nodePort": port.node_port,
        "endpoints": [_endpoint(lab, each) for each in lab.endpoints_of(described, port)],
        "withoutEndpoint": [
            {"pod": other.name, "why": why} for other, why in without_endpoint(lab, described, port)
        ],
        "choices": [
            {"nodes": names, **_choice(lab, choice)} for names, found in alike for choice in found
        ],
    }


def _choice(lab: Lab, choice: Choice) -> Facts:
    forwarded = choice.verdict.value == "forward"
    return {
        "to": list(choice.to),
        "client": choice.client,
        "verdict": choice.verdict.value,
        "reason": choice.reason,
        "chosen": [
            {**_endpoint(lab, each), "probability": 1 / len(choice.endpoints)}
            for each in choice.endpoints
            if forwarded
        ],
        "leftOut": [{**_endpoint(lab, each.endpoint), "why": each.why} for each in choice.left_out],
    }


def _endpoint(lab: Lab, endpoint: Endpoint) -> Facts:
    zone = None
    with contextlib.suppress(KeyError):  # of a node that the lab has not, nothing is known
        zone = lab.node(endpoint.node or "").labels.get(ZONE_LABEL)
    return {
        "endpoint": address_port(endpoint),
        "pod": endpoint.pod,
        "node": endpoint.node,
        "zone": zone,
        "condition": condition(endpoint),
    }
