"""ipvs mode as it is rendered, held against what the real kube-proxy left."""

from __future__ import annotations

import re

import pytest

import ipvs_golden as golden
from netlab.datapath.services import ipvs

states = pytest.mark.parametrize("state", golden.STATES)


@states
def test_virtual_and_real_servers_are_those_of_kube_proxy(state: str) -> None:
    rendered = ipvs.render(*golden.golden_lab(state))
    assert golden.as_saved(rendered) == golden.servers(state)
    usual = (900, 120, 300)
    told = [given or own for given, own in zip(rendered.timeouts_s, usual, strict=True)]
    assert " ".join(map(str, told)) == golden.timeouts(state)


@states
def test_sets_and_their_entries_are_those_of_kube_proxy(state: str) -> None:
    made, entries = golden.as_listed(ipvs.render(*golden.golden_lab(state)).sets)
    lines = golden.read(state, "ipset.txt").splitlines()
    # (ipset 7.17 tells the size of buckets, too, for which kube-proxy does not ask)
    found = [line.replace(" bucketsize 12", "") for line in lines if line.startswith("create")]
    assert made == found
    assert entries == [line for line in lines if line.startswith("add")]


@states
def test_addresses_are_those_of_kube_proxy(state: str) -> None:
    rendered = ipvs.render(*golden.golden_lab(state))
    lengths = {f"{ip}/{128 if ':' in ip else 32}" for ip in rendered.addresses}
    assert lengths == golden.addresses(state)
    assert len(lengths) == len(rendered.addresses)


@states
@pytest.mark.parametrize("name", ["iptables.txt", "ip6tables.txt"])
def test_rules_are_those_of_kube_proxy(state: str, name: str) -> None:
    rules = ipvs.render(*golden.golden_lab(state)).rules
    assert (rules.ipv4 if name == "iptables.txt" else rules.ipv6) == golden.read(state, name)


# Switching forwarding on changes these by itself.
_FOLLOWING = re.compile(r"net/ipv[46]/conf/.*/(forwarding|accept_redirects)")


@states
def test_sysctls_are_those_of_kube_proxy(state: str) -> None:
    rendered = {each.path: each.value for each in ipvs.sysctls(*golden.golden_lab(state))}
    recorded = golden.sysctls(state)
    assert rendered == {
        path: value for path, value in recorded.items() if not _FOLLOWING.fullmatch(path)
    }
