"""`netlab topology`: what comes with netlab, and whether a file of one's own is good."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from netlab.cli.common import output_option, print_json, print_table, selection_options
from netlab.problems import Exit, NetlabError, Problem, suggest

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from netlab.topology.load import Loaded


def _complete_shipped(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    from netlab.topology.load import shipped

    return [CompletionItem(name) for name in shipped() if name.startswith(incomplete)]


def _complete_topology(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    names = _complete_shipped(context, parameter, incomplete)
    return [*names, CompletionItem(incomplete, type="file")]


@click.group()
def topology() -> None:
    """List, show and check topology files."""


@topology.command()
@output_option("json", "name")
def ls(output: str | None) -> None:
    """List the topologies that come with netlab."""
    from netlab.topology.load import shipped

    rows = [
        {"name": name, "about": _about(path.read_text(encoding="utf-8")), "file": str(path)}
        for name, path in shipped().items()
    ]
    if output == "json":
        print_json(rows)
    elif output == "name":
        for row in rows:
            click.echo(row["name"])
    else:
        print_table(("NAME", "ABOUT"), [(row["name"], row["about"]) for row in rows])


def _about(text: str) -> str:
    """The first sentence of the comment that a shipped topology begins with."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("# "):
            break
        lines.append(line[2:])
    return " ".join(lines).partition(". ")[0].rstrip(".")


@topology.command()
@click.argument("name", shell_complete=_complete_shipped)
def show(name: str) -> None:
    """Print a topology that comes with netlab."""
    from netlab.topology.load import shipped

    known = shipped()
    if name not in known:
        near = suggest(name, list(known))
        hint = f'did you mean "{near}"? ' if near else ""
        message = f'no topology "{name}" comes with netlab'
        listing = "`netlab topology ls` lists them"
        raise NetlabError(Problem("unknown-topology", message, hint=hint + listing))
    click.echo(known[name].read_text(encoding="utf-8"), nl=False)


@topology.command()
def schema() -> None:
    """Print the JSON Schema of topology files, for editors."""
    from netlab.topology import schema as schemas

    print_json(schemas.schema())


@topology.command()
@click.argument(
    "files", metavar="FILE...", nargs=-1, required=True, shell_complete=_complete_topology
)
@selection_options
@output_option("json")
def validate(
    files: tuple[str, ...], only: tuple[str, ...], nodes: tuple[str, ...], output: str | None
) -> int:
    """Check topology files without building anything.

    FILE is a file, "-" for standard input, or the name of a topology that comes with netlab.
    Exit code 0 if all are good, 2 if not.
    """
    from netlab.topology.load import load

    results = []
    good = True
    for file in files:
        try:
            loaded = load(file, only=only, nodes=nodes)
        except NetlabError as error:
            good = False
            results.append({"file": file, "valid": False, "problems": _as_json(error.problems)})
            if output != "json":
                click.echo(f"✗ {file}", err=True)
                for problem in error.problems:
                    click.echo(str(problem), err=True)
        else:
            results.append(
                {"file": file, "valid": True, "problems": _as_json(loaded.warnings)}
                | {"lab": loaded.lab.name, **_counts(loaded)}
            )
            if output != "json":
                click.echo(f"✓ {file}: {_summary(loaded)}")
                for warning in loaded.warnings:
                    click.echo(str(warning), err=True)
    if output == "json":
        print_json(results)
    return int(Exit.YES if good else Exit.USAGE)


def _counts(loaded: Loaded) -> dict[str, int]:
    lab = loaded.lab
    return {"nodes": len(lab.nodes), "pods": len(lab.pods), "services": len(lab.services)}


def _summary(loaded: Loaded) -> str:
    """`lab one-node with 1 node, 3 pods, 1 service`."""
    parts = [
        f"{count} {kind.removesuffix('s') if count == 1 else kind}"
        for kind, count in _counts(loaded).items()
    ]
    return f"lab {loaded.lab.name} with {', '.join(parts)}"


def _as_json(problems: tuple[Problem, ...]) -> list[dict[str, Any]]:
    return [
        {
            "severity": "warning" if problem.warning else "error",
            "code": problem.code,
            "message": problem.message,
            "file": problem.place.file if problem.place else None,
            "line": problem.place.line if problem.place else None,
            "column": problem.place.column if problem.place else None,
            "hint": problem.hint,
        }
        for problem in problems
    ]
