"""Pods, and what makes pods: the fields that the datapath depends on.

As in :mod:`netlab.topology.kubernetes`.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from netlab.topology.kubernetes_parts import (
    Label,
    Labels,
    Metadata,
    Object,
    Part,
    Port,
    PortOrZero,
)
from netlab.topology.model import (
    DnsPolicy,
    Protocol,
)


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
