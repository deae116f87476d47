"""Chains of iptables that a node has beside its service proxy's, and the rules that lead to them.

They are added to tables that others share, and taken out of them again, by `iptables-restore
--noflush`; so what is ours has to be known by its name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from netlab.datapath import docker, docker_rules, host_ports
from netlab.datapath.services.iptables_save import matches, parse, target_of
from netlab.datapath.state import Chains, namespace_name
from netlab.topology.model import Lab, Node

Rules = dict[str, dict[str, list[str]]]
"""Rules without `-A CHAIN` by table and chain."""

_AT_THE_HEAD = ("POSTROUTING", "FORWARD")
_OURS = re.compile(r"CNI-(HOSTPORT|DN)-|DOCKER($|[-_])")
# Docker's rules in chains of others that lead to none of its own.
_DOCKERS = re.compile(
    r"-[io] (docker0|br-[0-9a-f]{12}) .*-j (ACCEPT|MASQUERADE)$"
    r"|-s (\S+/32) -d \3 -p (tcp|udp|sctp) .*-j MASQUERADE$"
)


def of_node(lab: Lab, node: Node) -> Chains | None:
    """Those of a node; None if it has none."""
    texts = [text(_wanted(lab, node, family)) for family in (4, 6)]
    if not any(texts):
        return None
    return Chains(ipv4=texts[0], ipv6=texts[1], backend=lab.iptables_backend)


def of_resolver(lab: Lab) -> Chains:
    """Those of a container that finds others by name."""
    return Chains(ipv4=text(docker_rules.resolver_rules()), backend=lab.iptables_backend)


def by_namespace(lab: Lab) -> dict[str, Chains]:
    """Those of a lab's nodes that have some."""
    found = {namespace_name(lab.name, node.name): of_node(lab, node) for node in lab.nodes}
    for node in lab.nodes:
        inside = docker.namespaces(lab, node, of_resolver(lab))
        found |= {each.name: each.chains for each in inside}
    return {name: chains for name, chains in found.items() if chains}


def _wanted(lab: Lab, node: Node, family: int) -> Rules:
    """Of a node, whose Docker is there before its pods."""
    found = docker_rules.chains(lab, node) if family == 4 else {}
    ports = host_ports.chains(lab, node, family)
    for chain, rules in {**ports, **host_ports.entries()}.items() if ports else ():
        nat = found.setdefault("nat", {})
        # What is put at a head comes before what was there.
        nat[chain] = (
            [*rules, *nat.get(chain, ())]
            if chain in _AT_THE_HEAD
            else [
                *nat.get(chain, ()),
                *rules,
            ]
        )
    return found


def text(rules: Rules) -> str:
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
    """A text as it is printed: of rules put at a head one by one the last is the first."""
    found: list[str] = []
    start = 0  # where the rules of a table begin
    for line in text.splitlines():
        if line.startswith("*"):
            start = 0
        elif line.startswith("-") and not start:
            start = len(found)
        if line.startswith("-I "):
            found.insert(start, f"-A{line[2:]}")
        else:
            found.append(line)
    return "\n".join(found)


def _is_own(chain: str) -> bool:
    return bool(_OURS.match(chain))


def _leads(rule: str) -> bool:
    """Whether a rule of somebody's chain is ours."""
    return _is_own(target_of(rule)) or bool(_DOCKERS.search(rule))
