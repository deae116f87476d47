"""Carry out a plan: make namespaces hold what they should.

Nearly all the time goes into the kernel, most of it under its rtnetlink lock.  What can be done
beside it is done in a second thread: it makes the namespaces one after the other, while this one
connects and configures those that are ready.
"""

from __future__ import annotations

import errno
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from netlab.datapath.state import (
    Address,
    Change,
    FdbEntry,
    Found,
    Item,
    Link,
    Namespace,
    Neighbour,
    Policy,
    Route,
    Sysctl,
)
from netlab.kernel import features, namespaces, observe, rtnetlink
from netlab.kernel.netlink import Socket
from netlab.problems import Exit, NetlabError, Problem

# How long ports may take to forward; on a machine that is not overloaded it is a millisecond.
_PORTS_S = 3.0


@dataclass
class _Open:
    """A namespace being worked on: our way in, its netlink socket, its interface numbers."""

    name: str
    descriptor: int
    netlink: Socket
    index: dict[str, int] = field(default_factory=lambda: {"lo": 1})

    def number(self, link: str) -> int:
        """The interface number of a link; a new link gets the next one."""
        if link not in self.index:
            self.index[link] = max(self.index.values()) + 1
        return self.index[link]

    def close(self) -> None:
        self.netlink.close()
        os.close(self.descriptor)


def carry_out(
    lab: str,
    changes: Sequence[Change],
    desired: Sequence[Namespace],
    found: Mapping[str, Found],
    ready: Callable[[str], None] = lambda name: None,
) -> None:
    """Make the changes that `plan` found between `found` and `desired`.

    `ready` is called with the name of each new namespace that makes pairs, as soon as it exists
    and from another thread.  Raises NetlabError with every refusal of the kernel.
    """
    by_namespace: dict[str, list[Change]] = {}
    for change in changes:
        by_namespace.setdefault(change.namespace, []).append(change)
    # Nodes and the switch first: veth pairs are made from the end that is there.
    ordered = sorted(desired, key=lambda ns: not _is_hub(ns))
    work = _Work(lab, {ns.name: ns for ns in ordered}, found, by_namespace)
    work.run([ns.name for ns in ordered], ready)
    for change in changes:
        if change.verb == "delete" and isinstance(change.item, Namespace):
            namespaces.remove(change.namespace)
    if work.problems:
        raise NetlabError(work.problems, Exit.MACHINE)


# Flushes what the routing of a namespace has learned, the MTU of paths for one.
_FORGET_PATHS = (
    Sysctl(path="net/ipv4/route/flush", value="1"),
    Sysctl(path="net/ipv6/route/flush", value="1"),
)


def forget_learned(names: Iterable[str]) -> None:
    """Let namespaces find out again what they have learned: MACs, and the MTU of paths."""
    for name in names:
        with namespaces.entered(name), Socket() as netlink:
            namespaces.write_sysctls(_FORGET_PATHS)
            netlink.request(
                [rtnetlink.forget_neighbour(body) for body in observe.learned_neighbours(netlink)]
            )


def _has_fallback_tunnels() -> bool:
    """Whether a namespace that was just made has links beside `lo`."""
    with namespaces.scratch() as fresh, namespaces.entered(fresh), Socket() as netlink:
        return len(observe.links_there(netlink)) > 1


def _is_hub(namespace: Namespace) -> bool:
    """Whether it is one that others hang on: it has a bridge, or makes the pairs to them."""
    return any(link.kind == "bridge" or link.makes_pair for link in namespace.links)


class _Work:
    def __init__(
        self,
        lab: str,
        desired: Mapping[str, Namespace],
        found: Mapping[str, Found],
        changes: Mapping[str, list[Change]],
    ) -> None:
        self.lab = lab
        self.desired = desired
        self.found = found
        self.changes = changes
        self.open: dict[str, _Open] = {}
        self.problems: list[Problem] = []
        # By the namespace that is waited for; then by who waits for it.
        self.waiting: dict[str, dict[str, list[Change]]] = {}
        self.waiting_links: dict[tuple[str, str], str] = {}  # (who waits, link): for whom
        # Loaded modules such as ipip put a device of their own into every namespace (tunl0).
        if any(link.kind == "ipip" for each in desired.values() for link in each.links):
            features.attempt(["ipip"])  # which loads it, before there are links that it would meet
        self.tunnels_of_the_kernel = _has_fallback_tunnels()
        self.ends = {
            (namespace.name, link.name): link
            for namespace in desired.values()
            for link in namespace.links
            if link.peer
        }

    def run(self, order: Sequence[str], ready: Callable[[str], None]) -> None:
        bridged = [name for name in order if _is_hub(self.desired[name])]
        leaves = [name for name in order if name in self.changes and name not in bridged]
        opened: queue.SimpleQueue[_Open | BaseException] = queue.SimpleQueue()
        thread = threading.Thread(
            target=self._open_all, args=(bridged, leaves, opened, ready), name="namespaces"
        )
        thread.start()
        try:
            for name in bridged:
                self.open[name] = _received(opened)
            # What goes, goes first, everywhere: a pair is made from one end alone.
            for name in bridged:
                self._apply(self.open[name], _deletions(self.changes.get(name, ())))
            for name in bridged:
                self._apply(self.open[name], _others(self.changes.get(name, ())))
            for name in leaves:
                leaf = self.open[name] = _received(opened)
                self._apply(leaf, _deletions(self.changes[name]))
                for maker, waiting in self.waiting.pop(name, {}).items():
                    self._apply(self.open[maker], waiting)
                self._apply(leaf, _others(self.changes[name]))
                del self.open[name]
                leaf.close()
            for name in bridged:
                if name in self.changes:
                    observe.await_ports(self.open[name].descriptor, _PORTS_S)
        finally:
            thread.join()
            for entry in self.open.values():
                entry.close()

    def _open_all(
        self,
        bridged: Sequence[str],
        leaves: Sequence[str],
        opened: queue.SimpleQueue[_Open | BaseException],
        ready: Callable[[str], None],
    ) -> None:
        try:
            for name in (*bridged, *leaves):
                there = self.found.get(name)
                if there:
                    with namespaces.entered(name):
                        descriptor = namespaces.open_current()
                        opened.put(_Open(name, descriptor, Socket(), dict(there.index)))
                else:
                    namespaces.remove(name)  # the file of a killed start
                    descriptor = namespaces.make(name, self.lab, self.desired[name].sysctls)
                    fresh = _Open(name, descriptor, Socket())
                    if self.tunnels_of_the_kernel:
                        fresh.index |= observe.links_there(fresh.netlink)
                    opened.put(fresh)
                    if name in bridged:
                        ready(name)
        except BaseException as error:  # raised by the thread that waits
            opened.put(error)

    def _apply(self, here: _Open, changes: Sequence[Change]) -> None:
        messages: list[bytes] = []
        sources: list[Change] = []
        sysctls: list[Sysctl] = []
        there = {None, *here.index}
        for change in changes:
            if awaited := self._awaited(change):
                self.waiting.setdefault(awaited, {}).setdefault(here.name, []).append(change)
            elif isinstance(change.item, Sysctl):
                if here.name in self.found or change.item.link:
                    sysctls.append(change.item)
            else:
                for packed in self._messages(here, change):
                    messages.append(packed)
                    sources.append(change)
        # One of a link that is there may be what its addresses need.
        self._write(here, [sysctl for sysctl in sysctls if sysctl.link in there])
        for refused in here.netlink.request(messages) if messages else ():
            change = sources[refused.index]
            if change.verb != "delete" or refused.errno not in _GONE:
                self.problems.append(_refusal(change, str(refused.strerror)))
        self._write(here, [sysctl for sysctl in sysctls if sysctl.link not in there])

    def _write(self, here: _Open, sysctls: list[Sysctl]) -> None:
        if sysctls:
            with namespaces.entered(here.descriptor):
                namespaces.write_sysctls(sysctls)

    def _awaited(self, change: Change) -> str | None:
        """The namespace without which a change cannot be made yet: that of a pair's other end.

        What is on such a link waits with it.
        """
        item = change.item
        if isinstance(item, Link):
            if change.verb != "add" or item.peer is None or not item.makes_pair:
                return None
            if item.peer.namespace in self.open:
                return None
            self.waiting_links[change.namespace, item.name] = item.peer.namespace
            return item.peer.namespace
        awaited = self.waiting_links.get((change.namespace, getattr(item, "link", None) or ""))
        return awaited if awaited in self.waiting else None

    def _messages(self, here: _Open, change: Change) -> Iterator[bytes]:
        item = change.item
        if isinstance(item, Namespace):
            return
        if isinstance(item, Link):
            yield from self._link_messages(here, change.verb, item)
            return
        if isinstance(item, Policy):
            delete_it = change.verb == "delete"
            yield (rtnetlink.delete_policy if delete_it else rtnetlink.add_policy)(item)
            return
        add, delete = _PACKERS[type(item)]
        link = here.number(item.link)  # type: ignore[union-attr, arg-type]
        yield (delete if change.verb == "delete" else add)(item, link)

    def _link_messages(self, here: _Open, verb: str, link: Link) -> Iterator[bytes]:
        if verb == "delete":
            yield rtnetlink.delete_link(here.index.pop(link.name))
            return
        index = here.number(link.name)
        master = here.number(link.master) if link.master else None
        if verb == "set":
            there = self.found[here.name]
            before = next(ln for ln in there.namespace.links if ln.name == link.name)
            yield rtnetlink.set_link(link, before, index, master)
            if link.master and (link.hairpin, link.master) != (before.hairpin, before.master):
                yield rtnetlink.set_hairpin(index, link.hairpin)
            if link.loss != before.loss:
                loss = link.loss
                yield rtnetlink.add_loss(loss, index) if loss else rtnetlink.delete_loss(index)
            if link.own_entry and not before.own_entry and before.mac:
                yield rtnetlink.add_own_entry(link.mac or before.mac, index)
            if link.name not in there.marked:
                yield rtnetlink.add_altname(index, namespaces.mark(self.lab, link.name))
            return
        if link.kind == "bridge":
            yield rtnetlink.add_bridge(link, index)
        elif link.vxlan:
            yield rtnetlink.add_vxlan(link, index, here.number(link.vxlan.device))
        elif link.ipip:
            yield rtnetlink.add_ipip(link, index, here.number(link.ipip.device))
        elif link.peer and link.makes_pair:
            other = self.open[link.peer.namespace]
            end = self.ends[link.peer.namespace, link.peer.link]
            far = other.number(end.name)
            yield rtnetlink.add_veth(link, index, master, end, far, other.descriptor)
        else:
            yield rtnetlink.set_up(index)  # the far end of a pair, made from the other side
        yield rtnetlink.add_altname(index, namespaces.mark(self.lab, link.name))
        if link.hairpin:
            yield rtnetlink.set_hairpin(index, on=True)
        if link.loss:
            yield rtnetlink.add_loss(link.loss, index)
        if not link.up:
            yield rtnetlink.set_up(index, up=False)


_PACKERS: dict[type[Item], tuple[Callable[..., bytes], Callable[..., bytes]]] = {
    Address: (rtnetlink.add_address, rtnetlink.delete_address),
    Route: (rtnetlink.add_route, rtnetlink.delete_route),
    Neighbour: (rtnetlink.add_neighbour, rtnetlink.delete_neighbour),
    FdbEntry: (rtnetlink.add_fdb, rtnetlink.delete_fdb),
}


# What is to be deleted may have gone by itself: the links of a namespace that somebody removed
# disappear some time after it, their other ends and what was on them with them.
_GONE = (errno.ENODEV, errno.ESRCH, errno.ENOENT, errno.EADDRNOTAVAIL)


def _deletions(changes: Iterable[Change]) -> list[Change]:
    return [change for change in changes if change.verb == "delete"]


def _others(changes: Iterable[Change]) -> list[Change]:
    return [change for change in changes if change.verb != "delete"]


def _received(opened: queue.SimpleQueue[_Open | BaseException]) -> _Open:
    entry = opened.get()
    if isinstance(entry, BaseException):
        raise entry
    return entry


def _refusal(change: Change, reason: str) -> Problem:
    from netlab.datapath.describe import describe

    return Problem(
        code="kernel-refused",
        message=f"{change.namespace}: cannot {change.verb} {describe(change.item)}: {reason}",
        hint="`netlab doctor` shows what this kernel can do",
    )
