"""The table of cases in each mode of the service proxy, by packets on the real kernel."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import select
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
from msgspec.structs import replace

from labs import six
from netlab.datapath.state import namespace_name
from netlab.kernel.namespaces import entered
from netlab.lab import lifecycle
from netlab.lab.edits import Changed
from netlab.topology.model import (
    DetectLocal,
    IPTablesBackend,
    IPTablesProxy,
    Lab,
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
    cases_lab,
    cluster_ip,
    external_ip,
    load_balancer_ip,
    node_port,
)

pytestmark = pytest.mark.kernel

MODES: tuple[ProxyMode, ...] = ("nftables", "nftables-flat", "iptables")
# Rules of iptables in the other backend too
LAYOUTS: tuple[tuple[ProxyMode, IPTablesBackend | None], ...] = (
    *((mode, None) for mode in MODES),
    ("iptables", "legacy"),
)

PODS = {"p0": "10.244.1.2", "p1": "10.244.2.2", "p2": "10.244.1.3", "p3": "10.244.2.3"}
OWN = {**PODS, "outside": "172.21.32.1"}
# Of cbr0 and flannel.1 on n1, and of flannel-v6.1
MASQUERADED = {"10.244.1.1", "10.244.1.0", "fd00:10:244:1::1", "fd00:10:244:1::"}

# What makes addresses those of a family: a test is about both.
FAMILIES = pytest.mark.parametrize("of", [str, six], ids=["IPv4", "IPv6"])


Family = Callable[[str], str]


class Answer(NamedTuple):
    """What a client hears: who answers and which client it sees, or why nobody does."""

    who: str
    client: str = ""


class Probes:
    """A lab that is up, and its clients."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab

    def namespace(self, client: str) -> str:
        if client in PODS:
            return namespace_name(self.lab.name, "demo", client)
        return namespace_name(self.lab.name, "_switch" if client == "outside" else client)

    def ask(
        self,
        client: str,
        address: str,
        port: int = 80,
        protocol: Protocol = "TCP",
        *,
        source: str = "",
        patience: float = 5,
    ) -> Answer:
        kind = socket.SOCK_STREAM if protocol == "TCP" else socket.SOCK_DGRAM
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with entered(self.namespace(client)), socket.socket(family, kind) as connection:
            connection.settimeout(patience)
            try:
                if source:
                    connection.bind((source, 0))
                if protocol == "TCP" and family == socket.AF_INET6:
                    _connect6(connection, (address, port), patience)
                else:
                    connection.connect((address, port))
                if protocol == "TCP":
                    return _http(connection)
                return _datagrams(connection)
            except ConnectionRefusedError:
                return Answer(REFUSED)
            except TimeoutError:
                return Answer(DROPPED)

    def pods(self, client: str, address: str, port: int = 80, times: int = 12) -> set[str]:
        """Who answers one client, asked several times."""
        return {self.ask(client, address, port).who for _ in range(times)}


_IPV6_RECVERR = 25  # linux/in6.h; Python does not name it


def _connect6(connection: socket.socket, address: tuple[str, int], patience: float) -> None:
    """Connect, and hear of a refusal at once.

    It is there before the call that sends the SYN has returned.  Over IPv6 TCP then takes no notice
    until it sends the SYN again, a second later (Linux 6.18); the socket's queue of errors has it.
    """
    connection.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVERR, 1)
    connection.setblocking(False)
    refused = connection.connect_ex(address)
    if refused == errno.EINPROGRESS:
        waiting = select.poll()
        waiting.register(connection, select.POLLOUT)
        events = waiting.poll(1000 * patience)
        if not events:
            raise TimeoutError
        refused = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if not refused and events[0][1] & select.POLLERR:
            _, ((_, _, error), *_), _, _ = connection.recvmsg(0, 512, socket.MSG_ERRQUEUE)
            (refused,) = struct.unpack_from("=I", error)  # struct sock_extended_err
    if refused:
        raise OSError(refused, os.strerror(refused))
    connection.settimeout(patience)


def _http(connection: socket.socket) -> Answer:
    """Two requests on one connection: who, and whom it sees."""
    return Answer(_get(connection, "/hostname"), _address(_get(connection, "/clientip")))


def _address(client: str) -> str:
    """The address of "10.244.1.2:40000" or "[fd00:10:244:1::2]:40000"."""
    return client.rpartition(":")[0].strip("[]")


def _get(connection: socket.socket, path: str) -> str:
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    answer = b""
    while b"\r\n\r\n" not in answer or not answer.endswith(b"\n"):
        received = connection.recv(4096)
        assert received, answer
        answer += received
    return answer.partition(b"\r\n\r\n")[2].decode().strip()


def _datagrams(connection: socket.socket) -> Answer:
    said = []
    for question in (b"hostname", b"clientip"):
        connection.send(question)
        said.append(connection.recv(2048).decode().strip())
    return Answer(said[0], _address(said[1]))


def _run(namespace: str, command: str) -> None:
    inside = ["ip", "netns", "exec", namespace, *command.split()]
    subprocess.run(inside, check=True, capture_output=True)


def _route_by_n1(probes: Probes) -> None:
    """From outside external addresses are reached by way of n1, and ClusterIPs too."""
    for network in ("203.0.113.0/24", "10.96.0.0/12"):
        for of in (str, six):
            _run(probes.namespace("outside"), f"ip route replace {of(network)} via {of(N1)}")


@contextlib.contextmanager
def _up(
    mode: ProxyMode, backend: IPTablesBackend | None = None, **proxy: object
) -> Iterator[Probes]:
    lab = cases_lab()
    changed = replace(lab.service_proxy, mode=mode, **proxy)
    lab = replace(lab, service_proxy=changed, iptables_backend=backend)
    probes = Probes(lab)
    try:
        lifecycle.up(lab)
        _route_by_n1(probes)
        # Refusals are ICMP errors, of which the kernel sends one client a few in a second.
        limits = "net.ipv4.icmp_ratelimit=0 net.ipv6.icmp.ratelimit=0"
        for node in ("n1", "n2"):
            _run(probes.namespace(node), f"sysctl {limits}")
        yield probes
    finally:
        lifecycle.down(lab.name)


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda layout: "-".join(filter(None, layout)))
def probes(request: pytest.FixtureRequest) -> Iterator[Probes]:
    """The lab of the cases in one mode."""
    with _up(*request.param) as up:
        yield up


def check(probes: Probes, case: Case) -> None:
    """Whether a case holds over both families, which wait for nothing at the same time."""
    with ThreadPoolExecutor(2) as threads:
        for _ in threads.map(lambda each: _check(probes, each), case.of_both_families()):
            pass


def _check(probes: Probes, case: Case) -> None:
    mode = probes.lab.service_proxy.mode
    expected = case.of(mode)
    if expected is None:
        return
    ask = (case.client, case.address, case.port, case.protocol)
    if expected in (REFUSED, DROPPED):
        who = probes.ask(*ask, patience=0.5 if expected == DROPPED else 5).who
        assert (case.address, who) == (case.address, expected)
        return
    missing, seen = set(expected.split()), set()
    # 30 tries an endpoint: the last one is missed once in 10^12 runs
    for _ in range(30 * len(missing)):
        answer = probes.ask(*ask)
        assert answer.who in expected.split(), case.address
        seen.add((answer.who, answer.client))
        missing.discard(answer.who)
        if not missing:
            break
    assert not missing
    told = case.seen_in(mode)
    for who, client in seen if told else ():
        # Who meets itself would answer itself past the Service.
        if told == "asked":
            assert client == case.address
        elif told == "masqueraded" or who == case.client:
            assert client in MASQUERADED
        else:
            assert client in (OWN[case.client], six(OWN[case.client]))


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
        _run(probes.namespace("outside"), f"ip address add {address} dev lo")
    yield [address.split("/")[0] for address in addresses]
    for address in addresses:
        _run(probes.namespace("outside"), f"ip address del {address} dev lo")


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
        _route_by_n1(probes)  # which is no part of the lab

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
    with _up(mode, **settings) as probes:
        for case in cases:
            check(probes, case)
