"""Who else makes pods: the kernel's floor, the CNI plugins, Mininet; each in a corner of its own.

`python -m netlab.bench.peers WHO PODS` makes so many pods and takes them down, in a mount and a
network namespace which nobody else sees and which end with it, and prints the seconds of both.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from netlab.bench import cni, floor
from netlab.kernel.syscalls import (
    CLONE_NEWNET,
    CLONE_NEWNS,
    MS_PRIVATE,
    MS_REC,
    die_with_parent,
    mount,
    unshare,
)
from netlab.problems import Exit, NetlabError, Problem

# Mininet belongs to the distribution's interpreter, not to this environment.
SYSTEM_PYTHON = "/usr/bin/python3"


class Seconds(msgspec.Struct, frozen=True):
    """How long all pods took."""

    up: float
    down: float


def lacking(who: str) -> str:
    """What this machine lacks for a peer, "" if nothing."""
    if who == "CNI bridge" and cni.directory() is None:
        return "the CNI plugins bridge and host-local are not installed: ./bootstrap.sh bench"
    if who == "Mininet" and not _has_mininet():
        return "Mininet is not installed: ./bootstrap.sh bench"
    return ""


def seconds(who: str, pods: int) -> Seconds:
    """Run a peer in a process of its own.  NetlabError (exit 3) if it fails."""
    command = [sys.executable, "-m", "netlab.bench.peers", who, str(pods)]
    done = subprocess.run(command, capture_output=True)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        message = f"{who}: {said[-1] if said else f'status {done.returncode}'}"
        raise NetlabError(Problem("peer-failed", message), Exit.MACHINE)
    return msgspec.json.decode(done.stdout, type=Seconds)


def _has_mininet() -> bool:
    try:
        command = [SYSTEM_PYTHON, "-c", "import mininet"]
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


def _floor(pods: int) -> Seconds:
    up = _timed(lambda: floor.build("floor", pods=pods))
    return Seconds(up, _timed(lambda: floor.remove("floor", pods=pods)))


def _cni(pods: int) -> Seconds:
    plugins = cni.directory()
    assert plugins
    # In memory, so that host-local's reservations wait for no disk.
    with tempfile.TemporaryDirectory(dir="/dev/shm") as data:
        node = cni.Node("cni", plugins, Path(data), pods)
        try:
            return Seconds(_timed(node.up), _timed(node.down))
        finally:
            node.close()


def _mininet(pods: int) -> Seconds:
    script = Path(__file__).with_name("mininet_bridge.py")
    command = [SYSTEM_PYTHON, str(script), str(pods)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return msgspec.json.decode(done.stdout, type=Seconds)


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


PEERS: dict[str, Callable[[int], Seconds]] = {
    "the kernel's floor": _floor,
    "CNI bridge": _cni,
    "Mininet": _mininet,
}


def main() -> None:
    """The process of a peer."""
    die_with_parent(signal.SIGKILL)
    unshare(CLONE_NEWNS | CLONE_NEWNET)
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    os.makedirs(floor.RUN_DIR, exist_ok=True)
    mount("tmpfs", floor.RUN_DIR, "tmpfs", 0)
    sys.stdout.write(msgspec.json.encode(PEERS[sys.argv[1]](int(sys.argv[2]))).decode())


if __name__ == "__main__":
    main()
