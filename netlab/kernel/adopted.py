"""The machine's own network namespace as a node of a lab: taken, and given back as it was.

It gets a name as others do, under which everything that enters namespaces finds it, and two marks
on `lo`: the one that all namespaces of a lab have, and one that says that this one is not to go.
What it had before is noted in a file under /run, which a restart takes away with the settings.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from msgspec.structs import replace

from netlab.datapath.state import Found, Namespace, Sysctl
from netlab.kernel import namespaces, nft, observe, rtnetlink
from netlab.kernel.netlink import Socket

_LO = 1
_IPTABLES = {
    f"{family} {table}"
    for family in ("ip", "ip6")
    for table in ("raw", "mangle", "nat", "filter", "security")
}
_HOOKS = ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING")
# What the kernel sets on every link when forwarding is switched on or off.
_FORWARDING = "net/ipv4/conf"


def owners() -> list[str]:
    """Labs that the calling thread's namespace is a machine of; it has a name there or not yet."""
    with Socket() as netlink:
        names = [name.split(":") for name in observe.altnames(netlink, _LO)]
    return sorted(
        {parts[1] for parts in names if parts[0] == "netlab" and parts[2:] == ["machine"]}
    )


def is_adopted(name: str, lab: str) -> bool:
    """Whether a named namespace is a machine's own, which stays when the lab goes."""
    if not namespaces.is_mounted(name):
        return False
    with namespaces.entered(name), Socket() as netlink:
        return _mark(lab) in observe.altnames(netlink, _LO)


def adopt(name: str, lab: str, sysctls: Iterable[Sysctl], note: str) -> None:
    """Name the calling thread's namespace, marked; of these sysctls note what they are.

    What was noted earlier stays.  Whatever is there already is left as it is.
    """
    _note(sysctls, note)
    with Socket() as netlink:
        there = observe.altnames(netlink, _LO)
        wanted = (_mark(lab), namespaces.mark(lab, "lo"))
        for refused in netlink.request(
            [rtnetlink.add_altname(_LO, each) for each in wanted if each not in there]
        ):
            raise refused
    if namespaces.is_mounted(name):
        return
    namespaces.remove(name)  # the file of a killed start
    namespaces.name_current(name)


def ours(found: Found, desired: Namespace | None) -> Found:
    """Of what such a namespace has, what is a lab's or is to be; the rest is not looked at."""
    wanted = desired or Namespace(name=found.namespace.name)
    names = found.marked | {link.name for link in wanted.links}
    there = found.namespace
    kept = replace(
        there,
        links=tuple(each for each in there.links if each.name in names),
        addresses=tuple(each for each in there.addresses if each.link in names),
        routes=tuple(each for each in there.routes if each.link in names),
        neighbours=tuple(each for each in there.neighbours if each.link in names),
        fdb=tuple(each for each in there.fdb if each.link in names),
        policies=tuple(each for each in there.policies if each in wanted.policies),
    )
    return replace(found, namespace=kept)


def release(name: str | None, lab: str, note: str) -> None:
    """Take a lab's links and marks out of a machine's namespace, and its settings back.

    Without a name: of the calling thread's, for a start that was killed before there was one.
    Rules must have gone before.
    """
    with namespaces.entered(name) if name else contextlib.nullcontext(), Socket() as netlink:
        marks = namespaces.mark(lab, "")
        found = observe.links_marked(netlink, marks)
        requests = [rtnetlink.delete_link(number) for link, number in found.items() if link != "lo"]
        for request in requests:  # one may go with another: the ends of a pair, what is above
            list(netlink.request([request]))
        namespaces.write_sysctls(_noted(note))
        there = observe.altnames(netlink, _LO)
        own = [each for each in (namespaces.mark(lab, "lo"), _mark(lab)) if each in there]
        noted = _read(note)
        if "chains" in noted:
            _drop_frames(noted["chains"])
        list(netlink.request([rtnetlink.delete_altname(_LO, each) for each in own]))
    if name:
        namespaces.remove(name)


def _mark(lab: str) -> str:
    return namespaces.mark(lab, "machine")


def _note(sysctls: Iterable[Sysctl], note: str) -> None:
    before = _read(note)
    links = os.listdir(f"/proc/sys/{_FORWARDING}")
    paths = [each.path for each in sysctls if not each.link]
    if "net/ipv4/ip_forward" in paths:
        paths += [f"{_FORWARDING}/{link}/forwarding" for link in links]
    now = {}
    for path in paths:
        with contextlib.suppress(OSError), open(f"/proc/sys/{path}") as file:
            now[path] = file.read().strip()
    os.makedirs(os.path.dirname(note), mode=0o700, exist_ok=True)
    before = _read(note)
    noted = {
        "sysctls": now | before.get("sysctls", {}),
        "chains": before["chains"] if "chains" in before else _chains(),
    }
    with open(f"{note}.new", "w") as file:
        json.dump(noted, file)
    os.replace(f"{note}.new", note)


def _chains() -> dict[str, list[str]]:
    """The chains of each of iptables' tables in nf_tables, "ip filter"."""
    here = namespaces.open_current()
    try:
        tables = nft.names(here) & _IPTABLES
        return {name: _parsed(nft.listing(here, [name]))[0] for name in sorted(tables)}
    finally:
        os.close(here)


def _parsed(listing: str) -> tuple[list[str], set[str]]:
    """All chains of a listed table, and those of them that are empty frames."""
    chains: list[str] = []
    busy: set[str] = set()
    for line in listing.splitlines():
        words = line.split()
        if words[:1] == ["chain"]:
            chains.append(words[1])
        elif words and words[0] not in ("table", "}", "type", "#"):
            busy.add(chains[-1] if chains else "")
        elif words[:1] == ["type"] and "policy accept" not in line:
            busy.add(chains[-1])
    return chains, set(chains) & set(_HOOKS) - busy


def _read(note: str) -> dict[str, Any]:
    try:
        with open(note) as file:
            found: dict[str, Any] = json.load(file)
            return found
    except FileNotFoundError:
        return {}


def _drop_frames(before: Mapping[str, Sequence[str]]) -> None:
    """Take away what iptables made of its own tables for a lab's rules, and others do not use."""
    here = namespaces.open_current()
    try:
        for name in sorted(nft.names(here) & _IPTABLES):
            chains, empty = _parsed(nft.listing(here, [name]))
            gone = sorted(empty - set(before.get(name, ())))
            if name not in before and len(gone) == len(chains):
                nft.delete(here, [name])
            elif gone:
                nft.change(here, "".join(f"delete chain {name} {chain}\n" for chain in gone))
    finally:
        os.close(here)


def _noted(note: str) -> list[Sysctl]:
    """Settings as they were, those of all links before those of each."""
    found = [
        Sysctl(path=path, value=value) for path, value in _read(note).get("sysctls", {}).items()
    ]
    # conf/all and ip_forward are one
    return sorted(found, key=lambda each: bool(each.link) and each.path.startswith(_FORWARDING))
