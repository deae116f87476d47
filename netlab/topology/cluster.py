"""The objects of a real cluster: what its ConfigMaps and pools say of the networks, and what nobody
says.

Where a topology holds them, these stand in for fields that `kind: Lab` leaves out:

* ConfigMap kube-system/kube-proxy (EKS: kube-proxy-config): KubeProxyConfiguration, that is
  `serviceProxy`;
* ConfigMap kube-system/kubeadm-config: podSubnet and serviceSubnet;
* ConfigMap kube-flannel-cfg: pod CIDR and overlay;
* IPPools of Calico: pod CIDR and overlay;
* what flannel writes on nodes, and kindnet's pods: overlay.

Objects come from a cluster if an API server gave one of them a `uid`.  Of such a topology
everything that was decided without a source is told as an assumption.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_network
from typing import Any

import msgspec
from msgspec.structs import fields, replace

from netlab.topology import kubernetes as k8s
from netlab.topology import lab_document, model
from netlab.topology.addresses import Network, family, family_of, is_network, smallest_network
from netlab.topology.allocate import FEATURE_GATES, NODE_PORT_ADDRESSES, OVERLAYS, PROXY_MODES
from netlab.topology.convert import shown
from netlab.topology.model import Family
from netlab.topology.objects import Objects, Stated
from netlab.topology.places import Complaints, Document, Origin, Path, c_loader
from netlab.topology.pod_networks import derived, drop_foreign_cidrs, holds_nodes

_CALICO_VNI, _CALICO_PORT = 4096, 4789  # FelixConfiguration: vxlanVNI, vxlanPort


@dataclass(slots=True)
class Cluster:
    """What a cluster's objects say beside Kubernetes' own kinds, and who said it."""

    origin: Origin
    name: str
    own_interfaces: bool = False  # detectLocal names those of the cluster's nodes
    own: Collection[str] = ()  # fields of the spec that the file's Lab states
    spec: lab_document.LabSpec = field(default_factory=lab_document.LabSpec)
    told: dict[str, str] = field(default_factory=dict)  # field of the spec → who told it
    why: dict[str, str] = field(default_factory=dict)  # the same → why nobody's telling is this


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
    for each in objects.settings:
        _read(each, cluster, found)
    _read_pools([each for each in objects.settings if each.value["kind"] == "IPPool"], cluster)
    _pod_cidr_of_proxy(cluster, objects)
    _read_annotations(objects, cluster, found)
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
            status = each.item.status or k8s.PodStatus()
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
        why = "runs on it" if isinstance(by.item, k8s.Pod) else "names it"
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


def _is_pending(pod: k8s.Pod) -> bool:
    status = pod.status or k8s.PodStatus()
    return status.phase == "Pending" and not (status.podIP or status.podIPs)


# What ConfigMaps and pools say


def _read(document: Document, cluster: Cluster, found: Complaints) -> None:
    value = document.value
    name = value["metadata"]["name"]
    if value["kind"] != "ConfigMap":
        return
    data = value.get("data") if isinstance(value.get("data"), dict) else {}
    if name in ("kube-proxy", "kube-proxy-config"):
        key = "config.conf" if name == "kube-proxy" else "config"
        settings = _inside(data, key, document, found)
        _read_proxy(settings, document, cluster, found)
    elif name == "kubeadm-config":
        networking = _part(_inside(data, "ClusterConfiguration", document, found), "networking")
        for theirs, ours in (("podSubnet", "podCIDR"), ("serviceSubnet", "serviceCIDR")):
            _take(cluster, ours, _networks(networking.get(theirs)), "ConfigMap kubeadm-config")
    elif name == "kube-flannel-cfg":
        _read_flannel(_inside(data, "net-conf.json", document, found), document, cluster, found)


def _inside(
    data: Mapping[str, Any], key: str, document: Document, found: Complaints
) -> dict[str, Any]:
    """The YAML or JSON in a text of a ConfigMap; empty, and warned of, if it is none."""
    import yaml

    text = data.get(key)
    try:
        value = yaml.load(text, Loader=c_loader()) if isinstance(text, str) else None
    except yaml.YAMLError:
        value = None
    if isinstance(value, dict):
        return value
    title = f"ConfigMap {document.value['metadata']['name']}"
    message = f"{title} is not heeded: its {key} is missing or cannot be read"
    found.warning("no-settings", message, document.origin, "data")
    return {}


def _part(value: Mapping[str, Any], key: str) -> dict[str, Any]:
    part = value.get(key)
    return part if isinstance(part, dict) else {}


def _networks(text: Any) -> str | None:
    """Networks joined by commas, if that is what it is."""
    parts = text.replace(" ", "").split(",") if isinstance(text, str) and text else []
    if not parts or not all(map(is_network, parts)):
        return None
    return ",".join(str(ip_network(part, strict=False)) for part in parts)


def _take(cluster: Cluster, name: str, value: Any, source: str) -> None:
    """Fill a field that nobody told before."""
    if value is not None and name not in cluster.told:
        cluster.spec = replace(cluster.spec, **{name: value})
        cluster.told[name] = source


def _read_proxy(
    settings: dict[str, Any], document: Document, cluster: Cluster, found: Complaints
) -> None:
    """KubeProxyConfiguration: the fields that `serviceProxy` has, as far as they are right."""
    kept: dict[str, Any] = {}
    for each in fields(lab_document.ServiceProxySpec):
        value = settings.get(each.name)
        if value in (None, "", {}, []):
            continue
        kept[each.name] = _known(each.name, value)
    mode = settings.get("mode") or model.ServiceProxy().mode
    if mode not in PROXY_MODES:
        instead = model.ServiceProxy().mode
        message = f"mode {instead}: the cluster's is {mode}, which this version does not build"
        if "serviceProxy" not in cluster.own:
            found.assumption(message, document.origin, "data")
        mode = instead
    kept["mode"] = mode
    proxy = _converted(kept, document, found)
    local = proxy.detectLocal or lab_document.DetectLocalSpec()
    of_interfaces = proxy.detectLocalMode in ("BridgeInterface", "InterfaceNamePrefix")
    if of_interfaces and not cluster.own_interfaces:
        theirs = " ".join(filter(None, (local.bridgeInterface, local.interfaceNamePrefix)))
        if theirs != "cbr0" and "serviceProxy" not in cluster.own:
            message = f"pods are behind the bridge cbr0: on the cluster's nodes behind {theirs}"
            found.assumption(message, document.origin, "data")
        local = lab_document.DetectLocalSpec(bridgeInterface="cbr0")
        proxy = replace(proxy, detectLocalMode="BridgeInterface", detectLocal=local)
    # Without one nothing counts as local: that is not the lab's default.
    proxy = replace(proxy, clusterCIDR=_networks(settings.get("clusterCIDR")) or "")
    if settings:
        _take(cluster, "serviceProxy", proxy, "ConfigMap kube-proxy")


def _converted(
    kept: dict[str, Any], document: Document, found: Complaints
) -> lab_document.ServiceProxySpec:
    """The fields that are right; each that is not is warned of."""
    wrong: list[str] = []
    if "clusterCIDR" in kept and _networks(kept["clusterCIDR"]) is None:
        wrong.append(f"clusterCIDR is {shown(kept.pop('clusterCIDR'))}; it takes CIDRs")
    if isinstance(addresses := kept.get("nodePortAddresses"), list):
        right = [each for each in addresses if _is_node_port_address(each)]
        strange = [shown(each) for each in addresses if each not in right]
        if strange:
            wrong.append(f"nodePortAddresses has {', '.join(strange)}; it takes CIDRs")
        kept["nodePortAddresses"] = right
    try:
        proxy = msgspec.convert(kept, lab_document.ServiceProxySpec)
    except msgspec.ValidationError:
        from netlab.topology.mistakes import mistakes_in

        for mistake in mistakes_in(kept, lab_document.ServiceProxySpec):
            wrong.append(mistake.message)
            *above, name = mistake.path
            part: Any = kept
            for step in above:
                part = part[step]
            del part[name]
        proxy = msgspec.convert(kept, lab_document.ServiceProxySpec)
    for each in wrong:
        title = f"ConfigMap {document.value['metadata']['name']}"
        message = f"{title}: {each}; it is not heeded"
        found.warning("no-settings", message, document.origin, "data")
    return proxy


def _is_node_port_address(value: Any) -> bool:
    return isinstance(value, str) and (value in NODE_PORT_ADDRESSES or is_network(value))


def _known(name: str, value: Any) -> Any:
    """What a lab knows of a field of KubeProxyConfiguration."""
    inner: dict[str, type[lab_document.Strict]] = {
        "detectLocal": lab_document.DetectLocalSpec,
        "iptables": lab_document.IPTablesSpec,
        "nftables": lab_document.NFTablesSpec,
        "conntrack": lab_document.ConntrackSpec,
    }
    if name in inner and isinstance(value, dict):
        names = {each.name for each in fields(inner[name])}
        return {key: part for key, part in value.items() if key in names and part is not None}
    if name == "featureGates" and isinstance(value, dict):
        return {gate: on for gate, on in value.items() if gate in FEATURE_GATES}
    return value


def _read_flannel(
    settings: dict[str, Any], document: Document, cluster: Cluster, found: Complaints
) -> None:
    networks = [settings.get("Network") if settings.get("EnableIPv4") is not False else None]
    networks.append(settings.get("IPv6Network") if settings.get("EnableIPv6") else None)
    source = "ConfigMap kube-flannel-cfg"
    _take(
        cluster,
        "podCIDR",
        _networks(",".join(each for each in networks if isinstance(each, str))),
        source,
    )
    _read_backend(_part(settings, "Backend"), source, document.origin, cluster, found)


def _read_backend(
    backend: Mapping[str, Any], source: str, origin: Origin, cluster: Cluster, found: Complaints
) -> None:
    """How flannel sends packets to other nodes."""
    kind = backend.get("Type")
    if not isinstance(kind, str):
        return
    if kind not in OVERLAYS:
        message = f"overlay vxlan: flannel's is {kind}, which this version does not build"
        if "overlay" not in cluster.own:
            found.assumption(message, origin)
        kind = "vxlan"
    numbers = {"vni": backend.get("VNI"), "port": backend.get("Port")}
    given = {name: number for name, number in numbers.items() if isinstance(number, int)}
    overlay = lab_document.OverlaySpec(type=kind, **(given if kind == "vxlan" else {}))
    _take(cluster, "overlay", overlay, source)


def _read_pools(pools: list[Document], cluster: Cluster) -> None:
    """Calico's: blocks of all pools are pod addresses; the first pool tells how they travel."""
    specs = [_part(each.value, "spec") for each in pools]
    specs = [spec for spec in specs if not spec.get("disabled") and _networks(spec.get("cidr"))]
    if not specs:
        return
    source = f"{len(specs)} IPPool{'s' * (len(specs) != 1)} of Calico"
    by_family: dict[Family, list[Network]] = {}
    for spec in specs:
        cidr = ip_network(spec["cidr"], strict=False)
        by_family.setdefault(family(cidr), []).append(cidr)
    holding = (smallest_network(cidrs, cidrs[0].max_prefixlen) for cidrs in by_family.values())
    _take(cluster, "podCIDR", ",".join(map(str, holding)), source)
    vxlan = specs[0].get("vxlanMode") or "Never"
    ipip = specs[0].get("ipipMode") or "Never"
    if vxlan == "Always":
        overlay = lab_document.OverlaySpec("vxlan", _CALICO_VNI, _CALICO_PORT)
        _take(cluster, "overlay", overlay, source)
    elif ipip == "Always":
        cluster.why["overlay"] = "Calico's is ipip, which is not built"
    elif "overlay" not in cluster.told:  # within one subnet also if CrossSubnet
        cluster.spec = replace(cluster.spec, overlay=lab_document.OverlaySpec("host-gw"))
        cluster.why["overlay"] = "Calico's has no tunnel between these nodes, and no BGP runs here"


def _read_annotations(objects: Objects, cluster: Cluster, found: Complaints) -> None:
    """Of nodes: flannel writes its backend there, with k3s too, which has no ConfigMap for it."""
    if "overlay" in cluster.told or "overlay" in cluster.why:
        return
    for document in objects.declared:
        metadata = document.value["metadata"]
        backend = _part(metadata, "annotations").get("flannel.alpha.coreos.com/backend-type")
        if document.value["kind"] == "Node" and backend:
            origin = document.origin
            _read_backend({"Type": backend}, f"Node {metadata['name']}", origin, cluster, found)
            return
    if any((pod.item.metadata.labels or {}).get("k8s-app") == "kindnet" for pod in objects.pods):
        _take(cluster, "overlay", lab_document.OverlaySpec("host-gw"), "kindnet")


def _pod_cidr_of_proxy(cluster: Cluster, objects: Objects) -> None:
    """kube-proxy's clusterCIDR, if nobody else told the pod CIDR and no node lives there."""
    proxy = cluster.spec.serviceProxy
    cidrs = _networks(proxy.clusterCIDR) if proxy else None
    if cidrs and any(holds_nodes(ip_network(cidr), objects) for cidr in cidrs.split(",")):
        return
    if proxy is not None:
        _take(
            cluster, "podCIDR", _networks(proxy.clusterCIDR), "ConfigMap kube-proxy (clusterCIDR)"
        )


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
