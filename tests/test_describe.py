"""`netlab describe`: who is chosen, and why nobody else, told as the rules have it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given

from labs import fresh_name
from netlab.datapath.services.choices import Choice, Wanted, choices, why_not
from netlab.datapath.services.endpoints import Endpoints, ServicePortInfo, Verdict, service_ports
from netlab.datapath.services.names import address_port, service_port_name
from netlab.lab import lifecycle
from netlab.report.describe import pod as pod_facts
from netlab.report.describe import service as service_facts
from netlab.topology.model import Endpoint, Node, Service
from services_golden import STATES, golden_lab
from test_change import node, pod, service
from test_cli import netlab
from test_services_endpoints import HERE, _endpoints, _services, info_of
from test_topology_allocation import allocated


def agree(info: ServicePortInfo, node: Node) -> None:
    """Who is in a set has no reason to be out of it, and the others have one."""
    sets: tuple[tuple[Wanted, Endpoints], ...] = (("cluster", info.cluster), ("local", info.local))
    for wanted, used in sets:
        in_words = tuple(e for e in info.known if not why_not(e, wanted, info.known, node))
        assert used in (in_words, ())  # one that no policy asks for is empty
        if info.internal_local is (wanted == "local"):
            assert used == in_words


@pytest.mark.parametrize("state", STATES)
def test_reasons_agree_with_the_sets_of_the_real_kube_proxy(state: str) -> None:
    lab, here = golden_lab(state)
    for each in lab.nodes:
        for family in (4, 6):
            for info in service_ports(lab, each, family):
                agree(info, each)
    ports = {info.name for family in (4, 6) for info in service_ports(lab, here, family)}
    for each_service in lab.services:
        for port in each_service.ports:
            name = service_port_name(each_service.namespace, each_service.name, port.name)
            found = choices(lab, each_service, port, here)
            assert bool(found) == (name in ports)
            for choice in found:
                assert choice.reason
                assert (choice.verdict is Verdict.FORWARD) == bool(choice.endpoints)
                left = {id(each.endpoint) for each in choice.left_out}
                assert not left & {id(endpoint) for endpoint in choice.endpoints}


@given(_services, _endpoints)
def test_an_endpoint_is_chosen_or_there_is_a_reason(
    described: Service, endpoints: tuple[Endpoint, ...]
) -> None:
    agree(info_of(described, endpoints), HERE)


def told(state: str) -> dict[tuple[str, str], Choice]:
    """Choices of a state's only Service port, by address and client."""
    lab, here = golden_lab(state)
    (described,) = (each for each in lab.services if each.cluster_ip)
    found = choices(lab, described, described.ports[0], here)
    return {(at, choice.client): choice for choice in found for at in choice.to}


def outcome(choice: Choice) -> str:
    if choice.verdict is not Verdict.FORWARD:
        return f"{choice.verdict.value}: {choice.reason}"
    return " ".join(map(address_port, choice.endpoints)) + f": {choice.reason}"


def why(choice: Choice) -> set[str]:
    return {each.why for each in choice.left_out}


def test_policy_local_without_a_local_endpoint() -> None:
    found = told("nodeport-local-remote-only")
    (inside,) = (choice for (at, client), choice in found.items() if at.endswith(":80"))
    assert inside.client == "anybody"
    by_client = {c: choice for (at, c), choice in found.items() if at.startswith("NodePort")}
    assert by_client["pods and this node"].endpoints == inside.endpoints
    assert outcome(by_client["others"]).startswith("drop: externalTrafficPolicy is Local")
    assert why(by_client["others"]) == {f"it is on node {inside.endpoints[0].node}"}


def test_the_other_reasons() -> None:
    def only(state: str) -> Choice:
        return next(iter(told(state).values()))

    assert outcome(only("itp-local-no-endpoints")) == "reject: it has no endpoint"
    assert outcome(only("itp-local-remote-only")).startswith("drop: internalTrafficPolicy is Local")
    assert outcome(only("terminating-not-serving")).startswith("reject: no endpoint is ready")
    assert why(only("terminating-not-serving")) == {"it terminates and no longer serves"}
    assert "it terminates, and others are ready" in why(only("terminating-beside-ready"))
    assert "no endpoint is ready: those that terminate" in outcome(only("terminating-only"))
    assert "hints of the EndpointSlices for zone" in outcome(only("hints-zone"))
    assert any(each.startswith("its hint is for zone") for each in why(only("hints-zone")))
    assert "hints of the EndpointSlices for node" in outcome(only("hints-node"))
    assert any(each.startswith("its hint is for node") for each in why(only("hints-node")))
    assert outcome(only("hints-zone-missing")).endswith("every endpoint that is ready")


def test_who_is_not_in_the_source_ranges_is_dropped() -> None:
    found = told("lb-source-ranges")
    outside = [c for (_, client), c in found.items() if client.startswith("anybody outside")]
    assert [choice.verdict for choice in outside] == [Verdict.DROP]
    # A node port is nobody's load balancer.
    (balanced,) = outside
    assert not any(at.startswith("NodePort") for at in balanced.to)


def test_endpoints_of_the_other_family_and_those_that_stand_twice() -> None:
    reasons = {each for choice in told("clusterip-five-endpoints").values() for each in why(choice)}
    assert "the same endpoint stands in another EndpointSlice" in reasons
    lab, here = golden_lab("dual-stack")
    described = lab.services[0]
    reasons = {r for c in choices(lab, described, described.ports[0], here) for r in why(c)}
    assert any(reason.startswith("it is IPv6, and ") for reason in reasons)
    assert any(reason.startswith("it is IPv4, and [") for reason in reasons)


def test_a_node_port_of_both_families_is_one_way_for_each() -> None:
    lab, here = golden_lab("dual-stack")
    (described,) = (each for each in lab.services if len(each.cluster_ips) > 1)
    ways = {at: c for c in choices(lab, described, described.ports[0], here) for at in c.to}
    for at, other in (("NodePort 30580 over IPv4", 6), ("NodePort 30580 over IPv6", 4)):
        left = [each for each in ways[at].left_out if each.why.startswith(f"it is IPv{other}, ")]
        assert left
        assert all((":" in each.endpoint.address) == (other == 6) for each in left)


def test_pods_that_are_selected_and_are_no_endpoint() -> None:
    named = {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": "http"}]}
    port = {"name": "http", "containerPort": 8080}
    good = pod("good", nodeName="n1", containers=[{"name": "c", "ports": [port]}])
    lab = allocated([node("n1"), node("n2"), good, pod("bare"), pod("db", "db"), service(**named)])
    facts = service_facts(lab, lab.services[0], lab.nodes)
    (shown,) = facts["ports"]
    assert shown["withoutEndpoint"] == [{"pod": "bare", "why": 'it has no TCP port named "http"'}]
    assert facts["notSelected"] == [{"name": "db", "labels": {"app": "db"}}]
    (choice,) = shown["choices"]  # the same on both nodes
    assert choice["nodes"] == ["n1", "n2"]
    assert [(each["pod"], each["probability"]) for each in choice["chosen"]] == [
        ("default/good", 1)
    ]
    bare = next(each for each in lab.pods if each.name == "bare")
    (entry,) = pod_facts(lab, bare)["services"]
    assert (entry["name"], entry["why"]) == ("web", 'it has no TCP port named "http"')


def test_services_that_no_rule_serves() -> None:
    headless, name = service("headless", clusterIP="None"), service("name", type="ExternalName")
    name["spec"] = {"type": "ExternalName", "externalName": "example.org"}
    lab = allocated([node("n1"), pod("p"), headless, name])
    for described, word in zip(lab.services, ("headless", "ExternalName"), strict=True):
        facts = service_facts(lab, described, lab.nodes)
        assert facts["notProxied"].startswith(word)
        assert all(port["choices"] == [] for port in facts["ports"])


@pytest.mark.kernel
def test_describe_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    name = fresh_name()
    monkeypatch.setenv("NETLAB_LAB", name)

    def fine(*arguments: str) -> str:
        finished = netlab(*arguments)
        assert finished.returncode == 0, finished.stderr
        return finished.stdout

    try:
        fine("up", "two-node-vxlan")
        text = fine("describe", "svc/myblog")
        assert "10.99.174.93:80 from anybody: every endpoint that is ready" in text
        assert text.count("    1/2  10.244.") == 2
        assert "On nodes k8s-slave1, k8s-slave2\n" in text
        assert "Not selected: pod1 (app=client), mysql" in text
        fine("ready", "pod/myblog-5c97d79cdb-jn7km", "--false")
        text = fine("describe", "svc/myblog", "--node", "k8s-slave2")
        assert "On node k8s-slave2\n" in text
        assert "-    10.244.1.4:8002 myblog-5c97d79cdb-jn7km: it is not ready\n" in text
        facts: Any = json.loads(fine("describe", "svc/myblog", "-o", "json"))
        assert (facts["schema"], facts["kind"]) == ("netlab.describe/v1", "Service")
        assert "not ready" in fine("describe", "pod/myblog-5c97d79cdb-jn7km")
        assert "myblog-5c97d79cdb-j485f" in fine("describe", "node/k8s-slave2")
        both = json.loads(fine("describe", "pod1", "10.99.174.93", "-o", "json"))
        assert [each["kind"] for each in both] == ["Pod", "Service"]
        for wrong in (("svc/myblok",), ("192.0.2.1",), ("svc/myblog", "--node", "nobody")):
            finished = netlab("describe", *wrong)
            assert (finished.returncode, finished.stdout) == (2, "")
    finally:
        lifecycle.down(name)
