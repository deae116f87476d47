"""Pods come and go while clients keep connecting: rollouts, graceful deletion, probes."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labs import fresh_name
from netlab.datapath.build import pod_namespace_name
from netlab.kernel import namespaces
from netlab.lab import lifecycle, record, rollout, termination
from netlab.lab.load import Attempt, summarized
from netlab.lab.readiness import Observed, heed, heeded
from netlab.topology import kubernetes_pods as k8s_pods
from netlab.topology.load import load
from netlab.topology.model import Lab, Pod
from test_cli import NETLAB, netlab

KEY = ("Deployment", "default", "web")

FRAME = """apiVersion: netlab/v1
kind: Lab
metadata: {name: churn}
---
apiVersion: v1
kind: Pod
metadata: {name: client}
---
"""
WEB = """apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 3
  strategy: {rollingUpdate: {maxSurge: SURGE, maxUnavailable: UNAVAILABLE}}
  template:
    metadata: {labels: {app: web}}
    spec:
      containers:
      - name: web
        ports: [{containerPort: 8080}]
PROBES
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}
"""
READINESS = """        readinessProbe:
          exec: {command: [test, -e, /run/healthy]}
          periodSeconds: 1
          failureThreshold: 1
          timeoutSeconds: 30
"""
LIVENESS = """        livenessProbe:
          exec: {command: [test, "!", -e, /run/stuck]}
          periodSeconds: 1
          failureThreshold: 1
          timeoutSeconds: 30
"""


def text_of(surge: str = "1", unavailable: str = "0", probes: str = "") -> str:
    web = WEB.replace("SURGE", surge).replace("UNAVAILABLE", unavailable)
    return FRAME + web.replace("PROBES\n", probes)


@pytest.fixture
def lab_of(tmp_path: Any) -> Callable[..., Lab]:
    def read(surge: str = "1", unavailable: str = "0", probes: str = "") -> Lab:
        path = tmp_path / "churn.yaml"
        path.write_text(text_of(surge, unavailable, probes))
        return load(str(path), name=fresh_name()).lab

    return read


def web_pods(lab: Lab) -> list[Pod]:
    return [pod for pod in lab.pods if pod.owner]


def client_of(lab: Lab) -> Pod:
    return next(pod for pod in lab.pods if not pod.owner)


def ends(lab: Lab) -> dict[str, tuple[bool, bool, bool]]:
    """Ready, serving and terminating of each endpoint, by its pod."""
    (entry,) = lab.endpoints
    return {e.pod or "": (e.ready, e.serving, e.terminating) for e in entry.endpoints}


# What is decided


def test_a_pod_that_is_deleted_terminates_while_another_one_begins(
    lab_of: Callable[..., Lab],
) -> None:
    lab = lab_of()
    leaving = web_pods(lab)[0]
    begun = termination.begin(lab, [f"pod/{leaving.name}"], 1000.0).lab
    assert len(web_pods(begun)) == 4
    assert ends(begun)[leaving.key] == (False, True, True)
    (found,) = termination.terminating(begun)
    assert found[0].key == leaving.key
    assert termination.deadline_of(found[1]) == 1030.0
    again = termination.begin(begun, [f"pod/{leaving.name}"], 1010.0, 60).lab
    assert termination.deadline_of(termination.terminating(again)[0][1]) == 1030.0
    sooner = termination.begin(begun, [f"pod/{leaving.name}"], 1010.0, 5).lab
    assert termination.deadline_of(termination.terminating(sooner)[0][1]) == 1015.0
    done = termination.removed(begun, [leaving.key]).lab
    assert [pod.key for pod in web_pods(done)] == [
        pod.key for pod in web_pods(begun) if pod.key != leaving.key
    ]
    assert [value["kind"] for value in done.declared] == [value["kind"] for value in lab.declared]


def spec_of(replicas: int, surge: int | str | None, unavailable: int | str | None) -> Any:
    value = {
        "template": {},
        "replicas": replicas,
        "strategy": {"rollingUpdate": {"maxSurge": surge, "maxUnavailable": unavailable}},
    }
    return msgspec.convert(value, k8s_pods.ControllerSpec)


@pytest.mark.parametrize(
    ("replicas", "surge", "unavailable", "resolved"),
    [  # as ResolveFenceposts does: surge rounds up, what may lack down
        (4, None, None, (1, 1)),
        (3, None, None, (1, 0)),
        (10, "25%", "25%", (3, 2)),
        (10, 0, 0, (0, 1)),
        (1, "0%", "50%", (0, 1)),
        (5, 2, "100%", (2, 5)),
    ],
)
def test_bounds_are_rounded_as_kubernetes_does(
    replicas: int, surge: int | str | None, unavailable: int | str | None, resolved: tuple[int, int]
) -> None:
    found = rollout.bounds(spec_of(replicas, surge, unavailable))
    assert (found.surge, found.unavailable) == resolved


@settings(deadline=None, max_examples=20)
@given(surge=st.integers(0, 4), unavailable=st.integers(0, 4), data=st.data())
def test_a_rollout_keeps_within_its_bounds_and_ends(
    surge: int, unavailable: int, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("rollout") / "web.yaml"
    path.write_text(text_of(str(surge), str(unavailable), READINESS))
    lab = load(str(path)).lab
    before = {pod.key for pod in web_pods(lab)}
    most, least = 3 + surge, 3 - (unavailable if surge or unavailable else 1)
    lab = rollout.restart(lab, ["deploy/web"], "2026-01-01T00:00:00Z").lab
    assert {pod.key for pod in web_pods(lab)} == before
    for _ in range(60):
        if rollout.progress(lab, KEY).is_complete:
            break
        lab = rollout.step(lab, KEY, 1000.0).lab
        alive = [pod for pod in web_pods(lab) if not pod.terminating]
        assert len(alive) <= most
        assert sum(pod.ready for pod in alive) >= least
        if data.draw(st.booleans(), "pods end"):
            lab = termination.removed(lab, [p.key for p in web_pods(lab) if p.terminating]).lab
        if data.draw(st.booleans(), "a pod becomes ready") and lab.unready:
            lab = heed(lab, Observed(ready=frozenset(lab.unready[:1]))).lab
    else:  # nothing that was drawn keeps it from its end
        for _ in range(20):
            lab = rollout.step(lab, KEY, 1000.0).lab
            lab = heeded(lab, {pod.key for pod in lab.pods})
            lab = termination.removed(lab, [p.key for p in web_pods(lab) if p.terminating]).lab
    assert rollout.progress(lab, KEY).is_complete
    assert not {pod.key for pod in web_pods(lab)} & before
    assert sum(value["kind"] == "Pod" for value in lab.declared) == 1  # the client


def test_probes_and_the_user_have_to_agree(lab_of: Callable[..., Lab]) -> None:
    from netlab.lab import change

    lab = lab_of(probes=READINESS)
    assert all(pod.ready for pod in lab.pods)  # a file says nothing of results
    started = heeded(lab, ())
    assert [pod.ready for pod in web_pods(started)] == [False] * 3
    first, *others = web_pods(started)
    one = heed(started, Observed(ready=frozenset([first.key]))).lab
    assert ends(one)[first.key] == (True, True, False)
    assert ends(one)[others[0].key] == (False, False, False)
    refused = change.ready(one, [f"pod/{first.name}"], False).lab
    assert ends(refused)[first.key] == (False, False, False)
    heard = heed(refused, Observed(ready=frozenset(pod.key for pod in web_pods(lab)))).lab
    assert ends(heard)[first.key] == (False, False, False)
    assert ends(heard)[others[0].key] == (True, True, False)
    more = change.scale(heard, ["deploy/web"], 4).lab
    assert [pod.ready for pod in web_pods(more)][-1:] == [False]  # a new one has yet to pass


def test_what_is_lost_is_counted() -> None:
    found = summarized(
        [Attempt(0.0, "answered", 1.0), Attempt(0.5, "refused", 0.2), Attempt(1.0, "reset", 3.0)]
    )
    assert (found.connections, found.answered, found.lost) == (3, 1, 2)
    assert found.results == {"answered": 1, "refused": 1, "reset": 1}
    assert (found.first_lost_s, found.last_lost_s, found.slowest_ms) == (0.5, 1.0, 3.0)


# On the kernel


@pytest.fixture
def up(lab_of: Callable[..., Lab], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Lab]]:
    names = []

    def bring(*arguments: str, **named: str) -> Lab:
        lab = lab_of(*arguments, **named)
        names.append(lab.name)
        monkeypatch.setenv("NETLAB_LAB", lab.name)
        lifecycle.up(lab)
        return lab

    yield bring
    for name in names:
        lifecycle.down(name)


def until(name: str, holds: Callable[[Lab], bool]) -> Lab:
    """The lab, as soon as that holds of it; how long it takes is the machine's business."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        lab = record.read(name)
        if lab is not None and holds(lab):
            return lab
        time.sleep(0.02)
    raise AssertionError(f"it never came to that: {lab}")


def fine(*arguments: str) -> str:
    finished = netlab(*arguments)
    assert finished.returncode == 0, finished.stderr + finished.stdout
    return finished.stdout


@pytest.mark.kernel
def test_a_probe_takes_an_endpoint_away_and_brings_it_back(up: Callable[..., Lab]) -> None:
    lab = up(probes=READINESS)
    name = lab.name
    pods = [pod.name for pod in web_pods(lab)]
    assert not any(pod.ready for pod in web_pods(until(name, lambda lab: len(lab.unready) == 3)))
    refused = netlab("load", "client", "svc/web", "--duration", "0.1")
    assert refused.returncode == 1
    assert "refused: 5" in refused.stdout
    for pod in pods:
        fine("exec", f"pod/{pod}", "--", "touch", "/run/healthy")
    until(name, lambda lab: not lab.unready)
    fine("load", "client", "svc/web", "--duration", "0.5")
    assert not lifecycle.differences(until(name, lambda lab: True))
    assert not lifecycle.up(lab).changes  # they have passed, and do not have to again
    fine("exec", f"pod/{pods[0]}", "--", "rm", "/run/healthy")
    gone = until(name, lambda lab: len(lab.unready) == 1)
    assert ends(gone)[f"default/{pods[0]}"] == (False, False, False)
    fine("label", f"pod/{pods[1]}", "tier=front")  # a change of the user's, while probes go on
    fine("exec", f"pod/{pods[0]}", "--", "touch", "/run/healthy")
    back = until(name, lambda lab: not lab.unready)
    assert next(pod for pod in back.pods if pod.name == pods[1]).labels["tier"] == "front"


@pytest.mark.kernel
def test_a_liveness_probe_starts_a_container_again(up: Callable[..., Lab]) -> None:
    lab = up(probes=LIVENESS)
    pod = web_pods(lab)[0]
    until(lab.name, lambda lab: not lab.unready)
    fine("exec", f"pod/{pod.name}", "--", "touch", "/run/stuck")

    def restarts(_: Lab) -> bool:
        listed = json.loads(fine("get", "pods", pod.name, "-o", "json"))
        (status,) = listed["status"]["containerStatuses"]
        return bool(status["restartCount"] >= 1)

    until(lab.name, restarts)
    fine("exec", f"pod/{pod.name}", "--", "rm", "-f", "/run/stuck")
    until(lab.name, lambda lab: not lab.unready)
    fine("load", "client", "svc/web", "--duration", "0.3")


@pytest.mark.kernel
@pytest.mark.parametrize("mode", ["iptables", "nftables"])
def test_a_rollout_loses_nothing_and_a_killed_one_is_finished(
    up: Callable[..., Lab], mode: str
) -> None:
    lab = up()
    fine("proxy", "--mode", mode)
    before = {pod.key for pod in web_pods(lab)}
    restart = subprocess.Popen(
        [NETLAB, "rollout", "restart", "deploy/web"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert restart.stderr is not None
    for line in restart.stderr:
        if "1 of 3 pods updated" in line:
            break
    restart.kill()
    restart.communicate()
    client = subprocess.Popen(
        [NETLAB, "load", "client", "svc/web", "--duration", "3", "--timeout", "20"],
        stdout=subprocess.PIPE,
        text=True,
    )
    said = fine("rollout", "status", "deploy/web")
    assert said == "deployment/web: successfully rolled out, 3 pods\n"
    assert client.communicate()[0] == "✓ default/client → svc/web: 150 connections, 0 lost\n"
    after = until(lab.name, lambda lab: True)
    assert not before & {pod.key for pod in web_pods(after)}
    assert not lifecycle.differences(after)


@pytest.mark.kernel
def test_who_is_connected_to_a_pod_that_is_deleted_is_served(up: Callable[..., Lab]) -> None:
    lab = up()
    pod = web_pods(lab)[0]
    with namespaces.entered(pod_namespace_name(lab, client_of(lab))):
        connection = socket.create_connection((pod.address, 8080), 30)
    client = connection.makefile("rw")
    client.write("hello\n")
    client.flush()
    assert client.readline() == f"{pod.name}\n"
    deletion = subprocess.Popen(
        [NETLAB, "delete", f"pod/{pod.name}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    leaving = until(lab.name, lambda lab: any(each.terminating for each in lab.pods))
    assert ends(leaving)[pod.key] == (False, True, True)
    assert len(web_pods(leaving)) == 4
    assert "Terminating" in fine("get", "pods", pod.name)
    assert client.readline() == "hello\n"
    client.write("still there?\n")
    client.flush()
    assert client.readline() == "still there?\n"
    client.close()
    connection.close()
    assert deletion.communicate()[0] == f"pod/{pod.name} deleted\n".encode()
    after = until(lab.name, lambda lab: True)
    assert pod.key not in {each.key for each in after.pods}
    assert len(web_pods(after)) == 3
    fine("delete", f"pod/{web_pods(after)[0].name}", "--now")


@pytest.mark.kernel
@pytest.mark.parametrize("mode", ["iptables", "nftables"])
def test_the_shipped_topology_loses_nothing_with_a_probe_and_something_without(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its programs are slow to listen, whatever else the machine does."""
    lab = load("rolling-update", name=fresh_name()).lab
    monkeypatch.setenv("NETLAB_LAB", lab.name)
    try:
        fine("up", "rolling-update", "--proxy", mode)
        until(lab.name, lambda lab: not lab.unready)
        found = {}
        clients = {}
        for deployment in ("careful", "careless"):
            clients[deployment] = subprocess.Popen(
                [
                    *(NETLAB, "load", "client", f"svc/{deployment}", "-o", "ndjson"),
                    *("--duration", "300", "--rate", "20", "--timeout", "30"),
                ],
                stdout=subprocess.PIPE,
                text=True,
            )
        fine("rollout", "restart", "deploy/careful", "deploy/careless")
        for deployment, client in clients.items():
            client.send_signal(signal.SIGINT)
            attempts = [json.loads(line) for line in client.communicate()[0].splitlines()]
            assert attempts
            found[deployment] = {each["result"] for each in attempts}
        assert found["careful"] == {"answered"}
        assert "refused" in found["careless"]
    finally:
        lifecycle.down(lab.name)
