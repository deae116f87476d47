"""Mode iptables follows the Services rule by rule, and ends where a fresh rendering does."""

from __future__ import annotations

import itertools
import os
import random
import re
import socket

import pytest
from msgspec.structs import replace

from labs import small_lab
from netlab.datapath.services import nftables_list
from netlab.datapath.services.endpoints import service_objects
from netlab.datapath.services.iptables import render, sysctls
from netlab.datapath.services.iptables_proxier import IPTablesProxier
from netlab.datapath.services.iptables_save import SHARED, differences
from netlab.datapath.services.modes import MODES
from netlab.datapath.services.proxier import service_changes, update_between
from netlab.datapath.state import Backend, Ruleset, Update
from netlab.kernel import nft, xtables
from netlab.kernel.namespaces import entered
from netlab.lab import lifecycle
from netlab.lab import rules as rules_of_lab
from netlab.lab.edits import Changed
from netlab.problems import Exit, NetlabError, Problem
from netlab.topology.model import Endpoint, Lab, ProxyMode
from services_golden import SEQUENCES, Step, read, steps
from test_services_updates import changed, next_changes, some_service, start, with_services

BACKENDS: tuple[Backend, ...] = ("nft", "legacy")
ITERATIONS = 40


def restored(saved: str, text: str) -> str:
    """What `iptables-save` prints after `iptables-restore --noflush` of a text; as strict as it."""
    tables: dict[str, dict[str, list[str]]] = {}
    heads: dict[str, list[str]] = {}
    for line in saved.splitlines():
        if line.startswith("*"):
            table, head = tables.setdefault(line, {}), heads.setdefault(line, [])
        elif line.startswith(":"):
            table[line[1:].split()[0]] = []
            head.append(line)
        elif line.startswith("-A"):
            table[line.split()[1]].append(line)
    for line in text.splitlines():
        verb, _, rest = line.partition(" ")
        if line.startswith("*"):
            table, head = tables[line], heads[line]
        elif line.startswith(":"):
            chain = line[1:].split()[0]
            if chain not in table:
                head.append(line)
            table[chain] = []
        elif verb == "-X":
            assert not table.pop(rest), line
            jumps = (rule for rules in table.values() for rule in rules)
            assert not any(rule.endswith(f" -j {rest}") for rule in jumps), line
            head[:] = [each for each in head if not each.startswith(f":{rest} ")]
        elif verb != "COMMIT":
            chain, rule = rest.split()[0], f"-A {rest}"
            target = re.search(r" -j (KUBE-\S+)$", rule)
            assert target is None or target[1] in table, line
            if verb == "-D":
                table[chain].remove(rule)
            else:
                table[chain].insert(0 if verb == "-I" else len(table[chain]), rule)
    lines = []
    for name, table in tables.items():
        lines += [name, *heads[name], *itertools.chain(*table.values()), "COMMIT"]
    return "\n".join([*lines, ""])


def after(rules: Ruleset, update: Update) -> Ruleset:
    return replace(
        rules, ipv4=restored(rules.ipv4, update.ipv4), ipv6=restored(rules.ipv6, update.ipv6)
    )


def apart(wanted: Ruleset, found: Ruleset) -> list[str]:
    return differences(wanted.ipv4, found.ipv4) + differences(wanted.ipv6, found.ipv6)


@pytest.mark.parametrize("seed", range(8))
def test_after_any_change_the_rules_are_those_of_a_fresh_rendering(seed: int) -> None:
    rng = random.Random(seed)
    lab = start(rng)
    node = lab.nodes[0]
    proxier = IPTablesProxier(lab, node)
    rules = proxier.whole()
    for _ in range(ITERATIONS):
        changes = next_changes(rng, lab)
        later = changed(lab, changes)
        update = proxier.update(changes)
        assert update == update_between(
            IPTablesProxier, lab, later, node, service_changes(lab, later)
        )
        assert update is not None
        rules = after(rules, update)
        assert apart(render(later, node), rules) == []
        lab = later
    assert proxier.whole() == render(lab, node)


@pytest.mark.kernel
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_kernel_follows_any_change(namespace: int, backend: Backend) -> None:
    rng = random.Random(11)
    lab = replace(start(rng), iptables_backend=backend)
    node = lab.nodes[0]
    proxier = IPTablesProxier(lab, node)
    xtables.restore(namespace, proxier.whole())
    for _ in range(15):
        changes = next_changes(rng, lab)
        lab = changed(lab, changes)
        update = proxier.update(changes)
        assert update is not None
        load(namespace, update)
        assert apart(render(lab, node), saved(namespace, backend)) == []


def load(namespace: int, update: Update) -> None:
    ruleset = Ruleset(ipv4=update.ipv4, ipv6=update.ipv6, backend=update.backend)
    xtables.restore(namespace, ruleset, flush=False)


def saved(namespace: int, backend: Backend | None = None) -> Ruleset:
    ipv4, ipv6 = xtables.save(namespace, backend=backend)
    return Ruleset(ipv4=ipv4, ipv6=ipv6)


SWITCH = "seq-switch-mode"
SEQUENCES_OF_IPTABLES = [name for name in SEQUENCES if name != SWITCH]


def recorded(step: Step) -> Ruleset:
    return Ruleset(ipv4=step.read("iptables.txt"), ipv6=step.read("ip6tables.txt"))


def is_flushed(step: Step) -> bool:
    """Rules that somebody deletes by hand are none of netlab's doing."""
    return "flush" in step.change.get("shell", "")


@pytest.mark.parametrize("sequence", SEQUENCES_OF_IPTABLES)
def test_each_step_of_kube_proxy_is_followed(sequence: str) -> None:
    before, rules = None, Ruleset(ipv4="", ipv6="")
    for step in steps(sequence):
        fresh = render(step.lab, step.node)
        rules = after(rules, update) if (update := between(before, step)) is not None else fresh
        for wanted in () if is_flushed(step) else (recorded(step),):
            assert apart(wanted, fresh) == apart(fresh, wanted) == []
            assert apart(wanted, rules) == apart(rules, wanted) == []
        before = step


def between(before: Step | None, after: Step) -> Update | None:
    if before is None:
        return None
    changes = service_changes(before.lab, after.lab)
    return update_between(IPTablesProxier, before.lab, after.lab, after.node, changes)


@pytest.mark.kernel
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sequence", SEQUENCES_OF_IPTABLES)
def test_the_kernel_follows_each_step_of_kube_proxy(
    namespace: int, sequence: str, backend: Backend
) -> None:
    before = None
    for step in steps(sequence):
        update = between(before, step)
        if update is not None:
            load(namespace, replace(update, backend=backend))
        else:
            rules = render(step.lab, step.node)
            xtables.restore(namespace, replace(rules, backend=backend))
        found = saved(namespace, backend)
        if not is_flushed(step):
            assert apart(recorded(step), found) == apart(found, recorded(step)) == []
        before = step


@pytest.mark.parametrize("sequence", SEQUENCES_OF_IPTABLES)
def test_sysctls_of_each_step_are_those_of_kube_proxy(sequence: str) -> None:
    lines = read(sequence, "sysctls-iptables.txt").splitlines()
    kept = {line.split(":")[0].replace(".", "/"): line.rpartition(" ")[2] for line in lines}
    for step in steps(sequence):
        assert {each.path: each.value for each in sysctls(step.lab, step.node)} == kept


@pytest.mark.kernel
@pytest.mark.parametrize("modes", [("iptables", "nftables"), ("nftables", "iptables")])
def test_another_mode_leaves_what_kube_proxy_leaves(
    namespace: int, modes: tuple[ProxyMode, ProxyMode]
) -> None:
    first = steps(SWITCH)[0]
    for number, mode in enumerate(modes):
        wanted = MODES[mode].render(first.lab, first.node)
        for change in rules_of_lab._differences("", namespace, wanted):  # type: ignore[arg-type]
            rules_of_lab.make("", change)
        files = f"{SWITCH}/from-{modes[0]}/step-{number}"
        left = Ruleset(ipv4=read(files, "iptables.txt"), ipv6=read(files, "ip6tables.txt"))
        found = saved(namespace)
        assert apart(left, found) == apart(found, left) == []
        tables = nft.listing(namespace, ["ip kube-proxy", "ip6 kube-proxy"])
        assert bool(tables) == (mode == "nftables")
        assert nftables_list.differences(read(files, "nftables.txt"), tables) == []


def crowded(lab: Lab, endpoints: int) -> Lab:
    """A lab whose Service web has that many endpoints."""
    http, udp = lab.endpoints
    many = tuple(
        Endpoint(address=f"10.244.{number >> 8}.{number & 255}", port=8002)
        for number in range(endpoints)
    )
    return replace(lab, endpoints=(replace(http, endpoints=many), replace(udp, endpoints=())))


@pytest.mark.parametrize(("few", "many"), [(1000, 1001), (1001, 1000)])
def test_a_cluster_that_becomes_large_is_loaded_whole(few: int, many: int) -> None:
    lab = small_lab()
    before, later = crowded(lab, few), crowded(lab, many)
    proxier = IPTablesProxier(before, lab.nodes[0])
    assert proxier.update(service_changes(before, later)) is None
    assert proxier.whole() == render(later, lab.nodes[0])


def test_what_no_rule_depends_on_is_no_update() -> None:
    lab = small_lab()
    proxier = IPTablesProxier(lab, lab.nodes[0])
    web = service_objects(lab)["demo/web"]
    labelled = replace(web.service, labels={"team": "a"}, selector={"app": "other"})
    update = proxier.update({"demo/web": web._replace(service=labelled)})
    assert update is not None
    assert not update


def test_one_endpoint_replaced_leaves_the_shared_chains_alone() -> None:
    lab = small_lab()
    http, udp = lab.endpoints
    moved = (replace(http.endpoints[0], address="10.244.2.77"), *http.endpoints[1:])
    later = replace(lab, endpoints=(replace(http, endpoints=moved), udp))
    update = IPTablesProxier(lab, lab.nodes[0]).update(service_changes(lab, later))
    assert update is not None
    assert update.ipv6 == ""
    assert not set(re.findall(r"KUBE-[A-Z-]+(?:-[A-Z0-9]{16})?", update.ipv4)) & SHARED
    assert update.ipv4.count("\n:KUBE-SVC-") == 1
    assert update.ipv4.count("\n:KUBE-SEP-") == 2
    assert update.ipv4.count("\n-X KUBE-SEP-") == 1


def test_an_update_is_as_long_as_what_changed() -> None:
    rng = random.Random(7)
    few = start(rng)
    more = {f"demo/s{i}": some_service(rng, i) for i in range(9, 99)}
    many = with_services(few, {**service_objects(few), **more})
    changes = {"demo/s1": some_service(rng, 1)}
    short, long = (IPTablesProxier(lab, few.nodes[0]).update(changes) for lab in (few, many))
    assert short
    assert short == long


@pytest.mark.kernel
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_running_lab_is_updated_without_asking_what_is_there(
    monkeypatch: pytest.MonkeyPatch, backend: Backend
) -> None:
    lab = replace(small_lab(), iptables_backend=backend)
    later = replace(lab, endpoints=lab.endpoints[:1])
    try:
        lifecycle.up(lab)
        with monkeypatch.context() as asked:
            asked.setattr(xtables, "save", None)
            outcome = change_to(later)
        assert [type(change.item) for change in outcome.changes] == [Update, Update]
        assert lifecycle.differences(later) == []
        assert lifecycle.up(later).changes == ()
    finally:
        lifecycle.down(lab.name)


@pytest.mark.kernel
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("damage", ["-F KUBE-SERVICES", "-F"])
def test_rules_that_cannot_be_updated_are_loaded_whole(damage: str, backend: Backend) -> None:
    lab = replace(small_lab(), iptables_backend=backend)
    later = replace(lab, services=lab.services[1:], endpoints=())
    try:
        lifecycle.up(lab)
        with entered(f"{lab.name}:n1"):
            assert os.system(f"iptables-{backend} -t nat {damage}") == 0
            assert os.system(f"iptables-{backend} -I FORWARD -s 192.0.2.0/24 -j DROP") == 0
        change_to(later)
        assert lifecycle.differences(later) == []
        assert "-s 192.0.2.0/24" in xtables.save(f"{lab.name}:n1", backend=backend)[0]
    finally:
        lifecycle.down(lab.name)


def change_to(lab: Lab) -> lifecycle.Outcome:
    return lifecycle.change(lab.name, lambda _: Changed(lab, ()))[1]


def with_node_port(lab: Lab) -> Lab:
    web, *others = lab.services
    http, udp = web.ports
    ports = (replace(http, node_port=30080), udp)
    return replace(lab, services=(replace(web, type="NodePort", ports=ports), *others))


@pytest.mark.kernel
def test_a_kernel_without_accounting_objects_gets_rules_that_do_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(name: str) -> None:
        raise NetlabError(Problem("no-nfacct", name), Exit.MACHINE)

    monkeypatch.setattr(xtables, "has_nfacct", lambda: False)
    monkeypatch.setattr(xtables, "create_nfacct", refuse)
    lab = small_lab()
    try:
        lifecycle.up(lab)
        assert lifecycle.up(lab).changes == ()
        outcome = change_to(with_node_port(lab))
        assert {type(change.item) for change in outcome.changes} == {Update}
        assert lifecycle.up(with_node_port(lab)).changes == ()
        printed, _ = xtables.save(f"{lab.name}:n1")
        assert "nfacct" not in printed
        assert "-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP" in printed
        with entered(f"{lab.name}:n1"):
            # by the rule that stands behind the one that counts
            socket.create_connection(("127.0.0.1", 30080), timeout=5).close()
        change_to(lab)
        assert lifecycle.up(lab).changes == ()
    finally:
        lifecycle.down(lab.name)


@pytest.mark.kernel
def test_whether_there_are_accounting_objects_is_asked_of_the_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert xtables.has_nfacct()
    xtables.has_nfacct.cache_clear()
    monkeypatch.setattr(xtables, "_NFNL_SUBSYS_ACCT", 99)  # of which there is none
    try:
        assert not xtables.has_nfacct()
    finally:
        xtables.has_nfacct.cache_clear()
