"""Tables as `nft list table` prints them: written, and compared.

What is written loads as it stands, and in the kernel is what a table of kube-proxy is.  Printed
again it differs from one version of nft to the next in spelling, and from one moment to the next in
the order of elements and in what packets leave behind: counters, and the addresses that a set with
the flag `dynamic` remembers.  Only spelling remains for whoever compares; see :func:`differences`.

What turns one table into another is written as commands: :func:`update`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv6Address, ip_network, summarize_address_range

from netlab.datapath.state import Table

# `set`, `map` and `chain` with a name; a counter has no contents that count
_OBJECT = re.compile(r"\t(set|map|chain|counter) (\S+) \{")
_ELEMENTS = "elements = {"
_READ = 1000  # of so many elements somebody may want to find one; sorting more takes a while


class TableText:
    """A table under construction: counters, sets, maps and chains in the order they were added.

    Also a part of one, such as what one Service adds: then sets may have elements here and be
    declared elsewhere.
    """

    def __init__(self, family: str, name: str, comment: str = "") -> None:
        self.family, self.name = family, name
        self.sets: dict[str, list[str]] = {}  # type and properties
        self.elements: defaultdict[str, list[str]] = defaultdict(list)  # by set; once is enough
        self.chains: dict[str, list[str]] = {}
        self._comment = comment
        self._counters: list[str] = []

    def counter(self, name: str) -> None:
        """A counter that rules refer to by name."""
        self._counters.append(name)

    def set(self, name: str, type_: str, *properties: str) -> None:
        """A set, or a map if the type holds a colon."""
        self.sets[name] = [f"type {type_}", *properties]

    def element(self, name: str, element: str) -> None:
        """An element of a set or map."""
        self.elements[name].append(element)

    def chain(self, name: str, *lines: str) -> None:
        """A chain with its rules, or further rules of a chain."""
        self.chains.setdefault(name, []).extend(lines)

    def table(self) -> Table:
        """The whole; Services' objects (names with a slash) follow the others, sorted."""
        blocks = [_block("counter", name, ["packets 0 bytes 0"]) for name in self._counters]
        for name in sorted(self.sets, key=_place):
            properties = self.sets[name]
            lines = _element_lines(self.elements.get(name, ()))
            blocks.append(_block(_kind(properties), name, [*properties, *lines]))
        blocks += (
            _block("chain", name, self.chains[name]) for name in sorted(self.chains, key=_place)
        )
        comment = f'\tcomment "{self._comment}"\n'
        body = "\n".join(blocks)
        text = f"table {self.family} {self.name} {{\n{comment}{body}}}\n"
        return Table(family=self.family, name=self.name, text=text)


def _place(name: str) -> str:
    return name if "/" in name else ""


def _kind(properties: list[str]) -> str:
    return "map" if " : " in properties[0] else "set"


def _block(kind: str, name: str, lines: Iterable[str]) -> str:
    return "".join((f"\t{kind} {name} {{\n", *(f"\t\t{line}\n" for line in lines), "\t}\n"))


def _element_lines(elements: Iterable[str]) -> list[str]:
    once = dict.fromkeys(elements)
    text = ",\n\t\t\t     ".join(once if len(once) > _READ else sorted(once))
    return [f"{_ELEMENTS} {text} }}"] if text else []


def update(before: TableText, after: TableText) -> str:
    """Input for nft that makes of a table that holds the one part a table that holds the other.

    Chains on hooks stay as they are.  What is the same in both is not written; "" if all is.
    """
    return "".join(f"{command}\n" for command in _commands(before, after))


def _commands(before: TableText, after: TableText) -> Iterator[str]:
    """What is referred to is made before what refers to it, and goes after it."""
    table = f"{after.family} {after.name}"
    for name, properties in after.sets.items():
        # of a set that is there, this changes the timeout
        if before.sets.get(name) != properties:
            yield f"add {_kind(properties)} {table} {name} {{ {' ; '.join(properties)} ; }}"
    changed = [name for name, rules in after.chains.items() if before.chains.get(name) != rules]
    for name in changed:
        yield f"add chain {table} {name}"
    for name in changed:
        yield f"flush chain {table} {name}"
        for rule in after.chains[name]:
            yield f"add rule {table} {name} {rule}"
    for name in sorted({*before.elements, *after.elements}):
        old, new = set(before.elements.get(name, ())), set(after.elements.get(name, ()))
        if name in after.sets or name not in before.sets:  # else they go with the set
            if gone := sorted(_key(element) for element in old - new):
                yield f"delete element {table} {name} {{ {', '.join(gone)} }}"
            if added := sorted(new - old):
                yield f"add element {table} {name} {{ {', '.join(added)} }}"
    removed = [name for name in before.chains if name not in after.chains]
    for name in removed:
        yield f"flush chain {table} {name}"
    for name in removed:
        yield f"delete chain {table} {name}"
    for name, properties in before.sets.items():
        if name not in after.sets:
            yield f"delete {_kind(properties)} {table} {name}"


def _key(element: str) -> str:
    """`10.96.0.1 . tcp . 80` of `10.96.0.1 . tcp . 80 comment "demo/web" : drop`."""
    return element.partition(" comment ")[0].partition(" : ")[0]


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
        if stripped.startswith("#"):  # a warning of nft's
            continue
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
