"""The life of a lab: up, changes while it is up, down, and how it is meanwhile."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from netlab.datapath import faults, name_files, probes
from netlab.datapath.build import build
from netlab.datapath.plan import caused, plan
from netlab.datapath.state import Change, Found, LabState, Namespace, NodeState
from netlab.kernel import adopted, converge, namespaces, observe
from netlab.lab import connections, control, named, readiness, ready, record, rules
from netlab.problems import Exit, NetlabError, Problem
from netlab.topology.model import Fault, Lab

if TYPE_CHECKING:
    from netlab.lab.edits import Changed


@dataclass(frozen=True, slots=True)
class Outcome:
    """What `up` or a change did (or, asked for a dry run, would do)."""

    state: LabState
    changes: tuple[Change, ...]
    unserved: tuple[control.Unserved, ...]
    created: bool  # there was no lab of that name before
    restarted: bool  # the lab's processes had ended
    elapsed_s: float
    before: Lab | None  # what was declared until then
    unready: tuple[ready.Lacking, ...] = ()  # programs that have not done their part yet


def up(lab: Lab, dry_run: bool = False, tell: Callable[[str], None] = lambda line: None) -> Outcome:
    """Make the kernel hold this lab, and return when everything in it answers.

    `tell` gets a line for each thing that takes its time.  Only what differs is changed.  If it
    fails or is interrupted and there was no such lab before, what was made is removed again.
    Raises NetlabError.
    """
    start = time.perf_counter()
    rules.require(lab)
    if dry_run:
        before = record.read(lab.name)
        lab = readiness.at_start(lab, before)
        state = _built(lab)
        state = faults.without_faults(state, before)
        found = _found(state)
        changes = _changes(lab, state, found)
        elapsed_s = time.perf_counter() - start
        return Outcome(state, tuple(changes), (), not found, False, elapsed_s, before)
    try:
        with namespaces.run_dir(), record.locked(lab.name):
            before = record.read(lab.name)
            lab = readiness.at_start(lab, before)
            state = faults.without_faults(_built(lab), before)
            found = _found(state)
            restarted = bool(found) and not _has_processes(lab.name)
            try:
                known = before if record.is_settled(lab.name) else None
                changes = _changes(lab, state, found)
                unserved = _converge(lab, state, found, known, changes)
                unready = ready.await_ready(state.processes, tell)
            except BaseException:
                if not found:
                    _remove(lab.name)
                raise
    except BaseException:
        namespaces.release_run_dir()
        raise
    readiness.await_ready(lab, tell)
    elapsed_s = time.perf_counter() - start
    return Outcome(
        state, tuple(changes), unserved, not found, restarted, elapsed_s, before, unready
    )


def change(
    name: str,
    decide: Callable[[Lab], Changed],
    dry_run: bool = False,
    await_programs: bool = True,
) -> tuple[Changed, Outcome]:
    """Make a lab that is up what `decide` makes of it.  Only what differs is touched.

    Without `await_programs` it does not wait for new ones, while other commands do for this one.

    If that fails or is interrupted, the lab is made what it was.  Raises NetlabError;
    LabNotRunning if nobody knows what was declared.
    """
    start = time.perf_counter()
    named.refuse_machines(name)
    before = _declared(name)
    if dry_run:
        changed = _decided(decide, before)
        known = before if record.is_settled(name) else None
        base = _base(known, changed.lab)
        state = faults.without_faults(_built(changed.lab, rules=base is None), before)
        changes = _changes(changed.lab, state, _found(state), known, base)
        elapsed_s = time.perf_counter() - start
        return changed, Outcome(state, tuple(changes), (), False, False, elapsed_s, before)
    with namespaces.run_dir(), record.locked(name):
        try:
            before = _declared(name)  # another command may have been at work until now
        except control.LabNotRunning:
            record.remove(name)
            raise
        changed = _decided(decide, before)
        rules.require(changed.lab)
        known = before if record.is_settled(name) else None
        base = _base(known, changed.lab)
        state = faults.without_faults(_built(changed.lab, rules=base is None), before)
        found = _found(state)
        restarted = not _has_processes(name)
        try:
            changes = _changes(changed.lab, state, found, known, base)
            unserved = _converge(changed.lab, state, found, known, changes)
            unready = ready.await_ready(state.processes) if await_programs else ()
        except BaseException:
            was = faults.without_faults(_built(before), changed.lab)
            with contextlib.suppress(NetlabError, OSError):
                now = _found(was)
                _converge(before, was, now, None, _changes(before, was, now))
            raise
    elapsed_s = time.perf_counter() - start
    done = tuple(changes)
    return changed, Outcome(state, done, unserved, False, restarted, elapsed_s, before, unready)


def down(name: str) -> int:
    """Remove everything of a lab that carries its mark; returns how many namespaces that were."""
    nothing = not namespaces.names_of(name) and not _has_processes(name)
    if nothing and name not in adopted.owners():
        with contextlib.suppress(OSError):
            record.remove(name)
        return 0
    namespaces.require_privilege()
    with record.locked(name):
        removed = _remove(name)
    namespaces.release_run_dir()
    return removed


def running() -> list[str]:
    """Names of all labs of which anything exists, here or on machines noted here; sorted."""
    return sorted({*namespaces.labs(), *control.running(), *record.on_machines()})


def differences(lab: Lab) -> list[Change]:
    """What `up` would change now."""
    state = _built(lab)
    return _changes(lab, state, _found(state))


def lacking(lab: Lab) -> tuple[ready.Lacking, ...]:
    """What the lab's programs should have brought about and have not."""
    return ready.lacking(_built(lab, rules=False).processes)


def _converge(
    lab: Lab,
    state: LabState,
    found: Mapping[str, Found],
    known: Lab | None,
    changes: Sequence[Change],
) -> tuple[control.Unserved, ...]:
    """Make the kernel hold a lab, by these changes; `known` is what it is known to hold."""
    data = record.encode(lab)
    record.write(lab.name, data)
    init = control.start(lab.name)
    faulty = faults.faulty(lab)
    probed, views = probes.of_lab(lab), name_files.views(lab)

    def serve() -> tuple[control.Unserved, ...]:
        return init.serve(state.servers, state.processes, views, probed, lab.unready)

    loads = rules.Loads(changes, faulty)
    # Whom the rules of a lab in use lead to has to answer already.
    first = bool(found) and any(server.namespace not in found for server in state.servers)
    try:
        for name in () if first else found:
            loads.begin(name)
        links = [change for change in changes if not rules.concerns(change)]
        converge.carry_out(lab.name, links, state.namespaces(), found, loads.begin)
        if first:
            serve()
        loads.begin_rest()
    finally:
        problems = loads.finish()
    if problems:
        raise NetlabError(problems, Exit.MACHINE)
    init.finish_later(loads.draining)
    connections.forget_stale(known and faults.faulty(known), faulty, found)
    if known is None or known.faults != lab.faults:
        connections.remember(state, found)
        converge.forget_learned(ns.name for ns in state.namespaces() if ns.name in found)
    connections.end_where_stopped(lab, state)
    init.declare(data)
    record.settle(lab.name)
    return serve()


def _built(lab: Lab, rules: bool = True) -> LabState:
    """What is to be on this machine: all of the lab, or the node that the machine is."""
    part = record.part(lab.name)
    if part is None:
        return build(lab, rules=rules)
    from netlab.hosts.part import part_of

    return part_of(build(lab, rules=rules, only=part.node), part)


def _declared(name: str) -> Lab:
    lab = record.read(name)
    if lab is None:
        raise control.LabNotRunning(name)
    return lab


def _found(state: LabState) -> dict[str, Found]:
    """What is there of this lab, by namespace.  NetlabError if a name it needs is not ours."""
    desired = {namespace.name: namespace for namespace in state.namespaces()}
    marks = namespaces.mark(state.lab, "")
    found: dict[str, Found] = {}
    foreign: list[Problem] = []
    is_machine = state.lab in adopted.owners()
    for name in namespaces.names_of(state.lab):
        if namespaces.is_ours(name, state.lab):
            if namespaces.is_mounted(name):
                there = observe.observe(name, marks, desired.get(name))
                if is_machine and adopted.is_adopted(name, state.lab):
                    there = adopted.ours(there, desired.get(name))
                found[name] = there
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


def _decided(decide: Callable[[Lab], Changed], before: Lab) -> Changed:
    """What is decided, without faults of what goes."""
    changed = decide(before)
    lasting = faults.lasting(changed.lab)
    return changed if lasting == changed.lab.faults else _with_faults(changed, lasting)


def _with_faults(changed: Changed, lasting: tuple[Fault, ...]) -> Changed:
    return dataclasses.replace(changed, lab=msgspec.structs.replace(changed.lab, faults=lasting))


def _base(known: Lab | None, after: Lab) -> Lab | None:
    """What the rules in the kernel are those of, if that is known and may be changed in place."""
    if known is None or known.faults != after.faults:
        return None
    return known if known.service_proxy.mode == after.service_proxy.mode else None


def _changes(
    lab: Lab,
    state: LabState,
    found: Mapping[str, Found],
    known: Lab | None = None,
    base: Lab | None = None,
) -> list[Change]:
    """What leads from what is found to the state; rules from those of `base`, if given.

    Where all of `known` was there, only what `lab` has otherwise: what somebody did by hand since
    is the business of `up`, unless whole namespaces are gone.
    """
    changes = plan(state, found)
    if known is not None:
        was = faults.without_faults(_built(known, rules=False), known)
        if all(namespace.name in found for namespace in was.namespaces()):
            changes = caused(changes, was, state)
    if base is None:
        return [*changes, *rules.changes(state, found)]
    return [*changes, *rules.updates(faults.faulty(base), faults.faulty(lab), found)]


def _has_processes(name: str) -> bool:
    return control.connect(name) is not None


def _remove(name: str) -> int:
    """Everything of a lab, processes first; the caller holds the lock."""
    init = control.connect(name)
    if init:
        init.shutdown()
    ours = [found for found in namespaces.names_of(name) if namespaces.is_ours(found, name)]
    is_machine = name in adopted.owners()
    own = [found for found in ours if is_machine and adopted.is_adopted(found, name)]
    for found in own:
        _leave(name, found)
    for found in ours:
        namespaces.remove(found)
    if is_machine and not own:  # a start that was killed before it had a name
        adopted.release(None, name, record.note(name))
    record.remove(name)
    return len(ours)


def _leave(lab: str, name: str) -> None:
    """Take everything of a lab out of a machine's own namespace."""
    empty = NodeState(name=lab, namespace=Namespace(name=name))
    found = {name: Found(namespace=empty.namespace, index={}, marked=frozenset())}
    for change in rules.changes(LabState(lab=lab, switch=None, nodes=(empty,)), found):
        rules.make(lab, change)
    adopted.release(name, lab, record.note(lab))
