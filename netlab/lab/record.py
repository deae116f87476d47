"""What was declared: the lab as files and later commands gave it, under /run/netlab/LAB.

The kernel is the record of what exists; this is only what it should be.  Init holds the same bytes,
so a lost directory costs nothing while init runs.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec

from netlab.kernel.namespaces import STATE_DIR, lock_directory
from netlab.topology.model import Lab

if TYPE_CHECKING:
    from netlab.hosts.part import Part

_FILE = "lab.json"
_SETTLED = "settled"
_PART = "part.json"


def directory(lab: str) -> str:
    """Where a lab's files are; only root may look inside."""
    return f"{STATE_DIR}/{lab}"


def encode(lab: Lab) -> bytes:
    """A lab as JSON."""
    return msgspec.json.encode(lab)


def write(name: str, data: bytes) -> None:
    """Replace the record in one step; it is what is to be, and nobody knows yet whether it is."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{directory(name)}/{_SETTLED}")
    path = f"{directory(name)}/{_FILE}"
    with open(f"{path}.new", "wb") as file:
        file.write(data)
    os.replace(f"{path}.new", path)


def settle(name: str) -> None:
    """Note that the kernel was made to hold what is recorded."""
    with open(f"{directory(name)}/{_SETTLED}", "wb"):
        pass


def is_settled(name: str) -> bool:
    """Whether the kernel was made to hold what is recorded, and nobody began to change it."""
    return os.path.exists(f"{directory(name)}/{_SETTLED}")


def read(name: str) -> Lab | None:
    """The recorded lab, from the file or else from init; None if neither has it."""
    data = _data(name)
    return msgspec.json.decode(data, type=Lab) if data else None


def on_machines() -> list[str]:
    """Labs whose nodes are machines of their own, noted where they were brought up from."""
    if not os.path.exists(f"{STATE_DIR}.hosts"):
        return []
    from netlab.hosts import record as hosts

    return hosts.names()


def write_part(name: str, part: Part) -> None:
    """Note what of the lab lives on this machine, where that is not all of it."""
    path = f"{directory(name)}/{_PART}"
    with open(f"{path}.new", "wb") as file:
        file.write(msgspec.json.encode(part))
    os.replace(f"{path}.new", path)


def note(name: str) -> str:
    """Where it stands what a machine had before it became a node."""
    return f"{directory(name)}/machine.json"


def part(name: str) -> Part | None:
    """What of the lab lives on this machine; None if all of it does."""
    from netlab.hosts.part import Part

    try:
        with open(f"{directory(name)}/{_PART}", "rb") as file:
            return msgspec.json.decode(file.read(), type=Part)
    except FileNotFoundError:
        return None


def twin_of(name: str) -> str:
    """The lab that one is a twin of, "" if of none; quick, however large it is."""
    data = _data(name)
    return msgspec.json.decode(data, type=_Twin).twin_of if data else ""


class _Twin(msgspec.Struct):
    """That much of a lab."""

    twin_of: str = ""


def _data(name: str) -> bytes | None:
    try:
        with open(f"{directory(name)}/{_FILE}", "rb") as file:
            return file.read()
    except FileNotFoundError:
        from netlab.lab import control

        init = control.connect(name)
        return init.declared() if init else None


def remove(name: str) -> None:
    """Take a lab's files away; the caller holds the lock."""
    path = directory(name)
    with contextlib.suppress(FileNotFoundError):
        for entry in os.listdir(path):
            os.unlink(f"{path}/{entry}")
        os.rmdir(path)


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Keep every other `up` and `down` of this lab waiting."""
    descriptor = lock_directory(directory(name), fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(descriptor)
