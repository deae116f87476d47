"""Rules as `iptables-save` prints them: written, and compared.

Two tools that print the same rules differ in dates, counters and, from version to version, in the
order of the matches of a rule; a rendering and a printed table are the same if only that differs.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import chain as chained
from itertools import groupby

# Chains in which every Service has rules of its own: their order means nothing between Services.
SHARED = {"KUBE-SERVICES", "KUBE-EXTERNAL-SERVICES", "KUBE-NODEPORTS", "KUBE-PROXY-FIREWALL"}
_OWN = "KUBE-"
_JUMP_TO_OWN = re.compile(r" -[jg] KUBE-")
_SERVICE = re.compile(r'--comment "?([^ "]+/[^ "]+)')
_COUNTERS = re.compile(r"\[(\d+):(\d+)\] ")
_COMMENT = re.compile(r'--comment (?:"([^"]*)"|(\S+))')
_JUMP = re.compile(r" -[jg] (\S+)")
_TOKEN = re.compile(r'"[^"]*"|\S+')


class Table:
    """A table under construction: chains with their rules, in the order of `iptables-save`."""

    def __init__(self, name: str, hooks: str, own: str) -> None:
        self._name = name
        self._hooks: dict[str, list[str]] = {hook: [] for hook in hooks.split()}
        self._chains: dict[str, list[str]] = {chain: [] for chain in own.split()}

    def add(self, chain: str, *parts: str) -> None:
        """Append a rule, given in parts of which some may be empty, and make its chain."""
        self.rules(chain).append(" ".join(("-A", chain, *filter(None, parts))) + "\n")

    def rules(self, chain: str) -> list[str]:
        """The rules of a chain, which is made: lines, to be added to where there are many."""
        rules = self._chains.get(chain)
        if rules is None:
            rules = self._hooks.get(chain)
            if rules is None:
                rules = self._chains[chain] = []
        return rules

    @property
    def name(self) -> str:
        """Its name: "nat"."""
        return self._name

    @property
    def chains(self) -> dict[str, list[str]]:
        """Rules of all but the built-in chains."""
        return self._chains

    def text(self) -> str:
        """Built-in chains first, the others by name; the rules chain by chain."""
        own = sorted(self._chains)
        return "".join(
            (
                f"*{self._name}\n",
                *(f":{hook} ACCEPT [0:0]\n" for hook in self._hooks),
                *[f":{name} - [0:0]\n" for name in own],
                *chained.from_iterable(self._hooks.values()),
                *chained.from_iterable([self._chains[name] for name in own]),
                "COMMIT\n",
            )
        )


def update(before: Table, after: Table) -> str:
    """Input for `iptables-restore --noflush`: some Services' part of a table becomes another.

    Chains of their own are written anew where they differ.  In the chains that all Services share a
    rule is deleted and inserted by itself: at the head, for the last rule has to stay there, and
    any other place would have the tool count the rules before it.  "" if nothing differs.
    """
    chains, edits, rules, gone = [], [], [], []
    for chain in sorted({*before.chains, *after.chains}):
        old, new = before.chains.get(chain), after.chains.get(chain)
        if chain in SHARED:
            lost, found = _moved(old or [], new or [])
            edits += [f"-D{rule[2:]}" for rule in lost]
            edits += [f"-I{rule[2:]}" for rule in reversed(found)]
        elif old != new:
            chains.append(f":{chain} - [0:0]\n")
            rules += new or []
            if new is None:
                gone.append(f"-X {chain}\n")
    if not (chains or edits):
        return ""
    # A chain can go when nothing leads to it any more.
    return "".join((f"*{after.name}\n", *chains, *rules, *edits, *gone, "COMMIT\n"))


def _moved(old: list[str], new: list[str]) -> tuple[list[str], list[str]]:
    """Rules in a shared chain that go and that come; those of one Service port keep their order."""
    before, after = _by_port(old), _by_port(new)
    differing = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    lost, found = (
        [rule for name in differing for rule in rules.get(name, ())] for rules in (before, after)
    )
    return lost, found


def _by_port(rules: list[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for rule in rules:
        found.setdefault(_service(rule), []).append(rule)
    return found


@functools.cache
def chance(ways: int) -> str:
    """A match on one packet in so many, with a blank before it; "" if it is each.

    kube-proxy sends ten decimals, the kernel keeps a multiple of 2^-31, eleven are printed.
    """
    if ways == 1:
        return ""
    kept = round(float(f"{1 / ways:.10f}") * 2**31)
    return f" -m statistic --mode random --probability {kept / 2**31:.11f}"


def comment(text: str) -> str:
    """A comment; the tools allow 256 bytes."""
    return f'-m comment --comment "{text}"'


def host(address: str) -> str:
    """A single address as the tools print it, with its prefix length."""
    return f"{address}/128" if ":" in address else f"{address}/32"


def nfacct(name: str) -> str:
    """A match that counts in an accounting object; printed with two blanks."""
    return f"-m nfacct --nfacct-name  {name}"


def recent(action: str, name: str, family: int) -> str:
    """A match on, or an entry in, a list of source addresses."""
    mask = "255.255.255.255" if family == 4 else ":".join(["ffff"] * 8)
    return f"-m recent {action} --name {name} --mask {mask} --rsource"


def removal(
    saved: str, keep: frozenset[str] = frozenset(), tables: Collection[str] | None = None
) -> str:
    """Input for `iptables-restore --noflush` that removes all KUBE-* chains but some.

    `saved` is what a namespace prints.  Rules of other chains go if they jump to one that goes.
    With `tables` only those are looked at.  "" if there is nothing to remove.
    """
    lines = []
    for name, table in parse(saved).items():
        if tables is not None and name not in tables:
            continue
        gone = [chain for chain in table.policies if chain.startswith(_OWN) and chain not in keep]
        if not gone:
            continue
        targets = {f" {option} {chain}" for option in ("-j", "-g") for chain in gone}
        lines += [f"*{name}", *(f":{chain} - [0:0]" for chain in gone)]
        for chain, rules in table.rules.items():
            if chain not in gone:
                lines += [f"-D{rule[2:]}" for rule in rules if rule.endswith(tuple(targets))]
        lines += [*(f"-X {chain}" for chain in gone), "COMMIT"]
    return "\n".join([*lines, ""])


def with_others(rendered: str, saved: str) -> str:
    """The rendering together with what somebody else put into the same tables.

    Others' rules in a built-in chain stay before or behind ours as they were.
    """
    found = parse(saved)
    lines: list[str] = []
    table = Printed()
    for line in rendered.splitlines():
        if line.startswith("*"):
            table = found.get(line[1:], Printed())
            lines.append(line)
            lines += (
                f":{chain} {policy} [0:0]"
                for chain, policy in table.policies.items()
                if policy == "-" and not chain.startswith(_OWN)
            )
            before = [rule for chain in table.rules for rule in _others(table, chain)[0]]
            waiting = True
        elif waiting and not line.startswith(":"):
            lines += before
            waiting = False
        if line == "COMMIT":
            lines += (rule for chain in table.rules for rule in _others(table, chain)[1])
        if not line.startswith("*"):
            lines.append(line)
    return "\n".join([*lines, ""])


def with_policies(rendered: str, saved: str) -> str:
    """The rendering with the policies that built-in chains have already: they are the machine's."""
    found = parse(saved)
    lines: list[str] = []
    policies: dict[str, str] = {}
    for line in rendered.splitlines():
        if line.startswith("*"):
            policies = found.get(line[1:].strip(), Printed()).policies
        elif line.startswith(":"):
            chain, policy, *_ = line[1:].split()
            if policy != "-" and policies.get(chain, policy) != policy:
                line = line.replace(f":{chain} {policy}", f":{chain} {policies[chain]}", 1)
        lines.append(line)
    return "\n".join([*lines, ""])


def _others(table: Printed, chain: str) -> tuple[list[str], list[str]]:
    """Rules of a chain that are not ours: those before the first of ours, and the rest."""
    if chain.startswith(_OWN):
        return [], []
    rules = table.rules[chain]
    ours = [number for number, rule in enumerate(rules) if _JUMP_TO_OWN.search(rule)]
    first = ours[0] if ours else len(rules)
    behind = (rule for rule in rules[first:] if not _JUMP_TO_OWN.search(rule))
    return rules[:first], list(behind)


def same(rendered: str, saved: str) -> bool:
    """Whether a namespace that prints `saved` holds the rules of `rendered`."""
    return not differences(rendered, saved)


def differences(rendered: str, saved: str) -> list[str]:
    """Chains that differ, as "nat KUBE-SVC-F2KIP5XTJW7U6HIO"; a table alone if it is not there.

    Compared are the tables of `rendered`: all KUBE-* chains with every rule, policies of built-in
    chains, and in those the jumps to KUBE-* chains.  Other chains, and other rules in built-in
    chains, are somebody else's and do not count; nor do counters, and the order of Services in the
    chains that they share.
    """
    wanted, found = parse(rendered), parse(saved)
    different = []
    for name, table in wanted.items():
        there = found.get(name)
        if there is None:
            different.append(name)
            continue
        for chain in dict.fromkeys((*table.policies, *there.policies)):
            if not _chain_same(chain, table, there):
                different.append(f"{name} {chain}")
    return different


@dataclass(slots=True)
class Printed:
    """A table as it was printed: policies and rules by chain."""

    policies: dict[str, str] = field(default_factory=dict)
    rules: dict[str, list[str]] = field(default_factory=dict)
    counters: dict[str, list[tuple[int, int] | None]] = field(default_factory=dict)


def parse(text: str) -> dict[str, Printed]:
    """Tables by name.  Rules come without counters; packets and bytes stand beside them."""
    tables: dict[str, Printed] = {}
    table = Printed()
    for line in text.splitlines():
        if line.startswith("*"):
            table = tables.setdefault(line[1:].strip(), Printed())
        elif line.startswith(":"):
            chain, policy, *_ = line[1:].split()
            table.policies[chain] = policy
        elif line.startswith(("-A ", "[")):
            counted = _COUNTERS.match(line)
            rule = line[counted.end() :] if counted else line
            chain = rule.split(None, 2)[1]
            table.rules.setdefault(chain, []).append(rule)
            counters = (int(counted[1]), int(counted[2])) if counted else None
            table.counters.setdefault(chain, []).append(counters)
    return tables


def _chain_same(chain: str, wanted: Printed, found: Printed) -> bool:
    ours, theirs = wanted.rules.get(chain, []), found.rules.get(chain, [])
    if not chain.startswith(_OWN):
        if chain not in wanted.policies:
            return True
        theirs = [rule for rule in theirs if _JUMP_TO_OWN.search(rule)]
    if wanted.policies.get(chain) != found.policies.get(chain):
        return False
    if ours == theirs:
        return True
    if chain in SHARED:
        ours, theirs = _by_service(ours), _by_service(theirs)
    return len(ours) == len(theirs) and all(
        one == other or matches(one) == matches(other)
        for one, other in zip(ours, theirs, strict=True)
    )


def _by_service(rules: list[str]) -> list[str]:
    """Rules with those of Services sorted by name, between others that keep their places."""
    ordered: list[str] = []
    for of_services, group in groupby(rules, key=lambda rule: bool(_service(rule))):
        run = list(group)
        ordered += sorted(run, key=_service) if of_services else run
    return ordered


def _service(rule: str) -> str:
    """The Service port in a rule's comment; "" if it is nobody's."""
    found = _SERVICE.search(rule)
    return found.group(1) if found else ""


def matches(rule: str) -> list[list[str]]:
    """The parts of a rule, each a match or the target with its options, in no particular order."""
    parts: list[list[str]] = []
    negation: list[str] = []
    for token in _TOKEN.findall(rule):
        if token == "!":
            negation = ["!"]
        elif re.fullmatch("-[a-z]", token):
            parts.append([*negation, token])
            negation = []
        elif parts:
            parts[-1] += [*negation, token.strip('"')]
            negation = []
    # `-m tcp` without options says nothing that `-p tcp` does not
    return sorted(part for part in parts if part[0] != "-m" or len(part) > 2)


def tokens(rule: str) -> dict[str, str]:
    """Options of a rule with their values: "-d", "! -s", "--dport"; "" where there is none."""
    found: dict[str, str] = {}
    name = negation = ""
    for token in _TOKEN.findall(rule):
        if token == "!":
            negation = "! "
        elif token.startswith("-"):
            name, negation = f"{negation}{token}", ""
            found[name] = ""
        elif name and not found[name]:
            found[name] = token.strip('"')
    return found


def target_of(rule: str) -> str:
    """The target or chain that a rule jumps to; "" if none."""
    found = _JUMP.search(rule)
    return found[1] if found else ""


def comment_of(rule: str) -> str:
    """The comment of a rule; "" if it has none."""
    found = _COMMENT.search(rule)
    return (found[1] or found[2]) if found else ""
