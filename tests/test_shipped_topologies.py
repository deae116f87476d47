"""Each shipped topology: what its heading promises, up, as declared, its main path, down."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from labs import fresh_name
from netlab.lab import lifecycle
from netlab.topology.load import load, shipped
from netlab.topology.model import Lab
from netlab.trace.aim import Request
from netlab.trace.run import trace
from netlab.verify.run import verify

NETLAB = Path(sys.executable).parent / "netlab"

# Main paths: from, to, and what becomes of it (a reason, if it is lost).
PATHS: dict[str, list[tuple[str, str, str]]] = {
    "egress": [("pod1", "host/web", "delivered"), ("node/k8s-slave1", "host/web", "delivered")],
    "egress-without-masquerade": [
        ("pod1", "host/web", "unknown-to-gateway"),
        ("node/k8s-slave1", "host/web", "delivered"),
    ],
    "flannel-ip-masq": [
        ("pod1", "node/k8s-slave2", "delivered"),
        ("pod1", "node/k8s-slave1", "delivered"),
    ],
    "ingress": [
        ("host/client", "http://myblog.example/", "delivered"),
        ("host/client", "http://myblog.example/shop", "delivered"),
        ("host/client", "http://shop.example/", "delivered"),
    ],
    "loadbalancer-nat": [
        ("host/caller", "svc/myblog", "delivered"),
        ("host/client", "svc/myblog", "delivered"),
        ("host/client", "svc/myblog-local", "delivered"),
        ("host/client", "192.0.2.1:81", "not-balanced"),
    ],
    "loadbalancer-passthrough": [
        ("host/caller", "svc/myblog-local", "delivered"),
        ("host/client", "svc/myblog", "delivered"),
        ("host/client", "svc/myblog-local", "delivered"),
        ("host/client", "192.0.2.9:80", "not-balanced"),
    ],
    "network-policy": [
        ("stranger", "database", "ingress-policy"),
        ("web", "database", "delivered"),
        ("web", "svc/mysql", "delivered"),
        ("web", "client", "egress-policy"),
        ("client", "web", "delivered"),
    ],
    "nodeport": [
        ("host/client", "node/k8s-master:30647", "delivered"),
        ("host/client", "node/k8s-slave1:30648", "delivered"),
        ("host/client", "node/k8s-master:30648", "no-local-endpoints"),
    ],
    "pod-containers": [
        ("pod/nginx-webapp-pod", "localhost:5000", "delivered"),
        ("pod/nginx-webapp-pod", "127.0.0.1:80", "delivered"),
        ("client", "pod/nginx-webapp-pod:5000", "delivered"),
        ("client", "svc/nginx-webapp-pod", "delivered"),
    ],
    "rolling-update": [("client", "svc/careful", "delivered")],
    "docker-modes": [
        ("pod1", "node/k8s-slave1:8080", "delivered"),
        ("container/tool", "pod1", "delivered"),
        ("container/web", "container/database", "dropped-by-rule"),
    ],
    "dns": [("pod1", "svc/kube-dns", "delivered"), ("client", "svc/myblog", "delivered")],
    "dual-stack": [("pod1", "svc/myblog", "delivered")],
    "outside-database": [("pod1", "svc/my-service", "delivered")],
    "one-node": [("client", "svc/web", "delivered")],
    "two-node-host-gw": [("client", "svc/web", "delivered")],
    "two-node-vxlan": [("pod1", "svc/myblog", "delivered")],
}
# Those that have the headings that a walk of the text asks for.
WALKS = [
    *("dns", "outside-database"),
    *("dual-stack", "egress", "egress-without-masquerade", "flannel-ip-masq"),
    *("ingress", "loadbalancer-nat", "loadbalancer-passthrough", "network-policy", "nodeport"),
    *("pod-containers", "rolling-update"),
]


def heading(name: str) -> str:
    text = shipped()[name].read_text(encoding="utf-8")
    lines = [line for line in text.split("apiVersion")[0].splitlines() if line.startswith("#")]
    return "\n".join(line.removeprefix("#").strip() for line in lines)


@pytest.mark.parametrize("name", WALKS)
def test_the_heading_tells_the_walk_what_the_text_gets_wrong_and_three_commands(name: str) -> None:
    said = heading(name)
    assert "text" in said
    assert re.search(r"gets wrong|leaves out|is often believed", said)
    commands = said.partition("Three commands:")[2]
    assert len(re.findall(r"^- `netlab ", commands, re.MULTILINE)) == 3


@pytest.mark.kernel
@pytest.mark.parametrize("name", PATHS)
def test_it_is_as_declared_and_its_main_path_is_as_predicted(
    up: Callable[[Lab], object], name: str
) -> None:
    lab = load(name, name=fresh_name()).lab
    up(lab)
    found = verify(lab)
    assert [each for each in found.results if not each.as_declared] == []
    for source, destination, outcome in PATHS[name]:
        told = trace(lab, Request(source, destination))
        assert (told.drop.reason if told.drop else told.disposition) == outcome
        assert told.prediction is not None
        assert told.prediction.differs == []
    assert lifecycle.up(lab).changes == ()
    lifecycle.down(lab.name)
    assert lifecycle.namespaces.names_of(lab.name) == []


@pytest.mark.kernel
@pytest.mark.parametrize("name", WALKS)
def test_the_commands_of_the_heading_do_something(up: Callable[[Lab], object], name: str) -> None:
    lab = load(name, name=fresh_name()).lab
    up(lab)
    for command in re.findall(r"^- `netlab ([^`]+)`", heading(name), re.MULTILINE):
        verb, *words = shlex.split(command)
        done = subprocess.run(
            [NETLAB, verb, "--lab", lab.name, *words], capture_output=True, text=True
        )
        # A trace that ends in a drop says so by exit code 1.
        assert done.returncode in (0, 1), done.stderr
        assert done.stdout
        assert "error" not in done.stderr


@pytest.mark.kernel
def test_nginx_passes_on_to_the_other_container_of_its_pod(up: Callable[[Lab], object]) -> None:
    lab = load("pod-containers", name=fresh_name()).lab
    up(lab)
    command = re.findall(r"^- `netlab (exec [^`]+)`", heading("pod-containers"), re.MULTILINE)[0]
    verb, *words = shlex.split(command)
    done = subprocess.run(
        [NETLAB, verb, "--lab", lab.name, *words], capture_output=True, text=True, check=True
    )
    assert done.stdout == "Hello world!\n"


def test_what_flannel_breaks_is_declared() -> None:
    """Without the declaration the lab would not be as declared: the third demand is broken."""
    expected = {each.outcome for each in load("flannel-ip-masq").lab.expected}
    assert "translated" in expected
