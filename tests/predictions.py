"""What tests of predictions ask: every client to every destination of a lab, and what differed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import second_kernel
from netlab.problems import NetlabError
from netlab.topology.model import Lab
from netlab.trace.aim import Request
from netlab.trace.family import family_of
from netlab.trace.model import Trace
from netlab.trace.run import trace

# Long enough for an answer on a machine that is busy, or emulated; what is dropped waits so long.
TIMEOUT_S = 0.9 if second_kernel.IN_VM in os.environ else 0.25


def clients(lab: Lab) -> list[str]:
    """Every pod and every node."""
    return [*(f"pod/{pod.key}" for pod in lab.pods), *(f"node/{node.name}" for node in lab.nodes)]


def service_addresses(lab: Lab) -> Iterator[tuple[str, str]]:
    """Every address and port of every Service, with its protocol, at every node for NodePorts."""
    for service in lab.services:
        addresses = [each for each in service.cluster_ips if each != "None"]
        addresses += [*service.external_ips, *service.load_balancer_ips]
        nodes = [each for node in lab.nodes for each in node.addresses]
        families = {family_of(each) for each in service.cluster_ips}
        for port in service.ports:
            ends = [(each, port.port) for each in addresses]
            if port.node_port:
                ends += [(each, port.node_port) for each in nodes if family_of(each) in families]
            protocol = port.protocol.lower()
            if (protocol, port.port) == ("udp", 53):  # a name server answers questions alone
                protocol = "dns"
            for address, number in ends:
                yield socket(address, number), protocol


def socket(address: str, port: int) -> str:
    """An address and a port as a destination is written."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def differing(lab: Lab, requests: Iterable[Request], declared: Lab | None = None) -> list[str]:
    """A line for each probe that was not as predicted; each is really sent."""
    return [line for request in requests for line in _differing(lab, request, declared)]


def _differing(lab: Lab, request: Request, declared: Lab | None) -> Iterator[str]:
    what = f"{request.source} → {request.destination} {request.protocol or ''}"
    try:
        found: Trace = trace(lab, request, declared)
    except NetlabError as error:
        yield f"{what}: {error.problems[0].message}"
        return
    if found.prediction is None:
        yield f"{what}: nothing was predicted"
    elif found.prediction.differs:
        was = f"{found.disposition} {found.drop.reason if found.drop else ''}"
        yield f"{what}: {was}: {' | '.join(found.prediction.differs)}"
