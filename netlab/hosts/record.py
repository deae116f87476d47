"""Which labs have their nodes on machines of their own, noted where they were brought up from.

It stands beside, not in, the directory of labs that live here: this machine may be a node, too.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator

import msgspec

from netlab.hosts.hosts_file import Machine
from netlab.kernel.namespaces import lock_directory
from netlab.topology.model import Lab

DIRECTORY = "/run/netlab.hosts"
_FILE = "hosts.json"


class Recorded(msgspec.Struct, frozen=True):
    """A lab with the addresses that its machines have, and its machines."""

    lab: Lab
    machines: dict[str, Machine]
    timeout_s: float


def read(name: str) -> Recorded | None:
    """What is noted of a lab; None if it has no machines of its own."""
    try:
        with open(f"{DIRECTORY}/{name}/{_FILE}", "rb") as file:
            return msgspec.json.decode(file.read(), type=Recorded)
    except FileNotFoundError:
        return None


def write(recorded: Recorded) -> None:
    """Note it, in one step."""
    path = f"{DIRECTORY}/{recorded.lab.name}/{_FILE}"
    with open(f"{path}.new", "wb") as file:
        file.write(msgspec.json.encode(recorded))
    os.replace(f"{path}.new", path)


def names() -> list[str]:
    """Labs that are noted, sorted."""
    try:
        found = sorted(os.listdir(DIRECTORY))
    except FileNotFoundError:
        return []
    return [name for name in found if os.path.exists(f"{DIRECTORY}/{name}/{_FILE}")]


def remove(name: str) -> None:
    """Forget a lab; the caller holds the lock."""
    with contextlib.suppress(FileNotFoundError):
        for entry in os.listdir(f"{DIRECTORY}/{name}"):
            os.unlink(f"{DIRECTORY}/{name}/{entry}")
        os.rmdir(f"{DIRECTORY}/{name}")
    with contextlib.suppress(OSError):  # others are noted
        os.rmdir(DIRECTORY)


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Keep every other `up` and `down` of this lab from here waiting."""
    descriptor = lock_directory(f"{DIRECTORY}/{name}", fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(descriptor)
        with contextlib.suppress(OSError):  # it is noted
            os.rmdir(f"{DIRECTORY}/{name}")
            os.rmdir(DIRECTORY)
