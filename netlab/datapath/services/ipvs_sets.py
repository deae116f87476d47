"""The ipsets of ipvs mode: what each holds, and how its entries are written.

Source: kube-proxy pkg/proxy/ipvs/ipset.go and proxier.go (ipsetInfo).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from netlab.datapath.state import IpSet

CLUSTER_IP = "CLUSTER-IP"
EXTERNAL_IP = "EXTERNAL-IP"
EXTERNAL_IP_LOCAL = "EXTERNAL-IP-LOCAL"
HEALTH_CHECK = "HEALTH-CHECK-NODE-PORT"
IPVS_IPS = "IPVS-IPS"
LOAD_BALANCER = "LOAD-BALANCER"
FIREWALL = "LOAD-BALANCER-FW"
LOAD_BALANCER_LOCAL = "LOAD-BALANCER-LOCAL"
SOURCE_CIDR = "LOAD-BALANCER-SOURCE-CIDR"
SOURCE_IP = "LOAD-BALANCER-SOURCE-IP"
LOOP_BACK = "LOOP-BACK"

_KINDS = {
    CLUSTER_IP: "hash:ip,port",
    EXTERNAL_IP: "hash:ip,port",
    EXTERNAL_IP_LOCAL: "hash:ip,port",
    HEALTH_CHECK: "bitmap:port",
    IPVS_IPS: "hash:ip",
    LOAD_BALANCER: "hash:ip,port",
    FIREWALL: "hash:ip,port",
    LOAD_BALANCER_LOCAL: "hash:ip,port",
    SOURCE_CIDR: "hash:ip,port,net",
    SOURCE_IP: "hash:ip,port,ip",
    LOOP_BACK: "hash:ip,port,ip",
    "NODE-PORT-LOCAL-SCTP-HASH": "hash:ip,port",
    "NODE-PORT-LOCAL-TCP": "bitmap:port",
    "NODE-PORT-LOCAL-UDP": "bitmap:port",
    "NODE-PORT-SCTP-HASH": "hash:ip,port",
    "NODE-PORT-TCP": "bitmap:port",
    "NODE-PORT-UDP": "bitmap:port",
}
ROLES = tuple(_KINDS)
_LONGEST = 31  # IPSET_MAXNAMELEN less the end of a text

Family = Literal[4, 6]


def set_name(role: str, family: Family) -> str:
    """`KUBE-CLUSTER-IP`, or `KUBE-6-LOAD-BALANCER-SOURCE-CID`, which is cut."""
    return f"KUBE-{'6-' * (family == 6)}{role}"[:_LONGEST]


def node_ports(protocol: str, *, local: bool) -> str:
    """The set of a protocol's NodePorts: all of them, or those under externalTrafficPolicy Local.

    Those of SCTP come with the node's addresses, for want of a bitmap of theirs in old kernels.
    """
    ending = "SCTP-HASH" if protocol == "sctp" else protocol.upper()
    return f"NODE-PORT-{'LOCAL-' * local}{ending}"


def ip_set(role: str, family: Family, entries: tuple[str, ...] = ()) -> IpSet:
    """A set of one family with these entries."""
    kind = _KINDS[role]
    of_ports = kind == "bitmap:port"
    name = set_name(role, family)
    return IpSet(name=name, kind=kind, family=None if of_ports else family, entries=entries)


NAMES: Mapping[str, tuple[str, Family]] = {
    set_name(role, family): (role, family) for family in (4, 6) for role in ROLES
}
"""Role and family of every set of ours, by name."""
