"""What traces say of losses that other kernels cannot have, or that concern a whole machine."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from netlab.datapath.podnet import outer_link
from netlab.lab import lifecycle
from netlab.topology.model import Lab
from netlab.trace.aim import Request
from netlab.trace.model import Trace
from netlab.trace.run import trace
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
