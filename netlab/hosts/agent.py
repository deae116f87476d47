"""What runs on a machine behind a gateway: it answers one request after the other.

A request is a dict with `do` and what that needs; the answer one with `data`, or with `problems`.
Nothing here outlives the channel but what a request was to make.
"""

from __future__ import annotations

import traceback
from typing import Any

import msgspec

from netlab.hosts import machine
from netlab.problems import Exit, NetlabError


class Agent:
    """The requests, each by a method of its name."""

    def __init__(self) -> None:
        self._ear: machine.Ear | None = None
        self._watching: Any = None

    def examine(self, data: bytes) -> bytes:
        order = msgspec.json.decode(data, type=machine.Order)
        return machine.encode(machine.examine(order))

    def listen(self, data: bytes) -> bytes:
        address, port = msgspec.json.decode(data, type=tuple[str, int])
        ear = machine.Ear(address, port)
        is_open = ear.open()
        self._ear = ear if is_open else None
        return msgspec.json.encode(is_open)

    def call(self, data: bytes) -> bytes:
        cookie, others = msgspec.json.decode(data, type=tuple[bytes, list[str]])
        if self._ear:
            self._ear.call(cookie, others)
        return b""

    def heard(self, data: bytes) -> bytes:
        cookie = msgspec.json.decode(data, type=bytes)
        return msgspec.json.encode(self._ear.heard(cookie) if self._ear else [])

    def deaf(self, data: bytes) -> bytes:
        if self._ear:
            self._ear.close()
            self._ear = None
        return b""

    def hold(self, data: bytes) -> bytes:
        order, interface = msgspec.json.decode(data, type=tuple[machine.Order, str])
        return machine.encode(machine.hold(order, interface))

    def release(self, data: bytes) -> bytes:
        return msgspec.json.encode(machine.release(data.decode()))

    def status(self, data: bytes) -> bytes:
        from netlab.hosts import condition

        return msgspec.json.encode(condition.of(data.decode()))

    def watch(self, data: bytes) -> bytes:
        from netlab.hosts.watching import Watching

        self.unwatch(b"")
        self._watching = Watching(data)
        return b""

    def send(self, data: bytes) -> bytes:
        timeout_s = msgspec.json.decode(data, type=float)
        return msgspec.msgpack.encode(self._watching.send(timeout_s))

    def seen(self, data: bytes) -> bytes:
        from netlab.trace.probe import Answer

        answer = msgspec.msgpack.decode(data, type=Answer)
        return msgspec.msgpack.encode(self._watching.seen(answer))

    def table(self, data: bytes) -> bytes:
        question, arguments = msgspec.msgpack.decode(data)
        return msgspec.msgpack.encode(self._watching.answer(question, arguments))

    def reports(self, data: bytes) -> bytes:
        return msgspec.msgpack.encode(self._watching.reports())

    def unwatch(self, data: bytes) -> bytes:
        if self._watching:
            self._watching.end()
            self._watching = None
        return b""

    def doctor(self, data: bytes) -> bytes:
        from netlab import doctor

        return msgspec.json.encode([msgspec.to_builtins(each) for each in doctor.examine()])


def serve(channel: Any) -> None:
    """Answer until the other end closes.  No error of a request ends it."""
    agent = Agent()
    for request in channel:
        try:
            answer = {"data": getattr(agent, request["do"])(request["data"])}
        except NetlabError as error:
            problems = [(each.code, each.message, each.hint) for each in error.problems]
            answer = {"problems": problems, "exit": int(error.exit_code)}
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            text = f"{where}{error.strerror or error}"
            answer = {"problems": [("machine-error", text, None)], "exit": int(Exit.MACHINE)}
        except Exception:  # the other end names the machine, and shows this with -v
            last = traceback.format_exc().strip()
            answer = {"problems": [("agent-failed", last, None)], "exit": int(Exit.MACHINE)}
        channel.send(answer)
    agent.unwatch(b"")
