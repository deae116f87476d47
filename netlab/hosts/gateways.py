"""Gateways to machines: opened all at once, asked all at once, and nothing waits for ever.

execnet sends the little that it needs over the pipe; netlab itself has to be there, in the same
version.  Each machine has one Python process of ours for as long as its gateway is open.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

import execnet
from execnet.gateway_base import get_execmodel
from execnet.gateway_bootstrap import bootstrap
from execnet.gateway_io import Popen2IOMaster, popen_args, ssh_args, vagrant_ssh_args

from netlab.hosts.hosts_file import Machine, Machines
from netlab.hosts.identity import identity
from netlab.problems import Exit, NetlabError, Problem

R = TypeVar("R")

CONNECT_S = 10.0
ANSWER_S = 120.0
_LEAVE_S = 2.0
# A machine that went away is known to be gone after so long.
_SSH = "-o BatchMode=yes -o ConnectTimeout=8 -o ServerAliveInterval=3 -o ServerAliveCountMax=2"
_OLDEST = (3, 11)

# Runs before anything of netlab is imported there: an older Python could not read it.
_HELLO = """
import os, sys
answer = {"python": tuple(sys.version_info[:3]), "program": sys.executable, "uid": os.geteuid()}
if sys.version_info >= (3, 11):
    try:
        from netlab.hosts.identity import identity
        answer["netlab"] = identity()
    except ImportError as error:
        answer["missing"] = str(error)
channel.send(answer)
"""
_SERVE = "from netlab.hosts.agent import serve; serve(channel)"


class _Pipes(Popen2IOMaster):
    """The process that leads to a machine; what it complains of is kept."""

    def __init__(self, command: Sequence[str]) -> None:
        self.complaints = open(os.memfd_create("netlab-gateway"), "w+b")  # noqa: SIM115
        self.popen = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.complaints,
            start_new_session=True,  # Ctrl-C is ours alone
        )
        execmodel = get_execmodel("thread")
        super(Popen2IOMaster, self).__init__(self.popen.stdin, self.popen.stdout, execmodel)

    def kill(self) -> None:
        """End it, and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)

    def said(self) -> str:
        """The last line of its complaints."""
        self.complaints.seek(0)
        lines = self.complaints.read().decode(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else ""

    def everything(self) -> str:
        """All of them."""
        self.complaints.seek(0)
        return self.complaints.read().decode(errors="replace")


class Gateway:
    """One machine that answers."""

    def __init__(self, node: str, machine: Machine) -> None:
        self.node = node
        self.machine = machine
        self._pipes: _Pipes | None = None
        self._channel: Any = None
        self._lock = threading.Lock()

    def open(self, timeout_s: float) -> None:
        """Connect, check what is there, start the agent.  NetlabError (exit 3) if that fails."""
        end = time.monotonic() + timeout_s
        spec = execnet.XSpec(self.machine.gateway)
        spec.id, spec.execmodel = self.node, "main_thread_only"
        try:
            pipes = self._pipes = _Pipes(_command(spec))
        except OSError as error:
            text = f"{error.filename}: {error.strerror}"
            raise NetlabError(
                self._named(Problem("host-unreachable", text)), Exit.MACHINE
            ) from None
        killer = threading.Timer(timeout_s, pipes.kill)
        killer.daemon = True
        killer.start()
        try:
            try:
                gateway = bootstrap(pipes, spec)
            except (EOFError, OSError, AssertionError, execnet.HostNotFound):
                raise self._unreachable(timed_out=time.monotonic() >= end) from None
            # (also where the program has ended with a status that execnet does not heed)
            self._greet(gateway, end)
        except BaseException:
            self.close()
            raise
        finally:
            killer.cancel()

    def _greet(self, gateway: execnet.Gateway, end: float) -> None:
        try:
            channel = gateway.remote_exec(_HELLO)
            found = channel.receive(timeout=max(0.1, end - time.monotonic()))
        except execnet.TimeoutError:
            raise self._unreachable(timed_out=True) from None
        except (EOFError, OSError, execnet.RemoteError):
            raise self._unreachable(timed_out=time.monotonic() >= end) from None
        problem = _unfit(found)
        if problem:
            raise NetlabError(self._named(problem), Exit.MACHINE)
        self._channel = gateway.remote_exec(_SERVE)

    def ask(self, do: str, data: bytes = b"", timeout_s: float = ANSWER_S) -> bytes:
        """One request, and its answer.  NetlabError if the machine says so, or says nothing."""
        with self._lock:
            try:
                self._channel.send({"do": do, "data": data})
                answer = self._channel.receive(timeout=timeout_s)
            except self._channel.TimeoutError:
                text = f"no answer to `{do}` within {timeout_s:g} s"
                raise NetlabError(self._named(Problem("host-silent", text)), Exit.MACHINE) from None
            except (EOFError, OSError, self._channel.RemoteError):
                raise self._gone() from None
        if "problems" in answer:
            problems = [self._named(Problem(*each)) for each in map(_problem, answer["problems"])]
            raise NetlabError(problems, Exit(answer["exit"]))
        data = answer["data"]
        assert isinstance(data, bytes)
        return data

    def close(self) -> None:
        """End the process there and the way to it."""
        if self._pipes is not None:
            with contextlib.suppress(OSError, ValueError):
                self._pipes.close_write()  # at the end of its input the process there ends
            try:
                self._pipes.popen.wait(_LEAVE_S)
            except subprocess.TimeoutExpired:
                self._pipes.kill()
                self._pipes.popen.wait()
            self._pipes.complaints.close()
            self._pipes = None

    def _named(self, problem: Problem) -> Problem:
        message = f"{self.node}: {problem.message}"
        return Problem(problem.code, message, problem.place, problem.hint)

    def _gone(self) -> NetlabError:
        said = self._pipes.said() if self._pipes else ""
        text = f"the machine is gone{': ' if said else ''}{said}"
        return NetlabError(
            self._named(Problem("host-gone", text, hint="`netlab up` again heals what is left")),
            Exit.MACHINE,
        )

    def _unreachable(self, timed_out: bool) -> NetlabError:
        text = self._pipes.everything() if self._pipes else ""
        code, why, hint = _reason(text, timed_out)
        problem = Problem(code, f"{self.machine.gateway}: {why}", hint=hint)
        return NetlabError(self._named(problem), Exit.MACHINE)


class Gateways:
    """Gateways to all machines of a lab, from `with` to the end of its body."""

    def __init__(self, machines: Machines, timeout_s: float = CONNECT_S) -> None:
        self._machines = machines
        self._timeout_s = timeout_s
        self.open: dict[str, Gateway] = {}
        self.failed: dict[str, NetlabError] = {}

    def __enter__(self) -> Gateways:
        def connect(node: str) -> Gateway:
            gateway = Gateway(node, self._machines[node])
            gateway.open(self._timeout_s)
            return gateway

        self.open, self.failed = at_once(connect, self._machines)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        at_once(lambda node: self.open[node].close(), self.open)

    def require_all(self) -> None:
        """Raise what went wrong on any machine, all of it."""
        raise_all(self.failed)

    def ask(
        self,
        do: str,
        data: Callable[[str], bytes] | bytes = b"",
        nodes: Sequence[str] | None = None,
        timeout_s: float = ANSWER_S,
    ) -> tuple[dict[str, bytes], dict[str, NetlabError]]:
        """One request to all machines that are open, or to some: answers, and errors."""
        wanted = [node for node in (self.open if nodes is None else nodes) if node in self.open]

        def one(node: str) -> bytes:
            return self.open[node].ask(do, data(node) if callable(data) else data, timeout_s)

        return at_once(one, wanted)

    def ask_all(self, do: str, data: Callable[[str], bytes] | bytes = b"") -> dict[str, bytes]:
        """The same, where every one has to answer.  NetlabError with all errors."""
        answers, errors = self.ask(do, data)
        raise_all(errors)
        return answers


def at_once(
    work: Callable[[str], R], nodes: Mapping[str, object] | Sequence[str]
) -> tuple[dict[str, R], dict[str, NetlabError]]:
    """Work for each of several machines, all at once: results, and what failed."""
    results: dict[str, R] = {}
    errors: dict[str, NetlabError] = {}
    unexpected: list[BaseException] = []

    def one(node: str) -> None:
        try:
            results[node] = work(node)
        except NetlabError as error:
            errors[node] = error
        except BaseException as error:  # raised by the thread that waits
            unexpected.append(error)

    threads = [threading.Thread(target=one, args=(node,), daemon=True) for node in nodes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in unexpected:
        raise error
    order = list(nodes)
    return {node: results[node] for node in order if node in results}, errors


def raise_all(errors: Mapping[str, NetlabError]) -> None:
    """Raise all errors as one, if there are any."""
    if errors:
        problems = [problem for error in errors.values() for problem in error.problems]
        raise NetlabError(problems, next(iter(errors.values())).exit_code)


def _command(spec: execnet.XSpec) -> list[str]:
    if spec.popen:
        return popen_args(spec)
    if not spec.python:
        spec.python = "python3"
    if spec.vagrant_ssh:
        return vagrant_ssh_args(spec)
    command = ssh_args(spec)
    return [command[0], *_SSH.split(), *command[1:]]


def way_in(machine: Machine, command: Sequence[str], terminal: bool) -> list[str]:
    """A command line that runs netlab's `command` on a machine, with its streams."""
    import shlex

    spec = execnet.XSpec(machine.gateway)
    if spec.popen:
        return [*popen_args(spec)[:-3], "-m", "netlab.hosts.here", *command]
    python = spec.python or "python3"
    there = f"{python} -m netlab.hosts.here {shlex.join(command)}"
    options = [*(["-t"] if terminal else ["-T"]), *_SSH.split()]
    if spec.vagrant_ssh:
        return ["vagrant", "ssh", str(spec.vagrant_ssh), "--", *options, there]
    config = ["-F", str(spec.ssh_config)] if spec.ssh_config else []
    return ["ssh", *options, *config, *str(spec.ssh).split(), there]


def _problem(entry: Sequence[Any]) -> tuple[str, str, None, str | None]:
    code, message, hint = entry
    return code, message, None, hint


def _unfit(found: Mapping[str, Any]) -> Problem | None:
    """Why a machine's Python will not do."""
    version = ".".join(map(str, found["python"]))
    program = found["program"]
    if tuple(found["python"]) < _OLDEST:
        needed = ".".join(map(str, _OLDEST))
        hint = "`//python=` in its gateway names another one"
        text = f"{program} is Python {version}, and netlab needs {needed}"
        return Problem("old-python", text, hint=hint)
    if "missing" in found:
        hint = "install it there with bootstrap.sh, and name its Python: `//python=...`"
        return Problem("no-netlab", f"{program} has no netlab: {found['missing']}", hint=hint)
    if found["netlab"] != identity():
        text = f"netlab there is {found['netlab']}, and here {identity()}"
        return Problem("other-version", text, hint="install the same on both")
    if found["uid"] != 0:
        text = f"the user there is not root (uid {found['uid']})"
        return Problem("not-root", text, hint="`//python=sudo /path/to/python`, or log in as root")
    return None


def _reason(text: str, timed_out: bool) -> tuple[str, str, str | None]:
    """What ssh or the shell there complained of, as a problem: its code, the words, a hint."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    for phrase, code, hint in _COMPLAINTS:
        if phrase in text:
            line = next((line for line in lines if phrase in line), last)
            return code, line.strip("@ "), hint
    if timed_out:
        return "host-silent", "no answer in time", "is it up, and is that its address?"
    return "host-unreachable", last or "the way there ended without a word", None


_COMPLAINTS = (
    (
        "REMOTE HOST IDENTIFICATION HAS CHANGED",
        "host-key-changed",
        "if the machine was made anew: `ssh-keygen -R HOST`; if not, it is another one",
    ),
    (
        "Host key verification failed",
        "host-key-unknown",
        "log in once with ssh by hand, and compare its key",
    ),
    # ("user@host: Permission denied (publickey)." is ssh's; the shell there has nothing behind it)
    ("Permission denied (", "wrong-key", "a key that the machine lets in, without a passphrase"),
    ("Permission denied", "no-python", "`//python=` in its gateway names a program to be run"),
    ("Connection refused", "host-unreachable", "is sshd running there?"),
    ("Could not resolve hostname", "host-unreachable", None),
    ("No route to host", "host-unreachable", None),
    ("Connection timed out", "host-silent", "is it up, and is that its address?"),
    ("not found", "no-python", "`//python=` in its gateway names the Python that has netlab"),
    ("No such file", "no-python", "`//python=` in its gateway names the Python that has netlab"),
    ("SyntaxError", "old-python", "`//python=` in its gateway names another one"),
)


@contextlib.contextmanager
def connected(machines: Machines, timeout_s: float = CONNECT_S) -> Iterator[Gateways]:
    """Gateways to all of these machines; NetlabError (exit 3) if one cannot be reached."""
    with Gateways(machines, timeout_s) as gateways:
        gateways.require_all()
        yield gateways
