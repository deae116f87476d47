"""Rollouts of a running lab driven to their end: steps, pods that end, pods that become ready."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable, Sequence

import msgspec

from netlab.lab import control, lifecycle, messages, record, rollout, termination
from netlab.lab.rollout import Progress
from netlab.topology import kubernetes_pods as k8s
from netlab.topology.earlier import Key
from netlab.topology.model import Lab


class Late(Exception):
    """The time is over; `progress` tells how far it is."""

    def __init__(self, progress: Sequence[Progress]) -> None:
        super().__init__()
        self.progress = progress


def roll(
    name: str, keys: Sequence[Key], tell: Callable[[str], None], timeout_s: float
) -> list[Progress]:
    """Go on with the rollouts of Deployments until all are complete; `tell` gets each step.

    Raises Late; NetlabError as a change does, and LabNotRunning if the lab goes down.
    """
    init = control.connect(name)
    if init is None:
        raise control.LabNotRunning(name)
    deadline = time.monotonic() + timeout_s
    rolling = _Rolling(name, keys, init)
    said: set[str] = set()
    with init.watch() as declared:
        while True:
            found = rolling.progress()
            for each in found:
                if str(each) not in said and not each.is_complete:
                    tell(str(each))
                said.add(str(each))
            if all(each.is_complete for each in found):
                return found
            if time.monotonic() > deadline:
                raise Late(found)
            if not rolling.go_on():
                _await_change(declared, name)


class _Rolling:
    """Rollouts that are under way."""

    def __init__(self, name: str, keys: Sequence[Key], init: control.Init) -> None:
        self._name = name
        self._keys = keys
        self._init = init
        self._ready_since: dict[str, float] = {}  # monotonic, by pod

    def progress(self) -> list[Progress]:
        """How far each is."""
        lab = self._declared()
        return [rollout.progress(lab, key) for key in self._keys]

    def go_on(self) -> bool:
        """Do what can be done now; whether that was anything."""
        lab = self._declared()
        self._note_ready(lab)
        over = termination.ended(lab, self._init, time.time())
        if over:
            lifecycle.change(
                self._name, lambda lab: termination.removed(lab, over), await_programs=False
            )
        stepped = [self._step(lab, key) for key in self._keys]
        return bool(over) or any(stepped)

    def _step(self, lab: Lab, key: Key) -> bool:
        if not _leads_on(rollout.step(lab, key, time.time(), self._available(lab, key)).lab, lab):
            return False
        changed, outcome = lifecycle.change(
            self._name,
            lambda lab: rollout.step(lab, key, time.time(), self._available(lab, key)),
            await_programs=False,
        )
        return outcome.before is None or _leads_on(changed.lab, outcome.before)

    def _available(self, lab: Lab, key: Key) -> frozenset[str]:
        """The pods that have been ready for the Deployment's minReadySeconds."""
        value = next(
            (
                value
                for value in lab.declared
                if (value["kind"], value["metadata"]["name"]) == (key[0], key[2])
                and (value["metadata"].get("namespace") or "default") == key[1]
            ),
            None,
        )
        least = msgspec.convert(value, k8s.Deployment).spec.minReadySeconds if value else 0
        now = time.monotonic()
        return frozenset(
            pod for pod, since in self._ready_since.items() if now - since >= (least or 0)
        )

    def _note_ready(self, lab: Lab) -> None:
        ready = {pod.key for pod in lab.pods if pod.ready}
        now = time.monotonic()
        self._ready_since = {pod: self._ready_since.get(pod, now) for pod in ready}

    def _declared(self) -> Lab:
        lab = record.read(self._name)
        if lab is None:
            raise control.LabNotRunning(self._name)
        return lab


def _leads_on(after: Lab, before: Lab) -> bool:
    return after.declared != before.declared


def _await_change(declared: socket.socket, name: str) -> None:
    """Wait until somebody declares something, but not for long: time ends pods, too."""
    if select.select((declared,), (), (), termination.LOOK_S)[0]:
        said = declared.recv(4096)
        if not said or messages.ENDING in said:
            raise control.LabNotRunning(name)
