"""A trace as somebody would tell it: the answer first, then the way there, the way back, the sum.

Steps stand between the hops that they lie between.  Hops with nothing worth telling between them
share a line; rules that decided nothing are only named by their chains.  `-o json` has everything.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from netlab.trace.model import (
    AnyStep,
    Bridge,
    Conntrack,
    Deliver,
    Drop,
    Encapsulate,
    Hop,
    Nat,
    Neighbour,
    Route,
    Rule,
    Trace,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text
    from rich.tree import Tree

_SIGNS = {
    "delivered": ("✓", "green"),
    "rejected": ("✗", "red"),
    "dropped": ("✗", "red"),
    "unobserved": ("?", "yellow"),
}
_DECIDING = ("accept", "drop", "queue", "stolen")


def print_trace(trace: Trace, console: Console) -> None:
    """Print a trace."""
    console.print(_headline(trace), soft_wrap=False)
    for title, hops in (("there", trace.forward), ("back", trace.reply)):
        if hops:
            console.print()
            console.print(_leg(title, hops))
    console.print()
    for line in _ending(trace):
        console.print(line)


def headline(trace: Trace) -> str:
    """The answer in one line."""
    probe = trace.probe
    way = f"{probe.from_} → {probe.to}"
    if trace.disposition == "delivered":
        took = f"{probe.protocol}, {trace.elapsed_us / 1000:.1f} ms"
        return f"{way}: delivered to {trace.delivered_to}, there and back ({took})"
    if trace.drop is None:
        return f"{way}: {trace.disposition}"
    return f"{way}: {trace.disposition} at {trace.drop.where}: {trace.drop.reason}"


def summary(trace: Trace) -> str:
    """Who received the probe and what it saw, in one sentence."""
    if trace.delivered_to is None or trace.seen_source is None:
        return ""
    who = f"{trace.delivered_to.kind} {trace.delivered_to.name}"
    if trace.seen_source == trace.probe.source:
        seen = f"its true source, {trace.seen_source}"
    else:
        how = [step.kind for step in trace.translations if step.kind in ("snat", "masquerade")]
        by = f" ({how[-1]})" if how else ""
        seen = f"{trace.seen_source} as its source{by}, not {trace.probe.source}"
    answer = " and answered" if trace.disposition == "delivered" else ""
    return f"{who} received it{answer}; it saw {seen}."


def _headline(trace: Trace) -> Text:
    from rich.text import Text

    sign, colour = _SIGNS[trace.disposition]
    return Text.assemble((f"{sign} ", f"bold {colour}"), (headline(trace), "bold"))


def _leg(title: str, hops: Sequence[Hop]) -> Tree:
    from rich.text import Text
    from rich.tree import Tree

    first = hops[0].packet
    kind = first.flags or first.icmp
    word = f"{first.protocol} {kind}" if kind else first.protocol
    tree = Tree(Text.assemble((title, "bold"), f"  {word}  {_before(hops)}"), guide_style="dim")
    numbered = list(enumerate(hops, 1))
    for _, group in groupby(numbered, key=lambda pair: pair[1].namespace):
        _place(tree, list(group))
    return tree


def _before(hops: Sequence[Hop]) -> str:
    """The packet's ends as its sender had them."""
    flow = hops[0].packet.flow
    for step in hops[0].steps:
        if isinstance(step, Nat):
            return str(flow).replace(str(step.after), str(step.before))
    return str(flow)


def _place(tree: Tree, numbered: list[tuple[int, Hop]]) -> None:
    """One namespace: its hops, and under each what happened next there."""
    from rich.text import Text

    branch = tree.add(Text(_title(numbered[0][1]), style="bold cyan"))
    line: Tree | None = None
    text = Text()
    for position, (number, hop) in enumerate(numbered):
        told = list(_told(step for step in hop.steps if not isinstance(step, Deliver | Drop)))
        for words, style in told:
            (branch if line is None else line).add(Text(words, style=style))
        words = f"{number} {hop.device} {hop.direction}"
        if line is None or told:
            text = Text(words)
            line = branch.add(text)
        else:
            text.append(f" → {words}")
        if position == 0 or _changed(numbered[position - 1][1], hop):
            text.append(f"  {_packet(hop)}", style="dim" if position == 0 else "yellow")
    for step in numbered[-1][1].steps:
        if isinstance(step, Drop) and line:
            line.add(Text(f"✗ {step}", style="red"))
        elif isinstance(step, Deliver) and line:
            line.add(Text(f"✓ {step}", style="green"))


def _title(hop: Hop) -> str:
    if hop.node is None:
        return "underlay switch"
    name = hop.namespace.partition(":")[2]
    space, colon, pod = name.partition(":")
    return f"pod {space}/{pod}" if colon else f"node {hop.node}"


def _packet(hop: Hop) -> str:
    if hop.packet.outer:
        return f"[{hop.packet.outer}] {hop.packet.flow}"
    return str(hop.packet.flow)


def _changed(before: Hop, after: Hop) -> bool:
    return (before.packet.flow, before.packet.outer is None) != (
        after.packet.flow,
        after.packet.outer is None,
    )


def _told(steps: Iterable[AnyStep]) -> Iterable[tuple[str, str]]:
    """What is worth telling of the steps of one hop, each with its style."""
    passed: list[str] = []
    for rules, group in groupby(steps, key=lambda step: isinstance(step, Rule)):
        if rules:
            lines, quiet = _rules([step for step in group if isinstance(step, Rule)])
            passed += quiet
            yield from lines
            continue
        for step in group:
            words = _words(step)
            if words:
                yield words
    if passed:
        yield f"passes {', '.join(dict.fromkeys(passed))}", "dim"


def _words(step: AnyStep) -> tuple[str, str] | None:
    if isinstance(step, Nat):
        return str(step), "bold yellow"
    if isinstance(step, Encapsulate):
        return str(step), "magenta"
    if isinstance(step, Conntrack):
        return f"conntrack: {step}", "dim"
    if isinstance(step, Route):
        return f"route: {step}", "" if step.matched else "red"
    if isinstance(step, Neighbour):
        return (f"neighbour: {step}", "dim") if step.mac else (f"neighbour: {step}", "red")
    if isinstance(step, Bridge) and not step.flooded and step.port:
        return None  # the next device says it
    return str(step), ""


def _rules(rules: Sequence[Rule]) -> tuple[list[tuple[str, str]], list[str]]:
    """Lines for the runs that decided something, and the chains of those that did not."""
    lines: list[tuple[str, str]] = []
    quiet: list[str] = []
    for (table, hook, outer), group in groupby(rules, key=lambda r: (r.table, r.hook, r.outer)):
        run = list(group)
        for index, rule in enumerate(run):
            text = rule.rule or ""
            if rule.verdict == "continue" and "-j MARK" in text and rule.chain != hook:
                target = text.partition("-j ")[2]
                lines.append((f"{_chains(run[: index + 1], hook, table)}: {target}", ""))
        last = run[-1]
        if last.verdict in _DECIDING:
            style = "bold red" if last.verdict == "drop" else ""
            served = f" ({last.object})" if last.object else ""
            what = f": {last.verdict}" if last.verdict != "accept" or table != "nat" else ""
            lines.append((f"{_chains(run, hook, table)}{what}{served}", style))
        elif not outer:
            quiet.append(f"{table} {hook}")
    return lines, quiet


def _chains(run: Sequence[Rule], hook: str, table: str) -> str:
    """The chains from the hook to the last rule, by the jumps that led there."""
    came_from = {
        rule.verdict.partition(" ")[2]: rule.chain
        for rule in run
        if rule.verdict.startswith(("jump ", "goto "))
    }
    chains = [run[-1].chain]
    while chains[0] != hook and chains[0] in came_from and len(chains) <= len(came_from):
        chains.insert(0, came_from[chains[0]])
    return f"{table} {' → '.join(chains)}"


def _ending(trace: Trace) -> Iterable[Text]:
    from rich.text import Text

    drop = trace.drop
    if drop:
        yield Text.assemble(("why: ", "bold"), drop.explanation)
        if drop.rule:
            yield Text.assemble(("rule: ", "bold"), drop.rule)
        for evidence in drop.evidence:
            yield Text.assemble(("seen: ", "bold"), evidence)
        if drop.fix:
            yield Text.assemble(("fix: ", "bold"), drop.fix)
    told = summary(trace)
    if told:
        yield Text(told)
    reports = {
        "packets": trace.witnesses.packets,
        "rules": trace.witnesses.rules,
        "conntrack": trace.witnesses.conntrack,
        "decisions": trace.witnesses.decisions,
    }
    for name, report in reports.items():
        if report != "ok":
            yield Text.assemble((f"witness {name}: ", "bold yellow"), report)
