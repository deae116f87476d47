"""What a user's text means: `pod1`, `demo/pod1`, `svc/myblog:http`, `node/k8s-slave1:30647`.

The forms are those of docs/design.md, "References".  Text that means nothing, or more than one
thing, is an error that says what there is instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Literal

from netlab.problems import NetlabError, Problem, suggest
from netlab.topology.model import (
    DockerContainer,
    Family,
    Host,
    Lab,
    Node,
    Pod,
    Service,
    ServicePort,
)

_KINDS = {
    **dict.fromkeys(("pod", "pods", "po"), "pod"),
    **dict.fromkeys(("svc", "service", "services"), "service"),
    **dict.fromkeys(("node", "nodes", "no"), "node"),
    **dict.fromkeys(("host", "hosts"), "host"),
    **dict.fromkeys(("container", "containers"), "container"),
}
_OWNERS = {
    **dict.fromkeys(("deploy", "deployment", "deployments"), "Deployment"),
    **dict.fromkeys(("rs", "replicaset", "replicasets"), "ReplicaSet"),
    **dict.fromkeys(("sts", "statefulset", "statefulsets"), "StatefulSet"),
    **dict.fromkeys(("ds", "daemonset", "daemonsets"), "DaemonSet"),
}

LOOPBACK: dict[Family, str] = {"IPv4": "127.0.0.1", "IPv6": "::1"}
"""What the name "localhost" stands for."""

_WITHOUT_NAMESPACE = ("node", "host", "container")

_Thing = Pod | Service | Node | Host | DockerContainer


@dataclass(frozen=True, slots=True)
class Reference:
    """What a text means.

    `address` is set whenever it is known: the pod's, the node's, the Service's cluster IP (None if
    headless or ExternalName), or the address itself.  `node` is the node named, or the one that
    the pod runs on.  `port` is set if the text or the Service leaves no choice; `port_number` is
    what the text says, or the number of `port`.  An address (kind "address") carries the pod, node,
    host or Service that it belongs to, if any.
    """

    kind: Literal["pod", "node", "service", "host", "container", "address"]
    pod: Pod | None = None
    node: Node | None = None
    host: Host | None = None
    container: DockerContainer | None = None
    service: Service | None = None
    address: str | None = None
    port: ServicePort | None = None
    port_number: int | None = None


def resolve(lab: Lab, text: str, namespace: str | None = None) -> Reference:
    """What `text` means in a lab.

    Names are looked for in `namespace` if it is given, else in all of them; a namespace in the text
    wins.  Raises NetlabError (exit code 2): unknown-pod, unknown-service, unknown-node,
    unknown-host, unknown-port, unknown-name, ambiguous-name, bad-address, bad-port.
    """
    found = _address(lab, text)
    if found:
        return found
    name, port = _split_port(text)
    first, slash, rest = name.partition("/")
    if slash and first.lower() in _KINDS:
        return _of_kind(lab, _KINDS[first.lower()], rest, port, namespace)
    if slash and first.lower() in _OWNERS:
        return _owned(lab, _OWNERS[first.lower()], rest, port, namespace)
    if slash:
        return _bare(lab, rest, port, first, with_nodes=False)
    return _bare(lab, name, port, namespace)


def _split_port(text: str) -> tuple[str, str | None]:
    name, colon, port = text.partition(":")
    if not colon:
        return name, None
    if not port or (port.isdecimal() and not _is_port_number(port)):
        raise _error(
            "bad-port", f'"{text}" has no usable port: it is a name or a number from 1 to 65535'
        )
    return name, port


def _is_port_number(text: str) -> bool:
    return bool(re.fullmatch(r"[0-9]{1,5}", text)) and 0 < int(text) < 65536


def _address(lab: Lab, text: str) -> Reference | None:
    bracketed = re.fullmatch(r"\[([^\]]*)\](?::(.*))?", text)
    if bracketed:
        host, port = bracketed.group(1), bracketed.group(2)
        if ":" not in host:
            raise _error("bad-address", f'"{host}" in "{text}" is not an IPv6 address')
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
    else:
        host, port = text, None
    if host.lower() == "localhost":
        # What every machine's /etc/hosts says, and each pod's.
        host = LOOPBACK[lab.families[0]]
    try:
        address = str(ip_address(host))
    except ValueError:
        if re.fullmatch(r"[\d.]*\.[\d.]*", host):
            raise _error(
                "bad-address", f'"{host}" is not an address: IPv4 has four numbers up to 255'
            ) from None
        if host.count(":") > 1:
            raise _error(
                "bad-address",
                f'"{host}" is not an address',
                "with a port an IPv6 address stands in brackets: [fd00:10:96::b]:80",
            ) from None
        return None
    number = None
    if port is not None:
        if not _is_port_number(port):
            raise _error(
                "bad-port", f'"{port}" in "{text}" is not a port: a number from 1 to 65535'
            )
        number = int(port)
    return _whose(lab, address, number)


def _whose(lab: Lab, address: str, number: int | None) -> Reference:
    """An address with what it belongs to."""
    for node in lab.nodes:
        if address in node.addresses:
            return Reference("address", node=node, address=address, port_number=number)
    for pod in lab.pods:
        if address in pod.addresses:
            node = lab.node(pod.node)
            return Reference("address", pod=pod, node=node, address=address, port_number=number)
    for host in lab.hosts:
        if address in host.addresses:
            return Reference("address", host=host, address=address, port_number=number)
    for container in lab.docker_containers:
        if address == container.address:
            node = lab.node(container.node)
            return Reference(
                "address", container=container, node=node, address=address, port_number=number
            )
    for service in lab.services:
        if address in (*service.cluster_ips, *service.external_ips, *service.load_balancer_ips):
            port, number = _service_port(service, None if number is None else str(number))
            return Reference(
                "address", service=service, address=address, port=port, port_number=number
            )
    return Reference("address", address=address, port_number=number)


def _of_kind(lab: Lab, kind: str, name: str, port: str | None, namespace: str | None) -> Reference:
    inside, slash, last = name.partition("/")
    if slash and kind not in _WITHOUT_NAMESPACE:
        namespace, name = inside, last
    hits: Mapping[str, _Thing]
    if kind == "node":
        hits, known = _nodes(lab, name), [node.name for node in lab.nodes]
    elif kind == "host":
        hits, known = _hosts(lab, name), [host.name for host in lab.hosts]
    elif kind == "container":
        known = [each.name for each in lab.docker_containers]
        hits = _containers(lab, name)
    elif kind == "pod":
        hits, known = _pods(lab, name, namespace), _names(lab.pods, namespace)
    else:
        hits, known = _services(lab, name, namespace), _names(lab.services, namespace)
    return _reference(lab, _only(lab, kind, name, hits, known, namespace), port)


def _bare(
    lab: Lab, name: str, port: str | None, namespace: str | None, with_nodes: bool = True
) -> Reference:
    """A name by itself, or with a namespace, which nodes and hosts have none of."""
    hits: dict[str, _Thing] = {
        **_pods(lab, name, namespace),
        **_services(lab, name, namespace),
        **(
            {**_nodes(lab, name), **_hosts(lab, name), **_containers(lab, name)}
            if with_nodes
            else {}
        ),
    }
    known = _names((*lab.pods, *lab.services), namespace)
    if with_nodes:
        known += [*(node.name for node in lab.nodes), *(host.name for host in lab.hosts)]
        known += [each.name for each in lab.docker_containers]
    return _reference(lab, _only(lab, "name", name, hits, known, namespace), port)


def _owned(lab: Lab, kind: str, name: str, port: str | None, namespace: str | None) -> Reference:
    """A pod of a Deployment or the like: a ready one if there is one."""
    inside, slash, last = name.partition("/")
    if slash:
        namespace, name = inside, last
    owner = f"{kind}/{name}"
    pods = [pod for pod in lab.pods if pod.owner == owner and _within(pod, namespace)]
    if not pods:
        owners = {pod.owner for pod in lab.pods if pod.owner.startswith(f"{kind}/")}
        near = suggest(owner, sorted(owners))
        raise _error(
            "unknown-pod",
            f'no pod in lab {lab.name} belongs to {kind} "{name}"',
            _did_you_mean(near, "netlab get pods"),
        )
    spaces = sorted({pod.namespace for pod in pods})
    if len(spaces) > 1:
        raise _ambiguous(lab, name, [f"{kind.lower()}/{space}/{name}" for space in spaces])
    pod = next((pod for pod in pods if pod.ready), pods[0])
    return _pod_reference(lab, pod, port)


def _pods(lab: Lab, name: str, namespace: str | None) -> dict[str, Pod]:
    hits = (pod for pod in lab.pods if pod.name == name and _within(pod, namespace))
    return {f"pod/{pod.key}": pod for pod in hits}


def _services(lab: Lab, name: str, namespace: str | None) -> dict[str, Service]:
    hits = (each for each in lab.services if each.name == name and _within(each, namespace))
    return {f"svc/{service.key}": service for service in hits}


def _nodes(lab: Lab, name: str) -> dict[str, Node]:
    return {f"node/{node.name}": node for node in lab.nodes if node.name == name}


def _hosts(lab: Lab, name: str) -> dict[str, Host]:
    return {f"host/{host.name}": host for host in lab.hosts if host.name == name}


def _containers(lab: Lab, name: str) -> dict[str, DockerContainer]:
    return {f"container/{each.name}": each for each in lab.docker_containers if each.name == name}


def _reference(lab: Lab, thing: _Thing, port: str | None) -> Reference:
    if isinstance(thing, Pod):
        return _pod_reference(lab, thing, port)
    if isinstance(thing, Service):
        return _service_reference(thing, port)
    if isinstance(thing, Host):
        number = _number(port, f"host/{thing.name}", {})
        return Reference("host", host=thing, address=thing.addresses[0], port_number=number)
    if isinstance(thing, DockerContainer):
        number = _number(port, f"container/{thing.name}", {})
        node = lab.node(thing.node)
        own = thing.address or (node.address if thing.mode == "host" else None)
        return Reference("container", container=thing, node=node, address=own, port_number=number)
    number = _number(port, f"node/{thing.name}", {})
    return Reference("node", node=thing, address=thing.address, port_number=number)


def _pod_reference(lab: Lab, pod: Pod, port: str | None) -> Reference:
    named = {entry.name: entry.port for entry in pod.ports if entry.name}
    return Reference(
        "pod",
        pod=pod,
        node=lab.node(pod.node),
        address=pod.address,
        port_number=_number(port, f"pod/{pod.key}", named),
    )


def _service_reference(service: Service, text: str | None) -> Reference:
    port, number = _service_port(service, text)
    address = service.cluster_ip if service.cluster_ip not in ("", "None") else None
    return Reference("service", service=service, address=address, port=port, port_number=number)


def _service_port(service: Service, text: str | None) -> tuple[ServicePort | None, int | None]:
    """The port that `text` names, and its number; one that TCP and UDP share is left open."""
    if text is None:
        only = service.ports[0] if len(service.ports) == 1 else None
        return only, only.port if only else None
    matching = [port for port in service.ports if text in (port.name, str(port.port))]
    if len(matching) == 1:
        return matching[0], matching[0].port
    named = {port.name: port.port for port in service.ports if port.name}
    return None, _number(text, f"svc/{service.key}", named)


def _number(port: str | None, whose: str, named: dict[str, int]) -> int | None:
    if port is None:
        return None
    if port.isdecimal():
        return int(port)
    if port in named:
        return named[port]
    near = suggest(port, list(named))
    raise _error(
        "unknown-port",
        f'{whose} has no port named "{port}"',
        f'did you mean "{near}"?' if near else f"its named ports: {', '.join(named) or 'none'}",
    )


def _only(
    lab: Lab,
    kind: str,
    name: str,
    hits: Mapping[str, _Thing],
    known: list[str],
    namespace: str | None,
) -> _Thing:
    """The one hit."""
    if len(hits) > 1:
        raise _ambiguous(lab, name, sorted(hits))
    if hits:
        return next(iter(hits.values()))
    what = "" if kind == "name" else f"{kind} "
    inside = f", namespace {namespace}" if namespace and kind not in _WITHOUT_NAMESPACE else ""
    listing = {
        "service": "netlab get services",
        "node": "netlab get nodes",
        "host": "netlab get hosts",
        "container": "netlab get containers",
    }
    raise _error(
        f"unknown-{kind}",
        f'{what}"{name}" is not in lab {lab.name}{inside}',
        _did_you_mean(suggest(name, known), listing.get(kind, "netlab get pods")),
    )


def _ambiguous(lab: Lab, name: str, hits: list[str]) -> NetlabError:
    return _error(
        "ambiguous-name",
        f'"{name}" is more than one thing in lab {lab.name}: {", ".join(hits)}',
        f"write one of them out, such as {hits[0]}",
    )


def _within(thing: Pod | Service, namespace: str | None) -> bool:
    return namespace is None or thing.namespace == namespace


def _names(things: Iterable[Pod | Service], namespace: str | None) -> list[str]:
    """Names as the user would write them: with their namespace if it is not the one asked for."""
    return [thing.name if _within(thing, namespace) else thing.key for thing in things]


def _did_you_mean(near: str | None, listing: str) -> str:
    return f'did you mean "{near}"? `{listing}` lists them' if near else f"`{listing}` lists them"


def _error(code: str, message: str, hint: str | None = None) -> NetlabError:
    return NetlabError(Problem(code, message, hint=hint))
