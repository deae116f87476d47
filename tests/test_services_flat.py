"""The maps of nftables-flat mode: what is in them, loaded, and changed while they are loaded."""

from __future__ import annotations

import re
import subprocess
import zlib
from collections.abc import Iterator

import pytest
from msgspec.structs import replace

from labs import fresh_name, small_lab
from netlab.datapath.services.nftables_flat import TABLES, render
from netlab.datapath.services.nftables_list import differences
from netlab.datapath.state import Tables
from netlab.kernel import nft, xtables
from netlab.kernel.namespaces import entered
from netlab.lab import lifecycle
from netlab.problems import NetlabError
from netlab.topology.model import Endpoint, Lab, ProxyMode, ServiceEndpoints
from services_golden import NFTABLES_STATES, golden_lab


def text(tables: Tables) -> str:
    return "".join(table.text for table in tables.tables)


def rules(rendered: str) -> list[str]:
    """Every rule with its chain, in the table for IPv4."""
    first = rendered.partition("\ntable ip6 ")[0]
    chains = re.findall(r"\tchain (\S+) \{\n((?:\t\t.*\n)*)", first)
    return [f"{name}: {line.strip()}" for name, body in chains for line in body.splitlines()]


def elements(rendered: str, name: str) -> list[str]:
    """Elements of a set or map in the table for IPv4."""
    found = re.search(
        rf"\t(?:set|map) {name} \{{\n(?:\t\t.*\n)*?\t\telements = \{{([^}}]*)", rendered
    )
    return [entry.strip() for entry in found[1].split(",")] if found else []


def many(services: int, endpoints: int = 2, **more: object) -> Lab:
    """Services s0, s1, ..."""
    lab = small_lab()
    web = lab.services[0]
    return replace(
        lab,
        services=tuple(
            replace(
                web, name=f"s{i}", cluster_ip=f"10.100.{i // 250}.{i % 250 + 1}",
                ports=web.ports[:1], **more,
            )
            for i in range(services)
        ),
        endpoints=tuple(
            ServiceEndpoints(
                namespace="demo", service=f"s{i}", port_name="http", protocol="TCP",
                endpoints=tuple(
                    Endpoint(address=f"10.244.{j % 2 + 1}.{i % 200 + 2}", port=8002 + j // 2)
                    for j in range(endpoints)
                ),
            )
            for i in range(services)
        ),
    )  # fmt: skip


def rendered(lab: Lab) -> str:
    return text(render(lab, lab.nodes[0]))


def test_a_service_is_elements_of_maps() -> None:
    lab = many(1)
    made = rendered(lab)
    assert elements(made, "service-ways") == ["10.100.0.1 . tcp . 80 : 0:2"]
    assert elements(made, "service-endpoints") == [
        "10.100.0.1 . tcp . 80 . 0:1 : 10.244.1.2 . 8002",
        "10.100.0.1 . tcp . 80 . 0:2 : 10.244.2.2 . 8002",
    ]
    assert elements(made, "service-chains") == ["0:2 : jump draw-2"]
    assert "draw-2: meta priority set numgen random mod 2 offset 1" in rules(made)


@pytest.mark.parametrize("affinity", ["None", "ClientIP"])
def test_rules_do_not_depend_on_the_number_of_services(affinity: str) -> None:
    few, more = (rendered(many(count, session_affinity=affinity)) for count in (1, 300))
    assert rules(few) == rules(more)
    assert len(elements(more, "service-ways")) == 300


def test_a_service_changes_no_element_of_another() -> None:
    """Else an update would have to write what did not change."""
    lab = many(40, session_affinity="ClientIP")
    fewer = replace(lab, services=lab.services[7:], endpoints=lab.endpoints[7:])
    for name in ("service-ways", "service-affinity", "affinity-endpoints", "service-chains"):
        assert set(elements(rendered(fewer), name)) <= set(elements(rendered(lab), name))


def test_endpoints_that_remember_have_numbers_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(zlib, "crc32", lambda data: 0xFFFFFFFE)
    numbers = [
        entry.split(" : ")[0]
        for entry in elements(rendered(many(2, session_affinity="ClientIP")), "affinity-endpoints")
    ]
    # neither 0 nor the highest, which nft calls "none" and "root"
    assert sorted(numbers) == ["0:1", "0:2", "0:3", "ffff:fffe"]


def test_more_endpoints_than_a_number_has_room_for_are_said_to_be() -> None:
    lab = many(1)
    crowd = tuple(Endpoint(address="10.244.1.2", port=port) for port in range(1, 32769))
    (entry,) = lab.endpoints
    with pytest.raises(NetlabError, match=r"demo/s0:http: 32768 endpoints are more than"):
        rendered(replace(lab, endpoints=(replace(entry, endpoints=crowd),)))


@pytest.fixture
def namespace() -> Iterator[str]:
    name = fresh_name()
    subprocess.run(["ip", "netns", "add", name], check=True)
    yield name
    subprocess.run(["ip", "netns", "delete", name], check=True)


@pytest.mark.kernel
@pytest.mark.parametrize("state", NFTABLES_STATES)
def test_a_loaded_rendering_is_printed_as_itself(namespace: str, state: str) -> None:
    tables = render(*golden_lab(state))
    nft.load(namespace, tables)
    nft.load(namespace, tables)
    assert nft.names(namespace) == set(TABLES)
    assert differences(text(tables), nft.listing(namespace, TABLES)) == []


@pytest.mark.kernel
@pytest.mark.parametrize("affinity", ["None", "ClientIP"])
def test_a_change_is_a_transaction_of_elements(namespace: str, affinity: str) -> None:
    """What docs/services-nftables-flat.md says of updates: an endpoint more, as it may be written.

    With a number of endpoints that no Service had before, chains too; none that is there changes.
    """
    before, after = (many(5, session_affinity=affinity), many(5, 3, session_affinity=affinity))
    after = replace(after, endpoints=(after.endpoints[0], *before.endpoints[1:]))
    first, second = rendered(before), rendered(after)
    nft.load(namespace, render(before, before.nodes[0]))
    commands = []
    old_rules, new_rules = rules(first), rules(second)
    for rule in (rule for rule in new_rules if rule not in old_rules):
        chain, _, statement = rule.partition(": ")
        commands += [f"add chain ip netlab {chain}", f"add rule ip netlab {chain} {statement}"]
    names = ["service-ways", "service-endpoints", "service-affinity", "affinity-endpoints"]
    for name in (*names, "service-chains"):
        old, new = elements(first, name), elements(second, name)
        for verb, entries in (("delete", set(old) - set(new)), ("add", set(new) - set(old))):
            keys = (entry.rsplit(" : ", 1)[0] if verb == "delete" else entry for entry in entries)
            commands += [f"{verb} element ip netlab {name} {{ {key} }}" for key in keys]
    with entered(namespace):
        subprocess.run(["nft", "-f", "-"], input="\n".join(commands), text=True, check=True)
    assert differences(second, nft.listing(namespace, TABLES)) == []


@pytest.mark.kernel
def test_from_mode_to_mode_nothing_is_left_over() -> None:
    lab = small_lab()
    node = f"{lab.name}:n1"
    kube_proxy = {"ip kube-proxy", "ip6 kube-proxy"}
    modes: list[tuple[ProxyMode, set[str]]] = [
        ("nftables-flat", set(TABLES)),
        ("nftables", kube_proxy),
        ("nftables-flat", set(TABLES)),
        ("iptables", set()),
        ("nftables-flat", set(TABLES)),
        ("none", set()),
    ]
    try:
        for mode, tables in modes:
            in_mode = replace(lab, service_proxy=replace(lab.service_proxy, mode=mode))
            lifecycle.up(in_mode)
            assert lifecycle.up(in_mode).changes == ()
            ours = nft.names(node) & (kube_proxy | set(TABLES))
            assert ours == tables
            assert ("KUBE-SERVICES" in xtables.save(node)[0]) == (mode == "iptables")
    finally:
        lifecycle.down(lab.name)
