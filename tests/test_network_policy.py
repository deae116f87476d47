"""NetworkPolicies: whom they select and let through, as rules, in traces, and on the kernel."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from labs import dual_stack_lab, fresh_name, small_lab
from netlab.datapath.network_policy import enforcing
from netlab.lab import lifecycle
from netlab.lab.change import apply, delete
from netlab.problems import NetlabError
from netlab.topology.load import load, read_objects
from netlab.topology.model import (
    ContainerPort,
    Lab,
    NetworkPolicy,
    PolicyRule,
    Ports,
    Protocol,
)
from netlab.trace.aim import Request
from netlab.trace.run import trace
from netlab.verify.run import verify
from predictions import TIMEOUT_S, clients, differing, service_addresses

HEAD = (
    "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: a, namespace: demo}\n"
)
PODS = "".join(
    f"---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {space}, "
    f"labels: {{app: {app}}}}}\n"
    for name, space, app in (
        ("web", "demo", "web"),
        ("db", "demo", "db"),
        ("far", "other", "web"),
        ("bare", "other", "none"),
    )
)
SPACES = (
    "---\napiVersion: v1\nkind: Namespace\nmetadata: {name: other, labels: {team: x}}\n"
    "---\napiVersion: v1\nkind: Namespace\nmetadata: {name: demo}\n"
)


def policy(tmp_path: Path, spec: str) -> NetworkPolicy:
    file = tmp_path / "t.yaml"
    file.write_text(f"{HEAD}spec: {spec}\n{PODS}{SPACES}")
    (found,) = load(file).lab.policies
    return found


def peers(tmp_path: Path, peer: str) -> set[str]:
    found = policy(tmp_path, f"{{podSelector: {{}}, ingress: [{{from: [{peer}]}}]}}")
    assert found.ingress
    return set(found.ingress[0].pods or ())


@pytest.mark.parametrize(
    ("selector", "selected"),
    [
        ("{}", {"demo/web", "demo/db"}),
        ("{matchLabels: {app: db}}", {"demo/db"}),
        ("{matchExpressions: [{key: app, operator: In, values: [db, x]}]}", {"demo/db"}),
        ("{matchExpressions: [{key: app, operator: NotIn, values: [db]}]}", {"demo/web"}),
        ("{matchExpressions: [{key: app, operator: Exists}]}", {"demo/web", "demo/db"}),
        ("{matchExpressions: [{key: tier, operator: DoesNotExist}]}", {"demo/web", "demo/db"}),
        (
            "{matchExpressions: [{key: tier, operator: NotIn, values: [x]}]}",
            {"demo/web", "demo/db"},
        ),
        ("{matchLabels: {app: db, tier: x}}", set()),
    ],
)
def test_pods_of_its_namespace_are_selected(
    tmp_path: Path, selector: str, selected: set[str]
) -> None:
    assert set(policy(tmp_path, f"{{podSelector: {selector}}}").selected) == selected


@pytest.mark.parametrize(
    ("peer", "named"),
    [
        ("{podSelector: {matchLabels: {app: web}}}", {"demo/web"}),
        ("{namespaceSelector: {}}", {"demo/web", "demo/db", "other/far", "other/bare"}),
        ("{namespaceSelector: {matchLabels: {team: x}}}", {"other/far", "other/bare"}),
        (
            "{namespaceSelector: {matchLabels: {team: x}}, podSelector: {matchLabels: {app: web}}}",
            {"other/far"},
        ),
        (
            "{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: demo}}}",
            {"demo/web", "demo/db"},
        ),
    ],
)
def test_peers_are_those_that_both_selectors_take(
    tmp_path: Path, peer: str, named: set[str]
) -> None:
    assert peers(tmp_path, peer) == named


@pytest.mark.parametrize(
    ("spec", "ingress", "egress"),
    [
        ("{podSelector: {}}", True, False),
        ("{podSelector: {}, egress: [{}]}", True, True),
        ("{podSelector: {}, policyTypes: [Egress]}", False, True),
        ("{podSelector: {}, policyTypes: [Ingress], egress: [{}]}", True, False),
    ],
)
def test_types_that_are_left_out_follow_from_the_rules(
    tmp_path: Path, spec: str, ingress: bool, egress: bool
) -> None:
    found = policy(tmp_path, spec)
    assert (found.ingress is not None, found.egress is not None) == (ingress, egress)


def test_a_block_is_what_its_exceptions_leave(tmp_path: Path) -> None:
    spec = (
        "{podSelector: {}, ingress: [{from: [{ipBlock: "
        "{cidr: 192.0.2.0/24, except: [192.0.2.0/25, 192.0.2.192/26]}}]}]}"
    )
    found = policy(tmp_path, spec)
    assert found.ingress
    assert found.ingress[0] == PolicyRule(pods=(), cidrs=("192.0.2.128/26",))


@pytest.mark.parametrize(
    ("rule", "code", "words"),
    [
        ("{ports: [{port: 90, endPort: 80}]}", "bad-port", "endPort 80 before its port 90"),
        ("{ports: [{port: http, endPort: 80}]}", "bad-port", "behind a name"),
        ("{ports: [{endPort: 80}]}", "bad-port", "no port"),
        ("{from: [{}]}", "bad-peer", "names nobody"),
        (
            "{from: [{podSelector: {}, ipBlock: {cidr: 10.0.0.0/8}}]}",
            "bad-peer",
            "a selector beside it",
        ),
        ("{from: [{ipBlock: {cidr: 10.0.0.0}}]}", "bad-cidr", "is not a CIDR"),
        (
            "{from: [{ipBlock: {cidr: 10.0.0.0/16, except: [10.1.0.0/24]}}]}",
            "outside-cidr",
            "not in 10.0.0.0/16",
        ),
    ],
)
def test_what_cannot_be_meant_is_said(tmp_path: Path, rule: str, code: str, words: str) -> None:
    with pytest.raises(NetlabError) as caught:
        policy(tmp_path, f"{{podSelector: {{}}, ingress: [{rule}]}}")
    (found,) = caught.value.problems
    assert found.code == code
    assert words in found.message
    assert found.place is not None
    assert found.place.line == 4


def test_the_rules_of_a_node(tmp_path: Path) -> None:
    lab = small_lab("l")
    ports = (
        Ports(protocol="TCP", first=80, last=90),
        Ports(protocol="TCP", first=85, last=100),
        Ports(protocol="UDP"),
    )
    lab = replace(
        lab,
        policies=(
            NetworkPolicy(
                namespace="demo",
                name="a",
                selected=("demo/p0", "demo/p1"),
                ingress=(PolicyRule(pods=("demo/p3",), cidrs=("192.0.2.0/24",), ports=ports),),
            ),
            NetworkPolicy(namespace="demo", name="b", selected=("demo/p0",), egress=()),
        ),
    )
    (table,) = enforcing(lab, lab.nodes[0])
    assert table.text == (Path(__file__).parent / "golden" / "network-policy.nft").read_text()


def test_nodes_without_isolated_pods_have_no_table() -> None:
    lab = small_lab("l")
    alone = NetworkPolicy(namespace="demo", name="a", selected=("demo/p1",), ingress=())
    lab = replace(lab, policies=(alone,))
    assert enforcing(lab, lab.nodes[0]) == ()
    assert len(enforcing(lab, lab.nodes[1])) == 1


def random_policies(chance: random.Random, lab: Lab) -> tuple[NetworkPolicy, ...]:
    keys = [pod.key for pod in lab.pods]
    protocols: tuple[Protocol, ...] = ("TCP", "UDP")

    def ports() -> tuple[Ports, ...]:
        made = (
            Ports(protocol=chance.choice(protocols), name="http"),
            Ports(protocol=chance.choice(protocols), first=8002, last=8002),
            Ports(protocol=chance.choice(protocols), first=8000, last=8001),
            Ports(protocol=chance.choice(protocols), first=7000, last=9000),
            Ports(protocol=chance.choice(protocols)),
        )
        return tuple(chance.sample(made, chance.choice((0, 1, 1, 2))))

    def rules() -> tuple[PolicyRule, ...] | None:
        if chance.random() < 0.3:
            return None
        cidrs = ("10.244.1.0/30", "10.244.2.2/32", "172.21.32.0/24", "fd00:10:244:2::/120")
        return tuple(
            PolicyRule(
                pods=None
                if chance.random() < 0.2
                else tuple(chance.sample(keys, chance.randint(0, 3))),
                cidrs=tuple(chance.sample(cidrs, chance.randint(0, 2))),
                ports=ports(),
            )
            for _ in range(chance.randint(0, 2))
        )

    return tuple(
        NetworkPolicy(
            namespace="demo",
            name=f"policy-{number}",
            selected=tuple(chance.sample(keys, chance.randint(1, 3))),
            ingress=rules(),
            egress=rules(),
        )
        for number in range(3)
    )


@pytest.mark.kernel
@pytest.mark.parametrize("mode", ["iptables", "nftables"])
def test_the_kernel_lets_through_what_the_api_says(up: Callable[[Lab], object], mode: str) -> None:
    """Random policies in labs of both families, by the reading of the API in `trace`."""
    chance = random.Random(mode)
    lab = dual_stack_lab(small_lab())
    pods = tuple(
        replace(pod, ports=(ContainerPort(port=8002, name="http"),)) if number != 2 else pod
        for number, pod in enumerate(lab.pods)
    )
    proxy = replace(lab.service_proxy, mode=mode)  # type: ignore[arg-type]
    lab = replace(lab, pods=pods, service_proxy=proxy)
    denied = 0
    for _ in range(4):
        lab = replace(lab, policies=random_policies(chance, lab))
        up(lab)
        found = verify(lab)
        assert [each for each in found.results if not each.as_declared] == [], lab.policies
        denied += sum(each.why_expected.endswith("-policy") for each in found.results)
    assert denied > 40, "the policies were no test"


@pytest.mark.kernel
def test_probes_meet_policies_as_predicted(up: Callable[[Lab], object]) -> None:
    """Services, node's own addresses, ICMP and closed ports, on one bridge and between nodes."""
    lab = small_lab()
    lab = replace(
        lab,
        policies=(
            NetworkPolicy(
                namespace="demo",
                name="in",
                selected=("demo/p1", "demo/p2"),
                ingress=(
                    PolicyRule(
                        pods=("demo/p0",), ports=(Ports(protocol="TCP", first=8002, last=8002),)
                    ),
                ),
            ),
            NetworkPolicy(
                namespace="demo",
                name="out",
                selected=("demo/p3",),
                egress=(PolicyRule(pods=("demo/p0",)),),
            ),
        ),
    )
    up(lab)
    requests = [
        Request(source, destination, protocol=protocol, timeout_s=TIMEOUT_S)  # type: ignore[arg-type]
        for source in clients(lab)
        for destination, protocol in (
            *((f"p{i}:8002", "tcp") for i in range(4)),
            ("p2:99", "tcp"),
            ("p1", "icmp"),
            ("node/n1", "icmp"),
            ("node/n2", "icmp"),
            *service_addresses(lab),
        )
    ]
    assert differing(lab, requests) == []


@pytest.mark.kernel
def test_a_drop_names_the_policy_and_a_change_of_it_holds_at_once(
    up: Callable[[Lab], object], tmp_path: Path
) -> None:
    lab = load("network-policy", name=fresh_name()).lab
    up(lab)
    request = Request("stranger", "demo/database:3306")
    found = trace(lab, request)
    assert found.dropped
    assert found.drop is not None
    assert found.drop.reason == "ingress-policy"
    assert found.drop.object == "NetworkPolicy demo/database"
    assert "networkpolicy/demo/database" in (found.drop.fix or "")
    assert "10.244.2." in found.drop.explanation

    changed, outcome = lifecycle.change(
        lab.name, lambda running: delete(running, ["networkpolicy/database"])
    )
    assert {change.namespace for change in outcome.changes} == {f"{lab.name}:k8s-slave2"}
    assert lifecycle.differences(changed.lab) == []
    assert trace(changed.lab, request).delivered

    file = tmp_path / "policy.yaml"
    file.write_text(f"{HEAD}spec: {{podSelector: {{matchLabels: {{app: database}}}}}}\n")
    documents, _ = read_objects([str(file)])
    changed, _ = lifecycle.change(lab.name, lambda running: apply(running, documents))
    assert lifecycle.differences(changed.lab) == []
    again = trace(changed.lab, request)
    assert again.drop is not None
    assert again.drop.object == "NetworkPolicy demo/a"
    assert verify(changed.lab).as_declared
