"""What a user's text means."""

from __future__ import annotations

import pytest

from netlab.problems import Exit, NetlabError
from netlab.topology.load import load
from netlab.topology.model import (
    ContainerPort,
    Lab,
    Node,
    Pod,
    Service,
    ServicePort,
    Underlay,
)
from netlab.topology.references import resolve


def _pod(namespace: str, name: str, address: str, owner: str = "", ready: bool = True) -> Pod:
    return Pod(
        namespace=namespace,
        name=name,
        node="n1",
        address=address,
        owner=owner,
        ready=ready,
        ports=(ContainerPort(port=8080, name="http"),),
    )


LAB = Lab(
    name="lab",
    pod_cidr="10.244.0.0/16",
    service_cidrs=("10.96.0.0/12",),
    underlay=Underlay(cidr="172.21.32.0/24", gateway="172.21.32.1"),
    nodes=(
        Node(name="n1", address="172.21.32.11", pod_cidr="10.244.1.0/24"),
        Node(name="n2", address="172.21.32.12", pod_cidr="10.244.2.0/24"),
    ),
    pods=(
        _pod("demo", "pod1", "10.244.1.2"),
        _pod("demo", "twin", "10.244.1.3"),
        _pod("other", "twin", "10.244.1.4"),
        _pod("demo", "web-1", "10.244.1.5", owner="Deployment/web", ready=False),
        _pod("demo", "web-2", "10.244.1.6", owner="Deployment/web"),
        _pod("demo", "both", "10.244.1.7"),
    ),
    services=(
        Service(
            namespace="demo",
            name="myblog",
            cluster_ip="10.99.174.93",
            external_ips=("192.0.2.7",),
            ports=(ServicePort(port=80, name="http"),),
        ),
        Service(
            namespace="demo",
            name="dns",
            cluster_ip="10.96.0.10",
            ports=(
                ServicePort(port=53, protocol="UDP", name="dns"),
                ServicePort(port=53, name="dns-tcp"),
                ServicePort(port=9153, name="metrics"),
            ),
        ),
        Service(namespace="demo", name="both", cluster_ip="None"),
    ),
)


@pytest.mark.parametrize(
    ("text", "kind", "address", "port_number"),
    [
        ("pod1", "pod", "10.244.1.2", None),
        ("demo/pod1", "pod", "10.244.1.2", None),
        ("pod/pod1", "pod", "10.244.1.2", None),
        ("pod/demo/pod1", "pod", "10.244.1.2", None),
        ("pod/other/twin", "pod", "10.244.1.4", None),
        ("pod1:8080", "pod", "10.244.1.2", 8080),
        ("pod1:http", "pod", "10.244.1.2", 8080),
        ("deploy/web", "pod", "10.244.1.6", None),
        ("deployment/demo/web:81", "pod", "10.244.1.6", 81),
        ("svc/both", "service", None, None),
        ("pod/both", "pod", "10.244.1.7", None),
        ("n2", "node", "172.21.32.12", None),
        ("node/n1:30647", "node", "172.21.32.11", 30647),
        ("8.8.8.8", "address", "8.8.8.8", None),
        ("8.8.8.8:53", "address", "8.8.8.8", 53),
        ("fd00::1", "address", "fd00::1", None),
        ("[fd00::1]:80", "address", "fd00::1", 80),
        ("[fd00::1]", "address", "fd00::1", None),
        ("FD00:0::1", "address", "fd00::1", None),
    ],
)
def test_meaning(text: str, kind: str, address: str | None, port_number: int | None) -> None:
    found = resolve(LAB, text)
    assert (found.kind, found.address, found.port_number) == (kind, address, port_number)


@pytest.mark.parametrize(
    ("text", "port", "number"),
    [
        ("svc/myblog", "http", 80),
        ("myblog", "http", 80),
        ("svc/demo/myblog:http", "http", 80),
        ("svc/myblog:80", "http", 80),
        ("svc/myblog:81", None, 81),
        ("10.99.174.93:80", "http", 80),
        ("192.0.2.7:80", "http", 80),
        ("svc/dns", None, None),
        ("svc/dns:dns-tcp", "dns-tcp", 53),
        ("svc/dns:metrics", "metrics", 9153),
        ("svc/dns:53", None, 53),
    ],
)
def test_service_ports(text: str, port: str | None, number: int | None) -> None:
    found = resolve(LAB, text)
    assert found.service is not None
    assert found.port_number == number
    assert (found.port.name if found.port else None) == port


def test_an_address_knows_whose_it_is() -> None:
    pod = resolve(LAB, "10.244.1.4:80")
    assert pod.kind == "address"
    assert pod.pod is not None
    assert pod.pod.key == "other/twin"
    assert pod.node == LAB.nodes[0]
    node = resolve(LAB, "172.21.32.12")
    assert (node.kind, node.node, node.pod) == ("address", LAB.nodes[1], None)
    assert resolve(LAB, "8.8.8.8").service is None


def test_an_address_of_the_other_family_knows_whose_it_is() -> None:
    lab = load("dual-stack").lab
    pod = resolve(lab, "[fd00:10:244:2::5]:8002")
    assert (pod.kind, pod.address, pod.port_number) == ("address", "fd00:10:244:2::5", 8002)
    assert pod.pod is not None
    assert pod.pod.name == "myblog-5c97d79cdb-j485f"
    node = resolve(lab, "fd00:172:21:32::9")
    assert node.node is not None
    assert node.node.name == "k8s-slave2"
    service = resolve(lab, "[fd00:10:96::93]:80")
    assert service.service is not None
    assert (service.service.name, service.port_number) == ("myblog", 80)


def test_a_namespace_decides_between_twins() -> None:
    found = resolve(LAB, "twin", namespace="other")
    assert found.pod is not None
    assert found.pod.namespace == "other"
    assert resolve(LAB, "demo/twin", namespace="other").address == "10.244.1.3"


@pytest.mark.parametrize(
    ("text", "namespace", "code", "says"),
    [
        ("pod9", None, "unknown-name", 'did you mean "pod1"? `netlab get pods` lists them'),
        ("pod/pod9", None, "unknown-pod", 'pod "pod9" is not in lab lab'),
        ("svc/myblgo", None, "unknown-service", 'did you mean "myblog"? `netlab get services`'),
        ("node/n9", None, "unknown-node", "`netlab get nodes` lists them"),
        ("deploy/wbe", None, "unknown-pod", 'did you mean "Deployment/web"'),
        ("pod1", "other", "unknown-name", '"pod1" is not in lab lab, namespace other'),
        ("pod1", "other", "unknown-name", 'did you mean "demo/pod1"'),
        ("twin", None, "ambiguous-name", "pod/demo/twin, pod/other/twin"),
        ("both", None, "ambiguous-name", "pod/demo/both, svc/demo/both"),
        ("svc/myblog:htpp", None, "unknown-port", 'did you mean "http"'),
        ("node/n1:http", None, "unknown-port", 'node/n1 has no port named "http"'),
        ("pod1:0", None, "bad-port", "1 to 65535"),
        ("pod1:", None, "bad-port", "1 to 65535"),
        ("pod1:" + "1" * 5000, None, "bad-port", "1 to 65535"),
        ("10.1.2.3:70000", None, "bad-port", "70000"),
        ("10.1.2.300", None, "bad-address", "10.1.2.300"),
        ("fd00::g", None, "bad-address", '"fd00::g" is not an address'),
        ("fd00:10:96::b:80:99:1:2:3", None, "bad-address", "in brackets: [fd00:10:96::b]:80"),
        ("[fd00::1]:x", None, "bad-port", '"x"'),
        ("[10.1.2.3]:80", None, "bad-address", "not an IPv6 address"),
        ("", None, "unknown-name", "is not in lab"),
    ],
)
def test_what_means_nothing_is_an_error(
    text: str, namespace: str | None, code: str, says: str
) -> None:
    with pytest.raises(NetlabError) as caught:
        resolve(LAB, text, namespace)
    assert caught.value.exit_code == Exit.USAGE
    assert [problem.code for problem in caught.value.problems] == [code]
    assert says in str(caught.value)
