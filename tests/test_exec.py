"""Commands inside a lab: where they run, how they end, and who may disturb them."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab_processes import PATIENCE_S, LabProcesses, eventually, lab_processes, wait_for_end
from netlab.datapath.state import namespace_name
from netlab.lab import control, record
from netlab.topology.model import Lab, Node, Pod, Underlay

pytestmark = pytest.mark.kernel

NETLAB = "from netlab.cli.main import main; main()"


class LabWithPods(LabProcesses):
    """Two pods and a node, recorded as `up` does, with an init but without links."""

    def make(self) -> None:
        self.init = self.start()
        for place in ("demo:pod1", "other:pod1", "k8s-slave1"):
            self.namespace(place)
        self.model = Lab(
            name=self.name,
            pod_cidr="10.244.0.0/16",
            service_cidrs=("10.96.0.0/12",),
            underlay=Underlay(cidr="172.21.32.0/24", gateway="172.21.32.1"),
            nodes=(Node(name="k8s-slave1", address="172.21.32.11", pod_cidr="10.244.1.0/24"),),
            pods=(
                Pod(namespace="demo", name="pod1", node="k8s-slave1", address="10.244.1.4"),
                Pod(namespace="other", name="pod1", node="k8s-slave1", address="10.244.1.5"),
                Pod(
                    namespace="demo",
                    name="agent",
                    node="k8s-slave1",
                    address="172.21.32.11",
                    host_network=True,
                ),
            ),
        )
        self.init.declare(record.encode(self.model))

    def netlab(self, *arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments),
            input=text,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )

    def command(self, verb: str, *arguments: str) -> list[str]:
        return [sys.executable, "-c", NETLAB, verb, "--lab", self.name, *arguments]

    def run(self, *command: str, text: str = "") -> subprocess.CompletedProcess[str]:
        return self.netlab("exec", "demo/pod1", "--", *command, text=text)


@pytest.fixture
def lab() -> Iterator[LabWithPods]:
    with lab_processes(LabWithPods) as made:
        yield made


# Where it runs


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        (("demo/pod1",), ("demo", "pod1")),
        (("pod1", "-n", "other"), ("other", "pod1")),
        (("-n", "other", "pod1"), ("other", "pod1")),
        (("-it", "demo/pod1"), ("demo", "pod1")),
        (("10.244.1.5",), ("other", "pod1")),
        (("node/k8s-slave1",), ("k8s-slave1",)),
        (("agent",), ("k8s-slave1",)),
    ],
)
def test_runs_in_the_network_namespace_that_is_meant(
    lab: LabWithPods, arguments: tuple[str, ...], place: tuple[str, ...]
) -> None:
    done = lab.netlab("exec", *arguments, "--", "stat", "-Lc", "%i", "/proc/self/ns/net")
    path = f"/run/netns/{namespace_name(lab.name, *place)}"
    assert done.stdout == f"{os.stat(path).st_ino}\n", done.stderr


def test_runs_in_the_pid_and_mount_namespace_of_init(lab: LabWithPods) -> None:
    done = lab.run("sh", "-c", "readlink /proc/self/ns/pid; cat /proc/1/comm; ls -d /proc/[0-9]*")
    pid, first, *processes = done.stdout.split()
    assert pid == os.readlink(f"/proc/{lab.init.pid}/ns/pid")
    assert first == "netlab-init"
    assert f"/proc/{os.getpid()}" not in processes or os.getpid() < 100


def test_sees_the_links_of_its_namespace_and_its_own_host_name(lab: LabWithPods) -> None:
    done = lab.run("sh", "-c", "ls /sys/class/net; uname -n")
    assert done.stdout == "lo\npod1\n"
    assert os.uname().nodename != "pod1"


def test_what_it_mounts_nobody_else_sees(lab: LabWithPods, tmp_path: Path) -> None:
    done = lab.run("sh", "-c", f"mount -t tmpfs none {tmp_path} && touch {tmp_path}/x && ls")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "x").exists()
    for mounts in ("self", str(lab.init.pid)):
        assert str(tmp_path) not in Path(f"/proc/{mounts}/mountinfo").read_text()


def test_keeps_directory_environment_and_input(lab: LabWithPods, tmp_path: Path) -> None:
    os.environ["NETLAB_TEST_MARK"] = "mark"
    try:
        done = subprocess.run(
            lab.command("exec", "demo/pod1", "--", "sh", "-c", "pwd; echo $NETLAB_TEST_MARK; cat"),
            input="some text",
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
    finally:
        del os.environ["NETLAB_TEST_MARK"]
    assert done.stdout == f"{tmp_path}\nmark\nsome text"


def test_options_after_the_dashes_are_the_commands(lab: LabWithPods) -> None:
    assert lab.run("echo", "-n", "--lab", "x").stdout == "--lab x"


def test_an_option_of_the_command_before_the_dashes_gets_a_hint(lab: LabWithPods) -> None:
    done = lab.netlab("exec", "demo/pod1", "curl", "-s", "http://x")
    assert done.returncode == 2
    assert '"-s"' in done.stderr
    assert "-- COMMAND -s" in done.stderr


def test_what_is_missing_is_told(lab: LabWithPods) -> None:
    done = lab.netlab("exec", "demo/pod1")
    assert done.returncode == 2
    assert "COMMAND" in done.stderr


# How it ends


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (("true",), 0),
        (("false",), 1),
        (("sh", "-c", "exit 42"), 42),
        (("sh", "-c", "kill -TERM $$"), 128 + 15),
        (("sh", "-c", "kill -KILL $$"), 128 + 9),
        (("sh", "-c", "kill -INT $$"), 128 + 2),
        (("sh", "-c", "kill -PIPE $$"), 128 + 13),
        (("no-such-command",), 127),
        (("/no/such/command",), 127),
        (("/etc/passwd",), 126),
        (("/",), 126),
    ],
)
def test_exit_code_is_the_commands_own(
    lab: LabWithPods, command: tuple[str, ...], code: int
) -> None:
    done = lab.run(*command)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    if code in (126, 127):
        assert command[0] in done.stderr
        assert "error[" in done.stderr
    else:
        assert done.stderr == ""


def test_pipes_work_as_everywhere(lab: LabWithPods) -> None:
    done = lab.run("sh", "-c", "yes | head -n 1")
    assert (done.stdout, done.stderr) == ("y\n", "")


def test_without_init_it_says_what_to_do(lab: LabWithPods) -> None:
    with record.locked(lab.name):
        record.write(lab.name, record.encode(lab.model))
    try:
        lab.init.shutdown()
        done = lab.run("true")
        assert done.returncode == 2
        assert "error[lab-not-running]" in done.stderr
        assert "netlab up" in done.stderr
    finally:
        with record.locked(lab.name):
            record.remove(lab.name)


@pytest.mark.parametrize("target", ["pod9", "pod1", "10.244.9.9"])
def test_a_target_that_is_none_is_an_error(lab: LabWithPods, target: str) -> None:
    done = lab.netlab("exec", target, "--", "true")
    assert done.returncode == 2
    assert "error[" in done.stderr
    assert target in done.stderr


def _started(lab: LabWithPods, script: str) -> subprocess.Popen[str]:
    """Run a shell script that says "ready", in the pod; returns when it has said so."""
    running = subprocess.Popen(
        lab.command("exec", "demo/pod1", "--", "sh", "-c", script),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert running.stdout is not None
    assert running.stdout.readline() == "ready\n"
    return running


def _inside(lab: LabWithPods, name: str) -> list[int]:
    """Host PIDs of the lab's processes of that name."""
    return [process.pid for process in lab.init.status().processes if process.name == name]


def test_terminate_reaches_the_command(lab: LabWithPods) -> None:
    running = _started(
        lab, "trap 'echo got it; exit 3' TERM; echo ready; sleep 1000 >/dev/null 2>&1 & wait"
    )
    running.send_signal(signal.SIGTERM)
    assert running.communicate(timeout=PATIENCE_S)[0] == "got it\n"
    assert running.returncode == 3


def test_interrupt_is_left_to_the_command(lab: LabWithPods) -> None:
    running = _started(
        lab, "trap 'echo got it; exit 4' INT; echo ready; sleep 1000 >/dev/null 2>&1 & wait"
    )
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does: everyone in the foreground
    assert running.communicate(timeout=PATIENCE_S)[0] == "got it\n"
    assert running.returncode == 4


def test_dies_with_the_caller(lab: LabWithPods) -> None:
    running = _started(lab, "echo ready; exec sleep 1000")
    (sleep,) = eventually(lambda: _inside(lab, "sleep"))
    pidfd = os.pidfd_open(sleep)
    running.kill()
    wait_for_end(sleep, pidfd)
    os.close(pidfd)
    running.communicate(timeout=PATIENCE_S)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_dies_with_the_lab(lab: LabWithPods, number: signal.Signals) -> None:
    running = _started(lab, "trap '' TERM HUP; echo ready; while :; do sleep 1000; done")
    os.kill(lab.init.pid, number)
    _, errors = running.communicate(timeout=PATIENCE_S)
    assert running.returncode == 128 + signal.SIGKILL
    assert "error[lab-ended]" in errors
    assert lab.init.wait(0)


def test_has_time_to_end_when_the_lab_goes_down(lab: LabWithPods) -> None:
    running = _started(
        lab, "trap 'echo bye; exit 0' TERM; echo ready; sleep 1000 >/dev/null 2>&1 & wait"
    )
    lab.init.shutdown()
    assert running.communicate(timeout=PATIENCE_S)[0] == "bye\n"
    assert running.returncode == 0


def test_a_stopped_caller_does_not_hold_the_lab_up(lab: LabWithPods) -> None:
    """Its children are not waited for then, and a PID namespace waits for all in it."""
    running = _started(lab, "echo ready; exec sleep 1000")
    os.killpg(running.pid, signal.SIGSTOP)
    lab.init.shutdown()
    assert control.connect(lab.name) is None
    os.killpg(running.pid, signal.SIGCONT)
    running.communicate(timeout=PATIENCE_S)


def test_what_it_leaves_in_the_background_ends_with_the_lab(lab: LabWithPods) -> None:
    lab.run("sh", "-c", "sleep 1000 >/dev/null 2>&1 &")
    (sleep,) = eventually(lambda: _inside(lab, "sleep"))
    pidfd = os.pidfd_open(sleep)
    lab.init.shutdown()
    wait_for_end(sleep, pidfd)
    os.close(pidfd)


# On a terminal


class Terminal:
    """A command with a terminal of its own, and what it shows."""

    def __init__(self, command: list[str], **environment: str) -> None:
        self.master, slave = pty.openpty()
        self.shown = ""

        def own_the_terminal() -> None:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=own_the_terminal,
            env={**os.environ, "TERM": "dumb", **environment},
        )
        os.close(slave)

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def wait_for(self, text: str) -> str:
        """Return what was shown up to and with `text`."""
        deadline = time.monotonic() + PATIENCE_S
        while text not in self.shown:
            ready, _, _ = select.select([self.master], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{text!r} is not in {self.shown!r}"
            try:
                self.shown += os.read(self.master, 4096).decode()
            except OSError:  # nobody is there any more
                pytest.fail(f"{text!r} is not in {self.shown!r}")
        before, _, self.shown = self.shown.partition(text)
        return before + text

    def close(self) -> None:
        os.close(self.master)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(PATIENCE_S)


@pytest.fixture
def terminals() -> Iterator[list[Terminal]]:
    opened: list[Terminal] = []
    yield opened
    for terminal in opened:
        terminal.close()


def _stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def test_control_c_ends_the_command_and_not_more(
    lab: LabWithPods, terminals: list[Terminal]
) -> None:
    terminal = Terminal(
        [
            "sh",
            "-c",
            'trap : INT; "$@"; echo code $?',
            "sh",
            *lab.command(
                "exec", "demo/pod1", "--", "sh", "-c", "trap '' INT; echo on; cat; exit 5"
            ),
        ]
    )
    terminals.append(terminal)
    terminal.wait_for("on")
    terminal.type("\x03")
    terminal.wait_for("^C")
    terminal.type("still there\r\x04")
    terminal.wait_for("code 5")


def test_a_command_sees_the_terminal_and_control_c(
    lab: LabWithPods, terminals: list[Terminal]
) -> None:
    command = "test -t 0 && echo on && exec sleep 1000"
    terminal = Terminal(lab.command("exec", "demo/pod1", "--", "sh", "-c", command))
    terminals.append(terminal)
    terminal.wait_for("on")
    terminal.type("\x03")
    assert terminal.process.wait(PATIENCE_S) == 128 + signal.SIGINT


def test_control_z_stops_and_fg_goes_on(lab: LabWithPods, terminals: list[Terminal]) -> None:
    """As a shell sees it: the whole job stops, and goes on."""
    command = lab.command("exec", "demo/pod1", "--", "sh", "-c", "echo on; read x; echo got $x")
    terminal = Terminal(["bash", "--norc", "--noediting", "-i"], PS1="outside> ")
    terminals.append(terminal)
    terminal.wait_for("outside> ")
    terminal.type(" ".join(f"'{word}'" for word in command) + "\r")
    terminal.wait_for("on\r\n")
    terminal.type("\x1a")
    terminal.wait_for("Stopped")
    terminal.wait_for("outside> ")
    terminal.type("fg\r")
    terminal.wait_for("fg\r\n")
    terminal.type("this\r")
    terminal.wait_for("got this")


def test_shell_says_where_it_is_and_leaves_the_terminal_as_it_was(
    lab: LabWithPods, terminals: list[Terminal]
) -> None:
    terminal = Terminal(
        [
            "sh",
            "-c",
            '"$@"; echo code $?; read x; echo got $x',
            "sh",
            *lab.command("shell", "demo/pod1"),
        ],
        SHELL="/bin/bash",
        HOME="/nonexistent",
    )
    terminals.append(terminal)
    before = termios.tcgetattr(terminal.master)
    terminal.wait_for("[demo/pod1] ")
    terminal.type("ls /sys/class/net | tr a-z A-Z\r")
    terminal.wait_for("\nLO\r\n")
    terminal.wait_for("[demo/pod1] ")
    terminal.type("sleep 1000\r")
    eventually(lambda: _inside(lab, "sleep"))
    terminal.type("\x1a")
    terminal.wait_for("Stopped")
    terminal.wait_for("[demo/pod1] ")
    terminal.type("exit 7\r")
    terminal.wait_for("There are stopped jobs.")
    terminal.wait_for("[demo/pod1] ")
    terminal.type("exit 7\r")
    terminal.wait_for("code 7")
    assert termios.tcgetattr(terminal.master) == before
    terminal.type("this\r")
    terminal.wait_for("got this")


def test_a_killed_shell_leaves_the_terminal_as_it_was(
    lab: LabWithPods, terminals: list[Terminal]
) -> None:
    terminal = Terminal(
        [
            "sh",
            "-c",
            '"$@"; echo code $?; read x; echo got $x',
            "sh",
            *lab.command("shell", "node/k8s-slave1"),
        ],
        SHELL="/bin/bash",
        HOME="/nonexistent",
    )
    terminals.append(terminal)
    before = termios.tcgetattr(terminal.master)
    terminal.wait_for("[node/k8s-slave1] ")
    os.kill(lab.init.pid, signal.SIGKILL)
    terminal.wait_for("code 137")
    assert termios.tcgetattr(terminal.master) == before
    terminal.type("this\r")
    terminal.wait_for("got this")
