"""How a lab's init is reached: an abstract Unix socket, `\\0netlab:LAB`, of the host's namespace.

Its name is there exactly as long as the process is, cannot be taken twice, and survives whatever
happens to files.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import socket
from collections.abc import Iterator

from netlab.lab import messages

PREFIX = "netlab:"
_ADDRESS_BYTES = 107  # sun_path of unix(7), less the leading zero


@contextlib.contextmanager
def connected(address: str, timeout: float) -> Iterator[socket.socket]:
    """A connection to an init.  OSError; PermissionError if it is another user's."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout)
        connection.connect(address)
        # Any user may take the name of a socket without a file: only our own user's init counts.
        if messages.peer(connection)[1] != os.geteuid():
            raise PermissionError(errno.EPERM, f"socket @{address[1:]} belongs to another user")
        yield connection


def listening_process(connection: socket.socket) -> int:
    """A descriptor of an init that does not answer (it may be stopped); TimeoutError if it is none.

    It has listened once more after its start, so that the credentials of the socket are its own.
    """
    pid, _ = messages.peer(connection)
    try:
        descriptor = os.pidfd_open(pid)
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as comm:
            if comm.read() == "netlab-init\n":
                return descriptor
    except OSError:
        raise TimeoutError from None
    os.close(descriptor)
    raise TimeoutError


def address_of(lab: str) -> str:
    """The name of its socket, shortened by a hash where it would be too long."""
    name = PREFIX + lab
    if len(name.encode()) > _ADDRESS_BYTES:
        name = f"{PREFIX}~{hashlib.sha256(lab.encode()).hexdigest()}"
    return "\0" + name
