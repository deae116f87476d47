"""The table of cases in each mode of the service proxy, by packets on the real kernel."""

from __future__ import annotations

import itertools
import socket
import time
from collections.abc import Callable, Iterator

import pytest
from msgspec.structs import replace

from labs import six
from netlab.kernel.namespaces import entered
from netlab.lab import lifecycle
from netlab.lab.edits import Changed
from netlab.topology.model import (
    DetectLocal,
    IPTablesBackend,
    IPTablesProxy,
    NFTablesProxy,
    Protocol,
    ProxyMode,
    TrafficPolicy,
)
from service_cases import (
    ALL,
    CASES,
    DROPPED,
    LOCALHOST,
    MIGRATING,
    N1,
    NO_ROUTE_LOCALNET,
    README,
    REFUSED,
    THERE,
    Case,
    cluster_ip,
    external_ip,
    load_balancer_ip,
    node_port,
)
from service_probes import MASQUERADED, PODS, Probes, cases_up, check, route_by_n1, run

pytestmark = pytest.mark.kernel

MODES: tuple[ProxyMode, ...] = ("nftables", "nftables-flat", "iptables")
# Rules of iptables in the other backend too
LAYOUTS: tuple[tuple[ProxyMode, IPTablesBackend | None], ...] = (
    *((mode, None) for mode in MODES),
    ("iptables", "legacy"),
)

# What makes addresses those of a family: a test is about both.
FAMILIES = pytest.mark.parametrize("of", [str, six], ids=["IPv4", "IPv6"])


Family = Callable[[str], str]


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda layout: "-".join(filter(None, layout)))
def probes(request: pytest.FixtureRequest) -> Iterator[Probes]:
    """The lab of the cases in one mode."""
    with cases_up(*request.param) as up:
        yield up


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_packets_to_services(probes: Probes, case: Case) -> None:
    check(probes, case)


STICKY_KEYS = (
    (cluster_ip("sticky"), 80),
    (external_ip("sticky"), 80),
    (load_balancer_ip("sticky"), 80),
    (N1, node_port("sticky")),
)


@FAMILIES
@pytest.mark.parametrize("client", ["p0", "p3", "n1", "outside"])
def test_a_client_is_remembered_at_all_addresses_of_a_port(
    probes: Probes, client: str, of: Family
) -> None:
    keys = STICKY_KEYS if client != "p3" else STICKY_KEYS[:1]
    answers = {probes.ask(client, of(host), port).who for host, port in keys for _ in range(8)}
    assert len(answers) == 1
    assert answers < {"p0", "p1", "p2", "p3"}


@pytest.fixture
def sources(probes: Probes, of: Family) -> Iterator[list[str]]:
    """Addresses of the machine outside, none of which any endpoint knows."""
    addresses = [of(f"192.0.2.{host}/32") for host in range(101, 141)]
    for address in addresses:
        run(probes.namespace("outside"), f"ip address add {address} dev lo")
    yield [address.split("/")[0] for address in addresses]
    for address in addresses:
        run(probes.namespace("outside"), f"ip address del {address} dev lo")


@FAMILIES
def test_each_client_is_remembered_by_itself_and_each_port_too(
    probes: Probes, sources: list[str], of: Family
) -> None:
    def endpoint(source: str, protocol: Protocol) -> str:
        address = of(external_ip("sticky"))
        return probes.ask("outside", address, protocol=protocol, source=source).who

    tcp = [endpoint(source, "TCP") for source in sources]
    assert set(tcp) == {"p0", "p1", "p2", "p3"}
    udp = [endpoint(source, "UDP") for source in sources]
    assert set(udp) == {"p0", "p1", "p2", "p3"}
    assert tcp != udp
    assert [endpoint(source, "TCP") for source in sources] == tcp
    assert [endpoint(source, "UDP") for source in sources] == udp


@FAMILIES
def test_who_is_remembered_counts_only_where_policy_allows_it(
    probes: Probes, sources: list[str], of: Family
) -> None:
    """Through the ClusterIP to any endpoint, through the load balancer to those of the node."""

    def endpoint(source: str, address: str) -> str:
        return probes.ask("outside", address, source=source).who

    everywhere, here = of(cluster_ip("sticky-local")), of(external_ip("sticky-local"))
    first = [endpoint(source, everywhere) for source in sources]
    assert set(first) == {"p0", "p1", "p2", "p3"}
    second = [endpoint(source, here) for source in sources]
    for before, now in zip(first, second, strict=True):
        assert now == before if before in ("p0", "p2") else now in ("p0", "p2")
    # Where two know the client, the first in the order of addresses is asked first.
    assert [endpoint(source, everywhere) for source in sources] == second


@FAMILIES
def test_who_is_remembered_stays_so_when_the_policy_changes(
    probes: Probes, sources: list[str], of: Family
) -> None:
    address = of(external_ip("sticky-changing"))

    def endpoints() -> list[str]:
        return [probes.ask("outside", address, source=source).who for source in sources]

    def change(**settings: TrafficPolicy) -> None:
        services = tuple(
            replace(each, **settings) if each.name == "sticky-changing" else each
            for each in probes.lab.services
        )
        changed = Changed(replace(probes.lab, services=services), ())
        lifecycle.change(probes.lab.name, lambda _: changed)
        route_by_n1(probes)  # which is no part of the lab

    first = endpoints()
    assert set(first) == {"p0", "p1", "p2", "p3"}
    change(internal_traffic_policy="Local")
    assert endpoints() == first
    change(external_traffic_policy="Local")
    second = endpoints()
    for before, now in zip(first, second, strict=True):
        assert now == before if before in ("p0", "p2") else now in ("p0", "p2")
    change()
    assert endpoints() == second


def test_a_client_is_forgotten_when_the_time_is_over(probes: Probes) -> None:
    address = cluster_ip("sticky-briefly")
    first = {each: probes.ask("p0", each).who for each in (address, six(address))}
    for _ in range(30):  # a new choice may be the old one, once in four
        time.sleep(1.2)  # nothing tells that the kernel has forgotten
        first = {each: who for each, who in first.items() if probes.ask("p0", each).who == who}
        if not first:
            return
    pytest.fail(f"always the same endpoint: {first}")


@FAMILIES
@pytest.mark.parametrize(
    ("client", "to", "port", "seen"),
    [
        ("p0", cluster_ip("single"), 80, "own"),
        ("p0", load_balancer_ip("single"), 80, "masqueraded"),
        ("outside", N1, node_port("single"), "masqueraded"),
    ],
)
def test_sctp_is_translated(
    probes: Probes, of: Family, client: str, to: str, port: int, seen: str
) -> None:
    """An INIT behind the DNAT; there need not be any SCTP in the kernel."""
    from scapy.layers.inet import IP
    from scapy.layers.sctp import SCTP, SCTPChunkInit

    chunk = SCTPChunkInit(init_tag=7, n_in_streams=1, n_out_streams=1)
    init = SCTP(sport=4000, dport=port) / chunk
    address = of(to)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with entered(probes.namespace("p3")):
        receiver = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_SCTP)
    with entered(probes.namespace(client)):
        sender = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_SCTP)
    with receiver, sender:
        receiver.settimeout(5)
        sender.sendto(bytes(init), (address, 0))
        packet, (source, *_) = receiver.recvfrom(4096)
    received = SCTP(packet) if ":" in address else IP(packet)[SCTP]
    assert source == of(PODS["p0"]) if seen == "own" else source in MASQUERADED
    assert (received.dport, received[SCTPChunkInit].init_tag) == (8002, 7)


# fmt: off
VARIANTS = {
    "every address takes NodePorts": (
        {"nodePortAddresses": ("0.0.0.0/0", "::/0")},
        [
            Case("", "p0", "10.244.1.1", "p1 p2 p3", port=node_port("cluster"), seen="masqueraded"),
            Case("", "outside", N1, "p1 p2 p3", port=node_port("cluster"), seen="masqueraded"),
            Case("", "outside", N1, "p0 p2", port=node_port("local"), seen="own"),
            Case("", "p0", "10.244.1.1", "p0 p1 p2 p3", port=node_port("local"), seen="own"),
            Case("", "p0", "10.244.1.1", REFUSED, port=node_port("empty")),
            Case("", "outside", N1, DROPPED, port=node_port("remote")),
            Case(
                "loopback", "n1", "127.0.0.1", REFUSED, port=node_port("cluster"),
                otherwise={"iptables": "p1 p2 p3"}, source=MIGRATING,
            ),
            Case(
                "ClusterIP", "p0", cluster_ip("web"), REFUSED, port=node_port("cluster"),
                otherwise={"iptables": None}, source=README,
            ),
        ],
    ),
    "masqueradeAll, pods known by their bridge": (
        {
            "detectLocalMode": "BridgeInterface",
            "detectLocal": DetectLocal(bridgeInterface="cbr0"),
            "nftables": NFTablesProxy(masqueradeAll=True, masqueradeBit=9),
            "iptables": IPTablesProxy(masqueradeAll=True, masqueradeBit=9),
        },
        [
            Case("", "p0", cluster_ip("web"), "p1 p2 p3", seen="masqueraded"),
            Case("", "p0", external_ip("local"), "p0 p1 p2 p3", seen="own"),
            Case("", "outside", external_ip("local"), "p0 p2", seen="own"),
        ],
    ),
    "pods known by the names of their links": (
        {
            "detectLocalMode": "InterfaceNamePrefix",
            "detectLocal": DetectLocal(interfaceNamePrefix="cb"),
        },
        [
            Case("", "p0", cluster_ip("web"), "p1 p2 p3", seen="own"),
            Case("", "n1", cluster_ip("web"), "p1 p2 p3", seen="masqueraded"),
            Case("", "p0", external_ip("local"), "p0 p1 p2 p3", seen="own"),
        ],
    ),
    "pods not known": (
        {"clusterCIDR": ""},
        [
            Case("", "p0", cluster_ip("web"), "p1 p2 p3", seen="own"),
            Case("", "p0", external_ip("local"), "p0 p2", seen="own"),
            Case("", "n1", external_ip("local"), "p0 p1 p2 p3", seen="masqueraded"),
            Case("", "p0", external_ip("cluster"), "p1 p2 p3", seen="masqueraded"),
        ],
    ),
    "NodePorts passed on from loopback": (
        {
            "nodePortAddresses": ("primary", "localhost"),
            "featureGates": {"KubeProxyNFTablesLocalhostNodePorts": True},
        },
        [
            Case("", "n1", "127.0.0.1", "p1 p2 p3", port=node_port("cluster"), seen="masqueraded"),
            Case(
                "", "n1", "127.0.0.1", "p0 p2", port=node_port("local"), seen="masqueraded",
                otherwise={"iptables": ALL}, source=LOCALHOST,
            ),
            Case(
                "", "n1", "127.0.0.1", REFUSED, port=node_port("cluster"), protocol="UDP",
                otherwise={"iptables": "p1 p2 p3"}, source=LOCALHOST,
            ),
            Case("", "n1", "127.0.0.1", REFUSED, port=node_port("empty")),
            Case(
                "", "n1", "127.0.0.1", REFUSED, port=node_port("remote"),
                otherwise={"iptables": THERE}, source=LOCALHOST, ipv4_only=True,
            ),
            Case(
                "", "n1", "::1", REFUSED, port=node_port("remote"),
                otherwise={"iptables": DROPPED}, source=NO_ROUTE_LOCALNET,
            ),
            Case("", "n1", "127.0.0.2", REFUSED, port=node_port("cluster"), ipv4_only=True),
            Case("", "outside", N1, "p1 p2 p3", port=node_port("cluster")),
        ],
    ),
    "NodePorts refused on loopback, external IPs not served": (
        {
            "featureGates": {
                "KubeProxyNFTablesLocalhostNodePorts": True,
                "AllowServiceExternalIPs": False,
            }
        },
        [
            Case(
                "", "n1", "127.0.0.1", REFUSED, port=node_port("cluster"),
                otherwise={"iptables": "p1 p2 p3"}, source=LOCALHOST,
            ),
            Case(
                "", "n1", "127.0.0.1", REFUSED, port=node_port("cluster"), protocol="UDP",
                otherwise={"iptables": "p1 p2 p3"}, source=LOCALHOST,
            ),
            Case("", "outside", N1, "p1 p2 p3", port=node_port("cluster")),
            Case("", "p0", load_balancer_ip("cluster"), "p1 p2 p3"),
        ],
    ),
}
# fmt: on


@pytest.mark.parametrize(("mode", "variant"), list(itertools.product(MODES, VARIANTS)))
def test_settings_of_the_proxy(mode: ProxyMode, variant: str) -> None:
    settings, cases = VARIANTS[variant]
    with cases_up(mode, **settings) as probes:
        for case in cases:
            check(probes, case)
