"""`netlab load`: a client that keeps connecting while pods come and go."""

from __future__ import annotations

import click

from netlab.cli.common import (
    complete_reference,
    lab_option,
    namespace_option,
    output_option,
    print_json,
    running_lab,
)
from netlab.problems import Exit, NetlabError, Problem


@click.command()
@click.argument("source", metavar="SRC", shell_complete=complete_reference)
@click.argument("destination", metavar="DST", shell_complete=complete_reference)
@click.option(
    "--rate",
    type=click.FloatRange(0.1, 1000),
    default=50.0,
    metavar="N",
    help="How many connections a second.  [default: 50]",
)
@click.option(
    "--duration",
    "duration_s",
    type=click.FloatRange(0.1, 3600),
    default=10.0,
    metavar="SECONDS",
    help="For how long.  [default: 10]",
)
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(0.01, 60),
    default=1.0,
    metavar="SECONDS",
    help="After how long without an answer one is lost.  [default: 1]",
)
@click.option("--port", type=click.IntRange(1, 65535), help="If DST leaves it open.")
@namespace_option
@lab_option
@output_option("json", "ndjson")
def load(
    source: str,
    destination: str,
    rate: float,
    duration_s: float,
    timeout_s: float,
    port: int | None,
    namespace: str | None,
    lab_name: str | None,
    output: str | None,
) -> int:
    """Keep opening new TCP connections from SRC to DST, and count those that had no answer.

    Exit code 0 if all had one, 1 if not.  `-o ndjson` tells of each as it ends.
    """
    lab = running_lab(lab_name)
    from netlab.lab.load import connect_again_and_again, summarized
    from netlab.trace.aim import Request, aim

    meant = aim(lab, Request(source, destination, namespace, protocol="tcp", port=port))
    if meant.port is None or meant.outside:
        hint = "a pod, a node or a host, and an address with a port"
        raise NetlabError(Problem("usage", f"{source} cannot connect to {destination}", hint=hint))
    import msgspec

    attempts = []
    for attempt in connect_again_and_again(
        meant.source.namespace, meant.destination, meant.port, rate, duration_s, timeout_s
    ):
        attempts.append(attempt)
        if output == "ndjson":
            click.echo(msgspec.json.encode(attempt))
    found = summarized(attempts)
    if output == "json":
        about = {"lab": lab.name, "from": meant.sender, "to": meant.to, "port": meant.port}
        print_json({**about, **msgspec.to_builtins(found)})
    elif output is None:
        click.echo(
            f"{'✗' if found.lost else '✓'} {meant.sender} → {meant.to}: "
            f"{found.connections} connections, {found.lost} lost"
        )
        for result, count in found.results.items():
            if result != "answered":
                click.echo(f"  {result}: {count}")
        if found.lost:
            click.echo(f"  from {found.first_lost_s} s to {found.last_lost_s} s")
    return int(Exit.NO if found.lost else Exit.YES)
