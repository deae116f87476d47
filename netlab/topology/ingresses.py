"""Ingress objects: which Service answers for which host and path, and the pods that see to it.

The controller is every pod in namespace `ingress-nginx` with the label `app.kubernetes.io/name:
ingress-nginx`, as the manifests of ingress-nginx have it.  It serves an Ingress that names no
class, the class `nginx`, or an IngressClass whose controller is `k8s.io/ingress-nginx`.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator

from msgspec.structs import replace

from netlab.topology import kubernetes_networking as k8s
from netlab.topology import model
from netlab.topology.containers import SBIN
from netlab.topology.convert import shown
from netlab.topology.objects import Objects, Stated
from netlab.topology.places import Complaints, Path

NAMESPACE = "ingress-nginx"
LABEL = "app.kubernetes.io/name"
COMPONENT = "app.kubernetes.io/component"  # the manifests have Jobs with the same name
CLASS, CONTROLLER = "nginx", "k8s.io/ingress-nginx"
PORTS: tuple[tuple[model.Protocol, int], ...] = (("TCP", 80), ("TCP", 443))
PROGRAMS = (("nginx", "nginx-light"), ("openssl", "openssl"))
"""What the controller runs, with Debian's packages."""

_LABEL = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_HOST = re.compile(rf"(\*\.)?{_LABEL}(\.{_LABEL})*")  # RFC 1123
_LONGEST_HOST = 253
_REDIRECT = "nginx.ingress.kubernetes.io/ssl-redirect"


def decide(
    objects: Objects,
    services: list[model.Service],
    pods: tuple[model.Pod, ...],
    found: Complaints,
) -> tuple[list[model.Ingress], tuple[model.Pod, ...]]:
    """The Ingresses that the controller serves, and the pods, of which some are the controller."""
    if not objects.ingresses:
        return [], pods
    classes = {
        each.item.metadata.name
        for each in objects.ingress_classes
        if each.item.spec and each.item.spec.controller == CONTROLLER
    }
    served = [
        each
        for each in objects.ingresses
        if (each.item.spec or k8s.IngressSpec()).ingressClassName in (None, CLASS, *classes)
    ]
    by_key = {service.key: service for service in services}
    decided = [_Ingress(each, by_key, found).decided() for each in served]
    _check_twice(decided, served, found)
    if objects.of_cluster and not is_installed():
        message = "nginx is not installed: the built-in workload answers for the Ingress controller"
        found.warning("not-served", message, hint="apt-get install nginx-light openssl, on Debian")
        return decided, pods
    made = tuple(_controller(pod) if is_controller(pod) else pod for pod in pods)
    if served and not any(pod.ingress_controller for pod in made):
        found.warning(
            "no-controller",
            f"{len(served)} Ingress objects are served by nobody: there is no controller",
            hint=f"a pod in namespace {NAMESPACE} with the label {LABEL}: {NAMESPACE} is one",
        )
    return decided, made


def is_installed() -> bool:
    """Whether this machine has what a controller runs."""
    return all(shutil.which(program) or shutil.which(program, path=SBIN) for program, _ in PROGRAMS)


def _controller(pod: model.Pod) -> model.Pod:
    listen = tuple(dict.fromkeys((*PORTS, *pod.listen)))
    return replace(pod, ingress_controller=True, listen=listen)


def is_controller(pod: model.Pod) -> bool:
    """Whether a pod runs nginx for Ingress objects, and no command of its own."""
    labels = pod.labels
    return (
        pod.namespace == NAMESPACE
        and labels.get(LABEL) == NAMESPACE
        and labels.get(COMPONENT, "controller") == "controller"
        and not any(container.runs for container in pod.containers)
    )


class _Ingress:
    def __init__(
        self,
        stated: Stated[k8s.Ingress],
        services: dict[str, model.Service],
        found: Complaints,
    ) -> None:
        self._stated = stated
        self._spec = stated.item.spec or k8s.IngressSpec()
        self._services = services
        self._found = found

    def decided(self) -> model.Ingress:
        stated, spec = self._stated, self._spec
        annotations = stated.item.metadata.annotations or {}
        if not spec.rules and not spec.defaultBackend:
            message = f"{stated.title}: it has neither rules nor a defaultBackend"
            self._found.error("missing-field", message, stated.origin, "spec")
        default = spec.defaultBackend
        return model.Ingress(
            namespace=stated.namespace,
            name=stated.item.metadata.name,
            rules=tuple(self._rules()),
            default_backend=self._backend(default, ("spec", "defaultBackend")) if default else None,
            tls=tuple(self._tls()),
            redirects=annotations.get(_REDIRECT, "true") != "false",
        )

    def _rules(self) -> Iterator[model.IngressRule]:
        for index, rule in enumerate(self._spec.rules or ()):
            at: Path = ("spec", "rules", index)
            host = rule.host or ""
            self._check_host(host, (*at, "host"))
            paths = rule.http.paths if rule.http else []
            yield model.IngressRule(
                host=host.lower(),
                paths=tuple(
                    self._path(path, (*at, "http", "paths", number))
                    for number, path in enumerate(paths)
                ),
            )

    def _tls(self) -> Iterator[model.IngressTLS]:
        for index, each in enumerate(self._spec.tls or ()):
            for number, host in enumerate(each.hosts or ()):
                self._check_host(host, ("spec", "tls", index, "hosts", number))
            hosts = tuple(host.lower() for host in each.hosts or ())
            yield model.IngressTLS(hosts=hosts, secret=each.secretName or "")

    def _check_host(self, host: str, at: Path) -> None:
        if host and not (_HOST.fullmatch(host.lower()) and len(host) <= _LONGEST_HOST):
            message = f"{self._stated.title}: {shown(host)} is not the name of a host"
            hint = "such as myblog.example, or with a wildcard for one label: *.example"
            self._found.error("bad-host", message, self._stated.origin, *at, hint=hint)

    def _path(self, stated: k8s.IngressPath, at: Path) -> model.IngressPath:
        path, kind = stated.path or "/", stated.pathType
        if not path.startswith("/") or any(each in path for each in " \t\r\n\"'{};\\"):
            message = f"{self._stated.title}: {shown(path)} is not a path"
            hint = "it begins with / and has no spaces, quotation marks, braces or semicolons"
            self._found.error("bad-path", message, self._stated.origin, *at, "path", hint=hint)
        # Of ingress-nginx its own kind of path is a prefix.
        return model.IngressPath(
            path=path,
            exact=kind == "Exact",
            backend=self._backend(stated.backend, (*at, "backend")),
        )

    def _backend(self, stated: k8s.IngressBackend, at: Path) -> model.IngressBackend:
        title, origin = self._stated.title, self._stated.origin
        if stated.service is None:
            message = f"{title}: a backend is a service here, and a resource nowhere"
            self._found.error("missing-field", message, origin, *at)
            return model.IngressBackend(service="", port=None)
        name, port = stated.service.name, stated.service.port or k8s.ServiceBackendPort()
        key = f"{self._stated.namespace}/{name}"
        service = self._services.get(key)
        if service is None:
            message = f"{title}: there is no Service {key}; its paths are answered with 503"
            self._found.warning("unknown-service", message, origin, *at, "service", "name")
            return model.IngressBackend(service=key, port=None)
        wanted = port.name or port.number
        known = next(
            (p for p in service.ports if wanted in (p.name or None, p.port)),
            None,
        )
        if known is None:
            ports = ", ".join(p.name or str(p.port) for p in service.ports)
            message = (
                f"{title}: Service {key} has no port {wanted}; its paths are answered with 503"
            )
            hint = f"it has {ports}"
            self._found.warning("unknown-port", message, origin, *at, "service", "port", hint=hint)
        return model.IngressBackend(service=key, port=known)


def _check_twice(
    ingresses: list[model.Ingress], stated: list[Stated[k8s.Ingress]], found: Complaints
) -> None:
    """Two rules for one host and path: only one of them would be heeded."""
    first: dict[tuple[str, str, bool], str] = {}
    for ingress, each in zip(ingresses, stated, strict=True):
        for number, rule in enumerate(ingress.rules):
            for index, path in enumerate(rule.paths):
                plain = path.path if path.exact else path.path.rstrip("/") or "/"
                key = rule.host, plain, path.exact
                owner = first.setdefault(key, f"{ingress.key} {number} {index}")
                if owner == f"{ingress.key} {number} {index}":
                    continue
                host = rule.host or "any host"
                of_other = owner.partition(" ")[0]
                message = (
                    f"{each.title}: {host} {path.path} is already a rule of Ingress {of_other}"
                )
                at: Path = ("spec", "rules", number, "http", "paths", index, "path")
                hint = "one host and path lead to one Service: remove one of them"
                found.error("duplicate-path", message, each.origin, *at, hint=hint)
