"""Labs on the real kernel: what is built carries packets, converges, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from labs import dual_stack_lab, fresh_name, small_lab
from netlab.datapath.build import build
from netlab.datapath.describe import shell, summary
from netlab.datapath.services.iptables_save import differences
from netlab.datapath.state import Ruleset
from netlab.kernel import namespaces, observe, xtables
from netlab.kernel.namespaces import entered
from netlab.lab import control, lifecycle, record
from netlab.problems import Exit, NetlabError
from netlab.topology.load import load
from netlab.topology.model import Lab
from netlab.trace.aim import Request
from netlab.trace.run import trace

pytestmark = pytest.mark.kernel


def http(namespace: str, address: str, port: int, path: str) -> str:
    """Body of an HTTP answer, asked for from inside a namespace."""
    with entered(namespace), socket.create_connection((address, port), timeout=5) as connection:
        connection.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        answer = b""
        while chunk := connection.recv(4096):
            answer += chunk
    return answer.partition(b"\r\n\r\n")[2].decode().strip()


def udp(namespace: str, address: str, port: int, text: str) -> str:
    """Answer to a datagram sent from inside a namespace."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with entered(namespace), socket.socket(family, socket.SOCK_DGRAM) as sender:
        sender.settimeout(5)
        sender.connect((address, port))
        sender.send(text.encode())
        return sender.recv(2048).decode().strip()


def host_snapshot(without: str) -> dict[str, str]:
    """The host's links, addresses, routes, rules, mounts and sysctls; other labs left out."""
    own = re.compile(r".*(test-|/run/netns|run/netlab).*\n")
    commands = {
        "links": "ip -o link",
        "addresses": "ip -o -4 address",
        "routes": "ip route show table all",
        "rules": "ip rule",
        "netfilter": "nft list ruleset",
    }
    taken = {
        name: subprocess.run(command.split(), capture_output=True, text=True, check=True).stdout
        for name, command in commands.items()
    }
    with open("/proc/self/mounts") as mounts:
        taken["mounts"] = own.sub("", mounts.read())
    for directory, _, files in os.walk("/proc/sys/net"):
        for file in files:
            try:
                with open(f"{directory}/{file}") as sysctl:
                    taken[f"{directory}/{file}"] = sysctl.read()
            except OSError:
                continue
    # Counters of the whole machine, not settings.
    return {k: v for k, v in taken.items() if not k.endswith(("nf_conntrack_count", "file-nr"))}


@pytest.mark.parametrize("overlay", ["vxlan", "host-gw"])
def test_pods_and_services_are_reached(
    up: Callable[[Lab], lifecycle.Outcome], overlay: str
) -> None:
    lab = small_lab(overlay=overlay)
    outcome = up(lab)
    assert outcome.created
    assert outcome.unserved == ()
    p0, p1 = f"{lab.name}:demo:p0", f"{lab.name}:demo:p1"
    # One node, across nodes; no NAT between pods.
    assert http(p0, "10.244.1.3", 8002, "/clientip").startswith("10.244.1.2:")
    assert http(p0, "10.244.2.2", 8002, "/clientip").startswith("10.244.1.2:")
    assert udp(p0, "10.244.2.2", 8002, "clientip").startswith("10.244.1.2:")
    # Through the Service, from a client, from an endpoint (hairpin in some tries), from a node.
    assert {http(p0, "10.99.0.1", 80, "/hostname") for _ in range(40)} == {"p1", "p2", "p3"}
    assert {http(p1, "10.99.0.1", 80, "/hostname") for _ in range(40)} == {"p1", "p2", "p3"}
    assert {http(f"{lab.name}:n1", "10.99.0.1", 80, "/hostname") for _ in range(40)} == {
        "p1",
        "p2",
        "p3",
    }
    assert {udp(p0, "10.99.0.1", 53, "hostname") for _ in range(40)} == {"p1", "p2", "p3"}
    # An endpoint that meets itself is masqueraded to its node, else the answer would not go back.
    seen = {http(p1, "10.99.0.1", 80, "/clientip").split(":")[0] for _ in range(40)}
    assert seen == {"10.244.2.2", "10.244.2.1"}


def test_service_without_endpoints_rejects(up: Callable[[Lab], lifecycle.Outcome]) -> None:
    lab = small_lab()
    up(lab)
    with pytest.raises(ConnectionRefusedError):
        http(f"{lab.name}:demo:p0", "10.99.0.2", 80, "/")


@pytest.mark.parametrize("node", ["slave1", "slave2"])
def test_rules_are_those_of_the_real_kube_proxy(
    up: Callable[[Lab], lifecycle.Outcome], node: str
) -> None:
    lab = replace(load("two-node-vxlan").lab, name=fresh_name())
    up(lab)
    saved = xtables.save(f"{lab.name}:k8s-{node}")
    for family, file in zip(saved, ("iptables.txt", "ip6tables.txt"), strict=True):
        golden = (Path(__file__).parent / "golden" / f"seed-{node}" / file).read_text()
        assert differences(golden, family) == []
        assert differences(family, golden) == []


def test_a_pod_outside_its_nodes_cidr_is_reached(up: Callable[[Lab], lifecycle.Outcome]) -> None:
    lab = small_lab()
    odd = replace(lab.pods[3], address="10.60.7.7")
    lab = replace(lab, pods=(*lab.pods[:3], odd))
    up(lab)
    for source in ("p0", "p1"):
        assert http(f"{lab.name}:demo:{source}", "10.60.7.7", 8002, "/hostname") == "p3"
    assert http(f"{lab.name}:demo:p3", "10.244.1.2", 8002, "/clientip").startswith("10.60.7.7:")


def test_up_twice_changes_nothing(up: Callable[[Lab], lifecycle.Outcome]) -> None:
    lab = small_lab()
    up(lab)
    inodes = {name: os.stat(namespaces.path(name)).st_ino for name in namespaces.names_of(lab.name)}
    again = up(lab)
    assert again.changes == ()
    assert not again.created
    assert inodes == {
        name: os.stat(namespaces.path(name)).st_ino for name in namespaces.names_of(lab.name)
    }


def test_dry_run_builds_nothing() -> None:
    lab = small_lab()
    outcome = lifecycle.up(lab, dry_run=True)
    assert outcome.changes
    assert namespaces.names_of(lab.name) == []
    assert control.connect(lab.name) is None


def test_a_changed_lab_changes_only_that(up: Callable[[Lab], lifecycle.Outcome]) -> None:
    lab = small_lab()
    up(lab)
    kept = os.stat(namespaces.path(f"{lab.name}:demo:p0")).st_ino
    grown = small_lab(lab.name, pods=5)
    outcome = up(grown)
    touched = {change.namespace for change in outcome.changes}
    # The new pod, its node's link to it, and both nodes' rules, for it is an endpoint.
    assert touched == {f"{lab.name}:demo:p4", f"{lab.name}:n1", f"{lab.name}:n2"}
    assert os.stat(namespaces.path(f"{lab.name}:demo:p0")).st_ino == kept
    assert http(f"{lab.name}:demo:p1", "10.244.1.4", 8002, "/hostname") == "p4"
    shrunk = up(lab)
    assert f"- namespace {lab.name}:demo:p4" in [summary(c) for c in shrunk.changes]
    assert not os.path.exists(namespaces.path(f"{lab.name}:demo:p4"))
    assert up(lab).changes == ()


@pytest.mark.parametrize(
    ("damage", "repaired"),
    [
        ("ip -n {0}:n1 link set cbr0 down", "~ {0}:n1  bridge cbr0 mtu 1450"),
        ("ip -n {0}:n1 link del cbr0", "+ {0}:n1  bridge cbr0 mtu 1450"),
        (
            "ip -n {0}:n1 link del flannel.1",
            "+ {0}:n1  vxlan flannel.1 id 1 local 172.21.32.11 mtu 1450",
        ),
        ("ip -n {0}:n1 link set flannel.1 mtu 1000", "~ {0}:n1  vxlan flannel.1"),
        ("ip -n {0}:n1 link set flannel.1 type vxlan learning", "+ {0}:n1  vxlan flannel.1"),
        ("ip -n {0}:n1 link set flannel.1 address 02:00:00:00:00:01", "~ {0}:n1  vxlan flannel.1"),
        ("ip -n {0}:n1 link set cbr0 address 02:00:00:00:00:01", "~ {0}:n1  bridge cbr0"),
        ("ip netns exec {0}:n1 sysctl -qw net.ipv4.conf.all.rp_filter=1", "~ {0}:n1  sysctl"),
        (
            "ip -n {0}:n1 route del 10.244.2.0/24",
            "+ {0}:n1  route 10.244.2.0/24 via 10.244.2.0 dev flannel.1",
        ),
        (
            "ip -n {0}:n1 neigh flush all nud permanent",
            "+ {0}:n1  neighbour 10.244.2.0 lladdr {vtep} dev flannel.1",
        ),
        (
            "ip -n {0}:demo:p0 address flush dev eth0",
            "+ {0}:demo:p0  address 10.244.1.2/24 dev eth0",
        ),
        (
            "ip netns exec {0}:n1 sysctl -qw net.ipv4.ip_forward=0",
            "~ {0}:n1  sysctl net.ipv4.ip_forward=1",
        ),
        ("ip netns exec {0}:n1 iptables -t nat -F KUBE-SERVICES", "~ {0}:n1  rules"),
        ("ip netns del {0}:demo:p0", "+ namespace {0}:demo:p0"),
    ],
)
def test_damage_is_repaired(
    up: Callable[[Lab], lifecycle.Outcome], damage: str, repaired: str
) -> None:
    from netlab.datapath.overlay import vtep_mac

    lab = small_lab()
    up(lab)
    subprocess.run(damage.format(lab.name).split(), check=True)
    lines = [summary(change) for change in up(lab).changes]
    wanted = repaired.format(lab.name, vtep=vtep_mac(lab.nodes[1]))
    assert any(line.startswith(wanted) for line in lines), lines
    assert up(lab).changes == ()
    assert http(f"{lab.name}:demo:p0", "10.244.2.2", 8002, "/hostname") == "p1"


def test_rules_of_others_stay_where_they_are(up: Callable[[Lab], lifecycle.Outcome]) -> None:
    lab = small_lab()
    up(lab)
    inside = ["ip", "netns", "exec", f"{lab.name}:n1"]
    for rule in (
        "-I FORWARD -s 192.0.2.1 -j DROP",
        "-A FORWARD -s 192.0.2.2 -j DROP",
        "-N MINE",
        "-A MINE -s 192.0.2.3 -j RETURN",
        "-t nat -I PREROUTING -s 192.0.2.4 -j ACCEPT",
        "-P FORWARD DROP",
    ):
        subprocess.run([*inside, "iptables", *rule.split()], check=True)
    subprocess.run([*inside, "iptables", "-t", "nat", "-F", "KUBE-SERVICES"], check=True)
    assert any(summary(c).startswith(f"~ {lab.name}:n1  rules") for c in up(lab).changes)
    saved = xtables.save(f"{lab.name}:n1")[0].splitlines()
    forward = [line for line in saved if line.startswith("-A FORWARD")]
    assert forward[0] == "-A FORWARD -s 192.0.2.1/32 -j DROP"
    assert forward[-1] == "-A FORWARD -s 192.0.2.2/32 -j DROP"
    assert len(forward) == 6
    assert "-A MINE -s 192.0.2.3/32 -j RETURN" in saved
    assert "-A PREROUTING -s 192.0.2.4/32 -j ACCEPT" in saved
    assert up(lab).changes == ()


def test_two_labs_at_once_do_not_meet(up: Callable[[Lab], lifecycle.Outcome]) -> None:
    labs = [small_lab(), small_lab()]
    failures: list[BaseException] = []

    def bring_up(lab: Lab) -> None:
        try:
            up(lab)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=bring_up, args=(lab,)) for lab in labs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    lifecycle.down(labs[0].name)
    assert http(f"{labs[1].name}:demo:p0", "10.99.0.1", 80, "/hostname") in {"p1", "p2", "p3"}


def test_the_host_is_as_it_was() -> None:
    lab = small_lab()
    before = host_snapshot(lab.name)
    lifecycle.up(lab)
    during = host_snapshot(lab.name)
    lifecycle.down(lab.name)
    assert during == before
    assert host_snapshot(lab.name) == before
    assert namespaces.names_of(lab.name) == []
    assert not os.path.exists(record.directory(lab.name))
    assert lifecycle.down(lab.name) == 0


def test_down_without_any_file(up: Callable[[Lab], lifecycle.Outcome]) -> None:
    lab = small_lab()
    up(lab)
    init = control.connect(lab.name)
    assert init is not None
    for file in os.listdir(record.directory(lab.name)):
        os.unlink(f"{record.directory(lab.name)}/{file}")
    os.rmdir(record.directory(lab.name))
    assert record.read(lab.name) == lab  # init holds it too
    assert lifecycle.down(lab.name) == 7
    assert init.wait(0)


def test_what_is_not_ours_is_never_deleted(up: Callable[[Lab], lifecycle.Outcome]) -> None:
    lab = small_lab()
    foreign = f"{lab.name}:n1"
    subprocess.run(["ip", "netns", "add", foreign], check=True)
    try:
        with pytest.raises(NetlabError) as caught:
            up(lab)
        assert caught.value.exit_code is Exit.MACHINE
        assert [problem.code for problem in caught.value.problems] == ["foreign-namespace"]
        assert namespaces.names_of(lab.name) == [foreign]
        assert lifecycle.down(lab.name) == 0
        assert os.path.exists(namespaces.path(foreign))
    finally:
        subprocess.run(["ip", "netns", "del", foreign], check=True)


STARTER = """
import os, sys, threading
import msgspec
from netlab.topology.load import load
from netlab.topology.model import Lab
from netlab.lab import lifecycle
from netlab.kernel import namespaces, netlink, syscalls
lab = msgspec.json.decode(os.environ["LAB"].encode(), type=Lab)
left = int(sys.argv[1])
verb = sys.argv[2]
def counted(function):
    def call(*args, **kwargs):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), 9)
        return function(*args, **kwargs)
    return call
namespaces.unshare = counted(namespaces.unshare)
namespaces.mount = counted(namespaces.mount)
namespaces.umount = counted(namespaces.umount)
namespaces.open_current = counted(namespaces.open_current)
netlink.Socket.request = counted(netlink.Socket.request)
if verb == "up":
    lifecycle.up(lab)
else:
    lifecycle.down(lab.name)
"""


def killed_after(calls: int, lab: Lab, verb: str) -> int:
    """Run `up` or `down` in a process that kills itself before its n-th system call that counts."""
    return subprocess.run(
        [sys.executable, "-c", STARTER, str(calls), verb],
        env={**os.environ, "LAB": msgspec.json.encode(lab).decode()},
        timeout=60,
    ).returncode


@pytest.mark.parametrize("calls", [0, 1, 2, 3, 4, 5, 7, 10, 14, 19, 25, 32, 40])
def test_killed_in_the_middle_of_up(up: Callable[[Lab], lifecycle.Outcome], calls: int) -> None:
    lab = small_lab()
    assert killed_after(calls, lab, "up") == -signal.SIGKILL
    # Either command makes order: here down ...
    lifecycle.down(lab.name)
    assert namespaces.names_of(lab.name) == []
    assert control.connect(lab.name) is None
    # ... and there up.
    assert killed_after(calls, lab, "up") == -signal.SIGKILL
    up(lab)
    assert http(f"{lab.name}:demo:p0", "10.99.0.1", 80, "/hostname") in {"p1", "p2", "p3"}
    assert up(lab).changes == ()


@pytest.mark.parametrize("calls", [0, 2, 5, 9, 14])
def test_killed_in_the_middle_of_down(up: Callable[[Lab], lifecycle.Outcome], calls: int) -> None:
    lab = small_lab()
    up(lab)
    assert killed_after(calls, lab, "down") == -signal.SIGKILL
    up(lab)
    assert http(f"{lab.name}:demo:p0", "10.244.2.2", 8002, "/hostname") == "p1"
    assert killed_after(calls, lab, "down") == -signal.SIGKILL
    lifecycle.down(lab.name)
    assert namespaces.names_of(lab.name) == []


def test_a_failed_start_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from netlab.kernel import xtables

    def refuse(*_: object) -> None:
        raise NetlabError((), Exit.MACHINE)

    monkeypatch.setattr(xtables, "restore", lambda *_: refuse())
    lab = small_lab()
    monkeypatch.setattr(lifecycle.control.Init, "serve", lambda *_: refuse())
    with pytest.raises(NetlabError):
        lifecycle.up(lab)
    assert namespaces.names_of(lab.name) == []
    assert control.connect(lab.name) is None


@pytest.mark.skipif(not shutil.which("nfacct"), reason="nfacct is not packaged here")
@pytest.mark.parametrize("stack", [lambda lab: lab, dual_stack_lab], ids=["IPv4", "dual"])
def test_shell_commands_build_the_same(
    up: Callable[[Lab], lifecycle.Outcome], stack: Callable[[Lab], Lab]
) -> None:
    lab = stack(small_lab())
    up(lab)
    twin = replace(lab, name=fresh_name())
    state = build(twin)
    script = "\n".join(shell(lifecycle.up(twin, dry_run=True).changes, state.namespaces()))
    try:
        done = subprocess.run(["sh", "-e"], input=script, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        for namespace in state.namespaces():
            name = namespace.name.replace(twin.name, lab.name, 1)
            ours = observe.observe(name, "netlab:", namespace).namespace
            theirs = observe.observe(namespace.name, "netlab:", namespace).namespace
            assert _comparable(theirs) == _comparable(ours)
        for node in state.nodes:
            assert node.rules is not None
            assert isinstance(node.rules, Ruleset)
            saved = xtables.save(node.namespace.name)
            assert differences(node.rules.ipv4, saved[0]) == []
            assert differences(node.rules.ipv6, saved[1]) == []
    finally:
        for name in namespaces.names_of(twin.name):
            namespaces.remove(name)


def _comparable(namespace: object) -> object:
    """Without names, and without the MACs that the kernel chose."""
    chosen = msgspec.to_builtins(namespace)
    del chosen["name"]
    for link in chosen["links"]:
        if link["name"].startswith("veth") or link["name"] in ("n1", "n2"):
            del link["mac"]
    return {
        kind: sorted(items, key=str) if isinstance(items, (list, tuple)) else items
        for kind, items in chosen.items()
    }


def test_ipv6_that_was_switched_off_on_a_device_is_switched_on_again() -> None:
    made = dual_stack_lab(small_lab())
    try:
        lifecycle.up(made)
        for namespace, device in (
            (f"{made.name}:n1", "cbr0"),
            (f"{made.name}:n1", "flannel-v6.1"),
            (f"{made.name}:demo:p0", "eth0"),
        ):
            setting = f"net/ipv6/conf/{device}/disable_ipv6=1"
            subprocess.run(["ip", "netns", "exec", namespace, "sysctl", "-q", setting], check=True)
        told = [summary(change) for change in lifecycle.differences(made)]
        switches = [line for line in told if "disable_ipv6=0" in line]
        assert len(switches) == 3
        assert f"~ {made.name}:n1  sysctl net.ipv6.conf.cbr0.disable_ipv6=0" in switches
        assert any("address fd00:10:244:1::1/64 dev cbr0" in line for line in told)
        lifecycle.up(made)
        assert lifecycle.up(made).changes == ()
        assert trace(made, Request("p0", "p1:8002", family=6)).delivered
    finally:
        lifecycle.down(made.name)


def test_a_verb_that_misses_a_namespace_says_so(up: Callable[[Lab], object]) -> None:
    lab = small_lab()
    up(lab)
    missing = f"{lab.name}:n2"
    namespaces.remove(missing)
    netlab = Path(sys.executable).parent / "netlab"
    done = subprocess.run([netlab, "conntrack", "--lab", lab.name], capture_output=True, text=True)
    assert done.returncode == Exit.MACHINE
    assert f"error[namespace-missing]: there is no network namespace {missing} here" in done.stderr
