"""The parts of a trace: JSON under netlab.trace/v1, and one line for each kind of step."""

from __future__ import annotations

import json

import msgspec
import pytest

from netlab.trace.family import IPV4
from netlab.trace.mark import Mark
from netlab.trace.model import Hop, Probe, Trace, Witnesses, encode
from netlab.trace.model_steps import (
    AnyStep,
    Bridge,
    Conntrack,
    Decapsulate,
    Deliver,
    Drop,
    Encapsulate,
    Nat,
    Neighbour,
    Outer,
    Packet,
    Route,
    Rule,
    Socket,
    Tuple,
)

SERVICE = Socket(ip="10.99.0.1", port=80)
POD = Socket(ip="10.244.2.2", port=8002)
CLIENT = Socket(ip="10.244.1.2", port=41000)
THERE = Tuple(source=CLIENT, destination=SERVICE)

STEPS: dict[str, tuple[AnyStep, str]] = {
    "route": (
        Route(
            destination="10.244.2.2", matched="10.244.2.0/24", device="flannel.1", via="10.244.2.0"
        ),
        "10.244.2.2 matches 10.244.2.0/24 via 10.244.2.0 dev flannel.1",
    ),
    "neighbour": (
        Neighbour(address="10.244.2.0", device="flannel.1", mac=None, state="failed"),
        "10.244.2.0 is at an unknown MAC on flannel.1 (failed)",
    ),
    "bridge": (
        Bridge(device="cbr0", mac="02:00:00:00:00:01", port="veth1"),
        "cbr0 forwards 02:00:00:00:00:01 to port veth1",
    ),
    "rule": (
        Rule(hook="FORWARD", table="filter", chain="FORWARD", handle=7, verdict="drop"),
        "filter FORWARD: rule with handle 7",
    ),
    "nat": (
        Nat(translation="dnat", reverse=False, before=SERVICE, after=POD),
        "DNAT 10.99.0.1:80 → 10.244.2.2:8002",
    ),
    "conntrack": (
        Conntrack(
            id=1,
            original=THERE,
            reply=Tuple(source=POD, destination=CLIENT),
            status=["dst-nat"],
        ),
        "original 10.244.1.2:41000 → 10.99.0.1:80, expects answers "
        "10.244.2.2:8002 → 10.244.1.2:41000",
    ),
    "encapsulate": (
        Encapsulate(device="flannel.1", vni=1, local="172.21.32.11", remote="172.21.32.12"),
        "flannel.1 encapsulates: VNI 1, outer 172.21.32.11 → 172.21.32.12",
    ),
    "decapsulate": (
        Decapsulate(device="flannel.1", vni=1, local="172.21.32.12", remote="172.21.32.11"),
        "flannel.1 decapsulates: VNI 1, outer was 172.21.32.11 → 172.21.32.12",
    ),
    "deliver": (Deliver(to="pod demo/p1"), "delivered to pod demo/p1"),
    "drop": (Drop(reason="fdb-missing"), "stopped: fdb-missing"),
}


@pytest.mark.parametrize("kind", STEPS)
def test_each_kind_of_step_has_its_name_its_line_and_comes_back_from_json(kind: str) -> None:
    step, line = STEPS[kind]
    data = msgspec.json.encode(step)
    assert json.loads(data)["kind"] == kind
    assert msgspec.json.decode(data, type=AnyStep) == step
    assert str(step) == line


def test_a_trace_has_every_key_of_the_schema() -> None:
    packet = Packet(
        src="10.244.1.2",
        dst="10.244.2.2",
        sport=41000,
        dport=8002,
        protocol="tcp",
        ttl=63,
        length=60,
        flags="S",
        outer=Outer(
            src="172.21.32.11",
            dst="172.21.32.12",
            sport=50000,
            dport=8472,
            ttl=64,
            length=110,
            id=1,
            vni=1,
        ),
    )
    hop = Hop(node="n1", namespace="lab:n1", device="eth0", direction="out", t_ns=10, packet=packet)
    trace = Trace(
        lab="lab",
        probe=Probe(
            from_="demo/p0", to="svc/web", protocol="tcp", source=CLIENT, destination=SERVICE
        ),
        disposition="delivered",
        delivered_to=None,
        seen_source=None,
        translations=[],
        drop=None,
        forward=[hop],
        reply=[],
        witnesses=Witnesses(packets="ok", rules="ok", conntrack="ok", kernel=None, decisions="ok"),
        elapsed_us=400,
    )
    found = json.loads(encode(trace))
    assert list(found) == [
        "schema",
        "lab",
        "probe",
        "resolution",
        "disposition",
        "delivered_to",
        "seen_source",
        "translations",
        "drop",
        "forward",
        "reply",
        "connections",
        "witnesses",
        "prediction",
        "elapsed_us",
        "application",
        "tries",
    ]
    assert found["schema"] == "netlab.trace/v1"
    assert found["probe"]["from"] == "demo/p0"
    assert set(found["forward"][0]) == {
        "node",
        "namespace",
        "device",
        "direction",
        "t_ns",
        "packet",
        "steps",
    }
    assert {"src", "dst", "sport", "dport", "protocol", "ttl", "length", "flags", "outer"} <= set(
        found["forward"][0]["packet"]
    )


def test_marks_differ_and_a_sequence_number_never_wraps() -> None:
    marks = [Mark.random("tcp", IPV4) for _ in range(100)]
    assert len({mark.cookie for mark in marks}) > 90
    assert all(0 < mark.sequence < 0xFFFFFFFF for mark in marks)
    assert len({Mark.random("udp", IPV4).cookie for _ in range(100)}) == 100
