"""Rules that follow the Services: whatever changes, they become what a fresh rendering says."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from msgspec.structs import replace

from labs import small_lab
from netlab.datapath.services.endpoints import ServiceObjects, service_objects
from netlab.datapath.services.modes import MODES
from netlab.datapath.services.nftables_list import differences
from netlab.datapath.services.proxier import ServiceChanges, service_changes, update_between
from netlab.datapath.state import Rules, Tables, Update
from netlab.kernel import nft, xtables
from netlab.kernel.namespaces import entered
from netlab.lab import lifecycle, record
from netlab.lab.edits import Changed
from netlab.problems import NetlabError
from netlab.topology.model import (
    Endpoint,
    Lab,
    ProxyMode,
    Service,
    ServiceEndpoints,
    ServicePort,
)
from services_golden import SEQUENCES, Step, steps

NFT_MODES: tuple[ProxyMode, ...] = ("nftables", "nftables-flat")


def some_service(rng: random.Random, number: int) -> ServiceObjects:
    """Any Service, with addresses and ports that no other number has, and endpoints that have."""
    type_ = rng.choice(["ClusterIP", "ClusterIP", "NodePort", "LoadBalancer", "ExternalName"])
    ports = tuple(
        ServicePort(
            name=name,
            port=rng.choice([80, 81]) + 100 * place,
            protocol=rng.choice(["TCP", "UDP", "SCTP"]),
            node_port=(
                30000 + 10 * number + place
                if type_ in ("NodePort", "LoadBalancer") and rng.random() < 0.8
                else None
            ),
        )
        for place, name in enumerate(rng.sample(["http", "dns", "metrics"], rng.randint(1, 2)))
    )
    balanced = type_ == "LoadBalancer" and rng.random() < 0.8
    ranges = ("10.244.0.0/16", "10.244.1.0/24", "172.21.32.0/24", "192.0.2.7/32", "fd00::/8")
    service = Service(
        namespace="demo",
        name=f"s{number}",
        type=type_,
        cluster_ip=rng.choice(
            [f"10.99.1.{number}", f"10.99.1.{number}", "None", f"fd99::{number}"]
        ),
        other_cluster_ips=rng.choice([(), (f"fd99::1:{number}",)]),
        ports=ports,
        external_ips=rng.choice([(), (f"198.51.100.{number}", f"fd98::{number}")]),
        load_balancer_ips=(f"203.0.113.{number}", f"fd97::{number}") if balanced else (),
        load_balancer_source_ranges=tuple(rng.sample(ranges, rng.choice([0, 1, 3]))),
        session_affinity=rng.choice(["None", "None", "ClientIP"]),
        affinity_timeout_s=rng.choice([90, 10800]),
        external_traffic_policy=rng.choice(["Cluster", "Local"]),
        internal_traffic_policy=rng.choice(["Cluster", "Cluster", "Local"]),
    )
    behind = tuple(
        ServiceEndpoints(
            namespace="demo",
            service=service.name,
            port_name=port.name,
            protocol=port.protocol,
            endpoints=some_endpoints(rng),
        )
        for port in ports
    )
    return ServiceObjects(service, behind)


def some_endpoints(rng: random.Random) -> tuple[Endpoint, ...]:
    found = []
    for _ in range(rng.choice([0, 1, 1, 2, 2, 3, 5])):
        node = rng.choice([1, 2])
        last = rng.randint(2, 9)
        found.append(
            Endpoint(
                address=f"fd00:{node}::{last}" if rng.random() < 0.3 else f"10.244.{node}.{last}",
                port=rng.choice([8002, 8003]),
                node=f"n{node}",
                ready=rng.random() < 0.8,
                terminating=rng.random() < 0.2,
                for_zones=rng.choice([(), (), ("z1",)]),
            )
        )
    return tuple(found)


def another(rng: random.Random, now: ServiceObjects) -> ServiceObjects:
    """The Service with something else about it; often only its endpoints."""
    number = int(now.service.name[1:])
    if rng.random() < 0.5:
        behind = tuple(replace(entry, endpoints=some_endpoints(rng)) for entry in now.endpoints)
        return ServiceObjects(now.service, behind)
    fresh = some_service(rng, number)
    if rng.random() < 0.5:
        return fresh
    field = rng.choice(
        ["session_affinity", "affinity_timeout_s", "external_traffic_policy",
         "internal_traffic_policy", "load_balancer_source_ranges", "external_ips", "cluster_ip"]
    )  # fmt: skip
    service = replace(now.service, **{field: getattr(fresh.service, field)})
    return ServiceObjects(service, now.endpoints)


def crowded(rng: random.Random, objects: ServiceObjects) -> ServiceObjects:
    """The Service with addresses that others may have, too."""
    number = int(objects.service.name[1:])
    few = ["198.51.100.1", "198.51.100.2", "fd98::1", "10.99.1.1", "10.99.1.2", "fd99::2"]
    service = replace(
        objects.service,
        cluster_ip=rng.choice([f"10.99.1.{number}", f"10.99.1.{number}", f"fd99::{number}"]),
        external_ips=tuple(rng.sample(few, rng.choice([0, 0, 1, 2]))),
        load_balancer_ips=tuple(rng.sample(few, objects.service.type == "LoadBalancer")),
    )
    return objects._replace(service=service)


def with_services(lab: Lab, services: Mapping[str, ServiceObjects]) -> Lab:
    return replace(
        lab,
        services=tuple(objects.service for objects in services.values()),
        endpoints=tuple(entry for objects in services.values() for entry in objects.endpoints),
    )


def start(rng: random.Random) -> Lab:
    lab = small_lab()
    nodes = tuple(replace(node, labels={"topology.kubernetes.io/zone": "z1"}) for node in lab.nodes)
    proxy = replace(
        lab.service_proxy,
        clusterCIDR="10.244.0.0/16,fd00::/8",
        nodePortAddresses=rng.choice([(), ("0.0.0.0/0", "::/0")]),
        featureGates={"KubeProxyNFTablesLocalhostNodePorts": rng.random() < 0.5},
    )
    services = {f"demo/s{i}": some_service(rng, i) for i in range(1, 7)}
    return with_services(replace(lab, nodes=nodes, service_proxy=proxy), services)


def next_changes(rng: random.Random, lab: Lab) -> ServiceChanges:
    """One to three Services that come, change or go."""
    known = service_objects(lab)
    changes: dict[str, ServiceObjects | None] = {}
    for number in rng.sample(range(1, 9), rng.choice([1, 1, 1, 2, 3])):
        key = f"demo/s{number}"
        if key not in known:
            changes[key] = some_service(rng, number)
        else:
            changes[key] = None if rng.random() < 0.25 else another(rng, known[key])
    return changes


def changed(lab: Lab, changes: ServiceChanges) -> Lab:
    services = {**service_objects(lab), **changes}
    return with_services(lab, {key: each for key, each in services.items() if each is not None})


def text(rules: Rules | None) -> str:
    assert isinstance(rules, Tables)
    return "".join(table.text for table in rules.tables)


def names(rules: Rules) -> list[str]:
    assert isinstance(rules, Tables)
    return [f"{table.family} {table.name}" for table in rules.tables]


@pytest.mark.kernel
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("mode", NFT_MODES)
def test_after_any_change_the_rules_are_those_of_a_fresh_rendering(
    namespace: int, mode: ProxyMode, seed: int
) -> None:
    assert run_changes(namespace, mode, seed) == 0


@pytest.mark.kernel
def test_numbers_that_meet_are_left_to_whole_loads(
    namespace: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    checksum = zlib.crc32
    monkeypatch.setattr(zlib, "crc32", lambda data: checksum(data) % 24 - 1 & 0xFFFFFFFF)
    assert 0 < run_changes(namespace, "nftables-flat", 4) < 25


@pytest.mark.kernel
@pytest.mark.parametrize("seed", range(5, 8))
@pytest.mark.parametrize("mode", NFT_MODES)
def test_what_several_services_name_is_left_to_whole_loads(
    namespace: int, mode: ProxyMode, seed: int
) -> None:
    assert 0 < run_changes(namespace, mode, seed, crowded) < 25


def run_changes(
    namespace: int,
    mode: ProxyMode,
    seed: int,
    alter: Callable[[random.Random, ServiceObjects], ServiceObjects] = lambda _, objects: objects,
) -> int:
    """25 changes in a namespace, each compared; how many wanted a whole load."""
    rng = random.Random(seed)
    whole_loads = 0
    lab = start(rng)
    lab = with_services(
        lab, {key: alter(rng, objects) for key, objects in service_objects(lab).items()}
    )
    node = lab.nodes[0]
    make = MODES[mode].proxier
    assert make
    proxier = make(lab, node)
    whole = proxier.whole()
    assert isinstance(whole, Tables)
    nft.load(namespace, whole)
    with nft.Session(namespace) as session:
        for _ in range(25):
            changes = {
                key: objects and alter(rng, objects)
                for key, objects in next_changes(rng, lab).items()
            }
            after = changed(lab, changes)
            update = proxier.update(changes)
            assert update == update_between(make, lab, after, node, service_changes(lab, after))
            if update is None:
                nft.load(namespace, proxier.whole())
                whole_loads += 1
            elif update:
                session.change(update.tables)
            lab = after
            fresh = MODES[mode].render(lab, node)
            printed = nft.listing(namespace, names(whole))
            assert differences(text(fresh), printed) == [], update
    assert text(proxier.whole()) == text(fresh)
    return whole_loads


@pytest.mark.parametrize("mode", NFT_MODES)
def test_an_update_is_as_long_as_what_changed(mode: ProxyMode) -> None:
    rng = random.Random(7)
    few = start(rng)
    services = {
        **service_objects(few),
        **{f"demo/s{i}": some_service(rng, i) for i in range(9, 99)},
    }
    many = with_services(few, services)
    changes = {"demo/s1": another(rng, services["demo/s1"])}
    make = MODES[mode].proxier
    assert make
    short, long = (make(lab, few.nodes[0]).update(changes) for lab in (few, many))
    assert short
    assert long
    assert len(long.tables) <= len(short.tables)


@pytest.mark.parametrize("mode", NFT_MODES)
def test_what_no_rule_depends_on_is_no_update(mode: ProxyMode) -> None:
    lab = small_lab()
    make = MODES[mode].proxier
    assert make
    proxier = make(lab, lab.nodes[0])
    web = service_objects(lab)["demo/web"]
    labelled = replace(web.service, labels={"team": "a"}, selector={"app": "other"})
    assert proxier.update({"demo/web": web._replace(service=labelled)}) == Update()
    assert proxier.update({"demo/gone": None}) == Update()


@pytest.mark.kernel
def test_a_session_says_what_was_refused_and_goes_on(namespace: int) -> None:
    with nft.Session(namespace) as session:
        session.change("add table ip a\n")
        with pytest.raises(NetlabError, match=r'line 2, "delete table ip b": .*No such file'):
            session.change("add table ip c\ndelete table ip b\n")
        session.change("add table ip d\n")
        assert nft.names(namespace) == {"ip a", "ip d"}
        os.kill(session.pid, signal.SIGKILL)
        with pytest.raises(NetlabError, match=r"libnftables ended its process .SIGKILL."):
            session.change("add table ip e\n")


def flat_lab() -> Lab:
    """A lab in which Service demo/web remembers its clients."""
    lab = small_lab()
    web, empty = lab.services
    return replace(
        lab,
        service_proxy=replace(lab.service_proxy, mode="nftables-flat"),
        services=(replace(web, session_affinity="ClientIP"), empty),
    )


def with_endpoints_of_empty(lab: Lab) -> Lab:
    """The Service demo/empty gets two endpoints."""
    entry = ServiceEndpoints(
        namespace="demo",
        service="empty",
        port_name="",
        protocol="TCP",
        endpoints=tuple(Endpoint(address=f"10.244.1.{i}", port=8002, node="n1") for i in (2, 3)),
    )
    return replace(lab, endpoints=(*lab.endpoints, entry))


def change_to(lab: Lab) -> lifecycle.Outcome:
    return lifecycle.change(lab.name, lambda _: Changed(lab, ()))[1]


def nft_in(namespace: str, command: str) -> str:
    with entered(namespace):
        return subprocess.run(
            ["nft", *command.split()], check=True, capture_output=True, text=True
        ).stdout


@pytest.mark.kernel
def test_a_running_lab_is_updated_without_asking_what_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lab = flat_lab()
    node = f"{lab.name}:n1"
    try:
        lifecycle.up(lab)
        nft_in(node, "add element ip netlab affinity { 10.244.1.9 . 0:7 timeout 1h }")
        with monkeypatch.context() as asked:
            for reading in (nft, "listing"), (nft, "names"), (xtables, "save"):
                asked.setattr(*reading, None)
            outcome = change_to(with_endpoints_of_empty(lab))
            (first, second) = (change.item for change in outcome.changes)
            assert isinstance(first, Update)
            assert "10.99.0.2 . tcp . 80 : 0:2" in first.tables
            assert isinstance(second, Update)
            fewer = replace(with_endpoints_of_empty(lab), pods=lab.pods[:3])
            assert not any(isinstance(c.item, Update) for c in change_to(fewer).changes)
        # another Service's clients are still known
        assert "10.244.1.9 . 0:7" in nft_in(node, "list set ip netlab affinity")
        assert lifecycle.differences(fewer) == []
    finally:
        lifecycle.down(lab.name)


@pytest.mark.kernel
def test_an_endpoint_that_comes_back_remembers_nobody() -> None:
    """As in nftables mode, where its set of clients goes with it."""
    lab = flat_lab()
    node = f"{lab.name}:n1"
    last = lab.endpoints[0].endpoints[-1]
    fewer = replace(lab, endpoints=tuple(
        replace(entry, endpoints=entry.endpoints[:-1]) for entry in lab.endpoints
    ))  # fmt: skip
    try:
        lifecycle.up(lab)
        printed = nft_in(node, "list map ip netlab affinity-endpoints")
        numbers = dict(re.findall(r"([0-9a-f]+:[0-9a-f]+) : ([0-9.]+) \. 8002", printed))
        assert len(numbers) == 6
        for number in numbers:
            nft_in(node, f"add element ip netlab affinity {{ 10.244.1.9 . {number} timeout 1h }}")
        change_to(fewer)
        remembered = nft_in(node, "list set ip netlab affinity")
        for number, address in numbers.items():
            assert (f". {number} " in remembered) == (address != last.address)
    finally:
        lifecycle.down(lab.name)


@pytest.mark.kernel
@pytest.mark.parametrize(
    "damage", ["delete table ip netlab", "flush map ip netlab service-ways", "flush ruleset"]
)
def test_rules_that_cannot_be_updated_are_loaded_whole(damage: str) -> None:
    lab = with_endpoints_of_empty(flat_lab())
    node = f"{lab.name}:n1"
    try:
        lifecycle.up(lab)
        nft_in(node, damage)
        after = replace(lab, endpoints=lab.endpoints[:-1])
        change_to(after)
        assert lifecycle.differences(after) == []
    finally:
        lifecycle.down(lab.name)


@pytest.mark.kernel
def test_a_lab_that_was_left_halfway_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that is killed between what it declares and what it loads."""
    lab = flat_lab()
    after = with_endpoints_of_empty(lab)
    try:
        lifecycle.up(lab)
        record.write(lab.name, record.encode(after))
        once_more = replace(after, services=(replace(after.services[0], labels={"a": "b"}),
                                             after.services[1]))  # fmt: skip
        change_to(once_more)
        assert lifecycle.differences(once_more) == []
    finally:
        lifecycle.down(lab.name)


# Chains that a proxy which stays deletes with its next event.
_STALE = re.compile(r"\n\tchain \S+/\S+ \{\n\t\}\n")


def recorded(step: Step) -> str | None:
    """What the real kube-proxy left in nftables mode; None where it had not come to it yet."""
    if step.sequence == "seq-service-cidr" and step.number in (1, 2):
        return None  # it heeds another ServiceCIDR with its next full sync
    if step.sequence == "seq-flushed" and step.number > 0:
        return None  # it notices with the family's next change that somebody flushed the rules
    return _STALE.sub("\n", step.read("nftables.txt"))


def not_only_services(before: Step, after: Step) -> bool:
    """Whether more than Services changes: all chains may then be others."""
    return (
        before.node != after.node
        or before.lab.service_proxy != after.lab.service_proxy
        or before.lab.service_cidrs != after.lab.service_cidrs
    )


@pytest.mark.kernel
@pytest.mark.parametrize("sequence", [name for name in SEQUENCES if name != "seq-switch-mode"])
@pytest.mark.parametrize("mode", NFT_MODES)
def test_after_each_step_the_rules_are_those_of_the_real_kube_proxy(
    namespace: int, mode: ProxyMode, sequence: str
) -> None:
    make, render = MODES[mode].proxier, MODES[mode].render
    before: Step | None = None
    for step in steps(sequence):
        fresh = render(step.lab, step.node)
        assert isinstance(fresh, Tables)
        update = None
        if before is not None:
            services = service_changes(before.lab, step.lab)
            update = update_between(make, before.lab, step.lab, step.node, services)
            assert (update is None) is not_only_services(before, step)
        if update is None:
            nft.load(namespace, fresh)
        elif update:
            nft.change(namespace, update.tables)
        printed = nft.listing(namespace, names(fresh))
        assert differences(text(fresh), printed) == [], update
        if mode == "nftables" and (golden := recorded(step)) is not None:
            assert differences(golden, printed) == [], step.change
        before = step


class Unread:
    """What takes the place of all Services' objects, and cannot be gone through."""


@pytest.mark.parametrize("mode", NFT_MODES)
def test_a_process_that_stays_looks_at_nothing_but_what_changes(mode: ProxyMode) -> None:
    rng = random.Random(5)
    lab = start(rng)
    make = MODES[mode].proxier
    assert make
    proxier: Any = make(lab, lab.nodes[0])
    proxier.whole()
    for _ in range(30):
        changes = next_changes(rng, lab)
        before = [proxier._known[key] for key in changes if key in proxier._known]
        after = [objects for objects in changes.values() if objects]
        for table in proxier._tables:
            assert table.update(Unread(), before, after) is not None
        lab = changed(lab, changes)
        proxier._known = service_objects(lab)
