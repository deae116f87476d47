"""Which pods are ready by their probes, as a lab has it.

A pod with probes is ready when they pass and nobody has said that it is not
(`netlab ready --false`): both have to agree.  A file says nothing of probes' results, so a lab that
is read from one is taken as all of them passing; when it comes up they have yet to.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import NamedTuple

from msgspec.structs import replace

from netlab.lab import control
from netlab.lab.edits import Changed, Edits
from netlab.topology.model import Lab

TIMEOUT_S = 10.0
_LOOK_S = 0.05


class Observed(NamedTuple):
    """What a lab's init knows of the pods (`namespace/name`) that it asks."""

    ready: frozenset[str] = frozenset()
    unready: frozenset[str] = frozenset()
    undecided: frozenset[str] = frozenset()  # of them those that may yet become ready


def heeded(lab: Lab, passed: Collection[str]) -> Lab:
    """The lab in which the readiness probes of these pods pass, and those of no others."""
    unready = {pod.key for pod in lab.pods if pod.is_probed and pod.key not in passed}
    if unready == set(lab.unready):
        return lab
    edits = Edits(lab)
    edits.passed = frozenset(pod.key for pod in lab.pods) - unready
    return replace(edits.decided().lab, twin_of=lab.twin_of, changed=lab.changed)


def heed(lab: Lab, observed: Observed) -> Changed:
    """What init has observed, taken over; pods that it does not know yet stay as they are."""
    passed = {pod.key for pod in lab.pods} - set(lab.unready)
    return Changed(heeded(lab, (passed | observed.ready) - observed.unready), ())


def at_start(lab: Lab, before: Lab | None) -> Lab:
    """A lab as it comes up: ready are those that were, and are the same."""
    if not any(pod.is_probed for pod in lab.pods):
        return lab
    init = control.connect(lab.name)
    known = observed(init) if init else Observed()
    were = (
        {pod.key: (pod.node, pod.addresses, pod.containers) for pod in before.pods}
        if before
        else {}
    )
    return heeded(
        lab,
        {
            pod.key
            for pod in lab.pods
            if pod.key in known.ready
            and were.get(pod.key) == (pod.node, pod.addresses, pod.containers)
        },
    )


def observed(init: control.Init) -> Observed:
    """What a lab's init has observed until now."""
    return Observed(*init.probed())


def await_ready(lab: Lab, tell: Callable[[str], None], timeout_s: float = TIMEOUT_S) -> None:
    """Wait until the probes of each pod have passed or failed, and that is what the lab has.

    Those that take longer than the timeout are left alone.
    """
    if not lab.unready:
        return
    from netlab.lab import record

    names = sorted(lab.unready)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    tell(f"waiting for {', '.join(names[:3])}{more} to be ready")
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        init, now = control.connect(lab.name), record.read(lab.name)
        if init is None or now is None:
            return
        known = observed(init)
        late = {key for key in now.unready if key in known.ready or key in known.undecided}
        if not late:
            return
        time.sleep(_LOOK_S)
