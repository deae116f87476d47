"""Which lab a name means, and what was declared for it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from netlab.problems import Exit, NetlabError, Problem, suggest

if TYPE_CHECKING:
    from netlab.topology.model import Lab


def running_lab(name: str | None, on_machines: bool = False) -> Lab:
    """The lab that is up under that name, or the only one, as its faults make it appear.

    NetlabError as from :func:`declared_lab`.
    """
    found = declared_lab(name, on_machines)
    if not found.faults:
        return found
    from netlab.datapath.faults import faulty

    return faulty(found)


def declared_lab(name: str | None, on_machines: bool = False) -> Lab:
    """The lab that is up under that name, or the only one, as it was declared.

    NetlabError (exit code 2) if there is none, or more than one, or if its nodes are machines of
    their own and that is no matter for the caller; 3 if nobody knows any more what was declared,
    and without root.
    """
    from netlab.lab import record

    if os.geteuid() != 0:
        raise NetlabError(
            Problem("not-root", "labs are made of network namespaces, which only root may enter"),
            Exit.MACHINE,
        )
    name = name or only_lab()
    if is_on_machines(name):
        from netlab.hosts import record as hosts

        if recorded := hosts.read(name):
            if on_machines:
                return recorded.lab
            raise _on_machines(name)
    found = record.read(name)
    if found is None:
        raise unknown_lab(name)
    return found


def declared_of(name: str) -> Lab | None:
    """What was declared for a lab, wherever its nodes live; None if nobody knows."""
    from netlab.lab import record

    if is_on_machines(name):
        from netlab.hosts import record as hosts

        recorded = hosts.read(name)
        return recorded.lab if recorded else None
    return record.read(name)


def refuse_machines(name: str) -> None:
    """NetlabError (exit 2) if a lab's nodes are machines, or this one is a node of it."""
    from netlab.lab import record

    part = record.part(name)
    if is_on_machines(name) or part:
        where = f"this machine is its node {part.node}" if part else "its nodes are machines"
        raise NetlabError(
            Problem(
                "on-machines",
                f"lab {name} is up already, and {where}",
                hint="where it was brought up: `netlab up --hosts` changes it, `netlab down` gives "
                "the machines back",
            )
        )


def is_on_machines(name: str) -> bool:
    """Whether a lab's nodes are machines of their own, brought up from here."""
    there = os.path.exists(f"/run/netlab.hosts/{name}/hosts.json")
    return there and not os.environ.get("NETLAB_HERE")


def _on_machines(name: str) -> NetlabError:
    text = f"the nodes of lab {name} are machines of their own, and this verb does not reach them"
    hint = "whoever logs in to a machine has `netlab rules`, `netlab conntrack --node NAME` and "
    hint += "`netlab capture` there, for its own part"
    return NetlabError(Problem("on-machines", text, hint=hint))


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
