"""`netlab verify`: who is asked, in which rounds, what is expected, and what a broken lab gives."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from labs import dual_stack_lab, small_lab
from netlab.kernel import namespaces
from netlab.lab import lifecycle
from netlab.report import verify as report
from netlab.topology.model import Expectation, Lab
from netlab.verify import rounds
from netlab.verify.expected import Expected
from netlab.verify.model import Question
from netlab.verify.questions import Ends, demands, outside, services
from netlab.verify.run import verify

NETLAB = Path(sys.executable).parent / "netlab"


def asked(lab: Lab) -> list[Question]:
    ends = Ends(lab)
    return [*demands(lab, ends), *outside(lab, ends), *services(lab, ends, [])]


def pairs(lab: Lab, demand: str) -> set[tuple[str, str]]:
    return {(str(q.source), str(q.target)) for q in asked(lab) if q.demand == demand}


def test_every_pair_of_every_demand_is_asked() -> None:
    lab = small_lab("l")
    pods = {f"pod/demo/p{i}" for i in range(4)}
    nodes = {"node/n1", "node/n2"}
    assert pairs(lab, "pod-to-pod") == {(a, b) for a in pods for b in pods if a != b}
    assert pairs(lab, "node-to-pod") == {(a, b) for a in nodes for b in pods}
    assert pairs(lab, "own-address") == {(a, b) for a in pods for b in nodes}
    clients = pods | nodes
    served = {"svc/demo/web", "svc/demo/empty"}
    assert pairs(lab, "service") == {(a, b) for a in clients for b in served}


def test_each_family_is_asked() -> None:
    lab = dual_stack_lab(small_lab("l"))
    counted = [q.family for q in asked(lab) if q.demand == "pod-to-pod"]
    assert counted.count(4) == counted.count(6) == 12


def test_pods_on_their_nodes_network_are_no_pods_of_the_model() -> None:
    lab = small_lab("l")
    first = replace(lab.pods[0], host_network=True, address=lab.nodes[0].address)
    lab = replace(lab, pods=(first, *lab.pods[1:]))
    assert not any("pod/demo/p0" in pair for pair in pairs(lab, "pod-to-pod"))


def test_rounds_ask_each_question_once_and_keep_within_their_room() -> None:
    lab = small_lab("l", pods=40)
    questions = asked(lab)
    parts = list(rounds.rounds(questions, {4: 150, 6: 150}))
    assert [question for part in parts for question in part] == questions
    assert len(parts) > 1
    for part in parts:
        entries = {entry for question in part for entry in rounds._entries(question)}
        assert len(entries) <= 150


def test_what_a_topology_breaks_on_purpose_comes_first_and_the_last_word_counts() -> None:
    lab = replace(
        small_lab("l"),
        expected=(
            Expectation(source="pod/*", destination="pod/*", outcome="unreachable"),
            Expectation(source="pod/demo/p0", destination="pod/demo/p?", outcome="translated"),
        ),
    )
    expected = Expected(lab)
    due = {(q.source.name, q.target.name): expected.of(q)[0] for q in asked(lab)}
    assert due["demo/p1", "demo/p2"] == "unreachable"
    assert due["demo/p0", "demo/p2"] == "translated"
    assert due["n1", "demo/p2"] == "reached"


def test_a_service_without_endpoints_is_not_to_be_reached() -> None:
    lab = small_lab("l")
    expected = Expected(lab)
    due = {q.target.name: expected.of(q) for q in asked(lab) if q.demand == "service"}
    assert due["demo/web"] == ("reached", "")
    assert due["demo/empty"][0] == "unreachable"
    assert "no-endpoints" in due["demo/empty"][1]


@pytest.mark.kernel
@pytest.mark.parametrize("overlay", ["vxlan", "host-gw"])
def test_a_healthy_lab_is_as_declared(up: Callable[[Lab], object], overlay: str) -> None:
    lab = dual_stack_lab(small_lab(overlay=overlay))
    up(lab)
    found = verify(lab)
    assert found.as_declared
    assert {part.demand: (part.pairs, part.reached) for part in found.demands} == {
        "pod-to-pod": (24, 24),
        "node-to-pod": (16, 16),
        "own-address": (16, 16),
        "outside": (0, 0),
        # Service empty has no endpoint: its one port at two addresses is refused to all six.
        "service": (36, 24),
    }


@pytest.mark.kernel
def test_a_broken_lab_is_told_pair_by_pair(up: Callable[[Lab], object]) -> None:
    """Where a route is gone, and where somebody translates."""
    lab = small_lab()
    up(lab)
    node = f"{lab.name}:n1"
    subprocess.run(["ip", "-n", node, "route", "del", "10.244.2.0/24"], check=True)
    found = verify(lab)
    assert not found.as_declared
    broken = {(r.source, r.target) for r in found.results if r.demand == "pod-to-pod"} & {
        (r.source, r.target) for r in found.results if not r.as_declared
    }
    here, there = ("pod/demo/p0", "pod/demo/p2"), ("pod/demo/p1", "pod/demo/p3")
    assert broken == {(a, b) for a in here for b in there} | {(b, a) for a in here for b in there}

    lifecycle.up(lab)
    rule = "add rule ip t c ip saddr 10.244.1.2 ip daddr 10.244.2.2 masquerade"
    chain = "add chain ip t c { type nat hook postrouting priority 90; }"
    with namespaces.entered(node):
        subprocess.run(["nft", f"add table ip t; {chain}; {rule}"], check=True)
    found = verify(lab, ("pod-to-pod",))
    (wrong,) = [each for each in found.results if not each.as_declared]
    assert (wrong.source, wrong.target, wrong.outcome) == (
        "pod/demo/p0",
        "pod/demo/p1",
        "translated",
    )
    assert wrong.own.startswith("10.244.1.2:")
    assert not wrong.seen.startswith("10.244.1.2:")


@pytest.mark.kernel
def test_a_lab_of_more_neighbours_than_the_machine_has_room_for_is_healthy(
    up: Callable[[Lab], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In rounds between which neighbours are forgotten: here as if there were little room."""
    monkeypatch.setattr(rounds, "_SHARE", 0.0)
    lab = small_lab(pods=30)
    up(lab)
    found = verify(lab, ("pod-to-pod",))
    assert found.as_declared
    assert found.rounds > 1
    assert found.demands[0].reached == 30 * 29


@pytest.mark.kernel
def test_the_command_says_it_in_three_forms_and_by_its_exit_code(
    up: Callable[[Lab], object], tmp_path: Path
) -> None:
    lab = small_lab()
    up(lab)
    file = tmp_path / "junit.xml"
    command = [NETLAB, "verify", "--lab", lab.name]
    done = subprocess.run([*command, "--junit", file, "-o", "json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["schema"], told["as_declared"]) == ("netlab.verify/v1", True)
    assert {(r["from"], r["to"]) for r in told["results"]} == {
        (str(q.source), str(q.target)) for q in asked(lab)
    }
    suites = xml.etree.ElementTree.parse(file).getroot()
    assert len(suites.findall(".//testcase")) == len(told["results"])
    assert not suites.findall(".//failure")

    subprocess.run(["ip", "-n", f"{lab.name}:n2", "link", "set", "flannel.1", "down"], check=True)
    done = subprocess.run([*command, "--junit", file], capture_output=True, text=True)
    assert done.returncode == 1
    assert "✗!" in done.stdout
    suites = xml.etree.ElementTree.parse(file).getroot()
    failures = suites.findall(".//failure")
    assert len(failures) == int(suites.attrib["failures"]) > 0
    assert "should have been reached" in failures[0].attrib["message"]


@pytest.mark.kernel
def test_a_namespace_that_is_gone_is_said(up: Callable[[Lab], object]) -> None:
    lab = small_lab()
    up(lab)
    subprocess.run(["ip", "netns", "del", f"{lab.name}:demo:p0"], check=True)
    command = [NETLAB, "verify", "--lab", lab.name]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, "")
    assert "namespace-missing" in done.stderr


def test_wide_labs_are_told_by_those_who_do_not_reach_all() -> None:
    from netlab.verify.model import Part, Result, Verified

    names = [f"pod/demo/p{i}" for i in range(60)]
    results = [
        Result(
            demand="pod-to-pod",
            source=a,
            target=b,
            address="10.244.1.2",
            port=80,
            protocol="TCP",
            outcome="unreachable" if a == names[0] else "reached",
            expected="reached",
            as_declared=a != names[0],
            why_expected="",
            own="",
            seen="",
            answered_by="",
            detail="no answer came",
        )
        for a in names
        for b in names
        if a != b
    ]
    part = Part(
        demand="pod-to-pod",
        title="pods reach pods without NAT",
        pairs=60 * 59,
        reached=59 * 59,
        translated=0,
        unreachable=59,
        not_as_declared=59,
    )
    found = Verified(
        lab="l",
        as_declared=False,
        demands=[part],
        left_out=[],
        rounds=1,
        elapsed_s=1.0,
        results=results,
    )
    lines = list(report.terminal(found))
    assert "  demo/p0: 0 of 59" in lines
    assert not any("demo/p1: " in line for line in lines)
    assert lines[-1].startswith("✗ l is not as declared: 3540 pairs")
    assert any("39 more" in line for line in lines)
