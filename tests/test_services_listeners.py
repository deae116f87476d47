"""What kube-proxy itself listens for: answers and listeners are those of the real one."""

from __future__ import annotations

import contextlib
import http.client
import socket
from collections.abc import Callable, Iterator

import pytest
from msgspec.structs import replace

from labs import dual_stack_lab, six, small_lab
from netlab.datapath.services.modes import MODES
from netlab.datapath.state import Server, namespace_name
from netlab.kernel.namespaces import entered
from netlab.lab import answers, lifecycle
from netlab.topology.model import Endpoint, Lab, ProxyMode, ServicePort
from services_golden import GOLDEN, golden_lab, read, steps

STATES = sorted(path.parent.name for path in GOLDEN.glob("*/health.txt"))
PROXIES: tuple[ProxyMode, ...] = ("iptables", "nftables", "nftables-flat")
PORT = 32180


def served(lab: Lab, mode: ProxyMode, node: str) -> list[Server]:
    return list(MODES[mode].servers(in_mode(lab, mode), lab.node(node)))


def in_mode(lab: Lab, mode: ProxyMode) -> Lab:
    return replace(lab, service_proxy=replace(lab.service_proxy, mode=mode))


def answer_of(server: Server) -> list[str]:
    """What is said to a request, as lines; without the fields that every server in Go adds."""
    assert server.page is not None
    page = answers.Page(server.page.status, server.page.fields, server.page.body)
    conversation = answers.Announcement(lambda: page)
    said = conversation.receive(b"GET /some/path HTTP/1.1\r\nHost: x\r\n\r\n").decode()
    assert not conversation.over
    head, _, body = said.partition("\r\n\r\n")
    status, *fields = head.split("\r\n")
    assert fields.pop() == f"Content-Length: {len(body)}"
    assert fields.pop().startswith("Date: ")
    return [status.removeprefix("HTTP/1.1 "), *fields, "", *body.split("\n")]


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("mode", PROXIES)
def test_answers_are_those_of_the_real_kube_proxy(state: str, mode: ProxyMode) -> None:
    lab, node = golden_lab(state)
    (server,) = served(lab, mode, node.name)
    (recorded,) = [
        each for each in read(state, "health.txt").strip().split("\n\nGET ") if ":32" in each
    ]
    url, *lines = recorded.removeprefix("GET ").split("\n")
    assert lines == answer_of(server)
    assert url == f"http://{node.address}:{server.listen[0][1]}/"
    assert server.listen[0][0] == "TCP"


def test_answers_follow_a_rolling_update_as_those_of_the_real_kube_proxy() -> None:
    recorded, states = "", set()
    for step in steps("seq-rollout"):
        recorded = read(f"seq-rollout/step-{step.number}", "health.txt") or recorded
        (server,) = served(step.lab, "iptables", step.node.name)
        assert recorded.rstrip().split("\n")[1:] == answer_of(server)
        states.add(answer_of(server)[0])
    assert states == {"200 OK", "503 Service Unavailable"}


@pytest.mark.parametrize("mode", ["iptables", "nftables"])
def test_listeners_are_those_of_the_real_kube_proxy(mode: ProxyMode) -> None:
    lab, node = golden_lab("lb-local")
    (server,) = served(lab, mode, node.name)
    own = {"*:10256", "127.0.0.1:10249"}  # of the program, not of a Service
    recorded = set(read("lb-local", f"listeners-{mode}.txt").split()) - own
    assert {f"{ip}:{port}" for ip in server.addresses for _, port in server.listen} == recorded


@pytest.mark.parametrize("mode", ["nftables", "nftables-flat"])
@pytest.mark.parametrize("state", ["nodeport-localhost-proxy", "nodeport-localhost-reject"])
def test_loopback_is_listened_on_as_by_the_real_kube_proxy(state: str, mode: ProxyMode) -> None:
    lab, node = golden_lab(state)
    found = served(lab, mode, node.name)
    own = {"*:10256", "127.0.0.1:10249"}
    recorded = set(read(state, "listeners.txt").split()) - own
    listening = {f"{each.addresses[0]}:{each.listen[0][1]}" for each in found}
    assert listening == recorded
    for each in found:
        assert each.backends == (("10.42.1.60", 8080), ("10.42.2.60", 8080))
    (service,) = lab.services
    local = replace(service, external_traffic_policy="Local", session_affinity="ClientIP")
    for each in served(replace(lab, services=(local,)), mode, node.name):
        assert each.backends == (("10.42.1.60", 8080),)
        assert each.sticky_s == 10800
    assert served(replace(lab, endpoints=()), mode, node.name) == []


@pytest.mark.parametrize(
    ("addresses", "listening"),
    [
        (("0.0.0.0/0",), ("0.0.0.0",)),
        (("192.168.77.0/24", "127.0.0.0/8"), ("127.0.0.1", "192.168.77.21")),
        (("10.1.0.0/16",), None),
    ],
)
@pytest.mark.parametrize("mode", PROXIES)
def test_addresses_are_those_that_take_node_ports(
    mode: ProxyMode, addresses: tuple[str, ...], listening: tuple[str, ...] | None
) -> None:
    lab, node = golden_lab("lb-local")
    lab = replace(lab, service_proxy=replace(lab.service_proxy, nodePortAddresses=addresses))
    found = [server.addresses for server in served(lab, mode, node.name)]
    assert found == ([listening] if listening else [])


def test_each_family_has_its_own_listener_and_counts_its_own_endpoints() -> None:
    lab, node = golden_lab("dual-stack")
    (service,) = lab.services
    assert service.type == "LoadBalancer"
    policy = replace(service, external_traffic_policy="Local", health_check_node_port=PORT)
    found = served(replace(lab, services=(policy,)), "iptables", node.name)
    assert [server.addresses for server in found] == [("0.0.0.0",), ("::",)]
    local = [
        {
            endpoint.address
            for entry in lab.endpoints
            for endpoint in entry.endpoints
            if endpoint.node == node.name and (":" in endpoint.address) is six
        }
        for six in (False, True)
    ]
    for server, expected in zip(found, local, strict=True):
        assert server.page is not None
        assert server.page.fields[-1] == ("X-Load-Balancing-Endpoint-Weight", str(len(expected)))


@pytest.mark.parametrize(
    "change",
    [
        {"external_traffic_policy": "Cluster"},
        {"health_check_node_port": None},
        {"type": "NodePort"},
        {"labels": {"service.kubernetes.io/service-proxy-name": "mine"}},
    ],
)
def test_others_have_none(change: dict[str, object]) -> None:
    lab, node = golden_lab("lb-local")
    (service,) = lab.services
    lab = replace(lab, services=(replace(service, **change),))
    assert served(lab, "iptables", node.name) == []


def test_what_is_no_request_is_answered_as_by_go() -> None:
    said = answers.Announcement(lambda: answers.Page(200, (), "")).receive(b"hello\r\n\r\n")
    assert said == (
        b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\n"
        b"Connection: close\r\n\r\n400 Bad Request"
    )


# On the kernel


def with_load_balancer(mode: ProxyMode, *local: Endpoint) -> Lab:
    """Service web as a load balancer with policy Local, and endpoints on n1."""
    lab = small_lab()
    web, empty = lab.services
    ports = (ServicePort(name="http", port=80, target_port=8002, node_port=30080),)
    gate = replace(
        web,
        type="LoadBalancer",
        ports=ports,
        external_traffic_policy="Local",
        health_check_node_port=PORT,
    )
    return in_mode(with_endpoints(replace(lab, services=(gate, empty)), *local), mode)


def with_endpoints(lab: Lab, *local: Endpoint) -> Lab:
    http_port = lab.endpoints[0]
    remote = next(each for each in http_port.endpoints if each.node == "n2")
    behind = replace(http_port, endpoints=(*local, remote))
    return replace(lab, endpoints=(behind,))


P0 = Endpoint(address="10.244.1.2", port=8002, node="n1", pod="demo/p0")
P2 = Endpoint(address="10.244.1.3", port=8002, node="n1", pod="demo/p2")


@contextlib.contextmanager
def asking(lab: Lab, client: str, address: str) -> Iterator[http.client.HTTPConnection]:
    """A connection that stays open, from a namespace of a lab."""
    connection = http.client.HTTPConnection(address, PORT)
    with entered(namespace_name(lab.name, client)):
        connection.sock = socket.create_connection((address, PORT), timeout=5)
    with contextlib.closing(connection):
        yield connection


def answer(connection: http.client.HTTPConnection) -> tuple[int, str | None]:
    """The status, and how many endpoints it tells of."""
    connection.request("GET", "/healthz")
    response = connection.getresponse()
    assert b'"name": "web"' in response.read()
    return response.status, response.headers["X-Load-Balancing-Endpoint-Weight"]


@pytest.mark.kernel
@pytest.mark.parametrize("of", [str, six], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("mode", PROXIES)
def test_nodes_tell_load_balancers_whether_they_have_endpoints(
    mode: ProxyMode, of: Callable[[str], str]
) -> None:
    lab = with_load_balancer(mode, P0, P2)
    both = dual_stack_lab(lab)
    n1, n2 = (of(node.address) for node in lab.nodes)
    try:
        assert lifecycle.up(both).unserved == ()
        with asking(lab, "_switch", n2) as other:
            assert answer(other) == (200, "1")
        with asking(lab, "_switch", n1) as kept:
            assert answer(kept) == (200, "2")
            draining = replace(P0, ready=False, serving=True, terminating=True)
            for endpoints, expected in (
                ((P0, replace(P2, ready=False, serving=False)), (200, "1")),
                ((draining,), (503, "0")),
                ((), (503, "0")),
                ((P0,), (200, "1")),
            ):
                lifecycle.up(dual_stack_lab(with_endpoints(lab, *endpoints)))
                assert answer(kept) == expected
                with asking(lab, "_switch", n1) as fresh:
                    assert answer(fresh) == expected
            for address in map(of, ("10.244.1.1", "127.0.0.1")):  # NodePorts are there, or not
                if mode == "iptables":
                    with asking(lab, "n1", address) as connection:
                        assert answer(connection) == (200, "1")
                else:
                    with pytest.raises(ConnectionRefusedError), asking(lab, "n1", address):
                        pass
            cluster = replace(lab.services[0], external_traffic_policy="Cluster")
            lifecycle.up(dual_stack_lab(replace(lab, services=(cluster,))))
            assert kept.sock.recv(1) == b""
        with pytest.raises(ConnectionRefusedError), asking(lab, "_switch", n1):
            pass
    finally:
        lifecycle.down(lab.name)


@pytest.mark.kernel
def test_who_else_has_the_port_is_told_and_without_a_proxy_nobody_answers() -> None:
    lab = with_load_balancer("none", P0)
    try:
        lifecycle.up(lab)
        with pytest.raises(ConnectionRefusedError), asking(lab, "_switch", "172.21.32.11"):
            pass
        with entered(f"{lab.name}:n1"):
            taken = socket.create_server(("172.21.32.11", PORT))
        with taken:
            outcome = lifecycle.up(in_mode(lab, "nftables"))
        (unserved,) = outcome.unserved
        assert unserved == (
            f"{lab.name}:n1",
            "the health check of svc/demo/web",
            "TCP",
            PORT,
            "Address already in use",
        )
        with asking(lab, "_switch", "172.21.32.12") as other:
            assert answer(other) == (200, "1")
    finally:
        lifecycle.down(lab.name)
