"""`netlab rules`: what serves a Service, found in listings of all modes, in order and in words."""

from __future__ import annotations

import json
import re
import socket
import subprocess
from collections.abc import Iterator, Mapping

import pytest
from click.testing import CliRunner
from msgspec.structs import replace

from labs import small_lab
from netlab.cli.main import netlab as command
from netlab.datapath.services.explain import Met, compare, read_service
from netlab.datapath.services.modes import MODES
from netlab.datapath.services.reading import Key, reading_of
from netlab.kernel.namespaces import entered
from netlab.lab import lifecycle
from netlab.problems import Exit, NetlabError
from netlab.topology.model import Lab, Node, ProxyMode, Service, ServicePort
from services_golden import NFTABLES_STATES, STATES, golden_lab, read

CASES = [
    *(("iptables", state) for state in STATES),
    *(("nftables", state) for state in NFTABLES_STATES),
    *(("nftables-flat", state) for state in NFTABLES_STATES),
]


def listings(lab: Lab, node: Node) -> Mapping[str, str]:
    """What the real tools print; of our own mode what we render."""
    mode = lab.service_proxy.mode
    if mode == "iptables":
        return {"ip": read(lab.name, "iptables.txt"), "ip6": read(lab.name, "ip6tables.txt")}
    text = read(lab.name, "nftables.txt")
    if mode == "nftables-flat":
        rules = MODES[mode].render(lab, node)
        text = "".join(table.text for table in rules.tables)  # type: ignore[union-attr]
    return {"ip": text, "ip6": text}


def lab_in(mode: ProxyMode, state: str) -> tuple[Lab, Node]:
    lab, node = golden_lab(state)
    return replace(lab, service_proxy=replace(lab.service_proxy, mode=mode)), node


def shown(lab: Lab, node: Node, service: Service, printed: Mapping[str, str]) -> list[Met]:
    return read_service(lab, node, service, printed)[1]


def lines(met: list[Met]) -> Iterator[tuple[Key, str]]:
    return ((each.block.key, line.text) for each in met for line in each.lines)


@pytest.mark.parametrize(("mode", "state"), CASES)
def test_every_rule_of_a_service_is_shown_once_and_none_of_others(
    mode: ProxyMode, state: str
) -> None:
    lab, node = lab_in(mode, state)
    printed = listings(lab, node)
    whole, blocks = compare(lab, node, MODES[mode], printed)
    assert {line.state for block in blocks.values() for line in block.lines} <= {"there"}
    # (with a feature gate off, kube-proxy leaves a chain that nothing leads to)
    led_to = {
        target
        for key, block in blocks.items()
        for line in block.lines
        for target in whole.targets(key, line.text)
    }
    wanted: dict[str, set[tuple[Key, str]]] = {}
    for key, block in blocks.items():
        for line in block.lines:
            if whole.is_told(key, line.text) and (key in led_to or key.kind != "chain"):
                for owner in whole.owners(key, line.text):
                    wanted.setdefault(owner.service, set()).add((key, line.text))
    named = {text for found in wanted.values() for text in found}
    for service in lab.services:
        reading, met = read_service(lab, node, service, printed)
        found = list(lines(met))
        assert len(found) == len(set(found))
        assert wanted.get(service.key, set()) <= set(found)
        assert (set(found) & named) <= wanted.get(service.key, set())
        for each in met:
            for line in each.lines:
                assert line.state == "there"
                said = reading.sentence(each.block, line)
                assert said.strip(": "), line.text
                assert "which is no endpoint" not in said
                assert "nothing that the proxy" not in said


def test_rules_come_in_the_order_of_the_way() -> None:
    lab, node = lab_in("iptables", "lb-source-ranges-local")
    met = shown(lab, node, lab.services[0], listings(lab, node))
    names = [f"{each.block.key.table} {each.block.key.name}"[:15].rstrip("-") for each in met]
    assert names == [
        "nat PREROUTING", "nat OUTPUT", "nat KUBE-SERVIC", "nat KUBE-SVC-FY", "nat KUBE-MARK-M",
        "nat KUBE-SEP-UL", "nat KUBE-SEP-QM", "nat KUBE-FW-FYC", "nat KUBE-EXT-FY",
        "nat KUBE-SVL-FY", "nat KUBE-NODEPO", "filter INPUT", "filter FORWARD", "filter OUTPUT",
        "filter KUBE-PRO", "filter KUBE-NOD", "filter KUBE-FOR", "nat POSTROUTING",
        "nat KUBE-POSTRO",
    ]  # fmt: skip


SENTENCES: list[tuple[ProxyMode, str, str]] = [
    ("iptables", "-j KUBE-SEP-7VV4V3FH4QZTCF3H",
     "endpoint 1 of 2 is chosen with probability 1/2: 10.244.1.4:8002 on k8s-slave1"),
    ("iptables", "-j KUBE-SEP-MU6IAQOXFDU7CSL4",
     "endpoint 2 of 2 is chosen from what is left, 1/2 of all: 10.244.2.5:8002 on k8s-slave2"),
    ("iptables", "! -s 10.244.0.0/16",
     "a packet from outside the pod CIDR 10.244.0.0/16 is marked for masquerade"),
    ("iptables", "--to-destination 10.244.2.5:8002", "DNAT to 10.244.2.5:8002 on k8s-slave2"),
    ("nftables", "numgen random mod 2",
     "one of 2 endpoints is chosen, each with probability 1/2: DNAT to 10.244.1.4:8002 on "
     "k8s-slave1; 10.244.2.5:8002 on k8s-slave2"),
    ("nftables", "10.99.174.93 . tcp . 80 : goto",
     "to 10.99.174.93:80/TCP: one of its endpoints is chosen"),
    ("nftables-flat", "10.99.174.93 . tcp . 80 : 0:2",
     "to 10.99.174.93:80/TCP: one of its 2 endpoints is chosen, each with probability 1/2"),
    ("nftables-flat", "10.99.174.93 . tcp . 80 . 0:2 : 10.244.2.5 . 8002",
     "place 2 is 10.244.2.5:8002 on k8s-slave2"),
]  # fmt: skip


@pytest.mark.parametrize(("mode", "rule", "sentence"), SENTENCES)
def test_what_a_rule_says(mode: ProxyMode, rule: str, sentence: str) -> None:
    lab, node = lab_in(mode, "seed-slave1")
    service = next(service for service in lab.services if service.name == "myblog")
    reading, met = read_service(lab, node, service, listings(lab, node))
    said = [
        reading.sentence(each.block, line)
        for each in met
        for line in each.lines
        if rule in line.text
    ]
    assert said == [sentence]


def test_one_port_of_a_service() -> None:
    lab, node = lab_in("nftables", "affinity-nodeport-local")
    service = next(service for service in lab.services if service.name == "login")
    printed = listings(lab, node)
    texts = {
        text for _, text in lines(read_service(lab, node, service, printed, "shop/login:beat")[1])
    }
    assert "10.43.7.70" in texts  # of all its ports
    assert any("30791" in text for text in texts)
    assert not any("30790" in text or "login/tcp/http" in text for text in texts)


def test_clients_that_are_remembered_are_shown() -> None:
    lab, node = lab_in("nftables", "affinity")
    printed = listings(lab, node)["ip"]
    name = re.findall(r"set (affinity-\S+)", printed)[0]
    before, _, behind = printed.partition(f"\tset {name} {{")
    timeout, elements = "\t\ttimeout 3h\n", "\t\telements = { 10.42.1.7 expires 2h59m }\n"
    remembering = f"{before}\tset {name} {{{behind.replace(timeout, timeout + elements, 1)}"
    reading, met = read_service(
        lab, node, lab.services[0], dict.fromkeys(("ip", "ip6"), remembering)
    )
    found = [
        (each.block.key.name, reading.sentence(each.block, line))
        for each in met
        for line in each.lines
        if line.learned
    ]
    assert found == [(name, "10.42.1.7 is remembered")]


@pytest.mark.parametrize("mode", ["iptables", "nftables", "nftables-flat"])
def test_what_is_missing_and_what_is_too_much_is_said(mode: ProxyMode) -> None:
    lab, node = lab_in(mode, "seed-slave1")
    service = next(service for service in lab.services if service.name == "myblog")
    printed = listings(lab, node)
    pattern = {
        "iptables": r"-A KUBE-SVC-F2KIP5XTJW7U6HIO .*10\.244\.1\.4.*\n",
        "nftables": r"10\.99\.174\.93 \. tcp \. 80 : goto [^ ]+",
        "nftables-flat": r"10\.99\.174\.93 \. tcp \. 80 \. 0:1 : [^,}]+,?",
    }[mode]
    changed, count = re.subn(pattern, "", printed["ip"], count=1)
    assert count == 1
    damaged = {"ip": changed, "ip6": printed["ip6"] if mode == "iptables" else changed}
    states = {
        line.state: (each.block.key.name, line.text)
        for each in shown(lab, node, service, damaged)
        for line in each.lines
    }
    assert set(states) == {"there", "missing"}
    assert "10.244.1.4" in states["missing"][1] or "10.99.174.93" in states["missing"][1]
    mysql = next(service for service in lab.services if service.name == "mysql")
    assert {line.state for each in shown(lab, node, mysql, damaged) for line in each.lines} == {
        "there"
    }


def test_a_rule_that_is_left_gets_all() -> None:
    lab, node = lab_in("iptables", "seed-slave1")
    service = next(service for service in lab.services if service.name == "myblog")
    printed = listings(lab, node)
    rest = re.sub(r"-A KUBE-SVC-F2KIP5XTJW7U6HIO .*10\.244\.1\.4.*\n", "", printed["ip"])
    reading, met = read_service(lab, node, service, {**printed, "ip": rest})
    said = [
        reading.sentence(each.block, line)
        for each in met
        for line in each.lines
        if each.block.key.name.startswith("KUBE-SVC") and "-j KUBE-SEP" in line.text
    ]
    assert said == [
        "endpoint 1 of 2 is chosen with probability 1/2: 10.244.1.4:8002 on k8s-slave1",
        "the only endpoint: 10.244.2.5:8002 on k8s-slave2",
    ]


def test_every_mode_with_rules_can_be_read() -> None:
    for name, mode in MODES.items():
        assert (reading_of(mode) is None) == (name == "none")


@pytest.fixture(scope="module", params=["iptables", "nftables", "nftables-flat"])
def running(request: pytest.FixtureRequest) -> Iterator[Lab]:
    lab = small_lab()
    lab = replace(lab, service_proxy=replace(lab.service_proxy, mode=request.param))
    lifecycle.up(lab)
    yield lab
    lifecycle.down(lab.name)


def netlab(lab: Lab, *words: str) -> tuple[int, str]:
    done = CliRunner().invoke(command, [*words, "--lab", lab.name], standalone_mode=False)
    if done.exception:
        raise done.exception
    return done.return_value, done.stdout


@pytest.mark.kernel
def test_the_kernel_is_asked(running: Lab) -> None:
    code, text = netlab(running, "rules", "svc/web:http")
    assert code == 0
    assert "10.99.0.1" in text
    assert "pod demo/p1 on n2" in text
    assert "10.99.0.2" not in text
    assert ":53/UDP" not in text
    assert "MISSING" not in text
    counts = re.search(r"^ +\[\d+:\d+\] ", text, re.M)
    assert bool(counts) == (running.service_proxy.mode == "iptables")


@pytest.mark.kernel
def test_counters_count(running: Lab) -> None:
    name = f"{running.name}:demo:p0"
    with entered(name), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.sendto(b"?", ("10.99.0.1", 53))
    _, text = netlab(running, "rules", "svc/web:udp", "-o", "json")
    (of_node,) = json.loads(text)["nodes"]
    if running.service_proxy.mode != "iptables":  # whose rules have no counters
        assert not any("packets" in rule for rule in of_node["rules"])
        return
    counted = [rule for rule in of_node["rules"] if "--to-destination" in rule["text"]]
    assert sum(rule["packets"] for rule in counted) == 1
    assert {rule["services"][0] for rule in counted} == {"demo/web:udp"}


@pytest.mark.kernel
def test_nodes_services_and_what_differs(running: Lab) -> None:
    code, text = netlab(running, "rules", "--node", "n1", "--node", "n2")
    assert code == 0
    assert re.findall(r"^n\d, mode", text, re.M) == ["n1, mode", "n2, mode"]
    assert set(re.findall(r"^(\S+/\S+|\(shared\)) ", text, re.M)) == {
        "(shared)", "demo/empty", "demo/web", "demo/web:http", "demo/web:udp"
    } - ({"demo/web"} if running.service_proxy.mode == "iptables" else set())  # fmt: skip
    code, text = netlab(running, "rules", "svc/empty", "--node", "n2")
    assert code == 0
    assert "refused" in text
    code, text = netlab(running, "rules", "-o", "json")
    assert code == 0
    found = json.loads(text)
    assert found["schema"] == "netlab.rules/v1"
    assert found["complete"]


@pytest.mark.kernel
def test_what_another_service_needs_is_not_too_much(running: Lab) -> None:
    """An endpoint that names no node here, and this one in another Service."""
    web = next(each for each in running.endpoints if each.protocol == "TCP")
    local = next(each for each in web.endpoints if each.node == "n1")
    port = ServicePort(port=80, target_port=local.port)
    same = Service(namespace="demo", name="same", cluster_ip="10.99.0.77", ports=(port,))
    behind = replace(
        web, service="same", port_name="", endpoints=(replace(local, node=None, pod=None),)
    )
    lab = replace(
        running, services=(*running.services, same), endpoints=(*running.endpoints, behind)
    )
    lifecycle.up(lab)
    assert netlab(lab, "rules", "svc/same", "--node", "n1")[0] == 0
    lifecycle.up(running)


@pytest.mark.kernel
def test_what_somebody_took_away_is_said(running: Lab) -> None:
    commands = {
        "iptables": "iptables -t nat -F KUBE-SERVICES",
        "nftables": "nft flush map ip kube-proxy service-ips",
        "nftables-flat": "nft flush map ip netlab service-endpoints",
    }
    mode = running.service_proxy.mode
    with entered(f"{running.name}:n2"):
        subprocess.run(commands[mode].split(), check=True)
    code, text = netlab(running, "rules", "svc/web", "--node", "n2")
    assert code == 1
    assert "MISSING" in text
    assert netlab(running, "rules", "svc/web", "--node", "n1")[0] == 0
    assert netlab(running, "rules", "--node", "n2")[0] == 1


@pytest.mark.kernel
def test_a_mode_without_rules_and_services_without_any() -> None:
    lab = small_lab()
    headless = Service(
        namespace="demo", name="headless", cluster_ip="None", ports=(ServicePort(port=80),)
    )
    lab = replace(lab, services=(*lab.services, headless))
    try:
        lifecycle.up(lab)
        code, text = netlab(lab, "rules", "svc/headless")
        assert (code, "headless: clients ask DNS" in text) == (0, True)
        lifecycle.up(replace(lab, service_proxy=replace(lab.service_proxy, mode="none")))
        assert netlab(lab, "rules", "svc/web") == (0, "")
        assert netlab(lab, "rules") == (0, "")
        code, text = netlab(lab, "rules", "-o", "json")
        assert (code, json.loads(text)["nodes"]) == (0, [])
    finally:
        lifecycle.down(lab.name)


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["svc/wep"], "unknown-service"),
        (["p0"], "not-a-service"),
        (["svc/web:81"], "unknown-port"),
        (["svc/web", "--node", "n3"], "unknown-node"),
    ],
)
def test_what_cannot_be_shown(running: Lab, words: list[str], code: str) -> None:
    with pytest.raises(NetlabError) as raised:
        netlab(running, "rules", *words)
    assert [problem.code for problem in raised.value.problems] == [code]
    assert raised.value.exit_code == Exit.USAGE
