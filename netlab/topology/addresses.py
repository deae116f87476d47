"""Addresses and networks as they stand in objects: read, or complained of.

A lab has one address family or both.  Of an object that has addresses of both, in a lab that has
one, the other family's are left out with a warning; an object with nothing else is an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ipaddress import (
    AddressValueError,
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    NetmaskValueError,
    ip_address,
    ip_network,
)

from netlab.topology.convert import shown, shown_path
from netlab.topology.model import Family
from netlab.topology.places import Complaints, Origin, Path

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

_MAPPED = 0xFFFF  # ::ffff:0:0/96, less its last 32 bits
DUAL_STACK_HINT = (
    "a lab of both families says so: spec.podCIDR: 10.244.0.0/16,fd00:10:244::/48 of its Lab, "
    "and serviceCIDR likewise if it is given"
)
OF_LAB = "the lab is"


def family_of(text: str) -> Family:
    """The family of an address or network, as text."""
    return "IPv6" if ":" in text else "IPv4"


def family(value: Address | Network) -> Family:
    """The family of an address or network."""
    return "IPv4" if value.version == 4 else "IPv6"


def width(of: Family) -> int:
    """How many bits an address has."""
    return 32 if of == "IPv4" else 128


# Read


def address(
    text: str, title: str, found: Complaints, origin: Origin | None, path: Path
) -> Address | None:
    """The address that an object has at `path`; complains and returns None if it is none."""
    try:
        value = IPv6Address(text) if ":" in text and "%" not in text else IPv4Address(text)
    except AddressValueError:
        message = f"{title}: {shown_path(path)} {shown(text)} is not an IP address"
        found.error("bad-address", message, origin, *path, hint=_address_hint(text))
        return None
    if _is_no_machine(value):
        message = f"{title}: {shown_path(path)} {text} is not the address of one machine"
        found.error("bad-address", message, origin, *path)
        return None
    return value


def _is_no_machine(value: Address) -> bool:
    """Whether it is everybody's, nobody's, or good on one link or in one machine only."""
    number = int(value)
    if isinstance(value, IPv4Address):
        return number >> 24 == 127 or number >> 28 == 0xE or number in (0, 0xFFFFFFFF)
    return number < 2 or number >> 120 == 0xFF or number >> 118 == 0x3FA or number >> 32 == _MAPPED


def _address_hint(text: str) -> str:
    if "/" in text:
        return "an address has no prefix length"
    if ":" in text:
        return "up to eight groups of hexadecimal digits, such as fd00:10:244:1::4, without a zone"
    return "four numbers from 0 to 255, without leading zeros, such as 10.244.1.4"


def network(
    text: str, title: str, found: Complaints, origin: Origin | None, path: Path
) -> Network | None:
    """The network that an object has at `path`; complains and returns None if it is none."""
    where = shown_path(path)
    kind = IPv6Network if ":" in text and "%" not in text else IPv4Network
    try:
        if "/" not in text:
            raise NetmaskValueError(text)
        return kind(text)
    except (AddressValueError, NetmaskValueError):
        message = f"{title}: {where} {shown(text)} is not a CIDR"
        hint = "an address, a slash and a prefix length, such as 10.244.0.0/16"
        found.error("bad-cidr", message, origin, *path, hint=hint)
    except ValueError:
        right = kind(text, strict=False)
        message = f"{title}: {where} {text} is an address inside a network, not a network"
        found.error("bad-cidr", message, origin, *path, hint=f"did you mean {right}?")
    return None


def is_address(text: str) -> bool:
    """Whether a text is an address of either family."""
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def is_network(text: str) -> bool:
    """Whether kube-proxy reads a text as a network: of either family, with host bits or not."""
    try:
        ip_network(text, strict=False)
    except ValueError:
        return False
    return "/" in text


def split(
    text: str, title: str, found: Complaints, origin: Origin | None, path: Path
) -> dict[Family, str]:
    """The parts of a field that takes one text or, joined by a comma, one of each family."""
    parts: dict[Family, str] = {}
    for part in map(str.strip, text.split(",")):
        if family_of(part) in parts:
            message = f"{title}: {shown_path(path)} {shown(text)} has two of {family_of(part)}"
            hint = "it takes one of each family: IPv4,IPv6"
            found.error("mixed-families", message, origin, *path, hint=hint)
        parts.setdefault(family_of(part), part)
    return parts


# Of the lab's families


def of_families(
    candidates: Iterable[tuple[str | None, Path]],
    families: Sequence[Family],
    title: str,
    found: Complaints,
    origin: Origin | None,
    only: str = OF_LAB,
) -> dict[Family, tuple[str, Path]]:
    """The texts of fields such as podIP and podIPs, with their paths, in the order of `families`.

    Complains of two of one family, and of what has none of `families`.  `only` is how a sentence
    begins that says what has no other ones.
    """
    given: dict[Family, tuple[str, Path]] = {}
    for text, path in candidates:
        if not text:
            continue
        first = given.setdefault(family_of(text), (text, path))
        if first[0] != text:
            message = (
                f"{title}: {shown_path(path)} {text} is the second {family_of(text)} one, "
                f"beside {first[0]}"
            )
            found.error("mixed-families", message, origin, *path, hint="one of each family")
    kept = {each: given[each] for each in families if each in given}
    if len(kept) < len(given):
        text, path = next(given[each] for each in given if each not in kept)
        if kept:
            left_out(text, families, title, found, origin, path, only)
        else:
            not_of_lab(text, families, title, found, origin, path, only)
    return kept


def left_out(
    text: str,
    families: Sequence[Family],
    title: str,
    found: Complaints,
    origin: Origin | None,
    path: Path,
    only: str = OF_LAB,
) -> None:
    """Warn that something of a family that the lab lacks is not there."""
    message = f"{title}: {text} is left out: it is {family_of(text)}, {only} {families[0]} only"
    found.warning("other-family", message, origin, *path)


def not_of_lab(
    text: str,
    families: Sequence[Family],
    title: str,
    found: Complaints,
    origin: Origin | None,
    path: Path,
    only: str = OF_LAB,
) -> None:
    """Complain of an object that could only live in a lab of the other family."""
    where = shown_path(path)
    message = f"{title}: {where} {text} is {family_of(text)}; {only} {families[0]} only"
    found.error("mixed-families", message, origin, *path, hint=DUAL_STACK_HINT)


# Arithmetic, in which two families have nothing in common


def first_of(cidr: Network) -> int:
    """The lowest address as a number."""
    return int(cidr.network_address)


def last_of(cidr: Network) -> int:
    """The highest address as a number."""
    return int(cidr.broadcast_address)


def overlap(one: Network, other: Network) -> bool:
    """Whether two networks have an address in common."""
    return (
        one.version == other.version
        and first_of(one) <= last_of(other)
        and first_of(other) <= last_of(one)
    )


def inside(part: Network, whole: Network) -> bool:
    """Whether a network is another one or a part of it."""
    return (
        part.version == whole.version
        and first_of(whole) <= first_of(part)
        and last_of(part) <= last_of(whole)
    )


def hosts(cidr: Network) -> range:
    """The addresses that machines may have, as numbers.

    The first is the network's own (IPv6: the routers' anycast address, RFC 4291 2.6.1); the last of
    an IPv4 network is for broadcasts.
    """
    return range(first_of(cidr) + 1, last_of(cidr) + (cidr.version == 6))


def address_at(number: int, of: Family) -> Address:
    """The address with that number."""
    return IPv4Address(number) if of == "IPv4" else IPv6Address(number)


def network_at(number: int, prefix: int, of: Family) -> Network:
    """The network of that prefix length which holds the address with that number."""
    kind = IPv4Network if of == "IPv4" else IPv6Network
    return kind((number, prefix), strict=False)


def smallest_network(parts: Sequence[Network], longest_prefix: int) -> Network:
    """The smallest network, of at most that prefix length, that holds all parts of one family."""
    of = family(parts[0])
    first = min(map(first_of, parts))
    last = max(map(last_of, parts))
    prefix = min(width(of) - (first ^ last).bit_length(), longest_prefix)
    return network_at(first, prefix, of)
