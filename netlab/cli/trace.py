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
    from netlab.trace.form import AskedProtocol


@click.command()
@click.argument("source", metavar="SRC", shell_complete=complete_reference)
@click.argument("destination", metavar="DST", shell_complete=complete_reference)
@click.option(
    "--protocol",
    type=click.Choice(("tcp", "udp", "icmp", "http", "dns")),
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
@click.option("--fragment", is_flag=True, help="Let it be fragmented, with --size.")
@click.option(
    "--ttl",
    type=click.IntRange(1, 255),
    metavar="HOPS",
    help="TTL of the probe, over IPv6 its hop limit.",
)
@click.option(
    "--from-address",
    metavar="ADDRESS",
    help="Send from this address, whether SRC has it or not.",
)
@click.option("--path", metavar="PATH", help="What to ask for over HTTP.  [default: /]")
@click.option(
    "--query",
    metavar="NAME",
    help="Name to ask for over DNS.  [default: kubernetes.default.svc.cluster.local]",
)
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(0.01, 60),
    metavar="SECONDS",
    help="How long to wait for an answer; over TCP at most 0.95.  [default: 0.8]",
)
@namespace_option
@lab_option
@output_option("json")
def trace(
    source: str,
    destination: str,
    protocol: AskedProtocol | None,
    port: int | None,
    family: Literal[4, 6] | None,
    source_port: int | None,
    size: int | None,
    fragment: bool,
    ttl: int | None,
    from_address: str | None,
    path: str | None,
    query: str | None,
    timeout_s: float | None,
    namespace: str | None,
    lab_name: str | None,
    output: str | None,
) -> int:
    """Send one probe from SRC to DST and tell what happened to it, there and back.

    SRC is a pod, a node, an address of one, or an address outside the lab, from where one comes by
    the underlay's gateway.  DST is a pod, svc/NAME, svc/NAME:PORT, an address
    with or without :PORT, or node/NAME:PORT.

    The exit code is 0 if it was delivered there and back, 1 if it was rejected or dropped, 4 if it
    could not be observed.
    """
    # Nothing that one command makes is garbage before it ends.
    gc.disable()
    lab = running_lab(lab_name)
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
        fragment=fragment,
        ttl=ttl,
        from_address=from_address,
        path=path,
        query=query,
    )
    found = run(lab, request)
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


def _raise_broken_pipe() -> None:
    raise BrokenPipeError
