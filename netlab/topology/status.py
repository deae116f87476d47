"""A decided lab as Kubernetes objects, `status` included: what `netlab get -o json` shows.

An object that stands in the file is shown as it stands there, completed by what was decided; one
that was made from another (a Deployment's pods, EndpointSlices) is written out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from msgspec.structs import replace

from netlab.topology.kubernetes import (
    HEADLESS,
    SERVICE_NAME,
)
from netlab.topology.model import (
    ZONE_LABEL,
    Endpoint,
    Family,
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
                "spec": {"podCIDR": node.pod_cidr, "podCIDRs": list(node.pod_cidrs)},
                "status": {"addresses": _node_addresses(node)},
            },
        )
        for node in lab.nodes
    ]


def pods(lab: Lab) -> list[Object]:
    """Pods, `v1`."""
    declared = _declared(lab, "Pod")
    return [
        _merged(declared.get((pod.namespace, pod.name)), _pod(pod, lab.node(pod.node)))
        for pod in lab.pods
    ]


def services(lab: Lab) -> list[Object]:
    """Services, `v1`."""
    declared = _declared(lab, "Service")
    shown = []
    for service in lab.services:
        stated = declared.get((service.namespace, service.name), {})
        shown.append(_merged(stated, _service(service)))
        ingress = _stated_ingress(stated) if service.type == "LoadBalancer" else None
        if ingress:
            shown[-1]["status"]["loadBalancer"] = {"ingress": ingress}
        if service.cluster_ip:
            policy = "SingleStack" if len(service.ip_families) < 2 else "RequireDualStack"
            spec = stated.get("spec") or {}
            shown[-1]["spec"]["ipFamilyPolicy"] = spec.get("ipFamilyPolicy") or policy
    return shown


def network_policies(lab: Lab) -> list[Object]:
    """NetworkPolicies, `networking.k8s.io/v1`."""
    declared = _declared(lab, "NetworkPolicy")
    return [
        _merged(
            declared.get((policy.namespace, policy.name)),
            {
                "apiVersion": "networking.k8s.io/v1",
                "kind": "NetworkPolicy",
                "metadata": {"name": policy.name, "namespace": policy.namespace},
                "spec": {
                    "policyTypes": [
                        name
                        for name, rules in (("Ingress", policy.ingress), ("Egress", policy.egress))
                        if rules is not None
                    ]
                },
            },
        )
        for policy in lab.policies
    ]


def hosts(lab: Lab) -> list[Object]:
    """Hosts, `netlab/v1`."""
    declared = _declared(lab, "Host")
    return [
        _merged(
            declared.get(("", host.name)),
            {
                "apiVersion": "netlab/v1",
                "kind": "Host",
                "metadata": {"name": host.name},
                "spec": {
                    "address": ",".join(host.addresses),
                    "network": "internet" if host.internet else "underlay",
                },
            },
        )
        for host in lab.hosts
    ]


def ingresses(lab: Lab) -> list[Object]:
    """Ingresses, `networking.k8s.io/v1`, with the addresses of the controller's Service."""
    keys = {pod.key for pod in lab.pods if pod.ingress_controller}
    before = {
        (entry.namespace, entry.service)
        for entry in lab.endpoints
        if any(end.pod in keys for end in entry.endpoints)
    }
    addresses = [
        {"ip": ip}
        for service in lab.services
        if (service.namespace, service.name) in before
        for ip in service.load_balancer_ips
    ]
    served = {(each.namespace, each.name) for each in lab.ingresses}
    return [
        _merged(
            item,
            {
                "metadata": {"name": key[1], "namespace": key[0]},
                "status": {
                    "loadBalancer": {"ingress": addresses} if addresses and key in served else {}
                },
            },
        )
        for key, item in _declared(lab, "Ingress").items()
    ]


def containers(lab: Lab) -> list[Object]:
    """Containers of Docker, `netlab/v1`."""
    declared = _declared(lab, "Container")
    return [
        _merged(
            declared.get(("", each.name)),
            {
                "apiVersion": "netlab/v1",
                "kind": "Container",
                "metadata": {"name": each.name},
                "spec": {
                    "node": each.node,
                    "network": each.network or each.mode,
                    **({"address": each.address} if each.address else {}),
                },
            },
        )
        for each in lab.docker_containers
    ]


def load_balancers(lab: Lab) -> list[Object]:
    """LoadBalancers, `netlab/v1`."""
    declared = _declared(lab, "LoadBalancer")
    return [
        _merged(
            declared.get(("", box.name)),
            {
                "apiVersion": "netlab/v1",
                "kind": "LoadBalancer",
                "metadata": {"name": box.name},
                "spec": {
                    "pool": ",".join(box.pools),
                    "mode": box.mode,
                    "address": ",".join(box.addresses),
                    "healthCheck": {
                        "periodSeconds": box.checks.period_s,
                        "timeoutSeconds": box.checks.timeout_s,
                        "healthyThreshold": box.checks.healthy,
                        "unhealthyThreshold": box.checks.unhealthy,
                    },
                },
            },
        )
        for box in lab.balancers
    ]


def _stated_ingress(stated: Object) -> list[Object] | None:
    """Those too that kube-proxy has no rules for: host names, and `ipMode: Proxy`."""
    status = stated.get("status") or {}
    ingress: list[Object] | None = (status.get("loadBalancer") or {}).get("ingress")
    return ingress


def endpoint_slices(lab: Lab) -> list[Object]:
    """EndpointSlices, `discovery.k8s.io/v1`: a Service's in the file if it has some that count.

    Otherwise they are as the controller makes them: of each Service there is one for each family,
    and, where a named target port is not the same number in all pods, for each set of ports; an
    empty one where there is no endpoint.
    """
    given = _given_slices(lab)
    zones = {node.name: node.labels.get(ZONE_LABEL) for node in lab.nodes}
    entries: dict[str, list[ServiceEndpoints]] = {}
    for entry in lab.endpoints:
        entries.setdefault(f"{entry.namespace}/{entry.service}", []).append(entry)
    shown = []
    for service in lab.services:
        if service.type == "ExternalName":
            continue
        if service.key in given:
            shown += given[service.key]
            continue
        slices = (
            (family, ports, endpoints)
            for family in service.ip_families or lab.families
            for ports, endpoints in _grouped(entries.get(service.key, []), family)
        )
        for number, each in enumerate(slices, 1):
            shown.append(_slice(service, number, *each, zones))
    return shown


def _given_slices(lab: Lab) -> dict[str, list[Object]]:
    """Those that stand in the file, by their Services; not what `endpoints.decide` leaves out."""
    headless = {service.key for service in lab.services if service.cluster_ip == "None"}
    found: dict[str, list[Object]] = {}
    for (namespace, _), item in _declared(lab, "EndpointSlice").items():
        labels = item["metadata"].get("labels") or {}
        key = f"{namespace}/{labels.get(SERVICE_NAME)}"
        heeded = HEADLESS not in labels or key in headless
        if heeded and item.get("addressType") in lab.families:
            shown = _merged(item, {"metadata": {"namespace": namespace}})
            found.setdefault(key, []).append(shown)
    return found


_Ports = tuple[tuple[str, str, int], ...]
"""Name, protocol and number of each."""


def _grouped(
    entries: list[ServiceEndpoints], family: Family
) -> Iterable[tuple[_Ports, list[Endpoint]]]:
    """The endpoints of one family by the ports that they have."""
    ports: dict[Endpoint, _Ports] = {}
    for entry in entries:
        for endpoint in entry.endpoints:
            if (":" in endpoint.address) == (family == "IPv6"):
                machine = replace(endpoint, port=0)
                port = (entry.port_name, entry.protocol, endpoint.port)
                ports[machine] = (*ports.get(machine, ()), port)
    groups: dict[_Ports, list[Endpoint]] = {}
    for machine, its in ports.items():
        groups.setdefault(its, []).append(machine)
    return groups.items() or [((), [])]


def _declared(lab: Lab, kind: str) -> dict[tuple[str, str], Object]:
    found = {}
    for item in lab.declared:
        if item.get("kind") == kind:
            metadata = item["metadata"]
            own = kind in ("Node", "Host", "LoadBalancer")
            namespace = "" if own else metadata.get("namespace", "default")
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
        *({"type": "InternalIP", "address": address} for address in node.addresses),
        {"type": "Hostname", "address": node.name},
    ]


def _pod(pod: Pod, node: Node) -> Object:
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
            "podIPs": [{"ip": address} for address in pod.addresses],
            "hostIP": node.address,
            "hostIPs": [{"ip": address} for address in node.addresses],
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
        spec["clusterIPs"] = list(service.cluster_ips)
        spec["ipFamilies"] = list(service.ip_families)
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


def _slice(
    service: Service,
    number: int,
    family: Family,
    ports: _Ports,
    endpoints: list[Endpoint],
    zones: Mapping[str, str | None],
) -> Object:
    labels = {"kubernetes.io/service-name": service.name}
    if service.cluster_ip == "None":
        labels[HEADLESS] = ""
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": f"{service.name}-{number}",
            "namespace": service.namespace,
            "labels": labels,
        },
        "addressType": family,
        "ports": [
            {"name": name, "protocol": protocol, "port": port} for name, protocol, port in ports
        ],
        "endpoints": [_endpoint(endpoint, zones) for endpoint in endpoints],
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
