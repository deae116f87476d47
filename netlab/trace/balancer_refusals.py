"""What a refusal by a load balancer's rules means."""

from __future__ import annotations

from netlab.datapath import balancer
from netlab.topology.model import LoadBalancer, Service
from netlab.trace.case import Case
from netlab.trace.declared_outside import NO_HEALTHY_NODE, NOT_BALANCED
from netlab.trace.model_steps import Rule
from netlab.trace.place import Place


def of_balancer(rule: Rule, place: Place, case: Case) -> tuple[str, str, str | None] | None:
    """Reason, explanation and what to do; None if it is another's rule."""
    if rule.table != balancer.TABLE:
        return None
    box = next((each for each in case.lab.balancers if each.name == place.name), None)
    if box is None:
        return None
    asked = f"{case.aim.destination} port {case.aim.port}"
    service = _asked(case, box)
    if service and rule.comment == balancer.NOT_ADMITTED:
        ranges = ", ".join(service.load_balancer_source_ranges)
        return (
            "dropped-by-rule",
            f"{place} lets none but {ranges} ask svc/{service.key}, and the source is none of them",
            f"name it in spec.loadBalancerSourceRanges of svc/{service.key}",
        )
    if rule.comment != balancer.NO_NODE:
        return None
    if service is None:
        served = [
            f"{ip} port {port.port} (svc/{each.key})"
            for each in case.lab.services
            for ip in box.serves(each)
            for port in each.ports
        ]
        others = f"it has {', '.join(served[:3])}" if served else "no Service has an address of it"
        return NOT_BALANCED, f"{place} serves nothing at {asked}: {others}", None
    if service.health_check_node_port:
        by = f"says at port {service.health_check_node_port} that it has a ready endpoint"
    else:
        by = "takes connections at its node port"
    return (
        NO_HEALTHY_NODE,
        f"{place} sends to nodes that pass its health check, and no node {by} for "
        f"svc/{service.key}",
        f"`netlab get endpointslices -n {service.namespace}` tells which endpoints are ready",
    )


def _asked(case: Case, box: LoadBalancer) -> Service | None:
    for service in case.lab.services:
        if case.aim.destination in box.serves(service):
            for port in service.ports:
                if (port.port, port.protocol.lower()) == (case.aim.port, case.aim.protocol):
                    return service
    return None
