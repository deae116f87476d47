"""Reports of benchmarks as one page of HTML that stands by itself: no script, nothing fetched.

Numbers of the tables carry the exact value of the JSON as `data-value`, and the reports themselves
are in the page as JSON, so that who has the page has the data.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence

from netlab.bench import lookup
from netlab.bench.conclusions import curves
from netlab.bench.model import Figure, Report, encode, number
from netlab.report import bench_plots
from netlab.report.bench_tables import heads, machine

_TITLES = {
    "lookup": "What service rules cost a packet",
    "sync": "What it takes to bring rules into the kernel",
    "throughput": "What passes through a Service",
    "lifecycle": "Pods up and down",
    "trace": "What a trace costs",
}
# What a table tells as well as a drawing.
_NOT_DRAWN = (": operations", "of the loader", "that stays")
_SIGNS = {"reproduced": "✓", "not reproduced": "✗", "cannot be measured here": "–"}
_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 72rem;
  padding: 0 1rem 3rem; color: #1a1a1a; background: #fff; }
h1 { font-size: 1.6rem; }
h2 { font-size: 1.3rem; border-bottom: 1px solid #ccc; margin-top: 2.5rem; }
h3 { font-size: 1.05rem; margin-bottom: .3rem; }
.plots { display: grid; gap: 1rem; margin-top: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
figure { margin: 0; break-inside: avoid; }
figure svg { width: 100%; height: auto; }
figcaption { font-weight: 600; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: left;
  vertical-align: top; }
td.number { text-align: right; white-space: nowrap; }
td small { color: #555; display: block; }
.reproduced { color: #00684a; }
.not-reproduced { color: #a12a00; }
.cannot-be-measured-here { color: #555; }
td.verdict { white-space: nowrap; font-weight: 600; }
.partial { background: #fff3cd; padding: .6rem 1rem; }
.machine { color: #444; font-size: .9rem; }
@media (max-width: 40rem) {
  td.verdict { white-space: normal; }
  .claims td { padding: .25rem .3rem; }
}
@media print {
  body { max-width: none; font-size: 10pt; }
  .scroll { overflow: visible; }
  h2, h3 { break-after: avoid; }
  tr { break-inside: avoid; }
}
"""


def as_html(reports: Sequence[Report]) -> str:
    """The page."""
    return "".join(_page(reports))


def _page(reports: Sequence[Report]) -> Iterator[str]:
    yield '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>netlab bench</title><style>{_STYLE}</style></head><body>"
    yield "<h1>netlab bench</h1>"
    for place, report in enumerate(reports):
        yield from _section(report, place)
    for place, report in enumerate(reports):
        # Within a script element nothing may look like a tag.
        data = encode(report).decode().replace("<", "\\u003c")
        yield f'<script type="application/json" id="report-{place}">{data}</script>'
    yield "</body></html>\n"


def _section(report: Report, number: int) -> Iterator[str]:
    yield f'<section id="{report.kind}-{number}"><h2>{_TITLES[report.kind]}</h2>'
    if not report.complete:
        yield (
            f'<p class="partial">Not completed: {_text(report.ended_by)}. '
            "What was done by then is here.</p>"
        )
    yield "<ul>"
    for sentence in report.sentences:
        yield f"<li>{_text(sentence)}</li>"
    yield "</ul>"
    yield from _claims(report)
    yield '<div class="plots">'
    yield from _plots(report, number)
    yield "</div>"
    for what in dict.fromkeys(each.what for each in report.figures):
        yield from _table([each for each in report.figures if each.what == what])
    yield f'<p class="machine">{_text(machine(report))}</p></section>'


def _plots(report: Report, number: int) -> Iterator[str]:
    def drawn(title: str, svg: str) -> str:
        return f"<figure><figcaption>{_text(title)}</figcaption>{svg}</figure>"

    for what in dict.fromkeys(each.what for each in report.figures):
        if what.endswith(_NOT_DRAWN):
            continue
        found = curves(report, what)
        figures = [each for each in report.figures if each.what == what]
        title, unit = f"{what[0].upper()}{what[1:]}", figures[0].unit
        if len({each.services for each in figures}) > 1:
            yield drawn(title, bench_plots.over_services(f"{title} {number}", found, _sign(unit)))
        elif len(figures) > 1:
            named = {mode: each[0] for mode, each in found.items()}
            yield drawn(title, bench_plots.bars(f"{title} {number}", named, _sign(unit)))
    fits = [each for each in report.fits if each.what.startswith(lookup.BY_POSITION)]
    for what in {max(fits, key=lambda each: each.last).what} if fits else ():  # most Services
        title = f"{what[0].upper()}{what[1:]}"
        lines = [each for each in fits if each.what == what]
        yield drawn(title, bench_plots.by_position(f"{title} {number}", lines))


def _table(figures: Sequence[Figure]) -> Iterator[str]:
    sizes = sorted({each.services for each in figures})
    cells = {(each.mode, each.services): each for each in figures}
    first = figures[0]
    yield f"<h3>{_text(first.what[0].upper() + first.what[1:])}, {_sign(first.unit)}</h3>"
    yield '<div class="scroll"><table><thead><tr><th></th>'
    for head in heads(sizes):
        yield f"<th>{head}</th>"
    yield "</tr></thead><tbody>"
    for mode in dict.fromkeys(each.mode for each in figures):
        yield f"<tr><th>{_text(mode or 'netlab')}</th>"
        for size in sizes:
            yield _number(cells.get((mode, size)))
        yield "</tr>"
    yield "</tbody></table></div>"


def _number(figure: Figure | None) -> str:
    if figure is None:
        return '<td class="number">–</td>'
    small = f"{number(figure.low)} to {number(figure.high)}" if figure.low != figure.high else ""
    if figure.quantiles:
        small += f"; p01 {number(figure.quantiles.p01)}, p90 {number(figure.quantiles.p90)}, "
        small += f"p99 {number(figure.quantiles.p99)}"
    return (
        f'<td class="number" data-what="{_text(figure.what)}" data-mode="{_text(figure.mode)}" '
        f'data-services="{figure.services}" data-value="{figure.value!r}">'
        f"{number(figure.value, 4)}<small>{small}</small></td>"
    )


def _claims(report: Report) -> Iterator[str]:
    if not report.claims:
        return
    yield '<h3>What others say</h3><div class="scroll"><table class="claims"><thead><tr><th></th>'
    yield "<th>claim</th><th>measured</th></tr></thead><tbody>"
    for claim in report.claims:
        kind = claim.verdict.replace(" ", "-")
        yield (
            f'<tr><td class="verdict {kind}">{_SIGNS[claim.verdict]} {claim.verdict}</td>'
            f"<td>{_text(claim.text)}<small>{_text(claim.source)}</small></td>"
            f"<td>{_text(claim.figure)}</td></tr>"
        )
    yield "</tbody></table></div>"


def _sign(unit: str) -> str:
    return unit.replace("us", "µs")


def _text(text: str) -> str:
    return html.escape(text)
