"""Run a command inside a lab, as if its terminal, signals and exit code were the caller's own.

The command runs in three namespaces of the lab: the network namespace of a pod or a node, the PID
namespace of init, so that it ends with the lab, and a mount namespace, in which it sees the files
of the place (:mod:`netlab.lab.views`), as programs that run there do.  Its host name and its /sys
are its own: /sys shows the links of the network namespace that mounted it.

Three processes: the caller, which waits outside; a supervisor, first to be inside, which tells the
caller how the command ended; the command.  The end of one ends those after it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from netlab.kernel.namespaces import open_named, path, require_privilege
from netlab.kernel.syscalls import (
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWUTS,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    die_with_parent,
    mount,
    setns,
    unshare,
)
from netlab.lab.control import Init, LabNotRunning
from netlab.problems import Exit, NetlabError, Problem

if TYPE_CHECKING:
    from netlab.datapath.state import View

NOT_EXECUTABLE = 126  # as POSIX shells have it (XCU 2.8.2)
NOT_FOUND = 127

_FROM_TERMINAL = (signal.SIGINT, signal.SIGQUIT)  # sent to all three processes
_FORWARDED = (signal.SIGTERM, signal.SIGHUP)  # sent to one
_STATUS = struct.Struct("=i")  # as waitpid(2) gives it


class _Entry(NamedTuple):
    """Everything that the processes inside need, opened outside."""

    view: View
    network: int
    init: int
    mounts: int
    directory: str
    status: int  # where the supervisor writes how the command ended
    signals: _Signals


class _Signals(NamedTuple):
    """What the caller did with signals before: the command does the same."""

    ignored: tuple[int, ...]
    blocked: set[int | signal.Signals]


def run(init: Init, view: View, command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a command and wait for it; returns its exit code, 128+n if signal n ended it.

    126 if it cannot be executed, 127 if there is no such command; both are told on stderr, as is
    the end of the lab.  To be called in the main thread, for it handles signals meanwhile.
    NetlabError if the lab or the namespace is not there, or the view's files cannot be shown.
    """
    require_privilege()
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.ExitStack() as stack:
        network = _open_network(view)
        stack.callback(os.close, network)
        reader, writer = os.pipe()
        stack.callback(os.close, reader)
        stack.enter_context(_terminal_kept())
        signals = stack.enter_context(_signals_left_to_the_command())
        mounts = init.show(view)
        stack.callback(os.close, mounts)
        entry = _Entry(view, network, init.pidfd, mounts, _directory(), writer, signals)
        try:
            supervisor = _fork_inside(init, entry, command, environment)
        finally:
            os.close(writer)
        _forward_signals(supervisor)
        status = os.read(reader, _STATUS.size)
        # As long as SIGCHLD is ignored: whoever inherits a zombie may let it lie.
        with contextlib.suppress(ChildProcessError):
            os.waitpid(supervisor, 0)
    if not status:
        _tell(Problem("lab-ended", f'lab "{init.lab}" went down, and "{command[0]}" with it'))
        return 128 + signal.SIGKILL
    code = os.waitstatus_to_exitcode(_STATUS.unpack(status)[0])
    return code if code >= 0 else 128 - code


def _fork_inside(
    init: Init, entry: _Entry, command: Sequence[str], environment: Mapping[str, str]
) -> int:
    """Start the supervisor in init's PID namespace; the caller's later children are outside."""
    home = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    try:
        setns(entry.init, CLONE_NEWPID)
        try:
            supervisor = os.fork()
            if supervisor == 0:
                _supervise(entry, command, environment)
        finally:
            setns(home, CLONE_NEWPID)
    except OSError:
        if not init.wait(0):
            raise
        raise LabNotRunning(init.lab) from None
    finally:
        os.close(home)
    return supervisor


def _supervise(entry: _Entry, command: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    status = NOT_EXECUTABLE << 8
    try:
        die_with_parent(signal.SIGKILL)
        if not _has_reader(entry.status):  # the caller ended before that; getppid() is 0 either way
            os._exit(1)
        _move_in(entry)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        supervisor = os.getpid()
        child = os.fork()
        if child == 0:
            _execute(supervisor, entry, command, environment)
        _forward_signals(child)
        _, status = os.waitpid(child, 0)
    except OSError as error:
        _tell(Problem("not-entered", f"{entry.view.namespace} cannot be entered: {error}"))
    finally:
        with contextlib.suppress(OSError):
            os.write(entry.status, _STATUS.pack(status))
        os._exit(0)


def _move_in(entry: _Entry) -> None:
    """Into the mounts and the network namespace; a /sys and a host name that are private."""
    setns(entry.mounts, CLONE_NEWNS)
    setns(entry.network, CLONE_NEWNET)
    unshare(CLONE_NEWNS | CLONE_NEWUTS)
    try:
        mount("sysfs", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    except OSError as error:
        if error.errno != errno.EBUSY:  # it is that one: a node that is the machine itself
            raise
    socket.sethostname(entry.view.host_name)
    with contextlib.suppress(OSError):
        os.chdir(entry.directory)


def _execute(
    supervisor: int, entry: _Entry, command: Sequence[str], environment: Mapping[str, str]
) -> NoReturn:
    code = NOT_EXECUTABLE
    try:
        die_with_parent(signal.SIGKILL)
        if os.getppid() != supervisor:
            os._exit(1)
        # exec keeps what is ignored: undo what Python ignores (SIGPIPE, SIGXFSZ) and what this
        # module does, not what `nohup` or a shell's & did.
        for number in (signal.SIGPIPE, signal.SIGXFSZ, *_FROM_TERMINAL, *_FORWARDED):
            if number not in entry.signals.ignored:
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, entry.signals.blocked)
        os.execvpe(command[0], list(command), dict(environment))
    except (FileNotFoundError, NotADirectoryError):
        code = NOT_FOUND
        hint = "commands are those of this machine, found by PATH; is its package installed?"
        _tell(Problem("command-not-found", f'"{command[0]}" is not there', hint=hint))
    except OSError as error:
        _tell(Problem("not-executable", f'"{command[0]}" cannot be executed: {error.strerror}'))
    finally:
        os._exit(code)


def _open_network(view: View) -> int:
    try:
        return open_named(view.namespace)
    except FileNotFoundError:
        problem = Problem(
            "namespace-gone",
            f"{path(view.namespace)} does not exist",
            hint="`netlab up` with the lab's topology makes it again",
        )
        raise NetlabError(problem, Exit.MACHINE) from None


def _directory() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:
        return "/"


@contextlib.contextmanager
def _signals_left_to_the_command() -> Iterator[_Signals]:
    """Do not end by what the terminal sends; hold back what is sent to us until it can go on.

    SIGCHLD is ignored, so that the kernel reaps the supervisor itself: the end of a PID namespace
    waits for everything that was moved into it, and a stopped caller (^Z) would never wait.
    """
    changed = (*_FROM_TERMINAL, *_FORWARDED, signal.SIGCHLD)
    before = {number: signal.getsignal(number) for number in changed}
    ignored = tuple(number for number in changed if before[number] is signal.SIG_IGN)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)
    for number in (*_FROM_TERMINAL, signal.SIGCHLD):
        signal.signal(number, signal.SIG_IGN)
    try:
        yield _Signals(ignored, blocked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _forward_signals(process: int) -> None:
    """Pass on what is sent to one process only, unless it is ignored."""

    def forward(number: int, _: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)

    for number in _FORWARDED:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, forward)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)


@contextlib.contextmanager
def _terminal_kept() -> Iterator[None]:
    """Have the terminal afterwards as before: a shell takes it over, and may be killed."""
    import termios

    try:
        in_foreground = os.tcgetpgrp(0) == os.getpgrp()
        modes = termios.tcgetattr(0)
    except (OSError, termios.error):  # not a terminal, or not ours
        in_foreground = False
    if not in_foreground:
        yield
        return
    try:
        yield
    finally:
        before = signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        with contextlib.suppress(OSError, termios.error):
            os.tcsetpgrp(0, os.getpgrp())
            termios.tcsetattr(0, termios.TCSANOW, modes)
        signal.signal(signal.SIGTTOU, before)


def _has_reader(pipe: int) -> bool:
    poll = select.poll()
    poll.register(pipe, 0)
    return not poll.poll(0)


def _tell(problem: Problem) -> None:
    print(problem, file=sys.stderr, flush=True)
