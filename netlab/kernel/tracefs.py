"""Where packets come in and are given up, as tracefs tells it: for kernels that refuse BPF.

An instance of its own, so that nobody else's tracing is touched, on a mount that no path leads to.
It names no namespace and shows no bytes, and it reports the packets of everybody.

An instance outlives a process that is killed.  Its name says whose it was, process and start time,
and the next one that is made removes those whose process is gone.

Source: Documentation/trace/ftrace.rst, fsopen(2).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import time

import msgspec

_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432  # on all architectures
_CREATE = 6  # FSCONFIG_CMD_CREATE
_PREFIX = "netlab-"
_PATIENCE_S, _PAUSE_S = 2.0, 0.002
_EVENTS = ("net/netif_receive_skb", "skb/kfree_skb")
_LINE = re.compile(r"\s(\d+)\.(\d{6}): (netif_receive_skb|kfree_skb): (.*)")
_FIELD = re.compile(r"(\w+)[=:] ?(\S+)")

_libc = ctypes.CDLL(None, use_errno=True)


class Line(msgspec.Struct, frozen=True):
    """A packet that came in on `device` with `length` bytes, or was given up for `reason`.

    `buffer` is the same word during a buffer's life.
    """

    t_us: int  # CLOCK_MONOTONIC
    buffer: str
    device: str | None = None
    length: int = 0
    reason: str | None = None
    function: str | None = None


class Instance:
    """Tracing from now until `close`.  Raises OSError where there is no tracefs or no privilege."""

    def __init__(self) -> None:
        self._name = f"instances/{_PREFIX}{os.getpid()}-{_started('self')}-{os.urandom(4).hex()}"
        self._root = _mount()
        self._pipe = -1
        self._rest = ""
        try:
            _remove_orphans(self._root)
            os.mkdir(self._name, dir_fd=self._root)
            self._write("trace_clock", "mono")
            for event in _EVENTS:
                self._write(f"events/{event}/enable", "1")
            flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
            self._pipe = os.open(f"{self._name}/trace_pipe", flags, dir_fd=self._root)
        except BaseException:
            self.close()
            raise

    def _write(self, file: str, value: str) -> None:
        flags = os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC
        descriptor = os.open(f"{self._name}/{file}", flags, dir_fd=self._root)
        try:
            os.write(descriptor, value.encode())
        finally:
            os.close(descriptor)

    def read(self) -> list[Line]:
        """What happened since it was read last, until now: more may come faster than it is read."""
        now_us = time.monotonic_ns() // 1000
        found: list[Line] = []
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._pipe, 1 << 16):
                *lines, self._rest = (self._rest + data.decode(errors="replace")).split("\n")
                found += filter(None, map(parse, lines))
                if found and found[-1].t_us > now_us:
                    break
        return found

    def close(self) -> None:
        if self._pipe >= 0:
            os.close(self._pipe)
        try:
            self._remove()
        finally:
            os.close(self._root)

    def _remove(self) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                os.rmdir(self._name, dir_fd=self._root)
            except FileNotFoundError:
                return
            except OSError as error:
                # A child that another thread has just forked holds the pipe until its exec.
                if error.errno != errno.EBUSY or time.monotonic() > deadline:
                    raise
                time.sleep(_PAUSE_S)
            else:
                return


def parse(line: str) -> Line | None:
    """A line of trace_pipe; None for one of another event."""
    found = _LINE.search(line)
    if found is None:
        return None
    seconds, micros, event, rest = found.groups()
    fields = dict(_FIELD.findall(rest))
    t_us = int(seconds) * 1_000_000 + int(micros)
    if event == "kfree_skb":
        return Line(
            t_us,
            fields["skbaddr"],
            reason=fields.get("reason", "NOT_SPECIFIED"),
            function=fields.get("location"),
        )
    return Line(t_us, fields["skbaddr"], device=fields["dev"], length=int(fields["len"]))


def _mount() -> int:
    """A descriptor of tracefs, mounted nowhere."""
    context = _call(_FSOPEN, b"tracefs", 1)
    try:
        _call(_FSCONFIG, context, _CREATE, None, None, 0)
        return _call(_FSMOUNT, context, 1, 0)
    finally:
        os.close(context)


def _call(number: int, *arguments: object) -> int:
    result: int = _libc.syscall(number, *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def _started(process: str) -> str:
    """When a process was started, in ticks since boot; proc(5)."""
    with open(f"/proc/{process}/stat") as file:
        return file.read().rpartition(")")[2].split()[19]


def _remove_orphans(root: int) -> None:
    instances = os.open("instances", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root)
    try:
        for name in os.listdir(instances):
            if name.startswith(_PREFIX) and _is_orphan(name):
                with contextlib.suppress(OSError):
                    os.rmdir(name, dir_fd=instances)
    finally:
        os.close(instances)


def _is_orphan(name: str) -> bool:
    process, _, rest = name.removeprefix(_PREFIX).partition("-")
    try:
        return _started(process) != rest.partition("-")[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
