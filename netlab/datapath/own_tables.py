"""nftables tables that a lab has beside its service proxy's rules, by namespace."""

from __future__ import annotations

from netlab.datapath import balancer, egress, network_policy, outside
from netlab.datapath.fault_edits import TABLE as FAULTS
from netlab.datapath.state import Table, namespace_name
from netlab.topology.model import Lab, Node

COMMENT = outside.COMMENT
_FIELDS = ("ip flannel-ipv4", "ip6 flannel-ipv6")
_OURS = (
    *(f"{family} {name}" for family in ("ip", "ip6") for name in (outside.TABLE, balancer.TABLE)),
    f"inet {network_policy.TABLE}",
)


def of_node(lab: Lab, node: Node) -> tuple[Table, ...]:
    """Those of a node."""
    return (*egress.masquerading(lab, node), *network_policy.enforcing(lab, node))


def by_namespace(lab: Lab) -> dict[str, tuple[Table, ...]]:
    """All of a lab but those of faults."""
    found = {namespace_name(lab.name, node.name): of_node(lab, node) for node in lab.nodes}
    return found | {each.name: each.tables for each in outside.namespaces(lab) if each.tables}


def is_ours(name: str) -> bool:
    """Whether a table ("ip flannel-ipv4") may be one of these, or of a fault."""
    return is_faults(name) or is_anybodys(name) or name in _OURS


def is_faults(name: str) -> bool:
    """Whether it is a fault's."""
    return name.split()[1].startswith(FAULTS)


def is_anybodys(name: str) -> bool:
    """Whether others call tables so too: what is netlab's bears the comment."""
    return name in _FIELDS
