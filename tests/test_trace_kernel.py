"""Traces of real packets through real labs."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from netlab.kernel import frame_events, packet_sockets
from netlab.kernel.namespaces import entered
from netlab.kernel.socket_filter import equal
from netlab.problems import Exit, NetlabError
from netlab.topology.model import Lab
from netlab.trace import canary
from netlab.trace.aim import Request
from netlab.trace.model import Hop, Trace
from netlab.trace.model_steps import Bridge, Encapsulate, Rule
from netlab.trace.run import trace
from netlab.trace.witnesses import frames
from netlab.trace.witnesses.rules import Rules
from trace_labs import lab, namespace

pytestmark = pytest.mark.kernel

__all__ = ["lab"]


def run(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def in_node(lab: Lab, node: str, *words: str) -> str:
    return run("ip", "netns", "exec", namespace(lab, node), *words)


def iptables(lab: Lab) -> str:
    """The tool that loads the lab's rules."""
    return f"iptables-{lab.iptables_backend}" if lab.iptables_backend else "iptables"


def places(hops: list[Hop]) -> list[str]:
    """Where the packet was, in order, each place once in a row."""
    found: list[str] = []
    for hop in hops:
        name = hop.namespace.partition(":")[2]
        if found[-1:] != [name]:
            found.append(name)
    return found


def all_ok(found: Trace) -> bool:
    seen = found.witnesses
    return (seen.packets, seen.rules, seen.conntrack, seen.decisions) == ("ok",) * 4


def test_pod_to_a_service_on_the_other_node_and_back(lab: Lab) -> None:
    found = trace(lab, Request("p0", "svc/remote"))
    assert found.disposition == "delivered"
    assert all_ok(found)
    assert places(found.forward) == ["demo:p0", "n1", "_switch", "n2", "demo:p1"]
    assert places(found.reply) == ["demo:p1", "n2", "_switch", "n1", "demo:p0"]
    assert found.delivered_to is not None
    assert (found.delivered_to.name, found.delivered_to.port) == ("demo/p1", 8002)
    assert found.seen_source == found.probe.source
    assert [(step.kind, str(step.after)) for step in found.translations] == [
        ("dnat", "10.244.2.2:8002")
    ]
    assert found.forward[0].packet.flags == "S"
    assert found.reply[-1].packet.flags == "SA"
    assert str(found.reply[-1].packet.flow.source) == "10.99.0.1:80"
    chains = [s.chain for hop in found.forward for s in hop.steps if isinstance(s, Rule)]
    assert [chain[:9] for chain in chains[:4]] == [
        "PREROUTIN",
        "KUBE-SERV",
        "KUBE-SVC-",
        "KUBE-SEP-",
    ]
    tunnels = [s for hop in found.forward for s in hop.steps if isinstance(s, Encapsulate)]
    assert [(step.local, step.remote) for step in tunnels] == [("172.21.32.11", "172.21.32.12")]


def test_pod_to_a_service_on_its_own_node(lab: Lab) -> None:
    found = trace(lab, Request("p0", "svc/local"))
    assert found.disposition == "delivered"
    assert places(found.forward) == ["demo:p0", "n1", "demo:p2"]
    assert [str(step.after) for step in found.translations] == ["10.244.1.3:8002"]


def test_pod_to_itself_through_its_service_is_masqueraded(lab: Lab) -> None:
    found = trace(lab, Request("p0", "svc/itself"))
    assert found.disposition == "delivered"
    assert places(found.forward) == ["demo:p0", "n1", "demo:p0"]
    assert [step.kind for step in found.translations] == ["dnat", "masquerade"]
    assert found.seen_source is not None
    assert found.seen_source.ip == "10.244.1.1"
    assert "MASQUERADE" in (found.translations[1].rule or "")


def test_pod_to_pod_without_translation(lab: Lab) -> None:
    found = trace(lab, Request("p0", "p3"))
    assert found.disposition == "delivered"
    assert found.probe.destination.port == 8002
    assert found.translations == []
    assert places(found.forward) == ["demo:p0", "n1", "_switch", "n2", "demo:p3"]


def test_node_to_a_service_is_masqueraded_with_a_port_of_the_kernels_choice(lab: Lab) -> None:
    found = trace(lab, Request("node/n1", "svc/remote"))
    assert found.disposition == "delivered"
    assert [step.kind for step in found.translations] == ["dnat", "masquerade"]
    assert found.seen_source is not None
    assert found.seen_source.ip == "10.244.1.0"
    assert found.seen_source != found.probe.source
    assert places(found.forward) == ["n1", "_switch", "n2", "demo:p1"]
    # On the second node, too, the rules are those of this packet.
    assert any(isinstance(s, Rule) for hop in found.forward[-4:] for s in hop.steps)


def test_a_node_port_of_another_node_leads_back_masqueraded() -> None:
    """The way crosses the first node twice."""
    from netlab.lab import lifecycle
    from trace_labs import trace_lab

    made = trace_lab()
    services = tuple(
        replace(service, type="NodePort", ports=(replace(service.ports[0], node_port=30080),))
        if service.name == "local"
        else service
        for service in made.services
    )
    made = replace(made, services=services)
    try:
        lifecycle.up(made)
        found = trace(made, Request("p0", "node/n2:30080"))
    finally:
        lifecycle.down(made.name)
    assert found.disposition == "delivered"
    assert places(found.forward) == ["demo:p0", "n1", "_switch", "n2", "_switch", "n1", "demo:p2"]
    assert [(step.kind, step.node) for step in found.translations] == [
        ("dnat", "n2"),
        ("masquerade", "n2"),
    ]
    assert found.seen_source is not None
    assert found.seen_source.ip == "10.244.2.0"


@pytest.mark.parametrize(
    ("destination", "protocol"), [("svc/datagrams", "udp"), ("p1:8002", "udp"), ("p1", "icmp")]
)
def test_other_protocols_are_followed_too(lab: Lab, destination: str, protocol: str) -> None:
    wanted = None if destination.startswith("svc") else protocol
    found = trace(lab, Request("p0", destination, protocol=wanted))  # type: ignore[arg-type]
    assert found.disposition == "delivered"
    assert found.probe.protocol == protocol
    assert {hop.packet.protocol for hop in (*found.forward, *found.reply)} == {protocol}
    assert places(found.forward) == ["demo:p0", "n1", "_switch", "n2", "demo:p1"]
    assert places(found.reply) == ["demo:p1", "n2", "_switch", "n1", "demo:p0"]


def test_a_service_without_endpoints_rejects(lab: Lab) -> None:
    found = trace(lab, Request("p0", "svc/empty"))
    assert found.disposition == "rejected"
    assert found.drop is not None
    assert (found.drop.reason, found.drop.node) == ("no-endpoints", "n1")
    assert "demo/empty has no endpoints" in (found.drop.rule or "")
    assert found.reply[0].packet.icmp == "port-unreachable"


@pytest.mark.parametrize(("protocol", "answer"), [("tcp", "RA"), ("udp", "port-unreachable")])
def test_a_closed_port_rejects(lab: Lab, protocol: str, answer: str) -> None:
    found = trace(lab, Request("p0", "p1:99", protocol=protocol))  # type: ignore[arg-type]
    assert found.disposition == "rejected"
    assert found.drop is not None
    assert (found.drop.reason, found.drop.where) == ("port-closed", "pod demo/p1")
    first = found.reply[0]
    assert answer in (first.packet.flags, first.packet.icmp)
    assert places(found.reply)[-1] == "demo:p0"


@pytest.mark.parametrize(
    ("node", "rule", "direction"),
    [
        ("n1", ("FORWARD", "-d", "10.244.2.2", "-j", "DROP"), "forward"),
        ("n2", ("INPUT", "-p", "udp", "--dport", "8472", "-j", "DROP"), "forward"),
        ("n1", ("FORWARD", "-s", "10.244.2.2", "-j", "DROP"), "reply"),
    ],
)
def test_a_rule_that_drops_is_named(
    lab: Lab, node: str, rule: tuple[str, ...], direction: str
) -> None:
    in_node(lab, node, iptables(lab), "-I", *rule)
    found = trace(lab, Request("p0", "p1:8002", timeout_s=0.3))
    assert found.disposition == "dropped"
    assert found.drop is not None
    assert (found.drop.node, found.drop.direction) == (node, direction)
    assert found.drop.reason == "dropped-by-rule"
    assert (found.drop.rule or "").startswith(f"-A {rule[0]} ")
    assert (found.delivered_to is not None) == (direction == "reply")


def test_a_chains_policy_that_drops_is_named(lab: Lab) -> None:
    in_node(lab, "n1", iptables(lab), "-P", "FORWARD", "DROP")
    found = trace(lab, Request("p0", "p1:8002", timeout_s=0.3))
    assert found.drop is not None
    assert found.drop.rule == "-P FORWARD DROP"


def test_a_rule_of_nftables_own_is_named(lab: Lab) -> None:
    in_node(lab, "n1", "nft", "add table ip mine")
    in_node(lab, "n1", "nft", "add chain ip mine c { type filter hook forward priority 5; }")
    in_node(lab, "n1", "nft", 'add rule ip mine c tcp dport 8002 drop comment "not mine"')
    found = trace(lab, Request("p0", "p1:8002", timeout_s=0.3))
    assert found.drop is not None
    assert (found.drop.reason, found.drop.where) == (
        "dropped-by-rule",
        "chain c of table mine on node n1",
    )
    assert "tcp dport 8002 drop" in (found.drop.rule or "")


def test_a_missing_forwarding_entry_of_the_tunnel_is_named(lab: Lab) -> None:
    mac = in_node(lab, "n1", "bridge", "fdb", "show", "dev", "flannel.1").split()[0]
    in_node(lab, "n1", "bridge", "fdb", "del", mac, "dev", "flannel.1", "dst", "172.21.32.12")
    found = trace(lab, Request("p0", "svc/remote", timeout_s=0.3))
    assert found.disposition == "dropped"
    assert found.drop is not None
    assert (found.drop.reason, found.drop.node, found.drop.device) == (
        "fdb-missing",
        "n1",
        "flannel.1",
    )
    assert found.forward[-1].device == "flannel.1"


def _no_route(lab: Lab) -> None:
    in_node(lab, "n1", "ip", "route", "del", "10.244.2.0/24")


def _link_down(lab: Lab) -> None:
    run("ip", "-n", namespace(lab, "demo", "p1"), "link", "set", "eth0", "down")


def _tunnel_down(lab: Lab) -> None:
    in_node(lab, "n2", "ip", "link", "set", "flannel.1", "down")


def _neighbour_gone(lab: Lab) -> None:
    run("ip", "-n", namespace(lab, "demo", "p1"), "link", "set", "eth0", "arp", "off")
    in_node(lab, "n2", "ip", "neigh", "flush", "dev", "cbr0")


@pytest.mark.parametrize(
    ("break_it", "reason", "node"),
    [
        (_no_route, "no-route", "n1"),
        (_link_down, "link-down", "n2"),
        (_tunnel_down, "tunnel-closed", "n2"),
        (_neighbour_gone, "neighbour-unresolved", "n2"),
    ],
)
def test_other_ways_to_be_lost(
    lab: Lab, break_it: Callable[[Lab], None], reason: str, node: str
) -> None:
    break_it(lab)
    found = trace(lab, Request("p0", "p1:8002", timeout_s=0.3))
    assert found.disposition in ("dropped", "rejected")
    assert found.drop is not None
    assert (found.drop.reason, found.drop.node) == (reason, node)


def test_a_service_address_that_nobody_has(lab: Lab) -> None:
    found = trace(lab, Request("p0", "10.99.99.99:80", timeout_s=0.3))
    assert found.drop is not None
    assert found.drop.reason == "no-such-service"
    found = trace(lab, Request("p0", "10.99.0.1:81", timeout_s=0.3))
    assert found.drop is not None
    assert found.drop.reason == "no-such-port"


def test_a_flooding_bridge_adds_no_hops(lab: Lab) -> None:
    trace(lab, Request("p0", "p2:8002"))  # so that neighbours are known
    in_node(lab, "n1", "ip", "link", "set", "cbr0", "type", "bridge", "fdb_flush")
    found = trace(lab, Request("p0", "p2:8002"))
    assert found.disposition == "delivered"
    assert places(found.forward) == ["demo:p0", "n1", "demo:p2"]
    assert [hop.direction for hop in found.forward] == ["out", "in", "out", "in"]
    floods = [s.flooded for hop in found.forward for s in hop.steps if isinstance(s, Bridge)]
    assert floods == [True]


def test_concurrent_traffic_does_not_mix_in(lab: Lab) -> None:
    """Others' connections to the same Service, and a second trace, at the same time."""
    stop = threading.Event()

    def talk() -> None:
        # (At a rate that can be read however busy the machine is: several hundred a second.)
        while not stop.wait(0.002):
            with entered(namespace(lab, "demo", "p0")):
                other = socket.socket()
            with other:
                other.settimeout(5)
                other.connect(("10.99.0.1", 80))

    found: dict[str, list[Trace]] = {"p0": [], "p2": []}

    def follow(source: str) -> None:
        for _ in range(5):
            found[source].append(trace(lab, Request(source, "svc/remote")))

    talker = threading.Thread(target=talk)
    talker.start()
    followers = [threading.Thread(target=follow, args=(source,)) for source in found]
    for thread in followers:
        thread.start()
    for thread in followers:
        thread.join()
    stop.set()
    talker.join()
    for source, traces in found.items():
        assert len(traces) == 5
        for each in traces:
            assert each.disposition == "delivered", (each.drop, each.witnesses)
            assert places(each.forward) == [f"demo:{source}", "n1", "_switch", "n2", "demo:p1"]
            assert len(each.forward) == 12
            assert len(each.translations) == 1
            assert {hop.packet.sport for hop in each.forward} == {each.probe.source.port}


@pytest.mark.parametrize("have", [True, False], ids=["programs", "sockets"])
def test_frames_are_seen_by_programs_or_else_by_sockets(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, have: bool
) -> None:
    if have:
        try:
            frame_events.FrameEvents([[equal(12, 2, 0x0800)]]).close()
        except (OSError, KeyError, ValueError) as error:
            pytest.skip(f"this kernel takes no typed programs of frames: {error!r}")
        monkeypatch.setattr(frames, "Sockets", None)
    else:
        monkeypatch.setattr(frames, "Programs", _refused)
    for size in (None, 1400):
        found = trace(lab, Request("p0", "p1:8002", protocol="udp", size=size))
        assert found.witnesses.packets == "ok"
        assert places(found.forward) == ["demo:p0", "n1", "_switch", "n2", "demo:p1"]
        assert len(found.forward) == 12
        assert {hop.packet.length for hop in found.forward if not hop.packet.outer} == {size or 36}


def _refused(*_: object) -> None:
    raise PermissionError


def test_a_thousandth_of_the_descriptors_suffices(lab: Lab) -> None:
    trace(lab, Request("p0", "svc/remote"))
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(10):
        trace(lab, Request("p0", "svc/remote"))
    assert len(set(os.listdir("/proc/self/fd")) - before) <= 1  # the listing's own
    assert "netlab_trace" not in in_node(lab, "n1", "nft", "list", "tables")


def test_a_killed_trace_leaves_no_table(lab: Lab) -> None:
    """Killed while it waits for an answer, with everything armed."""
    in_node(lab, "n1", iptables(lab), "-I", "FORWARD", "-d", "10.244.2.2", "-j", "DROP")
    program = (
        "import sys; from netlab.topology.model import Lab; from netlab.trace import probe, run\n"
        "import msgspec; lab = msgspec.json.decode(sys.stdin.buffer.read(), type=Lab)\n"
        "send = probe.send\n"
        "def armed(*arguments):\n"
        "    print('armed', flush=True)\n"
        "    sys.stdin.close(); import signal; signal.pause()\n"
        "probe.send = armed\n"
        "run.trace(lab, run.Request('p0', 'p1:8002'))\n"
    )
    import msgspec

    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(msgspec.json.encode(lab))
        process.stdin.close()
        assert process.stdout.readline() == b"armed\n"
        assert "netlab_trace" in in_node(lab, "n1", "nft", "list", "tables")
        exited = os.pidfd_open(process.pid)
        process.send_signal(signal.SIGKILL)
        select.select([exited], [], [])
        os.close(exited)
        process.wait()
    assert "netlab_trace" not in in_node(lab, "n1", "nft", "list", "tables")


def test_a_blind_witness_makes_the_trace_unobserved(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(canary, "_PATIENCE_S", 0.01)
    read = Rules._read
    monkeypatch.setattr(
        Rules, "_read", lambda self, place: None if place.name == "n2" else read(self, place)
    )
    found = trace(lab, Request("p0", "svc/remote"))
    assert found.disposition == "unobserved"
    assert found.drop is not None
    assert found.drop.evidence[0] == "the rules witness did not see its canary in node n2"


def test_nodes_without_rules_track_nothing_and_that_is_no_blindness() -> None:
    from netlab.lab import lifecycle
    from trace_labs import trace_lab

    bare = trace_lab()
    bare = replace(bare, service_proxy=replace(bare.service_proxy, mode="none"))
    try:
        lifecycle.up(bare)
        found = trace(bare, Request("p0", "p1:8002"))
    finally:
        lifecycle.down(bare.name)
    assert found.disposition == "delivered"
    assert found.witnesses.conntrack == "unavailable: no rule asks for tracking on n1, n2"
    assert (found.witnesses.packets, found.witnesses.rules) == ("ok", "ok")


def test_a_lab_with_a_namespace_missing_is_an_error(lab: Lab) -> None:
    run("ip", "netns", "del", namespace(lab, "demo", "p1"))
    with pytest.raises(NetlabError) as raised:
        trace(lab, Request("p0", "svc/remote"))
    assert raised.value.exit_code == Exit.MACHINE
    assert [problem.code for problem in raised.value.problems] == ["namespace-missing"]
    assert "pod demo/p1" in str(raised.value)


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (Request("p9", "svc/remote"), "unknown-name"),
        (Request("p0", "svc/nothing"), "unknown-service"),
        (Request("svc/remote", "p0"), "bad-source"),
        (Request("10.244.9.9", "p0"), "bad-source"),
        (Request("p0", "p1", timeout_s=2.0), "timeout-too-long"),
        (Request("p0", "node/n1", protocol="tcp"), "port-needed"),
        (Request("p0", "224.0.0.1"), "not-unicast"),
        (Request("p0", "255.255.255.255"), "not-unicast"),
        (Request("p0", "0.0.0.0"), "not-unicast"),
        (Request("nod/n1", "p1"), "unknown-name"),  # nodes are in no namespace
    ],
)
def test_requests_that_cannot_be_meant(request_: Request, code: str) -> None:
    from trace_labs import trace_lab

    with pytest.raises(NetlabError) as raised:
        trace(trace_lab(), request_)
    assert raised.value.exit_code == Exit.USAGE
    assert [problem.code for problem in raised.value.problems] == [code]


def test_without_the_right_to_choose_a_sequence_number_udp_is_traced(lab: Lab) -> None:
    netlab = str(Path(sys.executable).parent / "netlab")
    without = ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", netlab, "trace"]
    words = [*without, "--lab", lab.name, "p0", "10.244.2.2:8002"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == Exit.MACHINE
    assert "error[not-permitted]" in done.stderr
    words += ["--protocol", "udp", "-o", "json"]
    found = json.loads(subprocess.run(words, capture_output=True, text=True).stdout)
    assert found["disposition"] == "delivered"
    assert found["witnesses"]["rules"].startswith("unavailable: ")


def test_without_the_right_to_raw_sockets_tcp_is_traced(lab: Lab) -> None:
    netlab = str(Path(sys.executable).parent / "netlab")
    without = ["setpriv", "--bounding-set=-net_raw", "--inh-caps=-net_raw", netlab, "trace"]
    words = [*without, "--lab", lab.name, "p0", "10.244.2.2:8002", "-o", "json"]
    found = json.loads(subprocess.run(words, capture_output=True, text=True).stdout)
    assert found["disposition"] in ("delivered", "unobserved")
    # Where packets are seen by a packet socket, that one is missing, and the others go on.
    assert (found["disposition"] == "delivered") is (found["witnesses"]["packets"] == "ok")
    assert found["witnesses"]["rules"] == "ok"
    done = subprocess.run([*words, "--protocol", "icmp"], capture_output=True, text=True)
    assert done.returncode == Exit.MACHINE
    assert "error[not-permitted]" in done.stderr
    assert "CAP_NET_RAW" in done.stderr


def test_the_answer_is_read_on_the_terminal_and_as_json(lab: Lab) -> None:
    netlab = str(Path(sys.executable).parent / "netlab")
    words = [netlab, "trace", "--lab", lab.name, "p0", "svc/remote"]
    told = subprocess.run(
        words, capture_output=True, text=True, env={**os.environ, "COLUMNS": "80"}, check=True
    )
    lines = told.stdout.splitlines()
    assert lines[0].startswith("✓ delivered: demo/p0 → svc/remote is demo/p1 on n2")
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in told.stdout
    assert "DNAT 10.99.0.1:80 → 10.244.2.2:8002" in told.stdout
    assert "DNAT undone, source 10.244.2.2:8002 → 10.99.0.1:80" in told.stdout
    as_json = subprocess.run([*words, "-o", "json"], capture_output=True, text=True, check=True)
    assert json.loads(as_json.stdout)["disposition"] == "delivered"
    assert as_json.stderr == ""
    words[-1] = "svc/empty"
    lost = subprocess.run(words, capture_output=True, text=True, check=False)
    assert lost.returncode == Exit.NO
    assert lost.stdout.startswith("✗ rejected: demo/p0 → svc/empty on n1, no endpoints")
    words[-1] = "svc/remot"
    wrong = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (wrong.returncode, wrong.stdout) == (Exit.USAGE, "")
    assert 'did you mean "remote"' in wrong.stderr


def test_an_overlay_port_of_ones_own_is_followed(lab: Lab) -> None:
    """Traces a lab whose VXLAN port is not the one that scapy expects."""
    from netlab.lab import lifecycle
    from trace_labs import trace_lab

    other = trace_lab()
    other = replace(other, overlay=replace(other.overlay, port=9999, vni=77))
    try:
        lifecycle.up(other)
        found = trace(other, Request("p0", "svc/remote"))
    finally:
        lifecycle.down(other.name)
    assert found.disposition == "delivered"
    outers = [hop.packet.outer for hop in found.forward if hop.packet.outer]
    assert {(outer.dport, outer.vni) for outer in outers} == {(9999, 77)}


def test_a_source_port_can_be_used_again_at_once(lab: Lab) -> None:
    for _ in range(3):
        found = trace(lab, Request("p0", "svc/remote", source_port=40123))
        assert found.disposition == "delivered"
        assert found.probe.source.port == 40123
        assert places(found.forward) == ["demo:p0", "n1", "_switch", "n2", "demo:p1"]


def test_frames_of_others_do_not_fill_the_buffer_before_the_filter_is_there(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    attach = packet_sockets.attach

    def late(tap: socket.socket, program: bytes) -> None:
        with entered(namespace(lab, "n1")), socket.socket(type=socket.SOCK_DGRAM) as other:
            for _ in range(500):  # three times what a buffer of the usual size holds
                other.sendto(bytes(1000), ("127.0.0.1", 9))
        attach(tap, program)

    monkeypatch.setattr(packet_sockets, "attach", late)
    assert trace(lab, Request("p0", "svc/remote")).witnesses.packets == "ok"
