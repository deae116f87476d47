"""What Services ask for and userspace mode never had: the mode was older than all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from netlab.datapath.services.endpoints import service_objects
from netlab.topology.model import Lab, Service

_FIELDS: tuple[tuple[str, Callable[[Service], bool], str], ...] = (
    (
        "loadBalancerSourceRanges",
        lambda service: bool(service.load_balancer_source_ranges),
        "everybody may use them",
    ),
    (
        "externalTrafficPolicy Local",
        lambda service: service.external_traffic_policy == "Local",
        "connections go to endpoints on any node, and no node tells of its health",
    ),
    (
        "internalTrafficPolicy Local",
        lambda service: service.internal_traffic_policy == "Local",
        "connections go to endpoints on any node",
    ),
    (
        "SCTP",
        lambda service: any(port.protocol == "SCTP" for port in service.ports),
        "those ports are not proxied",
    ),
)


def absent(lab: Lab) -> Iterator[str]:
    """A sentence for each thing that Services of a lab in this mode ask for in vain."""
    if lab.service_proxy.mode != "userspace":
        return
    for what, asks, instead in _FIELDS:
        if keys := [service.key for service in lab.services if asks(service)]:
            yield _sentence(what, keys, instead)
    hinted = [
        key
        for key, objects in service_objects(lab).items()
        if any(
            end.for_zones or end.for_nodes for each in objects.endpoints for end in each.endpoints
        )
    ]
    if hinted:
        yield _sentence("hints of EndpointSlices", hinted, "every ready endpoint has its turn")


def _sentence(what: str, keys: list[str], instead: str) -> str:
    named = ", ".join(keys[:3])
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return f"mode userspace never had {what} ({named}{more}): {instead}"
