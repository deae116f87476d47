"""Start the interpreter that becomes a lab's init, without the caller moving or waiting.

It is a new program, not a fork of this one: init keeps nothing of what started it, neither memory
nor descriptors, environment, session or directory.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import sys

import netlab

LOG_DIR = "/run/netlab"
LISTENER = 3  # as in netlab.lab.init, which is not imported for one number


class Launch:
    """The short-lived process that becomes, after a fork into new namespaces, a lab's init."""

    def __init__(self, lab: str, listener: socket.socket) -> None:
        root = os.path.dirname(next(iter(netlab.__path__)))
        code = (
            f"import sys; sys.path.append({root!r}); "
            f"from netlab.lab.init import main; main({lab!r})"
        )
        self._log = _open_log(lab)
        self._start = os.lseek(self._log, 0, os.SEEK_END)
        inherited = _above_the_standard_ones(listener.fileno())
        try:
            self._pid = os.posix_spawn(
                sys.executable,
                [sys.executable, "-I", "-S", "-c", code],
                {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8"},
                file_actions=(
                    (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_DUP2, self._log, 1),
                    (os.POSIX_SPAWN_DUP2, self._log, 2),
                    (os.POSIX_SPAWN_DUP2, inherited, LISTENER),
                ),
                setsid=True,
                setsigmask=(),
                setsigdef=signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP},
            )
        finally:
            os.close(inherited)

    def said(self) -> str:
        """What it and init have written to their log."""
        return os.pread(self._log, 1 << 16, self._start).decode(errors="replace").strip()

    def close(self) -> None:
        with contextlib.suppress(ChildProcessError):  # (the caller ignores SIGCHLD)
            os.waitpid(self._pid, 0)
        os.close(self._log)


def log_path(lab: str) -> str:
    """Where init's log is, if the lab has a directory."""
    return f"{LOG_DIR}/{lab}/init.log"


def _open_log(lab: str) -> int:
    """Init's log: a file if the lab has a directory, else memory, for as long as it runs."""
    try:
        log = os.open(log_path(lab), os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        log = os.memfd_create("netlab-init-log")
    try:
        return _above_the_standard_ones(log)
    finally:
        os.close(log)


def _above_the_standard_ones(descriptor: int) -> int:
    """A copy out of the way of 0 to 3, which a caller may have left closed."""
    return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, LISTENER + 1)
