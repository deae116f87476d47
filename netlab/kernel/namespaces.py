"""Network namespaces with names: made, marked, found, entered and removed.

A name is a file under /run/netns with the namespace bind-mounted on it, as `ip netns` makes them.
Three marks make one ours, each from before the moment at which a kill could orphan it:

* the file is born with a line in it (so that a file without a mount is known as ours),
* `lo` carries the altname `netlab:LAB:lo` before the mount (so that a namespace without links is),
* each link carries an altname of the same shape.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from netlab.kernel.syscalls import (
    CLONE_NEWNET,
    setns,
)

RUN_DIR = "/run/netns"
THREAD_NAMESPACE = "/proc/thread-self/ns/net"


def path(name: str) -> str:
    """The file of a named namespace."""
    return f"{RUN_DIR}/{name}"


def open_current() -> int:
    """A descriptor of the calling thread's network namespace."""
    return os.open(THREAD_NAMESPACE, os.O_RDONLY | os.O_CLOEXEC)


def open_named(name: str) -> int:
    """A descriptor of a named namespace; FileNotFoundError if there is none."""
    return os.open(path(name), os.O_RDONLY | os.O_CLOEXEC)


@contextlib.contextmanager
def entered(namespace: str | int) -> Iterator[None]:
    """Run the body with the calling thread inside a namespace, given by name or descriptor.

    Sockets opened in the body belong to that namespace for good, and children forked in it
    start there.  Only this thread moves.
    """
    home = open_current()
    try:
        target = namespace if isinstance(namespace, int) else open_named(namespace)
        try:
            setns(target, CLONE_NEWNET)
        finally:
            if target is not namespace:
                os.close(target)
        try:
            yield
        finally:
            setns(home, CLONE_NEWNET)
    finally:
        os.close(home)


def exists(name: str) -> bool:
    """Whether there is a file of that name, a namespace or not."""
    return os.path.lexists(path(name))
