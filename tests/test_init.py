"""A lab's process 1: found without files, survives its starter, takes everything with it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from lab_processes import LabProcesses, eventually, lab_processes, process, wait_for_end
from netlab.datapath.state import Server
from netlab.kernel import namespaces
from netlab.lab import control
from netlab.problems import NetlabError

pytestmark = pytest.mark.kernel


@pytest.fixture
def lab() -> Iterator[LabProcesses]:
    with lab_processes(LabProcesses) as made:
        yield made


def test_runs_in_namespaces_of_its_own_without_a_terminal(lab: LabProcesses) -> None:
    init = lab.start()
    for namespace in ("pid", "mnt"):
        theirs = os.readlink(f"/proc/{init.pid}/ns/{namespace}")
        assert theirs != os.readlink(f"/proc/self/ns/{namespace}")
    assert os.readlink(f"/proc/{init.pid}/ns/net") == os.readlink("/proc/self/ns/net")
    assert os.getsid(init.pid) != os.getsid(0)
    assert os.readlink(f"/proc/{init.pid}/fd/0") == "/dev/null"
    assert os.readlink(f"/proc/{init.pid}/cwd") == "/"


def test_holds_nothing_open_that_its_starter_had(lab: LabProcesses) -> None:
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    init = lab.start()
    assert init.pid > 0
    os.close(writer)
    assert os.read(reader, 1) == b""
    os.close(reader)


def test_start_when_it_runs_gives_the_one_that_runs(lab: LabProcesses) -> None:
    first, second = lab.start(), lab.start()
    assert first.pid == second.pid


def test_many_starts_at_once_give_one(lab: LabProcesses) -> None:
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(lab.start().pid)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 5
    assert len(set(found)) == 1


def test_connect_finds_none_before_and_after(lab: LabProcesses) -> None:
    assert control.connect(lab.name) is None
    lab.start().shutdown()
    assert control.connect(lab.name) is None


def test_two_labs_do_not_meet(lab: LabProcesses) -> None:
    with lab_processes(LabProcesses) as other:
        one, two = lab.start(), other.start()
        one.declare(b"one")
        two.declare(b"two")
        assert {lab.name, other.name} <= set(control.running())
        one.shutdown()
        assert two.declared() == b"two"
        assert other.name in control.running()
        assert lab.name not in control.running()


def test_keeps_what_was_declared(lab: LabProcesses) -> None:
    init = lab.start()
    assert init.declared() is None
    data = os.urandom(3_000_000)
    init.declare(data)
    again = control.connect(lab.name)
    assert again is not None
    assert again.declared() == data
    init.declare(b"")
    assert init.declared() == b""


def test_a_lab_name_may_be_longer_than_a_socket_name(lab: LabProcesses) -> None:
    lab.name = lab.name * 20
    lab.start().declare(b"long")
    found = control.connect(lab.name)
    assert found is not None
    assert found.declared() == b"long"
    assert lab.name in control.running()


def test_killing_it_ends_the_workload(lab: LabProcesses) -> None:
    init = lab.start()
    workload = os.pidfd_open(process(init, "netlab-workload"))
    os.kill(init.pid, signal.SIGKILL)
    assert init.wait(20)
    wait_for_end(0, workload)
    os.close(workload)
    assert control.connect(lab.name) is None
    with pytest.raises(control.LabNotRunning):
        init.declared()
    assert lab.start().declared() is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ends_in_order_when_it_is_told_so_by_a_signal(
    lab: LabProcesses, number: signal.Signals
) -> None:
    init = lab.start()
    process(init, "netlab-workload")
    os.kill(init.pid, number)
    assert init.wait(20)


def test_hangups_do_not_end_it(lab: LabProcesses) -> None:
    init = lab.start()
    os.kill(init.pid, signal.SIGHUP)
    init.declare(b"still here")
    assert init.declared() == b"still here"


def test_one_that_is_stopped_is_found_and_ended(
    lab: LabProcesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = lab.start().pid
    os.kill(pid, signal.SIGSTOP)
    monkeypatch.setattr(control, "_HELLO_S", 0.1)
    init = control.connect(lab.name)
    assert init is not None
    assert init.pid == pid
    init.shutdown(timeout=0.1)
    assert control.connect(lab.name) is None


def test_restarts_a_workload_that_died_with_all_its_sockets(lab: LabProcesses) -> None:
    name = lab.namespace("a")
    init = lab.start()
    server = Server(namespace=name, identity="demo/a", node="n", listen=(("TCP", 80), ("UDP", 53)))
    assert init.serve([server]) == ()
    first = process(init, "netlab-workload")
    os.kill(first, signal.SIGKILL)
    eventually(lambda: init.status().restarts == 1 and process(init, "netlab-workload") != first)
    with namespaces.entered(name), socket.socket() as client:
        client.settimeout(20)
        eventually(lambda: client.connect_ex(("127.0.0.1", 80)) == 0)
        client.sendall(b"hello\n")
        assert client.recv(100).startswith(b"a\n")


def test_serves_at_once_when_the_workload_has_just_died(lab: LabProcesses) -> None:
    server = Server(namespace=lab.namespace("a"), identity="a", node="n", listen=(("TCP", 80),))
    init = lab.start()
    os.kill(process(init, "netlab-workload"), signal.SIGKILL)
    assert init.serve([server]) == ()
    assert init.status().sockets == 1


def test_reaps_orphans(lab: LabProcesses) -> None:
    init = lab.start()
    code = (
        "import os, sys; from netlab.lab import control, enter; "
        "from netlab.datapath.state import View; "
        "init = control.connect(sys.argv[1]); name = sys.argv[2]; "
        "view = View(name=name, namespace=name, host_name='x'); "
        "enter.run(init, view, ['sh', '-c', 'sleep 0.01 &'], os.environ)"
    )
    lab.python(code, lab.namespace("a")).communicate(timeout=20)
    eventually(lambda: "sleep" not in [p.name for p in init.status().processes])


# Its starter dies at different moments.


def test_starter_killed_before_it_spawns_leaves_nothing(lab: LabProcesses) -> None:
    starter = lab.python(
        "import os, sys; from netlab.lab import control; "
        "os.posix_spawn = lambda *a, **k: os.kill(os.getpid(), 9); control.start(sys.argv[1])"
    )
    starter.communicate(timeout=20)
    assert starter.returncode == -signal.SIGKILL
    assert control.connect(lab.name) is None


@pytest.mark.parametrize("after", ["pass", "init.pid", "init.declare(b'x')"])
def test_starter_killed_after_it_spawns_leaves_an_init_that_is_found(
    lab: LabProcesses, after: str
) -> None:
    starter = lab.python(
        "import os, sys; from netlab.lab import control; "
        f"init = control.start(sys.argv[1]); {after}; os.kill(os.getpid(), 9)"
    )
    starter.communicate(timeout=20)
    assert starter.returncode == -signal.SIGKILL
    init = control.connect(lab.name)
    assert init is not None
    assert init.declared() == (b"x" if "declare" in after else None)
    init.shutdown()
    assert control.connect(lab.name) is None


def test_client_that_ends_within_a_request_disturbs_nobody(lab: LabProcesses) -> None:
    init = lab.start()
    init.declare(b"before")
    for said in (b"\0\0", b"\0\0\0\x09\0\0\0\0\0\0\0\0{", b"\0\0\0\x02\0\0\0\0\0\0\0\0{}"):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(f"\0netlab:{lab.name}")
            client.sendall(said)
    assert init.declared() == b"before"


def test_users_other_than_root_are_not_served(lab: LabProcesses) -> None:
    init = lab.start()
    init.declare(b"root's")
    other = subprocess.run(
        [
            sys.executable,
            "-c",
            "import socket, os, sys; os.setuid(65534); s = socket.socket(socket.AF_UNIX);"
            "s.connect('\\0netlab:' + sys.argv[1]);"
            "s.sendall(b'\\0\\0\\0\\x12\\0\\0\\0\\0\\0\\0\\0\\0' + b'{\"do\": \"declared\"}');"
            "print(s.recv(100))",
            lab.name,
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
    )
    assert "root's" not in other.stdout
    assert "{" not in other.stdout


def test_a_socket_of_another_user_is_no_init(lab: LabProcesses) -> None:
    squatter = lab.python(
        "import socket, os, sys; os.setuid(65534); s = socket.socket(socket.AF_UNIX);"
        "s.bind('\\0netlab:' + sys.argv[1]); s.listen(); print('ready', flush=True);"
        "sys.stdin.read()"
    )
    assert squatter.stdout is not None
    assert squatter.stdout.readline() == "ready\n"
    with pytest.raises(NetlabError) as raised:
        lab.start()
    assert raised.value.problems[0].code == "not-permitted"
    assert lab.name not in control.running()
    squatter.communicate("", timeout=20)


def test_says_why_it_did_not_start(lab: LabProcesses) -> None:
    starter = lab.python(
        "import ctypes, os, sys; from netlab.lab import control\n"
        "from netlab.problems import NetlabError\n"
        # Without CAP_SYS_ADMIN (21) in the bounding set, no exec gets it back.
        "libc = ctypes.CDLL(None); assert libc.prctl(24, 21, 0, 0, 0) == 0\n"
        "try: control.start(sys.argv[1]).pid\n"
        "except NetlabError as error: print(error)"
    )
    out, _ = starter.communicate(timeout=20)
    assert "error[init-failed]" in out
    assert "Operation not permitted" in out
    assert control.connect(lab.name) is None


# It never holds what the host lets go.


def _mounted_in(init: control.Init, name: str) -> bool:
    with open(f"/proc/{init.pid}/mountinfo") as mountinfo:
        return any(f"/{name} " in line for line in mountinfo)


def test_namespaces_that_come_and_go_are_not_held(lab: LabProcesses) -> None:
    before = lab.namespace("before")
    init = lab.start()
    after = lab.namespace("after")
    assert init.pid > 0
    for name in (before, after):
        namespaces.remove(name)
        assert not _mounted_in(init, name)


def test_namespaces_mounted_privately_are_not_held(lab: LabProcesses) -> None:
    """As on a machine where nobody has made /run/netns a shared mount."""
    code = """
import os, sys
from netlab.kernel import namespaces, syscalls
from netlab.lab import control
from netlab.datapath.state import Server
lab = sys.argv[1]
syscalls.unshare(syscalls.CLONE_NEWNS)
syscalls.mount("none", "/", None, syscalls.MS_REC | syscalls.MS_SLAVE)
syscalls.mount("none", "/run", "tmpfs", 0)
os.mkdir("/run/netns")
home = namespaces.open_current()
for name in ("a", "b"):
    namespaces.make(f"{lab}:{name}", lab, ())
syscalls.setns(home, syscalls.CLONE_NEWNET)
init = control.start(lab)
init.pid
namespaces.make(f"{lab}:later", lab, ())
syscalls.setns(home, syscalls.CLONE_NEWNET)
servers = [
    Server(namespace=f"{lab}:{name}", identity=name, node="n", listen=(("TCP", 80),))
    for name in ("a", "b", "later")
]
print(init.serve(servers), init.status().sockets)
print([line for line in open("/proc/self/mountinfo") if f"{lab}:a" in line and "shared" in line])
print([line for line in open(f"/proc/{init.pid}/mountinfo") if lab in line])
init.shutdown()
"""
    out, errors = lab.python(code).communicate(timeout=20)
    assert out == "() 3\n[]\n[]\n", errors


def test_has_a_proc_of_its_own_processes(lab: LabProcesses) -> None:
    init = lab.start()
    entries = os.listdir(f"/proc/{init.pid}/root/proc")
    assert "1" in entries
    assert str(init.pid) not in entries or init.pid < 10
