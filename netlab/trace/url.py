"""`http://HOST:PORT/PATH` as a destination: what it asks for, and by which address one comes there.

A host of an Ingress rule is at the address of the controller's Service: what a DNS outside would
say.  Any other host is a reference, as it stands.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import msgspec

from netlab.problems import NetlabError, Problem, suggest
from netlab.topology.model import Lab, Service
from netlab.trace.family import family_of
from netlab.trace.ingress import front, is_host

if TYPE_CHECKING:
    from netlab.trace.aim import Request


def is_url(destination: str) -> bool:
    """Whether a destination is one."""
    return "://" in destination


def meant(lab: Lab, request: Request, is_outside: bool) -> Request:
    """The request that a URL means; the source is `is_outside` the cluster, or in it.

    Raises NetlabError (exit code 2).
    """
    text = request.destination
    try:
        parts = urlsplit(text)
        name, port = parts.hostname or "", parts.port
    except ValueError:
        raise _error("bad-url", f'"{text}" is no URL') from None
    if parts.scheme != "http":
        what = "over TLS" if parts.scheme == "https" else f'by "{parts.scheme}"'
        raise _error(
            "bad-url",
            f"{text}: what is asked for {what} is not traced",
            "http://HOST/PATH is; or its connection alone: svc/NAME:443",
        )
    if not name:
        raise _error("bad-url", f'"{text}" names no host', "as in http://myblog.example/")
    asked = [
        ("--protocol", request.protocol not in (None, "http")),
        ("--port", request.port is not None),
        ("--path", request.path is not None),
    ]
    if both := [option for option, is_given in asked if is_given]:
        raise _error("two-forms", f"{text} says all of it: {', '.join(both)} cannot, too")
    path = parts.path or "/"
    if parts.query:
        path += f"?{parts.query}"
    host = name if port in (None, 80) else f"{name}:{port}"
    return msgspec.structs.replace(
        request,
        destination=_destination(lab, request, name, port or 80, is_outside),
        protocol="http",
        path=path,
        host=host,
    )


def _destination(lab: Lab, request: Request, name: str, port: int, is_outside: bool) -> str:
    if not is_host(lab, name):
        hosts = {rule.host for each in lab.ingresses for rule in each.rules if rule.host}
        if "." in name and not name.replace(".", "").isdigit() and ":" not in name:
            near = suggest(name, sorted(hosts))
            known = f"hosts of Ingress rules are {', '.join(sorted(hosts))}" if hosts else None
            raise _error(
                "unknown-host-name",
                f'"{name}" is no host of an Ingress rule in lab {lab.name}',
                f'did you mean "{near}"?' if near else known,
            )
        return _ended(name, port)
    service = front(lab)
    if service is None:
        raise _error(
            "no-controller",
            f"{name} is a host of an Ingress rule, and no Service leads to an Ingress controller",
            "a Service that selects the controller's pods does: docs/ingress.md",
        )
    return _address(lab, service, request, port, is_outside)


def _address(lab: Lab, service: Service, request: Request, port: int, is_outside: bool) -> str:
    """A load balancer's address; without one outside a node's, inside the cluster IP."""
    family = request.family
    addresses, number = service.load_balancer_ips or service.cluster_ips, port
    if is_outside and not service.load_balancer_ips:
        known = next((each.node_port for each in service.ports if each.port == port), None)
        if known is None:
            raise _error(
                "no-address",
                f"svc/{service.key} has no address outside for port {port}",
                "with type: LoadBalancer or NodePort it has",
            )
        addresses, number = lab.nodes[0].addresses, known
    fitting = [each for each in addresses if family is None or family_of(each).version == family]
    if not fitting:
        raise _error("no-address", f"svc/{service.key} has no IPv{family} address")
    return _ended(fitting[0], number)


def _ended(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _error(code: str, message: str, hint: str | None = None) -> NetlabError:
    return NetlabError(Problem(code, message, hint=hint))
