"""Comparisons on the kernel: twins of a running lab, which come and go and leave it alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from netlab.compare import run as comparing
from netlab.compare import twins
from netlab.compare.model import Comparison, Measured, Variant
from netlab.compare.run import compare
from netlab.kernel import namespaces, nft_contents
from netlab.lab import lifecycle, record
from netlab.lab.named import only_lab
from netlab.problems import Exit, NetlabError, Problem
from netlab.topology.model import Fault, Lab, Service, ServicePort
from netlab.trace.aim import Request, aim
from trace_labs import lab, namespace, trace_lab

pytestmark = pytest.mark.kernel

__all__ = ["lab"]

NETLAB = str(Path(sys.executable).parent / "netlab")
MODES = (Variant("iptables"), Variant("nftables"), Variant("nftables-flat"))


def measured(found: Comparison) -> dict[str, Measured]:
    return {each.name: each.measured for each in found.columns if each.measured}


def twins_of(name: str) -> list[str]:
    return [each for each in lifecycle.running() if each.startswith(f"{name[:40]}-compare-")]


def test_one_packet_in_three_modes(lab: Lab) -> None:
    before = record.read(lab.name)
    found = compare(lab, Request("p0", "svc/remote"), MODES, count=5)
    assert found.agree
    by_mode = measured(found)
    assert list(by_mode) == ["iptables", "nftables", "nftables-flat"]
    traces = [each.trace for each in by_mode.values()]
    assert {trace.disposition for trace in traces} == {"delivered"}
    assert {str(trace.delivered_to) for trace in traces} == {"pod demo/p1 on n2 port 8002"}
    assert len({str(trace.probe.source) for trace in traces}) == 1  # the same port, too
    assert {len(trace.translations) for trace in traces} == {1}
    for each in by_mode.values():
        assert each.cost
        assert len(each.cost.samples_ns) == 5
        assert all(0 < sample < 1e9 for sample in each.cost.samples_ns)
        assert each.there
        assert each.there.compared > each.there.matched > 0
        assert each.load_ms > 0
    assert by_mode["iptables"].ruleset
    assert by_mode["iptables"].ruleset.sets == 0
    assert by_mode["nftables"].ruleset
    assert by_mode["nftables"].ruleset.sets > 0
    assert twins_of(lab.name) == []
    assert record.read(lab.name) == before
    assert lifecycle.differences(lab) == []


def test_the_same_endpoint_is_sought(lab: Lab) -> None:
    service = next(each for each in lab.services if each.name == "remote")
    entry = next(each for each in lab.endpoints if each.service == "remote")
    other = next(each for each in lab.endpoints if each.service == "local")
    both = replace(entry, endpoints=(*entry.endpoints, *other.endpoints))
    changed = replace(lab, services=(service,), endpoints=(both,))
    found = compare(changed, Request("p0", "svc/remote"), (*MODES, Variant("iptables")), count=1)
    # Missed once in a thousand times; then it is said, and no difference.
    addresses = {
        each.trace.delivered_to and each.trace.delivered_to.ip for each in measured(found).values()
    }
    assert found.agree
    assert (len(addresses) == 1) is not any("not to" in each for each in found.differences)


def with_more_services(lab: Lab, count: int) -> Lab:
    """Services whose rules stand before those of the others, as names sort."""
    more = tuple(
        Service(
            namespace="aaa",
            name=f"s{number:03}",
            cluster_ip=f"10.98.0.{number + 1}",
            ports=(ServicePort(port=80, target_port=8002),),
        )
        for number in range(count)
    )
    entry = next(each for each in lab.endpoints if each.service == "remote")
    ends = [replace(entry, namespace="aaa", service=each.name) for each in more]
    return replace(lab, services=(*more, *lab.services), endpoints=(*ends, *lab.endpoints))


def test_rules_compared_grow_with_services_in_iptables_mode_alone() -> None:
    lab = trace_lab()
    few, many = (
        measured(compare(each, Request("p0", "svc/remote"), MODES, count=1))
        for each in (lab, with_more_services(lab, 40))
    )

    def grown(mode: str) -> int:
        before, after = few[mode].there, many[mode].there
        assert before
        assert after
        return after.compared - before.compared

    # On the client's node up to its own Service; behind it all, and so the tunnel's packet on both.
    assert grown("iptables") == 4 * 40
    assert grown("nftables") == grown("nftables-flat") == 0


def test_contents_are_those_that_nft_lists(lab: Lab) -> None:
    there = nft_contents.contents(namespace(lab, "n1"), 2)
    listed = subprocess.run(
        ["ip", "netns", "exec", namespace(lab, "n1"), "nft", "-j", "list", "ruleset", "ip"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    objects = json.loads(listed)["nftables"]
    rules = [each["rule"]["handle"] for each in objects if "rule" in each]
    assert sorted(handle for each in there.chains.values() for handle in each) == sorted(rules)
    assert len(there.chains) == sum("chain" in each for each in objects)


def test_modes_differ_where_a_service_has_no_such_port(lab: Lab) -> None:
    done = subprocess.run(
        [NETLAB, "compare", "--lab", lab.name, "p0", "svc/remote", "--port", "81", "-o", "json"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == Exit.NO, done.stderr
    found = json.loads(done.stdout)
    assert found["agree"] is False
    by_mode = {each["mode"]: each["measured"]["trace"] for each in found["modes"]}
    assert by_mode["iptables"]["disposition"] == "dropped"
    assert by_mode["nftables"]["disposition"] == "rejected"
    assert {each["drop"]["reason"] for each in by_mode.values()} == {"no-such-port"}
    assert [sentence.partition(" it is ")[0] for sentence in found["differences"]] == [
        "With iptables",
        "With nftables and nftables-flat",
    ]


def test_faults_are_in_the_twins(lab: Lab) -> None:
    fault = Fault(name="no-route", node="n1", client="demo/p0", server="demo/p1")
    found = compare(replace(lab, faults=(fault,)), Request("p0", "p1"), MODES, count=1)
    assert found.agree
    losses = [each.trace.drop for each in measured(found).values()]
    assert [loss and (loss.reason, loss.node) for loss in losses] == [("no-route", "n1")] * 3
    assert all(each.cost is None for each in measured(found).values())


@pytest.mark.parametrize("protocol", ["icmp", "udp"])
def test_other_protocols_are_timed_as_well(lab: Lab, protocol: str) -> None:
    request = Request("p0", "p1", protocol=protocol)  # type: ignore[arg-type]
    found = compare(lab, replace(request, port=8002 if protocol == "udp" else None), MODES[:2], 4)
    for each in measured(found).values():
        assert each.trace.disposition == "delivered"
        assert each.cost
        assert len(each.cost.samples_ns) == 4


def test_what_the_machine_lacks_is_said(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    up = lifecycle.up

    def without_nftables(twin: Lab, dry_run: bool = False) -> lifecycle.Outcome:
        if twin.service_proxy.mode == "nftables":
            raise NetlabError(Problem("missing-library", "there is no nft"), Exit.MACHINE)
        return up(twin, dry_run)

    monkeypatch.setattr(lifecycle, "up", without_nftables)
    found = compare(lab, Request("p0", "svc/remote"), MODES[:2], count=1)
    assert [each.lacking for each in found.columns] == [None, "there is no nft"]
    assert list(measured(found)) == ["iptables"]


def test_twins_go_when_something_fails(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        assert len(twins_of(lab.name)) == 2
        raise ZeroDivisionError

    monkeypatch.setattr(comparing, "_time", fail)
    with pytest.raises(ZeroDivisionError):
        compare(lab, Request("p0", "svc/remote"), MODES[:2], count=1)
    assert twins_of(lab.name) == []


@pytest.fixture
def busy(lab: Lab) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Start comparisons that take long; returned once their twins are there."""
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        command = [NETLAB, "compare", "--lab", lab.name, "p0", "svc/remote", "--count", "10000"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        started.append(process)
        deadline = time.monotonic() + 30
        while len(twins_of(lab.name)) < 3:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_twins_go_when_it_is_interrupted(
    lab: Lab, busy: Callable[[], subprocess.Popen[str]], number: signal.Signals
) -> None:
    process = busy()
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == Exit.INTERRUPTED
    assert said.split() == ["interrupted"]
    assert twins_of(lab.name) == []


def test_twins_of_a_killed_comparison_are_removed_by_the_next_one(
    lab: Lab, busy: Callable[[], subprocess.Popen[str]]
) -> None:
    process = busy()
    left = twins_of(lab.name)
    assert not set(left) & set(twins.remove_orphans())  # somebody needs them
    process.kill()
    process.wait()
    done = subprocess.run(
        [NETLAB, "compare", "--lab", lab.name, "p0", "svc/remote", "--proxy", "none"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert twins_of(lab.name) == []
    # Another worker's comparison may have been quicker.
    assert len(done.stderr.splitlines()) <= 3
    assert not any(os.path.exists(record.directory(name)) for name in left)


def test_a_twin_is_a_lab_to_ls_and_down_and_is_not_the_lab_that_is_meant(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = twins.twin(lab, Variant("nftables"), aim(lab, Request("p0", "svc/remote")))
    with twins.up(made):
        assert made.name in lifecycle.running()
        assert record.twin_of(made.name) == lab.name
        monkeypatch.setattr(lifecycle, "running", lambda: sorted((lab.name, made.name)))
        assert only_lab() == lab.name
        monkeypatch.undo()
        assert lifecycle.down(made.name) > 0
    assert namespaces.names_of(made.name) == []
