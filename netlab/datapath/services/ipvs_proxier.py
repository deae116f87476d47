"""Services of ipvs mode that change: single servers, addresses and entries of sets.

Several Services may have an address, or an entry, in common, so that uses are counted.  Rules
change only when a set gets its first entry or loses its last one, and for load balancers that the
node itself may not use.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Iterable
from typing import TypeVar

from netlab.datapath.services import ipvs
from netlab.datapath.services import ipvs_sets as sets
from netlab.datapath.services.claims import Claims, Losses, losses, settled
from netlab.datapath.services.endpoints import (
    ServiceObjects,
    ServicePortInfo,
    ports_of,
    service_objects,
)
from netlab.datapath.services.ipvs_rules import Barred, own_chains, ruleset
from netlab.datapath.services.ipvs_service import Parts, parts
from netlab.datapath.services.nftables_proxier import Uses
from netlab.datapath.services.proxier import ServiceChanges
from netlab.datapath.state import Balancing, BalancingUpdate, IpSet, VirtualServer
from netlab.topology.model import Lab, Node

_Services = Collection[ServiceObjects]
T = TypeVar("T", bound=Hashable)


class IPVSProxier:
    """Both families of one node: a :class:`netlab.datapath.services.proxier.Proxier`."""

    def __init__(self, lab: Lab, node: Node) -> None:
        self._lab, self._node = lab, node
        self._known = service_objects(lab)
        self._families: dict[sets.Family, _Family] = {}  # once something is known of all Services
        self._claims: Claims | None = None

    def whole(self) -> Balancing:
        """All servers, sets, addresses and rules."""
        self._learn()
        by_family = {family: each.parts(self._known.values()) for family, each in self._all}
        return ipvs.rendered(self._lab, self._node, by_family)

    def update(self, changes: ServiceChanges) -> BalancingUpdate | None:
        """What differs by the Services that change.

        None where such a Service has an address and port that others have too: what it is given or
        takes concerns them.
        """
        claims = self._claims or self._learn()
        before = [self._known[key] for key in changes if key in self._known]
        after = [objects for objects in changes.values() if objects is not None]
        updates: list[BalancingUpdate] = []
        if claims.change(before, after):
            self._claims = None
        else:
            updates = [each.update(before, after) for _, each in self._all]
        for key, objects in changes.items():
            if objects is None:
                self._known.pop(key, None)
            else:
                self._known[key] = objects
        return self._joined(*updates) if updates else None

    @property
    def _all(self) -> Iterable[tuple[sets.Family, _Family]]:
        return self._families.items()

    def _learn(self) -> Claims:
        services = self._known.values()
        self._claims = claims = Claims(services)
        shared = claims.shared(services)
        self._families = {
            family: _Family(self._lab, self._node, family, shared) for family in ipvs.FAMILIES
        }
        for family in self._families.values():
            family.count(services)
        return claims

    def _joined(self, four: BalancingUpdate, six: BalancingUpdate) -> BalancingUpdate:
        return BalancingUpdate(
            device=ipvs.DEVICE,
            addresses=four.addresses + six.addresses,
            servers=four.servers + six.servers,
            sets=four.sets + six.sets,
            no_addresses=four.no_addresses + six.no_addresses,
            no_servers=four.no_servers + six.no_servers,
            no_sets=four.no_sets + six.no_sets,
            ipv4=four.ipv4,
            ipv6=six.ipv6,
            backend=self._lab.iptables_backend,
        )


class _Family:
    """What all Services together put on the node in one family, as often as they do."""

    def __init__(self, lab: Lab, node: Node, family: sets.Family, shared: _Services) -> None:
        self._lab, self._node, self._family = lab, node, family
        self._settings = ipvs.settings_of(lab, node, family)
        self._losses: Losses = losses(self._ports(shared))

    def parts(self, services: _Services) -> Parts:
        return parts(self._settings, settled(self._ports(services), self._losses))

    def count(self, services: _Services) -> None:
        every = self.parts(services)
        self._entries = Uses(every.entries)
        self._addresses = Uses(every.addresses)
        self._barred: Uses[Barred] = Uses(every.barred)
        self._filled = Counter(role for role, _ in self._entries)

    def update(self, before: _Services, after: _Services) -> BalancingUpdate:
        """Some of the Services that were counted become others."""
        old, new = self.parts(before), self.parts(after)
        lost, found = _difference(self._entries, old.entries, new.entries)
        no_addresses, addresses = _difference(self._addresses, old.addresses, new.addresses)
        gone, barred = _difference(self._barred, old.barred, new.barred)
        no_servers, servers = _servers(old.servers, new.servers)
        was = +self._filled
        self._filled.update(role for role, _ in found)
        self._filled.subtract(role for role, _ in lost)
        text = ""
        if was.keys() != (+self._filled).keys() or gone or barred:
            text = own_chains(ruleset(self._settings, (+self._filled).keys(), self._barred))
        return BalancingUpdate(
            device=ipvs.DEVICE,
            addresses=tuple(addresses),
            servers=tuple(servers),
            sets=self._sets(found),
            no_addresses=tuple(no_addresses),
            no_servers=tuple(no_servers),
            no_sets=self._sets(lost),
            ipv4=text if self._family == 4 else "",
            ipv6=text if self._family == 6 else "",
        )

    def _sets(self, entries: Iterable[tuple[str, str]]) -> tuple[IpSet, ...]:
        by_role: dict[str, list[str]] = {}
        for role, entry in entries:
            by_role.setdefault(role, []).append(entry)
        return tuple(
            sets.ip_set(role, self._family, tuple(found)) for role, found in by_role.items()
        )

    def _ports(self, services: _Services) -> list[ServicePortInfo]:
        return ports_of(services, self._lab.service_proxy, self._node, self._family)


def _difference(uses: Uses[T], lost: list[T], found: list[T]) -> tuple[list[T], list[T]]:
    """Things that are used no longer, and those that were not used before."""
    before, after = uses.change(lost, found)
    there, wanted = set(before), set(after)
    return [each for each in before if each not in wanted], [
        each for each in after if each not in there
    ]


def _servers(
    before: list[VirtualServer], after: list[VirtualServer]
) -> tuple[list[VirtualServer], list[VirtualServer]]:
    """Servers that go, and those that come or become others."""
    old, new = ({each.key: each for each in servers} for servers in (before, after))
    gone = [each for key, each in old.items() if key not in new]
    return gone, [each for key, each in new.items() if old.get(key) != each]
