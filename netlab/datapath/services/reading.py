"""Rules of Services as they are read: blocks of lines, held against what should be there.

A block is a chain, set or map; a line is a rule or an element.  Each mode reads its own tools'
listings into blocks and knows whom a line serves, where it leads and what it says (`Reading`); to
compare two listings and to follow a Service through one is the same for all modes, and here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol, cast

import msgspec

from netlab.datapath.services.endpoints import ServicePortInfo, service_ports
from netlab.datapath.services.modes import Mode
from netlab.datapath.services.names import address_port
from netlab.datapath.state import Rules
from netlab.topology.model import Lab, Node

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
        if self.table in ("ipset", "ipvs"):
            what = "set " * (self.kind == "set")
            return f"{'IPv6 ' * (self.family == 'ip6')}{what}{self.name}"
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

    def __init__(
        self,
        lab: Lab,
        node: Node,
        ports: Callable[[Lab, Node, int], list[ServicePortInfo]] = service_ports,
    ) -> None:
        self.infos = {"ip": ports(lab, node, 4), "ip6": ports(lab, node, 6)}
        self._pods = {address: pod for pod in lab.pods for address in pod.addresses}
        self._where: dict[str, str] = {}  # by endpoint
        self.by_port: dict[str, dict[str, Owner]] = {}
        self.by_address: dict[str, dict[str, list[Owner]]] = {}
        self.by_endpoint: dict[str, dict[str, list[Owner]]] = {}
        self.by_local_endpoint: dict[str, dict[str, list[Owner]]] = {}  # of this node alone
        self._node = node.name
        for family, infos in self.infos.items():
            self._index(family, infos)

    def _index(self, family: str, infos: list[ServicePortInfo]) -> None:
        ports = self.by_port.setdefault(family, {})
        addresses = self.by_address.setdefault(family, {})
        endpoints = self.by_endpoint.setdefault(family, {})
        here = self.by_local_endpoint.setdefault(family, {})
        for info in infos:
            owner = Owner(info.name)
            own = (info.cluster_ip,) if info.has_cluster_ip else ()
            for ip in own + info.external_ips + info.load_balancer_ips:
                ports[f"{ip} . {info.protocol} . {info.port}"] = owner
            if info.node_port:
                ports[f"{info.protocol} . {info.node_port}"] = owner
            of_service = addresses.setdefault(info.cluster_ip, [])
            if Owner(owner.service) not in of_service:
                of_service.append(Owner(owner.service))
            for endpoint in info.reachable:
                text = address_port(endpoint)
                serving = Owner(info.name, text)
                endpoints.setdefault(f"{text}/{info.protocol}", []).append(serving)
                if endpoint.node == self._node:
                    here.setdefault(f"{text}/{info.protocol}", []).append(serving)
                who = f", pod {endpoint.pod}" if endpoint.pod else ""
                self._where[text] = f"{who} on {endpoint.node}" if endpoint.node else who

    def endpoint(self, text: str) -> str:
        """`10.244.1.4:8002, pod demo/myblog-1 on k8s-slave1`."""
        if text in self._where:
            return f"{text}{self._where[text]}"
        pod = self._pods.get(text.rpartition(":")[0].strip("[]"))
        who = f", pod {pod.key} on {pod.node}" if pod else ""
        return f"{text}{who}, which is no endpoint"
