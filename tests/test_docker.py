"""Docker's networks on a node: what a file says of them, their rules, what becomes of packets."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from labs import fresh_name
from netlab.datapath import own_chains
from netlab.lab import lifecycle
from netlab.problems import NetlabError
from netlab.topology.load import load
from netlab.topology.model import Lab
from netlab.trace.aim import Request
from netlab.trace.prediction import foretell
from predictions import differing

NETLAB = Path(sys.executable).parent / "netlab"
NETWORK = "apiVersion: netlab/v1\nkind: ContainerNetwork\nmetadata: {{name: {name}}}\n"
CONTAINER = "apiVersion: netlab/v1\nkind: Container\nmetadata: {{name: {name}}}\n"


def container(name: str, spec: str = "") -> str:
    return CONTAINER.format(name=name) + (f"spec: {{{spec}}}\n" if spec else "")


def loaded(directory: Path, *documents: str) -> Lab:
    file = directory / "t.yaml"
    file.write_text("---\n".join(documents))
    return load(file).lab


def test_networks_and_addresses_are_decided_as_docker_does_it(tmp_path: Path) -> None:
    lab = loaded(
        tmp_path,
        NETWORK.format(name="one"),
        NETWORK.format(name="two"),
        container("a"),
        container("b", "address: 172.17.0.2"),
        container("c", "network: two"),
        container("d", "network: host"),
        container("e", "network: none"),
    )
    nets = {net.name: (net.cidr, net.gateway) for net in lab.docker_networks}
    assert nets == {
        "bridge": ("172.17.0.0/16", "172.17.0.1"),
        "one": ("172.18.0.0/16", "172.18.0.1"),
        "two": ("172.19.0.0/16", "172.19.0.1"),
    }
    found = {each.name: (each.mode, each.address) for each in lab.docker_containers}
    assert found == {
        "a": ("bridge", "172.17.0.3"),
        "b": ("bridge", "172.17.0.2"),
        "c": ("bridge", "172.19.0.2"),
        "d": ("host", ""),
        "e": ("none", ""),
    }


@pytest.mark.parametrize(
    ("documents", "code", "said"),
    [
        ([container("a", "network: absent")], "unknown-network", "has no network"),
        ([container("a", "node: absent")], "unknown-node", "there is no Node"),
        ([NETWORK.format(name="host")], "bad-name", "that Docker has itself"),
        (
            [NETWORK.format(name="a") + "spec: {subnet: 172.17.4.0/24}\n"],
            "overlapping-cidr",
            "overlaps with 172.17.0.0/16 of the same node",
        ),
        (
            [NETWORK.format(name="a") + "spec: {subnet: 10.244.0.0/24}\n"],
            "overlapping-cidr",
            "of the lab",
        ),
        ([container("a", "address: 10.0.0.1")], "outside-cidr", "is not one of"),
        (
            [container("a", "address: 172.17.0.2"), container("b", "address: 172.17.0.2")],
            "duplicate-address",
            "already another container's",
        ),
        (
            [
                container("a", "ports: [{port: 80, hostPort: 80}]"),
                container("b", "network: host, ports: [{port: 80}]"),
            ],
            "port-taken",
            "TCP 80 on node node1 is already Container a's",
        ),
        ([container("a", "networks: x")], "unknown-field", "networks"),
    ],
)
def test_what_is_wrong_is_told(tmp_path: Path, documents: list[str], code: str, said: str) -> None:
    with pytest.raises(NetlabError) as caught:
        loaded(tmp_path, *documents)
    (problem,) = caught.value.problems
    assert problem.code == code
    assert said in problem.message


# As Docker 20 to 27 has them, in the order of iptables-save.
NAT = """-A DOCKER -i {br} -j RETURN
-A DOCKER -i docker0 -j RETURN
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 172.17.0.2:80
-A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A POSTROUTING -s 172.17.0.2/32 -d 172.17.0.2/32 -p tcp -m tcp --dport 80 -j MASQUERADE
-A POSTROUTING -s 172.18.0.0/16 ! -o {br} -j MASQUERADE
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
"""
FILTER = """-A DOCKER -d 172.17.0.2/32 ! -i docker0 -o docker0 -p tcp -m tcp --dport 80 -j ACCEPT
-A DOCKER-ISOLATION-STAGE-1 -i {br} ! -o {br} -j DOCKER-ISOLATION-STAGE-2
-A DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j DOCKER-ISOLATION-STAGE-2
-A DOCKER-ISOLATION-STAGE-1 -j RETURN
-A DOCKER-ISOLATION-STAGE-2 -j RETURN
-A DOCKER-ISOLATION-STAGE-2 -o {br} -j DROP
-A DOCKER-ISOLATION-STAGE-2 -o docker0 -j DROP
-A DOCKER-USER -j RETURN
-A FORWARD -i {br} ! -o {br} -j ACCEPT
-A FORWARD -i {br} -o {br} -j ACCEPT
-A FORWARD -i docker0 ! -o docker0 -j ACCEPT
-A FORWARD -i docker0 -o docker0 -j ACCEPT
-A FORWARD -j DOCKER-ISOLATION-STAGE-1
-A FORWARD -j DOCKER-USER
-A FORWARD -o {br} -j DOCKER
-A FORWARD -o {br} -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -o docker0 -j DOCKER
-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
"""


def test_the_rules_are_dockers() -> None:
    lab = load("docker-modes").lab
    chains = own_chains.of_node(lab, lab.nodes[0])
    assert chains is not None
    tables = {part.split("\n", 1)[0]: part for part in chains.ipv4.replace("-I ", "-A ").split("*")}
    bridge = lab.docker_networks[1].bridge
    for name, wanted in (("nat", NAT), ("filter", FILTER)):
        lines = [line for line in tables[name].splitlines() if line.startswith("-A ")]
        assert sorted(lines) == sorted(wanted.format(br=bridge).splitlines())
    assert own_chains.of_node(lab, lab.nodes[1]) is None


def test_it_is_predicted() -> None:
    lab = load("docker-modes").lab

    def said(source: str, to: str) -> tuple[str, str]:
        found = foretell(lab, Request(source, to)).prediction
        return found.disposition, found.seen_source.ip if found.seen_source else ""

    assert said("pod2", "node/k8s-slave1:8080") == ("delivered", "10.244.2.2")
    assert said("container/tool", "pod1") == ("delivered", "10.244.1.1")
    assert said("container/tool", "container/web") == ("delivered", "172.17.0.3")
    assert said("container/web", "container/database") == ("dropped", "")
    assert said("container/batch", "pod1")[0] == "dropped"


# --- on the kernel -------------------------------------------------------------------------------


def _requests() -> list[Request]:
    sources = [*(f"container/{name}" for name in ("tool", "shop")), "pod1", "pod2"]
    targets = [f"container/{name}" for name in ("web", "database")]
    found = [
        Request(source, target)
        for source in (*sources, "node/k8s-slave1")
        for target in (*targets, "node/k8s-slave1:8080")
    ]
    more = ("container/tool", "container/shop", "container/batch", "container/monitor")
    found += [Request(source, "pod1") for source in more]
    found += [Request("pod2", "container/monitor"), Request("container/web", "container/tool:80")]
    return [*found, Request("node/k8s-slave1", "127.0.0.1:8080")]


@pytest.mark.kernel
def test_every_way_is_as_predicted(up: Callable[[Lab], lifecycle.Outcome]) -> None:
    lab = load("docker-modes", name=fresh_name()).lab
    outcome = up(lab)
    assert (outcome.unserved, outcome.unready) == ((), ())
    assert differing(lab, _requests()) == []
    assert up(lab).changes == ()


@pytest.mark.kernel
def test_in_a_network_of_its_users_one_is_found_by_name(
    up: Callable[[Lab], lifecycle.Outcome],
) -> None:
    lab = load("docker-modes", name=fresh_name()).lab
    up(lab)

    def said(source: str, *command: str) -> subprocess.CompletedProcess[str]:
        netlab = [NETLAB, "exec", "--lab", lab.name, f"container/{source}", "--"]
        return subprocess.run([*netlab, *command], capture_output=True, text=True)

    assert said("shop", "curl", "-s", "http://database:3306/hostname").stdout == "database\n"
    assert said("tool", "curl", "-s", "http://database:3306/hostname").returncode != 0
    assert "nameserver 127.0.0.11" in said("shop", "cat", "/etc/resolv.conf").stdout
    assert "127.0.0.11" not in said("tool", "cat", "/etc/resolv.conf").stdout
    assert "eth0" not in said("batch", "ip", "link").stdout
    assert "cbr0" in said("monitor", "ip", "link").stdout


@pytest.mark.kernel
def test_docker_goes_and_leaves_nothing(up: Callable[[Lab], lifecycle.Outcome]) -> None:
    lab = load("docker-modes", name=fresh_name()).lab
    up(lab)
    bare = replace(lab, docker_networks=(), docker_containers=())
    assert up(bare).changes
    inside = ["ip", "netns", "exec", f"{lab.name}:k8s-slave1"]
    for command in (["iptables-save"], ["ip", "link"]):
        done = subprocess.run([*inside, *command], check=True, capture_output=True, text=True)
        assert "docker" not in done.stdout.lower()
    assert up(bare).changes == ()
