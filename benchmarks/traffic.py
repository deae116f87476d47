"""Packets of others: datagrams from one pod to another at a steady rate, from a process of its own.

`python -m benchmarks.traffic FROM TO ADDRESS RATE SECONDS`, where FROM and TO are namespaces, sends
until the seconds are over or its standard input ends, and prints two numbers: datagrams that
arrived, and the seconds that they took.
"""

from __future__ import annotations

import select
import socket
import subprocess
import sys
import time
from types import TracebackType

from netlab.kernel.namespaces import entered

_PORT = 9999
_PAUSE_S = 0.001
_BUFFER = 1 << 22
_SO_RCVBUFFORCE = 33


class Traffic:
    """Such a process, from `with` to the end of its body; then `rate` is known."""

    def __init__(self, source: str, target: str, address: str, rate: int, seconds: int) -> None:
        words = [source, target, address, str(rate), str(seconds)]
        self._command = [sys.executable, "-m", "benchmarks.traffic", *words]
        self.rate = 0.0  # datagrams that arrived in a second

    def __enter__(self) -> Traffic:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout
        self._process.stdout.readline()  # it has begun
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        said, _ = self._process.communicate()
        arrived, seconds = said.split()
        self.rate = int(arrived) / float(seconds)


def _send(source: str, target: str, address: str, rate: int, seconds: float) -> None:
    with entered(target):
        receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    receiver.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
    receiver.bind((address, _PORT))
    with entered(source):
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sender.connect((address, _PORT))
    sent = arrived = 0
    print("sending", flush=True)
    start = time.monotonic()
    while (now := time.monotonic() - start) < seconds:
        for _ in range(int(now * rate) - sent):
            sender.send(bytes(64))
            sent += 1
        arrived += _received(receiver)
        if select.select([sys.stdin], [], [], _PAUSE_S)[0]:
            break
    print(arrived, time.monotonic() - start)


def _received(receiver: socket.socket) -> int:
    count = 0
    while True:
        try:
            receiver.recv(2048)
        except BlockingIOError:
            return count
        count += 1


if __name__ == "__main__":
    _send(*sys.argv[1:4], int(sys.argv[4]), float(sys.argv[5]))
