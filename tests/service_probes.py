"""A lab of the table of cases that is up, its clients, and what they hear."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from msgspec.structs import replace

from labs import six
from netlab.datapath.state import namespace_name
from netlab.kernel.namespaces import entered
from netlab.lab import lifecycle
from netlab.topology.model import IPTablesBackend, Lab, Protocol, ProxyMode
from service_cases import DROPPED, N1, REFUSED, Case, cases_lab

PODS = {"p0": "10.244.1.2", "p1": "10.244.2.2", "p2": "10.244.1.3", "p3": "10.244.2.3"}
OWN = {**PODS, "outside": "172.21.32.1"}
# Of cbr0 and flannel.1 on n1, and of flannel-v6.1
MASQUERADED = {"10.244.1.1", "10.244.1.0", "fd00:10:244:1::1", "fd00:10:244:1::"}


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


def run(namespace: str, command: str) -> None:
    inside = ["ip", "netns", "exec", namespace, *command.split()]
    subprocess.run(inside, check=True, capture_output=True)


def route_by_n1(probes: Probes) -> None:
    """From outside external addresses are reached by way of n1, and ClusterIPs too."""
    for network in ("203.0.113.0/24", "10.96.0.0/12"):
        for of in (str, six):
            run(probes.namespace("outside"), f"ip route replace {of(network)} via {of(N1)}")


@contextlib.contextmanager
def cases_up(
    mode: ProxyMode, backend: IPTablesBackend | None = None, **proxy: object
) -> Iterator[Probes]:
    lab = cases_lab()
    changed = replace(lab.service_proxy, mode=mode, **proxy)
    lab = replace(lab, service_proxy=changed, iptables_backend=backend)
    probes = Probes(lab)
    try:
        lifecycle.up(lab)
        route_by_n1(probes)
        # Refusals are ICMP errors, of which the kernel sends one client a few in a second.
        limits = "net.ipv4.icmp_ratelimit=0 net.ipv6.icmp.ratelimit=0"
        for node in ("n1", "n2"):
            run(probes.namespace(node), f"sysctl {limits}")
        yield probes
    finally:
        lifecycle.down(lab.name)


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
