"""The questions of `trace.path.Tables`, asked of the machine that a place is on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from netlab.kernel.listeners import Listener
from netlab.kernel.xfrm import Policy
from netlab.trace.model_steps import Bridge, Neighbour, Route, Socket, Tuple
from netlab.trace.place import Place
from netlab.trace.witnesses.decisions import Link


class Question(NamedTuple):
    """Types of what is sent and of what comes back."""

    arguments: Any
    answer: Any


QUESTIONS = {
    "link": Question(tuple[Place, str | int], Link | None),
    "route": Question(tuple[Place, str, str | None, str | None, int], Route | None),
    "neighbour": Question(tuple[Place, str, str], Neighbour | None),
    "port": Question(tuple[Place, str, str], Bridge | None),
    "tunnel": Question(tuple[Place, str, str], Bridge | None),
    "ports": Question(tuple[Place, str], list[Link]),
    "early_chains": Question(tuple[Place], list[str] | None),
    "policies": Question(tuple[Place], list[Policy] | None),
    "bridge_netfilter": Question(tuple[Place], bool),
    "off_by": Question(tuple[Place, str], str | None),
    "setting": Question(tuple[Place, str], str | None),
    "failed_inserts": Question(tuple[Place], int),
    "remembered": Question(tuple[Place, str, Tuple], Socket | None),
    "listeners": Question(tuple[Place, str, int], list[Listener] | None),
}

Ask = Callable[[str, str, list[Any]], bytes]  # node, question, arguments


class RemoteTables:
    """The tables of all machines; what was answered once is remembered."""

    def __init__(self, ask: Ask) -> None:
        self._ask_node = ask
        self._known: dict[bytes, Any] = {}

    def _ask(self, question: str, place: Place, *arguments: Any) -> Any:
        key = msgspec.msgpack.encode((question, place, arguments))
        if key not in self._known:
            assert place.node is not None  # of other places nothing was seen
            data = self._ask_node(place.node, question, [place, *arguments])
            self._known[key] = msgspec.msgpack.decode(data, type=QUESTIONS[question].answer)
        return self._known[key]

    def link(self, place: Place, device: str | int) -> Link | None:
        found: Link | None = self._ask("link", place, device)
        return found

    def route(
        self,
        place: Place,
        destination: str,
        source: str | None = None,
        iif: str | None = None,
        mark: int = 0,
    ) -> Route | None:
        found: Route | None = self._ask("route", place, destination, source, iif, mark)
        return found

    def neighbour(self, place: Place, address: str, device: str) -> Neighbour | None:
        found: Neighbour | None = self._ask("neighbour", place, address, device)
        return found

    def port(self, place: Place, bridge: str, mac: str) -> Bridge | None:
        found: Bridge | None = self._ask("port", place, bridge, mac)
        return found

    def tunnel(self, place: Place, device: str, mac: str) -> Bridge | None:
        found: Bridge | None = self._ask("tunnel", place, device, mac)
        return found

    def ports(self, place: Place, bridge: str) -> list[Link]:
        found: list[Link] = self._ask("ports", place, bridge)
        return found

    def early_chains(self, place: Place) -> list[str] | None:
        found: list[str] | None = self._ask("early_chains", place)
        return found

    def policies(self, place: Place) -> list[Policy] | None:
        found: list[Policy] | None = self._ask("policies", place)
        return found

    def bridge_netfilter(self, place: Place) -> bool:
        return bool(self._ask("bridge_netfilter", place))

    def off_by(self, place: Place, device: str) -> str | None:
        found: str | None = self._ask("off_by", place, device)
        return found

    def setting(self, place: Place, path: str) -> str | None:
        found: str | None = self._ask("setting", place, path)
        return found

    def failed_inserts(self, place: Place) -> int:
        return int(self._ask("failed_inserts", place))

    def remembered(self, place: Place, protocol: str, flow: Tuple) -> Socket | None:
        found: Socket | None = self._ask("remembered", place, protocol, flow)
        return found

    def listeners(self, place: Place, protocol: str, port: int) -> list[Listener] | None:
        found: list[Listener] | None = self._ask("listeners", place, protocol, port)
        return found
