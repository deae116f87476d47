"""Processes in a lab's PID namespace, as the host sees them."""

from __future__ import annotations

import contextlib
import os
from typing import NamedTuple


class Process(NamedTuple):
    """A process of a lab, with its number in the host's PID namespace."""

    pid: int
    name: str
    rss_kib: int


def living(init: int) -> list[int]:
    """Numbers of the processes of a lab, but init's, that are no zombies.

    A zombie keeps init waiting until its parent reaps it.  The parent of what `exec` moved in is
    outside, and if that was killed, then process 1 of the machine, which in containers may never.
    """
    found = []
    for process in processes_of(init):
        with contextlib.suppress(OSError), open(f"/proc/{process.pid}/stat", "rb") as stat:
            if process.pid != init and stat.read().rpartition(b")")[2].split()[0] not in b"ZX":
                found.append(process.pid)
    return found


def processes_of(init: int) -> tuple[Process, ...]:
    """All processes in the PID namespace of `init`."""
    found = []
    try:
        inside = os.readlink(f"/proc/{init}/ns/pid")
    except FileNotFoundError:  # it ended meanwhile
        return ()
    for entry in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # (it ended meanwhile)
            if os.readlink(f"/proc/{entry}/ns/pid") != inside:
                continue
            with open(f"/proc/{entry}/comm", encoding="utf-8", errors="replace") as comm:
                name = comm.read().strip()
            with open(f"/proc/{entry}/statm", encoding="ascii") as statm:
                pages = int(statm.read().split()[1])
            found.append(Process(int(entry), name, pages * os.sysconf("SC_PAGESIZE") // 1024))
    return tuple(sorted(found))
