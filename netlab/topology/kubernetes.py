"""Kubernetes objects: of each kind the fields that the datapath depends on, under their own names.

Everything else in an object is ignored.  A field may be null, which means that it is left out, as
in Kubernetes.  Names are checked here, by their types; what needs more than one field is checked
where it is used.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from netlab.topology.model import (
    DnsPolicy,
    Family,
    Protocol,
    ServiceType,
    TrafficDistribution,
    TrafficPolicy,
)

LABEL = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"

# `$` also matches before a final line break, hence the (?!\n).
Label = Annotated[
    str,
    Meta(
        pattern=rf"^{LABEL}$(?!\n)",
        max_length=63,
        description="RFC 1123 label: at most 63 of a-z, 0-9 and -, beginning and ending in "
        "a letter or a digit",
    ),
]
Subdomain = Annotated[
    str,
    Meta(
        pattern=rf"^{LABEL}(\.{LABEL})*$(?!\n)",
        max_length=253,
        description="RFC 1123 subdomain: at most 253 of a-z, 0-9, - and ., each part beginning "
        "and ending in a letter or a digit",
    ),
]
Port = Annotated[int, Meta(ge=1, le=65535)]
PortOrZero = Annotated[int, Meta(ge=0, le=65535)]
Labels = dict[str, str]


class Part(msgspec.Struct, frozen=True):
    """Base of everything inside an object."""


class Object(Part, frozen=True, tag_field="kind"):
    """Base of the kinds; the tag is the kind's name."""


class OwnerReference(Part, frozen=True):
    kind: str
    name: str
    controller: bool | None = None


class Metadata(Part, frozen=True):
    name: Subdomain
    namespace: Label | None = None
    labels: Labels | None = None
    deletionTimestamp: str | None = None
    ownerReferences: list[OwnerReference] | None = None


class LabelMetadata(Metadata, frozen=True, kw_only=True):
    """Metadata of a kind whose name has to be a label."""

    name: Label


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


# Pod, and what makes pods


class ContainerPort(Part, frozen=True, omit_defaults=True):
    containerPort: Port
    protocol: Protocol | None = None
    name: str | None = None
    hostPort: PortOrZero | None = None
    hostIP: str | None = None


class FieldRef(Part, frozen=True):
    fieldPath: str


class KeyRef(Part, frozen=True):
    key: str
    name: str | None = None
    optional: bool | None = None


class EnvVarSource(Part, frozen=True):
    fieldRef: FieldRef | None = None
    configMapKeyRef: KeyRef | None = None


class EnvVar(Part, frozen=True):
    name: str
    value: str | None = None
    valueFrom: EnvVarSource | None = None


class ConfigMapRef(Part, frozen=True):
    name: str | None = None
    optional: bool | None = None


class EnvFrom(Part, frozen=True):
    prefix: str | None = None
    configMapRef: ConfigMapRef | None = None


class VolumeMount(Part, frozen=True):
    name: str
    mountPath: str
    subPath: str | None = None


class HttpHeader(Part, frozen=True):
    name: str
    value: str = ""


class HttpGet(Part, frozen=True, omit_defaults=True):
    port: Port | str
    path: str | None = None
    host: str | None = None
    scheme: Literal["HTTP", "HTTPS"] | None = None
    httpHeaders: list[HttpHeader] | None = None


class TcpSocket(Part, frozen=True, omit_defaults=True):
    port: Port | str
    host: str | None = None


class Exec(Part, frozen=True, omit_defaults=True):
    command: list[str] | None = None


class Grpc(Part, frozen=True, omit_defaults=True):
    port: Port


class Probe(Part, frozen=True, omit_defaults=True):
    httpGet: HttpGet | None = None
    tcpSocket: TcpSocket | None = None
    exec: Exec | None = None
    grpc: Grpc | None = None
    initialDelaySeconds: Annotated[int, Meta(ge=0)] | None = None
    periodSeconds: Annotated[int, Meta(ge=0)] | None = None
    timeoutSeconds: Annotated[int, Meta(ge=0)] | None = None
    successThreshold: Annotated[int, Meta(ge=0)] | None = None
    failureThreshold: Annotated[int, Meta(ge=0)] | None = None


class Sleep(Part, frozen=True):
    seconds: Annotated[int, Meta(ge=0)]


class LifecycleHandler(Part, frozen=True, omit_defaults=True):
    sleep: Sleep | None = None
    exec: Exec | None = None


class Lifecycle(Part, frozen=True, omit_defaults=True):
    preStop: LifecycleHandler | None = None


class Container(Part, frozen=True, omit_defaults=True):
    ports: list[ContainerPort] | None = None
    name: str | None = None
    image: str | None = None
    command: list[str] | None = None
    args: list[str] | None = None
    workingDir: str | None = None
    env: list[EnvVar] | None = None
    envFrom: list[EnvFrom] | None = None
    volumeMounts: list[VolumeMount] | None = None
    readinessProbe: Probe | None = None
    livenessProbe: Probe | None = None
    startupProbe: Probe | None = None
    lifecycle: Lifecycle | None = None


class KeyToPath(Part, frozen=True):
    key: str
    path: str


class ConfigMapVolume(Part, frozen=True):
    name: str | None = None
    items: list[KeyToPath] | None = None
    optional: bool | None = None


class Volume(Part, frozen=True):
    name: str
    configMap: ConfigMapVolume | None = None


class HostAlias(Part, frozen=True, omit_defaults=True):
    ip: str
    hostnames: list[str] | None = None


class DnsOption(Part, frozen=True):
    name: str
    value: str | None = None


class DnsConfig(Part, frozen=True):
    nameservers: list[str] | None = None
    searches: list[str] | None = None
    options: list[DnsOption] | None = None


class PodSpec(Part, frozen=True, omit_defaults=True):
    nodeName: str | None = None
    nodeSelector: Labels | None = None
    hostNetwork: bool | None = None
    enableServiceLinks: bool | None = None
    containers: list[Container] | None = None
    volumes: list[Volume] | None = None
    hostname: Label | None = None
    subdomain: Label | None = None
    setHostnameAsFQDN: bool | None = None
    hostAliases: list[HostAlias] | None = None
    dnsPolicy: DnsPolicy | None = None
    dnsConfig: DnsConfig | None = None
    terminationGracePeriodSeconds: Annotated[int, Meta(ge=0)] | None = None


class Condition(Part, frozen=True):
    type: str
    status: Literal["True", "False", "Unknown"]


class PodIP(Part, frozen=True):
    ip: str


class PodStatus(Part, frozen=True):
    phase: str | None = None
    hostIP: str | None = None
    hostIPs: list[PodIP] | None = None
    podIP: str | None = None
    podIPs: list[PodIP] | None = None
    conditions: list[Condition] | None = None


class Pod(Object, frozen=True, tag="Pod"):
    metadata: Metadata
    spec: PodSpec | None = None
    status: PodStatus | None = None


class TemplateMetadata(Part, frozen=True):
    labels: Labels | None = None
    # (One that is not there has no part in the hash of a template.)
    annotations: Labels | msgspec.UnsetType | None = msgspec.UNSET


class PodTemplate(Part, frozen=True):
    metadata: TemplateMetadata | None = None
    spec: PodSpec | None = None


class RollingUpdate(Part, frozen=True):
    maxSurge: int | str | None = None
    maxUnavailable: int | str | None = None


class Strategy(Part, frozen=True):
    type: str | None = None
    rollingUpdate: RollingUpdate | None = None


class ControllerSpec(Part, frozen=True):
    template: PodTemplate
    replicas: Annotated[int, Meta(ge=0)] | None = None
    strategy: Strategy | None = None
    minReadySeconds: Annotated[int, Meta(ge=0)] | None = None


class ControllerMetadata(Metadata, frozen=True, kw_only=True):
    annotations: Labels | None = None


class Controller(Object, frozen=True):
    """What makes pods of a template."""

    metadata: ControllerMetadata
    spec: ControllerSpec


class Deployment(Controller, frozen=True, tag="Deployment"):
    pass


class ReplicaSet(Controller, frozen=True, tag="ReplicaSet"):
    pass


class StatefulSet(Controller, frozen=True, tag="StatefulSet"):
    pass


class DaemonSet(Controller, frozen=True, tag="DaemonSet"):
    pass


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


class LabelSelectorRequirement(Part, frozen=True):
    key: str
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    values: list[str] | None = None


class LabelSelector(Part, frozen=True):
    matchLabels: Labels | None = None
    matchExpressions: list[LabelSelectorRequirement] | None = None


class IPBlock(Part, frozen=True, rename={"except_": "except"}):
    cidr: str
    except_: list[str] | None = None


class NetworkPolicyPeer(Part, frozen=True):
    podSelector: LabelSelector | None = None
    namespaceSelector: LabelSelector | None = None
    ipBlock: IPBlock | None = None


class NetworkPolicyPort(Part, frozen=True):
    protocol: Protocol | None = None
    port: Port | str | None = None
    endPort: Port | None = None


class NetworkPolicyIngressRule(Part, frozen=True, rename={"from_": "from"}):
    from_: list[NetworkPolicyPeer] | None = None
    ports: list[NetworkPolicyPort] | None = None


class NetworkPolicyEgressRule(Part, frozen=True):
    to: list[NetworkPolicyPeer] | None = None
    ports: list[NetworkPolicyPort] | None = None


class NetworkPolicySpec(Part, frozen=True):
    podSelector: LabelSelector | None = None
    policyTypes: list[Literal["Ingress", "Egress"]] | None = None
    ingress: list[NetworkPolicyIngressRule] | None = None
    egress: list[NetworkPolicyEgressRule] | None = None


class NetworkPolicy(Object, frozen=True, tag="NetworkPolicy"):
    metadata: Metadata
    spec: NetworkPolicySpec | None = None


class IngressMetadata(Metadata, frozen=True, kw_only=True):
    annotations: Labels | None = None


class ServiceBackendPort(Part, frozen=True):
    name: str | None = None
    number: Port | None = None


class IngressServiceBackend(Part, frozen=True):
    name: Label
    port: ServiceBackendPort | None = None


class IngressBackend(Part, frozen=True):
    service: IngressServiceBackend | None = None


class IngressPath(Part, frozen=True):
    backend: IngressBackend
    pathType: Literal["Exact", "Prefix", "ImplementationSpecific"]
    path: str | None = None


class HTTPIngressRule(Part, frozen=True):
    paths: list[IngressPath]


class IngressRule(Part, frozen=True):
    host: str | None = None
    http: HTTPIngressRule | None = None


class IngressTLS(Part, frozen=True):
    hosts: list[str] | None = None
    secretName: Subdomain | None = None


class IngressSpec(Part, frozen=True):
    ingressClassName: str | None = None
    defaultBackend: IngressBackend | None = None
    rules: list[IngressRule] | None = None
    tls: list[IngressTLS] | None = None


class Ingress(Object, frozen=True, tag="Ingress"):
    metadata: IngressMetadata
    spec: IngressSpec | None = None


class IngressClassSpec(Part, frozen=True):
    controller: str | None = None


class IngressClass(Object, frozen=True, tag="IngressClass"):
    metadata: Metadata
    spec: IngressClassSpec | None = None


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
