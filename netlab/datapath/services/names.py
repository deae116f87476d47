"""Names that kube-proxy gives: service ports, endpoints, chains and sets made of both.

Sources: kube-proxy pkg/proxy/types.go (ServicePortName), pkg/proxy/iptables/proxier.go
(portProtoHash) and pkg/proxy/nftables/proxier.go (hashAndTruncate).
"""

from __future__ import annotations

import re
from base64 import b32encode
from collections.abc import Iterable, Sequence
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


_MOST_HASHES = 1 << 18
_hashes: dict[str, str] = {}  # each node of a lab needs the same ones


def chain_hash(port_name: str, protocol: str, endpoint: str = "") -> str:
    """What follows `KUBE-SVC-` and its like in the name of a chain: 16 characters of base32.

    The kernel allows 28 characters for a chain, so the Service's own name cannot stand there.
    `port_name` is a service port name, `protocol` lower case, `endpoint` as
    :func:`address_port` writes it.
    """
    text = f"{port_name}{protocol}{endpoint}"
    found = _hashes.get(text)
    if found is None:
        prepare_chain_hashes([text])
        found = _hashes[text]
    return found


def prepare_chain_hashes(texts: Iterable[str]) -> None:
    """Work out at once what :func:`chain_hash` will be asked for: its arguments, one string each.

    Many together cost a third of what they do one by one.
    """
    wanted = [text for text in texts if text not in _hashes]
    if len(_hashes) + len(wanted) > _MOST_HASHES:
        _hashes.clear()
    # 16 characters of base32 are exactly the first 10 bytes.
    digests = [sha256(text.encode(), usedforsecurity=False).digest()[:10] for text in wanted]
    encoded = _base32(digests)
    for number, text in enumerate(wanted):
        _hashes[text] = encoded[16 * number : 16 * (number + 1)]


def forget_chain_hashes() -> None:
    """Forget all, as a process has it that begins."""
    _hashes.clear()


_ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"
_TO_ALPHABET = _ALPHABET + bytes(256 - len(_ALPHABET))


def _base32(words: Sequence[bytes]) -> str:
    """Words of ten bytes as 16 characters each, all in one string and by one calculation.

    Each word is the end of a lane of 16 bytes of one large number.  Its 80 bits are halved, the
    upper half is shifted to the middle of the lane, and so on with each half, until each byte has
    five of the bits.
    """
    number = int.from_bytes(b"".join([b"\0\0\0\0\0\0" + word for word in words]), "big")
    size = 16 * len(words)
    for width, bits in ((8, 40), (4, 20), (2, 10), (1, 5)):  # bytes and bits of a half
        half = ((1 << bits) - 1).to_bytes(2 * width, "big")
        low = int.from_bytes(half * (size // len(half)), "big")
        number = number & low | (number >> bits & low) << 8 * width
    return number.to_bytes(size, "big").translate(_TO_ALPHABET).decode()


_LONGEST = 240  # nftables allows 255 characters, prefix included


@lru_cache(maxsize=1 << 16)
def nftables_name(port_name: str, protocol: str, endpoint: str = "") -> str:
    """What follows `service-`, `endpoint-` and their like in the name of a chain or set.

    `ILDV4B5I-demo/myblog/tcp/`, or `VFQRO7DV-shop/login/tcp/http__10.42.1.90/8080` with an
    endpoint.  Arguments as in :func:`chain_hash`.  The hash keeps apart what is cut to one text.
    """
    service, _, port = port_name.partition(":")
    name = f"{service}/{protocol}/{port}"
    if endpoint:
        address, _, number = endpoint.rpartition(":")
        # a colon is no part of a name for nft
        name += f"__{address.strip('[]').replace(':', '.')}/{number}"
    full = f"{b32encode(sha256(name.encode()).digest()[:5]).decode()}-{name}"
    return full if len(full) <= _LONGEST else f"{full[: _LONGEST - 3]}..."


# A name with one of these before it is that of a chain or set of one Service port.
_OF_SERVICE = re.compile(
    r"(?:service|external|local|firewall|endpoint|affinity)-[A-Z2-7]{8}-"
    r"([a-z0-9-]+/[a-z0-9.-]+)/[a-z]+/([a-z0-9-]*)(?:__(.+)/(\d+))?"
)


def served_by(name: str) -> tuple[str, str | None] | None:
    """Service port name and endpoint that a chain or set of nftables mode was made for.

    `service-ILDV4B5I-demo/myblog/tcp/http` is of demo/myblog:http.  None: of none, or the name was
    too long and is cut.
    """
    found = _OF_SERVICE.fullmatch(name)
    if found is None:
        return None
    service, port, address, number = found.groups()
    endpoint = None
    if address:
        is_ipv4 = re.fullmatch(r"\d+(\.\d+){3}", address)
        host = address if is_ipv4 else f"[{address.replace('.', ':')}]"
        endpoint = f"{host}:{number}"
    return f"{service}:{port}" if port else service, endpoint
