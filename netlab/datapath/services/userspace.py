"""Services of one node as kube-proxy had them first: a proxy on the node takes each connection.

A few rules of nat turn what is sent to a Service to a port of the node itself, where a program
listens (`userspace_programs`), which opens a second connection, to an endpoint.  What comes from
elsewhere is redirected, to the first address of the device that it came by; what the node itself
sends is translated to the node's address.

Source: kube-proxy v1.25, pkg/proxy/userspace/proxier.go (iptablesInit, openPortal, openNodePort)
and roundrobin.go; docs/services-userspace.md explains it.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence

import msgspec

from netlab.datapath.services.endpoints import (
    Endpoints,
    ServicePortInfo,
    service_objects,
    service_ports,
)
from netlab.datapath.services.iptables_save import Table, comment, host
from netlab.datapath.services.local import conntrack_sysctls, node_ip
from netlab.datapath.state import Ruleset, Server, Sysctl
from netlab.problems import NetlabError, Problem
from netlab.topology.model import Lab, Node

CONTAINER, HOST = "KUBE-PORTALS-CONTAINER", "KUBE-PORTALS-HOST"
NODE_PORT_CONTAINER, NODE_PORT_HOST = "KUBE-NODEPORT-CONTAINER", "KUBE-NODEPORT-HOST"
NON_LOCAL = "KUBE-NODEPORT-NON-LOCAL"
KUBELETS = "KUBE-FIREWALL"
# Below the NodePorts, which are below the ports that clients are given.
FIRST_PORT, PORTS = 10000, 20000

_PORTALS = comment("handle ClusterIPs; NOTE: this must be before the NodePort rules")
_NODE_PORTS = comment("handle service NodePorts; NOTE: this must be the last rule in the chain")
_FLOWS = comment("Ensure that non-local NodePort traffic can flow")


class Proxied(msgspec.Struct, frozen=True):
    """A Service port of one family, and the port of every node that its proxy listens on."""

    info: ServicePortInfo
    proxy_port: int

    @property
    def endpoints(self) -> Endpoints:
        """Those that are ready, wherever they are: it never knew any others."""
        return tuple(endpoint for endpoint in self.info.known if endpoint.ready)


def proxied(lab: Lab, node: Node, family: int) -> list[Proxied]:
    """The Service ports of a family on a node, by name.  SCTP it never knew."""
    ports = proxy_ports(lab)
    return [
        Proxied(info, ports[info.protocol, info.name])
        for info in service_ports(lab, node, family)
        if info.protocol != "sctp"
    ]


def proxy_ports(lab: Lab) -> dict[tuple[str, str], int]:
    """The port for each Service port, by protocol and name: the same on every node.

    kube-proxy takes any that is free.  Here it follows from the name, so that others keep theirs
    when one comes or goes, but for the few that want the same.
    """
    names = {
        (port.protocol.lower(), _name(each.service.key, port.name))
        for each in service_objects(lab).values()
        for port in each.service.ports
        if port.protocol != "SCTP"
    }
    taken = {
        (protocol.lower(), port)
        for pod in lab.pods
        if pod.host_network
        for protocol, port in pod.listen
    }
    found: dict[tuple[str, str], int] = {}
    for protocol in ("tcp", "udp"):
        mine = sorted(name for kind, name in names if kind == protocol)
        free = PORTS - sum(kind == protocol for kind, _ in taken)
        if len(mine) > free:
            raise NetlabError(
                Problem(
                    "too-many-services",
                    f"Lab {lab.name}: {len(mine)} Service ports of {protocol.upper()} are more "
                    f"than the {free} ports that a node's proxy has in mode userspace",
                )
            )
        for name in mine:
            offset = zlib.crc32(name.encode())
            while (protocol, port := FIRST_PORT + offset % PORTS) in taken:
                offset += 1
            taken.add((protocol, port))
            found[protocol, name] = port
    return found


def _name(key: str, port: str) -> str:
    return f"{key}:{port}" if port else key


def render(lab: Lab, node: Node) -> Ruleset:
    """All rules of a node; those of both families, as the other modes write them."""
    return Ruleset(
        ipv4=_tables(lab, node, 4),
        ipv6=_tables(lab, node, 6),
        backend=lab.iptables_backend,
    )


def sysctls(lab: Lab, node: Node) -> tuple[Sysctl, ...]:
    """Sysctls that kube-proxy sets on the node."""
    return tuple(conntrack_sysctls(lab.service_proxy))


def servers(lab: Lab, node: Node) -> Sequence[Server]:
    """Nobody asked it for the health of a node's endpoints."""
    return ()


def _tables(lab: Lab, node: Node, family: int) -> str:
    # (The table is there empty: what iptables mode has in it goes.)
    mangle = Table("mangle", "PREROUTING INPUT FORWARD OUTPUT POSTROUTING", "")
    filters = Table("filter", "INPUT FORWARD OUTPUT", f"{KUBELETS} {NON_LOCAL}")
    nat = Table(
        "nat",
        "PREROUTING INPUT OUTPUT POSTROUTING",
        f"{CONTAINER} {HOST} {NODE_PORT_CONTAINER} {NODE_PORT_HOST}",
    )
    filters.add("INPUT", _FLOWS, f"-j {NON_LOCAL}")
    filters.add("INPUT", f"-j {KUBELETS}")
    filters.add("OUTPUT", f"-j {KUBELETS}")
    if family == 4:
        filters.add(
            KUBELETS,
            "! -s 127.0.0.0/8 -d 127.0.0.0/8",
            comment("block incoming localnet connections"),
            "-m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP",
        )
    local = "-m addrtype --dst-type LOCAL"
    nat.add("PREROUTING", _PORTALS, f"-j {CONTAINER}")
    nat.add("PREROUTING", local, _NODE_PORTS, f"-j {NODE_PORT_CONTAINER}")
    nat.add("OUTPUT", _PORTALS, f"-j {HOST}")
    nat.add("OUTPUT", local, _NODE_PORTS, f"-j {NODE_PORT_HOST}")
    own = node_ip(node, family)
    for each in proxied(lab, node, family):
        to_node = f"[{own}]" if family == 6 else own
        redirect = f"-j REDIRECT --to-ports {each.proxy_port}"
        dnat = f"-j DNAT --to-destination {to_node}:{each.proxy_port}"
        _add_portals(nat, each.info, redirect, dnat)
        if each.info.node_port:
            match = _match(each.info, each.info.node_port)
            nat.add(NODE_PORT_CONTAINER, *match, redirect)
            nat.add(NODE_PORT_HOST, *match, dnat)
            accepted = "-m state --state NEW -j ACCEPT"
            filters.add(NON_LOCAL, *_match(each.info, each.proxy_port), accepted)
    return mangle.text() + filters.text() + nat.text()


def _add_portals(nat: Table, info: ServicePortInfo, redirect: str, dnat: str) -> None:
    """From the addresses that a Service port has to its proxy."""
    local = "-m addrtype --dst-type LOCAL"
    own = (info.cluster_ip,) if info.has_cluster_ip else ()
    for address, is_external in _portals(own, info):
        match = (f"-d {host(address)}", *_match(info, info.port))
        if is_external:
            # It may be what a pod reaches somebody else by: only what is from outside is taken.
            nat.add(CONTAINER, *match, "-m physdev ! --physdev-is-in", redirect)
            nat.add(CONTAINER, *match, local, redirect)
            nat.add(HOST, *match, local, dnat)
        else:
            nat.add(CONTAINER, *match, redirect)
            nat.add(HOST, *match, dnat)


def _portals(own: Iterable[str], info: ServicePortInfo) -> Iterator[tuple[str, bool]]:
    """Addresses, and whether each is one of `externalIPs`."""
    yield from ((address, False) for address in own)
    yield from ((address, True) for address in info.external_ips)
    yield from ((address, False) for address in info.load_balancer_ips)


def _match(info: ServicePortInfo, port: int) -> tuple[str, str, str]:
    return f"-p {info.protocol}", comment(info.name), f"-m {info.protocol} --dport {port}"
