"""Two listings of rules held against each other, line by line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from difflib import SequenceMatcher

from msgspec.structs import replace

from netlab.datapath.services.reading import Blocks, Key, Line, Reading


def merge(reading: Reading, wanted: Blocks, found: Blocks) -> Blocks:
    """What was found, with what is missing put in its place and what is too much marked."""
    merged: Blocks = {}
    for key in dict.fromkeys((*wanted, *found)):
        one, other = wanted.get(key), found.get(key)
        if other is None:
            assert one is not None
            lines = [replace(line, state="missing") for line in one.lines]
            merged[key] = replace(one, lines=lines, state="missing")
        elif one is None:
            if not reading.is_ignored(key, None):
                lines = [replace(line, state="extra") for line in other.lines]
                merged[key] = replace(other, lines=lines, state="extra")
        else:
            lines = list(_merged(reading, key, one.lines, other.lines))
            merged[key] = replace(other, lines=lines)
    return merged


def _merged(reading: Reading, key: Key, wanted: list[Line], found: list[Line]) -> Iterable[Line]:
    if [line.text for line in wanted] == [line.text for line in found]:
        return found
    if key.kind != "chain":
        return _merged_set(reading, key, wanted, found)
    if reading.is_shared(key):
        return _merged_shared(reading, key, wanted, found)
    return _merged_chain(reading, key, wanted, found)


def _merged_set(
    reading: Reading, key: Key, wanted: list[Line], found: list[Line]
) -> Iterator[Line]:
    texts, there = {line.text for line in wanted}, {line.text for line in found}
    # only what no line has to the letter is looked for in another spelling
    missing = {
        reading.comparable(key, line.text): line for line in wanted if line.text not in there
    }
    for line in found:
        if line.text in texts or line.learned:
            yield line
        elif missing and (same := reading.comparable(key, line.text)) in missing:
            del missing[same]
            yield line
        elif not reading.is_ignored(key, line.text):
            yield replace(line, state="extra")
    for line in missing.values():
        yield Line(line.text, "missing")


def _merged_shared(
    reading: Reading, key: Key, wanted: list[Line], found: list[Line]
) -> Iterator[Line]:
    """Service by Service, for their order means nothing; then what lies between Services."""
    ours, theirs = _by_service(reading, key, wanted), _by_service(reading, key, found)
    for service in sorted({*ours, *theirs} - {""}):
        yield from _merged_chain(reading, key, ours.get(service, []), theirs.get(service, []))
    yield from _merged_chain(reading, key, ours[""], theirs[""])


# Stands for all lines of Services that follow each other.
_SERVICES = Line("")


def _by_service(reading: Reading, key: Key, lines: list[Line]) -> dict[str, list[Line]]:
    """Lines by service port; under "" those of none, with a mark where Services are between."""
    found: dict[str, list[Line]] = {"": []}
    for line in lines:
        owners = reading.owners(key, line.text)
        if owners:
            found.setdefault(owners[0].port, []).append(line)
            if found[""][-1:] != [_SERVICES]:
                found[""].append(_SERVICES)
        else:
            found[""].append(line)
    return found


def _merged_chain(
    reading: Reading, key: Key, wanted: list[Line], found: list[Line]
) -> Iterator[Line]:
    ours = [reading.comparable(key, line.text) for line in wanted]
    theirs = [reading.comparable(key, line.text) for line in found]
    for tag, i, j, k, m in SequenceMatcher(None, ours, theirs, autojunk=False).get_opcodes():
        if tag == "equal":
            yield from (line for line in found[k:m] if line.text)
            continue
        yield from (Line(line.text, "missing") for line in wanted[i:j] if line.text)
        for line in found[k:m]:
            if line.text and not reading.is_ignored(key, line.text):
                yield replace(line, state="extra")
