"""Kubernetes objects: of each kind the fields that the datapath depends on, under their own names.

Everything else in an object is ignored.  A field may be null, which means that it is left out, as
in Kubernetes.  Names are checked here, by their types; what needs more than one field is checked
where it is used.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta

from netlab.topology.kubernetes_networking import (
    Ingress,
    IngressClass,
    NetworkPolicy,
)
from netlab.topology.kubernetes_parts import (
    LabelMetadata,
    Labels,
    Metadata,
    Object,
    Part,
    Port,
    PortOrZero,
)
from netlab.topology.kubernetes_pods import (
    DaemonSet,
    Deployment,
    Pod,
    ReplicaSet,
    StatefulSet,
)
from netlab.topology.model import (
    Family,
    Protocol,
    ServiceType,
    TrafficDistribution,
    TrafficPolicy,
)

# Node


class NodeAddress(Part, frozen=True):
    type: str
    address: str


class NodeSpec(Part, frozen=True):
    podCIDR: str | None = None
    podCIDRs: list[str] | None = None


class NodeStatus(Part, frozen=True):
    addresses: list[NodeAddress] | None = None


class Node(Object, frozen=True, tag="Node"):
    metadata: Metadata
    spec: NodeSpec | None = None
    status: NodeStatus | None = None


# Service


class ServicePort(Part, frozen=True):
    port: Port
    name: str | None = None
    protocol: Protocol | None = None
    targetPort: PortOrZero | str | None = None
    nodePort: PortOrZero | None = None


class ClientIPConfig(Part, frozen=True):
    timeoutSeconds: Annotated[int, Meta(ge=1, le=86400)] | None = None


class SessionAffinityConfig(Part, frozen=True):
    clientIP: ClientIPConfig | None = None


class ServiceSpec(Part, frozen=True):
    type: ServiceType | None = None
    externalName: str | None = None
    clusterIP: str | None = None
    clusterIPs: list[str] | None = None
    ipFamilies: list[Family] | None = None
    ipFamilyPolicy: Literal["SingleStack", "PreferDualStack", "RequireDualStack"] | None = None
    selector: Labels | None = None
    ports: list[ServicePort] | None = None
    externalIPs: list[str] | None = None
    loadBalancerSourceRanges: list[str] | None = None
    loadBalancerIP: str | None = None
    loadBalancerClass: str | None = None
    allocateLoadBalancerNodePorts: bool | None = None
    sessionAffinity: Literal["None", "ClientIP"] | None = None
    sessionAffinityConfig: SessionAffinityConfig | None = None
    externalTrafficPolicy: TrafficPolicy | None = None
    internalTrafficPolicy: TrafficPolicy | None = None
    healthCheckNodePort: PortOrZero | None = None
    publishNotReadyAddresses: bool | None = None
    trafficDistribution: TrafficDistribution | None = None


class LoadBalancerIngress(Part, frozen=True):
    ip: str | None = None
    ipMode: Literal["VIP", "Proxy"] | None = None


class LoadBalancerStatus(Part, frozen=True):
    ingress: list[LoadBalancerIngress] | None = None


class ServiceStatus(Part, frozen=True):
    loadBalancer: LoadBalancerStatus | None = None


class ServiceMetadata(LabelMetadata, frozen=True, kw_only=True):
    annotations: Labels | None = None


class Service(Object, frozen=True, tag="Service"):
    metadata: ServiceMetadata
    spec: ServiceSpec | None = None
    status: ServiceStatus | None = None


# Endpoints


class ObjectReference(Part, frozen=True):
    kind: str | None = None
    name: str | None = None
    namespace: str | None = None


class EndpointPort(Part, frozen=True):
    port: Port | None = None
    name: str | None = None
    protocol: Protocol | None = None


class EndpointAddress(Part, frozen=True):
    ip: str
    nodeName: str | None = None
    targetRef: ObjectReference | None = None


class EndpointSubset(Part, frozen=True):
    addresses: list[EndpointAddress] | None = None
    notReadyAddresses: list[EndpointAddress] | None = None
    ports: list[EndpointPort] | None = None


class Endpoints(Object, frozen=True, tag="Endpoints"):
    metadata: Metadata
    subsets: list[EndpointSubset] | None = None


class EndpointConditions(Part, frozen=True):
    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class NamedHint(Part, frozen=True):
    name: str


class EndpointHints(Part, frozen=True):
    forZones: list[NamedHint] | None = None
    forNodes: list[NamedHint] | None = None


class SliceEndpoint(Part, frozen=True):
    addresses: list[str]
    conditions: EndpointConditions | None = None
    nodeName: str | None = None
    targetRef: ObjectReference | None = None
    hints: EndpointHints | None = None


class EndpointSlice(Object, frozen=True, tag="EndpointSlice"):
    metadata: Metadata
    addressType: Literal["IPv4", "IPv6", "FQDN"]
    endpoints: list[SliceEndpoint] | None = None
    ports: list[EndpointPort] | None = None


# The rest


class ConfigMap(Object, frozen=True, tag="ConfigMap"):
    metadata: Metadata
    data: dict[str, str] | None = None


class ServiceCIDRSpec(Part, frozen=True):
    cidrs: list[str]


class ServiceCIDR(Object, frozen=True, tag="ServiceCIDR"):
    metadata: Metadata
    spec: ServiceCIDRSpec


class Namespace(Object, frozen=True, tag="Namespace"):
    metadata: LabelMetadata


KINDS: dict[tuple[str, str], type[Object]] = {
    ("", "Node"): Node,
    ("", "Pod"): Pod,
    ("", "Service"): Service,
    ("", "Endpoints"): Endpoints,
    ("", "ConfigMap"): ConfigMap,
    ("", "Namespace"): Namespace,
    ("apps", "Deployment"): Deployment,
    ("apps", "ReplicaSet"): ReplicaSet,
    ("apps", "StatefulSet"): StatefulSet,
    ("apps", "DaemonSet"): DaemonSet,
    ("discovery.k8s.io", "EndpointSlice"): EndpointSlice,
    ("networking.k8s.io", "ServiceCIDR"): ServiceCIDR,
    ("networking.k8s.io", "NetworkPolicy"): NetworkPolicy,
    ("networking.k8s.io", "Ingress"): Ingress,
    ("networking.k8s.io", "IngressClass"): IngressClass,
}
"""Kinds by API group and name."""

SETTINGS = {
    ("", "ConfigMap"): ("kube-proxy", "kube-proxy-config", "kubeadm-config", "kube-flannel-cfg"),
    ("crd.projectcalico.org", "IPPool"): (),
    ("projectcalico.org", "IPPool"): (),
}
"""What tells of a cluster's networks (see `cluster`): kinds, and names if only those do."""

SERVICE_NAME = "kubernetes.io/service-name"
"""Label of an EndpointSlice: the Service that it belongs to."""

HEADLESS = "service.kubernetes.io/headless"
"""Label of the EndpointSlices of a headless Service."""

CLUSTER_SCOPED = (Node, ServiceCIDR, Namespace, IngressClass)

NOT_BUILT = {
    ("", "ReplicationController"): "makes no pods",
    ("batch", "Job"): "makes no pods",
    ("batch", "CronJob"): "makes no pods",
}
"""Kinds that have a part in the datapath, but not in what this version builds."""


def namespace_of(item: Any) -> str:
    """The namespace of an object; "" if its kind has none."""
    return "" if isinstance(item, CLUSTER_SCOPED) else item.metadata.namespace or "default"


def title(item: Any) -> str:
    """An object as messages call it: `Pod demo/pod1`, `Node k8s-slave1`."""
    namespace = namespace_of(item)
    name = f"{namespace}/{item.metadata.name}" if namespace else item.metadata.name
    return f"{type(item).__name__} {name}"
