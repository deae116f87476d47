"""Which rules of a node serve a Service, in the order in which a packet meets them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import msgspec
from msgspec.structs import replace

from netlab.datapath.services.claims import sharing
from netlab.datapath.services.merging import merge
from netlab.datapath.services.modes import Mode, mode_of
from netlab.datapath.services.reading import Block, Blocks, Key, Line, Owner, Reading, reading_of
from netlab.topology.model import Lab, Node, Service


def only(lab: Lab, service: Service) -> Lab:
    """The lab with that Service and those that share an address with it; quick to render."""
    services = sharing(lab.services, service)
    keys = {(each.namespace, each.name) for each in services}
    endpoints = tuple(entry for entry in lab.endpoints if (entry.namespace, entry.service) in keys)
    return replace(lab, services=services, endpoints=endpoints)


def read_service(
    lab: Lab, node: Node, service: Service, printed: Mapping[str, str], port: str | None = None
) -> tuple[Reading, list[Met]]:
    """What packets for a Service meet on a node that prints its rules so; `port` as in `walk`.

    What should be there and is not is among it, in its place.
    """
    reading, wanted = _wanted(only(lab, service), node, mode_of(lab), whole=False)
    ours, found = (
        _without_others(reading, blocks, service) for blocks in (wanted, reading.blocks(printed))
    )
    return reading, walk(reading, merge(reading, ours, found), service.key, port)


def rendered_service(
    lab: Lab, node: Node, service: Service, port: str | None = None
) -> dict[Key, list[str]]:
    """What packets for a Service should meet on a node, by block."""
    alone = only(lab, service)
    reading, wanted = _wanted(alone, node, mode_of(lab), whole=False)
    met = walk(reading, wanted, service.key, port)
    return {each.block.key: [line.text for line in each.lines] for each in met}


def compare(lab: Lab, node: Node, mode: Mode, printed: Mapping[str, str]) -> tuple[Reading, Blocks]:
    """All rules of a mode on a node that prints them so, held against what should be there.

    Only of the families that `printed` has.
    """
    reading, wanted = _wanted(lab, node, mode)
    wanted = {key: block for key, block in wanted.items() if key.family in printed}
    return reading, merge(reading, wanted, reading.blocks(printed))


def _wanted(lab: Lab, node: Node, mode: Mode, *, whole: bool = True) -> tuple[Reading, Blocks]:
    """How a mode's rules are read, and those that a node should have.  ValueError: it has none."""
    reading_class = reading_of(mode)
    rules = mode.render(lab, node)
    if reading_class is None or rules is None:
        raise ValueError("a mode without rules")
    reading = reading_class(lab, node, whole=whole)
    return reading, reading.blocks(reading.rendered(rules))


def _without_others(reading: Reading, blocks: Blocks, service: Service) -> Blocks:
    """Blocks without that which serves other Services."""
    return {
        key: replace(block, lines=lines)
        for key, block in blocks.items()
        if (lines := [line for line in block.lines if _may_serve(reading, key, line, service)])
        or not block.lines
    }


def _may_serve(reading: Reading, key: Key, line: Line, service: Service) -> bool:
    owners = reading.owners(key, line.text)
    return not owners or any(owner.service == service.key for owner in owners)


class Met(msgspec.Struct):
    """The lines of one block that serve a Service."""

    stage: str
    block: Block
    lines: list[Line]


def walk(reading: Reading, blocks: Blocks, service: str, port: str | None = None) -> list[Met]:
    """What packets for a Service (or one service port of it) meet, in that order.

    `service` is "namespace/name", `port` a service port name.  Each block comes once.
    """
    found: list[Met] = []
    for family in ("ip", "ip6"):
        of_family = _Walk(reading, blocks, family, service, port)
        met = of_family.met()
        if of_family.serves:
            found += met
    return found


class _Walk:
    def __init__(
        self, reading: Reading, blocks: Blocks, family: str, service: str, port: str | None
    ) -> None:
        self._reading = reading
        self._blocks = blocks
        self._family = family
        self._service, self._port = service, port
        self._shown: dict[Key, list[Line]] = {}
        self._visited: set[Key] = set()
        self.serves = False

    def met(self) -> list[Met]:
        found: list[Met] = []
        translated = False
        for stage in self._reading.stages:
            if stage.needs_translation and not translated:
                continue
            roots = [Key(self._family, table, "chain", name) for table, name in stage.chains]
            keys = [key for key in roots if self._leads(key)]
            translated = translated or (stage.translates and bool(keys))
            for key in keys:
                found.append(Met(stage.what, self._blocks[key], self._shown[key]))
            for key in keys:
                for line in self._shown[key]:
                    found += self._behind(stage.what, key, line)
        return found

    def _behind(self, stage: str, key: Key, line: Line) -> Iterator[Met]:
        for target in self._reading.targets(key, line.text):
            if target in self._visited or not self._leads(target):
                continue
            self._visited.add(target)
            yield Met(stage, self._blocks[target], self._shown[target])
            for further in self._shown[target]:
                yield from self._behind(stage, target, further)

    def _leads(self, key: Key) -> bool:
        """Whether a block holds something for the Service; remembers what."""
        if key not in self._shown:
            self._shown[key] = []  # a chain that leads back to itself
            block = self._blocks.get(key)
            if block:
                self._shown[key] = [line for line in block.lines if self._is_shown(key, line)]
        return bool(self._shown[key])

    def _is_shown(self, key: Key, line: Line) -> bool:
        if line.state == "there" and not self._reading.is_told(key, line.text):
            return False
        owners = self._reading.owners(key, line.text)
        if owners:
            ours = any(self._is_ours(owner) for owner in owners)
            self.serves = self.serves or ours
            return ours
        targets = [t for t in self._reading.targets(key, line.text) if t in self._blocks]
        asked = [t for t in targets if t.kind != "chain" and not self._blocks[t].learns]
        chains = [t for t in targets if t.kind == "chain"]
        if not targets or key.kind != "chain":
            return self._reading.is_met(key, line.text)
        return all(map(self._leads, asked)) and (not chains or any(map(self._leads, chains)))

    def _is_ours(self, owner: Owner) -> bool:
        if owner.service != self._service:
            return False
        return self._port in (None, owner.port) or owner.port == self._service
