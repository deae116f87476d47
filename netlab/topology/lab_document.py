"""`kind: Lab`, netlab's own: the defaults of a topology.  A field that is not here is an error."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from netlab.topology.kubernetes_parts import (
    Label,
    Port,
    Subdomain,
)
from netlab.topology.model import (
    BalancerMode,
    IPTablesBackend,
    Masquerade,
    Outcome,
    Protocol,
    ProxyMode,
)

API_VERSION = "netlab/v1"


class Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base: unknown fields are errors."""


class LabMetadata(Strict, frozen=True):
    name: Label


class OverlaySpec(Strict, frozen=True):
    type: (
        Annotated[str, Meta(description="vxlan, vxlan-multicast, host-gw, ipip, bgp, mesh or eni")]
        | None
    ) = None
    vni: Annotated[int, Meta(ge=1, le=0xFFFFFF)] | None = None
    port: Port | None = None
    masquerade: (
        Annotated[
            Masquerade,
            Meta(
                description="whose source the nodes translate: what pods send beyond pods, "
                "Services and nodes (outside), to other nodes too (all, flannel's --ip-masq), none"
            ),
        ]
        | None
    ) = None
    group: Annotated[str, Meta(description="of vxlan-multicast, an address")] | None = None
    blockSize: Annotated[int, Meta(ge=20, le=30)] | None = None
    asNumber: Annotated[int, Meta(ge=1, le=0xFFFFFFFE)] | None = None


class UnderlaySpec(Strict, frozen=True):
    cidr: str | None = None
    gateway: str | None = None
    mtu: Annotated[int, Meta(ge=576, le=65535)] | None = None


class DetectLocalSpec(Strict, frozen=True):
    bridgeInterface: str | None = None
    interfaceNamePrefix: str | None = None


class IPTablesSpec(Strict, frozen=True):
    masqueradeAll: bool | None = None
    masqueradeBit: Annotated[int, Meta(ge=0, le=31)] | None = None
    localhostNodePorts: bool | None = None


class NFTablesSpec(Strict, frozen=True):
    masqueradeAll: bool | None = None
    masqueradeBit: Annotated[int, Meta(ge=0, le=31)] | None = None


class IPVSSpec(Strict, frozen=True):
    scheduler: str | None = None
    strictARP: bool | None = None
    tcpTimeout: str | None = None  # durations as Go writes them: 15m0s
    tcpFinTimeout: str | None = None
    udpTimeout: str | None = None


class ConntrackSpec(Strict, frozen=True):
    tcpBeLiberal: bool | None = None
    tcpEstablishedTimeout: str | None = None  # durations as Go writes them: 24h0m0s
    tcpCloseWaitTimeout: str | None = None
    udpTimeout: str | None = None
    udpStreamTimeout: str | None = None


class ServiceProxySpec(Strict, frozen=True):
    """The field names of KubeProxyConfiguration."""

    mode: ProxyMode | None = None
    detectLocalMode: (
        Literal["ClusterCIDR", "NodeCIDR", "BridgeInterface", "InterfaceNamePrefix"] | None
    ) = None
    detectLocal: DetectLocalSpec | None = None
    clusterCIDR: str | None = None
    nodePortAddresses: list[str] | None = None
    iptables: IPTablesSpec | None = None
    nftables: NFTablesSpec | None = None
    ipvs: IPVSSpec | None = None
    conntrack: ConntrackSpec | None = None
    featureGates: dict[str, bool] | None = None


class ExpectationSpec(Strict, frozen=True, rename={"source": "from", "destination": "to"}):
    """What is broken on purpose between those that two patterns match."""

    source: Annotated[str, Meta(description="pod/demo/*, node/n1, host/*")]
    destination: Annotated[str, Meta(description="the same, or svc/demo/myblog")]
    outcome: Outcome | None = None


class VerifySpec(Strict, frozen=True):
    expect: list[ExpectationSpec] | None = None


class LabSpec(Strict, frozen=True):
    podCIDR: str | None = None
    serviceCIDR: str | None = None
    overlay: OverlaySpec | None = None
    underlay: UnderlaySpec | None = None
    serviceProxy: ServiceProxySpec | None = None
    iptablesBackend: IPTablesBackend | None = None
    verify: VerifySpec | None = None


class Lab(Strict, frozen=True, tag_field="kind", tag="Lab"):
    """At most one in a topology."""

    apiVersion: Literal["netlab/v1"]
    metadata: LabMetadata
    spec: LabSpec | None = None


class HostPort(Strict, frozen=True):
    port: Port
    protocol: Protocol | None = None


class HostSpec(Strict, frozen=True):
    address: Annotated[str, Meta(description="one address, or one of each family: IPv4,IPv6")]
    network: Literal["underlay", "internet"] | None = None
    ports: list[HostPort] | None = None
    names: Annotated[
        list[Subdomain] | None,
        Meta(description="names that the cluster's name server has for it, beside its own"),
    ] = None


class Host(Strict, frozen=True, tag_field="kind", tag="Host"):
    """A machine outside the cluster, on the nodes' network or behind the Gateway."""

    apiVersion: Literal["netlab/v1"]
    metadata: LabMetadata
    spec: HostSpec


class GatewaySpec(Strict, frozen=True):
    address: str | None = None
    cidr: str | None = None


class Gateway(Strict, frozen=True, tag_field="kind", tag="Gateway"):
    """The way to the internet: at most one."""

    apiVersion: Literal["netlab/v1"]
    metadata: LabMetadata
    spec: GatewaySpec | None = None


Seconds = Annotated[float, Meta(ge=0.05, le=300)]
Times = Annotated[int, Meta(ge=1, le=100)]


class HealthCheckSpec(Strict, frozen=True):
    periodSeconds: Seconds | None = None
    timeoutSeconds: Seconds | None = None
    healthyThreshold: (
        Annotated[Times, Meta(description="successes in a row that bring a node back")] | None
    ) = None
    unhealthyThreshold: (
        Annotated[Times, Meta(description="failures in a row that take it out")] | None
    ) = None


class LoadBalancerSpec(Strict, frozen=True):
    pool: Annotated[
        str,
        Meta(
            description="the network of the addresses that Services get, or one of each family: "
            "IPv4,IPv6; it is no other network of the lab"
        ),
    ]
    mode: (
        Annotated[
            BalancerMode,
            Meta(
                description="nat: to a node port, answers come back through the box; "
                "passthrough: the packet itself to a node, which answers directly"
            ),
        ]
        | None
    ) = None
    address: (
        Annotated[str, Meta(description="its own on the nodes' network, or one of each family")]
        | None
    ) = None
    healthCheck: HealthCheckSpec | None = None


class LoadBalancer(Strict, frozen=True, tag_field="kind", tag="LoadBalancer"):
    """A box outside the cluster that serves Services of type LoadBalancer."""

    apiVersion: Literal["netlab/v1"]
    metadata: LabMetadata
    spec: LoadBalancerSpec


class PublishedPort(Strict, frozen=True):
    port: Port
    protocol: Protocol | None = None
    hostPort: (
        Annotated[Port, Meta(description="the node's port that is published for it")] | None
    ) = None
    hostIP: str | None = None


class ContainerVariable(Strict, frozen=True):
    name: str
    value: str


class ContainerSpec(Strict, frozen=True):
    node: Annotated[str, Meta(description="the first one, if left out")] | None = None
    network: (
        Annotated[
            str, Meta(description="none, host, bridge (the default), or a ContainerNetwork's name")
        ]
        | None
    ) = None
    address: str | None = None
    image: str | None = None
    command: list[str] | None = None
    args: list[str] | None = None
    workingDir: str | None = None
    env: list[ContainerVariable] | None = None
    ports: list[PublishedPort] | None = None


class Container(Strict, frozen=True, tag_field="kind", tag="Container"):
    """A container that Docker runs on a node, beside its pods."""

    apiVersion: Literal["netlab/v1"]
    metadata: LabMetadata
    spec: ContainerSpec | None = None


class ContainerNetworkSpec(Strict, frozen=True):
    node: Annotated[str, Meta(description="the first one, if left out")] | None = None
    subnet: Annotated[str, Meta(description="the first free one from 172.18.0.0/16 on")] | None = (
        None
    )


class ContainerNetwork(Strict, frozen=True, tag_field="kind", tag="ContainerNetwork"):
    """A network of a node's Docker that its user defined: a bridge with names in it."""

    apiVersion: Literal["netlab/v1"]
    metadata: LabMetadata
    spec: ContainerNetworkSpec | None = None


KINDS: dict[str, type[Lab | Host | Gateway | LoadBalancer | Container | ContainerNetwork]] = {
    "Lab": Lab,
    "Host": Host,
    "Gateway": Gateway,
    "LoadBalancer": LoadBalancer,
    "Container": Container,
    "ContainerNetwork": ContainerNetwork,
}
"""Kinds of netlab/v1."""
