"""Labs with many Services: one node that has their rules, one pod that asks, one that answers.

The client's pod is on the first node, the endpoints' pod on the second, so that the way to an
endpoint is the same with and without a Service: over the node's routing and the overlay.  All
endpoints are ports of one pod; rules tell endpoints by address and port, and so each is one of its
own to them.
"""

from __future__ import annotations

import os

from netlab.compare.model import Variant
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

PORT = 80  # of every Service
CLIENT_NODE, SERVER_NODE = "client", "server"
NAMESPACE = "bench"
CLIENT_ADDRESS, SERVER_ADDRESS = "10.128.0.2", "10.129.0.2"
_FIRST_PORT, _PORTS = 1024, 60_000


def name(word: str) -> str:
    """A lab name that nobody else has: of which process, and for which mode or what else."""
    return f"bench-{os.getpid()}-{word.replace(':', '-')}-{os.urandom(3).hex()}"


def lab(name: str, variant: Variant, services: int, endpoints: int, overlay: str = "vxlan") -> Lab:
    """Two nodes with a pod each, and so many Services of one TCP port and `endpoints` endpoints."""
    return Lab(
        name=name,
        pod_cidr="10.128.0.0/10",
        service_cidrs=("10.96.0.0/12",),
        underlay=Underlay(cidr="172.21.32.0/24", gateway="172.21.32.1"),
        overlay=Overlay(type=overlay),
        service_proxy=ServiceProxy(mode=variant.mode, clusterCIDR="10.128.0.0/10"),
        iptables_backend=variant.backend,
        nodes=(
            Node(name=CLIENT_NODE, address="172.21.32.11", pod_cidr="10.128.0.0/16"),
            Node(name=SERVER_NODE, address="172.21.32.12", pod_cidr="10.129.0.0/16"),
        ),
        pods=(
            Pod(namespace=NAMESPACE, name="client", node=CLIENT_NODE, address=CLIENT_ADDRESS),
            Pod(namespace=NAMESPACE, name="server", node=SERVER_NODE, address=SERVER_ADDRESS),
        ),
        services=tuple(
            Service(
                namespace=NAMESPACE,
                name=f"service-{number}",
                cluster_ip=cluster_ip(number),
                ip_families=("IPv4",),
                ports=(ServicePort(name="http", port=PORT, target_port=8080),),
            )
            for number in range(services)
        ),
        endpoints=tuple(
            ServiceEndpoints(
                namespace=NAMESPACE,
                service=f"service-{number}",
                port_name="http",
                protocol="TCP",
                endpoints=tuple(
                    Endpoint(address=SERVER_ADDRESS, port=port, node=SERVER_NODE)
                    for port in endpoint_ports(number, endpoints)
                ),
            )
            for number in range(services)
        ),
    )


def cluster_ip(service: int) -> str:
    """The address of a Service by its number; there is room for a million."""
    high, low = divmod(service + 1, 1 << 16)
    return f"10.{96 + high}.{low >> 8}.{low & 255}"


def endpoint_ports(service: int, endpoints: int) -> tuple[int, ...]:
    """Ports of the server's pod that are a Service's endpoints."""
    first = service * endpoints
    return tuple(_FIRST_PORT + (first + place) % _PORTS for place in range(endpoints))
