"""Which lab a name means, and what was declared for it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from netlab.problems import Exit, NetlabError, Problem, suggest

if TYPE_CHECKING:
    from netlab.topology.model import Lab


def running_lab(name: str | None) -> Lab:
    """The lab that is up under that name, or the only one, as its faults make it appear.

    NetlabError as from :func:`declared_lab`.
    """
    found = declared_lab(name)
    if not found.faults:
        return found
    from netlab.datapath.faults import faulty

    return faulty(found)


def declared_lab(name: str | None) -> Lab:
    """The lab that is up under that name, or the only one, as it was declared.

    NetlabError (exit code 2) if there is none, or more than one; 3 if nobody knows any more what
    was declared, and without root.
    """
    from netlab.lab import record

    if os.geteuid() != 0:
        raise NetlabError(
            Problem("not-root", "labs are made of network namespaces, which only root may enter"),
            Exit.MACHINE,
        )
    found = record.read(name or only_lab())
    if found is None:
        raise unknown_lab(name or "")
    return found


def only_lab() -> str:
    """The name of the only lab that is up; twins of a comparison do not count beside others."""
    from netlab.lab import lifecycle, record

    labs = lifecycle.running()
    if len(labs) > 1:
        labs = [name for name in labs if not record.twin_of(name)] or labs
    if len(labs) == 1:
        return labs[0]
    if not labs:
        raise NetlabError(
            Problem("no-lab", "no lab is up", hint="`netlab up two-node-vxlan` builds one")
        )
    raise NetlabError(
        Problem(
            "which-lab",
            f"{len(labs)} labs are up: {', '.join(labs)}",
            hint=f"say which one: `--lab {labs[0]}`",
        )
    )


def naming(name: str) -> list[str]:
    """Options that a command takes to mean this lab: none where no other is up."""
    from netlab.lab import control, record

    if os.environ.get("NETLAB_LAB") == name:
        return []
    others = (each for each in control.running() if each != name)
    return ["--lab", name] if any(not record.twin_of(each) for each in others) else []


def unknown_lab(name: str) -> NetlabError:
    """What to say of a name that no lab has."""
    from netlab.lab import lifecycle

    labs = lifecycle.running()
    if name in labs:
        return NetlabError(
            Problem(
                "record-lost",
                f'lab "{name}" is there, but nobody knows any more what was declared for it',
                hint=f"`netlab up` with its topology restores it, `netlab down {name}` removes it",
            ),
            Exit.MACHINE,
        )
    near = suggest(name, labs)
    hint = f'did you mean "{near}"? ' if near else ""
    return NetlabError(
        Problem("unknown-lab", f'no lab "{name}" is up', hint=hint + "`netlab ls` lists them")
    )
