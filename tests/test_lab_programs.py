"""Programs that a lab's init runs: in their namespaces, with files of their own, and again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab_processes import LabProcesses, eventually, lab_processes
from labs import small_lab
from netlab.datapath.state import File, Process, View
from netlab.lab import control, lifecycle, ready
from netlab.lab.enter import run
from netlab.topology.model import Lab

pytestmark = pytest.mark.kernel

# It listens where it is told to, and says in a file of its /run what it sees.
SERVER = """
import os, signal, socket, sys
path, port = sys.argv[1:]
def tell(*_):
    with open("/run/server/said", "w") as said:
        said.write(open(path).read())
signal.signal(signal.SIGHUP, tell)
tell()
with socket.create_server(("127.0.0.1", int(port))):
    while True:
        signal.pause()
"""


@pytest.fixture
def lab() -> Iterator[LabProcesses]:
    with lab_processes(LabProcesses) as made:
        yield made


def server(namespace: str, text: str = "one", **options: object) -> Process:
    """A program that shows what it can see."""
    path = str(options.pop("path", "/run/server/conf"))
    return Process(
        name="server",
        namespace=namespace,
        command=(sys.executable, "-I", "-S", "-c", SERVER, path, "8080"),
        package="python3",
        files=(File(path=path, text=text, owner="nobody"),),
        directories=(("/run/server", "nobody"),),
        listens=(("TCP", 8080),),
        **options,  # type: ignore[arg-type]
    )


def view(namespace: str, *files: File) -> View:
    """What is seen there."""
    return View(name=namespace, namespace=namespace, host_name="there", files=files)


def said(init: control.Init, namespace: str, path: str = "/run/server/said") -> str:
    """A file as a command inside sees it."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(writer, 1)
        os._exit(run(init, view(namespace), ["cat", path], os.environ))
    os.close(writer)
    with os.fdopen(reader) as opened:
        text = opened.read()
    os.waitpid(pid, 0)
    return text


def pid_of(init: control.Init, namespace: str) -> int:
    """The server of a namespace, in our PID namespace."""
    inode = os.stat(f"/run/netns/{namespace}").st_ino
    return next(each.pid for each in init.status().processes if _is_in(each.pid, inode))


def _is_in(pid: int, inode: int) -> bool:
    try:
        return os.stat(f"/proc/{pid}/ns/net").st_ino == inode
    except FileNotFoundError:  # it ended since it was listed
        return False


def test_two_of_one_kind_have_the_same_paths_and_not_the_same_files(lab: LabProcesses) -> None:
    first, second = lab.namespace("a"), lab.namespace("b")
    init = lab.start()
    programs = [server(first, "one"), server(second, "two")]
    init.serve([], programs)
    assert ready.await_ready(programs) == ()
    assert said(init, first) == "one"
    assert said(init, second) == "two"
    assert not Path("/run/server").exists()
    assert said(init, first, "/run/netns") == ""


def test_a_file_of_the_machine_is_covered_for_them_alone(lab: LabProcesses) -> None:
    name = lab.namespace("a")
    init = lab.start()
    before = Path("/etc/hosts").read_text()
    program = server(name, "192.0.2.1 other\n", path="/etc/hosts")
    init.serve([], [program])
    assert ready.await_ready([program]) == ()
    assert said(init, name, "/etc/hosts") == "192.0.2.1 other\n"
    assert Path("/etc/hosts").read_text() == before


def test_one_that_stays_as_declared_is_left_alone(lab: LabProcesses) -> None:
    name = lab.namespace("a")
    init = lab.start()
    init.serve([], [server(name)])
    ready.await_ready([server(name)])
    before = pid_of(init, name)
    init.serve([], [server(name)])
    assert pid_of(init, name) == before


def test_other_files_are_read_again_by_one_that_can(lab: LabProcesses) -> None:
    name = lab.namespace("a")
    init = lab.start()
    init.serve([], [server(name, "one", reload="SIGHUP")])
    ready.await_ready([server(name)])
    before = pid_of(init, name)
    init.serve([], [server(name, "two", reload="SIGHUP")])
    eventually(lambda: said(init, name) == "two")
    assert pid_of(init, name) == before


def test_other_files_start_one_anew_that_cannot(lab: LabProcesses) -> None:
    name = lab.namespace("a")
    init = lab.start()
    init.serve([], [server(name, "one")])
    ready.await_ready([server(name)])
    before = pid_of(init, name)
    init.serve([], [server(name, "two")])
    assert ready.await_ready([server(name)]) == ()
    assert said(init, name) == "two"
    assert pid_of(init, name) != before


def test_one_that_is_killed_is_started_again_and_counted(lab: LabProcesses) -> None:
    name = lab.namespace("a")
    init = lab.start()
    program = server(name)
    init.serve([], [program])
    ready.await_ready([program])
    os.kill(pid_of(init, name), signal.SIGKILL)
    eventually(lambda: init.status().programs[0].restarts == 1)
    assert ready.await_ready([program]) == ()
    (found,) = init.status().programs
    assert (found.running, found.ended) == (True, -signal.SIGKILL)


def test_one_that_does_not_live_waits_longer_each_time(lab: LabProcesses) -> None:
    name = lab.namespace("a")
    init = lab.start()
    program = Process(name="false", namespace=name, command=("false",), package="coreutils")
    init.serve([], [program])
    eventually(lambda: init.status().programs[0].restarts >= 2)
    pauses = []
    eventually(lambda: pauses.append(init.status().programs[0].starts_in_s or 0) or max(pauses) > 1)
    (found,) = init.status().programs
    assert found.ended == 1
    assert "false of" in str(found)


def test_one_that_is_not_there_is_told_in_the_log_and_ends_nobody(lab: LabProcesses) -> None:
    name = lab.namespace("a")
    init = lab.start()
    absent = Process(name="absent", namespace=name, command=("netlab-no-such",), package="none")
    init.serve([], [absent, server(name)])
    assert ready.await_ready([server(name)]) == ()
    states = {each.name: each.running for each in init.status().programs}
    assert states["server"]


def test_those_that_are_not_declared_any_more_end(lab: LabProcesses) -> None:
    name = lab.namespace("a")
    init = lab.start()
    init.serve([], [server(name)])
    ready.await_ready([server(name)])
    pid = pid_of(init, name)
    init.serve([], [])
    assert not Path(f"/proc/{pid}").exists()
    assert init.status().programs == ()
    assert ready.lacking([server(name)])[0].what == ("TCP port 8080",)


# --- a routing daemon in a lab -------------------------------------------------------------------


def _bird(name: str, node: str) -> int:
    init = control.connect(name)
    assert init is not None
    return pid_of(init, f"{name}:{node}")


def test_a_routing_daemon_that_dies_comes_back_with_its_routes(
    up: Callable[[Lab], lifecycle.Outcome],
) -> None:
    lab = small_lab(overlay="bgp")
    assert up(lab).unready == ()
    os.kill(_bird(lab.name, "n1"), signal.SIGKILL)
    init = control.connect(lab.name)
    assert init is not None
    eventually(lambda: init.status().programs[0].restarts == 1)
    eventually(lambda: lifecycle.lacking(lab) == ())
    assert up(lab).changes == ()


def test_a_new_pod_in_a_new_block_is_announced_by_the_daemon_that_runs(
    up: Callable[[Lab], lifecycle.Outcome],
) -> None:
    from msgspec.structs import replace

    lab = small_lab(overlay="bgp")
    up(lab)
    before = _bird(lab.name, "n1")
    pod = replace(lab.pods[0], name="p9", address="10.244.1.77")
    more = replace(lab, pods=(*lab.pods, pod))
    assert up(more).unready == ()
    assert _bird(lab.name, "n1") == before
    routes = subprocess.run(
        ["ip", "-n", f"{lab.name}:n2", "route", "show", "proto", "bird"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert "10.244.1.64/26 via 172.21.32.11" in routes


def test_a_lab_goes_down_while_its_daemon_cannot_run(
    up: Callable[[Lab], lifecycle.Outcome],
) -> None:
    lab = small_lab(overlay="bgp")
    up(lab)
    for node in ("n1", "n2"):
        os.kill(_bird(lab.name, node), signal.SIGKILL)
    assert lifecycle.down(lab.name) > 0
    assert control.connect(lab.name) is None
