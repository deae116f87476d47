"""Traces through the rules of nftables mode: the same questions, the same answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import pytest
from msgspec.structs import replace

from labs import dual_stack_lab, six
from netlab.lab import lifecycle
from netlab.report.terminal import headline
from netlab.topology.model import Endpoint, Lab, Service, ServiceEndpoints, ServicePort
from netlab.trace.aim import Request
from netlab.trace.model import Trace
from netlab.trace.model_steps import Nat, Rule, Socket, Tuple
from netlab.trace.run import trace
from netlab.trace.witnesses.nftables_text import Lookup, lookup_of, served_by_chain
from netlab.trace.witnesses.rules import Run, ended
from test_trace_kernel import all_ok, in_node, places
from trace_labs import trace_lab
from trace_records import told

SOURCE_RANGE = "198.51.100.0/24"
BALANCER = "203.0.113.7"


def nftables_lab() -> Lab:
    """The trace lab in nftables mode, with Services for what its maps can tell apart."""
    made = trace_lab()
    web = ServicePort(name="http", port=80, target_port=8002)
    more = (
        Service(
            namespace="demo",
            name="elsewhere",
            cluster_ip="10.99.0.6",
            ports=(web,),
            internal_traffic_policy="Local",
        ),
        Service(
            namespace="demo",
            name="restricted",
            type="LoadBalancer",
            cluster_ip="10.99.0.7",
            ports=(replace(web, node_port=30080),),
            load_balancer_ips=(BALANCER,),
            load_balancer_source_ranges=(SOURCE_RANGE,),
        ),
        Service(
            namespace="demo",
            name="sticky",
            cluster_ip="10.99.0.8",
            ports=(web,),
            session_affinity="ClientIP",
        ),
        Service(
            namespace="demo",
            name="closed",
            type="NodePort",
            cluster_ip="10.99.0.9",
            ports=(replace(web, node_port=30090),),
        ),
    )
    p1 = next(pod for pod in made.pods if pod.name == "p1")
    end = Endpoint(address=p1.address, port=8002, node=p1.node, pod=p1.key)
    behind = tuple(
        ServiceEndpoints(
            namespace="demo", service=name, port_name="http", protocol="TCP", endpoints=(end,)
        )
        for name in ("elsewhere", "restricted", "sticky")
    )
    return replace(
        made,
        services=made.services + more,
        endpoints=made.endpoints + behind,
        service_proxy=replace(made.service_proxy, mode="nftables"),
    )


@pytest.fixture
def lab() -> Iterator[Lab]:
    made = nftables_lab()
    try:
        lifecycle.up(made)
        yield made
    finally:
        lifecycle.down(made.name)


def rules(found: Trace) -> list[Rule]:
    return [step for hop in found.forward for step in hop.steps if isinstance(step, Rule)]


@pytest.mark.kernel
def test_a_delivered_probe_names_the_rule_and_the_service(lab: Lab) -> None:
    found = trace(lab, Request("p0", "svc/remote"))
    assert found.disposition == "delivered"
    assert all_ok(found)
    assert places(found.forward) == ["demo:p0", "n1", "_switch", "n2", "demo:p1"]
    met = [rule for rule in rules(found) if "firewall" not in (rule.rule or "")]
    assert [rule.chain.partition("-3KZGOQFF")[0] for rule in met[:3]] == [
        "nat-prerouting",
        "services",
        "service",
    ]
    assert [rule.object for rule in met[:3]] == [None, "svc/demo/remote", "svc/demo/remote"]
    assert met[2].action == "dnat"
    step = next(s for hop in found.forward for s in hop.steps if isinstance(s, Nat))
    assert step.rule == "meta l4proto tcp dnat to 10.244.2.2:8002"
    assert [(each.kind, each.rule) for each in found.translations] == [("dnat", step.rule)]


@pytest.mark.kernel
def test_a_pod_that_reaches_itself_is_masqueraded_by_the_hairpin_rule(lab: Lab) -> None:
    found = trace(lab, Request("p0", "svc/itself"))
    assert found.disposition == "delivered"
    assert [each.kind for each in found.translations] == ["dnat", "masquerade"]
    assert "@hairpin-connections masquerade" in (found.translations[1].rule or "")
    assert found.seen_source is not None
    assert found.seen_source.ip == "10.244.1.1"


@pytest.mark.kernel
def test_a_node_is_masqueraded_by_its_mark(lab: Lab) -> None:
    found = trace(lab, Request("node/n1", "svc/remote"))
    assert found.disposition == "delivered"
    assert [each.kind for each in found.translations] == ["dnat", "masquerade"]
    assert (found.translations[1].rule or "").startswith("meta mark & 0x00004000")


@pytest.mark.kernel
def test_the_chain_that_remembers_a_client_names_the_service(lab: Lab) -> None:
    found = trace(lab, Request("p0", "svc/sticky"))
    assert found.disposition == "delivered"
    chosen = [rule for rule in rules(found) if rule.chain.startswith("endpoint-")]
    assert {rule.object for rule in chosen} == {"svc/demo/sticky:http"}
    assert "dnat to 10.244.2.2:8002" in (found.translations[0].rule or "")


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("destination", "element"),
    [
        ("svc/empty", '10.99.0.4 . tcp . 80 comment "demo/empty" : goto reject-chain'),
        ("node/n1:30090", 'tcp . 30090 comment "demo/closed:http" : goto reject-chain'),
    ],
)
def test_a_service_without_endpoints_is_named_by_its_element(
    lab: Lab, destination: str, element: str
) -> None:
    found = trace(lab, Request("p0", destination))
    assert found.disposition == "rejected"
    assert found.drop is not None
    assert (found.drop.reason, found.drop.node) == ("no-endpoints", "n1")
    assert element in found.drop.evidence[0]
    assert "vmap @no-endpoint-" in (found.drop.rule or "")
    name = element.split('"')[1]
    assert f"svc/{name} has no ready endpoint" in found.drop.explanation
    assert rules(found)[-1].object == f"svc/{name}"
    assert headline(found).endswith("on n1, no endpoints")


@pytest.mark.kernel
def test_a_service_whose_endpoints_are_elsewhere_under_policy_local(lab: Lab) -> None:
    found = trace(lab, Request("p0", "svc/elsewhere", timeout_s=0.3))
    assert found.disposition == "dropped"
    assert found.drop is not None
    assert (found.drop.reason, found.drop.node) == ("no-local-endpoints", "n1")
    assert "svc/demo/elsewhere:http is Local" in found.drop.explanation
    assert trace(lab, Request("p3", "svc/elsewhere")).disposition == "delivered"


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("destination", "disposition", "reason", "words"),
    [
        ("10.99.0.1:81", "rejected", "no-such-port", "svc/demo/remote has 80/TCP"),
        ("10.99.99.99:80", "dropped", "no-such-service", "no Service has it"),
    ],
)
def test_what_is_left_for_a_cluster_ip_is_explained(
    lab: Lab, destination: str, disposition: str, reason: str, words: str
) -> None:
    found = trace(lab, Request("p0", destination))
    assert found.disposition == disposition
    assert found.drop is not None
    assert (found.drop.reason, found.drop.node) == (reason, "n1")
    assert words in found.drop.explanation
    assert found.drop.where == "chain cluster-ips-check of table kube-proxy on node n1"


@pytest.mark.kernel
def test_source_ranges_that_do_not_hold_the_source(lab: Lab) -> None:
    found = trace(lab, Request("p0", f"{BALANCER}:80"))
    assert found.disposition == "dropped"
    assert found.drop is not None
    assert (found.drop.reason, found.drop.node) == ("dropped-by-rule", "n1")
    assert "loadBalancerSourceRanges of svc/demo/restricted:http" in found.drop.explanation
    assert found.drop.rule == f"ip saddr != {SOURCE_RANGE} drop"


@pytest.mark.kernel
def test_what_flat_maps_refuse_is_named_by_the_element_of_a_set() -> None:
    made = dual_stack_lab(nftables_lab())
    made = replace(made, service_proxy=replace(made.service_proxy, mode="nftables-flat"))
    families: tuple[tuple[Literal[4, 6], Callable[[str], str]], ...] = ((4, str), (6, six))
    try:
        lifecycle.up(made)
        for family, of in families:
            for destination, reason, words, element in (
                (
                    "svc/empty",
                    "no-endpoints",
                    "svc/demo/empty has no ready",
                    "10.99.0.4 . tcp . 80",
                ),
                ("node/n1:30090", "no-endpoints", "svc/demo/closed:http has", "tcp . 30090"),
                ("svc/elsewhere", "no-local-endpoints", "is Local", "10.99.0.6 . tcp . 80"),
            ):
                found = trace(made, Request("p0", destination, family=family, timeout_s=0.3))
                assert found.drop is not None
                assert (found.drop.reason, found.drop.node) == (reason, "n1")
                assert words in found.drop.explanation
                assert f"the set has its destination: {of(element)}" in found.drop.evidence[0]
            address = f"[{six(BALANCER)}]" if family == 6 else BALANCER
            found = trace(made, Request("p0", f"{address}:80", timeout_s=0.3))
            assert found.drop is not None
            assert "the loadBalancerSourceRanges of" in found.drop.explanation
    finally:
        lifecycle.down(made.name)


@pytest.mark.kernel
def test_a_dropped_probe_does_not_wait_for_its_answer(lab: Lab) -> None:
    """An hour would do as well; it ends long before."""
    found = trace(lab, Request("p0", "10.99.99.99:80", protocol="udp", timeout_s=60))
    assert found.disposition == "dropped"
    assert found.elapsed_us < 30_000_000


@pytest.mark.kernel
def test_a_rule_of_ones_own_can_be_removed_as_told(lab: Lab) -> None:
    in_node(lab, "n1", "nft", "add table ip mine")
    in_node(lab, "n1", "nft", "add chain ip mine c { type filter hook forward priority 5; }")
    in_node(lab, "n1", "nft", "add rule ip mine c tcp dport 8002 drop")
    found = trace(lab, Request("p0", "svc/remote"))
    assert found.drop is not None
    assert found.drop.reason == "dropped-by-rule"
    command = (found.drop.fix or "").partition("`ip netns exec ")[2].rstrip("`").split()
    in_node(lab, "n1", *command[1:])
    assert trace(lab, Request("p0", "svc/remote")).disposition == "delivered"


# --- without a kernel ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chain", "served"),
    [
        ("service-ILDV4B5I-demo/myblog/tcp/", "svc/demo/myblog"),
        ("external-42NFTM6N-ns2/svc2/tcp/p80", "svc/ns2/svc2:p80"),
        ("local-42NFTM6N-ns2/svc2/udp/p80", "svc/ns2/svc2:p80"),
        ("firewall-42NFTM6N-ns2/svc2/tcp/p80", "svc/ns2/svc2:p80"),
        ("endpoint-VFQRO7DV-shop/login/tcp/http__10.42.1.90/8080", "svc/shop/login:http"),
        ("endpoint-VFQRO7DV-shop/login/tcp/__fd00..1/8080", "svc/shop/login"),
        ("services", None),
        ("service-endpoints-check", None),
        ("firewall-check", None),
    ],
)
def test_a_chains_name_says_whom_it_serves(chain: str, served: str | None) -> None:
    assert served_by_chain(chain) == served


def _run(destination: Socket, protocol: str = "tcp") -> Run:
    record, _, _ = told("rule-drop")
    flow = Tuple(source=Socket(ip="10.244.1.2", port=41000), destination=destination)
    run = record.runs[0]
    return Run(
        place=run.place,
        table="kube-proxy",
        chain="filter-forward",
        iif="cbr0",
        oif="eth0",
        protocol=protocol,
        flow=flow,
        ip_id=1,
        quoted=b"",
        outer=False,
        ours=True,
    )


@pytest.mark.parametrize(
    ("rule", "lookup"),
    [
        (
            "ip daddr . meta l4proto . th dport vmap @no-endpoint-services",
            Lookup("no-endpoint-services", "10.99.0.4 . tcp . 80"),
        ),
        (
            "ip daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports",
            Lookup("no-endpoint-nodeports", "tcp . 80"),
        ),
        ("ct state new jump service-endpoints-check", None),
        (
            "ip daddr . meta l4proto . th dport @no-local-endpoint-services drop",
            Lookup("no-local-endpoint-services", "10.99.0.4 . tcp . 80"),
        ),
        ("ip daddr . meta l4proto . th dport @local-services jump mark", None),
    ],
)
def test_a_rules_lookup_is_that_of_the_packet(rule: str, lookup: Lookup | None) -> None:
    assert lookup_of(rule, _run(Socket(ip="10.99.0.4", port=80))) == lookup


def test_a_packet_without_ports_is_not_looked_up_by_them() -> None:
    rule = "ip daddr . meta l4proto . th dport vmap @no-endpoint-services"
    assert lookup_of(rule, _run(Socket(ip="10.99.0.4"), "icmp")) is None


@pytest.mark.parametrize(
    ("rule", "action"),
    [
        ("-A KUBE-SEP-X -p tcp -j DNAT --to-destination 10.244.1.4:8002", "DNAT"),
        ('-A X -m comment --comment "then -j DROP" -j ACCEPT', "ACCEPT"),
        ("meta l4proto tcp dnat ip to numgen random mod 2 map { 0 : 10.0.0.1 . 80 }", "dnat"),
        ("ct status dnat ip saddr . ip daddr @hairpin-connections masquerade", "masquerade"),
        ('ip daddr @cluster-ips reject comment "drop it"', "reject"),
        ("ip daddr . meta l4proto . th dport vmap @service-ips", "drop"),
        (None, "drop"),
    ],
)
def test_what_a_rule_does_is_read_off_its_text(rule: str | None, action: str) -> None:
    step = Rule(hook="FORWARD", table="t", chain="c", handle=1, verdict="drop", rule=rule)
    assert step.action == action


def test_a_drop_ends_the_wait_unless_something_was_sent_back() -> None:
    for name, ends in (("rule-drop", True), ("no-endpoints", False), ("remote-service", False)):
        record, _, _ = told(name)
        n1 = [run for run in record.runs if run.place.name == "n1"]
        assert ended(n1) is ends
    assert not ended([])
