"""Two runs of a benchmark compared, as a table."""

from __future__ import annotations

from collections.abc import Sequence

from netlab.bench.compare import Row
from netlab.bench.model import number

_SIGNS = {"worse": "✗", "better": "✓"}


def as_markdown(rows: Sequence[Row], sentences: Sequence[str]) -> str:
    """A list of sentences and a table; what differs comes first."""
    lines = [*(f"- {each}" for each in sentences), ""]
    lines += ["| | what | mode | Services | old | new | ratio | noise |", f"|{'---|' * 8}"]
    lines += [f"| {' | '.join(cells)} |" for cells in map(_cells, _ordered(rows))]
    return "\n".join(lines)


def as_terminal(rows: Sequence[Row], sentences: Sequence[str]) -> str:
    """The same with aligned columns."""
    table = [["", "what", "mode", "Services", "old", "new", "ratio", "noise"]]
    table += map(_cells, _ordered(rows))
    widths = [max(len(cells[column]) for cells in table) for column in range(len(table[0]))]
    lines = [
        "   ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        for cells in table
    ]
    return "\n".join([*lines, "", *sentences])


def _ordered(rows: Sequence[Row]) -> list[Row]:
    order = ["worse", "better", "not comparable", "gone", "new", "no difference"]
    return sorted(rows, key=lambda row: order.index(row.verdict))


def _cells(row: Row) -> list[str]:
    return [
        f"{_SIGNS.get(row.verdict, ' ')} {row.verdict}".strip(),
        row.what,
        row.mode or "netlab",
        f"{row.services:,}" if row.services else "",
        _value(row.old, row.unit),
        _value(row.new, row.unit),
        f"{row.ratio:.2f}" if row.ratio is not None else "",
        f"± {100 * row.explained:.0f} %" if row.explained is not None else "",
    ]


def _value(value: float | None, unit: str) -> str:
    return "–" if value is None else f"{number(value, 4)} {unit}"
