"""The objects of a real cluster: what they lack is filled in, and what nobody says is told.

Its settings (`cluster_settings`) stand in for fields that `kind: Lab` leaves out.

Objects come from a cluster if an API server gave one of them a `uid`.  Of such a topology
everything that was decided without a source is told as an assumption.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec.structs import fields, replace

from netlab.topology import kubernetes as k8s
from netlab.topology import kubernetes_pods as k8s_pods
from netlab.topology import lab_document, model
from netlab.topology.addresses import family_of
from netlab.topology.cluster_settings import Cluster, read_settings
from netlab.topology.objects import Objects, Stated
from netlab.topology.places import Complaints, Document, Origin, Path
from netlab.topology.pod_networks import derived, drop_foreign_cidrs


def complete(
    objects: Objects, name: str, found: Complaints, own_interfaces: bool = False
) -> Cluster | None:
    """Give the objects what a cluster's settings say; None if they come from no cluster.

    A field that the Lab states is not touched.  With `own_interfaces` kube-proxy goes by the
    interfaces of the cluster's nodes, not by the lab's bridge.
    """
    dump = objects.of_cluster
    if dump:
        _add_nodes(objects, found)
        _leave_out_pending(objects, found)
    if not dump and not objects.settings:
        return None
    stated = objects.lab
    origin = stated.origin if stated else _origin(objects)
    cluster = Cluster(origin, stated.item.metadata.name if stated else name, own_interfaces)
    if stated and stated.item.spec:
        cluster.own = _stated_fields(stated.item.spec)
    read_settings(objects, cluster, found)
    if stated and stated.item.spec:
        cluster.spec = _merged(stated.item.spec, cluster.spec)
        cluster.told |= dict.fromkeys(_stated_fields(stated.item.spec), f"Lab {cluster.name}")
    if dump:
        drop_foreign_cidrs(objects, found)
        _derive(objects, cluster)
    if stated or cluster.spec != lab_document.LabSpec():
        metadata = lab_document.LabMetadata(name=cluster.name)
        lab = lab_document.Lab(apiVersion="netlab/v1", metadata=metadata, spec=cluster.spec)
        objects.lab = Stated(lab, origin)
    return cluster if dump else None


def _origin(objects: Objects) -> Origin:
    documents = [*objects.settings, *objects.declared]
    return documents[0].origin


def _merged(first: lab_document.LabSpec, second: lab_document.LabSpec) -> lab_document.LabSpec:
    """Each field of the first that is there, else that of the second."""
    return replace(second, **{name: getattr(first, name) for name in _stated_fields(first)})


def _stated_fields(spec: lab_document.LabSpec) -> list[str]:
    return [each.name for each in fields(spec) if getattr(spec, each.name) is not None]


def _derive(objects: Objects, cluster: Cluster) -> None:
    """What the addresses of nodes and pods tell where no setting does."""
    network = derived(objects) if "podCIDR" not in cluster.told else None
    if network is None:
        return
    cluster.spec = replace(cluster.spec, podCIDR=network.cidr)
    cluster.why["podCIDR"] = network.why
    if network.of_nodes and cluster.spec.overlay is None and "overlay" not in cluster.why:
        cluster.spec = replace(cluster.spec, overlay=lab_document.OverlaySpec("host-gw"))
        cluster.why["overlay"] = "the nodes' own network brings packets to pods"
    if network.of_nodes and "serviceProxy" not in cluster.told:
        # With the bridges' network every pod would count as a stranger.
        proxy = lab_document.ServiceProxySpec(clusterCIDR="")
        cluster.spec = replace(cluster.spec, serviceProxy=proxy)


# What the dump lacks


def _add_nodes(objects: Objects, found: Complaints) -> None:
    """Nodes that pods of a cluster run on, and that are not among its objects.

    Without any Node also those that endpoints name; if nobody names one, the lab's own is told.
    """
    known = {each.item.metadata.name for each in objects.nodes}
    missing: dict[str, tuple[Stated[Any], Path, list[str]]] = {}
    for each in objects.pods:
        name = each.item.spec.nodeName if each.item.spec else None
        if name and name not in known:
            status = each.item.status or k8s_pods.PodStatus()
            _, _, addresses = missing.setdefault(name, (each, ("spec", "nodeName"), []))
            for ip in (status.hostIP, *(host.ip for host in status.hostIPs or ())):
                if ip and ip not in addresses:
                    addresses.append(ip)
    for by, path, name in _nodes_of_endpoints(objects) if not known else ():
        missing.setdefault(name, (by, path, []))
    for name, (by, path, addresses) in missing.items():
        listed = [{"type": "InternalIP", "address": ip} for ip in addresses]
        value: dict[str, Any] = {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": name},
            "status": {"addresses": listed},
        }
        objects.nodes.append(Stated(msgspec.convert(value, k8s.Node), by.origin))
        objects.declared.append(Document(value, by.origin))
        why = "runs on it" if isinstance(by.item, k8s_pods.Pod) else "names it"
        where = f"; it is at {' and '.join(addresses)}, its hostIP" if addresses else ""
        message = f"Node {name} is not in the file: {by.title} {why}{where}"
        found.assumption(message, by.origin, *path)
    if not objects.nodes:
        found.assumption("one node, node1: there is no Node, and nothing names one")


def _nodes_of_endpoints(
    objects: Objects,
) -> Iterator[tuple[Stated[k8s.EndpointSlice] | Stated[k8s.Endpoints], Path, str]]:
    """The nodes that endpoints name, with who names them and where."""
    for stated in objects.slices:
        for index, entry in enumerate(stated.item.endpoints or ()):
            if entry.nodeName:
                yield stated, ("endpoints", index, "nodeName"), entry.nodeName
    for each in objects.endpoints:
        for index, subset in enumerate(each.item.subsets or ()):
            for name in ("addresses", "notReadyAddresses"):
                for position, address in enumerate(getattr(subset, name) or ()):
                    if address.nodeName:
                        path = ("subsets", index, name, position, "nodeName")
                        yield each, path, address.nodeName


def _leave_out_pending(objects: Objects, found: Complaints) -> None:
    """Pods that have no address yet."""
    pending = {id(each.origin) for each in objects.pods if _is_pending(each.item)}
    if pending:
        objects.pods = [each for each in objects.pods if id(each.origin) not in pending]
        objects.declared = [
            each
            for each in objects.declared
            if each.value["kind"] != "Pod" or id(each.origin) not in pending
        ]
        message = f"left out, as they have no address yet: {len(pending)} pods"
        found.warning("no-part", message)


def _is_pending(pod: k8s_pods.Pod) -> bool:
    status = pod.status or k8s_pods.PodStatus()
    return status.phase == "Pending" and not (status.podIP or status.podIPs)


# What nobody says


def tell_assumptions(cluster: Cluster, objects: Objects, lab: model.Lab, found: Complaints) -> None:
    """Everything in a cluster's lab that was decided without a source."""
    for message in _assumptions(cluster, objects, lab):
        found.assumption(message)
    for each in objects.nodes:
        listed = (each.item.status.addresses if each.item.status else None) or ()
        theirs = {
            family_of(entry.address)
            for entry in listed
            if entry.type in ("InternalIP", "ExternalIP")
        }
        decided = [
            ip for ip in lab.node(each.item.metadata.name).addresses if family_of(ip) not in theirs
        ]
        if decided:
            none = "no address" if not theirs else f"no {family_of(decided[0])} address"
            message = f"{each.title} has {none} in the file; it is given {' and '.join(decided)}"
            found.warning("no-address", message, each.origin)


def _assumptions(cluster: Cluster, objects: Objects, lab: model.Lab) -> Iterator[str]:
    told = cluster.told
    if "podCIDR" not in told:
        why = cluster.why.get("podCIDR", "neither nodes nor pods have addresses of pods")
        yield f"pod CIDR {','.join(lab.pod_cidrs)}: {why}"
    if "serviceCIDR" not in told and not objects.service_cidrs:
        cidrs = ",".join(lab.service_cidrs)
        yield f"Service CIDR {cidrs}: there is no ServiceCIDR and no ConfigMap kubeadm-config"
    if "overlay" not in told:
        overlay = lab.overlay
        how = f" (VNI {overlay.vni}, port {overlay.port})" if overlay.type == "vxlan" else ""
        why = cluster.why.get("overlay", "nothing says how pods reach other nodes")
        yield f"overlay {overlay.type}{how}: {why}"
    if "serviceProxy" not in told:
        proxy = lab.service_proxy
        why = "there is no ConfigMap kube-proxy"
        yield f"kube-proxy in mode {proxy.mode}, clusterCIDR {proxy.clusterCIDR or 'none'}: {why}"
    if "underlay" not in told:
        cidrs = ", ".join(filter(None, (lab.underlay.cidr, lab.underlay.other_cidr)))
        yield f"all nodes are on one network, {cidrs}, with an MTU of {lab.underlay.mtu}"
    if objects.services and not objects.slices:
        yield from _without_slices(objects)
    yield "what pods send to the outside keeps their addresses, whatever the CNI plugin does"


def _without_slices(objects: Objects) -> Iterator[str]:
    """A dump of which EndpointSlices were left out."""
    told = {(each.namespace, each.item.metadata.name) for each in objects.endpoints}
    none = [
        each.title
        for each in objects.services
        if each.item.spec
        and not each.item.spec.selector
        and each.item.spec.type != "ExternalName"
        and (each.namespace, each.item.metadata.name) not in told
    ]
    message = "endpoints are the pods that selectors match: there is no EndpointSlice"
    if none:
        more = f" and {len(none) - 5} more" if len(none) > 5 else ""
        message += f", so none for what has no selector, {', '.join(none[:5])}{more}"
    yield message
