"""Faults of a lab that is up: chosen, injected, cleared.

Pure, like :mod:`netlab.lab.change`: each takes the lab as it is and returns it as it should be, or
raises NetlabError (exit code 2).
"""

from __future__ import annotations

import random
from collections.abc import Container, Iterator

import msgspec
from msgspec.structs import replace

from netlab.datapath.faults import FAULTS
from netlab.lab.edits import Changed
from netlab.problems import NetlabError, Problem, suggest
from netlab.topology.model import Fault, Lab
from netlab.topology.references import resolve


class Wanted(msgspec.Struct, frozen=True):
    """Where a fault shall be; None: anywhere."""

    node: str | None = None
    pod: str | None = None
    service: str | None = None
    namespace: str | None = None  # where bare names are looked for


ANYWHERE = Wanted()


def possible(lab: Lab, name: str, wanted: Wanted = ANYWHERE) -> Iterator[Fault]:
    """Each way to inject a fault where it is wanted."""
    node = resolve(lab, _of("node", wanted.node)).node if wanted.node else None
    pod = resolve(lab, _of("pod", wanted.pod), wanted.namespace).pod if wanted.pod else None
    service = (
        resolve(lab, _of("svc", wanted.service), wanted.namespace).service
        if wanted.service
        else None
    )
    if lab.families[0] != "IPv4":
        return
    for fault in FAULTS[name].choices(lab):
        if (
            (node is None or fault.node == node.name)
            and (pod is None or pod.key in (fault.client, fault.server))
            and (service is None or fault.service == service.key)
        ):
            yield replace(fault, name=name)


def inject(lab: Lab, name: str, wanted: Wanted = ANYWHERE) -> Changed:
    """Put a fault in, which is the last one of the lab then."""
    known(name)
    if any(fault.name == name for fault in lab.faults):
        hint = f"`netlab fault clear {name}` takes it out"
        raise NetlabError(Problem("fault-there", f"{name} is in lab {lab.name} already", hint=hint))
    for fault in possible(lab, name, wanted):
        return _with(lab, fault)
    where = [text for text in (wanted.node, wanted.pod, wanted.service) if text]
    at = f" at {', '.join(where)}" if where else ""
    raise NetlabError(
        Problem(
            "fault-impossible",
            f"{name} cannot be injected into lab {lab.name}{at}",
            hint=f"it needs {FAULTS[name].needs}, over IPv4",
        )
    )


def inject_any(lab: Lab, seed: int | None = None, features: Container[str] = ()) -> Changed:
    """Put in a fault that is not told, the same one for the same seed and lab.

    `features` are those that the kernel has, of those that a fault needs.
    """
    there = {fault.name for fault in lab.faults}
    names = [
        name
        for name, kind in FAULTS.items()
        if name not in there
        and (not kind.feature or kind.feature in features)
        and any(possible(lab, name))
    ]
    if not names:
        hint = f"`netlab topology ls` shows labs with more in them than {lab.name} has"
        raise NetlabError(
            Problem("fault-impossible", f"no fault fits into lab {lab.name}", hint=hint)
        )
    dice = random.Random(seed)
    fault = dice.choice(list(possible(lab, dice.choice(names))))
    return _with(lab, replace(fault, hidden=True))


def clear(lab: Lab, name: str | None = None) -> Changed:
    """Take a fault out again, or all."""
    if name is None:
        return Changed(replace(lab, faults=()), ())
    known(name)
    left = tuple(fault for fault in lab.faults if fault.name != name)
    if left == lab.faults:
        there = ", ".join(fault.name for fault in lab.faults if not fault.hidden)
        hint = f"it has {there}" if there else "`netlab fault list` shows what there is"
        raise NetlabError(Problem("no-fault", f"{name} is not in lab {lab.name}", hint=hint))
    return Changed(replace(lab, faults=left), ())


def reveal(lab: Lab) -> Changed:
    """Hide nothing any more."""
    return Changed(replace(lab, faults=tuple(replace(f, hidden=False) for f in lab.faults)), ())


def known(name: str) -> None:
    """NetlabError if there is no fault of that name."""
    if name not in FAULTS:
        near = suggest(name, list(FAULTS))
        hint = f'did you mean "{near}"?' if near else "`netlab fault list` shows them"
        raise NetlabError(Problem("unknown-fault", f'there is no fault "{name}"', hint=hint))


def _with(lab: Lab, fault: Fault) -> Changed:
    return Changed(replace(lab, faults=(*lab.faults, fault)), ())


def _of(kind: str, text: str) -> str:
    return text if text.startswith((f"{kind}/", "service/", "pods/")) else f"{kind}/{text}"
