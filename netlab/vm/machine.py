"""One run of the virtual machine: a command in it, what it says, and what it ends with.

QEMU runs as whoever starts it, root or not, and shows the machine this computer's files as that
user may read them; the command is root in there.  Nothing of a run is on disk, and QEMU ends with
the thread that started it, whatever ends that.
"""

from __future__ import annotations

import contextlib
import os
import select
import selectors
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from netlab.kernel.syscalls import die_with_parent
from netlab.vm import programs
from netlab.vm.initramfs import PORTS, initramfs
from netlab.vm.packaged_kernel import Kernel, cache_directory, kernel

BOOT_S = 120.0
"""How long a start may take: 6 s on an idle computer that emulates, much more on a busy one."""

_FIRST_WORD_S = 5.0
_CONSOLE_KEPT = 1 << 18
_KVM = "/dev/kvm"
_KERNEL_OPTIONS = (
    "console=ttyS0 panic=-1 mitigations=off nokaslr apparmor=0 audit=0 random.trust_cpu=on "
    "no_timer_check tsc=reliable"
)

Hear = Callable[[bytes], None]
"""Takes what came out of a channel."""


class Job(msgspec.Struct, frozen=True):
    """What is run: `files` are found in /run/netlab-vm, `writable` directories are written to.

    `terminal`, rows and columns, says that the command has ours; else `stdin` is a descriptor that
    it reads from, or None.
    """

    command: Sequence[str]
    environment: Mapping[str, str]
    directory: str
    writable: Sequence[str] = ()
    files: Mapping[str, bytes] = {}
    stdin: int | None = None
    terminal: tuple[int, int] | None = None


class Size(msgspec.Struct, frozen=True):
    """What the machine has, how long it may run and be silent, and how nice it is to others.

    None: for ever.  Silent is a machine from which nothing comes but on its console.
    """

    processors: int = 2
    memory_mib: int = 2048
    seconds: float | None = None
    silent_seconds: float | None = None
    niceness: int = 0


_USUAL_SIZE = Size()


class Ended(Exception):
    """The machine ended, or was ended, before the command did; with its console."""

    def __init__(self, why: str, console: bytes, booted: bool) -> None:
        super().__init__(why)
        self.why = why
        self.booted = booted
        self.console = console.decode(errors="replace")


def run(
    job: Job, hear: Mapping[str, Hear], size: Size = _USUAL_SIZE, stop: int | None = None
) -> int:
    """Boot, run a command, and give its exit status.

    `hear` takes what comes from "stdout", "stderr", "data" and "console"; "booted" hears b"" when
    the command starts.  When the descriptor `stop` can be read, the machine is ended.  Ended if
    the machine does not start or does not live until the command has ended; NetlabError (exit 3)
    if something that it needs is not there.
    """
    programs.require()
    its_kernel = kernel()
    archive = initramfs(
        its_kernel,
        job.command,
        job.environment,
        job.directory,
        job.writable,
        job.terminal,
        job.files,
    )
    if _may_use_kvm():
        with Machine(its_kernel, archive, job, size, accelerated=True) as machine:
            if machine.says_something():
                return machine.follow(hear, stop)
        _kvm_is_unusable()
    with Machine(its_kernel, archive, job, size, accelerated=False) as machine:
        return machine.follow(hear, stop)


# What could not start a kernel is not tried again until this computer starts anew: some have the
# device, and a processor that only seems to do it (nested virtual machines).


def _mark_of_unusable_kvm() -> Path:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return cache_directory() / f"kvm-unusable-{boot}"


def _may_use_kvm() -> bool:
    return os.access(_KVM, os.R_OK | os.W_OK) and not _mark_of_unusable_kvm().exists()


def _kvm_is_unusable() -> None:
    for old in cache_directory().glob("kvm-unusable-*"):
        old.unlink(missing_ok=True)
    _mark_of_unusable_kvm().touch()


class Machine:
    """A process of QEMU and our ends of its channels; it is killed on leaving the context."""

    def __init__(
        self, its_kernel: Kernel, archive: bytes, job: Job, size: Size, accelerated: bool
    ) -> None:
        self._limit, self._silent_limit = size.seconds, size.silent_seconds
        self._booted = False
        self._console = bytearray()
        self._control = b""
        self._complaints = os.memfd_create("netlab-qemu")
        self._ours: dict[str, socket.socket] = {}
        theirs: dict[str, socket.socket] = {}
        self._stdin = job.stdin
        for name in ("console", *PORTS):
            if name != "stdin" or job.stdin is not None:
                self._ours[name], theirs[name] = socket.socketpair()
        try:
            self._process = self._start(its_kernel, archive, job, size, accelerated, theirs)
        except BaseException:
            self._close()
            raise
        finally:
            for end in theirs.values():
                end.close()
        self._started = self._last_word = time.monotonic()

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._close()

    def _close(self) -> None:
        os.close(self._complaints)
        for end in self._ours.values():
            end.close()

    def _start(
        self,
        its_kernel: Kernel,
        archive: bytes,
        job: Job,
        size: Size,
        accelerated: bool,
        channels: Mapping[str, socket.socket],
    ) -> subprocess.Popen[bytes]:
        file = os.memfd_create("netlab-initramfs")
        try:
            with open(file, "wb", closefd=False) as memory:
                memory.write(archive)
            command = [
                programs.program("qemu-system-x86_64"),
                *_processor(accelerated),
                *("-machine", "q35", "-smp", str(size.processors), "-m", str(size.memory_mib)),
                *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
                *("-nic", "none", "-device", "virtio-rng-pci", "-device", "virtio-serial-pci"),
                *_share("root", "/", read_only=True),
                *(
                    word
                    for number, path in enumerate(job.writable)
                    for word in _share(f"writable{number}", path)
                ),
                *_channels(channels),
                *(_TERMINAL if job.terminal else ()),
                *("-kernel", str(its_kernel.image), "-initrd", f"/proc/self/fd/{file}"),
                # What accelerates is found out to work by what is said first.
                *("-append", _KERNEL_OPTIONS + ("" if accelerated else " quiet loglevel=4")),
            ]
            return subprocess.Popen(
                command,
                stdin=None if job.terminal else subprocess.DEVNULL,
                stdout=None if job.terminal else self._complaints,
                stderr=self._complaints,
                pass_fds=(file, *(end.fileno() for end in channels.values())),
                # What the terminal sends is for us, and in raw mode for the machine.
                start_new_session=job.terminal is None,
                preexec_fn=lambda: _as_child(size.niceness),
            )
        finally:
            os.close(file)

    def _feed(self, source: int) -> None:
        """Pass on what the command reads, beside everything else: it may read it late, or never."""
        end = self._ours["stdin"]

        def pump() -> None:
            with contextlib.suppress(OSError):  # the machine has ended
                while data := os.read(source, 1 << 16):
                    end.sendall(data)
                end.shutdown(socket.SHUT_WR)

        threading.Thread(target=pump, daemon=True).start()

    def says_something(self) -> bool:
        """Whether the kernel prints anything within the time that one needs at most."""
        return bool(select.select([self._ours["console"]], [], [], _FIRST_WORD_S)[0]) and bool(
            self._ours["console"].recv(1, socket.MSG_PEEK)
        )

    def follow(self, hear: Mapping[str, Hear], stop: int | None = None) -> int:
        """Pass on what comes out of the channels until the command has ended; its status."""
        if self._stdin is not None:
            self._feed(self._stdin)
        status: int | None = None
        with selectors.DefaultSelector() as selector:
            for name, end in self._ours.items():
                if name != "stdin":
                    selector.register(end, selectors.EVENT_READ, name)
            if stop is not None:
                selector.register(stop, selectors.EVENT_READ, "stop")
            while status is None:
                ready = selector.select(self._time_left())
                if not ready:
                    self._process.kill()
                    raise self._ended(self._lateness())
                for key, _ in ready:
                    if key.data == "stop":
                        raise self._ended("the virtual machine was stopped")
                    data = _at_hand(self._ours[key.data])
                    if not data:
                        # All of them close together, when QEMU ends.
                        raise self._ended("the virtual machine ended by itself")
                    if key.data == "control":
                        status = self._controlled(data, hear)
                    else:
                        self._heard(key.data, data, hear)
            # What was said before comes by other channels.
            for name in ("stdout", "stderr", "data"):
                while data := _at_hand(self._ours[name]):
                    self._heard(name, data, hear)
        return status

    def _heard(self, name: str, data: bytes, hear: Mapping[str, Hear]) -> None:
        if name != "console":
            self._last_word = time.monotonic()
        else:
            self._console += data
            del self._console[:-_CONSOLE_KEPT]
        if name in hear:
            hear[name](data)

    def _controlled(self, data: bytes, hear: Mapping[str, Hear]) -> int | None:
        """What the machine says of itself: that it has booted, and the status of the command."""
        *lines, self._control = (self._control + data).split(b"\n")
        for line in lines:
            word, _, number = line.partition(b" ")
            if word == b"booted":
                self._booted = True
                self._last_word = time.monotonic()
                hear.get("booted", _ignore)(b"")
            else:
                return int(number)
        return None

    def _time_left(self) -> float | None:
        """Seconds, not below 0; None if there is no limit."""
        ends = [] if self._limit is None else [self._started + self._limit]
        if not self._booted:
            ends.append(self._started + BOOT_S)
        elif self._silent_limit is not None:
            ends.append(self._last_word + self._silent_limit)
        return max(0.0, min(ends) - time.monotonic()) if ends else None

    def _lateness(self) -> str:
        now = time.monotonic()
        if self._limit is not None and now >= self._started + self._limit:
            return f"the virtual machine was ended after {self._limit:g} s"
        if self._booted:
            return f"the virtual machine was ended: for {self._silent_limit:g} s it said nothing"
        return f"the virtual machine did not start within {BOOT_S:g} s"

    def _ended(self, why: str) -> Ended:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        while data := _at_hand(self._ours["console"]):
            self._console += data
        complaints = os.pread(self._complaints, 1 << 16, 0).decode(errors="replace").strip()
        if complaints:
            why += f"; QEMU said: {complaints.splitlines()[-1]}"
        return Ended(why, bytes(self._console), self._booted)


_TERMINAL = (
    "-chardev",
    "stdio,id=terminal,signal=off",
    "-device",
    "virtconsole,chardev=terminal",
)


def _as_child(niceness: int) -> None:
    die_with_parent(signal.SIGKILL)
    os.nice(niceness)


def _processor(accelerated: bool) -> tuple[str, ...]:
    # The plain processor is a quarter faster to emulate than the one that can do most.
    if accelerated:
        return ("-accel", "kvm", "-cpu", "host")
    return ("-accel", "tcg,thread=multi", "-cpu", "qemu64")


def _share(tag: str, path: str, read_only: bool = False) -> tuple[str, ...]:
    escaped = path.replace(",", ",,")
    options = "security_model=none,multidevs=remap" + ",readonly=on" * read_only
    return ("-virtfs", f"local,path={escaped},mount_tag={tag},{options}")


def _channels(channels: Mapping[str, socket.socket]) -> list[str]:
    words: list[str] = []
    for name, end in channels.items():
        words += ["-chardev", f"socket,id={name},fd={end.fileno()}"]
        if name == "console":
            words += ["-serial", f"chardev:{name}"]
        else:
            words += ["-device", f"virtserialport,chardev={name},name={name}"]
    return words


def _at_hand(end: socket.socket) -> bytes:
    """What has come already; b"" also when nothing comes any more."""
    try:
        return end.recv(1 << 16, socket.MSG_DONTWAIT)
    except (BlockingIOError, ConnectionResetError):
        return b""


def _ignore(_: bytes) -> None:
    pass
