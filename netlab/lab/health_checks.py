"""A load balancer's health checks: keeps its maps to the nodes that are healthy.

A program of a lab, in the load balancer's namespace.  Every period it asks each node: HTTP of the
healthCheckNodePort, which kube-proxy answers with 200 where it has endpoints, or whether a node
port takes connections.  So many failures in a row take a node out, so many successes bring it back.
Then the slots of a map are spread anew over the nodes that are left, in one transaction.

At first one success is enough, and rounds follow each other quickly.  When every node is known, a
Unix socket gets a name that tells for which configuration that holds.  A table that somebody
replaced meanwhile is noticed by the kernel's own notice and filled again.

It runs in a bare interpreter: only the standard library can be imported here.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

NAME = "netlab-health-checks"
_NETLINK_NETFILTER = 12
_NFNLGRP_NFTABLES = 7
_SOL_NETLINK, _ADD_MEMBERSHIP = 270, 1
_NEW_TABLE = 10 << 8  # NFT_MSG_NEWTABLE of NFNL_SUBSYS_NFTABLES
_REQUEST = b"GET /healthz HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n"

_FIRST_S = 0.05  # between rounds as long as nothing is known of some node

Check = tuple[str, str, int]
"""Kind (`http`, `tcp` or `none`), address and port."""


def main(path: str) -> NoReturn:
    """Check what the file says, for ever."""
    _HealthChecks(path).run()


class _Ask:
    """One check that is under way."""

    def __init__(self, check: Check, deadline: float) -> None:
        kind, address, port = check
        self.check = check
        self.deadline = deadline
        self.kind = kind
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.socket = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        # Nobody is to wait for the end of so many short connections.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.events = select.POLLOUT
        error = self.socket.connect_ex((address, port))
        self.result: bool | None = None if error in (0, errno.EINPROGRESS) else False
        self._said = b""

    def progress(self) -> None:
        """Go on; `result` is set when the answer is known."""
        try:
            if self.events == select.POLLOUT:
                if self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                    self.result = False
                elif self.kind == "tcp":
                    self.result = True
                else:
                    self.socket.send(_REQUEST % self.check[1].encode())
                    self.events = select.POLLIN
            else:
                data = self.socket.recv(4096)
                self._said += data
                if not data or b"\r\n" in self._said:
                    self.result = self._said.split(b" ", 2)[1:2] == [b"200"]
        except BlockingIOError:
            pass
        except OSError:
            self.result = False


class _HealthChecks:
    def __init__(self, path: str) -> None:
        self._path = path
        self._nft = _Nft()
        self._notices = _notices()
        self._is_healthy: dict[Check, bool] = {}
        self._in_a_row: dict[Check, int] = {}  # results that contradict what is held
        self._asks: dict[int, _Ask] = {}  # by descriptor
        self._named: socket.socket | None = None
        self._wake, self._wake_writer = socket.socketpair()
        self._wake.setblocking(False)
        self._wake_writer.setblocking(False)
        signal.set_wakeup_fd(self._wake_writer.fileno())
        signal.signal(signal.SIGHUP, lambda *_: None)
        self._poll = select.poll()
        self._poll.register(self._wake, select.POLLIN)
        self._poll.register(self._notices, select.POLLIN)
        self._read()

    def run(self) -> NoReturn:
        next_round = time.monotonic()
        while True:
            now = time.monotonic()
            if now >= next_round and not self._asks:
                self._begin_round()
                period_s: float = self._config["period_s"]
                next_round = now + (period_s if self._named else min(period_s, _FIRST_S))
            deadlines = [ask.deadline for ask in self._asks.values()]
            until = min(deadlines, default=next_round)
            ready = self._poll.poll(max(0.0, until - time.monotonic()) * 1000)
            for descriptor, _ in ready:
                if descriptor == self._wake.fileno():
                    self._drain()
                    self._read()
                    next_round = time.monotonic()
                elif descriptor == self._notices.fileno():
                    if self._was_replaced():
                        self._fill(self._config["maps"])
                elif descriptor in self._asks:
                    self._asks[descriptor].progress()
            self._settle()

    # What is to be checked

    def _read(self) -> None:
        """The configuration, at first and when it has changed: all is asked anew at once."""
        for ask in list(self._asks.values()):
            self._end(ask)
        with open(self._path, encoding="utf-8") as file:
            text = file.read()
        self._config: dict[str, Any] = json.loads(text)
        self._digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        wanted = self._checks()
        self._is_healthy = {
            check: healthy for check, healthy in self._is_healthy.items() if check in wanted
        }
        if self._named:
            self._named.close()
            self._named = None

    def _checks(self) -> set[Check]:
        every = (node["check"] for each in self._config["maps"] for node in each["nodes"])
        return {(kind, address, port) for kind, address, port in every}

    def _begin_round(self) -> None:
        deadline = time.monotonic() + self._config["timeout_s"]
        for check in self._checks():
            if check[0] == "none":
                self._is_healthy[check] = True
                continue
            ask = _Ask(check, deadline)
            self._asks[ask.socket.fileno()] = ask
            self._poll.register(ask.socket, ask.events)
        if not self._asks:
            self._end_round(set())

    def _settle(self) -> None:
        """Take the results of what has an answer, or has had its time."""
        if not self._asks:
            return
        changed = set()
        now = time.monotonic()
        for ask in list(self._asks.values()):
            if ask.result is None and now >= ask.deadline:
                ask.result = False
            if ask.result is None:
                self._poll.modify(ask.socket, ask.events)
                continue
            self._end(ask)
            if self._heard(ask.check, ask.result):
                changed.add(ask.check)
        if changed or not self._asks:
            self._end_round(changed)

    def _end(self, ask: _Ask) -> None:
        self._poll.unregister(ask.socket)
        del self._asks[ask.socket.fileno()]
        ask.socket.close()

    def _heard(self, check: Check, result: bool) -> bool:
        """Whether a result changes what is held of a check."""
        held = self._is_healthy.get(check)
        if result == held:
            self._in_a_row.pop(check, None)
            return False
        count = self._in_a_row[check] = self._in_a_row.get(check, 0) + 1
        threshold = self._config["healthy" if result else "unhealthy"]
        if count < threshold and not (held is None and result):
            return False
        self._is_healthy[check] = result
        self._in_a_row.pop(check, None)
        return True

    def _end_round(self, changed: set[Check]) -> None:
        """Fill the maps that something changed for, all of them behind the first round."""
        if self._named is None:
            if self._asks or self._checks() - self._is_healthy.keys():
                return
            self._fill(self._config["maps"])
            self._named = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._named.bind(f"\0{NAME}:{self._digest}")
            return
        maps = self._config["maps"]
        self._fill([m for m in maps if any(tuple(node["check"]) in changed for node in m["nodes"])])

    # What comes of it

    def _fill(self, maps: Iterable[dict[str, Any]]) -> None:
        lines = []
        maps = list(maps)
        if not maps:
            return
        for each in maps:
            table, name = each["table"], each["map"]
            values = [
                node["value"]
                for node in each["nodes"]
                if self._is_healthy.get(tuple(node["check"]))
            ]
            lines.append(f"flush map {table} {name}")
            if values:
                count = self._config["slots"]
                slots = (f"{slot} : {values[slot % len(values)]}" for slot in range(count))
                lines.append(f"add element {table} {name} {{ {', '.join(slots)} }}")
        lines += self._forgotten()
        self._nft.run("".join(f"{line}\n" for line in lines))

    def _forgotten(self) -> Iterator[str]:
        """Connections to a node that passes no check at all may begin anew elsewhere."""
        alive: dict[tuple[str, str], bool] = {}
        for each in self._config["maps"]:
            for node in filter(lambda node: node["remembered"], each["nodes"]):
                key = each["table"], node["remembered"]
                passes = self._is_healthy.get(tuple(node["check"]), False)
                alive[key] = alive.get(key, False) or passes
        for (table, name), is_alive in alive.items():
            if not is_alive:
                yield f"flush set {table} {name}"

    # What others do

    def _drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._wake.recv(4096):
                pass

    def _was_replaced(self) -> bool:
        """Whether one of the notices that have come is of a table of ours that was made."""
        name = self._config["table"].encode() + b"\0"
        found = False
        with contextlib.suppress(BlockingIOError):
            while True:
                try:
                    data = self._notices.recv(1 << 16)
                except OSError as error:
                    if error.errno != errno.ENOBUFS:  # some were lost: ours may be among them
                        raise
                    found = True
                    continue
                found = found or _tells_of(data, name)
        return found


def _notices() -> socket.socket:
    opened = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 12)
    opened.bind((0, 0))
    opened.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, _NFNLGRP_NFTABLES)
    return opened


def _tells_of(data: bytes, name: bytes) -> bool:
    """Whether messages of nf_tables tell of a new table of that name."""
    at = 0
    while at + 20 <= len(data):
        length, kind = struct.unpack_from("=IH", data, at)
        if length < 20:
            return False
        if kind == _NEW_TABLE and name in data[at : at + length]:
            return True
        at += (length + 3) & ~3
    return False


class _Nft:
    """libnftables, as little of it as it takes."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libnftables.so.1")
        self._library.nft_ctx_new.restype = ctypes.c_void_p
        self._library.nft_ctx_get_error_buffer.restype = ctypes.c_char_p
        self._context = ctypes.c_void_p(self._library.nft_ctx_new(0))
        self._library.nft_ctx_buffer_error(self._context)

    def run(self, commands: str) -> None:
        """In one transaction; what is refused is told to the log."""
        if self._library.nft_run_cmd_from_buffer(self._context, commands.encode()):
            said = self._library.nft_ctx_get_error_buffer(self._context) or b""
            line = said.decode(errors="replace").partition("\n")[0]
            print(f"{NAME}: nft refused the nodes: {line}", file=sys.stderr, flush=True)
