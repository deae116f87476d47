"""The cluster's name server, in pods that have the label of CoreDNS: Knot DNS with one zone.

The zone is what CoreDNS's plugin `kubernetes` answers (its specification is
kubernetes/dns docs/specification.md): addresses and ports of Services, endpoints of each by name,
the way back from addresses, aliases of Services that are names for something outside.

It is the zone of the root, so that an alias is followed to a Host of the lab, whose `names` stand
there as well, and so that a name that nobody has does not exist instead of being waited for: there
is nobody above to ask.

Knot, for it loads a changed zone beside the one that it answers from: no query is lost meanwhile
(NSD loses some, dnsmasq has to be started again for all but plain addresses, and gives no alias of
a name that it does not know itself).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from ipaddress import ip_address

from netlab.datapath.name_files import CLUSTER_DOMAIN, pod_view_name, servers_of
from netlab.datapath.state import File, Process
from netlab.topology.model import (
    KNOT,
    NAME_SERVER,
    Endpoint,
    Lab,
    Pod,
    Service,
)

PORT = 53
TTL_S = 30  # kubeadm's Corefile has it
_USER = "knot"  # Debian's package makes it
_DIRECTORY = "/run/knot"
_CONFIG = f"{_DIRECTORY}/knot.conf"
_ZONE = f"{_DIRECTORY}/names.zone"
_SERVICES = f"svc.{CLUSTER_DOMAIN}."
_PODS = f"pod.{CLUSTER_DOMAIN}."
_VERSION = "1.1.0"  # of the specification


def processes(lab: Lab, namespace_of: Mapping[str, str]) -> dict[str, tuple[Process, ...]]:
    """The name servers by node; `namespace_of` gives the network namespaces of their pods."""
    pods = [pod for pod in lab.pods if pod.name_server]
    if not pods:
        return {}
    text, serial = zone(lab)
    found: dict[str, tuple[Process, ...]] = {}
    for pod in pods:
        made = Process(
            name=NAME_SERVER,
            namespace=namespace_of[pod.key],
            command=(NAME_SERVER, "-c", _CONFIG),
            package=KNOT,
            view=pod_view_name(lab, pod) if pod.host_network else "",
            files=(File(path=_CONFIG, text=config(lab)), File(path=_ZONE, text=text)),
            directories=((_DIRECTORY, _USER),),
            reload="SIGHUP",
            listens=(("UDP", PORT), ("TCP", PORT)),
            zone_serial=serial,
        )
        found[pod.node] = (*found.get(pod.node, ()), made)
    return found


def config(lab: Lab) -> str:
    """What Knot reads first."""
    wildcards = {"IPv4": "0.0.0.0", "IPv6": "::"}
    listen = ", ".join(f"{wildcards[family]}@{PORT}" for family in lab.families)
    return f"""\
server:
  rundir: {_DIRECTORY}
  user: {_USER}:{_USER}
  listen: [ {listen} ]
  udp-workers: 1
  tcp-workers: 1
  background-workers: 1
  answer-rotation: on
database:
  storage: {_DIRECTORY}
log:
  - target: stderr
    any: error
zone:
  - domain: .
    file: {_ZONE}
    zonefile-load: whole
    zonefile-sync: -1
    journal-content: none
    semantic-checks: off
"""


def zone(lab: Lab) -> tuple[str, int]:
    """All names of a lab as a master file (RFC 1035), and its serial number, which is its own."""
    server = f"ns.dns.{CLUSTER_DOMAIN}."
    records = [f". NS {server}"]
    records += (_address_record(server, address) for address in servers_of(lab))
    records.append(f'dns-version.{CLUSTER_DOMAIN}. TXT "{_VERSION}"')
    behind = _endpoints(lab)
    names = {pod.key: pod for pod in lab.pods}
    for service in lab.services:
        records += _service(service, behind.get(service.key, {}), names)
    for pod in lab.pods:
        for address in pod.addresses:
            records.append(_address_record(f"{_dashed(address)}.{pod.namespace}.{_PODS}", address))
    for host in lab.hosts:
        for name in (host.name, *host.names):
            records += (_address_record(f"{name}.", address) for address in host.addresses)
    body = "".join(f"{record}\n" for record in dict.fromkeys(records))
    serial = zlib.crc32(body.encode()) or 1
    start = f". SOA {server} hostmaster.{CLUSTER_DOMAIN}. {serial} 7200 1800 86400 {TTL_S}"
    return f"$TTL {TTL_S}\n{start}\n{body}", serial


_Ends = dict[tuple[str, str], tuple[Endpoint, ...]]
"""Endpoints of a Service by the name of its port and the protocol."""


def _endpoints(lab: Lab) -> dict[str, _Ends]:
    """Those that are ready, of each Service by its key."""
    found: dict[str, _Ends] = {}
    for entry in lab.endpoints:
        ready = tuple(each for each in entry.endpoints if each.ready)
        ends = found.setdefault(f"{entry.namespace}/{entry.service}", {})
        ends[entry.port_name, entry.protocol] = ready
    for service in lab.services:  # that have no port, and so no endpoint that a proxy could use
        if service.cluster_ip == "None" and not service.ports and service.selector:
            wanted = service.selector.items()
            selected = (
                Endpoint(address=address, port=0, pod=pod.key)
                for pod in lab.pods
                if pod.namespace == service.namespace and wanted <= pod.labels.items()
                if pod.ready or service.publish_not_ready_addresses
                for address in pod.addresses
            )
            found[service.key] = {("", "TCP"): tuple(selected)}
    return found


def _service(service: Service, ends: _Ends, pods: Mapping[str, Pod]) -> Iterator[str]:
    name = f"{service.name}.{service.namespace}.{_SERVICES}"
    if service.type == "ExternalName":
        yield _alias(name, service.external_name)
        return
    headless = service.cluster_ip == "None"
    if not headless:
        for address in service.cluster_ips:
            yield _address_record(name, address)
            yield f"{_reverse(address)} PTR {name}"
        for port in service.ports:
            if port.name:
                yield f"{_port(port.name, port.protocol)}.{name} SRV 0 100 {port.port} {name}"
    for (port_name, protocol), each in ends.items():
        targets: dict[tuple[str, int], None] = {}
        for end in each:
            target = f"{_end_name(service, end, pods)}.{name}"
            targets[target, end.port] = None
            yield _address_record(target, end.address)
            yield f"{_reverse(end.address)} PTR {target}"
            if headless:
                yield _address_record(name, end.address)
        if headless and port_name:
            for target, number in targets:
                owner = f"{_port(port_name, protocol)}.{name}"
                yield f"{owner} SRV 0 {max(1, 100 // len(targets))} {number} {target}"


def _end_name(service: Service, end: Endpoint, pods: Mapping[str, Pod]) -> str:
    """What an endpoint is called below its Service: its pod's `hostname`, else its address."""
    pod = pods.get(end.pod or "")
    if pod and pod.naming.host_name and pod.naming.subdomain == service.name:
        return pod.naming.host_name
    return _dashed(end.address)


def _alias(name: str, target: str) -> str:
    try:
        return _address_record(name, str(ip_address(target)))
    except ValueError:
        return f"{name} CNAME {target.rstrip('.')}."


def _address_record(name: str, address: str) -> str:
    return f"{name} {'AAAA' if ':' in address else 'A'} {address}"


def _reverse(address: str) -> str:
    return f"{ip_address(address).reverse_pointer}."


def _port(name: str, protocol: str) -> str:
    return f"_{name}._{protocol.lower()}"


def _dashed(address: str) -> str:
    return address.replace(".", "-").replace(":", "-")
