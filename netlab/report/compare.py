"""A comparison as a table: a column for each mode, or one table after the other where it is narrow.

From top to bottom: what became of the probe, what it met on each node there and back, what that
cost, and in sentences in what the modes differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from netlab.compare.model import Column, Comparison, Measured
from netlab.report.terminal import DECIDING, SIGNS, rule_lines
from netlab.trace.effort import Effort
from netlab.trace.model import Hop, Trace
from netlab.trace.model_steps import Nat, Rule

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

_LEAST_COLUMN = 30  # characters, for a chain's name and what leads to it
_LEAST_LABEL, _LABELS = 14, 16


class _Row(NamedTuple):
    """A line of the table: what it tells, and of each mode in lines with styles."""

    label: str
    told: Callable[[Measured], Sequence[tuple[str, str]]]
    begins: str = ""  # the part of the table that begins here


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print a comparison."""
    from rich.text import Text

    columns = comparison.columns
    rows = list(_rows(comparison))
    title = f"{comparison.from_} → {comparison.to}, in twins of lab {comparison.lab}"
    console.print(Text(title, style="bold"))
    console.print()
    if console.width >= _LABELS + len(columns) * (_LEAST_COLUMN + 2):
        console.print(_table(rows, columns))
    else:
        for column in columns:
            console.print(_table(rows, [column]))
    for sentence in comparison.differences:
        console.print(Text(f"• {sentence}"))
    console.print(Text(_verdict(comparison), style="bold"))


def _verdict(comparison: Comparison) -> str:
    measured = sum(each.measured is not None for each in comparison.columns)
    if measured < 2:
        return "There is nothing to compare it with."
    if comparison.agree:
        return "The modes agree on what becomes of it and on its translations."
    return "The modes do not agree."


def _table(rows: Iterable[_Row], columns: Sequence[Column]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold cyan")
    table.add_column("", style="bold", min_width=_LEAST_LABEL, max_width=_LABELS, overflow="fold")
    for column in columns:
        table.add_column(Text(column.name), overflow="fold", ratio=1)
    if any(each.lacking for each in columns):
        table.add_row("", *(_cell(_lacking(each)) for each in columns))
    for row in rows:
        cells = [_cell(row.told(each.measured)) if each.measured else Text() for each in columns]
        if not any(cell.plain for cell in cells):
            continue
        if row.begins:
            table.add_section()
            table.add_row(Text(row.begins, style="bold magenta"))
        table.add_row(Text(row.label), *cells)
    table.add_row()
    return table


def _lacking(column: Column) -> list[tuple[str, str]]:
    return [(f"not here: {column.lacking}", "red")] if column.lacking else []


def _cell(lines: Iterable[tuple[str, str]]) -> Text:
    from rich.text import Text

    text = Text()
    for number, (words, style) in enumerate(lines):
        text.append("\n" if number else "")
        text.append(words, style=style)
    return text


def _rows(comparison: Comparison) -> Iterator[_Row]:
    traces = [each.measured.trace for each in comparison.columns if each.measured]
    yield _Row("result", _outcome)
    yield _Row("why", lambda each: _plain(each.trace.drop.explanation if each.trace.drop else None))
    yield _Row("endpoint", _endpoint)
    yield _Row("it saw", _seen)
    for title, leg in (("there", _forward), ("back", _reply)):
        begins = title
        for node in _nodes(leg(trace) for trace in traces):
            yield _Row(node, _way(leg, node), begins)
            begins = ""
    node = comparison.node
    yield _Row("rules compared", lambda each: _effort(each, "compared"), "cost")
    yield _Row("that matched", lambda each: _effort(each, "matched"))
    yield _Row(f"on {node}", _ruleset)
    yield _Row("to load them", lambda each: _plain(f"{each.load_ms:g} ms"))
    yield _Row("first packet", _cost)


def _plain(words: str | None) -> list[tuple[str, str]]:
    return [(words, "")] if words else []


def _outcome(each: Measured) -> list[tuple[str, str]]:
    trace = each.trace
    sign, colour = SIGNS[trace.disposition]
    where = f" on {trace.drop.node}" if trace.drop and trace.drop.node else ""
    reason = f", {trace.drop.reason.replace('-', ' ')}" if trace.drop else ""
    return [(f"{sign} {trace.disposition}{where}{reason}", f"bold {colour}")]


def _endpoint(each: Measured) -> list[tuple[str, str]]:
    to = each.trace.delivered_to
    if to is None:
        return []
    where = f" on {to.node}" if to.kind == "pod" and to.node else ""
    port = "" if to.port is None else f", port {to.port}"
    return [(f"{to.name}{where}{port}", "")]


def _seen(each: Measured) -> list[tuple[str, str]]:
    trace = each.trace
    if trace.seen_source is None:
        return []
    if trace.seen_source == trace.probe.source:
        return [(f"the true source, {trace.seen_source}", "")]
    how = [step.kind for step in trace.translations if step.kind in ("snat", "masquerade")]
    return [(f"{trace.seen_source} ({how[-1]})" if how else str(trace.seen_source), "yellow")]


def _forward(trace: Trace) -> list[Hop]:
    return trace.forward


def _reply(trace: Trace) -> list[Hop]:
    return trace.reply


def _nodes(legs: Iterable[Sequence[Hop]]) -> list[str]:
    """Nodes that are passed in any mode, in order."""
    passed = (hop.node for hops in legs for hop in hops if _on_node(hop))
    return list(dict.fromkeys(filter(None, passed)))


def _on_node(hop: Hop) -> bool:
    """Whether a hop is in a node's own namespace, not in one of its pods."""
    return hop.node is not None and hop.namespace.partition(":")[2] == hop.node


def _way(
    leg: Callable[[Trace], list[Hop]], node: str
) -> Callable[[Measured], list[tuple[str, str]]]:
    return lambda each: [
        line for hop in leg(each.trace) if hop.node == node and _on_node(hop) for line in _met(hop)
    ]


def _met(hop: Hop) -> Iterator[tuple[str, str]]:
    """What decided something, in the mode's own language, and what was translated."""
    for are_rules, group in groupby(hop.steps, key=lambda step: isinstance(step, Rule)):
        if are_rules:
            rules = [step for step in group if isinstance(step, Rule)]
            yield from rule_lines(rules)
            yield from ((f"  {rule.rule}", "dim italic") for rule in rules if _decides(rule))
        else:
            yield from ((str(step), "bold yellow") for step in group if isinstance(step, Nat))


def _decides(rule: Rule) -> bool:
    return rule.rule is not None and rule.verdict in DECIDING


def _effort(each: Measured, field: str) -> list[tuple[str, str]]:
    legs: list[tuple[str, Effort | None]] = [("there", each.there), ("back", each.back)]
    told = [f"{getattr(effort, field)} {leg}" for leg, effort in legs if effort]
    if not told and field == "compared":
        return [(_untold(each.trace.witnesses.rules), "dim")]
    return _plain(", ".join(told))


def _untold(report: str) -> str:
    """Why nobody knows which rules the packet met."""
    return "not told" if report == "ok" else f"not told: {report.partition(': ')[2]}"


def _ruleset(each: Measured) -> list[tuple[str, str]]:
    held = each.ruleset
    if held is None:
        return []
    lines = [(f"{_many(held.rules, 'rule')} in {_many(held.chains, 'chain')}", "")]
    if held.sets or held.elements:
        sets = _many(held.sets, "set or map", "sets and maps")
        lines.append((f"{sets}, {_many(held.elements, 'element')}", ""))
    return lines


def _many(count: int, one: str, several: str | None = None) -> str:
    return f"{count} {one if count == 1 else several or f'{one}s'}"


def _cost(each: Measured) -> list[tuple[str, str]]:
    cost = each.cost
    if cost is None:
        return []
    count = len(cost.samples_ns)
    scatter = f" ({cost.low_us:.0f} to {cost.high_us:.0f})" if count > 1 else ""
    return [(f"{cost.median_us:.0f} µs{scatter}, {_many(count, 'probe')}", "")]
