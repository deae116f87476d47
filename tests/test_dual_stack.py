"""Labs with IPv6, beside IPv4 and alone, on the real kernel."""

from __future__ import annotations

import socket
import struct
import subprocess
from collections.abc import Iterator

import msgspec
import pytest
from msgspec.structs import replace

from labs import dual_stack_lab, ipv6_lab, six, small_lab
from netlab.datapath.build import build
from netlab.datapath.describe import summary
from netlab.datapath.overlay import vtep_mac
from netlab.kernel import namespaces
from netlab.kernel.namespaces import entered
from netlab.lab import lifecycle
from netlab.topology.model import Lab, Pod
from netlab.trace.aim import Request
from netlab.trace.run import trace
from test_lifecycle import http, udp

pytestmark = pytest.mark.kernel

STACKS = {"dual": dual_stack_lab, "IPv6": ipv6_lab}


@pytest.fixture(
    scope="module",
    params=[(stack, overlay) for stack in STACKS for overlay in ("vxlan", "host-gw")],
    ids=lambda param: "-".join(param),
)
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """A lab that is up; p3 has an address outside its node's CIDR."""
    stack, overlay = request.param
    small = msgspec.json.encode(small_lab(overlay=overlay)).replace(b"10.244.2.3", b"10.60.7.7")
    made = STACKS[stack](msgspec.json.decode(small, type=Lab))
    try:
        assert lifecycle.up(made).unserved == ()
        yield made
    finally:
        lifecycle.down(made.name)
        assert namespaces.names_of(made.name) == []


def families(lab: Lab, *addresses: str) -> list[tuple[str, ...]]:
    """The addresses as IPv6, and as they are if the lab has IPv4."""
    of_six = tuple(six(address) for address in addresses)
    return [of_six] if ":" in lab.pod_cidr else [addresses, of_six]


def client(answer: str) -> str:
    """The address of "10.244.1.4:40000" or "[fd00:10:244:1::4]:40000"."""
    return answer.rpartition(":")[0].strip("[]")


def echoed(namespace: str, address: str, size: int) -> bool:
    """Whether an ICMPv6 echo request with that many bytes of data is answered."""
    with entered(namespace):
        raw = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
    with raw:
        raw.settimeout(5)
        raw.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_DONTFRAG, 1)
        raw.connect((address, 0))
        raw.send(struct.pack("!BBHHH", 128, 0, 0, 7, 1) + bytes(size))
        while (answer := raw.recv(65536))[0] != 129:  # neighbour discovery comes by, too
            pass
        return len(answer) == 8 + size


def test_nothing_is_left_to_do(lab: Lab) -> None:
    assert [summary(change) for change in lifecycle.up(lab).changes] == []


def test_pods_reach_each_other(lab: Lab) -> None:
    p0, p3 = f"{lab.name}:demo:p0", f"{lab.name}:demo:p3"
    for own, near, far, odd in families(lab, "10.244.1.2", "10.244.1.3", "10.244.2.2", "10.60.7.7"):
        for address, name in ((near, "p2"), (far, "p1"), (odd, "p3")):
            assert http(p0, address, 8002, "/hostname") == name
            assert client(http(p0, address, 8002, "/clientip")) == own
            assert client(udp(p0, address, 8002, "clientip")) == own
        assert client(http(p3, own, 8002, "/clientip")) == odd
        assert http(f"{lab.name}:n1", far, 8002, "/hostname") == "p1"


def test_gateways_answer_and_the_largest_packets_pass(lab: Lab) -> None:
    p0, n1 = f"{lab.name}:demo:p0", f"{lab.name}:n1"
    mtu = next(link.mtu for link in build(lab).nodes[0].pods[0].links)
    largest = mtu - 40 - 8
    assert mtu == (1430 if lab.overlay.type == "vxlan" else 1500)
    assert echoed(p0, six("10.244.1.1"), largest)
    assert echoed(p0, six("10.244.2.2"), largest)
    assert echoed(n1, six("172.21.32.1"), 1500 - 40 - 8)
    assert echoed(n1, six("172.21.32.12"), 1500 - 40 - 8)


def test_services_are_reached(lab: Lab) -> None:
    p0, p1, n1 = (f"{lab.name}:{name}" for name in ("demo:p0", "demo:p1", "n1"))
    for web, empty, own, bridge in families(
        lab, "10.99.0.1", "10.99.0.2", "10.244.2.2", "10.244.2.1"
    ):
        for where in (p0, p1, n1):
            found = {http(where, web, 80, "/hostname") for _ in range(40)}
            assert found == {"p1", "p2", "p3"}
        assert {udp(p0, web, 53, "hostname") for _ in range(40)} == {"p1", "p2", "p3"}
        # An endpoint that meets itself is masqueraded to its node.
        assert {client(http(p1, web, 80, "/clientip")) for _ in range(40)} == {own, bridge}
        with pytest.raises(ConnectionRefusedError):
            http(p0, empty, 80, "/")


@pytest.mark.parametrize(
    ("damage", "repaired"),
    [
        ("ip -n {0}:n1 link set cbr0 down", "+ {0}:n1  address fd00:10:244:1::1/64 dev cbr0"),
        (
            "ip -n {0}:demo:p0 address del fd00:10:244:1::2/64 dev eth0",
            "+ {0}:demo:p0  address fd00:10:244:1::2/64 dev eth0",
        ),
        (
            "ip -n {0}:n1 address flush dev cbr0 scope link",
            "+ {0}:n1  address fe80::858:",
        ),
        (
            "ip -n {0}:n1 address add fd00:9::9/64 dev cbr0",
            "- {0}:n1  address fd00:9::9/64 dev cbr0",
        ),
        (
            "ip -n {0}:n1 route add fd00:9::/64 via fd00:172:21:32::c",
            "- {0}:n1  route fd00:9::/64 via fd00:172:21:32::c dev eth0",
        ),
        ("ip -n {0}:demo:p0 -6 route flush default", "+ {0}:demo:p0  route ::/0 via"),
        (
            "ip netns exec {0}:n1 sysctl -qw net.ipv6.conf.all.forwarding=0",
            "~ {0}:n1  sysctl net.ipv6.conf.all.forwarding=1",
        ),
        (
            "ip netns exec {0}:n1 sysctl -qw net.ipv6.conf.all.disable_ipv6=1",
            "~ {0}:n1  sysctl net.ipv6.conf.all.disable_ipv6=0",
        ),
        ("ip netns exec {0}:n1 ip6tables -t nat -F KUBE-SERVICES", "~ {0}:n1  rules"),
        ("ip netns del {0}:demo:p0", "+ namespace {0}:demo:p0"),
    ],
)
def test_damage_is_repaired(lab: Lab, damage: str, repaired: str) -> None:
    repair(lab, damage.format(lab.name), repaired.format(lab.name))


def repair(lab: Lab, damage: str, repaired: str) -> None:
    subprocess.run(damage.split(), check=True)
    lines = [summary(change) for change in lifecycle.up(lab).changes]
    assert any(line.startswith(repaired) for line in lines), lines
    assert [summary(change) for change in lifecycle.up(lab).changes] == []
    assert http(f"{lab.name}:demo:p0", six("10.244.2.2"), 8002, "/hostname") == "p1"


@pytest.fixture
def down() -> Iterator[Lab]:
    """An IPv4 lab, to be brought up in whatever form."""
    small = small_lab()
    yield small
    lifecycle.down(small.name)


def test_the_overlay_is_repaired(down: Lab) -> None:
    lab = dual_stack_lab(down)
    lifecycle.up(lab)
    n1 = f"{lab.name}:n1"
    vtep = vtep_mac(lab.nodes[1], 6)
    there = "fd00:10:244:2::"
    for damage, repaired in (
        (f"ip -n {n1} link del flannel-v6.1", "+ {0}  vxlan flannel-v6.1 id 1 local fd00:"),
        (
            f"ip -n {n1} link set flannel-v6.1 address 02:00:00:00:00:01",
            f"~ {n1}  vxlan flannel-v6.1",
        ),
        (
            f"ip -n {n1} -6 neigh flush all nud permanent",
            f"+ {n1}  neighbour {there} lladdr {vtep} dev flannel-v6.1",
        ),
        (
            f"bridge -n {n1} fdb del {vtep} dev flannel-v6.1",
            f"+ {n1}  fdb {vtep} dst fd00:172:21:32::c dev flannel-v6.1",
        ),
        (
            f"ip -n {n1} route del {there}/64",
            f"+ {n1}  route {there}/64 via {there} dev flannel-v6.1",
        ),
    ):
        repair(lab, damage, repaired.format(n1))


def test_a_lab_changes_its_families(down: Lab) -> None:
    dual, only = dual_stack_lab(down), ipv6_lab(down)
    for lab in (down, dual, only, dual, down):
        lifecycle.up(lab)
        assert [summary(change) for change in lifecycle.up(lab).changes] == []
        p0 = f"{lab.name}:demo:p0"
        for pod in (lab.pods[1], lab.pods[2]):
            for address in pod.addresses:
                assert http(p0, address, 8002, "/hostname") == pod.name
        printed = subprocess.run(
            ["ip", "-n", p0, "-o", "address", "show", "dev", "eth0", "scope", "global"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert {line.split()[3].split("/")[0] for line in printed.splitlines()} == set(
            lab.pods[0].addresses
        )


def test_a_node_answers_datagrams_from_the_address_that_was_asked(down: Lab) -> None:
    on_node = Pod(
        namespace="demo",
        name="agent",
        node="n1",
        address="172.21.32.11",
        listen=(("UDP", 9000),),
        host_network=True,
    )
    lab = dual_stack_lab(replace(down, pods=(*down.pods, on_node)))
    lifecycle.up(lab)
    for text in ("172.21.32.11", "10.244.1.1"):
        for address in (text, six(text)):  # (a client hears nothing from any other)
            for where in ("demo:p0", "n2"):
                assert udp(f"{lab.name}:{where}", address, 9000, "hostname") == "agent"


def test_a_trace_over_ipv4_is_as_ever(down: Lab) -> None:
    lab = dual_stack_lab(down)
    lifecycle.up(lab)
    found = trace(lab, Request("p0", "10.99.0.1:80"))
    assert found.disposition == "delivered"
    assert found.delivered_to is not None
    assert found.delivered_to.name in {"demo/p1", "demo/p2", "demo/p3"}
