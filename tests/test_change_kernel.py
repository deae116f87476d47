"""A lab on the real kernel is changed while it runs: packets follow, and nobody else notices."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from labs import fresh_name
from netlab.datapath.build import pod_namespace_name
from netlab.datapath.state import Ruleset, Update
from netlab.kernel import namespaces, xtables
from netlab.kernel.namespaces import entered
from netlab.lab import control, lifecycle, record
from netlab.lab.change import apply, delete, label, ready, scale
from netlab.lab.edits import Changed
from netlab.lab.undone import undone
from netlab.problems import Exit, NetlabError, Problem
from netlab.topology.earlier import NOWHERE
from netlab.topology.load import load
from netlab.topology.model import Lab, Pod
from netlab.topology.places import Document
from test_lifecycle import http

pytestmark = pytest.mark.kernel

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
  replicas: 3
  selector: {matchLabels: {app: web}}
  template: {metadata: {labels: {app: web}}}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {clusterIP: 10.96.0.80, selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}
"""


@pytest.fixture
def topology(tmp_path: Path) -> Path:
    """A file with a client on n1, and Deployment and Service web."""
    file = tmp_path / "lab.yaml"
    file.write_text(OBJECTS)
    return file


@pytest.fixture
def build(topology: Path) -> Iterator[Callable[[], str]]:
    """Bring up a lab of that file; returns its name."""
    names = []

    def up() -> str:
        names.append(fresh_name())
        lifecycle.up(load(topology, names[-1]).lab)
        return names[-1]

    yield up
    for name in names:
        lifecycle.down(name)


def pods(name: str) -> list[Pod]:
    """The pods of Deployment web."""
    lab = record.read(name)
    assert lab
    return [pod for pod in lab.pods if pod.owner]


def answering(name: str) -> set[str]:
    """Who answers behind the Service."""
    return {http(f"{name}:default:client", "10.96.0.80", 80, "/hostname") for _ in range(100)}


def names_of(found: list[Pod]) -> set[str]:
    return {pod.name for pod in found}


def changed(name: str, decide: Callable[[Lab], Changed]) -> lifecycle.Outcome:
    return lifecycle.change(name, decide)[1]


def touched(outcome: lifecycle.Outcome) -> set[str]:
    """Namespaces in which something was changed, without the lab's name."""
    return {change.namespace.partition(":")[2] for change in outcome.changes}


def is_sound(name: str) -> None:
    """What is declared is there, in all places."""
    lab = record.read(name)
    init = control.connect(name)
    assert lab
    assert init
    assert init.declared() == record.encode(lab)
    assert lifecycle.differences(lab) == []
    assert answering(name) == names_of([pod for pod in lab.pods if pod.owner and pod.ready])


def test_what_somebody_did_by_hand_stays_until_up(build: Callable[[], str]) -> None:
    name = build()
    by_hand = {
        f"{name}:n1": "route add 192.0.2.0/24 via 172.21.32.12",
        f"{name}:_switch": "route add 198.51.100.0/24 via 172.21.32.11",
        f"{name}:n2": "route del 10.244.1.0/24",
    }
    for namespace, what in by_hand.items():
        subprocess.run(["ip", "-n", namespace, *what.split()], check=True)
    before = lifecycle.differences(record.read(name))  # type: ignore[arg-type]
    assert len(before) == len(by_hand)
    changed(name, lambda lab: scale(lab, ["deploy/web"], 4))
    changed(name, lambda lab: label(lab, ["svc/web"], {"x": "y"}))
    lab = record.read(name)
    assert lab
    assert lifecycle.differences(lab) == before
    lifecycle.up(lab)
    is_sound(name)


def test_endpoints_follow_scale_readiness_and_labels(build: Callable[[], str]) -> None:
    name = build()
    first = names_of(pods(name))
    assert answering(name) == first
    changed(name, lambda lab: scale(lab, ["deploy/web"], 5))
    assert len(first) == 3
    assert first < answering(name) == names_of(pods(name))
    chosen = pods(name)[0]
    changed(name, lambda lab: ready(lab, [chosen.name], ready=False))
    assert answering(name) == names_of(pods(name)) - {chosen.name}
    changed(name, lambda lab: ready(lab, [chosen.name], ready=True))
    changed(name, lambda lab: label(lab, ["pod/client"], {"app": "web"}))
    assert answering(name) == names_of(pods(name)) | {"client"}
    changed(name, lambda lab: label(lab, ["pod/client"], {"app": None}))
    changed(name, lambda lab: scale(lab, ["deploy/web"], 2))
    assert answering(name) == names_of(pods(name)) < first
    is_sound(name)
    changed(name, lambda lab: scale(lab, ["deploy/web"], 0))
    with pytest.raises(ConnectionRefusedError):
        answering(name)


def test_only_what_differs_is_touched(build: Callable[[], str]) -> None:
    name = build()
    inodes = {each: os.stat(namespaces.path(each)).st_ino for each in namespaces.names_of(name)}
    grown = changed(name, lambda lab: scale(lab, ["deploy/web"], 4))
    new = pods(name)[3]
    assert touched(grown) == {"n1", "n2", f"default:{new.name}"}
    on_other = {
        type(change.item)
        for change in grown.changes
        if change.namespace.endswith(":n1" if new.node == "n2" else ":n2")
    }
    assert on_other == {Update}
    chosen = pods(name)[0].name
    unready = changed(name, lambda lab: ready(lab, [chosen], ready=False))
    assert touched(unready) == {"n1", "n2"}
    assert {type(change.item) for change in unready.changes} == {Update}
    labeled = changed(name, lambda lab: label(lab, ["node/n1"], {"a": "b"}))
    assert labeled.changes == ()
    shrunk = changed(name, lambda lab: scale(lab, ["deploy/web"], 3))
    assert touched(shrunk) == {"n1", "n2", f"default:{new.name}"}
    assert inodes == {
        each: os.stat(namespaces.path(each)).st_ino for each in namespaces.names_of(name)
    }
    init = control.connect(name)
    assert init
    assert init.status().sockets == 3


def test_connections_of_untouched_pods_live_on(build: Callable[[], str]) -> None:
    name = build()
    with entered(f"{name}:default:client"):
        connection = socket.create_connection(("10.96.0.80", 80), timeout=5)
    # Not inside the namespace any more: a lab's init is found from the host's alone.
    with connection:
        lines = connection.makefile("rw", newline="\n")

        def say(text: str) -> str:
            lines.write(f"{text}\n")
            lines.flush()
            return lines.readline().strip()

        server = say("who is there?")
        assert lines.readline() == "who is there?\n"
        changed(name, lambda lab: scale(lab, ["deploy/web"], 5))
        assert say("after more pods") == "after more pods"
        others = [pod.name for pod in pods(name) if pod.name != server]
        changed(name, lambda lab: delete(lab, [f"pod/{other}" for other in others]))
        assert say("after others went") == "after others went"
        changed(name, lambda lab: ready(lab, [server], ready=False))
        assert say("while not ready") == "while not ready"
        # Nothing but the Service ever named the port that the pod answers on.
        changed(name, lambda lab: label(lab, [f"pod/{server}"], {"app": "other"}))
        assert say("while not selected") == "while not selected"
        changed(name, lambda lab: delete(lab, ["svc/web"]))
        assert say("without the Service") == "without the Service"


def test_a_removed_pod_is_gone_when_the_command_ends(build: Callable[[], str]) -> None:
    name = build()
    gone = pods(name)[2]
    lab = record.read(name)
    assert lab
    changed(name, lambda lab: scale(lab, ["deploy/web"], 2))
    assert not os.path.exists(namespaces.path(pod_namespace_name(lab, gone)))
    with pytest.raises(OSError, match=r"unreachable|timed out|No route"):
        http(f"{name}:default:client", gone.address, 8080, "/")


def test_objects_are_applied_and_deleted(build: Callable[[], str]) -> None:
    name = build()
    node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n3"}}
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "far", "labels": {"app": "far"}},
        "spec": {"nodeName": "n3"},
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "far"},
        "spec": {"type": "NodePort", "selector": {"app": "far"}, "ports": [{"port": 8080}]},
    }
    documents = [Document(each, NOWHERE) for each in (node, pod, service)]
    changed(name, lambda lab: apply(lab, documents))
    lab = record.read(name)
    assert lab
    made = next(each for each in lab.services if each.name == "far")
    client = f"{name}:default:client"
    assert http(client, made.cluster_ip, 8080, "/hostname") == "far"
    node_port = made.ports[0].node_port
    assert node_port
    assert http(client, lab.node("n1").address, node_port, "/hostname") == "far"
    is_sound(name)
    changed(name, lambda lab: delete(lab, ["pod/far", "svc/far", "node/n3"]))
    assert f"{name}:n3" not in namespaces.names_of(name)
    is_sound(name)


def test_up_restores_the_file_and_names_what_it_takes_back(
    build: Callable[[], str], topology: Path
) -> None:
    name = build()
    before = pods(name)
    changed(name, lambda lab: scale(lab, ["deploy/web"], 5))
    changed(name, lambda lab: ready(lab, [before[0].name], ready=False))
    lab = load(topology, name).lab
    outcome = lifecycle.up(lab)
    assert undone(outcome.before, lab) == [
        "deployment/web scaled to 5",
        f"pod/{before[0].name} made not ready",
    ]
    assert pods(name) == before
    is_sound(name)
    again = lifecycle.up(lab)
    assert (again.changes, undone(again.before, lab)) == ((), [])


def test_what_is_refused_leaves_the_lab_as_it_was(build: Callable[[], str]) -> None:
    name = build()
    lab = record.read(name)
    with pytest.raises(NetlabError) as caught:
        changed(name, lambda lab: scale(lab, ["deploy/web"], 3000))
    assert caught.value.exit_code is Exit.USAGE
    assert record.read(name) == lab
    is_sound(name)


def test_a_dry_run_does_nothing(build: Callable[[], str]) -> None:
    name = build()
    lab = record.read(name)
    result, outcome = lifecycle.change(
        name, lambda lab: scale(lab, ["deploy/web"], 4), dry_run=True
    )
    assert len([pod for pod in result.lab.pods if pod.owner]) == 4
    assert outcome.changes
    assert record.read(name) == lab
    is_sound(name)


def test_when_rules_cannot_be_loaded_all_is_as_it_was(
    build: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = build()
    lab = record.read(name)
    load_rules = xtables.restore
    failures = [f"{name}:n2"] * 2  # the update, and the whole load that follows

    def restore(namespace: str, rules: Ruleset, flush: bool = True) -> None:
        if namespace in failures:
            failures.remove(namespace)
            raise NetlabError(Problem("rules-refused", "as the test wants it"), Exit.MACHINE)
        load_rules(namespace, rules, flush)

    monkeypatch.setattr(xtables, "restore", restore)
    with pytest.raises(NetlabError) as caught:
        changed(name, lambda lab: scale(lab, ["deploy/web"], 6))
    assert [problem.code for problem in caught.value.problems] == ["rules-refused"]
    assert failures == []
    assert record.read(name) == lab
    is_sound(name)


def test_an_interrupted_change_is_taken_back(
    build: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = build()
    lab = record.read(name)
    serve = control.Init.serve
    interruptions = [KeyboardInterrupt()]

    def interrupted(init: control.Init, *declared: Sequence[object]) -> tuple[object, ...]:
        if interruptions:
            raise interruptions.pop()
        return serve(init, *declared)

    monkeypatch.setattr(control.Init, "serve", interrupted)
    with pytest.raises(KeyboardInterrupt):
        changed(name, lambda lab: delete(lab, ["deploy/web", "node/n2"]))
    assert record.read(name) == lab
    is_sound(name)


def test_changes_at_the_same_time_both_count(build: Callable[[], str]) -> None:
    name = build()
    failures: list[BaseException] = []

    def make(decide: Callable[[Lab], Changed]) -> None:
        try:
            changed(name, decide)
        except BaseException as error:
            failures.append(error)

    threads = [
        threading.Thread(target=make, args=(decide,))
        for decide in (
            lambda lab: scale(lab, ["deploy/web"], 5),
            lambda lab: label(lab, ["pod/client"], {"a": "b"}),
            lambda lab: ready(lab, [pods(name)[0].name], ready=False),
        )
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    lab = record.read(name)
    assert lab
    assert (len(pods(name)), lab.pods[0].labels, pods(name)[0].ready) == (5, {"a": "b"}, False)
    is_sound(name)


def test_another_lab_notices_nothing(build: Callable[[], str]) -> None:
    one, other = build(), build()
    before = record.read(other)
    inodes = {each: os.stat(namespaces.path(each)).st_ino for each in namespaces.names_of(other)}
    changed(one, lambda lab: delete(lab, ["deploy/web", "svc/web", "node/n2"]))
    assert record.read(other) == before
    assert inodes == {
        each: os.stat(namespaces.path(each)).st_ino for each in namespaces.names_of(other)
    }
    is_sound(other)


def test_a_lab_that_is_not_up() -> None:
    name = fresh_name()
    with pytest.raises(control.LabNotRunning):
        changed(name, lambda lab: scale(lab, ["deploy/web"], 1))
    assert not os.path.exists(record.directory(name))


STARTER = """
import os, sys
from netlab.lab import lifecycle
from netlab.lab.change import delete
from netlab.kernel import namespaces, netlink
left = int(sys.argv[1])
def counted(function):
    def call(*args, **kwargs):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), 9)
        return function(*args, **kwargs)
    return call
def begin(lab):
    for name in ("unshare", "mount", "umount", "open_current"):
        setattr(namespaces, name, counted(getattr(namespaces, name)))
    netlink.Socket.request = counted(netlink.Socket.request)
    return delete(lab, sys.argv[3:])
lifecycle.change(sys.argv[2], begin)
"""


def killed_after(calls: int, name: str) -> int:
    """Replace two pods in a process that kills itself before its n-th system call that counts."""
    victims = [f"pod/{pod.name}" for pod in pods(name)[:2]]
    return subprocess.run(
        [sys.executable, "-c", STARTER, str(calls), name, *victims], timeout=60
    ).returncode


@pytest.mark.parametrize("calls", [0, 5, 12, 15, 18, 20, 22, 24, 26, 28, 30])
def test_killed_in_the_middle(build: Callable[[], str], topology: Path, calls: int) -> None:
    name = build()
    assert killed_after(calls, name) == -signal.SIGKILL
    changed(name, lambda lab: label(lab, ["pod/client"], {"a": "b"}))
    assert len(pods(name)) == 3
    is_sound(name)
    assert killed_after(calls, name) == -signal.SIGKILL
    lifecycle.up(load(topology, name).lab)
    is_sound(name)
    assert killed_after(calls, name) == -signal.SIGKILL
    lifecycle.down(name)
    assert namespaces.names_of(name) == []
    assert control.connect(name) is None
