"""Tests on a second kernel: those marked `vm` run in a virtual machine, unless the host has it all.

A test says `@pytest.mark.vm`, or `@pytest.mark.vm("ipip")` with the names of what it needs (those
of `netlab.kernel.features.ATTEMPTS`).  If this kernel has that, and we are root, it is an ordinary
test.  Else one virtual machine boots while the other tests run, one pytest in it runs all of them,
and what it reports is told here as if they had run here: they stand last in the order.

The process that owns the machine is the only one of the session, or with pytest-xdist the
controller; its workers ask it.  A test that ends the machine or hangs in it is an error with the
machine's console, and the others go on in a new one.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import uuid
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import pytest

from netlab.kernel import features
from netlab.problems import NetlabError
from netlab.vm import machine, programs

IN_VM = "NETLAB_TESTS_IN_VM"
FEATURES = ("ip_vs", "dummy", "netem", "ipip", "sctp")
"""What a test needs that names nothing."""

OWN = "own kernel"
"""Needed by a test that changes what holds for a whole machine: it never runs on this one."""

SILENT_S = 240.0
_NICENESS = 3  # other tests on this computer have deadlines
_KEY = b"netlab"


class Results:
    """Runs tests in virtual machines; each thread may wait for what became of one of them."""

    def __init__(self, root: Path, options: Sequence[str], tests: Sequence[str]) -> None:
        self._root = root
        self._options = options
        self._left = list(tests)
        self._told: dict[str, list[dict[str, Any]]] = {}
        self._errors: dict[str, str] = {}
        self._running: str | None = None
        self._uncollected: list[str] = []
        self._output = bytearray()
        self._line = b""
        self._changed = threading.Condition()
        self._stopped = False
        self._stop, self._stopper = os.pipe()
        threading.Thread(target=self._run, daemon=True).start()

    def stop(self) -> None:
        """End the machine; nobody may wait then."""
        self._stopped = True
        with contextlib.suppress(OSError):
            os.write(self._stopper, b"x")

    def of(self, test: str) -> tuple[list[dict[str, Any]], str | None]:
        """The reports of a test, when it has ended, and what went wrong beside it."""
        with self._changed:
            self._changed.wait_for(lambda: test not in self._left)
            return self._told.get(test, []), self._errors.get(test)

    def _run(self) -> None:
        while self._left and not self._stopped:
            before = len(self._left)
            why = self._boot()
            with self._changed:
                if self._running is not None:  # it took the machine with it
                    self._end(self._running, why)
                elif len(self._left) == before or why is None:
                    for test in list(self._left):
                        self._end(test, why or self._unmade())

    def _boot(self) -> str | None:
        """Run what is left in one machine; why it ended, if it did not go to the end."""
        self._running = None
        arguments = [*self._options, *self._left]
        job = machine.Job(
            command=[sys.executable, str(self._root / "tests" / "second_kernel_guest.py")],
            environment={**os.environ, IN_VM: "1"},
            directory=str(self._root),
            files={"pytest.json": json.dumps(arguments).encode()},
        )
        size = machine.Size(silent_seconds=SILENT_S, niceness=_NICENESS)
        hear: dict[str, machine.Hear] = {
            "data": self._hear,
            "stdout": self._output.extend,
            "stderr": self._output.extend,
        }
        try:
            machine.run(job, hear, size, self._stop)
        except machine.Ended as ended:
            return f"{ended.why}\n{self._said()}\nits console:\n{_end_of(ended.console)}"
        except NetlabError as error:
            return str(error)
        return None

    def _said(self) -> str:
        return _end_of(self._output.decode(errors="replace"))

    def _unmade(self) -> str:
        return "\n".join(["the test was not found in the virtual machine", *self._uncollected]) + (
            "" if self._uncollected else f"\n{self._said()}"
        )

    def _hear(self, data: bytes) -> None:
        *lines, self._line = (self._line + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            with self._changed:
                if "start" in message:
                    self._running = message["start"]
                elif "uncollected" in message:
                    self._uncollected.append(message["uncollected"])
                else:
                    report = message["report"]
                    self._told.setdefault(report["nodeid"], []).append(report)
                    if report["when"] == "teardown":
                        self._end(report["nodeid"])

    def _end(self, test: str, error: str | None = None) -> None:
        if test in self._left:
            self._left.remove(test)
        if error is not None:
            self._errors[test] = error
        self._running = None
        self._changed.notify_all()


def _end_of(text: str) -> str:
    return "\n".join(text.rstrip().splitlines()[-40:])


class Owner:
    """The process that has the machine: it answers others who listen to `address`."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._results: Results | None = None
        self._first = threading.Lock()
        # Abstract: nothing of it is left by a process that is killed.
        self.address = f"\0netlab-tests-{uuid.uuid4()}"

    def start(self, tests: Sequence[str]) -> None:
        """Run these, unless they run already: every worker has the same."""
        with self._first:
            if self._results is None and tests:
                self._results = Results(self._config.rootpath, _options(self._config), tests)

    def of(self, test: str) -> tuple[list[dict[str, Any]], str | None]:
        assert self._results is not None
        return self._results.of(test)

    def stop(self) -> None:
        if self._results is not None:
            self._results.stop()

    def serve(self) -> None:
        """Answer workers, in threads of their own."""
        listener = Listener(self.address, "AF_UNIX", authkey=_KEY)

        def accept() -> None:
            while True:
                connection = listener.accept()
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()

    def _answer(self, connection: Connection) -> None:
        with contextlib.suppress(EOFError, OSError), connection:
            self.start(connection.recv())
            while True:
                connection.send(self.of(connection.recv()))


class Worker:
    """A process of pytest-xdist that asks the owner."""

    def __init__(self, address: str) -> None:
        self._connection = Client(address, "AF_UNIX", authkey=_KEY)

    def start(self, tests: Sequence[str]) -> None:
        self._connection.send(list(tests))

    def of(self, test: str) -> tuple[list[dict[str, Any]], str | None]:
        self._connection.send(test)
        answer: tuple[list[dict[str, Any]], str | None] = self._connection.recv()
        return answer

    def stop(self) -> None:
        self._connection.close()


class SecondKernel:
    """The plugin."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._tests: set[str] = set()
        given = getattr(config, "workerinput", None)
        self._results: Owner | Worker
        if given is not None:
            self._results = Worker(given["second_kernel"])
        else:
            self._results = Owner(config)
            if config.getoption("dist", "no") != "no":
                self._results.serve()

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Tell a worker of pytest-xdist where to ask."""
        assert isinstance(self._results, Owner)
        node.workerinput["second_kernel"] = self._results.address

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        here = _Here()
        every = self._config.getoption("--in-vm")
        elsewhere = [
            item
            for item in items
            if (every and item.get_closest_marker("kernel"))
            or ((mark := item.get_closest_marker("vm")) and (every or not here.has(mark)))
        ]
        if elsewhere and not os.environ.get("CI"):
            try:
                programs.require()
            except NetlabError as error:
                reason = "; ".join(problem.message for problem in error.problems)
                for item in elsewhere:
                    item.add_marker(pytest.mark.skip(reason=f"{reason} (an error if CI is set)"))
                return
        self._tests = {item.nodeid for item in elsewhere}
        items.sort(key=lambda item: item.nodeid in self._tests)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if not self._config.getoption("collectonly"):
            tests = [item.nodeid for item in session.items if item.nodeid in self._tests]
            self._results.start(tests)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        if item.nodeid not in self._tests:
            return None
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self._reports(item):
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def _reports(self, item: pytest.Item) -> Iterator[pytest.TestReport]:
        reports, error = self._results.of(item.nodeid)
        for plain in reports:
            # JSON has no tuples, and who prints where a test was skipped insists on one.
            if plain["outcome"] == "skipped" and isinstance(plain["longrepr"], list):
                plain = {**plain, "longrepr": tuple(plain["longrepr"])}
            plain = {**plain, "location": item.location}
            yield self._config.hook.pytest_report_from_serializable(config=self._config, data=plain)
        if error is not None:
            yield pytest.TestReport(
                nodeid=item.nodeid,
                location=item.location,
                keywords={},
                outcome="failed",
                longrepr=error,
                when="teardown" if reports else "setup",
            )

    def pytest_sessionfinish(self) -> None:
        self._results.stop()


class _Here:
    """What this kernel has, asked for once."""

    def __init__(self) -> None:
        self._known: dict[str, bool] = {}

    def has(self, mark: pytest.Mark) -> bool:
        if os.geteuid() != 0:
            return False
        names = mark.args or FEATURES
        if OWN in names:
            return False
        unknown = [name for name in names if name not in features.ATTEMPTS]
        if unknown:
            raise pytest.UsageError(f"@pytest.mark.vm: there is no feature {', '.join(unknown)}")
        new = [name for name in names if name not in self._known]
        self._known |= {name: bool(tried.ok) for name, tried in features.attempt(new).items()}
        return all(self._known[name] for name in names)


def _options(config: pytest.Config) -> list[str]:
    """Options of the pytest in the machine: how it tells is decided here."""
    tell = config.option
    return [
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        f"--rootdir={config.rootpath}",
        f"--tb={tell.tbstyle}",
        *(["--showlocals"] if tell.showlocals else []),
        *(["-" + "v" * tell.verbose] if tell.verbose > 0 else []),
        f"--override-ini=faulthandler_timeout={SILENT_S / 2:g}",
    ]


def add_options(parser: pytest.Parser) -> None:
    """The option of ours."""
    parser.addoption(
        "--in-vm",
        action="store_true",
        help="run every test that is marked `kernel` or `vm` in the virtual machine",
    )


def register(config: pytest.Config) -> None:
    """Take part in a session, unless this is the one in the machine."""
    if IN_VM not in os.environ:
        config.pluginmanager.register(SecondKernel(config))
