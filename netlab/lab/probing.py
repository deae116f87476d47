"""Probes as kubelet runs them: who is ready, and what has to be started again.

Questions over the network are asked from the node's namespace, commands run in the pod.  Each is a
child of init's that ends with 0 or not, killed when its time is over.  A container is ready when
its readiness probe passed so often in a row; it is started again when its liveness probe, or its
startup probe, failed so often.  As long as the startup probe has not passed the other two wait.

Init cannot render rules: that who is ready has changed is applied by :mod:`netlab.lab.heeding`.

It runs in init's bare interpreter: only the standard library can be imported here.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from netlab.kernel.syscalls import CLONE_NEWNET, CLONE_NEWNS, CLONE_NEWUTS, setns, unshare
from netlab.lab.children import Children
from netlab.lab.processes import SBIN, Pause, Processes
from netlab.lab.views import Key, Views

_LATE_S = 0.5  # what a child has beyond its timeout, to say that it is over
_READ = 10 * 1024  # bytes of an answer, as kubelet reads
_SAID = 200  # bytes of what a failed one says that are told


class _Check:
    """One probe of a container; `passes` is None until it has said something."""

    def __init__(self, declared: Mapping[str, Any], begins: float) -> None:
        self.declared = declared
        self.next_at = begins + declared["delay_s"]  # monotonic
        self.pid = 0
        self.deadline = 0.0
        self.said = -1  # descriptor of what the child says
        self.in_a_row = 0  # of the last result
        self.last: bool | None = None
        self.passes: bool | None = None

    def note(self, result: bool) -> bool:
        """Count a result; whether the probe says something else now."""
        self.in_a_row = self.in_a_row + 1 if result is self.last else 1
        self.last = result
        enough = self.declared["successes" if result else "failures"]
        if self.in_a_row < enough or self.passes is result:
            return False
        self.passes = result
        return True


class _Container:
    """A container that is asked."""

    def __init__(self, pod: Mapping[str, Any], declared: Mapping[str, Any]) -> None:
        self.pod = pod
        self.declared = declared
        self.restarts = 0  # of what the workload answers
        self.pause = Pause()  # the same
        self.starts = -1  # of its program, as last seen
        self.runs = False
        self.checks: dict[str, _Check] = {}

    def begin(self) -> None:
        """It was just started."""
        self.forget()
        now = time.monotonic()
        self.checks = {
            kind: _Check(self.declared[kind], now)
            for kind in ("startup", "readiness", "liveness")
            if self.declared[kind]
        }

    def forget(self) -> None:
        """Let go of what is being asked."""
        for check in self.checks.values():
            if check.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(check.pid, signal.SIGKILL)
            if check.said >= 0:
                os.close(check.said)
        self.checks = {}

    @property
    def ready(self) -> bool:
        awaited = (self.checks.get(kind) for kind in ("startup", "readiness"))
        return self.runs and all(check is None or check.passes is True for check in awaited)

    @property
    def asked(self) -> Iterator[tuple[str, _Check]]:
        """The probes that are to be asked now."""
        startup = self.checks.get("startup")
        is_starting = startup is not None and startup.passes is not True
        for kind, check in self.checks.items():
            if self.runs and (kind == "startup") is is_starting:
                yield kind, check


class Probing:
    """The probes of a lab."""

    def __init__(
        self,
        networks: Mapping[int, int],
        views: Views,
        children: Children,
        processes: Processes,
        log: Callable[[str], None],
    ) -> None:
        """`networks`: descriptors of network namespaces by inode."""
        self._networks = networks
        self._views = views
        self._children = children
        self._processes = processes
        self._log = log
        self._containers: dict[tuple[str, int, str], _Container] = {}
        self._ready: dict[str, bool] = {}
        self._heeded: set[str] = set()
        self.is_news = False  # who is ready is not what the rules know
        self.is_other_work = False  # so has what the workload is to answer for

    def declare(self, pods: list[dict[str, Any]], unready: list[str]) -> None:
        """Have exactly these asked; what is declared as before goes on.

        `unready`: pods (`namespace/name`) that the lab's rules know to be not ready.
        """
        wanted = {
            (pod["key"], pod["inode"], container["name"]): (pod, container)
            for pod in pods
            for container in pod["containers"]
        }
        for key in self._containers.keys() - wanted.keys():
            self._containers.pop(key).forget()
        for key, (pod, declared) in wanted.items():
            there = self._containers.get(key)
            if there is None:
                there = self._containers[key] = _Container(pod, declared)
            elif there.declared != declared:
                there.pod, there.declared = pod, declared
                there.begin()
            there.pod = pod
        self._heeded = set(unready)
        self._look_at_pods()
        self.is_news = set(self.unready()) != self._heeded

    def unready(self) -> list[str]:
        """Pods (`namespace/name`) that have probes and are not ready by them."""
        return [pod for pod, ready in self._ready.items() if not ready]

    def ready(self) -> list[str]:
        """Those that are."""
        return [pod for pod, ready in self._ready.items() if ready]

    def undecided(self) -> list[str]:
        """Pods that are not ready, with a probe that may yet pass for the first time."""
        return [
            each.pod["key"]
            for each in self._containers.values()
            if not each.ready and any(check.passes is None for check in each.checks.values())
        ]

    @property
    def descriptors(self) -> list[int]:
        """Those that init holds for what is being asked."""
        checks = (check for each in self._containers.values() for check in each.checks.values())
        return [check.said for check in checks if check.said >= 0]

    def down(self) -> set[tuple[int, str]]:
        """What the workload answers for and is about to be started again: inode and identity."""
        now = time.monotonic()
        return {
            (each.pod["inode"], each.pod["identity"])
            for each in self._containers.values()
            if each.pause.until > now
        }

    def status(self) -> list[dict[str, Any]]:
        """How containers without a program of their own were: pod, name, restarts, waiting."""
        now = time.monotonic()
        return [
            {
                "pod": each.pod["key"],
                "name": each.declared["name"],
                "restarts": each.restarts,
                "waiting": each.pause.until > now,
            }
            for each in self._containers.values()
            if not each.declared["program"]
        ]

    def next_look(self) -> float | None:
        """When something is to be asked or given up (monotonic)."""
        times = [
            check.deadline if check.pid else check.next_at
            for each in self._containers.values()
            for _, check in each.asked
        ]
        times += [each.pause.until for each in self._containers.values() if each.pause.until]
        return min(times, default=None)

    def look(self) -> None:
        """Ask what is due, give up what takes too long."""
        if not self._containers:
            return
        now = time.monotonic()
        for each in self._containers.values():
            if each.pause.until and each.pause.until <= now:
                each.pause.until = 0.0
                self.is_other_work = True
            self._see_whether_it_runs(each)
            for _, check in each.asked:
                if check.pid and check.deadline <= now:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(check.pid, signal.SIGKILL)
                    check.deadline = now + _LATE_S
                elif not check.pid and check.next_at <= now:
                    self._ask(each, check, now)
        self._look_at_pods()

    def ended(self, pid: int, code: int) -> bool:
        """Note that a child of init's has ended; False if it is none of these."""
        for each in self._containers.values():
            for kind, check in list(each.checks.items()):
                if check.pid == pid:
                    self._note(each, kind, check, code)
                    return True
        return False

    def _see_whether_it_runs(self, each: _Container) -> None:
        program = each.declared["program"]
        if program:
            starts, runs = self._processes.life_of((_view(each.pod), program))
        else:
            starts, runs = each.restarts, not each.pause.until
        if starts != each.starts:
            each.starts = starts
            each.begin()
        each.runs = runs

    def _look_at_pods(self) -> None:
        ready: dict[str, bool] = {}
        for each in self._containers.values():
            key = each.pod["key"]
            ready[key] = ready.get(key, True) and each.ready
        if ready != self._ready:
            self._ready = ready
            self.is_news = set(self.unready()) != self._heeded

    def _ask(self, each: _Container, check: _Check, now: float) -> None:
        declared, pod = check.declared, each.pod
        check.next_at = now + declared["period_s"]
        check.deadline = now + declared["timeout_s"] + _LATE_S * (declared["kind"] != "exec")
        heard, said = os.pipe()
        try:
            if declared["kind"] == "exec":
                view = _view(pod)
                mounts, name = self._views.find(view), self._views.host_name(view)
                if mounts is None:
                    mounts = self._views.show(view, {"name": pod["view"], **pod["shown"]})
                network = self._networks[pod["inode"]]
                environment = dict(each.declared["environment"])
                check.pid = self._children.fork(
                    lambda: _run(declared["command"], environment, network, mounts, name, said)
                )
            else:
                network = self._networks[pod["node_inode"]]
                check.pid = self._children.fork(lambda: _answer(declared, network, said))
        except OSError as error:
            os.close(heard)
            self._log(f"probe of {pod['key']}: {error}")
            return
        finally:
            os.close(said)
        check.said = heard

    def _note(self, each: _Container, kind: str, check: _Check, code: int) -> None:
        os.set_blocking(check.said, False)
        text = b""
        with contextlib.suppress(BlockingIOError):
            text = os.read(check.said, _SAID)
        os.close(check.said)
        check.pid, check.said = 0, -1
        if not check.note(code == 0):
            return
        title = f"{kind} probe of {each.pod['key']}, container {each.declared['name']}"
        if code == 0:
            self._log(f"{title} passes")
        else:
            how = "timed out" if code == -signal.SIGKILL else f"exit {code}"
            self._log(f"{title} fails: {text.decode(errors='replace').strip() or how}")
            if kind != "readiness":
                self._start_again(each)
        self._look_at_pods()

    def _start_again(self, each: _Container) -> None:
        if program := each.declared["program"]:
            self._processes.restart((_view(each.pod), program))
        else:
            each.restarts += 1
            each.pause.lengthen()
            self.is_other_work = True
        each.runs = False
        each.forget()


def _view(pod: Mapping[str, Any]) -> Key:
    return pod["inode"], pod["view"]


def _run(
    command: list[str],
    environment: Mapping[str, str],
    network: int,
    mounts: int,
    host_name: str,
    said: int,
) -> None:
    """Turn this child into a command in the pod; what it says goes to whoever asked."""
    setns(mounts, CLONE_NEWNS)
    setns(network, CLONE_NEWNET)
    if host_name:
        unshare(CLONE_NEWUTS)
        socket.sethostname(host_name)
    os.chdir("/")
    os.dup2(said, 1)
    os.dup2(said, 2)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.closerange(3, hard)
    path = f"{os.environ.get('PATH', os.defpath)}:{SBIN}"
    try:
        os.execvpe(command[0], command, {"PATH": path, "LC_ALL": "C.UTF-8", **environment})
    except OSError as error:
        os.write(2, f"{command[0]}: {error.strerror}".encode())
        os._exit(127)


def _answer(declared: Mapping[str, Any], network: int, said: int) -> None:
    """End this child with 0 if a port takes connections, or answers 200 to 399 over HTTP."""
    setns(network, CLONE_NEWNET)
    deadline = time.monotonic() + declared["timeout_s"]
    result = 1
    try:
        address = (declared["host"], declared["port"])
        with socket.create_connection(address, declared["timeout_s"]) as connection:
            # As kubelet does: its end is awaited, for a second at most.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 1))
            if declared["kind"] == "tcp" or _is_well(declared, connection, deadline, said):
                result = 0
    except OSError as error:
        os.write(said, str(error).encode())
    os._exit(result)


def _is_well(
    declared: Mapping[str, Any], connection: socket.socket, deadline: float, said: int
) -> bool:
    if declared["tls"]:
        import ssl

        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # as kubelet does
        connection = context.wrap_socket(connection)
    host = f"[{declared['host']}]" if ":" in declared["host"] else declared["host"]
    fields = {"Host": f"{host}:{declared['port']}", "User-Agent": "kube-probe/1.37"}
    fields |= {"Accept": "*/*", "Connection": "close", **dict(declared["headers"])}
    lines = [f"GET {declared['path']} HTTP/1.1", *(f"{k}: {v}" for k, v in fields.items())]
    connection.sendall("\r\n".join((*lines, "", "")).encode())
    answer = b""
    # To the end, if that is near: what is closed with something unread is reset.
    while len(answer) < _READ:
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            data = connection.recv(4096)
        except TimeoutError:
            if b"\r\n" in answer:
                break
            raise
        if not data:
            break
        answer += data
    status = answer.split(b" ", 2)[1:2]
    code = int(status[0]) if status and status[0].isdigit() else 0
    if not 200 <= code < 400:
        os.write(said, f"HTTP status {code}".encode() if code else b"no answer over HTTP")
    return 200 <= code < 400
