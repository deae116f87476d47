"""Process 1 of a lab: owns every process that belongs to it.

It lives in a PID namespace and a mount namespace of its own, so that ending it ends everything
that it started or that joined it, and so that files such as a pod's `resolv.conf` exist here only.
It answers on the abstract socket that :mod:`netlab.lab.control` bound before it was started,
holds the lab's declared objects, keeps the workload and declared programs running, and reaps what
dies.

It runs in a bare interpreter (`python -I -S`): only the standard library can be imported here.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import resource
import select
import signal
import socket
import sys
import time
from typing import Any, NamedTuple, NoReturn

from netlab.kernel.syscalls import (
    CLONE_NEWNS,
    CLONE_NEWPID,
    MNT_DETACH,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_REC,
    MS_SLAVE,
    mount,
    umount,
    unshare,
)
from netlab.lab import messages
from netlab.lab.children import Children
from netlab.lab.draining import Draining
from netlab.lab.heeding import Heeding
from netlab.lab.probing import Probing
from netlab.lab.processes import Processes
from netlab.lab.rule_logs import RuleLogs
from netlab.lab.views import Views

BACKLOG = 128
LISTENER = 3  # descriptor under which the control socket is inherited
_REQUEST_S = 10.0  # a client that stops in the middle of a request is left after this
_WORKLOAD_S = 60.0  # a workload that does not answer within this is killed
_GRACE_S = 0.5  # after SIGTERM to everything, and once more after SIGHUP
_RESTART_S = 1.0  # a workload that died sooner than this after its start has to wait as long
_HANDLED = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT)


def main(lab: str) -> NoReturn:
    """Become the init of `lab`; descriptors 0 to 3 are /dev/null, the log, the log, the socket."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.closerange(LISTENER + 1, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    os.umask(0o022)
    os.chdir("/")
    try:
        machine = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        unshare(CLONE_NEWPID | CLONE_NEWNS)
        if os.fork():
            os._exit(0)
        _prepare_mounts()
    except OSError as error:
        sys.exit(f"init of lab {lab}: {error}")
    with open("/proc/self/comm", "w") as comm:
        comm.write("netlab-init")
    listener = socket.socket(fileno=LISTENER)
    listener.listen(BACKLOG)  # now its credentials (SO_PEERCRED) are ours, not the starter's
    _Init(lab, listener, machine).run()


def _prepare_mounts() -> None:
    """Give the new mount namespace its /proc, and keep it from holding what the host lets go.

    A copy of a shared mount becomes a slave: what the host unmounts goes away here as well.  The
    copy of a private one would stay, and with it any network namespace mounted there.
    """
    mount("none", "/", None, MS_REC | MS_SLAVE)
    mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mountinfo:
        mounts = [line.split() for line in mountinfo]
    for fields in reversed(mounts):
        optional, kind = fields[6 : fields.index("-")], fields[fields.index("-") + 1]
        if kind == "nsfs" and not any(tag.startswith("master:") for tag in optional):
            with contextlib.suppress(OSError):  # (it went away meanwhile)
                umount(_unescape(fields[4]), MNT_DETACH)


def _unescape(field: str) -> str:
    """A path of mountinfo, which writes blanks and backslashes in octal (proc_pid_mountinfo(5))."""
    first, *rest = field.split("\\")
    return first + "".join(chr(int(part[:3], 8)) + part[3:] for part in rest)


class _Init:
    """The state of the running init, and its loop."""

    def __init__(self, lab: str, listener: socket.socket, machine: int) -> None:
        """`machine`: a descriptor of the machine's mount namespace."""
        self._lab = lab
        self._listener = listener
        self._declared: bytes | None = None
        self._namespaces: dict[int, int] = {}  # inode to descriptor, of what is served
        self._servers: list[dict[str, Any]] = []
        self._workload: _Workload | None = None
        self._restart_at = 0.0  # monotonic; counts while there is no workload
        self._starts = 0
        self._sockets = 0
        self._watchers: dict[int, socket.socket] = {}  # by descriptor
        self._poll = select.poll()
        self._rule_logs = RuleLogs(self._poll)
        self._draining = Draining(_log)
        children = Children(lambda: _HANDLED, _log)
        self._views = Views(children)
        self._processes = Processes(self._namespaces, self._views, children, _log)
        self._probing = Probing(self._namespaces, self._views, children, self._processes, _log)
        self._heeding = Heeding(lab, machine, children, _log)
        self._wake, self._wake_writer = socket.socketpair()
        self._wake_writer.setblocking(False)
        signal.set_wakeup_fd(self._wake_writer.fileno())
        for number in _HANDLED:
            signal.signal(number, lambda *_: None)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        self._pidfd = os.pidfd_open(os.getpid())

    def run(self) -> NoReturn:
        self._poll.register(self._listener, select.POLLIN)
        self._poll.register(self._wake, select.POLLIN)
        self._start_workload()
        while True:
            for descriptor, _ in self._poll.poll(self._until_next_ms()):
                if descriptor == self._listener.fileno():
                    self._accept()
                elif descriptor in self._watchers:  # it has closed; they have nothing to say
                    self._poll.unregister(descriptor)
                    self._watchers.pop(descriptor).close()
                elif descriptor == self._wake.fileno():
                    if {signal.SIGTERM, signal.SIGINT} & set(self._wake.recv(4096)):
                        self._end()
                else:
                    self._rule_logs.ready(descriptor)
            self._reap()
            self._processes.start_due()
            self._probe()
            if self._workload is None and self._restart_at <= time.monotonic():
                self._start_workload()
                if self._workload and self._servers:
                    self._tell_workload(self._workload)
            if self._draining.until_look_ms == 0:
                self._draining.look()

    def _until_next_ms(self) -> int | None:
        waits = (
            self._until_restart_ms(),
            self._draining.until_look_ms,
            _until_ms(self._probing.next_look()),
            _until_ms(self._heeding.next_start()),
        )
        return min((each for each in waits if each is not None), default=None)

    def _until_restart_ms(self) -> int | None:
        """How long nothing has to be started again."""
        due = self._processes.next_start()
        if self._workload is None:
            due = self._restart_at if due is None else min(due, self._restart_at)
        return _until_ms(due)

    def _probe(self) -> None:
        """Ask what is due, and have done what follows of it."""
        self._probing.look()
        if self._probing.is_other_work:
            self._probing.is_other_work = False
            if self._workload:
                self._tell_workload(self._workload)
        if self._probing.is_news:
            self._probing.is_news = False
            self._heeding.is_due()
        self._heeding.start_due()

    def _accept(self) -> None:
        """Serve one client: root's only, one request after the other until it closes."""
        try:
            client, _ = self._listener.accept()
        except OSError:
            return  # it has gone already
        with client:
            client.settimeout(_REQUEST_S)
            if messages.peer(client)[1] != os.geteuid():
                return
            try:
                while (request := messages.receive(client)) is not None:
                    if request.body["do"] == "watch":
                        self._watch(client)
                        return
                    self._answer(client, request)
            except (ConnectionError, TimeoutError):
                pass  # the client is gone, or stopped: nobody waits for an answer
            except Exception as error:  # process 1 must not end by a mistake: all would end
                _log_traceback()
                with contextlib.suppress(OSError):
                    messages.send(client, {"error": repr(error)})

    def _answer(self, client: socket.socket, request: messages.Message) -> None:
        do = request.body["do"]
        if do == "hello":
            messages.send(client, {"lab": self._lab}, b"", (self._pidfd,))
        elif do == "hold":
            self._hold(request.descriptors)
            messages.send(client, {})
        elif do == "serve":
            messages.send(client, self._serve(**request.body))
        elif do == "declare":
            self._declared = request.data
            messages.send(client, {})
            self._tell_watchers(messages.DECLARED)
        elif do == "declared":
            there = self._declared is not None
            messages.send(client, {"there": there}, self._declared or b"")
        elif do == "follow rules":
            self._follow_rules(client, request.descriptors)
        elif do == "finish later":
            for descriptor, servers in zip(
                request.descriptors, request.body["servers"], strict=True
            ):
                self._draining.add(descriptor, servers)
            messages.send(client, {})
        elif do == "status":
            answer: dict[str, Any] = {
                "restarts": max(0, self._starts - 1),
                "sockets": self._sockets,
            }
            answer |= {"containers": self._probing.status()}
            messages.send(client, {**answer, "programs": self._processes.status()})
        elif do == "show":
            self._show(client, request.body["inode"], request.body["view"])
        elif do == "probed":
            probing = self._probing
            told = {"ready": probing.ready(), "unready": probing.unready()}
            messages.send(client, {**told, "undecided": probing.undecided()})
        elif do == "terminate":
            left = self._processes.terminate((request.body["inode"], request.body["view"]))
            messages.send(client, {"left": left})
        elif do == "forget":
            self._views.forget((request.body["inode"], request.body["view"]))
            messages.send(client, {})
        elif do == "shutdown":
            with contextlib.suppress(OSError):
                messages.send(client, {})
            self._end()
        else:
            messages.send(client, {"error": f"unknown request {do!r}"})

    def _watch(self, client: socket.socket) -> None:
        """Keep a client that wants to hear of what is declared from now on."""
        messages.send(client, {})
        watcher = client.dup()
        watcher.setblocking(False)
        self._watchers[watcher.fileno()] = watcher
        self._poll.register(watcher, select.POLLIN)

    def _follow_rules(self, client: socket.socket, descriptors: tuple[int, ...]) -> None:
        """Give a client the log of a namespace, or say why not."""
        try:
            (namespace,) = descriptors
            channel = self._rule_logs.follow(namespace)
        except OSError as error:
            messages.send(client, {"refused": error.errno})
            return
        finally:
            messages.close(descriptors)
        with channel:
            messages.send(client, {}, b"", (channel.fileno(),))

    def _tell_watchers(self, what: bytes) -> None:
        for watcher in self._watchers.values():
            # One that is gone is dropped by the loop; one with a full buffer knows already.
            with contextlib.suppress(OSError):
                watcher.send(what)

    def _hold(self, descriptors: tuple[int, ...]) -> None:
        for descriptor in descriptors:
            inode = os.fstat(descriptor).st_ino
            if inode in self._namespaces:
                os.close(descriptor)
            else:
                self._namespaces[inode] = descriptor

    def _show(self, client: socket.socket, inode: int, view: dict[str, Any]) -> None:
        """Give a client the mount namespace of a view, or say why it cannot be made."""
        try:
            found = self._views.show((inode, view["name"]), view)
        except OSError as error:
            messages.send(client, {"refused": str(error)})
        else:
            messages.send(client, {}, b"", (found,))

    def _serve(
        self,
        do: str,
        servers: list[dict[str, Any]],
        processes: list[dict[str, Any]],
        views: list[tuple[int, dict[str, Any]]],
        probed: list[dict[str, Any]],
        unready: list[str],
    ) -> dict[str, Any]:
        """Have exactly these programs run, and the workload answer for exactly these servers.

        Asks first for namespaces not held yet.  `views` are those of the programs; the answer names
        the others that there are.
        """
        wanted = {each["inode"] for each in (*servers, *processes, *probed)}
        wanted |= {each["node_inode"] for each in probed}
        if missing := wanted - self._namespaces.keys():
            return {"missing": sorted(missing)}
        self._servers = servers
        for inode, view in views:
            try:
                self._views.show((inode, view["name"]), view)
            except OSError as error:  # whoever enters is told
                _log(f"{view['name']}: {error}")
        self._processes.declare(processes)
        self._probing.declare(probed, unready)
        others = [key for key in self._views.keys if key not in self._processes.views]
        for inode in self._namespaces.keys() - wanted:
            os.close(self._namespaces.pop(inode))
        for _ in range(2):  # (if it just died, or dies of this, a new one has a try)
            if self._workload is None:
                self._start_workload()
            if self._workload and (answer := self._tell_workload(self._workload)):
                return {**answer, "views": others}
        return {"error": "the workload does not stay alive"}

    def _tell_workload(self, workload: _Workload) -> dict[str, Any] | None:
        """Hand the servers and their namespaces over; None if the workload is no more."""
        try:
            descriptors = tuple(self._namespaces.values())
            down = self._probing.down()
            servers = [s for s in self._servers if (s["inode"], s["identity"]) not in down]
            messages.send(workload.channel, {"servers": servers}, b"", descriptors)
            answer = messages.receive(workload.channel)
        except OSError as error:
            _log(f"workload: {error}")
            answer = None
        if answer is None:
            self._drop_workload(workload)
            return None
        self._sockets = answer.body["sockets"]
        return answer.body

    def _start_workload(self) -> None:
        """Fork it; if the machine has no room for a process, the loop tries again later."""
        ours, theirs = socket.socketpair()
        # A SIGTERM must not meet init's handlers in the child: it would be lost.
        signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)
        try:
            pid = os.fork()
            if pid == 0:
                self._become_workload(ours, theirs)
        except OSError as error:
            _log(f"workload: {error}")
            self._restart_at = time.monotonic() + _RESTART_S
            return
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)
        theirs.close()
        ours.settimeout(_WORKLOAD_S)
        self._workload = _Workload(pid, ours, time.monotonic())
        self._starts += 1

    def _become_workload(self, ours: socket.socket, theirs: socket.socket) -> NoReturn:
        """Turn this fork of init into the workload: nothing of init's may stay open in it."""
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in (*_HANDLED, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)
            own = (ours, self._listener, self._wake, self._wake_writer)
            for channel in (*own, *self._watchers.values()):
                channel.close()
            descriptors = (
                self._namespaces.values(),
                self._rule_logs.descriptors,
                self._draining.descriptors,
                self._views.descriptors,
                self._probing.descriptors,
                self._heeding.descriptors,
            )
            messages.close((self._pidfd, *itertools.chain(*descriptors)))
            from netlab.lab import workload

            workload.main(theirs)
            status = 0
        except BaseException:
            _log_traceback()
        finally:
            os._exit(status)

    def _drop_workload(self, workload: _Workload) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(workload.pid, signal.SIGKILL)
        workload.channel.close()
        self._restart_at = workload.started + _RESTART_S
        self._workload = None

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0] != 0:
                pid, status = ended
                if self._workload is not None and pid == self._workload.pid:
                    _log(f"workload ended with {os.waitstatus_to_exitcode(status)}")
                    self._drop_workload(self._workload)
                else:
                    code = os.waitstatus_to_exitcode(status)
                    for owner in (self._processes, self._probing, self._heeding):
                        if owner.ended(pid, code):
                            break

    def _end(self) -> NoReturn:
        """Ask everything to end, wait a little; the kernel kills what is left with process 1."""
        self._tell_watchers(messages.ENDING)
        self._listener.close()
        for number in (signal.SIGTERM, signal.SIGHUP):  # interactive shells heed the second only
            with contextlib.suppress(ProcessLookupError):  # (there is nobody else)
                os.kill(-1, number)
                _wait_for_all(_GRACE_S)
        os._exit(0)


def _until_ms(due: float | None) -> int | None:
    """How long it is until then (monotonic), for poll(2)."""
    return None if due is None else max(0, math.ceil((due - time.monotonic()) * 1000))


def _wait_for_all(timeout: float) -> None:
    """Wait for every other process here, not only children: `exec` moves some in from outside."""
    deadline = time.monotonic() + timeout
    for entry in filter(str.isdecimal, os.listdir("/proc")):
        if int(entry) != os.getpid():
            with contextlib.suppress(ProcessLookupError):
                poll = select.poll()
                poll.register(os.pidfd_open(int(entry)), select.POLLIN)
                poll.poll(max(0.0, deadline - time.monotonic()) * 1000)


class _Workload(NamedTuple):
    """The running workload process, as init sees it."""

    pid: int
    channel: socket.socket
    started: float


def _log(line: str) -> None:
    with contextlib.suppress(OSError):  # (a full disk ends nobody)
        print(time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), line, file=sys.stderr, flush=True)


def _log_traceback() -> None:
    import traceback

    _log(traceback.format_exc())
