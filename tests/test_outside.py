"""Hosts outside the cluster, the gateway to the internet, and what masquerading is for."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from labs import dual_stack_lab, fresh_name, small_lab
from netlab.datapath.egress import masquerading
from netlab.lab import lifecycle
from netlab.lab.change import apply, delete
from netlab.problems import NetlabError
from netlab.topology.load import load, read_objects
from netlab.topology.model import Gateway, Host, Lab, Overlay
from netlab.trace.aim import Request
from netlab.trace.model_steps import Nat
from netlab.trace.run import trace
from netlab.verify.run import verify
from predictions import TIMEOUT_S, clients, differing

GATEWAY = "apiVersion: netlab/v1\nkind: Gateway\nmetadata: {name: igw}\n"
POD = "---\napiVersion: v1\nkind: Pod\nmetadata: {name: p}\nstatus: {podIP: 10.244.1.2}\n"


def host(spec: str, name: str = "web") -> str:
    return f"---\napiVersion: netlab/v1\nkind: Host\nmetadata: {{name: {name}}}\nspec: {spec}\n"


def lab_with_outside(name: str | None = None, masquerade: str = "outside") -> Lab:
    """Two nodes and four pods; a host of the internet, one beside the nodes, one of elsewhere."""
    lab = small_lab(name)
    return replace(
        lab,
        overlay=Overlay(masquerade=masquerade),  # type: ignore[arg-type]
        gateway=Gateway(name="igw", addresses=("203.0.113.1",), cidrs=("203.0.113.0/24",)),
        hosts=(
            Host(name="web", addresses=("203.0.113.10",), internet=True, listen=(("TCP", 80),)),
            Host(name="near", addresses=("172.21.32.100",), listen=(("TCP", 80), ("UDP", 53))),
            Host(name="far", addresses=("192.0.2.42",), listen=(("TCP", 9376),)),
        ),
    )


def problem(tmp_path: Path, text: str) -> tuple[str, str]:
    file = tmp_path / "t.yaml"
    file.write_text(text)
    with pytest.raises(NetlabError) as caught:
        load(file)
    (found,) = caught.value.problems
    return found.code, found.message


def loaded(tmp_path: Path, text: str) -> Lab:
    file = tmp_path / "t.yaml"
    file.write_text(text)
    return load(file, name=fresh_name()).lab


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        (host("{address: 203.0.113.9, network: internet}"), "no-gateway", "no Gateway"),
        (GATEWAY + GATEWAY.replace("api", "---\napi", 1), "duplicate-gateway", "second"),
        (GATEWAY + "spec: {cidr: 10.244.0.0/20}\n", "overlapping-cidr", "10.244.0.0/16"),
        (GATEWAY + "spec: {address: 198.51.100.1}\n", "outside-cidr", "203.0.113.0/24"),
        (
            GATEWAY + host("{address: 198.51.100.7, network: internet}"),
            "outside-cidr",
            "not in the internet's",
        ),
        (host("{address: 10.96.0.1}"), "inside-cidr", "the cluster's"),
        (POD + host("{address: 10.244.1.2}"), "duplicate-address", "Pod default/p"),
        (host("{address: 172.21.32.50}") * 2, "duplicate-name", "stands twice"),
        (host("{address: 'fd00::1'}"), "other-family", "IPv6"),
        (host("{}"), "missing-field", "address"),
        (host("{address: 172.21.32.50, mode: x}"), "unknown-field", "mode"),
    ],
)
def test_what_cannot_be_is_said(tmp_path: Path, text: str, code: str, words: str) -> None:
    if code == "duplicate-name":
        file = tmp_path / "t.yaml"
        file.write_text(text)
        with pytest.raises(NetlabError) as caught:
            load(file)
        assert code in {each.code for each in caught.value.problems}
        return
    found, message = problem(tmp_path, text)
    assert found == code
    assert words in message


def test_nodes_masquerade_where_something_is_outside_unless_they_are_told(tmp_path: Path) -> None:
    outside = host("{address: 172.21.32.50}")
    lab = "---\napiVersion: netlab/v1\nkind: Lab\nmetadata: {name: l}\nspec: {overlay: {%s}}\n"
    assert loaded(tmp_path, POD).overlay.masquerade == "none"
    assert loaded(tmp_path, POD + outside).overlay.masquerade == "outside"
    for word in ("none", "all", "outside"):
        stated = lab % f"masquerade: {word}"
        assert loaded(tmp_path, POD + outside + stated).overlay.masquerade == word


def test_a_host_answers_where_it_is_an_endpoint(tmp_path: Path) -> None:
    lab = loaded(
        tmp_path,
        POD
        + host("{address: 192.0.2.42}", "database")
        + "---\napiVersion: v1\nkind: Service\nmetadata: {name: my-service}\n"
        "spec: {ports: [{port: 80, targetPort: 9376}]}\n"
        "---\napiVersion: v1\nkind: Endpoints\nmetadata: {name: my-service}\n"
        "subsets: [{addresses: [{ip: 192.0.2.42}], ports: [{port: 9376}]}]\n",
    )
    assert lab.hosts[0].listen == (("TCP", 9376),)


def test_masquerading_is_for_what_leaves_the_cluster() -> None:
    lab = dual_stack_lab(lab_with_outside("l"))
    four, six = masquerading(lab, lab.nodes[0])
    assert (four.family, four.name) == ("ip", "flannel-ipv4")
    assert (six.family, six.name) == ("ip6", "flannel-ipv6")
    assert "10.96.0.0/12" in four.text
    assert "172.21.32.11" in four.text
    every = masquerading(replace(lab, overlay=Overlay(masquerade="all")), lab.nodes[0])
    assert "172.21.32.11" not in every[0].text
    assert masquerading(replace(lab, overlay=Overlay()), lab.nodes[0]) == ()


@pytest.mark.kernel
@pytest.mark.parametrize("mode", ["iptables", "nftables"])
def test_pods_and_nodes_reach_hosts_as_predicted(up: Callable[[Lab], object], mode: str) -> None:
    lab = lab_with_outside()
    lab = replace(lab, service_proxy=replace(lab.service_proxy, mode=mode))  # type: ignore[arg-type]
    up(lab)
    assert verify(lab).as_declared
    hosts = [f"host/{each.name}" for each in lab.hosts]
    requests = [
        Request(source, destination, timeout_s=TIMEOUT_S)
        for source in (*clients(lab), *hosts)
        for destination in (*hosts, "p0", "node/n2", "203.0.113.1", "203.0.113.77", "8.8.8.8")
    ]
    assert differing(lab, requests) == []


@pytest.mark.kernel
def test_the_source_is_translated_twice_and_twice_back(up: Callable[[Lab], object]) -> None:
    lab = lab_with_outside()
    up(lab)
    found = trace(lab, Request("p0", "host/web"))
    assert found.delivered
    turned = [(each.kind, each.before.ip, each.after.ip) for each in found.translations]
    assert turned == [
        ("masquerade", "10.244.1.2", "172.21.32.11"),
        ("snat", "172.21.32.11", "203.0.113.1"),
    ]
    assert found.seen_source is not None
    assert found.seen_source.ip == "203.0.113.1"
    undone = [step for hop in found.reply for step in hop.steps if isinstance(step, Nat)]
    assert [step.after.ip for step in undone] == ["172.21.32.11", "10.244.1.2"]


@pytest.mark.kernel
def test_without_masquerading_the_gateway_drops_and_says_whom_it_does_not_know(
    up: Callable[[Lab], object],
) -> None:
    lab = lab_with_outside(masquerade="none")
    up(lab)
    found = trace(lab, Request("p0", "host/web"))
    assert found.dropped
    assert found.drop is not None
    assert found.drop.reason == "unknown-to-gateway"
    assert found.drop.where.endswith("the internet gateway")
    assert "10.244.1.2" in found.drop.explanation
    assert trace(lab, Request("node/n1", "host/web")).delivered


@pytest.mark.kernel
def test_hosts_and_the_gateway_come_and_go_with_their_objects(
    up: Callable[[Lab], object], tmp_path: Path
) -> None:
    lab = loaded(tmp_path, POD)
    up(lab)
    before = set(lifecycle.namespaces.names_of(lab.name))
    file = tmp_path / "outside.yaml"
    file.write_text(
        GATEWAY + host("{address: 203.0.113.10, network: internet, ports: [{port: 80}]}")
    )
    documents, _ = read_objects([str(file)])
    changed, _ = lifecycle.change(lab.name, lambda running: apply(running, documents))
    assert lifecycle.differences(changed.lab) == []
    assert trace(changed.lab, Request("p", "203.0.113.10:80")).delivered
    changed, _ = lifecycle.change(
        lab.name, lambda running: delete(running, ["host/web", "gateway/igw"])
    )
    assert lifecycle.differences(changed.lab) == []
    assert set(lifecycle.namespaces.names_of(lab.name)) == before


@pytest.mark.kernel
def test_tables_that_somebody_changed_are_mended_and_anothers_are_left(
    up: Callable[[Lab], object],
) -> None:
    lab = lab_with_outside()
    up(lab)
    node = ["ip", "netns", "exec", f"{lab.name}:n1", "nft"]
    subprocess.run([*node, "flush chain ip flannel-ipv4 postrtg"], check=True)
    assert not trace(lab, Request("p0", "host/web")).delivered
    assert [change.verb for change in lifecycle.up(lab).changes] == ["set"]
    assert trace(lab, Request("p0", "host/web")).delivered
    assert lifecycle.up(lab).changes == ()

    without = replace(lab, overlay=Overlay(masquerade="none"))
    lifecycle.up(without)
    subprocess.run([*node, "add table ip flannel-ipv4"], check=True)
    assert lifecycle.up(without).changes == ()
