"""Topologies that load: what is given is kept, and Kubernetes objects mean what they mean there."""

from __future__ import annotations

import io
from pathlib import Path

import msgspec
import pytest

from netlab.problems import NetlabError
from netlab.topology import status
from netlab.topology.load import Loaded, find, load, shipped
from netlab.topology.model import Endpoint, Lab, Pod, Service

HERE = Path(__file__).parent
SEED = HERE / "data" / "seed"


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


def service(of: Lab, name: str) -> Service:
    """A Service by its name."""
    return next(each for each in of.services if each.name == name)


def pod(of: Lab, name: str) -> Pod:
    """A pod by its name."""
    return next(each for each in of.pods if each.name == name)


def endpoints(of: Lab, name: str, port: int = 0) -> tuple[Endpoint, ...]:
    """The endpoints of a port of a Service."""
    found = service(of, name)
    return of.endpoints_of(found, found.ports[port])


# What comes with netlab


def test_two_node_vxlan_is_the_example_of_the_text() -> None:
    result = load("two-node-vxlan")
    assert not result.warnings
    of = result.lab
    assert of.name == "two-node-vxlan"
    assert [(node.name, node.address, node.pod_cidr) for node in of.nodes] == [
        ("k8s-slave1", "172.21.32.11", "10.244.1.0/24"),
        ("k8s-slave2", "172.21.32.9", "10.244.2.0/24"),
    ]
    assert (of.underlay.cidr, of.underlay.gateway) == ("172.21.32.0/24", "172.21.32.1")
    assert (of.pod_cidr, of.service_cidrs) == ("10.244.0.0/16", ("10.96.0.0/12",))
    assert (of.overlay.type, of.overlay.vni, of.overlay.port) == ("vxlan", 1, 8472)
    assert (of.service_proxy.mode, of.service_proxy.clusterCIDR) == ("iptables", "10.244.0.0/16")
    assert {each.name: each.cluster_ip for each in of.services} == {
        "myblog": "10.99.174.93",
        "mysql": "10.108.214.84",
    }
    assert service(of, "myblog").ports[0].port == 80
    client = pod(of, "pod1")
    assert (client.namespace, client.node) == ("demo", "k8s-slave1")


def test_two_node_vxlan_has_the_endpoints_that_the_real_kube_proxy_was_given() -> None:
    ours = load("two-node-vxlan").lab
    recorded = load(HERE / "golden" / "seed-slave1" / "objects.yaml").lab
    for name in ("myblog", "mysql"):
        assert service(ours, name).cluster_ip == service(recorded, name).cluster_ip
        assert service(ours, name).ports == service(recorded, name).ports
        assert [msgspec.structs.replace(each, pod=None) for each in endpoints(ours, name)] == list(
            endpoints(recorded, name)
        )
    assert ours.nodes == recorded.nodes


def test_all_shipped_topologies_load_and_begin_with_an_explanation() -> None:
    names = {"one-node", "two-node-vxlan", "two-node-host-gw", "dual-stack"}
    assert names <= set(shipped())
    for name, path in shipped().items():
        result = load(name)
        assert result.lab.name == name
        assert not result.warnings
        assert path.read_text().startswith("# ")


def test_a_lab_survives_being_shipped() -> None:
    of = load("two-node-vxlan").lab
    assert msgspec.json.decode(msgspec.json.encode(of), type=Lab) == of


def test_a_shipped_name_wins_over_a_file_and_a_path_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one-node").write_text("nonsense")
    assert find("one-node") == shipped()["one-node"]
    assert find("./one-node") == Path("one-node")


# The text's manifests


@pytest.mark.parametrize(
    "name",
    ["my-service", "my-service-endpoints", "myblog", "mysql", "myblog-np", "configmap"],
)
def test_manifests_of_the_text_load_unchanged(name: str) -> None:
    of = load(SEED / f"{name}.yaml").lab
    assert of.name == name
    assert len(of.nodes) == 1


def test_service_of_the_text() -> None:
    (found,) = load(SEED / "myblog.yaml").lab.services
    assert (found.key, found.selector, found.type) == (
        "demo/myblog",
        {"app": "myblog"},
        "ClusterIP",
    )
    assert [(port.port, port.target_port, port.node_port) for port in found.ports] == [
        (80, 8002, None)
    ]


def test_node_port_of_the_text() -> None:
    (found,) = load(SEED / "myblog-np.yaml").lab.services
    assert found.ports[0].node_port == 30000


@pytest.mark.parametrize("name", ["tabs-service-template", "tabs-httpget"])
def test_manifests_with_tabs_say_so(name: str) -> None:
    with pytest.raises(NetlabError) as caught:
        load(SEED / f"{name}.yaml")
    (found,) = caught.value.problems
    assert found.code == "tab-indentation"
    assert found.place is not None
    lines = (SEED / f"{name}.yaml").read_text().splitlines()
    assert found.place.line is not None
    assert found.place.column is not None
    assert lines[found.place.line - 1][found.place.column - 1] == "\t"


def test_a_tab_elsewhere_than_at_the_error_is_mentioned() -> None:
    with pytest.raises(NetlabError, match="line 6 is indented with a tab"):
        load(SEED / "tabs-poststart.yaml")


@pytest.mark.parametrize("name", ["stray-text", "indentation", "fragment-rolling-update"])
def test_manifests_that_are_no_yaml(name: str) -> None:
    with pytest.raises(NetlabError, match="yaml-syntax"):
        load(SEED / f"{name}.yaml")


@pytest.mark.parametrize("name", ["fragment-hostnetwork", "fragment-tcpsocket"])
def test_manifests_that_are_parts_of_an_object(name: str) -> None:
    with pytest.raises(NetlabError, match="no apiVersion and no kind"):
        load(SEED / f"{name}.yaml")


# Files


def test_the_lab_is_called_after_the_file(tmp_path: Path) -> None:
    file = tmp_path / "My Lab (2).yaml"
    file.write_text("apiVersion: v1\nkind: Pod\nmetadata: {name: a}\n")
    assert load(file).lab.name == "my-lab-2"
    assert load(file, name="other").lab.name == "other"


def test_json_and_lists(tmp_path: Path) -> None:
    items = [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}},
        {"apiVersion": "v1", "kind": "PodList", "items": [{"metadata": {"name": "b"}}]},
    ]
    for name in ("t.json", "t.yaml"):
        file = tmp_path / name
        file.write_bytes(msgspec.json.encode({"apiVersion": "v1", "kind": "List", "items": items}))
        of = load(file).lab
        assert [each.name for each in of.pods] == ["a", "b"]
        assert [each["metadata"]["name"] for each in of.declared] == ["a", "b"]


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    text = io.BytesIO(b"apiVersion: v1\nkind: Pod\nmetadata: {name: a}\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(text))
    assert [each.name for each in load("-").lab.pods] == ["a"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_what_windows_writes(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "t.yaml"
    file.write_text("apiVersion: v1\r\nkind: Pod\r\nmetadata: {name: a}\r\n", encoding=encoding)
    assert [each.name for each in load(file).lab.pods] == ["a"]


def test_nulls_mean_left_out(tmp_path: Path) -> None:
    of = lab(
        tmp_path,
        "apiVersion: v1\nkind: Service\n"
        "metadata: {name: a, namespace: null, labels: null, creationTimestamp: null}\n"
        "spec: {clusterIP: , type: , selector: , sessionAffinity: , ports: [{port: 80}]}\n"
        "status: {loadBalancer: {}}\n",
    )
    assert service(of, "a").cluster_ip == "10.96.0.11"


# Kubernetes' meaning


DUMP = """\
apiVersion: v1
kind: List
items:
- apiVersion: v1
  kind: Node
  metadata: {name: n1, annotations: {whatever: "1"}, managedFields: [{a: b}]}
  spec: {podCIDR: 10.42.0.0/24, podCIDRs: [10.42.0.0/24], providerID: x}
  status: {addresses: [{type: Hostname, address: n1}, {type: InternalIP, address: 192.0.2.7}]}
- apiVersion: v1
  kind: Service
  metadata: {name: kubernetes, namespace: default}
  spec: {clusterIP: 10.43.0.1, ports: [{name: https, port: 443, targetPort: 6443}]}
- apiVersion: discovery.k8s.io/v1
  kind: EndpointSlice
  metadata: {name: kubernetes, labels: {kubernetes.io/service-name: kubernetes}}
  addressType: IPv4
  endpoints: [{addresses: [192.0.2.7], conditions: {ready: true}}]
  ports: [{name: https, port: 6443, protocol: TCP}]
- apiVersion: apps/v1
  kind: Deployment
  metadata: {name: web, namespace: prod}
  spec: {replicas: 2, template: {metadata: {labels: {app: web}}}}
- apiVersion: apps/v1
  kind: ReplicaSet
  metadata:
    name: web-5c97d79cdb
    namespace: prod
    ownerReferences: [{kind: Deployment, name: web, controller: true}]
  spec: {replicas: 2, template: {}}
- apiVersion: v1
  kind: Pod
  metadata:
    name: web-5c97d79cdb-jn7km
    namespace: prod
    labels: {app: web, pod-template-hash: 5c97d79cdb}
    ownerReferences: [{kind: ReplicaSet, name: web-5c97d79cdb, controller: true}]
  spec: {nodeName: n1, containers: [{name: c, ports: [{containerPort: 80}]}]}
  status: {phase: Running, podIP: 10.42.0.9, conditions: [{type: Ready, status: "True"}]}
- apiVersion: v1
  kind: Pod
  metadata: {name: once, namespace: prod}
  spec: {nodeName: n1}
  status: {phase: Succeeded, podIP: 10.42.0.9}
"""


def test_objects_of_a_cluster(tmp_path: Path) -> None:
    result = loaded(tmp_path, DUMP)
    of = result.lab
    assert (of.pod_cidr, of.service_cidrs) == ("10.42.0.0/16", ("10.43.0.0/16",))
    assert of.underlay.cidr == "192.0.2.0/24"
    assert [(each.name, each.address, each.owner) for each in of.pods] == [
        ("web-5c97d79cdb-jn7km", "10.42.0.9", "Deployment/web"),
        (of.pods[1].name, "10.42.0.2", "Deployment/web"),
    ]
    assert endpoints(of, "kubernetes") == (Endpoint(address="192.0.2.7", port=6443),)
    assert [problem.code for problem in result.warnings] == ["no-part"]


POD = """\
apiVersion: v1
kind: Pod
metadata: {name: %s, labels: {app: web}}
spec: {containers: [{ports: [{name: http, containerPort: %d}, {containerPort: 9000}]}]}
---
"""
SERVICE = """\
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{name: a, port: 80, targetPort: http}, {name: b, port: 81}]}
---
"""


def test_named_target_ports_are_each_pods_own(tmp_path: Path) -> None:
    of = lab(tmp_path, SERVICE + POD % ("x", 8001) + POD % ("z", 8002))
    assert [each.port for each in endpoints(of, "web", 0)] == [8001, 8002]
    assert [each.port for each in endpoints(of, "web", 1)] == [81, 81]
    assert pod(of, "x").listen == (("TCP", 8001), ("TCP", 9000), ("TCP", 81))


def test_a_pod_without_the_named_port_is_no_endpoint(tmp_path: Path) -> None:
    nameless = "apiVersion: v1\nkind: Pod\nmetadata: {name: x, labels: {app: web}}\n"
    of = loaded(tmp_path, SERVICE + nameless).lab
    assert endpoints(of, "web", 0) == ()
    assert [each.pod for each in endpoints(of, "web", 1)] == ["default/x"]


def test_readiness_and_deletion(tmp_path: Path) -> None:
    def stated(name: str, metadata: str = "", ready: str = "True") -> str:
        return (
            "apiVersion: v1\nkind: Pod\n"
            f"metadata: {{name: {name}, labels: {{app: web}}{metadata}}}\n"
            f"status: {{conditions: [{{type: Ready, status: '{ready}'}}]}}\n---\n"
        )

    text = (
        stated("good")
        + stated("unready", ready="False")
        + stated("leaving", ", deletionTimestamp: 2026-01-01T00:00:00Z")
        + "apiVersion: v1\nkind: Service\nmetadata: {name: %s}\n"
        "spec: {selector: {app: web}, publishNotReadyAddresses: %s, ports: [{port: 80}]}\n"
    )
    of = lab(tmp_path, text % ("web", "false"))
    assert [
        (each.pod, each.ready, each.serving, each.terminating) for each in endpoints(of, "web")
    ] == [
        ("default/good", True, True, False),
        ("default/unready", False, False, False),
        ("default/leaving", False, True, True),
    ]
    assert [each.ready for each in of.pods] == [True, False, True]
    of = lab(tmp_path, text % ("web", "true"))
    assert [each.ready for each in endpoints(of, "web")] == [True, True, True]


def test_slices_of_a_headless_service_are_not_those_of_another(tmp_path: Path) -> None:
    """kube-proxy does not watch slices with that label, whatever Service they name."""
    text = (
        "apiVersion: v1\nkind: Service\nmetadata: {name: web}\n"
        "spec: {clusterIP: %s, ports: [{name: a, port: 80}]}\n---\n"
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: web-1\n"
        "  labels: {kubernetes.io/service-name: web, service.kubernetes.io/headless: ''}\n"
        "addressType: IPv4\nports: [{name: a, port: 7000}]\n"
        "endpoints: [{addresses: [172.21.32.11], nodeName: n1}]\n---\n"
        "{apiVersion: v1, kind: Node, metadata: {name: n1}}\n"
    )
    result = loaded(tmp_path, text % "10.96.0.9")
    (warning,) = result.warnings
    assert "service.kubernetes.io/headless" in warning.message
    assert endpoints(result.lab, "web") == ()
    assert len(endpoints(loaded(tmp_path, text % "None").lab, "web")) == 1


def test_slices_in_the_file_win_over_the_selector(tmp_path: Path) -> None:
    text = SERVICE + POD % ("x", 8001)
    slices = (
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n"
        "metadata: {name: web-1, labels: {kubernetes.io/service-name: web}}\naddressType: IPv4\n"
        "ports: [{name: a, port: 7000}]\n"
        "endpoints:\n"
        "- {addresses: [10.244.1.2], nodeName: node1}\n"
        "- addresses: [192.0.2.9]\n  conditions: {ready: false, serving: true, terminating: true}\n"
        "  hints: {forZones: [{name: z1}], forNodes: [{name: n1}]}\n"
    )
    result = loaded(tmp_path, text + slices)
    of = result.lab
    (warning,) = result.warnings
    assert warning.code == "no-pod"
    assert "EndpointSlice default/web-1" in warning.message
    assert "192.0.2.9" in warning.message
    assert warning.place is not None
    assert warning.place.line == 18
    assert endpoints(of, "web", 0) == (
        Endpoint(address="10.244.1.2", port=7000, node="node1", pod="default/x"),
        Endpoint(
            address="192.0.2.9",
            port=7000,
            ready=False,
            terminating=True,
            for_zones=("z1",),
            for_nodes=("n1",),
        ),
    )
    assert endpoints(of, "web", 1) == ()


def test_a_service_without_selector_has_its_endpoints_object(tmp_path: Path) -> None:
    text = "---\n".join(
        (SEED / f"{name}.yaml").read_text() for name in ("my-service", "my-service-endpoints")
    )
    result = loaded(tmp_path, text)
    assert endpoints(result.lab, "my-service") == (Endpoint(address="192.0.2.42", port=9376),)
    assert [problem.code for problem in result.warnings] == ["no-pod"]


def test_addresses_that_are_not_ready_in_an_endpoints_object(tmp_path: Path) -> None:
    result = loaded(
        tmp_path,
        (SEED / "my-service.yaml").read_text()
        + "---\napiVersion: v1\nkind: Endpoints\nmetadata: {name: my-service}\n"
        "subsets: [{notReadyAddresses: [{ip: 192.0.2.1, nodeName: n1}], ports: [{port: 1}]}]\n",
    )
    assert endpoints(result.lab, "my-service") == (
        Endpoint(address="192.0.2.1", port=1, node="n1", ready=False, serving=False),
    )


def test_headless_and_external_name(tmp_path: Path) -> None:
    of = lab(
        tmp_path,
        POD % ("x", 8001) + "apiVersion: v1\nkind: Service\nmetadata: {name: h}\n"
        "spec: {clusterIP: None, selector: {app: web}, ports: [{port: 80}]}\n---\n"
        "apiVersion: v1\nkind: Service\nmetadata: {name: e}\n"
        "spec: {type: ExternalName, externalName: example.org}\n",
    )
    assert (service(of, "h").cluster_ip, service(of, "e").cluster_ip) == ("None", "")
    assert [each.pod for each in endpoints(of, "h")] == ["default/x"]
    assert [entry.service for entry in of.endpoints] == ["h"]


def test_all_of_a_load_balancer(tmp_path: Path) -> None:
    of = lab(
        tmp_path,
        "apiVersion: v1\nkind: Service\nmetadata: {name: lb, labels: {a: b}}\nspec:\n"
        "  type: LoadBalancer\n  externalTrafficPolicy: Local\n  internalTrafficPolicy: Local\n"
        "  sessionAffinity: ClientIP\n  sessionAffinityConfig: {clientIP: {timeoutSeconds: 90}}\n"
        "  externalIPs: [192.0.2.5]\n  loadBalancerSourceRanges: [' 198.51.100.0/24']\n"
        "  healthCheckNodePort: 30007\n"
        "  ports: [{name: a, port: 80, nodePort: 31122}, {name: b, port: 53, protocol: UDP}]\n"
        "status: {loadBalancer: {ingress: [{ip: 192.0.2.1}, {ip: 192.0.2.2, ipMode: VIP},"
        " {ip: 192.0.2.3, ipMode: Proxy}, {hostname: x}]}}\n",
    )
    found = service(of, "lb")
    assert found.load_balancer_ips == ("192.0.2.1", "192.0.2.2")
    assert status.services(of)[0]["status"]["loadBalancer"]["ingress"] == [
        {"ip": "192.0.2.1"},
        {"ip": "192.0.2.2", "ipMode": "VIP"},
        {"ip": "192.0.2.3", "ipMode": "Proxy"},
        {"hostname": "x"},
    ]
    assert found.load_balancer_source_ranges == ("198.51.100.0/24",)
    assert found.external_ips == ("192.0.2.5",)
    assert (found.session_affinity, found.affinity_timeout_s) == ("ClientIP", 90)
    assert (found.external_traffic_policy, found.internal_traffic_policy) == ("Local", "Local")
    assert found.health_check_node_port == 30007
    assert [port.node_port for port in found.ports] == [31122, 30000]
    assert found.labels == {"a": "b"}


def test_a_load_balancer_may_do_without_node_ports(tmp_path: Path) -> None:
    of = lab(
        tmp_path,
        "apiVersion: v1\nkind: Service\nmetadata: {name: lb}\n"
        "spec: {type: LoadBalancer, allocateLoadBalancerNodePorts: false, ports: [{port: 80}]}\n",
    )
    assert service(of, "lb").ports[0].node_port is None


def test_controllers(tmp_path: Path) -> None:
    nodes = "".join(
        f"apiVersion: v1\nkind: Node\nmetadata: {{name: n{i}, labels: {{disk: d{i}}}}}\n---\n"
        for i in range(3)
    )

    def controller(kind: str, replicas: str, spec: str = "") -> str:
        return (
            f"apiVersion: apps/v1\nkind: {kind}\nmetadata: {{name: {kind.lower()}}}\n"
            f"spec: {{{replicas}template: {{metadata: {{labels: {{app: a}}}}, "
            f"spec: {{{spec}}}}}}}\n"
            "---\n"
        )

    of = lab(
        tmp_path,
        nodes
        + controller("Deployment", "replicas: 3, ")
        + controller("StatefulSet", "replicas: 2, ")
        + controller("DaemonSet", "")
        + controller("ReplicaSet", "", "nodeSelector: {disk: d2}, hostNetwork: true"),
    )
    by_owner: dict[str, list[Pod]] = {}
    for each in of.pods:
        by_owner.setdefault(each.owner.partition("/")[0], []).append(each)
        assert each.labels["app"] == "a"
    assert sorted(each.node for each in by_owner["Deployment"]) == ["n0", "n1", "n2"]
    assert [each.name for each in by_owner["StatefulSet"]] == ["statefulset-0", "statefulset-1"]
    assert [each.node for each in by_owner["DaemonSet"]] == ["n0", "n1", "n2"]
    (host,) = by_owner["ReplicaSet"]
    assert (host.node, host.host_network, host.address) == ("n2", True, of.node("n2").address)
    for each in by_owner["Deployment"]:
        _, hash_, suffix = each.name.split("-")
        assert hash_ == each.labels["pod-template-hash"]
        assert (len(suffix), hash_.isalnum()) == (5, True)


def test_spec_of_the_lab(tmp_path: Path) -> None:
    of = lab(
        tmp_path,
        "apiVersion: netlab/v1\nkind: Lab\nmetadata: {name: a}\nspec:\n"
        "  podCIDR: 10.32.0.0/16\n  serviceCIDR: 10.33.0.0/16\n"
        "  overlay: {vni: 7, port: 4789}\n"
        "  underlay: {cidr: 192.0.2.0/28, gateway: 192.0.2.14, mtu: 9000}\n"
        "  serviceProxy:\n    mode: none\n    detectLocalMode: InterfaceNamePrefix\n"
        "    detectLocal: {interfaceNamePrefix: veth}\n    clusterCIDR: ''\n"
        "    nodePortAddresses: [192.0.2.7/24, primary, localhost, 'fd00::/64']\n"
        "    iptables: {masqueradeAll: true, masqueradeBit: 0, localhostNodePorts: false}\n"
        "    nftables: {masqueradeAll: true, masqueradeBit: 20}\n"
        "    conntrack: {tcpBeLiberal: true, tcpEstablishedTimeout: 24h0m0s, udpTimeout: 1m1.5s}\n"
        "    featureGates: {AllowServiceExternalIPs: false}\n",
    )
    assert (of.pod_cidr, of.service_cidrs) == ("10.32.0.0/16", ("10.33.0.0/16",))
    assert (of.overlay.type, of.overlay.vni, of.overlay.port) == ("vxlan", 7, 4789)
    assert (of.underlay.cidr, of.underlay.gateway, of.underlay.mtu) == (
        "192.0.2.0/28",
        "192.0.2.14",
        9000,
    )
    (node,) = of.nodes
    assert (node.name, node.address, node.pod_cidr) == ("node1", "192.0.2.1", "10.32.1.0/24")
    proxy = of.service_proxy
    assert (proxy.mode, proxy.detectLocalMode) == ("none", "InterfaceNamePrefix")
    assert (proxy.detectLocal.interfaceNamePrefix, proxy.clusterCIDR) == ("veth", "")
    assert proxy.nodePortAddresses == ("192.0.2.7/24", "primary", "localhost", "fd00::/64")
    assert proxy.iptables.masqueradeAll
    assert proxy.iptables.masqueradeBit == 0
    assert not proxy.iptables.localhostNodePorts
    assert proxy.nftables.masqueradeAll
    assert proxy.nftables.masqueradeBit == 20
    assert proxy.conntrack.tcpBeLiberal
    assert (proxy.conntrack.tcpEstablishedTimeout, proxy.conntrack.udpTimeout) == (86400, 61)
    assert proxy.featureGates == {"AllowServiceExternalIPs": False}


def test_service_cidr_objects(tmp_path: Path) -> None:
    of = lab(
        tmp_path,
        "apiVersion: networking.k8s.io/v1\nkind: ServiceCIDR\nmetadata: {name: kubernetes}\n"
        "spec: {cidrs: [10.50.0.0/24]}\n---\n"
        "apiVersion: networking.k8s.io/v1\nkind: ServiceCIDR\nmetadata: {name: more}\n"
        "spec: {cidrs: [10.51.0.0/24]}\n---\n"
        "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {ports: [{port: 80}]}\n---\n"
        "apiVersion: v1\nkind: Service\nmetadata: {name: b}\n"
        "spec: {clusterIP: 10.51.0.9, ports: [{port: 80}]}\n",
    )
    assert of.service_cidrs == ("10.50.0.0/24", "10.51.0.0/24")
    assert [each.cluster_ip for each in of.services] == ["10.50.0.11", "10.51.0.9"]


@pytest.mark.parametrize(
    ("yaml", "value"),
    [
        ("22:22", "22:22"),
        ("2026-01-01", "2026-01-01"),
        ("0x1F", 31),
        ("0o17", 15),
        ("017", 15),
        ("09", 9.0),
        ("1e3", 1000.0),
        ("off", False),
        ("~", None),
        ('"-"', "-"),
        ("+1", 1),
        ("1_000", 1000),
        ("1e999", "1e999"),
        (".5", 0.5),
        ("y", True),
        ("9" * 100, "9" * 100),
        ('"80"', "80"),
        ("!!str 80", "80"),
        ("!!int 80", 80),
        ("! yes", "yes"),
        ("v1.2", "v1.2"),
        ("10.244.1.4", "10.244.1.4"),
    ],
)
def test_scalars(tmp_path: Path, yaml: str, value: object) -> None:
    of = lab(
        tmp_path,
        f"apiVersion: v1\nkind: Pod\nmetadata: {{name: a}}\nx: {yaml}\n",
    )
    assert of.declared[0]["x"] == value
    assert type(of.declared[0]["x"]) is type(value)


def test_anchors_aliases_and_merges(tmp_path: Path) -> None:
    of = lab(
        tmp_path,
        "apiVersion: v1\nkind: Pod\nmetadata: {name: a, labels: &l {a: x, b: z}}\n---\n"
        "x: &l {a: x, b: z}\n"
        "apiVersion: v1\nkind: Pod\nmetadata:\n  name: b\n  labels: {a: own, <<: *l, 8080: z}\n",
    )
    assert pod(of, "b").labels == {"a": "own", "b": "z", "8080": "z"}
