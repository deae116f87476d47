"""`netlab conntrack`: entries of connection tracking in the words of a lab's objects."""

from __future__ import annotations

import json
from typing import Any

import pytest
from msgspec.structs import replace

from labs import fresh_name, small_lab
from netlab.kernel import conntrack
from netlab.kernel.conntrack import Entry, Tuple
from netlab.lab import lifecycle
from netlab.report.connections import Connection, Connections, Watched, concerns
from netlab.topology.model import Lab, Pod, ServicePort
from netlab.topology.references import resolve
from test_cli import NETLAB, netlab
from test_watch import Running

TCP, UDP = 6, 17


def with_node_port() -> Lab:
    lab = small_lab()
    web, empty = lab.services
    http = ServicePort(name="http", port=80, target_port=8002, node_port=30080)
    host = Pod(
        namespace="demo",
        name="host",
        node="n2",
        address=lab.nodes[1].address,
        host_network=True,
        listen=(("TCP", 9100),),
    )
    changed = replace(web, type="NodePort", ports=(http, web.ports[1]), external_ips=("192.0.2.7",))
    return replace(lab, services=(changed, empty), pods=(*lab.pods, host))


def entry(
    original: tuple[str, int, str, int], reply: tuple[str, int, str, int], protocol: int = TCP
) -> Entry:
    """Each way: source, its port, destination, its port."""
    ways = (Tuple(way[0], way[2], way[1], way[3]) for way in (original, reply))
    return Entry(family=4, protocol=protocol, original=next(ways), reply=next(ways), id=1)


P0, P1 = "10.244.1.2", "10.244.2.2"
CLUSTER_IP = entry((P0, 4000, "10.99.0.1", 80), (P1, 8002, P0, 4000))
NODE_PORT = entry(("172.21.32.1", 4000, "172.21.32.11", 30080), (P1, 8002, "10.244.1.0", 50000))
EXTERNAL = entry((P0, 4000, "192.0.2.7", 80), (P1, 8002, "10.244.1.0", 50000))
DATAGRAM = entry((P0, 4000, "10.99.0.1", 53), (P1, 8002, P0, 4000), UDP)
DIRECT = entry((P0, 4000, P1, 8002), (P1, 8002, P0, 4000))
OF_HOST = entry((P0, 4000, "172.21.32.12", 9100), ("172.21.32.12", 9100, P0, 4000))
FORWARDED = entry(("172.21.32.1", 4000, "172.21.32.12", 30080), (P1, 8002, "10.244.1.0", 50000))
ALL = (CLUSTER_IP, NODE_PORT, EXTERNAL, DATAGRAM, DIRECT, OF_HOST, FORWARDED)


def told(lab: Lab, *entries: Entry) -> list[Connection]:
    known = Connections(lab)
    return [known.of(lab.nodes[0], each) for each in entries]


def through(found: Connection) -> tuple[str, int, str] | None:
    service = found.service
    return (f"{service.namespace}/{service.name}", service.port, service.by) if service else None


def test_the_service_and_the_endpoint_are_named() -> None:
    found = told(with_node_port(), *ALL)
    assert [through(each) for each in found] == [
        ("demo/web", 80, "ClusterIP"),
        ("demo/web", 80, "NodePort"),
        ("demo/web", 80, "ExternalIP"),
        ("demo/web", 53, "ClusterIP"),
        None,
        None,
        None,  # (a node port of another node: it is that node's to translate)
    ]
    assert [each.endpoint for each in found] == [
        *["pod/demo/p1"] * 4,
        None,
        None,
        "pod/demo/p1",
    ]
    assert [each.masqueraded for each in found] == [False, True, True, False, False, False, True]
    first = found[0]
    names = [end.name for end in (first.original.source, first.original.destination)]
    assert names == ["pod/demo/p0", "svc/demo/web"]
    assert found[1].reply.destination.name == "node/n1"


@pytest.mark.parametrize(
    ("reference", "wanted"),
    [
        ("pod/p0", {CLUSTER_IP, EXTERNAL, DATAGRAM, DIRECT, OF_HOST}),
        ("pod/p1", {CLUSTER_IP, NODE_PORT, EXTERNAL, DATAGRAM, DIRECT, FORWARDED}),
        ("pod/p2", set()),
        ("pod/host", {OF_HOST}),
        ("svc/web", {CLUSTER_IP, NODE_PORT, EXTERNAL, DATAGRAM}),
        ("svc/web:http", {CLUSTER_IP, NODE_PORT, EXTERNAL}),
        ("svc/web:53", {DATAGRAM}),
        ("svc/empty", set()),
        ("node/n1", set(ALL)),
        ("node/n2", set()),
        ("10.99.0.1", {CLUSTER_IP, DATAGRAM}),
        ("10.99.0.1:53", {DATAGRAM}),
        ("192.0.2.99", set()),
    ],
)
def test_what_concerns_a_reference(reference: str, wanted: set[Entry]) -> None:
    lab = with_node_port()
    matches = concerns(resolve(lab, reference))
    assert {each for each in ALL if matches(*told(lab, each))} == wanted


def test_events_of_connections() -> None:
    lab = with_node_port()
    watched = Watched(concerns(resolve(lab, "svc/web")))
    (mine,), (other,) = told(lab, CLUSTER_IP), told(lab, replace(DIRECT, id=2))
    assert watched.event(other, True) is None
    assert watched.event(mine, True) == "ADDED"
    assert watched.event(replace(mine, timeout_seconds=5), True) is None
    assert watched.event(replace(mine, state="ESTABLISHED"), True) == "MODIFIED"
    # The Service is gone; the connection lives on.
    assert watched.event(replace(mine, service=None), True) == "MODIFIED"
    assert watched.event(mine, False) == "DELETED"
    assert watched.event(mine, False) is None


@pytest.mark.kernel
def test_a_watch_tells_what_becomes_of_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    name = fresh_name()
    monkeypatch.setenv("NETLAB_LAB", name)
    assert netlab("up", "two-node-vxlan").returncode == 0
    watch = None

    def event(running: Running) -> tuple[str, str]:
        read = json.loads(running.line())
        assert read["connection"]["service"]["name"] == "myblog"
        return read["type"], read["connection"]["state"]

    try:
        ask = ("exec", "pod1", "--", "curl", "-s", "http://10.99.174.93/hostname")
        netlab(*ask)
        watch = Running([NETLAB, "conntrack", "svc/myblog", "--watch", "-o", "json"])
        assert event(watch)[0] == "ADDED"  # it was there
        netlab(*ask)
        assert event(watch) == ("ADDED", "SYN_SENT")
        states = {event(watch)}
        while ("MODIFIED", "TIME_WAIT") not in states:
            states.add(event(watch))
        assert ("MODIFIED", "ESTABLISHED") in states
        node = f"{name}:k8s-slave1"
        assert conntrack.delete(node, conntrack.dump(node, 4)) > 0
        while event(watch)[0] != "DELETED":
            pass
        assert netlab("down").returncode == 0
        assert watch.end() == (0, f"{name} is down: nothing more will happen\n")
    finally:
        if watch:
            watch.kill()
        lifecycle.down(name)


@pytest.mark.kernel
def test_connections_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    name = fresh_name()
    monkeypatch.setenv("NETLAB_LAB", name)

    def listed(*arguments: str) -> list[dict[str, Any]]:
        finished = netlab("conntrack", *arguments, "-o", "json")
        assert finished.returncode == 0, finished.stderr
        found = json.loads(finished.stdout)
        assert (found["schema"], found["lab"]) == ("netlab.conntrack/v1", name)
        connections: list[dict[str, Any]] = found["connections"]
        return connections

    try:
        assert netlab("up", "two-node-vxlan").returncode == 0
        assert listed("svc/myblog") == []
        nothing = netlab("conntrack", "svc/myblog")
        assert (nothing.returncode, nothing.stdout) == (0, "")
        assert nothing.stderr == "no connection is known\n"
        asked = netlab("exec", "pod1", "--", "curl", "-s", "http://10.99.174.93/hostname")
        (found,) = listed("svc/myblog")
        assert found["node"] == "k8s-slave1"
        assert found["endpoint"] == f"pod/demo/{asked.stdout.strip()}"
        assert found["original"]["source"]["name"] == "pod/demo/pod1"
        assert found["service"]["by"] == "ClusterIP"
        assert (found["protocol"], found["masqueraded"]) == ("TCP", False)
        assert {"dst-nat", "seen-reply", "assured"} <= set(found["status"])
        assert found["timeoutSeconds"] > 0
        assert listed("svc/mysql") == []
        assert listed("svc/myblog", "--node", "k8s-slave2") == []
        # Where the endpoint is, it is a connection between two pods.
        far = [each for each in listed("pod1") if each["node"] == "k8s-slave2"]
        assert len(far) == (asked.stdout.strip() == "myblog-5c97d79cdb-j485f")
        assert {each["node"] for each in listed("node/k8s-slave1")} == {"k8s-slave1"}
        text = netlab("conntrack", "svc/myblog").stdout
        assert f": pod/demo/pod1 → svc/demo/myblog (ClusterIP) → {found['endpoint']}\n" in text
        assert f"\n    original  10.244.1.2:{found['original']['source']['port']} → 10." in text
        for wrong in (("pod9",), ("--node", "nobody"), ("svc/myblog:99x",)):
            finished = netlab("conntrack", *wrong)
            assert (finished.returncode, finished.stdout) == (2, "")
    finally:
        lifecycle.down(name)
