"""`netlab rollout`, and what `netlab delete pod/NAME` waits for: pods that come and go in time."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from netlab.cli.change import Options, tell
from netlab.cli.common import lab_option, namespace_option, output_option, print_json, running_lab
from netlab.cli.lab import progress as say
from netlab.problems import Exit, NetlabError, Problem

if TYPE_CHECKING:
    from netlab.lab.lifecycle import Outcome
    from netlab.lab.rollout import Progress
    from netlab.topology.earlier import Key


def delete_gracefully(references: Sequence[str], grace_s: int | None, options: Options) -> int:
    """Delete objects; return when the pods among them have ended.  The exit code."""
    import gc

    gc.disable()  # (as in `up`)
    name = running_lab(options.lab_name).name
    from netlab.lab import lifecycle, ready, termination

    changed, outcome = lifecycle.change(
        name,
        lambda lab: termination.begin(lab, references, time.time(), grace_s, options.namespace),
        await_programs=False,
    )
    pods = [f"{r.namespace}/{r.name}" for r in changed.results if r.kind == "Pod"]
    gc.enable()
    later = termination.see_off(name, pods, say)
    together = _together([outcome, *later])
    unready = ready.await_ready(together.state.processes)
    return tell(name, changed, dataclasses.replace(together, unready=unready), options)


def _together(outcomes: Sequence[Outcome]) -> Outcome:
    """What several changes did, as one."""
    first, last = outcomes[0], outcomes[-1]
    return dataclasses.replace(
        last,
        changes=tuple(change for outcome in outcomes for change in outcome.changes),
        restarted=any(outcome.restarted for outcome in outcomes),
        elapsed_s=sum(outcome.elapsed_s for outcome in outcomes),
        before=first.before,
    )


@click.group()
def rollout() -> None:
    """Replace the pods of a Deployment, a few at a time, and see how far that is."""


_deployments = click.argument("references", metavar="deploy/NAME...", nargs=-1, required=True)
_timeout = click.option(
    "--timeout",
    "timeout_s",
    metavar="SECONDS",
    type=click.FloatRange(min=0),
    default=600.0,
    help="How long to wait; exit code 1 if that was not enough.",
)


@rollout.command()
@_deployments
@namespace_option
@lab_option
@_timeout
@output_option("json")
def restart(
    references: tuple[str, ...],
    namespace: str | None,
    lab_name: str | None,
    timeout_s: float,
    output: str | None,
) -> int:
    """Give Deployments new pods, as their strategies say: maxSurge, maxUnavailable.

    Progress is told on stderr.  What is interrupted stays as it is then; `netlab rollout status`
    goes on.
    """
    name = running_lab(lab_name).name
    from netlab.lab import lifecycle, rollout

    stamp = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    changed, _ = lifecycle.change(
        name, lambda lab: rollout.restart(lab, references, stamp, namespace)
    )
    keys = [(each.kind, each.namespace, each.name) for each in changed.results]
    return _follow(name, keys, timeout_s, output)


@rollout.command()
@_deployments
@namespace_option
@lab_option
@_timeout
@click.option("--watch/--no-watch", default=True, help="Only tell how far it is, and do nothing.")
@output_option("json")
def status(
    references: tuple[str, ...],
    namespace: str | None,
    lab_name: str | None,
    timeout_s: float,
    watch: bool,
    output: str | None,
) -> int:
    """Tell how far Deployments are, and go on until they are done.

    Exit code 0 if they are, 1 if not.
    """
    lab = running_lab(lab_name)
    from netlab.lab import rollout

    keys = rollout.find(lab, references, namespace)
    if watch:
        return _follow(lab.name, keys, timeout_s, output)
    return _conclude([rollout.progress(lab, key) for key in keys], output)


def _follow(name: str, keys: Sequence[Key], timeout_s: float, output: str | None) -> int:
    from netlab.lab.rolling import Late, roll

    try:
        done = roll(name, keys, say, timeout_s)
    except Late as late:
        _conclude(late.progress, output)
        raise NetlabError(
            Problem(
                "not-rolled-out",
                f"not done after {timeout_s:g} s",
                hint="`netlab rollout status` goes on; `netlab get pods` tells which are not ready",
            ),
            Exit.NO,
        ) from None
    return _conclude(done, output)


def _conclude(found: Iterable[Progress], output: str | None) -> int:
    found = list(found)
    if output == "json":
        print_json([_as_json(each) for each in found])
    else:
        for each in found:
            click.echo(str(each))
    return int(Exit.YES if all(each.is_complete for each in found) else Exit.NO)


def _as_json(progress: Progress) -> dict[str, object]:
    kind, namespace, name = progress.key
    return {
        "kind": kind,
        "namespace": namespace,
        "name": name,
        "replicas": progress.replicas,
        "updated": progress.updated,
        "available": progress.available,
        "old": progress.old,
        "terminating": progress.ending,
        "complete": progress.is_complete,
    }
