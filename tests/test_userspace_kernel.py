"""Userspace mode on the kernel: proxies take connections, and traces show both of each."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Iterator

import msgspec
import pytest
from msgspec.structs import replace

from lab_processes import eventually
from labs import dual_stack_lab, small_lab
from netlab.kernel.namespaces import entered
from netlab.lab import control, lifecycle
from netlab.lab.change import proxy
from netlab.problems import Exit, NetlabError
from netlab.topology.model import Lab
from netlab.trace.aim import Request
from netlab.trace.model import Trace
from netlab.trace.run import Recorded, trace
from netlab.trace.series import chosen, trace_to_endpoint, traces
from test_services_modes import ask, datagram
from test_services_userspace import userspace_lab

pytestmark = pytest.mark.kernel

ALL = {"p1", "p2", "p3"}


@pytest.fixture
def lab() -> Iterator[Lab]:
    made = userspace_lab()
    try:
        lifecycle.up(made)
        yield made
    finally:
        lifecycle.down(made.name)


def pids(init: control.Init, name: str) -> list[int]:
    return [each.pid for each in init.status().processes if each.name == name]


def test_services_are_reached_in_turn(lab: Lab) -> None:
    assert lifecycle.up(lab).changes == ()
    p0, node, outside = f"{lab.name}:demo:p0", f"{lab.name}:n1", f"{lab.name}:_switch"
    for client in (p0, node):
        assert {ask(client, "10.99.0.1", 80) for _ in range(3)} == ALL
        assert {datagram(client, "10.99.0.1", 53) for _ in range(3)} == ALL
    assert {ask(outside, "172.21.32.12", 30080) for _ in range(3)} == ALL
    assert {datagram(outside, "172.21.32.12", 30053) for _ in range(3)} == ALL
    assert ask(p0, "203.0.113.101", 80) in ALL
    # The endpoint sees the node that its client came by.
    seen = {ask(p0, "10.99.0.1", 80, "/clientip").partition(":")[0] for _ in range(3)}
    assert seen == {"10.244.1.0", "10.244.1.1"}
    assert ask(node, "127.0.0.1", 30080) in ALL
    # Nobody answers for a Service without endpoints, but it is taken.
    assert ask(p0, "10.99.0.2", 80) == ""


def test_both_families(lab: Lab) -> None:
    six = dual_stack_lab(lab)
    six = replace(six, name=f"{lab.name}-six")
    try:
        lifecycle.up(six)
        assert lifecycle.up(six).changes == ()
        p0 = f"{six.name}:demo:p0"
        for address in ("10.99.0.1", "fd00:10:99::1"):
            assert {ask(p0, address, 80) for _ in range(3)} == ALL
        found = trace(six, Request("p0", "svc/web:80", family=6))
        assert (found.delivered, found.endpoint) == (True, found.connections[0].endpoint)  # type: ignore[index]
    finally:
        lifecycle.down(six.name)


def two(found: Trace) -> Trace:
    """The connection that the proxy opened."""
    assert found.connections is not None
    assert len(found.connections) == 1
    return found.connections[0]


@pytest.mark.parametrize("source", ["p0", "n1"])
@pytest.mark.parametrize(("port", "program"), [(80, "HAProxy"), (53, "nginx")])
def test_a_trace_shows_both_connections_as_one_path(
    lab: Lab, source: str, port: int, program: str
) -> None:
    recorded: list[Recorded] = []
    found = trace(lab, Request(source, f"svc/web:{port}"), recorded)
    second = two(found)
    assert (found.disposition, second.disposition) == ("delivered", "delivered")
    assert found.delivered_to == second.delivered_to
    assert found.delivered_to
    assert found.delivered_to.name.removeprefix("demo/") in ALL
    # What the endpoint sees as its client is the proxy.
    assert found.seen_source == second.seen_source
    assert found.seen_source
    assert found.seen_source.ip in ("10.244.1.0", "10.244.1.1")
    dnat, by_proxy = found.translations
    assert (dnat.kind, by_proxy.kind, by_proxy.node) == ("dnat", "proxy", "n1")
    assert by_proxy.before == dnat.after
    assert by_proxy.after == second.probe.destination
    assert by_proxy.rule == f"{program} of node n1 for svc/demo/web"
    assert found.forward[-1].namespace == f"{lab.name}:n1"
    assert second.forward[0].node == "n1"
    assert second.forward[-1].packet.flow.destination == second.probe.destination
    # All is as declared, and the prediction is one of both connections.
    foreseen = found.prediction
    assert foreseen
    assert (foreseen.differs, foreseen.disposition) == ([], "delivered")
    assert foreseen.delivered_to == found.delivered_to
    assert foreseen.seen_source
    assert foreseen.seen_source.ip == found.seen_source.ip
    assert [each.kind for each in foreseen.translations] == ["dnat", "proxy"]
    # Neither shows what is the other's.
    ends = (second.probe.source, second.probe.destination)
    assert not {hop.packet.flow.destination for hop in found.forward} & set(ends)
    assert {hop.packet.flow.source for hop in second.forward} == {second.probe.source}
    assert {each.sighting.packet.flow.source for each in recorded} >= {
        found.probe.source,
        second.probe.source,
    }
    assert msgspec.json.decode(msgspec.json.encode(found))["connections"][0]["connections"] is None


def test_a_trace_by_a_node_port_goes_on_from_that_node(lab: Lab) -> None:
    found = trace(lab, Request("p0", "node/n2:30080"))
    assert found.delivered
    assert two(found).forward[0].namespace == f"{lab.name}:n2"
    assert found.via == ["n1", "n2"]


def test_a_service_without_endpoints_is_taken_and_closed(lab: Lab) -> None:
    found = trace(lab, Request("p0", "svc/empty"))
    assert (found.disposition, found.reason, found.lost_on) == ("rejected", "no-endpoints", "n1")
    assert found.connections == []
    assert found.delivered_to is None
    assert found.prediction
    assert (found.prediction.disposition, found.prediction.reason) == ("rejected", "no-endpoints")
    assert found.prediction.differs == []


@pytest.mark.parametrize("port", [80, 53])
def test_an_endpoint_that_does_not_answer_is_where_it_is_lost(lab: Lab, port: int) -> None:
    only_p1 = tuple(replace(entry, endpoints=entry.endpoints[:1]) for entry in lab.endpoints)
    lab = replace(lab, endpoints=only_p1)
    init = control.connect(lab.name)
    assert init
    name = "haproxy" if port == 80 else "nginx"
    before = set(pids(init, name))
    lifecycle.up(lab)
    # A worker that has read what was before may take a connection until it ends.
    eventually(lambda: len(before & set(pids(init, name))) == 2 and len(pids(init, name)) == 4)
    with entered(f"{lab.name}:demo:p1"):
        subprocess.run(["ip", "link", "set", "eth0", "down"], check=True)
    found = trace(lab, Request("p0", f"svc/web:{port}"))
    second = two(found)
    assert (found.disposition, found.reason) == (second.disposition, second.reason)
    assert second.disposition == "dropped"
    assert found.drop == second.drop


def test_a_connection_that_waits_for_a_mac_is_told(lab: Lab) -> None:
    (end,) = (each for each in lab.endpoints[0].endpoints if each.pod == "demo/p2")
    lab = replace(lab, endpoints=tuple(replace(each, endpoints=(end,)) for each in lab.endpoints))
    init = control.connect(lab.name)
    assert init
    before = set(pids(init, "haproxy"))
    lifecycle.up(lab)
    eventually(lambda: len(before & set(pids(init, "haproxy"))) == 2)
    node, p2 = f"{lab.name}:n1", f"{lab.name}:demo:p2"
    for where, command in ((p2, "link set eth0 arp off down"), (node, "neigh flush to 10.244.1.3")):
        subprocess.run(["ip", "-n", where, *command.split()], check=True)
    found = trace(lab, Request("p0", "svc/web:80"))
    assert (found.disposition, found.reason) == ("dropped", "neighbour-unresolved")
    assert found.drop
    assert "HAProxy of node n1 opens one to 10.244.1.3:8002" in found.drop.explanation


def test_a_change_is_read_without_losing_a_connection(lab: Lab) -> None:
    p0 = f"{lab.name}:demo:p0"
    init = control.connect(lab.name)
    assert init
    before = {name: pids(init, name) for name in ("haproxy", "nginx")}
    with entered(p0):
        connection = socket.create_connection(("10.99.0.1", 80), timeout=5)
    with connection:
        connection.sendall(b"GET /hostname ")
        keep = lab.endpoints[0].endpoints[:1]
        fewer = tuple(replace(entry, endpoints=keep) for entry in lab.endpoints)
        lifecycle.up(replace(lab, endpoints=fewer))
        (name,) = {end.pod.removeprefix("demo/") for end in keep if end.pod}
        eventually(lambda: {ask(p0, "10.99.0.1", 80) for _ in range(3)} == {name})
        eventually(lambda: {datagram(p0, "10.99.0.1", 53) for _ in range(3)} == {name})
        connection.sendall(b"HTTP/1.0\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.")
    for name, old in before.items():
        assert set(old) & set(pids(init, name)), f"{name} was started anew"


@pytest.mark.parametrize("name", ["haproxy", "nginx"])
def test_one_that_dies_is_started_again_and_status_says_so(lab: Lab, name: str) -> None:
    init = control.connect(lab.name)
    assert init
    first = {each.namespace: each for each in init.status().programs if each.name == name}
    assert all(each.running and each.restarts == 0 for each in first.values())
    for pid in pids(init, name):
        with contextlib.suppress(ProcessLookupError):  # a worker that went with its master
            os.kill(pid, signal.SIGKILL)

    def again() -> bool:
        found = [each for each in init.status().programs if each.name == name]
        return all(each.running and each.restarts >= 1 for each in found)

    eventually(again)
    p0 = f"{lab.name}:demo:p0"
    asked = ask if name == "haproxy" else datagram
    port = 80 if name == "haproxy" else 53

    def answered() -> bool:
        try:
            return asked(p0, "10.99.0.1", port) in ALL
        except OSError:
            return False

    eventually(answered)
    assert lifecycle.down(lab.name)
    assert control.connect(lab.name) is None


def test_a_master_that_dies_leaves_no_worker_with_its_port(lab: Lab) -> None:
    init = control.connect(lab.name)
    assert init
    parents = {pid: _parent(pid) for pid in pids(init, "nginx")}
    masters = [pid for pid, parent in parents.items() if parent not in parents]
    assert len(masters) == 2
    for pid in masters:
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: not set(parents) & set(pids(init, "nginx")))
    eventually(lambda: lifecycle.lacking(lab) == ())


def _parent(pid: int) -> int:
    with open(f"/proc/{pid}/stat") as stat:
        return int(stat.read().rpartition(")")[2].split()[1])


def test_from_mode_to_mode_connections_live_on(lab: Lab) -> None:
    p0 = f"{lab.name}:demo:p0"
    for mode in ("iptables", "userspace", "nftables", "userspace"):
        lifecycle.change(lab.name, lambda lab, mode=mode: proxy(lab, mode))  # type: ignore[misc]
        wanted = replace(lab, service_proxy=replace(lab.service_proxy, mode=mode))
        assert lifecycle.differences(wanted) == []
        assert ask(p0, "10.99.0.1", 80) in ALL
        init = control.connect(lab.name)
        assert init
        assert bool(init.status().programs) == (mode == "userspace")


def test_a_series_counts_who_the_proxy_chose(lab: Lab) -> None:
    ends = [chosen(each) for each in traces(lab, Request("p0", "svc/web:80"), 3)]
    assert {end.ip for end in ends if end} == {"10.244.2.2", "10.244.1.3", "10.244.2.3"}
    found = trace_to_endpoint(lab, Request("p0", "svc/web:80"), "p3")
    assert (found.endpoint, found.delivered) == ("demo/p3", True)


def test_a_missing_program_is_named_before_anything_is_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("netlab.doctor._which", lambda name: None)
    lab = replace(small_lab(), service_proxy=replace(small_lab().service_proxy, mode="userspace"))
    with pytest.raises(NetlabError) as caught:
        lifecycle.up(lab)
    assert caught.value.exit_code == Exit.MACHINE
    said = str(caught.value)
    assert "needs haproxy, which is not installed" in said
    assert "apt-get install haproxy" in said
    assert "needs nginx, which is not installed" in said
    assert lab.name not in lifecycle.running()
