"""How often containers were started again, as a pod's `containerStatuses` have it."""

from __future__ import annotations

import contextlib
from typing import Any

from netlab.datapath import programs
from netlab.datapath.build import pod_namespace_name
from netlab.lab import control
from netlab.problems import NetlabError
from netlab.topology.model import Lab

Object = dict[str, Any]


def with_containers(lab: Lab, pods: list[Object]) -> list[Object]:
    """Pods with the status of those containers that run something or have probes.

    As it was declared, where nobody knows: when the lab's init is gone.
    """
    relevant = {
        pod.key: pod
        for pod in lab.pods
        if pod.is_probed or any(container.runs for container in pod.containers)
    }
    init = control.connect(lab.name) if relevant else None
    if init is None:
        return pods
    with contextlib.suppress(NetlabError):
        running, answering = init.lives()
        by_program = {(each.namespace, each.name): each for each in running}
        by_container = {(each.pod, each.name): each for each in answering}
        shown = []
        for item in pods:
            pod = relevant.get(f"{item['metadata']['namespace']}/{item['metadata']['name']}")
            statuses = []
            for container in pod.containers if pod else ():
                assert pod is not None
                name = programs.name_of(pod, container)
                program = by_program.get((pod_namespace_name(lab, pod), name))
                other = by_container.get((pod.key, container.name))
                if container.runs and program:
                    statuses.append(_status(container.name, program.restarts, program.running))
                elif other:
                    statuses.append(_status(container.name, other.restarts, not other.waiting))
            status = {**item["status"], **({"containerStatuses": statuses} if statuses else {})}
            shown.append({**item, "status": status})
        return shown
    return pods


def _status(name: str, restarts: int, runs: bool) -> Object:
    waiting = {"waiting": {"reason": "CrashLoopBackOff"}}
    return {"name": name, "restartCount": restarts, "state": {"running": {}} if runs else waiting}
