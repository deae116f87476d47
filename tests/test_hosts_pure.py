"""Nodes on machines: the hosts file, what of a lab a machine has, and clocks that differ."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from netlab.datapath.build import build
from netlab.hosts import gateways, hosts_file
from netlab.hosts.addresses import on_machines
from netlab.hosts.clocks import offsets
from netlab.hosts.part import Part, check, part_of
from netlab.problems import NetlabError
from netlab.topology.load import load
from netlab.trace.model_steps import Packet
from netlab.trace.place import Place
from netlab.trace.witnesses.packets import Sighting
from tests.labs import small_lab

GOOD = """
k8s-slave1: {gateway: "ssh=root@192.0.2.11", underlay: eth1}
k8s-slave2: {gateway: "ssh=root@192.0.2.9"}
"""


def _problems(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "hosts.yaml"
    path.write_text(text)
    with pytest.raises(NetlabError) as caught:
        hosts_file.read(str(path), load("two-node-vxlan").lab)
    assert caught.value.exit_code == 2
    return [f"{each.code}: {each.message}" for each in caught.value.problems]


def test_a_hosts_file_maps_nodes_to_machines(tmp_path: Path) -> None:
    path = tmp_path / "hosts.yaml"
    path.write_text(GOOD)
    machines = hosts_file.read(str(path), load("two-node-vxlan").lab)
    assert machines["k8s-slave1"].underlay == "eth1"
    assert machines["k8s-slave2"].way == "ssh"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[1", "bad-hosts: it is no YAML"),
        ("", "bad-hosts: it maps no node"),
        (GOOD + 'k8s-slave9: {gateway: "ssh=x"}', 'unknown-node: node "k8s-slave9" is not in'),
        (GOOD.replace("k8s-slave2", "k8s-slave1"), 'node-without-host: node "k8s-slave2" of lab'),
        (GOOD.replace("ssh=root@192.0.2.9", "telnet=x"), 'bad-gateway: k8s-slave2: "telnet=x"'),
        (GOOD.replace(".9", ".11"), "two-on-one-host: k8s-slave2 and k8s-slave1 are on one"),
        (GOOD.replace("underlay", "underlays"), "bad-hosts: k8s-slave1: Object contains unknown"),
        (GOOD.replace("gateway", "way"), "bad-hosts: k8s-slave1: Object"),
    ],
)
def test_what_is_wrong_in_a_hosts_file_is_named(tmp_path: Path, text: str, expected: str) -> None:
    assert any(each.startswith(expected) for each in _problems(tmp_path, text))


def test_settings_of_vagrant_are_read() -> None:
    text = """Host k8s-slave1
  HostName 192.168.121.5
  User vagrant
  Port 22
  IdentityFile "/x/private key"
  IdentitiesOnly yes

Host k8s-slave2
  HostName 192.168.121.6
"""
    hosts = hosts_file.ssh_hosts(text)
    assert hosts["k8s-slave1"]["IdentityFile"] == "/x/private key"
    assert list(hosts) == ["k8s-slave1", "k8s-slave2"]


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ("root@h: Permission denied (publickey,password).", "wrong-key"),
        ("/bin/sh: 1: /opt/python: Permission denied", "no-python"),
    ],
)
def test_a_key_that_is_refused_is_not_a_program_that_is(said: str, code: str) -> None:
    assert gateways._reason(said, timed_out=False)[0] == code


def test_a_machine_has_its_node_but_for_what_it_has_itself() -> None:
    lab = load("two-node-vxlan").lab
    check(lab)
    state = part_of(build(lab, only="k8s-slave2"), Part(node="k8s-slave2", interface="ens3"))
    (node,) = state.nodes
    names = [link.name for link in node.namespace.links]
    assert names[0] == "flannel.1"
    assert "eth0" not in names
    assert node.namespace.links[0].vxlan is not None
    assert node.namespace.links[0].vxlan.device == "ens3"
    assert {route.link for route in node.namespace.routes} == {"flannel.1"}
    paths = {sysctl.path for sysctl in node.namespace.sysctls}
    assert "net/ipv6/conf/cbr0/disable_ipv6" in paths
    assert "net/ipv6/conf/all/disable_ipv6" not in paths
    assert [each.name for each in state.namespaces()] == [
        "two-node-vxlan:k8s-slave2",
        "two-node-vxlan:demo:myblog-5c97d79cdb-j485f",
    ]
    assert {server.namespace for server in state.servers} == {
        "two-node-vxlan:demo:myblog-5c97d79cdb-j485f"
    }


def test_labs_that_cannot_live_on_machines_are_refused() -> None:
    lab = small_lab(overlay="host-gw")
    with pytest.raises(NetlabError, match="not vxlan"):
        check(lab)


def test_the_addresses_of_machines_are_used_everywhere() -> None:
    lab = load("two-node-vxlan").lab
    found = {"k8s-slave1": "192.0.2.7/24", "k8s-slave2": "192.0.2.8/24"}
    moved, said = on_machines(lab, found)
    assert [node.address for node in moved.nodes] == ["192.0.2.7", "192.0.2.8"]
    assert moved.underlay.cidr == "192.0.2.0/24"
    assert said[0] == "k8s-slave1 is 192.0.2.7 here, and not 172.21.32.11 of the topology"
    entries = build(moved, only="k8s-slave1").nodes[0].namespace.fdb
    assert [entry.destination for entry in entries] == ["192.0.2.8"]


def test_addresses_as_they_were_declared_change_nothing() -> None:
    lab = load("two-node-vxlan").lab
    found = {node.name: f"{node.address}/24" for node in lab.nodes}
    assert on_machines(lab, found) == (lab, [])


def _sighting(node: str, direction: str, t_ns: int, ttl: int, role: str) -> Sighting:
    packet = Packet(src="10.0.0.1", dst="10.0.0.2", protocol="tcp", ttl=ttl, length=60)
    place = Place(f"lab:{node}", "node", node, node)
    return Sighting(place, "eth0", direction, t_ns, packet, role)  # type: ignore[arg-type]


@given(
    clocks=st.lists(st.integers(-(10**15), 10**15), min_size=4, max_size=4),
    delays=st.lists(st.integers(1, 10**9), min_size=12, max_size=12),
    answered=st.booleans(),
)
def test_causality_holds_whatever_the_clocks_say(
    clocks: list[int], delays: list[int], answered: bool
) -> None:
    """A packet goes by four machines and back; each stamps it by a clock of its own."""
    way = ["a", "b", "c", "d"]
    steps = [(node, "probe") for node in way]
    steps += [(node, "answer") for node in reversed(way)] if answered else []
    seen: dict[str, list[Sighting]] = {node: [] for node in way}
    true: list[Sighting] = []
    now = 0
    for number, (node, role) in enumerate(steps):
        clock = clocks[way.index(node)]
        for direction in ("in", "out"):
            # A frame is the same packet where it leaves and where it comes in.
            ttl = 64 - number - (direction == "out")
            now += delays[(number + (direction == "out")) % len(delays)]
            sighting = _sighting(node, direction, now + clock, ttl, role)
            seen[node].append(sighting)
            true.append(sighting)
    ahead = offsets(seen, "a")
    assert set(ahead) == set(way)
    node_of = {id(each): each.place.node for each in true}
    joined = sorted(true, key=lambda each: each.t_ns - ahead[str(node_of[id(each)])])
    stamps = [each.t_ns - ahead[str(node_of[id(each)])] for each in true]
    assert stamps == sorted(stamps), joined


def test_a_machine_that_saw_nothing_in_common_is_left_out() -> None:
    seen = {"a": [_sighting("a", "out", 5, 64, "probe")], "b": []}
    assert offsets(seen, "a") == {"a": 0}
    assert offsets({"a": [], "b": [replace(seen["a"][0], t_ns=9)]}, "a") == {"a": 0}
