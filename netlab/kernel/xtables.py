"""Rules of a namespace, loaded and read with the tools of iptables.

The tools are run inside the namespace, IPv4 and IPv6 side by side.  The nftables-backed variants
(`iptables-nft-restore`) come first where a machine has both: their rules can be traced, and the
legacy ones share one lock, /run/xtables.lock, between all namespaces of the machine.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import struct
from typing import TYPE_CHECKING

from netlab.datapath.state import Ruleset
from netlab.kernel.namespaces import entered
from netlab.kernel.nft import names
from netlab.problems import Exit, NetlabError, Problem

if TYPE_CHECKING:
    from subprocess import Popen

_NETLINK_NETFILTER = 12
_NFNL_SUBSYS_ACCT = 7
_NFNL_MSG_ACCT_NEW = 0
_NFACCT_NAME = 1
_NLM_F_REQUEST, _NLM_F_ACK, _NLM_F_EXCL, _NLM_F_CREATE = 0x1, 0x4, 0x200, 0x400
_NLMSG_ERROR = 2

# How the nftables backend keeps the tables that we know.
_TABLES = {f"{family} {table}" for family in ("ip", "ip6") for table in ("mangle", "filter", "nat")}


def restore(namespace: str | int, ruleset: Ruleset, flush: bool = True) -> None:
    """Load a ruleset into a namespace (a name under /run/netns or a descriptor).

    Each table named in the ruleset is replaced as a whole, in one transaction a table: chains and
    rules that somebody else put there are gone afterwards, connections and policies of other
    tables stay.  Without `flush` only what the ruleset says is changed.  Accounting objects that
    the rules name are created first.

    Raises NetlabError (exit 3) if a tool is missing or refuses its input.
    """
    keep = [] if flush else ["--noflush"]
    with entered(namespace):
        for name in ruleset.nfacct:
            create_nfacct(name)
        loads = [
            (program, _run([program, "-w", "5", *keep], text))
            for program, text in (
                (program("iptables", "restore"), ruleset.ipv4),
                (program("ip6tables", "restore"), ruleset.ipv6),
            )
        ]
    _wait(loads, "rules-refused")


def save(namespace: str | int, counters: bool = False) -> tuple[str, str]:
    """What `iptables-save` and `ip6tables-save` say in a namespace, if asked for with counters.

    Raises NetlabError (exit 3) if a tool is missing or fails.
    """
    with entered(namespace):
        saves = [
            (program, _run([program, *["-c"] * counters], ""))
            for program in (program("iptables", "save"), program("ip6tables", "save"))
        ]
    ipv4, ipv6 = _wait(saves, "rules-unreadable")
    return ipv4, ipv6


def in_use(namespace: str | int) -> bool:
    """Whether a namespace has tables of iptables at all, of either backend; cheap to ask."""
    if names(namespace) & _TABLES:
        return True
    with entered(namespace):
        for file in ("ip_tables_names", "ip6_tables_names"):
            with contextlib.suppress(FileNotFoundError), open(f"/proc/thread-self/net/{file}") as f:
                if f.read():
                    return True
    return False


def create_nfacct(name: str) -> None:
    """Make an accounting object in the calling thread's namespace; one that exists is kept.

    A rule with `-m nfacct` cannot be loaded without its object.  Source: linux/netfilter/
    nfnetlink_acct.h.  Raises NetlabError (exit 3) if the kernel has no nfnetlink_acct.
    """
    label = name.encode() + b"\0"
    attribute = struct.pack("=HH", 4 + len(label), _NFACCT_NAME) + label
    body = struct.pack("=BBH", socket.AF_UNSPEC, 0, 0) + attribute + b"\0" * (-len(label) % 4)
    header = struct.pack(
        "=IHHII",
        16 + len(body),
        _NFNL_SUBSYS_ACCT << 8 | _NFNL_MSG_ACCT_NEW,
        _NLM_F_REQUEST | _NLM_F_ACK | _NLM_F_CREATE | _NLM_F_EXCL,
        1,
        0,
    )
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as connection:
        connection.send(header + body)
        answer = connection.recv(4096)
    kind, code = struct.unpack_from("=4xH10xi", answer)
    if kind == _NLMSG_ERROR and -code not in (0, errno.EEXIST):
        raise NetlabError(
            Problem(
                "no-nfacct",
                f'accounting object "{name}" cannot be made: {os.strerror(-code)}',
                hint="the kernel needs nfnetlink_acct and xt_nfacct: `modprobe -a nfnetlink_acct "
                "xt_nfacct`, as root",
            ),
            Exit.MACHINE,
        )


def program(family: str, verb: str) -> str:
    """Path of `iptables-nft-restore` and its like, or of the plain name where there is none."""
    for name in (f"{family}-nft-{verb}", f"{family}-{verb}"):
        # /usr/sbin is not on the path of every user who may become root
        found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
        if found:
            return found
    raise NetlabError(
        Problem(
            "missing-program",
            f'"{family}-{verb}" is not installed',
            hint="`apt-get install iptables` on Debian and Ubuntu",
        ),
        Exit.MACHINE,
    )


def _run(command: list[str], text: str) -> Popen[bytes]:
    """Start a program with a text as its input, without waiting for it to read.

    The input is a memory file, not a pipe: two programs can be fed from one thread.
    """
    import subprocess

    with open(os.memfd_create(command[0].rpartition("/")[2]), "wb") as source:
        source.write(text.encode())
        source.seek(0)
        return subprocess.Popen(
            command, stdin=source, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )


def _wait(programs: list[tuple[str, Popen[bytes]]], code: str) -> list[str]:
    """Outputs of programs once all have ended; NetlabError with every failure."""
    outputs, problems = [], []
    for program, process in programs:
        output, complaint = process.communicate()
        outputs.append(output.decode())
        if process.returncode:
            said = complaint.decode(errors="replace").strip() or "no message"
            problems.append(
                Problem(
                    code,
                    f"{program} ended with status {process.returncode}: {said}",
                    hint="`netlab doctor` tells what the kernel lacks",
                )
            )
    if problems:
        raise NetlabError(problems, Exit.MACHINE)
    return outputs
