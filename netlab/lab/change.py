"""How a lab changes while it runs: apply, delete, scale, label, ready, and its proxy's mode.

Pure: each takes the lab as it is and returns it as it should be, or raises NetlabError (exit code
2) with everything that is wrong.  What is not touched keeps all that was decided for it
(:mod:`netlab.topology.earlier`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import msgspec
from msgspec.structs import replace

from netlab.lab.edits import Changed, Edits, Object, Result
from netlab.problems import NetlabError, Problem, suggest
from netlab.topology import lab_document
from netlab.topology.allocate import PROXY_MODES
from netlab.topology.earlier import key_of
from netlab.topology.model import Lab
from netlab.topology.places import Complaints, Document

_SCALABLE = ("Deployment", "ReplicaSet", "StatefulSet")

# Labels as Kubernetes allows them: names with an optional DNS prefix, and texts of 63 characters.
_WORD = r"(?:[A-Za-z0-9](?:[-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)"
_LABEL_NAME = re.compile(rf"(?:[a-z0-9](?:[-a-z0-9.]{{0,251}}[a-z0-9])?/)?{_WORD}")
_LABEL_VALUE = re.compile(f"{_WORD}?")


def apply(running: Lab, stated: Sequence[Document], namespace: str | None = None) -> Changed:
    """Each object becomes what is stated, as a whole; one that names no namespace goes to that."""
    edits = Edits(running)
    for document in stated:
        value = _in_namespace(document.value, namespace)
        key = key_of(value)
        if edits.is_declared(key, value):
            edits.state(key, value, "unchanged", document.origin)
        elif key[0] == "Lab":
            _refuse_lab(edits, document)
        else:
            done = "configured" if edits.is_there(key) else "created"
            edits.state(key, value, done, document.origin)
    return edits.decided()


def delete(running: Lab, references: Sequence[str], namespace: str | None = None) -> Changed:
    """Objects go, with what belongs to them: a controller's pods, a Service's EndpointSlices.

    The controller of a pod that goes makes another one.
    """
    edits = Edits(running)
    for key in edits.find(references, namespace):
        edits.delete(key)
    return edits.decided()


def delete_stated(
    running: Lab, stated: Sequence[Document], namespace: str | None = None
) -> Changed:
    """The same, of the objects that have the names of those stated."""
    edits = Edits(running)
    keys = [key_of(_in_namespace(document.value, namespace)) for document in stated]
    for key, document in zip(keys, stated, strict=True):
        if key[0] == "Lab":
            _refuse_lab(edits, document)
        elif not edits.is_there(key):
            edits.complain_of_missing(key, document.origin)
    for key in keys:
        edits.delete(key)
    return edits.decided()


def scale(
    running: Lab, references: Sequence[str], replicas: int, namespace: str | None = None
) -> Changed:
    """Controllers have that many pods; the newest go first."""
    edits = Edits(running)
    for key in edits.find(references, namespace):
        if key[0] not in _SCALABLE:
            hint = "a Deployment, a ReplicaSet or a StatefulSet has"
            message = f"{key[0]} {key[2]} has no number of replicas"
            edits.found.error("not-scalable", message, hint=hint)
            continue
        value = edits.value(key)
        before = value["spec"].get("replicas")
        if replicas == (1 if before is None else before):
            edits.results.append(Result(*key, "unchanged"))
        else:
            spec = {**value["spec"], "replicas": replicas}
            edits.state(key, {**value, "spec": spec}, "scaled")
    return edits.decided()


def label(
    running: Lab,
    references: Sequence[str],
    labels: Mapping[str, str | None],
    namespace: str | None = None,
) -> Changed:
    """Labels are set, or, with None, taken away.

    A pod that its controller selects no longer is let go, and the controller makes another one.
    """
    edits = Edits(running)
    _check_labels(edits.found, labels)
    for key in edits.find(references, namespace):
        value = edits.value(key)
        before = value["metadata"].get("labels") or {}
        after = {name: text for name, text in before.items() if name not in labels}
        after |= {name: text for name, text in labels.items() if text is not None}
        if after == before:
            edits.results.append(Result(*key, "unchanged"))
            continue
        value = {**value, "metadata": {**value["metadata"], "labels": after}}
        if key[0] == "Pod" and not _selects(edits.controller(key), before, after):
            del value["metadata"]["ownerReferences"]
        removed = all(text is None for text in labels.values())
        edits.state(key, value, "unlabeled" if removed else "labeled")
    return edits.decided()


def ready(
    running: Lab, references: Sequence[str], ready: bool, namespace: str | None = None
) -> Changed:
    """Pods are ready, or not."""
    edits = Edits(running)
    pods = {pod.key: pod for pod in running.pods}
    for key in edits.find(references, namespace, usual="Pod"):
        pod = pods.get(f"{key[1]}/{key[2]}") if key[0] == "Pod" else None
        if pod is None:
            message = f"{key[0]} {key[2]} is no pod that runs: it cannot be ready"
            edits.found.error("not-a-pod", message, hint="`netlab get pods` lists them")
        elif pod.ready is ready:
            edits.results.append(Result(*key, "unchanged"))
        else:
            value = _with_readiness(edits.value(key), ready)
            edits.state(key, value, "ready" if ready else "not ready")
    return edits.decided()


def proxy(running: Lab, mode: str) -> Changed:
    """The service proxy of every node works in another mode; its other settings stay.

    The Lab object says so then, and there is one if there was none.
    """
    if mode not in PROXY_MODES:
        raise no_such_mode(mode)
    declared = list(running.declared)
    index = next((i for i, value in enumerate(declared) if value["kind"] == "Lab"), None)
    if index is None:
        metadata = {"name": running.name}
        declared.insert(
            0, {"apiVersion": lab_document.API_VERSION, "kind": "Lab", "metadata": metadata}
        )
    value = declared[index or 0]
    key = key_of(value)
    if running.service_proxy.mode == mode:
        return Changed(running, (Result(*key, "unchanged"),))
    spec = value.get("spec") or {}
    proxy = {**(spec.get("serviceProxy") or {}), "mode": mode}
    declared[index or 0] = {**value, "spec": {**spec, "serviceProxy": proxy}}
    lab = replace(
        running,
        service_proxy=replace(running.service_proxy, mode=mode),
        declared=tuple(declared),
        changed=tuple(sorted({*running.changed, key})),
    )
    return Changed(lab, (Result(*key, f"switched to {mode}"),))


def no_such_mode(mode: str) -> NetlabError:
    """What to say of a mode that nobody builds."""
    built = f"it builds {', '.join(PROXY_MODES)}"
    near = suggest(mode, PROXY_MODES)
    message = f'"{mode}" is no mode of a service proxy'
    hint = f'did you mean "{near}"? {built}' if near else built
    return NetlabError(Problem("unknown-mode", message, hint=hint))


def _in_namespace(value: Object, namespace: str | None) -> Object:
    """A stated object as the record will have it, in the namespace unless it names one."""
    plain: Object = msgspec.json.decode(msgspec.json.encode(value))
    if namespace and key_of(plain)[1] and not plain["metadata"].get("namespace"):
        plain["metadata"]["namespace"] = namespace
    return plain


def _refuse_lab(edits: Edits, document: Document) -> None:
    name = edits.running.name
    edits.found.error(
        "lab-frame",
        f"Lab {document.value['metadata']['name']}: a lab that is up has its networks, overlay "
        "and proxy from the file it was built of",
        document.origin,
        hint=f"`netlab up FILE` changes them, `netlab proxy --mode` the mode of the proxy, "
        f"`netlab down {name}` removes the lab",
    )


def _selects(
    controller: Object | None, before: Mapping[str, str], after: Mapping[str, str]
) -> bool:
    """Whether a pod whose labels change stays with its controller, if it has one."""
    if controller is None:
        return True
    spec = controller["spec"]
    template = spec["template"].get("metadata") or {}
    wanted = dict((spec.get("selector") or {}).get("matchLabels") or template.get("labels") or {})
    if _HASH in before:  # by which the ReplicaSet of a Deployment selects
        wanted[_HASH] = before[_HASH]
    return wanted.items() <= after.items()


_HASH = "pod-template-hash"


def _with_readiness(pod: Object, ready: bool) -> Object:
    status = pod.get("status") or {}
    others = [each for each in status.get("conditions") or () if each.get("type") != "Ready"]
    condition = {"type": "Ready", "status": str(ready)}
    return {**pod, "status": {**status, "conditions": [*others, condition]}}


def _check_labels(found: Complaints, labels: Mapping[str, str | None]) -> None:
    for name, text in labels.items():
        if not _LABEL_NAME.fullmatch(name):
            message = f'"{name}" is not the name of a label'
            found.error("bad-label", message, hint=f"{_CHARACTERS}; before it a DNS name and /")
        if text is not None and not _LABEL_VALUE.fullmatch(text):
            message = f'"{text}" is not the value of a label ({name})'
            found.error("bad-label", message, hint=_CHARACTERS)


_CHARACTERS = "at most 63 letters, digits, - _ and ., a letter or a digit first and last"
