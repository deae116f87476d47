"""A real cluster's objects as a topology, and parts of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

import cluster_dumps as dumps
from cluster_dumps import Object, calico_cluster, flannel, ip_pool, kube_proxy, node, pod
from labs import fresh_name
from netlab.kernel import namespaces
from netlab.lab import change, lifecycle
from netlab.problems import NetlabError
from netlab.topology.load import Loaded, load, read_objects
from netlab.topology.model import Lab
from test_lifecycle import http


@pytest.fixture
def loaded(tmp_path: Path) -> Any:
    """Loads objects as a dump."""

    def of(*objects: Object, **options: Any) -> Loaded:
        file = tmp_path / "cluster.json"
        file.write_text(json.dumps(dumps.dump(*objects)))
        return load(file, **options)

    return of


def assumed(loaded: Loaded) -> list[str]:
    """What was assumed."""
    return [each.message for each in loaded.warnings if each.code == "assumed"]


def flannel_cluster(backend: Object) -> list[Object]:
    return [
        node("a", "10.0.0.4", "10.42.0.0/24"),
        node("b", "10.0.0.5", "10.42.1.0/24"),
        pod("web-1-x", "a", "10.0.0.4", "10.42.0.9"),
        kube_proxy("nftables", "10.42.0.0/16"),
        flannel(backend, "10.42.0.0/16"),
    ]


def test_a_dump_keeps_what_the_cluster_decided(loaded: Any) -> None:
    lab = loaded(*calico_cluster()).lab
    assert {pod.name: (pod.node, pod.address, pod.host_network) for pod in lab.pods} == {
        "front-6f7d9-a1b2c": ("worker-1", "172.16.235.129", False),
        "back-75b4c-d3e4f": ("worker-2", "172.16.189.66", False),
        "back-75b4c-g5h6i": ("worker-1", "172.16.235.130", False),
        "kube-proxy-x1": ("worker-1", "192.168.56.11", True),
    }
    assert [node.pod_cidr for node in lab.nodes] == [f"172.16.{i}.0/24" for i in range(3)]
    assert [service.cluster_ip for service in lab.services] == ["10.96.0.1", "10.96.41.7"]
    assert [len(each.endpoints) for each in lab.endpoints] == [1, 2]


def test_every_assumption_is_told(loaded: Any) -> None:
    assert assumed(loaded(*calico_cluster())) == [
        "pod CIDR 172.16.0.0/16: it holds the nodes' pod CIDRs",
        "Service CIDR 10.96.0.0/12: there is no ServiceCIDR and no ConfigMap kubeadm-config",
        "overlay vxlan (VNI 1, port 8472): nothing says how pods reach other nodes",
        "kube-proxy in mode iptables, clusterCIDR 172.16.0.0/16: there is no ConfigMap kube-proxy",
        "all nodes are on one network, 192.168.56.0/24, with an MTU of 1500",
        "what pods send to the outside keeps their addresses, whatever the CNI plugin does",
    ]


def test_a_file_of_ones_own_assumes_nothing() -> None:
    assert assumed(load("two-node-vxlan")) == []


def test_settings_of_the_cluster_stand_in_for_the_lab(loaded: Any) -> None:
    kubeadm = dumps.config_map(
        "kubeadm-config",
        ClusterConfiguration="networking: {podSubnet: 172.16.0.0/12, serviceSubnet: 10.96.0.0/16}",
    )
    told = loaded(
        *calico_cluster(),
        kube_proxy("nftables", "172.16.0.0/16", "nftables: {masqueradeBit: 15, syncPeriod: 1s}\n"),
        ip_pool("172.16.0.0/16", ipipMode="Never", vxlanMode="Always"),
        kubeadm,
    )
    lab = told.lab
    assert lab.pod_cidr == "172.16.0.0/12"
    assert lab.service_cidrs == ("10.96.0.0/16",)
    assert (lab.overlay.type, lab.overlay.vni, lab.overlay.port) == ("vxlan", 4096, 4789)
    assert lab.service_proxy.mode == "nftables"
    assert lab.service_proxy.clusterCIDR == "172.16.0.0/16"
    assert lab.service_proxy.nftables.masqueradeBit == 15
    assert len(assumed(told)) == 2


@pytest.mark.parametrize(
    ("backend", "overlay"),
    [
        ({"Type": "vxlan"}, ("vxlan", 1, 8472)),
        ({"Type": "vxlan", "VNI": 4, "Port": 4789}, ("vxlan", 4, 4789)),
        ({"Type": "host-gw"}, ("host-gw", 1, 8472)),
        ({"Type": "wireguard"}, ("vxlan", 1, 8472)),
    ],
)
def test_flannel_tells_the_overlay(
    loaded: Any, backend: Object, overlay: tuple[str, int, int]
) -> None:
    told = loaded(*flannel_cluster(backend))
    assert (told.lab.overlay.type, told.lab.overlay.vni, told.lab.overlay.port) == overlay
    assert told.lab.pod_cidr == "10.42.0.0/16"
    said = "overlay vxlan: flannel's is wireguard, which this version does not build"
    assert (said in assumed(told)) is (backend["Type"] == "wireguard")


@pytest.mark.parametrize(
    ("ipip", "vxlan", "overlay"),
    [
        ("Never", "Never", "host-gw"),
        ("Never", "CrossSubnet", "host-gw"),
        ("Always", "Never", "vxlan"),
    ],
)
def test_pools_of_calico_tell_the_overlay(loaded: Any, ipip: str, vxlan: str, overlay: str) -> None:
    told = loaded(*calico_cluster(), ip_pool("172.16.0.0/16", ipipMode=ipip, vxlanMode=vxlan))
    assert told.lab.overlay.type == overlay
    said = {
        "host-gw": "overlay host-gw: Calico's has no tunnel between these nodes, "
        "and no BGP runs here",
        "vxlan": "overlay vxlan (VNI 1, port 8472): Calico's is ipip, which is not built",
    }
    assert [each for each in assumed(told) if each.startswith("overlay")] == [said[overlay]]


def test_a_mode_that_is_not_built_is_replaced_and_told(loaded: Any) -> None:
    told = loaded(*calico_cluster(), kube_proxy("kernelspace", "172.16.0.0/16"))
    assert told.lab.service_proxy.mode == "iptables"
    assert (
        "mode iptables: the cluster's is kernelspace, which this version does not build"
        in assumed(told)
    )


def test_kube_proxy_without_cluster_cidr_has_none(loaded: Any) -> None:
    assert loaded(*calico_cluster(), kube_proxy()).lab.service_proxy.clusterCIDR == ""


def test_settings_that_cannot_be_read_are_left_out(loaded: Any) -> None:
    broken = dumps.config_map("kube-proxy", config_conf="mode: [")
    wrong = dumps.config_map("kube-flannel-cfg", net__conf_json='{"Network": 7, "Backend": []}')
    told = loaded(*calico_cluster(), broken, wrong)
    assert told.lab.service_proxy.mode == "iptables"
    said = [each.message for each in told.warnings if each.code == "no-settings"]
    assert said == [
        "ConfigMap kube-proxy is not heeded: its config.conf is missing or cannot be read"
    ]


def test_a_lab_wins_over_the_settings(loaded: Any) -> None:
    spec = {"podCIDR": "172.16.0.0/15", "serviceProxy": {"mode": "nftables-flat"}}
    own = {"apiVersion": "netlab/v1", "kind": "Lab", "metadata": {"name": "mine"}, "spec": spec}
    told = loaded(own, *flannel_cluster({"Type": "host-gw"}))
    assert told.lab.name == "mine"
    assert told.lab.pod_cidr == "172.16.0.0/15"
    assert told.lab.service_proxy.mode == "nftables-flat"
    assert told.lab.overlay.type == "host-gw"


def test_what_a_lab_says_is_not_assumed(loaded: Any) -> None:
    spec = {"overlay": {"type": "host-gw"}, "serviceProxy": {"mode": "nftables"}}
    own = {"apiVersion": "netlab/v1", "kind": "Lab", "metadata": {"name": "mine"}, "spec": spec}
    cluster = flannel_cluster({"Type": "wireguard"})
    told = loaded(own, *cluster[:3], kube_proxy("ipvs", "10.42.0.0/16"), cluster[4])
    assert told.lab.service_proxy.mode == "nftables"
    assert not [each for each in assumed(told) if each.startswith(("overlay", "mode"))]


def without(kind: str) -> list[Object]:
    return [each for each in calico_cluster() if each["kind"] != kind]


def test_nodes_that_only_pods_name_are_added(loaded: Any) -> None:
    told = loaded(*without("Node"))
    assert {node.name: node.address for node in told.lab.nodes} == {
        "worker-1": "192.168.56.11",
        "worker-2": "192.168.56.12",
    }
    said = "Node worker-1 is not in the file: Pod shop/front-6f7d9-a1b2c runs on it; "
    assert said + "it is at 192.168.56.11, its hostIP" in assumed(told)


def test_half_a_dump_says_what_is_missing(loaded: Any) -> None:
    said = {
        kind: [each.message for each in loaded(*without(kind)).warnings]
        for kind in ("Pod", "Service", "EndpointSlice")
    }
    lost = "EndpointSlice shop/back-x7k2p: no pod of the lab has endpoints[0].addresses[0] "
    assert lost + "172.16.189.66" in said["Pod"]
    orphan = "EndpointSlice shop/back-x7k2p belongs to Service back, which is not in the file"
    assert orphan in said["Service"]
    assert "Service shop/back: no pod matches its selector app=back" in said["EndpointSlice"]


def test_pods_without_an_address_are_left_out(loaded: Any) -> None:
    said = [each.message for each in loaded(*calico_cluster()).warnings]
    assert "left out, as they have no address yet: 1 pods" in said
    assert "left out, as they have finished: 1 pods" in said


def test_readiness_is_the_clusters_and_no_probe_runs(loaded: Any) -> None:
    off = pod("web-1-y", "a", "10.0.0.4", "10.42.0.10", ready=False)
    lab = loaded(*flannel_cluster({"Type": "vxlan"}), off).lab
    assert {pod.name: pod.ready for pod in lab.pods} == {"web-1-x": True, "web-1-y": False}


def test_two_host_network_pods_on_one_port_are_reported(loaded: Any) -> None:
    twins = [
        pod(f"agent-{i}", "a", "10.0.0.4", "10.0.0.4", ports=(9100,), host_network=True)
        for i in range(2)
    ]
    said = [each.message for each in loaded(*flannel_cluster({"Type": "vxlan"}), *twins).warnings]
    assert "Pod shop/agent-1: TCP 9100 on node a is already Pod shop/agent-0's" in ";".join(said)


# Parts


def names(lab: Lab) -> tuple[list[str], list[str], list[str]]:
    return (
        [node.name for node in lab.nodes],
        [pod.name for pod in lab.pods],
        [service.name for service in lab.services],
    )


BACK = ["back-75b4c-d3e4f", "back-75b4c-g5h6i"]


def test_only_a_service_brings_its_pods_and_nodes(loaded: Any) -> None:
    whole = loaded(*calico_cluster()).lab
    part = loaded(*calico_cluster(), only=["svc/back"]).lab
    assert names(part) == (["worker-1", "worker-2"], BACK, ["back"])
    assert part.nodes == whole.nodes[1:]
    assert part.underlay == whole.underlay
    assert part.service_proxy == whole.service_proxy


def test_only_takes_pods_for_the_other_end(loaded: Any) -> None:
    part = loaded(*calico_cluster(), only=["svc/back", "pod/front-6f7d9-a1b2c"]).lab
    assert names(part) == (["worker-1", "worker-2"], ["front-6f7d9-a1b2c", *BACK], ["back"])


def test_nodes_keep_every_service_and_lose_what_is_elsewhere(loaded: Any) -> None:
    told = loaded(*calico_cluster(), nodes=["worker-1"])
    pods = ["front-6f7d9-a1b2c", "back-75b4c-g5h6i", "kube-proxy-x1"]
    assert names(told.lab) == (["worker-1"], pods, ["kubernetes", "back"])
    assert [len(each.endpoints) for each in told.lab.endpoints] == [1, 2]
    said = "endpoints that are left out: 1 pods; what is sent there is lost"
    assert said in [each.message for each in told.warnings]


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"only": ["svc/nothing"]}, "unknown-service"),
        ({"only": ["node/worker-1"]}, "bad-reference"),
        ({"nodes": ["worker-9"]}, "unknown-node"),
    ],
)
def test_a_part_that_is_not_there(loaded: Any, options: dict[str, list[str]], code: str) -> None:
    with pytest.raises(NetlabError) as refused:
        loaded(*calico_cluster(), **options)
    assert [each.code for each in refused.value.problems] == [code]


def test_a_part_can_be_changed_later(loaded: Any, tmp_path: Path) -> None:
    part = loaded(*calico_cluster(), only=["svc/back"]).lab
    ready = change.ready(part, ["back-75b4c-g5h6i"], False).lab
    assert names(ready) == names(part)
    assert {pod.name: pod.ready for pod in ready.pods} == dict(
        zip(BACK, (True, False), strict=True)
    )
    file = tmp_path / "more.json"
    file.write_text(json.dumps(dumps.service("front", "10.96.41.8", selector=False)))
    documents, _ = read_objects([file])
    more = change.apply(part, documents).lab
    assert names(more) == (names(part)[0], BACK, ["back", "front"])


def test_endpoints_elsewhere_outlast_a_change_of_something_else(loaded: Any) -> None:
    part = loaded(*other_networks(None, None)[:-1], nodes=["a"]).lab
    later = change.ready(part, ["client-1-x"], False).lab
    assert later.endpoints == part.endpoints
    assert [end.address for each in later.endpoints for end in each.endpoints] == [
        "10.0.1.77",
        "10.0.1.1",
    ]


def test_a_part_of_a_deployment_keeps_its_size(tmp_path: Path) -> None:
    file = tmp_path / "four.json"
    spec = {"replicas": 4, "template": {"metadata": {"labels": {"app": "web"}}}}
    web = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"}, "spec": spec}
    nodes = [{"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}} for name in "ab"]
    file.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": [*nodes, web]}))
    part = load(file, nodes=["a"]).lab
    assert len(part.pods) == 2
    again = change.ready(part, [part.pods[0].name], False).lab
    assert [pod.name for pod in again.pods] == [pod.name for pod in part.pods]


# Pods that do not live in their nodes' pod CIDRs


def other_networks(*cidrs: str | None, network: str = "10.0.1") -> list[Object]:
    """Two nodes at .20 and .31, a client on the first, a Service of one pod on each.

    Pods have .1, which elsewhere is a bridge's or a gateway's address, and others of `network`.
    """
    nodes = [node("a", "10.0.1.20", cidrs[0]), node("b", "10.0.1.31", cidrs[1])]
    behind = [
        pod("web-1-x", "a", "10.0.1.20", f"{network}.77"),
        pod("web-1-z", "b", "10.0.1.31", f"{network}.1"),
    ]
    return [
        *nodes,
        *behind,
        pod("client-1-x", "a", "10.0.1.20", f"{network}.66"),
        dumps.service("web-1", "172.20.0.10"),
        dumps.endpoint_slice("web-1", 8080, *behind),
    ]


def test_pods_in_the_nodes_network(loaded: Any) -> None:
    result = loaded(*other_networks(None, None))
    lab = result.lab
    assert (lab.underlay.cidr, lab.underlay.gateway) == ("10.0.1.0/24", "10.0.1.2")
    assert [each.pod_cidr for each in lab.nodes] == ["10.244.1.0/24", "10.244.2.0/24"]
    assert (lab.overlay.type, lab.service_proxy.clusterCIDR) == ("host-gw", "")
    told = assumed(result)
    assert "pod CIDR 10.244.0.0/16: of bridges; the pods live in the nodes' network" in told
    assert "overlay host-gw: the nodes' own network brings packets to pods" in told
    (outside,) = (each for each in result.warnings if each.code == "outside-cidr")
    assert outside.message.startswith("3 pods have addresses outside their nodes' pod CIDRs")


def test_a_cluster_cidr_that_is_the_nodes_network_is_no_pod_cidr(loaded: Any) -> None:
    lab = loaded(*other_networks(None, None), kube_proxy("nftables", "10.0.0.0/16")).lab
    assert (lab.pod_cidr, lab.service_proxy.clusterCIDR) == ("10.244.0.0/16", "10.0.0.0/16")


def test_a_pod_cidr_in_which_other_nodes_pods_live_is_no_bridges(loaded: Any) -> None:
    objects = other_networks("192.168.0.0/24", "192.168.1.0/24", network="192.168.0")
    result = loaded(*objects, ip_pool("192.168.0.0/16"))
    lab = result.lab
    assert [each.pod_cidr for each in lab.nodes] == ["192.168.2.0/24", "192.168.1.0/24"]
    assert any(
        "Node a: its bridge has another network than its pod CIDR 192.168.0.0/24" in each
        for each in assumed(result)
    )
    later = change.ready(lab, ["client-1-x"], False).lab
    assert later.nodes == lab.nodes
    assert [each.addresses for each in later.pods] == [each.addresses for each in lab.pods]


def test_bridges_have_networks_in_which_no_pod_lives(loaded: Any) -> None:
    lab = loaded(*other_networks(None, None, network="192.168.1"), ip_pool("192.168.0.0/16")).lab
    assert [each.pod_cidr for each in lab.nodes] == ["192.168.2.0/24", "192.168.3.0/24"]


def test_pods_addresses_tell_the_pod_cidr(loaded: Any) -> None:
    result = loaded(*other_networks("10.244.0.0/24", "10.244.1.0/24", network="192.168.1"))
    assert result.lab.pod_cidr == "192.168.0.0/16"
    assert result.lab.service_proxy.clusterCIDR == "192.168.0.0/16"
    assert "pod CIDR 192.168.0.0/16: it holds the pods' addresses" in assumed(result)


def test_what_flannel_and_kindnet_leave_on_nodes_tells_the_overlay(loaded: Any) -> None:
    objects = flannel_cluster({})[:-1]
    annotations = objects[0]["metadata"]["annotations"]
    annotations["flannel.alpha.coreos.com/backend-type"] = "host-gw"
    assert loaded(*objects).lab.overlay.type == "host-gw"
    annotations["flannel.alpha.coreos.com/backend-type"] = "wireguard"
    result = loaded(*objects)
    assert result.lab.overlay.type == "vxlan"
    assert "overlay vxlan: flannel's is wireguard, which this version does not build" in assumed(
        result
    )
    del annotations["flannel.alpha.coreos.com/backend-type"]
    kindnet = pod("kindnet-x", "a", "10.0.0.4", "10.0.0.4", host_network=True)
    kindnet["metadata"]["labels"]["k8s-app"] = "kindnet"
    assert loaded(*objects, kindnet).lab.overlay.type == "host-gw"


def test_kube_proxy_of_a_cloud(loaded: Any) -> None:
    text = "kind: KubeProxyConfiguration\nmode: nftables\nclusterCIDR: ''\n"
    result = loaded(*other_networks(None, None), dumps.config_map("kube-proxy-config", config=text))
    assert result.lab.service_proxy.mode == "nftables"
    assert not any("kube-proxy" in each for each in assumed(result))


def test_pods_are_behind_cbr0_whatever_the_clusters_bridge_is(loaded: Any) -> None:
    proxy = kube_proxy("iptables", "10.42.0.0/16")
    text = proxy["data"]["config.conf"]
    text = text.replace('bridgeInterface: ""', "bridgeInterface: cni0")
    text = text.replace('detectLocalMode: ""', "detectLocalMode: BridgeInterface")
    proxy["data"]["config.conf"] = text
    result = loaded(*flannel_cluster({})[:3], proxy)
    assert result.lab.service_proxy.detectLocal.bridgeInterface == "cbr0"
    assert any("on the cluster's nodes behind cni0" in each for each in assumed(result))


def test_a_pod_that_waits_does_not_come_with_a_later_change(loaded: Any) -> None:
    lab = loaded(*calico_cluster()).lab
    later = change.ready(lab, ["front-6f7d9-a1b2c"], False).lab
    assert [each.name for each in later.pods] == [each.name for each in lab.pods]


def test_a_node_that_many_pods_miss_is_told_once(tmp_path: Path) -> None:
    file = tmp_path / "t.yaml"
    file.write_text(
        "---\n".join(
            f"{{apiVersion: v1, kind: Pod, metadata: {{name: p{i}}}, spec: {{nodeName: x}}}}\n"
            for i in range(9)
        )
    )
    with pytest.raises(NetlabError) as refused:
        load(file)
    assert [each.message for each in refused.value.problems] == [
        'Pod default/p0: there is no Node "x"; pods that run there: 9'
    ]


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("cidrs", "network"),
    [((None, None), "10.0.1"), (("192.168.0.0/24", "192.168.1.0/24"), "192.168.0")],
    ids=["in the nodes' network", "in another node's pod CIDR"],
)
def test_pods_reach_each_other_wherever_they_live(
    loaded: Any, cidrs: tuple[str | None, ...], network: str
) -> None:
    lab = loaded(*other_networks(*cidrs, network=network), name=fresh_name()).lab
    try:
        assert lifecycle.up(lab).unserved == ()
        client = f"{lab.name}:shop:client-1-x"
        for host in (f"{network}.77", f"{network}.1"):
            assert http(client, host, 8080, "/hostname")
        assert {http(client, "172.20.0.10", 80, "/hostname") for _ in range(12)} == {
            http(client, f"{network}.{host}", 8080, "/hostname") for host in (77, 1)
        }
    finally:
        lifecycle.down(lab.name)


@pytest.mark.kernel
def test_a_dump_runs(loaded: Any) -> None:
    """Pods with addresses outside every node's CIDR reach each other and the Service."""
    pool = ip_pool("172.16.0.0/16", ipipMode="Never", vxlanMode="Always")
    settings = (kube_proxy("nftables", "172.16.0.0/16"), pool)
    lab = loaded(*calico_cluster(), *settings, name=fresh_name()).lab
    try:
        assert lifecycle.up(lab).unserved == ()
        front = f"{lab.name}:shop:front-6f7d9-a1b2c"
        assert http(front, "172.16.189.66", 8080, "/hostname")
        assert http(front, "172.16.235.130", 8080, "/hostname")
        assert http(front, "10.96.41.7", 80, "/hostname")
        assert lifecycle.differences(lab) == []
    finally:
        lifecycle.down(lab.name)
        assert namespaces.names_of(lab.name) == []


def _messages(loaded: Loaded, code: str) -> list[str]:
    return [each.message for each in loaded.warnings if each.code == code]


def test_nodes_that_only_endpoints_name_are_made(loaded: Any) -> None:
    on_a = pod("web-1-x", "a", "10.0.0.4", "10.42.0.9")
    on_b = pod("web-1-y", "b", "10.0.0.5", "10.42.1.9")
    told = loaded(dumps.service("web", "10.96.7.7"), dumps.endpoint_slice("web", 8080, on_a, on_b))
    assert [each.name for each in told.lab.nodes] == ["a", "b"]
    assert "Node b is not in the file: EndpointSlice shop/web-x7k2p names it" in assumed(told)
    assert _messages(told, "no-address") == [
        f"Node {each.name} has no address in the file; it is given {each.address}"
        for each in told.lab.nodes
    ]
    # Beside Nodes a name that none of them has is a mistake.
    told = loaded(
        node("a", "10.0.0.4", "10.42.0.0/24"),
        dumps.service("web", "10.96.7.7"),
        dumps.endpoint_slice("web", 8080, on_a, on_b),
    )
    assert [each.name for each in told.lab.nodes] == ["a"]
    assert _messages(told, "unknown-node") == [
        "EndpointSlice shop/web-x7k2p: endpoints[1].nodeName b is no node of the lab"
    ]


def test_what_a_dump_of_services_lacks_is_told(loaded: Any) -> None:
    told = loaded(
        dumps.service("web", "10.96.7.7"), dumps.service("other", "10.96.7.8", selector=False)
    )
    assert [each.name for each in told.lab.nodes] == ["node1"]
    assert "one node, node1: there is no Node, and nothing names one" in assumed(told)
    assert (
        "endpoints are the pods that selectors match: there is no EndpointSlice, "
        "so none for what has no selector, Service shop/other"
    ) in assumed(told)
    assert assumed(loaded(kube_proxy("iptables", "")))  # nothing but a ConfigMap


def test_an_endpoint_is_the_pod_that_has_its_address(loaded: Any) -> None:
    """Though its targetRef names one that is gone, or that has another."""
    gone = pod("web-1-x", "a", "10.0.0.4", "10.42.0.9")
    here = pod("web-1-y", "a", "10.0.0.4", "10.42.0.9")
    cluster = [
        node("a", "10.0.0.4", "10.42.0.0/24"),
        dumps.service("web", "10.96.7.7"),
        dumps.endpoint_slice("web", 8080, gone),
    ]
    told = loaded(*cluster, here)
    (endpoint,) = told.lab.endpoints[0].endpoints
    assert endpoint.pod == "shop/web-1-y"
    assert not _messages(told, "no-pod") + _messages(told, "other-pod")
    told = loaded(*cluster, here, pod("web-1-x", "a", "10.0.0.4", "10.42.0.7"))
    (endpoint,) = told.lab.endpoints[0].endpoints
    assert endpoint.pod == "shop/web-1-y"
    assert _messages(told, "other-pod") == [
        "EndpointSlice shop/web-x7k2p: endpoints[0].addresses[0] 10.42.0.9 is "
        "Pod shop/web-1-y's; Pod shop/web-1-x has another"
    ]


def test_wrong_fields_of_kube_proxys_configuration_are_each_told(loaded: Any) -> None:
    """And the others heeded."""
    more = (
        "iptables: {masqueradeBit: 99, masqueradeAll: true}\n"
        "nodePortAddresses: [nowhere, 10.0.0.0/24]\nconntrack: none\n"
    )
    told = loaded(*calico_cluster(), kube_proxy("nftables", "nope", more))
    assert sorted(_messages(told, "no-settings")) == [
        'ConfigMap kube-proxy: clusterCIDR is "nope"; it takes CIDRs; it is not heeded',
        'ConfigMap kube-proxy: conntrack is "none"; it takes a mapping; it is not heeded',
        "ConfigMap kube-proxy: iptables.masqueradeBit is 99; it takes a number from 0 to 31; "
        "it is not heeded",
        'ConfigMap kube-proxy: nodePortAddresses has "nowhere"; it takes CIDRs; it is not heeded',
    ]
    proxy = told.lab.service_proxy
    assert (proxy.mode, proxy.clusterCIDR) == ("nftables", "")
    assert (proxy.iptables.masqueradeAll, proxy.iptables.masqueradeBit) == (True, 14)
    assert proxy.nodePortAddresses == ("10.0.0.0/24",)


@pytest.mark.parametrize(
    ("mode", "local"),
    [
        ("BridgeInterface", {"bridgeInterface": "cni0"}),
        ("InterfaceNamePrefix", {"interfaceNamePrefix": "veth"}),
    ],
)
def test_to_compare_with_a_node_its_own_interfaces_count(
    loaded: Any, mode: str, local: Object
) -> None:
    more = f"detectLocalMode: {mode}\ndetectLocal: {json.dumps(local)}\n"
    cluster = [*calico_cluster(), kube_proxy("iptables", "", more)]
    here = loaded(*cluster).lab.service_proxy
    assert (here.detectLocalMode, here.detectLocal.bridgeInterface) == ("BridgeInterface", "cbr0")
    there = loaded(*cluster, own_interfaces=True).lab.service_proxy
    assert there.detectLocalMode == mode
    assert msgspec.to_builtins(there.detectLocal) == local
