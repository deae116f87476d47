"""ipvs mode on a kernel that has IPVS: what is there, what packets meet, what goes and stays."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import struct
import subprocess
import time
from collections.abc import Iterator

import pytest
from msgspec.structs import replace

import ipvs_golden as golden
from labs import small_lab
from netlab.datapath.services import ipvs as rendering
from netlab.datapath.services.iptables_save import differences
from netlab.datapath.state import (
    Balancing,
    BalancingUpdate,
    RealServer,
    Ruleset,
    VirtualServer,
    namespace_name,
)
from netlab.kernel import ipvs, xtables
from netlab.kernel.ipvs_messages import Key, finish
from netlab.kernel.namespaces import entered
from netlab.lab import lifecycle, record
from netlab.lab.edits import Changed
from netlab.problems import Exit, NetlabError
from netlab.topology.model import Lab, ProxyMode
from netlab.trace.aim import Request
from netlab.trace.model_steps import Ipvs
from netlab.trace.run import trace
from service_cases import CASES, Case, cluster_ip, external_ip
from service_probes import Probes, cases_up, check
from test_cli import netlab

pytestmark = [pytest.mark.kernel, pytest.mark.vm("ip_vs", "dummy")]

LAB = "ipvs-test"
DEVICE = rendering.DEVICE


def run(namespace: str | int, command: str) -> str:
    with entered(namespace):
        return subprocess.run(command.split(), check=True, capture_output=True, text=True).stdout


# -- One namespace -------------------------------------------------------------------------------

# Each has something that no other has; one follows the other in the same namespace.
STATES = (
    "clusterip", "dual-stack", "sctp", "external-ips", "loadbalancer-source-ranges",
    "etp-local-with-endpoint", "session-affinity", "scheduler-mh", "nodeport", "no-endpoints",
)  # fmt: skip


def test_what_is_loaded_is_what_kube_proxy_left_whatever_was_there_before(namespace: int) -> None:
    for state in STATES:
        wanted = rendering.render(*golden.golden_lab(state))
        assert ipvs.apply(namespace, wanted, LAB) == []
        xtables.restore(namespace, wanted.rules)
        servers = run(namespace, "ipvsadm-save -n").splitlines()
        assert sorted(servers) == sorted(golden.servers(state)), state
        sets = re.sub(r" initval \S+", "", run(namespace, "ipset save")).splitlines()
        assert sorted(sets) == sorted(golden.read(state, "ipset.txt").splitlines()), state
        told = run(namespace, f"ip -o addr show dev {DEVICE}")
        assert set(re.findall(r"inet6? (\S+)", told)) == golden.addresses(state), state
        for rendered, printed in zip(
            (wanted.rules.ipv4, wanted.rules.ipv6), xtables.save(namespace), strict=True
        ):
            assert differences(rendered, printed) == [], state
        assert not ipvs.differs(wanted, ipvs.present(namespace, DEVICE, LAB)), state
    link = run(namespace, f"ip -o link show {DEVICE}")
    assert "<BROADCAST,NOARP> mtu 1500" in link
    assert "state DOWN" in link
    routes = run(namespace, f"ip route show table local dev {DEVICE}")
    assert re.findall(r"local (\S+)", routes) == sorted(wanted.addresses)


def balancing(*real: str, protocol: str = "tcp", scheduler: str = "rr") -> Balancing:
    """One virtual server, 192.0.2.1:80, with these real ones at port 8000."""
    server = VirtualServer(
        protocol=protocol,
        address="192.0.2.1",
        port=80,
        scheduler=scheduler,
        real=tuple(RealServer(address=each, port=8000) for each in real),
    )
    return Balancing(
        device=DEVICE,
        addresses=("192.0.2.1",),
        servers=(server,),
        sets=(rendering.sets.ip_set("IPVS-IPS", 4, ("192.0.2.1",)),),
        rules=Ruleset(ipv4="", ipv6=""),
    )


def test_virtual_servers_of_others_stay(namespace: int) -> None:
    run(namespace, "ip link set lo up")  # before there is any address, none is unicast
    run(namespace, "ipvsadm -A -t 198.51.100.9:80 -s wrr")
    run(namespace, "ipvsadm -a -t 198.51.100.9:80 -r 10.0.0.9 -m -w 3")
    theirs = run(namespace, "ipvsadm-save -n")
    ipvs.apply(namespace, balancing("10.0.0.1"), LAB)
    assert set(theirs.splitlines()) < set(run(namespace, "ipvsadm-save -n").splitlines())
    assert not ipvs.differs(balancing("10.0.0.1"), ipvs.present(namespace, DEVICE, LAB))
    ipvs.remove(namespace, DEVICE, LAB)
    assert run(namespace, "ipvsadm-save -n") == theirs
    assert run(namespace, "ipset list -n") == ""
    assert DEVICE not in run(namespace, "ip link")


def test_a_foreign_device_is_an_error_and_stays(namespace: int) -> None:
    run(namespace, f"ip link add {DEVICE} type dummy")
    for attempt in (ipvs.apply, lambda *args: ipvs.present(args[0], DEVICE, LAB)):
        with pytest.raises(NetlabError) as caught:
            attempt(namespace, balancing(), LAB)
        assert caught.value.exit_code == Exit.MACHINE
        (problem,) = caught.value.problems
        assert problem.code == "foreign-device"
        assert DEVICE in problem.message
    assert DEVICE in run(namespace, "ip link")
    assert run(namespace, "ipvsadm-save -n") == ""


def test_a_scheduler_that_the_kernel_lacks_is_named_with_its_module(namespace: int) -> None:
    with pytest.raises(NetlabError) as caught:
        ipvs.apply(namespace, balancing(scheduler="nosuch"), LAB)
    (problem,) = caught.value.problems
    assert (problem.code, caught.value.exit_code) == ("missing-module", Exit.MACHINE)
    assert "ip_vs_nosuch" in problem.message


def test_another_scheduler_and_persistence_change_the_server_in_place(namespace: int) -> None:
    ipvs.apply(namespace, balancing("10.0.0.1", "10.0.0.2"), LAB)
    (server,) = balancing("10.0.0.1").servers
    changed = replace(server, scheduler="sh", persistent_s=90)
    update = BalancingUpdate(device=DEVICE, servers=(changed,))
    assert ipvs.change(namespace, update, LAB) == []
    assert run(namespace, "ipvsadm-save -n").splitlines() == [
        "-A -t 192.0.2.1:80 -s sh -p 90",
        "-a -t 192.0.2.1:80 -r 10.0.0.1:8000 -m -w 1",
    ]


# -- Graceful removal ----------------------------------------------------------------------------

KEY = Key("tcp", "192.0.2.1", 80)


@contextlib.contextmanager
def held(namespace: int) -> Iterator[socket.socket]:
    """A connection through the virtual server to 10.0.0.1, and a listener there."""
    run(namespace, "ip link set lo up")
    run(namespace, "ip address add 10.0.0.1/32 dev lo")
    with entered(namespace), socket.socket() as listener, socket.socket() as client:
        listener.bind(("10.0.0.1", 8000))
        listener.listen()
        client.settimeout(10)
        client.connect(("192.0.2.1", 80))
        connection, _ = listener.accept()
        with connection:
            yield client


def weights(namespace: int) -> dict[str, str]:
    return dict(re.findall(r"-r (\S+):8000 -m -w (\d+)", run(namespace, "ipvsadm-save -n")))


def test_a_real_server_of_tcp_keeps_its_connections(namespace: int) -> None:
    both, other = balancing("10.0.0.1", "10.0.0.2"), balancing("10.0.0.2")
    ipvs.apply(namespace, balancing("10.0.0.1"), LAB)
    with held(namespace) as client:
        draining = ipvs.apply(namespace, other, LAB)
        assert draining == [(KEY, "10.0.0.1", 8000)]
        assert weights(namespace) == {"10.0.0.1": "0", "10.0.0.2": "1"}
        assert not ipvs.differs(other, ipvs.present(namespace, DEVICE, LAB))
        assert client.send(b"it goes on") == 10
        # It comes back, and goes again.
        assert ipvs.apply(namespace, both, LAB) == []
        assert weights(namespace) == {"10.0.0.1": "1", "10.0.0.2": "1"}
        assert ipvs.change(
            namespace, BalancingUpdate(device=DEVICE, servers=other.servers), LAB
        ) == [(KEY, "10.0.0.1", 8000)]
        with entered(namespace):
            assert finish(draining) == draining
        assert weights(namespace) == {"10.0.0.1": "0", "10.0.0.2": "1"}
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    # IPVS remembers a connection that was reset for ten seconds, and tells nobody of its end.
    deadline = time.monotonic() + 30
    left = draining
    while left and time.monotonic() < deadline:
        time.sleep(0.5)
        with entered(namespace):
            left = finish(left)
    assert left == []
    assert weights(namespace) == {"10.0.0.2": "1"}


def test_a_real_server_that_has_a_weight_again_is_no_longer_waited_for(namespace: int) -> None:
    ipvs.apply(namespace, balancing("10.0.0.1"), LAB)
    with entered(namespace):
        assert finish([(KEY, "10.0.0.1", 8000)]) == []
    assert weights(namespace) == {"10.0.0.1": "1"}


# -- A lab ---------------------------------------------------------------------------------------


def in_mode(lab: Lab, mode: ProxyMode) -> Lab:
    return replace(lab, service_proxy=replace(lab.service_proxy, mode=mode))


def to_lab(lab: Lab) -> lifecycle.Outcome:
    return lifecycle.change(lab.name, lambda _: Changed(lab, ()))[1]


@pytest.fixture
def lab() -> Iterator[Lab]:
    made = in_mode(small_lab(), "ipvs")
    lifecycle.up(made)
    yield made
    lifecycle.down(made.name)


def everything(node: str) -> str:
    rules = (line for line in run(node, "iptables-save").splitlines() if "KUBE" in line)
    others = ("ipvsadm-save -n", "ipset list -n", "nft list tables")
    return "\n".join((*rules, *(run(node, command) for command in others)))


def test_a_second_up_changes_nothing_and_what_was_done_by_hand_is_repaired(lab: Lab) -> None:
    assert lifecycle.up(lab).changes == ()
    node = namespace_name(lab.name, "n1")
    before = run(node, "ipvsadm-save -n")
    run(node, "ipvsadm -D -t 10.99.0.1:80")
    run(node, "ipset flush KUBE-CLUSTER-IP")
    run(node, f"ip address del 10.99.0.1/32 dev {DEVICE}")
    assert [change.namespace for change in lifecycle.up(lab).changes] == [node]
    assert sorted(run(node, "ipvsadm-save -n").splitlines()) == sorted(before.splitlines())
    assert lifecycle.up(lab).changes == ()


def test_services_that_change_are_followed(lab: Lab) -> None:
    first, *others = lab.endpoints
    fewer = replace(lab, endpoints=(replace(first, endpoints=first.endpoints[:1]), *others))
    outcome = to_lab(fewer)
    assert {type(change.item) for change in outcome.changes} == {BalancingUpdate}
    assert lifecycle.up(record.read(lab.name) or fewer).changes == ()
    gone = replace(fewer, services=fewer.services[1:], endpoints=())
    to_lab(gone)
    assert "10.99.0.1" not in run(namespace_name(lab.name, "n1"), "ipvsadm-save -n")
    assert lifecycle.up(gone).changes == ()


@pytest.mark.parametrize("mode", ["iptables", "nftables-flat"])
def test_modes_leave_nothing_to_each_other(lab: Lab, mode: ProxyMode) -> None:
    node = namespace_name(lab.name, "n1")
    ours = everything(node)
    to_lab(in_mode(lab, mode))
    assert lifecycle.up(in_mode(lab, mode)).changes == ()
    theirs = everything(node)
    assert "-A -t" not in theirs
    assert "KUBE-IPVS" not in theirs
    assert "KUBE-CLUSTER-IP" not in theirs
    assert DEVICE not in run(node, "ip link")
    to_lab(lab)
    assert lifecycle.up(lab).changes == ()
    both = everything(node), ours
    # (tables of nf_tables that are empty remain)
    again, before = (sorted(re.sub(r"table .*\n", "", each).splitlines()) for each in both)
    assert again == before


def test_a_foreign_device_stops_up_before_anything_is_changed(lab: Lab) -> None:
    to_lab(in_mode(lab, "none"))
    node = namespace_name(lab.name, "n2")
    run(node, f"ip link add {DEVICE} type dummy")
    with pytest.raises(NetlabError) as caught:
        to_lab(lab)
    assert [each.code for each in caught.value.problems] == ["foreign-device"]
    assert run(namespace_name(lab.name, "n1"), "ipvsadm-save -n") == ""


def test_a_trace_tells_of_the_virtual_server(lab: Lab) -> None:
    found = trace(lab, Request(source="p0", destination="svc/web"))
    assert found.disposition == "delivered"
    assert found.prediction
    assert found.prediction.differs == []
    (translation,) = found.translations
    assert (translation.kind, translation.node, translation.rule) == ("ipvs", "n1", None)
    steps = [step for hop in found.forward for step in hop.steps]
    (chosen,) = [step for step in steps if isinstance(step, Ipvs)]
    assert (chosen.client, chosen.virtual) == (found.probe.source, translation.before)
    assert chosen.real == translation.after
    assert chosen.expires_s > 0
    kinds = [type(step).__name__ for step in steps]
    assert kinds.index("Ipvs") + 1 == kinds.index("Nat") < kinds.index("Conntrack")
    back = [str(step) for hop in found.reply for step in hop.steps]
    assert f"IPVS undone, source {translation.after} → {translation.before}" in back


@pytest.mark.parametrize("source", ["node/n1", "p1"])
def test_traces_from_other_places(lab: Lab, source: str) -> None:
    found = trace(lab, Request(source=source, destination="svc/web"))
    assert found.disposition == "delivered"
    assert found.prediction
    assert found.prediction.differs == []
    assert found.translations[0].kind == "ipvs"


@pytest.mark.parametrize(
    ("destination", "protocol", "reason", "words"),
    [
        ("svc/empty", "tcp", "no-endpoints", "the virtual server 10.99.0.2:80, which is empty"),
        ("10.99.0.1:81", "tcp", "no-such-port", "no virtual server is at 10.99.0.1:81"),
        ("10.99.0.1", "icmp", "no-such-port", "does not answer ping"),
    ],
)
def test_what_is_refused_is_told_of_the_service(
    lab: Lab, destination: str, protocol: str, reason: str, words: str
) -> None:
    found = trace(lab, Request(source="p0", destination=destination, protocol=protocol))
    assert found.drop
    assert (found.disposition, found.drop.reason) == ("rejected", reason)
    assert words in found.drop.explanation
    assert found.prediction
    assert found.prediction.differs == []


def test_rules_are_shown_and_all_is_there(lab: Lab) -> None:
    done = netlab("rules", "svc/web:http", "-o", "json", "--lab", lab.name)
    assert done.returncode == 0, done.stderr
    (node,) = json.loads(done.stdout)["nodes"]
    places = {rule["name"] for rule in node["rules"]}
    assert {"KUBE-SERVICES", "KUBE-CLUSTER-IP", "KUBE-IPVS-IPS", "virtual servers"} <= places
    assert {rule["state"] for rule in node["rules"]} == {"there"}


# -- What packets meet ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def probes() -> Iterator[Probes]:
    with cases_up("ipvs") as up:
        yield up


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_packets_to_services(probes: Probes, case: Case) -> None:
    check(probes, case)


@pytest.mark.parametrize("client", ["p0", "outside"])
def test_a_client_is_remembered_at_each_address_by_itself(probes: Probes, client: str) -> None:
    """IPVS keeps clients by virtual server; other modes by Service port, at all its addresses."""
    for address in (cluster_ip("sticky"), external_ip("sticky")):
        assert len({probes.ask(client, address).who for _ in range(8)}) == 1
