"""Packets of new and of established connections, and how long the kernel has them on their way.

A packet socket at the client's device and one at the server's take the kernel's own stamps, of one
clock.  Nothing of Python is between the two stamps of a packet.
"""

from __future__ import annotations

import random
import select
import socket
import struct
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple, Self

from netlab.bench import clusters
from netlab.bench.stage import Stage
from netlab.kernel import conntrack
from netlab.kernel.namespaces import entered
from netlab.kernel.packet_sockets import Tap, await_stamps, close_all
from netlab.kernel.pcap_filter import Filter
from netlab.problems import Exit, NetlabError, Problem

DEVICE = "eth0"
_BUFFER = 64 << 20
_HEADERS = 14 + 20 + 20
# Where the source port and the sequence number stand, which nothing on the way changes.
_KEY = struct.Struct("!34xH2xI")
_PATIENCE_S = 2.0
_FIRST_SOURCE, _SOURCES = 1025, 64_000
_IP, _TCP = struct.Struct("!BBHHHBBH4s4s"), struct.Struct("!HHIIBBHHH")
_SYN, _WINDOW, _TTL, _OFFSET = 2, 64240, 64, 5 << 4
_ONLY_SYN = "tcp[tcpflags] & (tcp-syn|tcp-ack) == tcp-syn"
_DATA = f"src host {clusters.CLIENT_ADDRESS} and tcp[tcpflags] & tcp-push != 0"
_RST_ON_CLOSE = struct.pack("ii", 1, 0)  # struct linger


class Sample(NamedTuple):
    """A packet to a Service by its number, -1 without one; the time between the devices."""

    service: int
    ns: int


class _Lane:
    """The way from the client's device to the server's, watched from `with` to the end."""

    matching: str

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self._stack = ExitStack()
        self.taps: list[Tap] = []

    def __enter__(self) -> Self:
        program = Filter(self.matching, _HEADERS).program
        try:
            for namespace in (self.stage.client, self.stage.server):
                with entered(namespace):
                    self.taps.append(Tap(program, _BUFFER, DEVICE))
                    if not await_stamps():
                        raise NetlabError(
                            Problem("no-stamps", "the kernel stamps no packets here"),
                            Exit.UNOBSERVED,
                        )
            self._open()
            for tap in self.taps:
                tap.forget()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        close_all(self.taps)

    def _open(self) -> None:
        """Sockets for what is sent."""
        raise NotImplementedError

    def _times(self, services: Sequence[int]) -> list[Sample]:
        """Of packets that were sent since the last call, one to each of these Services in turn.

        NetlabError (exit 4) if one was not seen at both devices.
        """
        left = {}
        place = 0
        sender, receiver = self.taps
        while (frame := sender.read()) is not None:
            if frame.direction == "out":
                left[_KEY.unpack_from(frame.data)] = (services[place], frame.t_ns)
                place += 1
        found: list[Sample] = []
        ready = select.poll()
        ready.register(receiver, select.POLLIN)
        deadline = time.monotonic() + _PATIENCE_S
        while len(found) < len(services):
            frame = receiver.read()
            if frame is None:
                if not ready.poll(max(0, deadline - time.monotonic()) * 1000):
                    raise self.lost(len(services), place, len(found))
            elif frame.direction == "in":
                service, t_ns = left.pop(_KEY.unpack_from(frame.data))
                found.append(Sample(service, frame.t_ns - t_ns))
        return found

    def lost(self, sent: int, left: int, came: int) -> NetlabError:
        """What to say where packets were not seen at both devices."""
        return NetlabError(
            Problem(
                "packets-lost",
                f"of {sent} packets {left} were seen at the client's device and {came} at the "
                "server's",
                hint="another program may have rules in the way, or the machine is overloaded",
            ),
            Exit.UNOBSERVED,
        )


class FirstPackets(_Lane):
    """SYNs, each of a connection that nobody has seen.

    They go to ports on which nobody listens: the RST in answer ends the connection on the nodes.
    """

    matching = _ONLY_SYN

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage)
        self._next = 0

    def _open(self) -> None:
        with entered(self.stage.client):
            raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
        self._socket = self._stack.enter_context(raw)

    def send(self, services: Sequence[int], targets: Sequence[tuple[str, int]]) -> list[Sample]:
        """One to each target, which are what one knows the Services by; the nodes know none before.

        At most 60,000.
        """
        for namespace in (self.stage.client_node, self.stage.server_node):
            conntrack.flush(namespace)
        packets = []
        for address, port in targets:
            source = _FIRST_SOURCE + self._next % _SOURCES
            self._next += 1
            packets.append((syn(clusters.CLIENT_ADDRESS, source, address, port), (address, 0)))
        send = self._socket.sendto
        for packet, target in packets:
            send(packet, target)
        return self._times(services)


class Established(_Lane):
    """Data on connections that are established, a few bytes each."""

    matching = _DATA

    def __init__(
        self,
        stage: Stage,
        services: Sequence[int],
        targets: Sequence[tuple[str, int]],
        ports: Sequence[int],
    ) -> None:
        super().__init__(stage)
        self._services, self._targets, self._ports = services, targets, ports
        self._ends: list[tuple[socket.socket, socket.socket]] = []

    def _open(self) -> None:
        with ExitStack() as listening:
            ready = select.poll()
            listeners: dict[int, socket.socket] = {}
            with entered(self.stage.server):
                for port in self._ports:
                    listener = listening.enter_context(socket.socket())
                    listener.bind((clusters.SERVER_ADDRESS, port))
                    listener.listen()
                    ready.register(listener, select.POLLIN)
                    listeners[listener.fileno()] = listener
            with entered(self.stage.client):
                for target in self._targets:
                    client = self._stack.enter_context(socket.socket())
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST_ON_CLOSE)
                    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    client.settimeout(_PATIENCE_S)
                    client.connect(target)
                    ((descriptor, _),) = ready.poll(_PATIENCE_S * 1000)
                    server = self._stack.enter_context(listeners[descriptor].accept()[0])
                    server.settimeout(_PATIENCE_S)
                    self._ends.append((client, server))

    def send(self, count: int) -> list[Sample]:
        """So many packets, in turns over the connections."""
        services = []
        for number in range(count):
            place = number % len(self._ends)
            client, server = self._ends[place]
            client.send(b"established")
            server.recv(64)
            services.append(self._services[place])
        return self._times(services)


def syn(source: str, source_port: int, destination: str, port: int) -> bytes:
    """An IP packet (RFC 791) with a SYN (RFC 9293) and the checksum that it should have."""
    ends = socket.inet_aton(source) + socket.inet_aton(destination)
    sequence = random.getrandbits(32)
    head = (source_port, port, sequence, 0, _OFFSET, _SYN, _WINDOW)
    plain = _TCP.pack(*head, 0, 0)
    tcp = _TCP.pack(
        *head, _checksum(ends + struct.pack("!BBH", 0, socket.IPPROTO_TCP, 20) + plain), 0
    )
    # The kernel fills in the length, the id and the checksum of the header (raw(7)).
    ip = _IP.pack(4 << 4 | 5, 0, 40, 0, 0, _TTL, socket.IPPROTO_TCP, 0, ends[:4], ends[4:])
    return ip + tcp


def _checksum(data: bytes) -> int:
    """RFC 1071; of whole words."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~(total + (total >> 16)) & 0xFFFF
