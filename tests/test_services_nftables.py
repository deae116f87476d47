"""Our nftables rules against those that kube-proxy v1.37.2 left on a real kernel (tests/golden)."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netlab.datapath.services.nftables import TABLES, render, sysctls
from netlab.datapath.services.nftables_list import addresses, differences, duration
from services_golden import NFTABLES_STATES, golden_lab, read

MYBLOG = read("seed-slave1", "nftables.txt")


@pytest.mark.parametrize("state", NFTABLES_STATES)
def test_rules_are_those_of_the_real_kube_proxy(state: str) -> None:
    rendered = "".join(table.text for table in render(*golden_lab(state)).tables)
    assert rendered == read(state, "nftables.txt")


@pytest.mark.parametrize("state", NFTABLES_STATES)
def test_sysctls_are_those_of_the_real_kube_proxy(state: str) -> None:
    recorded = {
        line.split(":")[0].replace(".", "/"): line.rpartition(" ")[2]
        for line in read(state, "sysctls-nftables.txt").splitlines()
    }
    assert {entry.path: entry.value for entry in sysctls(*golden_lab(state))} == recorded


@pytest.mark.parametrize("state", ["empty", "seed-slave1", "lb-local", "dual-stack"])
def test_a_transaction_replaces_both_tables(state: str) -> None:
    ipv4, ipv6 = read(state, "nftables.txt").split("table ip6 kube-proxy")
    assert render(*golden_lab(state)).transaction == (
        "add table ip kube-proxy\n"
        "delete table ip kube-proxy\n"
        f"{ipv4}"
        "add table ip6 kube-proxy\n"
        "delete table ip6 kube-proxy\n"
        f"table ip6 kube-proxy{ipv6}"
    )


@pytest.mark.parametrize("state", NFTABLES_STATES)
def test_the_tables_are_named_for_those_who_remove_them(state: str) -> None:
    tables = render(*golden_lab(state)).tables
    assert tuple(f"{table.family} {table.name}" for table in tables) == TABLES


MYSQL = "10.108.214.84 . tcp . 3306 : goto service-4MZWHQFJ-demo/mysql/tcp/"
MASQUERADING = "\t\tct status dnat ip saddr . ip daddr . meta l4proto . th dport"


@pytest.mark.parametrize(
    ("old", "new", "different"),
    [
        ("10.108.214.84,\n\t\t\t     10.99.174.93 }", "10.99.174.93, 10.108.214.84 }", []),
        ("\t}\n\n\tchain", "\t}\n\tchain", []),
        ("10.99.174.93 }", "10.99.174.94 }", ["ip kube-proxy set cluster-ips"]),
        (f"{MYSQL},\n", "", ["ip kube-proxy map service-ips"]),
        ("\t\tjump services\n", "", ["ip kube-proxy chain nat-prerouting"]),
        ("\t\tjump services\n", "\t\tjump services\n" * 2, ["ip kube-proxy chain nat-prerouting"]),
        ("priority srcnat", "priority 120", ["ip kube-proxy chain nat-postrouting"]),
        ("\tchain services {\n", "\tchain mine {\n\t}\n\tchain services {\n",
         ["ip kube-proxy chain mine"]),
        ("rules for kube-proxy", "mine", ["ip kube-proxy"]),
        ("table ip6 kube-proxy", "table ip6 other", ["ip6 kube-proxy", "ip6 other"]),
        (MYBLOG[MYBLOG.index("table ip6") :], "", ["ip6 kube-proxy"]),
        (MYBLOG, "", ["ip kube-proxy", "ip6 kube-proxy"]),
    ],
)  # fmt: skip
def test_which_differences_count(old: str, new: str, different: list[str]) -> None:
    changed = MYBLOG.replace(old, new, 1)
    assert changed != MYBLOG
    assert differences(MYBLOG, changed) == different


def test_the_order_of_rules_counts() -> None:
    lines = MYBLOG.splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if line.startswith(MASQUERADING))
    lines[at - 1], lines[at] = lines[at], lines[at - 1]
    assert differences(MYBLOG, "".join(lines)) == ["ip kube-proxy chain masquerading"]


def test_counters_do_not_count() -> None:
    text = read("nodeport-localhost-reject", "nftables.txt")
    assert differences(text, text.replace("packets 0 bytes 0", "packets 3 bytes 180")) == []
    assert differences(text, text.replace("counter localhost", "counter other", 1)) != []


def _networks(version: int) -> st.SearchStrategy[str]:
    """Networks close to each other, so that they often touch."""
    base = int(ip_address("10.0.0.0" if version == 4 else "fd00::"))
    bits = 32 if version == 4 else 128
    return st.builds(
        lambda host, length: str(ip_network((base + host, bits - length), strict=False)),
        st.integers(0, 63),
        st.integers(0, 4),
    )


@settings(deadline=None)
@given(st.sampled_from([4, 6]).flatmap(lambda v: st.lists(_networks(v), min_size=1, max_size=8)))
def test_a_match_holds_the_networks_and_nothing_else(networks: list[str]) -> None:
    text = addresses(networks)
    found: set[int] = set()
    last = -1
    for part in text.strip("{ }").split(", "):
        if "-" in part:
            first, end = (int(ip_address(ip)) for ip in part.split("-"))
        else:
            network = ip_network(part)
            first, end = int(network[0]), int(network[-1])
        # sorted, and apart: nft refuses intervals that overlap, and joins neighbours
        assert first > last + 1
        last = end
        found.update(range(first, end + 1))
    assert found == {int(ip) for text in networks for ip in ip_network(text)}
    assert text.startswith("{") == (", " in text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(10800, "3h"), (90, "1m30s"), (600, "10m"), (86400, "1d"), (90061, "1d1h1m1s"), (1, "1s")],
)
def test_durations_are_spelled_as_nft_does(seconds: int, text: str) -> None:
    assert duration(seconds) == text


def test_the_page_shows_true_rules() -> None:
    page = (Path(__file__).parents[1] / "docs" / "services-nftables.md").read_text()
    golden = {line.strip() for line in read("seed-slave1", "nftables.txt").splitlines()}
    blocks = page.split("```nft\n")[1:]
    shown = [line.strip() for block in blocks for line in block.split("```")[0].splitlines()]
    assert len(shown) > 20
    assert {line for line in shown if line and line != "…"} <= golden
