"""Names of what is outside the cluster: namespaces, and ports of the switches."""

from __future__ import annotations

import hashlib

from netlab.datapath.state import namespace_name
from netlab.topology.model import Host, Lab, LoadBalancer

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


def balancer_namespace(lab: Lab, box: LoadBalancer) -> str:
    """File name of a load balancer's namespace."""
    return namespace_name(lab.name, "_balancer", box.name)


def host_port(host: Host) -> str:
    """Name of a host's port on its switch, which no node can have."""
    return _port("_", host.name)


def balancer_port(box: LoadBalancer) -> str:
    """Name of a load balancer's port on the underlay's switch, which no host can have."""
    return _port("_lb_", box.name)


def _port(prefix: str, name: str) -> str:
    """At most 15 characters, where a link's name ends (IFNAMSIZ)."""
    if len(prefix + name) <= 15:
        return prefix + name
    digest = hashlib.sha1(name.encode()).hexdigest()[:6]
    return f"{prefix}{name[: 8 - len(prefix)]}-{digest}"
