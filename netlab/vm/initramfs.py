"""What the virtual machine starts from: an archive in memory, made anew for each boot.

It brings what the kernel needs to see this machine's files, and what is to be run then.
Format: Documentation/driver-api/early-userspace/buffer-format.rst ("newc").
"""

from __future__ import annotations

import os
import shlex
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

from netlab.problems import Exit, NetlabError, Problem
from netlab.vm.packaged_kernel import Kernel
from netlab.vm.programs import program

PORTS = ("stdin", "stdout", "stderr", "control", "data")
"""Channels between the machine and us, ports of a serial bus; "data" is for the command."""

# With these the kernel finds files and channels; all others are loaded when they are used.
_MODULES = ("virtio_pci", "9p", "9pnet_virtio", "overlay", "virtio_console", "virtio_rng")

# The root is what this machine has, as it is; what is written stays in memory.  Only directories
# that were asked for are written to.
_INIT = r"""#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
$b mount -t devtmpfs dev /dev
for m in /modules/*; do $b insmod $m || echo "netlab: insmod $m failed"; done
p=trans=virtio,version=9p2000.L,msize=512000
$b mount -t 9p -o ro,cache=loose,$p root /root || echo "netlab: no root"
$b mount -t tmpfs -o size=75% tmpfs /rw
$b mkdir /rw/up /rw/work /rw/new
$b mount -t overlay -o lowerdir=/root,upperdir=/rw/up,workdir=/rw/work overlay /rw/new ||
    echo "netlab: no overlay"
n=/rw/new
for f in proc sys dev; do $b mount --move /$f $n/$f; done
$b mount -t tmpfs -o mode=755 run $n/run
$b mkdir -p $n/run/netns $n/run/lock $n/run/netlab-vm $n/dev/pts $n/dev/shm
$b cp -r /bin/busybox /job/. $n/run/netlab-vm
. /job/writable
$b mount -t devpts -o ptmxmode=666,mode=620 devpts $n/dev/pts
$b mount -t tmpfs shm $n/dev/shm
for f in fd:/proc/self/fd stdin:/proc/self/fd/0 stdout:/proc/self/fd/1 stderr:/proc/self/fd/2; do
    $b ln -sf ${f#*:} $n/dev/${f%%:*}
done
$b mount -t cgroup2 cgroup2 $n/sys/fs/cgroup
$b mount -t debugfs debugfs $n/sys/kernel/debug
$b mount -t tracefs tracefs $n/sys/kernel/tracing
$b mount -t bpf bpf $n/sys/fs/bpf
$b ip link set lo up
$b hostname netlab-vm
exec $b switch_root $n /run/netlab-vm/busybox sh /run/netlab-vm/start
"""

# Ports have names in /sys; their devices are numbered.  A daemon that the command leaves behind
# may hold its output open: what was written before the command's end is awaited, no more.
_START = r"""
b=/run/netlab-vm/busybox
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
for p in /sys/class/virtio-ports/*; do
    [ ! -s $p/name ] || $b ln -s /dev/${p##*/} /run/netlab-vm/$($b cat $p/name)
done
cd /run/netlab-vm
$b mkdir -p /lib/modules
$b ln -sfn "$MODULES" /lib/modules/$($b uname -r)
# Nothing loads these by itself, or not at once.
modprobe -a br_netfilter nf_conntrack_netlink
exec 3> control
echo booted >&3
if [ -e terminal ]; then
    $b setsid -c $b sh job < /dev/hvc0 > /dev/hvc0 2>&1 3>&-
    status=$?
else
    $b mkfifo out err
    $b cat < out > stdout 3>&- & out=$!
    $b cat < err > stderr 3>&- & err=$!
    in=stdin
    [ -e $in ] || in=/dev/null
    $b setsid $b sh job < $in > out 2> err 3>&-
    status=$?
    n=0
    while [ $n -lt 20 ] && { $b kill -0 $out || $b kill -0 $err; } 2> /dev/null; do
        $b sleep 0.1
        n=$((n + 1))
    done
fi
$b sync
echo "ended $status" >&3
$b sleep 1000000
"""


def initramfs(
    kernel: Kernel,
    command: Sequence[str],
    environment: Mapping[str, str],
    directory: str,
    writable: Sequence[str],
    terminal: tuple[int, int] | None,
    files: Mapping[str, bytes],
) -> bytes:
    """The archive that boots `kernel` and runs `command` in `directory`.

    `writable` are the directories shared under the names `writable0`, `writable1`, ...; `files` are
    found in /run/netlab-vm.  With `terminal`, its rows and columns, the command has a terminal.
    """
    archive = _Archive()
    for name in ("bin", "dev", "job", "modules", "proc", "root", "rw", "sys"):
        archive.directory(name)
    archive.file("bin/busybox", _busybox(), 0o755)
    for number, module in enumerate(kernel.module_files(*_MODULES)):
        archive.file(f"modules/{number:02}-{module.name}", module.read_bytes())
    archive.file("init", _INIT.encode(), 0o755)
    mounts = "".join(
        f"$b mkdir -p $n{shlex.quote(path)}\n"
        f"$b mount -t 9p -o cache=mmap,$p writable{number} $n{shlex.quote(path)} ||"
        f" echo 'netlab: no' {shlex.quote(path)}\n"
        for number, path in enumerate(writable)
    )
    archive.file("job/writable", mounts.encode())
    archive.file("job/start", f"MODULES={shlex.quote(str(kernel.modules))}\n{_START}".encode())
    archive.file("job/job", _job(command, environment, directory, terminal).encode())
    if terminal:
        archive.file("job/terminal", b"")
    for name, content in files.items():
        archive.file(f"job/{name}", content)
    return archive.packed()


def _job(
    command: Sequence[str],
    environment: Mapping[str, str],
    directory: str,
    terminal: tuple[int, int] | None,
) -> str:
    """The shell script that runs the command."""
    lines = [f"stty rows {terminal[0]} cols {terminal[1]}"] if terminal else []
    lines += [
        f"export {name}={shlex.quote(value)}"
        for name, value in environment.items()
        if name.isidentifier()
    ]
    return "\n".join([*lines, f"cd {shlex.quote(directory)}", f"exec {shlex.join(command)}", ""])


def _busybox() -> bytes:
    content = Path(program("busybox")).read_bytes()
    if b"/ld-linux" in content:
        raise NetlabError(
            Problem(
                "missing-program",
                f"{program('busybox')} needs libraries, and the virtual machine starts without any",
                hint="`sudo apt-get install --no-install-recommends busybox-static`",
            ),
            Exit.MACHINE,
        )
    return content


class _Archive:
    """Files behind each other."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def directory(self, name: str) -> None:
        self._add(name, b"", stat.S_IFDIR | 0o755)

    def file(self, name: str, content: bytes, mode: int = 0o644) -> None:
        self._add(name, content, stat.S_IFREG | mode)

    def packed(self) -> bytes:
        self._add("TRAILER!!!", b"", 0)
        return b"".join(self._parts)

    def _add(self, name: str, content: bytes, mode: int) -> None:
        number = len(self._parts) + 1
        size, length = len(content), len(os.fsencode(name)) + 1
        numbers = (number, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, length, 0)
        header = b"070701" + b"".join(b"%08X" % each for each in numbers)
        head = header + os.fsencode(name) + b"\0"
        self._parts.append(head + b"\0" * (-len(head) % 4) + content + b"\0" * (-size % 4))
