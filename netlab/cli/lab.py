"""`netlab up`, `down`, `ls` and `status`."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from netlab.cli.common import (
    complete_lab,
    iptables_backend_option,
    lab_option,
    output_option,
    print_json,
    print_table,
    proxy_mode_option,
    require_root,
    running_lab,
    selection_options,
)
from netlab.lab.named import naming, only_lab
from netlab.problems import Exit, NetlabError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from netlab.lab.control import Running
    from netlab.lab.lifecycle import Outcome
    from netlab.topology.model import IPTablesBackend, Lab


def _complete_topology(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    from netlab.topology.load import shipped

    names = [CompletionItem(name) for name in shipped() if name.startswith(incomplete)]
    return [*names, CompletionItem(incomplete, type="file")]


@click.command()
@click.argument("topology", shell_complete=_complete_topology)
@click.option("--dry-run", is_flag=True, help="Only print what would change.")
@click.option("--shell", "as_shell", is_flag=True, help="Only print it as shell commands.")
@click.option(
    "--lab", "name", metavar="NAME", envvar="NETLAB_LAB", help="Another name for the lab."
)
@selection_options
@proxy_mode_option("--proxy", "Let the service proxy work in this mode, whatever the file says.")
@iptables_backend_option
@click.option(
    "--hosts",
    metavar="FILE|vagrant",
    help="Let each node live on a machine of its own, as this file says.",
)
@click.option(
    "--allow-host-changes",
    "allowed",
    is_flag=True,
    help="With --hosts: change rules that are in the way, until the lab goes.",
)
@click.option(
    "--keep-going",
    is_flag=True,
    help="With --hosts: leave out machines that fail, and keep the others.",
)
@output_option("json")
def up(
    topology: str,
    dry_run: bool,
    as_shell: bool,
    name: str | None,
    only: tuple[str, ...],
    nodes: tuple[str, ...],
    mode: str | None,
    backend: IPTablesBackend | None,
    hosts: str | None,
    allowed: bool,
    keep_going: bool,
    output: str | None,
) -> int:
    """Build the lab of TOPOLOGY, or change what differs from it.

    TOPOLOGY is a file, or the name of one that comes with netlab (`netlab topology ls`).  What
    `apply`, `delete`, `scale`, `label`, `ready` and `proxy` changed since is undone, and named.
    """
    import gc

    from netlab.topology.load import load

    # Nothing that one command makes is garbage before it ends.
    gc.disable()
    loaded = load(topology, name=name, only=only, nodes=nodes)
    for warning in loaded.warnings:
        click.echo(str(warning), err=True)
    lab = loaded.lab
    if mode is not None:
        from netlab.lab import change

        lab = change.proxy(lab, mode).lab
    if backend is not None:
        from msgspec.structs import replace

        lab = replace(lab, iptables_backend=backend)
    require_root()
    if hosts is not None:
        if dry_run or as_shell:
            raise click.UsageError("--dry-run and --shell do not go with --hosts")
        from netlab.cli import hosts as on_machines

        return on_machines.up(lab, hosts, allowed, keep_going, output)
    if allowed or keep_going:
        raise click.UsageError("--allow-host-changes and --keep-going go with --hosts")
    from netlab.doctor import neighbour_warning, preflight
    from netlab.lab import lifecycle
    from netlab.lab.named import refuse_machines

    refuse_machines(lab.name)
    from netlab.lab.undone import undone

    preflight(lab)
    tell_of_absent(lab)
    if crowded := neighbour_warning(lab):
        click.echo(str(crowded), err=True)
    tell = progress if output != "json" else lambda line: None
    outcome = lifecycle.up(lab, dry_run=dry_run or as_shell, tell=tell)
    taken_back = undone(outcome.before, lab)
    if as_shell:
        from netlab.datapath.describe import shell

        for command in shell(outcome.changes, outcome.state.namespaces()):
            click.echo(command)
    elif output == "json":
        about = {"lab": lab.name, "created": outcome.created, "dryRun": dry_run}
        print_json({**about, "undone": taken_back, **outcome_as_json(outcome)})
        return int(Exit.YES)
    elif dry_run:
        print_plan(outcome)
    for line in taken_back:
        click.echo(f"{'would be ' * (dry_run or as_shell)}undone: {line}", err=True)
    if not (dry_run or as_shell):
        _tell(lab, outcome)
    return int(Exit.YES)


def outcome_as_json(outcome: Outcome) -> dict[str, Any]:
    """What was done, or would be."""
    from netlab.datapath.describe import describe

    return {
        "restarted": outcome.restarted,
        "changes": [
            {"verb": c.verb, "namespace": c.namespace, "item": describe(c.item)}
            for c in outcome.changes
        ],
        "unserved": [entry._asdict() for entry in outcome.unserved],
        "unready": [entry._asdict() for entry in outcome.unready],
        "elapsedSeconds": round(outcome.elapsed_s, 3),
    }


def print_plan(outcome: Outcome) -> None:
    """What a dry run found."""
    from netlab.datapath.describe import summary

    for change in outcome.changes:
        click.echo(summary(change))
    click.echo(f"{len(outcome.changes)} changes; nothing was done", err=True)


def progress(line: str) -> None:
    """A line about what takes its time."""
    click.echo(f"  {line}", err=True)


def tell_of_absent(lab: Lab) -> None:
    """What Services ask for, and the mode of the lab's proxies never had."""
    if lab.service_proxy.mode != "userspace":
        return
    from netlab.datapath.services.userspace_absent import absent

    for sentence in absent(lab):
        click.echo(f"warning[historic-mode]: {sentence}", err=True)


def tell_of_processes(name: str, outcome: Outcome) -> None:
    """What does not answer, and what had to be started again."""
    from netlab.lab.launch import log_path

    for entry in outcome.unserved:
        click.echo(
            f"warning[not-served]: {entry.identity} does not answer on {entry.protocol} "
            f"{entry.port}: {entry.reason}",
            err=True,
        )
    for lacking in outcome.unready:
        click.echo(
            f"warning[not-ready]: {lacking}\n  hint: `netlab status {name}` tells how it is, and "
            f"{log_path(name)} what it said",
            err=True,
        )
    if outcome.restarted:
        click.echo(f"started what answers in the pods of {name} again", err=True)


def _tell(lab: Lab, outcome: Outcome) -> None:
    name = lab.name
    tell_of_processes(name, outcome)
    if not outcome.changes:
        click.echo(f"{name} is up; nothing {'else ' * outcome.restarted}to change", err=True)
        return
    nodes, pods = len(lab.nodes), len(lab.pods)
    what = (
        f"{nodes} node{'s' * (nodes != 1)}, {pods} pod{'s' * (pods != 1)}"
        if outcome.created
        else f"{len(outcome.changes)} change{'s' * (len(outcome.changes) != 1)}"
    )
    click.echo(f"✓ {name} is up: {what} in {outcome.elapsed_s:.2f} s", err=True)
    click.echo(f"  next: {_next_command(name)}", err=True)


def _next_command(name: str) -> str:
    """Something to try in the lab that was just built."""
    lab = running_lab(name)
    targets = {pod for entry in lab.endpoints for e in entry.endpoints if (pod := e.pod)}
    sources = [pod for pod in lab.pods if pod.key not in targets] or list(lab.pods)
    for service in lab.services:
        if sources and service.cluster_ip not in ("", "None"):
            return shlex.join(
                ["netlab", "trace", sources[0].name, f"svc/{service.name}", *naming(name)]
            )
    return shlex.join(["netlab", "get", "pods", "-o", "wide", *naming(name)])


@click.command()
@click.argument("lab", required=False, shell_complete=complete_lab)
@lab_option
@click.option("--all", "everything", is_flag=True, help="Every lab.")
@click.option(
    "--hosts",
    metavar="FILE|vagrant",
    help="Machines that may have it, if nobody knows any more; LAB is its topology.",
)
def down(lab: str | None, lab_name: str | None, everything: bool, hosts: str | None) -> int:
    """Remove LAB, or the only one that is up: namespaces, processes, files.

    A topology file may stand for the lab it describes.  Machines are given back as they were; exit
    code 3 if one could not be reached.
    """
    from netlab.lab import lifecycle
    from netlab.lab.named import is_on_machines

    require_root()
    lab = lab or lab_name
    if everything:
        names = lifecycle.running()
    elif lab is None:
        names = [only_lab()]
    else:
        names = [_lab_name(lab)]
    if hosts is not None:
        return _down_on(lab, lab_name, hosts)
    worst = Exit.YES
    for name in names:
        if is_on_machines(name):
            from netlab.cli import hosts as on_machines

            worst = max(worst, Exit(on_machines.down(name)))
            continue
        removed = lifecycle.down(name)
        if removed:
            click.echo(f"✓ {name} is down: {removed} namespaces removed", err=True)
        else:
            click.echo(f"{name} is not up; nothing to remove", err=True)
    return int(worst)


def _down_on(topology: str | None, name: str | None, hosts: str) -> int:
    """Take a lab down on machines that a file names."""
    from netlab.cli import hosts as on_machines
    from netlab.hosts import hosts_file
    from netlab.topology.load import load

    if topology is None:
        raise click.UsageError("--hosts needs the topology, or a lab's name and --lab")
    loaded = load(topology, name=name).lab
    return on_machines.down(loaded.name, hosts_file.read(hosts, loaded))


def _lab_name(text: str) -> str:
    """The lab that a name or a topology file stands for."""
    if "/" not in text and not text.endswith((".yaml", ".yml", ".json")):
        return text
    from netlab.topology.load import load

    return load(text).lab.name


@click.command()
@output_option("json", "name")
def ls(output: str | None) -> None:
    """List the labs that are up."""
    from netlab.lab import control, lifecycle
    from netlab.lab.named import declared_of

    require_root()
    rows = []
    for name in lifecycle.running():
        lab = declared_of(name)
        init = control.connect(name)
        rows.append(
            {
                "name": name,
                "nodes": len(lab.nodes) if lab else None,
                "pods": len(lab.pods) if lab else None,
                "services": len(lab.services) if lab else None,
                "init": init.pid if init else None,
            }
        )
    if output == "json":
        print_json(rows)
    elif output == "name":
        for row in rows:
            click.echo(row["name"])
    elif rows:
        print_table(
            [key.upper() for key in rows[0]],
            [["-" if value is None else str(value) for value in row.values()] for row in rows],
        )
    else:
        click.echo("no lab is up", err=True)


@click.command()
@click.argument("lab", required=False, shell_complete=complete_lab)
@lab_option
@output_option("json")
def status(lab: str | None, lab_name: str | None, output: str | None) -> int:
    """Tell how LAB is: what differs from what was declared, and whether its processes run.

    Exit code 0 if all is as it should be, 1 if not.
    """
    from netlab.datapath.describe import summary
    from netlab.lab import control, lifecycle
    from netlab.lab.named import is_on_machines

    declared = running_lab(lab or lab_name, on_machines=True)
    if is_on_machines(declared.name):
        from netlab.cli import hosts as on_machines

        return on_machines.status(declared, output)
    differences = [summary(change) for change in lifecycle.differences(declared)]
    init = control.connect(declared.name)
    processes: control.Status | None = None
    if init:
        with contextlib.suppress(NetlabError):
            processes = init.status()
    programs = processes.programs if processes else ()
    lacking = [str(each) for each in lifecycle.lacking(declared)]
    healthy = (
        not differences
        and processes is not None
        and not lacking
        and all(each.running for each in programs)
    )
    if output == "json":
        print_json(
            {
                "lab": declared.name,
                "healthy": healthy,
                "nodes": len(declared.nodes),
                "pods": len(declared.pods),
                "services": len(declared.services),
                "stopped": list(declared.stopped),
                "differences": differences,
                "programs": [each._asdict() for each in programs],
                "lacking": lacking,
                "init": {
                    "pid": processes.pid,
                    "restarts": processes.restarts,
                    "sockets": processes.sockets,
                    "processes": [each._asdict() for each in processes.processes],
                }
                if processes
                else None,
            }
        )
    else:
        click.echo(
            f"{'✓' if healthy else '✗'} {declared.name}: {len(declared.nodes)} nodes, "
            f"{len(declared.pods)} pods, {len(declared.services)} services"
        )
        if processes:
            click.echo(f"  init {processes.pid}, {processes.sockets} sockets answer")
        else:
            click.echo("  init is gone: nothing answers in the pods")
        if programs:
            click.echo(f"  {_told(programs)}")
        for name in declared.stopped:
            click.echo(f"  node {name} is stopped: `netlab start node/{name}`")
        for line in (*(str(each) for each in programs if not each.running), *lacking, *differences):
            click.echo(f"  {line}")
        if not healthy:
            click.echo(f"  hint: `netlab up` with the topology of {declared.name} repairs it")
    return int(Exit.YES if healthy else Exit.NO)


def _told(programs: Sequence[Running]) -> str:
    """How many programs run: "3 of 3 bird run, started again 2 times"."""
    parts = []
    for name in sorted({each.name for each in programs}):
        all_of_it = [each for each in programs if each.name == name]
        running = sum(each.running for each in all_of_it)
        restarts = sum(each.restarts for each in all_of_it)
        again = f", started again {restarts} times" if restarts else ""
        parts.append(f"{running} of {len(all_of_it)} {name} run{again}")
    return "; ".join(parts)
