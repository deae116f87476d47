"""`netlab trace --count N`: a series of probes, its summary, and its exit code."""

from __future__ import annotations

import sys
from contextlib import closing
from typing import TYPE_CHECKING

import click

from netlab.problems import Exit

if TYPE_CHECKING:
    from rich.console import Console

    from netlab.topology.model import Lab
    from netlab.trace.aim import Request
    from netlab.trace.expectation import Expectation
    from netlab.trace.tally import Series


def run_series(
    lab: Lab,
    declared: Lab,
    request: Request,
    count: int,
    expectation: Expectation | None,
    output: str | None,
    console: Console | None,
) -> int:
    """Send `count` probes and print what they came to, or came to until Ctrl-C.

    `declared` is the lab without its faults; `console` is where it is told if `output` asks for no
    JSON.
    """
    from netlab.trace.aim import aim
    from netlab.trace.model import encode_line
    from netlab.trace.series import traces
    from netlab.trace.tally import Tally

    tally = Tally(lab, aim(lab, request), count, expectation)
    interrupted = False
    shows_progress = sys.stderr.isatty() and output != "ndjson"
    try:
        with closing(traces(lab, request, count, declared)) as found:
            for number, trace in enumerate(found, 1):
                tally.add(trace)
                if output == "ndjson":
                    click.echo(encode_line(trace).decode())
                elif shows_progress:
                    click.echo(f"\r{number} of {count}", nl=False, err=True)
    except KeyboardInterrupt:
        interrupted = True
    if shows_progress:
        click.echo("\r\x1b[K", nl=False, err=True)
    series = tally.series()
    _print(series, output, console)
    if interrupted:
        click.echo("interrupted", err=True)
        return int(Exit.INTERRUPTED)
    return _exit_code(series)


def _print(series: Series, output: str | None, console: Console | None) -> None:
    from netlab.trace.model import encode, encode_line

    if output == "ndjson":
        click.echo(encode_line(series).decode())
    elif output == "json":
        click.echo(encode(series).decode())
    elif console:
        from netlab.report.series import print_series
        from netlab.report.terminal import print_trace

        print_series(series, console)
        if series.unexpected:
            console.print(f"\nprobe {series.unexpected.first}:", style="bold")
            print_trace(series.unexpected.trace, console)
    if series.unexpected:
        first = series.unexpected
        which = f"{first.count} of {series.count} probes; number {first.first}"
        click.echo(f"not as expected: {which} {'; it '.join(first.differences)}", err=True)


def _exit_code(series: Series) -> int:
    """That of the worst trace: what is known to be wrong comes before what is not known."""
    found = series.dispositions
    expected = series.expectation
    wrong = series.unexpected if expected else found["rejected"] + found["dropped"]
    if wrong:
        return int(Exit.NO)
    return int(Exit.UNOBSERVED if found["unobserved"] else Exit.YES)
