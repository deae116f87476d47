"""Sockets of Services on which kube-proxy itself listens, on each node.

* healthCheckNodePort: a load balancer that keeps to externalTrafficPolicy Local asks every node
  there, and sends only to those that answer 200: those with a ready endpoint.  An endpoint that
  terminates does not count, though it may still be served to.
* NodePorts on loopback, in the nftables modes if it is told to: no rule can send a packet from
  127.0.0.1 to a pod unless `route_localnet` lets it, so that streams are passed on.

Source: kube-proxy pkg/proxy/healthcheck/service_health.go, pkg/proxy/localnodeportproxy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from netlab.datapath.podnet import EVERY_ADDRESS
from netlab.datapath.services.endpoints import cluster_ip_of, service_ports
from netlab.datapath.services.local import NodePortAddresses, own_addresses
from netlab.datapath.state import Page, Server, namespace_name
from netlab.topology.model import Lab, Node, Service, ServiceProxy


def health_checks(
    lab: Lab, node: Node, node_ports: Callable[[ServiceProxy, Node, int], NodePortAddresses]
) -> list[Server]:
    """What answers on a node; `node_ports` tells which of its addresses take NodePorts, by mode."""
    asked = [service for service in lab.services if _is_asked(service)]
    found = []
    for family in (4, 6) if asked else ():
        chosen = node_ports(lab.service_proxy, node, family)
        listening = (
            (EVERY_ADDRESS[family],)
            if chosen.match_all
            else tuple(chosen.of(own_addresses(lab, node, family)))
        )
        found += [
            Server(
                namespace=namespace_name(lab.name, node.name),
                identity=f"the health check of svc/{service.key}",
                node=node.name,
                listen=(("TCP", service.health_check_node_port or 0),),
                addresses=listening,
                page=_page(service, _local_endpoints(lab, node, service, family)),
            )
            for service in asked
            if listening and cluster_ip_of(service, family) is not None
        ]
    return found


def passed_on(lab: Lab, node: Node, family: int) -> Iterator[Server]:
    """NodePorts on the loopback address of a family; without endpoints nobody listens."""
    for info in service_ports(lab, node, family):
        endpoints = info.local if info.external_local else info.cluster
        if info.node_port and info.protocol == "tcp" and endpoints:
            yield Server(
                namespace=namespace_name(lab.name, node.name),
                identity=f"the NodePort of svc/{info.name} on loopback",
                node=node.name,
                listen=(("TCP", info.node_port),),
                addresses=("127.0.0.1" if family == 4 else "::1",),
                backends=tuple((endpoint.address, endpoint.port) for endpoint in endpoints),
                sticky_s=info.affinity_s,
            )


def _is_asked(service: Service) -> bool:
    return (
        service.health_check_node_port is not None
        and service.type == "LoadBalancer"
        and service.external_traffic_policy == "Local"
    )


def _local_endpoints(lab: Lab, node: Node, service: Service, family: int) -> int:
    """Addresses on the node that are ready for any port of the Service."""
    six = family == 6
    ready = {
        endpoint.address
        for port in service.ports
        for endpoint in lab.endpoints_of(service, port)
        if endpoint.ready and endpoint.node == node.name and (":" in endpoint.address) is six
    }
    return len(ready)


def _page(service: Service, local: int) -> Page:
    return Page(
        status=200 if local else 503,
        fields=(
            ("Content-Type", "application/json"),
            ("X-Content-Type-Options", "nosniff"),
            ("X-Load-Balancing-Endpoint-Weight", str(local)),
        ),
        body=(
            "{\n"
            '\t"service": {\n'
            f'\t\t"namespace": "{service.namespace}",\n'
            f'\t\t"name": "{service.name}"\n'
            "\t},\n"
            f'\t"localEndpoints": {local},\n'
            '\t"serviceProxyHealthy": true\n'
            "}"
        ),
    )
