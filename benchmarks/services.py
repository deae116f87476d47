"""Rules of many Services on one node, loaded and then changed bit by bit.

`python -m benchmarks.services LAYOUT SERVICES` measures it in a process and a network namespace of
its own, so that its memory is that of a proxy which stays, and prints a `Measured` as JSON.
"""

from __future__ import annotations

import gc
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Protocol

import msgspec
from msgspec.structs import replace

from netlab.datapath.services.endpoints import ServiceObjects, service_objects
from netlab.datapath.services.modes import MODES
from netlab.datapath.services.proxier import Proxier, ServiceChanges
from netlab.datapath.state import Rules, Ruleset, Tables, Update
from netlab.kernel import nft, xtables
from netlab.kernel.namespaces import open_current
from netlab.kernel.syscalls import CLONE_NEWNET, unshare
from netlab.topology.model import (
    Endpoint,
    IPTablesBackend,
    Lab,
    Node,
    ProxyMode,
    Service,
    ServiceEndpoints,
    ServicePort,
    ServiceProxy,
    Underlay,
)

NODES = 20


def lab(services: int) -> Lab:
    """Services of one port and two endpoints, which are spread over the nodes."""
    return Lab(
        name="bench",
        pod_cidr="10.128.0.0/10",
        service_cidrs=("10.96.0.0/12",),
        underlay=Underlay(cidr="172.21.32.0/24", gateway="172.21.32.1"),
        service_proxy=ServiceProxy(clusterCIDR="10.128.0.0/10"),
        nodes=tuple(
            Node(
                name=f"node{number}",
                address=f"172.21.32.{number + 11}",
                pod_cidr=f"10.{128 + number}.0.0/16",
            )
            for number in range(NODES)
        ),
        services=tuple(
            Service(
                namespace="demo",
                name=f"service-{i}",
                cluster_ip=f"10.{96 + (i >> 16)}.{i >> 8 & 255}.{i & 255}",
                ports=(ServicePort(name="http", port=80, target_port=8080),),
            )
            for i in range(1, services + 1)
        ),
        endpoints=tuple(
            ServiceEndpoints(
                namespace="demo",
                service=f"service-{i}",
                port_name="http",
                protocol="TCP",
                endpoints=(_endpoint(i, 0), _endpoint(i, 1)),
            )
            for i in range(1, services + 1)
        ),
    )


def _endpoint(service: int, place: int) -> Endpoint:
    node = (service + 7 * place) % NODES
    number = service // NODES * 2 + place
    address = f"10.{128 + node}.{number >> 8}.{number & 255}"
    return Endpoint(address=address, port=8080, node=f"node{node}")


class Measured(msgspec.Struct):
    """Milliseconds, medians of several where there are several, and megabytes."""

    mode: str
    services: int
    load: float  # rendered and loaded
    tool_load: float  # the same rules by the native tool, from a file
    first: float  # the first change after the load
    changes: dict[str, float]  # what to write, and written, in a process that stays
    tool_changes: dict[str, float]  # the native tool with the same input
    commands: dict[str, int]  # lines of that input
    resident: float  # of the process, when it has loaded and changed
    sender: float  # what its child has for itself
    loader: float  # the most that the child had which loaded


def measured(mode: str, services: int) -> Measured:
    """Run the measurement as a process."""
    command = [sys.executable, "-m", "benchmarks.services", mode, str(services)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    return msgspec.json.decode(output, type=Measured)


class Backend(Protocol):
    """How rules of a sort get into the namespace that the process is in."""

    rounds: int  # of each change
    pid: int  # of what stays to send changes

    def load(self, rules: Rules) -> None:
        """Load rules as netlab does."""

    def change(self, update: Update) -> None:
        """Change rules as a process that stays does."""

    def tool_load(self, rules: Rules) -> Callable[[], object]:
        """A call that loads them with the native tool; what it reads is written before."""

    def tool_change(self, update: Update) -> Callable[[], object]:
        """The same for a change."""

    def clear(self) -> None:
        """Remove all rules."""


class Nft:
    """`nft -f`, and sessions."""

    rounds = 15

    def __init__(self, directory: str) -> None:
        self._file = Path(directory) / "nft"
        self._here = open_current()
        self._session: nft.Session | None = None

    @property
    def pid(self) -> int:
        return self._session.pid if self._session else 0

    def load(self, rules: Rules) -> None:
        assert isinstance(rules, Tables)
        nft.load(self._here, rules)

    def change(self, update: Update) -> None:
        if self._session is None:
            self._session = nft.Session(self._here)
        self._session.change(update.tables)

    def tool_load(self, rules: Rules) -> Callable[[], object]:
        assert isinstance(rules, Tables)
        return self._tool(rules.transaction)

    def tool_change(self, update: Update) -> Callable[[], object]:
        return self._tool(update.tables)

    def _tool(self, text: str) -> Callable[[], object]:
        self._file.write_text(text)
        return lambda: subprocess.run(["nft", "-f", self._file], check=True)

    def clear(self) -> None:
        nft.delete(self._here, tuple(nft.names(self._here)))


class Xtables:
    """`iptables-restore` of one of its backends; nothing stays."""

    rounds = 5  # each takes as long as the tool does
    pid = 0

    def __init__(self, directory: str, backend: IPTablesBackend) -> None:
        self._file = Path(directory) / "rules"
        self._here = open_current()
        self._backend = backend

    def load(self, rules: Rules) -> None:
        assert isinstance(rules, Ruleset)
        xtables.restore(self._here, replace(rules, backend=self._backend))

    def change(self, update: Update) -> None:
        ruleset = Ruleset(ipv4=update.ipv4, ipv6=update.ipv6, backend=self._backend)
        xtables.restore(self._here, ruleset, flush=False)

    def tool_load(self, rules: Rules) -> Callable[[], object]:
        """Without `--noflush`, which is its best time where tables are empty."""
        assert isinstance(rules, Ruleset)
        return self._tool(rules.ipv4)

    def tool_change(self, update: Update) -> Callable[[], object]:
        return self._tool(update.ipv4, "--noflush")

    def _tool(self, text: str, *options: str) -> Callable[[], object]:
        self._file.write_text(text)
        command = [f"iptables-{self._backend}-restore", *options, self._file]
        return lambda: subprocess.run(command, check=True)

    def clear(self) -> None:
        empty = "".join(f"*{table}\nCOMMIT\n" for table in ("mangle", "filter", "nat"))
        self.load(Ruleset(ipv4=empty, ipv6=empty))


LAYOUTS: dict[str, tuple[ProxyMode, Callable[[str], Backend]]] = {
    "nftables": ("nftables", Nft),
    "nftables-flat": ("nftables-flat", Nft),
    "iptables-nft": ("iptables", lambda directory: Xtables(directory, "nft")),
    "iptables-legacy": ("iptables", lambda directory: Xtables(directory, "legacy")),
}
"""Modes, and what loads their rules."""


def measure(layout: str, services: int, directory: str) -> Measured:
    """In a fresh network namespace, which the process stays in."""
    unshare(CLONE_NEWNET)
    gc.disable()
    mode, loads = LAYOUTS[layout]
    backend = loads(directory)
    rounds = backend.rounds
    made = lab(services)
    make = MODES[mode].proxier
    assert make
    start = time.perf_counter()
    proxier = make(made, made.nodes[0])
    rules = proxier.whole()
    backend.load(rules)
    load = _since(start)
    loader = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    backend.clear()
    tool_load = _timed(backend.tool_load(rules))
    del rules

    some = dict(list(service_objects(made).items())[: (2 * rounds + 1) * len(KINDS)])
    del made
    keys = iter(some)
    first = _changed(proxier, backend, _replaced(some, next(keys)))[0]
    changes, tool_changes, commands = {}, {}, {}
    for kind, (prepared, change) in KINDS.items():
        taken = []
        for _ in range(rounds):
            key = next(keys)
            if prepared:
                _changed(proxier, backend, prepared(some, key))
            spent, update = _changed(proxier, backend, change(some, key))
            taken.append(spent)
        changes[kind] = median(taken)
        commands[kind] = (update.ipv4 + update.ipv6 + update.tables).count("\n")
    resident, sender = _status("self", "VmRSS"), _own(backend.pid)
    for kind, (prepared, change) in KINDS.items():
        taken = []
        for _ in range(rounds):
            key = next(keys)
            if prepared:
                _changed(proxier, backend, prepared(some, key))
            told = proxier.update(change(some, key))
            assert told
            taken.append(_timed(backend.tool_change(told)))
        tool_changes[kind] = median(taken)
    return Measured(
        mode=layout,
        services=services,
        load=load,
        tool_load=tool_load,
        first=first,
        changes=changes,
        tool_changes=tool_changes,
        commands=commands,
        resident=resident,
        sender=sender,
        loader=loader,
    )


Some = dict[str, ServiceObjects]


def _replaced(some: Some, key: str) -> ServiceChanges:
    """Another endpoint in place of the second."""
    first, second = some[key].endpoints[0].endpoints
    return _with(some, key, (first, replace(second, port=second.port + 1)))


def _extended(some: Some, key: str) -> ServiceChanges:
    """A third endpoint."""
    first, second = some[key].endpoints[0].endpoints
    return _with(some, key, (first, second, replace(first, port=first.port + 1)))


def _with(some: Some, key: str, endpoints: tuple[Endpoint, ...]) -> ServiceChanges:
    (entry,) = some[key].endpoints
    return {key: some[key]._replace(endpoints=(replace(entry, endpoints=endpoints),))}


KINDS: dict[
    str,
    tuple[Callable[[Some, str], ServiceChanges] | None, Callable[[Some, str], ServiceChanges]],
] = {
    "one endpoint replaced": (None, _replaced),
    "one endpoint added": (None, _extended),
    "one Service added": (lambda some, key: {key: None}, lambda some, key: {key: some[key]}),
}
"""What is measured, and what makes ready for it."""


def _changed(proxier: Proxier, backend: Backend, changes: ServiceChanges) -> tuple[float, Update]:
    start = time.perf_counter()
    update = proxier.update(changes)
    assert update
    backend.change(update)
    return _since(start), update


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return _since(start)


def _since(start: float) -> float:
    return (time.perf_counter() - start) * 1e3


def _status(pid: int | str, field: str) -> float:
    return next(_kib(f"/proc/{pid}/status", field))


def _own(pid: int) -> float:
    """What a child does not share with its parent."""
    return sum(_kib(f"/proc/{pid}/smaps_rollup", "Private_")) if pid else 0


def _kib(path: str, field: str) -> Iterator[float]:
    for line in Path(path).read_text().splitlines():
        if line.startswith(field):
            yield int(line.split()[1]) / 1024


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        os.chdir(directory)
        found = measure(sys.argv[1], int(sys.argv[2]), directory)
    sys.stdout.buffer.write(msgspec.json.encode(found))
