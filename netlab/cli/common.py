"""What commands share: which lab is meant, how lists are printed, what completes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from netlab.problems import Exit, NetlabError, Problem, suggest

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem
    from rich.console import Console

    from netlab.topology.model import Lab, Node

F = TypeVar("F", bound=Callable[..., Any])


def lab_option(function: F) -> F:
    """`--lab NAME`: which lab, if more than one is up."""
    return click.option(
        "--lab",
        "lab_name",
        metavar="NAME",
        envvar="NETLAB_LAB",
        shell_complete=complete_lab,
        help="Which lab, if more than one is up.",
    )(function)


def namespace_option(function: F) -> F:
    """`-n NAMESPACE`: where to look for bare names."""
    return click.option(
        "-n", "--namespace", metavar="NAMESPACE", help="Kubernetes namespace of bare names."
    )(function)


def output_option(*formats: str) -> Callable[[F], F]:
    """`-o FORMAT`."""

    def decorate(function: F) -> F:
        return click.option("-o", "--output", type=click.Choice(formats), help="Output format.")(
            function
        )

    return decorate


def proxy_mode_option(name: str, help: str) -> Callable[[F], F]:
    """`--proxy MODE` of `up`, `--mode MODE` of `proxy`."""
    return click.option(name, "mode", metavar="MODE", shell_complete=_complete_mode, help=help)


def selection_options(function: F) -> F:
    """`--only REFERENCE` and `--nodes NAMES`: a part of a topology."""
    only = click.option(
        "--only",
        metavar="REF",
        multiple=True,
        help="Only what this needs: svc/NAME with the pods behind it, or pod/NAME; repeatable.",
    )
    nodes = click.option(
        "--nodes",
        metavar="A,B",
        default="",
        callback=_names,
        help="Only these nodes, and the pods on them.",
    )
    return only(nodes(function))


def _names(context: click.Context, option: click.Parameter, text: str) -> tuple[str, ...]:
    """Names joined by commas."""
    names = tuple(filter(None, map(str.strip, text.split(","))))
    if not names and context.get_parameter_source(option.name or "") == ParameterSource.COMMANDLINE:
        raise click.BadParameter("it names no node", context, option)
    return names


def iptables_backend_option(function: F) -> F:
    """`--iptables-backend nft|legacy`."""
    return click.option(
        "--iptables-backend",
        "backend",
        type=click.Choice(["nft", "legacy"]),
        help="Keep rules of mode iptables there, whatever the file says and plain iptables is.",
    )(function)


def _complete_mode(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    from netlab.topology.allocate import PROXY_MODES

    return [CompletionItem(mode) for mode in PROXY_MODES if mode.startswith(incomplete)]


def require_root() -> None:
    """NetlabError (exit 3) if we are not root; its hint is the command that was typed."""
    if os.geteuid() != 0:
        context = click.get_current_context(silent=True)
        command = context.command_path if context else "netlab"
        raise NetlabError(
            Problem(
                "not-root",
                f"`{command}` needs root, for labs are made of network namespaces",
                hint=f"`sudo {command} ...`",
            ),
            Exit.MACHINE,
        )


def running_lab(name: str | None, on_machines: bool = False) -> Lab:
    """The lab that is up under that name, or the only one, as its faults make it appear.

    NetlabError (exit 2) otherwise, and for one on machines unless those are reached.
    """
    require_root()
    from netlab.lab import named

    return named.running_lab(name, on_machines)


def new_console() -> Console:
    """A console for what rich prints; a reader that goes away ends the command as elsewhere."""
    from rich.console import Console

    console = Console(highlight=False)
    # rich would end with 1, which says that the answer is no.
    console.on_broken_pipe = _raise_broken_pipe  # type: ignore[method-assign]
    return console


def _raise_broken_pipe() -> None:
    raise BrokenPipeError


def print_json(value: Any) -> None:
    """JSON on stdout."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], indent: str = "") -> None:
    """Columns as kubectl prints them: aligned, three blanks apart, no lines."""
    table = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    for row in table:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo(indent + "   ".join(cells).rstrip())


def complete_lab(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Names of labs that are up."""
    from click.shell_completion import CompletionItem

    try:
        entries = os.listdir("/run/netlab")
    except OSError:
        return []
    return [
        CompletionItem(name)
        for name in sorted(entries)
        if name.startswith(incomplete) and os.path.isdir(f"/run/netlab/{name}")
    ]


def complete_reference(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Pods, services and nodes of the lab that is up."""
    from click.shell_completion import CompletionItem

    try:
        lab = running_lab(context.params.get("lab_name"), on_machines=True)
    except (NetlabError, OSError):
        return []
    names = [
        *(pod.name for pod in lab.pods),
        *(f"svc/{service.name}" for service in lab.services),
        *(f"node/{node.name}" for node in lab.nodes),
    ]
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def complete_node(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Nodes of the lab that is up."""
    from click.shell_completion import CompletionItem

    try:
        lab = running_lab(context.params.get("lab_name"), on_machines=True)
    except (NetlabError, OSError):
        return []
    return [CompletionItem(node.name) for node in lab.nodes if node.name.startswith(incomplete)]


def node_named(lab: Lab, name: str) -> Node:
    """The node of that name, or "node/NAME".  NetlabError (exit 2) if there is none."""
    name = name.removeprefix("node/")
    known = [node.name for node in lab.nodes]
    if name not in known:
        near = suggest(name, known)
        raise NetlabError(
            Problem(
                "unknown-node",
                f'node "{name}" is not in lab {lab.name}',
                hint=f'did you mean "{near}"?' if near else "`netlab get nodes` lists them",
            )
        )
    return lab.node(name)
