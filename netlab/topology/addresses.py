"""Addresses and networks as they stand in objects: read, or complained of.

This version builds IPv4.  Where an object has addresses of both families the IPv4 one is taken and
a warning says so; one that has only IPv6 is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import (
    AddressValueError,
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    NetmaskValueError,
)

from netlab.topology.convert import shown, shown_path
from netlab.topology.places import Complaints, Origin, Path

IPV4_ONLY = "this version builds IPv4 only"


def address(
    text: str, title: str, found: Complaints, origin: Origin | None, path: Path
) -> IPv4Address | None:
    """The address that an object has at `path`; complains and returns None if it is none."""
    try:
        value = IPv4Address(text)
    except AddressValueError:
        _complain_of_address(text, title, found, origin, path)
        return None
    if value.is_multicast or value.is_loopback or value.is_unspecified or int(value) == 0xFFFFFFFF:
        message = f"{title}: {shown_path(path)} {text} is not the address of one machine"
        found.error("bad-address", message, origin, *path)
        return None
    return value


def _complain_of_address(
    text: str, title: str, found: Complaints, origin: Origin | None, path: Path
) -> None:
    where = shown_path(path)
    try:
        IPv6Address(text)
    except AddressValueError:
        message = f"{title}: {where} {shown(text)} is not an IP address"
        found.error("bad-address", message, origin, *path, hint=_address_hint(text))
    else:
        message = f"{title}: {where} {text} is IPv6; {IPV4_ONLY}"
        found.error("unsupported", message, origin, *path)


def _address_hint(text: str) -> str:
    if "/" in text:
        return "an address has no prefix length"
    return "four numbers from 0 to 255, without leading zeros, such as 10.244.1.4"


def network(
    text: str, title: str, found: Complaints, origin: Origin | None, path: Path
) -> IPv4Network | None:
    """The network that an object has at `path`; complains and returns None if it is none."""
    where = shown_path(path)
    try:
        if "/" not in text:
            raise NetmaskValueError(text)
        return IPv4Network(text)
    except (AddressValueError, NetmaskValueError):
        try:
            IPv6Network(text, strict=False)
        except ValueError:
            message = f"{title}: {where} {shown(text)} is not a CIDR"
            hint = "an address, a slash and a prefix length, such as 10.244.0.0/16"
            found.error("bad-cidr", message, origin, *path, hint=hint)
        else:
            message = f"{title}: {where} {text} is IPv6; {IPV4_ONLY}"
            found.error("unsupported", message, origin, *path)
    except ValueError:
        right = IPv4Network(text, strict=False)
        message = f"{title}: {where} {text} is an address inside a network, not a network"
        found.error("bad-cidr", message, origin, *path, hint=f"did you mean {right}?")
    return None


def is_ipv6(text: str) -> bool:
    """Whether a text is an IPv6 address or network."""
    return ":" in text


def ipv4_of(
    candidates: Sequence[tuple[str, Path]],
    title: str,
    found: Complaints,
    origin: Origin | None,
) -> tuple[str, Path] | None:
    """The first text of a dual-stack field that is not IPv6, with its path.

    None if there is no text at all, or, after an error, if all are IPv6.
    """
    given = [(text, path) for text, path in candidates if text]
    rest = [(text, path) for text, path in given if not is_ipv6(text)]
    if given and not rest:
        text, path = given[0]
        message = f"{title}: {shown_path(path)} {text} is IPv6; {IPV4_ONLY}"
        found.error("unsupported", message, origin, *path)
    elif len(rest) < len(given):
        found.warning("ipv4-only", f"{title}: its IPv6 side is left out; {IPV4_ONLY}", origin)
    return rest[0] if rest else None


def smallest_network(parts: Sequence[IPv4Network], longest_prefix: int) -> IPv4Network:
    """The smallest network, of at most that prefix length, that holds all parts."""
    first = min(int(part.network_address) for part in parts)
    last = max(int(part.broadcast_address) for part in parts)
    prefix = min(32 - (first ^ last).bit_length(), longest_prefix)
    return IPv4Network((first, prefix), strict=False)
