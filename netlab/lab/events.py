"""What changes in a lab, as the events of a Kubernetes watch.

Init tells when something was declared; what that is follows from comparing the objects before and
after.  What comes and goes between two readings is not seen, and need not be: an event carries the
whole object.
"""

from __future__ import annotations

import contextlib
import select
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import msgspec

from netlab.datapath.faults import faulty
from netlab.lab import control, messages
from netlab.problems import Exit, NetlabError, Problem
from netlab.topology.model import Lab

Object = dict[str, Any]
Event = dict[str, Any]  # {"type": "ADDED" | "MODIFIED" | "DELETED", "object": Object}
Key = tuple[str, str, str]


class HasFileno(Protocol):
    """What can be waited for."""

    def fileno(self) -> int: ...


def watch(name: str, objects_of: Callable[[Lab], Iterable[Object]]) -> Iterator[list[Event]]:
    """Events of a lab's objects: first one for each that is there, then what happens.

    Ends, and raises, as :func:`follow` does.
    """
    known: dict[Key, Object] = {}
    for lab in follow(name):
        if lab is not None:
            now = {_key(item): item for item in objects_of(lab)}
            if events := list(difference(known, now)):
                yield events
            known = now


def follow(name: str, others: Sequence[HasFileno] = ()) -> Iterator[Lab | None]:
    """The lab as it is declared, with its faults, now and each time that it is.

    None when `others` have something.

    Ends when the lab goes down, raises BrokenPipeError when nobody reads stdout any more, and
    NetlabError: LabNotRunning, or (exit code 3) if the lab's init ended otherwise.
    """
    init = control.connect(name)
    if init is None:
        raise control.LabNotRunning(name)
    with init.watch() as channel:
        poll = select.poll()
        for each in (channel, *others):
            poll.register(each, select.POLLIN)
        if sys.stdout is not None:
            poll.register(sys.stdout, 0)  # (a closed pipe is told unasked)
        said: bytes | None = messages.DECLARED
        while True:
            data = None
            with contextlib.suppress(control.LabNotRunning):  # (how it ended is about to be told)
                data = init.declared() if said else None
            if data is not None:
                yield faulty(msgspec.json.decode(data, type=Lab))
            ready = {descriptor for descriptor, _ in poll.poll()}
            unread = sys.stdout is not None and sys.stdout.fileno() in ready
            said = channel.recv(4096) if channel.fileno() in ready else None
            if unread or said == b"" or messages.ENDING in (said or b""):
                break
            if ready - {channel.fileno()}:
                yield None
    if unread:
        raise BrokenPipeError
    if not said:
        raise _ended(name)


def difference(before: dict[Key, Object], after: dict[Key, Object]) -> Iterator[Event]:
    """The events between two states of objects: what came or changed, in order, then what went."""
    for key, item in after.items():
        if key not in before:
            yield {"type": "ADDED", "object": item}
        elif before[key] != item:
            yield {"type": "MODIFIED", "object": item}
    for key, item in before.items():
        if key not in after:
            yield {"type": "DELETED", "object": item}


def _key(item: Object) -> Key:
    metadata = item["metadata"]
    return item["kind"], metadata.get("namespace", ""), metadata["name"]


def _ended(name: str) -> NetlabError:
    return NetlabError(
        Problem(
            "init-ended",
            f'init of lab "{name}" has ended, and with it the watch',
            hint="`netlab up` with its topology starts it again",
        ),
        Exit.MACHINE,
    )
