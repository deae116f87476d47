"""Rules of a lab's nodes: what must change, and the loads, which run beside the other work.

Each load is in a thread of its own: the kernel makes it wait, not the CPU.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Literal, TypeVar

import msgspec
from msgspec.structs import replace

from netlab.datapath import own_chains, own_tables
from netlab.datapath.services import iptables_save, ipvs_listing, nftables_list
from netlab.datapath.services.iptables import without_counting
from netlab.datapath.services.ipvs import DEVICE
from netlab.datapath.services.modes import leftovers, mode_of, replaced
from netlab.datapath.services.proxier import service_changes, update_between
from netlab.datapath.state import (
    Backend,
    Balancing,
    BalancingUpdate,
    Chains,
    Change,
    Found,
    LabState,
    Leftovers,
    Namespace,
    NodeState,
    Rules,
    Ruleset,
    Tables,
    Update,
    namespace_name,
)
from netlab.doctor import container_problems, mode_problems, name_server_problems
from netlab.kernel import adopted, ipvs, namespaces, nft, xtables
from netlab.lab import control
from netlab.problems import Exit, NetlabError, Problem
from netlab.topology.model import Lab, Node

R = TypeVar("R", bound=Rules | Update | BalancingUpdate)
_OF_RULES = Ruleset | Tables | Balancing | Chains | Update | BalancingUpdate | Leftovers


def concerns(change: Change) -> bool:
    """Whether a change is one of rules, so that `Loads` makes it."""
    return isinstance(change.item, _OF_RULES)


def require(lab: Lab) -> None:
    """Raise NetlabError (exit 3) if this machine lacks what the lab is made of."""
    if lab.service_proxy.mode == "ipvs":
        ipvs.require()
    lacking = (mode_problems, container_problems, name_server_problems)
    if problems := [problem for each in lacking for problem in each(lab)]:
        raise NetlabError(problems, Exit.MACHINE)


def changes(state: LabState, found: Mapping[str, Found]) -> list[Change]:
    """Loads and removals that give every node the rules it should have, and no others of ours."""
    old = [node for node in state.nodes if node.namespace.name in found]
    # A lab without a proxy of ours may have one of its user's, with the same names.
    foreign = any(node.rules is None for node in old) and not _had_rules(state.lab)
    made: dict[str, list[Change]] = {}
    problems: list[Problem] = []

    def compare(node: NodeState) -> None:
        try:
            if node.rules is not None or not foreign:
                made[node.name] = list(_all_differences(state.lab, node))
        except NetlabError as error:
            problems.extend(error.problems)

    threads = [threading.Thread(target=compare, args=(node,)) for node in old]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise NetlabError(problems, Exit.MACHINE)
    for node in state.nodes:
        if node.rules is not None and node.namespace.name not in found:
            item = _possible(node.rules)
            made[node.name] = [Change(verb="add", namespace=node.namespace.name, item=item)]
        if (chains := node.namespace.chains) and node.namespace.name not in found:
            added = Change(verb="add", namespace=node.namespace.name, item=chains)
            made.setdefault(node.name, []).append(added)
    changes = [change for node in state.nodes for change in made.get(node.name, ())]
    for node in state.nodes:
        for namespace in node.pods:
            changes += _of_chains(namespace, there=namespace.name in found)
    around = (*((state.switch,) if state.switch else ()), *state.outside)
    for namespace in (*around, *(node.namespace for node in state.nodes)):
        changes += _of_own_tables(state.lab, namespace, there=namespace.name in found)
    return changes


def _of_own_tables(lab: str, namespace: Namespace, there: bool) -> Iterable[Change]:
    """Tables beside the proxy's, known by their names, that are to come, to be mended and to go."""
    names = nft.names(namespace.name) if there else frozenset()
    wanted = {f"{table.family} {table.name}": table for table in namespace.tables}
    old = {name for name in names if own_tables.is_ours(name)}
    gone = [
        name
        for name in sorted(old - wanted.keys())
        # A lab without masquerading of ours may have its user's, with the same name.
        if not own_tables.is_anybodys(name) or _is_marked(namespace.name, name)
    ]
    if gone:
        item = Leftovers(tables=tuple(gone))
        yield Change(verb="delete", namespace=namespace.name, item=item)
    if new := tuple(table for name, table in wanted.items() if name not in old):
        yield Change(verb="add", namespace=namespace.name, item=Tables(tables=new))
    if other := tuple(
        table
        for name, table in wanted.items()
        if name in old
        and not own_tables.is_faults(name)
        and not _is_there(lab, namespace.name, Tables(tables=(table,)), ("", ""))
    ):
        yield Change(verb="set", namespace=namespace.name, item=Tables(tables=other))


def _is_marked(namespace: str, name: str) -> bool:
    return f'comment "{own_tables.COMMENT}"' in nft.listing(namespace, [name])


def _own_updates(before: Lab, after: Lab, found: Mapping[str, Found]) -> Iterable[Change]:
    """The same, where before was what should be."""
    yield from _chain_updates(before, after, found)
    was, will = own_tables.by_namespace(before), own_tables.by_namespace(after)
    for namespace in was | will:
        old = {f"{table.family} {table.name}": table for table in was.get(namespace, ())}
        new = {f"{table.family} {table.name}": table for table in will.get(namespace, ())}
        if namespace not in found:
            old = {}
        gone = tuple(sorted(old.keys() - new.keys()))
        if gone and namespace in found:
            yield Change(verb="delete", namespace=namespace, item=Leftovers(tables=gone))
        changed = tuple(table for name, table in new.items() if old.get(name) != table)
        if changed:
            verb: Literal["add", "set"] = "set" if old else "add"
            yield Change(verb=verb, namespace=namespace, item=Tables(tables=changed))


def _chain_updates(before: Lab, after: Lab, found: Mapping[str, Found]) -> Iterable[Change]:
    was, will = own_chains.by_namespace(before), own_chains.by_namespace(after)
    for name in was | will:
        old = was.get(name, Chains()) if name in found else Chains()
        new = will.get(name, Chains())
        ipv4, ipv6 = own_chains.edits(old.ipv4, new.ipv4), own_chains.edits(old.ipv6, new.ipv6)
        if ipv4 or ipv6:
            item = Update(ipv4=ipv4, ipv6=ipv6, backend=after.iptables_backend)
            yield Change(verb="set", namespace=name, item=item)


def updates(before: Lab, after: Lab, found: Mapping[str, Found]) -> list[Change]:
    """Changes that turn the rules of one lab into those of another of the same mode.

    Nothing is read back, but where a mode cannot say what to write: the nodes are taken to have
    the rules that they should have before.
    """
    mode = mode_of(after)
    services = service_changes(before, after)
    made: list[Change] = []
    for node in after.nodes:
        namespace = namespace_name(after.name, node.name)
        if namespace not in found:
            if (rules := mode.render(after, node)) is not None:
                made.append(Change(verb="add", namespace=namespace, item=_possible(rules)))
            continue
        update = update_between(mode.proxier, before, after, node, services)
        if update is None:
            if (rules := mode.render(after, node)) is not None:
                made += _differences(after.name, namespace, rules)
        elif update:
            made.append(Change(verb="set", namespace=namespace, item=_possible(update)))
    return [*made, *_own_updates(before, after, found)]


def printed(lab: Lab, node: Node) -> Mapping[str, str]:
    """What the tools print on a node of a running lab, for `datapath.services.reading`.

    With counters where rules have some.  NetlabError (exit 3) if it cannot be read.
    """
    namespace = namespace_name(lab.name, node.name)
    rules = mode_of(lab).render(replace(lab, services=(), endpoints=()), node)
    match rules:
        case Ruleset(backend=backend):
            ipv4, ipv6 = xtables.save(namespace, counters=True, backend=backend)
            return {"ip": ipv4, "ip6": ipv6}
        case Tables(tables=tables):
            text = nft.listing(namespace, [f"{table.family} {table.name}" for table in tables])
            return {"ip": text, "ip6": text}
        case Balancing(rules=ruleset):
            ipv4, ipv6 = xtables.save(namespace, counters=True, backend=ruleset.backend)
            below = ipvs_listing.listing(*ipvs.listed(namespace))
            return {"ip": ipv4 + below["ip"], "ip6": ipv6 + below["ip6"]}
        case None:
            return {}


def _had_rules(lab: str) -> bool:
    """Whether the lab that is up had a mode of ours; also if nobody knows.

    Then its init has ended, and every process of the lab with it, a proxy too.
    """
    init = control.connect(lab)
    declared = init.declared() if init else None
    return not declared or msgspec.json.decode(declared, type=Lab).service_proxy.mode != "none"


def _all_differences(lab: str, node: NodeState) -> Iterable[Change]:
    """Changes for one node, of the proxy's rules and of the chains beside them."""
    chosen = _backend(node.namespace.chains or node.rules)
    saved = _saved(node.namespace.name, chosen)
    yield from _differences(lab, node.namespace.name, node.rules, saved)
    # A machine may have Docker and CNI plugins of its own, whose chains have the same names.
    if not _is_machine(lab, node.namespace.name):
        yield from _chain_edits(node.namespace, saved)


def _is_machine(lab: str, namespace: str) -> bool:
    """Whether it is a machine's own namespace, which the lab gives back as it was."""
    return lab in adopted.owners() and adopted.is_adopted(namespace, lab)


def _of_chains(namespace: Namespace, there: bool) -> Iterable[Change]:
    """Changes for a namespace that has no other rules."""
    if namespace.chains and there:
        yield from _chain_edits(namespace, _saved(namespace.name, _backend(namespace.chains)))
    elif namespace.chains:
        yield Change(verb="add", namespace=namespace.name, item=namespace.chains)


def _chain_edits(
    namespace: Namespace, saved: Mapping[Backend, tuple[str, str]]
) -> Iterable[Change]:
    chains, chosen = namespace.chains, _backend(namespace.chains)
    for backend, printed in saved.items():
        wanted = chains if chains and backend == chosen else Chains()
        ipv4 = own_chains.edits(printed[0], wanted.ipv4)
        ipv6 = own_chains.edits(printed[1], wanted.ipv6)
        if ipv4 or ipv6:
            verb: Literal["set", "delete"] = "delete" if wanted == Chains() else "set"
            item = Update(ipv4=ipv4, ipv6=ipv6, backend=backend)
            yield Change(verb=verb, namespace=namespace.name, item=item)


def _backend(wanted: Rules | Chains | None) -> Backend | None:
    """The backend of iptables that rules are for, if for one."""
    if isinstance(wanted, Balancing):
        wanted = wanted.rules
    with contextlib.suppress(NetlabError):  # the load will say what is missing
        if isinstance(wanted, Ruleset | Chains):
            return wanted.backend or xtables.host_backend()
    return None


def _saved(namespace: str, chosen: Backend | None) -> dict[Backend, tuple[str, str]]:
    """What the backends print that are in use, or chosen."""
    saved: dict[Backend, tuple[str, str]] = {}
    for backend in xtables.BACKENDS:
        with contextlib.suppress(NetlabError):  # not to be read: load them again
            if backend == chosen or xtables.in_use(namespace, backend):
                saved[backend] = xtables.save(namespace, backend=backend)
    return saved


def _differences(
    lab: str,
    namespace: str,
    wanted: Rules | None,
    printed: Mapping[Backend, tuple[str, str]] | None = None,
) -> Iterable[Change]:
    """Changes for one node; what replaces rules comes before what removes others.

    `printed` is what it prints, if that was asked for already.
    """
    wanted = _possible(wanted) if wanted else None
    if isinstance(wanted, Balancing):
        ipvs.refuse_foreign(namespace, wanted.device, lab)
    chosen = _backend(wanted)
    saved = _saved(namespace, chosen) if printed is None else dict(printed)
    there = saved.pop(chosen, ("", "")) if chosen else ("", "")
    if wanted and _is_machine(lab, namespace):
        if isinstance(wanted, Ruleset):
            wanted = _with_policies(wanted, there)
        elif isinstance(wanted, Balancing):
            wanted = replace(wanted, rules=_with_policies(wanted.rules, there))
    if wanted and not _is_there(lab, namespace, wanted, there):
        item: Rules = wanted
        if isinstance(wanted, Ruleset):
            item = _with_others(wanted, there)
        elif isinstance(wanted, Balancing):
            item = replace(wanted, rules=_with_others(wanted.rules, there))
        yield Change(verb="set", namespace=namespace, item=item)
    if isinstance(wanted, Balancing):
        yield from replaced(namespace, wanted.rules, there)
    has_balancing = ipvs.is_there(namespace, DEVICE, lab)
    yield from leftovers(namespace, wanted, saved, nft.names(namespace), has_balancing)


def _possible(rules: R) -> R:
    """Rules as this kernel takes them."""
    if not isinstance(rules, Ruleset | Update) or xtables.has_nfacct():
        return rules
    return without_counting(rules)


def _with_policies(wanted: Ruleset, saved: tuple[str, str]) -> Ruleset:
    """What a built-in chain of a machine does with everybody's packets stays as it is."""
    ipv4, ipv6 = (
        iptables_save.with_policies(rendered, printed)
        for rendered, printed in zip((wanted.ipv4, wanted.ipv6), saved, strict=True)
    )
    return replace(wanted, ipv4=ipv4, ipv6=ipv6)


def _with_others(wanted: Ruleset, saved: tuple[str, str]) -> Ruleset:
    """A load replaces tables as a whole; what somebody else put there must be in it."""
    ipv4, ipv6 = (
        iptables_save.with_others(rendered, printed)
        for rendered, printed in zip((wanted.ipv4, wanted.ipv6), saved, strict=True)
    )
    return replace(wanted, ipv4=ipv4, ipv6=ipv6)


def _is_there(lab: str, namespace: str, wanted: Rules, saved: tuple[str, str]) -> bool:
    if isinstance(wanted, Balancing):
        return _is_there(lab, namespace, wanted.rules, saved) and not ipvs.differs(
            wanted, ipvs.present(namespace, wanted.device, lab)
        )
    if isinstance(wanted, Ruleset):
        texts = zip((wanted.ipv4, wanted.ipv6), saved, strict=True)
        return all(iptables_save.same(rendered, printed) for rendered, printed in texts)
    tables = [f"{table.family} {table.name}" for table in wanted.tables]
    with contextlib.suppress(NetlabError):
        printed = nft.listing(namespace, tables)
        rendered = "".join(table.text for table in wanted.tables)
        return not (
            nftables_list.differences(rendered, printed)
            # or this machine's nft has another spelling
            and nftables_list.differences(nft.relisted(wanted), printed)
        )
    return False


class Loads:
    """The changes of rules that give a lab's nodes the rules of that lab, by namespace."""

    def __init__(self, changes: Iterable[Change], lab: Lab) -> None:
        self._lab = lab
        self._changes: dict[str, list[Change]] = {}
        for change in changes:
            if concerns(change):
                self._changes.setdefault(change.namespace, []).append(change)
        self._threads: list[threading.Thread] = []
        self._problems: list[Problem] = []
        self.draining: dict[str, list[ipvs.Draining]] = {}  # by namespace

    def begin(self, namespace: str) -> None:
        """Start what is to be done in a namespace that exists, if there is something."""
        changes = self._changes.pop(namespace, None)
        if changes:
            thread = threading.Thread(
                target=self._make, args=(changes,), name=f"rules of {namespace}"
            )
            thread.start()
            self._threads.append(thread)

    def begin_rest(self) -> None:
        """Start what is left: in namespaces that have no bridge."""
        for namespace in list(self._changes):
            self.begin(namespace)

    def finish(self) -> list[Problem]:
        """Wait for all that was started; what went wrong."""
        for thread in self._threads:
            thread.join()
        return self._problems

    def _make(self, changes: Iterable[Change]) -> None:
        try:
            for change in changes:
                try:
                    self._make_one(change)
                except NetlabError:
                    if not isinstance(change.item, Update | BalancingUpdate):
                        raise
                    self._make_whole(change.namespace)
        except NetlabError as error:
            self._problems += error.problems

    def _make_whole(self, namespace: str) -> None:
        """After an update that was refused: the rules are not those that it was made for."""
        names = {namespace_name(self._lab.name, node.name): node for node in self._lab.nodes}
        rules = mode_of(self._lab).render(self._lab, names[namespace])
        for change in _differences(self._lab.name, namespace, rules):
            self._make_one(change)

    def _make_one(self, change: Change) -> None:
        if draining := make(self._lab.name, change):
            self.draining.setdefault(change.namespace, []).extend(draining)


def load_time(lab: Lab, node: Node) -> float:
    """Seconds that loading a node's rules takes, into an empty namespace of its own.

    To render them is not counted.  NetlabError (exit 3) if they are refused.
    """
    rules = mode_of(lab).render(lab, node)
    if rules is None:
        return 0.0
    rules = _possible(rules)
    with namespaces.scratch() as namespace:
        start = time.perf_counter()
        _load(lab.name, namespace, rules)
        return time.perf_counter() - start


def _load(lab: str, namespace: str | int, rules: Rules) -> list[ipvs.Draining]:
    """Load rules as a whole; what of virtual servers has to be finished later."""
    match rules:
        case Ruleset():
            xtables.restore(namespace, rules)
        case Tables():
            nft.load(namespace, rules)
        case Balancing():
            draining = ipvs.apply(namespace, rules, lab)
            xtables.restore(namespace, rules.rules)
            return draining
    return []


def clear(lab: str, namespace: str) -> None:
    """Remove all rules of ours from a namespace, of whatever mode.  NetlabError (exit 3)."""
    for change in _differences(lab, namespace, None):
        if concerns(change):
            make(lab, change)


def make(lab: str, change: Change) -> list[ipvs.Draining]:
    """Carry out one change of rules; what of virtual servers has to be finished later.

    NetlabError (exit 3) if it is refused.
    """
    namespace = change.namespace
    match change.item:
        case Ruleset() | Tables() | Balancing():
            return _load(lab, namespace, change.item)
        case Chains(ipv4=ipv4, ipv6=ipv6, backend=backend):
            ruleset = Ruleset(ipv4=ipv4, ipv6=ipv6, backend=backend)
            xtables.restore(namespace, ruleset, flush=False)
        case Update(ipv4=ipv4, ipv6=ipv6, tables=tables, forget=forget, backend=backend):
            ruleset = Ruleset(ipv4=ipv4, ipv6=ipv6, backend=backend)
            xtables.restore(namespace, ruleset, flush=False)
            if tables:
                nft.change(namespace, tables)
            if forget:
                nft.forget(namespace, forget)
        case BalancingUpdate(ipv4=ipv4, ipv6=ipv6, backend=backend):
            draining = ipvs.change(namespace, change.item, lab)
            ruleset = Ruleset(ipv4=ipv4, ipv6=ipv6, backend=backend)
            xtables.restore(namespace, ruleset, flush=False)
            return draining
        case Leftovers(ipv4=ipv4, ipv6=ipv6, tables=tables, backend=backend, device=device):
            ruleset = Ruleset(ipv4=ipv4, ipv6=ipv6, backend=backend)
            xtables.restore(namespace, ruleset, flush=False)
            if tables:
                nft.delete(namespace, tables)
            if device:
                ipvs.remove(namespace, device, lab)
    return []
