"""`netlab trace --watch`: the traffic of others, traced without a packet of our own."""

from __future__ import annotations

import contextlib
import multiprocessing
import socket
import threading
import time
from collections.abc import Callable

import pytest
from msgspec.structs import replace

from labs import ipv6_lab
from netlab.kernel.namespaces import entered
from netlab.lab import lifecycle
from netlab.problems import Exit, NetlabError
from netlab.topology.model import Lab
from netlab.trace.aim import Place, Request
from netlab.trace.model import Rule, Trace
from netlab.trace.run import Recorded, trace
from netlab.trace.waiting import Wait, trace_next
from test_cli import netlab
from test_trace_kernel import all_ok, in_node, places
from trace_labs import lab, namespace, trace_lab

__all__ = ["lab"]

REMOTE, EMPTY = "10.99.0.1", "10.99.0.4"


def connect(lab: Lab, pod: str, address: str, port: int = 80, wait_s: float = 5.0) -> None:
    """What a client does, whatever comes of it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with entered(namespace(lab, "demo", pod)):
        client = socket.socket(family)
    with client, contextlib.suppress(OSError):
        client.settimeout(wait_s)
        client.connect((address, port))


def watched(lab: Lab, wait: Wait, act: Callable[[], None]) -> tuple[Trace, list[Recorded]]:
    """The trace of what `act` does as soon as all witnesses watch."""
    recorded: list[Recorded] = []
    acting = threading.Thread(target=act)

    def armed(place: Place) -> None:
        acting.start()

    try:
        return trace_next(lab, replace(wait, wait_s=20), recorded, armed), recorded
    finally:
        acting.join()


def met(found: Trace) -> list[tuple[str | None, str, str, int, bool]]:
    """The rules that a packet met on its way there, node by node."""
    return [
        (hop.node, step.table, step.chain, step.handle, step.outer)
        for hop in found.forward
        for step in hop.steps
        if isinstance(step, Rule)
    ]


@pytest.mark.kernel
def test_the_first_packet_of_a_connection_is_traced_with_all_witnesses(lab: Lab) -> None:
    wait = Wait("p0", "tcp dst port 80")
    found, recorded = watched(lab, wait, lambda: connect(lab, "p0", REMOTE))
    assert found.disposition == "delivered"
    assert all_ok(found)
    assert found.witnesses.kernel == "ok"
    assert places(found.forward) == ["demo:p0", "n1", "_switch", "n2", "demo:p1"]
    assert places(found.reply) == ["demo:p1", "n2", "_switch", "n1", "demo:p0"]
    assert found.probe.to == "svc/demo/remote:80"
    assert [str(step.after) for step in found.translations] == ["10.244.2.2:8002"]
    assert met(found) == met(trace(lab, Request("p0", "svc/remote")))
    assert len(recorded) == len(found.forward) + len(found.reply)


@pytest.mark.kernel
def test_what_others_send_and_what_the_filter_leaves_out_does_not_mix_in(lab: Lab) -> None:
    def crowd() -> None:
        while True:
            time.sleep(0.05)
            connect(lab, "p2", REMOTE)
            connect(lab, "p3", "10.244.2.2", 8002)
            connect(lab, "p0", "10.244.2.2", 8002)

    # Of its own interpreter, which would else wait for ours.
    crowding = multiprocessing.get_context("fork").Process(target=crowd, daemon=True)
    crowding.start()
    try:
        wait = Wait("p0", f"dst host {REMOTE}")
        found, recorded = watched(lab, wait, lambda: connect(lab, "p0", REMOTE))
    finally:
        crowding.kill()
        crowding.join()
    assert found.disposition == "delivered", found.drop
    assert all_ok(found), found.witnesses
    assert places(found.forward) == ["demo:p0", "n1", "_switch", "n2", "demo:p1"]
    assert found.probe.destination.ip == REMOTE
    sources = {found.probe.source.port, 80, 8002}
    assert {each.sighting.packet.sport for each in recorded} <= sources
    assert met(found) == met(trace(lab, Request("p0", "svc/remote")))


@pytest.mark.kernel
def test_a_refusal_is_explained(lab: Lab) -> None:
    found, _ = watched(lab, Wait("p0"), lambda: connect(lab, "p0", EMPTY))
    assert (found.disposition, found.drop and found.drop.reason) == ("rejected", "no-endpoints")


@pytest.mark.kernel
def test_of_what_is_sent_twice_the_loss_is_explained(lab: Lab) -> None:
    in_node(lab, "n2", "iptables", "-I", "FORWARD", "-p", "tcp", "--dport", "8002", "-j", "DROP")

    def clients() -> None:
        connect(lab, "p0", "10.99.0.2")  # which is answered, so that it is not meant
        connect(lab, "p0", REMOTE, wait_s=2.5)

    found, _ = watched(lab, Wait("p0", lost=True), clients)
    assert found.disposition == "dropped"
    assert found.drop is not None
    assert (found.drop.reason, found.drop.node) == ("dropped-by-rule", "n2")
    assert found.probe.to == "svc/demo/remote:80"
    # It is another packet for connection tracking, which had forgotten the first.
    assert [step.kind for step in found.translations] == ["dnat"]


@pytest.mark.kernel
def test_over_ipv6() -> None:
    made = ipv6_lab(trace_lab())
    try:
        lifecycle.up(made)
        address = made.services[0].cluster_ip
        found, _ = watched(made, Wait("p0"), lambda: connect(made, "p0", address))
    finally:
        lifecycle.down(made.name)
    assert found.disposition == "delivered"
    assert all_ok(found)
    assert places(found.forward) == ["demo:p0", "n1", "_switch", "n2", "demo:p1"]


@pytest.mark.kernel
def test_of_a_node_its_own_connections_count(lab: Lab) -> None:
    def clients() -> None:
        connect(lab, "p0", REMOTE)
        with entered(namespace(lab, "n1")), socket.socket() as client:
            client.settimeout(5)
            client.connect((REMOTE, 80))

    found, _ = watched(lab, Wait("node/n1"), clients)
    assert found.disposition == "delivered"
    assert found.probe.from_ == "n1"
    assert [step.kind for step in found.translations] == ["dnat", "masquerade"]


@pytest.mark.kernel
def test_none_in_time_is_not_observed(lab: Lab) -> None:
    done = netlab("trace", "p0", "--watch", "--timeout", "0.3", "--lab", lab.name)
    assert done.returncode == Exit.UNOBSERVED
    assert "waiting for pod demo/p0 to send" in done.stderr
    assert "error[no-packet]: pod demo/p0 opened no TCP connection in 0.3 s" in done.stderr


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("p0",), "a probe needs a DST"),
        (("p0", "p1", "--dropped"), "--dropped tells --watch what to wait for"),
        (("p0", "p1", "--watch", "tcp"), "only SRC goes with --watch"),
        (("p0", "--watch", "tcp prt 80"), '"tcp prt 80" is no filter'),
        (("svc/remote", "--watch", "tcp"), "cannot send a probe"),
    ],
)
def test_what_cannot_be_meant(lab: Lab, arguments: tuple[str, ...], said: str) -> None:
    done = netlab("trace", *arguments, "--lab", lab.name)
    assert done.returncode == 2
    assert said in done.stderr


@pytest.mark.kernel
def test_a_family_that_the_lab_lacks_is_an_error(lab: Lab) -> None:
    with pytest.raises(NetlabError, match="has no IPv6"):
        trace_next(lab, Wait("p0", family=6))
