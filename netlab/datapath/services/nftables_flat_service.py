"""What one Service port adds to the maps of nftables-flat mode: elements, and nothing else.

An address and port of a Service leads to endpoints at one of four *sites*, each with maps of its
own: at the address of a Service or at a NodePort, and there to all endpoints or, where policy
Local asks for it, to those of the node.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache

from netlab.datapath.services.endpoints import Endpoints, ServicePortInfo, Verdict
from netlab.datapath.services.names import address_port
from netlab.datapath.services.nftables_list import TableText, ranges
from netlab.datapath.services.nftables_service import (
    HAIRPINS,
    Settings,
    allowed_sources,
    comment,
    hairpins,
    has_firewall,
)
from netlab.problems import NetlabError, Problem
from netlab.topology.model import Endpoint

# Bits of a way's number for the endpoints; the others take a day in seconds, Kubernetes' longest.
_ENDPOINT_BITS = 15


class Site:
    """Where a packet's endpoint is chosen: a chain and its maps, named alike."""

    def __init__(self, name: str, *, is_node_port: bool) -> None:
        self.name = name
        self.is_node_port = is_node_port
        self.ways = f"{name}-ways"  # key: how many endpoints, and how long clients are remembered
        self.chains = f"{name}-chains"  # that to the chain which chooses
        self.endpoints = f"{name}-endpoints"  # key and place: endpoint
        self.affinity = f"{name}-affinity"  # key and place: number of an endpoint that remembers


SERVICE = Site("service", is_node_port=False)
LOCAL_SERVICE = Site("local-service", is_node_port=False)
NODEPORT = Site("nodeport", is_node_port=True)
LOCAL_NODEPORT = Site("local-nodeport", is_node_port=True)


def way_number(endpoints: int, seconds: int) -> int:
    """Among how many endpoints to choose and for how many seconds to remember it, as one number.

    No seconds: not to be remembered.  It depends on nothing else, so no Service changes another's.
    """
    return seconds << _ENDPOINT_BITS | endpoints


def way_of(number: int) -> tuple[int, int]:
    """Endpoints and seconds of a way's number."""
    return number & (1 << _ENDPOINT_BITS) - 1, number >> _ENDPOINT_BITS


Way = tuple[Site, int]
"""A way by its site and number."""


class Numbers:
    """Numbers of endpoints that remember clients.

    A checksum of the name, so that it does not depend on other Services; the next one that is free
    where two have the same.
    """

    def __init__(self) -> None:
        self.names: dict[int, str] = {}
        self._met: set[int] = set()  # wanted by a name that had to take another

    def of(self, name: str) -> int:
        """The number of a name; it is taken from now on."""
        number = zlib.crc32(name.encode())
        # neither 0 nor the highest, for which nft has words
        while number in (0, 0xFFFFFFFF) or self.names.setdefault(number, name) != name:
            self._met.add(number)
            number = (number + 1) & 0xFFFFFFFF
        return number

    def free(self, names: Iterable[str]) -> None:
        """The numbers of these names may be taken."""
        for name in names:
            del self.names[self.of(name)]

    def depend(self, names: Iterable[str]) -> bool:
        """Whether the number of one of the names depends on others, or that of others on it."""
        return any(zlib.crc32(name.encode()) in self._met for name in names)


@dataclass(slots=True)
class Elements:
    """What some Services add: elements, and the ways that they need."""

    table: TableText
    numbers: Numbers
    ways: list[Way] = field(default_factory=list)


@lru_cache(maxsize=1 << 12)  # the same few, for nearly all Services
def class_id(number: int) -> str:
    """32 bits as nft prints a `classid`, the type of `meta priority`; not 0 nor the highest."""
    return f"{number >> 16:x}:{number & 0xFFFF:x}"


def add_service(elements: Elements, settings: Settings, info: ServicePortInfo) -> None:
    """Everything of one Service port."""
    to_port = f"{info.protocol} . {info.port}"
    key = f"{info.cluster_ip} . {to_port}"
    by_set = elements.table.elements
    by_set["cluster-ips"].append(info.cluster_ip)
    if not info.has_cluster_ip:
        pass
    elif info.internal is Verdict.FORWARD:
        chosen = info.local if info.internal_local else info.cluster
        _add_choice(elements, SERVICE, key, info, chosen)
    else:
        _add_refusal(elements, "services", key, info, info.internal)
    for ip in info.external_ips + info.load_balancer_ips:
        _add_external(elements, f"{ip} . {to_port}", info, SERVICE, LOCAL_SERVICE)
    if info.node_port:
        key = f"{info.protocol} . {info.node_port}"
        _add_external(elements, key, info, NODEPORT, LOCAL_NODEPORT)
        if info.protocol in settings.rejected_on_localhost:
            by_set["localhost-nodeports"].append(key)
    if has_firewall(info):
        sources = ranges(allowed_sources(settings, info))
        for ip in info.load_balancer_ips:
            by_set["firewall-services"].append(f"{ip} . {to_port}")
            by_set["firewall-sources"] += (f"{ip} . {to_port} . {source}" for source in sources)
    by_set[HAIRPINS] += hairpins(settings, info)


def _add_external(
    elements: Elements, key: str, info: ServicePortInfo, everywhere: Site, here: Site
) -> None:
    """An external address or a NodePort."""
    kind = "nodeports" if everywhere.is_node_port else "services"
    if info.has_any:
        _add_choice(elements, everywhere, key, info, info.cluster)
        policy = "local" if info.external_local else "masqueraded"
        elements.table.element(f"{policy}-{kind}", key)
        if info.external_local and info.local:
            _add_choice(elements, here, key, info, info.local)
    # Under policy Local this too: pods and the node are translated before anything is refused.
    if info.external is not Verdict.FORWARD:
        _add_refusal(elements, kind, key, info, info.external)


def _add_refusal(
    elements: Elements, kind: str, key: str, info: ServicePortInfo, verdict: Verdict
) -> None:
    which = "no-endpoint" if verdict is Verdict.REJECT else "no-local-endpoint"
    elements.table.element(f"{which}-{kind}", f'{key} comment "{comment(info)}"')


def _add_choice(
    elements: Elements, site: Site, key: str, info: ServicePortInfo, endpoints: Endpoints
) -> None:
    """The way from a key to one of several endpoints."""
    if len(endpoints) >> _ENDPOINT_BITS:
        raise _too_many(info, len(endpoints))
    by_set = elements.table.elements
    way = way_number(len(endpoints), info.affinity_s or 0)
    elements.ways.append((site, way))
    by_set[site.ways].append(f"{key} : {class_id(way)}")
    if not info.affinity_s:
        add = by_set[site.endpoints].append
        for place, endpoint in enumerate(endpoints, 1):
            add(f"{key} . {class_id(place)} : {endpoint.address} . {endpoint.port}")
        return
    for place, endpoint in enumerate(endpoints, 1):
        number = class_id(elements.numbers.of(_remembering(info, endpoint)))
        by_set[site.affinity].append(f"{key} . {class_id(place)} : {number}")
        by_set["affinity-endpoints"].append(f"{number} : {endpoint.address} . {endpoint.port}")


def remembering(info: ServicePortInfo) -> Iterator[str]:
    """Names, for :class:`Numbers`, of the endpoints of a Service port that remember clients."""
    if info.affinity_s:
        yield from (_remembering(info, endpoint) for endpoint in info.reachable)


def _remembering(info: ServicePortInfo, endpoint: Endpoint) -> str:
    """The same for all addresses and policies of the Service port."""
    return f"{info.name}/{info.protocol}/{address_port(endpoint)}"


def _too_many(info: ServicePortInfo, count: int) -> NetlabError:
    most = (1 << _ENDPOINT_BITS) - 1
    return NetlabError(
        Problem(
            "unsupported",
            f"Service {info.name}: {count} endpoints are more than mode nftables-flat takes, "
            f"{most} for a port",
            hint="serviceProxy mode nftables takes them",
        )
    )
