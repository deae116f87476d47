"""Services of IPv6 by packets, in the modes made of nftables.

A machine and a client in namespaces of their own.  The endpoints are addresses of the machine
itself, so that one listener hears them all and can tell which of them was chosen.
"""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable, Iterator

import pytest
from msgspec.structs import replace

from labs import fresh_name, small_lab
from netlab.datapath.services import nftables, nftables_flat
from netlab.datapath.state import Tables
from netlab.kernel import nft
from netlab.kernel.namespaces import entered
from netlab.topology.model import (
    Endpoint,
    Lab,
    Node,
    Service,
    ServiceEndpoints,
    ServicePort,
)

pytestmark = pytest.mark.kernel

MACHINE, CLIENT = "fd00:2::11", "fd00:2::1"
ENDPOINTS = [f"fd00:1::{host}" for host in (2, 3, 4)]
OTHERS = [f"fd00:2::1:{host}" for host in range(1, 31)]  # the client's, too
WEB, STICKY, EMPTY = "fd00:99::1", "fd00:99::2", "fd00:99::3"
STICKY_OUTSIDE, FIREWALLED = "fd00:88::2", "fd00:88::1"


def lab() -> Lab:
    small = small_lab()
    ends = tuple(Endpoint(address=address, port=8002, node="n1") for address in ENDPOINTS)
    ports = (ServicePort(port=80, target_port=8002),)
    return replace(
        small,
        service_cidrs=("fd00:99::/108",),
        service_proxy=replace(small.service_proxy, clusterCIDR="10.244.0.0/16,fd00:1::/64"),
        nodes=(
            Node(
                name="n1",
                address="172.21.32.11",
                other_addresses=(MACHINE,),
                pod_cidr="10.244.1.0/24",
            ),
        ),
        services=(
            Service(
                namespace="demo",
                name="web",
                type="LoadBalancer",
                cluster_ip=WEB,
                ports=ports,
                load_balancer_ips=(FIREWALLED,),
                load_balancer_source_ranges=("fd00:2::1:0/120", "10.0.0.0/8"),
            ),
            Service(
                namespace="demo",
                name="sticky",
                type="NodePort",
                cluster_ip=STICKY,
                ports=(ServicePort(port=80, target_port=8002, node_port=30080),),
                external_ips=(STICKY_OUTSIDE,),
                session_affinity="ClientIP",
            ),
            Service(namespace="demo", name="empty", cluster_ip=EMPTY, ports=ports),
        ),
        endpoints=tuple(
            ServiceEndpoints(
                namespace="demo", service=name, port_name="", protocol="TCP", endpoints=ends
            )
            for name in ("web", "sticky")
        ),
    )


@pytest.fixture(params=[nftables.render, nftables_flat.render], ids=["nftables", "nftables-flat"])
def ask(request: pytest.FixtureRequest) -> Iterator[Callable[..., str]]:
    """Which endpoint a connection reaches; else an error of `connect`."""
    machine, client = fresh_name(), fresh_name()
    try:
        for name in (machine, client):
            _ip(f"netns add {name}")
            _ip(f"-n {name} link set lo up")
        _ip(f"link add eth0 netns {machine} type veth peer name eth0 netns {client}")
        for name, addresses in (
            (machine, [f"{MACHINE}/64"]),
            (client, [f"{CLIENT}/64", *(f"{address}/64" for address in OTHERS)]),
        ):
            for address in addresses:
                _ip(f"-n {name} address add {address} dev eth0 nodad")
            _ip(f"-n {name} link set eth0 up")
        for address in ENDPOINTS:
            _ip(f"-n {machine} address add {address}/128 dev lo nodad")
        _ip(f"-n {client} route add default via {MACHINE}")
        # forwarded, then refused: wants a way to go
        _ip(f"-n {machine} route add default via {CLIENT}")
        settings = ["net.ipv6.conf.all.forwarding=1", "net.ipv6.icmp.ratelimit=0"]
        subprocess.run(["ip", "netns", "exec", machine, "sysctl", "-q", *settings], check=True)
        made = lab()
        tables = request.param(made, made.nodes[0])
        assert isinstance(tables, Tables)
        nft.load(machine, tables)
        with entered(machine), socket.socket(socket.AF_INET6) as listener:
            listener.bind(("::", 8002))
            listener.listen()
            listener.settimeout(5)

            def connect(
                address: str, port: int = 80, source: str = CLIENT, patience: float = 5
            ) -> str:
                with entered(client), socket.socket(socket.AF_INET6) as connection:
                    connection.bind((source, 0))
                    connection.settimeout(patience)
                    connection.connect((address, port))
                    accepted, peer = listener.accept()
                    with accepted:
                        assert peer[0] == source
                        return str(accepted.getsockname()[0])

            yield connect
    finally:
        for name in (machine, client):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def _ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True)


def test_services_of_ipv6(ask: Callable[..., str]) -> None:
    assert {ask(WEB) for _ in range(60)} == set(ENDPOINTS)
    with pytest.raises(ConnectionRefusedError):
        ask(EMPTY)
    with pytest.raises(ConnectionRefusedError):
        ask(WEB, 81)
    with pytest.raises(TimeoutError):
        ask("fd00:99::9", patience=0.5)
    with pytest.raises(TimeoutError):
        ask(FIREWALLED, patience=0.5)
    assert {ask(FIREWALLED, source=source) for source in OTHERS} == set(ENDPOINTS)


def test_clients_of_ipv6_are_remembered(ask: Callable[..., str]) -> None:
    first = [ask(STICKY, source=source) for source in OTHERS]
    assert set(first) == set(ENDPOINTS)
    for address, port in ((STICKY, 80), (STICKY_OUTSIDE, 80), (MACHINE, 30080)):
        assert [ask(address, port, source) for source in OTHERS] == first
