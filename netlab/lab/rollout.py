"""`netlab rollout restart`: a Deployment's pods are replaced, a few at a time.

Each step is a change of the declared objects, decided from the lab as it is: so whoever comes after
a command that was killed goes on where that stopped.  How many pods come and go in a step is what
Kubernetes' rolling update does (k8s.io/kubernetes/pkg/controller/deployment/rolling.go): there are
never more than `replicas` + maxSurge, nor fewer ready ones than `replicas` - maxUnavailable.

Old pods of a Deployment that was restarted are those whose `pod-template-hash` is not that of its
template; while they live they are objects of their own, for the template that made them is gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from netlab.lab.edits import Changed, Edits, Object
from netlab.lab.termination import ending
from netlab.problems import NetlabError, Problem
from netlab.topology import kubernetes_pods as k8s
from netlab.topology.earlier import Key
from netlab.topology.model import Lab, Pod
from netlab.topology.pods import SURGE, template_hash

RESTARTED = "kubectl.kubernetes.io/restartedAt"
_HASH = "pod-template-hash"
_PERCENT = "25%"  # of both, if nothing is said (pkg/apis/apps/v1/defaults.go)


@dataclass(frozen=True, slots=True)
class Bounds:
    """How many pods there may be more than wanted, and how many ready ones fewer."""

    surge: int
    unavailable: int


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a Deployment is: numbers of pods."""

    key: Key
    replicas: int
    updated: int  # of the current template
    available: int  # ready ones, old or new
    old: int
    ending: int

    @property
    def is_complete(self) -> bool:
        """Whether every pod is of the current template, and ready."""
        return (
            self.updated == self.replicas
            and self.available >= self.replicas
            and not (self.old or self.ending)
        )

    def __str__(self) -> str:
        reference = f"deployment/{self.key[2]}"
        if self.is_complete:
            return f"{reference}: successfully rolled out, {self.replicas} pods"
        return (
            f"{reference}: {self.updated} of {self.replicas} pods updated, "
            f"{self.available} ready, {self.old} old, {self.ending} terminating"
        )


def bounds(spec: k8s.ControllerSpec) -> Bounds:
    """What a Deployment's strategy allows.  NetlabError if it says what is no number."""
    strategy = spec.strategy or k8s.Strategy()
    if strategy.type == "Recreate":
        return Bounds(0, _replicas(spec))
    rolling = strategy.rollingUpdate or k8s.RollingUpdate()
    surge = _resolved("maxSurge", rolling.maxSurge, _replicas(spec), up=True)
    unavailable = _resolved("maxUnavailable", rolling.maxUnavailable, _replicas(spec), up=False)
    # (Of two zeros nothing would ever come: ResolveFenceposts of deployment_util.go.)
    return Bounds(surge, unavailable if surge or unavailable else 1)


def _resolved(field: str, given: int | str | None, replicas: int, up: bool) -> int:
    """A number, or a percentage of the replicas; surge is rounded up, what may lack down."""
    text = _PERCENT if given is None else given
    if isinstance(text, int) and text >= 0:
        return text
    number = str(text).removesuffix("%")
    if str(text).endswith("%") and number.isdecimal():
        return -(-replicas * int(number) // 100) if up else replicas * int(number) // 100
    message = f'{field} "{given}" is neither a number nor a percentage'
    raise NetlabError(Problem("bad-value", message, hint='such as 1 or "25%"'))


def restart(
    running: Lab, references: Sequence[str], stamp: str, namespace: str | None = None
) -> Changed:
    """The template of Deployments says when they were restarted; their pods live on, for now."""
    edits = Edits(running)
    for key in edits.find(references, namespace, usual="Deployment"):
        if key[0] != "Deployment":
            message = f"{key[0]} {key[2]} is not rolled out: only a Deployment is"
            edits.found.error(
                "not-rolled-out", message, hint="`netlab delete pod/NAME` replaces one"
            )
            continue
        value = edits.value(key)
        bounds(msgspec.convert(value, k8s.Deployment).spec)
        for pod in _owned(running, key):
            pod_key = ("Pod", pod.namespace, pod.name)
            edits.keep(pod_key, edits.value(pod_key))
        template = value["spec"]["template"]
        metadata = template.get("metadata") or {}
        annotations = {**(metadata.get("annotations") or {}), RESTARTED: stamp}
        template = {**template, "metadata": {**metadata, "annotations": annotations}}
        edits.state(key, {**value, "spec": {**value["spec"], "template": template}}, "restarted")
    return edits.decided()


def find(running: Lab, references: Sequence[str], namespace: str | None = None) -> list[Key]:
    """The Deployments that are meant."""
    edits = Edits(running)
    found = edits.find(references, namespace, usual="Deployment")
    for key in found:
        if key[0] != "Deployment":
            message = f"{key[0]} {key[2]} is not rolled out: only a Deployment is"
            edits.found.error("not-rolled-out", message)
    edits.found.raise_errors()
    return found


def progress(lab: Lab, key: Key) -> Progress:
    """How far a Deployment is.  NetlabError if it is gone."""
    spec = msgspec.convert(_value(lab, key), k8s.Deployment).spec
    own = _owned(lab, key)
    alive = [pod for pod in own if not pod.terminating]
    new = [pod for pod in alive if _is_new(pod, spec.template)]
    return Progress(
        key=key,
        replicas=_replicas(spec),
        updated=len(new),
        available=sum(pod.ready for pod in alive),
        old=len(alive) - len(new),
        ending=len(own) - len(alive),
    )


def step(lab: Lab, key: Key, now_s: float, available: frozenset[str] | None = None) -> Changed:
    """The next step of a rollout: nothing changes if it has to wait, or is complete.

    `available`: the pods (`namespace/name`) that count as ready; None: all that are.
    """
    edits = Edits(lab)
    value = _value(lab, key)
    spec = msgspec.convert(value, k8s.Deployment).spec
    allowed, replicas = bounds(spec), _replicas(spec)
    alive = [pod for pod in _owned(lab, key) if not pod.terminating]
    new = [pod for pod in alive if _is_new(pod, spec.template)]
    old = [pod for pod in alive if pod not in new]
    ready = {pod.key for pod in alive if pod.ready and (available is None or pod.key in available)}
    going = _going(old, new, ready, replicas - allowed.unavailable)
    left = len(alive) - len(going)
    coming = max(0, min(replicas + allowed.surge - len(alive), replicas - len(new)))
    for pod in going:
        pod_key = ("Pod", pod.namespace, pod.name)
        if pod.grace_s:
            edits.keep(pod_key, ending(edits.value(pod_key), now_s, pod.grace_s))
        else:
            edits.drop(pod_key)
    surge = left + coming - replicas
    stated = _with_surge(value, surge)
    if going or coming or stated != value:
        edits.keep(key, stated)
    return edits.decided()


def _going(old: list[Pod], new: list[Pod], ready: set[str], least: int) -> list[Pod]:
    """Old pods that may go: those that are not ready first, then as many as are not needed."""
    unready = len([pod for pod in new if pod.key not in ready])
    may = max(0, len(old) + len(new) - least - unready)
    unhealthy = [pod for pod in old if pod.key not in ready][:may]
    spare = max(0, len(ready) - least)
    return [*unhealthy, *[pod for pod in old if pod.key in ready][:spare]]


def _with_surge(value: Object, surge: int) -> Object:
    """A Deployment that has that many pods more for now."""
    metadata = value["metadata"]
    annotations = {k: v for k, v in (metadata.get("annotations") or {}).items() if k != SURGE}
    if surge:
        annotations[SURGE] = str(surge)
    rest = {k: v for k, v in metadata.items() if k != "annotations"}
    return {**value, "metadata": {**rest, **({"annotations": annotations} if annotations else {})}}


def _value(lab: Lab, key: Key) -> Object:
    edits = Edits(lab)
    if not edits.is_there(key):
        edits.complain_of_missing(key)
        edits.found.raise_errors()
    return edits.value(key)


def _owned(lab: Lab, key: Key) -> list[Pod]:
    owner = f"{key[0]}/{key[2]}"
    return [pod for pod in lab.pods if (pod.namespace, pod.owner) == (key[1], owner)]


def _is_new(pod: Pod, template: k8s.PodTemplate) -> bool:
    """Whether a pod is one of those that the template makes."""
    annotations = template.metadata.annotations if template.metadata else None
    restarted = isinstance(annotations, dict) and RESTARTED in annotations
    return not restarted or pod.labels.get(_HASH) == template_hash(template)


def _replicas(spec: k8s.ControllerSpec) -> int:
    return 1 if spec.replicas is None else spec.replicas
