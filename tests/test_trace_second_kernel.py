"""What traces say of losses that other kernels cannot have, or that concern a whole machine."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from lab_processes import eventually
from labs import fresh_name
from netlab.datapath.podnet import outer_link
from netlab.datapath.state import Link
from netlab.lab import faults, lifecycle
from netlab.topology.load import load
from netlab.topology.model import Lab
from netlab.trace.aim import Request
from netlab.trace.model import Trace
from netlab.trace.run import trace
from netlab.trace.series import traces
from trace_labs import namespace, trace_lab

MOST = Path("/proc/sys/net/netfilter/nf_conntrack_max")


@pytest.fixture(scope="module", params=["iptables", "nftables"])
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    made = trace_lab()
    made = replace(made, service_proxy=replace(made.service_proxy, mode=request.param))
    try:
        lifecycle.up(made)
        yield made
    finally:
        lifecycle.down(made.name)


def traced(lab: Lab, destination: str) -> Trace:
    return trace(lab, Request("p0", destination, timeout_s=0.9))


@pytest.mark.vm("netem")
def test_a_queue_that_loses_packets_is_named(lab: Lab) -> None:
    server = next(pod for pod in lab.pods if pod.name == "p2")
    device, node = outer_link(server), namespace(lab, "n1")
    tc = ("tc", "-n", node, "qdisc")
    # MACs are known then; else the question for them is what is lost.
    assert traced(lab, "svc/local").disposition == "delivered"
    subprocess.run([*tc, "add", "dev", device, "root", "netem", "loss", "100%"], check=True)
    try:
        found = traced(lab, "svc/local")
    finally:
        subprocess.run([*tc, "del", "dev", device, "root"], check=True)
    drop = found.drop
    assert drop is not None
    assert (found.disposition, drop.reason) == ("dropped", "loss")
    assert (drop.direction, drop.node, drop.device) == ("forward", "n1", device)
    assert drop.fix is not None
    assert f"tc -n {node} qdisc del dev {device} root" in drop.fix
    assert any("QDISC_DROP" in each for each in drop.evidence)
    assert traced(lab, "svc/local").disposition == "delivered"


@pytest.mark.vm("netem")
def test_a_link_that_loses_half_is_a_fault_like_any_other(lab: Lab) -> None:
    changed, _ = lifecycle.change(lab.name, lambda lab: faults.inject(lab, "loss"))
    try:
        assert lifecycle.differences(changed.lab) == []
        (unlike,) = lifecycle.differences(lab)
        assert isinstance(unlike.item, Link)
        (fault,) = changed.lab.faults
        server = next(pod for pod in lab.pods if pod.key == fault.server)
        assert (unlike.verb, unlike.item.name) == ("set", outer_link(server))
        asked = Request(fault.client, f"{fault.server}:8002", timeout_s=0.9)
        # That all of so many come through, or none, happens once in a million times.
        drops = [each.drop for each in traces(changed.lab, asked, 20, lab)]
        assert {"loss", None} <= {drop and drop.reason for drop in drops}
        # A question for a MAC gets lost as well, and is asked again after a second.
        for drop in drops:
            told = " ".join(drop.evidence) if drop else "netem"
            assert "netem" in told or (drop and drop.reason in ("loss", "late"))
    finally:
        lifecycle.change(lab.name, lambda lab: faults.clear(lab, "loss"))
    assert lifecycle.differences(lab) == []
    assert traced(lab, f"{fault.server}:8002").disposition == "delivered"


@pytest.fixture
def egress() -> Iterator[Lab]:
    made = load("egress", name=fresh_name()).lab
    try:
        lifecycle.up(made)
        yield made
    finally:
        lifecycle.down(made.name)


@pytest.mark.vm("nft queue")
def test_who_loses_a_race_for_a_source_port_is_told_so(egress: Lab) -> None:
    assert trace(egress, Request("pod1", "host/web:80", timeout_s=0.9)).disposition == "delivered"
    changed, _ = lifecycle.change(egress.name, lambda lab: faults.inject(lab, "source-port-race"))
    assert lifecycle.differences(changed.lab) == []
    eventually(lambda: lifecycle.lacking(changed.lab) == ())  # who races has begun
    found = trace(changed.lab, Request("pod1", "host/web:80", timeout_s=0.9), declared=egress)
    lifecycle.change(egress.name, faults.clear)
    drop = found.drop
    assert drop is not None
    assert (found.disposition, drop.reason, drop.node) == (
        "dropped",
        "conntrack-clash",
        "k8s-slave1",
    )
    assert "insert_failed of node k8s-slave1 was counted once meanwhile" in drop.evidence
    assert drop.fix is not None
    assert "--random-fully" in drop.fix
    assert found.prediction is not None
    assert "translation of the source (at node k8s-slave1)" in found.prediction.differs[0]
    assert lifecycle.differences(egress) == []
    assert trace(egress, Request("pod1", "host/web:80", timeout_s=0.9)).disposition == "delivered"


@pytest.mark.vm("own kernel")
def test_a_full_table_of_connections_is_named(lab: Lab) -> None:
    assert traced(lab, "svc/remote").disposition == "delivered"  # is remembered for a while
    before = MOST.read_text()
    MOST.write_text("1")
    try:
        found = traced(lab, "svc/remote")
    finally:
        MOST.write_text(before)
    drop = found.drop
    assert drop is not None
    assert (found.disposition, drop.reason, drop.node) == ("dropped", "conntrack-full", "n1")
    assert drop.direction == "forward"
    assert any("nf_conntrack_max 1" in each for each in drop.evidence)
    assert any("NETFILTER_DROP" in each and "else" not in each for each in drop.evidence)
    assert drop.fix is not None
    assert "nf_conntrack_max" in drop.fix
    assert traced(lab, "svc/remote").disposition == "delivered"
