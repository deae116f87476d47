"""Programs that run in a lab's namespaces for as long as it lives, as its init has them.

Each is declared as :class:`netlab.datapath.state.Process` says.  The programs of one network
namespace share a mount namespace, in which /run is their own and files of theirs cover the
machine's; so a pid file or a control socket is where the program always has it, as often as there
are namespaces.  One that ends is started again, each time later than before.

It runs in init's bare interpreter: only the standard library can be imported here.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import resource
import select
import signal
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn

from netlab.kernel.syscalls import (
    CLONE_NEWNET,
    CLONE_NEWNS,
    MNT_DETACH,
    MS_BIND,
    MS_NODEV,
    MS_NOSUID,
    mount,
    setns,
    umount,
    unshare,
)

_FIRST_PAUSE_S = 0.25  # before the first new start; each further one waits twice as long
_LONGEST_PAUSE_S = 30.0
_LASTING_S = 10.0  # one that lived this long begins with the first pause again
_GRACE_S = 2.0  # from SIGTERM to SIGKILL
_COVERS = "/run/.covers"  # files that cover others
_NETNS = "/run/netns"
_SBIN = "/usr/local/sbin:/usr/sbin:/sbin"

Key = tuple[int, str]
"""The inode of a network namespace and the name of a process in it."""


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

    def has_ended(self, code: int) -> None:
        now = time.monotonic()
        lasted = now - self.started >= _LASTING_S
        self.failures = 1 if lasted else self.failures + 1
        self.pid, self.ended = 0, code
        pause = min(_FIRST_PAUSE_S * 2 ** (self.failures - 1), _LONGEST_PAUSE_S)
        self.start_at = now + pause


class Processes:
    """The programs of a lab, and the mount namespaces that they live in."""

    def __init__(
        self,
        networks: Mapping[int, int],
        own: Callable[[], Collection[int]],
        log: Callable[[str], None],
    ) -> None:
        """`networks`: descriptors of network namespaces by inode; `own`: signals of init's."""
        self._networks = networks
        self._signals = own
        self._log = log
        self._running: dict[Key, _Running] = {}
        self._mounts: dict[int, int] = {}  # by the inode of the network namespace

    @property
    def descriptors(self) -> list[int]:
        """Those that init holds for them."""
        return list(self._mounts.values())

    def mounts(self, inode: int) -> int | None:
        """A descriptor of the mount namespace that belongs to a network namespace."""
        return self._mounts.get(inode)

    def declare(self, declared: list[dict[str, Any]]) -> None:
        """Have exactly these run; one that is declared as before is left alone."""
        wanted = {(each["inode"], each["name"]): each for each in declared}
        for key in self._running.keys() - wanted.keys():
            self._stop(self._running.pop(key))
        for inode in self._mounts.keys() - {inode for inode, _ in wanted}:
            os.close(self._mounts.pop(inode))
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
            if not running.pid and running.start_at <= time.monotonic():
                self._start(running)

    def next_start(self) -> float | None:
        """When something is to be started again (monotonic); None if all is there."""
        times = [each.start_at for each in self._running.values() if not each.pid]
        return min(times, default=None)

    def ended(self, pid: int, code: int) -> bool:
        """Note that a child of init's has ended; False if it is none of these."""
        for running in self._running.values():
            if running.pid == pid:
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
        inode = declared["inode"]
        running.started = time.monotonic()
        running.starts += 1
        try:
            if inode not in self._mounts:
                self._mounts[inode] = self._make_mounts()
            self._in_mounts(inode, lambda: _furnish(declared))
            pid = self._fork(lambda: _become(declared, self._networks[inode], self._mounts[inode]))
        except OSError as error:
            self._log(f"{declared['name']} of {declared['namespace']}: {error}")
            running.has_ended(1)
            return
        running.pid = pid

    def _change(self, running: _Running, declared: dict[str, Any]) -> None:
        """Where only files differ it may read them again, else it is started anew."""
        before = running.declared
        running.declared = declared
        is_same = _without(before, _NOT_OF_THE_PROGRAM) == _without(declared, _NOT_OF_THE_PROGRAM)
        if is_same and before.get("files") == declared.get("files"):
            return
        if running.pid and declared["reload"] and is_same:
            self._in_mounts(declared["inode"], lambda: _furnish(declared))
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
        finally:
            os.close(ending)
        running.pid = 0

    def _make_mounts(self) -> int:
        """A mount namespace with an empty /run, made by a child that is held until it is ours."""
        ready, tell = os.pipe()
        held, let_go = os.pipe()

        def child() -> None:
            unshare(CLONE_NEWNS)
            with contextlib.suppress(OSError):  # (a copy of each namespace's mount for nothing)
                umount(_NETNS, MNT_DETACH)
            mount("tmpfs", "/run", "tmpfs", MS_NOSUID | MS_NODEV)
            os.chmod("/run", 0o755)
            os.write(tell, b"+")
            os.close(let_go)
            os.read(held, 1)

        try:
            pid = self._fork(child)
            os.close(tell)
            tell = -1
            try:
                if os.read(ready, 1) != b"+":
                    raise OSError("no mount namespace could be made")
                return os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
            finally:
                os.close(let_go)
                let_go = -1
                os.waitpid(pid, 0)
        finally:
            for descriptor in (ready, tell, held, let_go):
                if descriptor >= 0:
                    os.close(descriptor)

    def _in_mounts(self, inode: int, do: Callable[[], None]) -> None:
        """Do something there, in a child.  OSError if it fails; the log says how."""

        def child() -> None:
            setns(self._mounts[inode], CLONE_NEWNS)
            do()

        _, status = os.waitpid(self._fork(child), 0)
        if status:
            raise OSError("its files could not be written")

    def _fork(self, do: Callable[[], None]) -> int:
        """Run a function in a child that ends after it, without init's signal handlers."""
        numbers = self._signals()
        signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
        try:
            pid = os.fork()
            if pid == 0:
                self._run_child(do, numbers)
            return pid
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)

    def _run_child(self, do: Callable[[], None], numbers: Collection[int]) -> NoReturn:
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in (*numbers, signal.SIGHUP, signal.SIGPIPE, signal.SIGXFSZ):
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
            do()
            status = 0
        except OSError as error:
            self._log(str(error))
        finally:
            os._exit(status)


_NOT_OF_THE_PROGRAM = ("files", "at_start", "routes", "listens", "names")
"""What may differ without it being another: also what it is ready by."""


def _without(declared: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    return {key: value for key, value in declared.items() if key not in keys}


def _furnish(declared: Mapping[str, Any]) -> None:
    """Make a process's directories and files in this mount namespace."""
    for path, owner in declared.get("directories", ()):
        os.makedirs(path, exist_ok=True)
        os.chown(path, *_owner(owner))
    for file in declared.get("files", ()):
        path = file["path"]
        if path.startswith("/run/"):
            _write(path, file)
        else:
            stand_in = f"{_COVERS}{path}"
            is_covered = os.path.exists(stand_in)
            _write(stand_in, file)
            if not is_covered:
                mount(stand_in, path, None, MS_BIND)


def _write(path: str, file: Mapping[str, Any]) -> None:
    """In place: one that covers another is the same file for ever."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as opened:
        opened.write(file["text"])
        os.fchown(opened.fileno(), *_owner(file.get("owner", "")))


def _owner(name: str) -> tuple[int, int]:
    """A user's numbers.  OSError if the machine has no such user."""
    if not name:
        return 0, 0
    try:
        found = pwd.getpwnam(name)
    except KeyError:
        raise OSError(f"there is no user {name}") from None
    return found.pw_uid, found.pw_gid


def _become(declared: Mapping[str, Any], network: int, mounts: int) -> None:
    """Turn this child into the program, in its namespaces and with nothing of init's open."""
    setns(mounts, CLONE_NEWNS)
    setns(network, CLONE_NEWNET)
    os.setsid()
    os.chdir(declared.get("directory", "/"))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.closerange(3, hard)
    command = declared["command"]
    path = f"{os.environ.get('PATH', os.defpath)}:{_SBIN}"
    try:
        variables = dict(declared.get("at_start", ())) | dict(declared.get("environment", ()))
        environment = {"PATH": path, "LC_ALL": "C.UTF-8", **variables}
        os.execvpe(command[0], command, environment)
    except OSError as error:
        raise OSError(f"{command[0]}: {error.strerror}") from None
