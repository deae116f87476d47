"""`netlab bench`: what the datapaths cost, measured on this machine."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from netlab.cli.bench_report import FORMATS, check_files, run_and_tell, tell
from netlab.cli.common import print_json
from netlab.problems import Exit

if TYPE_CHECKING:
    from netlab.compare.model import Variant

Command = Callable[..., int]


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


class _Services(NamedTuple):
    """For how many Services, in which modes."""

    given: str | None
    variants: tuple[Variant, ...]
    force: bool

    def sizes(self, usual: _Amount) -> tuple[int, ...]:
        from netlab.bench import options

        return options.sizes(self.given or usual.sizes, len(self.variants), self.force)


def _of_services(function: Command) -> Command:
    """Options that come to the command as one argument, `services`."""

    @functools.wraps(function)
    def bundled(
        sizes: str | None, modes: str | None, force: bool, in_vm: bool, **others: Any
    ) -> int:
        if in_vm:
            from netlab.cli.bench_vm import measure_there

            return measure_there(others["files"])
        from netlab.bench import options

        services = _Services(sizes, options.modes(modes or options.ALL_MODES), force)
        return function(services=services, **others)

    return _with_options(
        bundled,
        click.option("--sizes", metavar="N,N", help="Numbers of Services, joined by commas."),
        click.option(
            "--modes",
            metavar="MODES",
            help="Modes of the service proxy; iptables:nft and iptables:legacy name a backend."
            "  [default: all; one that the machine lacks is skipped]",
        ),
        click.option("--force", is_flag=True, help="Sizes that take much memory, or minutes."),
        click.option(
            "--vm",
            "in_vm",
            is_flag=True,
            help="Measure all modes in a virtual machine, whose kernel has IPVS.",
        ),
    )


class _Run(NamedTuple):
    """How much is measured, and where the report goes."""

    amount: str | None
    given_rounds: int | None
    output: str | None
    files: tuple[str, ...]

    def usual(self, benchmark: str) -> _Amount:
        return _AMOUNTS[benchmark][self.amount or "default"]

    def rounds(self, usual: _Amount) -> int:
        return self.given_rounds or usual.rounds


def _of_all(function: Command) -> Command:
    """Options that come to the command as one argument, `run`."""

    @functools.wraps(function)
    def bundled(
        amount: str | None,
        rounds: int | None,
        output: str | None,
        files: tuple[str, ...],
        **others: Any,
    ) -> int:
        return function(run=_Run(amount, rounds, output, files), **others)

    return _with_options(
        bundled,
        click.option("--smoke", "amount", flag_value="smoke", help="Little, in seconds."),
        click.option("--full", "amount", flag_value="full", help="Much, in up to 20 minutes."),
        click.option(
            "--rounds", type=click.IntRange(1, 1000), metavar="N", help="Turns of each mode."
        ),
        _output_option,
        click.option(
            "--report",
            "files",
            metavar="FILE",
            multiple=True,
            help="Write a report too: .html, .json, .csv or .md; repeatable.",
        ),
    )


def _with_options(function: Command, *options: Callable[[Command], Command]) -> Command:
    for option in options:
        function = option(function)
    return function


_output_option = click.option(
    "-o", "--output", type=click.Choice(FORMATS), help="Format on standard output."
)
_endpoints_option = click.option(
    "--endpoints",
    type=click.IntRange(1, 100),
    default=2,
    show_default=True,
    help="Of each Service.",
)
_pods_option = click.option(
    "--pods", "sizes", metavar="N,N", help="Numbers of pods, joined by commas."
)
_seed_option = click.option(
    "--seed", type=int, default=1, show_default=True, help="Which Services chance chooses."
)


@bench.command()
@_of_services
@_endpoints_option
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
    services: _Services,
    endpoints: int,
    connections: int | None,
    overlay: str,
    seed: int,
    run: _Run,
) -> int:
    """Time the first packet of new connections to Services chosen at random.

    By the kernel's own stamps, between the client's device and the endpoint's, in each mode and
    for each number of Services, against the same way without Services.
    """
    from netlab.bench import lookup as measured
    from netlab.bench import options

    usual = run.usual("lookup")
    chosen = measured.Options(
        sizes=services.sizes(usual),
        modes=services.variants,
        endpoints=endpoints,
        connections=connections or usual.each,
        rounds=run.rounds(usual),
        overlay=options.overlay(overlay),
        force=services.force,
        seed=seed,
    )
    return run_and_tell(
        "lookup",
        chosen,
        measured.cost(chosen),
        functools.partial(measured.lookup, chosen),
        run.output,
        run.files,
    )


@bench.command()
@_of_services
@_endpoints_option
@click.option("--loads", type=click.IntRange(1, 1000), metavar="N", help="Full loads of each mode.")
@_of_all
def sync(
    services: _Services,
    endpoints: int,
    loads: int | None,
    run: _Run,
) -> int:
    """Time how rules get into the kernel: all of them, and changes of a few.

    With CPU, memory and lines of input, in a process that stays, as a service proxy does.
    """
    from netlab.bench import sync as measured

    usual = run.usual("sync")
    chosen = measured.Options(
        sizes=services.sizes(usual),
        modes=services.variants,
        endpoints=endpoints,
        loads=loads or usual.each,
        rounds=run.rounds(usual),
        force=services.force,
    )
    return run_and_tell(
        "sync",
        chosen,
        measured.cost(chosen),
        functools.partial(measured.sync, chosen),
        run.output,
        run.files,
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
    services: _Services,
    overlays: str,
    seconds: float | None,
    seed: int,
    run: _Run,
) -> int:
    """Count what passes through a Service: connections, packets, bulk data, and CPU for each."""
    from netlab.bench import options
    from netlab.bench import throughput as measured

    usual = run.usual("throughput")
    chosen = measured.Options(
        sizes=services.sizes(usual),
        modes=services.variants,
        overlays=tuple(map(options.overlay, map(str.strip, overlays.split(",")))),
        rounds=run.rounds(usual),
        seconds=seconds or usual.seconds,
        force=services.force,
        seed=seed,
    )
    return run_and_tell(
        "throughput",
        chosen,
        measured.cost(chosen),
        functools.partial(measured.throughput, chosen),
        run.output,
        run.files,
    )


@bench.command()
@_pods_option
@_of_all
def lifecycle(
    sizes: str | None,
    run: _Run,
) -> int:
    """Time pods up and down, against the kernel's floor, the CNI plugins and Mininet."""
    from netlab.bench import lifecycle as measured
    from netlab.bench.options import pods

    usual = run.usual("lifecycle")
    chosen = measured.Options(pods(sizes or usual.sizes), run.rounds(usual))
    return run_and_tell(
        "lifecycle",
        chosen,
        measured.cost(chosen),
        functools.partial(measured.lifecycle, chosen),
        run.output,
        run.files,
    )


@bench.command()
@_pods_option
@click.option("--pings", type=click.IntRange(1, 100_000), metavar="N", help="Of others, a round.")
@_of_all
def trace(
    sizes: str | None,
    pings: int | None,
    run: _Run,
) -> int:
    """Time traces and their witnesses, and what both cost the traffic of others."""
    from netlab.bench import tracing as measured
    from netlab.bench.options import pods

    usual = run.usual("trace")
    chosen = measured.Options(pods(sizes or usual.sizes), run.rounds(usual), pings or usual.each)
    return run_and_tell(
        "trace",
        chosen,
        measured.cost(chosen),
        functools.partial(measured.tracing, chosen),
        run.output,
        run.files,
    )


@bench.command()
@click.argument("reports", metavar="REPORT...", nargs=-1, required=True)
@_output_option
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
