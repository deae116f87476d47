"""Settings of iptables mode: single rules and chains of Services that change.

kube-proxy writes the chains that all Services share anew at each change, which takes ten times as
long as all the rest where there are 10,000 Services.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace

from netlab.datapath.services.claims import Claims
from netlab.datapath.services.endpoints import (
    ServiceObjects,
    ServicePortInfo,
    ports_of,
    service_objects,
)
from netlab.datapath.services.iptables import LARGE_CLUSTER, render_services, settings_of
from netlab.datapath.services.iptables_save import Table, update
from netlab.datapath.services.iptables_service import Settings, add_filter_rules, add_nat_rules
from netlab.datapath.services.proxier import ServiceChanges
from netlab.datapath.state import Ruleset, Update
from netlab.topology.model import Lab, Node

_Services = Collection[ServiceObjects]


class IPTablesProxier:
    """Both families of one node: a :class:`netlab.datapath.services.proxier.Proxier`."""

    def __init__(self, lab: Lab, node: Node) -> None:
        self._lab, self._node = lab, node
        self._known = service_objects(lab)
        self._claims: Claims | None = None  # once a change wanted to know
        self._large: dict[int, bool] = {}  # by family, once a change wanted to know

    def whole(self) -> Ruleset:
        """All rules."""
        return render_services(self._lab, self._node, self._known.values())

    def update(self, changes: ServiceChanges) -> Update | None:
        """The chains of Services that change, and their rules in the chains that all share.

        None where a cluster becomes a large one, or is one no longer: all comments come or go.  And
        where several Services have an address and port of those that change: their order counts.
        """
        old = self._known
        new = {**old, **{key: each for key, each in changes.items() if each is not None}}
        for key, objects in changes.items():
            if objects is None:
                new.pop(key, None)
        self._known = new
        before, after = ([each[key] for key in changes if key in each] for each in (old, new))
        self._claims = self._claims or Claims(old.values())
        if self._claims.change(before, after):
            self._large.clear()
            return None
        texts = []
        for family in (4, 6):
            ports = [self._ports(services, family) for services in (before, after)]
            large = False
            if ports[0] != ports[1]:
                was = self._large.get(family)
                was = self._is_large(old.values(), family) if was is None else was
                self._large[family] = large = self._is_large(new.values(), family)
                if large is not was:
                    self._large.clear()
                    return None
            settings = replace(settings_of(self._lab, self._node, family), large_cluster=large)
            parts = zip(*(_tables(settings, infos) for infos in ports), strict=True)
            texts.append("".join(update(*tables) for tables in parts))
        return Update(ipv4=texts[0], ipv6=texts[1], backend=self._lab.iptables_backend)

    def _ports(self, services: Iterable[ServiceObjects], family: int) -> list[ServicePortInfo]:
        return ports_of(services, self._lab.service_proxy, self._node, family)

    def _is_large(self, services: _Services, family: int) -> bool:
        """Whether comments are left out; a few Services tell if there are many."""
        endpoints = 0
        for objects in services:
            endpoints += sum(len(info.known) for info in self._ports((objects,), family))
            if endpoints > LARGE_CLUSTER:
                return True
        return False


def _tables(settings: Settings, infos: Iterable[ServicePortInfo]) -> tuple[Table, Table]:
    """What Services put into the filter and the nat table."""
    filters, nat = Table("filter", "", ""), Table("nat", "", "")
    for info in infos:
        add_filter_rules(filters, settings, info)
        add_nat_rules(nat, settings, info)
    return filters, nat
