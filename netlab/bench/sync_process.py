"""A proxy that stays, in a process of its own, so that its time and memory can be told.

`python -m netlab.bench.sync_process NODE-NAMESPACE MODE SERVICES ENDPOINTS` enters a node of a lab
and then does what the lines on its standard input say, answering each with a line: `Done` as JSON.
It ends with its input.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator

import msgspec
from msgspec.structs import replace

from netlab.bench import clusters
from netlab.bench.machine import kernel_memory_kib
from netlab.bench.options import modes
from netlab.datapath.services.endpoints import ServiceObjects, service_objects
from netlab.datapath.services.modes import mode_of
from netlab.datapath.services.proxier import ServiceChanges
from netlab.datapath.state import BalancingUpdate, Change, Rules, Ruleset, Tables, Update
from netlab.kernel import nft
from netlab.kernel.syscalls import die_with_parent
from netlab.lab import rules
from netlab.problems import NetlabError
from netlab.topology.model import Lab

MANY = 100
_SETTLED_KIB = 256
_PATIENCE_S, _PAUSE_S = 2.0, 0.02


class Done(msgspec.Struct):
    """What one thing took."""

    seconds: float
    cpu_s: float  # of the process and of what it started
    operations: int  # lines of input for the tools
    kernel_kib: int | None = None  # what the kernel has more of afterwards
    peak_kib: int | None = None  # the most memory of what it started
    resident_kib: int | None = (
        None  # what the process has afterwards, with the one that stays by it
    )
    problem: str = ""


class Proxy:
    """The rules of a lab's client node, changed as kube-proxy would."""

    def __init__(self, namespace: str, lab: Lab) -> None:
        self._namespace = namespace
        self._mode = mode_of(lab)
        self._lab = lab
        self._node = lab.node(clusters.CLIENT_NODE)
        self._objects = service_objects(lab)
        self._keys = list(self._objects)
        self._replaced: set[str] = set()
        self._turn = 0
        count = len(self._keys)
        self._stride = next(n for n in range(count // 7 + 1, count + 2) if math.gcd(n, count) == 1)
        self._session: nft.Session | None = None
        self._loaded: Rules | None = None
        assert self._mode.proxier
        self._proxier = self._mode.proxier(lab, self._node)

    def load(self) -> Done:
        """All rules, rendered and loaded into a node without any."""
        self._clear()
        before = kernel_memory_kib()
        with _watched(self._session) as done:
            assert self._mode.proxier
            self._proxier = self._mode.proxier(self._lab, self._node)
            whole = self._proxier.whole()
            self._make(whole)
        self._loaded = whole
        self._replaced.clear()
        done.operations = _lines(whole)
        done.kernel_kib = max(0, kernel_memory_kib() - before)
        done.peak_kib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        return done

    def replace(self) -> Done:
        """One of a Service's endpoints is another one."""
        return self._change(self._toggled(self._next()))

    def add(self) -> Done:
        """One Service more; it goes before."""
        key = self._next()
        self._change({key: None})
        return self._change({key: self._now(key)})

    def remove(self) -> Done:
        """One Service less; it comes back afterwards."""
        key = self._next()
        done = self._change({key: None})
        self._change({key: self._now(key)})
        return done

    def many(self) -> Done:
        """One endpoint of each of a hundred Services, in one change."""
        changes: dict[str, ServiceObjects | None] = {}
        for _ in range(min(MANY, len(self._keys))):
            changes |= self._toggled(self._next())
        return self._change(changes)

    def _next(self) -> str:
        """Services in turns, with strides over the list that meet each of them once."""
        self._turn += 1
        return self._keys[self._turn * self._stride % len(self._keys)]

    def _toggled(self, key: str) -> dict[str, ServiceObjects]:
        self._replaced ^= {key}
        return {key: self._now(key)}

    def _now(self, key: str) -> ServiceObjects:
        """The Service as it is, with its last endpoint replaced or not."""
        objects = self._objects[key]
        if key not in self._replaced:
            return objects
        (entry,) = objects.endpoints
        *kept, last = entry.endpoints
        other = replace(last, port=last.port % 65535 + 1)
        return objects._replace(endpoints=(replace(entry, endpoints=(*kept, other)),))

    def _change(self, changes: ServiceChanges) -> Done:
        if isinstance(self._loaded, Tables) and self._session is None:
            self._session = nft.Session(self._namespace)
            self._session.change("\n")  # what it reads first is not a change's
        with _watched(self._session) as done:
            update = self._proxier.update(changes)
            item: Rules | Update | BalancingUpdate = (
                self._proxier.whole() if update is None else update
            )
            if isinstance(item, Update) and self._session and not item.forget:
                self._session.change(item.tables)
            elif item:
                self._make(item)
        done.operations = _lines(item)
        done.resident_kib = _status("self", "VmRSS") + self._of_session()
        return done

    def _make(self, item: Rules | Update | BalancingUpdate) -> None:
        rules.make(self._lab.name, Change(verb="set", namespace=self._namespace, item=item))

    def _of_session(self) -> int:
        """What the child does not share with this process."""
        return _rollup(self._session.pid) if self._session else 0

    def _clear(self) -> None:
        """Leave no rules, and wait until the kernel has given their memory back."""
        if self._session:
            self._session.close()
            self._session = None
        match self._loaded:
            case Ruleset(backend=backend):  # to remove chain by chain takes as long as a load
                empty = "".join(f"*{table}\nCOMMIT\n" for table in ("mangle", "filter", "nat"))
                self._make(Ruleset(ipv4=empty, ipv6=empty, backend=backend))
            case None:
                pass
            case _:
                rules.clear(self._lab.name, self._namespace)
        self._loaded = None
        deadline = time.monotonic() + _PATIENCE_S
        last = kernel_memory_kib()
        while time.monotonic() < deadline:
            time.sleep(_PAUSE_S)
            now = kernel_memory_kib()
            if abs(now - last) < _SETTLED_KIB:
                return
            last = now


@contextlib.contextmanager
def _watched(session: nft.Session | None) -> Iterator[Done]:
    """Time and processor time of the body."""
    done = Done(0.0, 0.0, 0)
    cpu = _cpu_s(session)
    start = time.perf_counter()
    yield done
    done.seconds = time.perf_counter() - start
    done.cpu_s = _cpu_s(session) - cpu


def _cpu_s(session: nft.Session | None) -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    total = sum(each.ru_utime + each.ru_stime for each in used)
    if session:
        with open(f"/proc/{session.pid}/schedstat") as file:  # nanoseconds; Documentation/scheduler
            total += int(file.read().split()[0]) / 1e9
    return total


def _lines(item: Rules | Update | BalancingUpdate) -> int:
    """Lines of input for the tools; what is told by netlink counts one for each object."""
    return item.transaction.count("\n") if isinstance(item, Tables) else _parts(item)


def _parts(item: object) -> int:
    if isinstance(item, str):
        return item.count("\n")
    if isinstance(item, tuple):
        return sum(max(1, _parts(each)) for each in item)
    if isinstance(item, msgspec.Struct):
        return sum(_parts(getattr(item, name)) for name in item.__struct_fields__)
    return 0


def _status(pid: int | str, field: str) -> int:
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field))


def _rollup(pid: int) -> int:
    with open(f"/proc/{pid}/smaps_rollup") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith("Private_"))


def _serve(proxy: Proxy) -> None:
    jobs: dict[str, Callable[[], Done]] = {
        "load": proxy.load,
        "replace": proxy.replace,
        "add": proxy.add,
        "remove": proxy.remove,
        "many": proxy.many,
    }
    for line in sys.stdin:
        try:
            done = jobs[line.strip()]()
        except NetlabError as error:
            done = Done(0, 0, 0, problem="; ".join(each.message for each in error.problems))
        sys.stdout.write(msgspec.json.encode(done).decode() + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    die_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    gc.disable()
    namespace, mode, services, endpoints = sys.argv[1:5]
    lab = clusters.lab(namespace.partition(":")[0], modes(mode)[0], int(services), int(endpoints))
    sys.stdout.write(f"{os.getpid()}\n")
    sys.stdout.flush()
    _serve(Proxy(namespace, lab))
