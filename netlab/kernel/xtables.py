"""Rules of a namespace, loaded and read with the tools of iptables.

The tools are run inside the namespace, IPv4 and IPv6 side by side.  Rules are kept by nf_tables
(`iptables-nft-restore`) or by the kernel's older x_tables (`iptables-legacy-restore`), and neither
shows those of the other.  Where nobody says which, it is the one that plain `iptables` is.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import shutil
import socket
import struct
from typing import TYPE_CHECKING

from netlab.datapath.state import Backend, Ruleset
from netlab.kernel.namespaces import entered
from netlab.kernel.netlink import NetlinkError, Socket
from netlab.kernel.nft import names
from netlab.kernel.syscalls import getsockopt
from netlab.problems import Exit, NetlabError, Problem

if TYPE_CHECKING:
    from subprocess import Popen

_NETLINK_NETFILTER = 12
_NFNL_SUBSYS_ACCT = 7
_NFNL_MSG_ACCT_NEW, _NFNL_MSG_ACCT_GET = 0, 1
_NFACCT_NAME = 1
_NLM_F_REQUEST, _NLM_F_ACK, _NLM_F_EXCL, _NLM_F_CREATE = 0x1, 0x4, 0x200, 0x400
_NLMSG_ERROR = 2
_IPT_SO_GET_INFO = 64
_GET_INFO = struct.Struct("=32s52x")  # struct ipt_getinfo

# How the nftables backend keeps the tables that we know.
_TABLES = {f"{family} {table}" for family in ("ip", "ip6") for table in ("mangle", "filter", "nat")}

BACKENDS: tuple[Backend, ...] = ("nft", "legacy")

# All legacy tools of a machine, in whatever namespace, wait for one lock, /run/xtables.lock.
_PATIENCE_S = "60"

# Reading rules is allocating and freeing small pieces of memory: glibc may keep more than seven of
# a size at hand, which saves a tenth of the time.  Other C libraries take no notice.
_TUNABLES = "GLIBC_TUNABLES"
_KEEP_PIECES = "glibc.malloc.tcache_count=65535"


def restore(namespace: str | int, ruleset: Ruleset, flush: bool = True) -> None:
    """Load a ruleset into a namespace (a name under /run/netns or a descriptor).

    Each table named in the ruleset is replaced as a whole, in one transaction a table: chains and
    rules that somebody else put there are gone afterwards, connections and policies of other
    tables stay.  Without `flush` only what the ruleset says is changed.  Accounting objects that
    the rules name are created first.

    Raises NetlabError (exit 3) if a tool is missing or refuses its input.
    """
    backend = ruleset.backend or host_backend()
    keep = [] if flush else ["--noflush"]
    ordered = _last_first if flush and backend == "legacy" else str
    with entered(namespace):
        for name in ruleset.nfacct:
            create_nfacct(name)
        loads = [
            (program, _run([program, "-w", _PATIENCE_S, *keep], ordered(text)))
            for program, text in (
                (program("iptables", "restore", backend), ruleset.ipv4),
                (program("ip6tables", "restore", backend), ruleset.ipv6),
            )
            if text
        ]
    _wait(loads, "rules-refused")


def save(
    namespace: str | int, counters: bool = False, backend: Backend | None = None
) -> tuple[str, str]:
    """What `iptables-save` and `ip6tables-save` say in a namespace, if asked for with counters.

    Raises NetlabError (exit 3) if a tool is missing or fails.
    """
    with entered(namespace):
        saves = [
            (program, _run([program, *["-c"] * counters], ""))
            for program in (
                program("iptables", "save", backend),
                program("ip6tables", "save", backend),
            )
        ]
    ipv4, ipv6 = _wait(saves, "rules-unreadable")
    return ipv4, ipv6


def in_use(namespace: str | int, backend: Backend) -> bool:
    """Whether a namespace has tables of a backend with something in them; cheap to ask.

    (Tables of nf_tables that are empty count, too: they can go, those of x_tables cannot.)
    """
    if backend == "nft":
        return bool(names(namespace) & _TABLES)
    with entered(namespace):
        return bool(legacy_tables())


def legacy_tables(*families: int) -> list[str]:
    """Tables of the legacy backend with chains or rules in the calling thread's namespace.

    `families` are those asked about, AF_INET or AF_INET6, both if none is given.
    Source: linux/netfilter_ipv4/ip_tables.h, IPT_SO_GET_INFO.
    """
    found: dict[str, None] = {}
    for file, family, level in (
        ("ip_tables_names", socket.AF_INET, socket.IPPROTO_IP),
        ("ip6_tables_names", socket.AF_INET6, socket.IPPROTO_IPV6),
    ):
        if families and family not in families:
            continue
        with contextlib.suppress(OSError), open(f"/proc/thread-self/net/{file}") as names_file:
            for name in names_file.read().split():
                with socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW) as channel:
                    asked = _GET_INFO.pack(name.encode())
                    answer = getsockopt(channel.fileno(), level, _IPT_SO_GET_INFO, asked)
                hooks, entries = struct.unpack_from("=I40xI", answer, 32)
                # One for the policy of each hook, and one at the end.
                if entries > hooks.bit_count() + 1:
                    found[name] = None
    return list(found)


@functools.cache
def has_nfacct() -> bool:
    """Whether this kernel has accounting objects, so that rules can count in them."""
    request = struct.pack("=BBH", socket.AF_UNSPEC, 0, 0)
    with Socket(_NETLINK_NETFILTER) as netlink:
        try:
            netlink.dump(_NFNL_SUBSYS_ACCT << 8 | _NFNL_MSG_ACCT_GET, request)
        except NetlinkError as error:
            return error.errno != errno.EINVAL  # there is no such subsystem
    return True


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


def program(family: str, verb: str, backend: Backend | None = None) -> str:
    """Path of `iptables-nft-restore` and its like; without a backend the one that the host uses.

    Raises NetlabError (exit 3) if it is not installed.
    """
    backend = backend or host_backend()
    name = f"{family}-{backend}-{verb}"
    found = _which(name)
    if found is None and backend == host_backend():  # a version that comes with one backend only
        name = f"{family}-{verb}"
        found = _which(name)
    if found is None:
        raise _missing(name)
    return found


@functools.cache
def host_backend() -> Backend:
    """The backend that plain `iptables` is on this machine.

    Raises NetlabError (exit 3) if there is no iptables at all.
    """
    plain = _which("iptables")
    if plain is None:
        for backend in BACKENDS:
            if _which(f"iptables-{backend}-restore"):
                return backend
        raise _missing("iptables")
    # All names are links to xtables-nft-multi or xtables-legacy-multi.
    binary = os.path.basename(os.path.realpath(plain))
    for backend in BACKENDS:
        if f"-{backend}" in binary:
            return backend
    import subprocess

    # "iptables v1.8.9 (nf_tables)"; without a backend it is a version before 1.8.
    said = subprocess.run([plain, "--version"], capture_output=True, text=True).stdout
    return "nft" if "(nf_tables)" in said else "legacy"


def _which(name: str) -> str | None:
    # /usr/sbin is not on the path of every user who may become root
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")


def _missing(program: str) -> NetlabError:
    return NetlabError(
        Problem(
            "missing-program",
            f'"{program}" is not installed',
            hint="`apt-get install iptables` on Debian and Ubuntu",
        ),
        Exit.MACHINE,
    )


def _last_first(rules: str) -> str:
    """The same rules, with the chains of each table declared from the last to the first.

    The legacy tool keeps chains sorted by name.  One that belongs before all others finds its place
    at once, one that belongs behind them is compared with hundreds; and the chains that most rules
    lead to, which come first by name, are found first if they were declared last.  This takes a
    fifth off the time for tens of thousands of chains.
    """
    return "*".join(map(_chains_last_first, rules.split("*")))


def _chains_last_first(table: str) -> str:
    """That of a table without the asterisk before its name; what has no rules stays as it is."""
    declared, rule, rules = table.partition("\n-")
    if not rule:
        return table
    name, *chains = declared.split("\n:")
    return "\n:".join((name, *reversed(chains))) + rule + rules


def _run(command: list[str], text: str) -> Popen[bytes]:
    """Start a program with a text as its input, without waiting for it to read.

    The input is a memory file, not a pipe: two programs can be fed from one thread.
    """
    import subprocess

    with open(os.memfd_create(command[0].rpartition("/")[2]), "wb") as source:
        source.write(text.encode())
        source.seek(0)
        return subprocess.Popen(
            command,
            stdin=source,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={_TUNABLES: _KEEP_PIECES, **os.environ},
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
