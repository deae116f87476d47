"""How a machine's part of a lab is, as `netlab status` tells it."""

from __future__ import annotations

import contextlib

from netlab.datapath.describe import summary
from netlab.datapath.state import State
from netlab.lab import control, lifecycle, record
from netlab.problems import NetlabError


class Condition(State, frozen=True):
    """What differs on a machine, and whether the lab's processes run there."""

    declared: bool
    differences: tuple[str, ...] = ()
    lacking: tuple[str, ...] = ()
    stopped: tuple[str, ...] = ()
    init: int | None = None
    sockets: int = 0

    @property
    def healthy(self) -> bool:
        bad = (*self.differences, *self.lacking, *self.stopped)
        return self.declared and self.init is not None and not bad


def of(name: str) -> Condition:
    """That of a lab's part on this machine."""
    lab = record.read(name)
    if lab is None:
        return Condition(declared=False)
    init = control.connect(name)
    status: control.Status | None = None
    if init:
        with contextlib.suppress(NetlabError):
            status = init.status()
    return Condition(
        declared=True,
        differences=tuple(map(summary, lifecycle.differences(lab))),
        lacking=tuple(map(str, lifecycle.lacking(lab))),
        stopped=tuple(str(each) for each in status.programs if not each.running) if status else (),
        init=status.pid if status else None,
        sockets=status.sockets if status else 0,
    )
