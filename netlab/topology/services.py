"""Services: their cluster IPs and node ports, given or decided, and the ports that pods answer on.

* A cluster IP that is not given is the lowest free one of the Service CIDR from its eleventh
  address on (10.96.0.11; those before are where clusters have `kubernetes` and DNS), then the
  lower ones.
* A node port that is not given is the lowest free one from 30000 to 32767, for each protocol; so
  is the health check's node port of a LoadBalancer with externalTrafficPolicy Local.
"""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network

from netlab.topology import kubernetes as k8s
from netlab.topology import model
from netlab.topology.addresses import address, ipv4_of, is_ipv6, network
from netlab.topology.objects import Stated
from netlab.topology.places import Complaints, Path
from netlab.topology.pods import DraftPod

NODE_PORTS = range(30000, 32768)
_FIRST_CLUSTER_IP = 11  # counted from the network's address


def decide(
    stated: list[Stated[k8s.Service]], cidrs: tuple[IPv4Network, ...], found: Complaints
) -> list[model.Service]:
    """All Services of a lab, in the file's order."""
    cluster_ips = _cluster_ips(stated, cidrs, found)
    node_ports = _NodePorts(stated, found)
    services = []
    for each in stated:
        spec = each.item.spec or k8s.ServiceSpec()
        _check_ports(each, found)
        policy = spec.externalTrafficPolicy or "Cluster"
        affinity = spec.sessionAffinityConfig
        timeout = affinity.clientIP.timeoutSeconds if affinity and affinity.clientIP else None
        services.append(
            model.Service(
                namespace=each.namespace,
                name=each.item.metadata.name,
                type=spec.type or "ClusterIP",
                cluster_ip=cluster_ips.get(each.title, ""),
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
                external_ips=_external_ips(each, found),
                load_balancer_ips=_load_balancer_ips(each, found),
                load_balancer_source_ranges=_source_ranges(each, found),
                session_affinity=spec.sessionAffinity or "None",
                affinity_timeout_s=timeout or 10800,
                external_traffic_policy=policy,
                internal_traffic_policy=spec.internalTrafficPolicy or "Cluster",
                health_check_node_port=node_ports.of_health_check(each),
                publish_not_ready_addresses=bool(spec.publishNotReadyAddresses),
                labels=each.item.metadata.labels or {},
            )
        )
    return services


# Cluster IPs


def _cluster_ips(
    stated: list[Stated[k8s.Service]], cidrs: tuple[IPv4Network, ...], found: Complaints
) -> dict[str, str]:
    """Cluster IP by the title of the Service: an address, "None", or "" for ExternalName."""
    decided: dict[str, str] = {}
    owner: dict[IPv4Address, str] = {}
    waiting = []
    for each in stated:
        spec = each.item.spec or k8s.ServiceSpec()
        if spec.type == "ExternalName":
            decided[each.title] = ""
        elif "None" in (spec.clusterIP, *(spec.clusterIPs or ())):
            decided[each.title] = "None"
        elif spec.clusterIP or spec.clusterIPs:
            _keep_cluster_ip(each, spec, cidrs, owner, decided, found)
        elif spec.ipFamilies and "IPv4" not in spec.ipFamilies:
            message = f"{each.title}: an IPv6 Service; this version builds IPv4 only"
            found.error("unsupported", message, each.origin, "spec", "ipFamilies")
        else:
            waiting.append(each)
    free = (candidate for candidate in _candidates(cidrs) if candidate not in owner)
    for served, each in enumerate(waiting):
        chosen = next(free, None)
        if chosen is not None:
            decided[each.title] = str(chosen)
        elif cidrs:
            more = len(waiting) - served - 1
            others = f" and {more} more" if more else ""
            listed = ", ".join(str(cidr) for cidr in cidrs)
            message = f"the Service CIDR {listed} has no address left for {each.title}{others}"
            hint = "give the lab a wider spec.serviceCIDR"
            found.error("exhausted-cidr", message, each.origin, hint=hint)
            break
    return decided


def _keep_cluster_ip(
    each: Stated[k8s.Service],
    spec: k8s.ServiceSpec,
    cidrs: tuple[IPv4Network, ...],
    owner: dict[IPv4Address, str],
    decided: dict[str, str],
    found: Complaints,
) -> None:
    candidates: list[tuple[str, Path]] = [(spec.clusterIP or "", ("spec", "clusterIP"))]
    candidates += [(ip, ("spec", "clusterIPs", i)) for i, ip in enumerate(spec.clusterIPs or ())]
    chosen = ipv4_of(candidates, each.title, found, each.origin)
    given = address(chosen[0], each.title, found, each.origin, chosen[1]) if chosen else None
    if given is None or chosen is None:
        return
    if given in owner:
        message = f"{each.title}: {given} is already the cluster IP of {owner[given]}"
        found.error("duplicate-address", message, each.origin, *chosen[1])
    elif cidrs and not any(_holds(cidr, given) for cidr in cidrs):
        listed = ", ".join(str(cidr) for cidr in cidrs)
        message = f"{each.title}: its cluster IP {given} is outside the Service CIDR {listed}"
        hint = "leave clusterIP out to have one allocated, or widen spec.serviceCIDR of the Lab"
        found.error("outside-cidr", message, each.origin, *chosen[1], hint=hint)
    owner[given] = each.title
    decided[each.title] = str(given)


def _holds(cidr: IPv4Network, given: IPv4Address) -> bool:
    if cidr.prefixlen > 30:
        return given in cidr
    return cidr.network_address < given < cidr.broadcast_address


def _candidates(cidrs: tuple[IPv4Network, ...]) -> Iterator[IPv4Address]:
    for cidr in cidrs:
        first = int(cidr.network_address)
        last = int(cidr.broadcast_address)
        start = min(first + _FIRST_CLUSTER_IP, last)
        for values in (range(start, last), range(first + 1, start)):
            yield from map(IPv4Address, values)


# Ports


def _check_ports(each: Stated[k8s.Service], found: Complaints) -> None:
    """What the API server would refuse."""
    spec = each.item.spec or k8s.ServiceSpec()
    ports = spec.ports or []
    headless = "None" in (spec.clusterIP, *(spec.clusterIPs or ()))
    if not ports and not headless and spec.type != "ExternalName":
        found.error("missing-field", f"{each.title}: spec.ports is missing", each.origin, "spec")
    if headless and spec.type in ("NodePort", "LoadBalancer"):
        message = f'{each.title}: a {spec.type} Service cannot have clusterIP "None"'
        found.error("bad-value", message, each.origin, "spec", "clusterIP")
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
        if spec.type != "LoadBalancer" or spec.externalTrafficPolicy != "Local":
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


def _external_ips(each: Stated[k8s.Service], found: Complaints) -> tuple[str, ...]:
    given = (each.item.spec.externalIPs if each.item.spec else None) or []
    kept = []
    for index, text in enumerate(given):
        if is_ipv6(text):
            _left_out(each, text, found)
        elif ip := address(text, each.title, found, each.origin, ("spec", "externalIPs", index)):
            kept.append(str(ip))
    return tuple(kept)


def _load_balancer_ips(each: Stated[k8s.Service], found: Complaints) -> tuple[str, ...]:
    """Ingress addresses that kube-proxy makes rules for: `ipMode` VIP, or none."""
    status = each.item.status
    ingress = (status.loadBalancer.ingress if status and status.loadBalancer else None) or []
    spec = each.item.spec or k8s.ServiceSpec()
    kept = []
    for index, entry in enumerate(ingress):
        if not entry.ip or (entry.ipMode or "VIP") != "VIP" or spec.type != "LoadBalancer":
            continue
        path = ("status", "loadBalancer", "ingress", index, "ip")
        if is_ipv6(entry.ip):
            _left_out(each, entry.ip, found)
        elif ip := address(entry.ip, each.title, found, each.origin, path):
            kept.append(str(ip))
    return tuple(kept)


def _source_ranges(each: Stated[k8s.Service], found: Complaints) -> tuple[str, ...]:
    given = (each.item.spec.loadBalancerSourceRanges if each.item.spec else None) or []
    kept = []
    for index, text in enumerate(given):
        path = ("spec", "loadBalancerSourceRanges", index)
        if is_ipv6(text):
            _left_out(each, text, found)
        elif cidr := network(text.strip(), each.title, found, each.origin, path):
            kept.append(str(cidr))
    return tuple(kept)


def _left_out(each: Stated[k8s.Service], text: str, found: Complaints) -> None:
    message = f"{each.title}: {text} is left out; this version builds IPv4 only"
    found.warning("ipv4-only", message, each.origin)


def target_number(port: model.ServicePort, pod: DraftPod) -> int | None:
    """The port of a pod behind a Service's port; None if the pod has none of that name."""
    if isinstance(port.target_port, int):
        return port.target_port
    for declared in pod.ports:
        if declared.name == port.target_port and (declared.protocol or "TCP") == port.protocol:
            return declared.containerPort
    return None
