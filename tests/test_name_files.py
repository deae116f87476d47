"""Files by which names are found: what they say, and who sees them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lab_processes import LabProcesses, lab_processes
from labs import fresh_name
from netlab.datapath.name_files import host_view, node_view, pod_view, views
from netlab.datapath.state import View
from netlab.lab import lifecycle
from netlab.lab.change import apply
from netlab.problems import NetlabError
from netlab.topology.load import load, read_objects
from netlab.topology.model import Lab
from test_cli import NETLAB, netlab

HEAD = """\
apiVersion: netlab/v1
kind: Host
metadata: {name: client}
spec: {address: 172.21.32.100}
---
apiVersion: v1
kind: Node
metadata: {name: n1}
status: {addresses: [{type: InternalIP, address: 172.21.32.11}]}
---
"""
KUBE_DNS = """\
apiVersion: v1
kind: Service
metadata: {namespace: kube-system, name: kube-dns}
spec: {clusterIP: 10.96.0.10, ports: [{name: dns, port: 53, protocol: UDP}]}
---
"""
POD = """\
apiVersion: v1
kind: Pod
metadata: {namespace: demo, name: pod1}
spec:
"""


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Lab]:
    def read(spec: str, *, dns: bool = True) -> Lab:
        path = tmp_path / "lab.yaml"
        path.write_text(HEAD + (KUBE_DNS if dns else "") + POD + spec)
        return load(path, name=fresh_name()).lab

    return read


def seen(view: View, path: str) -> str:
    """A file of a view."""
    return next(file.text for file in view.files if file.path == path)


def of_pod(lab: Lab, path: str = "/etc/resolv.conf") -> str:
    return seen(pod_view(lab, lab.pods[0]), path)


CLUSTER = """\
nameserver 10.96.0.10
search demo.svc.cluster.local svc.cluster.local cluster.local
options ndots:5
"""
NOBODY = "# There is no name server here.\n"


def test_a_pod_asks_the_clusters_server(read: Callable[..., Lab]) -> None:
    assert of_pod(read("  containers: []\n")) == CLUSTER


def test_without_such_a_service_it_asks_nobody(read: Callable[..., Lab]) -> None:
    assert of_pod(read("  containers: []\n", dns=False)) == NOBODY


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("  dnsPolicy: Default\n", NOBODY),
        ("  hostNetwork: true\n", NOBODY),
        ("  hostNetwork: true\n  dnsPolicy: ClusterFirstWithHostNet\n", CLUSTER),
        (
            "  dnsPolicy: None\n  dnsConfig: {nameservers: [192.0.2.53], searches: [a.example],"
            ' options: [{name: ndots, value: "2"}, {name: edns0}]}\n',
            "nameserver 192.0.2.53\nsearch a.example\noptions ndots:2 edns0\n",
        ),
        (
            "  dnsConfig: {nameservers: [192.0.2.53], searches: [a.example, cluster.local],"
            ' options: [{name: ndots, value: "2"}]}\n',
            "nameserver 10.96.0.10\nnameserver 192.0.2.53\nsearch demo.svc.cluster.local "
            "svc.cluster.local cluster.local a.example\noptions ndots:2\n",
        ),
    ],
)
def test_its_policy_and_config_decide(read: Callable[..., Lab], spec: str, expected: str) -> None:
    assert of_pod(read(spec)) == expected


def test_hosts_and_host_name_of_a_pod_with_a_subdomain(read: Callable[..., Lab]) -> None:
    lab = read(
        "  hostname: db-0\n  subdomain: db\n  setHostnameAsFQDN: true\n"
        "  hostAliases: [{ip: 192.0.2.1, hostnames: [one.example, one]}]\n"
    )
    assert of_pod(lab, "/etc/hosts").splitlines()[-4:] == [
        "10.244.1.2\tdb-0.db.demo.svc.cluster.local\tdb-0",
        "",
        "# Entries added by HostAliases.",
        "192.0.2.1\tone.example\tone",
    ]
    assert of_pod(lab, "/etc/hostname") == "db-0\n"
    assert pod_view(lab, lab.pods[0]).host_name == "db-0.db.demo.svc.cluster.local"


def test_nodes_and_hosts_know_each_other(read: Callable[..., Lab]) -> None:
    lab = read("  containers: []\n")
    for view in (node_view(lab, lab.nodes[0]), host_view(lab, lab.hosts[0])):
        assert seen(view, "/etc/resolv.conf") == NOBODY
        hosts = seen(view, "/etc/hosts").splitlines()
        assert hosts[-2:] == ["172.21.32.11\tn1", "172.21.32.100\tclient"]
        assert views(lab)(view.name) == view


@pytest.mark.parametrize(
    ("spec", "code"),
    [
        ("  dnsPolicy: None\n", "no-name-server"),
        ("  dnsPolicy: Cluster\n", "bad-value"),
        ("  dnsConfig: {nameservers: [name.example]}\n", "bad-address"),
        ("  dnsConfig: {nameservers: [192.0.2.1, 192.0.2.2, 192.0.2.3, 192.0.2.4]}\n", "too-many"),
        ("  hostAliases: [{ip: 300.0.0.1, hostnames: [a]}]\n", "bad-address"),
        ("  hostname: Upper\n", "bad-"),
    ],
)
def test_what_is_wrong_is_said(read: Callable[..., Lab], spec: str, code: str) -> None:
    with pytest.raises(NetlabError) as caught:
        read(spec)
    assert any(problem.code.startswith(code) for problem in caught.value.problems)


# --- on the kernel -------------------------------------------------------------------------------


def inside(lab: str, place: str, *command: str) -> str:
    finished = netlab("exec", place, "--lab", lab, "--", *command)
    assert (finished.returncode, finished.stderr) == (0, "")
    return finished.stdout


@pytest.mark.kernel
def test_every_command_and_program_in_a_pod_sees_them(
    read: Callable[..., Lab], up: Callable[[Lab], lifecycle.Outcome]
) -> None:
    lab = read("  hostname: db-0\n")
    up(lab)
    before = {path: Path(path).read_text() for path in ("/etc/hosts", "/etc/hostname")}
    assert inside(lab.name, "pod1", "cat", "/etc/resolv.conf") == CLUSTER
    assert inside(lab.name, "pod1", "getent", "hosts", "db-0").split() == ["10.244.1.2", "db-0"]
    assert inside(lab.name, "pod1", "hostname") == "db-0\n"
    assert inside(lab.name, "n1", "getent", "hosts", "client").split()[0] == "172.21.32.100"
    assert inside(lab.name, "pod1", "ls", "/run") == ""
    assert {path: Path(path).read_text() for path in before} == before


@pytest.mark.kernel
def test_who_is_inside_sees_what_apply_changes(
    read: Callable[..., Lab], up: Callable[[Lab], lifecycle.Outcome], tmp_path: Path
) -> None:
    lab = read("  containers: []\n")
    up(lab)
    script = "print('inside', flush=True); input(); print(open('/etc/resolv.conf').read(), end='')"
    with subprocess.Popen(
        [NETLAB, "exec", "pod1", "--lab", lab.name, "--", sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "inside\n"
        file = tmp_path / "pod.yaml"
        file.write_text(POD + "  dnsPolicy: Default\n")
        stated, _ = read_objects([str(file)])
        lifecycle.change(lab.name, lambda running: apply(running, stated))
        assert process.communicate("go\n")[0] == NOBODY


# A machine whose resolv.conf is what `prepare` makes of it, for this process and its children.
MACHINE = """
import os, shutil, sys
from netlab.kernel.syscalls import *
unshare(CLONE_NEWNS)
mount("none", "/", None, MS_REC | MS_PRIVATE)
shutil.copytree("/etc", sys.argv[3], symlinks=True)
mount(sys.argv[3], "/etc", None, MS_BIND)
{prepare}
from netlab.datapath.state import File, View
from netlab.lab import control, enter
view = View(name=sys.argv[2], namespace=sys.argv[2], host_name="x",
            files=(File(path="/etc/resolv.conf", text="nameserver 192.0.2.1\\n"),))
init = control.start(sys.argv[1])
command = "cat /etc/resolv.conf; head -n 1 /etc/passwd; ls /etc/alternatives/ | head -n 1"
code = enter.run(init, view, ["sh", "-c", command], os.environ)
left = os.path.lexists("/etc/resolv.conf"), os.path.exists("/etc/resolv.conf")
print(code, *left)
"""


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("prepare", "left"),
    [
        ("", "True True"),
        ("os.unlink('/etc/resolv.conf')", "False False"),
        (
            "os.unlink('/etc/resolv.conf'); "
            "os.symlink('../run/systemd/resolve/stub-resolv.conf', '/etc/resolv.conf')",
            "True False",
        ),
        ("os.unlink('/etc/resolv.conf'); os.symlink('gone', '/etc/resolv.conf')", "True False"),
    ],
    ids=["a file", "absent", "a link into an empty /run", "a link to nothing"],
)
def test_it_is_seen_whatever_the_machine_has_there(tmp_path: Path, prepare: str, left: str) -> None:
    with lab_processes(LabProcesses) as lab:
        namespace = lab.namespace("a")
        code = MACHINE.replace("{prepare}", prepare)
        process = lab.python(code, namespace, os.fspath(tmp_path / "etc"))
        out, err = process.communicate(timeout=30)
        lines = out.splitlines()
        assert lines[0] == "nameserver 192.0.2.1", err
        assert lines[1].startswith("root:"), (out, err)
        assert lines[-1].split(maxsplit=1)[1] == left, (out, err)
