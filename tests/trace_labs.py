"""A lab for traces: one Service for each thing that can happen to a packet to a Service."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from msgspec.structs import replace

from labs import small_lab
from netlab.datapath.state import namespace_name
from netlab.lab import lifecycle
from netlab.topology.model import Endpoint, Lab, Protocol, Service, ServiceEndpoints, ServicePort

# Name: cluster IP, protocol, the pod behind it.  p0 and p2 are on n1, p1 and p3 on n2.
_SERVICES: dict[str, tuple[str, Protocol, str | None]] = {
    "remote": ("10.99.0.1", "TCP", "p1"),
    "local": ("10.99.0.2", "TCP", "p2"),
    "itself": ("10.99.0.3", "TCP", "p0"),
    "empty": ("10.99.0.4", "TCP", None),
    "datagrams": ("10.99.0.5", "UDP", "p1"),
}


def trace_lab(name: str | None = None) -> Lab:
    """Two nodes, four pods, and the Services above, each with port 80 to 8002."""
    lab = small_lab(name)
    pods = {pod.name: pod for pod in lab.pods}
    services, endpoints = [], []
    for service, (address, protocol, pod) in _SERVICES.items():
        port = ServicePort(port=80, protocol=protocol, target_port=8002)
        services.append(Service(namespace="demo", name=service, cluster_ip=address, ports=(port,)))
        behind = pods.get(pod or "")
        if behind:
            end = Endpoint(address=behind.address, port=8002, node=behind.node, pod=behind.key)
            endpoints.append(
                ServiceEndpoints(
                    namespace="demo",
                    service=service,
                    port_name="",
                    protocol=protocol,
                    endpoints=(end,),
                )
            )
    return replace(lab, services=tuple(services), endpoints=tuple(endpoints))


def namespace(lab: Lab, *parts: str) -> str:
    """File name of a namespace of the lab."""
    return namespace_name(lab.name, *parts)


@pytest.fixture
def lab() -> Iterator[Lab]:
    """A trace lab that is up."""
    made = trace_lab()
    try:
        lifecycle.up(made)
        yield made
    finally:
        lifecycle.down(made.name)
