"""Machines for tests: network, mount and PID namespaces of this kernel, joined by a switch.

Each has process 1, a /proc and a /run of its own, and an uplink; a lab's node there lives in what
is, for it, the machine's own network namespace.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from netlab.hosts.hosts_file import Machine

_START = """
umount -R -l /run/netns 2>/dev/null
echo 0 >/proc/sys/net/ipv6/conf/default/accept_dad
mount -t tmpfs run /run && mkdir -p /run/lock && mount -t sysfs sys /sys 2>/dev/null
ip link set lo up
echo ready
exec sleep infinity
"""


@dataclass
class Box:
    """One machine: `pid` is that of its process 1, as this machine counts."""

    name: str
    pid: int
    starter: subprocess.Popen[str]
    address: str
    python: str = sys.executable

    @property
    def entering(self) -> list[str]:
        """What runs a command on it."""
        return ["nsenter", "-t", str(self.pid), "-n", "-m", "-p", "--"]

    @property
    def machine(self) -> Machine:
        """As the hosts file has it."""
        gateway = f"popen//python={' '.join(self.entering)} {self.python}"
        return Machine(gateway=gateway, underlay="uplink")

    def run(self, *command: str, check: bool = True) -> str:
        """Output of a command on it."""
        done = subprocess.run([*self.entering, *command], capture_output=True, text=True)
        if check and done.returncode:
            raise AssertionError(f"{command}: {done.stdout}{done.stderr}")
        return done.stdout

    def kill(self) -> None:
        """Switch it off."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.starter.wait()

    def snapshot(self) -> dict[str, str]:
        """Everything on it that a lab could leave behind."""
        return {
            " ".join(command): self.run(*command, check=False)
            for command in (
                ["ip", "-o", "link"],
                ["ip", "-o", "addr"],
                ["ip", "route", "show", "table", "all"],
                ["ip", "-6", "route", "show", "table", "all"],
                ["ip", "rule"],
                ["nft", "list", "ruleset"],
                ["iptables-legacy-save"],
                ["ipset", "save"],
                ["ipvsadm", "-Sn"],
                ["sh", "-c", "ls /run /run/netns 2>/dev/null"],
                ["cat", "/proc/self/mountinfo"],
                [
                    "sh",
                    "-c",
                    "sysctl -a 2>/dev/null | grep -v -E "
                    "'nf_conntrack_(count|max|buckets)|random|fs.|kernel|user.|vm.|neigh'",
                ],
            )
        }


def differences(before: Sequence[dict[str, str]], boxes: Sequence[Box]) -> list[str]:
    """What is otherwise on machines now, line by line."""
    found = []
    for was, box in zip(before, boxes, strict=True):
        now = box.snapshot()
        for what in was:
            lines = difflib.unified_diff(
                was[what].splitlines(), now[what].splitlines(), n=1, lineterm=""
            )
            found += [f"{box.name}: {what}: {line}" for line in lines]
    return found


@dataclass
class Switched:
    """Machines on one network."""

    boxes: list[Box] = field(default_factory=list)

    def __getitem__(self, index: int) -> Box:
        return self.boxes[index]

    def machines(self, nodes: Sequence[str]) -> dict[str, Machine]:
        """The machines as nodes of these names."""
        return {node: box.machine for node, box in zip(nodes, self.boxes, strict=False)}


@contextlib.contextmanager
def switched(addresses: Sequence[str], mtu: int = 1500) -> Iterator[Switched]:
    """Machines with these addresses ("172.21.32.11/24") on interfaces `uplink`."""
    with contextlib.ExitStack() as stack:
        switch = _start("switch", "")
        stack.callback(switch.kill)
        switch.run("ip", "link", "add", "lan0", "type", "bridge")
        switch.run("ip", "link", "set", "lan0", "up")
        found = Switched()
        for number, address in enumerate(addresses):
            box = _start(f"m{number}", address)
            stack.callback(box.kill)
            subprocess.run(
                [
                    *["ip", "link", "add", f"x{box.pid}", "mtu", str(mtu)],
                    *["netns", str(switch.pid), "type", "veth"],
                    *["peer", "name", "uplink", "netns", str(box.pid)],
                ],
                check=True,
            )
            switch.run("ip", "link", "set", f"x{box.pid}", "master", "lan0", "up")
            box.run("ip", "link", "set", "uplink", "mtu", str(mtu), "up")
            box.run("ip", "address", "add", address, "dev", "uplink")
            found.boxes.append(box)
        yield found


def _start(name: str, address: str) -> Box:
    command = ["unshare", "-n", "-m", "-p", "-f", "--mount-proc", "--kill-child", "sh", "-c"]
    starter = subprocess.Popen([*command, _START], stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    assert starter.stdout.readline() == "ready\n"
    with open(f"/proc/{starter.pid}/task/{starter.pid}/children") as file:
        pid = int(file.read().split()[0])
    return Box(name, pid, starter, address)
