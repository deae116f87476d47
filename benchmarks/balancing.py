"""Virtual servers of many Services on one node, loaded and changed, beside the native tools.

`python -m benchmarks.balancing FEW MANY` measures both numbers of Services in turns, in namespaces
of its own, and prints a list of `Measured` as JSON.  It needs a kernel with IPVS: `netlab vm --`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import msgspec
from msgspec.structs import replace

from benchmarks.services import lab as services_lab
from netlab.datapath.balancing_commands import balancing_inputs
from netlab.datapath.services import ipvs as rendering
from netlab.datapath.services.endpoints import service_objects
from netlab.datapath.services.ipvs_proxier import IPVSProxier
from netlab.datapath.services.proxier import ServiceChanges
from netlab.datapath.state import Balancing
from netlab.kernel import ipvs, xtables
from netlab.kernel.namespaces import entered, scratch

LOADS, CHANGES = 3, 9


class Measured(msgspec.Struct):
    """Milliseconds; medians, but for loads the least."""

    services: int
    load: float  # rendered, and everything but the rules made
    tools: float  # ipset restore, ip -batch and ipvsadm -R with the same
    rules: float  # what iptables-restore takes
    change: float  # one endpoint replaced: what to change, and changed


def measured(numbers: Sequence[int]) -> list[Measured]:
    """All numbers of Services, the changes in turns."""
    nodes = [_Node(number) for number in numbers]
    for _ in range(CHANGES):
        for node in nodes:
            node.change()
    found = [node.measured() for node in nodes]
    for node in nodes:
        node.close()
    return found


class _Node:
    def __init__(self, services: int) -> None:
        self._services = services
        self._lab = services_lab(services)
        self._lab = replace(self._lab, service_proxy=replace(self._lab.service_proxy, mode="ipvs"))
        self._node = self._lab.nodes[0]
        self._proxier = IPVSProxier(self._lab, self._node)
        self._whole = self._proxier.whole()
        self._loads = [_timed(self._load_and_forget) for _ in range(LOADS)]
        self._tools = [_by_tools(self._whole) for _ in range(LOADS)]
        self._scratch = scratch()
        self._namespace = self._scratch.__enter__()
        ipvs.apply(self._namespace, self._whole, "bench")
        self._rules = _timed(lambda: xtables.restore(self._namespace, self._whole.rules))
        self._changes: list[float] = []
        self._turn = 0

    def close(self) -> None:
        self._scratch.__exit__(None, None, None)

    def _load_and_forget(self) -> float:
        with scratch() as namespace:
            start = time.perf_counter()
            whole = rendering.render(self._lab, self._node)
            ipvs.apply(namespace, whole, "bench")
            return time.perf_counter() - start

    def change(self) -> None:
        """One endpoint of a Service in the middle is replaced."""
        key = f"demo/service-{self._services // 2}"
        objects = service_objects(self._lab)[key]
        (entry,) = objects.endpoints
        self._turn += 1
        new = replace(entry.endpoints[0], address=f"10.140.9.{self._turn}")
        behind = replace(entry, endpoints=(new, *entry.endpoints[1:]))
        changes: ServiceChanges = {key: objects._replace(endpoints=(behind,))}
        start = time.perf_counter()
        update = self._proxier.update(changes)
        assert update
        ipvs.change(self._namespace, update, "bench")
        self._changes.append(time.perf_counter() - start)

    def measured(self) -> Measured:
        return Measured(
            services=self._services,
            load=1000 * min(self._loads),
            tools=1000 * min(self._tools),
            rules=1000 * self._rules,
            change=1000 * median(self._changes[1:]),  # the first one may look at all
        )


def _timed(work: Callable[[], float | None]) -> float:
    start = time.perf_counter()
    own = work()
    return time.perf_counter() - start if own is None else own


def _by_tools(whole: Balancing) -> float:
    """The same by ipset, ip and ipvsadm, each of which reads a file."""
    with tempfile.TemporaryDirectory() as directory, scratch() as namespace:
        files = []
        for number, (command, text) in enumerate(balancing_inputs(whole)):
            file = Path(directory) / str(number)
            file.write_text(text)
            files.append((command, file))
        start = time.perf_counter()
        with entered(namespace):
            subprocess.run(["ip", "link", "add", whole.device, "type", "dummy"], check=True)
            for command, file in files:
                with file.open() as source:
                    subprocess.run(command, stdin=source, check=True)
        return time.perf_counter() - start


if __name__ == "__main__":
    sys.stdout.buffer.write(msgspec.json.encode(measured([int(each) for each in sys.argv[1:]])))
