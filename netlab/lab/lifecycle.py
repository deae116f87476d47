"""The life of a lab: up, down, and how it is meanwhile."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from netlab.datapath.build import build
from netlab.datapath.plan import plan
from netlab.datapath.services.iptables_save import same
from netlab.datapath.state import Change, Found, LabState, NodeState, Ruleset
from netlab.kernel import converge, namespaces, observe, xtables
from netlab.lab import control, record
from netlab.problems import Exit, NetlabError, Problem
from netlab.topology.model import Lab


@dataclass(frozen=True, slots=True)
class Outcome:
    """What `up` did (or, asked for a dry run, would do)."""

    state: LabState
    changes: tuple[Change, ...]
    unserved: tuple[control.Unserved, ...]
    created: bool  # there was no lab of that name before
    elapsed_s: float


def up(lab: Lab, dry_run: bool = False) -> Outcome:
    """Make the kernel hold this lab, and return when everything in it answers.

    Only what differs is changed.  If it fails or is interrupted and there was no such lab before,
    what was made is removed again.  Raises NetlabError.
    """
    start = time.perf_counter()
    state = build(lab)
    if dry_run:
        found = _found(state)
        changes = _changes(state, found)
        return Outcome(state, tuple(changes), (), not found, time.perf_counter() - start)
    try:
        with namespaces.run_dir(), record.locked(lab.name):
            found = _found(state)
            try:
                changes, unserved = _converge(lab, state, found)
            except BaseException:
                if not found:
                    _remove(lab.name)
                raise
    except BaseException:
        namespaces.release_run_dir()
        raise
    return Outcome(state, tuple(changes), unserved, not found, time.perf_counter() - start)


def down(name: str) -> int:
    """Remove everything of a lab that carries its mark; returns how many namespaces that were."""
    if not namespaces.names_of(name) and not _has_processes(name):
        with contextlib.suppress(OSError):
            record.remove(name)
        return 0
    with record.locked(name):
        removed = _remove(name)
    namespaces.release_run_dir()
    return removed


def running() -> list[str]:
    """Names of all labs of which anything exists, sorted."""
    return sorted({*namespaces.labs(), *control.running()})


def differences(lab: Lab) -> list[Change]:
    """What `up` would change now."""
    state = build(lab)
    return _changes(state, _found(state))


def _converge(
    lab: Lab, state: LabState, found: Mapping[str, Found]
) -> tuple[list[Change], tuple[control.Unserved, ...]]:
    data = record.encode(lab)
    record.write(lab.name, data)
    init = control.start(lab.name)
    changes = _changes(state, found)
    loads = _RuleLoads(state, changes)
    try:
        loads.begin(name for name in found)
        links = [change for change in changes if not isinstance(change.item, Ruleset)]
        converge.carry_out(lab.name, links, state.namespaces(), found, loads.begin_one)
    finally:
        problems = loads.finish()
    if problems:
        raise NetlabError(problems, Exit.MACHINE)
    init.declare(data)
    return changes, init.serve(state.servers)


def _found(state: LabState) -> dict[str, Found]:
    """What is there of this lab, by namespace.  NetlabError if a name it needs is not ours."""
    desired = {namespace.name: namespace for namespace in state.namespaces()}
    marks = namespaces.mark(state.lab, "")
    found: dict[str, Found] = {}
    foreign: list[Problem] = []
    for name in namespaces.names_of(state.lab):
        if namespaces.is_ours(name, state.lab):
            if namespaces.is_mounted(name):
                found[name] = observe.observe(name, marks, desired.get(name))
        elif name in desired:
            foreign.append(
                Problem(
                    "foreign-namespace",
                    f"{namespaces.path(name)} exists and was not made by netlab",
                    hint=f"if nobody needs it: `ip netns del {name}`; or give the lab another name",
                )
            )
    if foreign:
        raise NetlabError(foreign, Exit.MACHINE)
    return found


def _changes(state: LabState, found: Mapping[str, Found]) -> list[Change]:
    rules = [
        Change(verb="set" if node.namespace.name in found else "add", namespace=name, item=wanted)
        for node in _stale_rules(state.nodes, found)
        if (name := node.namespace.name) and (wanted := node.rules)
    ]
    return [*plan(state, found), *rules]


def _stale_rules(nodes: Sequence[NodeState], found: Mapping[str, Found]) -> list[NodeState]:
    """Nodes whose rules are not what they should be."""
    with_rules = [node for node in nodes if node.rules]
    old = [node for node in with_rules if node.namespace.name in found]
    saved: dict[str, tuple[str, str]] = {}

    def read(node: NodeState) -> None:
        with contextlib.suppress(NetlabError):
            saved[node.name] = xtables.save(node.namespace.name)

    threads = [threading.Thread(target=read, args=(node,)) for node in old]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [
        node
        for node in with_rules
        if node.rules
        and not (
            node.name in saved
            and same(node.rules.ipv4, saved[node.name][0])
            and same(node.rules.ipv6, saved[node.name][1])
        )
    ]


class _RuleLoads:
    """Loads of rules, each in a thread of its own: the kernel makes them wait, not the CPU."""

    def __init__(self, state: LabState, changes: Iterable[Change]) -> None:
        self._rules = {c.namespace: c.item for c in changes if isinstance(c.item, Ruleset)}
        self._threads: list[threading.Thread] = []
        self._problems: list[Problem] = []

    def begin_one(self, namespace: str) -> None:
        rules = self._rules.pop(namespace, None)
        if rules is None:
            return

        def load() -> None:
            try:
                xtables.restore(namespace, rules)
            except NetlabError as error:
                self._problems += error.problems

        thread = threading.Thread(target=load, name=f"rules of {namespace}")
        thread.start()
        self._threads.append(thread)

    def begin(self, names: Iterable[str]) -> None:
        for name in names:
            self.begin_one(name)

    def finish(self) -> list[Problem]:
        for thread in self._threads:
            thread.join()
        return self._problems


def _has_processes(name: str) -> bool:
    return control.connect(name) is not None


def _remove(name: str) -> int:
    """Everything of a lab, processes first; the caller holds the lock."""
    init = control.connect(name)
    if init:
        init.shutdown()
    ours = [found for found in namespaces.names_of(name) if namespaces.is_ours(found, name)]
    for found in ours:
        namespaces.remove(found)
    record.remove(name)
    return len(ours)
