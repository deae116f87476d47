"""Labs whose nodes are machines of their own: namespaces here that are machines to netlab."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from msgspec.structs import replace

from netlab.hosts import gateways, lifecycle, record, tracing
from netlab.hosts.hosts_file import Machine
from netlab.lab import change
from netlab.problems import NetlabError
from netlab.topology.load import load
from netlab.topology.model import Lab
from netlab.trace.aim import Request
from netlab.trace.model import Trace
from tests.labs import fresh_name
from tests.machines import Switched, differences, switched

pytestmark = pytest.mark.kernel

NODES = ("k8s-slave1", "k8s-slave2")
ADDRESSES = ("172.21.32.11/24", "172.21.32.9/24")
FAR = "myblog-5c97d79cdb-j485f"


@pytest.fixture
def boxes() -> Iterator[Switched]:
    with switched(ADDRESSES) as found:
        yield found


@pytest.fixture
def lab() -> Iterator[Lab]:
    name = fresh_name()
    yield load("two-node-vxlan", name=name).lab
    if record.read(name):
        lifecycle.down(name)
        record.remove(name)


def _trace(lab: Lab, destination: str) -> Trace:
    with lifecycle.gateways_of(lab.name) as open_gateways:
        return tracing.trace(open_gateways, lab, Request("pod1", destination))


def _netlab(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from netlab.cli import main; main()", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def _codes(error: NetlabError) -> list[str]:
    return [problem.code for problem in error.problems]


@pytest.mark.parametrize("mode", ["iptables", "nftables"])
def test_two_machines_hold_a_lab_and_are_given_back_as_they_were(
    boxes: Switched, lab: Lab, mode: str
) -> None:
    before = [box.snapshot() for box in boxes.boxes]
    lab = change.proxy(lab, mode).lab
    machines = boxes.machines(NODES)
    first = lifecycle.up(lab, machines)
    assert all(held.created and held.changes for held in first.held.values())
    again = lifecycle.up(lab, machines)
    assert [held.changes for held in again.held.values()] == [(), ()]
    there = f"http://{lab.pods[3].address}:8002/hostname"
    asked = boxes[0].run(
        "ip", "netns", "exec", f"{lab.name}:demo:pod1", "curl", "-s", "-m", "5", there
    )
    assert asked == f"{FAR}\n"
    found = _trace(lab, FAR)
    assert found.disposition == "delivered"
    devices = [(hop.node, hop.device) for hop in found.forward]
    assert ("k8s-slave1", "uplink") in devices
    assert ("k8s-slave2", "uplink") in devices
    assert devices.index(("k8s-slave1", "uplink")) < devices.index(("k8s-slave2", "uplink"))
    assert [hop.node for hop in found.reply][-1] == "k8s-slave1"
    done = lifecycle.down(lab.name)
    assert dict(done.removed) == {"k8s-slave1": 4, "k8s-slave2": 2}
    assert not done.failed
    assert not "\n".join(differences(before, boxes.boxes))
    assert record.read(lab.name) is None


def test_a_service_is_traced_to_the_other_machine(boxes: Switched, lab: Lab) -> None:
    lifecycle.up(lab, boxes.machines(NODES))
    for _ in range(40):
        found = _trace(lab, "svc/myblog")
        assert found.disposition == "delivered"
        assert found.translations[0].kind == "dnat"
        if found.delivered_to and found.delivered_to.node == "k8s-slave2":
            break
    else:
        raise AssertionError("chance never chose the other machine")
    assert found.witnesses.packets == "ok"


def test_a_drop_on_the_other_machine_is_found_there(boxes: Switched, lab: Lab) -> None:
    lifecycle.up(lab, boxes.machines(NODES))
    boxes[1].run("nft", "add", "table", "ip", "wall")
    boxes[1].run("nft", "add chain ip wall f { type filter hook forward priority 5; }")
    boxes[1].run("nft", "add", "rule", "ip", "wall", "f", "tcp", "dport", "8002", "drop")
    found = _trace(lab, FAR)
    assert found.disposition == "dropped"
    assert found.drop is not None
    assert found.drop.node == "k8s-slave2"
    assert "wall" in (found.drop.rule or "") + found.drop.where + found.drop.explanation


def test_what_others_have_on_a_machine_stays(boxes: Switched, lab: Lab) -> None:
    box = boxes[0]
    box.run("iptables", "-A", "INPUT", "-p", "tcp", "--dport", "99", "-j", "REJECT")
    box.run("iptables", "-t", "nat", "-N", "DOCKER")
    box.run("ip", "link", "add", "docker0", "type", "bridge")
    box.run("ip", "address", "add", "172.17.0.1/16", "dev", "docker0")
    box.run("ip", "route", "add", "198.51.100.0/24", "dev", "uplink")
    box.run("ip", "rule", "add", "from", "198.51.100.1", "table", "77")
    before = box.snapshot()
    said: list[str] = []
    lifecycle.up(lab, boxes.machines(NODES), tell=said.append)
    assert said == ["k8s-slave1: Docker has rules here; they stay as they are"]
    assert "--dport 99" in box.run("iptables-save")
    lifecycle.down(lab.name)
    assert not "\n".join(differences([before], [box]))


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        ("ip link add cbr0 type bridge", "foreign-link", "interface cbr0"),
        ("ip route add 10.244.7.0/24 dev uplink", "cidr-in-use", "overlaps 10.244.7.0/24"),
        ("ip route add 10.96.0.0/16 dev uplink", "cidr-in-use", "10.96.0.0/12"),
        ("iptables -P FORWARD DROP", "forward-drop", "policy of FORWARD"),
        ("iptables -t nat -N KUBE-SERVICES", "foreign-proxy", "KUBE-SERVICES"),
        ("nft add table ip kube-proxy", "foreign-proxy", "kube-proxy"),
        ("nft add table inet firewalld", "firewalld", "firewalld"),
        ("ip link set uplink mtu 1400", "mtu-too-small", "1400"),
    ],
)
def test_what_is_in_the_way_is_said_and_nothing_is_changed(
    boxes: Switched, lab: Lab, command: str, code: str, words: str
) -> None:
    boxes[1].run("sh", "-c", command)
    before = [box.snapshot() for box in boxes.boxes]
    with pytest.raises(NetlabError) as caught:
        lifecycle.up(lab, boxes.machines(NODES))
    assert code in _codes(caught.value)
    told = next(each for each in caught.value.problems if each.code == code)
    assert told.message.startswith("k8s-slave2: ")
    assert words in told.message
    assert not "\n".join(differences(before, boxes.boxes))
    assert record.read(lab.name) is None


def test_a_forward_policy_of_drop_is_passed_where_that_is_allowed(
    boxes: Switched, lab: Lab
) -> None:
    boxes[1].run("iptables", "-P", "FORWARD", "DROP")
    before = [box.snapshot() for box in boxes.boxes]
    lifecycle.up(lab, boxes.machines(NODES), allowed=True)
    assert _trace(lab, FAR).disposition == "delivered"
    lifecycle.up(lab, boxes.machines(NODES), allowed=True)
    lifecycle.down(lab.name)
    assert not "\n".join(differences(before, boxes.boxes))


def test_machines_that_do_not_hear_each_other_are_found_before_pods_are_made(
    boxes: Switched, lab: Lab
) -> None:
    boxes[1].run("iptables", "-A", "INPUT", "-p", "udp", "--dport", "8472", "-j", "DROP")
    before = boxes[0].snapshot()
    with pytest.raises(NetlabError) as caught:
        lifecycle.up(lab, boxes.machines(NODES))
    (problem,) = caught.value.problems
    assert problem.code == "not-heard"
    assert problem.message == "k8s-slave2: UDP to its port 8472 does not come from 172.21.32.11"
    assert not "\n".join(differences([before], [boxes[0]]))


def test_a_machine_that_is_elsewhere_is_taken_where_it_is(lab: Lab) -> None:
    with switched(["192.0.2.1/24", "192.0.2.2/24"]) as boxes:
        said: list[str] = []
        outcome = lifecycle.up(lab, boxes.machines(NODES), tell=said.append)
        assert said[0] == "k8s-slave1 is 192.0.2.1 here, and not 172.21.32.11 of the topology"
        assert _trace(outcome.lab, FAR).disposition == "delivered"
        lifecycle.down(lab.name)


def test_a_machine_that_dies_is_named_and_the_next_up_heals(lab: Lab) -> None:
    with switched(ADDRESSES) as boxes:
        machines = boxes.machines(NODES)
        lifecycle.up(lab, machines)
        boxes[1].kill()
        start = time.monotonic()
        found, failed = lifecycle.status(lab.name)
        assert found["k8s-slave1"].healthy
        assert list(failed) == ["k8s-slave2"]
        assert time.monotonic() - start < 10
        done = lifecycle.down(lab.name)
        assert list(done.removed) == ["k8s-slave1"]
        assert list(done.failed) == ["k8s-slave2"]
        left = record.read(lab.name)
        assert left is not None
        assert list(left.machines) == ["k8s-slave2"]
    with switched(ADDRESSES) as boxes:  # made anew, as after a restart
        outcome = lifecycle.up(lab, boxes.machines(NODES))
        assert all(held.created for held in outcome.held.values())
        assert _trace(lab, FAR).disposition == "delivered"
        assert not lifecycle.down(lab.name).failed


def test_with_keep_going_the_others_are_made(boxes: Switched, lab: Lab) -> None:
    boxes[1].run("ip", "link", "add", "cbr0", "type", "bridge")
    machines = boxes.machines(NODES)
    outcome = lifecycle.up(lab, machines, keep_going=True)
    assert list(outcome.held) == ["k8s-slave1"]
    assert _codes(outcome.failed["k8s-slave2"]) == ["foreign-link"]
    boxes[1].run("ip", "link", "delete", "cbr0")
    outcome = lifecycle.up(lab, machines)
    assert [held.created for held in outcome.held.values()] == [False, True]
    assert outcome.held["k8s-slave1"].changes == ()


def test_a_failure_in_the_middle_gives_back_what_was_made(boxes: Switched, lab: Lab) -> None:
    before = [box.snapshot() for box in boxes.boxes]
    # Nothing looks at these until they are in the way: a namespace of somebody else, of our name.
    boxes[1].run("ip", "netns", "add", f"{lab.name}:demo:{FAR}")
    with pytest.raises(NetlabError) as caught:
        lifecycle.up(lab, boxes.machines(NODES))
    assert _codes(caught.value) == ["foreign-namespace"]
    boxes[1].run("ip", "netns", "delete", f"{lab.name}:demo:{FAR}")
    boxes[1].run("sh", "-c", "umount /run/netns && rmdir /run/netns")
    assert not "\n".join(differences(before, boxes.boxes))


def test_killed_at_any_moment_the_next_command_makes_order(boxes: Switched, lab: Lab) -> None:
    before = [box.snapshot() for box in boxes.boxes]
    machines = boxes.machines(NODES)
    hosts = "\n".join(
        f'{node}: {{gateway: "{each.gateway}", underlay: uplink}}'
        for node, each in machines.items()
    )
    for delay in (1.0, 1.6, 2.2):
        path = Path(f"/tmp/{lab.name}.yaml")
        path.write_text(hosts)
        command = [sys.executable, "-c", "from netlab.cli import main; main()", "up"]
        process = subprocess.Popen(
            [*command, "two-node-vxlan", "--lab", lab.name, "--hosts", str(path)],
            stderr=subprocess.DEVNULL,
        )
        time.sleep(delay)
        process.kill()
        process.wait()
        path.unlink()
    lifecycle.up(lab, machines)
    assert all(each.healthy for each in lifecycle.status(lab.name)[0].values())
    lifecycle.down(lab.name)
    assert not "\n".join(differences(before, boxes.boxes))


def test_a_way_that_leads_nowhere_is_named(boxes: Switched, lab: Lab) -> None:
    machines = boxes.machines(NODES)
    for gateway, code in (
        ("popen//python=/nowhere/python3", "host-unreachable"),
        ("popen//python=false", "host-unreachable"),
        ("popen//python=sh -c 'sleep 60'", "host-silent"),
        ("popen//python=sh -c 'echo python3: not found >&2; exit 127'", "no-python"),
    ):
        start = time.monotonic()
        with pytest.raises(NetlabError) as caught:
            lifecycle.up(lab, {**machines, NODES[1]: Machine(gateway)}, timeout_s=3)
        assert _codes(caught.value) == [code]
        assert NODES[1] in caught.value.problems[0].message
        assert time.monotonic() - start < 10


def test_another_version_is_refused_with_both_named(
    boxes: Switched, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateways, "identity", lambda: "9.9.9 (source 00000000)")
    with pytest.raises(NetlabError) as caught:
        lifecycle.up(lab, boxes.machines(NODES))
    assert set(_codes(caught.value)) == {"other-version"}
    assert "9.9.9 (source 00000000)" in caught.value.problems[0].message
    assert "netlab there is " in caught.value.problems[0].message


def test_a_machine_is_a_node_of_one_lab_only(boxes: Switched, lab: Lab) -> None:
    lifecycle.up(lab, boxes.machines(NODES))
    other = replace(lab, name=fresh_name())
    with pytest.raises(NetlabError) as caught:
        lifecycle.up(other, boxes.machines(NODES))
    assert set(_codes(caught.value)) == {"machine-taken"}
    assert all(each.healthy for each in lifecycle.status(lab.name)[0].values())


def test_damage_is_told_and_repaired(boxes: Switched, lab: Lab) -> None:
    lifecycle.up(lab, boxes.machines(NODES))
    boxes[0].run("ip", "link", "delete", "flannel.1")
    found, _ = lifecycle.status(lab.name)
    assert any("flannel.1" in line for line in found["k8s-slave1"].differences)
    assert found["k8s-slave2"].healthy
    outcome = lifecycle.up(lab, boxes.machines(NODES))
    assert outcome.held["k8s-slave2"].changes == ()
    assert _trace(lab, FAR).disposition == "delivered"


def test_the_command_line(boxes: Switched, lab: Lab, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts.yaml"
    machines = boxes.machines(NODES)
    hosts.write_text(
        yaml.safe_dump(
            {n: {"gateway": m.gateway, "underlay": m.underlay} for n, m in machines.items()}
        )
    )
    name = lab.name
    done = _netlab("up", "two-node-vxlan", "--lab", name, "--hosts", str(hosts))
    assert done.returncode == 0, done.stderr
    assert f"✓ {name} is up: 2 machines" in done.stderr
    done = _netlab("status", "--lab", name)
    assert done.returncode == 0
    assert "✓ k8s-slave2 (172.21.32.9)" in done.stdout
    done = _netlab("exec", "--lab", name, "pod1", "--", "sh", "-c", "hostname; exit 7")
    assert (done.returncode, done.stdout) == (7, "pod1\n")
    done = _netlab("exec", "--lab", name, "node/k8s-slave2", "--", "ip", "-br", "link")
    assert "cbr0" in done.stdout
    done = _netlab("trace", "--lab", name, "pod1", FAR)
    assert done.returncode == 0
    assert "node k8s-slave2" in done.stdout
    done = _netlab("trace", "--lab", name, "pod1", FAR, "--count", "5")
    assert done.returncode == 2
    done = _netlab("up", "two-node-vxlan", "--lab", name)
    assert done.returncode == 2
    assert "its nodes are machines" in done.stderr
    done = _netlab("scale", "--lab", name, "deploy/myblog", "--replicas", "2")
    assert done.returncode == 2
    done = _netlab("down", name)
    assert done.returncode == 0
    assert f"✓ {name} is down on 2 machines" in done.stderr
