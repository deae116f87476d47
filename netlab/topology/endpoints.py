"""Which pods, and which given addresses, stand behind each port of a Service.

* EndpointSlices in the file are taken as they are, for a Service with a selector too.
* Otherwise a Service with a selector has the pods that it selects: `ready` if they are ready and
  not being deleted, `serving` if they are ready, `terminating` if they are being deleted.
  Those that are ready have the hints that `trafficDistribution` asks for: their zone, and with
  PreferSameNode their node.
* A Service without selector and slices has those of the Endpoints object of its name.

A pod is an endpoint once for each family of the Service, those of the primary family first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from msgspec.structs import replace

from netlab.topology import kubernetes as k8s
from netlab.topology import model
from netlab.topology.addresses import OF_LAB, Address, address, family, family_of, left_out
from netlab.topology.convert import shown_path
from netlab.topology.model import ZONE_LABEL
from netlab.topology.networks import Networks
from netlab.topology.objects import Objects, Stated
from netlab.topology.places import Complaints, Path
from netlab.topology.pods import DraftPod
from netlab.topology.services import target_number

_SERVICE_NAME = "kubernetes.io/service-name"
_TOPOLOGY_MODE = (  # the first that is there counts
    "service.kubernetes.io/topology-aware-hints",
    "service.kubernetes.io/topology-mode",
)


def decide(
    objects: Objects,
    networks: Networks,
    services: list[model.Service],
    pods: list[DraftPod],
    found: Complaints,
) -> list[model.ServiceEndpoints]:
    """Endpoints of every port of every Service; also has the pods listen on target ports."""
    index = _PodIndex(pods)
    zones = {
        pod.node.name: zone
        for pod in pods
        if pod.node and (zone := pod.node.labels.get(ZONE_LABEL))
    }
    given = _Given(objects, networks, services, pods, found)
    decided: list[model.ServiceEndpoints] = []
    for service, stated in zip(services, objects.services, strict=True):
        if service.type == "ExternalName":
            continue
        selected = index.selected(service)
        for pod in selected:
            for port in service.ports:
                number = target_number(port, pod)
                if number is not None:
                    pod.listen[port.protocol, number] = None
        has_slices = given.has_slices(service)
        if service.selector and not has_slices:
            if not selected:
                _warn_of_selector(service, stated, pods, found)
            else:
                _warn_of_target_ports(service, stated, selected, found)
            _warn_of_topology_mode(stated, found)
        for port in service.ports:
            if has_slices or not service.selector:
                endpoints = tuple(given.endpoints(service, port))
            else:
                endpoints = tuple(_hinted(_of_pods(service, port, selected), stated, zones))
            decided.append(
                model.ServiceEndpoints(
                    namespace=service.namespace,
                    service=service.name,
                    port_name=port.name,
                    protocol=port.protocol,
                    endpoints=endpoints,
                )
            )
    return decided


class _PodIndex:
    """Pods by namespace and label, so that a Service looks at few."""

    def __init__(self, pods: list[DraftPod]) -> None:
        self._by_label: dict[tuple[str, str, str], list[DraftPod]] = {}
        for pod in pods:
            for key, value in pod.labels.items():
                self._by_label.setdefault((pod.namespace, key, value), []).append(pod)

    def selected(self, service: model.Service) -> list[DraftPod]:
        """The pods that a Service selects, in order; none if it has no selector."""
        if not service.selector:
            return []
        fewest = min(
            (
                self._by_label.get((service.namespace, *label), [])
                for label in service.selector.items()
            ),
            key=len,
        )
        wanted = service.selector.items()
        return [pod for pod in fewest if wanted <= pod.labels.items()]


def _of_pods(
    service: model.Service, port: model.ServicePort, pods: list[DraftPod]
) -> Iterator[model.Endpoint]:
    numbers = [target_number(port, pod) for pod in pods]
    for of in service.ip_families:
        for pod, number in zip(pods, numbers, strict=True):
            if number is not None and of in pod.addresses:
                yield model.Endpoint(
                    address=str(pod.addresses[of]),
                    port=number,
                    node=pod.node.name if pod.node else None,
                    pod=pod.key,
                    ready=service.publish_not_ready_addresses
                    or (pod.ready and not pod.terminating),
                    serving=pod.ready,
                    terminating=pod.terminating,
                )


def _warn_of_selector(
    service: model.Service,
    stated: Stated[k8s.Service],
    pods: list[DraftPod],
    found: Complaints,
) -> None:
    wanted = service.selector.items()
    labels = ", ".join(f"{key}={value}" for key, value in wanted)
    elsewhere = sorted({pod.namespace for pod in pods if wanted <= pod.labels.items()})
    hint = None
    if elsewhere:
        hint = f"pods in namespace {elsewhere[0]} match; a Service selects in its own namespace"
    else:
        near = sorted(
            {
                f"{key}={pod.labels[key]}"
                for pod in pods
                if pod.namespace == service.namespace
                for key in service.selector
                if key in pod.labels
            }
        )
        if near:
            hint = f"pods in namespace {service.namespace} have {', '.join(near[:5])}"
    message = f"{stated.title}: no pod matches its selector {labels}"
    found.warning("selects-nothing", message, stated.origin, "spec", "selector", hint=hint)


def _warn_of_target_ports(
    service: model.Service,
    stated: Stated[k8s.Service],
    selected: list[DraftPod],
    found: Complaints,
) -> None:
    for index, port in enumerate(service.ports):
        if any(target_number(port, pod) is not None for pod in selected):
            continue
        known = {
            f"{each.name} ({each.protocol or 'TCP'})"
            for pod in selected
            for each in pod.ports
            if each.name
        }
        message = (
            f"{stated.title}: no pod that it selects has a {port.protocol} port named "
            f'"{port.target_port}"'
        )
        hint = f"they have {', '.join(sorted(known)[:5])}" if known else "they name no port"
        where = ("spec", "ports", index, "targetPort")
        found.warning("no-target-port", message, stated.origin, *where, hint=hint)


def _hinted(
    endpoints: Iterable[model.Endpoint], stated: Stated[k8s.Service], zones: Mapping[str, str]
) -> Iterator[model.Endpoint]:
    """Endpoints with hints, as k8s.io/endpointslice/trafficdist gives them to ready ones."""
    wanted = stated.item.spec.trafficDistribution if stated.item.spec else None
    if wanted is None or _topology_mode(stated):
        yield from endpoints
        return
    for each in endpoints:
        if not each.ready or each.node is None:
            yield each
            continue
        zone = zones.get(each.node)
        yield replace(
            each,
            for_zones=(zone,) if zone else (),
            for_nodes=(each.node,) if wanted == "PreferSameNode" else (),
        )


def _topology_mode(stated: Stated[k8s.Service]) -> str | None:
    """The annotation that has the controller give hints in its place, if it is set."""
    annotations = stated.item.metadata.annotations or {}
    name = next((name for name in _TOPOLOGY_MODE if name in annotations), None)
    return name if name and annotations[name] in ("Auto", "auto") else None


def _warn_of_topology_mode(stated: Stated[k8s.Service], found: Complaints) -> None:
    if annotation := _topology_mode(stated):
        message = (
            f"{stated.title}: the annotation {annotation} gives no hints: they depend on how many "
            "processors each zone has"
        )
        hint = "spec.trafficDistribution gives some, EndpointSlices with hints are heeded"
        where = ("metadata", "annotations", annotation)
        found.warning("not-built", message, stated.origin, *where, hint=hint)


class _Given:
    """Endpoints that stand in the file."""

    def __init__(
        self,
        objects: Objects,
        networks: Networks,
        services: list[model.Service],
        pods: list[DraftPod],
        found: Complaints,
    ) -> None:
        self._found = found
        self._families = networks.families
        self._pods = {pod.key: pod for pod in pods}
        self._by_address = {
            each: pod for pod in pods if not pod.host_network for each in pod.addresses.values()
        }
        self._of_nodes = {each for node in networks.nodes for each in node.addresses.values()}
        self._of_hosts = {
            each.strip() for host in objects.hosts for each in host.item.spec.address.split(",")
        }
        self._nodes = {node.name for node in networks.nodes}
        self._slices: dict[str, list[Stated[k8s.EndpointSlice]]] = {}
        self._endpoints: dict[str, Stated[k8s.Endpoints]] = {}
        known = {service.key: service for service in services}
        for each in objects.slices:
            self._add(each, known)
        for endpoints in objects.endpoints:
            key = f"{endpoints.namespace}/{endpoints.item.metadata.name}"
            self._endpoints[key] = endpoints
            if key not in known:
                message = f"{endpoints.title}: there is no Service of that name in the file"
                found.warning("no-service", message, endpoints.origin)

    def _add(self, each: Stated[k8s.EndpointSlice], known: Mapping[str, model.Service]) -> None:
        """Sort in a slice of a Service that there is, of a family that there is."""
        labels = each.item.metadata.labels or {}
        name = labels.get(_SERVICE_NAME)
        kind = each.item.addressType
        if name is None:
            message = f"{each.title} has no label {_SERVICE_NAME}"
            self._found.warning("no-service", message, each.origin)
        elif f"{each.namespace}/{name}" not in known:
            message = f"{each.title} belongs to Service {name}, which is not in the file"
            self._found.warning("no-service", message, each.origin)
        elif k8s.HEADLESS in labels and known[f"{each.namespace}/{name}"].cluster_ip != "None":
            message = f"{each.title}: kube-proxy heeds no endpoints with the label {k8s.HEADLESS}"
            self._found.warning("no-part", message, each.origin, "metadata", "labels", k8s.HEADLESS)
        elif kind == "FQDN":
            message = f"{each.title}: kube-proxy heeds no endpoints of addressType FQDN"
            self._found.warning("no-part", message, each.origin, "addressType")
        elif kind not in self._families:
            message = f"{each.title} is left out: it is {kind}, {OF_LAB} {self._families[0]} only"
            self._found.warning("other-family", message, each.origin, "addressType")
        else:
            self._slices.setdefault(f"{each.namespace}/{name}", []).append(each)

    def has_slices(self, service: model.Service) -> bool:
        """Whether the file has EndpointSlices for a Service."""
        return service.key in self._slices

    def endpoints(
        self, service: model.Service, port: model.ServicePort
    ) -> Iterator[model.Endpoint]:
        """The given endpoints of one port."""
        if service.key in self._slices:
            for each in self._slices[service.key]:
                yield from self._of_slice(each, port)
        elif service.key in self._endpoints:
            yield from self._of_endpoints(self._endpoints[service.key], port)

    def _of_slice(
        self, stated: Stated[k8s.EndpointSlice], port: model.ServicePort
    ) -> Iterator[model.Endpoint]:
        for number in _numbers(stated.item.ports or (), port):
            for index, entry in enumerate(stated.item.endpoints or ()):
                path: Path = ("endpoints", index, "addresses", 0)
                if not entry.addresses:
                    continue
                ip = address(entry.addresses[0], stated.title, self._found, stated.origin, path)
                if ip is None:
                    continue
                if family(ip) != stated.item.addressType:
                    message = (
                        f"{stated.title}: {shown_path(path)} {ip} is {family(ip)}; "
                        f"its addressType is {stated.item.addressType}"
                    )
                    self._found.error("mixed-families", message, stated.origin, *path)
                conditions = entry.conditions or k8s.EndpointConditions()
                hints = entry.hints or k8s.EndpointHints()
                yield model.Endpoint(
                    address=str(ip),
                    port=number,
                    node=self._node(entry.nodeName, stated, (*path[:2], "nodeName")),
                    pod=self._pod(ip, entry.targetRef, stated, path),
                    ready=conditions.ready is not False,
                    serving=conditions.serving is not False,
                    terminating=conditions.terminating is True,
                    for_nodes=tuple(hint.name for hint in hints.forNodes or ()),
                    for_zones=tuple(hint.name for hint in hints.forZones or ()),
                )

    def _of_endpoints(
        self, stated: Stated[k8s.Endpoints], port: model.ServicePort
    ) -> Iterator[model.Endpoint]:
        for index, subset in enumerate(stated.item.subsets or ()):
            for number in _numbers(subset.ports or (), port):
                for name in ("addresses", "notReadyAddresses"):
                    for position, entry in enumerate(getattr(subset, name) or ()):
                        path: Path = ("subsets", index, name, position, "ip")
                        if family_of(entry.ip) not in self._families:
                            families, title = self._families, stated.title
                            left_out(entry.ip, families, title, self._found, stated.origin, path)
                            continue
                        ip = address(entry.ip, stated.title, self._found, stated.origin, path)
                        if ip is None:
                            continue
                        yield model.Endpoint(
                            address=str(ip),
                            port=number,
                            node=self._node(entry.nodeName, stated, (*path[:-1], "nodeName")),
                            pod=self._pod(ip, entry.targetRef, stated, path),
                            ready=name == "addresses",
                            serving=name == "addresses",
                        )

    def _pod(
        self,
        ip: Address,
        reference: k8s.ObjectReference | None,
        stated: Stated[k8s.EndpointSlice] | Stated[k8s.Endpoints],
        path: Path,
    ) -> str | None:
        """`namespace/name` of the lab's pod that an endpoint is; warns if it is nothing here."""
        named = None
        if reference and reference.kind == "Pod":
            named = self._pods.get(f"{reference.namespace or stated.namespace}/{reference.name}")
            if named and ip == named.addresses.get(family(ip)):
                return named.key
        pod = self._by_address.get(ip)
        where = f"{shown_path(path)} {ip}"
        if pod and named:
            message = f"{stated.title}: {where} is {pod.title}'s; {named.title} has another"
            self._found.warning("other-pod", message, stated.origin, *path)
        elif not pod and ip not in self._of_nodes and str(ip) not in self._of_hosts:
            whose = f"; {named.title} has another" if named else ""
            message = f"{stated.title}: no pod of the lab has {where}{whose}"
            hint = "it is kept; what is sent there is lost"
            self._found.warning("no-pod", message, stated.origin, *path, hint=hint)
        return pod.key if pod else None

    def _node(
        self,
        name: str | None,
        stated: Stated[k8s.EndpointSlice] | Stated[k8s.Endpoints],
        path: Path,
    ) -> str | None:
        """The node that an endpoint names; warns if the lab has none of that name."""
        if name and name not in self._nodes:
            message = f"{stated.title}: {shown_path(path)} {name} is no node of the lab"
            hint = "the endpoint is kept; it is local to no node"
            self._found.warning("unknown-node", message, stated.origin, *path, hint=hint)
        return name


def _numbers(ports: Iterable[k8s.EndpointPort], port: model.ServicePort) -> Iterator[int]:
    for each in ports:
        same = (each.name or "", each.protocol or "TCP") == (port.name, port.protocol)
        if same and each.port is not None:
            yield each.port
