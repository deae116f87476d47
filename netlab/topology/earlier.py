"""A lab decided anew after its objects changed: what was decided earlier stays as it was.

Nodes keep their pod CIDRs and addresses, pods their nodes and addresses, Services their cluster
IPs and node ports, and the pods that controllers made live on.  All this is put into the objects as
if it had been given; only what is new is allocated then.  The networks and the rest of `kind: Lab`
are the running lab's.

* The pods of a controller with another template are made anew, with other names (but a
  StatefulSet's) and addresses.
* A controller that has too many pods loses the newest, when it is changed itself.
* EndpointSlices of a Service with a selector end when the Service changes, or a pod that it selects
  or selected.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator
from ipaddress import ip_address, ip_network

import msgspec
from msgspec.structs import replace

from netlab.problems import Problem
from netlab.topology import kubernetes as k8s
from netlab.topology import kubernetes_parts as k8s_parts
from netlab.topology import kubernetes_pods as k8s_pods
from netlab.topology import lab_document, model
from netlab.topology.addresses import family_of
from netlab.topology.allocate import allocate
from netlab.topology.objects import Objects, Stated
from netlab.topology.places import Complaints, Origin, Source
from netlab.topology.pods import DraftPod, stated_pods, surge_of

Key = tuple[str, str, str]
"""Kind, namespace ("" if the kind has none) and name of an object."""

# Of what commands declared, and what no file says: problems with it have no place.
NOWHERE = Origin(Source("", b""), 0)

_SERVICE_NAME = "kubernetes.io/service-name"
_CLUSTER_SCOPED = {*lab_document.KINDS, *(kind.__name__ for kind in k8s.CLUSTER_SCOPED)}


def key_of(value: dict[str, object]) -> Key:
    """The key of an object that `gather` accepted."""
    kind, metadata = str(value["kind"]), value["metadata"]
    assert isinstance(metadata, dict)
    scoped = kind in _CLUSTER_SCOPED
    return kind, "" if scoped else metadata.get("namespace") or "default", metadata["name"]


def decide_again(
    objects: Objects,
    running: model.Lab,
    given: Collection[Key],
    gone: Collection[str],
    passed: frozenset[str] | None = None,
) -> tuple[model.Lab, tuple[Problem, ...]]:
    """The lab of changed objects, and the warnings.

    `given` are the objects that the change states, `gone` the pods (`namespace/name`) that it
    deletes, `passed` those whose readiness probes pass; None: the same as before, and no new one.
    The lab's `declared` lacks what ended as a consequence.  Raises NetlabError as
    `allocate` does; `objects` is used up.
    """
    _keep_frame(objects, running)
    same_cidr = _keep_nodes(objects, running)
    _keep_pods(objects, running, same_cidr)
    _keep_replicas(objects, running, same_cidr, given, gone)
    _keep_services(objects, running)
    unready = {*running.unready, *gone}
    objects.passed = frozenset(pod.key for pod in running.pods if pod.key not in unready)
    if passed is not None:
        objects.passed = passed
    age = {pod.key: number for number, pod in enumerate(running.pods)}
    objects.pods.sort(key=lambda each: age.get(_pod(each), len(age)))  # the newest are last
    staying = {_pod(each) for each in objects.pods}
    # (A StatefulSet's pod comes back under its own name.)
    objects.leaving = [
        pod
        for pod in running.pods
        if pod.key not in staying and not pod.owner.startswith("StatefulSet/")
    ]
    found = Complaints()
    lab = allocate(objects, running.name, found)
    stale = _stale_slices(objects, running, lab, given)
    if stale:
        objects.slices = [each for each in objects.slices if _key(each) not in stale]
        objects.declared = [each for each in objects.declared if key_of(each.value) not in stale]
        found = Complaints()
        lab = allocate(objects, running.name, found)
    framed = replace(
        lab,
        name=running.name,
        pods=tuple(_listening(lab.pods, running, staying)),
        pod_cidr=running.pod_cidr,
        other_pod_cidrs=running.other_pod_cidrs,
        underlay=running.underlay,
        # What is outside may have come or gone since.
        overlay=replace(running.overlay, masquerade=lab.overlay.masquerade),
        service_proxy=running.service_proxy,
        iptables_backend=running.iptables_backend,
    )
    return framed, found.warnings()


def _key(stated: Stated[k8s_parts.Object]) -> Key:
    return type(stated.item).__name__, stated.namespace, stated.item.metadata.name  # type: ignore[attr-defined]


def _pod(stated: Stated[k8s_pods.Pod]) -> str:
    """`namespace/name`."""
    return f"{stated.namespace}/{stated.item.metadata.name}"


def _listening(
    pods: Iterable[model.Pod], running: model.Lab, staying: Collection[str]
) -> Iterator[model.Pod]:
    """Pods, those that stay as they are with every port that they answer on.

    No program stops listening because a Service goes.  (A port of a node may be another's now.)
    """
    before = {pod.key: pod for pod in running.pods}
    for pod in pods:
        was = before.get(pod.key)
        stays = was is not None and pod.key in staying and pod.ports == was.ports
        if was and stays and not pod.host_network and not set(was.listen) <= set(pod.listen):
            yield replace(pod, listen=tuple(dict.fromkeys((*pod.listen, *was.listen))))
        else:
            yield pod


# The networks


def _keep_frame(objects: Objects, running: model.Lab) -> None:
    """Networks that were derived from what the objects were do not follow what they are now."""
    stated = objects.lab
    spec = (stated.item.spec if stated else None) or lab_document.LabSpec()
    of_objects = {
        _canonical(cidr)
        for value in running.declared
        if value["kind"] == "ServiceCIDR"
        for cidr in value["spec"]["cidrs"]
    }
    derived = [cidr for cidr in running.service_cidrs if cidr not in of_objects]
    spec = replace(
        spec,
        podCIDR=",".join(running.pod_cidrs),
        serviceCIDR=spec.serviceCIDR or ",".join(derived) or None,
        underlay=lab_document.UnderlaySpec(
            cidr=_joined(running.underlay.cidr, running.underlay.other_cidr),
            gateway=_joined(running.underlay.gateway, running.underlay.other_gateway),
            mtu=running.underlay.mtu,
        ),
    )
    lab = lab_document.Lab(
        apiVersion="netlab/v1",
        metadata=lab_document.LabMetadata(name=running.name),
        spec=spec,
    )
    objects.lab = Stated(lab, stated.origin if stated else NOWHERE)


def _joined(*texts: str) -> str:
    """A field that has a value for each family."""
    return ",".join(filter(None, texts))


def _lacking(given: Iterable[str], decided: Iterable[str]) -> list[str]:
    """What was decided for families of which nothing is given."""
    families = set(map(family_of, given))
    return [text for text in decided if family_of(text) not in families]


def _is_other(given: Iterable[str], decided: Collection[str]) -> bool:
    """Whether something else is given than was decided for its family."""
    families = set(map(family_of, decided))
    return any(
        text not in decided and _canonical(text) not in decided
        for text in given
        if family_of(text) in families
    )


def _canonical(text: str) -> str:
    with contextlib.suppress(ValueError):
        return str(ip_network(text) if "/" in text else ip_address(text))
    return text


def _keep_nodes(objects: Objects, running: model.Lab) -> set[str]:
    """Complete the nodes; returns the names of those whose pod CIDR is what it was."""
    before = {node.name: node for node in running.nodes}
    if not objects.nodes:  # the one that netlab adds
        return set(before)
    same = set()
    declared = {key[2]: value for value in running.declared if (key := key_of(value))[0] == "Node"}
    for index, each in enumerate(objects.nodes):
        node = before.get(each.item.metadata.name)
        if node is None:
            continue
        spec = each.item.spec or k8s.NodeSpec()
        was = msgspec.convert(declared[node.name], k8s.Node).spec if node.name in declared else None
        if was is not None and (was.podCIDR, was.podCIDRs) == (spec.podCIDR, spec.podCIDRs):
            # What a cluster's node says may not be what its pods' network uses (cluster.py).
            spec = replace(spec, podCIDR=None, podCIDRs=list(node.pod_cidrs))
        cidrs = spec.podCIDRs or []
        given = [cidr for cidr in (spec.podCIDR, *cidrs) if cidr]
        if not _is_other(given, node.pod_cidrs):
            same.add(node.name)
        spec = replace(spec, podCIDRs=[*cidrs, *_lacking(given, node.pod_cidrs)])
        status = each.item.status or k8s.NodeStatus()
        listed = status.addresses or []
        given = [each.address for each in listed if each.type in ("InternalIP", "ExternalIP")]
        added = (k8s.NodeAddress("InternalIP", ip) for ip in _lacking(given, node.addresses))
        status = replace(status, addresses=[*listed, *added])
        objects.nodes[index] = Stated(replace(each.item, spec=spec, status=status), each.origin)
    return same


# Pods


def _keep_pods(objects: Objects, running: model.Lab, same_cidr: set[str]) -> None:
    """Complete the pods that are declared."""
    before = {pod.key: pod for pod in running.pods}
    nodes = {each.item.metadata.name for each in objects.nodes} or {running.nodes[0].name}
    for index, each in enumerate(objects.pods):
        pod = before.get(_pod(each))
        if pod is None:
            continue
        spec = each.item.spec or k8s_pods.PodSpec()
        status = each.item.status or k8s_pods.PodStatus()
        ips = status.podIPs or []
        given = [ip for ip in (status.podIP, *(entry.ip for entry in ips)) if ip]
        moves = _is_other(given, pod.addresses)
        if not spec.nodeName and pod.node in nodes and not moves:
            spec = replace(spec, nodeName=pod.node)
        own_address = not spec.hostNetwork and not pod.host_network
        if own_address and spec.nodeName == pod.node and pod.node in same_cidr:
            added = (k8s_pods.PodIP(ip) for ip in _lacking(given, pod.addresses))
            status = replace(status, podIPs=[*ips, *added])
        objects.pods[index] = Stated(replace(each.item, spec=spec, status=status), each.origin)


def _keep_replicas(
    objects: Objects,
    running: model.Lab,
    same_cidr: set[str],
    given: Collection[Key],
    gone: Collection[str],
) -> None:
    """Write out the pods that controllers made and that live on; take away those that do not."""
    stated = {pod.key: pod for pod in stated_pods(objects, running.families, Complaints())}
    owned: dict[tuple[str, str], list[model.Pod]] = {}
    were_stated = {f"{key[1]}/{key[2]}" for key in map(key_of, running.declared) if key[0] == "Pod"}
    for pod in running.pods:
        if pod.key in stated or (pod.key not in were_stated and pod.key not in gone):
            owned.setdefault((pod.namespace, pod.owner), []).append(pod)
    templates = _templates(running)
    ended: set[str] = set()
    for controller in objects.controllers:
        key = _key(controller)
        own = owned.get((controller.namespace, f"{key[0]}/{key[2]}"), [])
        if templates.get(key, controller.item.spec.template) != controller.item.spec.template:
            ended.update(pod.key for pod in own)
        elif isinstance(controller.item, k8s_pods.DaemonSet):
            ended.update(_on_other_nodes(objects, controller, own))
        elif key in given:
            ended.update(_surplus(controller, own, stated))
        ended -= {f"{key[1]}/{key[2]}" for key in given if key[0] == "Pod"}
        objects.pods += [
            _written_out(pod, controller)
            for pod in own
            if pod.key not in stated and pod.key not in ended and pod.node in same_cidr
        ]
    ended &= stated.keys()
    if ended:
        objects.pods = [each for each in objects.pods if _pod(each) not in ended]
        objects.declared = [
            each for each in objects.declared if _pod_key(key_of(each.value)) not in ended
        ]


def _pod_key(key: Key) -> str | None:
    return f"{key[1]}/{key[2]}" if key[0] == "Pod" else None


def _templates(running: model.Lab) -> dict[Key, k8s_pods.PodTemplate]:
    """What the controllers of a lab make their pods of."""
    found = {}
    for value in running.declared:
        kind = k8s.KINDS.get((value["apiVersion"].rpartition("/")[0], value["kind"]))
        if kind is not None and issubclass(kind, k8s_pods.Controller):
            found[key_of(value)] = msgspec.convert(value, kind).spec.template
    return found


def _on_other_nodes(
    objects: Objects, controller: Stated[k8s_pods.Controller], own: list[model.Pod]
) -> Iterator[str]:
    """Pods of a DaemonSet on nodes that its nodeSelector leaves out."""
    spec = controller.item.spec.template.spec or k8s_pods.PodSpec()
    wanted = (spec.nodeSelector or {}).items()
    for each in objects.nodes:
        name = each.item.metadata.name
        labels = {"kubernetes.io/hostname": name, **(each.item.metadata.labels or {})}
        if not wanted <= labels.items():
            yield from (pod.key for pod in own if pod.node == name)


def _surplus(
    controller: Stated[k8s_pods.Controller], own: list[model.Pod], stated: dict[str, DraftPod]
) -> list[str]:
    """The newest of a controller's pods, as far as it has more than `replicas`."""
    alive = [pod.key for pod in own if pod.key not in stated or not stated[pod.key].terminating]
    replicas = controller.item.spec.replicas
    return alive[(1 if replicas is None else replicas) + surge_of(controller.item) :]


def _written_out(pod: model.Pod, controller: Stated[k8s_pods.Controller]) -> Stated[k8s_pods.Pod]:
    kind, _, name = pod.owner.partition("/")
    metadata = k8s_parts.Metadata(
        name=pod.name,
        namespace=pod.namespace,
        labels=pod.labels,
        ownerReferences=[k8s_parts.OwnerReference(kind, name, controller=True)],
    )
    spec = replace(controller.item.spec.template.spec or k8s_pods.PodSpec(), nodeName=pod.node)
    ips = () if pod.host_network else pod.addresses
    status = k8s_pods.PodStatus(podIPs=[k8s_pods.PodIP(ip) for ip in ips])
    return Stated(k8s_pods.Pod(metadata=metadata, spec=spec, status=status), controller.origin)


# Services


def _keep_services(objects: Objects, running: model.Lab) -> None:
    before = {service.key: service for service in running.services}
    objects.balanced = {service.key: service.load_balancer_ips for service in running.services}
    for index, each in enumerate(objects.services):
        service = before.get(f"{each.namespace}/{each.item.metadata.name}")
        spec = each.item.spec
        if service is None or spec is None or spec.type == "ExternalName":
            continue
        spec = _with_cluster_ips(spec, service)
        if spec.type in ("NodePort", "LoadBalancer"):
            spec = _with_node_ports(spec, service)
        objects.services[index] = Stated(replace(each.item, spec=spec), each.origin)


def _with_cluster_ips(spec: k8s.ServiceSpec, service: model.Service) -> k8s.ServiceSpec:
    """A Service keeps the cluster IPs of the families that it still has."""
    ips = spec.clusterIPs or []
    given = [ip for ip in (spec.clusterIP, *ips) if ip]
    if service.cluster_ip in ("", "None") or "None" in given:
        return spec
    wanted = spec.ipFamilies or service.ip_families
    decided = [ip for of in wanted for ip in service.cluster_ips if family_of(ip) == of]
    kept = _lacking(given, decided)
    if spec.ipFamilyPolicy in (None, "SingleStack"):
        kept = [] if given else kept[:1]
    return replace(spec, clusterIPs=[*ips, *kept])


def _with_node_ports(spec: k8s.ServiceSpec, service: model.Service) -> k8s.ServiceSpec:
    """Ports that are still there keep their node ports, as does the health check."""
    decided = {(port.port, port.protocol): port.node_port for port in service.ports}
    given = {(port.nodePort, port.protocol or "TCP") for port in spec.ports or ()}
    ports = []
    for port in spec.ports or ():
        protocol = port.protocol or "TCP"
        node_port = port.nodePort or decided.get((port.port, protocol))
        if not port.nodePort and (node_port, protocol) not in given:
            port = replace(port, nodePort=node_port)
        ports.append(port)
    health = spec.healthCheckNodePort
    if spec.type == "LoadBalancer" and spec.externalTrafficPolicy == "Local":
        health = health or service.health_check_node_port
    return replace(spec, ports=ports, healthCheckNodePort=health)


# EndpointSlices


def _stale_slices(
    objects: Objects, before: model.Lab, after: model.Lab, given: Collection[Key]
) -> set[Key]:
    """Slices of Services with selectors that no longer tell how things are.

    Slices that the change itself states are as it states them.
    """
    slices: dict[str, list[Key]] = {}
    for each in objects.slices:
        name = (each.item.metadata.labels or {}).get(_SERVICE_NAME)
        slices.setdefault(f"{each.namespace}/{name}", []).append(_key(each))
    earlier = {service.key: service for service in before.services}
    stale: set[Key] = set()
    pods = _changed_pods(before, after) if slices else []
    for service in after.services:
        own = slices.get(service.key, [])
        known = earlier.get(service.key)
        if not own or known is None or not service.selector or any(key in given for key in own):
            continue
        wanted = service.selector.items()
        if service != known or any(
            pod.namespace == service.namespace and wanted <= pod.labels.items() for pod in pods
        ):
            stale.update(own)
    return stale


def _changed_pods(before: model.Lab, after: model.Lab) -> list[model.Pod]:
    """Pods that come, go or change, as they were and as they are."""
    # (What a pod answers on follows from the Services.)
    old, new = ({pod.key: replace(pod, listen=()) for pod in lab.pods} for lab in (before, after))
    return [
        pod
        for one, other in ((old, new), (new, old))
        for key, pod in one.items()
        if other.get(key) != pod
    ]
