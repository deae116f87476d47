"""Reports of `netlab bench`: a benchmark run, and its report put where it is wanted."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from netlab.cli.common import require_root
from netlab.problems import Exit, NetlabError, Problem

if TYPE_CHECKING:
    from netlab.bench.model import Kind, Report
    from netlab.bench.run import Progress, Recorder

FORMATS = ("json", "csv", "markdown", "html")
_SUFFIXES = {".json": "json", ".csv": "csv", ".md": "markdown", ".html": "html", ".htm": "html"}


def run_and_tell(
    kind: Kind,
    chosen: Any,
    cost: float,
    benchmark: Callable[[Recorder, Progress], None],
    output: str | None,
    files: Sequence[str],
) -> int:
    """Measure and tell; the exit code."""
    import msgspec

    from netlab.bench.conclusions import conclude
    from netlab.bench.run import Progress, run
    from netlab.doctor import preflight

    require_root()
    formats = check_files(files)
    if output == "html":
        _check_plots()
    preflight()
    for number in (signal.SIGTERM, signal.SIGHUP):  # labs are taken down, and a report is made
        signal.signal(number, signal.default_int_handler)
    told = msgspec.to_builtins(chosen, enc_hook=str)
    if "modes" in told:
        told["modes"] = [str(mode) for mode in chosen.modes]
    progress = Progress(cost)
    try:
        found = run(kind, told, lambda recorder: benchmark(recorder, progress), conclude)
    finally:
        progress.close()
    tell([found], output, formats)
    if found.complete:
        return int(Exit.YES)
    click.echo(f"the run was not completed: {found.ended_by}", err=True)
    return int(Exit.INTERRUPTED if found.ended_by == "interrupted" else Exit.UNOBSERVED)


def check_files(files: Sequence[str]) -> dict[str, str]:
    """The format of each file, by its ending; NetlabError before anything is measured."""
    from netlab.bench.schema import check_writable

    formats = {}
    for path in files:
        ending = next((suffix for suffix in _SUFFIXES if path.endswith(suffix)), None)
        if ending is None:
            raise NetlabError(
                Problem(
                    "bad-report",
                    f'"{path}" does not say what it is to be',
                    hint=f"a name that ends in {', '.join(_SUFFIXES)}",
                )
            )
        check_writable(path)
        formats[path] = _SUFFIXES[ending]
    if "html" in formats.values():
        _check_plots()
    return formats


def _check_plots() -> None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise NetlabError(
            Problem(
                "missing-library",
                "reports in HTML need matplotlib, which is not installed",
                hint="`pip install netlab-datapath[report]`; or -o markdown",
            ),
            Exit.MACHINE,
        )


def tell(reports: list[Report], output: str | None, files: dict[str, str]) -> None:
    from netlab.bench.schema import write

    if output:
        sys.stdout.write(_text(reports, output))
    elif not files or sys.stdout.isatty():
        from netlab.report.bench_tables import as_terminal

        for each in reports:
            click.echo(as_terminal(each))
    problems: list[Problem] = []
    for path, kind in files.items():
        text = _text(reports, kind)
        try:
            write(path, text)
            click.echo(f"wrote {path}", err=True)
        except NetlabError as error:
            problems += error.problems
            if not output:  # what took minutes to measure is not lost
                sys.stdout.write(text)
    if problems:
        raise NetlabError(problems, Exit.MACHINE)


def _text(reports: list[Report], kind: str) -> str:
    from netlab.report import bench_tables

    if kind == "json":
        from netlab.bench.model import encode

        if len(reports) > 1:
            raise NetlabError(
                Problem("bad-report", "JSON holds one report; HTML, CSV and Markdown hold several")
            )
        return encode(reports[0]).decode() + "\n"
    if kind == "csv":
        return bench_tables.as_csv(reports)
    if kind == "markdown":
        return bench_tables.as_markdown(reports)
    from netlab.report.bench_html import as_html

    return as_html(reports)
