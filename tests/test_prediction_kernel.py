"""Predictions against real packets: what is declared is what happens, and a difference is named."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from labs import dual_stack_lab, fresh_name, ipv6_lab, require_overlay, small_lab
from netlab.cli.main import netlab
from netlab.lab import lifecycle
from netlab.topology.load import load, shipped
from netlab.topology.model import (
    Endpoint,
    Lab,
    Pod,
    Protocol,
    ProxyMode,
    Service,
    ServiceEndpoints,
    ServicePort,
)
from netlab.trace.aim import Request, aim
from netlab.trace.model import Loss
from netlab.trace.run import trace
from netlab.trace.undeclared import undeclared
from predictions import TIMEOUT_S, clients, differing, service_addresses, socket
from trace_labs import lab, namespace, trace_lab

pytestmark = pytest.mark.kernel

__all__ = ["lab"]

# Every shipped topology as it is, and one in the other modes.
SHIPPED: list[tuple[str, ProxyMode | None]] = [
    *((name, None) for name in shipped()),
    ("two-node-vxlan", "nftables"),
    ("two-node-vxlan", "nftables-flat"),
    ("two-node-vxlan", "none"),
]


@pytest.mark.parametrize(("topology", "mode"), SHIPPED)
def test_prediction_is_observation_on_every_shipped_topology(
    up: Callable[[Lab], object], topology: str, mode: ProxyMode | None
) -> None:
    """Every pod to every pod, every pod and node to every Service, over each family."""
    lab = load(topology, name=fresh_name()).lab
    require_overlay(lab.overlay.type)
    if mode:
        lab = replace(lab, service_proxy=replace(lab.service_proxy, mode=mode))
    up(lab)
    assert differing(lab, _everything(lab)) == []


def _everything(lab: Lab) -> Iterator[Request]:
    for source in clients(lab):
        for pod in lab.pods if not source.startswith("node/") else ():
            for address in pod.addresses:
                yield Request(source, address, timeout_s=TIMEOUT_S)
        for end, protocol in service_addresses(lab):
            yield Request(source, end, protocol=protocol, timeout_s=TIMEOUT_S)  # type: ignore[arg-type]


def test_what_nobody_declared_is_predicted_too(lab: Lab) -> None:
    """Ends of ways that no Service and no pod has."""
    requests = [
        Request(source, destination, timeout_s=TIMEOUT_S)
        for source in ("p0", "node/n1")
        for destination in (
            *("p1:99", "p2:99", "node/n2:99", "node/n2", "node/n1", "p0:8002"),
            *("10.99.0.1:81", "10.99.9.9:80", "192.0.2.1", "172.21.32.77", "10.244.2.77"),
            *("10.244.2.1", "10.244.1.0", "172.21.32.1", "10.244.77.1"),
        )
    ]
    assert differing(lab, requests) == []


def test_packets_that_are_too_large_are_predicted(lab: Lab) -> None:
    asked = [
        ("p0", "p1", "icmp", 1450),
        ("p0", "p1", "icmp", 1451),
        ("node/n1", "p1", "icmp", 1451),
        ("node/n1", "node/n2", "icmp", 1500),
        ("p0", "svc/datagrams", "udp", 1450),
        ("p0", "svc/datagrams", "udp", 1460),
    ]
    requests = [
        Request(source, to, protocol=protocol, size=size, timeout_s=TIMEOUT_S)  # type: ignore[arg-type]
        for source, to, protocol, size in asked
    ]
    assert differing(lab, requests) == []


def host_network_lab(overlay: str, mode: ProxyMode) -> Lab:
    """Services of pods on the host network, and of one whose address is not of its node's CIDR."""
    lab = small_lab(pods=3, overlay=overlay)
    agents = [
        Pod(
            namespace="demo",
            name=f"agent-{node.name}",
            node=node.name,
            address=node.address,
            listen=(("TCP", 9100), ("UDP", 9100)),
            host_network=True,
        )
        for node in lab.nodes
    ]
    stray = Pod(
        namespace="demo", name="stray", node="n1", address="10.250.0.9", listen=(("TCP", 9100),)
    )
    behind: dict[str, tuple[list[Pod], Protocol]] = {
        "agents": (agents, "TCP"),
        "datagrams": (agents[1:], "UDP"),
        "of-stray": ([stray], "TCP"),
    }
    services, endpoints = [], []
    for number, (name, (pods, protocol)) in enumerate(behind.items(), 1):
        node_port = 30000 + number if protocol == "TCP" else None
        port = ServicePort(port=80, protocol=protocol, target_port=9100, node_port=node_port)
        services.append(
            Service(
                namespace="demo",
                name=name,
                type="NodePort" if node_port else "ClusterIP",
                cluster_ip=f"10.99.1.{number}",
                ports=(port,),
                external_traffic_policy="Local" if node_port else "Cluster",
            )
        )
        ends = tuple(
            Endpoint(address=pod.address, port=9100, node=pod.node, pod=pod.key) for pod in pods
        )
        endpoints.append(
            ServiceEndpoints(
                namespace="demo", service=name, port_name="", protocol=protocol, endpoints=ends
            )
        )
    return replace(
        lab,
        pods=(*lab.pods, *agents, stray),
        services=tuple(services),
        endpoints=tuple(endpoints),
        service_proxy=replace(lab.service_proxy, mode=mode),
    )


@pytest.mark.parametrize(
    ("overlay", "mode", "family"),
    [
        ("host-gw", "nftables", lambda lab: lab),
        ("vxlan", "iptables", ipv6_lab),
    ],
    ids=["host-gw-nftables", "vxlan-iptables-ipv6"],
)
def test_pods_on_the_host_network_and_with_addresses_of_their_own(
    up: Callable[[Lab], object], overlay: str, mode: ProxyMode, family: Callable[[Lab], Lab]
) -> None:
    lab = family(host_network_lab(overlay, mode))
    up(lab)
    requests = [
        Request(source, to, protocol=protocol, timeout_s=TIMEOUT_S)  # type: ignore[arg-type]
        for source in ("p0", "p1", "stray", "node/n1", "node/n2")
        for to, protocol in (
            *service_addresses(lab),
            *((f"{name}:9100", None) for name in ("stray", "agent-n1", "agent-n2")),
        )
    ]
    assert differing(lab, requests) == []


# --- generated labs ------------------------------------------------------------------------------

_CONDITIONS = [
    {},
    {"ready": False, "serving": False},
    {"ready": False, "terminating": True},
    {"for_nodes": ("n1",)},
    {"for_nodes": ("n2",)},
]
_RANGES = ["10.244.1.0/24", "172.21.32.0/24", "192.0.2.0/24"]


@st.composite
def services(draw: st.DrawFn, lab: Lab, number: int) -> tuple[Service, ServiceEndpoints]:
    """A Service in front of some pods, with addresses of every kind."""
    type_ = draw(st.sampled_from(["ClusterIP", "NodePort", "LoadBalancer"]))
    outside = type_ != "ClusterIP"
    protocol = draw(st.sampled_from(["TCP", "TCP", "UDP"]))
    policies = st.sampled_from(["Cluster", "Local"])
    balanced = type_ == "LoadBalancer"
    port = ServicePort(
        port=80,
        protocol=protocol,  # type: ignore[arg-type]
        target_port=8002,
        node_port=30000 + number if outside else None,
    )
    service = Service(
        namespace="demo",
        name=f"s{number}",
        type=type_,  # type: ignore[arg-type]
        cluster_ip=f"10.99.0.{number}",
        ports=(port,),
        external_ips=(f"203.0.113.{number}",) if draw(st.booleans()) else (),
        load_balancer_ips=(f"203.0.113.{100 + number}",) if balanced else (),
        load_balancer_source_ranges=(
            tuple(draw(st.lists(st.sampled_from(_RANGES), max_size=2, unique=True)))
            if balanced
            else ()
        ),
        external_traffic_policy=draw(policies) if outside else "Cluster",  # type: ignore[arg-type]
        internal_traffic_policy=draw(policies),  # type: ignore[arg-type]
    )
    behind = draw(st.lists(st.sampled_from(lab.pods), max_size=3, unique_by=lambda pod: pod.key))
    ends = tuple(
        Endpoint(
            address=pod.address,
            port=draw(st.sampled_from([8002, 8002, 8002, 8003])),  # nobody listens on the last
            node=pod.node,
            pod=pod.key,
            **draw(st.sampled_from(_CONDITIONS)),  # type: ignore[arg-type]
        )
        for pod in behind
    )
    return service, ServiceEndpoints(
        namespace="demo",
        service=service.name,
        port_name="",
        protocol=port.protocol,
        endpoints=ends,
    )


@st.composite
def generated_labs(draw: st.DrawFn) -> Lab:
    """One to three nodes, pods, Services, in any mode, over either family or both."""
    nodes = draw(st.integers(1, 3))
    made = small_lab(
        "generated",
        pods=draw(st.integers(2, 4)),
        nodes=nodes,
        overlay=draw(st.sampled_from(["vxlan", "host-gw"])),
    )
    pairs = [draw(services(made, number)) for number in range(1, draw(st.integers(2, 3)) + 1)]
    proxy = replace(
        made.service_proxy,
        mode=draw(st.sampled_from(["iptables", "nftables", "nftables-flat"])),
        detectLocalMode=draw(st.sampled_from(["ClusterCIDR", "NodeCIDR"])),
    )
    made = replace(
        made,
        services=tuple(service for service, _ in pairs),
        endpoints=tuple(ends for _, ends in pairs),
        service_proxy=proxy,
    )
    families = draw(st.sampled_from([lambda lab: lab, ipv6_lab, dual_stack_lab]))
    return families(made)


@st.composite
def probes(draw: st.DrawFn) -> tuple[Lab, list[tuple[str, str, str | None]]]:
    """A lab, and some clients and destinations in it."""
    lab = draw(generated_labs())
    ends: list[tuple[str, str | None]] = [*service_addresses(lab)]
    ends += [(socket(each, 8002), None) for pod in lab.pods for each in pod.addresses]
    ends += [(each, None) for node in lab.nodes for each in node.addresses]
    pairs = st.tuples(st.sampled_from(clients(lab)), st.sampled_from(ends))
    chosen = draw(st.lists(pairs, min_size=6, max_size=10, unique=True))
    return lab, [(source, *end) for source, end in chosen]


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(probes())
def test_prediction_is_observation_in_generated_labs(
    generated: tuple[Lab, list[tuple[str, str, str | None]]],
) -> None:
    lab, asked = generated
    lab = replace(lab, name=fresh_name())
    requests = [
        Request(source, to, protocol=protocol, timeout_s=TIMEOUT_S)  # type: ignore[arg-type]
        for source, to, protocol in asked
    ]
    try:
        lifecycle.up(lab)
        assert differing(lab, requests) == []
    finally:
        lifecycle.down(lab.name)


# --- what is not as declared ---------------------------------------------------------------------


def in_node(lab: Lab, node: str, *words: str) -> None:
    subprocess.run(["ip", "netns", "exec", namespace(lab, node), *words], check=True)


def test_a_way_round_that_delivers_is_named(lab: Lab) -> None:
    """Nothing is lost, and the trace itself has nothing to say."""
    in_node(lab, "n1", "ip", "route", "add", "10.244.2.2/32", "via", "172.21.32.12")
    found = trace(lab, Request("p0", "p1"))
    assert found.disposition == "delivered"
    assert found.prediction is not None
    assert found.prediction.differs == [
        "node n1's route to 10.244.2.2: 10.244.2.2 matches 10.244.2.2/32 via 172.21.32.12 dev eth0;"
        " declared is 10.244.2.0/24 via 10.244.2.0 dev flannel.1"
    ]


def test_a_translation_that_nobody_declared_is_named(lab: Lab) -> None:
    to = ("-d", "10.244.2.2", "-p", "tcp", "-j", "DNAT", "--to-destination", "10.244.1.3:8002")
    in_node(lab, "n1", "iptables", "-t", "nat", "-I", "PREROUTING", *to)
    found = trace(lab, Request("p0", "p1:8002"))
    assert found.prediction is not None
    assert found.prediction.differs[0] == (
        "node n1 sent it to 10.244.1.3:8002; declared is no translation"
    )
    in_node(lab, "n1", "iptables", "-t", "nat", "-D", "PREROUTING", *to)
    in_node(lab, "n1", "iptables", "-t", "nat", "-I", "POSTROUTING", *to[:4], "-j", "MASQUERADE")
    found = trace(lab, Request("p0", "p1:8002"))
    assert found.disposition == "delivered"
    assert found.prediction is not None
    assert found.prediction.differs == [
        "node n1 did a masquerade to 10.244.1.0, by -A POSTROUTING -d 10.244.2.2/32 -p tcp "
        "-j MASQUERADE; none is declared"
    ]


@pytest.mark.parametrize("broken", ["mtu", "address", "rules"])
def test_what_is_declared_stands_there_and_not_the_reason_again(lab: Lab, broken: str) -> None:
    to, options, declared = "p1:8002", {}, ""
    if broken == "mtu":
        in_node(lab, "n1", "ip", "link", "set", "flannel.1", "mtu", "1300")
        to, options = "p1", {"protocol": "icmp", "size": 1400}
        declared = "the MTU of a link (at node n1; declared are 1450 bytes on flannel.1 of node n1)"
    elif broken == "address":
        subprocess.run(
            ["ip", "-n", f"{lab.name}:demo:p1", "addr", "flush", "dev", "eth0"], check=True
        )
        declared = "declared is 10.244.2.2 on pod demo/p1)"
    else:
        in_node(lab, "n1", "iptables", "-t", "nat", "-F")
        to, declared = "svc/remote", "declared is a translation to 10.244.2.2:8002)"
    found = trace(lab, Request("p0", to, timeout_s=0.3, **options))  # type: ignore[arg-type]
    assert found.drop is not None
    assert found.prediction is not None
    first = found.prediction.differs[0]
    assert found.drop.explanation not in first
    assert declared in first
    assert "it should have been delivered to pod demo/p1 on n2" in first


def test_of_what_is_not_known_only_that_it_should_be_otherwise_is_said(lab: Lab) -> None:
    found = trace(lab, request := Request("p0", "p1:8002"))
    words = "it was last seen there; why is not known"
    lost = Loss(
        direction="forward",
        node="n1",
        device="eth0",
        reason="unknown",
        where="eth0 of node n1",
        rule=None,
        evidence=[],
        explanation=words,
        fix=None,
    )
    found = replace(found, disposition="dropped", drop=lost)
    assert found.prediction is not None
    assert undeclared(lab, aim(lab, request), found, found.prediction)[0] == (
        "it should have been delivered to pod demo/p1 on n2 port 8002, and was dropped (unknown)"
    )


def test_the_terminal_has_one_line_more_only_if_something_differs(lab: Lab) -> None:
    words = ["trace", "p0", "svc/remote", "--lab", lab.name]
    assert "declared otherwise" not in CliRunner().invoke(netlab, words).stdout
    in_node(lab, "n1", "sysctl", "-qw", "net.ipv4.ip_forward=0")
    told = CliRunner().invoke(netlab, words).stdout
    assert "declared otherwise: forwarding on node n1 is off; declared is on" in told
    # What is predicted stays what is declared.
    told = CliRunner().invoke(netlab, [*words, "--predict"]).stdout
    assert told.startswith("should be delivered: demo/p0 → svc/remote")


def test_an_answer_over_udp_is_known_where_a_node_masquerades_to_its_own_pod(lab: Lab) -> None:
    """The bridge sees it with an address of the client that no device had seen."""
    found = trace(lab, Request("node/n2", "svc/datagrams"))
    assert found.disposition == "delivered"
    assert found.delivered_to is not None
    assert found.delivered_to.name == "demo/p1"
    assert found.seen_source is not None
    assert found.seen_source.ip == "10.244.2.1"


def test_a_client_that_complains_of_a_strangers_answer_refuses_nothing(
    up: Callable[[Lab], object],
) -> None:
    """The answer goes past the node that translated, and the client sends it an ICMP error."""
    lab = trace_lab()
    port = ServicePort(port=80, protocol="UDP", target_port=8002, node_port=30053)
    service = Service(
        namespace="demo",
        name="stranger",
        type="NodePort",
        cluster_ip="10.99.0.9",
        ports=(port,),
        external_traffic_policy="Local",
    )
    behind = next(pod for pod in lab.pods if pod.name == "p2")
    end = Endpoint(address=behind.address, port=8002, node=behind.node, pod=behind.key)
    ends = ServiceEndpoints(
        namespace="demo", service="stranger", port_name="", protocol="UDP", endpoints=(end,)
    )
    lab = replace(lab, services=(*lab.services, service), endpoints=(*lab.endpoints, ends))
    up(lab)
    found = trace(lab, Request("p0", "172.21.32.12:30053", protocol="udp", timeout_s=TIMEOUT_S))
    assert found.drop is not None
    assert (found.disposition, found.drop.reason) == ("dropped", "not-masqueraded")
    assert found.prediction is not None
    assert found.prediction.differs == []


def test_a_pod_refuses_its_own_datagram(up: Callable[[Lab], object]) -> None:
    """The error is of the source's namespace, and a refusal all the same."""
    lab = trace_lab()
    closed = tuple(
        replace(each, endpoints=tuple(replace(end, port=8003) for end in each.endpoints))
        if each.service == "datagrams"
        else each
        for each in lab.endpoints
    )
    lab = replace(lab, endpoints=closed)
    up(lab)
    found = trace(lab, Request("p1", "svc/datagrams", timeout_s=TIMEOUT_S))
    assert found.drop is not None
    assert (found.disposition, found.drop.reason) == ("rejected", "port-closed")
    assert found.prediction is not None
    assert found.prediction.differs == []
