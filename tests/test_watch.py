"""`netlab get --watch`: events of a lab's objects, and a proxy of one's own that lives on them."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labs import fresh_name
from netlab.lab import control, lifecycle
from netlab.lab.events import difference
from netlab.topology import status
from test_change import node, pod, service
from test_change import slice_ as slice_of
from test_cli import NETLAB, netlab
from test_topology_allocation import allocated

Object = dict[str, Any]

_objects = st.dictionaries(
    st.tuples(st.just("Pod"), st.just("demo"), st.sampled_from("abcd")),
    st.fixed_dictionaries({"kind": st.just("Pod"), "spec": st.integers(0, 2)}),
)


@given(_objects, _objects)
def test_events_lead_from_one_state_to_the_other(
    before: dict[Any, Object], after: dict[Any, Object]
) -> None:
    events = list(difference(before, after))
    kinds = {id(event["object"]): event["type"] for event in events}
    assert len(kinds) == len(events)
    for key in before.keys() | after.keys():
        if key not in before:
            wanted = "ADDED"
        elif key not in after:
            wanted = "DELETED"
        else:
            wanted = None if before[key] == after[key] else "MODIFIED"
        assert kinds.get(id(after.get(key, before.get(key)))) == wanted


def test_slices_of_the_file_that_count_for_nothing_are_not_shown() -> None:
    unheeded = slice_of("given", "web", "10.244.1.9")
    unheeded["metadata"]["labels"]["service.kubernetes.io/headless"] = ""
    lab = allocated([node("n1"), service("web"), unheeded])
    assert [item["metadata"]["name"] for item in status.endpoint_slices(lab)] == ["web-1"]


def test_slices_have_what_a_proxy_needs() -> None:
    named = {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": "http"}]}
    pods = [
        pod(f"p{port}", nodeName="n1", containers=[{"name": "c", "ports": [port_]}])
        for port in (8080, 8081)
        for port_ in ({"name": "http", "containerPort": port},)
    ]
    hinted = slice_of("given", "given", "10.244.1.9")
    hinted["endpoints"][0] |= {"nodeName": "n1", "hints": {"forZones": [{"name": "a"}]}}
    first = node("n1")
    first["metadata"]["labels"] = {"topology.kubernetes.io/zone": "a"}
    headless = service("headless", clusterIP="None")
    lab = allocated([first, *pods, service(**named), service("given"), headless, hinted])
    slices = {item["metadata"]["name"]: item for item in status.endpoint_slices(lab)}
    # A named port has another number in each pod: one slice for each.
    for number, port in ((1, 8080), (2, 8081)):
        item = slices[f"web-{number}"]
        assert [each["port"] for each in item["ports"]] == [port]
        assert [each["targetRef"]["name"] for each in item["endpoints"]] == [f"p{port}"]
    # One of the file is shown as it stands there.
    metadata = {"namespace": "default", **hinted["metadata"]}
    assert slices["given"] == {**hinted, "metadata": metadata}
    assert "given-1" not in slices
    label = "service.kubernetes.io/headless"
    assert label in slices["headless-1"]["metadata"]["labels"]
    assert label not in slices["web-1"]["metadata"]["labels"]
    shown = {item["metadata"]["name"]: item["spec"] for item in status.services(lab)}
    assert shown["web"]["sessionAffinity"] == "None"
    assert shown["web"]["internalTrafficPolicy"] == "Cluster"
    assert "externalTrafficPolicy" not in shown["web"]


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A running lab of topology two-node-vxlan in mode none, which commands take for granted."""
    name = fresh_name()
    monkeypatch.setenv("NETLAB_LAB", name)
    up = netlab("up", "two-node-vxlan", "--proxy", "none")
    assert up.returncode == 0, up.stderr
    yield name
    lifecycle.down(name)


class Running:
    """A command that runs beside the test, and whose lines are waited for."""

    def __init__(self, command: list[str], stdin: Any = subprocess.DEVNULL) -> None:
        self.process = subprocess.Popen(
            command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
        )
        self._rest = b""

    def line(self) -> str:
        """The next line; fails if there is none in time."""
        assert self.process.stdout
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self.process.stdout], [], [], 30)
            assert ready, "no line came"
            chunk = os.read(self.process.stdout.fileno(), 1 << 16)
            assert chunk, "it ended"
            self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode()

    def end(self) -> tuple[int, str]:
        """Exit code and stderr, once it has ended by itself."""
        assert self.process.stderr
        code = self.process.wait(timeout=30)
        return code, self.process.stderr.read().decode()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def watching(lab: str) -> Iterator[Any]:
    """Start `netlab get KINDS --watch -o json`."""
    started = []

    def start(kinds: str = "services,endpointslices", *options: str) -> Running:
        started.append(Running([NETLAB, "get", kinds, "-o", "json", "--watch", *options]))
        return started[-1]

    yield start
    for each in started:
        each.kill()


def event(running: Running) -> tuple[str, str]:
    """Type and name of the next event."""
    read = json.loads(running.line())
    assert set(read) == {"type", "object"}
    return read["type"], f"{read['object']['kind']}/{read['object']['metadata']['name']}"


def change(*arguments: str) -> None:
    finished = netlab(*arguments)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.kernel
def test_events_come_as_things_happen_until_the_lab_goes_down(lab: str, watching: Any) -> None:
    watch = watching()
    assert [event(watch) for _ in range(4)] == [
        ("ADDED", "Service/myblog"),
        ("ADDED", "Service/mysql"),
        ("ADDED", "EndpointSlice/myblog-1"),
        ("ADDED", "EndpointSlice/mysql-1"),
    ]
    pods = watching("pods", "-l", "app=client")
    assert event(pods) == ("ADDED", "Pod/pod1")
    change("ready", "pod/mysql-85f4f65f99-w6jkj", "--false")
    assert event(watch) == ("MODIFIED", "EndpointSlice/mysql-1")
    change("label", "pod/pod1", "app-")
    assert event(pods) == ("DELETED", "Pod/pod1")
    change("delete", "svc/myblog")
    assert event(watch) == ("DELETED", "Service/myblog")
    assert event(watch) == ("DELETED", "EndpointSlice/myblog-1")
    change("up", "two-node-vxlan", "--proxy", "none")
    assert {event(watch) for _ in range(3)} == {
        ("ADDED", "Service/myblog"),
        ("ADDED", "EndpointSlice/myblog-1"),
        ("MODIFIED", "EndpointSlice/mysql-1"),
    }
    assert event(pods) == ("ADDED", "Pod/pod1")
    change("down")
    assert watch.end() == (0, f"{lab} is down: nothing more will happen\n")
    assert pods.end()[0] == 0


@pytest.mark.kernel
def test_a_watch_ends_when_it_is_told_or_nobody_reads(lab: str, watching: Any) -> None:
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)):
        watch = watching("nodes")
        assert event(watch) == ("ADDED", "Node/k8s-slave1")
        watch.process.send_signal(number)
        ended, said = watch.end()
        assert ended == code
        assert said.strip() in ("", "interrupted")
    watch = watching("nodes")
    event(watch)
    watch.process.stdout.close()
    assert watch.end() == (128 + signal.SIGPIPE, "")
    watch = watching("nodes")
    event(watch)
    init = control.connect(lab)
    assert init
    os.kill(init.pid, signal.SIGKILL)
    code, said = watch.end()
    assert code == 3
    assert said.startswith("error[init-ended]")


@pytest.mark.kernel
def test_a_watch_that_is_not_read_holds_nobody_up(lab: str, watching: Any) -> None:
    watch = watching("pods")
    watch.line()
    watch.process.send_signal(signal.SIGSTOP)
    for value in ("--false", "--true", "--false"):
        change("ready", "pod/pod1", value)
    watch.process.send_signal(signal.SIGCONT)
    while True:
        read = json.loads(watch.line())
        ready = read["object"]["status"]["conditions"][0]["status"]
        if (read["type"], ready) == ("MODIFIED", "False"):
            break
    # What it hears last, it hears when there is nobody to ask any more.
    watch.process.send_signal(signal.SIGSTOP)
    change("ready", "pod/pod1")
    change("down")
    watch.process.send_signal(signal.SIGCONT)
    assert watch.end() == (0, f"{lab} is down: nothing more will happen\n")


def test_a_watch_wants_json() -> None:
    finished = netlab("get", "pods", "--watch", "--lab", "none")
    assert finished.returncode == 2
    assert "-o json" in finished.stderr


def answering(client: str) -> str:
    url = "http://10.99.174.93/hostname"
    command = ["exec", client, "--", "curl", "-s", "--max-time", "5", url]
    return netlab(*command).stdout.strip()


@pytest.mark.kernel
def test_a_proxy_of_ones_own_serves_the_lab(lab: str, watching: Any) -> None:
    watch = watching()
    nodes = ("k8s-slave1", "k8s-slave2")
    script = Path(__file__).parent.parent / "docs" / "own_proxy.py"
    # It looks for `netlab` where this one is.
    path = f"{Path(NETLAB).parent}:{os.environ['PATH']}"
    command = ["env", f"PATH={path}", sys.executable, str(script), *nodes]
    proxy = Running(command, stdin=watch.process.stdout)
    first, second = "myblog-5c97d79cdb-jn7km", "myblog-5c97d79cdb-j485f"
    try:
        written = 0
        while written < 4:
            written += int(proxy.line().split()[0])
        both = {answering("pod1") for _ in range(20)}
        assert both == {first, second}
        for gone, left in ((first, second), (second, first)):
            change("ready", f"pod/{gone}", "--false")
            proxy.line()
            assert {answering(client) for client in ("pod1", "node/k8s-slave1")} == {left}
            change("ready", f"pod/{gone}")
            proxy.line()
        change("ready", f"pod/{first}", f"pod/{second}", "--false")
        proxy.line()
        refused = netlab("exec", "pod1", "--", "curl", "-s", "http://10.99.174.93/")
        assert refused.returncode == 7
        assert netlab("status").returncode == 0  # its table is no damage
        change("down")
        assert watch.end()[0] == 0
        assert proxy.end() == (0, "")
    finally:
        proxy.kill()
