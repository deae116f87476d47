"""The verb `vm`: any command on a second kernel."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from netlab.problems import Exit, NetlabError, Problem

if TYPE_CHECKING:
    from netlab.vm import machine


@click.command(context_settings={"allow_interspersed_args": False})
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "-w",
    "--write",
    "writable",
    metavar="DIR",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, resolve_path=True),
    help="Keep what the command writes in this directory; repeatable.",
)
@click.option(
    "--memory", metavar="MIB", type=click.IntRange(min=256), default=2048, show_default=True
)
@click.option("--cpus", metavar="NUMBER", type=click.IntRange(1, 64), default=2, show_default=True)
@click.option(
    "--timeout",
    metavar="SECONDS",
    type=click.FloatRange(min=0, min_open=True),
    help="End the machine after so long; exit code 4.",
)
@click.option(
    "--console",
    metavar="FILE",
    type=click.Path(dir_okay=False),
    help="Write down what the kernel prints.",
)
def vm(
    command: tuple[str, ...],
    writable: tuple[str, ...],
    memory: int,
    cpus: int,
    timeout: float | None,
    console: str | None,
) -> int:
    """Run COMMAND as root in a virtual machine with a Debian kernel, or open a shell there.

    \b
      netlab vm -- netlab doctor
      netlab vm -- sh -c 'netlab up two-node-vxlan && netlab trace pod1 svc/myblog'
      netlab vm

    It sees this computer's files as you may read them; what it writes is gone afterwards, but in
    directories given with -w. Needs no root, and QEMU. The exit code is the command's.
    """
    from netlab.vm import machine

    on_terminal = not command
    typed = sys.stdin is not None and sys.stdin.isatty()
    if on_terminal and not (typed and sys.stdout.isatty()):
        raise NetlabError(
            Problem(
                "usage",
                "`netlab vm` without a COMMAND opens a shell, and this is no terminal",
                hint="`netlab vm -- COMMAND`",
            )
        )
    terminal = os.get_terminal_size() if on_terminal else None
    job = machine.Job(
        command=command or ("/bin/sh", "-c", 'exec "$(command -v bash || echo sh)" -i'),
        environment=environment(),
        directory=os.getcwd(),
        writable=writable,
        stdin=None if on_terminal or sys.stdin is None or sys.stdin.isatty() else 0,
        terminal=(terminal.lines, terminal.columns) if terminal else None,
    )
    size = machine.Size(processors=cpus, memory_mib=memory, seconds=timeout)
    hear: dict[str, machine.Hear] = {"stdout": to(1), "stderr": to(2)}
    try:
        with _kept_console(console, hear), _kept_terminal(on_terminal):
            return machine.run(job, hear, size)
    except machine.Ended as ended:
        raise _told(ended) from None


def environment() -> dict[str, str]:
    """Ours, with this netlab first on the path."""
    ours = os.path.dirname(os.path.abspath(sys.argv[0]))
    path = [ours, os.environ.get("PATH", ""), "/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin"]
    return {**os.environ, "PATH": ":".join(filter(None, path))}


def to(descriptor: int) -> machine.Hear:
    """What writes all that comes out of the machine to a descriptor."""

    def write(data: bytes) -> None:
        while data:
            data = data[os.write(descriptor, data) :]

    return write


@contextmanager
def _kept_console(path: str | None, hear: dict[str, machine.Hear]) -> Iterator[None]:
    """Write the console into a file, if one is named."""
    if path is None:
        yield
        return
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise NetlabError(Problem("usage", f"{path}: {error.strerror}")) from None
    hear["console"] = to(file)
    try:
        yield
    finally:
        os.close(file)


@contextmanager
def _kept_terminal(ours: bool) -> Iterator[None]:
    """Leave the terminal as it was: QEMU changes it, and may be killed."""
    if not ours:
        yield
        return
    import termios

    settings = termios.tcgetattr(0)
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, settings)


def _told(ended: machine.Ended) -> NetlabError:
    """The error, with the end of the console; all of it is in a file."""
    import tempfile

    lines = ended.console.rstrip().splitlines()
    if lines:
        with tempfile.NamedTemporaryFile(
            "w", prefix="netlab-vm-console-", suffix=".log", delete=False
        ) as file:
            file.write(ended.console)
        click.echo(
            "\n".join(["the console of the virtual machine ended with", *lines[-15:]]), err=True
        )
        hint = f"all of the console is in {file.name}"
    else:
        hint = "its console is empty"
    return NetlabError(
        Problem("vm-ended", ended.why, hint=hint),
        Exit.UNOBSERVED if ended.booted else Exit.MACHINE,
    )
