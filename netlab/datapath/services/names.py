"""Names that kube-proxy gives: service ports, endpoints, and chains hashed from both.

Sources: kube-proxy pkg/proxy/types.go (ServicePortName) and pkg/proxy/iptables/proxier.go
(portProtoHash).
"""

from __future__ import annotations

from base64 import b32encode
from functools import lru_cache
from hashlib import sha256

from netlab.topology.model import Endpoint


def service_port_name(namespace: str, service: str, port: str) -> str:
    """`namespace/name:port`, or `namespace/name` for a port without a name."""
    return f"{namespace}/{service}:{port}" if port else f"{namespace}/{service}"


def address_port(endpoint: Endpoint) -> str:
    """`10.244.1.4:8002`, or `[fd00::4]:8002`."""
    if ":" in endpoint.address:
        return f"[{endpoint.address}]:{endpoint.port}"
    return f"{endpoint.address}:{endpoint.port}"


@lru_cache(maxsize=1 << 16)  # each node of a lab needs the same ones
def chain_hash(port_name: str, protocol: str, endpoint: str = "") -> str:
    """What follows `KUBE-SVC-` and its like in the name of a chain: 16 characters of base32.

    The kernel allows 28 characters for a chain, so the Service's own name cannot stand there.
    `port_name` is a service port name, `protocol` lower case, `endpoint` as
    :func:`address_port` writes it.
    """
    digest = sha256(f"{port_name}{protocol}{endpoint}".encode()).digest()
    # 16 characters of base32 are exactly the first 10 bytes
    return b32encode(digest[:10]).decode()
