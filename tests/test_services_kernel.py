"""Rendered rules on a real kernel: loaded, printed, compared, repaired."""

from __future__ import annotations

import shutil
import subprocess

import msgspec
import pytest

from netlab.datapath.services.iptables import render
from netlab.datapath.services.iptables_save import differences, same
from netlab.datapath.state import Ruleset
from netlab.kernel.namespaces import entered
from netlab.kernel.xtables import create_nfacct, restore, save
from netlab.problems import Exit, NetlabError
from netlab.topology.model import Endpoint, ServiceEndpoints
from services_golden import STATES, golden_lab

pytestmark = pytest.mark.kernel


def run(namespace: int, *command: str) -> None:
    with entered(namespace):
        subprocess.run(command, check=True, capture_output=True)


@pytest.mark.parametrize("state", STATES)
def test_a_loaded_rendering_is_printed_as_itself(namespace: int, state: str) -> None:
    ruleset = render(*golden_lab(state))
    restore(namespace, ruleset)
    ipv4, ipv6 = save(namespace)
    assert differences(ruleset.ipv4, ipv4) == []
    assert differences(ruleset.ipv6, ipv6) == []


def test_probabilities_are_printed_as_the_kernel_keeps_them(namespace: int) -> None:
    lab, node = golden_lab("clusterip-one-endpoint")
    (entry,) = lab.endpoints
    many = tuple(Endpoint(address=f"10.42.1.{host}", port=8080) for host in range(2, 202))
    crowded = msgspec.structs.replace(
        lab,
        endpoints=(
            ServiceEndpoints(
                namespace=entry.namespace,
                service=entry.service,
                port_name=entry.port_name,
                protocol=entry.protocol,
                endpoints=many,
            ),
        ),
    )
    ruleset = render(crowded, node)
    restore(namespace, ruleset)
    printed = {line for line in save(namespace)[0].splitlines() if "--probability" in line}
    rendered = {line for line in ruleset.ipv4.splitlines() if "--probability" in line}
    assert len(rendered) == 199
    assert printed == rendered


def test_a_changed_rule_is_seen_and_a_second_load_repairs_it(namespace: int) -> None:
    ruleset = render(*golden_lab("seed-slave1"))
    restore(namespace, ruleset)
    run(namespace, "iptables", "-t", "nat", "-F", "KUBE-MARK-MASQ")
    assert differences(ruleset.ipv4, save(namespace)[0]) == ["nat KUBE-MARK-MASQ"]
    restore(namespace, ruleset)
    assert same(ruleset.ipv4, save(namespace)[0])


def test_rules_of_others_do_not_count_and_a_load_removes_them(namespace: int) -> None:
    ruleset = render(*golden_lab("seed-slave1"))
    restore(namespace, ruleset)
    run(namespace, "iptables", "-I", "FORWARD", "-s", "192.0.2.0/24", "-j", "DROP")
    assert same(ruleset.ipv4, save(namespace)[0])
    restore(namespace, ruleset)
    assert "192.0.2.0/24" not in save(namespace)[0]


def test_a_load_that_is_refused_says_so_of_both_families_and_keeps_the_tables(
    namespace: int,
) -> None:
    ruleset = render(*golden_lab("seed-slave1"))
    restore(namespace, ruleset)
    wrong = Ruleset(
        ipv4="*nat\n-A KUBE-SERVICES -j KUBE-NOWHERE\nCOMMIT\n", ipv6="*nothing\nCOMMIT\n"
    )
    with pytest.raises(NetlabError) as caught:
        restore(namespace, wrong)
    assert caught.value.exit_code == Exit.MACHINE
    ipv4, ipv6 = caught.value.problems
    assert "KUBE-NOWHERE" in ipv4.message
    assert "ip6tables" in ipv6.message
    assert same(ruleset.ipv4, save(namespace)[0])


def test_a_missing_program_is_named_with_its_package(
    namespace: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_args, **_options: None)
    with pytest.raises(NetlabError) as caught:
        save(namespace)
    assert caught.value.exit_code == Exit.MACHINE
    (problem,) = caught.value.problems
    assert "iptables-save" in problem.message
    assert "apt-get install iptables" in (problem.hint or "")


def test_an_accounting_object_may_be_there_already(namespace: int) -> None:
    rule = "-A INPUT -m nfacct --nfacct-name netlab_test -j ACCEPT"
    ruleset = Ruleset(ipv4=f"*filter\n{rule}\nCOMMIT\n", ipv6="")
    with entered(namespace):
        create_nfacct("netlab_test")
        create_nfacct("netlab_test")
    restore(namespace, ruleset)
    assert "netlab_test" in save(namespace)[0]
