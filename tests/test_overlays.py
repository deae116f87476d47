"""Overlays: what each builds, what of them is refused, and that every pod reaches every other."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest
from _pytest.mark.structures import ParameterSet
from click.testing import CliRunner
from msgspec.structs import replace

from labs import fresh_name, small_lab
from netlab.cli.main import netlab
from netlab.datapath.build import build
from netlab.datapath.describe import shell
from netlab.datapath.overlays import TYPES, tunnel, vni
from netlab.datapath.overlays.bgp import blocks
from netlab.datapath.plan import plan
from netlab.datapath.podnet import outer_link
from netlab.datapath.state import LabState, namespace_name
from netlab.doctor import neighbour_warning, overlay_problems
from netlab.kernel import features
from netlab.lab import lifecycle
from netlab.problems import NetlabError
from netlab.topology.load import load, shipped
from netlab.topology.model import Lab, ProxyMode
from netlab.topology.overlays import KINDS
from netlab.trace.aim import Request
from netlab.trace.run import trace
from predictions import TIMEOUT_S, clients, differing, service_addresses
from test_lifecycle import host_snapshot

# Every shipped topology and the overlay that it is there for.
SHOWN = {
    "one-node": "vxlan",
    "two-node-vxlan": "vxlan",
    "dual-stack": "vxlan",
    "two-node-host-gw": "host-gw",
    "two-node-ipip": "ipip",
    "three-node-bgp": "bgp",
    "three-node-mesh": "mesh",
    "vxlan-multicast": "vxlan-multicast",
    "eni": "eni",
}


def _marked(case: str | tuple[str, str], overlay: str) -> ParameterSet:
    """A case that runs in a virtual machine where this kernel lacks what its overlay needs."""
    marks = (pytest.mark.vm("ipip"),) if overlay == "ipip" else ()
    values = (case,) if isinstance(case, str) else case
    return pytest.param(*values, marks=marks)


def overlay_lab(overlay: str, nodes: int = 3, pods: int = 6) -> Lab:
    lab = small_lab(nodes=nodes, pods=pods, overlay=overlay)
    if overlay != "eni":
        return lab
    cidrs = replace(lab.underlay, cidr="10.0.0.0/8", gateway="10.0.0.1")
    of_nodes = tuple(
        replace(node, address=f"10.0.0.{number + 11}") for number, node in enumerate(lab.nodes)
    )
    return replace(lab, underlay=cidrs, nodes=of_nodes)


# --- what is built -------------------------------------------------------------------------------


def test_every_type_that_a_file_may_name_is_built_and_shown() -> None:
    assert TYPES.keys() == KINDS.keys() == set(SHOWN.values())
    for name, overlay in SHOWN.items():
        assert load(name).lab.overlay.type == overlay
    assert SHOWN.keys() <= shipped().keys()


@pytest.mark.parametrize("overlay", KINDS)
def test_tables_grow_with_the_nodes_and_not_with_the_pods(overlay: str) -> None:
    """FDB, neighbour entries, tunnels and routes by way of other nodes."""

    def entries(pods: int) -> list[tuple[int, int, int, int]]:
        found = []
        for node in build(overlay_lab(overlay, 4, pods), rules=False).nodes:
            there = node.namespace
            own = {link.name for link in there.links if link.peer}
            to_others = [each for each in there.routes if each.via or each.link not in own]
            tunnels = [link for link in there.links if link.below]
            found.append((len(there.fdb), len(there.neighbours), len(to_others), len(tunnels)))
        return found

    assert entries(8) == entries(120)


def test_each_pair_of_a_mesh_has_a_vni_of_its_own_that_both_ends_speak() -> None:
    lab = overlay_lab("mesh", 5)
    pairs = list(combinations(lab.nodes, 2))
    assert sorted(vni(lab, *pair) for pair in pairs) == list(range(1, 11))
    assert all(vni(lab, one, other) == vni(lab, other, one) for one, other in pairs)
    fewer = overlay_lab("mesh", 4)
    for one, other in combinations(fewer.nodes, 2):
        assert vni(fewer, one, other) == vni(lab, one, other)
        assert tunnel(fewer, one, other, 4) == tunnel(lab, one, other, 4)


def test_a_node_announces_the_blocks_that_its_pods_are_in() -> None:
    lab = overlay_lab("bgp", 2, 0)
    pod = small_lab().pods[0]
    addresses = ("10.244.1.2", "10.244.1.64", "10.244.1.200", "10.9.9.9")
    pods = tuple(replace(pod, name=each, address=each) for each in addresses)
    announced = blocks(lab, lab.nodes[0], {"n1": pods})
    assert announced == ("10.244.1.0/26", "10.244.1.64/26", "10.244.1.192/26", "10.9.9.9/32")
    assert blocks(lab, lab.nodes[1], {}) == ("10.244.2.0/26",)


@pytest.mark.parametrize("overlay", KINDS)
def test_shell_says_everything_that_is_built(overlay: str) -> None:
    state: LabState = build(overlay_lab(overlay), rules=False)
    lines = "\n".join(shell(plan(state, {}), state.namespaces()))
    words = {
        "vxlan": "type vxlan id 1 local 172.21.32.11 dev eth0 dstport 8472 nolearning",
        "vxlan-multicast": "dstport 8472 learning group 239.1.1.1",
        "host-gw": "route replace 10.244.2.0/24 via 172.21.32.12 dev eth0",
        "ipip": "type ipip local 172.21.32.11 dev eth0",
        "bgp": "/proxy_arp=1",
        "mesh": "id 3 local 172.21.32.12 dev eth0 dstport 8472 nolearning remote 172.21.32.13",
        "eni": "rule add from 10.244.1.2/32 lookup 2 priority 1536",
    }
    assert words[overlay] in lines


# --- what is refused -----------------------------------------------------------------------------

LAB = "apiVersion: netlab/v1\nkind: Lab\nmetadata: {name: a}\n"
NODE = "---\napiVersion: v1\nkind: Node\nmetadata: {name: n%d}\nspec: {podCIDR: %s}\n"
BAD = {
    "unknown type": (
        "spec: {overlay: {type: vxlam}}\n",
        ("unsupported", 4, 24),
        'did you mean "vxlan"?',
    ),
    "VNI too large": (
        "spec: {overlay: {vni: 16777216}}\n",
        ("bad-value", 4, 23),
        "16777216",
    ),
    "VNIs of a mesh": (
        "spec: {overlay: {type: mesh, vni: 16777214}}\n"
        + "".join(NODE % (n, f"10.244.{n}.0/24") for n in (1, 2, 3)),
        ("vni-out-of-range", 4, 35),
        "from 16777214 to 16777216",
    ),
    "no group": (
        "spec: {overlay: {type: vxlan-multicast, group: 10.0.0.1}}\n",
        ("bad-group", 4, 48),
        "no IPv4 multicast address",
    ),
    "family": (
        "spec: {podCIDR: 'fd00:10:244::/48', overlay: {type: bgp}}\n",
        ("overlay-family", 4, 53),
        "carries no IPv6",
    ),
    "MTU for IPv6": (
        "spec: {podCIDR: 'fd00:10:244::/48', underlay: {mtu: 1349}}\n",
        ("mtu-too-small", 4, 53),
        "leaves 1279 bytes to pods, and IPv6 needs 1280; take 1350 or more",
    ),
    "MTU for IPv4": (
        "spec: {overlay: {type: ipip}, underlay: {mtu: 595}}\n",
        ("mtu-too-small", 4, 47),
        "leaves 575 bytes",
    ),
    "overlapping pod CIDRs": (
        "spec: {overlay: {type: bgp}}\n"
        + NODE % (1, "10.244.1.0/24")
        + NODE % (2, "10.244.1.128/25"),
        ("overlapping-cidr", 14, 17),
        "10.244.1.128/25 of Node n2 overlaps",
    ),
    "a part of a block": (
        "spec: {overlay: {type: bgp}}\n" + NODE % (1, "10.244.1.0/27"),
        ("unroutable-block", 9, 17),
        "cannot be routed",
    ),
    "a block outside the network": (
        "spec: {overlay: {type: eni}}\n" + NODE % (1, "10.244.1.0/24"),
        ("unroutable-block", 9, 17),
        "outside the nodes' network 172.21.32.0/24",
    ),
}


@pytest.mark.parametrize("mistake", BAD)
def test_what_cannot_work_is_told_with_its_place(mistake: str, tmp_path: Path) -> None:
    text, expected, words = BAD[mistake]
    file = tmp_path / "a.yaml"
    file.write_text(LAB + text)
    with pytest.raises(NetlabError) as caught:
        load(file)
    problem = caught.value.problems[0]
    assert problem.place is not None
    assert (problem.code, problem.place.line, problem.place.column) == expected
    assert words in f"{problem.message}; {problem.hint}"


def test_a_program_that_is_not_installed_is_named_with_its_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("netlab.doctor._which", lambda name: None)
    (problem,) = overlay_problems(small_lab("l", overlay="bgp"))
    assert problem.code == "missing-program"
    assert "needs bird" in problem.message
    assert "bird2" in str(problem.hint)
    assert list(overlay_problems(small_lab("l"))) == []


def test_a_lab_that_may_need_more_neighbours_than_there_can_be_is_warned_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("netlab.doctor._NEIGHBOUR_LIMIT", "/nowhere")
    assert neighbour_warning(small_lab("l", pods=510)) is None
    warning = neighbour_warning(small_lab("l", pods=511))
    assert warning is not None
    assert warning.warning
    assert "at least 1026 neighbour entries" in warning.message
    assert "room for 1024" in warning.message


# --- on the kernel -------------------------------------------------------------------------------


@pytest.mark.kernel
def test_a_kernel_without_a_module_says_so_before_anything_is_built() -> None:
    if features.attempt(["ipip"])["ipip"].ok:
        pytest.skip("this kernel has ipip")
    name = fresh_name()
    done = CliRunner().invoke(netlab, ["up", "two-node-ipip", "--lab", name])
    assert isinstance(done.exception, NetlabError)
    assert done.exception.exit_code == 3
    assert "kernel module ipip" in done.exception.problems[0].message
    assert name not in lifecycle.running()


@pytest.mark.kernel
@pytest.mark.parametrize("topology", [_marked(each, SHOWN[each]) for each in SHOWN])
def test_a_shipped_topology_comes_up_carries_everything_and_goes(topology: str) -> None:
    """All pairs of pods there and back, as predicted; a second `up`; the host as it was."""
    name = fresh_name()
    lab = load(topology, name=name).lab
    if lab.overlay.type == "ipip":
        features.attempt(["ipip"])  # the module gives every namespace its tunl0, the host's too
    before = host_snapshot(name)
    try:
        assert lifecycle.up(lab).unready == ()
        again = lifecycle.up(lab)
        assert (again.changes, again.unserved, again.unready) == ((), (), ())
        assert differing(lab, _everything(lab)) == []
        first, *_, last = lab.pods
        found = trace(lab, Request(first.key, last.key, timeout_s=TIMEOUT_S))
        assert found.disposition == "delivered"
        assert str(found.seen_source).startswith(f"{first.address}:"), "no NAT between pods"
    finally:
        lifecycle.down(name)
    assert host_snapshot(name) == before


def _everything(lab: Lab) -> list[Request]:
    requests = []
    for source in clients(lab):
        ends = [pod.key for pod in lab.pods]
        ends += [] if source.startswith("node/") else [f"node/{node.name}" for node in lab.nodes]
        requests += [Request(source, end, timeout_s=TIMEOUT_S) for end in ends if end != source]
    return requests


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("overlay", "mode"),
    [
        *(
            _marked((overlay, "iptables"), overlay)
            for overlay in KINDS
            if overlay not in ("vxlan", "host-gw")
        ),
        ("bgp", "nftables"),
        ("bgp", "nftables-flat"),
        ("eni", "nftables"),
    ],
)
def test_services_work_over_each_overlay(
    up: Callable[[Lab], object], overlay: str, mode: ProxyMode
) -> None:
    lab = overlay_lab(overlay)
    lab = replace(lab, service_proxy=replace(lab.service_proxy, mode=mode))
    up(lab)
    requests = [
        Request(source, end, protocol=protocol, timeout_s=TIMEOUT_S)  # type: ignore[arg-type]
        for source in ("p0", "p1", "node/n1")
        for end, protocol in service_addresses(lab)
        for _ in range(3)
    ]
    assert differing(lab, requests) == []


DAMAGE = {
    "bgp": ["link del $pod", "route flush proto boot"],
    "eni": ["link del $pod", "rule del priority 1536", "route flush table 2"],
    "mesh": ["link del mesh2", "route del 10.244.3.0/24"],
    "vxlan-multicast": ["link del vxlan.1"],
}


@pytest.mark.kernel
@pytest.mark.parametrize("overlay", DAMAGE)
def test_what_is_damaged_is_repaired(up: Callable[[Lab], lifecycle.Outcome], overlay: str) -> None:
    lab = overlay_lab(overlay)
    up(lab)
    pod = outer_link(lab.pods[0])
    for command in DAMAGE[overlay]:
        words = command.replace("$pod", pod).split()
        subprocess.run(["ip", "-n", namespace_name(lab.name, "n1"), *words], check=True)
    repaired = up(lab)
    assert repaired.changes
    assert repaired.unready == ()
    assert up(lab).changes == ()
    pairs = [("p0", "p1"), ("p0", "p2"), ("p0", "p3"), ("p1", "p0")]
    assert differing(lab, [Request(*pair, timeout_s=TIMEOUT_S) for pair in pairs]) == []
