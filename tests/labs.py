"""Small labs for tests, made of the model's own classes."""

from __future__ import annotations

import itertools
import os
import re
from ipaddress import ip_interface

import msgspec
import pytest
from msgspec.structs import replace

from netlab.kernel import features
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


def require_overlay(overlay: str) -> None:
    """Skip where the kernel lacks what an overlay needs; a virtual machine has it."""
    if overlay == "ipip" and not features.attempt(["ipip"])["ipip"].ok:
        pytest.skip("this kernel lacks the module ipip")


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


def six(text: str) -> str:
    """Text with an IPv6 address or network in place of each IPv4 one.

    10.244.1.11 becomes fd00:10:244:1::b, 10.244.1.0/24 fd00:10:244:1::/64.
    """
    return re.sub(r"\b(\d+)\.(\d+)\.(\d+)\.(\d+)(?:/(\d+))?\b", _six, text)


def _six(match: re.Match[str]) -> str:
    a, b, c, d, length = match.groups()
    text = f"fd00:{a}:{b}:{c}::{int(d):x}"
    if match[0].startswith("127.0.0."):
        text = "::1"
    if length is None:
        return str(ip_interface(text).ip)
    bits = int(length)
    of_six = 0 if bits == 0 else 16 + 2 * bits if bits <= 24 else 96 + bits
    interface = ip_interface(f"{text}/{of_six}")
    return str(interface.network)


def ipv6_lab(lab: Lab) -> Lab:
    """The same lab with IPv6 alone."""
    return msgspec.json.decode(six(msgspec.json.encode(lab).decode()), type=Lab)


def dual_stack_lab(lab: Lab) -> Lab:
    """The same lab with IPv6 beside its IPv4, all Services of both families."""
    other = ipv6_lab(lab)
    proxy = lab.service_proxy
    both_cidrs = ",".join(filter(None, (proxy.clusterCIDR, other.service_proxy.clusterCIDR)))
    return replace(
        lab,
        other_pod_cidrs=(other.pod_cidr,),
        service_cidrs=lab.service_cidrs + other.service_cidrs,
        underlay=replace(
            lab.underlay, other_cidr=other.underlay.cidr, other_gateway=other.underlay.gateway
        ),
        service_proxy=replace(proxy, clusterCIDR=both_cidrs),
        nodes=tuple(
            replace(node, other_addresses=(there.address,), other_pod_cidrs=(there.pod_cidr,))
            for node, there in zip(lab.nodes, other.nodes, strict=True)
        ),
        pods=tuple(
            replace(pod, other_addresses=(there.address,))
            for pod, there in zip(lab.pods, other.pods, strict=True)
        ),
        services=tuple(
            replace(
                service,
                other_cluster_ips=(there.cluster_ip,),
                external_ips=service.external_ips + there.external_ips,
                load_balancer_ips=service.load_balancer_ips + there.load_balancer_ips,
                load_balancer_source_ranges=(
                    service.load_balancer_source_ranges + there.load_balancer_source_ranges
                ),
            )
            for service, there in zip(lab.services, other.services, strict=True)
        ),
        endpoints=tuple(
            replace(entry, endpoints=entry.endpoints + there.endpoints)
            for entry, there in zip(lab.endpoints, other.endpoints, strict=True)
        ),
    )
