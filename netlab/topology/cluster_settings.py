"""What the settings of a real cluster say of its networks: ConfigMaps, Calico's pools, annotations.

They are of:

* kube-proxy (ConfigMap kube-system/kube-proxy, of EKS kube-proxy-config): KubeProxyConfiguration,
  that is `serviceProxy`;
* kubeadm (ConfigMap kube-system/kubeadm-config): podSubnet and serviceSubnet;
* flannel (ConfigMap kube-flannel-cfg, annotations of nodes): pod CIDR and overlay;
* Calico (IPPools): pod CIDR and overlay;
* kindnet (its pods): overlay.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_network
from typing import Any

import msgspec
from msgspec.structs import fields, replace

from netlab.topology import lab_document, model
from netlab.topology.addresses import Network, family, is_network, smallest_network
from netlab.topology.allocate import FEATURE_GATES, NODE_PORT_ADDRESSES, PROXY_MODES
from netlab.topology.convert import shown
from netlab.topology.model import Family
from netlab.topology.objects import Objects
from netlab.topology.overlays import KINDS as OVERLAY_KINDS
from netlab.topology.places import Complaints, Document, Origin, c_loader
from netlab.topology.pod_networks import holds_nodes

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


def read_settings(objects: Objects, cluster: Cluster, found: Complaints) -> None:
    """Fill the fields of the spec that some setting tells, and note which one."""
    for each in objects.settings:
        _read(each, cluster, found)
    _read_pools([each for each in objects.settings if each.value["kind"] == "IPPool"], cluster)
    _pod_cidr_of_proxy(cluster, objects)
    _read_annotations(objects, cluster, found)


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
    if kind not in OVERLAY_KINDS:
        message = f"overlay vxlan: flannel's is {kind}, which this version does not build"
        if "overlay" not in cluster.own:
            found.assumption(message, origin)
        kind = "vxlan"
    vni, port = backend.get("VNI"), backend.get("Port")
    overlay = lab_document.OverlaySpec(type=kind)
    if kind == "vxlan":
        overlay = lab_document.OverlaySpec(
            type=kind,
            vni=vni if isinstance(vni, int) else None,
            port=port if isinstance(port, int) else None,
        )
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
