"""Labs made from what was given to the real kube-proxy, to compare with what it wrote.

Reads the Kubernetes objects of tests/golden/STATE into the model by the shortest way, without the
project's own loader: a mistake there must not hide one in the rules, nor the other way round.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import yaml

from netlab.topology.model import (
    ConntrackProxy,
    DetectLocal,
    Endpoint,
    IPTablesProxy,
    IPVSProxy,
    Lab,
    NFTablesProxy,
    Node,
    Overlay,
    Service,
    ServiceEndpoints,
    ServicePort,
    ServiceProxy,
    Underlay,
)

GOLDEN = Path(__file__).parent / "golden"
STATES = sorted(path.parent.name for path in GOLDEN.glob("*/iptables.txt"))
SEQUENCES = sorted(path.parent.name for path in GOLDEN.glob("seq-*/objects.yaml"))
NFTABLES_STATES = sorted(path.parent.name for path in GOLDEN.glob("*/nftables.txt"))

# Recorded on a node with a second link, which the objects do not tell.
SECOND_ADDRESS = dict.fromkeys(
    ("nodeport", "nodeport-primary", "nodeport-all", "nodeport-cidrs"), ("10.200.0.21",)
)

_SECONDS = {
    "0s": 0,
    "5s": 5,
    "45s": 45,
    "60s": 60,
    "200s": 200,
    "900s": 900,
    "150s": 150,
    "1h0m0s": 3600,
    "24h0m0s": 86400,
}


def read(state: str, name: str) -> str:
    """A file of a state; empty if there is none."""
    path = GOLDEN / state / name
    return path.read_text() if path.exists() else ""


def golden_lab(state: str) -> tuple[Lab, Node]:
    """The lab of a state, and the node that was recorded."""
    objects = list(yaml.safe_load_all(read(state, "objects.yaml")))
    return lab_of(state, objects, yaml.safe_load(read(state, "config.yaml")))


@dataclass(frozen=True)
class Step:
    """A step of a sequence: what the lab is then, and what is said of how it came about."""

    sequence: str
    number: int
    lab: Lab
    node: Node  # the recorded one
    change: dict[str, Any]  # change.yaml; empty for the first state

    def read(self, name: str) -> str:
        """What a file held after the step; one that is absent is as it was."""
        for number in range(self.number, -1, -1):
            path = GOLDEN / self.sequence / f"step-{number}" / name
            if path.exists():
                return path.read_text()
        return ""


def steps(sequence: str) -> list[Step]:
    """A sequence of tests/golden from its first state on."""
    config = yaml.safe_load(read(sequence, "config.yaml"))
    objects = {_key(item): item for item in yaml.safe_load_all(read(sequence, "objects.yaml"))}
    found = [Step(sequence, 0, *lab_of(sequence, list(objects.values()), config), {})]
    for number in range(1, len(list((GOLDEN / sequence).glob("step-*/change.yaml"))) + 1):
        change = yaml.safe_load(read(sequence, f"step-{number}/change.yaml"))
        objects |= {_key(item): item for item in change.get("put", ())}
        for item in change.get("delete", ()):
            del objects[item["kind"], item["name"]]
        config |= change.get("restart", {})
        lab, node = lab_of(sequence, list(objects.values()), config)
        found.append(Step(sequence, number, lab, node, change))
    return found


def _key(item: dict[str, Any]) -> tuple[str, str]:
    """As `delete` of a step names it."""
    metadata = item["metadata"]
    namespace = metadata.get("namespace")
    name = metadata["name"]
    return item["kind"], f"{namespace}/{name}" if namespace else name


def lab_of(state: str, objects: list[dict[str, Any]], config: dict[str, Any]) -> tuple[Lab, Node]:
    """A lab of these objects, and the node that was recorded."""
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for item in objects:
        by_kind.setdefault(item["kind"], []).append(item)
    second = SECOND_ADDRESS.get(state, ())
    recorded = config["hostnameOverride"]
    lab = Lab(
        name=state,
        pod_cidr="10.42.0.0/16",
        service_cidrs=tuple(
            cidr for item in by_kind.get("ServiceCIDR", []) for cidr in item["spec"]["cidrs"]
        ),
        underlay=Underlay(cidr="192.168.77.0/24", gateway="192.168.77.1"),
        overlay=Overlay(),
        service_proxy=_proxy(config),
        nodes=tuple(
            _node(item, second if item["metadata"]["name"] == recorded else ())
            for item in by_kind["Node"]
        ),
        services=tuple(_service(item) for item in by_kind.get("Service", [])),
        endpoints=_endpoints(by_kind.get("EndpointSlice", [])),
    )
    return lab, lab.node(recorded)


def _proxy(config: dict[str, Any]) -> ServiceProxy:
    return ServiceProxy(
        detectLocalMode=config.get("detectLocalMode", ""),
        detectLocal=DetectLocal(**config.get("detectLocal", {})),
        clusterCIDR=config.get("clusterCIDR", ""),
        nodePortAddresses=tuple(config.get("nodePortAddresses", ())),
        iptables=msgspec.convert(config.get("iptables", {}), IPTablesProxy),
        nftables=msgspec.convert(config.get("nftables", {}), NFTablesProxy),
        ipvs=IPVSProxy(
            **{
                name: _SECONDS.get(value, value)
                for name, value in config.get("ipvs", {}).items()
                if not name.endswith("Period")  # of a proxy that runs
            }
        ),
        conntrack=ConntrackProxy(
            **{
                name: _SECONDS.get(value, value)
                for name, value in config.get("conntrack", {}).items()
                if name not in ("maxPerCore", "min")
            }
        ),
        featureGates=config.get("featureGates", {}),
    )


def _node(item: dict[str, Any], more: tuple[str, ...]) -> Node:
    first, *others = (
        entry["address"] for entry in item["status"]["addresses"] if entry["type"] == "InternalIP"
    )
    return Node(
        name=item["metadata"]["name"],
        address=first,
        other_addresses=(*others, *more),
        pod_cidr=item["spec"]["podCIDR"],
        other_pod_cidrs=tuple(item["spec"].get("podCIDRs", ())[1:]),
        labels=item["metadata"].get("labels", {}),
    )


def _service(item: dict[str, Any]) -> Service:
    spec = item["spec"]
    ingress = item.get("status", {}).get("loadBalancer", {}).get("ingress", [])
    first, *others = spec.get("clusterIPs", [""])
    return Service(
        namespace=item["metadata"]["namespace"],
        name=item["metadata"]["name"],
        labels=item["metadata"].get("labels", {}),
        type=spec["type"],
        cluster_ip=first,
        other_cluster_ips=tuple(others),
        ports=tuple(
            ServicePort(
                port=port["port"],
                protocol=port["protocol"],
                name=port.get("name", ""),
                node_port=port.get("nodePort"),
            )
            for port in spec.get("ports", [])
        ),
        external_ips=tuple(spec.get("externalIPs", ())),
        load_balancer_ips=tuple(
            entry["ip"] for entry in ingress if "ip" in entry and entry.get("ipMode") != "Proxy"
        ),
        load_balancer_source_ranges=tuple(spec.get("loadBalancerSourceRanges", ())),
        session_affinity=spec["sessionAffinity"],
        affinity_timeout_s=spec.get("sessionAffinityConfig", {})
        .get("clientIP", {})
        .get("timeoutSeconds", 10800),
        external_traffic_policy=spec.get("externalTrafficPolicy", "Cluster"),
        internal_traffic_policy=spec.get("internalTrafficPolicy", "Cluster"),
        health_check_node_port=spec.get("healthCheckNodePort"),
    )


def _endpoints(slices: list[dict[str, Any]]) -> tuple[ServiceEndpoints, ...]:
    found: dict[tuple[str, str, str, Any], list[Endpoint]] = {}
    for item in slices:
        metadata = item["metadata"]
        for port in item["ports"]:
            key = (
                metadata["namespace"],
                metadata["labels"]["kubernetes.io/service-name"],
                port["name"],
                port["protocol"],
            )
            found.setdefault(key, []).extend(
                _endpoint(entry, port["port"]) for entry in item["endpoints"] or []
            )
    return tuple(
        ServiceEndpoints(
            namespace=namespace,
            service=service,
            port_name=port_name,
            protocol=protocol,
            endpoints=tuple(endpoints),
        )
        for (namespace, service, port_name, protocol), endpoints in found.items()
    )


def _endpoint(entry: dict[str, Any], port: int) -> Endpoint:
    conditions, hints = entry.get("conditions", {}), entry.get("hints", {})
    return Endpoint(
        address=entry["addresses"][0],
        port=port,
        node=entry.get("nodeName"),
        ready=conditions.get("ready", True),
        serving=conditions.get("serving", True),
        terminating=conditions.get("terminating", False),
        for_nodes=tuple(hint["name"] for hint in hints.get("forNodes", ())),
        for_zones=tuple(hint["name"] for hint in hints.get("forZones", ())),
    )
