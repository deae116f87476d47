"""Services that name the same address and port: one of them has it, in every mode the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from msgspec.structs import replace

from labs import small_lab
from netlab.datapath.services.claims import losses, settled_ports, taken
from netlab.datapath.services.endpoints import service_objects, service_ports
from netlab.datapath.services.explain import read_service
from netlab.datapath.services.modes import MODES
from netlab.datapath.services.nftables_list import parse
from netlab.datapath.services.reading import reading_of
from netlab.datapath.state import Tables
from netlab.lab import lifecycle
from netlab.topology.model import Endpoint, Lab, ProxyMode, Service, ServiceEndpoints, ServicePort
from test_services_modes import ask

ALL_MODES: tuple[ProxyMode, ...] = ("iptables", "nftables", "nftables-flat")
NFT_MODES: tuple[ProxyMode, ...] = ("nftables", "nftables-flat")

_Made = tuple[str, dict[str, Any]]
# Of two Services the pod behind and what they have; the address asked for and who answers.
CASES: dict[str, tuple[_Made, _Made, str, str]] = {
    "the first by name": (
        ("p1", {"external_ips": ("198.51.100.1",)}),
        ("p3", {"external_ips": ("198.51.100.1",)}),
        "198.51.100.1",
        "p1",
    ),
    "the first with endpoints": (
        ("", {"external_ips": ("198.51.100.2",)}),
        ("p3", {"external_ips": ("198.51.100.2",)}),
        "198.51.100.2",
        "p3",
    ),
    "none with endpoints": (
        ("", {"external_ips": ("198.51.100.3",)}),
        ("", {"external_ips": ("198.51.100.3",)}),
        "198.51.100.3",
        "refused",
    ),
    "an external IP before a cluster IP": (
        ("p1", {"external_ips": ("10.99.0.42",)}),
        ("p3", {"cluster_ip": "10.99.0.42"}),
        "10.99.0.42",
        "p1",
    ),
    "a cluster IP before an external IP": (
        ("p1", {"cluster_ip": "10.99.0.51"}),
        ("p3", {"external_ips": ("10.99.0.51",), "external_traffic_policy": "Local"}),
        "10.99.0.51",
        "p1",
    ),
    "a load balancer IP, without ranges": (
        ("p1", {"external_ips": ("198.51.100.6",), "external_traffic_policy": "Local"}),
        (
            "p3",
            {
                "type": "LoadBalancer",
                "load_balancer_ips": ("198.51.100.6",),
                "load_balancer_source_ranges": ("192.0.2.0/24",),
            },
        ),
        "198.51.100.6",
        "p1",
    ),
    "a Service's own addresses": (
        ("p1", {"external_ips": ("198.51.100.7", "10.99.0.71", "198.51.100.7")}),
        (
            "p3",
            {
                "type": "LoadBalancer",
                "external_ips": ("198.51.100.8", "10.99.0.72"),
                "load_balancer_ips": ("198.51.100.8",),
                "session_affinity": "ClientIP",
            },
        ),
        "10.99.0.72",
        "p3",
    ),
}


def contested_lab(mode: ProxyMode) -> Lab:
    """Two Services of each case: demo/cN-a and demo/cN-b."""
    lab = small_lab()
    pods = {pod.name: pod for pod in lab.pods}
    services, behind = [], []
    for number, (one, other, _, _) in enumerate(CASES.values(), start=1):
        for place, (pod, more) in enumerate((one, other), start=1):
            name = f"c{number}-{'ab'[place - 1]}"
            own = {"cluster_ip": f"10.99.0.{number}{place}", **more}
            port = ServicePort(name="", port=80, protocol="TCP", target_port=8002)
            services.append(Service(namespace="demo", name=name, ports=(port,), **own))
            behind.append(
                ServiceEndpoints(
                    namespace="demo",
                    service=name,
                    port_name="",
                    protocol="TCP",
                    endpoints=tuple(
                        Endpoint(
                            address=pods[p].address, port=8002, node=pods[p].node, pod=f"demo/{p}"
                        )
                        for p in pod.split()
                    ),
                )
            )
    proxy = replace(lab.service_proxy, mode=mode)
    # against the file's order, which means nothing
    return replace(
        lab, service_proxy=proxy, services=tuple(reversed(services)), endpoints=tuple(behind)
    )


def test_who_loses_what() -> None:
    lab = contested_lab("nftables")
    lost = losses(service_ports(lab, lab.nodes[0], 4))
    assert {name: ips for (name, _), ips in lost.items()} == {
        "demo/c1-b": {"198.51.100.1": "demo/c1-a"},
        "demo/c2-a": {"198.51.100.2": "demo/c2-b"},
        "demo/c3-b": {"198.51.100.3": "demo/c3-a"},
        "demo/c4-b": {"10.99.0.42": "demo/c4-a"},
        "demo/c5-b": {"10.99.0.51": "demo/c5-a"},
        "demo/c6-b": {"198.51.100.6": "demo/c6-a"},
    }
    for service in lab.services:
        told = [(info.name, ip, by) for info, ip, by in taken(lab, lab.nodes[0], service)]
        of_service = lost.get((service.key, "tcp"), {})
        assert told == [(service.key, ip, by) for ip, by in of_service.items()]
    settled = {info.name: info for info in settled_ports(lab, lab.nodes[0], 4)}
    assert [name for name, info in settled.items() if not info.has_cluster_ip] == ["demo/c4-b"]
    assert settled["demo/c7-a"].external_ips == ("198.51.100.7",)
    assert settled["demo/c7-b"].external_ips == ()


@pytest.mark.parametrize("mode", NFT_MODES)
def test_each_key_is_there_once_and_in_all_sets_that_of_one_service(mode: ProxyMode) -> None:
    lab = contested_lab(mode)
    rules = MODES[mode].render(lab, lab.nodes[0])
    assert isinstance(rules, Tables)
    for table, objects in parse(rules.tables[0].text).items():
        for name, lines in objects.items():
            keys = Counter(line.partition(" : ")[0] for line in lines if " . tcp . " in line)
            assert not [key for key, count in keys.items() if count > 1], (table, name)
    # the source ranges of a Service that is not reached there are nobody's
    assert "192.0.2.0" not in rules.tables[0].text


@pytest.mark.parametrize("mode", ALL_MODES)
def test_rules_of_each_are_found_whole(mode: ProxyMode) -> None:
    lab = contested_lab(mode)
    node = lab.nodes[0]
    reading_class = reading_of(MODES[mode])
    rules = MODES[mode].render(lab, node)
    assert reading_class
    assert rules
    printed = reading_class(lab, node).rendered(rules)
    for service in lab.services:
        reading, met = read_service(lab, node, service, printed)
        lines = [(each.block.key, line) for each in met for line in each.lines]
        assert lines
        assert {line.state for _, line in lines} == {"there"}
        owners = {owner.service for key, line in lines for owner in reading.owners(key, line.text)}
        # (an endpoint that reaches itself may be several Services')
        assert service.key in owners
        if service.name == "c4-b" and mode != "iptables":
            assert not [line.text for _, line in lines if "10.99.0.42 . tcp" in line.text]


@pytest.mark.parametrize("mode", ALL_MODES)
def test_a_change_of_what_is_shared_wants_a_whole_load(mode: ProxyMode) -> None:
    lab = contested_lab(mode)
    make = MODES[mode].proxier
    assert make
    known = service_objects(lab)

    def update(key: str, **more: Any) -> Any:
        objects = known[key]
        changed = objects._replace(service=replace(objects.service, **more))
        return make(lab, lab.nodes[0]).update({key: changed})

    affinity: dict[str, Any] = {"session_affinity": "ClientIP"}
    for key in ("demo/c1-a", "demo/c1-b", "demo/c4-a", "demo/c4-b", "demo/c5-a", "demo/c5-b"):
        assert update(key, **affinity) is None
        assert update(key, external_ips=(), cluster_ip="10.99.0.99") is None
        assert make(lab, lab.nodes[0]).update({key: None}) is None
    assert update("demo/c7-a", **affinity)
    assert update("demo/c7-b", external_ips=()) is not None
    assert update("demo/c7-a", external_ips=("198.51.100.1",)) is None
    assert update("demo/c7-a", external_ips=("10.99.0.11",)) is None
    other_port = ServicePort(name="", port=81, protocol="TCP", target_port=8002)
    assert update("demo/c7-a", external_ips=("198.51.100.1",), ports=(other_port,))


@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.kernel
def test_one_of_them_is_reached_and_nothing_is_missing(
    mode: ProxyMode, up: Callable[..., lifecycle.Outcome]
) -> None:
    lab = contested_lab(mode)
    up(lab)
    assert lifecycle.differences(lab) == []

    def answer(client: str, address: str) -> str:
        try:
            return ask(f"{lab.name}:{client}", address, 80)
        except ConnectionRefusedError:
            return "refused"
        except OSError:  # in iptables mode such packets of the node's own leave it, as ever
            assert (mode, client) == ("iptables", "n1")
            return "refused"

    for client in ("demo:p0", "n1"):
        found = {name: answer(client, address) for name, (_, _, address, _) in CASES.items()}
        assert found == {name: expected for name, (_, _, _, expected) in CASES.items()}
