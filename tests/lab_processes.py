"""What tests of a lab's processes share: a lab of their own, its namespaces, and patience."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from typing import TypeVar

from netlab.kernel import namespaces
from netlab.kernel.syscalls import CLONE_NEWNET, setns
from netlab.lab import control

T = TypeVar("T")

PATIENCE_S = 20.0  # no test takes long; a broken one ends


class LabProcesses:
    """A lab that has an init and namespaces, but neither links nor rules."""

    def __init__(self) -> None:
        self.name = f"t{uuid.uuid4().hex[:10]}"

    def make(self) -> None:
        """What a kind of lab has from the beginning."""

    def start(self) -> control.Init:
        return control.start(self.name)

    def namespace(self, name: str) -> str:
        """Make a namespace with `lo` up; returns its file name."""
        full = f"{self.name}:{name}"
        home = namespaces.open_current()
        try:
            os.close(namespaces.make(full, self.name, ()))
        finally:
            setns(home, CLONE_NEWNET)
            os.close(home)
        return full

    def python(self, code: str, *arguments: str) -> subprocess.Popen[str]:
        """A Python process of its own; the lab's name is `sys.argv[1]`."""
        return subprocess.Popen(
            [sys.executable, "-c", code, self.name, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


L = TypeVar("L", bound=LabProcesses)


@contextlib.contextmanager
def lab_processes(kind: type[L]) -> Iterator[L]:
    """A lab with a name of its own; what was made of it is removed."""
    lab = kind()
    try:
        with namespaces.run_dir():
            lab.make()
            yield lab
    finally:
        if (init := control.connect(lab.name)) is not None:
            init.shutdown()
        for name in namespaces.names_of(lab.name):
            namespaces.remove(name)
        namespaces.release_run_dir()


def process(init: control.Init, name: str) -> int:
    """The number of the lab's process of that name, as soon as there is one."""
    return eventually(lambda: next((p.pid for p in init.status().processes if p.name == name), 0))


def wait_for_end(pid: int, pidfd: int | None = None) -> None:
    """Return when a process, anybody's child, has ended."""
    try:
        descriptor = os.pidfd_open(pid) if pidfd is None else pidfd
    except ProcessLookupError:
        return
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    assert poll.poll(PATIENCE_S * 1000), f"process {pid} does not end"
    if pidfd is None:
        os.close(descriptor)


def eventually(look: Callable[[], T]) -> T:
    """What `look` finds, once it finds something: for what the kernel tells nobody about."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := look()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
    return found
