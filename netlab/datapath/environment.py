"""The environment of a container, as kubelet makes it.

Sources: kubelet makeEnvironmentVariables (pkg/kubelet/kubelet_pods.go), FromServices
(pkg/kubelet/envvars/envvars.go) and third_party/forked/golang/expansion.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from netlab.topology.model import Container, Lab, Pod, Service

_MASTER = "default/kubernetes"  # the Service that pods of every namespace know
_REFERENCE = re.compile(r"\$(?:\$|\(([^()]*)\))")


def of_container(lab: Lab, pod: Pod, container: Container) -> dict[str, str]:
    """All variables that a container has: those of Services, and its own, which come before."""
    services = of_services(lab, pod)
    return {**services, **own(pod, container, services)}


def own(pod: Pod, container: Container, services: Mapping[str, str]) -> dict[str, str]:
    """HOSTNAME and what a container declares; one variable may refer to those before it."""
    found = {"HOSTNAME": pod.node if pod.host_network else pod.name}
    declared: dict[str, str] = {}
    for each in container.env:
        declared[each.name] = expanded(each.value, {**services, **declared})
    return {**found, **declared}


def command(container: Container, variables: Mapping[str, str]) -> tuple[str, ...]:
    """A container's command and arguments, with the values of variables that they refer to."""
    return tuple(expanded(text, variables) for text in (*container.command, *container.args))


def of_services(lab: Lab, pod: Pod) -> dict[str, str]:
    """Variables for the Services of a pod's namespace, and for the API server's.

    Headless ones have none, nor those of type ExternalName.
    """
    known = {each.name: each for each in lab.services if each.key == _MASTER}
    if pod.service_links:
        known |= {each.name: each for each in lab.services if each.namespace == pod.namespace}
    found: dict[str, str] = {}
    for service in known.values():
        if service.ports and service.cluster_ip not in ("", "None"):
            found |= _of_service(service)
    return found


def _of_service(service: Service) -> Iterator[tuple[str, str]]:
    prefix, address = _name(service.name), service.cluster_ip
    host = f"[{address}]" if ":" in address else address
    yield f"{prefix}_SERVICE_HOST", address
    yield f"{prefix}_SERVICE_PORT", str(service.ports[0].port)
    for port in service.ports:
        if port.name:
            yield f"{prefix}_SERVICE_PORT_{_name(port.name)}", str(port.port)
    for index, port in enumerate(service.ports):
        protocol = port.protocol.lower()
        url = f"{protocol}://{host}:{port.port}"
        if index == 0:
            yield f"{prefix}_PORT", url
        link = f"{prefix}_PORT_{port.port}_{port.protocol}"
        yield link, url
        yield f"{link}_PROTO", protocol
        yield f"{link}_PORT", str(port.port)
        yield f"{link}_ADDR", address


def _name(text: str) -> str:
    return text.replace("-", "_").upper()


def expanded(text: str, variables: Mapping[str, str]) -> str:
    """A text with the values of `$(NAME)` in it; unknown ones stay, and `$$` is a `$`."""

    def value(found: re.Match[str]) -> str:
        if found[1] is None:
            return "$"
        return variables.get(found[1], found[0])

    return _REFERENCE.sub(value, text)
