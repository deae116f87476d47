"""A node's machine goes off and on again: who answers, what is told, what comes back."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from labs import fresh_name
from netlab.datapath.build import build, pod_namespace_name
from netlab.kernel import namespaces
from netlab.lab import lifecycle, stopping
from netlab.lab.undone import undone
from netlab.problems import NetlabError
from netlab.topology.load import load
from netlab.topology.model import Lab
from netlab.trace.aim import Request
from netlab.trace.prediction import foretell
from netlab.trace.run import trace

CLIENT, SERVER, ADDRESS = "demo/pod1", "demo/myblog-5c97d79cdb-j485f", "10.244.2.5"
NODE = "k8s-slave2"


def ready_nodes(lab: Lab) -> set[str | None]:
    return {each.node for entry in lab.endpoints for each in entry.endpoints if each.ready}


def test_endpoints_on_a_stopped_node_are_not_ready_and_its_pods_are_not_served() -> None:
    lab = load("two-node-vxlan").lab
    off = stopping.stop(lab, [f"node/{NODE}"]).lab
    assert NODE in ready_nodes(lab) - ready_nodes(off)
    assert not [each for each in build(off).servers if each.node == NODE]
    assert undone(off, lab) == [f"node/{NODE} stopped"]
    on = stopping.start(off, [f"node/{NODE}"]).lab
    assert (on.stopped, on.endpoints, build(on)) == ((), lab.endpoints, build(lab))


def test_only_a_node_stops() -> None:
    lab = load("two-node-vxlan").lab
    with pytest.raises(NetlabError, match="is no node"):
        stopping.stop(lab, ["pod/pod1"])
    with pytest.raises(NetlabError, match="is not in lab"):
        stopping.start(lab, ["n9"])


def _ask(connection: socket.socket) -> None:
    connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
    connection.recv(1)


@pytest.fixture
def running() -> Iterator[Lab]:
    lab = load("two-node-vxlan", name=fresh_name()).lab
    lifecycle.up(lab)
    try:
        yield lab
    finally:
        lifecycle.down(lab.name)


@pytest.mark.kernel
def test_a_client_hears_nothing_of_a_node_that_stops_and_is_refused_when_it_is_back(
    running: Lab,
) -> None:
    client = next(pod for pod in running.pods if pod.key == CLIENT)
    with namespaces.entered(pod_namespace_name(running, client)):
        connection = socket.create_connection((ADDRESS, 8002), 10)
    with connection:
        off, _ = lifecycle.change(running.name, lambda lab: stopping.stop(lab, [NODE]))
        assert not lifecycle.differences(off.lab)
        connection.setblocking(False)
        with pytest.raises(BlockingIOError):
            connection.recv(1)
        request = Request(CLIENT, f"{ADDRESS}:8002")
        lost = trace(off.lab, request)
        assert lost.drop is not None
        assert lost.drop.reason == "node-stopped"
        assert NODE in str(lost.drop.explanation)
        expected = foretell(off.lab, request).prediction
        assert (expected.disposition, expected.reason) == ("dropped", "node-stopped")
        on, _ = lifecycle.change(running.name, lambda lab: stopping.start(lab, [NODE]))
        assert not lifecycle.differences(on.lab)
        assert trace(on.lab, request).disposition == "delivered"
        # Whoever it was connected to is no more.
        connection.settimeout(30)
        with pytest.raises(ConnectionResetError):
            _ask(connection)


@pytest.mark.kernel
@pytest.mark.parametrize("topology", ["two-node-host-gw", "eni", "dual-stack", "nodeport"])
def test_a_node_that_was_stopped_is_as_it_was_declared(topology: str) -> None:
    lab = load(topology, name=fresh_name()).lab
    node = lab.nodes[-1].name
    lifecycle.up(lab)
    try:
        off, _ = lifecycle.change(lab.name, lambda lab: stopping.stop(lab, [node]))
        assert not lifecycle.differences(off.lab)
        on, _ = lifecycle.change(lab.name, lambda lab: stopping.start(lab, [node]))
        assert not lifecycle.differences(on.lab)
    finally:
        lifecycle.down(lab.name)
