"""`netlab apply`, `delete`, `scale`, `label` and `ready`: a lab changed while it runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import click

from netlab.cli.common import (
    lab_option,
    namespace_option,
    output_option,
    print_json,
    running_lab,
)
from netlab.cli.lab import outcome_as_json, print_plan, tell_of_absent, tell_of_processes
from netlab.problems import Exit, NetlabError, Problem

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from netlab.lab.edits import Changed, Result
    from netlab.lab.lifecycle import Outcome
    from netlab.topology.model import Lab
    from netlab.topology.places import Document

F = TypeVar("F", bound=Callable[..., Any])


def _complete_object(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """`pod/pod1`, `deployment/myblog` and whatever else the lab that is up has."""
    from click.shell_completion import CompletionItem

    from netlab.lab.edits import declared_objects

    try:
        lab = running_lab(context.params.get("lab_name"))
    except (NetlabError, OSError):
        return []
    keys = [key for key in declared_objects(lab) if key[0] not in ("Lab", "Pod")]
    names = [f"pod/{pod.name}" for pod in lab.pods]
    names += [f"{kind.lower()}/{name}" for kind, _, name in keys]
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


dry_run_option = click.option("--dry-run", is_flag=True, help="Only print what would change.")


class Options(NamedTuple):
    """Options that all commands of change have."""

    lab_name: str | None
    namespace: str | None
    dry_run: bool
    output: str | None


def change_options(function: F) -> F:
    """Declares them; the command gets them as `options`."""

    @functools.wraps(function)
    def call(**arguments: Any) -> Any:
        options = Options(**{name: arguments.pop(name) for name in Options._fields})
        return function(**arguments, options=options)

    call = lab_option(namespace_option(dry_run_option(output_option("json", "name")(call))))
    return cast(F, call)


_files = click.option(
    "-f",
    "--filename",
    "files",
    metavar="FILE",
    multiple=True,
    type=click.Path(allow_dash=True),
    help='A file with Kubernetes objects, "-" for standard input; may be repeated.',
)


@click.command()
@_files
@change_options
def apply(
    files: tuple[str, ...],
    options: Options,
) -> int:
    """Make objects of a running lab what FILE says, and leave all others alone.

    An object takes on what FILE says as a whole; what netlab decided for it (addresses, node ports,
    names of pods) stays.
    """
    from netlab.lab import change

    if not files:
        raise _usage("apply takes the objects from a file: -f FILE", "`-f -` is standard input")
    stated = _read(files)
    return carry_out(lambda lab: change.apply(lab, stated, options.namespace), options)


@click.command()
@click.argument("references", metavar="[KIND/NAME]...", nargs=-1, shell_complete=_complete_object)
@_files
@click.option("--now", is_flag=True, help="Pods go at once, whatever they are doing.")
@click.option(
    "--grace-period",
    "grace_s",
    metavar="SECONDS",
    type=click.IntRange(min=0),
    help="How long pods have to end, instead of their terminationGracePeriodSeconds.",
)
@change_options
def delete(
    references: tuple[str, ...],
    files: tuple[str, ...],
    now: bool,
    grace_s: int | None,
    options: Options,
) -> int:
    """Delete objects of a running lab, by name or as FILE names them.

    With an object goes what belongs to it: the pods of a Deployment, the EndpointSlices of a
    Service, all that is in a Namespace.  A pod that is named has time to end: it gets no new
    connections, and goes when it is done with those that it has.
    """
    from netlab.lab import change

    if bool(references) is bool(files):
        raise _usage("delete takes objects, or a file that names them", "KIND/NAME, or -f FILE")
    if references:
        words = _objects(references)
        if not (now or grace_s == 0 or options.dry_run) and any(map(_is_pod, words)):
            from netlab.cli.rollout import delete_gracefully

            return delete_gracefully(words, grace_s, options)
        return carry_out(lambda lab: change.delete(lab, words, options.namespace), options)
    stated = _read(files)
    return carry_out(lambda lab: change.delete_stated(lab, stated, options.namespace), options)


@click.command()
@click.argument(
    "references", metavar="KIND/NAME...", nargs=-1, required=True, shell_complete=_complete_object
)
@click.option("--replicas", type=click.IntRange(min=0), required=True, help="How many pods.")
@change_options
def scale(
    references: tuple[str, ...],
    replicas: int,
    options: Options,
) -> int:
    """Give a Deployment, ReplicaSet or StatefulSet more pods, or fewer: the newest go."""
    from netlab.lab import change

    words = _objects(references)
    return carry_out(lambda lab: change.scale(lab, words, replicas, options.namespace), options)


@click.command()
@click.argument(
    "words",
    metavar="KIND/NAME... KEY=VALUE|KEY-...",
    nargs=-1,
    required=True,
    shell_complete=_complete_object,
)
@change_options
def label(
    words: tuple[str, ...],
    options: Options,
) -> int:
    """Set labels of objects (KEY=VALUE), or take them away (KEY-).

    A pod that its Deployment no longer selects is let go, and the Deployment makes another one.
    """
    from netlab.lab import change

    references = _objects([word for word in words if not _is_label(word)])
    labels: dict[str, str | None] = {}
    for word in filter(_is_label, words):
        key, equals, value = word.partition("=")
        key = key if equals else key[:-1]
        if key in labels:
            raise _usage(f'the label "{key}" is changed twice', "once is enough")
        labels[key] = value if equals else None
    if not references or not labels:
        lacking = "labels: KEY=VALUE sets one, KEY- takes it away" if references else "KIND/NAME"
        raise _usage("label takes objects and labels", lacking)
    return carry_out(lambda lab: change.label(lab, references, labels, options.namespace), options)


@click.command()
@click.argument(
    "references", metavar="pod/NAME...", nargs=-1, required=True, shell_complete=_complete_object
)
@click.option("--true/--false", "value", default=True, help="Ready, the default, or not.")
@change_options
def ready(
    references: tuple[str, ...],
    value: bool,
    options: Options,
) -> int:
    """Make pods ready, or with --false not ready, as a readiness probe would."""
    from netlab.lab import change

    words = _objects(references)
    return carry_out(lambda lab: change.ready(lab, words, value, options.namespace), options)


def _usage(message: str, hint: str) -> NetlabError:
    return NetlabError(Problem("usage", message, hint=hint))


def _read(files: Sequence[str]) -> list[Document]:
    from netlab.topology.load import read_objects

    stated, warnings = read_objects(files)
    for warning in warnings:
        click.echo(str(warning), err=True)
    return stated


def _objects(words: Sequence[str]) -> list[str]:
    """`pod a b` is kubectl's way to say `pod/a pod/b`."""
    from netlab.lab.edits import KINDS

    if len(words) > 1 and words[0].lower() in KINDS and not any("/" in word for word in words):
        return [f"{words[0]}/{word}" for word in words[1:]]
    return list(words)


def _is_pod(reference: str) -> bool:
    from netlab.lab.edits import KINDS

    return KINDS.get(reference.partition("/")[0].lower()) == "Pod"


def _is_label(word: str) -> bool:
    return "=" in word or word.endswith("-")


def carry_out(decide: Callable[[Lab], Changed], options: Options) -> int:
    """Change the lab that is meant, and tell what became of it; returns the exit code."""
    import gc

    gc.disable()  # (as in `up`)
    name = running_lab(options.lab_name).name
    from netlab.lab import lifecycle

    changed, outcome = lifecycle.change(name, decide, options.dry_run)
    return tell(name, changed, outcome, options)


def tell(name: str, changed: Changed, outcome: Outcome, options: Options) -> int:
    """Tell what became of a lab; returns the exit code."""
    for warning in changed.warnings:
        click.echo(str(warning), err=True)
    if outcome.changes:
        tell_of_absent(changed.lab)
    if options.output == "json":
        about = {"lab": changed.lab.name, "dryRun": options.dry_run}
        objects = [_as_json(result) for result in changed.results]
        print_json({**about, "objects": objects, **outcome_as_json(outcome)})
        return int(Exit.YES)
    for result in changed.results:
        done = "" if options.output == "name" else f" {result.done}{' (dry run)' * options.dry_run}"
        click.echo(f"{result.reference}{done}")
    if options.dry_run and options.output is None:
        print_plan(outcome)
    tell_of_processes(name, outcome)
    return int(Exit.YES)


def _as_json(result: Result) -> dict[str, str]:
    return {
        "kind": result.kind,
        **({"namespace": result.namespace} if result.namespace else {}),
        "name": result.name,
        "result": result.done,
    }
