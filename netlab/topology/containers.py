"""The containers of pods: what runs in them, with which variables, files and ports.

A container's `command` runs where its program is on this machine, in a file of netlab's own (one
with a `kind: Lab`, and no cluster's dump); else the built-in workload answers for it, and on
the ports that nobody declares.  An image is recorded, nothing more.
"""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from posixpath import normpath

from netlab.topology import kubernetes_pods as k8s
from netlab.topology import probes
from netlab.topology.convert import shown
from netlab.topology.model import (
    Container,
    ContainerPort,
    MountedFile,
    Protocol,
    Variable,
)
from netlab.topology.objects import Objects
from netlab.topology.places import Complaints, Path
from netlab.topology.pods import DraftPod

SBIN = "/usr/local/sbin:/usr/sbin:/sbin"
"""Where programs are found beside PATH, as a lab's init has it."""

_LABEL_FIELD = re.compile(r"metadata\.labels\['(.+)'\]")


@dataclass(slots=True)
class Containers:
    """Decides the containers of one pod after the other; `tell` says what came of it, once."""

    objects: Objects
    found: Complaints
    node_addresses: dict[str, tuple[str, ...]]
    _absent: dict[str, list[str]] = field(default_factory=dict)  # containers by program
    _unread: Counter[str] = field(default_factory=Counter)
    _commands: int = 0
    _data: dict[tuple[str, str], dict[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._data = {
            (each.namespace, each.item.metadata.name): each.item.data or {}
            for each in self.objects.config_maps
        }

    def of(self, draft: DraftPod) -> tuple[Container, ...]:
        """Those of a pod whose node and addresses are decided."""
        decided = []
        seen: set[str] = set()
        for index, spec in enumerate(draft.spec.containers or ()):
            name = spec.name or f"container{index + 1}"
            if name in seen:
                message = f"{draft.title} has two containers of the name {shown(name)}"
                path = ("containers", index, "name")
                self.found.error("duplicate-name", message, draft.origin, *draft.path, *path)
            seen.add(name)
            decided.append(self._container(draft, index, name, spec))
        if not self.objects.of_cluster:
            self._check_ports(draft, decided)
        if self.objects.runs_programs:
            self._check_files(draft, decided)
        return tuple(decided)

    def tell(self) -> None:
        """What is not run, and what is not read."""
        if self._commands:
            self.found.warning(
                "not-run",
                f"commands of {self._commands} containers are not run: "
                "the built-in workload answers for them",
                hint="they run in a file that has a `kind: Lab` and does not come from a cluster",
            )
        if self._absent:
            programs = ", ".join(
                f"{shown(program)} ({users[0]}{_and_more(users)})"
                for program, users in sorted(self._absent.items())
            )
            self.found.warning(
                "not-run",
                f"programs that are not on this machine: {programs}; "
                "the built-in workload answers for them",
            )
        if self._unread:
            parts = ", ".join(f"{what} ({count})" for what, count in sorted(self._unread.items()))
            self.found.warning("not-built", f"of containers this version does not read {parts}")

    def _container(self, draft: DraftPod, index: int, name: str, spec: k8s.Container) -> Container:
        path: Path = (*draft.path, "containers", index)
        env = (*self._from_maps(draft, spec, path), *self._variables(draft, spec, path))
        asked = probes.Probes()
        if self.objects.runs_programs:
            asked = probes.of_container(draft, spec, path, self.found)
        return Container(
            name=name,
            image=spec.image or "",
            command=tuple(spec.command or ()),
            args=tuple(spec.args or ()),
            directory=spec.workingDir or "",
            env=env,
            ports=tuple(
                ContainerPort(
                    port=port.containerPort,
                    protocol=port.protocol or "TCP",
                    name=port.name or "",
                    host_port=port.hostPort or 0,
                    host_ip=port.hostIP or "",
                )
                for port in spec.ports or ()
            ),
            files=tuple(self._files(draft, spec, path)),
            runs=self._runs(draft, name, spec),
            readiness=asked.readiness,
            liveness=asked.liveness,
            startup=asked.startup,
            pre_stop_s=self._pre_stop_s(spec),
        )

    def _runs(self, draft: DraftPod, name: str, spec: k8s.Container) -> bool:
        return bool(spec.command) and self.is_run(
            f"{draft.title}, container {name}", (spec.command or [""])[0]
        )

    def is_run(self, title: str, program: str) -> bool:
        """Whether a program is run; if it is not, `tell` says so."""
        if not self.objects.runs_programs:
            self._commands += 1
            return False
        if shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:{SBIN}"):
            return True
        self._absent.setdefault(program, []).append(title)
        return False

    def _pre_stop_s(self, spec: k8s.Container) -> int:
        """How long a container sleeps before its end."""
        hook = spec.lifecycle.preStop if spec.lifecycle else None
        if hook is None:
            return 0
        if hook.exec is not None:
            self._unread["preStop hooks other than sleep"] += 1
        return hook.sleep.seconds if hook.sleep else 0

    # Variables

    def _from_maps(self, draft: DraftPod, spec: k8s.Container, path: Path) -> Iterator[Variable]:
        for index, source in enumerate(spec.envFrom or ()):
            if source.configMapRef is None:
                self._unread["envFrom of other things than ConfigMaps"] += 1
                continue
            reference = source.configMapRef
            at = (*path, "envFrom", index, "configMapRef", "name")
            data = self._config_map(draft, reference.name, reference.optional, at)
            for key, text in (data or {}).items():
                yield Variable(name=f"{source.prefix or ''}{key}", value=text.replace("$", "$$"))

    def _variables(self, draft: DraftPod, spec: k8s.Container, path: Path) -> Iterator[Variable]:
        for index, each in enumerate(spec.env or ()):
            at = (*path, "env", index, "valueFrom")
            if each.valueFrom is None:
                yield Variable(name=each.name, value=each.value or "")
                continue
            if each.valueFrom.fieldRef is not None:
                text = self._field(draft, each.valueFrom.fieldRef.fieldPath)
            elif each.valueFrom.configMapKeyRef is not None:
                text = self._key(draft, each.valueFrom.configMapKeyRef, at)
            else:
                text = None
                self._unread["env of other things than fields and ConfigMaps"] += 1
            if text is not None:
                yield Variable(name=each.name, value=text.replace("$", "$$"))

    def _field(self, draft: DraftPod, path: str) -> str | None:
        """A field of the pod, by the paths that the API server allows."""
        assert draft.node is not None
        addresses = [str(address) for address in draft.addresses.values()]
        node = self.node_addresses[draft.node.name]
        fields = {
            "metadata.name": draft.name,
            "metadata.namespace": draft.namespace,
            "spec.nodeName": draft.node.name,
            "spec.serviceAccountName": "default",
            "status.hostIP": node[0],
            "status.hostIPs": ",".join(node),
            "status.podIP": addresses[0],
            "status.podIPs": ",".join(addresses),
        }
        if label := _LABEL_FIELD.fullmatch(path):
            return draft.labels.get(label[1], "")
        if path not in fields:
            self._unread[f"env of the field {path}"] += 1
        return fields.get(path)

    def _key(self, draft: DraftPod, reference: k8s.KeyRef, path: Path) -> str | None:
        at = (*path, "configMapKeyRef")
        data = self._config_map(draft, reference.name, reference.optional, (*at, "name"))
        if data is None:
            return None
        if reference.key not in data and not reference.optional:
            message = (
                f"{draft.title}: ConfigMap {draft.namespace}/{reference.name} has no key "
                f"{shown(reference.key)}"
            )
            self.found.error("unknown-key", message, draft.origin, *at, "key")
        return data.get(reference.key)

    def _config_map(
        self, draft: DraftPod, name: str | None, optional: bool | None, path: Path
    ) -> dict[str, str] | None:
        """What a ConfigMap of the pod's namespace holds; None without one."""
        data = self._data.get((draft.namespace, name or ""))
        if data is None and not optional:
            if self.objects.runs_programs:
                message = f"{draft.title}: there is no ConfigMap {draft.namespace}/{name}"
                self.found.error("unknown-configmap", message, draft.origin, *path)
            else:
                self._unread["what ConfigMaps hold that are not in the file"] += 1
        return data

    # Files

    def _files(self, draft: DraftPod, spec: k8s.Container, path: Path) -> Iterator[MountedFile]:
        volumes = {volume.name: index for index, volume in enumerate(draft.spec.volumes or ())}
        for index, mount in enumerate(spec.volumeMounts or ()):
            at = (*path, "volumeMounts", index)
            if mount.name not in volumes:
                if self.objects.runs_programs:
                    message = f"{draft.title} has no volume {shown(mount.name)}"
                    self.found.error("unknown-volume", message, draft.origin, *at, "name")
                continue
            number = volumes[mount.name]
            volume = (draft.spec.volumes or [])[number]
            if volume.configMap is None:
                self._unread["volumes of other things than ConfigMaps"] += 1
                continue
            if not mount.mountPath.startswith("/"):
                message = f"{draft.title}: mountPath {shown(mount.mountPath)} does not begin with /"
                self.found.error("bad-value", message, draft.origin, *at, "mountPath")
                continue
            yield from self._mounted(draft, volume.configMap, mount, number)

    def _mounted(
        self,
        draft: DraftPod,
        volume: k8s.ConfigMapVolume,
        mount: k8s.VolumeMount,
        number: int,
    ) -> Iterator[MountedFile]:
        """The files of a ConfigMap below its mount path, or at it with `subPath`."""
        at: Path = (*draft.path, "volumes", number, "configMap")
        data = self._config_map(draft, volume.name, volume.optional, (*at, "name"))
        if data is None:
            return
        texts = data
        if volume.items:
            texts = {}
            for index, item in enumerate(volume.items):
                inside = not item.path.startswith("/") and ".." not in item.path.split("/")
                if item.key not in data and not volume.optional:
                    message = (
                        f"{draft.title}: ConfigMap {draft.namespace}/{volume.name} has no key "
                        f"{shown(item.key)}"
                    )
                    self.found.error(
                        "unknown-key", message, draft.origin, *at, "items", index, "key"
                    )
                elif not inside:
                    message = f"{draft.title}: {shown(item.path)} leads out of the volume"
                    self.found.error(
                        "bad-value", message, draft.origin, *at, "items", index, "path"
                    )
                elif item.key in data:
                    texts[item.path] = data[item.key]
        if mount.subPath is None:
            below = texts
        else:
            part = normpath(mount.subPath)
            below = {
                path.removeprefix(part).lstrip("/"): text
                for path, text in texts.items()
                if path == part or path.startswith(f"{part}/")
            }
        for path, text in below.items():
            yield MountedFile(path=normpath(f"{mount.mountPath}/{path}"), text=text)

    def _check_files(self, draft: DraftPod, containers: Sequence[Container]) -> None:
        """The containers of a pod see the same files here: a path has one text."""
        texts: dict[str, tuple[str, str]] = {}
        for index, container in enumerate(containers):
            for file in container.files:
                text, first = texts.setdefault(file.path, (file.text, container.name))
                if text != file.text:
                    self.found.error(
                        "path-taken",
                        f"{draft.title}: container {container.name} has another file at "
                        f"{file.path} than container {first}",
                        draft.origin,
                        *(*draft.path, "containers", index, "volumeMounts"),
                        hint="containers of a pod see the same files here: take other paths",
                    )

    # Ports

    def _check_ports(self, draft: DraftPod, containers: Sequence[Container]) -> None:
        """Two containers of a pod share its addresses: one port can be only one's."""
        owner: dict[tuple[Protocol, int], str] = {}
        for index, container in enumerate(containers):
            for number, port in enumerate(container.ports):
                first = owner.setdefault((port.protocol, port.port), container.name)
                if first != container.name:
                    self.found.error(
                        "port-collision",
                        f"{draft.title}: {port.protocol} {port.port} of container "
                        f"{container.name} is already container {first}'s",
                        draft.origin,
                        *draft.path,
                        *("containers", index, "ports", number, "containerPort"),
                        hint="the containers of a pod share one network namespace",
                    )


def _and_more(users: Sequence[str]) -> str:
    return f" and {len(users) - 1} more" if len(users) > 1 else ""
