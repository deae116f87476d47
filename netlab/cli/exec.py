"""`netlab exec` and `netlab shell`: commands inside pods and nodes."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from netlab.cli.common import complete_reference, lab_option, namespace_option, running_lab
from netlab.lab.named import is_on_machines
from netlab.problems import NetlabError, Problem

if TYPE_CHECKING:
    from collections.abc import Mapping

    from netlab.datapath.state import View
    from netlab.topology.model import Container, DockerContainer, Lab, Pod
    from netlab.topology.references import Reference

F = TypeVar("F", bound=Callable[..., Any])


class _Exec(click.Command):
    """Says what to do if an option of the command was taken for one of ours."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            option = error.option_name
            raise NetlabError(
                Problem(
                    "usage",
                    f'`netlab exec` has no option "{option}"',
                    hint=f"is it the command's? `netlab exec TARGET -- COMMAND {option}`",
                )
            ) from None


def _like_kubectl(short: str, long: str, what: str) -> Callable[[F], F]:
    return click.option(
        short,
        long,
        is_flag=True,
        expose_value=False,
        help=f"As kubectl's; {what} is passed anyway.",
    )


_container_option = click.option(
    "-c",
    "--container",
    metavar="CONTAINER",
    help="The container of a pod whose environment it is to have; the first one otherwise.",
)


@click.command(name="exec", cls=_Exec)
@click.argument("target", shell_complete=complete_reference)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@namespace_option
@lab_option
@_container_option
@_like_kubectl("-i", "--stdin", "stdin")
@_like_kubectl("-t", "--tty", "a terminal")
def exec_(
    target: str,
    command: tuple[str, ...],
    container: str | None,
    namespace: str | None,
    lab_name: str | None,
) -> int:
    """Run COMMAND in a pod or on a node; `--` before it keeps its options its own.

    \b
      netlab exec pod1 -- curl -s http://10.99.174.93/hostname
      netlab exec node/k8s-slave1 -- ip route

    A pod's variables are there, those of its Services too. The exit code is the command's.
    """
    lab = running_lab(lab_name, on_machines=True)
    if is_on_machines(lab.name):
        options = [
            *(["-n", namespace] if namespace else []),
            *(["-c", container] if container else []),
        ]
        return _there(lab, target, namespace, ["exec", *options, "--", target, *command])
    place, _, owner = _place(lab, target, namespace)
    return _run(lab, place, command, _environment(lab, owner, target, container))


@click.command()
@click.argument("target", shell_complete=complete_reference)
@_container_option
@namespace_option
@lab_option
def shell(target: str, container: str | None, namespace: str | None, lab_name: str | None) -> int:
    """Open $SHELL in a pod or on a node; the prompt says where."""
    lab = running_lab(lab_name, on_machines=True)
    if is_on_machines(lab.name):
        options = [
            *(["-n", namespace] if namespace else []),
            *(["-c", container] if container else []),
        ]
        return _there(lab, target, namespace, ["shell", *options, "--", target])
    place, label, owner = _place(lab, target, namespace)
    environment = _environment(lab, owner, target, container)
    program = next(
        found
        for name in (os.environ.get("SHELL"), "bash", "sh")
        if name and (found := shutil.which(name))
    )
    prompt = f"[{label}] "
    if os.path.basename(program) != "bash":
        return _run(lab, place, [program, "-i"], {**environment, "PS1": f"{prompt}$ "})
    start = _bash_start(prompt)
    return _run(lab, place, [program, "--rcfile", f"/dev/fd/{start}", "-i"], environment)


def _there(lab: Lab, target: str, namespace: str | None, command: list[str]) -> int:
    """The same command on the machine that the target lives on."""
    from netlab.cli.hosts import run_there
    from netlab.topology.references import resolve

    reference = resolve(lab, target, namespace)
    pod = reference.pod or _pod_behind(lab, reference)
    node = pod.node if pod else reference.node.name if reference.node else None
    if node is None:
        _place(lab, target, namespace)  # says why
        raise NetlabError(Problem("no-place", f'"{target}" is on no node of lab {lab.name}'))
    return run_there(lab, node, [command[0], "--lab", lab.name, *command[1:]])


def _bash_start(prompt: str) -> int:
    """What bash reads first, in memory: the user's own file, and the prompt in front of theirs."""
    file = os.memfd_create("netlab-bashrc", 0)  # inherited
    lines = f"""
[ -r ~/.bashrc ] && . ~/.bashrc
PS1={shlex.quote(prompt)}"$PS1"
exec {file}<&-
"""
    os.write(file, lines.encode())
    os.lseek(file, 0, os.SEEK_SET)
    return file


def _run(lab: Lab, place: View, command: Sequence[str], environment: Mapping[str, str]) -> int:
    from netlab.lab import control, enter

    init = control.connect(lab.name)
    if init is None:
        raise control.LabNotRunning(lab.name)
    return enter.run(init, place, command, environment)


def _environment(
    lab: Lab, pod: Pod | DockerContainer | None, target: str, name: str | None
) -> dict[str, str]:
    """The caller's variables and, before those, the ones of a container."""
    from netlab.datapath import docker, environment
    from netlab.topology.model import Container, DockerContainer

    if isinstance(pod, DockerContainer) and name in (None, pod.name):
        return {**os.environ, **docker.environment_of(pod)}
    if pod is None or isinstance(pod, DockerContainer):
        if name is not None:
            problem = Problem("usage", f'"{target}" is no pod, and has no container "{name}"')
            raise NetlabError(problem)
        return dict(os.environ)
    # (Of a pod that declares no container the built-in workload is the only one.)
    container = _container(pod, name) if pod.containers or name else Container(name="")
    return {**os.environ, **environment.of_container(lab, pod, container)}


def _container(pod: Pod, name: str | None) -> Container:
    if name is None:
        return pod.containers[0]
    for container in pod.containers:
        if container.name == name:
            return container
    known = ", ".join(container.name for container in pod.containers) or "none"
    problem = Problem(
        "unknown-container",
        f'Pod {pod.key} has no container "{name}"',
        hint=f"it has {known}",
    )
    raise NetlabError(problem)


def _place(
    lab: Lab, text: str, namespace: str | None
) -> tuple[View, str, Pod | DockerContainer | None]:
    """Where a reference leads, its name for people, and the pod or the container if it is one."""
    from netlab.datapath import docker
    from netlab.datapath.name_files import host_view, node_view, pod_view
    from netlab.topology.references import resolve

    reference = resolve(lab, text, namespace)
    pod = reference.pod or _pod_behind(lab, reference)
    if pod is not None:
        return pod_view(lab, pod), pod.key, pod
    if reference.container is not None:
        name = f"container/{reference.container.name}"
        return docker.view(lab, reference.container), name, reference.container
    if reference.node is not None:
        return node_view(lab, reference.node), f"node/{reference.node.name}", None
    if reference.host is not None:
        return host_view(lab, reference.host), f"host/{reference.host.name}", None
    raise NetlabError(
        Problem(
            "no-place",
            f'"{text}" is neither a pod nor a node nor a host of lab {lab.name}',
            hint="`netlab get pods -o wide` and `netlab get nodes` list them",
        )
    )


def _pod_behind(lab: Lab, reference: Reference) -> Pod | None:
    """A pod behind a Service, as kubectl picks one."""
    if reference.service is None:
        return None
    ports = reference.service.ports
    keys = {e.pod for port in ports for e in lab.endpoints_of(reference.service, port) if e.ready}
    return next((pod for pod in lab.pods if pod.key in keys), None)
