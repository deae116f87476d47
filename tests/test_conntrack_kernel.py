"""Connection tracking on the real kernel: entries read and deleted, stale ones of UDP forgotten."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from connections import carry_out, printed
from labs import fresh_name
from netlab.datapath.services.conntrack import is_cleaning_due
from netlab.datapath.services.modes import mode_of
from netlab.datapath.state import Ruleset, Tables
from netlab.kernel import conntrack, nft, xtables
from netlab.kernel.conntrack import Counters, Icmp, Tuple
from netlab.kernel.namespaces import entered, open_current
from netlab.kernel.syscalls import CLONE_NEWNET, setns, unshare
from netlab.lab import change, lifecycle
from netlab.lab.connections import forget_stale_on
from netlab.topology.load import load
from netlab.topology.model import ProxyMode
from services_golden import steps

pytestmark = pytest.mark.kernel

MODES: tuple[ProxyMode, ...] = ("iptables", "nftables", "nftables-flat")


@pytest.fixture
def namespace() -> Iterator[int]:
    """A descriptor of a fresh network namespace with `lo` up, which ends with it."""
    home = open_current()
    unshare(CLONE_NEWNET)
    fresh = open_current()
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    setns(home, CLONE_NEWNET)
    os.close(home)
    yield fresh
    os.close(fresh)


def track(namespace: int) -> None:
    """Track and count connections, and translate 192.0.2.1:53 of UDP to 127.0.0.1:5353."""
    with entered(namespace), open("/proc/sys/net/netfilter/nf_conntrack_acct", "w") as switch:
        switch.write("1")
    nft.change(
        namespace,
        "add table inet test\n"
        "add chain inet test out { type nat hook output priority -100; }\n"
        "add rule inet test out ip daddr 192.0.2.1 udp dport 53 dnat ip to 127.0.0.1:5353\n"
        "add rule inet test out ct state new\n",
    )
    with entered(namespace):
        subprocess.run(["ip", "route", "add", "192.0.2.0/24", "dev", "lo"], check=True)


def test_entries_tell_of_translation_state_and_counters(namespace: int) -> None:
    track(namespace)
    with (
        entered(namespace),
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
        socket.create_server(("::1", 80), family=socket.AF_INET6),
        socket.create_connection(("::1", 80)) as tcp,
    ):
        server.bind(("127.0.0.1", 5353))
        client.connect(("192.0.2.1", 53))
        client.send(b"12345")
        server.recv(100)
        source = client.getsockname()
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as ping:
            # echo request, checksum, id 7, sequence 1
            ping.sendto(bytes([8, 0, 0xF7, 0xF7, 0, 7, 0, 1]), ("127.0.0.1", 0))
        found = conntrack.dump(namespace)
        by_protocol = {entry.protocol: entry for entry in found}
        assert len(by_protocol) == len(found) == 3
        udp = by_protocol[socket.IPPROTO_UDP]
        assert udp.original == Tuple(source[0], "192.0.2.1", source[1], 53)
        assert udp.reply == Tuple("127.0.0.1", source[0], 5353, source[1])
        assert udp.status == ("confirmed", "dst-nat")
        assert udp.sent == Counters(1, 20 + 8 + 5)
        assert udp.answered == Counters(0, 0)
        assert udp.timeout_s
        assert 0 < udp.timeout_s <= 30
        assert by_protocol[socket.IPPROTO_TCP].family == 6
        assert by_protocol[socket.IPPROTO_TCP].state == "ESTABLISHED"
        assert "assured" in by_protocol[socket.IPPROTO_TCP].status
        assert by_protocol[socket.IPPROTO_TCP].original.source_port == tcp.getsockname()[1]
        assert by_protocol[socket.IPPROTO_ICMP].original.icmp == Icmp(id=7, type=8, code=0)
        assert by_protocol[socket.IPPROTO_ICMP].original.source_port is None
        assert [entry.family for entry in conntrack.dump(namespace, 6)] == [6]
        assert {entry.family for entry in conntrack.dump(namespace, 4)} == {4}


def test_what_is_deleted_is_gone_and_the_rest_stays(namespace: int) -> None:
    track(namespace)
    with (
        entered(namespace),
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one,
        socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as other,
        socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as ping,
    ):
        one.sendto(b"", ("192.0.2.1", 53))
        other.sendto(b"", ("::1", 53))
        ping.sendto(bytes([8, 0, 0xF7, 0xF7, 0, 7, 0, 1]), ("127.0.0.1", 0))
        first = {entry.original.destination: entry for entry in conntrack.dump(namespace)}
        assert first.keys() == {"192.0.2.1", "::1", "127.0.0.1"}
        assert conntrack.delete(namespace, [first["192.0.2.1"]]) == 1
        assert conntrack.delete(namespace, [first["192.0.2.1"]]) == 0
        (left,) = conntrack.dump(namespace, 6)
        assert left.id == first["::1"].id
        assert conntrack.delete(namespace, first.values()) == 2
        assert conntrack.dump(namespace) == []


@pytest.mark.parametrize("mode", MODES)
def test_those_go_and_stay_that_go_and_stay_under_kube_proxy(
    namespace: int, mode: ProxyMode
) -> None:
    before = None
    for step in steps("seq-udp-conntrack"):
        if "shell" in step.change:
            carry_out(namespace, step.change["shell"])
        lab = replace(step.lab, service_proxy=replace(step.lab.service_proxy, mode=mode))
        rules = mode_of(lab).render(lab, step.node)
        if isinstance(rules, Ruleset):
            xtables.restore(namespace, rules)
        elif isinstance(rules, Tables):
            nft.load(namespace, rules)
        if is_cleaning_due(before, lab):
            forget_stale_on(lab, step.node, namespace)
        assert printed(namespace) == sorted(step.read("conntrack.txt").strip().splitlines())
        before = lab


OBJECTS = """
{apiVersion: v1, kind: Node, metadata: {name: n1}}
---
{apiVersion: v1, kind: Node, metadata: {name: n2}}
---
{apiVersion: v1, kind: Pod, metadata: {name: client}, spec: {nodeName: n1}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template: {metadata: {labels: {app: web}}}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  clusterIP: 10.96.0.80
  selector: {app: web}
  ports: [{name: udp, port: 53, protocol: UDP, targetPort: 5353}, {name: http, port: 80}]
"""


class Client:
    """UDP and TCP from one pod, each always from the same port."""

    def __init__(self, namespace: str) -> None:
        with entered(namespace):
            self._udp = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(12)]
            self.tcp = socket.create_connection(("10.96.0.80", 80), timeout=5)
        for each in self._udp:
            each.settimeout(5)
            each.connect(("10.96.0.80", 53))

    def asked(self) -> list[str]:
        """Who answers each socket."""
        answers = []
        for each in self._udp:
            each.send(b"hostname")
            answers.append(each.recv(2048).decode().strip())
        return answers

    def close(self) -> None:
        for each in (*self._udp, self.tcp):
            each.close()


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[str]:
    """A running lab with a client and a Service of UDP and TCP in front of two pods."""
    file = tmp_path / "lab.yaml"
    file.write_text(OBJECTS)
    name = fresh_name()
    lifecycle.up(load(file, name).lab)
    yield name
    lifecycle.down(name)


@pytest.fixture
def client(lab: str) -> Iterator[Client]:
    made = Client(f"{lab}:default:client")
    yield made
    made.close()


@pytest.mark.parametrize("mode", MODES)
def test_a_client_that_keeps_sending_is_led_to_who_is_left(
    lab: str, client: Client, mode: ProxyMode
) -> None:
    lifecycle.change(lab, lambda running: change.proxy(running, mode))
    first = client.asked()
    gone, stays = sorted(set(first))
    lifecycle.change(lab, lambda running: change.ready(running, [gone], ready=False))
    assert set(client.asked()) == {stays}
    # Who is back gets new connections only: the others lead to one who serves.
    lifecycle.change(lab, lambda running: change.ready(running, [gone], ready=True))
    assert set(client.asked()) == {stays}
    client.tcp.sendall(b"GET /hostname HTTP/1.0\r\n\r\n")
    assert client.tcp.recv(100).startswith(b"HTTP/1.")


def test_connections_live_on_when_the_mode_changes(lab: str, client: Client) -> None:
    first = client.asked()
    assert len(set(first)) == 2
    for mode in ("nftables", "iptables", "nftables-flat"):
        lifecycle.change(lab, lambda running, mode=mode: change.proxy(running, mode))
        assert client.asked() == first


def test_nothing_is_asked_where_no_endpoint_of_udp_changed(
    lab: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(conntrack, "dump", lambda *question: asked.append(question) or [])
    lifecycle.change(lab, lambda running: change.label(running, ["pod/client"], {"a": "b"}))
    assert asked == []
    lifecycle.change(lab, lambda running: change.scale(running, ["deploy/web"], 3))
    assert asked == [(f"{lab}:n1", 4), (f"{lab}:n2", 4)]
