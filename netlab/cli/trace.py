"""`netlab trace`."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Literal

import click

from netlab.cli.common import (
    complete_reference,
    lab_option,
    namespace_option,
    output_option,
    running_lab,
)
from netlab.problems import Exit

if TYPE_CHECKING:
    from netlab.trace.model import ProbeProtocol


@click.command()
@click.argument("source", metavar="SRC", shell_complete=complete_reference)
@click.argument("destination", metavar="[DST]", required=False, shell_complete=complete_reference)
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
    help="How long to wait for an answer; over TCP at most 0.95.  [default: 0.8]  "
    "With --watch, for the packet.  [default: until Ctrl-C]",
)
@click.option(
    "--watch",
    "watched",
    metavar="[FILTER]",
    is_flag=False,
    flag_value="",
    help="Send nothing: trace the next TCP connection that SRC opens, or its ping, that FILTER, in "
    "tcpdump's language, holds for.",
)
@click.option(
    "--dropped",
    is_flag=True,
    help="With --watch: a connection that has no answer.",
)
@click.option(
    "--pcapng",
    metavar="FILE",
    type=click.Path(dir_okay=False, allow_dash=True),
    help="Write the packets to FILE for Wireshark, from all devices, with what was done to them.",
)
@namespace_option
@lab_option
@output_option("json")
def trace(
    source: str,
    destination: str | None,
    protocol: ProbeProtocol | None,
    port: int | None,
    family: Literal[4, 6] | None,
    source_port: int | None,
    size: int | None,
    timeout_s: float | None,
    watched: str | None,
    dropped: bool,
    pcapng: str | None,
    namespace: str | None,
    lab_name: str | None,
    output: str | None,
) -> int:
    """Send one probe from SRC to DST and tell what happened to it, there and back.

    SRC is a pod, a node, or an address of one.  DST is a pod, svc/NAME, svc/NAME:PORT, an address
    with or without :PORT, or node/NAME:PORT.

    The exit code is 0 if it was delivered there and back, 1 if it was rejected or dropped, 4 if it
    could not be observed.

    \b
      netlab trace pod1 svc/myblog
      netlab trace pod1 --watch 'tcp port 80'
    """
    if pcapng == "-" and output:
        raise click.UsageError(f"-o {output} and --pcapng - both write to stdout")
    if watched is not None and any((destination, protocol, port, source_port, size)):
        raise click.UsageError("a packet of SRC's own is as it is: only SRC goes with --watch")
    if watched is None and dropped:
        raise click.UsageError("--dropped tells --watch what to wait for")
    # Nothing that one command makes is garbage before it ends, unless it waits for long.
    if watched is None:
        gc.disable()
    lab = running_lab(lab_name)
    from netlab.trace.run import Recorded

    recorded: list[Recorded] = []
    if watched is not None:
        from netlab.trace.waiting import Wait, trace_next

        wait = Wait(source, watched, dropped, timeout_s, namespace, family)
        found = trace_next(
            lab, wait, recorded, lambda place: click.echo(f"waiting for {place} to send", err=True)
        )
    elif destination is None:
        raise click.UsageError("a probe needs a DST; --watch waits for a packet of SRC's own")
    else:
        from netlab.trace.aim import DEFAULT_TIMEOUT_S, Request
        from netlab.trace.run import trace as run

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
        found = run(lab, request, recorded)
    if pcapng == "-":
        from netlab.report.terminal import headline

        click.echo(headline(found), err=True)
    elif output == "json":
        from netlab.trace.model import encode

        click.echo(encode(found).decode())
    else:
        from rich.console import Console

        from netlab.report.terminal import print_trace

        console = Console(highlight=False)
        # rich would end with 1, which says that the packet was dropped.
        console.on_broken_pipe = _raise_broken_pipe  # type: ignore[method-assign]
        print_trace(found, console)
    if pcapng:
        from netlab.cli.pcapng import pcapng_stream
        from netlab.report import trace_pcapng

        with pcapng_stream(pcapng) as stream:
            trace_pcapng.write(found, recorded, stream)
    exits = {"delivered": Exit.YES, "unobserved": Exit.UNOBSERVED}
    return exits.get(found.disposition, Exit.NO)


def _raise_broken_pipe() -> None:
    raise BrokenPipeError
