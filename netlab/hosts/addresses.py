"""A lab with the addresses that its machines have, in place of those that its topology gives."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import ip_interface
from typing import Any

import msgspec
from msgspec.structs import replace

from netlab.topology.model import Lab


def on_machines(lab: Lab, found: Mapping[str, str]) -> tuple[Lab, list[str]]:
    """The lab with each node at its machine's address ("192.0.2.11/24"), and what is otherwise."""
    other: dict[str, str] = {}
    said = []
    for node in lab.nodes:
        address = found[node.name].partition("/")[0]
        if address != node.address:
            other[node.address] = address
            said.append(f"{node.name} is {address} here, and not {node.address} of the topology")
    first = ip_interface(found[lab.nodes[0].name])
    if not other and str(first.network) == lab.underlay.cidr:
        return lab, said
    moved = msgspec.convert(_replaced(msgspec.to_builtins(lab), other), type=Lab)
    return replace(moved, underlay=replace(moved.underlay, cidr=str(first.network))), said


def _replaced(value: Any, other: Mapping[str, str]) -> Any:
    """Plain data with these addresses in place of those, wherever one stands alone."""
    if isinstance(value, str):
        return other.get(value, value)
    if isinstance(value, dict):
        return {key: _replaced(each, other) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_replaced(each, other) for each in value]
    return value
