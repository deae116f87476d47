"""`netlab rules diff`: whether a real node has the rules that kube-proxy should have written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from netlab.cli.common import (
    complete_node,
    lab_option,
    node_named,
    output_option,
    print_json,
    running_lab,
)
from netlab.problems import Exit, NetlabError, Problem

if TYPE_CHECKING:
    from netlab.datapath.services.differences import Difference
    from netlab.topology.model import Lab, Node

SCHEMA = "netlab.rules-diff/v1"


@click.command()
@click.argument("file", type=click.Path(allow_dash=True))
@click.option(
    "--node",
    metavar="NODE",
    shell_complete=complete_node,
    help="The node that FILE is of; needed where there is more than one.",
)
@click.option(
    "--topology",
    metavar="TOPOLOGY",
    type=click.Path(allow_dash=True),
    help="Objects of the cluster: a file, or a shipped topology.  [default: those of the lab]",
)
@lab_option
@output_option("json")
def diff(
    file: str,
    node: str | None,
    topology: str | None,
    lab_name: str | None,
    output: str | None,
) -> int:
    """Tell whether a node is right: what differs in FILE from what kube-proxy should have written.

    FILE ("-" for standard input) is what `iptables-save`, `ip6tables-save` or `nft list ruleset`
    print on a node; which of them, and so the mode, is seen from it.  Rules of others do not count,
    nor do counters and the spelling of a version.

    The exit code is 0 if nothing differs, 1 if something does.
    """
    import gc

    gc.disable()
    from netlab.datapath.services.differences import differences, recognise

    text = _read(file)
    lab = _loaded(topology) if topology else running_lab(lab_name)
    if node is None and len(lab.nodes) != 1:
        raise NetlabError(
            Problem(
                "which-node",
                f"{file} may be of any of {len(lab.nodes)} nodes",
                hint=f"say of which one: `--node {lab.nodes[0].name}`",
            )
        )
    chosen = node_named(lab, node) if node else lab.nodes[0]
    told = recognise(text)
    if told is None:
        raise _unrecognised(file, text)
    mode, printed = told
    found = differences(lab, chosen, mode, printed)
    families = sorted(printed)
    if output == "json":
        about = {"schema": SCHEMA, "lab": lab.name, "node": chosen.name, "mode": mode}
        of_file = [_difference_as_json(difference) for difference in found]
        print_json({**about, "families": families, "same": not found, "differences": of_file})
    else:
        _print_differences(lab, chosen, mode, families, found)
    return int(Exit.NO if found else Exit.YES)


def _read(file: str) -> str:
    try:
        with click.open_file(file, encoding="utf-8", errors="replace") as source:
            return str(source.read())
    except OSError as error:
        raise NetlabError(
            Problem("unreadable", f"{file} cannot be read: {error.strerror}")
        ) from None


def _loaded(topology: str) -> Lab:
    from netlab.topology.load import load

    loaded = load(topology, own_interfaces=True)
    for warning in loaded.warnings:
        click.echo(str(warning), err=True)
    return loaded.lab


def _unrecognised(file: str, text: str) -> NetlabError:
    hint = "`iptables-save`, `ip6tables-save` or `nft list ruleset`, run on the node, print them"
    if "chain KUBE-SERVICES {" in text:
        hint = "nft cannot list rules of iptables in full: `iptables-save` can"
    elif text.lstrip().startswith("{"):
        hint = "JSON of nft is not read: `nft list ruleset` without -j"
    return NetlabError(
        Problem("not-rules", f"{file} holds no rules of any mode of kube-proxy", hint=hint)
    )


def _difference_as_json(difference: Difference) -> dict[str, Any]:
    return {
        "difference": difference.kind,
        **difference.key._asdict(),
        "services": list(difference.ports),
        "endpoints": list(difference.endpoints),
        "wanted": difference.wanted,
        "found": difference.found,
        "should": difference.should or None,
        "does": difference.does or None,
    }


def _print_differences(
    lab: Lab, node: Node, mode: str, families: Sequence[str], found: Sequence[Difference]
) -> None:
    from netlab.datapath.services.differences import by_service

    names = {"ip": "IPv4", "ip6": "IPv6"}
    of = f"mode {mode}, {' and '.join(names[family] for family in families)}"
    if not found:
        click.echo(f"✓ {node.name} has the rules that it should have ({of})")
        return
    count = f"{len(found)} difference{'s' * (len(found) != 1)}"
    click.echo(f"✗ {node.name} differs from what it should have ({of}): {count}")
    known = {service.key for service in lab.services}
    for service, differences in by_service(found).items():
        click.echo()
        head = f"svc/{service}" if service else "what all Services share, or none has"
        click.echo(click.style(head, bold=True))
        if service and service not in known:
            click.echo("  the objects have no such Service")
        for difference in differences:
            _print_difference(difference)


def _print_difference(difference: Difference) -> None:
    kind = difference.kind.replace("-", " ")
    endpoints = ", ".join(difference.endpoints)
    concerned = f", {endpoints}" if endpoints else ""
    click.echo(f"  {click.style(kind, fg='yellow')}: {difference.key}{concerned}")
    for sign, text, said, colour in (
        ("-", difference.wanted, difference.should, "red"),
        ("+", difference.found, difference.does, "green"),
    ):
        for line in (text or "").splitlines():
            click.echo(click.style(f"    {sign} {line}", fg=colour))
        if said:
            click.echo(click.style(f"        {said}", dim=True))
