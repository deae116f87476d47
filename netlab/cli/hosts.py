"""What `up`, `down`, `status` and `exec` do where nodes are machines of their own."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from netlab.cli.common import print_json
from netlab.lab.named import naming
from netlab.problems import Exit, NetlabError

if TYPE_CHECKING:
    from netlab.hosts.lifecycle import Outcome
    from netlab.topology.model import Lab


def up(lab: Lab, hosts: str, allowed: bool, keep_going: bool, output: str | None) -> int:
    """`netlab up --hosts`: 0, or 3 where some machines are left out."""
    from netlab.hosts import hosts_file, lifecycle

    machines = hosts_file.read(hosts, lab)
    outcome = lifecycle.up(
        lab,
        machines,
        allowed=allowed,
        keep_going=keep_going,
        timeout_s=connect_timeout(),
        tell=lambda line: click.echo(f"  {line}", err=True),
    )
    _complain(outcome.failed)
    for node, held in outcome.held.items():
        for line in (*held.unserved, *held.unready):
            click.echo(f"warning[not-served]: {node}: {line}", err=True)
    if output == "json":
        print_json(_as_json(outcome))
    else:
        _tell(outcome)
    return int(Exit.MACHINE if outcome.failed else Exit.YES)


def connect_timeout() -> float:
    """Seconds in which a machine has to answer at first, by NETLAB_HOSTS_TIMEOUT."""
    from netlab.hosts.gateways import CONNECT_S

    text = os.environ.get("NETLAB_HOSTS_TIMEOUT", "")
    try:
        return float(text) if text else CONNECT_S
    except ValueError:
        raise click.UsageError(f'NETLAB_HOSTS_TIMEOUT is "{text}", which is no number') from None


def _as_json(outcome: Outcome) -> dict[str, Any]:
    return {
        "lab": outcome.lab.name,
        "nodes": {
            node: {
                "created": held.created,
                "restarted": held.restarted,
                "changes": list(held.changes),
                "unserved": list(held.unserved),
                "unready": list(held.unready),
            }
            for node, held in outcome.held.items()
        },
        "failed": {
            node: [problem.message for problem in error.problems]
            for node, error in outcome.failed.items()
        },
        "elapsedSeconds": round(outcome.elapsed_s, 3),
    }


def _tell(outcome: Outcome) -> None:
    name, held = outcome.lab.name, outcome.held
    changes = sum(len(each.changes) for each in held.values())
    if not changes:
        click.echo(f"{name} is up on {_count(len(held))}; nothing to change", err=True)
        return
    click.echo(
        f"✓ {name} is up: {_count(len(held))}, {changes} changes in {outcome.elapsed_s:.2f} s",
        err=True,
    )
    options = " ".join(["", *naming(name)])
    click.echo(f"  next: netlab status{options}", err=True)


def _count(machines: int) -> str:
    return f"{machines} machine{'s' * (machines != 1)}"


def _complain(failed: Mapping[str, NetlabError]) -> None:
    for error in failed.values():
        for problem in error.problems:
            click.echo(str(problem), err=True)


def down(name: str, machines: Mapping[str, Any] | None = None) -> int:
    """`netlab down` of such a lab: 3 where a machine could not be reached."""
    from netlab.hosts import lifecycle

    timeout_s = connect_timeout() if "NETLAB_HOSTS_TIMEOUT" in os.environ else None
    done = lifecycle.down(name, machines, timeout_s)
    count = sum(done.removed.values())
    if done.removed:
        sign = "✗" if done.failed else "✓"
        click.echo(
            f"{sign} {name} is down on {_count(len(done.removed))}: {count} namespaces removed",
            err=True,
        )
    _complain(done.failed)
    if done.failed:
        click.echo(f"  hint: `netlab down {name}` again, when they answer", err=True)
    return int(Exit.MACHINE if done.failed else Exit.YES)


def status(lab: Lab, output: str | None) -> int:
    """`netlab status` of such a lab, machine by machine."""
    from netlab.hosts import lifecycle

    found, failed = lifecycle.status(lab.name)
    healthy = not failed and all(each.healthy for each in found.values())
    if output == "json":
        import msgspec

        print_json(
            {
                "lab": lab.name,
                "healthy": healthy,
                "nodes": {
                    node: {**msgspec.structs.asdict(each), "healthy": each.healthy}
                    for node, each in found.items()
                },
                "failed": {
                    node: [problem.message for problem in error.problems]
                    for node, error in failed.items()
                },
            }
        )
        return int(Exit.YES if healthy else Exit.NO)
    click.echo(f"{'✓' if healthy else '✗'} {lab.name}: {_count(len(lab.nodes))}")
    for node in lab.nodes:
        if node.name in failed:
            click.echo(f"  ✗ {node.name}: {failed[node.name].problems[0].message}")
            continue
        if node.name not in found:
            click.echo(f"  ✗ {node.name}: taken down")
            continue
        each = found[node.name]
        if not each.declared:
            click.echo(f"  ✗ {node.name}: the lab is not there")
            continue
        init = f"init {each.init}, {each.sockets} sockets answer" if each.init else "no init runs"
        click.echo(f"  {'✓' if each.healthy else '✗'} {node.name} ({node.address}): {init}")
        for line in (*each.stopped, *each.lacking, *each.differences):
            click.echo(f"    {line}")
    if not healthy:
        click.echo("  hint: `netlab up --hosts` with the same files repairs it")
    return int(Exit.YES if healthy else Exit.NO)


def run_there(lab: Lab, node: str, command: Sequence[str]) -> int:
    """Run one of netlab's own commands on a node's machine, with the terminal of this one."""
    import subprocess

    from netlab.hosts import lifecycle
    from netlab.hosts.gateways import way_in

    machine = lifecycle.required(lab.name).machines[node]
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    return subprocess.run(way_in(machine, command, terminal), check=False).returncode
