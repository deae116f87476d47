"""Sets of the kernel, changed and read by the tool ipset.

Source: ipset(8); what `ipset save` prints is input for `ipset restore`.
"""

from __future__ import annotations

import subprocess
from collections.abc import Collection, Iterable, Iterator

from netlab.datapath.services.ipvs_listing import creation, plain
from netlab.datapath.state import IpSet
from netlab.kernel.namespaces import entered
from netlab.kernel.xtables import which
from netlab.problems import Exit, NetlabError, Problem


def program() -> str:
    """Path of the tool.  Raises NetlabError (exit 3) if it is not installed."""
    found = which("ipset")
    if found is None:
        message = '"ipset" is not installed'
        hint = "`apt-get install ipset` on Debian and Ubuntu"
        raise NetlabError(Problem("missing-program", message, hint=hint), Exit.MACHINE)
    return found


def saved(namespace: str | int) -> str:
    """All sets of a namespace as `ipset save` prints them.  Raises NetlabError (exit 3)."""
    return _run(namespace, "save", "", "sets-unreadable")


def restore(namespace: str | int, text: str) -> None:
    """Carry out lines of `ipset restore`; what they ask for may be there already, or be gone.

    Raises NetlabError (exit 3) with the tool's own words.
    """
    if text:
        _run(namespace, "restore", text, "sets-refused")


def created(sets: Iterable[IpSet]) -> str:
    """Lines that make sets and add entries."""
    return "".join(line for each in sets for line in _created(each))


def _created(each: IpSet) -> Iterator[str]:
    yield f"{creation(each)}\n"
    yield from [f"add {each.name} {entry}\n" for entry in each.entries]


def without(sets: Iterable[IpSet]) -> str:
    """Lines that take entries away."""
    return "".join(f"del {each.name} {entry}\n" for each in sets for entry in each.entries)


def destroyed(names: Iterable[str]) -> str:
    """Lines that remove sets, which no rule may ask any more."""
    return "".join(f"destroy {name}\n" for name in names)


def parsed(text: str, names: Collection[str]) -> dict[str, IpSet]:
    """Of what `ipset save` printed the sets of these names, by name."""
    found: dict[str, tuple[str, str]] = {}
    entries: dict[str, list[str]] = {}
    for line in text.splitlines():
        verb, name, rest = line.split(None, 2)
        if verb == "add" and name in entries:
            entries[name].append(plain(rest))
        elif verb == "create" and name in names:
            kind, _, options = rest.partition(" ")
            found[name] = kind, options
            entries[name] = []
    return {
        name: IpSet(
            name=name,
            kind=kind,
            family=6 if "inet6" in options else 4 if "inet" in options else None,
            entries=tuple(entries[name]),
        )
        for name, (kind, options) in found.items()
    }


def _run(namespace: str | int, verb: str, text: str, code: str) -> str:
    command = [program(), "-exist", verb]
    with entered(namespace):
        done = subprocess.run(command, input=text.encode(), capture_output=True)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip() or "no message"
        message = f"ipset {verb} ended with status {done.returncode}: {said}"
        hint = "`netlab doctor` tells what the kernel lacks"
        raise NetlabError(Problem(code, message, hint=hint), Exit.MACHINE)
    return done.stdout.decode()
