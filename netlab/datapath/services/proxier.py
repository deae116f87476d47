"""Rules that follow the Services: what a change of some costs depends on those alone.

As kube-proxy's proxiers do, a `Proxier` keeps what the rules of its node are made of, and tells for
each change what to write.  A process that stays keeps one for each node; a command makes one of
what was declared before and asks it once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from netlab.datapath.services.endpoints import ServiceObjects, service_objects
from netlab.datapath.state import BalancingUpdate, Rules, Update
from netlab.topology.model import Lab, Node

ServiceChanges = Mapping[str, ServiceObjects | None]
"""Services that differ, by key; None: there is no such Service any more."""


class Proxier(Protocol):
    """The rules of one node, in one mode, with settings that do not change.

    Made by `Mode.proxier(lab, node)`; what it knows at first is that lab.
    """

    def whole(self) -> Rules:
        """All rules, as `Mode.render` gives them for what is known now."""

    def update(self, changes: ServiceChanges) -> Update | BalancingUpdate | None:
        """What turns the rules of what was known before into those of what is known from now on.

        Costs as much as the Services of `changes` do; the first call may look at all.  An empty
        update: nothing differs.  None: only :meth:`whole` will do, and so it will if the update is
        refused by the kernel.  Either way the changes are known afterwards.
        """


def service_changes(before: Lab, after: Lab) -> dict[str, ServiceObjects | None]:
    """Services of which something differs between two labs, by key; None: not in `after`."""
    old, new = service_objects(before), service_objects(after)
    changes: dict[str, ServiceObjects | None] = {key: None for key in old if key not in new}
    changes |= {key: objects for key, objects in new.items() if old.get(key) != objects}
    return changes


def update_between(
    proxier: Callable[[Lab, Node], Proxier] | None,
    before: Lab,
    after: Lab,
    node: Node,
    changes: ServiceChanges,
) -> Update | BalancingUpdate | None:
    """What turns a node's rules of one lab into those of another of the same mode.

    `changes` are the :func:`service_changes` between both.  None: only a whole load will do, as
    always in a mode without proxiers.
    """
    if not _same_frame(before, after, node):
        return None
    if not changes:
        return Update()
    return proxier(before, node).update(changes) if proxier else None


def _same_frame(before: Lab, after: Lab, node: Node) -> bool:
    """Whether all that rules depend on but the Services is the same."""
    return (
        node in before.nodes
        and before.service_proxy == after.service_proxy
        and before.iptables_backend == after.iptables_backend
        and before.service_cidrs == after.service_cidrs
        and before.overlay == after.overlay
    )
