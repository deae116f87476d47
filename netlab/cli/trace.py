"""`netlab trace`."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Literal

import click

from netlab.cli.common import (
    complete_reference,
    declared_lab,
    lab_option,
    namespace_option,
    output_option,
)
from netlab.problems import Exit

if TYPE_CHECKING:
    from netlab.topology.model import Lab
    from netlab.trace.aim import Request
    from netlab.trace.model import ProbeProtocol


@click.command()
@click.argument("source", metavar="SRC", shell_complete=complete_reference)
@click.argument("destination", metavar="DST", shell_complete=complete_reference)
@click.option(
    "--protocol",
    type=click.Choice(("tcp", "udp", "icmp")),
    help="What to send.  [default: what the Service port says, else tcp; icmp without a port]",
)
@click.option(
    "--port", type=click.IntRange(1, 65535), help="Destination port, if DST leaves it open."
)
@click.option(
    "-4", "--ipv4", "family", type=int, flag_value=4, help="Over IPv4, in a lab of both families."
)
@click.option("-6", "--ipv6", "family", type=int, flag_value=6, help="Over IPv6.")
@click.option(
    "--source-port",
    type=click.IntRange(1, 65535),
    metavar="PORT",
    help="Send from this port, as a client that always uses the same.",
)
@click.option(
    "--size",
    type=click.IntRange(1, 65535),
    metavar="BYTES",
    help="Length of the IP packet, over UDP and ICMP; it may not be fragmented.",
)
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(0.01, 60),
    metavar="SECONDS",
    help="How long to wait for an answer; over TCP at most 0.95.  [default: 0.8]",
)
@click.option(
    "--predict", is_flag=True, help="Send nothing: tell what should happen, by what is declared."
)
@click.option(
    "--topology",
    metavar="TOPOLOGY",
    type=click.Path(allow_dash=True),
    help="With --predict: the lab of a file, or a shipped topology, which need not be up.",
)
@namespace_option
@lab_option
@output_option("json")
def trace(
    source: str,
    destination: str,
    protocol: ProbeProtocol | None,
    port: int | None,
    family: Literal[4, 6] | None,
    source_port: int | None,
    size: int | None,
    timeout_s: float | None,
    predict: bool,
    topology: str | None,
    namespace: str | None,
    lab_name: str | None,
    output: str | None,
) -> int:
    """Send one probe from SRC to DST and tell what happened to it, there and back.

    SRC is a pod, a node, or an address of one.  DST is a pod, svc/NAME, svc/NAME:PORT, an address
    with or without :PORT, or node/NAME:PORT.

    The exit code is 0 if it was delivered there and back, 1 if it was rejected or dropped, 4 if it
    could not be observed; with --predict, what it should be.
    """
    # Nothing that one command makes is garbage before it ends.
    gc.disable()
    if topology and not predict:
        raise click.UsageError("--topology goes with --predict: only a lab that is up is traced")
    declared = _loaded(topology) if topology else declared_lab(lab_name)
    from netlab.trace.aim import DEFAULT_TIMEOUT_S, Request

    request = Request(
        source=source,
        destination=destination,
        namespace=namespace,
        protocol=protocol,
        port=port,
        family=family,
        timeout_s=DEFAULT_TIMEOUT_S if timeout_s is None else timeout_s,
        size=size,
        source_port=source_port,
    )
    if predict:
        return _foretell(declared, request, output)
    from netlab.datapath.faults import faulty
    from netlab.trace.run import trace as run

    found = run(faulty(declared), request, declared)
    if output == "json":
        from netlab.trace.model import encode

        click.echo(encode(found).decode())
    else:
        from rich.console import Console

        from netlab.report.terminal import print_trace

        console = Console(highlight=False)
        # rich would end with 1, which says that the packet was dropped.
        console.on_broken_pipe = _raise_broken_pipe  # type: ignore[method-assign]
        print_trace(found, console)
    exits = {"delivered": Exit.YES, "unobserved": Exit.UNOBSERVED}
    return exits.get(found.disposition, Exit.NO)


def _loaded(topology: str) -> Lab:
    from netlab.topology.load import load

    loaded = load(topology)
    for warning in loaded.warnings:
        click.echo(str(warning), err=True)
    return loaded.lab


def _foretell(lab: Lab, request: Request, output: str | None) -> int:
    """Print what should become of a probe; whether it should be delivered."""
    from netlab.trace.prediction import foretell

    foretold = foretell(lab, request)
    if output == "json":
        from netlab.trace.model import encode

        click.echo(encode(foretold).decode())
    else:
        from rich.console import Console

        from netlab.report.prediction import print_foretold

        console = Console(highlight=False)
        console.on_broken_pipe = _raise_broken_pipe  # type: ignore[method-assign]
        print_foretold(foretold, console)
    ways = [foretold.prediction, *foretold.prediction.others]
    return Exit.YES if all(way.disposition == "delivered" for way in ways) else Exit.NO


def _raise_broken_pipe() -> None:
    raise BrokenPipeError
