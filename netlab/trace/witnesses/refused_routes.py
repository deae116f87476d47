"""Why the kernel refused a route: its rules and tables, walked as a lookup walks them.

The kernel answers a refused lookup with an error number alone, and `EINVAL` is that of a blackhole
as well as of impossible addresses.  Source: net/ipv4/fib_rules.c, fib_semantics.c (fib_props),
net/ipv6/fib6_rules.c, route.c (fib6_prop).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import msgspec

from netlab.kernel.netlink import Socket as Netlink
from netlab.kernel.netlink import attributes
from netlab.kernel.rtnetlink import RTA_DST, RTA_GATEWAY, RTA_OIF, RTA_TABLE, RTM_GETROUTE
from netlab.trace.family import Family

_RTM_GETRULE = 34
_RTA_PRIORITY = 6
_FRA_DST, _FRA_SRC, _FRA_IIFNAME, _FRA_GOTO, _FRA_PRIORITY = 1, 2, 3, 4, 6
_FRA_FWMARK, _FRA_TABLE, _FRA_FWMASK, _FRA_OIFNAME = 10, 15, 16, 17
_TO_TABLE, _GOTO, _NOP = 1, 2, 3
_INVERT = 0x2
_HEADER = struct.Struct("=BBBBBBBBI")
_THROW = 9  # a route that sends the lookup on to the next rule

TYPES = {1: "unicast", 2: "local", 3: "broadcast", 4: "anycast", 5: "multicast"} | {
    6: "blackhole",
    7: "unreachable",
    8: "prohibit",
}


class Question(msgspec.Struct, frozen=True):
    """The headers that a route is looked up for."""

    family: Family
    destination: str
    source: str | None
    iif: str | None
    mark: int


class Found(msgspec.Struct, frozen=True):
    """What a lookup ends at: a route with its prefix, or a rule that refuses by itself."""

    type: str
    prefix: str | None = None
    table: int = 0
    oif: int = 0
    via: str | None = None
    rule: str | None = None  # as `ip rule del` takes it: "from 10.244.1.2 blackhole"


def find(netlink: Netlink, question: Question) -> Found | None:
    """The route or the rule that decides; None if nothing matches."""
    asked = _HEADER.pack(question.family.address_family, *[0] * 8)
    routes = netlink.dump(RTM_GETROUTE, asked)
    after = 0
    for priority, header, found in _rules(netlink.dump(_RTM_GETRULE, asked)):
        if priority < after or not _matches(header, found, question):
            continue
        action = header[7]
        if action == _GOTO:
            after = _u32(found[_FRA_GOTO])
        elif action == _TO_TABLE:
            table = _u32(found[_FRA_TABLE]) if _FRA_TABLE in found else header[4]
            route = _longest(routes, table, question)
            if route:
                return route
        elif action != _NOP and action in TYPES:
            return Found(TYPES[action], rule=_words(question.family, header, found, TYPES[action]))
    return None


def _rules(bodies: list[bytes]) -> Iterator[tuple[int, tuple[int, ...], dict[int, bytes]]]:
    rules = []
    for body in bodies:
        found = attributes(body, _HEADER.size)
        priority = _u32(found[_FRA_PRIORITY]) if _FRA_PRIORITY in found else 0
        rules.append((priority, _HEADER.unpack_from(body), found))
    return iter(sorted(rules, key=lambda rule: rule[0]))


def _matches(header: tuple[int, ...], found: dict[int, bytes], question: Question) -> bool:
    iif = found.get(_FRA_IIFNAME, b"").rstrip(b"\0").decode()
    mask = _u32(found[_FRA_FWMASK]) if _FRA_FWMASK in found else 0xFFFFFFFF
    mark = _u32(found[_FRA_FWMARK]) if _FRA_FWMARK in found else 0
    matches = (
        _covers(question.family, found.get(_FRA_DST), header[1], question.destination)
        and _covers(question.family, found.get(_FRA_SRC), header[2], question.source)
        and iif in ("", question.iif or "lo")
        and _FRA_OIFNAME not in found
        and (mark == question.mark & mask if _FRA_FWMARK in found else True)
    )
    return matches != bool(header[8] & _INVERT)


def _longest(routes: list[bytes], table: int, question: Question) -> Found | None:
    ip = question.family
    best: tuple[tuple[int, int], Found | None] | None = None
    for body in routes:
        _, bits, _, _, number, _, _, kind, _ = _HEADER.unpack_from(body)
        found = attributes(body, _HEADER.size)
        number = _u32(found[RTA_TABLE]) if RTA_TABLE in found else number
        prefix = found.get(RTA_DST, bytes(ip.bits // 8))
        if number != table or not _covers(ip, prefix, bits, question.destination):
            continue
        metric = _u32(found[_RTA_PRIORITY]) if _RTA_PRIORITY in found else 0
        route = None
        if kind != _THROW:
            route = Found(
                type=TYPES.get(kind, str(kind)),
                prefix=f"{ip.text(prefix)}/{bits}",
                table=table,
                oif=_u32(found[RTA_OIF]) if RTA_OIF in found else 0,
                via=ip.text(found[RTA_GATEWAY]) if RTA_GATEWAY in found else None,
            )
        if best is None or (bits, -metric) > best[0]:
            best = (bits, -metric), route
    return best[1] if best else None


def _covers(ip: Family, prefix: bytes | None, bits: int, address: str | None) -> bool:
    if not bits:
        return True
    if prefix is None or address is None:
        return False
    ours, theirs = (int.from_bytes(each, "big") for each in (prefix, ip.packed(address)))
    return ours >> (ip.bits - bits) == theirs >> (ip.bits - bits)


def _words(ip: Family, header: tuple[int, ...], found: dict[int, bytes], action: str) -> str:
    ends = [
        f"{word} {ip.text(found[kind])}/{bits}"
        for word, kind, bits in (("from", _FRA_SRC, header[2]), ("to", _FRA_DST, header[1]))
        if kind in found
    ]
    priority = _u32(found[_FRA_PRIORITY]) if _FRA_PRIORITY in found else 0
    return f"{' '.join(ends) or 'from all'} {action} priority {priority}"


def _u32(data: bytes) -> int:
    return int(struct.unpack("=I", data[:4])[0])
