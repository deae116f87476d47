"""Tables as `nft list table` prints them: written, and compared.

What is written loads as it stands, and in the kernel is what a table of kube-proxy is.  Printed
again it differs from one version of nft to the next in spelling, and from one moment to the next in
the order of elements and in what packets leave behind: counters, and the addresses that a set with
the flag `dynamic` remembers.  Only spelling remains for whoever compares; see :func:`differences`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address, ip_network, summarize_address_range

from netlab.datapath.state import Table

# `set`, `map` and `chain` with a name; a counter has no contents that count
_OBJECT = re.compile(r"\t(set|map|chain|counter) (\S+) \{")
_ELEMENTS = "elements = {"


class TableText:
    """A table under construction: counters, sets, maps and chains in the order they were added."""

    def __init__(self, family: str, name: str, comment: str) -> None:
        self._family, self._name, self._comment = family, name, comment
        self._counters: list[str] = []
        self._sets: dict[str, tuple[list[str], set[str]]] = {}
        self._chains: dict[str, list[str]] = {}

    def counter(self, name: str) -> None:
        """A counter that rules refer to by name."""
        self._counters.append(name)

    def set(self, name: str, type_: str, *properties: str) -> None:
        """A set, or a map if the type holds a colon."""
        self._sets[name] = ([f"type {type_}", *properties], set())

    def element(self, name: str, element: str) -> None:
        """An element of a set or map that was declared; once is enough."""
        self._sets[name][1].add(element)

    def elements(self, name: str, elements: Iterable[str]) -> None:
        """Many elements of one set or map."""
        self._sets[name][1].update(elements)

    def chain(self, name: str, *lines: str) -> None:
        """A chain with its rules, or further rules of a chain."""
        self._chains.setdefault(name, []).extend(lines)

    def table(self) -> Table:
        """The whole; Services' objects (names with a slash) follow the others, sorted."""
        blocks = [_block("counter", name, ["packets 0 bytes 0"]) for name in self._counters]
        for name in sorted(self._sets, key=_place):
            properties, elements = self._sets[name]
            kind = "map" if " : " in properties[0] else "set"
            blocks.append(_block(kind, name, [*properties, *_element_lines(elements)]))
        blocks += (
            _block("chain", name, self._chains[name]) for name in sorted(self._chains, key=_place)
        )
        comment = f'\tcomment "{self._comment}"\n'
        body = "\n".join(blocks)
        text = f"table {self._family} {self._name} {{\n{comment}{body}}}\n"
        return Table(family=self._family, name=self._name, text=text)


def _place(name: str) -> str:
    return name if "/" in name else ""


def _block(kind: str, name: str, lines: Iterable[str]) -> str:
    return "".join((f"\t{kind} {name} {{\n", *(f"\t\t{line}\n" for line in lines), "\t}\n"))


def _element_lines(elements: Iterable[str]) -> list[str]:
    text = ",\n\t\t\t     ".join(sorted(elements))
    return [f"{_ELEMENTS} {text} }}"] if text else []


def duration(seconds: int) -> str:
    """`10800` as `3h`, `90` as `1m30s`."""
    parts = []
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, seconds = divmod(seconds, size)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts)


def addresses(networks: Iterable[str]) -> str:
    """Networks as the right side of a match."""
    found = ranges(networks)
    return found[0] if len(found) == 1 else f"{{ {', '.join(found)} }}"


def ranges(networks: Iterable[str]) -> list[str]:
    """Networks in order; as nft does, those that overlap or lie side by side are joined."""
    joined: list[tuple[int, int]] = []
    parsed = [ip_network(text) for text in networks]
    for network in sorted(parsed, key=lambda n: int(n.network_address)):
        first, last = int(network.network_address), int(network.broadcast_address)
        if joined and first <= joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], max(joined[-1][1], last))
        else:
            joined.append((first, last))
    address = IPv4Address if parsed[0].version == 4 else IPv6Address
    return [_range(address(first), address(last)) for first, last in joined]


def _range(first: IPv4Address | IPv6Address, last: IPv4Address | IPv6Address) -> str:
    if first == last:
        return str(first)
    networks = [str(network) for network in summarize_address_range(first, last)]
    return networks[0] if len(networks) == 1 else f"{first}-{last}"


def differences(wanted: str, found: str) -> list[str]:
    """Objects that differ between two printed texts, as "ip kube-proxy chain services".

    A table that is in one text alone is named itself.  The order of objects and of elements does
    not count, nor do counters, remembered addresses and the tables' white space; the order of
    rules does.  Both must have been printed by one version of nft.
    """
    ours, theirs = parse(wanted), parse(found)
    different = []
    for table in dict.fromkeys((*ours, *theirs)):
        if table not in ours or table not in theirs:
            different.append(table)
            continue
        one, other = ours[table], theirs[table]
        different += (
            f"{table} {name}".rstrip()
            for name in dict.fromkeys((*one, *other))
            if one.get(name) != other.get(name)
        )
    return different


def parse(text: str, *, remembered: bool = False) -> dict[str, dict[str, list[str]]]:
    """Lines by table and object; those of the table itself stand under "".

    With `remembered` the elements of dynamic sets, which packets made, are among them.
    """
    tables: dict[str, dict[str, list[str]]] = {}
    objects: dict[str, list[str]] = {}
    lines: list[str] = []
    elements: list[str] | None = None
    for line in text.splitlines():
        stripped = line.strip()
        if elements is not None or stripped.startswith(_ELEMENTS):
            elements = elements or []
            elements.append(stripped.removeprefix(_ELEMENTS))
            if stripped.endswith("}"):
                if remembered or not is_dynamic(lines):
                    lines += sorted(_split(" ".join(elements).removesuffix("}")))
                elements = None
        elif line.startswith("table "):
            objects = tables.setdefault(line.removeprefix("table ").rstrip(" {"), {"": []})
            lines = objects[""]
        elif found := _OBJECT.match(line):
            lines = objects.setdefault(f"{found[1]} {found[2]}", [])
        elif line == "\t}":
            lines = objects[""]
        elif stripped not in ("", "}") and not stripped.startswith("packets "):
            lines.append(stripped)
    return tables


def is_dynamic(lines: Iterable[str]) -> bool:
    """Whether packets add to the set or map that these are the lines of."""
    return any(line.startswith("flags") and "dynamic" in line for line in lines)


def _split(elements: str) -> list[str]:
    return [stripped for element in elements.split(",") if (stripped := element.strip())]
