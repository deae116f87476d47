"""`netlab conntrack`: the connections that the nodes of a lab keep track of."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import click

from netlab.cli.common import (
    complete_node,
    complete_reference,
    lab_option,
    namespace_option,
    node_named,
    output_option,
    print_json,
    running_lab,
)
from netlab.problems import Exit, NetlabError, Problem

if TYPE_CHECKING:
    from netlab.report.connections import Connection, Direction, End
    from netlab.topology.model import Lab, Node


@click.command()
@click.argument("reference", required=False, shell_complete=complete_reference)
@click.option(
    "--node",
    metavar="NODE",
    multiple=True,
    shell_complete=complete_node,
    help="On this node only; may be repeated.",
)
@click.option("-w", "--watch", is_flag=True, help="Go on and tell what becomes of them.")
@namespace_option
@lab_option
@output_option("json")
def conntrack(
    reference: str | None,
    node: tuple[str, ...],
    watch: bool,
    namespace: str | None,
    lab_name: str | None,
    output: str | None,
) -> int:
    """List the connections on a lab's nodes, or those of a pod, a Service, a node or an address.

    Of each: who it is from and to, what was translated by which Service, what answers are expected
    to look like, its state, and in how many seconds it is forgotten if nothing more comes.
    """
    lab = running_lab(lab_name)
    from netlab.report import connections
    from netlab.topology.references import resolve

    concerns = connections.concerns(resolve(lab, reference, namespace) if reference else None)
    nodes = [node_named(lab, name) for name in node] or list(lab.nodes)
    if watch:
        _watch(lab, nodes, concerns, output)
        return int(Exit.YES)
    found = [each for each in _all(lab, nodes) if concerns(each)]
    if output == "json":
        print_json(connections.as_json(lab, found))
        return int(Exit.YES)
    for connection in found:
        _tell(connection)
    if not found:
        click.echo("no connection is known", err=True)
    return int(Exit.YES)


def _all(lab: Lab, nodes: Iterable[Node]) -> Iterable[Connection]:
    from netlab.datapath.state import namespace_name
    from netlab.kernel.conntrack import dump
    from netlab.report.connections import Connections

    known = Connections(lab)
    for node in nodes:
        entries = dump(namespace_name(lab.name, node.name))
        found = [known.of(node, entry) for entry in entries]
        yield from sorted(found, key=lambda each: (each.protocol, _shown(each.original), each.id))


def _watch(
    lab: Lab,
    nodes: Iterable[Node],
    concerns: Callable[[Connection], bool],
    output: str | None,
) -> None:
    """Until the lab goes down."""
    from netlab.datapath.state import namespace_name
    from netlab.kernel.conntrack import Events
    from netlab.lab.events import follow
    from netlab.report.connections import Connections, Watched

    known, watched = Connections(lab), Watched(concerns)

    def tell(found: Connection, is_there: bool) -> None:
        if event := watched.event(found, is_there):
            _tell_event(event, found, output)

    with contextlib.ExitStack() as opened:
        events = [(node, Events(namespace_name(lab.name, node.name))) for node in nodes]
        for _, each in events:
            opened.callback(each.close)
        for found in _all(lab, [node for node, _ in events]):
            tell(found, True)
        for declared in follow(lab.name, [each for _, each in events]):
            known = Connections(declared) if declared else known
            for node, each in events:
                for entry, is_there in each.read():
                    tell(known.of(node, entry), is_there)
                if each.overrun:
                    raise NetlabError(_LOST, Exit.UNOBSERVED)
    click.echo(f"{lab.name} is down: nothing more will happen", err=True)


_LOST = Problem(
    "events-lost",
    "connections changed faster than they could be told",
    hint="watch fewer of them: `--node NODE`",
)


def _tell_event(event: str, found: Connection, output: str | None) -> None:
    if output == "json":
        import msgspec

        line = msgspec.json.encode({"type": event, "connection": found})
        click.echo(line.decode())
    else:
        click.echo(f"{event:<8}  ", nl=False)
        _tell(found)


def _tell(found: Connection) -> None:
    about = [found.protocol, found.state] if found.state else [found.protocol]
    if found.timeout_seconds is not None:
        about.append(f"{found.timeout_seconds} s")
    way = [_name(found.original.source)]
    if found.service:
        way.append(f"svc/{found.service.namespace}/{found.service.name} ({found.service.by})")
    else:
        way.append(_name(found.original.destination))
    way += [found.endpoint] if found.endpoint else []
    click.echo(f"{found.node}  {' '.join(about)}: {' → '.join(way)}")
    more = ["" if "seen-reply" in found.status else "not answered yet"]
    seen = _at(found.reply.destination)
    more.append(f"its source is seen as {seen}" if found.masqueraded else "")
    more.append(f"mark {found.mark:#x}" if found.mark else "")
    more.append(f"zone {found.zone}" if found.zone else "")
    more += [
        f"{count.packets} packets {way}"
        for count, way in ((found.sent, "sent"), (found.answered, "back"))
        if count
    ]
    click.echo(f"    original  {_shown(found.original)}")
    click.echo(f"    reply     {_shown(found.reply)}")
    if said := ", ".join(filter(None, more)):
        click.echo(f"    {said}")


def _name(end: End) -> str:
    return end.name or end.address


def _shown(direction: Direction) -> str:
    shown = " → ".join(_at(end) for end in (direction.source, direction.destination))
    if direction.icmp:
        shown += f" type {direction.icmp.type} id {direction.icmp.id}"
    return shown


def _at(end: End) -> str:
    if end.port is None:
        return end.address
    return f"[{end.address}]:{end.port}" if ":" in end.address else f"{end.address}:{end.port}"
