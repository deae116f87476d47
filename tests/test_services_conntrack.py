"""Which UDP connections a node forgets, and when it looks."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from labs import small_lab
from netlab.datapath.services.conntrack import UdpServices, is_cleaning_due
from netlab.topology.model import Endpoint, Lab, Service, ServiceEndpoints, ServicePort

SERVING, GONE = ("10.244.1.9", 5353), ("10.244.1.8", 5353)


def dns(*endpoints: Endpoint, protocol: Any = "UDP", **more: Any) -> Lab:
    """A lab with one Service, at every kind of address and of both families."""
    port = ServicePort(name="dns", port=53, protocol=protocol, node_port=30053)
    service = Service(
        namespace="demo",
        name="dns",
        type="LoadBalancer",
        cluster_ip="10.99.0.53",
        other_cluster_ips=("fd99::53",),
        external_ips=("198.51.100.5",),
        load_balancer_ips=("203.0.113.5",),
        ports=(port,),
        **more,
    )
    behind = ServiceEndpoints(
        namespace="demo", service="dns", port_name="dns", protocol=protocol, endpoints=endpoints
    )
    return replace(small_lab("lab"), services=(service,), endpoints=(behind,))


def endpoint(address: str = SERVING[0], **conditions: bool) -> Endpoint:
    return Endpoint(address=address, port=5353, node="n1", **conditions)


def stale(lab: Lab, address: str, port: int, answering: tuple[str, int], family: int = 4) -> bool:
    return UdpServices(lab, lab.nodes[0], family).is_stale(address, port, answering)


@pytest.mark.parametrize(
    ("address", "port"),
    [
        ("10.99.0.53", 53),
        ("198.51.100.5", 53),
        ("203.0.113.5", 53),
        ("172.21.32.11", 30053),
        ("192.0.2.1", 30053),  # another host's port of that number
    ],
)
def test_what_leads_to_nobody_who_serves_is_stale(address: str, port: int) -> None:
    lab = dns(endpoint())
    assert not stale(lab, address, port, SERVING)
    assert stale(lab, address, port, GONE)
    assert stale(lab, address, port, (SERVING[0], 5354))
    assert stale(lab, address, port, (address, port))  # not translated: from before


def test_other_ports_and_addresses_do_not_count() -> None:
    lab = dns(endpoint())
    assert not stale(lab, "10.99.0.53", 99, GONE)
    assert not stale(lab, "192.0.2.1", 53, GONE)


@pytest.mark.parametrize(
    ("conditions", "serves"),
    [
        ({"ready": False, "serving": True, "terminating": True}, True),
        ({"ready": False, "serving": False, "terminating": True}, False),
        ({"ready": False, "serving": False}, False),
    ],
)
def test_who_serves_while_it_ends_keeps_its_connections(
    conditions: dict[str, bool], serves: bool
) -> None:
    lab = dns(endpoint(**conditions), endpoint("10.244.2.9"))
    assert stale(lab, "10.99.0.53", 53, SERVING) is not serves


def test_policies_do_not_count() -> None:
    lab = dns(
        replace(endpoint(), node="n2"),
        internal_traffic_policy="Local",
        external_traffic_policy="Local",
    )
    assert not stale(lab, "10.99.0.53", 53, SERVING)
    assert not stale(lab, "198.51.100.5", 53, SERVING)


def test_without_endpoints_node_ports_are_left_alone() -> None:
    lab = dns(endpoint(ready=False, serving=False))
    assert stale(lab, "10.99.0.53", 53, GONE)
    assert not stale(lab, "172.21.32.11", 30053, GONE)


def test_each_family_has_endpoints_of_its_own() -> None:
    six = ("fd00::9", 5353)
    lab = dns(endpoint(), endpoint(six[0]))
    assert not stale(lab, "fd99::53", 53, six, family=6)
    assert stale(lab, "fd99::53", 53, ("fd00::8", 5353), family=6)
    only_four = dns(endpoint())
    assert stale(only_four, "fd99::53", 53, six, family=6)
    assert not stale(only_four, "fd01::1", 30053, six, family=6)


def test_what_is_not_proxied_or_no_udp_is_nobodys() -> None:
    assert not UdpServices(dns(endpoint(), protocol="TCP"), small_lab().nodes[0], 4)
    label = {"service.kubernetes.io/service-proxy-name": "other"}
    assert not UdpServices(dns(endpoint(), labels=label), small_lab().nodes[0], 4)


def test_cleaning_is_due_when_endpoints_of_udp_change() -> None:
    lab = dns(endpoint())
    assert not is_cleaning_due(lab, lab)
    assert is_cleaning_due(lab, dns(endpoint(terminating=True)))
    assert is_cleaning_due(lab, dns())
    assert is_cleaning_due(lab, replace(lab, endpoints=()))
    assert is_cleaning_due(None, lab)


def test_cleaning_is_not_due_when_something_else_changes() -> None:
    lab = dns(endpoint())
    assert not is_cleaning_due(lab, replace(lab, services=()))
    of_tcp = dns(endpoint(), protocol="TCP")
    assert not is_cleaning_due(of_tcp, dns(protocol="TCP"))
    assert not is_cleaning_due(None, of_tcp)


def test_a_proxy_with_other_settings_is_new_to_all_endpoints() -> None:
    lab = dns(endpoint())
    switched = replace(lab, service_proxy=replace(lab.service_proxy, mode="nftables"))
    assert is_cleaning_due(lab, switched)
    none = replace(lab, service_proxy=replace(lab.service_proxy, mode="none"))
    assert not is_cleaning_due(lab, none)
    assert is_cleaning_due(none, lab)
