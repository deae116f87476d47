"""The process that answers for all pods of a lab.

A socket belongs to the network namespace that it was opened in, whoever reads from it.  So one
process opens the sockets of each pod by a short visit to its namespace, and one loop serves them
all.  Init tells it the whole desired list each time; it opens what is missing and closes what is
gone.  Like init it runs in a bare interpreter: only the standard library can be imported here.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from netlab.kernel.syscalls import CLONE_NEWNET, setns
from netlab.lab import messages, relay
from netlab.lab.answers import Announcement, Conversation, Page, Pod, datagram

IDLE_S = 300.0  # a connection on which nothing moved for this long is closed
_AT_ONCE = 64  # accepts or datagrams of one socket before others have their turn
_PIECE = 64 * 1024
_UNSENT_LIMIT = 4 * _PIECE  # a client that does not read is not listened to beyond this
_BACKLOG = 128

_KINDS = {
    "TCP": (socket.SOCK_STREAM, 0),
    "UDP": (socket.SOCK_DGRAM, 0),
    "SCTP": (socket.SOCK_STREAM, socket.IPPROTO_SCTP),
}
_IP_PKTINFO = 8  # linux/in.h; Python 3.11 does not name it
_PKTINFO = struct.Struct(
    "=I4s4s"
)  # struct in_pktinfo: interface, source of the answer, destination
_PKTINFO6 = struct.Struct("=16sI")  # struct in6_pktinfo: address, interface


_Address = tuple[str, int] | tuple[str, int, int, int]  # as sockets tell it, by family


_Socket = socket.socket


class _Key(NamedTuple):
    """What makes a listening socket the one that it is."""

    inode: int  # of the network namespace: a name may come back as another namespace
    protocol: str
    port: int
    address: str = ""  # every one
    stuck: bool = False


class _Open(NamedTuple):
    socket: socket.socket
    pod: Pod
    page: Page | None  # what is said instead of what pods say
    streams: _Streams | None  # where clients are passed on to instead
    waiting: _Socket | None  # what fills the queue of one that is stuck


class _Streams(NamedTuple):
    choice: relay.Choice
    namespace: int  # descriptor of the one that they begin in


def main(channel: socket.socket) -> None:
    """Serve until init, at the other end of `channel`, closes it."""
    with open("/proc/self/comm", "w") as comm:
        comm.write("netlab-workload")
    _Workload(channel).run()


class _Workload:
    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self._poll = select.epoll()
        self._poll.register(channel, select.EPOLLIN)
        self._open: dict[_Key, _Open] = {}
        self._listening: dict[int, _Key] = {}  # by descriptor
        self._connections: OrderedDict[_Connection, None] = OrderedDict()  # least active first
        self._sides: dict[int, tuple[_Connection, _Side]] = {}  # by descriptor

    def run(self) -> None:
        while True:
            for descriptor, events in self._poll.poll(self._until_idle_s()):
                if (found := self._sides.get(descriptor)) is not None:
                    self._progress(*found, events)
                elif (key := self._listening.get(descriptor)) is not None:
                    self._receive(key)
                elif descriptor == self._channel.fileno():
                    request = messages.receive(self._channel)
                    if request is None:
                        return
                    messages.send(self._channel, self._serve(request))
            self._drop_idle()

    # What is listened to

    def _serve(self, request: messages.Message) -> dict[str, Any]:
        """Make the open sockets those of the request; tells their number and what cannot be."""
        wanted: dict[_Key, dict[str, Any]] = {}
        unserved = []
        for server in request.body["servers"]:
            for key in _keys(server):
                first = wanted.setdefault(key, server)
                if first is not server:
                    unserved.append(_unserved(server, key, f"{first['identity']} has that port"))
        self._close(self._open.keys() - wanted.keys())
        namespaces = {os.fstat(descriptor).st_ino: descriptor for descriptor in request.descriptors}
        here = None
        try:
            for key, server in wanted.items():
                pod = Pod(server["identity"], server["node"])
                page = Page(**server["page"]) if "page" in server else None
                backends = _backends(server)
                if (there := self._open.get(key)) is not None:
                    self._open[key] = there._replace(pod=pod, page=page)
                    if there.streams and backends:
                        there.streams.choice.change(backends)
                    continue
                try:
                    if here != key.inode:
                        setns(namespaces[key.inode], CLONE_NEWNET)
                        here = key.inode
                    opened, streams = self._listen(key, backends, namespaces[key.inode])
                    waiting = _fill(opened, key) if key.stuck else None
                    self._open[key] = _Open(opened, pod, page, streams, waiting)
                except OSError as error:
                    unserved.append(_unserved(server, key, os.strerror(error.errno or 0)))
        finally:
            setns(self._home, CLONE_NEWNET)
            messages.close(request.descriptors)
        return {"sockets": len(self._open), "unserved": list(dict.fromkeys(unserved))}

    def _listen(
        self, key: _Key, backends: relay.Backends | None, namespace: int
    ) -> tuple[socket.socket, _Streams | None]:
        """Open one socket in the namespace that this thread is in."""
        kind, protocol = _KINDS[key.protocol]
        family = socket.AF_INET6 if ":" in key.address else socket.AF_INET
        opened = socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)
        try:
            if family == socket.AF_INET6:
                opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if kind == socket.SOCK_DGRAM and family == socket.AF_INET6:
                opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
            elif kind == socket.SOCK_DGRAM:
                opened.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
            opened.bind((key.address, key.port))
            if kind == socket.SOCK_STREAM:
                opened.listen(0 if key.stuck else _BACKLOG)
            streams = _Streams(relay.Choice(backends), os.dup(namespace)) if backends else None
            self._poll.register(opened, 0 if key.stuck else select.EPOLLIN)
        except BaseException:
            opened.close()
            raise
        self._listening[opened.fileno()] = key
        return opened, streams

    def _close(self, keys: Iterable[_Key]) -> None:
        """Stop listening, and hang up on who came in that way."""
        gone = set(keys)
        for connection in [c for c in self._connections if c.key in gone]:
            self._hang_up(connection)
        for key in gone:
            there = self._open.pop(key)
            del self._listening[there.socket.fileno()]
            there.socket.close()
            if there.waiting:
                there.waiting.close()
            if there.streams:
                os.close(there.streams.namespace)

    # Who speaks to it

    def _receive(self, key: _Key) -> None:
        there = self._open[key]
        try:
            for _ in range(_AT_ONCE):
                if key.protocol == "UDP":
                    _answer_datagram(there)
                else:
                    self._accept(key, there)
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._make_room()
            # Anything else was the fault of one client, and its loss (accept(2), "Error handling").

    def _accept(self, key: _Key, there: _Open) -> None:
        accepted, address = there.socket.accept()
        accepted.setblocking(False)
        sides: tuple[_Side, ...]
        if there.streams is None:
            sides = (_Client(accepted, self._conversation(key, there, address)),)
        else:
            sides = relay.stream(accepted, self._backend(there.streams))
        connection = _Connection(key, sides)
        self._connections[connection] = None
        for side in sides:
            self._sides[side.socket.fileno()] = connection, side
        self._wait_for(connection)

    def _backend(self, streams: _Streams) -> socket.socket:
        setns(streams.namespace, CLONE_NEWNET)
        try:
            return relay.connect(streams.choice.next())
        finally:
            setns(self._home, CLONE_NEWNET)

    def _conversation(self, key: _Key, there: _Open, address: _Address) -> Conversation:
        page = there.page
        if page is None:
            return Conversation(there.pod, _text(address))
        return Announcement(lambda: self._open[key].page or page)

    def _make_room(self) -> None:
        """Descriptors are used up: give up the connection that was idle longest."""
        if self._connections:
            self._hang_up(next(iter(self._connections)))
        else:
            time.sleep(0.05)  # the listener stays readable: do not spin on it

    def _progress(self, connection: _Connection, side: _Side, events: int) -> None:
        try:
            side.progress(events)
        except OSError:
            self._hang_up(connection)
            return
        if not any(each.events for each in connection.sides):
            self._hang_up(connection)
            return
        connection.active = time.monotonic()
        self._connections.move_to_end(connection)
        self._wait_for(connection)

    def _wait_for(self, connection: _Connection) -> None:
        """Have the poll wait for what the sides of a connection wait for, and no more.

        A socket that waits for nothing is taken out: errors would be told of it again and again.
        """
        for side in connection.sides:
            before, now = connection.awaited.get(side, 0), side.events
            if now and not before:
                self._poll.register(side.socket, now)
            elif now != before and now:
                self._poll.modify(side.socket, now)
            elif before and not now:
                self._poll.unregister(side.socket)
            connection.awaited[side] = now

    def _hang_up(self, connection: _Connection) -> None:
        del self._connections[connection]
        for side in connection.sides:
            del self._sides[side.socket.fileno()]
            side.socket.close()

    def _until_idle_s(self) -> float | None:
        if not self._connections:
            return None
        return max(0.0, next(iter(self._connections)).active + IDLE_S - time.monotonic())

    def _drop_idle(self) -> None:
        while self._connections and self._until_idle_s() == 0:
            self._hang_up(next(iter(self._connections)))


class _Connection:
    """What came in at a listening socket: a client, or both sides of a stream that is passed on."""

    def __init__(self, key: _Key, sides: tuple[_Side, ...]) -> None:
        self.key = key
        self.sides = sides
        self.awaited: dict[_Side, int] = {}  # the events that the poll waits for
        self.active = time.monotonic()


class _Client:
    """One client over TCP: what it is told, in its pace.

    `events` are those to wait for; none means that it is finished.
    """

    def __init__(self, accepted: socket.socket, conversation: Conversation) -> None:
        self.socket = accepted
        self.events = select.EPOLLIN
        self._conversation = conversation
        self._unsent = bytearray()
        self._heard_all = False
        self._said_all = False

    def progress(self, events: int) -> None:
        """Read and write what can be; OSError if the connection is broken."""
        if events & ~select.EPOLLOUT:
            self._read()
        if self._unsent:
            try:
                sent = self.socket.send(self._unsent)
            except BlockingIOError:
                sent = 0
            del self._unsent[:sent]
        if self._conversation.over and not self._unsent and not self._said_all:
            # Closing with unread data makes a reset, which may overtake the answer: say that
            # this was all, and read on until the client has closed.
            self._said_all = True
            self.socket.shutdown(socket.SHUT_WR)
        self.events = 0
        if not self._heard_all and len(self._unsent) < _UNSENT_LIMIT:
            self.events |= select.EPOLLIN
        if self._unsent:
            self.events |= select.EPOLLOUT

    def _read(self) -> None:
        try:
            data = self.socket.recv(_PIECE)
        except BlockingIOError:
            return
        if not data:
            self._heard_all = True
            self._unsent += self._conversation.end()
        elif not self._conversation.over:
            self._unsent += self._conversation.receive(data)


_Side = _Client | relay.Side


def _answer_datagram(there: _Open) -> None:
    data, ancillary, _, address = there.socket.recvmsg(1 << 16, socket.CMSG_SPACE(_PKTINFO6.size))
    answer = datagram(data, there.pod, _text(address))
    # From the address that was asked: a node has several, and the client knows only that one.
    sources = []
    for level, kind, value in ancillary:
        if (level, kind) == (socket.IPPROTO_IP, _IP_PKTINFO):
            value = _PKTINFO.pack(0, _PKTINFO.unpack(value)[1], b"\0" * 4)
        elif (level, kind) == (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO):
            value = _PKTINFO6.pack(_PKTINFO6.unpack(value)[0], 0)
        sources.append((level, kind, value))
    there.socket.sendmsg([answer], sources, 0, address)


def _text(address: _Address) -> str:
    """A client as text: "10.244.1.4:40000", "[fd00:10:244:1::4]:40000"."""
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _backends(server: dict[str, Any]) -> relay.Backends | None:
    if "backends" not in server:
        return None
    addresses = tuple((address, port) for address, port in server["backends"])
    return relay.Backends(addresses, server.get("sticky_s"))


def _keys(server: dict[str, Any]) -> Iterator[_Key]:
    for address in server.get("addresses", ("",)):
        for protocol, port in server.get("listen", ()):
            yield _Key(server["inode"], protocol, port, address, server.get("stuck", False))


def _fill(listener: socket.socket, key: _Key) -> socket.socket:
    """Fill the queue of a listener of length 0, which has room for one connection."""
    loopback = "::1" if listener.family == socket.AF_INET6 else "127.0.0.1"
    address = loopback if key.address in ("", "0.0.0.0", "::") else key.address
    waiting = socket.socket(listener.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    waiting.connect_ex((address, key.port))
    return waiting


def _unserved(server: dict[str, Any], key: _Key, reason: str) -> tuple[str, str, str, int, str]:
    return server["namespace"], server["identity"], key.protocol, key.port, reason
