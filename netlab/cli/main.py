"""The command `netlab`: verbs by name, loaded when they are used, and what becomes of errors."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys

import click

from netlab.problems import Exit, NetlabError

# Verb: where it lives and the line that `--help` shows, so that help and completion of verbs
# import nothing.
_VERBS = {
    "up": ("netlab.cli.lab:up", "Build a lab, or change what differs from its file."),
    "down": ("netlab.cli.lab:down", "Remove a lab and everything in it."),
    "ls": ("netlab.cli.lab:ls", "List the labs that are up."),
    "status": ("netlab.cli.lab:status", "Tell how a lab is, and what differs from its file."),
    "get": ("netlab.cli.get:get", "List nodes, pods, services and endpoints."),
    "describe": ("netlab.cli.describe:describe", "Tell who is chosen behind a Service, and why."),
    "apply": ("netlab.cli.change:apply", "Create or change objects while a lab runs."),
    "delete": ("netlab.cli.change:delete", "Delete objects while a lab runs."),
    "scale": ("netlab.cli.change:scale", "Change how many pods a Deployment has."),
    "rollout": ("netlab.cli.rollout:rollout", "Replace a Deployment's pods, a few at a time."),
    "stop": ("netlab.cli.machines:stop", "Switch a node's machine off."),
    "start": ("netlab.cli.machines:start", "Switch a node's machine on again."),
    "label": ("netlab.cli.change:label", "Set and take away labels; endpoints follow."),
    "ready": ("netlab.cli.change:ready", "Make pods ready, or not; endpoints follow."),
    "proxy": ("netlab.cli.proxy:proxy", "Show the service proxy, or switch its mode."),
    "exec": ("netlab.cli.exec:exec_", "Run a command in a pod or on a node."),
    "shell": ("netlab.cli.exec:shell", "Open a shell in a pod or on a node."),
    "trace": ("netlab.cli.trace:trace", "Follow a packet there and back, and say why."),
    "verify": (
        "netlab.cli.verify:verify",
        "Check what Kubernetes demands of a network, pair by pair.",
    ),
    "load": ("netlab.cli.load:load", "Keep connecting, and count what is lost."),
    "capture": ("netlab.cli.capture:capture", "Show packets on many devices at once."),
    "compare": ("netlab.cli.compare:compare", "Follow a packet in each mode, side by side."),
    "fault": ("netlab.cli.fault:fault", "Put faults into a lab, to practise finding them."),
    "rules": ("netlab.cli.rules:rules", "Show the rules that serve Services, and explain them."),
    "conntrack": ("netlab.cli.conntrack:conntrack", "List the connections on the nodes."),
    "topology": ("netlab.cli.topology:topology", "List, show and check topology files."),
    "vm": ("netlab.cli.vm:vm", "Run a command on a second kernel, in a virtual machine."),
    "bench": ("netlab.cli.bench:bench", "Measure what the datapaths cost on this machine."),
    "doctor": ("netlab.cli.doctor:doctor", "Tell what this machine can do, and what it lacks."),
}


class _Verbs(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _VERBS:
            return None
        module, _, attribute = _VERBS[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in _VERBS.items()])

    def shell_complete(
        self, ctx: click.Context, incomplete: str
    ) -> list[click.shell_completion.CompletionItem]:
        from click.shell_completion import CompletionItem

        verbs = [
            CompletionItem(name, help=line)
            for name, (_, line) in _VERBS.items()
            if name.startswith(incomplete)
        ]
        return verbs + click.Command.shell_complete(self, ctx, incomplete)


@click.group(
    cls=_Verbs,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "NETLAB"},
)
@click.version_option(package_name="netlab-datapath", prog_name="netlab")
@click.option("-v", "--verbose", is_flag=True, help="Show where an unexpected error came from.")
@click.pass_context
def netlab(context: click.Context, verbose: bool) -> None:
    """Kubernetes datapaths on a real kernel, without a cluster, explained packet by packet."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def main() -> None:
    """Entry point: the exit codes of docs/design.md, errors in words."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(_run())


def _run() -> int:
    try:
        result = netlab.main(standalone_mode=False)
        if sys.stdout is not None:  # closed by the caller
            sys.stdout.flush()
    except NetlabError as error:
        for problem in error.problems:
            click.echo(str(problem), err=True)
        return int(error.exit_code)
    except click.exceptions.Exit as exit_:
        return exit_.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return int(Exit.INTERRUPTED)
    except click.ClickException as error:
        return _usage(error)
    except BrokenPipeError:  # whoever read the output has seen enough
        _forget_output()
        return 128 + 13
    except OSError as error:
        if str(error.filename).startswith(_NETNS):
            return _without_namespace(error)
        if error.errno not in (errno.ENOSPC, errno.EIO, errno.EBADF):
            return _unexpected(error)
        _forget_output()
        click.echo(f"error[output]: the output cannot be written: {error.strerror}", err=True)
        return int(Exit.MACHINE)
    except Exception as error:
        return _unexpected(error)
    return result if isinstance(result, int) else int(Exit.YES)


def _forget_output() -> None:
    """What is still to be written goes nowhere; Python would complain once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


_NETNS = "/run/netns/"


def _without_namespace(error: OSError) -> int:
    """Of verbs that look into each namespace of a lab, and find one that is not here."""
    name = str(error.filename).removeprefix(_NETNS)
    click.echo(f"error[namespace-missing]: there is no network namespace {name} here", err=True)
    click.echo(
        "  hint: `netlab up` completes a lab; of one with nodes on machines of their own each has "
        "its own alone: name it with --node",
        err=True,
    )
    return int(Exit.MACHINE)


def _unexpected(error: Exception) -> int:
    """What nobody thought of: in one sentence, or with `-v` where it came from."""
    if {"-v", "--verbose"} & set(sys.argv[1:]) or os.environ.get("NETLAB_VERBOSE"):
        raise error
    click.echo(f"error[unexpected]: {type(error).__name__}: {error}", err=True)
    click.echo("  hint: `netlab -v ...` shows where; please report it", err=True)
    return int(Exit.MACHINE)


def _usage(error: click.ClickException) -> int:
    """Click's own complaints in the shape of ours."""
    context = getattr(error, "ctx", None)
    click.echo(f"error[usage]: {error.format_message()}", err=True)
    if context is not None:
        click.echo(f"  hint: `{context.command_path} --help`", err=True)
    return int(Exit.USAGE)
