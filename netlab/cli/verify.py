"""`netlab verify`: the demands of the network model, and every Service, for every pair."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import click

from netlab.cli.common import lab_option, output_option, require_root
from netlab.problems import Exit, NetlabError, Problem

if TYPE_CHECKING:
    from collections.abc import Iterable

    from netlab.verify.model import Demand

_PARTS: tuple[Demand, ...] = ("pod-to-pod", "node-to-pod", "own-address", "outside", "service")


@click.command()
@click.option(
    "--only",
    type=click.Choice(_PARTS),
    multiple=True,
    help="Only this demand; may be repeated.",
)
@click.option(
    "--junit",
    metavar="FILE",
    type=click.Path(dir_okay=False),
    help="Write JUnit XML there: a test for each pair.",
)
@lab_option
@output_option("json")
def verify(
    only: tuple[Demand, ...], junit: str | None, lab_name: str | None, output: str | None
) -> int:
    """Check that a lab keeps what Kubernetes demands of a network.

    Pods reach pods, and nodes reach pods, without NAT; a pod sees its own address as others do;
    every Service is reached from every pod and node, and node ports from hosts of the nodes'
    network; pods and nodes reach the hosts outside.  Real packets are sent for every pair.  What
    the topology breaks on purpose stands in its spec.verify.expect; refusals by NetworkPolicies
    and of Services without endpoints are foreseen.

    Exit code 0 if all is as declared, 1 if not.
    """
    require_root()
    from netlab.lab import named
    from netlab.report import verify as report
    from netlab.verify.model import encode
    from netlab.verify.run import verify as run

    lab = named.declared_lab(lab_name)
    file = None if junit is None else _opened(junit)
    try:
        verified = run(lab, only or _PARTS, _show if sys.stderr.isatty() else _quiet)
    except FileNotFoundError as error:
        raise NetlabError(
            Problem(
                "namespace-missing",
                f"{error.filename} is not there",
                hint=f"lab {lab.name} is not complete: `netlab up` completes it",
            ),
            Exit.MACHINE,
        ) from None
    finally:
        if sys.stderr.isatty():
            click.echo("\r\033[K", nl=False, err=True)
    if file is not None:
        _write(file, report.junit(verified))
    if output == "json":
        click.echo(encode(verified).decode())
    else:
        for line in report.terminal(verified):
            click.echo(line)
    return int(Exit.YES if verified.as_declared else Exit.NO)


def _quiet(done: int, total: int) -> None:
    """Nothing is shown where nobody watches."""


def _show(done: int, total: int) -> None:
    click.echo(f"\r{done} of {total} pairs", nl=False, err=True)


def _opened(file: str) -> int:
    """A file to write to, before anything is asked."""
    try:
        return os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise NetlabError(
            Problem("unwritable", f"{file} cannot be written: {error.strerror}")
        ) from None


def _write(file: int, lines: Iterable[str]) -> None:
    with open(file, "w", encoding="utf-8") as opened:
        opened.writelines(f"{line}\n" for line in lines)
