"""`kind: Lab`, netlab's own: the defaults of a topology.  A field that is not here is an error."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from netlab.topology.kubernetes import Label, Port
from netlab.topology.model import IPTablesBackend, ProxyMode

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


class LabSpec(Strict, frozen=True):
    podCIDR: str | None = None
    serviceCIDR: str | None = None
    overlay: OverlaySpec | None = None
    underlay: UnderlaySpec | None = None
    serviceProxy: ServiceProxySpec | None = None
    iptablesBackend: IPTablesBackend | None = None


class Lab(Strict, frozen=True, tag_field="kind", tag="Lab"):
    """At most one in a topology."""

    apiVersion: Literal["netlab/v1"]
    metadata: LabMetadata
    spec: LabSpec | None = None


NOT_BUILT = ("Host", "Gateway", "LoadBalancer", "Container", "ContainerNetwork")
"""Kinds of netlab/v1 that this version does not build yet."""
