"""Many probes: a distribution over endpoints, one endpoint that is asked for, what is expected."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest
from msgspec.structs import replace
from rich.console import Console

from labs import fresh_name, ipv6_lab, small_lab
from netlab.kernel import bpf, nft
from netlab.lab import lifecycle
from netlab.problems import Exit, NetlabError
from netlab.report.series import print_series
from netlab.topology.model import Lab
from netlab.trace.aim import Request, aim
from netlab.trace.expectation import Expectation, expectation
from netlab.trace.model import (
    Disposition,
    Hop,
    Loss,
    Probe,
    Receiver,
    Trace,
    Translation,
    Witnesses,
)
from netlab.trace.model_steps import Packet, Socket
from netlab.trace.run import trace
from netlab.trace.series import chosen, trace_to_endpoint, traces
from netlab.trace.tally import Tally, declared
from test_cli import NETLAB, netlab
from test_trace_kernel import all_ok, in_node, places, run
from trace_labs import namespace

kernel = pytest.mark.kernel
WEB = Request("p0", "svc/web:http")


def told(
    number: int, end: str | None = None, disposition: Disposition = "delivered", us: int = 500
) -> Trace:
    """A trace from p0 to svc/web, as far as it matters here; `end` is the pod that was chosen."""
    source, service = Socket(ip="10.244.1.2", port=40000 + number), Socket(ip="10.99.0.1", port=80)
    addresses = {"p1": "10.244.2.2", "p2": "10.244.1.3", "p3": "10.244.2.3"}
    packet = Packet(src=source.ip, dst=service.ip, protocol="tcp", ttl=64, length=60)
    nodes = ["n1", *(["n2"] if end in ("p1", "p3") else [])]
    hops = [
        Hop(
            node=node,
            namespace=name,
            device="eth0",
            direction="out",
            t_ns=0,
            packet=packet,
        )
        for node, name in [("n1", "lab:demo:p0"), *((node, f"lab:{node}") for node in nodes)]
    ]
    reached = end and disposition == "delivered"
    after = Socket(ip=addresses[end], port=8002) if end else None
    return Trace(
        lab="lab",
        probe=Probe(
            from_="demo/p0", to="svc/web:http", protocol="tcp", source=source, destination=service
        ),
        disposition=disposition,
        delivered_to=Receiver(
            kind="pod", name=f"demo/{end}", node=nodes[-1], ip=addresses[end], port=8002
        )
        if reached and end
        else None,
        seen_source=None,
        translations=[Translation(kind="dnat", node="n1", before=service, after=after, rule=None)]
        if after
        else [],
        drop=None
        if disposition == "delivered"
        else Loss(
            direction="forward",
            node="n2",
            device="eth0",
            reason="no-route",
            where="eth0 of n2",
            rule=None,
            evidence=[],
            explanation="node n2 has no route",
            fix="give it one",
        ),
        forward=hops,
        reply=[],
        witnesses=Witnesses(packets="ok", rules="ok", conntrack="ok", kernel="ok", decisions="ok"),
        elapsed_us=us,
    )


@pytest.mark.parametrize(
    ("expected", "shown", "differences"),
    [
        (Expectation(), told(1, "p1"), []),
        (Expectation("delivered", ("n1", "n2"), "demo/p1"), told(1, "p1"), []),
        (Expectation("dropped"), told(1, "p1"), ["was delivered, not dropped"]),
        (Expectation(via=("n2",)), told(1, "p2"), ["passed n1, not n2"]),
        (
            Expectation(via=("n3", "n4"), to="demo/p3"),
            told(1, "p1"),
            ["passed n1 and n2, not n3 nor n4", "was received by demo/p1, not by demo/p3"],
        ),
        (
            Expectation(to="demo/p1"),
            told(1, "p1", "dropped"),
            [
                "was dropped on n2 (no-route), not delivered",
                "was received by nobody, not by demo/p1",
            ],
        ),
        (Expectation("dropped"), told(1, "p1", "dropped"), []),
        (Expectation("dropped", ("n9",), "demo/p3"), told(1, None, "unobserved"), []),
    ],
)
def test_what_is_not_as_expected(
    expected: Expectation, shown: Trace, differences: list[str]
) -> None:
    assert expected.differences(shown) == differences


def test_expectations_are_references() -> None:
    lab = small_lab("lab")
    assert expectation(lab, None) is None
    assert expectation(lab, "dropped", ["node/n2", "n1"]) == Expectation("dropped", ("n2", "n1"))
    assert expectation(lab, None, to="p1") == Expectation(to="demo/p1")
    assert expectation(lab, None, to="10.244.2.2", namespace="demo") == Expectation(to="demo/p1")
    assert expectation(lab, None, to="node/n2") == Expectation(to="n2")
    for via, to, said in (
        (["n22"], None, 'unknown-node]: node "n22" is not in lab lab\n  hint: did you mean "n2"?'),
        ([], "p11", 'unknown-name]: "p11" is not in lab lab\n  hint: did you mean "p1"?'),
        ([], "svc/web", "bad-receiver"),
        ([], "192.0.2.1", "bad-receiver"),
    ):
        with pytest.raises(NetlabError) as raised:
            expectation(lab, None, via, to)
        assert said in str(raised.value)
        assert raised.value.exit_code == Exit.USAGE


def test_a_series_is_told() -> None:
    lab = small_lab("lab")
    tally = Tally(lab, aim(lab, WEB), 10, Expectation(via=("n2",)))
    ends = ("p1", "p2", "p1", "p3", "p1")
    for number, end in enumerate(ends):
        tally.add(told(number, end, us=300 + 100 * number))
    for number in (5, 6):
        tally.add(told(number, "p3", "dropped", us=800_000))
    series = tally.series()
    assert (series.asked, series.count, series.interrupted) == (10, 7, True)
    assert series.dispositions == {"delivered": 5, "rejected": 0, "dropped": 2, "unobserved": 0}
    assert [(each.name, each.count, each.delivered) for each in series.endpoints] == [
        ("demo/p2", 1, 1),
        ("demo/p1", 3, 3),
        ("demo/p3", 3, 1),
    ]
    assert {each.declared_share for each in series.endpoints} == {round(1 / 3, 4)}
    spent = series.elapsed_us
    assert spent
    assert (spent.min, spent.median, spent.max) == (300, 500, 700)
    assert series.unexpected
    assert (series.unexpected.count, series.unexpected.first) == (3, 2)
    assert series.unexpected.trace == told(1, "p2", us=400)
    output = io.StringIO()
    print_series(series, Console(file=output, width=100))
    assert output.getvalue().splitlines() == [
        "✗ 7 of 10 probes demo/p0 → svc/web:http: 5 delivered, 2 dropped, 3 not as expected",
        "",
        "ENDPOINT   NODE   PROBES   SHARE   DECLARED",
        "demo/p2    n1          1   14.3%      33.3%   ▇▇▇",
        "demo/p1    n2          3   42.9%      33.3%   ▇▇▇▇▇▇▇▇▇",
        "demo/p3    n2          3   42.9%      33.3%   ▇▇▇▇▇▇▇▇▇",
        "",
        "2 lost on its way there on n2: no route",
        "why: node n2 has no route",
        "fix: give it one",
        "",
        "answered after 0.30 ms at least, 0.50 (median), 0.70 at most",
    ]


def test_the_share_that_is_declared() -> None:
    def ends(lab: Lab, request: Request) -> list[str] | None:
        found = declared(lab, aim(lab, request))
        return None if found is None else [end.pod or "" for end in found]

    lab = small_lab("lab")
    assert ends(lab, WEB) == ["demo/p2", "demo/p1", "demo/p3"]
    assert ends(ipv6_lab(lab), WEB) == ["demo/p2", "demo/p1", "demo/p3"]
    assert ends(lab, Request("p0", "p1")) is None
    assert ends(lab, Request("p0", "svc/empty")) is None
    web, empty = lab.services
    sticky = replace(lab, services=(replace(web, session_affinity="ClientIP"), empty))
    assert ends(sticky, WEB) is None
    local = replace(lab, services=(replace(web, internal_traffic_policy="Local"), empty))
    assert ends(local, WEB) == ["demo/p2"]
    assert ends(local, replace(WEB, source="p1")) == ["demo/p1", "demo/p3"]
    ports = tuple(replace(port, node_port=30000 + port.port) for port in web.ports)
    service = replace(web, type="NodePort", ports=ports)
    open_to_all = replace(lab, services=(service, empty))
    assert len(ends(open_to_all, Request("p0", "node/n2:30080")) or []) == 3
    service = replace(service, external_traffic_policy="Local")
    # Pods and the node itself reach all, others those of the node.
    by_client = replace(lab, services=(service, empty))
    assert ends(by_client, Request("p0", "node/n2:30080")) is None


@pytest.fixture
def lab() -> Iterator[Lab]:
    """Service web of p1, p2 and p3, up."""
    made = small_lab()
    try:
        lifecycle.up(made)
        yield made
    finally:
        lifecycle.down(made.name)


@kernel
def test_each_trace_of_a_series_is_whole_and_its_own(lab: Lab) -> None:
    found = list(traces(lab, WEB, 60))
    assert [each.disposition for each in found] == ["delivered"] * 60
    assert all(all_ok(each) and each.witnesses.kernel == "ok" for each in found)
    assert {each.endpoint for each in found} == {"demo/p1", "demo/p2", "demo/p3"}
    ports = [each.probe.source.port for each in found]
    assert len(set(ports)) == 60
    for each, port in zip(found, ports, strict=True):
        assert {hop.packet.sport for hop in each.forward} == {port}
        assert {hop.packet.dport for hop in each.reply} == {port}
        there, back = places(each.forward), places(each.reply)
        assert there == back[::-1]
        assert each.via == (["n1"] if each.endpoint == "demo/p2" else ["n1", "n2"])
        assert any("KUBE-SEP" in rule for rule in each.rules)
        (translation,) = each.translations
        assert translation.after == chosen(each)
        assert "DNAT" in (translation.rule or "")


@kernel
@pytest.mark.parametrize("protocol", ["udp", "icmp"])
def test_a_series_of_datagrams(lab: Lab, protocol: str) -> None:
    to = "svc/web:53" if protocol == "udp" else "p3"
    found = list(traces(lab, Request("p0", to, protocol=protocol), 8))  # type: ignore[arg-type]
    assert [each.disposition for each in found] == ["delivered"] * 8
    assert [each.witnesses for each in found if not all_ok(each)] == []
    # Of pings, too, each is a connection of its own, so that its first packet meets the nat rules.
    assert [each.rules for each in found if "-A POSTROUTING" not in "\n".join(each.rules)] == []


@kernel
def test_what_is_lost_does_not_mix_with_what_follows(lab: Lab) -> None:
    in_node(lab, "n2", "iptables", "-I", "FORWARD", "-d", "10.244.2.2", "-j", "DROP")
    seen: dict[str | None, Trace] = {}
    for each in traces(lab, WEB, 200):
        end = chosen(each)
        assert end
        port = each.probe.source.port
        assert {hop.packet.sport for hop in each.forward} == {port}
        if end.ip == "10.244.2.2":
            assert (each.disposition, each.reason, each.lost_on) == (
                "dropped",
                "dropped-by-rule",
                "n2",
            )
            assert each.endpoint is None
        else:
            assert each.delivered
        seen[end.ip] = each
        if len(seen) == 3:
            break
    assert len(seen) == 3


@kernel
def test_rules_that_change_meanwhile_are_told_as_they_are(lab: Lab) -> None:
    rule = ("FORWARD", "-m", "comment", "--comment", "new here", "-j", "KUBE-FORWARD")
    after_each = [("-I", *rule), (), ("-D", *rule), ()]
    found = traces(lab, replace(WEB, source="p1", destination="p3"), 4)
    texts = []
    for each, change in zip(found, after_each, strict=True):
        texts.append(any("new here" in text for text in each.rules))
        assert all_ok(each)
        if change:
            in_node(lab, "n2", "iptables", *change)
    assert texts == [False, True, True, False]


def _programs() -> set[int]:
    """Numbers of the BPF programs that this process holds at work."""
    found = set()
    for entry in os.listdir("/proc/self/fdinfo"):
        try:
            with open(f"/proc/self/fdinfo/{entry}") as file:
                found |= {int(each) for each in re.findall(r"^prog_id:\s*(\d+)", file.read(), re.M)}
        except FileNotFoundError:  # that of the listing itself
            continue
    return found


def _exists(program: int) -> bool:
    try:
        os.close(bpf._bpf(13, struct.pack("=III", program, 0, 0)))  # BPF_PROG_GET_FD_BY_ID
    except FileNotFoundError:
        return False
    return True


@kernel
def test_sixty_traces_leave_nothing(lab: Lab) -> None:
    def held() -> tuple[object, ...]:
        tables = [nft.names(namespace(lab, node)) for node in ("n1", "n2")]
        instances = "/sys/kernel/tracing/instances"
        ours = f"netlab-{os.getpid()}-"
        traced = os.listdir(instances) if os.path.isdir(instances) else []
        descriptors = []
        for number in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):  # the directory that was listed
                descriptors.append(os.readlink(f"/proc/self/fd/{number}"))
        return tables, [each for each in traced if each.startswith(ours)], sorted(descriptors)

    trace(lab, WEB)
    before = held()
    for _ in range(20):
        trace(lab, WEB)
    assert held() == before
    programs = set()
    for _ in range(2):
        for each in traces(lab, WEB, 20):
            assert each.delivered
            programs |= _programs()
    assert held() == before
    # One of each of two witnesses at each of their two tracepoints, however many probes there are.
    assert len(programs) == 2 * 4
    deadline = time.monotonic() + 10
    while any(_exists(program) for program in programs):
        assert time.monotonic() < deadline, "a BPF program stayed"
        time.sleep(0.01)
    found = traces(lab, WEB, 20)
    next(found)
    assert held() != before
    found.close()
    assert held() == before


@kernel
@pytest.mark.parametrize("mode", ["iptables", "nftables", "nftables-flat"])
def test_source_ports_until_an_endpoint_is_chosen(up: Callable[[Lab], object], mode: str) -> None:
    made = small_lab()
    made = replace(made, service_proxy=replace(made.service_proxy, mode=mode))  # type: ignore[arg-type]
    up(made)
    for pod in ("p1", "demo/p2", "10.244.2.3"):
        found = trace_to_endpoint(made, WEB, pod)
        assert found.delivered
        assert (found.tries or 0) >= 1
        assert pod in (found.endpoint or "", (found.endpoint or "")[5:], str(chosen(found))[:-5])
        assert {hop.packet.sport for hop in found.forward} == {found.probe.source.port}


@kernel
def test_an_endpoint_that_cannot_be_had(lab: Lab) -> None:
    in_node(lab, "n1", "iptables", "-I", "FORWARD", "-d", "10.244.2.3", "-j", "DROP")
    lost = trace_to_endpoint(lab, WEB, "p3")
    assert (lost.disposition, lost.lost_on, chosen(lost)) == (
        "dropped",
        "n1",
        Socket(ip="10.244.2.3", port=8002),
    )
    web, empty = lab.services
    local = replace(lab, services=(replace(web, internal_traffic_policy="Local"), empty))
    lifecycle.up(local)
    for request, pod, code, said in (
        (WEB, "p0", Exit.USAGE, "its endpoints are demo/p1, demo/p2, demo/p3"),
        (replace(WEB, destination="svc/empty"), "p1", Exit.USAGE, "it has no endpoint"),
        (WEB, "p9", Exit.USAGE, "unknown-name"),
        (WEB, "svc/web", Exit.USAGE, "not-an-endpoint"),
        (replace(WEB, destination="p1"), "p1", Exit.USAGE, "no-service"),
        (replace(WEB, source_port=4000), "p1", Exit.USAGE, "one-source-port"),
        (WEB, "p1", Exit.NO, "gave none of 100 probes from pod demo/p0 to p1"),
    ):
        with pytest.raises(NetlabError) as raised:
            trace_to_endpoint(local, request, pod)
        assert said in str(raised.value)
        assert raised.value.exit_code == code


@kernel
def test_the_command_says_what_differs(lab: Lab) -> None:
    def traced(*arguments: str) -> subprocess.CompletedProcess[str]:
        return netlab("trace", "p0", *arguments, "--lab", lab.name)

    good = traced("p1", "--expect", "delivered", "--via", "n2", "--to", "p1")
    assert (good.returncode, good.stderr) == (0, "")
    other = traced("p1", "--via", "n2", "--to", "p3", "-o", "json")
    assert other.returncode == 1
    assert other.stderr == "not as expected: it was received by demo/p1, not by demo/p3\n"
    assert json.loads(other.stdout)["disposition"] == "delivered"
    assert traced("svc/empty", "--expect", "rejected").returncode == 0
    assert traced("svc/empty", "--expect", "dropped").stderr == (
        "not as expected: it was rejected on n1 (no-endpoints), not dropped\n"
    )
    wrong = traced("p1", "--via", "n22")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert 'did you mean "n2"?' in wrong.stderr
    both = traced("svc/web", "--port", "80", "--count", "2", "--endpoint", "p1")
    assert both.returncode == 2


@kernel
def test_the_command_counts(lab: Lab) -> None:
    def traced(*arguments: str) -> subprocess.CompletedProcess[str]:
        return netlab("trace", "p0", *arguments, "--lab", lab.name)

    many = traced("svc/web:http", "--count", "12", "-o", "json")
    assert many.returncode == 0
    series = json.loads(many.stdout)
    assert (series["schema"], series["count"]) == ("netlab.trace-series/v1", 12)
    assert sum(each["count"] for each in series["endpoints"]) == 12
    assert {each["declared_share"] for each in series["endpoints"]} == {0.3333}
    refused = traced("svc/empty", "--count", "2")
    assert refused.returncode == 1
    assert refused.stdout.startswith("✗ 2 probes demo/p0 → svc/empty: 2 rejected")
    assert traced("svc/empty", "--count", "2", "--expect", "rejected").returncode == 0
    other = traced("p1", "--count", "3", "--to", "p3")
    assert other.returncode == 1
    assert other.stderr.startswith("not as expected: 3 of 3 probes; number 1 was received by demo/")
    assert "3 not as expected" in other.stdout
    assert "there  TCP SYN" in other.stdout
    one = json.loads(traced("svc/web:http", "--endpoint", "p1", "-o", "ndjson").stdout)
    assert one["tries"] >= 1
    assert one["delivered_to"]["name"] == "demo/p1"
    shown = traced("svc/web:http", "--endpoint", "p1").stdout
    assert re.search(r"^\d+ source ports? tried until that endpoint was chosen\.$", shown, re.M)


@kernel
def test_an_interrupted_series_tells_what_it_has(lab: Lab) -> None:
    command = [NETLAB, "trace", "p0", "svc/web:http", "--lab", lab.name, "--count", "1000000"]
    process = subprocess.Popen(
        [*command, "-o", "ndjson"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout
    first = json.loads(process.stdout.readline())
    process.send_signal(signal.SIGINT)
    rest, said = process.communicate(timeout=30)
    assert process.returncode == Exit.INTERRUPTED
    assert said == "interrupted\n"
    *others, series = [json.loads(line) for line in rest.splitlines()]
    assert {each["schema"] for each in [first, *others]} == {"netlab.trace/v1"}
    assert series["interrupted"]
    assert (series["asked"], series["count"]) == (1_000_000, 1 + len(others))
    tables = run("ip", "netns", "exec", namespace(lab, "n1"), "nft", "list", "tables")
    assert "netlab_trace" not in tables


def test_a_series_of_nothing_is_wrong_usage() -> None:
    done = netlab("trace", "a", "b", "--count", "0", "--lab", fresh_name())
    assert done.returncode == 2
    assert "error[usage]: Invalid value for '--count'" in done.stderr
