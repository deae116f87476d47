"""Names of what Docker has on a node: namespaces, links, a container's own name server."""

from __future__ import annotations

import hashlib

from netlab.datapath.state import namespace_name
from netlab.topology.model import DockerContainer, Lab

RESOLVER = "127.0.0.11"


def container_namespace(lab: Lab, container: DockerContainer) -> str:
    """The namespace that a container lives in: its own, or its node's."""
    if container.mode == "host":
        return namespace_name(lab.name, container.node)
    return namespace_name(lab.name, "_container", container.name)


def outer_link(container: DockerContainer) -> str:
    """The end on the node of a container's pair."""
    return "veth" + hashlib.sha1(f"docker/{container.name}".encode()).hexdigest()[:7]
