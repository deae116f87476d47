"""NetworkPolicies and Ingresses: the fields that the datapath depends on.

As in :mod:`netlab.topology.kubernetes`.
"""

from __future__ import annotations

from typing import Literal

from netlab.topology.kubernetes_parts import (
    Label,
    Labels,
    Metadata,
    Object,
    Part,
    Port,
    Subdomain,
)
from netlab.topology.model import (
    Protocol,
)


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
