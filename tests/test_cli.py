"""The command line as a user meets it: whole processes, exit codes, streams."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from labs import fresh_name
from netlab.lab import lifecycle

NETLAB = str(Path(sys.executable).parent / "netlab")


def netlab(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [NETLAB, *arguments],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def lab() -> Iterator[str]:
    """The name of a running lab of topology two-node-vxlan."""
    name = fresh_name()
    done = netlab("up", "two-node-vxlan", "--lab", name)
    assert done.returncode == 0, done.stderr
    yield name
    lifecycle.down(name)


def test_help_names_every_verb_and_imports_little() -> None:
    done = netlab("--help", PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0
    for verb in (
        "up",
        "down",
        "ls",
        "status",
        "get",
        "describe",
        "exec",
        "shell",
        "trace",
        "conntrack",
        "topology",
        "doctor",
    ):
        assert re.search(rf"^  {verb} +\S", done.stdout, re.MULTILINE)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {"scapy", "pyroute2", "rich", "yaml", "msgspec", "asyncio", "nftables"}


@pytest.mark.parametrize(
    "verb",
    [
        "up",
        "down",
        "ls",
        "status",
        "get",
        "describe",
        "conntrack",
        "exec",
        "shell",
        "trace",
        "topology",
        "doctor",
    ],
)
def test_every_verb_has_help(verb: str) -> None:
    done = netlab(verb, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Usage: netlab")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("fly",), "error[usage]: No such command 'fly'"),
        (("up",), "error[usage]: Missing argument 'TOPOLOGY'"),
        (("up", "--fast", "x"), "error[usage]: No such option"),
        (("up", "no-such-topology"), 'error[unknown-topology]: no topology "no-such-topology"'),
        (("up", "two-node-vxlan", "--nodes", ","), "error[usage]: Invalid value for '--nodes'"),
        (("ls", "-o", "xml"), "error[usage]: Invalid value for '-o'"),
        (("get", "frogs", "--lab", "none"), "error[unknown-lab]"),
        (("trace", "a", "b", "--lab", "none"), "error[unknown-lab]"),
        (("exec", "a", "--lab", "none", "--", "true"), "error[unknown-lab]"),
        (("status", "none"), 'error[unknown-lab]: no lab "none" is up'),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...], complaint: str) -> None:
    done = netlab(*arguments)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert "hint:" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.kernel
def test_up_down_and_what_they_say(lab: str) -> None:
    again = netlab("up", "two-node-vxlan", "--lab", lab)
    assert (again.returncode, again.stdout) == (0, "")
    assert "nothing to change" in again.stderr
    status = netlab("status", lab, "-o", "json")
    assert status.returncode == 0
    assert json.loads(status.stdout)["healthy"]
    assert lab in [entry["name"] for entry in json.loads(netlab("ls", "-o", "json").stdout)]
    assert "7 namespaces removed" in netlab("down", lab).stderr
    gone = netlab("down", lab)
    assert gone.returncode == 0
    assert "not up" in gone.stderr
    assert netlab("status", lab).returncode == 2


@pytest.mark.kernel
def test_pods_of_the_hosts_network_count_as_pods(tmp_path: Path) -> None:
    name, file = fresh_name(), tmp_path / "t.yaml"
    pods = ("{}", "{hostNetwork: true}")
    file.write_text(
        "---\n".join(
            f"apiVersion: v1\nkind: Pod\nmetadata: {{name: p{i}}}\nspec: {spec}\n"
            for i, spec in enumerate(pods)
        )
    )
    try:
        assert "is up: 1 node, 2 pods in" in netlab("up", str(file), "--lab", name).stderr
        assert "2 pods" in netlab("status", name).stdout
    finally:
        netlab("down", name)


@pytest.mark.kernel
def test_up_starts_processes_again(lab: str) -> None:
    init = json.loads(netlab("status", "--lab", lab, "-o", "json").stdout)["init"]["pid"]
    os.kill(init, signal.SIGKILL)
    assert netlab("status", lab).returncode == 1
    again = netlab("up", "two-node-vxlan", "--lab", lab)
    assert "started what answers in the pods" in again.stderr
    assert netlab("status", lab).returncode == 0


@pytest.mark.kernel
def test_a_lost_record_is_said(lab: str) -> None:
    init = json.loads(netlab("status", lab, "-o", "json").stdout)["init"]["pid"]
    os.kill(init, signal.SIGKILL)
    os.unlink(f"/run/netlab/{lab}/lab.json")
    lost = netlab("status", lab)
    assert lost.returncode == 3
    assert "error[record-lost]" in lost.stderr


def test_no_arguments_show_help() -> None:
    done = netlab()
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: netlab")


def test_output_that_cannot_be_written() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([NETLAB, "topology", "ls"], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 3
    assert b"cannot be written" in done.stderr


@pytest.mark.kernel
def test_a_reader_that_has_seen_enough_is_no_drop(lab: str) -> None:
    command = f"{NETLAB} trace pod1 svc/myblog --lab {lab} | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout.startswith("✓ delivered")
    assert done.returncode in (0, 128 + signal.SIGPIPE)
    assert done.stderr == ""


@pytest.mark.kernel
def test_status_says_what_differs(lab: str) -> None:
    subprocess.run(["ip", "-n", f"{lab}:demo:pod1", "link", "set", "eth0", "down"], check=True)
    status = netlab("status", lab)
    assert status.returncode == 1
    assert f"~ {lab}:demo:pod1  veth eth0" in status.stdout


@pytest.mark.kernel
def test_dry_run_and_shell(lab: str) -> None:
    other = fresh_name()
    dry = netlab("up", "two-node-vxlan", "--lab", other, "--dry-run")
    assert dry.returncode == 0
    assert f"+ namespace {other}:k8s-slave1" in dry.stdout
    commands = netlab("up", "two-node-vxlan", "--lab", other, "--shell")
    assert f"ip netns add {other}:k8s-slave1" in commands.stdout
    assert "iptables-restore <<'EOF'" in commands.stdout
    planned = json.loads(
        netlab("up", "two-node-vxlan", "--lab", other, "--dry-run", "-o", "json").stdout
    )
    assert len(planned["changes"]) == len(dry.stdout.splitlines())
    assert netlab("status", other).returncode == 2


@pytest.mark.kernel
def test_get(lab: str) -> None:
    listed = json.loads(netlab("get", "pods", "--lab", lab, "-o", "json").stdout)
    assert listed["kind"] == "List"
    assert {item["status"]["podIP"] for item in listed["items"]} == {
        "10.244.1.2",
        "10.244.1.3",
        "10.244.1.4",
        "10.244.2.5",
    }
    names = netlab("get", "pods", "-l", "app=myblog", "--lab", lab, "-o", "name").stdout.split()
    assert len(names) == 2
    assert all(name.startswith("pod/myblog-") for name in names)
    table = netlab("get", "svc", "-n", "demo", "--lab", lab).stdout.splitlines()
    assert table[0].split()[:3] == ["NAMESPACE", "NAME", "TYPE"]
    assert "10.99.174.93" in table[1]
    one = json.loads(netlab("get", "svc/myblog", "--lab", lab, "-o", "json").stdout)
    assert one["spec"]["clusterIP"] == "10.99.174.93"
    slices = json.loads(netlab("get", "eps", "--lab", lab, "-o", "json").stdout)["items"]
    assert {s["metadata"]["labels"]["kubernetes.io/service-name"] for s in slices} == {
        "myblog",
        "mysql",
    }
    missing = netlab("get", "pods", "pod9", "--lab", lab)
    assert missing.returncode == 2
    assert 'did you mean "pod1"?' in missing.stderr
    empty = netlab("get", "pods", "-l", "app=nobody", "--lab", lab, "-o", "json")
    assert json.loads(empty.stdout)["items"] == []


@pytest.mark.kernel
def test_completion_knows_the_lab(lab: str) -> None:
    def complete(line: str) -> list[str]:
        words = line.split(" ")
        done = netlab(
            _NETLAB_COMPLETE="bash_complete",
            COMP_WORDS=line,
            COMP_CWORD=str(len(words) - 1),
            NETLAB_LAB=lab,
        )
        return [entry.partition(",")[2] for entry in done.stdout.splitlines()]

    assert complete("netlab tr") == ["trace"]
    assert complete("netlab trace po") == ["pod1"]
    assert complete("netlab trace pod1 svc/myb") == ["svc/myblog"]
    assert "two-node-vxlan" in complete("netlab up two")


@pytest.mark.kernel
@pytest.mark.parametrize("arguments", [("up", "two-node-vxlan"), ("ls",), ("get", "pods")])
def test_without_root(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", NETLAB, *arguments],
        capture_output=True,
        text=True,
    )
    if "Permission denied" in done.stderr and NETLAB in done.stderr:
        pytest.skip("the checkout lies where another user cannot read it")
    assert done.returncode == 3, done.stderr
    assert "sudo netlab" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.kernel
def test_interrupted_up_leaves_nothing() -> None:
    name = fresh_name()
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, "up", "two-node-vxlan", "--lab", name],
        stderr=subprocess.PIPE,
        text=True,
    )
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert "interrupted" in said
    names = os.listdir("/run/netns") if os.path.isdir("/run/netns") else []
    assert not [n for n in names if n.startswith(name)]


# Ctrl-C at the worst moment: half of the links are made.
INTERRUPTED = """
import os, signal, sys
from netlab.kernel import netlink
real, left = netlink.Socket.request, 6
def request(self, messages):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGINT)
    return real(self, messages)
netlink.Socket.request = request
from netlab.cli.main import main
main()
"""


@pytest.mark.kernel
@pytest.mark.parametrize(
    "words",
    [
        "trace pod1 svc/myblog",
        "trace pod1 --watch --timeout 1",
        "capture pod1 --duration 0.1",
        "conntrack svc/myblog",
        "exec pod1 -- true",
        "fault inject no-route",
        "proxy --mode nftables",
        "status",
        "down",
    ],
)
def test_a_root_that_may_enter_no_namespace_is_told_so(lab: str, words: str) -> None:
    without = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", NETLAB]
    done = subprocess.run(
        [*without, *words.split()],
        env={**os.environ, "NETLAB_LAB": lab},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (3, "")
    assert "error[missing-capability]: this root lacks CAP_SYS_ADMIN" in done.stderr
    assert netlab("status", lab).returncode == 0  # nothing was lost
