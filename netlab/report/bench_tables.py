"""Reports of benchmarks as CSV, as Markdown, and for the terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence

from netlab.bench.model import Figure, Report, number

_SIGNS = {"reproduced": "✓", "not reproduced": "✗", "cannot be measured here": "–"}
_COLUMNS = (
    "kind",
    "what",
    "mode",
    "services",
    "unit",
    "value",
    "low",
    "high",
    "better",
    "count",
    "noise",
    "min",
    "p01",
    "p50",
    "p90",
    "p99",
    "max",
)


def as_csv(reports: Sequence[Report]) -> str:
    """A line for each figure."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for report in reports:
        for each in report.figures:
            found = each.quantiles
            quantiles: list[float | str] = [""] * 6
            if found:
                quantiles = [found.min, found.p01, found.p50, found.p90, found.p99, found.max]
            writer.writerow(
                [
                    report.kind,
                    each.what,
                    each.mode,
                    each.services,
                    each.unit,
                    each.value,
                    each.low,
                    each.high,
                    each.better,
                    each.count,
                    "" if each.noise is None else each.noise,
                    *quantiles,
                ]
            )
    return text.getvalue()


def as_markdown(reports: Sequence[Report]) -> str:
    """Sentences, tables over the number of Services, claims and the machine."""
    return "\n".join(line for report in reports for line in _markdown(report)) + "\n"


def _markdown(report: Report) -> Iterator[str]:
    yield f"## netlab bench {report.kind}"
    yield ""
    for sentence in report.sentences:
        yield f"- {_cell(sentence)}"
    for what in dict.fromkeys(each.what for each in report.figures):
        figures = [each for each in report.figures if each.what == what]
        yield from ("", f"### {what[0].upper()}{what[1:]}, {figures[0].unit}", "")
        yield from _over_services(figures)
    if report.claims:
        yield from ("", "### Claims", "", "| | claim | source | figure |", "|---|---|---|---|")
        for claim in report.claims:
            cells = (claim.text, claim.source, claim.figure)
            sign = f"{_SIGNS[claim.verdict]} {claim.verdict}"
            yield f"| {sign} | {' | '.join(map(_cell, cells))} |"
    yield from ("", f"{machine(report)}", "")


def _over_services(figures: Sequence[Figure]) -> Iterator[str]:
    """A row for each mode, a column for each number of Services; p99 where there is one."""
    sizes = sorted({each.services for each in figures})
    cells = {(each.mode, each.services): each for each in figures}
    yield f"| mode | {' | '.join(heads(sizes))} |"
    yield f"|---|{'---|' * len(sizes)}"
    for mode in dict.fromkeys(each.mode for each in figures):
        row = (told(cells.get((mode, size))) for size in sizes)
        yield f"| {mode or 'netlab'} | {' | '.join(row)} |"


def heads(sizes: Sequence[int]) -> list[str]:
    """What stands above the columns of numbers of Services."""
    if list(sizes) == [0]:
        return ["median"]
    return [f"{size:,} Services" if size else "no Services" for size in sizes]


def told(figure: Figure | None) -> str:
    """A value with its interval, and the 99th percentile: "6.8 (6.5–8.1), p99 21"."""
    if figure is None:
        return "–"
    text = number(figure.value, 4)
    if figure.low != figure.high:
        text += f" ({number(figure.low)}–{number(figure.high)})"
    if figure.quantiles:
        text += f", p99 {number(figure.quantiles.p99)}"
    return text


def machine(report: Report) -> str:
    """Where and when, in a sentence."""
    here = report.machine
    tools = ", ".join(f"{name} {said}" for name, said in here.tools.items())
    governor = here.governor or "none told"
    return (
        f"{report.started}, {report.elapsed_s:,.0f} s: {here.processors} × {here.processor}"
        f"{f' ({here.caches})' if here.caches else ''}, "
        f"{here.memory_mib:,} MiB, {here.system}, virtualisation {here.virtualisation}, governor "
        f"{governor}, load before {here.load_before}; {tools}."
    )


def as_terminal(report: Report) -> str:
    """Sentences, then a table for what most ask, then claims."""
    lines = []
    for what in dict.fromkeys(each.what for each in report.figures):
        figures = [each for each in report.figures if each.what == what]
        lines += [f"{what} ({figures[0].unit})", *_aligned(figures), ""]
    lines += [f"• {sentence}" for sentence in report.sentences]
    if report.claims:
        lines += ["", "claims"]
        for claim in report.claims:
            lines.append(f"{_SIGNS[claim.verdict]} {claim.text} ({claim.source})")
            lines.append(f"    {claim.verdict}: {claim.figure}")
    return "\n".join(lines)


def _aligned(figures: Sequence[Figure]) -> Iterator[str]:
    sizes = sorted({each.services for each in figures})
    cells = {(each.mode, each.services): each for each in figures}
    rows = [["", *heads(sizes)]]
    for mode in dict.fromkeys(each.mode for each in figures):
        rows.append([mode or "netlab", *(told(cells.get((mode, size))) for size in sizes)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(sizes) + 1)]
    for row in rows:
        line = "   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        if line.strip():
            yield f"  {line.rstrip()}"


def _cell(text: str) -> str:
    """What stands in a table of Markdown."""
    return text.replace("|", "\\|").replace("\n", " ")
