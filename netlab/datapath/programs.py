"""The commands of containers as programs of their pods' namespaces."""

from __future__ import annotations

from collections.abc import Iterator

from netlab.datapath import environment, ingress
from netlab.datapath.name_files import pod_view_name
from netlab.datapath.state import File, Process
from netlab.topology.model import Container, Lab, Pod


def of_pod(lab: Lab, pod: Pod, namespace: str) -> Iterator[Process]:
    """The programs of a pod's containers, in the namespace that the pod lives in."""
    if pod.ingress_controller:
        yield ingress.process(lab, pod, namespace)
    for container in pod.containers:
        if container.runs:
            yield _process(lab, pod, container, namespace)


def name_of(pod: Pod, container: Container) -> str:
    """What a container's program is called, in a namespace that may have others on a node."""
    return f"{pod.key}/{container.name}" if pod.host_network else container.name


def _process(lab: Lab, pod: Pod, container: Container, namespace: str) -> Process:
    services = environment.of_services(lab, pod)
    own = environment.own(pod, container, services)
    return Process(
        name=name_of(pod, container),
        namespace=namespace,
        view=pod_view_name(lab, pod) if pod.host_network else "",
        command=environment.command(container, {**services, **own}),
        files=tuple(File(path=file.path, text=file.text) for file in container.files),
        directory=container.directory or "/",
        environment=tuple(own.items()),
        at_start=tuple(services.items()),
        listens=tuple(
            (port.protocol, port.port) for port in container.ports if port.protocol != "SCTP"
        ),
    )
