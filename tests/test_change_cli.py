"""`apply`, `delete`, `scale`, `label` and `ready` as a user meets them."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from labs import fresh_name
from netlab.lab import lifecycle
from test_cli import NETLAB, netlab

VERBS = ("apply", "delete", "scale", "label", "ready", "proxy")

OBJECTS = """apiVersion: apps/v1
kind: Deployment
metadata: {namespace: demo, name: web}
spec:
  replicas: 2
  template: {metadata: {labels: {app: web}}}
---
apiVersion: v1
kind: Service
metadata: {namespace: demo, name: web}
spec: {selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}
"""


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A running lab of topology two-node-vxlan, which commands take for granted."""
    name = fresh_name()
    monkeypatch.setenv("NETLAB_LAB", name)
    up = netlab("up", "two-node-vxlan")
    assert up.returncode == 0, up.stderr
    yield name
    lifecycle.down(name)


def fine(*arguments: str) -> str:
    """Output of a command that succeeds."""
    finished = netlab(*arguments)
    assert (finished.returncode, finished.stderr) == (0, "")
    return finished.stdout


def test_the_verbs_have_help() -> None:
    listed = netlab("--help").stdout
    for verb in VERBS:
        assert f"\n  {verb} " in listed
        shown = netlab(verb, "--help")
        assert shown.returncode == 0
        assert shown.stdout.startswith(f"Usage: netlab {verb}")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("apply",), "error[usage]: apply takes the objects from a file"),
        (("apply", "-f", "no-such-file.yaml"), "error[no-such-file]"),
        (("delete",), "error[usage]: delete takes objects"),
        (("delete", "pod/a", "-f", "b.yaml"), "error[usage]: delete takes objects"),
        (("scale", "deploy/web"), "error[usage]: Missing option '--replicas'"),
        (("scale", "deploy/web", "--replicas", "-1"), "error[usage]: Invalid value"),
        (("label", "pod/a"), "error[usage]: label takes objects and labels"),
        (("label", "app=web"), "error[usage]: label takes objects and labels"),
        (("label", "pod/a", "app=web", "app-"), 'error[usage]: the label "app" is changed twice'),
        (("ready", "pod/a", "--lab", "none"), "error[unknown-lab]"),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...], complaint: str) -> None:
    finished = netlab(*arguments)
    assert finished.returncode == 2
    assert complaint in finished.stderr
    assert "Traceback" not in finished.stderr
    assert finished.stdout == ""


@pytest.mark.kernel
def test_a_lab_is_changed(lab: str, tmp_path: Path) -> None:
    file = tmp_path / "web.yaml"
    file.write_text(OBJECTS)
    assert fine("apply", "-f", str(file)) == "deployment/web created\nservice/web created\n"
    assert fine("apply", "-f", str(file), "-o", "name") == "deployment/web\nservice/web\n"
    assert fine("apply", "-f", str(file)) == "deployment/web unchanged\nservice/web unchanged\n"
    first, _ = pods = fine("get", "pods", "-l", "app=web", "-o", "name").split()
    body = fine("exec", "pod1", "--", "curl", "-s", "http://10.96.0.11/hostname").strip()
    assert f"pod/{body}" in pods
    assert fine("scale", "deploy/web", "--replicas", "3") == "deployment/web scaled\n"
    assert fine("scale", "deployment", "web", "--replicas=3") == "deployment/web unchanged\n"
    assert fine("ready", first, "--false") == f"{first} not ready\n"
    assert "(unready)" in fine("get", "endpointslices", "-n", "demo")
    assert fine("label", "pod", "pod1", "app=web", "tier=a") == "pod/pod1 labeled\n"
    assert len(fine("get", "pods", "-l", "app=web", "-o", "name").split()) == 4
    assert fine("label", "pod/pod1", "app-") == "pod/pod1 unlabeled\n"
    assert fine("delete", "-f", str(file)) == "deployment/web deleted\nservice/web deleted\n"
    assert fine("delete", "pod", "pod1") == "pod/pod1 deleted\n"
    assert netlab("status").returncode == 0
    up = netlab("up", "two-node-vxlan")
    assert up.returncode == 0
    assert up.stderr.startswith("undone: pod/pod1 deleted\n")
    assert "undone" not in netlab("up", "two-node-vxlan").stderr


@pytest.mark.kernel
def test_standard_input_and_json(lab: str) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [NETLAB, *arguments]
        return subprocess.run(command, input=OBJECTS, capture_output=True, text=True, timeout=60)

    dry = json.loads(run("apply", "-f", "-", "--dry-run", "-o", "json").stdout)
    planned = run("apply", "-f", "-", "--dry-run")
    assert planned.stdout.startswith("deployment/web created (dry run)\nservice/web created (dry")
    assert planned.stdout.count("\n") == 2 + len(dry["changes"])
    assert netlab("get", "svc/web").returncode == 2
    made = json.loads(run("apply", "-f", "-", "-o", "json").stdout)
    assert made["objects"] == [
        {"kind": "Deployment", "namespace": "demo", "name": "web", "result": "created"},
        {"kind": "Service", "namespace": "demo", "name": "web", "result": "created"},
    ]
    assert (made["lab"], made["dryRun"], dry["dryRun"]) == (lab, False, True)
    assert made["changes"] == dry["changes"]
    undone = json.loads(netlab("up", "two-node-vxlan", "-o", "json").stdout)["undone"]
    assert undone == ["deployment/web created", "service/web created"]


@pytest.mark.kernel
def test_the_proxy_is_shown_and_switched(lab: str) -> None:
    shown = fine("proxy").splitlines()
    assert shown[0].split() == ["SETTING", "VALUE"]
    settings = dict(line.split(maxsplit=1) for line in shown[1:])
    assert settings["mode"] == "iptables"
    assert settings["nodePortAddresses"] == "all (the default of this mode)"
    assert settings["iptables.localhostNodePorts"] == "true"
    for mode in ("user-space", "nft"):
        refused = netlab("proxy", "--mode", mode)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert (
            "it builds iptables, nftables, nftables-flat, ipvs, userspace, none" in refused.stderr
        )
    assert netlab("up", "two-node-vxlan", "--proxy", "user-space").returncode == 2
    assert fine("proxy", "-o", "name") == "iptables\n"
    planned = netlab("proxy", "--mode", "nftables", "--dry-run").stdout
    assert planned.startswith("lab/two-node-vxlan switched to nftables (dry run)\n~ ")
    assert fine("proxy", "--mode", "nftables") == "lab/two-node-vxlan switched to nftables\n"
    assert fine("proxy", "--mode", "nftables") == "lab/two-node-vxlan unchanged\n"
    settings = json.loads(fine("proxy", "-o", "json"))["serviceProxy"]
    assert (settings["mode"], settings["clusterCIDR"]) == ("nftables", "10.244.0.0/16")
    fine("ready", "pod/myblog-5c97d79cdb-jn7km", "--false")
    assert "primary (the default of this mode)" in fine("proxy")
    assert netlab("status").returncode == 0
    saved = fine("exec", "node/k8s-slave1", "--", "iptables-save", "-t", "nat")
    assert "KUBE-SERVICES" not in saved
    up = netlab("up", "two-node-vxlan", "--proxy", "nftables-flat")
    assert "undone: lab/two-node-vxlan switched to nftables\n" in up.stderr
    assert fine("proxy", "-o", "name") == "nftables-flat\n"
    assert "nothing to change" in netlab("up", "two-node-vxlan", "--proxy=nftables-flat").stderr
    up = netlab("up", "two-node-vxlan")
    assert "undone: lab/two-node-vxlan switched to nftables-flat\n" in up.stderr
    assert fine("proxy", "-o", "name") == "iptables\n"


@pytest.mark.kernel
def test_errors_name_the_place_and_change_nothing(lab: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(OBJECTS.replace("port: 80,", "port: 80000,"))
    finished = netlab("apply", "-f", str(file))
    assert finished.returncode == 2
    assert f"{file}:11:45: error[" in finished.stderr
    file.write_text(OBJECTS.replace("{port: 80,", "{port: 80, nodePort: 30000,"))
    finished = netlab("apply", "-f", str(file))
    assert finished.returncode == 2
    assert f"{file}:11:" in finished.stderr
    finished = netlab("delete", "pod/pod11", "svc/myblok", "-n", "demo")
    assert finished.returncode == 2
    assert f'error[unknown-pod]: Pod "pod11" is not in lab {lab}, namespace demo' in finished.stderr
    assert 'did you mean "pod1"?' in finished.stderr
    assert "error[unknown-service]" in finished.stderr
    up = netlab("up", "two-node-vxlan")
    assert up.stderr == f"{lab} is up; nothing to change\n"


SERVICE = """\
apiVersion: v1
kind: Service
metadata: {name: bad, namespace: demo}
spec: """

# What is stated as spec of a Service, the part that is wrong, and words of the complaint.  The lab
# has Service demo/myblog with cluster IP 10.99.174.93, and here demo/gate with node port 30080.
BAD = {
    "cluster IP of another": (
        "{clusterIP: 10.99.174.93, ports: [{port: 80}]}",
        "10.99.174.93",
        "error[duplicate-address]: Service demo/bad: 10.99.174.93 is already the cluster IP of "
        "Service demo/myblog",
    ),
    "node port of another": (
        "{type: NodePort, ports: [{port: 80, nodePort: 30080}]}",
        "30080",
        "error[duplicate-port]: Service demo/bad: node port 30080/TCP is already that of "
        "Service demo/gate",
    ),
    "node port that is no port": (
        "{type: NodePort, ports: [{port: 80, nodePort: 66000}]}",
        "66000",
        "error[bad-value]: Service demo/bad: spec.ports[0].nodePort is 66000; it takes a number "
        "from 0 to 65535",
    ),
    "unknown protocol": (
        "{ports: [{port: 80, protocol: TPC}]}",
        "TPC",
        'error[bad-value]: Service demo/bad: spec.ports[0].protocol is "TPC"',
    ),
    "cluster IP of the other family": (
        "{clusterIP: 'fd00::1', ports: [{port: 80}]}",
        "'fd00",
        "error[mixed-families]: Service demo/bad: spec.clusterIP fd00::1 is IPv6",
    ),
    "cluster IP that is not of its family": (
        "{clusterIP: 10.99.1.1, ipFamilies: [IPv6], ports: [{port: 80}]}",
        "IPv6",
        "error[mixed-families]: Service demo/bad",
    ),
    "unknown traffic policy": (
        "{internalTrafficPolicy: local, ports: [{port: 80}]}",
        "local",
        'error[bad-value]: Service demo/bad: spec.internalTrafficPolicy is "local"',
    ),
    "source range that is none": (
        "{type: LoadBalancer, loadBalancerSourceRanges: [10.0.0.0], ports: [{port: 80}]}",
        "10.0.0.0",
        "error[bad-cidr]: Service demo/bad: spec.loadBalancerSourceRanges[0]",
    ),
}


@pytest.mark.kernel
def test_bad_services_are_refused_with_their_place_and_change_nothing(
    lab: str, tmp_path: Path
) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(
        SERVICE.replace("bad", "gate") + "{type: NodePort, ports: [{port: 80, nodePort: 30080}]}\n"
    )
    fine("apply", "-f", str(file))
    shown = fine("get", "services,endpointslices,pods", "-o", "json")
    for spec, wrong, complaint in BAD.values():
        file.write_text(f"{SERVICE}{spec}\n")
        finished = netlab("apply", "-f", str(file))
        assert finished.returncode == 2
        column = len("spec: ") + spec.index(wrong) + 1
        assert f"{file}:4:{column}: {complaint}" in finished.stderr
        assert finished.stdout == ""
    finished = netlab("proxy", "--mode", "nftable")
    assert finished.returncode == 2
    assert fine("get", "services,endpointslices,pods", "-o", "json") == shown
    assert netlab("status").returncode == 0
    # What is only strange is done, and said.
    file.write_text(f"{SERVICE}{{type: ExternalName, externalName: a.b, selector: {{app: x}}}}\n")
    finished = netlab("apply", "-f", str(file))
    assert finished.returncode == 0
    assert f"{file}:4:57: warning[selects-nothing]: Service demo/bad" in finished.stderr
    file.write_text(f"{SERVICE}{{type: NodePort, ports: [{{port: 80, nodePort: 20000}}]}}\n")
    finished = netlab("apply", "-f", str(file))
    assert finished.returncode == 0
    assert f"{file}:4:53: warning[node-port-range]: Service demo/bad" in finished.stderr


@pytest.mark.kernel
def test_what_get_shows_can_be_applied(lab: str, tmp_path: Path) -> None:
    file = tmp_path / "all.json"
    file.write_text(OBJECTS)
    fine("apply", "-f", str(file.rename(tmp_path / "web.yaml")))
    before = fine("get", "pods,services,nodes", "-o", "wide")
    file.write_text(fine("get", "pods,services,nodes", "-o", "json"))
    assert "deleted" not in fine("apply", "-f", str(file))
    assert fine("get", "pods,services,nodes", "-o", "wide") == before
    assert netlab("status").returncode == 0


@pytest.mark.kernel
def test_completion_knows_the_objects(lab: str) -> None:
    line = "netlab delete "
    for incomplete, wanted in (("pod/p", "pod/pod1"), ("service/myb", "service/myblog")):
        finished = netlab(
            _NETLAB_COMPLETE="bash_complete", COMP_WORDS=line + incomplete, COMP_CWORD="2"
        )
        assert [each.partition(",")[2] for each in finished.stdout.splitlines()] == [wanted]


@pytest.mark.kernel
@pytest.mark.parametrize("verb", ["scale deploy/web --replicas 2", "delete pod/pod1"])
def test_without_root(verb: str) -> None:
    finished = subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", NETLAB, *verb.split()],
        capture_output=True,
        text=True,
        env={**os.environ, "NETLAB_LAB": "none"},
    )
    if "Permission denied" in finished.stderr and NETLAB in finished.stderr:
        pytest.skip("the checkout lies where another user cannot read it")
    assert finished.returncode == 3, finished.stderr
    assert "sudo netlab" in finished.stderr
