"""`netlab rules`: the rules that serve a Service on a node, in the order of a packet's way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import click

from netlab.cli.common import (
    complete_node,
    lab_option,
    namespace_option,
    node_named,
    output_option,
    print_json,
    print_table,
    running_lab,
)
from netlab.cli.rules_diff import diff
from netlab.problems import Exit, NetlabError, Problem

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from netlab.datapath.services.explain import Met
    from netlab.datapath.services.reading import Block, Line, Reading
    from netlab.topology.model import Lab, Node, Service

SCHEMA = "netlab.rules/v1"


class _Rules(click.Group):
    """`netlab rules svc/myblog` is `netlab rules show svc/myblog`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or args[0] not in (*self.commands, *ctx.help_option_names):
            args.insert(0, "show")
        return super().parse_args(ctx, args)


@click.group(cls=_Rules)
def rules() -> None:
    """Show the rules that serve Services on a node, or compare them with a real node's.

    `netlab rules svc/NAME[:PORT]` is short for `netlab rules show svc/NAME[:PORT]`, whose --help
    has the options.
    """


rules.add_command(diff)


def _complete_service(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    try:
        lab = running_lab(context.params.get("lab_name"))
    except (NetlabError, OSError):
        return []
    names = (f"svc/{service.name}" for service in lab.services)
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


@rules.command(context_settings={"auto_envvar_prefix": "NETLAB_RULES"})
@click.argument(
    "service", metavar="[svc/NAME[:PORT]]", required=False, shell_complete=_complete_service
)
@click.option(
    "--node",
    metavar="NODE",
    multiple=True,
    shell_complete=complete_node,
    help="On which node; may be repeated.  [default: the first]",
)
@namespace_option
@lab_option
@output_option("json")
def show(
    service: str | None,
    node: tuple[str, ...],
    namespace: str | None,
    lab_name: str | None,
    output: str | None,
) -> int:
    """Show the rules and map elements of a Service, as a node's kernel has them.

    They come in the order in which a packet meets them, each with a sentence.  Without a Service:
    how many rules each has.

    The exit code is 1 if something is missing, or there that should not be.
    """
    import gc

    gc.disable()  # nothing that one command makes is garbage before it ends
    lab = running_lab(lab_name)
    chosen = [node_named(lab, name) for name in node] or list(lab.nodes[:1])
    asked = (lab, chosen, output == "json")
    if service is None:
        return _summary(*asked)
    return _service(*asked, *_resolved(lab, service, namespace))


def _resolved(lab: Lab, text: str, namespace: str | None) -> tuple[Service, str | None]:
    """A Service, and the service port name if one of its ports is meant."""
    from netlab.datapath.services.names import service_port_name
    from netlab.topology.references import resolve

    found = resolve(lab, text, namespace)
    if found.service is None:
        raise NetlabError(
            Problem(
                "not-a-service",
                f'"{text}" is no Service, and only Services have rules',
                hint="`netlab get services` lists them",
            )
        )
    service, port = found.service, None
    if found.port_number is not None:
        if found.port is None:
            given = ", ".join(sorted({f"{each.port}/{each.protocol}" for each in service.ports}))
            raise NetlabError(
                Problem(
                    "unknown-port",
                    f"svc/{service.key} has no port {found.port_number}, or more than one",
                    hint=f"its ports: {given}; what two protocols share goes by its name",
                )
            )
        port = service_port_name(service.namespace, service.name, found.port.name)
    return service, port


def _service(
    lab: Lab, nodes: Sequence[Node], as_json: bool, service: Service, port: str | None
) -> int:
    from netlab.datapath.services.explain import read_service
    from netlab.datapath.services.modes import mode_of
    from netlab.lab.rules import printed

    mode = lab.service_proxy.mode
    has_rules = bool(mode_of(lab).reading)
    found = [
        (node, *read_service(lab, node, service, printed(lab, node), port))
        for node in nodes
        if has_rules
    ]
    whole = all(line.state == "there" for _, _, met in found for each in met for line in each.lines)
    named = f"svc/{port or service.key}"
    if as_json:
        about = {"schema": SCHEMA, "lab": lab.name, "mode": mode, "service": named}
        of_nodes = [
            {"node": node.name, "rules": list(_as_json(reading, met))}
            for node, reading, met in found
        ]
        print_json({**about, "complete": whole, "nodes": of_nodes})
        return int(Exit.YES if whole else Exit.NO)
    if not has_rules:
        click.echo(f"mode {mode}: no rules of netlab's, on no node", err=True)
    for number, (node, reading, met) in enumerate(found):
        if number:
            click.echo()
        click.echo(click.style(f"{named} on {node.name}, mode {mode}", bold=True))
        if not met:
            click.echo(f"no rule: {_why_none(service)}")
        _print_met(reading, met)
        _tell_of_taken(lab, node, service, port)
    if len(found) == 1:
        _tell_of_others(lab, found[0][0], service, port)
    return int(Exit.YES if whole else Exit.NO)


def _why_none(service: Service) -> str:
    from netlab.datapath.services.endpoints import PROXY_NAME_LABEL

    if service.type == "ExternalName":
        return "a Service of type ExternalName is a name for DNS, and no proxy's business"
    if service.cluster_ip in ("", "None"):
        return "the Service is headless: clients ask DNS for its pods"
    if PROXY_NAME_LABEL in service.labels:
        return f"its label {PROXY_NAME_LABEL} leaves it to another proxy"
    return "the Service has no port"


def _print_met(reading: Reading, met: Iterable[Met]) -> None:
    shown = ""
    for each in met:
        stage = f"{'IPv6, ' * (each.block.key.family == 'ip6')}{each.stage}"
        if stage != shown:
            shown = stage
            click.echo(f"\n{stage}:")
        click.echo(click.style(f"  {each.block.key}", fg="cyan"))
        for line in each.lines:
            _print_line(reading, each.block, line)


def _print_line(reading: Reading, block: Block, line: Line) -> None:
    counted = "" if line.packets is None else f"[{line.packets}:{line.bytes}] "
    colour = {"missing": "red", "extra": "yellow"}.get(line.state)
    state = {"missing": "MISSING ", "extra": "EXTRA "}.get(line.state, "")
    click.echo(f"    {click.style(state, fg=colour)}{counted}{line.text}")
    click.echo(click.style(f"      {reading.sentence(block, line)}", dim=True))


def _as_json(reading: Reading, met: Iterable[Met]) -> Iterable[dict[str, Any]]:
    for each in met:
        for line in each.lines:
            yield {"stage": each.stage, **_line_as_json(reading, each.block, line)}


def _line_as_json(reading: Reading, block: Block, line: Line) -> dict[str, Any]:
    owners = reading.owners(block.key, line.text)
    return {
        **block.key._asdict(),
        "text": line.text,
        "state": line.state,
        **({} if line.packets is None else {"packets": line.packets, "bytes": line.bytes}),
        **({"learned": True} if line.learned else {}),
        "services": sorted({owner.port for owner in owners}),
        "endpoint": next((owner.endpoint for owner in owners if owner.endpoint), None),
        "says": reading.sentence(block, line),
    }


def _tell_of_taken(lab: Lab, node: Node, service: Service, port: str | None) -> None:
    """Which addresses of the Service lead to others."""
    from netlab.datapath.services.claims import taken

    for info, ip, winner in taken(lab, node, service):
        if port in (None, info.name):
            address = f"[{ip}]" if ":" in ip else ip
            text = f"{winner} has {address}:{info.port}/{info.protocol.upper()} already"
            click.echo(f"{text}: connections to it go there", err=True)


def _tell_of_others(lab: Lab, node: Node, service: Service, port: str | None) -> None:
    """On which nodes the Service should have other rules."""
    from netlab.datapath.services.explain import rendered_service

    if len(lab.nodes) == 1:
        return
    here = rendered_service(lab, node, service, port)
    same, others = [], []
    for other in lab.nodes:
        if other == node:
            continue
        there = rendered_service(lab, other, service, port)
        differ = [str(key) for key in {**here, **there} if here.get(key) != there.get(key)]
        if differ:
            others.append(f"{other.name} differs in {_some(differ)}")
        else:
            same.append(other.name)
    if same:
        click.echo(f"{_some(same)} should have the same rules", err=True)
    for text in others[:5]:
        click.echo(f"{text}: `--node` shows it", err=True)
    if others[5:]:
        click.echo(f"and so do {len(others) - 5} more nodes", err=True)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def _summary(lab: Lab, nodes: Sequence[Node], as_json: bool) -> int:
    from netlab.datapath.services.explain import compare
    from netlab.datapath.services.modes import mode_of
    from netlab.lab.rules import printed

    mode = lab.service_proxy.mode
    found = [
        (node, *compare(lab, node, mode_of(lab), printed(lab, node)))
        for node in nodes
        if mode_of(lab).reading
    ]
    whole = all(
        line.state == "there"
        for _, _, blocks in found
        for block in blocks.values()
        for line in block.lines
    )
    if as_json:
        of_nodes = [
            {
                "node": node.name,
                "rules": [
                    _line_as_json(reading, block, line)
                    for block in blocks.values()
                    for line in block.lines
                    if reading.is_told(block.key, line.text) or line.state != "there"
                ],
            }
            for node, reading, blocks in found
        ]
        about = {"schema": SCHEMA, "lab": lab.name, "mode": mode, "service": None}
        print_json({**about, "complete": whole, "nodes": of_nodes})
        return int(Exit.YES if whole else Exit.NO)
    if not found:
        click.echo(f"mode {mode}: no rules of netlab's, on no node", err=True)
    for number, (node, reading, blocks) in enumerate(found):
        if number:
            click.echo()
        click.echo(click.style(f"{node.name}, mode {mode}", bold=True))
        _print_summary(reading, blocks.values())
    if found:
        click.echo("`netlab rules svc/NAME` shows those of a Service", err=True)
    return int(Exit.YES if whole else Exit.NO)


def _print_summary(reading: Reading, blocks: Iterable[Block]) -> None:
    counts: dict[str, dict[str, int]] = {"": {}}
    for block in blocks:
        kind = "RULES" if block.key.kind == "chain" else "ELEMENTS"
        for line in block.lines:
            if line.state == "there" and not reading.is_told(block.key, line.text):
                continue
            column = kind if line.state == "there" else line.state.upper()
            owners = {owner.port for owner in reading.owners(block.key, line.text)} or {""}
            for owner in owners:
                of_service = counts.setdefault(owner, {})
                of_service[column] = of_service.get(column, 0) + 1
    columns = [
        column
        for column in ("RULES", "ELEMENTS", "MISSING", "EXTRA")
        if any(column in row for row in counts.values())
    ]
    rows = [
        [name or "(shared)", *(str(row.get(column, 0)) for column in columns)]
        for name, row in sorted(counts.items())
    ]
    print_table(["SERVICE", *columns], rows)
