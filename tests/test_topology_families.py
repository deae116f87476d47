"""Labs of IPv6 and of both families: what is decided, what is kept, what does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from netlab.problems import NetlabError, Problem
from netlab.topology import status
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


def test_networks_of_any_width(tmp_path: Path) -> None:
    given = "apiVersion: v1\nkind: Node\nmetadata: {name: n0}\nspec: {podCIDR: 'fd77::/32'}\n---\n"
    of = lab(tmp_path, LAB % "fd77::/16" + given + TWO_NODES + WEB)
    assert [node.pod_cidr for node in of.nodes] == ["fd77::/32", "fd77:1::/64", "fd77:1:0:1::/64"]
    small = LAB.replace("}\n---", ", serviceCIDR: 'fd08::/126'}\n---") % "fd00:10:244::/63"
    of = lab(
        tmp_path, small + TWO_NODES + "".join(service(name, "type: ClusterIP") for name in "ab")
    )
    assert [node.pod_cidr for node in of.nodes] == ["fd00:10:244:1::/64", "fd00:10:244::/64"]
    assert [each.cluster_ip for each in of.services] == ["fd08::1", "fd08::2"]


# Which families a lab has

NODE_OF_BOTH = (
    "apiVersion: v1\nkind: Node\nmetadata: {name: a}\n"
    "spec: {podCIDR: 'fd00:1::/64', podCIDRs: ['fd00:1::/64', 10.244.3.0/24]}\n"
    "status: {addresses: [{type: ExternalIP, address: 203.0.113.1},"
    " {type: InternalIP, address: 192.0.2.7}, {type: InternalIP, address: 192.0.2.8},"
    " {type: InternalIP, address: 'fd01::7'}]}\n---\n"
)


@pytest.mark.parametrize(
    ("text", "families"),
    [
        ("apiVersion: v1\nkind: Pod\nmetadata: {name: a}\n", ("IPv4",)),
        (NODE_OF_BOTH, ("IPv6", "IPv4")),
        (
            "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\n"
            "status: {podIPs: [{ip: 10.244.1.5}, {ip: 'fd00:10:244:1::5'}]}\n",
            ("IPv4", "IPv6"),
        ),
        (
            "apiVersion: v1\nkind: Node\nmetadata: {name: a}\n"
            "status: {addresses: [{type: InternalIP, address: 'fd01::1'}]}\n",
            ("IPv6",),
        ),
        (
            "apiVersion: networking.k8s.io/v1\nkind: ServiceCIDR\nmetadata: {name: kubernetes}\n"
            "spec: {cidrs: [10.50.0.0/24, 'fd50::/108']}\n",
            ("IPv4", "IPv6"),
        ),
        (service("a", "clusterIP: 'fd00:10:96::7'"), ("IPv6",)),
        (
            "apiVersion: netlab/v1\nkind: Lab\nmetadata: {name: t}\n"
            "spec: {underlay: {cidr: 'fd07::/64'}}\n",
            ("IPv6",),
        ),
    ],
)
def test_objects_alone_tell_the_families(
    text: str, families: tuple[str, ...], tmp_path: Path
) -> None:
    assert lab(tmp_path, text).families == families


def test_a_node_of_a_cluster_of_both_families(tmp_path: Path) -> None:
    (node,) = lab(tmp_path, NODE_OF_BOTH).nodes
    assert node.pod_cidrs == ("fd00:1::/64", "10.244.3.0/24")
    assert node.addresses == ("fd01::7", "192.0.2.7")


def test_in_a_lab_of_one_family_the_other_side_is_left_out(tmp_path: Path) -> None:
    result = loaded(
        tmp_path,
        LAB % "10.244.0.0/16"
        + NODE_OF_BOTH
        + "apiVersion: v1\nkind: Pod\nmetadata: {name: p, labels: {app: web}}\n"
        "status: {podIPs: [{ip: 'fd00:1::5'}, {ip: 10.244.3.5}]}\n---\n"
        + service(
            "s",
            "type: LoadBalancer, clusterIPs: ['fd00:10:96::5', 10.96.0.5],"
            " ipFamilyPolicy: RequireDualStack, externalIPs: ['fd99::1', 192.0.2.99],"
            " loadBalancerSourceRanges: ['fd99::/64', 192.0.2.0/24]",
        )
        + "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n"
        "metadata: {name: s6, labels: {kubernetes.io/service-name: s}}\naddressType: IPv6\n"
        "ports: [{port: 8080}]\nendpoints: [{addresses: ['fd00:1::5']}]\n---\n"
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n"
        "metadata: {name: s4, labels: {kubernetes.io/service-name: s}}\naddressType: IPv4\n"
        "ports: [{port: 8080}]\nendpoints: [{addresses: [10.244.3.5]}]\n",
    )
    of = result.lab
    assert of.families == ("IPv4",)
    assert of.nodes[0].addresses == ("192.0.2.7",)
    assert of.pods[0].addresses == ("10.244.3.5",)
    (only,) = of.services
    assert only.cluster_ips == ("10.96.0.5",)
    assert only.ip_families == ("IPv4",)
    assert (only.external_ips, only.load_balancer_source_ranges) == (
        ("192.0.2.99",),
        ("192.0.2.0/24",),
    )
    assert [each.address for each in of.endpoints[0].endpoints] == ["10.244.3.5"]
    assert {problem.code for problem in result.warnings} == {"other-family"}
    assert "Node a: fd00:1::/64 is left out: it is IPv6, the lab is IPv4 only" in str(
        result.warnings[0]
    )


@pytest.mark.parametrize("other", ["10.8.0.0/16,fd08::/112", "fd08::/112,10.8.0.0/16"])
def test_a_service_cidr_of_the_other_family_is_kept_for_kube_proxys_rules(
    other: str, tmp_path: Path
) -> None:
    """And gives no address to a Service."""
    text = (LAB % "fd00:10:244::/48").replace("'}", f"', serviceCIDR: '{other}'}}")
    of = lab(tmp_path, text + service("a", "ipFamilyPolicy: PreferDualStack"))
    assert of.service_cidrs == ("fd08::/112", "10.8.0.0/16")
    assert of.services[0].cluster_ips == ("fd08::b",)
    assert of.services[0].ip_families == ("IPv6",)


# Services


@pytest.mark.parametrize(
    ("spec", "cluster_ips"),
    [
        ("type: ClusterIP", ("10.96.0.11",)),
        ("ipFamilyPolicy: SingleStack, ipFamilies: [IPv6]", ("fd00:10:96::b",)),
        ("ipFamilyPolicy: PreferDualStack", ("10.96.0.11", "fd00:10:96::b")),
        (
            "ipFamilyPolicy: RequireDualStack, ipFamilies: [IPv6]",
            ("fd00:10:96::b", "10.96.0.11"),
        ),
        (
            "ipFamilyPolicy: RequireDualStack, ipFamilies: [IPv6, IPv4]",
            ("fd00:10:96::b", "10.96.0.11"),
        ),
        ("clusterIP: 'FD00:10:96:0::7'", ("fd00:10:96::7",)),
        (
            "clusterIP: 'fd00:10:96::7', ipFamilyPolicy: PreferDualStack",
            ("fd00:10:96::7", "10.96.0.11"),
        ),
        (
            "clusterIPs: [10.96.0.7, 'fd00:10:96::7'], ipFamilyPolicy: PreferDualStack",
            ("10.96.0.7", "fd00:10:96::7"),
        ),
    ],
)
def test_a_service_has_the_families_that_the_api_server_gives_it(
    spec: str, cluster_ips: tuple[str, ...], tmp_path: Path
) -> None:
    (only,) = lab(tmp_path, DUAL + service("a", spec)).services
    assert only.cluster_ips == cluster_ips
    assert only.ip_families == tuple("IPv6" if ":" in ip else "IPv4" for ip in cluster_ips)


def test_prefer_dual_stack_makes_do_with_one(tmp_path: Path) -> None:
    (only,) = lab(tmp_path, service("a", "ipFamilyPolicy: PreferDualStack")).services
    assert (only.cluster_ips, only.ip_families) == (("10.96.0.11",), ("IPv4",))


def test_services_have_the_families_of_the_service_cidrs(tmp_path: Path) -> None:
    text = (DUAL + service("a", "ipFamilyPolicy: PreferDualStack")).replace(
        "'}", "', serviceCIDR: 'fd08::/112'}", 1
    )
    (only,) = lab(tmp_path, text).services
    assert only.cluster_ips == ("fd08::b",)


def test_addresses_from_outside_are_of_both_families(tmp_path: Path) -> None:
    text = service(
        "a",
        "type: LoadBalancer, ipFamilyPolicy: RequireDualStack, externalIPs: [192.0.2.1, 'fd99::1'],"
        " loadBalancerSourceRanges: [198.51.100.0/24, ' fd99::/64 ']",
    ).removesuffix("---\n")
    status = "status: {loadBalancer: {ingress: [{ip: 192.0.2.2}, {ip: 'fd99::2'}]}}\n"
    (only,) = lab(tmp_path, DUAL + text + status).services
    assert only.external_ips == ("192.0.2.1", "fd99::1")
    assert only.load_balancer_ips == ("192.0.2.2", "fd99::2")
    assert only.load_balancer_source_ranges == ("198.51.100.0/24", "fd99::/64")


@pytest.mark.parametrize(
    ("spec", "addresses"),
    [
        ("selector: {app: web}", ["10.244.1.2"]),
        ("selector: {app: web}, ipFamilies: [IPv6]", ["fd00:10:244:1::2"]),
        (
            "selector: {app: web}, ipFamilyPolicy: PreferDualStack, ipFamilies: [IPv6]",
            ["fd00:10:244:1::2", "10.244.1.2"],
        ),
        (
            "selector: {app: web}, clusterIP: None, ipFamilyPolicy: RequireDualStack",
            ["10.244.1.2", "fd00:10:244:1::2"],
        ),
    ],
)
def test_a_pod_is_an_endpoint_of_each_family_of_the_service(
    spec: str, addresses: list[str], tmp_path: Path
) -> None:
    of = lab(tmp_path, DUAL + TWO_NODES + WEB + service("a", spec))
    assert [each.address for each in of.endpoints[0].endpoints] == addresses
    assert {each.pod for each in of.endpoints[0].endpoints} == {"default/web"}


def test_slices_and_endpoints_objects_of_both_families(tmp_path: Path) -> None:
    one_slice = (
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n"
        "metadata: {name: %s, labels: {kubernetes.io/service-name: a}}\naddressType: %s\n"
        "ports: [{port: 8080}]\nendpoints: [{addresses: ['%s']}]\n---\n"
    )
    of = lab(
        tmp_path,
        DUAL
        + TWO_NODES
        + WEB
        + service("a", "ipFamilyPolicy: PreferDualStack")
        + one_slice % ("a4", "IPv4", "10.244.1.2")
        + one_slice % ("a6", "IPv6", "fd00:10:244:1::2")
        + service("b", "ipFamilyPolicy: PreferDualStack")
        + "apiVersion: v1\nkind: Endpoints\nmetadata: {name: b}\n"
        "subsets: [{addresses: [{ip: 'fd00:10:244:1::2'}, {ip: 10.244.1.2}],"
        " ports: [{port: 8080}]}]\n",
    )
    for entry in of.endpoints:
        assert {(each.address, each.pod) for each in entry.endpoints} == {
            ("10.244.1.2", "default/web"),
            ("fd00:10:244:1::2", "default/web"),
        }


# What does not fit

MISTAKES = {
    "a Service of a family that the lab lacks": (
        service("a", "clusterIP: 'fd00::1', clusterIPs: ['fd00::1']"),
        ("mixed-families", 9, 58),
        ["Service default/a: spec.clusterIP fd00::1 is IPv6; Services of this lab are IPv4 only"],
    ),
    "families that the lab lacks": (
        service("a", "ipFamilies: [IPv6]"),
        ("mixed-families", 9, 59),
        ["spec.ipFamilies is IPv6", "IPv4 only"],
    ),
    "both required": (
        service("a", "ipFamilyPolicy: RequireDualStack"),
        ("mixed-families", 9, 63),
        ["Service default/a: ipFamilyPolicy is RequireDualStack", "IPv4 only", "fd00:10:244::/48"],
    ),
    "a pod of the other family": (
        "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nstatus: {podIP: 'fd00::1'}\n",
        ("mixed-families", 9, 17),
        ["Pod default/a: status.podIP fd00::1 is IPv6"],
    ),
    "two addresses of one family": (
        "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\n"
        "status: {podIP: 10.244.1.2, podIPs: [{ip: 10.244.1.2}, {ip: 10.244.1.3}]}\n",
        ("mixed-families", 9, 61),
        ["Pod default/a: status.podIPs[1].ip 10.244.1.3 is the second IPv4 one", "10.244.1.2"],
    ),
    "two cluster IPs of one family": (
        service("a", "clusterIPs: [10.96.0.7, 10.96.0.8], ipFamilyPolicy: PreferDualStack"),
        ("mixed-families", 9, 71),
        ["spec.clusterIPs[1] 10.96.0.8 is the second IPv4 one"],
    ),
    "two families without a policy": (
        service("a", "clusterIPs: [10.96.0.7, 'fd00:10:96::7']"),
        ("mixed-families", 9, 59),
        ["spec.clusterIPs has two families", "SingleStack", "PreferDualStack"],
    ),
    "families against addresses": (
        service("a", "clusterIP: 10.96.0.7, ipFamilies: [IPv6, IPv4]")
        .replace("ipFamilies", "ipFamilyPolicy: PreferDualStack, ipFamilies")
        .replace("[IPv6, IPv4]", "[IPv4, IPv4]"),
        ("mixed-families", 9, 114),
        ["spec.ipFamilies has two of IPv4"],
    ),
    "a slice against its addresses": (
        service("a", "type: ClusterIP") + "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n"
        "metadata: {name: s, labels: {kubernetes.io/service-name: a}}\naddressType: IPv4\n"
        "ports: [{port: 1}]\nendpoints:\n- addresses: ['fd00::1']\n",
        ("mixed-families", 17, 15),
        ["EndpointSlice default/s: endpoints[0].addresses[0] fd00::1 is IPv6", "is IPv4"],
    ),
    "a Service CIDR of the other family": (
        "apiVersion: networking.k8s.io/v1\nkind: ServiceCIDR\nmetadata: {name: a}\n"
        "spec: {cidrs: ['fd00::/112']}\n",
        ("mixed-families", 9, 16),
        ["ServiceCIDR a: spec.cidrs[0] fd00::/112 is IPv6"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake(mistake: str, tmp_path: Path) -> None:
    text, expected, words = MISTAKES[mistake]
    (found,) = problems(tmp_path, LAB % "10.244.0.0/16" + text)
    assert found.place is not None
    assert (found.code, found.place.line, found.place.column) == expected
    for word in words:
        assert word in str(found)


@pytest.mark.parametrize(
    ("spec", "code", "words"),
    [
        ("podCIDR: 'fd00::/48,fd01::/48'", "mixed-families", "two of IPv6"),
        ("podCIDR: 'fd00::/48,'", "bad-cidr", "is not a CIDR"),
        ("podCIDR: 'fd00::1/48'", "bad-cidr", "did you mean fd00::/48"),
        ("podCIDR: 'fd00::%1/48'", "bad-cidr", "is not a CIDR"),
        ("podCIDR: 'fd00::/48', serviceCIDR: 10.96.0.0/12", "mixed-families", "IPv6 only"),
        ("podCIDR: 'fd00::/48', serviceCIDR: 'fd00::/112'", "overlapping-cidr", "fd00::/112"),
        (
            "podCIDR: 10.1.0.0/16, underlay: {gateway: 'fd00::1'}",
            "mixed-families",
            "spec.underlay.gateway fd00::1",
        ),
        ("podCIDR: 'fd00::/64', underlay: {cidr: 'fd01::/64'}", "exhausted-cidr", "no /64 left"),
        ("podCIDR: 'fd00::/48', underlay: {gateway: 'fe80::1'}", "bad-address", "one machine"),
        (
            "podCIDR: 'fd00::/48', underlay: {gateway: '::ffff:10.0.0.1'}",
            "bad-address",
            "one machine",
        ),
    ],
)
def test_a_lab_that_cannot_be(spec: str, code: str, words: str, tmp_path: Path) -> None:
    text = f"apiVersion: netlab/v1\nkind: Lab\nmetadata: {{name: t}}\nspec: {{{spec}}}\n---\n"
    found = problems(tmp_path, text + TWO_NODES)
    assert any(problem.code == code and words in str(problem) for problem in found), found
    assert all(problem.place and problem.place.line == 4 for problem in found)


@pytest.mark.parametrize(
    ("text", "code", "line", "words"),
    [
        (
            service("a", "type: ExternalName, externalName: example.org, selector: {app: web}"),
            "selects-nothing",
            9,
            "Service default/a: an ExternalName Service has no use for its selector",
        ),
        (
            service("a", "type: ClusterIP")
            + "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n"
            "metadata: {name: s, labels: {kubernetes.io/service-name: a}}\naddressType: FQDN\n"
            "ports: [{port: 1}]\nendpoints:\n- addresses: [example.org]\n",
            "no-part",
            14,
            "EndpointSlice default/s: kube-proxy heeds no endpoints of addressType FQDN",
        ),
        (
            service(
                "a",
                "clusterIP: None, selector: {app: web}, ipFamilies: [IPv4, IPv6],"
                " ipFamilyPolicy: PreferDualStack",
            )
            + WEB.replace("nodeName: n1, ", ""),
            "other-family",
            9,
            "spec.ipFamilies is IPv4, IPv6; Services of this lab are IPv4 only",
        ),
    ],
)
def test_warning(text: str, code: str, line: int, words: str, tmp_path: Path) -> None:
    (found,) = loaded(tmp_path, LAB % "10.244.0.0/16" + text).warnings
    assert found.place is not None
    assert (found.code, found.place.line) == (code, line)
    assert words in str(found)


# As objects again


def test_objects_of_a_dual_stack_lab_as_kubectl_shows_them(tmp_path: Path) -> None:
    ports = "{port: 80, name: http, targetPort: 8080}, {port: 81, name: more, targetPort: 8080}"
    of = lab(
        tmp_path,
        DUAL
        + TWO_NODES
        + WEB
        + service("a", "selector: {app: web}, ipFamilyPolicy: PreferDualStack").replace(
            "{port: 80, targetPort: 8080}", ports
        )
        + service("b", "ipFamilies: [IPv6]"),
    )
    (node, _), (pod,) = status.nodes(of), status.pods(of)
    assert node["spec"] == {
        "podCIDR": "10.244.1.0/24",
        "podCIDRs": ["10.244.1.0/24", "fd00:10:244:1::/64"],
    }
    assert [each["address"] for each in node["status"]["addresses"]] == [
        "172.21.32.2",
        "fd00:172:21:32::2",
        "n1",
    ]
    assert pod["status"]["podIP"] == "10.244.1.2"
    assert pod["status"]["podIPs"] == [{"ip": "10.244.1.2"}, {"ip": "fd00:10:244:1::2"}]
    a, b = (each["spec"] for each in status.services(of))
    assert a["clusterIPs"] == ["10.96.0.11", "fd00:10:96::b"]
    assert (a["ipFamilies"], a["ipFamilyPolicy"]) == (["IPv4", "IPv6"], "PreferDualStack")
    assert (b["clusterIP"], b["ipFamilies"], b["ipFamilyPolicy"]) == (
        "fd00:10:96::c",
        ["IPv6"],
        "SingleStack",
    )
    shown = [
        (
            each["metadata"]["name"],
            each["addressType"],
            [port["name"] for port in each["ports"]],
            [endpoint["addresses"] for endpoint in each["endpoints"]],
        )
        for each in status.endpoint_slices(of)
    ]
    assert shown == [
        ("a-1", "IPv4", ["http", "more"], [["10.244.1.2"]]),
        ("a-2", "IPv6", ["http", "more"], [["fd00:10:244:1::2"]]),
        ("b-1", "IPv6", [], []),
    ]
