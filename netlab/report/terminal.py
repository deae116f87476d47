"""A trace as somebody would tell it: the answer first, then the way there, the way back, the sum.

Steps stand between the hops that they lie between.  Hops with nothing worth telling between them
share a line; rules that decided nothing are only named by their chains.  `-o json` has everything.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from netlab.trace.model import Hop, NameAsked, Trace
from netlab.trace.model_steps import (
    AnyStep,
    Bridge,
    Conntrack,
    Deliver,
    Drop,
    Encapsulate,
    Ipvs,
    Nat,
    Neighbour,
    Route,
    Rule,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text
    from rich.tree import Tree

SIGNS = {
    "delivered": ("✓", "green"),
    "rejected": ("✗", "red"),
    "dropped": ("✗", "red"),
    "unobserved": ("?", "yellow"),
}
# A mark that is set, and not one that is taken back.
_MARKS = re.compile(r"(?:-j MARK --set-xmark (?!\S+/0x0\b)|meta mark set meta mark \| )(\S+)")
# How a load balancer that passes packets on makes its choice.
_CHOICE = re.compile(r"meta mark set (?:numgen|jhash) .* map @slots/")
# Verdicts that end a packet's way through a hook.
DECIDING = ("accept", "drop", "queue", "stolen")


def print_trace(trace: Trace, console: Console) -> None:
    """Print a trace."""
    console.print(_headline(trace, console.width))
    if trace.resolution:
        console.print()
        console.print(_asked(trace.resolution))
    _print_legs(trace, console)
    for second in trace.connections or ():
        console.print()
        console.print(_opened(trace, second))
        _print_legs(second, console)
    console.print()
    for line in _ending(trace):
        console.print(line)


def _print_legs(trace: Trace, console: Console) -> None:
    probe = trace.probe
    if trace.forward:
        console.print()
        console.print(leg("there", f"{probe.source} → {probe.destination}", trace.forward))
    if trace.reply:
        console.print()
        console.print(leg("back", str(trace.reply[0].packet.flow), trace.reply))


def _asked(questions: Sequence[NameAsked]) -> Tree:
    """The questions for a name, in order."""
    from rich.text import Text
    from rich.tree import Tree

    tree = Tree(Text("name", "bold"))
    for question in questions:
        tree.add(Text(str(question)))
    return tree


def _opened(trace: Trace, second: Trace) -> Text:
    """Who opened a connection for another."""
    from rich.text import Text

    by = [step.rule for step in trace.translations if step.kind == "proxy" and step.rule]
    who = by[0] if by else f"a proxy of {second.probe.from_}"
    return Text(f"{who} opened a connection of its own to {second.probe.destination}:", "bold")


def headline(trace: Trace) -> str:
    """The answer in one line."""
    drop, to = trace.drop, trace.delivered_to
    way = f"{trace.disposition}: {trace.probe.from_} → {trace.probe.to}"
    if drop:
        where = f" on {drop.node}" if drop.node else ""
        return f"{way}{where}, {drop.reason.replace('-', ' ')}"
    who = f" is {to.name}" if to and to.name != trace.probe.to else ""
    where = f" on {to.node}" if to and to.kind == "pod" else ""
    return f"{way}{who}{where}, {trace.elapsed_us / 1000:.1f} ms"


def summary(trace: Trace) -> str:
    """Who received the probe and what it saw, in one sentence."""
    if trace.delivered_to is None or trace.seen_source is None:
        return ""
    who = f"{trace.delivered_to.kind} {trace.delivered_to.name}"
    if trace.probe.spoofed and trace.seen_source == trace.probe.source:
        seen = f"{trace.seen_source} as its source, as it was sent"
    elif trace.seen_source == trace.probe.source:
        seen = f"its true source, {trace.seen_source}"
    else:
        changes = ("snat", "masquerade", "proxy")
        how = [step.kind for step in trace.translations if step.kind in changes]
        by = f" ({how[-1]})" if how else ""
        seen = f"{trace.seen_source} as its source{by}, not {trace.probe.source}"
    answer = " and answered" if trace.disposition == "delivered" else ""
    if answer and trace.probe.spoofed and trace.probe.from_ != trace.probe.source.ip:
        answer += f", to {trace.probe.source.ip} and not to {trace.probe.from_}"
    return f"{who} received it{answer}; it saw {seen}."


def told(hop: Hop) -> list[str]:
    """What happened between this sight of the packet and the next, a line for each thing."""
    return [words for words, _ in _told(hop.steps, hop)]


# The flags of a handshake as people say them.
_FLAGS = {"S": "SYN", "SA": "SYN-ACK", "R": "RST", "RA": "RST"}


def _headline(trace: Trace, width: int) -> Text:
    from rich.text import Text

    sign, colour = SIGNS[trace.disposition]
    line = headline(trace)
    if len(sign) + 1 + len(line) > width:
        # What was asked on the first line, what became of it on the second.
        way = f"{trace.disposition}: {trace.probe.from_} → {trace.probe.to}"
        line = f"{way}\n  {line.removeprefix(way).lstrip(' ,')}"
    return Text.assemble((f"{sign} ", f"bold {colour}"), (line, "bold"))


def leg(title: str, ends: str, hops: Sequence[Hop]) -> Tree:
    """One leg as a tree: places, their hops, the steps between those."""
    from rich.text import Text
    from rich.tree import Tree

    first = hops[0].packet
    kind = _FLAGS.get(first.flags or "", first.flags) or first.icmp
    protocol = first.protocol.upper().replace("V", "v")
    word = f"{protocol} {kind}" if kind else protocol
    tree = Tree(Text.assemble((title, "bold"), f"  {word}  {ends}"), guide_style="dim")
    before = None
    for _, group in groupby(enumerate(hops, 1), key=lambda pair: pair[1].namespace):
        numbered = list(group)
        _place(tree, numbered, before)
        before = numbered[-1][1]
    return tree


def _place(tree: Tree, numbered: list[tuple[int, Hop]], before: Hop | None) -> None:
    """One namespace: its hops, and under each what happened next there."""
    from rich.text import Text

    branch = tree.add(Text(_title(numbered[0][1]), style="bold cyan"))
    text: Text | None = None
    for number, hop in numbered:
        steps = hop.steps
        if before is None:
            steps = _after(hop)
            for words, style in _told(hop.steps[: len(hop.steps) - len(steps)], hop):
                branch.add(Text(words, style=style))
        words = f"{number} {hop.device} {hop.direction}"
        if text is None:
            text = Text(words)
            line = branch.add(text)
        else:
            text.append(f" → {words}")
        if before is None or (before.packet.flow, before.packet.outer) != (
            hop.packet.flow,
            hop.packet.outer,
        ):
            text.append(f"  {_packet(hop)}", style="dim" if before is None else "yellow")
        pieces = before.packet.fragments if before else None
        if hop.packet.fragments != pieces:
            text.append(f"  ({hop.packet.fragments or 'one piece'})", style="yellow")
        told = list(_told(steps, hop))
        for words, style in told:
            line.add(Text(words, style=style))
        if told:
            text = None
        before = hop


def _after(first: Hop) -> list[AnyStep]:
    """The steps after a leg's first sight: a device's own forwarding begins them, or the end."""
    for index, step in enumerate(first.steps):
        if isinstance(step, Bridge | Encapsulate | Deliver | Drop):
            return first.steps[index:]
    return []


def _title(hop: Hop) -> str:
    name = hop.namespace.partition(":")[2]
    if hop.node is None:
        outside = {"_gateway": "internet gateway", "_internet": "internet switch"}
        for prefix, kind in (("_host:", "host"), ("_balancer:", "load balancer")):
            if name.startswith(prefix):
                return f"{kind} {name.removeprefix(prefix)}"
        return outside.get(name, "underlay switch")
    space, colon, pod = name.partition(":")
    if space == "_container":
        return f"container {pod}"
    return f"pod {space}/{pod}" if colon else f"node {hop.node}"


def _packet(hop: Hop) -> str:
    outer = hop.packet.outer
    return f"[{outer.tunnel.upper()} {outer}]" if outer else str(hop.packet.flow)


def _told(steps: Iterable[AnyStep], hop: Hop) -> Iterable[tuple[str, str]]:
    """What is worth telling of the steps of one hop, each with its style."""
    for are_rules, group in groupby(steps, key=lambda step: isinstance(step, Rule)):
        if are_rules:
            yield from rule_lines([step for step in group if isinstance(step, Rule)])
        else:
            yield from filter(None, (_words(step, hop) for step in group))


def _words(step: AnyStep, hop: Hop) -> tuple[str, str] | None:
    if isinstance(step, Nat):
        return str(step), "bold yellow"
    if isinstance(step, Ipvs):
        return str(step), "cyan"
    if isinstance(step, Encapsulate):
        return str(step), "magenta"
    if isinstance(step, Deliver):
        return f"✓ {step}", "green"
    if isinstance(step, Drop):
        return f"✗ {step}", "red"
    if isinstance(step, Conntrack):
        if step.reply.reversed == step.original:
            return None  # nothing to remember
        return f"conntrack expects answers {step.reply}", "dim"
    if isinstance(step, Route):
        return f"route: {step}", "red" if step.refuses else ""
    if isinstance(step, Neighbour):
        return (f"neighbour: {step}", "dim") if step.mac else (f"neighbour: {step}", "red")
    if isinstance(step, Bridge) and not step.flooded and step.port:
        if hop.direction == "out" or hop.node is None:
            return None  # the next device says it
        return f"stays on bridge {step.device}: port {step.port} by FDB", ""
    return str(step), ""


def rule_lines(rules: Sequence[Rule]) -> Iterable[tuple[str, str]]:
    """A line for each run that decided something, and one for those in a row that did not."""
    quiet: list[str] = []
    for (table, hook, outer), group in groupby(rules, key=lambda r: (r.table, r.hook, r.outer)):
        lines = list(_run(list(group), hook, table))
        if lines:
            yield from _passes(quiet)
            quiet = []
            yield from lines
        elif not outer:
            quiet.append(f"{table} {hook}")
    yield from _passes(quiet)


def _passes(quiet: Sequence[str]) -> Iterable[tuple[str, str]]:
    if quiet:
        yield f"passes {', '.join(dict.fromkeys(quiet))}", "dim"


def _run(run: Sequence[Rule], hook: str, table: str) -> Iterable[tuple[str, str]]:
    """What one run of rules through a table's hook did to the packet."""
    for index, rule in enumerate(run):
        mark = _MARKS.search(rule.rule or "")
        if mark:
            yield f"{_chains(run[: index + 1], hook, table)}: sets mark {mark[1]}", ""
        elif _CHOICE.search(rule.rule or ""):
            yield f"{_chains(run[: index + 1], hook, table)}: chooses a node by its mark", ""
    last = run[-1]
    if last.verdict in DECIDING:
        served = f" ({last.object})" if last.object else ""
        style = "bold red" if last.verdict == "drop" else ""
        yield f"{_chains(run, hook, table)}: {last.action}{served}", style


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
    if trace.tries:
        ports = "source port" if trace.tries == 1 else "source ports"
        yield Text(f"{trace.tries} {ports} tried until that endpoint was chosen.")
    if trace.application:
        name = trace.application.protocol.upper()
        yield Text.assemble((f"{name}: ", "bold"), str(trace.application))
    if trace.prediction and trace.prediction.differs:
        yield Text.assemble(("declared otherwise: ", "bold"), trace.prediction.differs[0])
    reports = {
        "packets": trace.witnesses.packets,
        "rules": trace.witnesses.rules,
        "conntrack": trace.witnesses.conntrack,
        "kernel": trace.witnesses.kernel or "ok",
        "decisions": trace.witnesses.decisions,
    }
    for name, report in reports.items():
        if report != "ok":
            yield Text.assemble((f"witness {name}: ", "bold yellow"), report)
