"""Programs that run in a lab's namespaces for as long as it lives, as its init has them.

Each is declared as :class:`netlab.datapath.state.Process` says.  The programs of one pod or node
share a view of its files (:mod:`netlab.lab.views`), with a /run of their own; so a pid file or a
control socket is where the program always has it, as often as there are namespaces.  One that ends
is started again, each time later than before.

It runs in init's bare interpreter: only the standard library can be imported here.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import socket
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

from netlab.kernel.syscalls import CLONE_NEWNET, CLONE_NEWNS, CLONE_NEWUTS, setns, unshare
from netlab.lab.children import Children
from netlab.lab.views import Key, Views

_FIRST_PAUSE_S = 0.25  # before the first new start; each further one waits twice as long
_LONGEST_PAUSE_S = 30.0
_LASTING_S = 10.0  # one that lived this long begins with the first pause again
_GRACE_S = 2.0  # from SIGTERM to SIGKILL
SBIN = "/usr/local/sbin:/usr/sbin:/sbin"

Program = tuple[Key, str]
"""The view that a process has, and its name there."""


class Pause:
    """How long what ends again and again waits for its next start; `until` is monotonic."""

    def __init__(self) -> None:
        self.failures = 0  # short lives in a row
        self.until = 0.0
        self._started = 0.0

    def lengthen(self) -> None:
        """It has ended."""
        now = time.monotonic()
        self.failures = 1 if now - self._started >= _LASTING_S else self.failures + 1
        self.until = now + min(_FIRST_PAUSE_S * 2 ** (self.failures - 1), _LONGEST_PAUSE_S)
        self._started = self.until


class _Running:
    """One declared process: `pid` is 0 while it is not there."""

    def __init__(self, declared: dict[str, Any]) -> None:
        self.declared = declared
        self.pid = 0
        self.started = 0.0  # monotonic
        self.start_at = 0.0
        self.starts = 0
        self.failures = 0  # short lives in a row
        self.ended: int | None = None  # exit code, -n by signal n
        self.leaving = False  # it was told to end, for good
        self.kill_at = 0.0  # when it has to be gone after it was told to end

    def has_ended(self, code: int) -> None:
        now = time.monotonic()
        lasted = now - self.started >= _LASTING_S
        self.failures = 1 if lasted else self.failures + 1
        self.pid, self.ended, self.kill_at = 0, code, 0.0
        pause = min(_FIRST_PAUSE_S * 2 ** (self.failures - 1), _LONGEST_PAUSE_S)
        self.start_at = now + pause


class Processes:
    """The programs of a lab."""

    def __init__(
        self,
        networks: Mapping[int, int],
        views: Views,
        children: Children,
        log: Callable[[str], None],
    ) -> None:
        """`networks`: descriptors of network namespaces by inode."""
        self._networks = networks
        self._views = views
        self._children = children
        self._log = log
        self._running: dict[Program, _Running] = {}

    @property
    def views(self) -> set[Key]:
        """Those that they have."""
        return {view for view, _ in self._running}

    def declare(self, declared: list[dict[str, Any]]) -> None:
        """Have exactly these run; one that is declared as before is left alone."""
        wanted = {(_view(each), each["name"]): each for each in declared}
        for key in self._running.keys() - wanted.keys():
            self._stop(self._running.pop(key))
        for key, each in wanted.items():
            running = self._running.get(key)
            if running is None:
                self._running[key] = _Running(each)
            elif running.declared != each:
                self._change(running, each)
        self.start_due()

    def start_due(self) -> None:
        """Start what is not there and has waited long enough."""
        for running in self._running.values():
            if running.pid and 0 < running.kill_at <= time.monotonic():
                running.kill_at = 0.0
                os.kill(running.pid, signal.SIGKILL)
            if not (running.pid or running.leaving) and running.start_at <= time.monotonic():
                self._start(running)

    def terminate(self, view: Key) -> int:
        """Tell the programs that share a view to end for good; how many have not yet."""
        left = 0
        for (key, _), running in self._running.items():
            if key == view:
                if running.pid and not running.leaving:
                    os.kill(running.pid, signal.SIGTERM)
                running.leaving = True
                left += bool(running.pid)
        return left

    def restart(self, program: Program) -> None:
        """End one that does not do its work; it is started again like one that ended itself."""
        running = self._running.get(program)
        if running is not None and running.pid and not running.leaving:
            os.kill(running.pid, signal.SIGTERM)
            running.kill_at = time.monotonic() + _GRACE_S

    def life_of(self, program: Program) -> tuple[int, bool]:
        """How often one was started, and whether it runs and was not told to end."""
        running = self._running.get(program)
        if running is None:
            return 0, False
        return running.starts, bool(running.pid) and not (running.kill_at or running.leaving)

    def next_start(self) -> float | None:
        """When something is to be started again, or killed (monotonic); None if all is there."""
        waiting = (each for each in self._running.values() if not (each.pid or each.leaving))
        times = [each.start_at for each in waiting]
        times += [each.kill_at for each in self._running.values() if each.kill_at]
        return min(times, default=None)

    def ended(self, pid: int, code: int) -> bool:
        """Note that a child of init's has ended; False if it is none of these."""
        for running in self._running.values():
            if running.pid == pid:
                _end_group(pid)
                running.has_ended(code)
                name, where = running.declared["name"], running.declared["namespace"]
                self._log(f"{name} of {where} ended with {code}")
                return True
        return False

    def status(self) -> list[dict[str, Any]]:
        """How each of them is."""
        now = time.monotonic()
        return [
            {
                "name": each.declared["name"],
                "namespace": each.declared["namespace"],
                "running": bool(each.pid),
                "restarts": max(0, each.starts - 1),
                "ended": each.ended,
                "starts_in_s": None if each.pid else round(max(0.0, each.start_at - now), 1),
            }
            for each in self._running.values()
        ]

    def _start(self, running: _Running) -> None:
        declared = running.declared
        view = _view(declared)
        running.started = time.monotonic()
        running.starts += 1
        try:
            self._furnish(declared)
            mounts, host_name = self._views.find(view), self._views.host_name(view)
            assert mounts is not None
            network = self._networks[declared["inode"]]
            pid = self._children.fork(lambda: _become(declared, network, mounts, host_name))
        except OSError as error:
            self._log(f"{declared['name']} of {declared['namespace']}: {error}")
            running.has_ended(1)
            return
        running.pid = pid

    def _furnish(self, declared: Mapping[str, Any]) -> None:
        directories, files = declared.get("directories", ()), declared.get("files", ())
        self._views.furnish(_view(declared), files, directories)

    def _change(self, running: _Running, declared: dict[str, Any]) -> None:
        """Where only files differ it may read them again, else it is started anew."""
        before = running.declared
        running.declared = declared
        is_same = _without(before, _NOT_OF_THE_PROGRAM) == _without(declared, _NOT_OF_THE_PROGRAM)
        if is_same and before.get("files") == declared.get("files"):
            return
        if running.pid and declared["reload"] and is_same:
            self._furnish(declared)
            os.kill(running.pid, signal.Signals[declared["reload"]])
        else:
            self._stop(running)
            running.start_at, running.failures = 0.0, 0

    def _stop(self, running: _Running) -> None:
        """End one and wait for it."""
        if not running.pid:
            return
        ending = os.pidfd_open(running.pid)
        try:
            for number in (signal.SIGTERM, signal.SIGKILL):
                os.kill(running.pid, number)
                poll = select.poll()
                poll.register(ending, select.POLLIN)
                if poll.poll(_GRACE_S * 1000):
                    break
            os.waitpid(running.pid, 0)
            _end_group(running.pid)
        finally:
            os.close(ending)
        running.pid = 0


def _view(declared: Mapping[str, Any]) -> Key:
    return declared["inode"], declared.get("view") or declared["namespace"]


def _end_group(leader: int) -> None:
    """End what a program that has ended leaves running: workers that have its ports."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


_NOT_OF_THE_PROGRAM = ("files", "at_start", "routes", "listens", "names", "zone_serial")
"""What may differ without it being another: also what it is ready by."""


def _without(declared: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    return {key: value for key, value in declared.items() if key not in keys}


def _become(declared: Mapping[str, Any], network: int, mounts: int, host_name: str) -> None:
    """Turn this child into the program, in its namespaces and with nothing of init's open."""
    setns(mounts, CLONE_NEWNS)
    setns(network, CLONE_NEWNET)
    if host_name:
        unshare(CLONE_NEWUTS)
        socket.sethostname(host_name)
    os.setsid()
    os.chdir(declared.get("directory", "/"))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.closerange(3, hard)
    command = declared["command"]
    path = f"{os.environ.get('PATH', os.defpath)}:{SBIN}"
    try:
        variables = dict(declared.get("at_start", ())) | dict(declared.get("environment", ()))
        environment = {"PATH": path, "LC_ALL": "C.UTF-8", **variables}
        os.execvpe(command[0], command, environment)
    except OSError as error:
        raise OSError(f"{command[0]}: {error.strerror}") from None
