"""What differs between the rules that a node should have and those that a listing holds.

Built on the blocks of `reading`: lines that are missing and lines that are too much are told as one
difference where one stands in the other's place, and each names whom it concerns.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

import msgspec

from netlab.datapath.services.explain import compare
from netlab.datapath.services.modes import MODES
from netlab.datapath.services.reading import (
    Block,
    Blocks,
    Key,
    Line,
    Reading,
    reading_of,
)
from netlab.topology.model import Lab, Node, ProxyMode

Kind = Literal[
    "missing-table",
    "missing-chain",
    "missing-set",
    "missing-rule",
    "missing-element",
    "extra-chain",
    "extra-set",
    "extra-rule",
    "extra-element",
    "stale-chain",
    "other-endpoint",
    "other-probability",
    "other-mark",
    "other-order",
    "other-rule",
    "other-element",
]

_CHANCE = re.compile(r"--probability \S+|numgen random mod \d+")
_MARK = re.compile(r"--(?:set-x)?mark (\S+)|mark (?:[&|^]|and|or|xor) (\S+)")
_MOST = 200  # lines of a block and a Service that are looked at in pairs
_ALIKE = 0.5


class Difference(msgspec.Struct):
    """One difference; `wanted` and `found` are rules or elements, None where there are none.

    Of a chain or set that is missing or too much they are all its lines.
    """

    kind: Kind
    key: Key
    ports: tuple[str, ...]  # service port names; none: it concerns all Services, or none of ours
    endpoints: tuple[str, ...]
    wanted: str | None = None
    found: str | None = None
    should: str = ""  # what the wanted line would do
    does: str = ""  # what the found one does


def recognise(text: str) -> tuple[ProxyMode, Mapping[str, str]] | None:
    """The mode whose rules a tool has listed, and the listings by family; None if no mode's."""
    for name, mode in MODES.items():
        reading = reading_of(mode)
        if reading and (printed := reading.recognise(text)):
            return name, printed
    return None


def differences(
    lab: Lab, node: Node, mode: ProxyMode, printed: Mapping[str, str]
) -> list[Difference]:
    """What differs on a node that prints its rules so from what the mode should have written."""
    reading, blocks = compare(lab, node, MODES[mode], printed)
    tables = _missing_tables(blocks)
    found = [_missing_table(reading, blocks, *table) for table in tables]
    led_to = {
        target
        for key, block in blocks.items()
        for line in block.lines
        if line.state != "missing"
        for target in reading.targets(key, line.text)
    }
    for key, block in blocks.items():
        if (key.family, key.table) in tables:
            continue
        if block.state != "there":
            found.append(_of_block(reading, block, key in led_to))
        else:
            found += _of_lines(reading, block)
    return found


def _missing_tables(blocks: Blocks) -> list[tuple[str, str]]:
    there = {(key.family, key.table) for key, block in blocks.items() if block.state != "missing"}
    return list(
        dict.fromkeys(
            (key.family, key.table) for key in blocks if (key.family, key.table) not in there
        )
    )


def _missing_table(reading: Reading, blocks: Blocks, family: str, table: str) -> Difference:
    ports = {
        owner.port
        for key, block in blocks.items()
        if (key.family, key.table) == (family, table)
        for line in block.lines
        for owner in reading.owners(key, line.text)
    }
    return Difference("missing-table", Key(family, table, "table", ""), tuple(sorted(ports)), ())


def _of_block(reading: Reading, block: Block, is_led_to: bool) -> Difference:
    what = "chain" if block.key.kind == "chain" else "set"
    lines = [line.text for line in block.lines] or [""]
    owners = {owner for line in lines for owner in reading.owners(block.key, line)}
    ports = tuple(sorted({owner.port for owner in owners}))
    led = {endpoint for line in lines for endpoint in reading.endpoints(block.key, line)}
    endpoints = tuple(sorted(led))
    text = "\n".join(line.text for line in block.lines)
    if block.state == "missing":
        kind: Kind = "missing-chain" if what == "chain" else "missing-set"
        return Difference(kind, block.key, ports, endpoints, wanted=text)
    kind = "extra-set" if what == "set" else "extra-chain" if is_led_to else "stale-chain"
    return Difference(kind, block.key, ports, endpoints, found=text)


def _of_lines(reading: Reading, block: Block) -> Iterator[Difference]:
    missing: dict[tuple[str, ...], list[Line]] = {}
    extra: dict[tuple[str, ...], list[Line]] = {}
    for line in block.lines:
        if line.state != "there":
            owners = reading.owners(block.key, line.text)
            ports = tuple(sorted({owner.port for owner in owners}))
            (missing if line.state == "missing" else extra).setdefault(ports, []).append(line)
    for ports in dict.fromkeys((*missing, *extra)):
        pairs = _pairs(reading, block.key, ports, missing.get(ports, []), extra.get(ports, []))
        for wanted, found in pairs:
            yield _of_pair(reading, block, ports, wanted, found)


def _pairs(
    reading: Reading, key: Key, ports: tuple[str, ...], missing: list[Line], extra: list[Line]
) -> Iterator[tuple[Line | None, Line | None]]:
    """Each missing line with the one in its place, or with none; then what is left."""
    left = list(extra)
    alone: list[Line] = []
    for wanted in missing:
        found = _counterpart(reading, key, wanted, left)
        if found is None:
            alone.append(wanted)
        else:
            left.remove(found)
            yield wanted, found
    if ports and key.kind == "chain" and len(alone) == len(left) == 1:
        # of another form, such as the choice among two endpoints and the only one
        yield alone[0], left[0]
        return
    yield from ((wanted, None) for wanted in alone)
    yield from ((None, found) for found in left)


def _counterpart(reading: Reading, key: Key, wanted: Line, extra: list[Line]) -> Line | None:
    comparable = reading.comparable(key, wanted.text)
    slot = reading.slot(key, wanted.text)
    best, likeness = None, _ALIKE
    words = set(wanted.text.split())
    for line in extra[:_MOST]:
        if reading.comparable(key, line.text) == comparable:
            return line
        if slot is not None:
            if reading.slot(key, line.text) == slot:
                best = line
            continue
        others = set(line.text.split())
        alike = len(words & others) / len(words | others)
        if alike > likeness:
            best, likeness = line, alike
    return best


def _of_pair(
    reading: Reading, block: Block, ports: tuple[str, ...], wanted: Line | None, found: Line | None
) -> Difference:
    key = block.key
    lines = [line for line in (wanted, found) if line]
    told = [set(reading.endpoints(key, line.text)) for line in lines]
    # what both lead to is not what they differ in
    concerned = told[0] ^ told[1] if len(told) == 2 and told[0] != told[1] else told[0]
    return Difference(
        _kind(reading, key, wanted, found),
        key,
        ports,
        tuple(sorted(concerned)),
        wanted.text if wanted else None,
        found.text if found else None,
        reading.sentence(block, wanted) if wanted else "",
        reading.sentence(block, found) if found else "",
    )


def _kind(reading: Reading, key: Key, wanted: Line | None, found: Line | None) -> Kind:
    is_rule = key.kind == "chain"
    if found is None:
        return "missing-rule" if is_rule else "missing-element"
    if wanted is None:
        return "extra-rule" if is_rule else "extra-element"
    one, other = wanted.text, found.text
    if reading.comparable(key, one) == reading.comparable(key, other):
        return "other-order"
    if set(reading.endpoints(key, one)) != set(reading.endpoints(key, other)):
        return "other-endpoint"
    if _CHANCE.findall(one) != _CHANCE.findall(other):
        return "other-probability"
    if _MARK.findall(one) != _MARK.findall(other):
        return "other-mark"
    return "other-rule" if is_rule else "other-element"


def by_service(found: Iterable[Difference]) -> dict[str, list[Difference]]:
    """Differences by service ("namespace/name"); under "" those that concern many or none."""
    grouped: dict[str, list[Difference]] = {}
    for difference in found:
        services = {port.partition(":")[0] for port in difference.ports}
        name = services.pop() if len(services) == 1 else ""
        grouped.setdefault(name, []).append(difference)
    return dict(sorted(grouped.items()))
