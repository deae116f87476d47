"""IPVS over generic netlink: virtual servers and real servers as messages, and read back.

Numbers are those of linux/ip_vs.h.  Only the standard library is used, so that a lab's init, which
has nothing else, can take real servers away when their connections have ended.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterable
from typing import NamedTuple

from netlab.kernel.netlink import (
    NetlinkError,
    Socket,
    attribute,
    attributes,
    message,
    nested,
    number,
    text,
)

NETLINK_GENERIC = 16
_GENL_ID_CTRL, _CTRL_CMD_GETFAMILY = 16, 3
_CTRL_ATTR_FAMILY_ID, _CTRL_ATTR_FAMILY_NAME = 1, 2

_NEW_SERVICE, _SET_SERVICE, _DEL_SERVICE, _GET_SERVICE = 1, 2, 3, 4
_NEW_DEST, _SET_DEST, _DEL_DEST, _GET_DEST = 5, 6, 7, 8
_SET_CONFIG = 12
_SERVICE, _DEST, _TIMEOUTS = 1, 2, (4, 5, 6)
_AF, _PROTOCOL, _ADDRESS, _PORT, _FWMARK, _SCHEDULER, _FLAGS, _TIMEOUT, _NETMASK = range(1, 10)
_DEST_ADDRESS, _DEST_PORT, _DEST_METHOD, _DEST_WEIGHT, _DEST_UPPER, _DEST_LOWER = range(1, 7)
_DEST_ACTIVE, _DEST_INACTIVE, _DEST_FAMILY = 7, 8, 11
_PERSISTENT, _BY_PORT = 0x1, 0x10  # IP_VS_SVC_F_PERSISTENT, IP_VS_SVC_F_SCHED2
_MASQUERADING = 0

PROTOCOLS = {"tcp": 6, "udp": 17, "sctp": 132}
_NAMES = {value: name for name, value in PROTOCOLS.items()}

_GENERIC = struct.pack("=BBH", 0, 1, 0)


class Key(NamedTuple):
    """A virtual server."""

    protocol: str  # "tcp", "udp", "sctp"
    address: str
    port: int


class Service(NamedTuple):
    """What a virtual server is set to; `persistent_s` is 0 where it keeps no client."""

    key: Key
    scheduler: str
    persistent_s: int
    by_port: bool


class Destination(NamedTuple):
    """A real server as it is read; connections are those that the kernel remembers."""

    address: str
    port: int
    weight: int
    connections: int


def family_id(channel: Socket) -> int:
    """The number of IPVS's netlink family; asking loads the module.  NetlinkError if it has none.

    (ENOENT: the kernel has no IPVS.)
    """
    body = struct.pack("=BBH", _CTRL_CMD_GETFAMILY, 1, 0) + text(_CTRL_ATTR_FAMILY_NAME, "IPVS")
    found = attributes(channel.get(_GENL_ID_CTRL, body), 4)
    (identifier,) = struct.unpack_from("=H", found[_CTRL_ATTR_FAMILY_ID])
    return int(identifier)


class Ipvs:
    """A channel to the IPVS of the calling thread's namespace."""

    def __init__(self) -> None:
        self._channel = Socket(NETLINK_GENERIC)
        try:
            self._family = family_id(self._channel)
        except BaseException:
            self._channel.close()
            raise

    def __enter__(self) -> Ipvs:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def request(self, messages: list[bytes]) -> list[NetlinkError]:
        """Send messages, many at once; the refusals."""
        return self._channel.request(messages)

    def services(self) -> list[Service]:
        """All virtual servers that have an address and a port."""
        found = []
        for body in self._channel.dump(self._family, _generic(_GET_SERVICE)):
            inner = attributes(attributes(body, 4).get(_SERVICE, b""))
            if _FWMARK not in inner:
                found.append(_service(inner))
        return found

    def destinations(self, key: Key) -> list[Destination]:
        """The real servers of a virtual server."""
        body = _generic(_GET_DEST) + nested(_SERVICE, _key(key))
        answers = self._channel.dump(self._family, body)
        return [_destination(attributes(attributes(each, 4)[_DEST])) for each in answers]

    def service(self, key: Key) -> Service | None:
        """A virtual server, if there is one of that address and port."""
        body = _generic(_GET_SERVICE) + nested(_SERVICE, _key(key))
        try:
            answer = self._channel.get(self._family, body)
        except NetlinkError as error:
            if error.errno == errno.ESRCH:
                return None
            raise
        return _service(attributes(attributes(answer, 4)[_SERVICE]))

    def add_service(self, service: Service) -> bytes:
        """Make a virtual server."""
        return self._message(_NEW_SERVICE, nested(_SERVICE, _full(service)))

    def set_service(self, service: Service) -> bytes:
        """Give one that is there other settings."""
        return self._message(_SET_SERVICE, nested(_SERVICE, _full(service)))

    def delete_service(self, key: Key) -> bytes:
        """Remove one with its real servers."""
        return self._message(_DEL_SERVICE, nested(_SERVICE, _key(key)))

    def add_destination(self, service: bytes, address: str, port: int, weight: int) -> bytes:
        """Make a real server of a virtual server, given as :func:`packed_key` has it."""
        return self._message(_NEW_DEST, service + _dest(address, port, weight))

    def set_destination(self, service: bytes, address: str, port: int, weight: int) -> bytes:
        """Give one that is there another weight."""
        return self._message(_SET_DEST, service + _dest(address, port, weight))

    def delete_destination(self, service: bytes, address: str, port: int) -> bytes:
        """Remove a real server."""
        return self._message(_DEL_DEST, service + nested(_DEST, _socket(address, port)))

    def set_timeouts(self, seconds: Iterable[int]) -> bytes:
        """How long connections of TCP, of TCP that ends and of UDP are remembered; 0: as it is."""
        found = zip(_TIMEOUTS, seconds, strict=True)
        return self._message(_SET_CONFIG, b"".join(number(kind, each) for kind, each in found))

    def _message(self, command: int, body: bytes) -> bytes:
        return message(self._family, 0, _generic(command) + body)


def packed_key(key: Key) -> bytes:
    """A virtual server as messages name it."""
    return nested(_SERVICE, _key(key))


def all_destinations() -> dict[Key, list[Destination]]:
    """The real servers of all virtual servers of the calling thread's namespace.

    Netlink tells those of one server at a time; /proc/net/ip_vs has them all.
    """
    found: dict[Key, list[Destination]] = {}
    here: list[Destination] = []
    with open("/proc/thread-self/net/ip_vs") as listing:
        for line in listing:
            if line.startswith("  -> "):
                _, remote, *rest = line.split()
                if rest[0] == "Masq":
                    address, port = _socket_of(remote)
                    weight, active, inactive = map(int, rest[1:4])
                    here.append(Destination(address, port, weight, active + inactive))
            elif line.startswith(("TCP ", "UDP ", "SCTP ")):
                protocol, local, *_ = line.split()
                here = found.setdefault(Key(protocol.lower(), *_socket_of(local)), [])
            else:
                here = []
    return found


def _socket_of(printed: str) -> tuple[str, int]:
    """`0A6CD654:0CEA` or `[2001:0db8:...]:0050`."""
    address, _, port = printed.rpartition(":")
    if address.startswith("["):
        packed = socket.inet_pton(socket.AF_INET6, address[1:-1])
        return socket.inet_ntop(socket.AF_INET6, packed), int(port, 16)
    return socket.inet_ntoa(bytes.fromhex(address)), int(port, 16)


def finish(draining: Iterable[tuple[Key, str, int]]) -> list[tuple[Key, str, int]]:
    """Take away those real servers whose connections have ended; those that still have some.

    All are in the calling thread's namespace.  One that has a weight again serves again, and is
    neither.
    """
    left: list[tuple[Key, str, int]] = []
    messages: list[bytes] = []
    there = all_destinations()
    with Ipvs() as channel:
        for each in draining:
            key, address, port = each
            for found in there.get(key, ()):
                if (found.address, found.port) == (address, port) and not found.weight:
                    if found.connections:
                        left.append(each)
                    else:
                        service = packed_key(key)
                        messages.append(channel.delete_destination(service, address, port))
        channel.request(messages)  # (one that went meanwhile is gone as well)
    return left


def _generic(command: int) -> bytes:
    return bytes([command]) + _GENERIC[1:]


def _packed(address: str) -> tuple[int, bytes]:
    """Family and the 16 bytes of a union nf_inet_addr."""
    if ":" in address:
        return socket.AF_INET6, socket.inet_pton(socket.AF_INET6, address)
    return socket.AF_INET, socket.inet_aton(address) + bytes(12)


def _u16(kind: int, value: int) -> bytes:
    return struct.pack("=HHHxx", 6, kind, value)


def _port(kind: int, port: int) -> bytes:
    return struct.pack("=HH", 6, kind) + struct.pack("!Hxx", port)


def _key(key: Key) -> bytes:
    family, packed = _packed(key.address)
    return (
        _u16(_AF, family)
        + _u16(_PROTOCOL, PROTOCOLS[key.protocol])
        + attribute(_ADDRESS, packed)
        + _port(_PORT, key.port)
    )


def _full(service: Service) -> bytes:
    flags = _PERSISTENT * bool(service.persistent_s) | _BY_PORT * service.by_port
    # A mask of IPv4 in network order, or a length of IPv6: one client is one address
    netmask = 128 if ":" in service.key.address else 0xFFFFFFFF
    return (
        _key(service.key)
        + text(_SCHEDULER, service.scheduler)
        + attribute(_FLAGS, struct.pack("=II", flags, 0xFFFFFFFF))
        + number(_TIMEOUT, service.persistent_s)
        + number(_NETMASK, netmask)
    )


def _socket(address: str, port: int) -> bytes:
    family, packed = _packed(address)
    return attribute(_DEST_ADDRESS, packed) + _port(_DEST_PORT, port) + _u16(_DEST_FAMILY, family)


def _dest(address: str, port: int, weight: int) -> bytes:
    return nested(
        _DEST,
        _socket(address, port),
        number(_DEST_METHOD, _MASQUERADING),
        number(_DEST_WEIGHT, weight),
        number(_DEST_UPPER, 0),
        number(_DEST_LOWER, 0),
    )


def _address(family: int, packed: bytes) -> str:
    size = 16 if family == socket.AF_INET6 else 4
    return socket.inet_ntop(socket.AddressFamily(family), packed[:size])


def _number(payload: bytes) -> int:
    (value,) = struct.unpack_from("=I", payload)
    return int(value)


def _service(found: dict[int, bytes]) -> Service:
    (family,) = struct.unpack_from("=H", found[_AF])
    (protocol,) = struct.unpack_from("=H", found[_PROTOCOL])
    (port,) = struct.unpack_from("!H", found[_PORT])
    flags = _number(found[_FLAGS])
    return Service(
        Key(_NAMES.get(protocol, str(protocol)), _address(family, found[_ADDRESS]), port),
        found[_SCHEDULER].rstrip(b"\0").decode(),
        _number(found[_TIMEOUT]) if flags & _PERSISTENT else 0,
        bool(flags & _BY_PORT),
    )


def _destination(found: dict[int, bytes]) -> Destination:
    (family,) = struct.unpack_from("=H", found[_DEST_FAMILY])
    (port,) = struct.unpack_from("!H", found[_DEST_PORT])
    connections = _number(found[_DEST_ACTIVE]) + _number(found[_DEST_INACTIVE])
    return Destination(
        _address(family, found[_DEST_ADDRESS]), port, _number(found[_DEST_WEIGHT]), connections
    )
