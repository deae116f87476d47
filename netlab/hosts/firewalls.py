"""What other firewalls a machine has: found and said, and not changed unless that is allowed."""

from __future__ import annotations

import os
import shlex
import subprocess
from typing import NamedTuple

from netlab.kernel import nft, xtables
from netlab.kernel.namespaces import open_current
from netlab.problems import NetlabError, Problem
from netlab.topology.model import Lab


class Findings(NamedTuple):
    """Others' rules.  `lasting` are problems that netlab does not remove, allowed to or not."""

    problems: list[Problem]
    lasting: list[Problem]
    notes: list[str]


def found() -> Findings:
    """Look at the rules of the calling thread's namespace."""
    problems: list[Problem] = []
    lasting: list[Problem] = []
    notes: list[str] = []
    here = open_current()
    try:
        tables = nft.names(here)
        texts = []
        for backend in xtables.BACKENDS:
            if xtables.in_use(here, backend):
                try:
                    texts.append(xtables.save(here, backend=backend)[0])
                except NetlabError as error:
                    lasting += error.problems
    finally:
        os.close(here)
    for name in sorted(tables):
        if name.split()[1] == "kube-proxy":
            lasting.append(_foreign_proxy(f"nftables table {name}"))
        elif name.split()[1] == "firewalld":
            lasting.append(
                Problem(
                    "firewalld",
                    "firewalld is at work, and refuses what is forwarded",
                    hint="`systemctl stop firewalld`, for as long as the lab is up",
                )
            )
    if any(":KUBE-SERVICES " in text for text in texts):
        lasting.append(_foreign_proxy("chain KUBE-SERVICES"))
    if any(":DOCKER " in text for text in texts):
        notes.append("Docker has rules here; they stay as they are")
    if any(_policy_is_drop(text) for text in texts):
        problems.append(
            Problem(
                "forward-drop",
                "the policy of FORWARD is DROP: packets of pods would not pass",
                hint="--allow-host-changes adds rules that accept them, for as long as the lab is "
                "up",
            )
        )
    return Findings([*problems, *lasting], lasting, notes)


def _policy_is_drop(text: str) -> bool:
    _, _, filters = text.partition("*filter\n")
    return ":FORWARD DROP" in filters.partition("COMMIT")[0]


def allow(lab: Lab) -> None:
    """Where FORWARD's policy is DROP, put rules that accept pods' packets in front."""
    saved = _saved()
    if _policy_is_drop(saved) and not _ours(saved, lab.name):
        for rule in _rules(lab.name, lab.pod_cidrs):
            _iptables("-I", *rule)


def disallow(lab: str) -> None:
    """Take the rules of :func:`allow` away."""
    for rule in _ours(_saved(), lab):
        _iptables("-D", *rule)


def _ours(saved: str, lab: str) -> list[list[str]]:
    rules = (shlex.split(line) for line in saved.splitlines() if line.startswith("-A FORWARD "))
    return [words[1:] for words in rules if _comment(lab) in words]


def _comment(lab: str) -> str:
    return f"netlab:{lab}:pods"


def _rules(lab: str, cidrs: tuple[str, ...]) -> list[list[str]]:
    comment = ["-m", "comment", "--comment", _comment(lab)]
    return [
        ["FORWARD", end, cidr, *comment, "-j", "ACCEPT"] for cidr in cidrs for end in ("-s", "-d")
    ]


def _saved() -> str:
    program = xtables.which("iptables-save")
    if program is None:
        return ""
    done = subprocess.run([program, "-t", "filter"], capture_output=True, text=True, check=False)
    return done.stdout


def _iptables(*words: str) -> None:
    program = xtables.which("iptables")
    assert program is not None
    subprocess.run([program, "-w", "5", "-t", "filter", *words], capture_output=True, check=True)


def _foreign_proxy(what: str) -> Problem:
    return Problem(
        "foreign-proxy",
        f"there is a {what} that netlab did not make: this machine is a node of a cluster",
        hint="take a machine that is none",
    )
