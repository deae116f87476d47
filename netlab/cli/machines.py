"""`netlab stop` and `netlab start`: a node's machine goes off and on again."""

from __future__ import annotations

import click

from netlab.cli.change import Options, carry_out, change_options
from netlab.problems import Exit

_nodes = click.argument("references", metavar="node/NAME...", nargs=-1, required=True)


@click.command()
@_nodes
@change_options
def stop(references: tuple[str, ...], options: Options) -> int:
    """Switch the machines of nodes off: their links are down, and nothing in them answers.

    Their endpoints are not ready.  Connections end without a word.
    """
    from netlab.lab import stopping

    return carry_out(lambda lab: stopping.stop(lab, references), options)


@click.command()
@_nodes
@change_options
def start(references: tuple[str, ...], options: Options) -> int:
    """Switch the machines of nodes on again: they are as they were declared.

    Returns when the probes of their pods have passed or failed, or after ten seconds.
    """
    from netlab.cli.common import running_lab
    from netlab.cli.lab import progress
    from netlab.lab import readiness, stopping

    code = carry_out(lambda lab: stopping.start(lab, references), options)
    if not options.dry_run and code == Exit.YES:
        readiness.await_ready(running_lab(options.lab_name), progress)
    return code
