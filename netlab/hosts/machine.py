"""A machine that is a node: looked at, made to hold its part of a lab, and given back.

Runs on the machine itself.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from ipaddress import ip_interface, ip_network

import msgspec

from netlab.datapath.build import build
from netlab.datapath.state import State
from netlab.hosts import firewalls
from netlab.hosts.part import Part, part_of
from netlab.kernel import adopted, namespaces, observe, rtnetlink
from netlab.kernel.netlink import Socket, attributes
from netlab.lab import lifecycle, record, rules
from netlab.problems import Exit, NetlabError, Problem
from netlab.topology.model import Lab


class Order(State, frozen=True):
    """What a machine is to be; `underlay` is an interface or an address of the machine."""

    lab: Lab
    node: str
    underlay: str
    allowed: bool = False  # what is there already may be changed


class Said(State, frozen=True):
    """A problem, as plain data."""

    code: str
    message: str
    hint: str | None = None


class Facts(State, frozen=True):
    """What a machine is, and why it cannot be the node, if it cannot."""

    interface: str = ""
    address: str = ""  # "172.21.32.11/24"
    mtu: int = 0
    problems: tuple[Said, ...] = ()
    notes: tuple[str, ...] = ()  # what is there and stays as it is


class Held(State, frozen=True):
    """What was done on a machine."""

    changes: tuple[str, ...]
    created: bool
    restarted: bool
    unserved: tuple[str, ...]
    unready: tuple[str, ...]


def said(problems: tuple[Problem, ...]) -> tuple[Said, ...]:
    """Problems as plain data."""
    return tuple(Said(each.code, each.message, each.hint) for each in problems)


def examine(order: Order) -> Facts:
    """Look at everything that is needed or in the way, and change nothing."""
    from netlab import doctor

    problems: list[Problem] = []
    try:
        doctor.preflight(order.lab)
        rules.require(order.lab)
    except NetlabError as error:
        problems += error.problems
    interface, address, mtu = "", "", 0
    try:
        interface, address, mtu = _underlay(order.underlay)
    except NetlabError as error:
        problems += error.problems
    else:
        if mtu < order.lab.underlay.mtu:
            problems.append(
                Problem(
                    "mtu-too-small",
                    f"{interface} carries packets of {mtu} bytes, and lab {order.lab.name} is made "
                    f"for {order.lab.underlay.mtu}",
                    hint=f"`underlay: {{mtu: {mtu}}}` in the spec of its Lab",
                )
            )
    notes: list[str] = []
    if not problems and order.lab.name not in adopted.owners():
        problems += _in_the_way(order, interface)
        if not adopted.owners():
            findings = firewalls.found()
            notes += findings.notes
            problems += findings.lasting if order.allowed else findings.problems
    return Facts(interface, address, mtu, said(tuple(problems)), tuple(notes))


def hold(order: Order, interface: str) -> Held:
    """Make the machine hold its part.  What a failed first start made is removed again."""
    lab, part = order.lab, Part(node=order.node, interface=interface)
    fresh = lab.name not in adopted.owners()
    try:
        with namespaces.run_dir():
            with record.locked(lab.name):
                record.write_part(lab.name, part)
                own = part_of(build(lab, rules=False, only=order.node), part).nodes[0]
                sysctls = own.namespace.sysctls
                adopted.adopt(own.namespace.name, lab.name, sysctls, record.note(lab.name))
                if order.allowed:
                    firewalls.allow(lab)
            outcome = lifecycle.up(lab)
    except BaseException:
        if fresh:
            release(lab.name)
        raise
    from netlab.datapath.describe import summary

    return Held(
        changes=tuple(map(summary, outcome.changes)),
        created=fresh,
        restarted=outcome.restarted,
        unserved=tuple(
            f"{each.identity} does not answer on {each.protocol} {each.port}: {each.reason}"
            for each in outcome.unserved
        ),
        unready=tuple(map(str, outcome.unready)),
    )


def release(lab: str) -> int:
    """Give the machine back as it was; how many namespaces the lab had there."""
    firewalls.disallow(lab)
    return lifecycle.down(lab)


def namespaces_missing(names: tuple[str, ...]) -> list[str]:
    """Those that are not there."""
    return [name for name in names if not namespaces.is_mounted(name)]


def _underlay(wanted: str) -> tuple[str, str, int]:
    """Interface, address with its length and MTU by an interface's name or an address."""
    with Socket() as netlink:
        index = observe.links_there(netlink)
        names = {number: name for name, number in index.items()}
        if wanted in index:
            return wanted, _address(netlink, index[wanted], wanted), _mtu(netlink, index[wanted])
        for number, address in _addresses(netlink):
            if address.partition("/")[0] == wanted:
                return names[number], address, _mtu(netlink, number)
    known = ", ".join(sorted(name for name in index if name != "lo"))
    raise NetlabError(
        Problem(
            "no-underlay",
            f'there is neither an interface nor an address "{wanted}"',
            hint=f"`underlay:` in the hosts file names one of {known}, or an address there",
        ),
        Exit.MACHINE,
    )


def _address(netlink: Socket, index: int, name: str) -> str:
    for number, address in _addresses(netlink):
        if number == index:
            return address
    raise NetlabError(
        Problem("no-address", f"interface {name} has no IPv4 address"),
        Exit.MACHINE,
    )


def _addresses(netlink: Socket) -> Iterator[tuple[int, str]]:
    body = bytes((socket.AF_INET, 0, 0, 0)) + bytes(4)
    for answer in netlink.dump(rtnetlink.RTM_GETADDR, body):
        found = attributes(answer, 8)
        local = socket.inet_ntop(socket.AF_INET, found[rtnetlink.IFA_LOCAL])
        yield int.from_bytes(answer[4:8], "little"), f"{local}/{answer[1]}"


def _mtu(netlink: Socket, index: int) -> int:
    answer = netlink.get(rtnetlink.RTM_GETLINK, rtnetlink.link_message(index))
    return int.from_bytes(attributes(answer, 16)[rtnetlink.IFLA_MTU], "little")


def _in_the_way(order: Order, interface: str) -> Iterator[Problem]:
    """What somebody else has where the lab's things are to be."""
    lab = order.lab
    if others := adopted.owners():
        yield Problem(
            "machine-taken",
            f"this machine is a node of lab {', '.join(others)} already",
            hint=f"`netlab down {others[0]}` gives it back",
        )
        return
    part = Part(node=order.node, interface=interface)
    node = part_of(build(lab, rules=False, only=order.node), part).nodes[0].namespace
    with Socket() as netlink:
        index = observe.links_there(netlink)
        for name in (*(link.name for link in node.links), "kube-ipvs0"):
            if name in index:
                yield Problem(
                    "foreign-link",
                    f"there is an interface {name} that netlab did not make",
                    hint=f"if nobody needs it: `ip link delete {name}`",
                )
        names = {number: name for name, number in index.items()}
        taken = [(names[number], address) for number, address in _addresses(netlink)]
        taken += [(each.link, each.destination) for each in observe.every_route(netlink)]
    for cidr in (*lab.pod_cidrs, *lab.service_cidrs):
        for link, other in taken:
            network = ip_interface(other).network
            if network.prefixlen and network.overlaps(ip_network(cidr)):
                yield Problem(
                    "cidr-in-use",
                    f"{cidr} of lab {lab.name} overlaps {other}, which {link} has",
                    hint="give the lab another podCIDR or serviceCIDR",
                )
                break


def encode(found: Facts | Held) -> bytes:
    """As it is sent back."""
    return msgspec.json.encode(found)


class Ear:
    """A socket on the overlay's port that hears other machines, before there is an overlay.

    Where the overlay is there already, whether they see each other shows by itself.
    """

    def __init__(self, address: str, port: int) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._address = (address, port)

    def open(self) -> bool:
        """Whether the port was free; if not, somebody has a VXLAN device or a server there."""
        try:
            self._socket.bind(self._address)
        except OSError:
            self._socket.close()
            return False
        self._socket.settimeout(0.05)
        return True

    def call(self, cookie: bytes, others: list[str]) -> None:
        """Send a datagram to each of the other machines."""
        for other in others:
            with contextlib.suppress(OSError):
                self._socket.sendto(cookie, (other, self._address[1]))

    def heard(self, cookie: bytes) -> list[str]:
        """From whom one has come until now."""
        found = set()
        with contextlib.suppress(OSError):
            while True:
                data, (host, _) = self._socket.recvfrom(256)
                if data == cookie:
                    found.add(host)
        return sorted(found)

    def close(self) -> None:
        self._socket.close()
