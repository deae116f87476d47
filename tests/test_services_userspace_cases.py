"""The table of cases in userspace mode, on the kernel: what the historic mode had, and had not.

Where nothing stands here a case holds as in the table.  The endpoints see the node that the
connection came to, never the client.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from service_cases import ALL, CASES, DROPPED, REFUSED, THERE, Case
from service_probes import MASQUERADED, Probes, cases_up

pytestmark = pytest.mark.kernel

# Of cbr0 and of the overlay's device on both nodes: a proxy's connections are its node's.
NODES = MASQUERADED | {"10.244.2.1", "10.244.2.0", "fd00:10:244:2::1", "fd00:10:244:2::"}
CLOSED = "closed"  # taken, and closed without a word
WEB = "p1 p2 p3"

# By what kube-proxy v1.25 was (pkg/proxy/userspace): each line of a group differs for one reason.
HISTORIC: dict[str, str | None] = {
    # A proxy takes what it has nobody for; it cannot say so over UDP.
    **dict.fromkeys(
        (
            *(f"no endpoints, {who}" for who in ("pod", "node", "outside")),
            "no endpoints, external IP from outside",
            "no endpoints, load balancer IP",
            "no endpoints, load balancer IP from outside",
            "no endpoints, load balancer IP from the node",
            "no endpoints, NodePort from the node",
            "no endpoints, NodePort",
            "no endpoints, NodePort from outside",
            "internal policy Local, nowhere any",
            "internal policy Local, nowhere any, node",
            "endpoints that terminate and serve",
            "endpoints that terminate and do not serve",
            "in a range, no endpoints",
            "in no range, no endpoints",
        ),
        CLOSED,
    ),
    "no endpoints, UDP": DROPPED,
    "no endpoints, UDP NodePort from outside": DROPPED,
    # No rule is for them: the packet leaves the node as it is.
    **dict.fromkeys(
        (
            "unused port of a ClusterIP, pod",
            "unused port of a ClusterIP, node",
            "unused protocol of a ClusterIP",
            "unallocated ClusterIP, pod",
            "unallocated ClusterIP, node",
            "Service of another proxy",
        )
    ),
    # externalIPs are for what comes from outside: neither from a bridge's ports nor from the node.
    **dict.fromkeys(
        (
            "no endpoints, external IP",
            "no endpoints, external IP from the node",
            "internal policy Local, none here, external IP",
            "hints and policy Local, pod",
            *(f"external IP, {client}" for client in ("p0", "n1")),
            *(f"policy Local, external IP, {client}" for client in ("p0", "n1")),
            *(f"policy Local, none here, external IP, {client}" for client in ("p0", "n1")),
            "source in no range, external IP",
        )
    ),
    # There were no policies,
    "internal policy Local, pod": ALL,
    "internal policy Local, node": ALL,
    "internal policy Local, other node": ALL,
    "internal policy Local, none here, pod": THERE,
    "internal policy Local, none here, node": THERE,
    "internal policy Local, none here, its ClusterIP": THERE,
    "both policies Local, ClusterIP": "p1 p2",
    "both policies Local, from outside": "p1 p2",
    **{
        f"policy Local, {at}, outside": ALL
        for at in ("external IP", "load balancer IP", "NodePort")
    },
    **{
        f"policy Local, none here, {at}, outside": THERE
        for at in ("external IP", "load balancer IP", "NodePort")
    },
    # no hints,
    "endpoints of the node's zone": ALL,
    "endpoints of the other node's zone": ALL,
    "endpoints of the zone, from outside": ALL,
    "endpoints of the node itself": ALL,
    "endpoints of the other node": ALL,
    "hints for other nodes only: zones": ALL,
    "hints and policy Local, outside": "p1 p2",
    # no endpoints that terminate,
    "they terminate here, outside": THERE,
    # no source ranges,
    "source in no range, pod": WEB,
    "source in no range, node": WEB,
    "the node in a range, pod": WEB,
    "in a range, policy Local, outside": ALL,
    "in no range, policy Local, pod": ALL,
    "in no range, UDP": WEB,
    # and no nodePortAddresses: every local address took NodePorts.
    **{
        f"NodePort at {address} from {client}": WEB
        for client, address in (
            ("p0", "10.244.1.1"),
            ("n1", "10.244.1.1"),
            ("n1", "127.0.0.1"),
            ("p0", "10.244.1.0"),
        )
    },
    # The endpoint meets its node, not itself.
    "the only endpoint to itself by another node": "p1",
}


@pytest.fixture(scope="module")
def probes() -> Iterator[Probes]:
    with cases_up("userspace") as up:
        yield up


def test_every_difference_is_one_of_the_table() -> None:
    assert HISTORIC.keys() <= {case.name for case in CASES}
    assert not [case.name for case in CASES if HISTORIC.get(case.name, "") == case.expected]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_packets_to_services(probes: Probes, case: Case) -> None:
    expected = HISTORIC.get(case.name, case.expected)
    if expected is None:
        return
    families = case.of_both_families()
    with ThreadPoolExecutor(2) as threads:
        for _ in threads.map(lambda each: _check(probes, each, expected), families):
            pass


def _check(probes: Probes, case: Case, expected: str) -> None:
    ask = (case.client, case.address, case.port, case.protocol)
    if expected == CLOSED:
        with pytest.raises((AssertionError, ConnectionResetError, BrokenPipeError)):
            probes.ask(*ask)
        return
    if expected in (REFUSED, DROPPED):
        who = probes.ask(*ask, patience=0.5 if expected == DROPPED else 5).who
        assert (case.address, who) == (case.address, expected)
        return
    wanted = set(expected.split())
    # Endpoints have their turns, whoever asks.
    answers = [probes.ask(*ask) for _ in range(2 * len(wanted))]
    assert {each.who for each in answers} == wanted, case.address
    assert {each.client for each in answers} <= NODES
