"""Proxiers of the nftables modes: a table for each family, kept up to date by transactions.

Nearly all that a Service puts into a table is its own.  What several may have in common is counted
when the table is rendered whole, so that a process that stays knows it; for a command that only
changes some it is looked for among the others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from functools import partial
from typing import Generic, TypeVar

from netlab.datapath.services.claims import Claims, Losses, losses, settled
from netlab.datapath.services.collecting import no_collecting
from netlab.datapath.services.endpoints import (
    ServiceObjects,
    ServicePortInfo,
    ports_of,
    service_objects,
)
from netlab.datapath.services.nftables_list import TableText, update
from netlab.datapath.services.nftables_service import HAIRPINS, Settings, hairpins
from netlab.datapath.services.proxier import ServiceChanges
from netlab.datapath.state import Table, Tables, Update
from netlab.topology.model import Lab, Node

Services = Collection[ServiceObjects]
T = TypeVar("T", bound=Hashable)


class TablesProxier:
    """Both tables of one node: a :class:`netlab.datapath.services.proxier.Proxier`."""

    def __init__(
        self, lab: Lab, node: Node, table: Callable[[Lab, Node, int], TableProxier]
    ) -> None:
        self._known = service_objects(lab)
        self._new_tables = partial(_both, lab, node, table)
        self._tables = self._new_tables()
        self._claims: Claims | None = None  # of what is known, once a change wanted to know

    @no_collecting()
    def whole(self) -> Tables:
        """Both tables with all Services."""
        services = self._known.values()
        if any(each.service.external_ips or each.service.load_balancer_ips for each in services):
            self._count_claims()
        return Tables(tables=tuple(table.whole(services) for table in self._tables))

    def update(self, changes: ServiceChanges) -> Update | None:
        """Commands for elements and chains of the Services that change, in one transaction.

        None where such a Service has an address and port that others have too: what it is given or
        takes concerns them.
        """
        claims = self._claims or self._count_claims()
        before = [self._known[key] for key in changes if key in self._known]
        after = [objects for objects in changes.values() if objects is not None]
        known = self._known.values()
        updates: list[Update | None] = []
        if claims.change(before, after):
            self._tables = self._new_tables()
            self._claims = None
        else:
            updates = [table.update(known, before, after) for table in self._tables]
        for key, objects in changes.items():
            if objects is None:
                self._known.pop(key, None)
            else:
                self._known[key] = objects
        found = [update for update in updates if update is not None]
        if len(found) < len(self._tables):
            return None
        ipv4, ipv6 = found
        return Update(tables=ipv4.tables + ipv6.tables, forget=ipv4.forget + ipv6.forget)

    def _count_claims(self) -> Claims:
        services = self._known.values()
        self._claims = claims = Claims(services)
        shared = claims.shared(services)
        for table in self._tables:
            table.settle(shared)
        return claims


def _both(
    lab: Lab, node: Node, table: Callable[[Lab, Node, int], TableProxier]
) -> tuple[TableProxier, TableProxier]:
    return table(lab, node, 4), table(lab, node, 6)


class TableProxier(ABC):
    """The table of one family, in one layout."""

    def __init__(self, lab: Lab, node: Node, family: int, settings: Settings) -> None:
        self.lab, self.node, self.family, self.settings = lab, node, family, settings
        self.hairpins: Uses[str] | None = None  # of all Services, once they are counted
        self._losses: Losses = {}

    @abstractmethod
    def whole(self, services: Services) -> Table:
        """The table with these Services."""

    @abstractmethod
    def update(self, known: Services, before: Services, after: Services) -> Update | None:
        """Some of the known Services become others.  None: load it whole."""

    def settle(self, shared: Services) -> None:
        """Take note of all Services that have an address and port that others have, too."""
        self._losses = losses(self._ports(shared))

    def ports(self, services: Services) -> list[ServicePortInfo]:
        """Service ports as this table sees them."""
        return settled(self._ports(services), self._losses)

    def _ports(self, services: Services) -> list[ServicePortInfo]:
        return ports_of(services, self.lab.service_proxy, self.node, self.family)

    def commands(self, known: Services, before: TableText, after: TableText) -> str:
        """Input for nft: what some of the known Services add becomes something else."""
        lost, found = (part.elements[HAIRPINS] for part in (before, after))
        if Counter(lost) != Counter(found):
            uses = self.hairpins or self._hairpins_among(known, {*lost, *found})
            before.elements[HAIRPINS], after.elements[HAIRPINS] = uses.change(lost, found)
        return update(before, after)

    def _hairpins_among(self, known: Services, elements: set[str]) -> Uses[str]:
        """Those of the Services that may have one of these elements."""
        addresses = {element.partition(" ")[0] for element in elements}
        some = [
            objects
            for objects in known
            if any(e.address in addresses for entry in objects.endpoints for e in entry.endpoints)
        ]
        return Uses(each for info in self.ports(some) for each in hairpins(self.settings, info))


class Uses(Generic[T]):
    """How often things are used that are there once."""

    def __init__(self, used: Iterable[T]) -> None:
        self._counts = Counter(used)

    def __iter__(self) -> Iterator[T]:
        return iter(self._counts)

    def change(self, lost: Iterable[T], found: Iterable[T]) -> tuple[list[T], list[T]]:
        """Take note of uses that end and begin; which of these things were and are in use."""
        ending, beginning = Counter(lost), Counter(found)
        concerned = ending | beginning
        before = [thing for thing in concerned if self._counts[thing]]
        self._counts.update(beginning)
        self._counts.subtract(ending)
        for thing in ending:
            if not self._counts[thing]:
                del self._counts[thing]
        return before, [thing for thing in concerned if self._counts[thing]]
