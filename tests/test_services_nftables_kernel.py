"""Rendered nftables rules on a real kernel: loaded, printed, compared, replaced."""

from __future__ import annotations

import re
import subprocess

import pytest
from msgspec.structs import replace

from netlab.datapath.services.nftables import render
from netlab.datapath.services.nftables_list import differences
from netlab.datapath.state import Table, Tables
from netlab.kernel import nft
from netlab.kernel.namespaces import entered
from netlab.problems import Exit, NetlabError
from services_golden import NFTABLES_STATES, golden_lab, read

pytestmark = pytest.mark.kernel

OURS = ("ip kube-proxy", "ip6 kube-proxy")
MYBLOG = render(*golden_lab("seed-slave1"))


def recorded(state: str) -> Tables:
    """What the real kube-proxy left, as tables that can be loaded."""
    first, second = read(state, "nftables.txt").split("table ip6 kube-proxy")
    return Tables(
        tables=(
            Table(family="ip", name="kube-proxy", text=first),
            Table(family="ip6", name="kube-proxy", text=f"table ip6 kube-proxy{second}"),
        )
    )


@pytest.mark.parametrize("state", NFTABLES_STATES)
def test_a_loaded_rendering_is_printed_as_what_the_real_kube_proxy_left(
    namespace: int, state: str
) -> None:
    nft.load(namespace, render(*golden_lab(state)))
    assert differences(nft.relisted(recorded(state)), nft.listing(namespace, OURS)) == []


def test_what_is_printed_here_can_be_told_from_what_should_be(namespace: int) -> None:
    nft.load(namespace, MYBLOG)
    printed = nft.listing(namespace, OURS)
    assert differences(nft.relisted(MYBLOG), printed) == []
    one, other = MYBLOG.tables
    changed = Tables(tables=(replace(one, text=one.text.replace("\treject\n", "\tdrop\n")), other))
    assert differences(nft.relisted(changed), printed) == ["ip kube-proxy chain reject-chain"]


def test_a_load_replaces_what_was_in_the_tables_and_nothing_else(namespace: int) -> None:
    other = Tables(tables=(Table(family="ip", name="mine", text="table ip mine {\n}\n"),))
    nft.load(namespace, other)
    nft.load(namespace, render(*golden_lab("small-cluster")))
    nft.load(namespace, MYBLOG)
    assert differences(nft.relisted(MYBLOG), nft.listing(namespace, OURS)) == []
    assert nft.names(namespace) == {*OURS, "ip mine"}
    nft.delete(namespace, OURS)
    nft.delete(namespace, OURS)
    assert nft.names(namespace) == {"ip mine"}
    assert nft.listing(namespace, OURS) == ""


def test_what_a_killed_load_leaves_asleep_is_not_taken_for_what_should_be(namespace: int) -> None:
    nft.load(namespace, MYBLOG)
    nft.change(namespace, "table ip kube-proxy {\n\tflags dormant\n}\n")
    assert differences(nft.relisted(MYBLOG), nft.listing(namespace, OURS)) != []
    nft.load(namespace, MYBLOG)
    assert differences(nft.relisted(MYBLOG), nft.listing(namespace, OURS)) == []


def refusal(namespace: int, table: str) -> str:
    """What is said of a table that cannot be loaded, beside one that can."""
    wrong = Tables(tables=(*MYBLOG.tables, Table(family="ip6", name="wrong", text=table)))
    with pytest.raises(NetlabError) as caught:
        nft.load(namespace, wrong)
    assert caught.value.exit_code == Exit.MACHINE
    (problem,) = caught.value.problems
    return problem.message


def test_a_load_that_is_refused_names_the_line_and_changes_nothing(namespace: int) -> None:
    before = render(*golden_lab("small-cluster"))
    nft.load(namespace, before)
    said = refusal(namespace, "table ip6 wrong {\n\tchain y {\n\t\tjump nowhere\n\t}\n}\n")
    assert '"jump nowhere"' in said
    assert "No such file or directory" in said
    assert differences(nft.relisted(before), nft.listing(namespace, OURS)) == []


def test_an_abort_of_the_library_is_an_error_like_others(namespace: int) -> None:
    """Nft 1.0.6 aborts on such a map, later ones take it; neither may end this process."""
    table = """table ip6 wrong {
	map remembered { typeof ip6 saddr . meta mark : ct mark; flags dynamic; size 100; }
	chain y { update @remembered { ip6 saddr . meta mark : ct mark }; jump nowhere; }
}
"""
    assert refusal(namespace, table)
    assert nft.names(namespace) == frozenset()


def test_what_packets_left_behind_does_not_count(namespace: int) -> None:
    affinity = render(*golden_lab("affinity"))
    nft.load(namespace, affinity)
    printed = nft.listing(namespace, OURS)
    (name,) = re.findall(r"set (affinity-\S+10\.42\.1\.90/8080) ", printed)
    remembered = f"add element ip kube-proxy {name} {{ 10.42.1.7 }}\n"
    with entered(namespace):
        subprocess.run(["nft", "-f", "-"], input=remembered, text=True, check=True)
    assert "10.42.1.7" in nft.listing(namespace, OURS)
    assert differences(printed, nft.listing(namespace, OURS)) == []
