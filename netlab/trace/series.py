"""Many probes of one request, each from a new source port, one after the other.

Arming the witnesses and closing them takes most of a trace's time, and so does printing rules.  So
the probes of a series have one mark and one arming, in which the witnesses forget the one before.
After a probe without an answer they are armed anew, for another mark: what is still on its way
would be taken for the next one's.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from itertools import islice

from msgspec.structs import replace

from netlab.problems import Exit, NetlabError, Problem
from netlab.topology.model import Endpoint, Lab, Service, ServicePort
from netlab.topology.references import resolve
from netlab.trace import probe
from netlab.trace.aim import Aim, Request, aim
from netlab.trace.model import Trace
from netlab.trace.model_steps import OF_SERVICES, Socket
from netlab.trace.probe import Answer
from netlab.trace.proxies import proxies
from netlab.trace.run import follow, require_namespaces, tell, trace
from netlab.trace.watch import Watch

# With the chance of one endpoint of n for each try, one in e^10 fails.
_TRIES_PER_ENDPOINT = 10
_LEAST_TRIES = 100


def traces(
    lab: Lab, request: Request, count: int, declared: Lab | None = None
) -> Generator[Trace, None, None]:
    """Traces of `count` probes, as they are done.

    Raises NetlabError as :func:`netlab.trace.run.trace` does, and (exit code 2) for a request that
    names its source port.  Close the iterator if you leave it before its end.
    """
    decided = _ready(lab, request)
    if proxies(lab, decided):
        for _ in range(count):
            yield trace(lab, request, declared=declared)
        return
    with closing(_probes(lab, decided, request.timeout_s)) as probes:
        for answer, watch in islice(probes, count):
            yield tell(declared or lab, follow(lab, decided, answer, watch, is_last=False), watch)


def trace_to_endpoint(
    lab: Lab, request: Request, endpoint: str, declared: Lab | None = None
) -> Trace:
    """The trace of the first probe that the Service gives to `endpoint`, a reference of a pod.

    Connection tracking tells whom a probe was given to, and the rest is looked at only for the one
    that counts.  Raises NetlabError: exit code 2 if the destination is no Service's, or the pod is
    no endpoint of it; 1 if other endpoints were chosen, try by try.
    """
    decided = _ready(lab, request)
    service, port = service_port(lab, decided)
    known = endpoints(lab, decided)
    wanted = _wanted(lab, service, port, known, endpoint, request.namespace)
    most = max(_LEAST_TRIES, _TRIES_PER_ENDPOINT * len(known))
    if proxies(lab, decided):
        most = _TRIES_PER_ENDPOINT * len(known)  # endpoints have their turns
        for tries in range(1, most + 1):
            found = trace(lab, request, declared=declared)
            if chosen(found) == wanted:
                return replace(found, tries=tries)
            if found.disposition == "unobserved":
                return found
        raise _not_chosen(service, decided, endpoint, most)
    with closing(_probes(lab, decided, request.timeout_s)) as probes:
        for tries, (answer, watch) in enumerate(islice(probes, most), 1):
            told = watch.translated(answer.source)
            if told and told != wanted:
                continue
            found = tell(declared or lab, follow(lab, decided, answer, watch, is_last=False), watch)
            if chosen(found) == wanted:
                return replace(found, tries=tries)
            if found.disposition == "unobserved":
                return found
    raise _not_chosen(service, decided, endpoint, most)


def _not_chosen(service: Service, decided: Aim, endpoint: str, most: int) -> NetlabError:
    return NetlabError(
        Problem(
            "endpoint-not-chosen",
            f"svc/{service.key} gave none of {most} probes from {decided.source} to {endpoint}",
            hint=f"`netlab describe svc/{service.name}` says who is chosen, and why others are not",
        ),
        Exit.NO,
    )


def chosen(trace: Trace) -> Socket | None:
    """Who was to receive the probe, by its last translation or else by arrival."""
    for translation in reversed(trace.translations):
        if translation.kind in (*OF_SERVICES, "proxy"):
            return translation.after
    to = trace.delivered_to
    return Socket(ip=to.ip, port=to.port) if to else None


def service_port(lab: Lab, decided: Aim) -> tuple[Service, ServicePort]:
    """The Service's port that is aimed at.  NetlabError (exit code 2) if there is none."""
    protocol = decided.protocol.upper()
    if found := known_port(lab, decided):
        return found
    raise NetlabError(
        Problem(
            "no-service",
            f'no Service chooses who receives what is sent to "{decided.to}" over '
            f"{protocol if decided.port is None else f'{protocol} port {decided.port}'}",
            hint="an endpoint is that of a destination such as svc/NAME",
        )
    )


def known_port(lab: Lab, decided: Aim) -> tuple[Service, ServicePort] | None:
    """The Service's port that is aimed at, if it has that one."""
    for service in lab.services:
        for port in service.ports if service.key == decided.service else ():
            same = port.protocol == decided.protocol.upper()
            if same and decided.port in (port.port, port.node_port):
                return service, port
    return None


def endpoints(lab: Lab, decided: Aim) -> dict[Socket, Endpoint]:
    """All endpoints of the Service's port that is aimed at, of the probe's family."""
    service, port = service_port(lab, decided)
    is_six = ":" in decided.destination
    return {
        Socket(ip=each.address, port=each.port): each
        for each in lab.endpoints_of(service, port)
        if (":" in each.address) is is_six
    }


def _ready(lab: Lab, request: Request) -> Aim:
    decided = aim(lab, request)
    if request.source_port:
        raise NetlabError(
            Problem(
                "one-source-port",
                f"many probes cannot all be sent from port {request.source_port}: connection "
                "tracking would give them all to whom the first one was given to",
                hint="leave --source-port out",
            )
        )
    require_namespaces(lab, decided)
    return decided


def _probes(
    lab: Lab, decided: Aim, timeout_s: float
) -> Generator[tuple[Answer, Watch], None, None]:
    """Probes without end, and the watch that has seen each of them and none before."""
    while True:
        mark = probe.new_mark(decided)
        with Watch(lab, decided, mark) as watch:
            while True:
                answer = probe.send(decided, mark, timeout_s, watch)
                yield answer, watch
                if answer.outcome == "no-answer" or watch.blind:
                    break
                watch.renew()


def _wanted(
    lab: Lab,
    service: Service,
    port: ServicePort,
    known: dict[Socket, Endpoint],
    text: str,
    namespace: str | None,
) -> Socket:
    """The address and port of an endpoint that a user names."""
    meant = resolve(lab, text, namespace)
    addresses = meant.pod.addresses if meant.pod else (meant.address,)
    ports = [end for end in known if end.ip in addresses]
    if meant.service is None and ports:
        return next((end for end in ports if end.port == meant.port_number), ports[0])
    names = [f"{each.pod or each.address}" for each in known.values()]
    raise NetlabError(
        Problem(
            "not-an-endpoint",
            f'"{text}" is no endpoint of svc/{service.key}, port {port.port}',
            hint=f"its endpoints are {', '.join(names)}" if names else "it has no endpoint",
        )
    )
