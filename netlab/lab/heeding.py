"""Has what probes found become rules: starts the installed netlab for that, outside.

Init and this module run in a bare interpreter, which cannot render rules.  A child goes back to the
machine's mount namespace, so that what it mounts is seen there, and becomes netlab's own program
(:mod:`netlab.lab.heed`), which asks init who is ready now, and changes the lab like any command,
after those that are at work.  What changes meanwhile is another one's; there is one at a time.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable

from netlab.kernel.syscalls import CLONE_NEWNS, setns
from netlab.lab.children import Children
from netlab.lab.processes import SBIN, Pause


class Heeding:
    """The child that does it, when there is one."""

    def __init__(
        self, lab: str, machine: int, children: Children, log: Callable[[str], None]
    ) -> None:
        """`machine`: a descriptor of the mount namespace to work in."""
        self._lab = lab
        self._machine = machine
        self._children = children
        self._log = log
        self._pid = 0
        self._due = False
        self._pause = Pause()

    @property
    def descriptors(self) -> list[int]:
        """Those that init holds for it."""
        return [self._machine]

    def is_due(self) -> None:
        """Something has changed."""
        self._due = True

    def next_start(self) -> float | None:
        """When it is to be started (monotonic)."""
        return self._pause.until if self._due and not self._pid else None

    def start_due(self) -> None:
        """Start it, if there is something to do and it is not at work."""
        if not self._due or self._pid or self._pause.until > time.monotonic():
            return
        self._due = False
        try:
            self._pid = self._children.fork(self._become)
        except OSError as error:
            self._log(f"readiness: {error}")
            self._has_failed()

    def ended(self, pid: int, code: int) -> bool:
        """Note that a child of init's has ended; False if it is not this one."""
        if pid != self._pid:
            return False
        self._pid = 0
        if code:
            self._log(f"readiness could not be applied: exit {code}")
            self._has_failed()
        return True

    def _has_failed(self) -> None:
        self._due = True
        self._pause.lengthen()

    def _become(self) -> None:
        setns(self._machine, CLONE_NEWNS)
        os.chdir("/")
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        os.closerange(3, hard)
        code = (
            f"import sys; sys.path.append({sys.path[-1]!r}); "
            f"from netlab.lab.heed import main; main({self._lab!r})"
        )
        path = f"{os.environ.get('PATH', os.defpath)}:{SBIN}"
        arguments = [sys.executable, "-I", "-c", code]
        os.execve(sys.executable, arguments, {"PATH": path, "LC_ALL": "C.UTF-8"})
