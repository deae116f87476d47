"""The probes of containers: what kubelet asks whether they are well, with its defaults.

Those of a file of netlab's own are run (:mod:`netlab.topology.containers` says which that is).
"""

from __future__ import annotations

from dataclasses import dataclass

from msgspec.structs import replace

from netlab.topology import kubernetes_pods as k8s
from netlab.topology.convert import shown
from netlab.topology.model import Probe
from netlab.topology.places import Complaints, Path
from netlab.topology.pods import DraftPod

_FIELDS = ("readinessProbe", "livenessProbe", "startupProbe")


@dataclass(frozen=True, slots=True)
class Probes:
    """Those of one container; None for one that it has not."""

    readiness: Probe | None = None
    liveness: Probe | None = None
    startup: Probe | None = None


def of_container(draft: DraftPod, spec: k8s.Container, path: Path, found: Complaints) -> Probes:
    """The probes of a container; what is wrong with them is complained of."""
    decided = []
    for name in _FIELDS:
        stated: k8s.Probe | None = getattr(spec, name)
        probe = None
        if stated is not None:
            probe = _probe(draft, spec, stated, (*path, name), found)
            if name != "readinessProbe" and (stated.successThreshold or 1) != 1:
                message = f"{draft.title}: successThreshold of a {name} is 1"
                found.error("bad-value", message, draft.origin, *path, name, "successThreshold")
        decided.append(probe)
    return Probes(*decided)


def _probe(
    draft: DraftPod, spec: k8s.Container, stated: k8s.Probe, path: Path, found: Complaints
) -> Probe | None:
    ways = [way for way in ("httpGet", "tcpSocket", "exec", "grpc") if getattr(stated, way)]
    if len(ways) != 1:
        has = f"has {' and '.join(ways)}" if ways else "asks nothing"
        message = f"{draft.title}: a probe {has}"
        found.error(
            "bad-value", message, draft.origin, *path, hint="it takes httpGet, tcpSocket or exec"
        )
        return None
    if stated.grpc:
        message = f"{draft.title}: probes over gRPC are not run"
        found.warning("not-run", message, draft.origin, *path, "grpc")
        return None
    timed = Probe(
        kind="exec",
        delay_s=stated.initialDelaySeconds or 0,
        # (0 means that it is left out, as in k8s.io/kubernetes/pkg/apis/core/v1/defaults.go.)
        period_s=stated.periodSeconds or 10,
        timeout_s=stated.timeoutSeconds or 1,
        successes=stated.successThreshold or 1,
        failures=stated.failureThreshold or 3,
    )
    if stated.exec:
        command = tuple(stated.exec.command or ())
        if not command:
            message = f"{draft.title}: the exec of a probe has no command"
            found.error("bad-value", message, draft.origin, *path, "exec")
            return None
        return replace(timed, command=command)
    if http := stated.httpGet:
        port = _number(draft, spec, http.port, (*path, "httpGet"), found)
        text = http.path or "/"
        return replace(
            timed,
            kind="http",
            host=http.host or "",
            port=port,
            path=text if text.startswith("/") else f"/{text}",
            tls=http.scheme == "HTTPS",
            headers=tuple((each.name, each.value) for each in http.httpHeaders or ()),
        )
    assert stated.tcpSocket is not None
    port = _number(draft, spec, stated.tcpSocket.port, (*path, "tcpSocket"), found)
    return replace(timed, kind="tcp", host=stated.tcpSocket.host or "", port=port)


def _number(
    draft: DraftPod, spec: k8s.Container, port: int | str, path: Path, found: Complaints
) -> int:
    if isinstance(port, int):
        return port
    for each in spec.ports or ():
        if each.name == port:
            return each.containerPort
    message = f"{draft.title}: a probe asks port {shown(port)}, which its container does not have"
    found.error("unknown-port", message, draft.origin, *path, "port")
    return 0
