"""The end of a pod, as Kubernetes has it: nobody new, whom it has, what it runs, and then itself.

A pod that is deleted gets a `deletionTimestamp`, the time by which all is over.  From then on it
is no endpoint for new connections (or, with `serving`, where there is no other), and its
controller has made another one.  Its `preStop` sleeps, then its programs get SIGTERM.  It goes when
they have ended, and nobody is connected any more to what the built-in workload answers for it, or
when its time is over.  What a killed command has begun so, the next one ends.

Source: https://kubernetes.io/docs/concepts/workloads/pods/pod-lifecycle/#pod-termination
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Collection, Sequence
from datetime import UTC, datetime

from netlab.datapath.build import pod_namespace_name
from netlab.datapath.name_files import pod_view_name
from netlab.kernel.listeners import connected
from netlab.lab import control, lifecycle, record
from netlab.lab.edits import Changed, Edits, Object
from netlab.topology.earlier import Key
from netlab.topology.model import Lab, Pod

LOOK_S = 0.05  # the end of connections and programs is told to nobody


def begin(
    running: Lab,
    references: Sequence[str],
    now_s: float,
    grace_s: int | None = None,
    namespace: str | None = None,
) -> Changed:
    """Pods begin to end, other objects are deleted at once; `now_s` is the time of day, POSIX.

    `grace_s` stands for the pods' own grace periods; 0: at once.
    """
    edits = Edits(running)
    pods = {pod.key: pod for pod in running.pods}
    for key in edits.find(references, namespace):
        pod = pods.get(f"{key[1]}/{key[2]}") if key[0] == "Pod" else None
        grace = pod.grace_s if pod and grace_s is None else grace_s
        if pod is None or not grace:
            edits.delete(key)
        else:
            edits.state(key, ending(edits.value(key), now_s, grace), "deleted")
    return edits.decided()


def ending(pod: Object, now_s: float, grace_s: int) -> Object:
    """A pod object that is to be gone after so many seconds, or earlier if it was said before."""
    metadata = pod["metadata"]
    until = now_s + grace_s
    if (given := deadline_of(pod)) is not None and given <= until:
        return pod
    stamp = datetime.fromtimestamp(until, UTC).isoformat(timespec="milliseconds")
    times = {
        "deletionTimestamp": stamp.replace("+00:00", "Z"),
        "deletionGracePeriodSeconds": grace_s,
    }
    return {**pod, "metadata": {**metadata, **times}}


def deadline_of(pod: Object) -> float | None:
    """When a pod object is to be gone, POSIX; None if it is not to go, or nobody knows when."""
    with contextlib.suppress(ValueError, TypeError):
        text = pod["metadata"].get("deletionTimestamp")
        return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp() if text else None
    return 0.0


def removed(running: Lab, keys: Collection[str]) -> Changed:
    """Pods (`namespace/name`) that have ended go."""
    edits = Edits(running)
    for pod in running.pods:
        if pod.key in keys and pod.terminating:
            edits.delete(("Pod", pod.namespace, pod.name))
    return edits.decided()


def terminating(lab: Lab) -> list[tuple[Pod, Object]]:
    """The pods that are about to go, with their objects."""
    pods = {("Pod", pod.namespace, pod.name): pod for pod in lab.pods if pod.terminating}
    found = []
    for value in lab.declared if pods else ():
        key: Key = (
            value["kind"],
            value["metadata"].get("namespace") or "default",
            value["metadata"]["name"],
        )
        if key in pods:
            found.append((pods[key], value))
    return found


def ended(lab: Lab, init: control.Init, now_s: float, only: Collection[str] = ()) -> list[str]:
    """Those of the pods that are about to go that may go now; tells programs when it is time.

    `only`: the pods to look at; none: all.
    """
    over = []
    for pod, value in terminating(lab):
        if only and pod.key not in only:
            continue
        deadline = deadline_of(value) or 0.0
        grace = value["metadata"].get("deletionGracePeriodSeconds") or 0
        sleeps = max((container.pre_stop_s for container in pod.containers), default=0)
        if now_s >= deadline or (now_s >= deadline - grace + sleeps and _has_ended(lab, init, pod)):
            over.append(pod.key)
    return over


def _has_ended(lab: Lab, init: control.Init, pod: Pod) -> bool:
    """Whether nothing of a pod is at work; its programs are told to end."""
    namespace = pod_namespace_name(lab, pod)
    try:
        if any(container.runs for container in pod.containers):
            view = pod_view_name(lab, pod) if pod.host_network else namespace
            if init.terminate(namespace, view):
                return False
        ports = {port for protocol, port in pod.served if protocol == "TCP"}
        return not (ports and connected(namespace, ports))
    except FileNotFoundError:  # somebody removed its namespace
        return True


def see_off(
    name: str, keys: Collection[str], tell: Callable[[str], None] = lambda line: None
) -> tuple[lifecycle.Outcome, ...]:
    """Wait until these pods (`namespace/name`) have ended, and remove each when it has.

    Returns what that changed.  Those that somebody else removes are no concern.  Raises
    NetlabError as :func:`netlab.lab.lifecycle.change`; LabNotRunning if the lab goes down.
    """
    outcomes = []
    said = False
    waiting = set(keys)
    while waiting:
        lab = record.read(name)
        init = control.connect(name)
        if lab is None or init is None:
            raise control.LabNotRunning(name)
        waiting &= {pod.key for pod, _ in terminating(lab)}
        over = ended(lab, init, time.time(), waiting) if waiting else []
        if over:
            gone = functools.partial(removed, keys=over)
            _, outcome = lifecycle.change(name, gone, await_programs=False)
            outcomes.append(outcome)
            waiting -= set(over)
        elif waiting:
            if not said:
                tell(f"waiting for {', '.join(sorted(waiting))} to end")
                said = True
            time.sleep(LOOK_S)
    return tuple(outcomes)
