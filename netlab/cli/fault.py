"""`netlab fault`: put faults into a lab, to practise finding them."""

from __future__ import annotations

import gc
import shlex
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from netlab.cli.common import (
    complete_node,
    complete_reference,
    lab_option,
    namespace_option,
    output_option,
    print_json,
    require_root,
    running_lab,
)
from netlab.lab.named import naming, only_lab
from netlab.problems import Exit, NetlabError, Problem

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from netlab.lab.edits import Changed
    from netlab.topology.model import Fault, Lab


@click.group()
def fault() -> None:
    """Put faults into a lab that is up, and take them out again: to practise finding them."""


def _complete_fault(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    from netlab.datapath.faults import FAULTS

    return [
        CompletionItem(name, help=kind.sentence)
        for name, kind in FAULTS.items()
        if name.startswith(incomplete)
    ]


@fault.command("list")
@lab_option
@output_option("json", "name")
def list_(lab_name: str | None, output: str | None) -> int:
    """List the faults that there are, what they need, and those that are in the lab."""
    from netlab.datapath.faults import FAULTS

    injected = _injected(lab_name)
    told = {each.name: each for each in injected if not each.hidden}
    if output == "json":
        faults = [
            {
                "name": name,
                "sentence": kind.sentence,
                "needs": kind.needs,
                "injected": name in told,
            }
            for name, kind in FAULTS.items()
        ]
        print_json({"faults": faults, "hidden": len(injected) - len(told)})
    elif output == "name":
        click.echo("\n".join(FAULTS))
    else:
        for name, kind in FAULTS.items():
            click.echo(f"{name}{' (injected)' * (name in told)}: {kind.sentence}")
            click.echo(f"  needs {kind.needs}")
    if len(injected) > len(told):
        click.echo("there is one that is hidden: `netlab fault reveal` tells", err=True)
    return int(Exit.YES)


def _injected(lab_name: str | None) -> tuple[Fault, ...]:
    """The faults of the lab that is meant, if one is up."""
    try:
        return running_lab(lab_name).faults
    except NetlabError:
        if lab_name:
            raise
        return ()


@fault.command()
@click.argument("name", required=False, shell_complete=_complete_fault)
@click.option("--node", metavar="NODE", shell_complete=complete_node, help="On this node.")
@click.option(
    "--pod", metavar="POD", shell_complete=complete_reference, help="Met from or to this pod."
)
@click.option(
    "--service", metavar="SVC", shell_complete=complete_reference, help="Of this Service."
)
@click.option("--random", "any_", is_flag=True, help="One that is not told until `fault reveal`.")
@click.option("--seed", type=int, help="With --random: the same number, the same fault.")
@namespace_option
@lab_option
def inject(
    name: str | None,
    node: str | None,
    pod: str | None,
    service: str | None,
    any_: bool,
    seed: int | None,
    namespace: str | None,
    lab_name: str | None,
) -> int:
    """Put the fault NAME into a lab, and tell the trace that meets it."""
    from netlab.lab import faults

    if any_ is (name is not None) or (seed is not None and not any_):
        raise NetlabError(
            Problem(
                "usage",
                "fault inject takes the NAME of a fault, or --random (and then --seed)",
                hint="`netlab fault list` shows the names",
            )
        )
    if name:
        faults.known(name)
        _require(name)
        wanted = faults.Wanted(node, pod, service, namespace)
        lab = _change(lab_name, lambda lab: faults.inject(lab, name, wanted))
        click.echo(_told(lab.faults[-1]))
    elif node or pod or service:
        raise NetlabError(
            Problem("usage", "--random decides by itself where", hint="leave the place out")
        )
    else:
        has = _features()
        lab = _change(lab_name, lambda lab: faults.inject_any(lab, seed, has))
        click.echo("something is wrong now")
    click.echo(f"  next: {_trace(lab, lab.faults[-1])}", err=True)
    return int(Exit.YES)


@fault.command()
@click.argument("name", required=False, shell_complete=_complete_fault)
@lab_option
def clear(name: str | None, lab_name: str | None) -> int:
    """Take the fault NAME out of a lab, or all of them, hidden ones too."""
    from netlab.lab import faults

    before = running_lab(lab_name).faults
    lab = _change(lab_name, lambda lab: faults.clear(lab, name))
    for each in before:
        if each not in lab.faults:
            click.echo(f"cleared: {_told(each)}")
    if not before:
        click.echo("no fault is in the lab", err=True)
    return int(Exit.YES)


@fault.command()
@lab_option
def reveal(lab_name: str | None) -> int:
    """Tell which faults are in a lab, hidden ones too."""
    from netlab.lab import faults

    lab = _change(lab_name, faults.reveal)
    for each in lab.faults:
        click.echo(_told(each))
        click.echo(f"  met by {_trace(lab, each)}")
    if not lab.faults:
        click.echo("no fault is in the lab", err=True)
    return int(Exit.YES)


def _require(name: str) -> None:
    """NetlabError (exit 3) if the kernel lacks what the fault is made of."""
    from netlab.datapath.faults import FAULTS

    feature = FAULTS[name].feature
    if feature and feature not in _features():
        raise NetlabError(
            Problem(
                "feature-missing",
                f"the fault {name} needs {feature}, which this kernel does not have",
                hint="`netlab doctor` tells which module that is; `netlab vm` has a kernel with it",
            ),
            Exit.MACHINE,
        )


def _features() -> set[str]:
    """Those that the kernel has, of those that a fault needs."""
    from netlab.datapath.faults import FAULTS
    from netlab.kernel import features

    needed = sorted({kind.feature for kind in FAULTS.values() if kind.feature})
    return {name for name, outcome in features.attempt(needed).items() if outcome.ok}


def _change(lab_name: str | None, decide: Callable[[Lab], Changed]) -> Lab:
    require_root()
    gc.disable()  # (as in `up`)
    name = running_lab(lab_name).name if lab_name else only_lab()
    from netlab.lab import lifecycle

    return lifecycle.change(name, decide)[0].lab


def _told(each: Fault) -> str:
    from netlab.datapath.faults import FAULTS

    where = f"{each.name} on node {each.node}, from pod {each.client} to "
    to = f"host {each.host}" if each.host else f"pod {each.server}"
    to = f"svc/{each.service}" if each.service else to
    return f"{where}{to}: {FAULTS[each.name].sentence}"


def _trace(lab: Lab, each: Fault) -> str:
    from netlab.datapath.faults import trace_of

    return shlex.join(["netlab", "trace", *trace_of(lab, each), *naming(lab.name)])
