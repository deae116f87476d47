"""Pods before they are placed: those in the file, and those that its Deployments and the like make.

A controller makes the replicas that the file's pods with its ownerReference leave missing; their
names are `myblog-5c97d79cdb-jn7km` in shape, and the same at each start.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import msgspec

from netlab.topology import kubernetes_parts as k8s_parts
from netlab.topology import kubernetes_pods as k8s_pods
from netlab.topology.addresses import Address, address, of_families
from netlab.topology.model import Family, Protocol
from netlab.topology.nodes import DraftNode
from netlab.topology.objects import Objects, Stated
from netlab.topology.places import Complaints, Origin, Path


@dataclass(slots=True)
class DraftPod:
    """A pod while it is decided.

    `path` leads from its origin to its spec, `paths` to the addresses that are given.
    """

    namespace: str
    name: str
    labels: dict[str, str]
    spec: k8s_pods.PodSpec
    origin: Origin
    path: Path = ("spec",)
    owner: str = ""
    ready: bool = True
    terminating: bool = False
    passes: bool = True  # its readiness probes do, or it has none
    addresses: dict[Family, Address] = field(default_factory=dict)
    paths: dict[Family, Path] = field(default_factory=dict)
    node: DraftNode | None = None
    listen: dict[tuple[Protocol, int], None] = field(default_factory=dict)  # an ordered set

    @property
    def key(self) -> str:
        """`namespace/name`."""
        return f"{self.namespace}/{self.name}"

    @property
    def title(self) -> str:
        """As messages call it."""
        return f"Pod {self.key}"

    @property
    def host_network(self) -> bool:
        """Whether it lives in its node's network namespace."""
        return bool(self.spec.hostNetwork)

    @property
    def is_probed(self) -> bool:
        """Whether probes tell whether it is ready."""
        return any(
            probe is not None and (probe.httpGet or probe.tcpSocket or probe.exec)
            for each in self.spec.containers or ()
            for probe in (each.readinessProbe, each.livenessProbe, each.startupProbe)
        )

    @property
    def ports(self) -> Iterator[k8s_pods.ContainerPort]:
        """The ports that its containers declare."""
        for container in self.spec.containers or ():
            yield from container.ports or ()


# Pods in the file


def stated_pods(
    objects: Objects, families: tuple[Family, ...], found: Complaints
) -> list[DraftPod]:
    """The pods that stand in the file and have not finished."""
    owners = {
        (each.namespace, each.item.metadata.name): each.item.metadata.ownerReferences
        for each in objects.controllers
        if isinstance(each.item, k8s_pods.ReplicaSet)
    }
    pods = []
    finished = 0
    for each in objects.pods:
        status = each.item.status or k8s_pods.PodStatus()
        if status.phase in ("Succeeded", "Failed"):
            finished += 1
            continue
        metadata = each.item.metadata
        draft = DraftPod(
            namespace=each.namespace,
            name=metadata.name,
            labels=metadata.labels or {},
            spec=each.item.spec or k8s_pods.PodSpec(),
            origin=each.origin,
            owner=_owner(each, owners),
            ready=not any(
                condition.type == "Ready" and condition.status != "True"
                for condition in status.conditions or ()
            ),
            terminating=metadata.deletionTimestamp is not None,
        )
        if not draft.host_network:
            _keep_addresses(draft, status, families, found)
        pods.append(draft)
    if finished:
        found.warning("no-part", f"left out, as they have finished: {finished} pods")
    return pods


def _owner(
    pod: Stated[k8s_pods.Pod],
    owners: dict[tuple[str, str], list[k8s_parts.OwnerReference] | None],
) -> str:
    """`Deployment/myblog` for a pod of a ReplicaSet of that Deployment."""
    references = pod.item.metadata.ownerReferences or []
    controller = next((each for each in references if each.controller), None)
    if controller is None:
        return ""
    if controller.kind == "ReplicaSet":
        above = owners.get((pod.namespace, controller.name)) or []
        deployment = next((each for each in above if each.kind == "Deployment"), None)
        if deployment:
            return f"Deployment/{deployment.name}"
        template = (pod.item.metadata.labels or {}).get("pod-template-hash")
        if template and controller.name.endswith(f"-{template}"):
            return f"Deployment/{controller.name.removesuffix(f'-{template}')}"
    return f"{controller.kind}/{controller.name}"


def _keep_addresses(
    pod: DraftPod, status: k8s_pods.PodStatus, families: tuple[Family, ...], found: Complaints
) -> None:
    candidates: list[tuple[str | None, Path]] = [(status.podIP, ("status", "podIP"))]
    candidates += [
        (each.ip, ("status", "podIPs", i, "ip")) for i, each in enumerate(status.podIPs or ())
    ]
    kept = of_families(candidates, families, pod.title, found, pod.origin)
    for each, (text, path) in kept.items():
        given = address(text, pod.title, found, pod.origin, path)
        if given:
            pod.addresses[each] = given
            pod.paths[each] = path


# Pods that controllers make


def made_pods(
    controller: Stated[k8s_pods.Controller], have: Sequence[DraftPod], taken: set[str], nodes: int
) -> Iterator[DraftPod]:
    """The pods that a controller lacks; a DaemonSet's for `nodes` nodes."""
    metadata, spec = controller.item.metadata, controller.item.spec
    kind = type(controller.item).__name__
    template = spec.template
    labels = (template.metadata.labels if template.metadata else None) or {}
    replicas = 1 if spec.replicas is None else spec.replicas
    if isinstance(controller.item, k8s_pods.DaemonSet):
        replicas = nodes
    base = metadata.name
    if isinstance(controller.item, k8s_pods.Deployment):
        hash_ = template_hash(template)
        base = f"{base}-{hash_}"
        labels = {**labels, "pod-template-hash": hash_}
    ordinals = isinstance(controller.item, k8s_pods.StatefulSet)
    names = _ordinal_names(base) if ordinals else _random_names(controller.namespace, base)
    names = (name for name in names if name not in taken)
    for _ in range(replicas + surge_of(controller.item) - len(have)):
        name = next(names)
        taken.add(name)
        yield DraftPod(
            namespace=controller.namespace,
            name=name,
            labels=labels,
            spec=template.spec or k8s_pods.PodSpec(),
            origin=controller.origin,
            path=TEMPLATE,
            owner=f"{kind}/{metadata.name}",
        )


SURGE = "netlab/surge"
"""The annotation of a Deployment that is being rolled out: how many pods more it has for now."""


def surge_of(controller: k8s_pods.Controller) -> int:
    """How many pods more than its replicas a controller has for now; fewer, if negative."""
    text = (controller.metadata.annotations or {}).get(SURGE, "0")
    return int(text) if text.lstrip("-").isdecimal() else 0


TEMPLATE: Path = ("spec", "template", "spec")

# Of k8s.io/apimachinery/pkg/util/rand: no vowels, and none of 0, 1 and 3.
_ALPHABET = "bcdfghjklmnpqrstvwxz2456789"
_LONGEST_BASE = 58  # of a generated name, k8s.io/apiserver/pkg/storage/names


def template_hash(template: k8s_pods.PodTemplate) -> str:
    """Ten characters in the alphabet of Kubernetes, as it encodes a 32-bit hash."""
    number = str(zlib.crc32(msgspec.json.encode(template)))
    return "".join(_ALPHABET[ord(digit) % len(_ALPHABET)] for digit in number)


def _random_names(namespace: str, base: str) -> Iterator[str]:
    attempt = 0
    while True:
        digest = hashlib.sha256(f"{namespace}/{base}/{attempt}".encode()).digest()
        suffix = "".join(_ALPHABET[byte % len(_ALPHABET)] for byte in digest[:5])
        yield f"{base[: _LONGEST_BASE - 1]}-{suffix}"
        attempt += 1


def _ordinal_names(base: str) -> Iterator[str]:
    ordinal = 0
    while True:
        yield f"{base}-{ordinal}"
        ordinal += 1
