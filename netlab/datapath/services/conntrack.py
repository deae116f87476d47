"""UDP connections that a Service no longer means.

A connection is translated as its first packet was.  Nobody closes one of UDP: it lives on for as
long as the client sends, and so leads to an endpoint that is gone or, from before there was one,
to none at all.  When endpoints change kube-proxy forgets such connections; TCP and SCTP are left
alone.

Source: kube-proxy pkg/proxy/conntrack/cleanup.go, and EndpointsMap.Update in
pkg/proxy/endpointschangetracker.go for when it is due.
"""

from __future__ import annotations

from netlab.datapath.services.endpoints import ports_of, service_objects
from netlab.topology.model import Lab, Node, ServiceEndpoints

_Target = tuple[str, int]  # an address and a port


class UdpServices:
    """Where the UDP connections of one family may lead.

    Policies, hints and termination do not count: who serves keeps the connections that he has.
    """

    def __init__(self, lab: Lab, node: Node, family: int) -> None:
        services = (
            objects
            for objects in service_objects(lab).values()
            if any(port.protocol == "UDP" for port in objects.service.ports)
        )
        self._by_address: dict[_Target, frozenset[_Target]] = {}
        self._by_node_port: dict[int, frozenset[_Target]] = {}
        for info in ports_of(services, lab.service_proxy, node, family):
            if info.protocol != "udp":
                continue
            serving = frozenset((each.address, each.port) for each in info.known if each.serving)
            for address in (info.cluster_ip, *info.external_ips, *info.load_balancer_ips):
                self._by_address[address, info.port] = serving
            if info.node_port and serving:
                self._by_node_port[info.node_port] = serving

    def __bool__(self) -> bool:
        return bool(self._by_address)

    def is_stale(self, address: str, port: int, answering: _Target) -> bool:
        """Whether a connection to a Service is expected to be answered by no endpoint of it.

        One to the number of a NodePort is taken for one to it at any address, be it another host's.
        """
        for serving in (self._by_address.get((address, port)), self._by_node_port.get(port)):
            if serving is not None and answering not in serving:
                return True
        return False


def is_cleaning_due(before: Lab | None, after: Lab) -> bool:
    """Whether endpoints of a Service with a UDP port changed; None: nobody knows what was before.

    A proxy with other settings is one that has just started: all endpoints are new to it.  Without
    a proxy of ours it is for the user's to clean.
    """
    if after.service_proxy.mode == "none":
        return False
    if before is None or before.service_proxy != after.service_proxy:
        return bool(_endpoints_of_udp(after))
    return _endpoints_of_udp(before) != _endpoints_of_udp(after)


def _endpoints_of_udp(lab: Lab) -> dict[tuple[str, str], set[ServiceEndpoints]]:
    """Endpoints of every port of the Services that have a port of UDP."""
    found = {
        (entry.namespace, entry.service): set[ServiceEndpoints]()
        for entry in lab.endpoints
        if entry.protocol == "UDP"
    }
    for entry in lab.endpoints:
        if (behind := found.get((entry.namespace, entry.service))) is not None:
            behind.add(entry)
    return found
