"""`netlab compare`."""

from __future__ import annotations

import gc
import signal
from typing import TYPE_CHECKING, Any

import click

from netlab.cli.common import (
    complete_reference,
    lab_option,
    namespace_option,
    new_console,
    output_option,
    require_root,
)
from netlab.cli.trace import trace
from netlab.lab.named import declared_lab
from netlab.problems import Exit

if TYPE_CHECKING:
    from netlab.compare.model import Comparison

_OF_TRACE = ("protocol", "port", "ipv4", "ipv6", "source_port", "size")
_DEFAULT = "iptables,nftables,nftables-flat"


@click.command(params=[option for option in trace.params if option.name in _OF_TRACE])
@click.argument("source", metavar="SRC", shell_complete=complete_reference)
@click.argument("destination", metavar="DST", shell_complete=complete_reference)
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(0.01, 60),
    metavar="SECONDS",
    help="How long to wait for an answer; over TCP at most 0.95.  [default: 0.8]",
)
@click.option(
    "--proxy",
    metavar="MODES",
    default=_DEFAULT,
    show_default=True,
    help="Modes, joined by commas; also iptables:nft and iptables:legacy.",
)
@click.option(
    "--count",
    type=click.IntRange(1, 10_000),
    metavar="N",
    help="How many connections to time in each mode.  [default: 20]",
)
@namespace_option
@lab_option
@output_option("json")
def compare(
    source: str,
    destination: str,
    proxy: str,
    count: int | None,
    namespace: str | None,
    lab_name: str | None,
    output: str | None,
    **of_trace: Any,
) -> int:
    """Show how one packet from SRC to DST fares in each mode of the service proxy.

    Each mode gets a twin of the running lab, which is left alone; twins are taken down at the end.
    SRC, DST and the options of the probe mean what they do to `netlab trace`.

    The exit code is 0 if the modes agree on what becomes of the packet and on its translations, 1
    if they do not, 3 if the machine lacks one of them, 4 if something could not be observed.
    """
    # Nothing that one command makes is garbage before it ends.
    gc.disable()
    from netlab.compare.run import DEFAULT_COUNT
    from netlab.compare.run import compare as run
    from netlab.compare.twins import remove_orphans, variants
    from netlab.doctor import preflight
    from netlab.trace.aim import DEFAULT_TIMEOUT_S, Request

    require_root()
    wanted = variants(proxy)
    timeout_s = of_trace.pop("timeout_s")
    request = Request(
        source=source,
        destination=destination,
        namespace=namespace,
        timeout_s=DEFAULT_TIMEOUT_S if timeout_s is None else timeout_s,
        **of_trace,
    )
    preflight()
    for name in remove_orphans():
        click.echo(f"removed {name}, which a killed `netlab compare` had left", err=True)
    lab = declared_lab(lab_name)
    for number in (signal.SIGTERM, signal.SIGHUP):  # twins are taken down
        signal.signal(number, signal.default_int_handler)
    found = run(lab, request, wanted, DEFAULT_COUNT if count is None else count)
    if output == "json":
        from netlab.compare.model import encode

        click.echo(encode(found).decode())
    else:
        from netlab.report.compare import print_comparison

        print_comparison(found, new_console())
    return int(_exit(found))


def _exit(found: Comparison) -> Exit:
    if "unobserved" in found.dispositions:
        return Exit.UNOBSERVED
    if any(column.lacking for column in found.columns):
        return Exit.MACHINE
    return Exit.YES if found.agree else Exit.NO
