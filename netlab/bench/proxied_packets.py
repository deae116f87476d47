"""Packets by way of a proxy on the client's node, which opens a connection of its own for each.

What comes to the server's device is then another packet than what left the client's: the first one
of the proxy's connection, or the data that it passes on.  So one is on its way at a time, and they
are told by their order.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Sequence

from netlab.bench.packets import Established, FirstPackets, Sample
from netlab.kernel import conntrack, nft
from netlab.kernel.namespaces import entered

_TABLE = "ip netlab-bench"
_LISTENER = 61_500  # beyond the ports of endpoints
_PATIENCE_S = 2.0
_DATA = "tcp[tcpflags] & tcp-push != 0"
_RST_ON_CLOSE = b"\1\0\0\0\0\0\0\0"  # struct linger


class ProxiedFirstPackets(FirstPackets):
    """Connections that a proxy takes: from the client's SYN to the proxy's.

    One listener of the server stands for all endpoints, behind the device where packets are seen.
    """

    def _open(self) -> None:
        super()._open()
        nft.change(
            self.stage.server,
            f"add table {_TABLE}\n"
            f"add chain {_TABLE} prerouting {{ type nat hook prerouting priority -100; }}\n"
            f"add rule {_TABLE} prerouting tcp dport != {_LISTENER} redirect to :{_LISTENER}\n",
        )
        self._stack.callback(self._close)
        with entered(self.stage.server):
            listener = socket.create_server(("", _LISTENER), backlog=4096)
        self._listener = self._stack.enter_context(listener)
        self._listener.setblocking(False)

    def _close(self) -> None:
        with contextlib.suppress(OSError):
            nft.delete(self.stage.server, (_TABLE,))

    def send_through(
        self, services: Sequence[int], targets: Sequence[tuple[str, int]]
    ) -> list[Sample]:
        """One connection to each target, which is closed when the proxy has opened its own."""
        for namespace in (self.stage.client_node, self.stage.server_node):
            conntrack.flush(namespace)
        found: list[Sample] = []
        for service, target in zip(services, targets, strict=True):
            with entered(self.stage.client):
                client = socket.socket()
            with client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST_ON_CLOSE)
                client.settimeout(_PATIENCE_S)
                client.connect(target)
                found += in_order(self, [service])
            with contextlib.suppress(BlockingIOError):
                while True:
                    self._listener.accept()[0].close()
        return found


class ProxiedEstablished(Established):
    """Data on connections through a proxy, one packet at a time."""

    matching = _DATA

    def _times(self, services: Sequence[int]) -> list[Sample]:
        return in_order(self, services)


def in_order(lane: FirstPackets | Established, services: Sequence[int]) -> list[Sample]:
    """Times of packets that were sent one after the other, told by their order.

    NetlabError (exit 4) if one was not seen at both devices.
    """
    sender, receiver = lane.taps
    left: list[int] = []
    came: list[int] = []
    ready = select.poll()
    ready.register(receiver, select.POLLIN)
    deadline = time.monotonic() + _PATIENCE_S
    while len(came) < len(services):
        frame = receiver.read()
        if frame is not None:
            if frame.direction == "in":
                came.append(frame.t_ns)
        elif not ready.poll(max(0, deadline - time.monotonic()) * 1000):
            break
    while (sent := sender.read()) is not None:
        if sent.direction == "out":
            left.append(sent.t_ns)
    if not len(left) == len(came) == len(services):
        raise lane.lost(len(services), len(left), len(came))
    return [
        Sample(service, arrived - begun)
        for service, begun, arrived in zip(services, left, came, strict=True)
    ]
