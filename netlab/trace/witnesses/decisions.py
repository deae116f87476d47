"""Decisions: what the kernel's tables answer for the probe's headers.

Routes are asked for with the packet's own input device, source and mark, and answered with the
prefix that matched (RTM_F_FIB_MATCH); neighbours and forwarding entries one by one.  They are asked
right after the probe has passed.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import msgspec

from netlab.kernel import conntrack, xfrm
from netlab.kernel.listeners import Listener, listeners
from netlab.kernel.namespaces import entered
from netlab.kernel.netlink import NetlinkError, attribute, attributes, number, text
from netlab.kernel.netlink import Socket as Netlink
from netlab.kernel.nft_contents import before_reassembly
from netlab.kernel.rtnetlink import (
    IFF_UP,
    IFLA_ADDRESS,
    IFLA_BRPORT_MODE,
    IFLA_IFNAME,
    IFLA_INFO_KIND,
    IFLA_INFO_SLAVE_DATA,
    IFLA_LINK,
    IFLA_LINKINFO,
    IFLA_MASTER,
    IFLA_MTU,
    NDA_DST,
    NDA_LLADDR,
    NDA_MASTER,
    NTF_SELF,
    RTA_DST,
    RTA_GATEWAY,
    RTA_OIF,
    RTA_TABLE,
    RTM_GETLINK,
    RTM_GETNEIGH,
    RTM_GETROUTE,
    link_message,
    mac_bytes,
)
from netlab.problems import NetlabError
from netlab.trace.family import IPV6, Family
from netlab.trace.model_steps import REFUSING, Bridge, Neighbour, Route, Socket, Tuple
from netlab.trace.place import Place
from netlab.trace.witnesses import Canary
from netlab.trace.witnesses.refused_routes import TYPES, Question, find

RTA_SRC, RTA_IIF, RTA_PREFSRC, RTA_MARK = 2, 3, 7, 16
_RTM_F_FIB_MATCH = 0x2000
_IFF_LOWER_UP = 0x10000
_ROUTE = struct.Struct("=BBBBBBBBI")
_NEIGHBOUR = struct.Struct("=BxxxiHBB")
_LINK = struct.Struct("=BxHiII")
_AF_BRIDGE = 7

_TABLES = {253: "default", 254: "main", 255: "local"}
# Refusals of which the kernel answers a lookup with an error instead of the route.
_REFUSALS = {
    errno.ENETUNREACH: "no-route",
    errno.EHOSTUNREACH: "unreachable",
    errno.EACCES: "prohibit",
    errno.EINVAL: "martian",
    errno.EXDEV: "reverse-path",
}
_STATES = {
    0x01: "incomplete",
    0x02: "reachable",
    0x04: "stale",
    0x08: "delay",
    0x10: "probe",
    0x20: "failed",
    0x40: "noarp",
    0x80: "permanent",
}


class Link(msgspec.Struct, frozen=True):
    """A device: its bridge, its kind, the number of its veth peer (in the peer's namespace)."""

    name: str
    index: int
    up: bool
    carrier: bool
    kind: str | None
    master: str | None
    peer: int | None
    mtu: int = 0
    hairpin: bool = False  # of a bridge port
    mac: str | None = None


class Decisions:
    """The decisions witness: questions to routing, neighbour and forwarding tables."""

    name = "decisions"

    def __init__(self, family: Family) -> None:
        self._family = family
        self._sockets: dict[Place, Netlink] = {}
        self._links: dict[tuple[Place, str | int], Link | None] = {}
        self._inserts: dict[Place, int] = {}  # that had failed before
        self._failed: list[str] = []

    def arm(self, places: Sequence[Place]) -> None:
        for place in places:
            try:
                with entered(place.namespace):
                    self._sockets[place] = Netlink()
            except OSError as error:
                self._failed.append(f"{place}: {error.strerror}")
        self._count_inserts()

    def _count_inserts(self) -> None:
        for place in self._sockets:
            if place.kind in ("node", "gateway"):
                self._inserts[place] = _failed_inserts(place)

    def saw(self, canary: Canary) -> bool:
        return True

    def forget(self) -> None:
        self._links.clear()
        self._count_inserts()

    def events(self) -> list[Link]:
        """The devices that were asked about; decisions are answers to questions."""
        return [link for link in self._links.values() if link]

    def link(self, place: Place, device: str | int) -> Link | None:
        """A device by name or number; None if there is none (any more)."""
        key = place, device
        if key not in self._links:
            self._links[key] = self._ask_link(place, device)
        return self._links[key]

    def _ask_link(self, place: Place, device: str | int) -> Link | None:
        by_name = isinstance(device, str)
        body = link_message(0 if by_name else int(device))
        if by_name:
            body += text(IFLA_IFNAME, str(device))
        with self._asking(place) as netlink:
            answer = netlink.get(RTM_GETLINK, body)
            _, _, index, flags, _ = _LINK.unpack_from(answer)
            found = attributes(answer, _LINK.size)
            info = attributes(found.get(IFLA_LINKINFO, b""))
            kind = info.get(IFLA_INFO_KIND)
            port = attributes(info.get(IFLA_INFO_SLAVE_DATA, b""))
            master = self.link(place, _u32(found[IFLA_MASTER])) if IFLA_MASTER in found else None
            return Link(
                name=found[IFLA_IFNAME].rstrip(b"\0").decode(),
                index=index,
                up=bool(flags & IFF_UP),
                carrier=bool(flags & _IFF_LOWER_UP),
                kind=kind.rstrip(b"\0").decode() if kind else None,
                master=master.name if master else None,
                peer=_u32(found[IFLA_LINK]) if IFLA_LINK in found else None,
                mtu=_u32(found[IFLA_MTU]),
                hairpin=port.get(IFLA_BRPORT_MODE) == b"\1",
                mac=found[IFLA_ADDRESS].hex(":") if IFLA_ADDRESS in found else None,
            )
        return None

    def route(
        self,
        place: Place,
        destination: str,
        source: str | None = None,
        iif: str | None = None,
        mark: int = 0,
    ) -> Route | None:
        """The route of a packet; without `iif` of one that is sent there.  None: not answered.

        A route with `matched` None is the kernel's refusal, and `type` says which.
        """
        ip = self._family
        bits = ip.bits if source else 0
        body = _ROUTE.pack(ip.address_family, ip.bits, bits, 0, 0, 0, 0, 0, _RTM_F_FIB_MATCH)
        body += attribute(RTA_DST, ip.packed(destination))
        if source:
            body += attribute(RTA_SRC, ip.packed(source))
        if iif:
            link = self.link(place, iif)
            body += number(RTA_IIF, link.index if link else 0)
        if mark:
            body += number(RTA_MARK, mark)
        question = Question(ip, destination, source, iif, mark)
        try:
            netlink = self._sockets[place]
            answer = netlink.get(RTM_GETROUTE, body)
        except NetlinkError as error:
            return self._refused(place, question, error.errno or 0)
        except (KeyError, OSError):
            return None
        _, bits, _, _, table, _, _, kind, _ = _ROUTE.unpack_from(answer)
        found = attributes(answer, _ROUTE.size)
        if RTA_TABLE in found:
            table = _u32(found[RTA_TABLE])
        out = self.link(place, _u32(found[RTA_OIF])) if RTA_OIF in found else None
        kept = TYPES.get(kind, str(kind))
        if iif and kept == "unicast" and ip is IPV6 and not self._forwards(place, iif):
            kept = "forwarding-off"  # which a lookup of IPv6 does not heed
        return Route(
            destination=destination,
            matched=f"{_address(found.get(RTA_DST)) or ip.unspecified}/{bits}",
            device=out.name if out else None,
            via=_address(found.get(RTA_GATEWAY)),
            source=_address(found.get(RTA_PREFSRC)),
            table=_TABLES.get(table, str(table)),
            type=kept,
        )

    def _forwards(self, place: Place, device: str) -> bool:
        """Whether what comes in by a device is passed on."""
        paths = _path(self._family.forwarding), f"net/ipv6/conf/{device}/force_forwarding"
        return any(_setting(place, each) not in ("0", None) for each in paths)

    def neighbour(self, place: Place, address: str, device: str) -> Neighbour | None:
        """The entry of a next hop; one without MAC and state "none" if there is no entry."""
        link = self.link(place, device)
        if link is None:
            return None
        body = _NEIGHBOUR.pack(self._family.address_family, link.index, 0, 0, 0)
        body += attribute(NDA_DST, self._family.packed(address))
        with self._asking(place) as netlink:
            answer = netlink.get(RTM_GETNEIGH, body)
            _, _, state, _, _ = _NEIGHBOUR.unpack_from(answer)
            lladdr = attributes(answer, _NEIGHBOUR.size).get(NDA_LLADDR)
            return Neighbour(
                address=address,
                device=device,
                mac=lladdr.hex(":") if lladdr and state & ~0x21 else None,
                state=_STATES.get(state, str(state)),
            )
        return Neighbour(address=address, device=device, mac=None, state="none")

    def _refused(self, place: Place, question: Question, code: int) -> Route | None:
        """A refusal, with the route or the rule that says so where there is one."""
        refusal = _REFUSALS.get(code)
        if refusal is None:
            return None
        found = find(self._sockets[place], question)
        if found and found.type in REFUSING:
            refusal = found.type
        elif found and found.type == "unicast" and question.iif and code == errno.EHOSTUNREACH:
            refusal = "forwarding-off"
        elif code == errno.EINVAL and self._comes_another_way(place, question):
            return Route(destination=question.destination, matched=None, type="reverse-path")
        else:
            return Route(destination=question.destination, matched=None, type=refusal)
        out = self.link(place, found.oif) if found.oif else None
        return Route(
            destination=question.destination,
            matched=found.prefix,
            device=out.name if out else None,
            via=found.via,
            table=_TABLES.get(found.table, str(found.table)),
            type=refusal,
            rule=found.rule,
        )

    def _comes_another_way(self, place: Place, question: Question) -> bool:
        """Whether a source that cannot be right is one that rp_filter refuses.

        The kernel gives both the same errno (EXDEV until 6.12).
        """
        if not question.source or not question.iif:
            return False
        paths = (f"net/ipv4/conf/{each}/rp_filter" for each in ("all", question.iif))
        filter_ = max(int(_setting(place, path) or 0) for path in paths)
        back = self.route(place, question.source)
        if not filter_ or back is None or back.type == "local":
            return False
        return back.refuses or (filter_ == 1 and back.device != question.iif)

    def setting(self, place: Place, path: str) -> str | None:
        """The value of a sysctl by its path below /proc/sys."""
        return _setting(place, path)

    def failed_inserts(self, place: Place) -> int:
        """How often since :meth:`arm` a connection's tuple was taken when it was to be entered."""
        return _failed_inserts(place) - self._inserts.get(place, 0)

    def remembered(self, place: Place, protocol: str, flow: Tuple) -> Socket | None:
        """To whom connection tracking sends a flow of which it knows."""
        number = self._family.number_of(protocol)
        with suppress(NetlabError):
            for entry in conntrack.dump(place.namespace, self._family.version):
                to, back = entry.original, entry.reply
                ends = (
                    Socket(ip=to.source, port=to.source_port),
                    Socket(ip=to.destination, port=to.destination_port),
                )
                if entry.protocol == number and ends == (flow.source, flow.destination):
                    return Socket(ip=back.source, port=back.source_port)
        return None

    def listeners(self, place: Place, protocol: str, port: int) -> list[Listener]:
        """What listens on a port of `tcp` or `udp`."""
        return listeners(place.namespace, self._family.number_of(protocol), port)

    def early_chains(self, place: Place) -> list[str]:
        """Base chains of nf_tables that see a packet before its fragments are put together."""
        with suppress(OSError):
            return before_reassembly(place.namespace)
        return []

    def policies(self, place: Place) -> list[xfrm.Policy]:
        """IPsec policies of a place."""
        with suppress(OSError):
            return xfrm.policies(place.namespace)
        return []

    def bridge_netfilter(self, place: Place) -> bool:
        """Whether iptables' PREROUTING runs where a frame enters a bridge (br_netfilter)."""
        return _setting(place, _path(self._family.bridge_netfilter)) == "1"

    def off_by(self, place: Place, device: str) -> str | None:
        """The sysctl that switches the probe's family off on a device, as only IPv6 can be.

        A path below /proc/sys.  What `all` is set to every device gets, and may be set to others.
        """
        if self._family is not IPV6:
            return None
        here, everywhere = (f"net/ipv6/conf/{each}/disable_ipv6" for each in (device, "all"))
        if _setting(place, here) in ("0", None):
            return None
        return here if _setting(place, everywhere) == "0" else everywhere

    def ports(self, place: Place, bridge: str) -> list[Link]:
        """A bridge's ports."""
        master = self.link(place, bridge)
        if master is None or place not in self._sockets:
            return []
        names = [
            attributes(each, _LINK.size)
            for each in self._sockets[place].dump(RTM_GETLINK, link_message(0))
        ]
        links = [
            self.link(place, each[IFLA_IFNAME].rstrip(b"\0").decode())
            for each in names
            if IFLA_MASTER in each and _u32(each[IFLA_MASTER]) == master.index
        ]
        return [link for link in links if link]

    def port(self, place: Place, bridge: str, mac: str) -> Bridge | None:
        """A bridge's port for a MAC; `flooded` if it has no entry."""
        link = self.link(place, bridge)
        if link is None:
            return None
        found = self._forwarding(place, mac, master=link.index)
        if found is None:
            return Bridge(device=bridge, mac=mac, flooded=True)
        port = self.link(place, found[0])
        return Bridge(device=bridge, mac=mac, port=port.name if port else None)

    def tunnel(self, place: Place, device: str, mac: str) -> Bridge | None:
        """A VXLAN device's remote end for a MAC; `remote` None if it has no entry."""
        link = self.link(place, device)
        if link is None:
            return None
        found = self._forwarding(place, mac, device=link.index)
        remote = _address(found[1].get(NDA_DST)) if found else None
        return Bridge(device=device, mac=mac, remote=remote)

    def _forwarding(
        self, place: Place, mac: str, master: int = 0, device: int = 0
    ) -> tuple[int, dict[int, bytes]] | None:
        """Port and attributes of the entry of a bridge (`master`) or of a `device` of its own."""
        flags = NTF_SELF if device else 0
        body = _NEIGHBOUR.pack(_AF_BRIDGE, device, 0, flags, 0)
        body += attribute(NDA_LLADDR, mac_bytes(mac))
        if master:
            body += number(NDA_MASTER, master)
        with self._asking(place) as netlink:
            answer = netlink.get(RTM_GETNEIGH, body)
            _, port, _, _, _ = _NEIGHBOUR.unpack_from(answer)
            return port, attributes(answer, _NEIGHBOUR.size)
        return None

    @contextmanager
    def _asking(self, place: Place) -> Iterator[Netlink]:
        """A place's socket for one question; the body ends where the kernel has no such entry."""
        try:
            yield self._sockets[place]
        except NetlinkError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                self._failed.append(f"{place}: {error.strerror}")
        except KeyError:
            pass

    def disarm(self) -> None:
        for netlink in self._sockets.values():
            netlink.close()
        self._sockets.clear()

    @property
    def report(self) -> str:
        if not self._failed:
            return "ok"
        return f"{'partial' if self._links else 'unavailable'}: {'; '.join(self._failed)}"


def _u32(data: bytes) -> int:
    return int(struct.unpack("=I", data[:4])[0])


def _address(data: bytes | None) -> str | None:
    if not data:
        return None
    return socket.inet_ntop(socket.AF_INET if len(data) == 4 else socket.AF_INET6, data)


def _path(sysctl: str) -> str:
    return sysctl.replace(".", "/")


def _failed_inserts(place: Place) -> int:
    try:
        return conntrack.failed_inserts(place.namespace)
    except (NetlabError, OSError):
        return 0


def _setting(place: Place, path: str) -> str | None:
    """The value of a sysctl by its path below /proc/sys; None if this kernel has none."""
    with suppress(OSError), entered(place.namespace), open(f"/proc/sys/{path}") as file:
        return file.read().strip()
    return None
