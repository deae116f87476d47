"""Labs of IPv6 and of both families: what is decided, what is kept, what does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from netlab.problems import NetlabError, Problem
from netlab.topology.load import Loaded, load
from netlab.topology.model import Lab

LAB = "apiVersion: netlab/v1\nkind: Lab\nmetadata: {name: t}\nspec: {podCIDR: '%s'}\n---\n"
DUAL = LAB % "10.244.0.0/16,fd00:10:244::/48"
TWO_NODES = (
    "apiVersion: v1\nkind: Node\nmetadata: {name: n1}\n---\n"
    "apiVersion: v1\nkind: Node\nmetadata: {name: n2}\n---\n"
)
WEB = (
    "apiVersion: v1\nkind: Pod\nmetadata: {name: web, labels: {app: web}}\n"
    "spec: {nodeName: n1, containers: [{ports: [{containerPort: 8080}]}]}\n---\n"
)


def loaded(directory: Path, text: str) -> Loaded:
    """What a file with this text is."""
    file = directory / "t.yaml"
    file.write_text(text)
    return load(file)


def lab(directory: Path, text: str) -> Lab:
    """The lab of a file with this text, which has nothing to warn of."""
    result = loaded(directory, text)
    assert not result.warnings
    return result.lab


def problems(directory: Path, text: str) -> list[Problem]:
    """What is wrong with a file with this text."""
    with pytest.raises(NetlabError) as caught:
        loaded(directory, text)
    return list(caught.value.problems)


def service(name: str, spec: str) -> str:
    """The text of a Service of port 80."""
    return (
        f"apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\n"
        f"spec: {{ports: [{{port: 80, targetPort: 8080}}], {spec}}}\n---\n"
    )


# What is decided


def test_the_defaults_of_a_dual_stack_lab(tmp_path: Path) -> None:
    of = lab(tmp_path, DUAL + TWO_NODES + WEB)
    assert of.families == ("IPv4", "IPv6")
    assert of.pod_cidrs == ("10.244.0.0/16", "fd00:10:244::/48")
    assert of.service_cidrs == ("10.96.0.0/12", "fd00:10:96::/112")
    underlay = of.underlay
    assert (underlay.cidr, underlay.gateway) == ("172.21.32.0/24", "172.21.32.1")
    assert (underlay.other_cidr, underlay.other_gateway) == (
        "fd00:172:21:32::/64",
        "fd00:172:21:32::1",
    )
    assert of.service_proxy.clusterCIDR == "10.244.0.0/16,fd00:10:244::/48"
    assert [node.pod_cidrs for node in of.nodes] == [
        ("10.244.1.0/24", "fd00:10:244:1::/64"),
        ("10.244.2.0/24", "fd00:10:244:2::/64"),
    ]
    assert [node.addresses for node in of.nodes] == [
        ("172.21.32.2", "fd00:172:21:32::2"),
        ("172.21.32.3", "fd00:172:21:32::3"),
    ]
    assert of.pods[0].addresses == ("10.244.1.2", "fd00:10:244:1::2")


def test_an_ipv6_lab_has_nothing_else(tmp_path: Path) -> None:
    of = lab(tmp_path, LAB % "fd00:10:244::/48" + TWO_NODES + WEB + service("a", "type: NodePort"))
    assert of.families == ("IPv6",)
    assert (of.pod_cidr, of.other_pod_cidrs) == ("fd00:10:244::/48", ())
    assert of.service_cidrs == ("fd00:10:96::/112",)
    assert (of.underlay.cidr, of.underlay.other_cidr) == ("fd00:172:21:32::/64", "")
    (node, _), (pod,), (only,) = of.nodes, of.pods, of.services
    assert (node.address, node.other_addresses) == ("fd00:172:21:32::2", ())
    assert (pod.address, pod.other_addresses) == ("fd00:10:244:1::2", ())
    assert only.cluster_ips == ("fd00:10:96::b",)
    assert only.ports[0].node_port == 30000


def test_the_first_pod_cidr_is_the_primary_one(tmp_path: Path) -> None:
    of = lab(tmp_path, LAB % "fd00:10:244::/48, 10.244.0.0/16" + TWO_NODES + WEB)
    assert of.families == ("IPv6", "IPv4")
    assert of.pods[0].addresses == ("fd00:10:244:1::2", "10.244.1.2")
    assert of.underlay.other_cidr == "172.21.32.0/24"


def test_pods_in_the_nodes_network_have_its_addresses(tmp_path: Path) -> None:
    pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {hostNetwork: true}\n"
    of = lab(tmp_path, DUAL + TWO_NODES + pod)
    assert of.pods[0].addresses == ("172.21.32.2", "fd00:172:21:32::2")


def test_everything_stated_of_both_families(tmp_path: Path) -> None:
    of = lab(
        tmp_path,
        "apiVersion: netlab/v1\nkind: Lab\nmetadata: {name: t}\nspec:\n"
        "  podCIDR: 10.9.0.0/16,fd09::/48\n  serviceCIDR: 10.8.0.0/16,fd08::/108\n"
        "  underlay: {cidr: '192.0.2.0/24,fd07::/64', gateway: 'fd07::ff,192.0.2.99'}\n"
        "  serviceProxy: {clusterCIDR: '10.9.0.0/16,fd09::/48', nodePortAddresses:"
        " [192.0.2.0/24, 'fd07::/64']}\n",
    )
    assert of.service_cidrs == ("10.8.0.0/16", "fd08::/108")
    assert (of.underlay.cidr, of.underlay.other_cidr) == ("192.0.2.0/24", "fd07::/64")
    assert (of.underlay.gateway, of.underlay.other_gateway) == ("192.0.2.99", "fd07::ff")
    assert of.nodes[0].addresses == ("192.0.2.1", "fd07::1")
    assert of.nodes[0].pod_cidrs == ("10.9.1.0/24", "fd09:0:0:1::/64")
