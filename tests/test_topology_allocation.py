"""Whatever is left out: what is decided is unique, in its place, and the same again."""

from __future__ import annotations

import tempfile
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from netlab.topology.load import load
from netlab.topology.model import Lab

Object = dict[str, Any]


def allocated(objects: list[Object], kind: str = "yaml") -> Lab:
    """The lab of these objects, read from a file."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / f"lab.{kind}"
        documents = b"\n---\n".join(msgspec.json.encode(each) for each in objects)
        if kind == "json":
            documents = msgspec.json.encode({"apiVersion": "v1", "kind": "List", "items": objects})
        file.write_bytes(documents)
        return load(file).lab


@st.composite
def topologies(draw: st.DrawFn) -> list[Object]:
    """Objects that say some of what can be said, without contradiction; half of dual-stack labs."""
    objects: list[Object] = []
    both = draw(st.booleans())
    count = draw(st.integers(1, 6))
    cidrs = draw(st.lists(st.integers(0, 40), min_size=count, max_size=count, unique=True))
    hosts = draw(st.lists(st.integers(1, 254), min_size=count, max_size=count, unique=True))
    given_cidrs = [draw(st.booleans()) for _ in range(count)]
    given_cidrs[0] = given_cidrs[0] or both  # (from them the families follow)
    for i in range(count):
        node: Object = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": f"n{i}"}}
        if given_cidrs[i]:
            node["spec"] = {"podCIDR": f"10.244.{cidrs[i]}.0/24"}
        if both and given_cidrs[i] and (i == 0 or draw(st.booleans())):
            six = str(ip_network(f"fd00:10:244:{cidrs[i]:x}::/64"))
            node["spec"]["podCIDRs"] = [node["spec"]["podCIDR"], six]
        given_hosts = [f"172.21.32.{hosts[i]}"] if draw(st.booleans()) else []
        if both and draw(st.booleans()):
            given_hosts.append(f"fd00:172:21:32::{hosts[i]:x}")
        if given_hosts:
            addresses = [{"type": "InternalIP", "address": address} for address in given_hosts]
            node["status"] = {"addresses": addresses}
        objects.append(node)
    pod_hosts = draw(st.lists(st.integers(2, 254), max_size=12, unique=True))
    for i, host in enumerate(pod_hosts):
        pod: Object = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"p{i}"}}
        node_index = draw(st.none() | st.integers(0, count - 1))
        pod["spec"] = {"hostNetwork": draw(st.booleans())}
        if node_index is not None:
            pod["spec"]["nodeName"] = f"n{node_index}"
            if given_cidrs[node_index] and draw(st.booleans()):
                pod["status"] = {"podIP": f"10.244.{cidrs[node_index]}.{host}"}
            if both and node_index == 0 and draw(st.booleans()):
                six = str(ip_address(f"fd00:10:244:{cidrs[0]:x}::{host:x}"))
                pod.setdefault("status", {})["podIPs"] = [{"ip": six}]
        pod["metadata"]["labels"] = {"app": draw(st.sampled_from("ab"))}
        objects.append(pod)
    for i in range(draw(st.integers(0, 3))):
        template = {"metadata": {"labels": {"app": draw(st.sampled_from("ab"))}}}
        objects.append(
            {
                "apiVersion": "apps/v1",
                "kind": draw(st.sampled_from(["Deployment", "StatefulSet", "DaemonSet"])),
                "metadata": {"name": f"d{i}"},
                "spec": {"replicas": draw(st.integers(0, 8)), "template": template},
            }
        )
    offsets = draw(st.lists(st.integers(1, 40), max_size=10, unique=True))
    for i, offset in enumerate(offsets):
        spec: Object = {
            "type": draw(st.sampled_from(["ClusterIP", "NodePort", "LoadBalancer"])),
            "selector": {"app": draw(st.sampled_from("ab"))},
            "ports": [{"port": 80}],
        }
        if draw(st.booleans()):
            spec["clusterIP"] = f"10.96.0.{offset}"
        elif both and draw(st.booleans()):
            spec["clusterIP"] = f"fd00:10:96::{offset:x}"
        policies = ["SingleStack", "PreferDualStack", *(["RequireDualStack"] if both else [])]
        spec["ipFamilyPolicy"] = draw(st.sampled_from(policies))
        if spec["type"] != "ClusterIP" and draw(st.booleans()):
            spec["ports"][0]["nodePort"] = 30000 + offset
        objects.append(
            {"apiVersion": "v1", "kind": "Service", "metadata": {"name": f"s{i}"}, "spec": spec}
        )
    return draw(st.permutations(objects))


@settings(max_examples=150, deadline=None)
@given(topologies())
def test_addresses_are_unique_and_inside_their_networks(objects: list[Object]) -> None:
    lab = allocated(objects)
    underlay = lab.underlay
    underlays = [ip_network(each) for each in (underlay.cidr, underlay.other_cidr) if each]
    pools = [ip_network(cidr) for cidr in lab.pod_cidrs]
    nodes = {node.name: node for node in lab.nodes}
    assert len(underlays) == len(pools) == len(lab.families)
    taken = [each for each in (underlay.gateway, underlay.other_gateway) if each]
    for place, pool in enumerate(pools):
        cidrs = [ip_network(node.pod_cidrs[place]) for node in lab.nodes]
        for index, cidr in enumerate(cidrs):
            assert cidr.subnet_of(pool)  # type: ignore[arg-type]
            assert not any(cidr.overlaps(other) for other in cidrs[:index])
    for node in lab.nodes:
        assert len(node.addresses) == len(node.pod_cidrs) == len(lab.families)
        for address, inside in zip(node.addresses, underlays, strict=True):
            assert ip_address(address) in inside
        taken += (*node.addresses, *node.bridge_addresses, *node.overlay_addresses)
    for pod in lab.pods:
        if pod.host_network:
            assert pod.addresses == nodes[pod.node].addresses
            continue
        for address, cidr in zip(pod.addresses, nodes[pod.node].pod_cidrs, strict=True):
            assert ip_address(address) in ip_network(cidr)
        taken += pod.addresses
    for service in lab.services:
        for ip, of in zip(service.cluster_ips, service.ip_families, strict=True):
            cidr = {"IPv4": "10.96.0.0/12", "IPv6": "fd00:10:96::/112"}[of]
            assert ip_address(ip) in ip_network(cidr)
        taken += service.cluster_ips
    assert len(set(taken)) == len(taken)
    node_ports = [port.node_port for each in lab.services for port in each.ports if port.node_port]
    assert len(set(node_ports)) == len(node_ports)
    assert all(30000 <= port <= 32767 for port in node_ports)
    keys = [pod.key for pod in lab.pods]
    assert len(set(keys)) == len(keys)


@settings(max_examples=100, deadline=None)
@given(topologies())
def test_what_is_given_is_kept(objects: list[Object]) -> None:
    lab = allocated(objects)
    nodes = {node.name: node for node in lab.nodes}
    pods = {pod.name: pod for pod in lab.pods}
    services = {service.name: service for service in lab.services}
    for each in objects:
        name, spec, status = each["metadata"]["name"], each.get("spec", {}), each.get("status", {})
        if each["kind"] == "Node":
            assert nodes[name].pod_cidr == spec.get("podCIDR", nodes[name].pod_cidr)
            assert {*spec.get("podCIDRs", ())} <= {*nodes[name].pod_cidrs}
            for address in status.get("addresses", []):
                assert address["address"] in nodes[name].addresses
        elif each["kind"] == "Pod":
            assert pods[name].node == spec.get("nodeName", pods[name].node)
            if not spec["hostNetwork"]:
                assert pods[name].address == status.get("podIP", pods[name].address)
                assert {ip["ip"] for ip in status.get("podIPs", ())} <= {*pods[name].addresses}
        elif each["kind"] == "Service":
            service = services[name]
            assert service.cluster_ip == spec.get("clusterIP", service.cluster_ip)
            (port,) = service.ports
            assert port.node_port == spec["ports"][0].get("nodePort", port.node_port)
            assert (port.node_port is None) == (spec["type"] == "ClusterIP")


@settings(max_examples=50, deadline=None)
@given(topologies())
def test_the_same_objects_give_the_same_lab_from_yaml_and_json(objects: list[Object]) -> None:
    lab = allocated(objects)
    assert allocated(objects) == lab
    assert allocated(objects, "json") == lab


@settings(max_examples=50, deadline=None)
@given(topologies())
def test_endpoints_are_the_pods_that_the_selector_names(objects: list[Object]) -> None:
    lab = allocated(objects)
    for service in lab.services:
        wanted = {
            (pod.key, address, pod.node)
            for pod in lab.pods
            if pod.labels.get("app") == service.selector["app"]
            for address in pod.addresses
            if ("IPv6" if ":" in address else "IPv4") in service.ip_families
        }
        found = lab.endpoints_of(service, service.ports[0])
        assert {(each.pod, each.address, each.node) for each in found} == wanted
        assert len(found) == len(wanted)
        for pod in lab.pods:
            if pod.labels.get("app") == service.selector["app"] and not pod.host_network:
                assert ("TCP", 80) in pod.listen


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(0, 40))
def test_replicas_are_spread(nodes: int, replicas: int) -> None:
    objects: list[Object] = [
        {"apiVersion": "v1", "kind": "Node", "metadata": {"name": f"n{i}"}} for i in range(nodes)
    ]
    objects.append(
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": "d"},
            "spec": {"replicas": replicas, "template": {}},
        }
    )
    lab = allocated(objects)
    counts = [sum(pod.node == node.name for pod in lab.pods) for node in lab.nodes]
    assert sum(counts) == replicas
    assert max(counts) - min(counts) <= 1


def test_the_documented_defaults() -> None:
    nodes: list[Object] = [
        {"apiVersion": "v1", "kind": "Node", "metadata": {"name": f"n{i}"}} for i in range(3)
    ]
    pods: list[Object] = [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"p{i}"}} for i in range(4)
    ]
    services: list[Object] = [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": f"s{i}"},
            "spec": {"type": "NodePort", "ports": [{"port": 80}]},
        }
        for i in range(2)
    ]
    lab = allocated([*nodes, *pods, *services])
    assert lab.name == "lab"
    assert (lab.pod_cidr, lab.service_cidrs) == ("10.244.0.0/16", ("10.96.0.0/12",))
    assert (lab.underlay.cidr, lab.underlay.gateway) == ("172.21.32.0/24", "172.21.32.1")
    assert [(node.address, node.pod_cidr) for node in lab.nodes] == [
        ("172.21.32.2", "10.244.1.0/24"),
        ("172.21.32.3", "10.244.2.0/24"),
        ("172.21.32.4", "10.244.3.0/24"),
    ]
    assert [(pod.node, pod.address) for pod in lab.pods] == [
        ("n0", "10.244.1.2"),
        ("n1", "10.244.2.2"),
        ("n2", "10.244.3.2"),
        ("n0", "10.244.1.3"),
    ]
    assert [service.cluster_ip for service in lab.services] == ["10.96.0.11", "10.96.0.12"]
    assert [service.ports[0].node_port for service in lab.services] == [30000, 30001]


def test_the_last_corners_of_small_networks_are_used() -> None:
    objects: list[Object] = [
        {
            "apiVersion": "netlab/v1",
            "kind": "Lab",
            "metadata": {"name": "small"},
            "spec": {
                "podCIDR": "10.244.0.0/23",
                "serviceCIDR": "10.96.0.0/28",
                "underlay": {"cidr": "192.0.2.0/29"},
            },
        },
        {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"}},
        {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n2"}},
    ]
    objects += [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": f"s{i}"},
            "spec": {"ports": [{"port": 80}]},
        }
        for i in range(14)
    ]
    lab = allocated(objects)
    assert [node.pod_cidr for node in lab.nodes] == ["10.244.1.0/24", "10.244.0.0/24"]
    last_bytes = [int(each.cluster_ip.rpartition(".")[2]) for each in lab.services]
    assert last_bytes == [11, 12, 13, 14, *range(1, 11)]
