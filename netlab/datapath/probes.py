"""What a lab's init asks containers, from where: probes with their places."""

from __future__ import annotations

from collections.abc import Iterator

from netlab.datapath import environment, programs
from netlab.datapath.build import pod_namespace_name
from netlab.datapath.name_files import pod_view_name
from netlab.datapath.state import Check, ProbedContainer, ProbedPod, namespace_name
from netlab.topology.model import Container, Lab, Pod, Probe


def of_lab(lab: Lab) -> tuple[ProbedPod, ...]:
    """The pods that have probes; those that are about to go are not restarted any more."""
    return tuple(
        _pod(lab, pod) for pod in lab.pods if pod.is_probed and pod.node not in lab.stopped
    )


def _pod(lab: Lab, pod: Pod) -> ProbedPod:
    return ProbedPod(
        key=pod.key,
        identity=pod.name,
        namespace=pod_namespace_name(lab, pod),
        node_namespace=namespace_name(lab.name, pod.node),
        view=pod_view_name(lab, pod) if pod.host_network else pod_namespace_name(lab, pod),
        containers=tuple(_containers(lab, pod)),
    )


def _containers(lab: Lab, pod: Pod) -> Iterator[ProbedContainer]:
    for container in pod.containers:
        yield ProbedContainer(
            name=container.name,
            program=programs.name_of(pod, container) if container.runs else "",
            readiness=_check(pod, container.readiness),
            liveness=None if pod.terminating else _check(pod, container.liveness),
            startup=_check(pod, container.startup),
            environment=_environment(lab, pod, container),
        )


def _environment(lab: Lab, pod: Pod, container: Container) -> tuple[tuple[str, str], ...]:
    """What a command of a probe has, where there is one."""
    asked = (container.readiness, container.liveness, container.startup)
    if not any(probe and probe.kind == "exec" for probe in asked):
        return ()
    services = environment.of_services(lab, pod)
    own = environment.own(pod, container, services)
    return tuple({**services, **own}.items())


def _check(pod: Pod, probe: Probe | None) -> Check | None:
    if probe is None:
        return None
    return Check(
        kind=probe.kind,
        host=probe.host or pod.address,
        port=probe.port,
        path=probe.path,
        tls=probe.tls,
        headers=probe.headers,
        command=probe.command,
        delay_s=probe.delay_s,
        period_s=probe.period_s,
        timeout_s=probe.timeout_s,
        successes=probe.successes,
        failures=probe.failures,
    )
