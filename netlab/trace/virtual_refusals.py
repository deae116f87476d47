"""Refusals of ipvs mode: rules that ask sets, and virtual servers without real ones.

No comment of a rule says which Service is meant: the objects do.
"""

from __future__ import annotations

from netlab.topology.model import Service, ServicePort
from netlab.trace.case import Case
from netlab.trace.model_steps import Rule, Socket
from netlab.trace.place import Place
from netlab.trace.refusals import Doubt

_SOURCE_RANGES = ("KUBE-SOURCE-RANGES-FIREWALL", "KUBE-IPVS-OUT-FILTER")


def said_by_set_rule(rule: Rule, place: Place, case: Case) -> Doubt | None:
    """What a rule of ipvs mode that stopped the packet says; None: it is no such rule."""
    at = Socket(ip=case.aim.destination, port=case.aim.port)
    named = _with_address(case)
    if rule.chain in _SOURCE_RANGES and rule.verdict == "drop":
        of = f" of svc/{named.key}" if named else ""
        return Doubt(
            "dropped-by-rule",
            f"the loadBalancerSourceRanges{of} do not contain the packet's source, so kube-proxy's "
            f"rules on {place.name} drop it",
            f"add the source to loadBalancerSourceRanges{of}, or trace from within them",
        )
    if rule.chain != "KUBE-IPVS-FILTER" or named is None:
        return None
    known = ", ".join(f"{port.port}/{port.protocol}" for port in named.ports)
    if case.aim.protocol == "icmp":
        words = f"the address of a virtual server does not answer ping: svc/{named.key} has {known}"
    else:
        words = (
            f"no virtual server is at {at} over {case.aim.protocol}: svc/{named.key} has {known}"
        )
    return Doubt(
        "no-such-port",
        f"{words}, so kube-proxy's rules on {place.name} reject the packet",
        f"trace svc/{named.key}, or give the Service that port",
    )


def empty_server(case: Case, place: Place) -> Doubt | None:
    """Why the kernel of a node refuses what no rule did: its virtual server is empty."""
    if case.lab.service_proxy.mode != "ipvs" or place.kind != "node" or case.story.nats("forward"):
        return None
    found = _asked(case)
    if found is None:
        return None
    service, port = found
    ready = any(each.ready for each in case.lab.endpoints_of(service, port))
    at = Socket(ip=case.aim.destination, port=case.aim.port)
    refused = f"and its kernel refuses what comes to the virtual server {at}, which is empty"
    if ready:
        return Doubt(
            "no-local-endpoints",
            f"has no ready endpoint of svc/{service.key}, whose traffic policy is Local, {refused}",
            f"run an endpoint on {place.name}, or set the policy to Cluster",
        )
    return Doubt(
        "no-endpoints",
        f"knows no ready endpoint of svc/{service.key}, {refused}",
        f"let the selector of svc/{service.key} match a ready pod: `netlab get endpoints`",
    )


def _with_address(case: Case) -> Service | None:
    address = case.aim.destination
    return next(
        (
            service
            for service in case.lab.services
            if address in (*service.cluster_ips, *service.external_ips, *service.load_balancer_ips)
        ),
        None,
    )


def _asked(case: Case) -> tuple[Service, ServicePort] | None:
    """The Service port that the probe is for, by an address of its own or by its NodePort."""
    protocol = case.aim.protocol.upper()
    own = _with_address(case)
    for service in case.lab.services:
        for port in service.ports:
            number = port.port if service is own else port.node_port if own is None else None
            if port.protocol == protocol and number == case.aim.port:
                return service, port
    return None
