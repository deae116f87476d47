"""ipvs mode as it is rendered, held against what the real kube-proxy left."""

from __future__ import annotations

import errno
import os
import random
import re
from collections.abc import Callable

import pytest
from msgspec.structs import replace

import ipvs_golden as golden
from labs import small_lab
from netlab.datapath.describe import shell, summary
from netlab.datapath.services import ipvs, ipvs_proxier
from netlab.datapath.services.choices import choices
from netlab.datapath.services.differences import differences, recognise
from netlab.datapath.services.endpoints import ServiceObjects, Verdict, service_objects
from netlab.datapath.services.explain import compare
from netlab.datapath.services.ipvs_rules import own_chains
from netlab.datapath.services.modes import MODES
from netlab.datapath.services.proxier import service_changes, update_between
from netlab.datapath.state import Balancing, BalancingUpdate, Change, Leftovers
from netlab.kernel import ipset, namespaces
from netlab.kernel import ipvs as kernel_ipvs
from netlab.kernel import ipvs_messages as messages
from netlab.kernel.netlink import NetlinkError
from netlab.lab import draining, lifecycle
from netlab.problems import Exit, NetlabError
from service_cases import cases_lab
from test_services_updates import changed, crowded, next_changes, start, with_services

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


# -- Services that change ------------------------------------------------------------------------


class Node:
    """What a node holds: the updates are applied to it, as the kernel would."""

    def __init__(self, whole: Balancing) -> None:
        self.addresses = {*whole.addresses}
        self.servers = {each.key: each for each in whole.servers}
        self.sets = {each.name: {*each.entries} for each in whole.sets}
        self.texts = own_chains(whole.rules.ipv4), own_chains(whole.rules.ipv6)

    def apply(self, update: BalancingUpdate) -> None:
        for each in update.sets:
            assert self.sets[each.name].isdisjoint(each.entries)
            self.sets[each.name].update(each.entries)
        for each in update.no_sets:
            assert self.sets[each.name].issuperset(each.entries)
            self.sets[each.name].difference_update(each.entries)
        assert self.addresses.isdisjoint(update.addresses)
        assert self.addresses.issuperset(update.no_addresses)
        self.addresses.update(update.addresses)
        self.addresses.difference_update(update.no_addresses)
        self.servers |= {each.key: each for each in update.servers}
        for server in update.no_servers:
            del self.servers[server.key]
        ipv4, ipv6 = self.texts
        self.texts = update.ipv4 or ipv4, update.ipv6 or ipv6

    def is_as(self, whole: Balancing) -> bool:
        fresh = Node(whole)
        return (self.addresses, self.servers, self.sets, _lines(self)) == (
            fresh.addresses,
            fresh.servers,
            fresh.sets,
            _lines(fresh),
        )


def _lines(node: Node) -> list[list[str]]:
    # (load balancers that are barred come in no order)
    return [sorted(text.splitlines()) for text in node.texts]


Alter = Callable[[random.Random, ServiceObjects], ServiceObjects]


def run_changes(seed: int, alter: Alter = lambda _, objects: objects) -> int:
    """40 changes, each compared with a fresh rendering; how many wanted a whole load."""
    rng = random.Random(seed)
    lab = start(rng)
    some = {key: alter(rng, each) for key, each in service_objects(lab).items()}
    lab = with_services(lab, some)
    make, node = ipvs_proxier.IPVSProxier, lab.nodes[0]
    proxier = make(lab, node)
    there = Node(proxier.whole())
    whole_loads = 0
    for _ in range(40):
        changes = {
            key: objects and alter(rng, objects) for key, objects in next_changes(rng, lab).items()
        }
        after = changed(lab, changes)
        update = proxier.update(changes)
        again = update_between(make, lab, after, node, service_changes(lab, after))
        assert again == update or not (again or update)
        lab = after
        if update is None:
            whole_loads += 1
            there = Node(proxier.whole())
        else:
            there.apply(update)
        assert there.is_as(ipvs.render(lab, node)), update
    assert Node(proxier.whole()).is_as(ipvs.render(lab, node))
    return whole_loads


@pytest.mark.parametrize("seed", range(6))
def test_after_any_change_all_is_as_in_a_fresh_rendering(seed: int) -> None:
    assert run_changes(seed) == 0


@pytest.mark.parametrize("seed", range(6, 10))
def test_what_several_services_name_is_left_to_whole_loads(seed: int) -> None:
    assert 0 < run_changes(seed, crowded) < 40


def test_an_endpoint_that_is_replaced_changes_its_servers_alone() -> None:
    lab, node = golden.golden_lab("nodeport")
    (entry, other) = lab.endpoints
    new = replace(entry.endpoints[0], address="10.57.1.99")
    behind = replace(entry, endpoints=(new, *entry.endpoints[1:]))
    update = ipvs_proxier.IPVSProxier(lab, node).update(
        service_changes(lab, replace(lab, endpoints=(behind, other)))
    )
    assert update
    assert {(each.address, each.port) for each in update.servers} == {
        ("10.111.50.9", 80), ("172.31.7.21", 30647), ("10.57.1.1", 30647),
    }  # fmt: skip
    assert [(each.name, each.entries) for each in update.sets + update.no_sets] == [
        ("KUBE-LOOP-BACK", ("10.57.1.99,tcp:8080,10.57.1.99",)),
        ("KUBE-LOOP-BACK", ("10.57.1.4,tcp:8080,10.57.1.4",)),
    ]
    assert update.no_servers == update.addresses == update.no_addresses == ()
    assert update.ipv4 == update.ipv6 == ""


# -- What is read and explained ------------------------------------------------------------------


@states
def test_what_a_node_lists_is_what_it_should_have_and_each_line_is_explained(state: str) -> None:
    lab, node = golden.golden_lab(state)
    listed = golden.listed(state)
    assert differences(lab, node, "ipvs", listed) == []
    reading, blocks = compare(lab, node, MODES["ipvs"], listed)
    lines = [(block, line) for block in blocks.values() for line in block.lines]
    assert len(lines) > 20
    for block, line in lines:
        said = reading.sentence(block, line)
        assert said[0] == said[0].lower() or said.startswith("NodePort")
        assert "  " not in said


def test_listings_of_ipvs_mode_are_recognised() -> None:
    listed = golden.listed("dual-stack")
    together = "".join(listed.values())
    found = recognise(together)
    assert found
    mode, printed = found
    assert mode == "ipvs"
    lab, node = golden.golden_lab("dual-stack")
    assert differences(lab, node, mode, printed) == []


def test_what_differs_is_told_of_the_service_that_it_concerns() -> None:
    lab, node = golden.golden_lab("seed-k8s-slave1")
    four = golden.listed("seed-k8s-slave1")["ip"]
    gone = "-a -t 10.99.174.93:80 -r 10.244.2.5:8002 -m -w 1\n"
    other = four.replace("-r 10.244.1.4:8002 -m -w 1", "-r 10.244.1.9:8002 -m -w 1")
    broken = (
        other.replace(gone, "")
        .replace("add KUBE-CLUSTER-IP 10.108.214.84,tcp:3306\n", "")
        .replace("COMMIT\n*nat", "-A KUBE-FORWARD -j DROP\nCOMMIT\n*nat")
    )
    found = differences(lab, node, "ipvs", {"ip": broken})
    told = {(each.kind, str(each.key), each.ports) for each in found}
    assert told == {
        ("extra-rule", "filter KUBE-FORWARD", ()),
        ("missing-element", "set KUBE-CLUSTER-IP", ("demo/mysql",)),
        ("missing-rule", "virtual servers", ("demo/myblog",)),
        ("other-endpoint", "virtual servers", ("demo/myblog",)),
    }


def test_virtual_servers_of_others_and_those_that_drain_are_no_difference() -> None:
    lab, node = golden.golden_lab("seed-k8s-slave1")
    theirs = "-A -t 192.0.2.1:80 -s wrr\n-a -t 192.0.2.1:80 -r 192.0.2.9:80 -m -w 3\n"
    draining = "-a -t 10.99.174.93:80 -r 10.244.2.9:8002 -m -w 0\n"
    four = golden.listed("seed-k8s-slave1")["ip"]
    assert differences(lab, node, "ipvs", {"ip": four + theirs + draining}) == []
    ours = "-A -t 10.99.174.93:81 -s rr\n"
    (found,) = differences(lab, node, "ipvs", {"ip": four + ours})
    assert (found.kind, found.found) == ("extra-rule", ours.rstrip())


# -- Who is chosen -------------------------------------------------------------------------------


def test_the_choices_that_are_told_are_those_of_the_virtual_servers() -> None:
    """Of every Service port of the table of cases, on both nodes."""
    lab = cases_lab()
    lab = replace(lab, service_proxy=replace(lab.service_proxy, mode="ipvs"))
    for node in lab.nodes:
        servers = {each.key: each for each in ipvs.render(lab, node).servers}
        for service, port in ((s, p) for s in lab.services for p in s.ports):
            for choice in choices(lab, service, port, node):
                if choice.verdict is Verdict.DROP:  # loadBalancerSourceRanges
                    continue
                for to in choice.to:
                    address, _, number = to.rpartition(":")
                    if to.startswith("NodePort"):
                        address, number = node.address, to.split()[1]
                        if "IPv6" in to:
                            address = node.addresses[-1]
                    server = servers[port.protocol.lower(), address.strip("[]"), int(number)]
                    told = {(each.address, each.port) for each in choice.endpoints}
                    assert told == {(each.address, each.port) for each in server.real}
                    assert (choice.verdict is Verdict.FORWARD) is bool(server.real)
                    assert choice.reason


def test_what_policy_local_means_is_said() -> None:
    lab, node = golden.golden_lab("itp-local-nodeport")
    (service,) = lab.services
    first, *_ = choices(lab, service, service.ports[0], node)
    assert first.reason == (
        "internalTrafficPolicy is Local, and none is on this node: ipvs mode then takes all"
    )
    lab, node = golden.golden_lab("itp-local")
    said = {c.reason for s in lab.services for c in choices(lab, s, s.ports[0], node)}
    assert said == {
        "internalTrafficPolicy is Local: endpoints on this node",
        "internalTrafficPolicy is Local, and none is on this node: the virtual server has no real "
        "server",
    }


# -- A machine that lacks it ---------------------------------------------------------------------


def test_what_is_missing_is_named_with_its_package_before_anything_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def none(_: object) -> int:
        raise NetlinkError(errno.ENOENT, "", 0)

    monkeypatch.setattr(kernel_ipvs, "family_id", none)
    monkeypatch.setattr(ipset, "which", lambda name: None)
    lab = small_lab()
    lab = replace(lab, service_proxy=replace(lab.service_proxy, mode="ipvs"))
    with pytest.raises(NetlabError) as caught:
        lifecycle.up(lab)
    assert caught.value.exit_code == Exit.MACHINE
    module, program = caught.value.problems
    assert (module.code, program.code) == ("missing-module", "missing-program")
    assert "ip_vs" in module.message
    assert "linux-image-amd64" in (module.hint or "")
    assert '"ipset"' in program.message
    assert "apt-get install ipset" in (program.hint or "")
    assert namespaces.names_of(lab.name) == []


# -- As commands ---------------------------------------------------------------------------------


def test_the_commands_for_it_are_those_that_one_would_type() -> None:
    whole = ipvs.render(*golden.golden_lab("seed-k8s-slave1"))
    change = Change(verb="add", namespace="x", item=whole)
    text = "\n".join(shell([change], []))
    for line in (
        "ip -n x link add kube-ipvs0 type dummy",
        "address add 10.99.174.93/32 dev kube-ipvs0",
        "add KUBE-CLUSTER-IP 10.99.174.93,tcp:80",
        "-a -t 10.99.174.93:80 -r 10.244.1.4:8002 -m -w 1",
    ):
        assert line in text.splitlines()
    assert "2 virtual servers" in summary(change)
    gone = Change(verb="delete", namespace="x", item=Leftovers(device="kube-ipvs0"))
    assert "ip -n x link del kube-ipvs0" in "\n".join(shell([gone], []))
    assert "kube-ipvs0" in summary(gone)


# -- Messages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["10.99.0.1", "fd00:99::1"])
def test_messages_say_to_pyroute2_what_is_meant(address: str) -> None:
    from pyroute2.netlink.generic.ipvs import ipvsmsg

    channel = object.__new__(messages.Ipvs)
    channel._family = 30
    key = messages.Key("udp", address, 53)
    packed = channel.add_service(messages.Service(key, "mh", 600, True))
    service = ipvsmsg(packed)
    service.decode()
    assert service["cmd"] == 1
    told = dict(service.get_attr("IPVS_CMD_ATTR_SERVICE")["attrs"])
    assert told["IPVS_SVC_ATTR_PROTOCOL"] == 17
    assert (told["IPVS_SVC_ATTR_ADDR"], told["IPVS_SVC_ATTR_PORT"]) == (address, 53)
    assert told["IPVS_SVC_ATTR_SCHED_NAME"] == "mh"
    assert told["IPVS_SVC_ATTR_TIMEOUT"] == 600
    real = "fd00::9" if ":" in address else "10.0.0.9"
    packed = channel.add_destination(messages.packed_key(key), real, 5353, 1)
    destination = ipvsmsg(packed)
    destination.decode()
    assert destination["cmd"] == 5
    told = dict(destination.get_attr("IPVS_CMD_ATTR_DEST")["attrs"])
    assert (told["IPVS_DEST_ATTR_ADDR"], told["IPVS_DEST_ATTR_PORT"]) == (real, 5353)
    assert (told["IPVS_DEST_ATTR_WEIGHT"], told["IPVS_DEST_ATTR_FWD_METHOD"]) == (1, 0)


# -- Real servers that drain ---------------------------------------------------------------------


def test_init_looks_until_the_last_connection_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    key = messages.Key("tcp", "10.99.0.1", 80)
    busy = {(key, "10.0.0.1", 8000), (key, "10.0.0.2", 8000)}
    entered: list[int] = []
    monkeypatch.setattr(draining, "setns", lambda descriptor, _: entered.append(descriptor))
    monkeypatch.setattr(draining, "finish", lambda servers: [e for e in servers if e in busy])
    waiting = draining.Draining(log=pytest.fail)
    home = waiting.descriptors
    assert waiting.until_look_ms is None
    for address in ("10.0.0.1", "10.0.0.2"):  # as JSON brings them
        namespace = os.open("/proc/self/ns/net", os.O_RDONLY)
        waiting.add(namespace, [[list(key), address, 8000]])
    assert len(waiting.descriptors) == 2  # the same namespace, held once
    assert 0 < (waiting.until_look_ms or 0) <= 60_000
    waiting.look()
    assert waiting.until_look_ms is not None
    busy.clear()
    waiting.look()
    assert waiting.until_look_ms is None
    assert waiting.descriptors == home
    assert entered[1::2] == home * 2
    os.close(*home)
