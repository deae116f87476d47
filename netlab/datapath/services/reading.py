"""Rules of Services as they are read: blocks of lines, held against what should be there.

A block is a chain, set or map; a line is a rule or an element.  Each mode reads its own tools'
listings into blocks and knows whom a line serves, where it leads and what it says (`Reading`); to
compare two listings and to follow a Service through one is the same for all modes, and here.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Literal, NamedTuple, Protocol, cast

import msgspec
from msgspec.structs import replace

from netlab.datapath.services.endpoints import ServicePortInfo, service_ports
from netlab.datapath.services.modes import Mode, mode_of
from netlab.datapath.services.names import address_port
from netlab.datapath.state import Rules
from netlab.topology.model import Lab, Node, Service

_IPTABLES_TABLES = ("mangle", "filter", "nat")

State = Literal["there", "missing", "extra"]


class Key(NamedTuple):
    """What a block is found by."""

    family: str  # "ip", "ip6"
    table: str
    kind: str  # "chain", "set", "map"
    name: str

    def __str__(self) -> str:
        if self.table in _IPTABLES_TABLES:
            return f"{'IPv6 ' * (self.family == 'ip6')}{self.table} {self.name}".rstrip()
        block = "" if self.kind == "table" else f" {self.kind} {self.name}"
        return f"{self.family} {self.table}{block}"


class Owner(NamedTuple):
    """Whom a line serves."""

    port: str  # service port name, "demo/myblog:http"; only "demo/myblog" where all ports share it
    endpoint: str | None = None  # "10.244.1.4:8002"

    @property
    def service(self) -> str:
        """`namespace/name`."""
        return self.port.partition(":")[0]


class Line(msgspec.Struct):
    """A rule or an element, as the tool prints it."""

    text: str
    state: State = "there"
    packets: int | None = None  # None: it does not count
    bytes: int | None = None
    learned: bool = False  # an element that packets made


class Block(msgspec.Struct):
    """A chain, set or map; `state` is that of the whole."""

    key: Key
    lines: list[Line] = []
    state: State = "there"
    learns: bool = False  # a set to which packets add


Blocks = dict[Key, Block]


class Stage(NamedTuple):
    """A part of a packet's way: base chains at which it begins."""

    what: str
    chains: tuple[tuple[str, str], ...]  # table and name
    translates: bool = False
    needs_translation: bool = False  # not met by what no stage before has translated


class Reading(Protocol):
    """What a mode knows of its own listings.

    Made for a lab and a node; `whole` is whether the lab has all its Services, see `only`.
    """

    stages: Sequence[Stage]

    def __init__(self, lab: Lab, node: Node, *, whole: bool = True) -> None: ...

    @staticmethod
    def recognise(text: str) -> Mapping[str, str] | None:
        """The listings of families in what a tool has printed; None if it is none of this mode."""

    def blocks(self, printed: Mapping[str, str]) -> Blocks:
        """The blocks of ours in the listings of families ("ip", "ip6")."""

    def rendered(self, rules: Rules) -> Mapping[str, str]:
        """The listings of rules that are not loaded."""

    def comparable(self, key: Key, line: str) -> object:
        """Equal for lines that say the same to the kernel, however a version spells it."""

    def is_shared(self, key: Key) -> bool:
        """Whether the order of Services means nothing in a chain."""

    def is_ignored(self, key: Key, line: str | None) -> bool:
        """Whether a line (or a whole block) that is too much may be somebody else's."""

    def owners(self, key: Key, line: str) -> tuple[Owner, ...]:
        """Whom a line serves; nobody: all Services, or no Service of ours."""

    def endpoints(self, key: Key, line: str) -> Iterable[str]:
        """Endpoints that a line names, as "10.244.1.4:8002"."""

    def slot(self, key: Key, line: str) -> str | None:
        """What only one line of a block can have, such as the key of an element; None: nothing."""

    def targets(self, key: Key, line: str) -> Iterable[Key]:
        """Blocks that a packet meets because of a line, in order."""

    def is_told(self, key: Key, line: str) -> bool:
        """Whether a line that is as it should be says something of a packet's way."""

    def is_met(self, key: Key, line: str) -> bool:
        """Whether a line that serves nobody and leads nowhere is met by packets for a Service."""

    def sentence(self, block: Block, line: Line) -> str:
        """What a line does."""


def reading_of(mode: Mode) -> type[Reading] | None:
    """The class that explains the rules of a mode; None if it has none."""
    if not mode.reading:
        return None
    module, _, name = mode.reading.partition(":")
    found = getattr(importlib.import_module(f"netlab.datapath.services.{module}"), name)
    return cast(type[Reading], found)


class Known:
    """What the objects say of the names and addresses that lines hold."""

    def __init__(self, lab: Lab, node: Node) -> None:
        self.lab = lab
        self.node = node
        self.infos: dict[str, list[ServicePortInfo]] = {
            "ip": service_ports(lab, node, 4),
            "ip6": service_ports(lab, node, 6),
        }
        self._pods = {address: pod for pod in lab.pods for address in pod.addresses}
        self._nodes: dict[str, str] = {}
        self.by_port: dict[str, dict[str, Owner]] = {}
        self.by_address: dict[str, dict[str, list[Owner]]] = {}
        self.by_endpoint: dict[str, dict[str, list[Owner]]] = {}
        for family, infos in self.infos.items():
            self._index(family, infos)

    def _index(self, family: str, infos: list[ServicePortInfo]) -> None:
        ports = self.by_port.setdefault(family, {})
        addresses = self.by_address.setdefault(family, {})
        endpoints = self.by_endpoint.setdefault(family, {})
        for info in infos:
            owner = Owner(info.name)
            for ip in (info.cluster_ip, *info.external_ips, *info.load_balancer_ips):
                ports[f"{ip} . {info.protocol} . {info.port}"] = owner
            if info.node_port:
                ports[f"{info.protocol} . {info.node_port}"] = owner
            of_service = addresses.setdefault(info.cluster_ip, [])
            if Owner(owner.service) not in of_service:
                of_service.append(Owner(owner.service))
            for endpoint in info.reachable:
                text = address_port(endpoint)
                endpoints.setdefault(f"{text}/{info.protocol}", []).append(Owner(info.name, text))
                if endpoint.node:
                    self._nodes[endpoint.address] = endpoint.node

    def endpoint(self, text: str) -> str:
        """`10.244.1.4:8002, pod demo/myblog-1 on k8s-slave1`."""
        address = text.rpartition(":")[0].strip("[]")
        if pod := self._pods.get(address):
            return f"{text}, pod {pod.key} on {pod.node}"
        if node := self._nodes.get(address):
            return f"{text} on {node}"
        if any(
            f"{text}/{protocol}" in self.by_endpoint[family]
            for family in self.by_endpoint
            for protocol in ("tcp", "udp", "sctp")
        ):
            return text
        return f"{text}, which is no endpoint of the lab"


def only(lab: Lab, service: Service) -> Lab:
    """The lab with that Service alone; quick to render for every node."""
    endpoints = tuple(
        entry
        for entry in lab.endpoints
        if (entry.namespace, entry.service) == (service.namespace, service.name)
    )
    return replace(lab, services=(service,), endpoints=endpoints)


def read_service(
    lab: Lab, node: Node, service: Service, printed: Mapping[str, str], port: str | None = None
) -> tuple[Reading, list[Met]]:
    """What packets for a Service meet on a node that prints its rules so; `port` as in `walk`.

    What should be there and is not is among it, in its place.
    """
    reading, wanted = _wanted(only(lab, service), node, mode_of(lab), whole=False)
    found = _without_others(reading, reading.blocks(printed), service)
    return reading, walk(reading, merge(reading, wanted, found), service.key, port)


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


def _without_others(reading: Reading, found: Blocks, service: Service) -> Blocks:
    """What was found without that which serves other Services."""
    return {
        key: replace(block, lines=lines)
        for key, block in found.items()
        if (lines := [line for line in block.lines if _may_serve(reading, key, line, service)])
        or not block.lines
    }


def _may_serve(reading: Reading, key: Key, line: Line, service: Service) -> bool:
    owners = reading.owners(key, line.text)
    return not owners or any(owner.service == service.key for owner in owners)


# Comparing


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


# Following a Service


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
