"""What this kernel can do, found out by doing it.

A configuration file or a list of modules says what could be; here each feature is used once, in a
network namespace of its own, by a child process that ends afterwards and takes everything along.
Modules are loaded only where the kernel does so by itself.  A child that crashes or hangs spoils
its own answer and no other.  Without root the children try in a user namespace of their own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from netlab.kernel import rtnetlink
from netlab.kernel.netlink import (
    NLM_F_CREATE,
    NLM_F_EXCL,
    Socket,
    attribute,
    message,
    nested,
    number,
    text,
)
from netlab.kernel.syscalls import (
    CLONE_NEWNET,
    CLONE_NEWNS,
    MS_BIND,
    MS_PRIVATE,
    MS_REC,
    die_with_parent,
    mount,
    unshare,
)

TIMEOUT_S = 30.0

_CLONE_NEWUSER = 0x10000000
_SOL_NETLINK = 270
_NETLINK_ADD_MEMBERSHIP = 1
_NETLINK_NETFILTER = 12
_NETLINK_GENERIC = 16
_NFNLGRP_CONNTRACK_NEW = 1
_NFNLGRP_NFTRACE = 9
_GENL_ID_CTRL = 16
_CTRL_CMD_GETFAMILY = 3
_CTRL_ATTR_FAMILY_NAME = 2
_BR_SWITCH = "/proc/sys/net/bridge/bridge-nf-call-iptables"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of an attempt; `ok` is None if it could not be made."""

    ok: bool | None
    detail: str


def attempt(names: Sequence[str]) -> dict[str, Outcome]:
    """Try features by name, all at once; the names are the keys of `ATTEMPTS`."""
    return run({name: ATTEMPTS[name] for name in names})


def run(attempts: Mapping[str, Callable[[], str]]) -> dict[str, Outcome]:
    """Run each function in a child in a scratch namespace; what it returns is the detail."""
    children = {name: _fork(function) for name, function in attempts.items()}
    deadline = time.monotonic() + TIMEOUT_S
    try:
        return {name: _outcome(*child, deadline) for name, child in children.items()}
    finally:
        for pid, answer in children.values():
            # Each child leads a process group, so that a tool that it started ends with it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
            os.close(answer)


def _fork(function: Callable[[], str]) -> tuple[int, int]:
    """Start a child that tries; its process id and where its answer can be read."""
    answer, tell = os.pipe()
    pid = os.fork()
    if pid:
        os.close(tell)
        # Done on both sides: whoever is first, the group is there when it is to be killed.
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)
        return pid, answer
    status = 1
    try:
        os.setpgid(0, 0)
        die_with_parent(signal.SIGKILL)
        os.write(tell, _try(function))
        status = 0
    finally:
        os._exit(status)


def _try(function: Callable[[], str]) -> bytes:
    """One character for the outcome, then the detail."""
    try:
        _enter_scratch()
    except OSError as error:
        return f"?{error.strerror}: no scratch namespace could be made".encode()
    try:
        return b"+" + function().encode()
    except Exception as error:
        said = (error.strerror if isinstance(error, OSError) else None) or str(error)
        return b"-" + said.encode()


def _enter_scratch() -> None:
    """Move into new network and mount namespaces, as root or, without root, as its own root."""
    user = os.geteuid()
    if user != 0:
        group = os.getegid()
        unshare(_CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWNS)
        for file, line in (
            ("setgroups", "deny"),
            ("uid_map", f"0 {user} 1"),
            ("gid_map", f"0 {group} 1"),
        ):
            with open(f"/proc/self/{file}", "w") as control:
                control.write(line)
        # iptables-legacy would lock a file that only the real root may open.
        os.environ["XTABLES_LOCKFILE"] = os.devnull
    else:
        unshare(CLONE_NEWNET | CLONE_NEWNS)
    mount("none", "/", None, MS_REC | MS_PRIVATE)


def _outcome(pid: int, answer: int, deadline: float) -> Outcome:
    import select

    ready, _, _ = select.select([answer], [], [], max(0.0, deadline - time.monotonic()))
    if not ready:
        return Outcome(False, f"no answer within {TIMEOUT_S:g} s")
    said = os.read(answer, 65536).decode(errors="replace")
    if not said:
        _, status = os.waitpid(pid, 0)
        ended = os.waitstatus_to_exitcode(status)
        why = f"was ended by {signal.Signals(-ended).name}" if ended < 0 else f"ended with {ended}"
        return Outcome(False, f"the attempt {why}")
    return Outcome({"+": True, "-": False, "?": None}[said[0]], said[1:])


# -- The attempts: each returns a detail worth reading, or "" ------------------------------------


def _netns() -> str:
    """The scratch namespace is there already; naming it is a bind mount."""
    mount("tmpfs", "/tmp", "tmpfs", 0)
    with open("/tmp/name", "x"):
        pass
    mount("/proc/self/ns/net", "/tmp/name", None, MS_BIND)
    return ""


def _altname() -> str:
    _request(rtnetlink.add_altname(1, "netlab:doctor:lo"))
    return ""


def _link(kind: str, *data: bytes) -> str:
    info = [text(rtnetlink.IFLA_INFO_KIND, kind)]
    if data:
        info.append(nested(rtnetlink.IFLA_INFO_DATA, *data))
    body = rtnetlink.link_message(0) + nested(rtnetlink.IFLA_LINKINFO, *info)
    _request(message(rtnetlink.RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body))
    return ""


def _vxlan() -> str:
    return _link(
        "vxlan",
        number(rtnetlink.IFLA_VXLAN_ID, 1),
        # The kernel reads the port in network order.
        struct.pack("=HH", 6, rtnetlink.IFLA_VXLAN_PORT) + struct.pack("!Hxx", 8472),
    )


def _ipip() -> str:
    """With an end of its own: the module makes one without, tunl0, in every namespace."""
    return _link("ipip", attribute(rtnetlink.IFLA_IPTUN_LOCAL, socket.inet_aton("192.0.2.1")))


def _ipv6() -> str:
    """An address, given as `up` gives it."""
    from netlab.datapath.state import Address

    with open("/proc/sys/net/ipv6/conf/all/disable_ipv6", "w") as switch:
        switch.write("0")
    _request(rtnetlink.set_up(1))
    _request(rtnetlink.add_address(Address(link="lo", address="2001:db8::1/128"), 1))
    return ""


def _br_netfilter() -> str:
    with open(_BR_SWITCH) as switch:
        switch.read()
    return ""


def _packet() -> str:
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0):
        return ""


# What kube-proxy's rules are made of: matches and targets, each once.
_NAT = """*filter
-A INPUT -m conntrack --ctstate NEW -m comment --comment doctor -j ACCEPT
-A FORWARD -m mark --mark 0x4000/0x4000 -j REJECT
COMMIT
*nat
-A PREROUTING -m addrtype --dst-type LOCAL -j MARK --or-mark 0x4000
-A PREROUTING -p tcp -m statistic --mode random --probability 0.5 -j DNAT --to-destination {to}
-A PREROUTING -p tcp -m recent --name doctor --rcheck --seconds 10800 --reap -j RETURN
-A POSTROUTING -j MASQUERADE --random-fully
COMMIT
"""


def _nat() -> str:
    _restore(_NAT.format(to="192.0.2.1:80"), _NAT.format(to="[2001:db8::1]:80"))
    return ""


def _nfacct() -> str:
    rules = "*filter\n-A INPUT -m nfacct --nfacct-name doctor -j ACCEPT\nCOMMIT\n"
    _restore(rules, "", "doctor")
    return ""


def _rule_log() -> str:
    """A packet that nftables has marked is logged when a legacy rule matches it."""
    from netlab.datapath.state import Ruleset
    from netlab.kernel import xtables
    from netlab.kernel.namespaces import open_current
    from netlab.kernel.nflog import Log

    rules = Ruleset(ipv4="*filter\n-A OUTPUT -j ACCEPT\nCOMMIT\n", ipv6="", backend="legacy")
    xtables.restore(open_current(), rules)
    _load_nft("meta nftrace set 1")
    log = Log()
    _send_datagram()
    if not any(b"TRACE: filter:OUTPUT:" in data for data in log.datagrams()):
        raise RuntimeError("no rule was logged")
    return ""


def _conntrack() -> str:
    """A packet that a rule has tracked is announced."""
    _load_nft("ct state new accept")
    _await_event(_NFNLGRP_CONNTRACK_NEW)
    return ""


def _nftrace() -> str:
    """A packet that a rule has marked is followed."""
    _load_nft("meta nftrace set 1")
    _await_event(_NFNLGRP_NFTRACE)
    return ""


def _bpf() -> str:
    """Programs that look at packets are taken and attached; no packet begins with that word."""
    from netlab.kernel.skb_events import SkbEvents, pattern_of_word

    SkbEvents([pattern_of_word(0, b"none")]).close()
    return ""


def _ip_vs() -> str:
    body = struct.pack("=BBH", _CTRL_CMD_GETFAMILY, 1, 0) + text(_CTRL_ATTR_FAMILY_NAME, "IPVS")
    with Socket(_NETLINK_GENERIC) as channel:
        channel.get(_GENL_ID_CTRL, body)
    return ""


def _netem() -> str:
    """A queue that loses packets, at the loopback device."""
    _request(rtnetlink.add_loss(1, 1))
    return ""


def _sctp() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_SCTP):
        return ""


def _request(packed: bytes) -> None:
    with Socket() as channel:
        for refused in channel.request([packed]):
            raise refused


def _restore(ipv4: str, ipv6: str, *nfacct: str) -> None:
    """Load rules as `up` does."""
    from netlab.datapath.state import Ruleset
    from netlab.kernel import xtables
    from netlab.kernel.namespaces import open_current

    xtables.restore(open_current(), Ruleset(ipv4=ipv4, ipv6=ipv6, nfacct=nfacct))


def _load_nft(rule: str) -> str:
    import nftables

    code, _, complaint = nftables.Nftables().cmd(
        "add table ip doctor\n"
        "add chain ip doctor out { type filter hook output priority -150; }\n"
        f"add rule ip doctor out {rule}"
    )
    if code:
        raise RuntimeError(f"nftables: {complaint.strip().splitlines()[0]}")
    return ""


def _await_event(group: int) -> None:
    """Send a datagram to ourselves and wait until netfilter tells that group about it."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as events:
        events.bind((0, 0))
        events.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, group)
        events.settimeout(TIMEOUT_S - 1)
        _send_datagram()
        try:
            events.recv(65536)
        except TimeoutError:
            raise RuntimeError("the kernel announced nothing") from None


def _send_datagram() -> None:
    _request(rtnetlink.set_up(1))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"doctor", ("127.0.0.1", 9))


ATTEMPTS: dict[str, Callable[[], str]] = {
    "netns": _netns,
    "altname": _altname,
    "veth": lambda: _link("veth"),
    "bridge": lambda: _link("bridge"),
    "vxlan": _vxlan,
    "ipip": _ipip,
    "br_netfilter": _br_netfilter,
    "nat": _nat,
    "nfacct": _nfacct,
    "packet sockets": _packet,
    "conntrack events": _conntrack,
    "nft trace": _nftrace,
    "rule log": _rule_log,
    "BPF": _bpf,
    "IPv6": _ipv6,
    "dummy": lambda: _link("dummy"),
    "ip_vs": _ip_vs,
    "netem": _netem,
    "nft queue": lambda: _load_nft("queue flags bypass to 1"),
    "sctp": _sctp,
}
