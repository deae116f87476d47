"""Names of what is outside the cluster: namespaces, and ports of the switches."""

from __future__ import annotations

import hashlib

from netlab.datapath.state import namespace_name
from netlab.topology.model import Host, Lab

INTERNET = "_internet"
GATEWAY_PORT = "__gateway"  # on both switches; no node or host can have the name


def host_namespace(lab: Lab, host: Host) -> str:
    """File name of a host's namespace."""
    return namespace_name(lab.name, "_host", host.name)


def gateway_namespace(lab: Lab) -> str:
    """File name of the gateway's namespace."""
    return namespace_name(lab.name, "_gateway")


def internet_namespace(lab: Lab) -> str:
    """File name of the internet's switch."""
    return namespace_name(lab.name, INTERNET)


def host_port(host: Host) -> str:
    """Name of a host's port on its switch, which no node can have."""
    if len(host.name) <= 14:
        return f"_{host.name}"
    return f"_{host.name[:7]}-{hashlib.sha1(host.name.encode()).hexdigest()[:6]}"
