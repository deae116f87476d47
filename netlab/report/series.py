"""A series of probes as somebody would tell it: how many arrived, where, and what went wrong."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from netlab.trace.tally import Series, Share

if TYPE_CHECKING:
    from rich.console import Console

_BAR = 20


def print_series(series: Series, console: Console) -> None:
    """Print a series."""
    from rich.text import Text

    sign, colour = _sign(series)
    console.print(Text.assemble((f"{sign} ", f"bold {colour}"), (headline(series), "bold")))
    if series.endpoints:
        console.print()
        for row in _table(series.endpoints):
            console.print(Text(row, no_wrap=True), crop=False, overflow="ignore")
    for loss in series.losses:
        where = f" on {loss.node}" if loss.node else ""
        way = "on its way there" if loss.direction == "forward" else "on its way back"
        console.print()
        reason = loss.reason.replace("-", " ")
        console.print(Text.assemble((f"{loss.count} lost {way}{where}: ", "bold"), reason))
        console.print(Text.assemble(("why: ", "bold"), loss.explanation))
        if loss.fix:
            console.print(Text.assemble(("fix: ", "bold"), loss.fix))
    if series.elapsed_us:
        spent = series.elapsed_us
        times = (each / 1000 for each in (spent.min, spent.median, spent.max))
        console.print()
        console.print(
            "answered after {:.2f} ms at least, {:.2f} (median), {:.2f} at most".format(*times)
        )


def _sign(series: Series) -> tuple[str, str]:
    """Good, bad, or not known; and its colour."""
    found = series.dispositions
    bad = series.unexpected if series.expectation else found["rejected"] or found["dropped"]
    if bad:
        return "✗", "red"
    return ("✓", "green") if series.count > found["unobserved"] == 0 else ("?", "yellow")


def headline(series: Series) -> str:
    """What became of the probes, in one line."""
    counts = (f"{count} {name}" for name, count in series.dispositions.items() if count)
    sent = f"{series.count} probes" if series.count != 1 else "1 probe"
    if series.interrupted:
        sent = f"{series.count} of {series.asked} probes"
    told = f": {', '.join(counts)}" if series.count else ""
    wrong = f", {series.unexpected.count} not as expected" if series.unexpected else ""
    return f"{sent} {series.probe.from_} → {series.probe.to}{told}{wrong}"


def _table(shares: list[Share]) -> Iterator[str]:
    """Columns: who, how often, its share, the one that the Service declares."""
    with_declared = any(each.declared_share is not None for each in shares)
    rows = [["ENDPOINT", "NODE", "PROBES", "SHARE", *(["DECLARED"] if with_declared else [])]]
    for each in shares:
        end = each.ip if each.port is None else f"{each.ip}:{each.port}"
        row = [each.name or end, each.node or "-", str(each.count), _percent(each.share)]
        if with_declared:
            row.append("-" if each.declared_share is None else _percent(each.declared_share))
        rows.append(row)
    bars = ["", *("▇" * round(each.share * _BAR) for each in shares)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row, bar in zip(rows, bars, strict=True):
        yield "   ".join(_aligned(row, widths, bar)).rstrip()


def _aligned(row: list[str], widths: list[int], bar: str) -> Iterable[str]:
    """Names to the left, numbers to the right."""
    for column, (cell, width) in enumerate(zip(row, widths, strict=True)):
        yield cell.ljust(width) if column < 2 else cell.rjust(width)
    yield bar


def _percent(share: float) -> str:
    return f"{share:.0%}" if share in (0, 1) else f"{share * 100:.1f}%"
