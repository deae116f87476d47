"""What this machine can do for a lab, what it lacks, and how to get it.

`examine` finds out everything and takes a fraction of a second; `preflight` is the little of it
that `up` looks at each time, so that what is missing is named before anything is built.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from netlab.problems import Exit, NetlabError, Problem

if TYPE_CHECKING:
    from netlab.topology.model import Lab

# Bits of linux/capability.h.
_CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_NET_RAW": 13, "CAP_SYS_ADMIN": 21}
_RUN_DIR = "/run/netns"
_BR_NETFILTER = "/proc/sys/net/bridge/bridge-nf-call-iptables"
_NEIGHBOUR_LIMIT = "/proc/sys/net/ipv4/neigh/default/gc_thresh3"
_USUAL_NEIGHBOUR_LIMIT = 1024  # gc_thresh3 of net/ipv4/arp.c
# The others are needed by every lab that there is, or come with what is.
_TRIED_FOR_OVERLAYS = ("ipip",)
_CONTAINER_FIX = "in a container: run it with --privileged"
# The switches concern this machine's own bridges, which need not change.
_BR_NETFILTER_FIX = (
    "sudo modprobe br_netfilter && sudo sysctl -w net.bridge.bridge-nf-call-iptables=0 "
    "net.bridge.bridge-nf-call-ip6tables=0"
)
_MODULES_ARE_IN = "on Debian in linux-image-amd64, on Ubuntu in linux-modules-extra-$(uname -r)"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at; `ok` is None if it could not be found out."""

    name: str
    ok: bool | None
    required: bool
    detail: str
    why: str
    fix: str | None = None


@dataclass(frozen=True, slots=True)
class _Feature:
    why: str
    fix: str
    required: bool = True


def _module(*names: str) -> str:
    return f"sudo modprobe -a {' '.join(names)} ({_MODULES_ARE_IN})"


# By the names of `kernel.features.ATTEMPTS`.
_FEATURES = {
    "netns": _Feature("each node and each pod is a network namespace", _CONTAINER_FIX),
    "altname": _Feature(
        "marks on devices tell what is netlab's and may be removed", "Linux 5.5 or newer"
    ),
    "veth": _Feature("the cable of each pod and each node", _module("veth")),
    "bridge": _Feature("cbr0 on each node, and the switch between nodes", _module("bridge")),
    "vxlan": _Feature("the overlay that carries packets between nodes", _module("vxlan")),
    "ipip": _Feature("overlay ipip: IP packets in IP packets", _module("ipip"), False),
    "br_netfilter": _Feature(
        "Service rules hold between two pods of one bridge",
        f"{_BR_NETFILTER_FIX} ({_MODULES_ARE_IN})",
    ),
    "nat": _Feature(
        "kube-proxy's rules: DNAT, MASQUERADE and the matches around them",
        _module("nft_compat", "nft_chain_nat", "xt_nat", "xt_MASQUERADE", "xt_statistic"),
    ),
    "nfacct": _Feature(
        "kube-proxy's rules count in accounting objects; without them they do not count",
        _module("nfnetlink_acct", "xt_nfacct"),
        False,
    ),
    "packet sockets": _Feature("a trace sees packets on every device", _module("af_packet")),
    "conntrack events": _Feature(
        "a trace tells how connections were translated", _module("nf_conntrack_netlink")
    ),
    "nft trace": _Feature("a trace names the rules that a packet met", _module("nf_tables")),
    "rule log": _Feature(
        "a trace names the rules of iptables' legacy backend",
        _module("ip_tables", "iptable_filter", "nfnetlink_log"),
        False,
    ),
    "BPF": _Feature(
        "a trace tells where and why the kernel itself dropped a packet",
        "Linux 5.13 or newer with BTF and without lockdown; without it tracefs tells the reasons",
        False,
    ),
    "IPv6": _Feature(
        "labs of two families, or of IPv6 alone",
        "start the machine without `ipv6.disable=1` on its kernel command line",
        False,
    ),
    "dummy": _Feature("kube-ipvs0 in ipvs mode", _module("dummy"), False),
    "ip_vs": _Feature("service proxy mode ipvs", _module("ip_vs", "ip_vs_rr"), False),
    "netem": _Feature("links that lose and delay packets (tc qdisc)", _module("sch_netem"), False),
    "nft queue": _Feature(
        "the fault source-port-race (`netlab fault`)", _module("nft_queue"), False
    ),
    "sctp": _Feature("pods answer on SCTP ports", _module("sctp"), False),
}


def preflight(lab: Lab | None = None) -> None:
    """Look at what `up` cannot do without and what costs next to nothing to look at.

    Of a lab also what its overlay and its service proxy need.  Raises NetlabError (exit 3) with
    everything that is missing.
    """
    problems = [*_privilege_problems(), *_program_problems()]
    if lab is not None:
        problems += [*overlay_problems(lab), *mode_problems(lab)]
        problems += [*container_problems(lab), *name_server_problems(lab)]
    if not os.path.exists(_BR_NETFILTER):
        problems.append(
            Problem(
                "missing-module",
                "the kernel module br_netfilter is not loaded: packets between pods of one node "
                "would pass by the Service rules",
                hint=f"`{_BR_NETFILTER_FIX}`",
            )
        )
    if problems:
        raise NetlabError(problems, Exit.MACHINE)


def mode_problems(lab: Lab) -> Iterator[Problem]:
    """What the service proxy of a lab needs and this machine lacks."""
    from netlab.datapath.services.modes import mode_of

    for program, package in mode_of(lab).programs:
        there = os.path.exists(program) if program.startswith("/") else _which(program)
        if not there:
            yield Problem(
                "missing-program",
                f"service proxy mode {lab.service_proxy.mode} of lab {lab.name} needs {program}, "
                "which is not installed",
                hint=f"apt-get install {package} (on Debian; `./bootstrap.sh test` does so without "
                "starting its daemon)",
            )


def container_problems(lab: Lab) -> Iterator[Problem]:
    """What Docker's networks of a lab need and this machine lacks."""
    by_name = [net for net in lab.docker_networks if not net.is_default]
    if by_name and _which("dnsmasq") is None:
        yield Problem(
            "missing-program",
            f"network {by_name[0].name} of lab {lab.name} needs dnsmasq, by which its containers "
            "are found by name, and which is not installed",
            hint="apt-get install dnsmasq-base (on Debian; `./bootstrap.sh test` does so)",
        )


def name_server_problems(lab: Lab) -> Iterator[Problem]:
    """What the name server of a lab needs and this machine lacks."""
    from netlab.topology.model import KNOT, NAME_SERVER

    pod = next((pod for pod in lab.pods if pod.name_server), None)
    if pod and _which(NAME_SERVER) is None:
        yield Problem(
            "missing-program",
            f"Pod {pod.key} of lab {lab.name}, the cluster's name server, needs {NAME_SERVER}, "
            "which is not installed",
            hint=f"apt-get install {KNOT} (on Debian; `./bootstrap.sh test` does so "
            "without starting its daemon)",
        )


def overlay_problems(lab: Lab) -> Iterator[Problem]:
    """What the overlay of a lab needs and this machine lacks."""
    from netlab.datapath.overlays import type_of

    overlay = type_of(lab)
    what = f'overlay "{lab.overlay.type}" of lab {lab.name}'
    for program, package in overlay.programs:
        if _which(program) is None:
            yield Problem(
                "missing-program",
                f"{what} needs {program}, which is not installed",
                hint=f"apt-get install {package} (on Debian; `./bootstrap.sh test` does so without "
                "starting its daemon)",
            )
    if any(pod.ingress_controller for pod in lab.pods):
        from netlab.topology.ingresses import PROGRAMS

        for program, package in PROGRAMS:
            if _which(program) is None:
                yield Problem(
                    "missing-program",
                    f"the Ingress controller of lab {lab.name} needs {program}, which is not "
                    "installed",
                    hint=f"apt-get install {package} (on Debian; `./bootstrap.sh test` does so "
                    "without starting its daemon)",
                )
    if overlay.feature in _TRIED_FOR_OVERLAYS and os.geteuid() == 0:
        from netlab.kernel import features

        outcome = features.attempt([overlay.feature])[overlay.feature]
        if outcome.ok is False:
            yield Problem(
                "missing-module",
                f"{what} needs the kernel module {overlay.feature}, which this kernel lacks: "
                f"{outcome.detail}",
                hint=f"{_FEATURES[overlay.feature].fix}; or another spec.overlay.type",
            )


def neighbour_warning(lab: Lab) -> Problem | None:
    """A lab that may need more neighbour entries than there can be on the whole machine.

    Entries that are learned count, permanent ones do not (neigh_alloc() of net/core/neighbour.c):
    each pod and its node know each other, and each node every other one and the gateway.
    """
    pods = sum(not pod.host_network for pod in lab.pods)
    nodes = len(lab.nodes)
    learned = 2 * pods + nodes * nodes
    try:
        with open(_NEIGHBOUR_LIMIT) as file:
            limit = int(file.read())
    except OSError:
        limit = _USUAL_NEIGHBOUR_LIMIT
    if learned <= limit:
        return None
    return Problem(
        "many-neighbours",
        f"when all of its {nodes} nodes and {pods} pods speak, lab {lab.name} has at least "
        f"{learned} neighbour entries, and this machine has room for {limit} in all namespaces "
        "together: beyond that packets are lost (EHOSTUNREACH)",
        hint="sudo sysctl -w net.ipv4.neigh.default.gc_thresh3=16384; or let few speak at once",
        warning=True,
    )


def examine() -> list[Check]:
    """Look at everything. Nothing on the machine is changed."""
    return [
        _privileges(),
        _run_directory(),
        *_features(),
        *_limits(),
        *_tools(),
        Check(
            "python",
            sys.version_info >= (3, 11),
            True,
            sys.version.split()[0],
            "runs netlab",
            "Python 3.11 or newer",
        ),
    ]


def is_fit(checks: list[Check]) -> bool:
    """Whether all that is required is there."""
    return all(check.ok for check in checks if check.required)


# -- Privileges ----------------------------------------------------------------------------------


def _missing_capabilities() -> list[str]:
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("CapEff:"))
    held = int(line.split()[1], 16)
    return [name for name, bit in _CAPABILITIES.items() if not held >> bit & 1]


def _privilege_problems() -> Iterator[Problem]:
    missing = _missing_capabilities()
    if not missing:
        return
    if os.geteuid() != 0:
        import shlex

        # With the path of the program: sudo does not look into an environment's bin directory.
        command = shlex.join(["sudo", *sys.argv])
        yield Problem("not-root", "making network namespaces needs root", hint=f"`{command}`")
    else:
        yield Problem(
            "missing-capability",
            f"this root lacks {', '.join(missing)}, which making network namespaces needs",
            hint=_CONTAINER_FIX,
        )


def _privileges() -> Check:
    missing = _missing_capabilities()
    fix = "sudo netlab ..." if os.geteuid() else _CONTAINER_FIX
    detail = f"without {', '.join(missing)}" if missing else ", ".join(_CAPABILITIES)
    why = "makes namespaces and sends packets in them"
    return Check("root", not missing, True, detail, why, fix)


def _run_directory() -> Check:
    """Whether names of namespaces can be made; the nearest directory that exists decides."""
    directory = _RUN_DIR
    while not os.path.isdir(directory):
        directory = os.path.dirname(directory)
    writable = os.access(directory, os.W_OK)
    return Check(
        _RUN_DIR,
        writable if os.geteuid() == 0 else None,
        True,
        "writable" if writable else f"{directory} cannot be written to",
        "namespaces have their names here, where `ip netns` looks, too",
        "mount a tmpfs on /run" if os.geteuid() == 0 else "run it as root",
    )


# -- The kernel ----------------------------------------------------------------------------------


def _features() -> Iterator[Check]:
    from netlab.kernel import features

    outcomes = features.attempt(list(_FEATURES))
    for name, feature in _FEATURES.items():
        outcome = outcomes[name]
        fix = "sudo netlab doctor" if outcome.ok is None and os.geteuid() else feature.fix
        detail = outcome.detail or "tried"
        yield Check(name, outcome.ok, feature.required, detail, feature.why, fix)


def _limits() -> Iterator[Check]:
    import resource

    try:
        with open(_NEIGHBOUR_LIMIT) as file:
            entries: int | None = int(file.read())
    except OSError:
        entries = None  # only the first namespace of the machine shows it
    yield Check(
        "neighbour table",
        None if entries is None else entries >= 1024,
        False,
        "not shown in this namespace"
        if entries is None
        else f"{entries} entries for all namespaces of the machine together",
        "pods that talk to each other take an entry each; beyond it: EHOSTUNREACH",
        "sudo sysctl -w net.ipv4.neigh.default.gc_thresh3=16384",
    )
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = hard == resource.RLIM_INFINITY or hard >= 4096
    yield Check(
        "descriptors",
        enough,
        False,
        "unlimited" if hard == resource.RLIM_INFINITY else f"at most {hard} a process",
        "one process answers for all pods and takes one for each port of each pod",
        "raise the hard limit, ulimit -Hn or LimitNOFILE=",
    )


# -- Programs ------------------------------------------------------------------------------------


def _program_problems() -> Iterator[Problem]:
    from netlab.kernel.xtables import program

    for family in ("iptables", "ip6tables"):
        try:
            program(family, "restore")
        except NetlabError as error:
            yield from error.problems


def _tools() -> Iterator[Check]:
    yield _iptables()
    yield _libnftables()
    for name, argument, why, package in (
        ("ip", "-V", "`ip netns exec` enters what netlab made", "iproute2"),
        ("nft", "--version", "shows rules by hand", "nftables"),
        ("ipset", "--version", "makes the sets of service proxy mode ipvs", "ipset"),
        ("curl", "--version", "asks a Service from within a pod", "curl"),
        ("conntrack", "--version", "shows connections by hand", "conntrack"),
        ("bird", "--version", "overlay bgp: routes between nodes", "bird2"),
        ("dnsmasq", "-v", "names in networks of Docker's users", "dnsmasq-base"),
        ("knotd", "-V", "the cluster's name server, pods with k8s-app: kube-dns", "knot"),
        ("haproxy", "-v", "service proxy mode userspace: TCP", "haproxy"),
        ("nginx", "-v", "mode userspace: UDP; topologies pod-containers, ingress", "nginx-light"),
        ("openssl", "version", "certificates of an Ingress controller", "openssl"),
    ):
        path = _which(name)
        fix = f"apt-get install {package}"
        detail = f"{_version(_said(path, argument))}, {path}" if path else "not installed"
        yield Check(name, path is not None, False, detail, why, fix)


def _iptables() -> Check:
    from netlab.kernel.xtables import program

    why, fix = "loads kube-proxy's rules", "apt-get install iptables"
    try:
        paths = [program("iptables", "restore"), program("ip6tables", "restore")]
    except NetlabError as error:
        return Check("iptables", False, True, error.problems[0].message, why, fix)
    # "iptables-restore v1.8.9 (nf_tables)"; without a backend it is a version before 1.8.
    said = _said(paths[0], "--version")
    backend = "nft" if "(nf_tables)" in said else "legacy"
    detail = f"{_version(said)}, backend {backend}, {paths[0]}"
    return Check("iptables", True, True, detail, why, fix)


def _libnftables() -> Check:
    """The library and its Python binding, loaded in a child: it has been seen to abort."""
    from netlab.kernel import features

    def load() -> str:
        import importlib.metadata

        import nftables

        nftables.Nftables()
        return f"pip-nftables {importlib.metadata.version('pip-nftables')}"

    outcome = features.run({"libnftables": load})["libnftables"]
    return Check(
        "libnftables",
        outcome.ok,
        True,
        outcome.detail,
        "arms the trace of rules",
        "apt-get install libnftables1 (Fedora and others: nftables); pip install pip-nftables",
    )


def _which(name: str) -> str | None:
    import shutil

    # /usr/sbin is not on the path of every user who may become root.
    return shutil.which(name) or shutil.which(name, path="/usr/local/sbin:/usr/sbin:/sbin")


def _said(path: str, argument: str) -> str:
    """First line of what a program says about its version."""
    import subprocess

    try:
        answer = subprocess.run(
            [path, argument], capture_output=True, text=True, timeout=5, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"does not run: {error}"
    lines = (answer.stdout or answer.stderr).strip().splitlines()
    return lines[0] if lines else f"ended with {answer.returncode}"


def _version(said: str) -> str:
    """The version number in such a line, or else the line."""
    import re

    found = re.search(r"\d+(\.\d+)+", said)
    return found[0] if found else said
