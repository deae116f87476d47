"""The hosts file: which machine each node of a lab lives on.

    k8s-slave1: {gateway: "ssh=root@192.0.2.11", underlay: eth1}
    k8s-slave2: {gateway: "vagrant_ssh=k8s-slave2", underlay: 172.21.32.9}

A gateway is a specification of execnet's (https://execnet.readthedocs.io, "xspec"): the way to the
machine and, behind `//python=`, the Python that has netlab there.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping

import msgspec

from netlab.problems import Exit, NetlabError, Place, Problem, suggest
from netlab.topology.model import Lab

# Where the project's own bootstrap puts it on the machines of its Vagrantfile.
VAGRANT_PYTHON = "sudo /opt/netlab/.venv/bin/python"
_WAYS = ("ssh", "vagrant_ssh", "popen")


class Machine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a machine is reached, and its interface or address towards the others.

    Without `underlay` it is where the node's address of the topology is.
    """

    gateway: str
    underlay: str = ""

    @property
    def way(self) -> str:
        """`ssh`, `vagrant_ssh` or `popen`."""
        return self.gateway.partition("//")[0].partition("=")[0]


Machines = Mapping[str, Machine]


def read(path: str, lab: Lab) -> dict[str, Machine]:
    """The machines of a lab's nodes, by a file or, for "vagrant", by `vagrant status`.

    NetlabError (exit 2) with everything that is wrong in it.
    """
    if path == "vagrant":
        return _of_vagrant(lab)
    import yaml

    place = Place(path)
    try:
        with open(path, encoding="utf-8") as file:
            found = yaml.safe_load(file)
    except OSError as error:
        problem = Problem("unreadable", f"{path}: {error.strerror}", hint="--hosts names a file")
        raise NetlabError(problem) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        text = " ".join(str(error).split())
        raise NetlabError(Problem("bad-hosts", f"it is no YAML: {text}", place)) from None
    if not isinstance(found, dict) or not found:
        text = "it maps no node to a machine"
        hint = 'as in: k8s-slave1: {gateway: "ssh=root@192.0.2.11", underlay: eth1}'
        raise NetlabError(Problem("bad-hosts", text, place, hint))
    machines: dict[str, Machine] = {}
    problems: list[Problem] = []
    for node, entry in found.items():
        try:
            machines[str(node)] = msgspec.convert(entry, type=Machine)
        except msgspec.ValidationError as error:
            problems.append(Problem("bad-hosts", f"{node}: {error}", place))
    problems += _problems(machines, lab, place, set(map(str, found)))
    if problems:
        raise NetlabError(problems)
    return machines


def _problems(machines: Machines, lab: Lab, place: Place, named: set[str]) -> list[Problem]:
    nodes = [node.name for node in lab.nodes]
    problems = []
    for name in sorted(named - set(nodes)):
        near = suggest(name, nodes)
        text = f'node "{name}" is not in lab {lab.name}'
        hint = f'did you mean "{near}"?' if near else f"it has {', '.join(nodes)}"
        problems.append(Problem("unknown-node", text, place, hint))
    for name in nodes:
        if name not in named:
            text = f'node "{name}" of lab {lab.name} has no machine'
            problems.append(Problem("node-without-host", text, place, "add it to the hosts file"))
    ways: dict[str, str] = {}
    for node, machine in machines.items():
        if machine.way not in _WAYS:
            text = f'{node}: "{machine.gateway}" is no way to a machine'
            hint = "a gateway begins with ssh=, vagrant_ssh= or popen"
            problems.append(Problem("bad-gateway", text, place, hint))
        elif machine.gateway in ways:
            text = f"{node} and {ways[machine.gateway]} are on one machine, which can be one node"
            hint = "without --hosts all nodes are namespaces of one machine"
            problems.append(Problem("two-on-one-host", text, place, hint))
        ways[machine.gateway] = node
    return problems


def _of_vagrant(lab: Lab) -> dict[str, Machine]:
    """The machines of the Vagrantfile in this directory, those of them that are nodes."""
    try:
        done = subprocess.run(
            ["vagrant", "ssh-config"], capture_output=True, text=True, timeout=60, check=False
        )
    except FileNotFoundError:
        problem = Problem(
            "missing-program", '"vagrant" is not installed', hint="`apt-get install vagrant`"
        )
        raise NetlabError(problem, Exit.MACHINE) from None
    except subprocess.TimeoutExpired:
        problem = Problem("no-vagrant", "`vagrant ssh-config` does not end")
        raise NetlabError(problem, Exit.MACHINE) from None
    hosts = ssh_hosts(done.stdout)
    missing = [node.name for node in lab.nodes if node.name not in hosts]
    if missing:
        words = " ".join(done.stderr.split())  # a sentence of its own, over several lines
        because = f": {words}" if words else ""
        problem = Problem(
            "no-vagrant",
            f"Vagrant has no machine {', '.join(missing)} that runs{because}",
            hint="`vagrant up` in the directory of the Vagrantfile",
        )
        raise NetlabError(problem, Exit.MACHINE)
    return {
        node.name: Machine(gateway=f"{_way_to(hosts[node.name])}//python={VAGRANT_PYTHON}")
        for node in lab.nodes
    }


def ssh_hosts(text: str) -> dict[str, dict[str, str]]:
    """The settings of each `Host` of an ssh_config(5), as `vagrant ssh-config` prints it."""
    hosts: dict[str, dict[str, str]] = {}
    settings: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.strip().partition(" ")
        if key == "Host":
            settings = hosts.setdefault(value.strip(), {})
        elif key:
            settings[key] = value.strip().strip('"')
    return hosts


def _way_to(settings: Mapping[str, str]) -> str:
    wanted = ("Port", "IdentityFile", "IdentitiesOnly", "UserKnownHostsFile")
    options = [f"-o {key}={settings[key]}" for key in wanted if key in settings]
    # The machine was made a moment ago by Vagrant itself, on this machine.
    options.append("-o StrictHostKeyChecking=no")
    user, host = settings.get("User", "vagrant"), settings.get("HostName", "127.0.0.1")
    return f"ssh={' '.join(options)} {user}@{host}"
