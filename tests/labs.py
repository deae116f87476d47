"""Small labs for tests, made of the model's own classes."""

from __future__ import annotations

import itertools
import os

from netlab.topology.model import (
    Endpoint,
    Lab,
    Node,
    Overlay,
    Pod,
    Service,
    ServiceEndpoints,
    ServicePort,
    ServiceProxy,
    Underlay,
)

_counter = itertools.count()


def fresh_name() -> str:
    """A lab name that no other test, worker or user has."""
    return f"test-{os.getpid()}-{next(_counter)}"


def small_lab(
    name: str | None = None, pods: int = 4, nodes: int = 2, overlay: str = "vxlan"
) -> Lab:
    """Pods p0, p1, ... in turn on nodes n1, n2, ...; Service demo/web of all but p0."""
    made_nodes = tuple(
        Node(name=f"n{i + 1}", address=f"172.21.32.{i + 11}", pod_cidr=f"10.244.{i + 1}.0/24")
        for i in range(nodes)
    )
    made_pods = tuple(
        Pod(
            namespace="demo",
            name=f"p{i}",
            node=made_nodes[i % nodes].name,
            address=f"10.244.{i % nodes + 1}.{i // nodes + 2}",
            labels={"app": "web"},
            listen=(("TCP", 8002), ("UDP", 8002)),
        )
        for i in range(pods)
    )
    endpoints = tuple(
        Endpoint(address=pod.address, port=8002, node=pod.node, pod=pod.key)
        for pod in made_pods[1:]
    )
    return Lab(
        name=name or fresh_name(),
        pod_cidr="10.244.0.0/16",
        service_cidrs=("10.96.0.0/12",),
        underlay=Underlay(cidr="172.21.32.0/24", gateway="172.21.32.1"),
        overlay=Overlay(type=overlay),
        service_proxy=ServiceProxy(clusterCIDR="10.244.0.0/16"),
        nodes=made_nodes,
        pods=made_pods,
        services=(
            Service(
                namespace="demo",
                name="web",
                cluster_ip="10.99.0.1",
                selector={"app": "web"},
                ports=(
                    ServicePort(name="http", port=80, target_port=8002),
                    ServicePort(name="udp", port=53, protocol="UDP", target_port=8002),
                ),
            ),
            Service(
                namespace="demo",
                name="empty",
                cluster_ip="10.99.0.2",
                selector={"app": "none"},
                ports=(ServicePort(port=80, target_port=8002),),
            ),
        ),
        endpoints=(
            ServiceEndpoints(
                namespace="demo",
                service="web",
                port_name="http",
                protocol="TCP",
                endpoints=endpoints,
            ),
            ServiceEndpoints(
                namespace="demo",
                service="web",
                port_name="udp",
                protocol="UDP",
                endpoints=endpoints,
            ),
        ),
    )
