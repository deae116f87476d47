"""Faults: each is injected, traced, and cleared, after which the trace is delivered."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from msgspec.structs import replace

from labs import small_lab
from netlab.cli.main import netlab
from netlab.cli.trace import trace as trace_command
from netlab.datapath.build import build
from netlab.datapath.faults import FAULTS, faulty, lasting, trace_of, without_faults
from netlab.kernel.namespaces import entered
from netlab.lab import events, faults, lifecycle, record
from netlab.lab.faults import Wanted
from netlab.lab.undone import undone
from netlab.problems import NetlabError
from netlab.topology.load import load
from netlab.topology.model import Fault, Lab, Service
from netlab.trace.aim import Request
from netlab.trace.model import Trace
from netlab.trace.run import trace
from trace_labs import namespace, trace_lab

kernel = pytest.mark.kernel
MODES = ("iptables", "iptables-legacy", "nftables")


def fault_lab(mode: str = "iptables") -> Lab:
    """A lab into which every fault fits but one, which needs somebody outside."""

    def more(service: Service) -> Service:
        if service.name == "local":
            ports = (replace(service.ports[0], node_port=30080),)
            return replace(service, type="NodePort", ports=ports)
        if service.name == "remote":
            return replace(service, type="LoadBalancer", load_balancer_ips=("203.0.113.7",))
        return service

    made = trace_lab()
    if mode == "iptables-legacy":
        mode, made = "iptables", replace(made, iptables_backend="legacy")
    proxy = replace(made.service_proxy, mode=mode)  # type: ignore[arg-type]
    return replace(made, services=tuple(map(more, made.services)), service_proxy=proxy)


@pytest.fixture(scope="module", params=MODES)
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    made = fault_lab(request.param)
    try:
        lifecycle.up(made)
        yield made
    finally:
        lifecycle.down(made.name)


def traced(lab: Lab, fault: Fault) -> Trace:
    """What the trace tells that a fault names, as the command would have it."""
    context = trace_command.make_context("trace", trace_of(lab, fault))
    asked = Request.__struct_fields__
    given = {
        name: value for name, value in context.params.items() if name in asked and value is not None
    }
    return trace(faulty(lab), Request(**{"timeout_s": 0.3, **given}), declared=lab)


def declared(lab: Lab) -> Lab:
    found = record.read(lab.name)
    assert found is not None
    return found


# Disposition, reason, node (of p0's node n1 and p1's node n2), and what the words say.
EXPECTED = {
    "rp-filter": ("dropped", "reverse-path", "n1", "rp_filter=2"),
    "neighbour-unresolved": ("dropped", "neighbour-unresolved", "n1", "neigh replace 10.244.2.0"),
    "wrong-vtep": ("rejected", "fdb-wrong", "n1", "fdb replace"),
    "wrong-vni": ("dropped", "vni-unknown", "n2", "node n1 sent it with VNI 99"),
    "underlay-port-blocked": ("dropped", "underlay-blocked", None, "UDP port 8472"),
    "small-mtu": ("rejected", "mtu", "n1", "flannel.1 takes 1350"),
    "source-range": ("dropped", "dropped-by-rule", "n1", "add the source to loadBalancerSource"),
    "missing-masquerade": ("dropped", "not-masqueraded", "n2", "let node n2 masquerade"),
    "bridge-nf-off": ("dropped", "bridge-netfilter-off", "n2", "bridge-nf-call-iptables=1"),
    "stale-conntrack": ("dropped", "stale-conntrack", "n1", "conntrack -D -p tcp --orig-src"),
    "conntrack-full": ("dropped", "conntrack-full", "n1", "nf_conntrack_max="),
    "conntrack-invalid": ("dropped", "conntrack-invalid", "n1", "delete rule ip netlab-fault-"),
    "wrong-listen-address": ("rejected", "port-closed", "n1", "on 127.0.0.1 alone"),
    "accept-queue-full": ("dropped", "accept-queue-full", "n1", "its queue is full"),
    "ttl": ("rejected", "ttl", "n1", "net.ipv4.ip_default_ttl=64"),
    "martian": ("dropped", "martian", "n1", "has the address 10.244.2.2 itself"),
    "arp-ignored": ("dropped", "arp-ignored", "n1", "net.ipv4.conf.all.arp_ignore=0"),
    "hairpin-off": ("dropped", "hairpin-off", "n2", "hairpin on"),
    "no-route": ("dropped", "no-route", "n1", "has no route for 10.244.2.2"),
    "forwarding-off": ("dropped", "forwarding-off", "n1", "net.ipv4.ip_forward=1"),
    "fdb-missing": ("dropped", "fdb-missing", "n1", "fdb replace"),
    "link-down": ("dropped", "link-down", "n1", "link set veth"),
    "policy-drop": ("dropped", "dropped-by-rule", "n1", "policy is to drop"),
    "no-endpoints": ("rejected", "no-endpoints", "n1", "has no ready endpoint"),
    "remote-only-local-policy": ("dropped", "no-local-endpoints", "n1", "policy to Cluster"),
    "port-closed": ("rejected", "port-closed", "n1", "nothing listens on TCP port 8002"),
    "icmp-filtered": ("dropped", "dropped-by-rule", "n1", "nft delete rule ip netlab-fault-"),
}


# The object that a trace says is not as declared.
OTHERWISE = {
    "no-route": "node n1's route to 10.244.2.2: 10.244.2.2 matches 0.0.0.0/0",
    "forwarding-off": "forwarding on node n1 is off",
    "rp-filter": "node n1's route back to 10.244.2.2 is not that by which this came",
    "neighbour-unresolved": "node n1's neighbour entry for node n2's tunnel end, 10.244.2.0",
    "fdb-missing": "node n1's FDB entry for node n2, 0e:23:f5:f5:ae:55 on flannel.1, is missing",
    "wrong-vtep": "node n1's FDB entry for node n2, 0e:23:f5:f5:ae:55 on flannel.1, leads to 192.",
    "wrong-vni": "flannel.1 of node n1 is of VNI 99; declared is 1",
    "underlay-port-blocked": "the network between the nodes",
    "link-down": "a link (behind flannel.1 of node n1): it should have been delivered",
    "small-mtu": "the MTU of a link (at node n1; declared are 1450 bytes on flannel.1 of node n1)",
    "policy-drop": "a rule (at chain forward of table netlab-fault-policy-drop on node n1)",
    "source-range": "a rule (at chain",
    "no-endpoints": "the rules' set of endpoints (at chain",
    "remote-only-local-policy": "the rules' set of endpoints (at chain",
    "missing-masquerade": "masquerading (at node n2): it should have been delivered",
    "bridge-nf-off": "bridge netfilter (at node n2): it should have been delivered",
    "stale-conntrack": "node n1 sent it to 10.244.2.254:8002; declared are 10.244.2.2:8002",
    "conntrack-full": "what connection tracking has room for (",
    "conntrack-invalid": "what connection tracking knows (at chain",
    "port-closed": "what listens (at pod demo/p0): it should have been delivered",
    "wrong-listen-address": "what listens (at pod demo/p0): it should have been delivered",
    "accept-queue-full": "what listens (at eth0 of pod demo/p0)",
    "icmp-filtered": "a rule (at chain forward of table netlab-fault-icmp-filtered on node n1)",
    "ttl": "the TTL that packets begin with (at node n1): it should",
    "martian": "node n1's route to 10.244.1.2: no packet",
    "arp-ignored": "the answer to ARP (behind",
    "hairpin-off": "hairpin mode of a bridge port (",
}

# What is in sockets, connections and sysctls that a lab has no word for is no difference to it.
UNSEEN = (
    "port-closed",
    "wrong-listen-address",
    "accept-queue-full",
    "stale-conntrack",
    "conntrack-full",
    "ttl",
    "arp-ignored",
)
# Those that fit into the lab of this file.
FITTING = [name for name in FAULTS if name != "source-port-race"]
# Those that every kernel can have; tests of the others are in test_trace_second_kernel.py.
EVERYWHERE = [name for name, kind in FAULTS.items() if not kind.feature]


@kernel
@pytest.mark.parametrize("name", EVERYWHERE)
def test_a_fault_is_found_and_cleared(lab: Lab, name: str) -> None:
    changed, _ = lifecycle.change(lab.name, lambda lab: faults.inject(lab, name))
    (fault,) = changed.lab.faults
    try:
        found = traced(changed.lab, fault)
        assert lifecycle.differences(changed.lab) == []
        assert lifecycle.differences(lab) or name in UNSEEN
    finally:
        lifecycle.change(lab.name, lambda lab: faults.clear(lab, name))
    assert found.drop is not None
    said = f"{found.drop.explanation} | {found.drop.fix}"
    disposition, reason, node, words = EXPECTED[name]
    assert (found.disposition, found.drop.reason, found.drop.node) == (disposition, reason, node)
    assert words in said
    assert found.drop.fix
    assert found.prediction is not None
    assert found.prediction.disposition == "delivered"
    assert OTHERWISE[name] in found.prediction.differs[0]
    assert found.drop.explanation not in found.prediction.differs[0]
    assert declared(lab) == lab
    assert lifecycle.differences(lab) == []
    cleared = traced(lab, fault)
    assert cleared.disposition == "delivered"
    assert cleared.prediction is not None
    assert cleared.prediction.differs == []


@kernel
def test_up_repairs_what_faults_broke(lab: Lab) -> None:
    names = ("ttl", "arp-ignored", "policy-drop", "underlay-port-blocked", "link-down")
    for name in names:
        lifecycle.change(lab.name, lambda lab, name=name: faults.inject(lab, name))  # type: ignore[misc]
    assert [fault.name for fault in declared(lab).faults] == list(names)
    lifecycle.change(lab.name, lambda lab: faults.clear(lab, "policy-drop"))
    assert [fault.name for fault in declared(lab).faults] == [n for n in names if n != names[2]]
    outcome = lifecycle.up(lab)
    assert len(outcome.changes) == 4
    assert undone(outcome.before, lab) == [f"fault/{n} injected" for n in names if n != names[2]]
    assert declared(lab).faults == ()
    assert lifecycle.up(lab).changes == ()


@kernel
def test_the_commands(lab: Lab) -> None:
    def run(*words: str, code: int = 0) -> tuple[str, str]:
        done = CliRunner().invoke(netlab, ["fault", *words, "--lab", lab.name])
        if done.exception and not isinstance(done.exception, SystemExit | NetlabError):
            raise done.exception
        if code:
            assert isinstance(done.exception, NetlabError)
            assert done.exception.exit_code == code
            return "", " ".join(map(str, done.exception.problems))
        return done.stdout, done.stderr

    out, err = run("inject", "no-route", "--node", "n2")
    assert out.startswith("no-route on node n2, from pod demo/p1 to pod demo/p0")
    assert "netlab trace demo/p1 demo/p0:8002" in err
    assert "no-route (injected)" in run("list")[0]
    assert "already" in run("inject", "no-route", code=2)[1]
    assert "no-rout" in run("inject", "no-rout", code=2)[1]
    assert "unknown-pod" in run("inject", "fdb-missing", "--pod", "demo/x", code=2)[1]
    assert run("clear", "no-route")[0].startswith("cleared: no-route on node n2")
    run("clear", "no-route", code=2)
    out, _ = run("inject", "--random", "--seed", "7")
    assert out == "something is wrong now\n"
    listed = json.loads(run("list", "-o", "json")[0])
    assert listed["hidden"] == 1
    assert not any(each["injected"] for each in listed["faults"])
    assert "met by netlab trace" in run("reveal")[0]
    assert json.loads(run("list", "-o", "json")[0])["hidden"] == 0
    run("clear")
    assert declared(lab) == lab


@kernel
@pytest.mark.parametrize("name", ["link-down", "arp-ignored", "stale-conntrack", "hairpin-off"])
def test_between_pods_of_one_node(name: str) -> None:
    made = small_lab(nodes=1, pods=2)
    reason = EXPECTED[name][1]
    try:
        lifecycle.up(made)
        changed, _ = lifecycle.change(made.name, lambda lab: faults.inject(lab, name))
        found = traced(changed.lab, changed.lab.faults[0])
        assert found.drop is not None
        assert (found.drop.reason, found.drop.node) == (reason, "n1")
        assert found.drop.fix
    finally:
        lifecycle.down(made.name)


@kernel
def test_killed_in_the_middle(lab: Lab) -> None:
    code = "from netlab.cli.main import main; main()"
    command = [sys.executable, "-c", code, "fault", "inject", "ttl", "--lab", lab.name]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        while record.is_settled(lab.name) and process.poll() is None:
            time.sleep(0.001)
        process.kill()
    lifecycle.change(lab.name, faults.clear)
    assert declared(lab) == lab
    assert lifecycle.differences(lab) == []
    with entered(namespace(lab, "demo", "p0")), open("/proc/sys/net/ipv4/ip_default_ttl") as ttl:
        assert ttl.read() == "64\n"


@kernel
def test_who_watches_hears_of_it(lab: Lab) -> None:
    """A service proxy of one's own is to have the fault, too."""

    def endpoints(seen: Lab | None) -> int:
        assert seen is not None
        ends = [each for each in seen.endpoints if each.service == "remote"]
        return sum(end.ready for each in ends for end in each.endpoints)

    watch = events.follow(lab.name)
    try:
        assert endpoints(next(watch)) == 1
        lifecycle.change(lab.name, lambda lab: faults.inject(lab, "no-endpoints"))
        assert endpoints(next(watch)) == 0
    finally:
        watch.close()  # type: ignore[attr-defined]
        lifecycle.change(lab.name, faults.clear)


def test_the_same_seed_gives_the_same_fault() -> None:
    made = fault_lab()
    first = [faults.inject_any(made, seed).lab.faults for seed in range(40)]
    assert first == [faults.inject_any(made, seed).lab.faults for seed in range(40)]
    assert all(fault.hidden for (fault,) in first)
    assert len({fault.name for (fault,) in first}) > len(FAULTS) / 2
    everything = made
    has = {kind.feature for kind in FAULTS.values()}
    for _ in FITTING:
        everything = faults.inject_any(everything, features=has).lab
    assert {fault.name for fault in everything.faults} == set(FITTING)
    with pytest.raises(NetlabError, match="no fault fits"):
        faults.inject_any(everything, features=has)
    assert all(not FAULTS[faults.inject_any(made, n).lab.faults[0].name].feature for n in range(40))


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_changes_what_the_lab_should_hold_and_nothing_of_what_it_declares(
    name: str,
) -> None:
    made = fault_lab() if name in FITTING else load("egress").lab
    changed = faults.inject(made, name).lab
    assert replace(changed, faults=()) == made
    assert build(changed) != build(made)
    assert faulty(faulty(changed)) == faulty(changed)
    assert faults.clear(changed, name).lab == made
    assert without_faults(build(made), None) == build(made)


def test_the_page_tells_of_every_fault() -> None:
    page = (Path(__file__).parents[1] / "docs" / "faults.md").read_text()
    for name, kind in FAULTS.items():
        assert f"| `{name}` | {kind.sentence} | {kind.needs} |" in page


def test_a_fault_is_put_where_it_is_wanted() -> None:
    made = fault_lab()
    (fault,) = faults.inject(made, "link-down", Wanted(pod="p3")).lab.faults
    assert (fault.node, fault.server) == ("n2", "demo/p3")
    (fault,) = faults.inject(made, "no-endpoints", Wanted(service="datagrams")).lab.faults
    assert fault.service == "demo/datagrams"
    with pytest.raises(NetlabError, match="needs overlay vxlan"):
        faults.inject(small_lab(overlay="host-gw"), "fdb-missing")
    with pytest.raises(NetlabError, match="cannot be injected"):
        faults.inject(small_lab(nodes=1), "no-route")


def test_a_fault_goes_with_what_it_is_in() -> None:
    made = fault_lab()
    (fault,) = faults.inject(made, "link-down", Wanted(pod="p3")).lab.faults
    assert lasting(replace(made, faults=(fault,))) == (fault,)
    assert lasting(replace(made, pods=made.pods[:3], faults=(fault,))) == ()
