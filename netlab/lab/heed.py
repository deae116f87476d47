"""The program that makes rules of what probes found: started by a lab's init, ends when it is done.

It is a command like those of users: it waits for them by the lab's lock, and changes only what
probes are about, so that it never takes back what somebody else has changed.
"""

from __future__ import annotations

import gc
import sys
from typing import NoReturn

from netlab.lab import control, lifecycle, readiness, record
from netlab.problems import NetlabError


def main(lab: str) -> NoReturn:
    """Apply what the init of `lab` has observed."""
    gc.disable()
    try:
        sys.exit(_apply(lab))
    except control.LabNotRunning:
        sys.exit(0)  # it went down meanwhile
    except NetlabError as error:
        for problem in error.problems:
            print(problem, file=sys.stderr)
        sys.exit(int(error.exit_code))


def _apply(name: str) -> int:
    init = control.connect(name)
    lab = record.read(name)
    if init is None or lab is None:
        return 0
    if readiness.heed(lab, readiness.observed(init)).lab is not lab:
        lifecycle.change(
            name,
            lambda lab: readiness.heed(lab, readiness.observed(init)),
            await_programs=False,  # (a pod that fails is not to wait for one that begins)
        )
    return 0
