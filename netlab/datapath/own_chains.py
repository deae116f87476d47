"""Chains of iptables that a node has beside its service proxy's, and the rules that lead to them.

They are added to tables that others share, and taken out of them again, by `iptables-restore
--noflush`; so what is ours has to be known by its name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from netlab.datapath import host_ports
from netlab.datapath.services.iptables_save import matches, parse, target_of
from netlab.datapath.state import Chains, namespace_name
from netlab.topology.model import Lab, Node

Rules = dict[str, dict[str, list[str]]]
"""Rules without `-A CHAIN` by table and chain."""

_AT_THE_HEAD = ("POSTROUTING", "FORWARD")
_OURS = re.compile(r"CNI-(HOSTPORT|DN)-")


def of_node(lab: Lab, node: Node) -> Chains | None:
    """Those of a node; None if it has none."""
    texts = [_text(_wanted(lab, node, family)) for family in (4, 6)]
    if not any(texts):
        return None
    return Chains(ipv4=texts[0], ipv6=texts[1], backend=lab.iptables_backend)


def by_namespace(lab: Lab) -> dict[str, Chains]:
    """Those of a lab's nodes that have some."""
    found = {namespace_name(lab.name, node.name): of_node(lab, node) for node in lab.nodes}
    return {name: chains for name, chains in found.items() if chains}


def _wanted(lab: Lab, node: Node, family: int) -> Rules:
    ports = host_ports.chains(lab, node, family)
    return {"nat": {**ports, **host_ports.entries()}} if ports else {}


def _text(rules: Rules) -> str:
    """As `iptables-save` prints it, of tables in which nothing else is."""
    lines = []
    for table, chains in rules.items():
        own = sorted(chain for chain in chains if _is_own(chain))
        hooks = [chain for chain in chains if not _is_own(chain)]
        lines += [f"*{table}", *(f":{chain} - [0:0]" for chain in own)]
        for chain in (*hooks, *own):
            lines += _added(chain, chains[chain])
        lines.append("COMMIT")
    return "\n".join([*lines, ""]) if lines else ""


def edits(saved: str, wanted: str) -> str:
    """Input for `iptables-restore --noflush` that makes of what is printed what is wanted.

    "" if nothing differs.
    """
    there, rules = _own(saved), _own(wanted)
    lines: list[str] = []
    for table in sorted({*there, *rules}):
        lines += _table_edits(table, there.get(table, {}), rules.get(table, {}))
    return "\n".join([*lines, ""]) if lines else ""


def _table_edits(
    table: str, old: Mapping[str, list[str]], new: Mapping[str, list[str]]
) -> list[str]:
    chains: list[str] = []
    added: list[str] = []
    deleted: list[str] = []
    gone: list[str] = []
    for chain in sorted({*old, *new}):
        before, after = old.get(chain), new.get(chain)
        if before is not None and after is not None and _same(before, after):
            continue
        if not _is_own(chain):
            deleted += [f"-D {chain} {rule}" for rule in before or ()]
            added += _added(chain, after or [])
            continue
        chains.append(f":{chain} - [0:0]")
        added += [f"-A {chain} {rule}" for rule in after or ()]
        if after is None:
            gone.append(f"-X {chain}")
    if not (chains or added or deleted):
        return []
    return [f"*{table}", *chains, *deleted, *added, *gone, "COMMIT"]


def _added(chain: str, rules: list[str]) -> list[str]:
    """Rules behind those of a chain, or before them where that is the custom."""
    if chain in _AT_THE_HEAD:
        return [f"-I {chain} {rule}" for rule in reversed(rules)]
    return [f"-A {chain} {rule}" for rule in rules]


def _same(before: list[str], after: list[str]) -> bool:
    return len(before) == len(after) and all(
        one == other or matches(one) == matches(other)
        for one, other in zip(before, after, strict=True)
    )


def _own(text: str) -> dict[str, dict[str, list[str]]]:
    """What of a printed text is ours; chains of hooks only if they have a rule of ours."""
    found: dict[str, dict[str, list[str]]] = {}
    for name, table in parse(_appended(text)).items():
        chains: dict[str, list[str]] = {chain: [] for chain in table.policies if _is_own(chain)}
        for chain, rules in table.rules.items():
            own = [rule.split(None, 2)[2] for rule in rules if _is_own(chain) or _leads(rule)]
            if own:
                chains[chain] = own
        if chains:
            found[name] = chains
    return found


def _appended(text: str) -> str:
    """A text as it is printed: where rules are put at a head one by one, the last is the first."""
    lines = text.splitlines()
    heads = [line for line in lines if line.startswith("-I ")]
    rest = [line for line in lines if not line.startswith("-I ")]
    at = next((n for n, line in enumerate(rest) if line.startswith("-A ")), len(rest))
    return "\n".join([*rest[:at], *(f"-A{line[2:]}" for line in reversed(heads)), *rest[at:]])


def _is_own(chain: str) -> bool:
    return bool(_OURS.match(chain))


def _leads(rule: str) -> bool:
    """Whether a rule of somebody's chain is ours."""
    return _is_own(target_of(rule))
