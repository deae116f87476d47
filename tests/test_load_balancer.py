"""Load balancers: addresses for Services, both modes on the kernel, health checks, traces."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from labs import dual_stack_lab, fresh_name, small_lab
from netlab.datapath import balancer
from netlab.datapath.outside_names import balancer_namespace, host_namespace
from netlab.lab import lifecycle, record
from netlab.lab.change import apply, delete, ready
from netlab.problems import NetlabError
from netlab.topology import status
from netlab.topology.load import load, read_objects, shipped
from netlab.topology.model import (
    BalancerMode,
    Gateway,
    HealthChecks,
    Host,
    Lab,
    LoadBalancer,
    ProxyMode,
    Service,
    ServiceEndpoints,
    ServicePort,
)
from netlab.trace.aim import Request
from netlab.trace.prediction import foretell
from netlab.trace.run import trace
from predictions import TIMEOUT_S, differing

NODES = "".join(f"apiVersion: v1\nkind: Node\nmetadata: {{name: n{i}}}\n---\n" for i in range(1, 4))
FIRST, SECOND = "k8s-slave1", "k8s-slave2"
QUICK = HealthChecks(period_s=0.05, timeout_s=0.3)


def box(spec: str = "{pool: 192.0.2.0/30}", name: str = "lb") -> str:
    head = f"---\napiVersion: netlab/v1\nkind: LoadBalancer\nmetadata: {{name: {name}}}\n"
    return f"{head}spec: {spec}\n"


def service(name: str, spec: str = "", rest: str = "") -> str:
    return (
        f"---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\n"
        f"spec: {{type: LoadBalancer, ports: [{{port: 80}}]{spec}}}\n{rest}"
    )


def loaded(tmp_path: Path, text: str) -> Lab:
    file = tmp_path / "t.yaml"
    file.write_text(NODES + text)
    return load(file, name=fresh_name()).lab


def balanced_lab(mode: BalancerMode, proxy: ProxyMode = "iptables") -> Lab:
    """Three nodes, pods on two; demo/every of policy Cluster, demo/local of Local, by a box."""
    lab = small_lab(nodes=3, pods=2)
    pods = lab.pods
    port = ServicePort(port=80, target_port=8002)
    made, entries = [], []
    for name, number, policy in (("every", 30080, "Cluster"), ("local", 30081, "Local")):
        made.append(
            Service(
                namespace="demo",
                name=name,
                type="LoadBalancer",
                cluster_ip=f"10.99.0.{number - 30060}",
                ip_families=("IPv4",),
                selector={"app": "web"},
                ports=(replace(port, node_port=number),),
                load_balancer_ips=(f"192.0.2.{number - 30079}",),
                external_traffic_policy=policy,  # type: ignore[arg-type]
                health_check_node_port=32000 if policy == "Local" else None,
            )
        )
        (ends,) = {e.endpoints for e in lab.endpoints if e.port_name == "http"}
        first = replace(ends[0], address=pods[0].address, node="n1", pod=pods[0].key)
        entries.append(
            ServiceEndpoints(
                namespace="demo",
                service=name,
                port_name="",
                protocol="TCP",
                endpoints=(first, *ends),
            )
        )
    return replace(
        lab,
        service_proxy=replace(lab.service_proxy, mode=proxy),
        services=tuple(made),
        endpoints=tuple(entries),
        hosts=(Host(name="client", addresses=("172.21.32.100",)),),
        balancers=(
            LoadBalancer(
                name="lb",
                addresses=("172.21.32.200",),
                pools=("192.0.2.0/28",),
                mode=mode,
                checks=QUICK,
            ),
        ),
    )


# What a topology says


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        (box("{}"), "missing-field", "pool"),
        (box("{pool: 192.0.2.0}"), "bad-cidr", "192.0.2.0"),
        (box("{pool: 10.244.7.0/24}"), "overlapping-cidr", "pod CIDR"),
        (box("{pool: 172.21.32.128/28}"), "overlapping-cidr", "underlay"),
        (box() + box(name="other"), "overlapping-cidr", "LoadBalancer lb"),
        (box() + box("{pool: 198.51.100.0/30}"), "duplicate-name", "stands twice"),
        (box("{pool: 192.0.2.0/30, address: 10.0.0.1}"), "outside-cidr", "underlay"),
        (box("{pool: 192.0.2.0/30, address: 172.21.32.2}"), "duplicate-address", "Node n1"),
        (box("{pool: 192.0.2.0/30, mode: proxy}"), "bad-value", "proxy"),
        (box("{pool: 'fd00::/120'}"), "mixed-families", "IPv6"),
        (
            box() + service("a") + service("b") + service("c"),
            "exhausted-pool",
            "192.0.2.0/30 of LoadBalancer lb",
        ),
        (
            box() + service("a", ", loadBalancerIP: 192.0.2.9"),
            "outside-cidr",
            "no load balancer's pool",
        ),
        (
            box()
            + service("a", ", loadBalancerIP: 192.0.2.1")
            + service("b", ", loadBalancerIP: 192.0.2.1"),
            "duplicate-address",
            "default/a",
        ),
        (
            box() + service("a", ", loadBalancerClass: netlab/else"),
            "unknown-load-balancer",
            "netlab/else",
        ),
    ],
)
def test_what_cannot_be_is_said(tmp_path: Path, text: str, code: str, words: str) -> None:
    with pytest.raises(NetlabError) as caught:
        loaded(tmp_path, text)
    assert code in {each.code for each in caught.value.problems}
    assert any(words in each.message for each in caught.value.problems)


def test_services_get_the_lowest_free_address_and_keep_what_they_have(tmp_path: Path) -> None:
    given = "status: {loadBalancer: {ingress: [{ip: 192.0.2.2}]}}\n"
    lab = loaded(
        tmp_path,
        box("{pool: 192.0.2.0/29}")
        + service("a")
        + service("b", rest=given)
        + service("c", ", loadBalancerIP: 192.0.2.1")
        + service("d", ", loadBalancerClass: example.com/other"),
    )
    has = {each.name: each.load_balancer_ips for each in lab.services}
    assert has == {"a": ("192.0.2.3",), "b": ("192.0.2.2",), "c": ("192.0.2.1",), "d": ()}
    shown = {
        each["metadata"]["name"]: each["status"]["loadBalancer"] for each in status.services(lab)
    }
    assert shown["a"] == {"ingress": [{"ip": "192.0.2.3"}]}
    assert lab.balancers[0].addresses == ("172.21.32.254",)
    # One goes: the others keep theirs, and a new one gets what is free.
    without = delete(lab, ["svc/c"]).lab
    file = tmp_path / "new.yaml"
    file.write_text(service("e") + service("a", ", sessionAffinity: ClientIP"))
    documents, _ = read_objects([str(file)])
    after = apply(without, documents).lab
    has = {each.name: each.load_balancer_ips for each in after.services}
    assert has == {"a": ("192.0.2.3",), "b": ("192.0.2.2",), "d": (), "e": ("192.0.2.1",)}
    # Without the box its addresses are nobody's.
    alone = delete(after, ["loadbalancer/lb"]).lab
    assert {each.load_balancer_ips for each in alone.services} == {(), ("192.0.2.2",)}


def test_two_boxes_share_the_services(tmp_path: Path) -> None:
    lab = loaded(
        tmp_path,
        box("{pool: 192.0.2.1/32}", "one")
        + box("{pool: 198.51.100.0/30, mode: passthrough}", "two")
        + service("a")
        + service("b")
        + service("c", ", loadBalancerClass: netlab/two"),
    )
    has = {each.name: each.load_balancer_ips for each in lab.services}
    assert has == {"a": ("192.0.2.1",), "b": ("198.51.100.1",), "c": ("198.51.100.2",)}
    assert [box.serves(each) for box in lab.balancers for each in lab.services] == [
        *(("192.0.2.1",), (), ()),
        *((), ("198.51.100.1",), ("198.51.100.2",)),
    ]


def test_rules_say_what_a_box_does() -> None:
    (table,) = balancer.namespace(lab := balanced_lab("nat"), lab.balancers[0]).tables
    assert "ip daddr 192.0.2.1 tcp dport 80 dnat ip to numgen random mod 60 map" in table.text
    assert "ct status dnat snat ip to 172.21.32.200" in table.text
    assert "2 : 172.21.32.13 . 30081" in table.text
    lab = balanced_lab("passthrough")
    made = balancer.namespace(lab, lab.balancers[0])
    assert "ip daddr 192.0.2.0/28 notrack goto balance" in made.tables[0].text
    assert [(each.mark, each.table) for each in made.policies] == [(1, 101), (2, 102), (3, 103)]
    ranges = replace(lab.services[0], load_balancer_source_ranges=("203.0.113.0/24",))
    narrow = replace(balanced_lab("nat"), services=(ranges,))
    (table,) = balancer.namespace(narrow, narrow.balancers[0]).tables
    assert "ip saddr != 203.0.113.0/24 drop" in table.text


@pytest.mark.parametrize("mode", ["nat", "passthrough"])
def test_without_a_proxy_that_answers_checks_no_node_is_sent_to(mode: BalancerMode) -> None:
    for proxy, destination in (("none", "svc/every"), ("userspace", "svc/local")):
        lab = balanced_lab(mode, proxy)  # type: ignore[arg-type]
        told = foretell(lab, Request("host/client", destination)).prediction
        assert (told.disposition, told.reason_unsaid) == ("rejected", "no-healthy-node")


# On the kernel


def asked(lab: Lab, address: str, path: str = "/clientip") -> str:
    done = subprocess.run(
        [
            *("ip", "netns", "exec", host_namespace(lab, lab.hosts[0])),
            *("curl", "-s", "-g", "-m", "3", f"http://{address}{path}"),
        ],
        capture_output=True,
        text=True,
    )
    return done.stdout.strip() or f"curl: {done.returncode}"


def chosen(lab: Lab, name: str) -> set[str]:
    """What is in the slots of a Service's port, each once."""
    listed = subprocess.run(
        [
            *("ip", "netns", "exec", balancer_namespace(lab, lab.balancers[0])),
            *("nft", "list", "map", "ip", balancer.TABLE, f"slots/demo/{name}/tcp/80"),
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    _, _, elements = listed.partition("elements = {")
    return {
        each.partition(" : ")[2].strip() for each in elements.partition("}")[0].split(",") if each
    } - {""}


def becomes(wanted: set[str], lab: Lab, name: str) -> bool:
    deadline = time.monotonic() + 10
    while chosen(lab, name) != wanted and time.monotonic() < deadline:
        time.sleep(0.02)
    return chosen(lab, name) == wanted


@pytest.mark.kernel
@pytest.mark.parametrize("proxy", ["iptables", "nftables"])
@pytest.mark.parametrize("mode", ["nat", "passthrough"])
def test_clients_outside_reach_services_as_predicted(
    up: Callable[[Lab], object], mode: BalancerMode, proxy: ProxyMode
) -> None:
    lab = balanced_lab(mode, proxy)
    up(lab)
    requests = [
        Request("host/client", destination, timeout_s=TIMEOUT_S)
        for destination in (
            *("svc/every", "svc/every", "svc/local", "svc/local", "192.0.2.2:80"),
            *("192.0.2.1:81", "192.0.2.9:80"),
        )
    ]
    assert differing(lab, requests) == []
    found = trace(lab, Request("host/client", "svc/local"))
    assert found.delivered
    assert found.seen_source is not None
    # The text has the answer rewritten on its way back; only mode nat has it pass the box.
    client = "172.21.32.200" if mode == "nat" else "172.21.32.100"
    assert found.seen_source.ip == client
    assert asked(lab, "192.0.2.2").startswith(client)
    back = {hop.namespace for hop in found.reply}
    assert (balancer_namespace(lab, lab.balancers[0]) in back) == (mode == "nat")
    assert lifecycle.up(lab).changes == ()


@pytest.mark.kernel
@pytest.mark.parametrize("mode", ["nat", "passthrough"])
def test_nodes_leave_and_come_back_with_their_health(
    up: Callable[[Lab], object], tmp_path: Path, mode: BalancerMode
) -> None:
    text = shipped()[f"loadbalancer-{mode}"].read_text(encoding="utf-8")
    file = tmp_path / "t.yaml"
    checks = "  healthCheck: {periodSeconds: 0.05, timeoutSeconds: 0.3}\n"
    file.write_text(text.replace(f"  mode: {mode}\n", f"  mode: {mode}\n{checks}"))
    lab = load(file, name=fresh_name()).lab
    up(lab)
    addresses = {name: lab.node(name).address for name in ("k8s-master", FIRST, SECOND)}
    marks = {node.name: f"0x{mark:08x}" for mark, node in enumerate(lab.nodes, 1)}

    def slots(port: int, *names: str) -> set[str]:
        if mode == "passthrough":
            return {marks[name] for name in names}
        return {f"{addresses[name]} . {port}" for name in names}

    def set_ready(is_ready: bool, *pods: str) -> None:
        lifecycle.change(lab.name, lambda running: ready(running, pods, is_ready))

    one, other = (pod.name for pod in lab.pods)
    assert becomes(slots(30647, "k8s-master", FIRST, SECOND), lab, "myblog")
    assert chosen(lab, "myblog-local") == slots(30648, FIRST, SECOND)
    set_ready(False, one)
    assert becomes(slots(30648, SECOND), lab, "myblog-local")
    assert {asked(lab, "192.0.2.2", "/hostname") for _ in range(8)} == {other}
    set_ready(False, other)
    assert becomes(set(), lab, "myblog-local")
    assert becomes(set(), lab, "myblog")
    assert asked(lab, "192.0.2.1").startswith("curl: 7")  # refused, not left to wait
    now = record.read(lab.name)
    assert now is not None
    for destination in ("svc/myblog", "svc/myblog-local"):
        found = trace(now, Request("host/client", destination))
        assert found.drop is not None
        assert found.drop.reason == "no-healthy-node"
        assert found.drop.where.endswith("load balancer balancer")
        assert found.prediction is not None
        assert found.prediction.differs == []
    set_ready(True, one, other)
    assert becomes(slots(30647, "k8s-master", FIRST, SECOND), lab, "myblog")
    # A node that nobody hears of any more.
    subprocess.run(["ip", "-n", f"{lab.name}:{SECOND}", "link", "set", "eth0", "down"], check=True)
    assert becomes(slots(30647, "k8s-master", FIRST), lab, "myblog")
    assert {asked(lab, "192.0.2.2", "/hostname") for _ in range(8)} == {one}
    subprocess.run(["ip", "-n", f"{lab.name}:{SECOND}", "link", "set", "eth0", "up"], check=True)
    lifecycle.up(lab)
    assert becomes(slots(30647, "k8s-master", FIRST, SECOND), lab, "myblog")


@pytest.mark.kernel
@pytest.mark.parametrize("mode", ["nat", "passthrough"])
def test_the_internet_knows_the_way_to_a_load_balancer_and_no_other(
    up: Callable[[Lab], object], mode: BalancerMode
) -> None:
    lab = balanced_lab(mode)
    caller = Host(name="caller", addresses=("203.0.113.9",), internet=True)
    way = Gateway(name="igw", addresses=("203.0.113.1",), cidrs=("203.0.113.0/24",))
    lab = replace(lab, gateway=way, hosts=(caller, *lab.hosts))
    up(lab)
    requests = [
        Request("host/caller", destination, timeout_s=TIMEOUT_S)
        for destination in ("svc/every", "svc/local", "192.0.2.1:81", "node/n1:30080", "p0")
    ]
    assert differing(lab, requests) == []
    found = trace(lab, requests[1])
    assert found.delivered
    assert found.seen_source is not None
    assert found.seen_source.ip == ("172.21.32.200" if mode == "nat" else "203.0.113.9")
    assert asked(lab, "192.0.2.2").startswith(found.seen_source.ip)
    assert lifecycle.up(lab).changes == ()


@pytest.mark.kernel
@pytest.mark.parametrize("mode", ["nat", "passthrough"])
def test_source_ranges_are_heeded(up: Callable[[Lab], object], mode: BalancerMode) -> None:
    """By the box where nodes see it alone, else by the nodes."""
    lab = balanced_lab(mode)
    narrow = replace(lab.services[0], load_balancer_source_ranges=("203.0.113.0/24",))
    wide = replace(lab.services[1], load_balancer_source_ranges=("172.21.32.96/28",))
    lab = replace(lab, services=(narrow, wide))
    up(lab)
    requests = [
        Request("host/client", destination, timeout_s=TIMEOUT_S)
        for destination in ("svc/every", "svc/local")
    ]
    assert differing(lab, requests) == []
    found, other = (trace(lab, each) for each in requests)
    assert other.delivered
    assert found.drop is not None
    assert found.drop.reason == "dropped-by-rule"
    assert (" on load balancer lb" in found.drop.where) == (mode == "nat")


@pytest.mark.kernel
def test_what_somebody_removed_is_mended_and_the_checks_fill_it_again(
    up: Callable[[Lab], object],
) -> None:
    lab = balanced_lab("nat")
    up(lab)
    inside = ["ip", "netns", "exec", balancer_namespace(lab, lab.balancers[0])]
    subprocess.run([*inside, "nft", "delete", "table", "ip", balancer.TABLE], check=True)
    assert [change.verb for change in lifecycle.up(lab).changes] == ["add"]
    assert becomes({"172.21.32.11 . 30081", "172.21.32.12 . 30081"}, lab, "local")
    assert asked(lab, "192.0.2.2").startswith("172.21.32.200")


@pytest.mark.kernel
def test_services_and_boxes_come_and_go_with_their_objects(
    up: Callable[[Lab], object], tmp_path: Path
) -> None:
    host = "---\napiVersion: netlab/v1\nkind: Host\nmetadata: {name: client}\n"
    pod = "---\napiVersion: v1\nkind: Pod\nmetadata: {name: p, labels: {a: b}}\n"
    lab = loaded(tmp_path, host + "spec: {address: 172.21.32.100}\n" + pod)
    up(lab)
    before = set(lifecycle.namespaces.names_of(lab.name))
    file = tmp_path / "more.yaml"
    file.write_text(box() + service("web", ", selector: {a: b}"))
    documents, _ = read_objects([str(file)])
    changed, outcome = lifecycle.change(lab.name, lambda running: apply(running, documents))
    assert outcome.unready == ()
    assert lifecycle.differences(changed.lab) == []
    assert asked(lab, "192.0.2.1", "/hostname") == "p"
    changed, _ = lifecycle.change(
        lab.name, lambda running: delete(running, ["loadbalancer/lb", "svc/web"])
    )
    assert lifecycle.differences(changed.lab) == []
    assert set(lifecycle.namespaces.names_of(lab.name)) == before


@pytest.mark.kernel
@pytest.mark.parametrize("mode", ["nat", "passthrough"])
def test_both_families_are_balanced(up: Callable[[Lab], object], mode: BalancerMode) -> None:
    lab = dual_stack_lab(balanced_lab(mode))
    (box,), (host,) = lab.balancers, lab.hosts
    lab = replace(
        lab,
        services=tuple(replace(each, ip_families=("IPv4", "IPv6")) for each in lab.services),
        hosts=(replace(host, addresses=(*host.addresses, "fd00:172:21:32::64")),),
        balancers=(
            replace(
                box,
                addresses=(*box.addresses, "fd00:172:21:32::c8"),
                pools=(*box.pools, "fd00:192:0:2::/64"),
            ),
        ),
    )
    up(lab)
    requests = [
        Request("host/client", destination, family=family, timeout_s=TIMEOUT_S)
        for destination in ("svc/every", "svc/local")
        for family in (4, 6)
    ]
    assert differing(lab, requests) == []
    client = "[fd00:172:21:32::c8]" if mode == "nat" else "[fd00:172:21:32::64]"
    assert asked(lab, "[fd00:192:0:2::2]").startswith(client)
    assert lifecycle.up(lab).changes == ()
