"""`netlab bench`: what the datapaths cost, measured on this machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import click

from netlab.cli.bench_report import FORMATS, check_files, run_and_tell, tell
from netlab.cli.common import print_json
from netlab.problems import Exit

F = TypeVar("F", bound=Callable[..., Any])


class _Amount(NamedTuple):
    """How much is measured where no option says otherwise."""

    sizes: str
    rounds: int
    each: int  # new connections at a point, or full loads
    seconds: float = 0.0


_AMOUNTS: dict[str, dict[str, _Amount]] = {
    "lookup": {
        "smoke": _Amount("100,300,1000", 4, 400),
        "default": _Amount("100,1000,5000,10000", 60, 6_000),
        "full": _Amount("100,1000,5000,10000,20000,30000", 100, 10_000),
    },
    "sync": {
        "smoke": _Amount("100,300", 3, 2),
        "default": _Amount("100,1000,10000", 10, 3),
        "full": _Amount("100,1000,5000,10000,30000", 20, 5),
    },
    "throughput": {
        "smoke": _Amount("100", 2, 1, 0.2),
        "default": _Amount("1,1000,10000", 5, 1, 0.5),
        "full": _Amount("1,1000,10000,30000", 10, 1, 1.0),
    },
    "lifecycle": {
        "smoke": _Amount("20", 2, 1),
        "default": _Amount("50,200", 5, 1),
        "full": _Amount("50,200,500", 11, 1),
    },
    "trace": {
        "smoke": _Amount("2", 3, 100),
        "default": _Amount("4", 20, 1_000),
        "full": _Amount("4,40", 40, 1_000),
    },
}


def _print_schema(context: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    if not wanted:
        return
    from netlab.bench.schema import schema

    print_json(schema())
    context.exit()


@click.group()
@click.option(
    "--schema",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_schema,
    help="Print the JSON Schema of reports.",
)
def bench() -> None:
    """Measure what the datapaths cost on this machine, and report it.

    Each benchmark makes labs of its own, named bench-..., and takes them down at its end.  Ctrl-C
    ends it with a report of what is done by then.
    """


def _of_services(function: F) -> F:
    for option in (
        click.option("--sizes", metavar="N,N", help="Numbers of Services, joined by commas."),
        click.option(
            "--modes",
            metavar="MODES",
            help="Modes of the service proxy; iptables:nft and iptables:legacy name a backend."
            "  [default: all; one that the machine lacks is skipped]",
        ),
        click.option("--force", is_flag=True, help="Sizes that take much memory, or minutes."),
    ):
        function = option(function)
    return function


def _of_all(function: F) -> F:
    for option in (
        click.option("--smoke", "amount", flag_value="smoke", help="Little, in seconds."),
        click.option("--full", "amount", flag_value="full", help="Much, in up to 20 minutes."),
        click.option(
            "--rounds", type=click.IntRange(1, 1000), metavar="N", help="Turns of each mode."
        ),
        click.option(
            "-o", "--output", type=click.Choice(FORMATS), help="Format on standard output."
        ),
        click.option(
            "--report",
            "files",
            metavar="FILE",
            multiple=True,
            help="Write a report too: .html, .json, .csv or .md; repeatable.",
        ),
    ):
        function = option(function)
    return function


def _seed_option(function: F) -> F:
    return click.option(
        "--seed", type=int, default=1, show_default=True, help="Which Services chance chooses."
    )(function)


@bench.command()
@_of_services
@click.option(
    "--endpoints",
    type=click.IntRange(1, 100),
    default=2,
    show_default=True,
    help="Of each Service.",
)
@click.option(
    "--connections", type=click.IntRange(1, 1_000_000), metavar="N", help="New ones at each point."
)
@click.option(
    "--overlay",
    default="vxlan",
    show_default=True,
    metavar="TYPE",
    help="Between the two nodes; over host-gw no packet carries another.",
)
@_seed_option
@_of_all
def lookup(
    sizes: str | None,
    modes: str | None,
    force: bool,
    endpoints: int,
    connections: int | None,
    overlay: str,
    seed: int,
    amount: str | None,
    rounds: int | None,
    output: str | None,
    files: tuple[str, ...],
) -> int:
    """Time the first packet of new connections to Services chosen at random.

    By the kernel's own stamps, between the client's device and the endpoint's, in each mode and
    for each number of Services, against the same way without Services.
    """
    from netlab.bench import lookup as measured
    from netlab.bench import options

    usual = _AMOUNTS["lookup"][amount or "default"]
    wanted = options.modes(modes or options.ALL_MODES)
    chosen = measured.Options(
        sizes=options.sizes(sizes or usual.sizes, len(wanted), force),
        modes=wanted,
        endpoints=endpoints,
        connections=connections or usual.each,
        rounds=rounds or usual.rounds,
        overlay=options.overlay(overlay),
        force=force,
        seed=seed,
    )
    return run_and_tell(
        "lookup",
        chosen,
        measured.cost(chosen),
        lambda recorder, progress: measured.lookup(chosen, recorder, progress),
        output,
        files,
    )


@bench.command()
@_of_services
@click.option(
    "--endpoints",
    type=click.IntRange(1, 100),
    default=2,
    show_default=True,
    help="Of each Service.",
)
@click.option("--loads", type=click.IntRange(1, 1000), metavar="N", help="Full loads of each mode.")
@_of_all
def sync(
    sizes: str | None,
    modes: str | None,
    force: bool,
    endpoints: int,
    loads: int | None,
    amount: str | None,
    rounds: int | None,
    output: str | None,
    files: tuple[str, ...],
) -> int:
    """Time how rules get into the kernel: all of them, and changes of a few.

    With CPU, memory and lines of input, in a process that stays, as a service proxy does.
    """
    from netlab.bench import options
    from netlab.bench import sync as measured

    usual = _AMOUNTS["sync"][amount or "default"]
    wanted = options.modes(modes or options.ALL_MODES)
    chosen = measured.Options(
        sizes=options.sizes(sizes or usual.sizes, len(wanted), force),
        modes=wanted,
        endpoints=endpoints,
        loads=loads or usual.each,
        rounds=rounds or usual.rounds,
        force=force,
    )
    return run_and_tell(
        "sync",
        chosen,
        measured.cost(chosen),
        lambda recorder, progress: measured.sync(chosen, recorder, progress),
        output,
        files,
    )


@bench.command()
@_of_services
@click.option(
    "--overlays", default="vxlan", show_default=True, metavar="TYPES", help="Joined by commas."
)
@click.option("--seconds", type=click.FloatRange(0.05, 600), help="Of each measurement.")
@_seed_option
@_of_all
def throughput(
    sizes: str | None,
    modes: str | None,
    force: bool,
    overlays: str,
    seconds: float | None,
    seed: int,
    amount: str | None,
    rounds: int | None,
    output: str | None,
    files: tuple[str, ...],
) -> int:
    """Count what passes through a Service: connections, packets, bulk data, and CPU for each."""
    from netlab.bench import options
    from netlab.bench import throughput as measured

    usual = _AMOUNTS["throughput"][amount or "default"]
    wanted = options.modes(modes or options.ALL_MODES)
    chosen = measured.Options(
        sizes=options.sizes(sizes or usual.sizes, len(wanted), force),
        modes=wanted,
        overlays=tuple(map(options.overlay, map(str.strip, overlays.split(",")))),
        rounds=rounds or usual.rounds,
        seconds=seconds or usual.seconds,
        force=force,
        seed=seed,
    )
    return run_and_tell(
        "throughput",
        chosen,
        measured.cost(chosen),
        lambda recorder, progress: measured.throughput(chosen, recorder, progress),
        output,
        files,
    )


@bench.command()
@click.option("--pods", "sizes", metavar="N,N", help="Numbers of pods, joined by commas.")
@_of_all
def lifecycle(
    sizes: str | None,
    amount: str | None,
    rounds: int | None,
    output: str | None,
    files: tuple[str, ...],
) -> int:
    """Time pods up and down, against the kernel's floor, the CNI plugins and Mininet."""
    from netlab.bench import lifecycle as measured
    from netlab.bench.options import pods

    usual = _AMOUNTS["lifecycle"][amount or "default"]
    chosen = measured.Options(pods(sizes or usual.sizes), rounds or usual.rounds)
    return run_and_tell(
        "lifecycle",
        chosen,
        measured.cost(chosen),
        lambda recorder, progress: measured.lifecycle(chosen, recorder, progress),
        output,
        files,
    )


@bench.command()
@click.option("--pods", "sizes", metavar="N,N", help="Numbers of pods, joined by commas.")
@click.option("--pings", type=click.IntRange(1, 100_000), metavar="N", help="Of others, a round.")
@_of_all
def trace(
    sizes: str | None,
    pings: int | None,
    amount: str | None,
    rounds: int | None,
    output: str | None,
    files: tuple[str, ...],
) -> int:
    """Time traces and their witnesses, and what both cost the traffic of others."""
    from netlab.bench import tracing as measured
    from netlab.bench.options import pods

    usual = _AMOUNTS["trace"][amount or "default"]
    chosen = measured.Options(
        pods(sizes or usual.sizes), rounds or usual.rounds, pings or usual.each
    )
    return run_and_tell(
        "trace",
        chosen,
        measured.cost(chosen),
        lambda recorder, progress: measured.tracing(chosen, recorder, progress),
        output,
        files,
    )


@bench.command()
@click.argument("reports", metavar="REPORT...", nargs=-1, required=True)
@click.option("-o", "--output", type=click.Choice(FORMATS), help="Format on standard output.")
@click.option("--report", "files", metavar="FILE", multiple=True, help="Write a file; repeatable.")
def report(reports: tuple[str, ...], output: str | None, files: tuple[str, ...]) -> int:
    """Show reports that were written as JSON, several of them as one."""
    from netlab.bench.schema import read

    formats = check_files(files)
    tell([read(path) for path in reports], output, formats)
    return int(Exit.YES)


@bench.command("compare")
@click.argument("old", metavar="OLD")
@click.argument("new", metavar="NEW")
@click.option(
    "--least",
    type=click.FloatRange(0, 1000),
    default=5,
    show_default=True,
    metavar="PERCENT",
    help="Differences below are none.",
)
@click.option(
    "-o", "--output", type=click.Choice(["json", "markdown"]), help="Format on standard output."
)
def compare_(old: str, new: str, least: float, output: str | None) -> int:
    """Compare two reports, with their noise taken into account; also of pytest-benchmark.

    The exit code is 1 if a figure is worse than noise explains.
    """
    import msgspec

    from netlab.bench.compare import COMPARED, compare, read, regressions, sentences
    from netlab.report.bench_comparison import as_markdown, as_terminal

    before, after = read(old), read(new)
    rows = compare(before, after, least / 100)
    said = sentences(before, after, rows)
    if output == "json":
        print_json({"schema": COMPARED, "sentences": said, "figures": msgspec.to_builtins(rows)})
    elif output == "markdown":
        click.echo(as_markdown(rows, said))
    else:
        click.echo(as_terminal(rows, said))
    return int(Exit.NO if regressions(rows) else Exit.YES)
