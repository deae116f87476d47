"""Our rules against those that kube-proxy v1.37.2 left on a real kernel (tests/golden)."""

from __future__ import annotations

import re

import pytest
from services_golden import STATES, golden_lab, read

from netlab.datapath.services.iptables import render, sysctls


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
        if "_timeout" not in line  # left to the kernel: no rule depends on them
    }
    assert {entry.path: entry.value for entry in sysctls(*golden_lab(state))} == recorded
