"""Our nftables rules against those that kube-proxy v1.37.2 left on a real kernel (tests/golden)."""

from __future__ import annotations

import pytest

from netlab.datapath.services.nftables import render, sysctls
from services_golden import NFTABLES_STATES, golden_lab, read


@pytest.mark.parametrize("state", NFTABLES_STATES)
def test_rules_are_those_of_the_real_kube_proxy(state: str) -> None:
    rendered = "".join(table.text for table in render(*golden_lab(state)).tables)
    assert rendered == read(state, "nftables.txt")


@pytest.mark.parametrize("state", NFTABLES_STATES)
def test_sysctls_are_those_of_the_real_kube_proxy(state: str) -> None:
    recorded = {
        line.split(":")[0].replace(".", "/"): line.rpartition(" ")[2]
        for line in read(state, "sysctls-nftables.txt").splitlines()
        if "_timeout" not in line  # left to the kernel: no rule depends on them
    }
    assert {entry.path: entry.value for entry in sysctls(*golden_lab(state))} == recorded
