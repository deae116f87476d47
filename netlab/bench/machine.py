"""What kind of machine this is, as far as it matters to figures."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

from netlab.bench.model import Machine

_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
# How each tells its version.
_TOOLS = {
    "nft": ("nft", "--version"),
    "iptables": ("iptables", "--version"),
    "iperf3": ("iperf3", "--version"),
}


def machine() -> Machine:
    """The machine that we are on, as it is now."""
    told = os.uname()
    return Machine(
        system=f"{told.sysname} {told.release} {told.version}",
        architecture=told.machine,
        processor=_processor(),
        processors=os.cpu_count() or 1,
        caches=_caches(),
        memory_mib=memory_kib("MemTotal") // 1024,
        governor=_read(_GOVERNOR),
        virtualisation=_virtualisation(),
        load_before=round(os.getloadavg()[0], 2),
        tools={
            "python": platform.python_version(),
            "netlab": version("netlab-datapath"),
            **{name: said for name, command in _TOOLS.items() if (said := _version(command))},
        },
    )


def memory_kib(field: str) -> int:
    """A line of /proc/meminfo, "MemAvailable"; 0 if this kernel has no such."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    return 0


def kernel_memory_kib() -> int:
    """What the kernel holds for itself of the kinds that rules lie in: slab, percpu, vmalloc."""
    return sum(memory_kib(field) for field in ("Slab", "Percpu", "VmallocUsed"))


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.lower().startswith(("model name", "cpu model")):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _caches() -> str:
    """Caches of data of the first processor."""
    found = []
    for index in sorted(_CACHES.glob("index*")):
        level, kind, size = (_read(index / name) for name in ("level", "type", "size"))
        if level and size and kind != "Instruction":
            found.append(f"L{level}{'d' if kind == 'Data' else ''} {size}")
    return ", ".join(found)


def _virtualisation() -> str:
    """As systemd tells it, "docker in kvm", or else what the processor does."""
    program = shutil.which("systemd-detect-virt")
    if program:
        said = [
            subprocess.run([program, which], capture_output=True, text=True).stdout.strip()
            for which in ("--container", "--vm")
        ]
        return " in ".join(word for word in said if word not in ("", "none")) or "none"
    flags = Path("/proc/cpuinfo").read_text()
    return "a virtual machine" if " hypervisor" in flags else "unknown"


def _version(command: tuple[str, ...]) -> str:
    program = shutil.which(command[0]) or shutil.which(command[0], path="/usr/sbin:/sbin")
    if program is None:
        return ""
    try:
        done = subprocess.run([program, *command[1:]], capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.partition("\n")[0].strip()


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
