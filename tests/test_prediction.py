"""What the declared lab alone says of a probe, without a kernel and without root."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner
from msgspec.structs import replace

from labs import dual_stack_lab, ipv6_lab, small_lab
from netlab.cli.main import netlab
from netlab.problems import NetlabError
from netlab.topology.model import ConntrackProxy, Lab, Pod, ProxyMode
from netlab.topology.overlays import KINDS
from netlab.trace.aim import Request
from netlab.trace.model import PredictedHop, Prediction
from netlab.trace.prediction import foretell
from service_cases import CASES, DROPPED, REFUSED, Case, cases_lab, node_port
from trace_labs import trace_lab

MODES: tuple[ProxyMode, ...] = ("iptables", "nftables", "nftables-flat", "ipvs")


def predicted(lab: Lab, source: str, destination: str, **more: object) -> Prediction:
    return foretell(lab, Request(source, destination, **more)).prediction  # type: ignore[arg-type]


def with_mode(lab: Lab, mode: ProxyMode) -> Lab:
    return replace(lab, service_proxy=replace(lab.service_proxy, mode=mode))


def way(hops: list[PredictedHop]) -> list[str]:
    """A line for each hop: place, device and direction, and the ends."""
    return [
        f"{hop.namespace.partition(':')[2]} {hop.device} {hop.direction} "
        f"{hop.source} > {hop.destination}{f' in {hop.outer}' if hop.outer else ''}"
        f"{'' if hop.sure else ' ?'}"
        for hop in hops
    ]


# --- ways ----------------------------------------------------------------------------------------


def test_pod_to_pod_of_its_node_stays_on_the_bridge() -> None:
    found = predicted(small_lab(), "p0", "p2")
    assert (found.disposition, found.reason) == ("delivered", None)
    assert way(found.forward) == [
        "demo:p0 eth0 out 10.244.1.2 > 10.244.1.3:8002",
        "n1 vethb808edd8 in 10.244.1.2 > 10.244.1.3:8002",
        "n1 veth1779d5f1 out 10.244.1.2 > 10.244.1.3:8002",
        "demo:p2 eth0 in 10.244.1.2 > 10.244.1.3:8002",
    ]
    assert way(found.reply) == [
        "demo:p2 eth0 out 10.244.1.3:8002 > 10.244.1.2",
        "n1 veth1779d5f1 in 10.244.1.3:8002 > 10.244.1.2",
        "n1 vethb808edd8 out 10.244.1.3:8002 > 10.244.1.2",
        "demo:p0 eth0 in 10.244.1.3:8002 > 10.244.1.2",
    ]


def test_pod_to_a_service_on_another_node_over_vxlan() -> None:
    found = predicted(trace_lab(), "p0", "svc/remote")
    tunnel = " in 172.21.32.11 → 172.21.32.12 VNI 1"
    assert way(found.forward) == [
        "demo:p0 eth0 out 10.244.1.2 > 10.99.0.1:80",
        "n1 vethb808edd8 in 10.244.1.2 > 10.99.0.1:80",
        "n1 cbr0 in 10.244.1.2 > 10.244.2.2:8002",
        "n1 flannel.1 out 10.244.1.2 > 10.244.2.2:8002",
        f"n1 eth0 out 10.244.1.2 > 10.244.2.2:8002{tunnel}",
        f"_switch n1 in 10.244.1.2 > 10.244.2.2:8002{tunnel}",
        f"_switch n2 out 10.244.1.2 > 10.244.2.2:8002{tunnel}",
        f"n2 eth0 in 10.244.1.2 > 10.244.2.2:8002{tunnel}",
        "n2 flannel.1 in 10.244.1.2 > 10.244.2.2:8002",
        "n2 cbr0 out 10.244.1.2 > 10.244.2.2:8002",
        "n2 veth283aa26a out 10.244.1.2 > 10.244.2.2:8002",
        "demo:p1 eth0 in 10.244.1.2 > 10.244.2.2:8002",
    ]
    assert way(found.reply)[-2:] == [
        "n1 vethb808edd8 out 10.99.0.1:80 > 10.244.1.2",
        "demo:p0 eth0 in 10.99.0.1:80 > 10.244.1.2",
    ]
    assert [str(each.after) for each in found.translations] == ["10.244.2.2:8002"]


def test_host_gw_has_no_tunnel() -> None:
    found = predicted(small_lab(overlay="host-gw"), "node/n1", "p1")
    assert way(found.forward) == [
        "n1 eth0 out 172.21.32.11 > 10.244.2.2:8002",
        "_switch n1 in 172.21.32.11 > 10.244.2.2:8002",
        "_switch n2 out 172.21.32.11 > 10.244.2.2:8002",
        "n2 eth0 in 172.21.32.11 > 10.244.2.2:8002",
        "n2 cbr0 out 172.21.32.11 > 10.244.2.2:8002",
        "n2 veth283aa26a out 172.21.32.11 > 10.244.2.2:8002",
        "demo:p1 eth0 in 172.21.32.11 > 10.244.2.2:8002",
    ]


def test_ipv6_has_a_tunnel_of_its_own() -> None:
    found = predicted(dual_stack_lab(trace_lab()), "node/n1", "svc/remote", family=6)
    assert way(found.forward)[:2] == [
        "n1 flannel-v6.1 out fd00:10:244:1:: > [fd00:10:244:2::2]:8002",
        "n1 eth0 out fd00:10:244:1:: > [fd00:10:244:2::2]:8002 "
        "in fd00:172:21:32::b → fd00:172:21:32::c VNI 1",
    ]
    assert [each.kind for each in found.translations] == ["dnat", "masquerade"]


def test_a_pod_reaches_itself_masqueraded_and_past_the_bridge_perhaps() -> None:
    found = predicted(trace_lab(), "p0", "svc/itself")
    assert found.seen_source is not None
    assert str(found.seen_source) == "10.244.1.1"
    assert way(found.forward)[1:] == [
        "n1 vethb808edd8 in 10.244.1.2 > 10.99.0.3:80",
        "n1 cbr0 out 10.244.1.1 > 10.244.1.2:8002 ?",
        "n1 vethb808edd8 out 10.244.1.1 > 10.244.1.2:8002",
        "demo:p0 eth0 in 10.244.1.1 > 10.244.1.2:8002",
    ]
    assert way(found.reply)[-1] == "demo:p0 eth0 in 10.99.0.3:80 > 10.244.1.2"


def test_nobody_routes_outside() -> None:
    found = predicted(small_lab(), "p0", "192.0.2.1")
    assert (found.disposition, found.reason) == ("dropped", "outside-lab")
    assert way(found.forward)[-1] == "_switch br0 in 10.244.1.2 > 192.0.2.1"
    # The switch knows the way to a node, and tells it.
    found = predicted(small_lab(), "node/n1", "192.0.2.1")
    assert (found.disposition, found.reason, found.limited) == ("rejected", "no-route", True)
    assert found.reason_unsaid == "outside-lab"


# --- verdicts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("destination", "more", "expected"),
    [
        ("p1:99", {}, ("rejected", "port-closed", "pod demo/p1")),
        ("p1:99", {"protocol": "udp"}, ("rejected", "port-closed", "pod demo/p1")),
        ("p1", {"protocol": "icmp"}, ("delivered", None, None)),
        ("node/n2:80", {}, ("rejected", "port-closed", "node n2")),
        ("10.244.2.77", {}, ("dropped", "neighbour-unresolved", "node n2")),
        ("10.244.1.77", {}, ("dropped", "neighbour-unresolved", "pod demo/p0")),
        ("10.99.0.1", {"protocol": "icmp"}, ("dropped", "no-such-port", "the underlay switch")),
        ("10.99.0.1:81", {}, ("dropped", "no-such-port", "the underlay switch")),
        ("10.99.9.9:80", {}, ("dropped", "no-such-service", "the underlay switch")),
        ("svc/empty", {}, ("rejected", "no-endpoints", "node n1")),
    ],
)
def test_what_stops_a_probe(destination: str, more: dict[str, str], expected: object) -> None:
    found = predicted(trace_lab(), "p0", destination, **more)
    assert (found.disposition, found.reason, found.where) == expected


@pytest.mark.parametrize("mode", MODES[1:3])
def test_nftables_modes_refuse_what_is_no_service(mode: ProxyMode) -> None:
    lab = with_mode(trace_lab(), mode)
    found = predicted(lab, "p0", "10.99.0.1:81")
    assert (found.disposition, found.reason, found.where) == ("rejected", "no-such-port", "node n1")
    found = predicted(lab, "node/n1", "10.99.9.9:80")
    assert (found.disposition, found.reason) == ("dropped", "no-such-service")


def test_without_a_proxy_nothing_is_translated() -> None:
    found = predicted(with_mode(trace_lab(), "none"), "p0", "svc/remote")
    assert (found.disposition, found.reason) == ("dropped", "not-translated")
    assert found.endpoints == []


def test_an_answer_that_passes_by_is_dropped_where_its_mode_says() -> None:
    """A pod asks another node's NodePort under policy Local, and the endpoint is on a third."""
    lab = small_lab(nodes=3, pods=3)
    web = replace(
        lab.services[0],
        type="NodePort",
        external_traffic_policy="Local",
        ports=(replace(lab.services[0].ports[0], node_port=30080),),
    )
    ends = replace(lab.endpoints[0], endpoints=lab.endpoints[0].endpoints[1:])
    lab = replace(lab, services=(web,), endpoints=(ends,))
    found = predicted(lab, "p0", "172.21.32.12:30080")
    assert (found.reason, found.where) == ("conntrack-invalid", "node n1")
    liberal = replace(lab.service_proxy, conntrack=ConntrackProxy(tcpBeLiberal=True))
    found = predicted(replace(lab, service_proxy=liberal), "p0", "172.21.32.12:30080")
    assert (found.reason, found.where) == ("not-masqueraded", "pod demo/p0")
    found = predicted(with_mode(lab, "nftables"), "p0", "172.21.32.12:30080")
    assert (found.reason, found.where) == ("not-masqueraded", "pod demo/p0")


def test_faults_are_not_part_of_what_is_declared() -> None:
    from netlab.lab import faults

    lab = trace_lab("broken")
    broken = faults.inject(lab, "fdb-missing").lab
    assert broken.faults
    assert predicted(broken, "p0", "svc/remote") == predicted(lab, "p0", "svc/remote")


CLIENTS = [case for case in CASES if case.client != "outside"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CLIENTS, ids=lambda case: case.name)
def test_services_are_chosen_as_in_the_table_of_cases(case: Case, mode: ProxyMode) -> None:
    """The table that each mode's rules are held to on the kernel."""
    lab = with_mode(cases_lab(), mode)
    for each in case.of_both_families():
        _holds(lab, each, each.of(mode))


def _holds(lab: Lab, case: Case, expected: str | None) -> None:
    source = case.client if case.client.startswith("p") else f"node/{case.client}"
    address = f"[{case.address}]" if ":" in case.address else case.address
    to = f"{address}:{case.port}"
    found = predicted(lab, source, to, protocol=case.protocol.lower())
    ways = [found, *found.others]
    if expected is None:
        assert not found.translations
        assert found.disposition != "delivered"
        return
    if expected in (REFUSED, DROPPED):
        disposition = "rejected" if expected == REFUSED else "dropped"
        assert {each.disposition for each in ways} == {disposition}
        return
    assert sorted(end.name for end in found.endpoints) == [f"demo/{p}" for p in expected.split()]
    assert [each.delivered_to for each in ways] == found.endpoints
    told = case.seen_in(lab.service_proxy.mode)
    if told == "asked":
        assert {each.seen_source.ip for each in ways if each.seen_source} == {case.address}
    elif told:
        own = {each for pod in lab.pods if pod.name == case.client for each in pod.addresses}
        own |= {each for node in lab.nodes if node.name == case.client for each in node.addresses}
        for each in ways:
            assert each.seen_source is not None
            assert each.delivered_to is not None
            # Who reaches itself is masqueraded in any case.
            itself = each.delivered_to.name == f"demo/{case.client}"
            assert (each.seen_source.ip in own) is (told == "own" and not itself)


def test_each_endpoint_has_a_way() -> None:
    lab = cases_lab()
    found = predicted(lab, "node/n1", f"172.21.32.12:{node_port('cluster')}")
    assert [end.name for end in found.endpoints] == ["demo/p2", "demo/p1", "demo/p3"]
    assert [each.translations[-1].after.ip for each in (found, *found.others)] == [
        "10.244.2.0",
        "10.244.2.1",
        "10.244.2.1",
    ]


def test_a_pod_of_the_host_network_is_its_node() -> None:
    lab = small_lab()
    agent = Pod(
        namespace="demo",
        name="agent",
        node="n2",
        address="172.21.32.12",
        listen=(("TCP", 9100),),
        host_network=True,
    )
    lab = replace(lab, pods=(*lab.pods, agent))
    found = predicted(lab, "p0", "agent:9100")
    assert found.delivered_to is not None
    assert (found.delivered_to.kind, found.delivered_to.name) == ("node", "n2")


def test_what_is_not_predicted_is_said() -> None:
    with pytest.raises(NetlabError) as error:
        predicted(ipv6_lab(small_lab()), "p0", "fd00:10:244:2::")
    assert error.value.problems[0].code == "not-predicted"


# --- the command ---------------------------------------------------------------------------------


def test_the_command_tells_the_tree_of_a_topology_that_is_not_up() -> None:
    words = ["trace", "pod1", "svc/mysql", "--predict", "--topology", "two-node-vxlan"]
    done = CliRunner().invoke(netlab, words)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].startswith("should be delivered: demo/pod1 → svc/mysql, to pod demo/mysql-85")
    assert "│   └── 3 cbr0 out  10.244.1.2 → 10.244.1.3:3306 → 4 veth46c4c4d2 out" in lines
    assert lines[-1] == "Nothing was sent: this is what follows from the declared lab."
    done = CliRunner().invoke(netlab, [*words, "-o", "json"])
    found = json.loads(done.stdout)
    assert found["schema"] == "netlab.prediction/v1"
    prediction = found["prediction"]
    assert (prediction["disposition"], prediction["differs"]) == ("delivered", [])
    assert [end["port"] for end in prediction["endpoints"]] == [3306]
    assert prediction["forward"][0]["device"] == "eth0"


def test_the_exit_code_is_what_it_should_be() -> None:
    words = ["trace", "pod1", "10.99.174.93:99", "--predict", "--topology", "two-node-vxlan"]
    done = CliRunner().invoke(netlab, words, standalone_mode=False)
    assert done.return_value == 1
    assert "no such port" in " ".join(done.stdout.split())


def test_only_predictions_are_of_topologies() -> None:
    done = CliRunner().invoke(netlab, ["trace", "pod1", "p", "--topology", "two-node-vxlan"])
    assert done.exit_code == 2
    assert "--predict" in done.output


def test_predictions_share_no_code_with_the_rules() -> None:
    """Nor do they need a kernel."""
    program = (
        "import sys, netlab.trace.prediction, netlab.trace.undeclared\n"
        "print(*(n for n in sys.modules if n.startswith(('netlab.kernel', 'netlab.lab', "
        "'netlab.datapath'))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    # Names of devices, MACs (which are made of names) and VNIs: each type of overlay has its own.
    overlays = {f"netlab.datapath.overlays.{each.replace('-', '_')}" for each in KINDS}
    assert set(done.stdout.split()) == {
        "netlab.datapath",
        "netlab.datapath.docker_names",
        "netlab.datapath.outside_names",
        "netlab.datapath.overlay",
        "netlab.datapath.overlays",
        "netlab.datapath.podnet",
        "netlab.datapath.state",
        *overlays,
    }
