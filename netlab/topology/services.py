"""Services: their node ports, given or decided, and the ports that pods answer on.

* A node port that is not given is the lowest free one from 30000 to 32767, for each protocol; so
  is the health check's node port of a LoadBalancer with externalTrafficPolicy Local.
"""

from __future__ import annotations

from ipaddress import ip_network

from netlab.topology import kubernetes as k8s
from netlab.topology import model
from netlab.topology.addresses import address, family_of, is_address, is_network, left_out
from netlab.topology.cluster_ips import ClusterIPs, is_headless
from netlab.topology.convert import shown, shown_path
from netlab.topology.model import Family
from netlab.topology.naming import is_dns_name
from netlab.topology.networks import Networks
from netlab.topology.objects import Stated
from netlab.topology.places import Complaints, Path
from netlab.topology.pods import DraftPod

NODE_PORTS = range(30000, 32768)


def decide(
    stated: list[Stated[k8s.Service]], networks: Networks, of_cluster: bool, found: Complaints
) -> list[model.Service]:
    """All Services of a lab, in the file's order; `of_cluster` if an API server took them."""
    cluster_ips = ClusterIPs(stated, networks, found)
    node_ports = _NodePorts(stated, found)
    services = []
    for each in stated:
        spec = each.item.spec or k8s.ServiceSpec()
        _check_ports(each, of_cluster, found)
        cluster_ip, *other_cluster_ips = cluster_ips.of(each) or ("",)
        policy = spec.externalTrafficPolicy or "Cluster"
        affinity = spec.sessionAffinityConfig
        timeout = affinity.clientIP.timeoutSeconds if affinity and affinity.clientIP else None
        services.append(
            model.Service(
                namespace=each.namespace,
                name=each.item.metadata.name,
                type=spec.type or "ClusterIP",
                cluster_ip=cluster_ip,
                other_cluster_ips=tuple(other_cluster_ips),
                ip_families=cluster_ips.families(each),
                selector=spec.selector or {},
                ports=tuple(
                    model.ServicePort(
                        port=port.port,
                        protocol=port.protocol or "TCP",
                        name=port.name or "",
                        target_port=port.targetPort or port.port,
                        node_port=node_ports.of(each, index),
                    )
                    for index, port in enumerate(spec.ports or ())
                ),
                external_ips=_external_ips(each, networks.families, found),
                load_balancer_ips=_load_balancer_ips(each, networks.families, found),
                load_balancer_source_ranges=_source_ranges(each, networks.families, found),
                session_affinity=spec.sessionAffinity or "None",
                affinity_timeout_s=timeout or 10800,
                external_traffic_policy=policy,
                internal_traffic_policy=spec.internalTrafficPolicy or "Cluster",
                health_check_node_port=node_ports.of_health_check(each),
                external_name=(spec.externalName or "") if spec.type == "ExternalName" else "",
                publish_not_ready_addresses=bool(spec.publishNotReadyAddresses),
                labels=each.item.metadata.labels or {},
            )
        )
    _tell_of_shared(stated, services, found)
    return services


# Ports


def _check_ports(each: Stated[k8s.Service], of_cluster: bool, found: Complaints) -> None:
    """What the API server would refuse."""
    spec = each.item.spec or k8s.ServiceSpec()
    ports = spec.ports or []
    headless = is_headless(spec)
    if not ports and not headless and spec.type != "ExternalName":
        found.error("missing-field", f"{each.title}: spec.ports is missing", each.origin, "spec")
    if headless and spec.type in ("NodePort", "LoadBalancer"):
        message = f'{each.title}: a {spec.type} Service cannot have clusterIP "None"'
        found.error("bad-value", message, each.origin, "spec", "clusterIP")
    if spec.type == "ExternalName" and not spec.externalName:
        message = f"{each.title}: spec.externalName is missing"
        found.error("missing-field", message, each.origin, "spec")
    if spec.type == "ExternalName" and not is_dns_name(spec.externalName or "a"):
        message = f"{each.title}: spec.externalName {shown(spec.externalName)} is no DNS name"
        found.error("bad-value", message, each.origin, "spec", "externalName")
    outside = spec.type in ("NodePort", "LoadBalancer") or (
        spec.type != "ExternalName" and spec.externalIPs
    )
    if spec.externalTrafficPolicy and not outside:
        message = f"{each.title}: a {spec.type or 'ClusterIP'} Service has no externalTrafficPolicy"
        # (Objects older than this check are in clusters still.)
        complain = found.warning if of_cluster else found.error
        hint = "with type: NodePort or LoadBalancer it has, or with externalIPs"
        complain("bad-value", message, each.origin, "spec", "externalTrafficPolicy", hint=hint)
    names: set[str] = set()
    numbers: set[tuple[int, str]] = set()
    for index, port in enumerate(ports):
        path: Path = ("spec", "ports", index)
        name, key = port.name or "", (port.port, port.protocol or "TCP")
        if not name and len(ports) > 1:
            message = f"{each.title}: with several ports each needs a name"
            found.error("missing-field", message, each.origin, *path)
        elif name in names:
            message = f'{each.title}: two ports are named "{name}"'
            found.error("duplicate-name", message, each.origin, *path, "name")
        if key in numbers:
            message = f"{each.title}: port {key[0]}/{key[1]} stands twice"
            found.error("duplicate-port", message, each.origin, *path, "port")
        names.add(name)
        numbers.add(key)


def _has_health_check(spec: k8s.ServiceSpec) -> bool:
    return spec.type == "LoadBalancer" and spec.externalTrafficPolicy == "Local"


class _NodePorts:
    """The node ports of a lab, each for one Service."""

    def __init__(self, stated: list[Stated[k8s.Service]], found: Complaints) -> None:
        self._found = found
        self._owner: dict[tuple[int, str], str] = {}
        self._next: dict[str, int] = {}
        self._exhausted: set[str] = set()
        for each in stated:
            self._keep(each)

    def _keep(self, each: Stated[k8s.Service]) -> None:
        spec = each.item.spec or k8s.ServiceSpec()
        given: list[tuple[int | None, str, Path]] = [
            (port.nodePort, port.protocol or "TCP", ("spec", "ports", index, "nodePort"))
            for index, port in enumerate(spec.ports or ())
        ]
        given.append((spec.healthCheckNodePort, "TCP", ("spec", "healthCheckNodePort")))
        if spec.healthCheckNodePort and not _has_health_check(spec):
            message = f"{each.title}: healthCheckNodePort {spec.healthCheckNodePort} is nobody's"
            hint = "only a LoadBalancer with externalTrafficPolicy: Local has one"
            self._found.error("bad-value", message, each.origin, *given.pop()[2], hint=hint)
        for number, protocol, path in given:
            if not number:
                continue
            key = (number, protocol)
            if spec.type not in ("NodePort", "LoadBalancer"):
                kind = spec.type or "ClusterIP"
                message = f"{each.title}: a {kind} Service has no node port, this one {number}"
                hint = "with type: NodePort it has"
                self._found.error("bad-value", message, each.origin, *path, hint=hint)
            elif key in self._owner:
                message = (
                    f"{each.title}: node port {number}/{protocol} is already that of "
                    f"{self._owner[key]}"
                )
                self._found.error("duplicate-port", message, each.origin, *path)
            elif number not in NODE_PORTS:
                message = f"{each.title}: node port {number} is outside 30000-32767; it is kept"
                self._found.warning("node-port-range", message, each.origin, *path)
            self._owner.setdefault(key, each.title)

    def of(self, each: Stated[k8s.Service], index: int) -> int | None:
        """The node port of a Service's port; None if it has none."""
        spec = each.item.spec or k8s.ServiceSpec()
        port = (spec.ports or [])[index]
        if spec.type not in ("NodePort", "LoadBalancer"):
            return None
        if port.nodePort:
            return port.nodePort
        if spec.type == "LoadBalancer" and spec.allocateLoadBalancerNodePorts is False:
            return None
        return self._allocate(each, port.protocol or "TCP")

    def of_health_check(self, each: Stated[k8s.Service]) -> int | None:
        """healthCheckNodePort: of a LoadBalancer that sends to local endpoints only."""
        spec = each.item.spec or k8s.ServiceSpec()
        if not _has_health_check(spec):
            return None
        return spec.healthCheckNodePort or self._allocate(each, "TCP")

    def _allocate(self, each: Stated[k8s.Service], protocol: str) -> int | None:
        for number in range(self._next.get(protocol, NODE_PORTS.start), NODE_PORTS.stop):
            if (number, protocol) not in self._owner:
                self._owner[number, protocol] = each.title
                self._next[protocol] = number + 1
                return number
        if protocol not in self._exhausted:
            self._exhausted.add(protocol)
            message = f"no {protocol} node port is left for {each.title}: all of them are taken"
            self._found.error("exhausted-ports", message, each.origin)
        return None


# Addresses from outside


def _tell_of_shared(
    stated: list[Stated[k8s.Service]], services: list[model.Service], found: Complaints
) -> None:
    """External addresses and ports that several Services have; only one of them can be reached.

    The API server takes them, and no proxy says anything.
    """
    claimants: dict[tuple[str, int, str], list[tuple[str, int, Path]]] = {}
    external = {ip for each in services for ip in each.external_ips + each.load_balancer_ips}
    for index, each in enumerate(services) if external else ():
        if each.type == "ExternalName" or each.cluster_ip in ("", "None"):
            continue
        balanced: Path = ("status", "loadBalancer", "ingress")
        paths: dict[str, Path] = dict.fromkeys(each.load_balancer_ips, balanced)
        paths |= dict.fromkeys(each.external_ips, ("spec", "externalIPs"))
        cluster_ips = (each.cluster_ip, *each.other_cluster_ips)
        paths |= dict.fromkeys((ip for ip in cluster_ips if ip in external), ("spec",))
        for ip, path in paths.items():
            for port in each.ports:
                name = f"{each.key}:{port.name}" if port.name else each.key
                claim = (ip, port.port, port.protocol)
                claimants.setdefault(claim, []).append((name, index, path))
    for (ip, number, protocol), those in claimants.items():
        first, *others = sorted(those)
        for _, index, path in others:
            loser, winner = stated[index], services[first[1]]
            message = f"{loser.title}: {ip} port {number}/{protocol} is also that of {winner.key}"
            hint = f"only one can have it: the first by name with endpoints, {winner.key} if it has"
            found.warning("shared-address", message, loser.origin, *path, hint=hint)


def _external_ips(
    each: Stated[k8s.Service], families: tuple[Family, ...], found: Complaints
) -> tuple[str, ...]:
    given = (each.item.spec.externalIPs if each.item.spec else None) or []
    kept = []
    for index, text in enumerate(given):
        path = ("spec", "externalIPs", index)
        if family_of(text) not in families:
            left_out(text, families, each.title, found, each.origin, path)
        elif ip := address(text, each.title, found, each.origin, path):
            kept.append(str(ip))
    return tuple(kept)


def _load_balancer_ips(
    each: Stated[k8s.Service], families: tuple[Family, ...], found: Complaints
) -> tuple[str, ...]:
    """Ingress addresses that kube-proxy makes rules for: `ipMode` VIP, or none."""
    status = each.item.status
    ingress = (status.loadBalancer.ingress if status and status.loadBalancer else None) or []
    spec = each.item.spec or k8s.ServiceSpec()
    kept = []
    for index, entry in enumerate(ingress):
        if not entry.ip or spec.type != "LoadBalancer":
            continue
        if entry.ipMode == "Proxy" and is_address(entry.ip):
            continue
        path = ("status", "loadBalancer", "ingress", index, "ip")
        if family_of(entry.ip) not in families:
            left_out(entry.ip, families, each.title, found, each.origin, path)
        elif ip := address(entry.ip, each.title, found, each.origin, path):
            kept.append(str(ip))
    return tuple(kept)


def _source_ranges(
    each: Stated[k8s.Service], families: tuple[Family, ...], found: Complaints
) -> tuple[str, ...]:
    spec = each.item.spec or k8s.ServiceSpec()
    given = spec.loadBalancerSourceRanges or []
    field = ("spec", "loadBalancerSourceRanges")
    if given and spec.type != "LoadBalancer":
        message = f"{each.title}: only a LoadBalancer Service has loadBalancerSourceRanges"
        found.error("bad-value", message, each.origin, *field)
    kept = []
    for index, text in enumerate(map(str.strip, given)):
        if not is_network(text):
            message = f"{each.title}: {shown_path((*field, index))} {shown(text)} is not a CIDR"
            hint = "a network such as 192.0.2.0/24, or one machine: 192.0.2.7/32"
            found.error("bad-cidr", message, each.origin, *field, index, hint=hint)
        elif family_of(text) not in families:
            left_out(text, families, each.title, found, each.origin, (*field, index))
        else:
            kept.append(str(ip_network(text, strict=False)))
    return tuple(kept)


def target_number(port: model.ServicePort, pod: DraftPod) -> int | None:
    """The port of a pod behind a Service's port; None if the pod has none of that name."""
    if isinstance(port.target_port, int):
        return port.target_port
    for declared in pod.ports:
        if declared.name == port.target_port and (declared.protocol or "TCP") == port.protocol:
            return declared.containerPort
    return None
