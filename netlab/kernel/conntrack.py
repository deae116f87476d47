"""Connection tracking of a namespace: entries read, and deleted, by netlink.

Source: linux/netfilter/nfnetlink_conntrack.h.
"""

from __future__ import annotations

import errno
import itertools
import re
import socket
import struct
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address
from pathlib import Path

import msgspec

from netlab.kernel.namespaces import entered
from netlab.kernel.netlink import (
    NLM_F_CREATE,
    NetlinkError,
    Socket,
    attribute,
    attributes,
    message,
    nested,
)
from netlab.kernel.nfnetlink import Listener
from netlab.problems import Exit, NetlabError, Problem

MESSAGE_NEW = 1 << 8  # what announces an entry, and what becomes of it
_MESSAGE_GET, _MESSAGE_DELETE = 1 << 8 | 1, 1 << 8 | 2
_MESSAGE_STATISTICS = 1 << 8 | 4  # IPCTNL_MSG_CT_GET_STATS_CPU
_INSERT_FAILED = 9  # enum ctattr_stats_cpu
_NETLINK_NETFILTER = 12
_GROUPS = (1, 2, 3)  # new, update, destroy
_NFGENMSG_BYTES = 4

# enum ctattr_type, ctattr_tuple, ctattr_ip, ctattr_l4proto, ctattr_counters, ctattr_protoinfo
_ORIGINAL, _REPLY, _STATUS, _PROTOCOL_INFO = 1, 2, 3, 4
_NAT_DESTINATION = 13
_TIMEOUT, _MARK, _COUNTERS_ORIGINAL, _COUNTERS_REPLY, _ID, _ZONE = 7, 8, 9, 10, 12, 18
_TUPLE_IP, _TUPLE_PROTOCOL = 1, 2
_ADDRESSES = {4: (1, 2), 6: (3, 4)}  # source, destination
_PROTOCOL_NUMBER, _SOURCE_PORT, _DESTINATION_PORT = 1, 2, 3
_ICMP = {4: (4, 5, 6), 6: (7, 8, 9)}  # id, type, code
_PACKETS, _BYTES = 1, 2
_NAT_ADDRESSES = {4: (1, 2), 6: (4, 5)}  # lowest, highest
_NAT_PROTOCOL, _NAT_LOWEST_PORT, _NAT_HIGHEST_PORT = 3, 1, 2
# seen-reply, assured, confirmed; and IPS_FIXED_TIMEOUT: packets do not make it live longer
_REMEMBERED = 0x2 | 0x4 | 0x8 | 0x400
_INFO_TCP, _INFO_SCTP = 1, 3
_STATE = 1

# enum ip_conntrack_status, the bits that explain something
_STATUS_BITS = {
    0x1: "expected",
    0x2: "seen-reply",
    0x4: "assured",
    0x8: "confirmed",
    0x10: "src-nat",
    0x20: "dst-nat",
    0x4000: "offload",
}
# enum tcp_conntrack and sctp_conntrack, from 0
_STATES = {
    _INFO_TCP: (
        "NONE SYN_SENT SYN_RECV ESTABLISHED FIN_WAIT CLOSE_WAIT LAST_ACK TIME_WAIT CLOSE SYN_SENT2"
    ),
    _INFO_SCTP: (
        "NONE CLOSED COOKIE_WAIT COOKIE_ECHOED ESTABLISHED SHUTDOWN_SENT SHUTDOWN_RECD "
        "SHUTDOWN_ACK_SENT HEARTBEAT_SENT"
    ),
}
_SIZE = "/proc/sys/net/netfilter/nf_conntrack_{}"
_FAMILIES: dict[int, int] = {4: socket.AF_INET, 6: socket.AF_INET6}
_VERSIONS = {number: version for version, number in _FAMILIES.items()}


class Icmp(msgspec.Struct, frozen=True):
    """What an ICMP message has in place of ports."""

    id: int
    type: int
    code: int


class Tuple(msgspec.Struct, frozen=True):
    """One direction of a connection; ports are None where the protocol has none."""

    source: str
    destination: str
    source_port: int | None = None
    destination_port: int | None = None
    icmp: Icmp | None = None


class Counters(msgspec.Struct, frozen=True):
    """What passed in one direction."""

    packets: int
    bytes: int


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A connection.

    `reply` is what answers are expected to have: it differs from `original` turned round where
    addresses are translated, its source being the translated destination.
    """

    family: int  # 4 or 6
    protocol: int  # as IANA numbers them: socket.IPPROTO_UDP
    original: Tuple
    reply: Tuple
    id: int
    status: tuple[str, ...] = ()  # "seen-reply", "assured", "dst-nat", ...
    state: str = ""  # of TCP and SCTP: "ESTABLISHED"
    timeout_s: int | None = None  # None: not told, as of one that is announced to be gone
    mark: int = 0
    zone: int = 0
    # None unless net.netfilter.nf_conntrack_acct is on
    sent: Counters | None = None
    answered: Counters | None = None


def dump(namespace: str | int, family: int | None = None) -> list[Entry]:
    """Every entry of a namespace (a name under /run/netns or a descriptor), in no order.

    `family` is 4 or 6, None for both.  Raises NetlabError (exit 3) if the kernel does not tell.
    """
    number = _FAMILIES[family] if family else socket.AF_UNSPEC
    with entered(namespace), Socket(_NETLINK_NETFILTER) as netlink:
        try:
            found = netlink.dump(_MESSAGE_GET, _request(number))
        except NetlinkError as error:
            raise _untold(error) from None
    entries = (decode(body[0], body[_NFGENMSG_BYTES:]) for body in found)
    return [entry for entry in entries if entry is not None]


def sizes(namespace: str | int) -> tuple[int, int]:
    """How many connections a namespace knows, and how many it may know."""
    with entered(namespace):
        count, most = (Path(_SIZE.format(name)).read_text() for name in ("count", "max"))
    return int(count), int(most)


def failed_inserts(namespace: str | int) -> int:
    """How many connections could not be entered, as another one had their tuple already.

    Raises NetlabError (exit 3) if the kernel does not tell.
    """
    with entered(namespace), Socket(_NETLINK_NETFILTER) as netlink:
        try:
            processors = netlink.dump(_MESSAGE_STATISTICS, _request(socket.AF_UNSPEC))
        except NetlinkError as error:
            raise _untold(error) from None
    return sum(_number(attributes(each, _NFGENMSG_BYTES)[_INSERT_FAILED]) for each in processors)


def delete(namespace: str | int, entries: Iterable[Entry]) -> int:
    """Delete entries; returns how many of them were still there.

    Raises NetlabError (exit 3) if the kernel refuses.
    """
    messages = [message(_MESSAGE_DELETE, 0, _naming(entry)) for entry in entries]
    if not messages:
        return 0
    with entered(namespace), Socket(_NETLINK_NETFILTER) as netlink:
        refused = netlink.request(messages)
    for error in refused:
        if error.errno != errno.ENOENT:
            raise _untold(error)
    return len(messages) - len(refused)


def flush(namespace: str | int) -> None:
    """Delete all entries of a namespace at once, of both families.  NetlabError (exit 3)."""
    with entered(namespace), Socket(_NETLINK_NETFILTER) as netlink:
        for error in netlink.request([message(_MESSAGE_DELETE, 0, _request(socket.AF_UNSPEC))]):
            raise _untold(error)


def delete_marked(namespace: str | int, mark: int) -> None:
    """Delete all entries with that mark, of both families.  NetlabError (exit 3)."""
    body = _request(socket.AF_UNSPEC) + attribute(_MARK, struct.pack("!I", mark))
    with entered(namespace), Socket(_NETLINK_NETFILTER) as netlink:
        for error in netlink.request([message(_MESSAGE_DELETE, 0, body)]):
            raise _untold(error)


def fill(namespace: str | int, mark: int) -> int:
    """Make entries until there is no room for another one; how many.

    They are of UDP between addresses that nobody has (198.18.0.0/15, RFC 2544) and last until they
    are deleted; being assured, they make no room either.  NetlabError (exit 3) if the kernel
    refuses for another reason, or would take hundreds of megabytes for them.
    """
    made = 0
    most = sizes(namespace)[1]
    if most > _TOO_MANY:
        raise NetlabError(
            Problem(
                "table-too-large",
                f"a namespace may know {most:,} connections: too many to make up",
                hint=f"`sysctl -w net.netfilter.nf_conntrack_max={_TOO_MANY}`, on a machine that "
                "can do with so few",
            ),
            Exit.MACHINE,
        )
    filling = _filling(mark)
    with entered(namespace), Socket(_NETLINK_NETFILTER) as netlink:
        while not (refused := netlink.request([*itertools.islice(filling, _AT_ONCE)])):
            made += _AT_ONCE
    for error in refused:
        if error.errno != errno.ENOMEM:
            raise _untold(error)
    return made + _AT_ONCE - len(refused)


def create(
    namespace: str | int, protocol: int, original: Tuple, to: tuple[str, int], mark: int
) -> None:
    """Make an entry whose destination is translated, and that lasts until it is deleted.

    Raises NetlabError (exit 3) if the kernel refuses.
    """
    version = 6 if ":" in original.source else 4
    family = _FAMILIES[version]
    answers = Tuple(
        original.destination, original.source, original.destination_port, original.source_port
    )
    address, port = socket.inet_pton(family, to[0]), struct.pack("!H", to[1])
    lowest, highest = _NAT_ADDRESSES[version]
    body = b"".join(
        (
            _request(family),
            _packed(_ORIGINAL, version, protocol, original),
            _packed(_REPLY, version, protocol, answers),
            nested(
                _NAT_DESTINATION,
                attribute(lowest, address),
                attribute(highest, address),
                nested(
                    _NAT_PROTOCOL,
                    attribute(_NAT_LOWEST_PORT, port),
                    attribute(_NAT_HIGHEST_PORT, port),
                ),
            ),
            *_lasting(mark),
        )
    )
    with entered(namespace), Socket(_NETLINK_NETFILTER) as netlink:
        for error in netlink.request([message(MESSAGE_NEW, NLM_F_CREATE, body)]):
            raise _untold(error)


_AT_ONCE = 1000
_TOO_MANY = 1 << 20
_SOURCES, _DESTINATIONS = (int(IPv4Address(text)) for text in ("198.18.0.0", "198.19.0.0"))
_OF_EACH = 1 << 16


def _filling(mark: int) -> Iterator[bytes]:
    """Requests for entries that differ in their addresses, cut out of one (there are many)."""
    one, other = "255.0.0.1", "255.0.0.2"  # in the place of addresses, and nowhere else
    body = b"".join(
        (
            _request(socket.AF_INET),
            _packed(_ORIGINAL, 4, socket.IPPROTO_UDP, Tuple(one, other, 9, 9)),
            _packed(_REPLY, 4, socket.IPPROTO_UDP, Tuple(other, one, 9, 9)),
            *_lasting(mark),
        )
    )
    pattern = b"|".join(re.escape(IPv4Address(each).packed) for each in (one, other))
    begin, to, answer, back, end = re.split(pattern, message(MESSAGE_NEW, NLM_F_CREATE, body))
    for number in itertools.count():
        source = struct.pack("!I", _SOURCES + number % _OF_EACH)
        destination = struct.pack("!I", _DESTINATIONS + number // _OF_EACH)
        yield b"".join((begin, source, to, destination, answer, destination, back, source, end))


def _lasting(mark: int) -> tuple[bytes, ...]:
    """What is common to entries that nobody's packets made."""
    return (
        attribute(_STATUS, struct.pack("!I", _REMEMBERED)),
        attribute(_TIMEOUT, struct.pack("!I", 0x7FFFFFFF)),
        attribute(_MARK, struct.pack("!I", mark)),
    )


class Events:
    """What becomes of the entries of a namespace from now on.

    It holds the namespace alive.  Of entries from before the kernel may tell nothing
    (net.netfilter.nf_conntrack_events).
    """

    def __init__(self, namespace: str) -> None:
        with entered(namespace):
            self._listener = Listener(_GROUPS)

    def read(self) -> Iterator[tuple[Entry, bool]]:
        """Each entry that was announced since the last call, and whether it is there."""
        for kind, family, payload in self._listener.read():
            if kind in (MESSAGE_NEW, _MESSAGE_DELETE) and (entry := decode(family, payload)):
                yield entry, kind == MESSAGE_NEW

    @property
    def overrun(self) -> bool:
        """Whether some were lost, as they came faster than they were read."""
        return self._listener.overrun

    def fileno(self) -> int:
        """The descriptor, readable when there is something to read."""
        return self._listener.fileno()

    def close(self) -> None:
        self._listener.close()


def decode(family: int, payload: bytes) -> Entry | None:
    """An entry from the family and the attributes of a message; None if it is of neither family."""
    version = _VERSIONS.get(family)
    found = attributes(payload)
    if version is None or _ORIGINAL not in found or _REPLY not in found:
        return None
    protocol, original = _tuple(version, found[_ORIGINAL])
    status = _number(found.get(_STATUS, b""))
    return Entry(
        family=version,
        protocol=protocol,
        original=original,
        reply=_tuple(version, found[_REPLY])[1],
        id=_number(found.get(_ID, b"")),
        status=tuple(name for bit, name in _STATUS_BITS.items() if status & bit),
        state=_state(found.get(_PROTOCOL_INFO, b"")),
        timeout_s=_number(found[_TIMEOUT]) if _TIMEOUT in found else None,
        mark=_number(found.get(_MARK, b"")),
        zone=_number(found.get(_ZONE, b"")),
        sent=_counters(found.get(_COUNTERS_ORIGINAL)),
        answered=_counters(found.get(_COUNTERS_REPLY)),
    )


def _request(family: int) -> bytes:
    """`struct nfgenmsg`."""
    return struct.pack("=BBH", family, 0, 0)


def _naming(entry: Entry) -> bytes:
    """What tells the kernel which entry is meant."""
    return b"".join(
        (
            _request(_FAMILIES[entry.family]),
            _packed(_ORIGINAL, entry.family, entry.protocol, entry.original),
            attribute(_ID, struct.pack("!I", entry.id)),
            attribute(_ZONE, struct.pack("!H", entry.zone)) if entry.zone else b"",
        )
    )


def _packed(kind: int, version: int, number: int, end: Tuple) -> bytes:
    """One direction of a connection."""
    addresses = zip(_ADDRESSES[version], (end.source, end.destination), strict=True)
    ports = {_SOURCE_PORT: end.source_port, _DESTINATION_PORT: end.destination_port}
    protocol = [attribute(_PROTOCOL_NUMBER, bytes([number]))]
    protocol += (
        attribute(kind, struct.pack("!H", port)) for kind, port in ports.items() if port is not None
    )
    if end.icmp:
        identity, sort, code = _ICMP[version]
        protocol += (
            attribute(identity, struct.pack("!H", end.icmp.id)),
            attribute(sort, bytes([end.icmp.type])),
            attribute(code, bytes([end.icmp.code])),
        )
    ip = (
        attribute(which, socket.inet_pton(_FAMILIES[version], address))
        for which, address in addresses
    )
    return nested(kind, nested(_TUPLE_IP, *ip), nested(_TUPLE_PROTOCOL, *protocol))


def _tuple(version: int, data: bytes) -> tuple[int, Tuple]:
    parts = attributes(data)
    ip, protocol = attributes(parts[_TUPLE_IP]), attributes(parts[_TUPLE_PROTOCOL])
    source, destination = (
        socket.inet_ntop(_FAMILIES[version], ip[kind]) for kind in _ADDRESSES[version]
    )
    source_port, destination_port = (
        _number(protocol[kind]) if kind in protocol else None
        for kind in (_SOURCE_PORT, _DESTINATION_PORT)
    )
    icmp = [_number(protocol[kind]) for kind in _ICMP[version] if kind in protocol]
    return protocol[_PROTOCOL_NUMBER][0], Tuple(
        source=source,
        destination=destination,
        source_port=source_port,
        destination_port=destination_port,
        icmp=Icmp(*icmp) if len(icmp) == 3 else None,
    )


def _state(data: bytes) -> str:
    info = attributes(data)
    for kind, states in _STATES.items():
        if kind in info:
            number = attributes(info[kind])[_STATE][0]
            return dict(enumerate(states.split())).get(number, str(number))
    return ""


def _counters(data: bytes | None) -> Counters | None:
    if data is None:
        return None
    found = attributes(data)
    return Counters(packets=_number(found[_PACKETS]), bytes=_number(found[_BYTES]))


def _number(data: bytes) -> int:
    return int.from_bytes(data, "big")


def _untold(error: NetlinkError) -> NetlabError:
    return NetlabError(
        Problem(
            "no-conntrack",
            f"the kernel refuses to speak of its connections: {error.strerror}",
            hint="it needs nf_conntrack_netlink: `modprobe nf_conntrack_netlink`, as root",
        ),
        Exit.MACHINE,
    )
