"""The objects of a lab while a command changes them, found by what users call them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from msgspec.structs import replace

from netlab.problems import NetlabError, Problem, suggest
from netlab.topology.earlier import NOWHERE, Key, decide_again, key_of
from netlab.topology.model import Lab
from netlab.topology.objects import gather
from netlab.topology.places import Complaints, Document, Origin

Object = dict[str, Any]

CONTROLLERS = ("Deployment", "ReplicaSet", "StatefulSet", "DaemonSet")

KINDS = {
    **dict.fromkeys(("node", "nodes", "no"), "Node"),
    **dict.fromkeys(("pod", "pods", "po"), "Pod"),
    **dict.fromkeys(("service", "services", "svc"), "Service"),
    **dict.fromkeys(("deployment", "deployments", "deploy"), "Deployment"),
    **dict.fromkeys(("replicaset", "replicasets", "rs"), "ReplicaSet"),
    **dict.fromkeys(("statefulset", "statefulsets", "sts"), "StatefulSet"),
    **dict.fromkeys(("daemonset", "daemonsets", "ds"), "DaemonSet"),
    **dict.fromkeys(("endpoints", "ep"), "Endpoints"),
    **dict.fromkeys(("endpointslice", "endpointslices"), "EndpointSlice"),
    **dict.fromkeys(("servicecidr", "servicecidrs"), "ServiceCIDR"),
    **dict.fromkeys(("namespace", "namespaces", "ns"), "Namespace"),
    **dict.fromkeys(("networkpolicy", "networkpolicies", "netpol"), "NetworkPolicy"),
    **dict.fromkeys(("ingress", "ingresses", "ing"), "Ingress"),
    **dict.fromkeys(("ingressclass", "ingressclasses"), "IngressClass"),
    **dict.fromkeys(("host", "hosts"), "Host"),
    **dict.fromkeys(("gateway", "gateways"), "Gateway"),
    **dict.fromkeys(("container", "containers"), "Container"),
    **dict.fromkeys(("containernetwork", "containernetworks"), "ContainerNetwork"),
    **dict.fromkeys(("configmap", "configmaps", "cm"), "ConfigMap"),
    **dict.fromkeys(("loadbalancer", "loadbalancers", "lb"), "LoadBalancer"),
}
"""Kinds by the words of kubectl."""


@dataclass(frozen=True, slots=True)
class Result:
    """What became of an object: `created`, `configured`, `unchanged`, `deleted`, `scaled`, ..."""

    kind: str
    namespace: str
    name: str
    done: str

    @property
    def reference(self) -> str:
        """`service/myblog`."""
        return f"{self.kind.lower()}/{self.name}"


@dataclass(frozen=True, slots=True)
class Changed:
    """The lab as it should be, what became of each object, and what is worth knowing."""

    lab: Lab
    results: tuple[Result, ...]
    warnings: tuple[Problem, ...] = ()


def declared_objects(lab: Lab) -> dict[Key, Object]:
    """What a lab declares, by key, and the node that it has when it declares none."""
    found = {key_of(value): value for value in lab.declared}
    if not any(kind == "Node" for kind, _, _ in found):
        found |= {key_of(value): value for value in _undeclared_nodes(lab)}
    return found


def _undeclared_nodes(lab: Lab) -> list[Object]:
    return [
        {"apiVersion": "v1", "kind": "Node", "metadata": {"name": node.name}} for node in lab.nodes
    ]


class Edits:
    """Objects are stated or deleted, problems noted; `decided` makes the lab of it, or raises."""

    def __init__(self, running: Lab) -> None:
        self.running = running
        self.found = Complaints()
        self.results: list[Result] = []
        self._objects = {
            key: Document(value, NOWHERE) for key, value in declared_objects(running).items()
        }
        pods = {("Pod", pod.namespace, pod.name): pod for pod in running.pods}
        self._owner = {key: (pod.namespace, pod.owner) for key, pod in pods.items()}
        self._replicas = {key: pod for key, pod in pods.items() if key not in self._objects}
        self._given: set[Key] = set()
        self._gone: set[Key] = set()
        # Pods (`namespace/name`) whose readiness probes pass; None: those of the running lab.
        self.passed: frozenset[str] | None = None
        self.stopped = frozenset(running.stopped)  # nodes whose machine is to be off

    # What there is

    def is_there(self, key: Key) -> bool:
        """Whether there is such an object; a namespace is there as soon as something is in it."""
        occupied = key[0] == "Namespace" and any(each[1] == key[2] for each in self._objects)
        return key in self._objects or key in self._replicas or occupied

    def is_declared(self, key: Key, value: Object) -> bool:
        """Whether an object is declared to be this."""
        return key in self._objects and self._objects[key].value == value

    def value(self, key: Key) -> Object:
        """An object as it is declared; a pod that a controller made is written out."""
        if key in self._objects:
            value: Object = self._objects[key].value
            return value
        pod = self._replicas[key]
        kind, _, name = pod.owner.partition("/")
        template = self._objects[kind, pod.namespace, name].value["spec"]["template"]
        owner = {"apiVersion": "apps/v1", "kind": kind, "name": name, "controller": True}
        return {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": pod.name,
                "namespace": pod.namespace,
                "labels": dict(pod.labels),
                "ownerReferences": [owner],
            },
            "spec": template.get("spec") or {},
        }

    def controller(self, key: Key) -> Object | None:
        """The controller that a pod belongs to."""
        namespace, owner = self._owner.get(key, ("", ""))
        kind, _, name = owner.partition("/")
        document = self._objects.get((kind, namespace, name))
        return document.value if document else None

    def find(
        self, references: Sequence[str], namespace: str | None, usual: str | None = None
    ) -> list[Key]:
        """What is meant by `KIND/NAME` or `KIND/NAMESPACE/NAME`; of a usual kind without `KIND/`.

        What means nothing, or several things, is complained of.
        """
        found: dict[Key, None] = {}
        for text in references:
            first, *rest = text.split("/")
            kind = KINDS.get(first.lower())
            if usual and len(rest) < 2 and (kind is None or not rest):
                kind, rest = usual, [first, *rest]
            if kind is None or not 1 <= len(rest) <= 2 or not all(rest):
                self._complain_of_reference(text, first, kind)
                continue
            inside = rest[0] if len(rest) == 2 else namespace
            hits = self._named(kind, rest[-1], inside)
            if len(hits) > 1:
                shown = ", ".join("/".join((kind.lower(), *hit[1:])) for hit in hits)
                message = f'"{text}" is more than one thing in lab {self.running.name}: {shown}'
                self.found.error("ambiguous-name", message, hint="say in which namespace: `-n`")
            elif not hits:
                self.complain_of_missing((kind, inside or "", rest[-1]))
            found.update(dict.fromkeys(hits))
        return list(found)

    def _named(self, kind: str, name: str, namespace: str | None) -> list[Key]:
        if kind == "Namespace":
            return [(kind, "", name)] if self.is_there((kind, "", name)) else []
        return [
            key
            for key in (*self._objects, *self._replicas)
            if (key[0], key[2]) == (kind, name) and (not namespace or key[1] in ("", namespace))
        ]

    def _complain_of_reference(self, text: str, first: str, kind: str | None) -> None:
        near = None if kind else suggest(first.lower(), list(KINDS))
        self.found.error(
            "bad-reference",
            f'"{text}" is no object: it takes KIND/NAME, or KIND/NAMESPACE/NAME',
            hint=f'did you mean "{near}"?' if near else f"kinds: {', '.join(_KIND_NAMES)}",
        )

    def complain_of_missing(self, key: Key, origin: Origin | None = None) -> None:
        """Say that there is no such object."""
        kind, namespace, name = key
        known = [key[2] for key in (*self._objects, *self._replicas) if key[0] == kind]
        near = suggest(name, known)
        listed = f"there is {', '.join(known[:5])}" if known else f"it has no {kind}"
        inside = f", namespace {namespace}" if namespace else ""
        self.found.error(
            f"unknown-{kind.lower()}",
            f'{kind} "{name}" is not in lab {self.running.name}{inside}',
            origin,
            hint=f'did you mean "{near}"?' if near else listed,
        )

    # What changes

    def state(self, key: Key, value: Object, done: str, origin: Origin = NOWHERE) -> None:
        """An object is to be this."""
        self._objects[key] = Document(value, origin)
        self._given.add(key)
        self.results.append(Result(*key, done))

    def keep(self, key: Key, value: Object) -> None:
        """An object is to be this, as a part of another change: nothing is told of it."""
        self._objects[key] = Document(value, NOWHERE)
        self._given.add(key)

    def delete(self, key: Key) -> None:
        """An object goes, and what belongs to it."""
        self.results.append(Result(*key, "deleted"))
        self.drop(key)

    def drop(self, key: Key) -> None:
        """The same, as a part of another change."""
        self._objects.pop(key, None)
        if key[0] == "Pod":
            self._gone.add(key)
        for dependent in list(self._dependents(key)):
            self.drop(dependent)

    def _dependents(self, key: Key) -> Iterator[Key]:
        """What cannot be without it, as Kubernetes' garbage collector and controllers see it."""
        kind, namespace, name = key
        for other, document in self._objects.items():
            metadata = document.value["metadata"]
            if kind == "Namespace":
                belongs = other[1] == name
            elif other[1] != namespace:
                belongs = False
            elif kind == "Service":
                service = (metadata.get("labels") or {}).get("kubernetes.io/service-name")
                belongs = other[0] == "EndpointSlice" and service == name
                belongs = belongs or other == ("Endpoints", namespace, name)
            else:
                owners = metadata.get("ownerReferences") or ()
                belongs = any((o.get("kind"), o.get("name")) == (kind, name) for o in owners)
                belongs = belongs or self._owner.get(other) == (namespace, f"{kind}/{name}")
            if belongs:
                yield other

    # The outcome

    def decided(self) -> Changed:
        """The lab with these objects.  Raises NetlabError with everything that is wrong."""
        self.found.raise_errors()
        running = self.running
        if not any(kind == "Node" for kind, _, _ in self._objects):
            message = f"lab {running.name} would have no node left"
            hint = f"`netlab down {running.name}` removes a lab"
            raise NetlabError(Problem("last-node", message, hint=hint))
        documents = list(self._objects.values())
        if not any(value["kind"] == "Node" for value in running.declared):
            undeclared = _undeclared_nodes(running)
            if [d.value for d in documents if d.value["kind"] == "Node"] == undeclared:
                documents = [d for d in documents if d.value["kind"] != "Node"]
        same = [d.value for d in documents] == list(running.declared)
        same = same and self.stopped == set(running.stopped)
        if same and not self._gone and self.passed is None:
            return Changed(running, tuple(self.results))
        lab, warnings = self._decide(documents, self._given, self._gone, self.passed)
        if warnings:
            before = [Document(value, NOWHERE) for value in running.declared]
            said = {(w.code, w.message) for w in self._decide(before, set(), set(), None)[1]}
            warnings = tuple(w for w in warnings if (w.code, w.message) not in said)
        old, new = declared_objects(running), declared_objects(lab)
        touched = {key for key in old | new if old.get(key) != new.get(key)}
        changed = tuple(sorted({*running.changed, *touched, *self._gone}))
        lab = replace(lab, changed=changed, faults=running.faults)
        return Changed(lab, tuple(self.results), warnings)

    def _decide(
        self,
        documents: list[Document],
        given: set[Key],
        gone: set[Key],
        passed: frozenset[str] | None,
    ) -> tuple[Lab, tuple[Problem, ...]]:
        found = Complaints()
        objects = gather(documents, found)
        found.raise_errors()
        objects.stopped = self.stopped
        keys = {f"{key[1]}/{key[2]}" for key in gone}
        return decide_again(objects, self.running, given, keys, passed)


_KIND_NAMES = tuple(dict.fromkeys(kind.lower() for kind in KINDS.values()))
