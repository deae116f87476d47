"""A lab's init seen from outside: started, found, asked, ended.

Its socket (:mod:`netlab.lab.init_socket`) is bound here, before init is started: so a lab has one
init, and whoever connects meanwhile waits for it instead of missing it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from netlab.kernel import namespaces
from netlab.lab import messages
from netlab.lab.init_socket import PREFIX, address_of, connected, listening_process
from netlab.lab.launch import Launch, log_path
from netlab.lab.pid_namespace import Process, living, processes_of
from netlab.problems import Exit, NetlabError, Problem

if TYPE_CHECKING:
    from netlab.datapath.state import ProbedPod, Server, View
    from netlab.datapath.state import Process as Program

_ANSWER_S = 120.0
_HELLO_S = 5.0
_SETTLE_S = 5.0  # how long an init of the same lab may take to go away
_KILL_S = 2.0


class LabNotRunning(NetlabError):
    """There is no init of that lab, or it ended while it was asked."""

    def __init__(self, lab: str) -> None:
        super().__init__(
            Problem("lab-not-running", f'lab "{lab}" is not running', hint="start it: `netlab up`")
        )


class Unserved(NamedTuple):
    """A socket that the workload could not open, and why."""

    namespace: str
    identity: str
    protocol: str
    port: int
    reason: str


class Running(NamedTuple):
    """A declared program: how often it was started again, and how it ended last.

    `ended` is an exit code, -n for signal n; None if it never did.
    """

    name: str
    namespace: str
    running: bool
    restarts: int
    ended: int | None
    starts_in_s: float | None

    def __str__(self) -> str:
        if self.running:
            again = f", started again {self.restarts} times" if self.restarts else ""
            return f"{self.name} of {self.namespace} runs{again}"
        how = f"signal {-self.ended}" if self.ended and self.ended < 0 else f"exit {self.ended}"
        return (
            f"{self.name} of {self.namespace} ended ({how}) and starts again in "
            f"{self.starts_in_s} s"
        )


class Container(NamedTuple):
    """A container with probes that the workload answers for; `waiting` to be started again."""

    pod: str
    name: str
    restarts: int
    waiting: bool


class Status(NamedTuple):
    """How a lab's init and what it owns are."""

    pid: int
    restarts: int
    sockets: int
    processes: tuple[Process, ...]
    programs: tuple[Running, ...] = ()


class Init:
    """A running init, or one that is about to run; requests wait for it.

    Each request raises LabNotRunning if it has ended, and NetlabError(init-failed) if it never
    came to be.
    """

    def __init__(self, lab: str, launch: Launch | None = None) -> None:
        self.lab = lab
        self._launch = launch
        self._pidfd: int | None = None

    def __del__(self) -> None:
        if self._launch is not None:
            self._launch.close()
        if self._pidfd is not None:
            os.close(self._pidfd)

    @property
    def pidfd(self) -> int:
        """A descriptor of the process, for setns(2) and poll(2); closed with this object."""
        if self._pidfd is None:
            with self._connection(_HELLO_S) as connection:
                try:
                    (self._pidfd,) = self._ask(connection, {"do": "hello"}).descriptors
                except TimeoutError:
                    self._pidfd = listening_process(connection)
        return self._pidfd

    @property
    def pid(self) -> int:
        """The number of the process in this PID namespace; -1 once it has ended."""
        with open(f"/proc/self/fdinfo/{self.pidfd}", encoding="ascii") as fdinfo:
            return next(int(line.split()[1]) for line in fdinfo if line.startswith("Pid:"))

    def serve(
        self,
        servers: Sequence[Server],
        programs: Sequence[Program] = (),
        view_of: Callable[[str], View | None] = lambda name: None,
        probed: Sequence[ProbedPod] = (),
        unready: Sequence[str] = (),
    ) -> tuple[Unserved, ...]:
        """Have the workload answer for exactly these servers, and return when all sockets listen.

        Exactly these programs run from then on; whether they are ready, :mod:`netlab.lab.ready`
        tells.  `view_of` gives views by their names, for the programs and for what is entered
        already.  What the workload cannot open is returned.  Init keeps the namespaces of what is
        served alive: one whose pod is deleted goes away when the next call leaves it out.
        """
        unserved: list[Unserved] = []
        files: dict[int, str] = {}
        wire = []
        for server in servers:
            try:
                inode = os.stat(namespaces.path(server.namespace)).st_ino
            except OSError as error:
                unserved += _all_unserved(server, error)
                continue
            files[inode] = server.namespace
            wire.append({**msgspec.to_builtins(server), "inode": inode})
        running = []
        views: dict[str, tuple[int, View]] = {}
        for program in programs:
            inode = os.stat(namespaces.path(program.namespace)).st_ino
            files[inode] = program.namespace
            filled = {"reload": program.reload, **msgspec.to_builtins(program)}
            running.append({**filled, "inode": inode})
            name = program.view or program.namespace
            if name not in views and (view := view_of(name)):
                views[name] = inode, view
        asked = [_with_inodes(pod, files, view_of) for pod in probed]
        with self._connection() as connection:
            seen = msgspec.to_builtins(list(views.values()))
            request = {"do": "serve", "servers": wire, "processes": running, "views": seen}
            request |= {"probed": asked, "unready": list(unready)}
            answer = self._ask(connection, request).body
            if missing := answer.get("missing"):
                self._hold(connection, [files[inode] for inode in missing])
                answer = self._ask(connection, request).body
        if "missing" in answer:
            raise NetlabError(
                Problem(
                    "lab-changed",
                    f'namespaces of lab "{self.lab}" were made anew by somebody else meanwhile',
                    hint="run the command again",
                ),
                Exit.MACHINE,
            )
        for inode, name in answer["views"]:
            self._show_anew(inode, view_of(name), name)
        return (*unserved, *(Unserved(*entry) for entry in answer["unserved"]))

    def declare(self, data: bytes) -> None:
        """Have init keep the lab's declared objects."""
        with self._connection() as connection:
            self._ask(connection, {"do": "declare"}, data)

    def declared(self) -> bytes | None:
        """What was declared last, or None if nothing was."""
        with self._connection() as connection:
            answer = self._ask(connection, {"do": "declared"})
            return answer.data if answer.body["there"] else None

    def finish_later(self, draining: Mapping[str, Sequence[object]]) -> None:
        """Have init take real servers away, by namespace, when their connections have ended."""
        if not draining:
            return
        with contextlib.ExitStack() as opened:
            descriptors = []
            for name in draining:
                descriptors.append(namespaces.open_named(name))
                opened.callback(os.close, descriptors[-1])
            with self._connection() as connection:
                request = {"do": "finish later", "servers": list(draining.values())}
                self._ask(connection, request, b"", descriptors)

    def probed(self) -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
        """Pods with probes: those that are ready by them, that are not, that may become so."""
        with self._connection() as connection:
            answer = self._ask(connection, {"do": "probed"}).body
        ready, unready, undecided = (
            frozenset(answer[which]) for which in ("ready", "unready", "undecided")
        )
        return ready, unready, undecided

    def terminate(self, namespace: str, view: str) -> int:
        """Tell the programs of a pod to end for good; returns how many have not yet."""
        inode = os.stat(namespaces.path(namespace)).st_ino
        with self._connection() as connection:
            request = {"do": "terminate", "inode": inode, "view": view}
            left: int = self._ask(connection, request).body["left"]
        return left

    @contextlib.contextmanager
    def watch(self) -> Iterator[socket.socket]:
        """A connection on which init sends a byte (`messages`) for each time that it is told.

        It ends when init does.
        """
        with self._connection() as connection:
            self._ask(connection, {"do": "watch"})
            yield connection

    def follow_rules(self, namespace: str) -> socket.socket:
        """A channel with what rules of iptables-legacy log in a namespace, datagram by datagram.

        It ends when something was lost.  OSError: EPERM if another process listens there.
        """
        descriptor = namespaces.open_named(namespace)
        try:
            with self._connection() as connection:
                answer = self._ask(connection, {"do": "follow rules"}, b"", (descriptor,))
        finally:
            os.close(descriptor)
        if refused := answer.body.get("refused"):
            raise OSError(refused, os.strerror(refused))
        (channel,) = answer.descriptors
        return socket.socket(fileno=channel)

    def status(self) -> Status:
        """Figures of init and of every process in the lab, those of `exec` included."""
        with self._connection() as connection:
            answer = self._ask(connection, {"do": "status"}).body
        programs = tuple(Running(**each) for each in answer["programs"])
        found = processes_of(self.pid)
        return Status(self.pid, answer["restarts"], answer["sockets"], found, programs)

    def lives(self) -> tuple[tuple[Running, ...], tuple[Container, ...]]:
        """How programs are, and the containers that the workload answers for."""
        with self._connection() as connection:
            answer = self._ask(connection, {"do": "status"}).body
        programs = tuple(Running(**each) for each in answer["programs"])
        return programs, tuple(Container(**each) for each in answer["containers"])

    def show(self, view: View) -> int:
        """A descriptor of the mount namespace in which that is seen, the caller's to close.

        NetlabError(files-not-shown) if it cannot be.
        """
        inode = os.stat(namespaces.path(view.namespace)).st_ino
        with self._connection() as connection:
            request = {"do": "show", "inode": inode, "view": msgspec.to_builtins(view)}
            answer = self._ask(connection, request)
        if refused := answer.body.get("refused"):
            raise NetlabError(
                Problem(
                    "files-not-shown",
                    f"{view.name}: {refused}",
                    hint=f"see {log_path(self.lab)}",
                ),
                Exit.MACHINE,
            )
        return answer.descriptors[0]

    def _show_anew(self, inode: int, view: View | None, name: str) -> None:
        """What is in a view sees what changed; one whose place is no more is let go."""
        with contextlib.suppress(FileNotFoundError):
            if view and os.stat(namespaces.path(view.namespace)).st_ino == inode:
                os.close(self.show(view))
                return
        with self._connection() as connection:
            self._ask(connection, {"do": "forget", "inode": inode, "view": name})

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until init and everything in the lab has ended; False if it has not in `timeout`."""
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(None if timeout is None else timeout * 1000))

    def shutdown(self, timeout: float = 2.0) -> None:
        """End every process of the lab: politely for `timeout` seconds, then by SIGKILL.

        NetlabError(processes-remain) if the kernel cannot end one of them.
        """
        try:
            pidfd = self.pidfd
        except LabNotRunning:
            return
        with contextlib.suppress(NetlabError), self._connection(timeout) as connection:
            self._ask(connection, {"do": "shutdown"})
        if self.wait(timeout):
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        if not self.wait(_KILL_S) and (left := living(self.pid)):
            raise NetlabError(
                Problem(
                    "processes-remain",
                    f'processes of lab "{self.lab}" do not end after SIGKILL: '
                    + ", ".join(map(str, left)),
                    hint="see what they wait for: `ps -eo pid,ppid,stat,wchan,args`",
                ),
                Exit.MACHINE,
            )

    @contextlib.contextmanager
    def _connection(self, timeout: float = _ANSWER_S) -> Iterator[socket.socket]:
        try:
            with connected(address_of(self.lab), timeout) as connection:
                yield connection
        except TimeoutError:
            raise NetlabError(
                Problem(
                    "init-silent",
                    f'init of lab "{self.lab}" does not answer',
                    hint=f"`netlab down {self.lab}` ends it",
                ),
                Exit.MACHINE,
            ) from None
        except PermissionError as error:
            raise NetlabError(
                Problem("not-permitted", str(error.strerror), hint="run it as root, with sudo"),
                Exit.MACHINE,
            ) from None
        except ConnectionError:
            raise self._gone() from None

    def _ask(
        self,
        connection: socket.socket,
        request: dict[str, Any],
        data: bytes = b"",
        descriptors: Sequence[int] = (),
    ) -> messages.Message:
        messages.send(connection, request, data, descriptors)
        answer = messages.receive(connection)
        if answer is None:
            raise ConnectionResetError(errno.ECONNRESET, "no answer")
        if error := answer.body.get("error"):
            raise NetlabError(
                Problem(
                    "init-refused",
                    f'init of lab "{self.lab}" answers: {error}',
                    hint=f"see {log_path(self.lab)}",
                ),
                Exit.MACHINE,
            )
        return answer

    def _hold(self, connection: socket.socket, names: Sequence[str]) -> None:
        """Give init descriptors of namespaces, few at a time: the soft limit may be low."""
        for start in range(0, len(names), messages.BATCH):
            with contextlib.ExitStack() as opened:
                descriptors = []
                for name in names[start : start + messages.BATCH]:
                    with contextlib.suppress(FileNotFoundError):  # (init asks for it again)
                        descriptors.append(namespaces.open_named(name))
                        opened.callback(os.close, descriptors[-1])
                self._ask(connection, {"do": "hold"}, b"", descriptors)

    def _gone(self) -> NetlabError:
        said = self._launch.said() if self._launch is not None and self._pidfd is None else ""
        if not said:
            return LabNotRunning(self.lab)
        return NetlabError(
            Problem(
                "init-failed", said.splitlines()[-1], hint="`netlab doctor` tells what is missing"
            ),
            Exit.MACHINE,
        )


def start(lab: str) -> Init:
    """Start the init of a lab and return at once; if it is running, that one is returned.

    The calling process stays where it is, and init does not depend on it.
    """
    deadline = time.monotonic() + _SETTLE_S
    while True:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            try:
                listener.bind(address_of(lab))
                listener.listen(128)
                return Init(lab, Launch(lab, listener))
            except OSError as error:
                if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                    raise
        if (running := connect(lab)) is not None:
            return running
        time.sleep(0.005)  # it is about to go away, and tells nobody when its name is free


def connect(lab: str) -> Init | None:
    """The running init of a lab, or None."""
    init = Init(lab)
    try:
        _ = init.pidfd
    except LabNotRunning:
        return None
    return init


def running() -> tuple[str, ...]:
    """Names of all labs whose init runs, sorted; found in the kernel's list of sockets."""
    with open("/proc/self/net/unix", encoding="utf-8", errors="surrogateescape") as table:
        paths = {line.split(maxsplit=7)[-1].rstrip("\n") for line in table}
    labs = set()
    for path in paths:
        if path.startswith("@" + PREFIX):
            with (
                contextlib.suppress(OSError),
                connected("\0" + path[1:], _HELLO_S) as connection,
            ):
                messages.send(connection, {"do": "hello"})
                if (answer := messages.receive(connection)) is not None:
                    messages.close(answer.descriptors)
                    labs.add(answer.body["lab"])
    return tuple(sorted(labs))


def _with_inodes(
    pod: ProbedPod, files: dict[int, str], view_of: Callable[[str], View | None]
) -> dict[str, Any]:
    """A pod as init takes it; adds its namespaces to the files by inode."""
    found = {}
    for field, name in (("inode", pod.namespace), ("node_inode", pod.node_namespace)):
        found[field] = os.stat(namespaces.path(name)).st_ino
        files[found[field]] = name
    view = view_of(pod.view)
    shown = msgspec.to_builtins(view) if view else {}
    return {**msgspec.to_builtins(pod), **found, "shown": shown}


def _all_unserved(server: Server, error: OSError) -> list[Unserved]:
    reason = f"{namespaces.path(server.namespace)}: {error.strerror}"
    return [
        Unserved(server.namespace, server.identity, protocol, port, reason)
        for protocol, port in server.listen
    ]
