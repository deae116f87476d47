"""Our rules against those that kube-proxy v1.37.2 left on a real kernel (tests/golden)."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netlab.datapath.services.iptables import render, sysctls
from netlab.datapath.services.iptables_save import chance
from services_golden import STATES, golden_lab, read


def _without_counters(text: str) -> str:
    return re.sub(r" \[\d+:\d+\]", "", text)


@pytest.mark.parametrize("state", STATES)
def test_rules_are_those_of_the_real_kube_proxy(state: str) -> None:
    ruleset = render(*golden_lab(state))
    assert _without_counters(ruleset.ipv4) == read(state, "iptables.txt")
    assert _without_counters(ruleset.ipv6) == read(state, "ip6tables.txt")


@pytest.mark.parametrize("state", STATES)
def test_sysctls_are_those_of_the_real_kube_proxy(state: str) -> None:
    recorded = {
        line.split(":")[0].replace(".", "/"): line.rpartition(" ")[2]
        for line in read(state, "sysctls-iptables.txt").splitlines()
    }
    assert {entry.path: entry.value for entry in sysctls(*golden_lab(state))} == recorded


@pytest.mark.parametrize("state", STATES)
def test_every_accounting_object_that_a_rule_names_is_made_before(state: str) -> None:
    ruleset = render(*golden_lab(state))
    named = set(re.findall(r"--nfacct-name +(\S+)", ruleset.ipv4 + ruleset.ipv6))
    assert named <= set(ruleset.nfacct)


@pytest.mark.parametrize("state", ["small-cluster", "lb-local", "hints-and-local"])
def test_the_order_of_objects_means_nothing(state: str) -> None:
    lab, node = golden_lab(state)
    turned = msgspec.structs.replace(
        lab, services=lab.services[::-1], endpoints=lab.endpoints[::-1], nodes=lab.nodes[::-1]
    )
    assert render(turned, node) == render(lab, node)


def test_node_ports_on_chosen_networks_include_the_bridge_and_the_overlay() -> None:
    lab, node = golden_lab("nodeport")
    proxy = msgspec.structs.replace(lab.service_proxy, nodePortAddresses=("10.42.0.0/16",))
    rules = render(msgspec.structs.replace(lab, service_proxy=proxy), node).ipv4
    jumps = re.findall(r"-A KUBE-SERVICES -d (\S+) .*-j KUBE-NODEPORTS", rules)
    assert jumps == ["10.42.1.0/32", "10.42.1.1/32"]


@settings(deadline=None)
@given(st.integers(min_value=1, max_value=2000))
def test_every_endpoint_gets_the_same_share(ways: int) -> None:
    left = 1.0
    for tried in range(ways, 0, -1):
        share = float(chance(tried).rpartition(" ")[2] or 1)
        assert left * share == pytest.approx(1 / ways, rel=1e-5)
        left *= 1 - share


def test_the_rules_that_the_documentation_shows_are_true() -> None:
    page = Path(__file__).parents[1] / "docs" / "services.md"
    shown = [line for line in page.read_text().splitlines() if line.startswith("-A ")]
    assert len(shown) > 10
    assert set(shown) <= set(render(*golden_lab("seed-slave1")).ipv4.splitlines())
