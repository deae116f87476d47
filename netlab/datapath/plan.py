"""What must change: the difference between what is there and what should be.

Pure, so that `--dry-run` prints it, `--shell` spells it out and the kernel code only carries it
out.  Things in our namespaces that somebody else put there are left alone where that can be told:
a link without our mark is never deleted, nor are routes of the kernel or of a routing daemon.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from netlab.datapath.state import Change, Found, Item, LabState, Link, Namespace, Sysctl


def plan(desired: LabState, found: Mapping[str, Found]) -> list[Change]:
    """Changes that lead from `found` (by namespace name) to `desired`.

    Deletions come before additions within a namespace, and namespaces no longer wanted last.
    """
    wanted = desired.namespaces()
    halves = _halves(wanted, found)
    changes: list[Change] = []
    for namespace in wanted:
        there = found.get(namespace.name)
        if there is None:
            changes.append(Change(verb="add", namespace=namespace.name, item=namespace))
            changes += (
                Change(verb="add", namespace=namespace.name, item=item)
                for item in _items(namespace)
            )
        else:
            changes += _differences(namespace, there, halves)
    names = {namespace.name for namespace in wanted}
    for name, there in found.items():
        if name not in names:
            changes.append(Change(verb="delete", namespace=name, item=there.namespace))
    return changes


def caused(changes: Sequence[Change], before: LabState, after: LabState) -> list[Change]:
    """Those of changes that lead from one state to another.

    The others would take back what somebody did by hand, whom a change of something else does not
    concern.  Links are known by their names: what is found of one may not be what it should be.
    """
    old, new = (
        {
            (namespace.name, *_identity(item)): item
            for namespace in state.namespaces()
            for item in (namespace, *_items(namespace))
        }
        for state in (before, after)
    )
    keys = [(change.namespace, *_identity(change.item)) for change in changes]
    wanted = [old.get(key) != new.get(key) for key in keys]
    # With a link goes what is on it, which is made anew with it: a VXLAN device, addresses, routes.
    touched: set[tuple[str, str | None]] = set()
    for change, is_wanted in zip(changes, wanted, strict=True):
        if isinstance(link := change.item, Link) and (
            is_wanted or (link.below and (change.namespace, link.below) in touched)
        ):
            touched.add((change.namespace, link.name))
    return [
        change
        for change, is_wanted in zip(changes, wanted, strict=True)
        if is_wanted or (change.namespace, _on(change.item)) in touched
    ]


def _on(item: Item) -> str | None:
    """The link that an item is, or is on."""
    return item.name if isinstance(item, Link) else _link_of(item)


def _identity(item: Item) -> tuple[object, ...]:
    match item:
        case Namespace():
            return (Namespace,)
        case Link(name=name):
            return Link, name
        case Sysctl(path=path):
            return Sysctl, path
    return (item,)


def _items(namespace: Namespace) -> Iterable[Item]:
    yield from (sysctl for sysctl in namespace.sysctls if not sysctl.link)
    yield from namespace.links
    yield from namespace.addresses
    yield from namespace.neighbours
    yield from namespace.fdb
    yield from namespace.routes
    yield from namespace.policies
    yield from (sysctl for sysctl in namespace.sysctls if sysctl.link)


def _halves(wanted: Iterable[Namespace], found: Mapping[str, Found]) -> set[tuple[str, str]]:
    """Ends of veth pairs whose other end is missing.

    The kernel removes a pair some time after one end's namespace went, so such an end may still
    be there: it must be deleted before the pair is made again.
    """
    halves = set()
    for namespace in wanted:
        for link in namespace.links:
            if link.peer is None or namespace.name not in found:
                continue
            there = found.get(link.peer.namespace)
            if there is None or link.peer.link not in there.index:
                halves.add((namespace.name, link.name))
    return halves


def _differences(
    desired: Namespace, found: Found, halves: set[tuple[str, str]]
) -> Iterable[Change]:
    name = desired.name
    there = {link.name: link for link in found.namespace.links}
    wanted = {link.name for link in desired.links}
    gone = {link for link in found.marked if link not in wanted and link != "lo"}
    added: list[Item] = []
    changed: list[Item] = []
    for link in desired.links:
        now = there.get(link.name)
        if now is not None and (
            (name, link.name) in halves
            or _other_device(link, now)
            # The kernel removes a tunnel's device with the one below it.
            or link.below in gone
        ):
            gone.add(link.name)
            now = None
        if now is None:
            added.append(link)
        elif not _same_settings(link, now) or link.name not in found.marked:
            changed.append(link)
    for link_name in sorted(gone):
        if link_name in there:
            yield Change(verb="delete", namespace=name, item=there[link_name])

    # What sat on a deleted link went with it; what sits on a link that is not ours is not ours.
    lasting: set[str | None] = {None, *wanted, "lo"} - gone
    readdressed = {
        link.name for link in changed if isinstance(link, Link) and _other_mac(link, there)
    }
    # A new MAC flushes the neighbours of its link, permanent ones too.
    pairs: tuple[tuple[Iterable[Item], Iterable[Item], set[str | None]], ...] = (
        (desired.addresses, found.namespace.addresses, lasting),
        (desired.neighbours, found.namespace.neighbours, lasting - readdressed),
        (desired.fdb, found.namespace.fdb, lasting),
        (desired.routes, found.namespace.routes, lasting),
        (desired.policies, found.namespace.policies, lasting),
    )
    for want, have, staying in pairs:
        want_set, have_set = set(want), {item for item in have if _link_of(item) in staying}
        for item in have:
            if item in have_set and item not in want_set:
                yield Change(verb="delete", namespace=name, item=item)
        added += (item for item in want if item not in have_set)
    values = {sysctl.path: sysctl.value for sysctl in found.namespace.sysctls}
    made = {item.name for item in added if isinstance(item, Link)}
    for sysctl in desired.sysctls:
        if sysctl.link in made:
            added.append(sysctl)  # what was read is what the link had that goes
        elif values.get(sysctl.path) != sysctl.value:
            changed.append(sysctl)
    # A link that is made gets what the namespace has; one that is there may have been set apart.
    off = {each.link for each in desired.addresses if ":" in each.address} & found.without_ipv6
    changed += (
        Sysctl(path=f"net/ipv6/conf/{link}/disable_ipv6", value="0")
        for link in sorted(off & lasting)
    )

    # Ports that are there are put into a new bridge by what sets them right.
    bridges = [item for item in added if isinstance(item, Link) and item.kind == "bridge"]
    others = [item for item in added if item not in bridges]
    yield from (Change(verb="add", namespace=name, item=item) for item in bridges)
    yield from (Change(verb="set", namespace=name, item=item) for item in changed)
    yield from (Change(verb="add", namespace=name, item=item) for item in others)


def _link_of(item: Item) -> str | None:
    return getattr(item, "link", None)


def _other_device(want: Link, have: Link) -> bool:
    return want.kind != have.kind or want.vxlan != have.vxlan or want.ipip != have.ipip


def _other_mac(want: Link, there: Mapping[str, Link]) -> bool:
    return want.mac is not None and want.mac != there[want.name].mac


def _same_settings(want: Link, have: Link) -> bool:
    return (
        want.up == have.up
        and want.mtu == have.mtu
        and want.master == have.master
        and want.hairpin == have.hairpin
        and want.own_entry == have.own_entry
        and want.loss == have.loss
        and want.mac in (None, have.mac)
    )
