"""Frames that go to the wrong MAC, and bridges that do not know their own."""

from __future__ import annotations

import subprocess

import pytest

from netlab.datapath.overlay import vtep_mac
from netlab.lab import lifecycle
from netlab.topology.model import Lab
from netlab.trace.aim import Request
from netlab.trace.run import trace
from test_trace_kernel import in_node
from test_trace_losses import in_pod, lost
from trace_labs import lab

__all__ = ["lab"]

pytestmark = pytest.mark.kernel

_WRONG = "02:00:00:00:00:99"


def _of_pod(lab: Lab) -> None:
    in_node(lab, "n2", "ip", "neigh", "replace", *_entry("10.244.2.2", "cbr0"))


def _of_gateway(lab: Lab) -> None:
    in_pod(lab, "p0", "ip", "neigh", "replace", *_entry("10.244.1.1", "eth0"))


def _of_node(lab: Lab) -> None:
    in_node(lab, "n1", "ip", "neigh", "replace", *_entry("172.21.32.12", "eth0"))


def _of_tunnel(lab: Lab) -> None:
    in_node(lab, "n1", "ip", "neigh", "replace", *_entry("10.244.2.0", "flannel.1"))


def _of_the_way_back(lab: Lab) -> None:
    in_pod(lab, "p1", "ip", "neigh", "replace", *_entry("10.244.2.1", "eth0"))


def _entry(address: str, device: str) -> list[str]:
    return [address, "lladdr", _WRONG, "dev", device, "nud", "permanent"]


@pytest.mark.parametrize(
    ("break_it", "node", "words"),
    [
        (_of_pod, "n2", f"node n2 sends what is for 10.244.2.2 to {_WRONG} on cbr0"),
        (_of_gateway, "n1", f"pod demo/p0 sends what is for 10.244.1.1 to {_WRONG} on eth0"),
        (_of_node, "n1", f"node n1 sends what is for 172.21.32.12 to {_WRONG} on eth0"),
        (_of_tunnel, "n1", f"node n1 sends what is for 10.244.2.0 to {_WRONG} on flannel.1"),
        (_of_the_way_back, "n2", f"pod demo/p1 sends what is for 10.244.2.1 to {_WRONG} on eth0"),
    ],
)
def test_a_wrong_mac_is_named_seen_and_repaired(
    lab: Lab, break_it: object, node: str, words: str
) -> None:
    break_it(lab)  # type: ignore[operator]
    found, said = lost(lab, "p0", "p1:8002")
    assert (found.reason, found.lost_on) == ("neighbour-wrong", node)
    assert words in said
    assert "neigh del" in said or vtep_mac(lab.node("n2")) in said
    assert "means something else" not in " ".join(found.drop.evidence if found.drop else ())
    assert any(_WRONG in str(change.item) for change in lifecycle.differences(lab))
    lifecycle.up(lab)
    assert trace(lab, Request("p0", "p1:8002")).delivered


def test_what_the_trace_says_to_do_about_a_wrong_mac_does_it(lab: Lab) -> None:
    for break_it in (_of_gateway, _of_tunnel):
        break_it(lab)
        found, _ = lost(lab, "p0", "p1:8002")
        assert found.drop is not None
        _, command, _ = str(found.drop.fix).split("`", 2)
        subprocess.run(command, shell=True, check=True)
        assert trace(lab, Request("p0", "p1:8002")).delivered


def test_a_bridge_that_does_not_know_its_own_mac(lab: Lab) -> None:
    assert lifecycle.differences(lab) == []
    for node in ("n1", "n2"):
        in_node(lab, node, "bridge", "fdb", "flush", "dev", "cbr0")
    found, said = lost(lab, "p0", "p1:8002")
    assert (found.reason, found.lost_on) == ("fdb-missing", "n1")
    assert "cbr0 of node n1 has no FDB entry for its own MAC" in said
    assert "or `netlab up`" in said
    assert len(lifecycle.differences(lab)) == 2
    _, command, _ = said.split("`", 2)
    subprocess.run(command, shell=True, check=True)
    found, said = lost(lab, "p0", "p1:8002")
    assert (found.reason, found.lost_on) == ("fdb-missing", "n2")
    assert "the answer to ARP for 10.244.2.2 too" in said
    mac = in_pod(lab, "p1", "cat", "/sys/class/net/eth0/address").strip()
    known = ["10.244.2.2", "lladdr", mac, "dev", "cbr0", "nud", "reachable"]
    in_node(lab, "n2", "ip", "neigh", "replace", *known)
    found, said = lost(lab, "p0", "p1:8002")
    assert (found.reason, found.lost_on) == ("fdb-missing", "n2")
    assert found.drop is not None
    assert found.drop.direction == "reply"
    assert len(lifecycle.up(lab).changes) == 1
    assert trace(lab, Request("p0", "p1:8002")).delivered
    assert lifecycle.up(lab).changes == ()
