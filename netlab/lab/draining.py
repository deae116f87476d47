"""Real servers of IPVS that go when their connections have ended; init looks once a minute.

kube-proxy does the same (pkg/proxy/ipvs/graceful_termination.go).  Only the standard library can be
imported here, as in all of init.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable
from typing import Any

from netlab.kernel.ipvs_messages import Key, finish
from netlab.kernel.syscalls import CLONE_NEWNET, setns

LOOK_S = 60.0


class Draining:
    """What is to be taken away, by namespace; `log` is told what goes wrong."""

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log = log
        self._home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self._waiting: dict[int, tuple[int, set[tuple[Key, str, int]]]] = {}  # by inode
        self._look_at = math.inf  # monotonic

    @property
    def descriptors(self) -> list[int]:
        """All that are open here."""
        return [self._home, *(descriptor for descriptor, _ in self._waiting.values())]

    @property
    def until_look_ms(self) -> int | None:
        """How long it is until the next look; None: there is nothing to look at."""
        if self._look_at == math.inf:
            return None
        return max(0, math.ceil((self._look_at - time.monotonic()) * 1000))

    def add(self, descriptor: int, servers: Iterable[Any]) -> None:
        """Take over a descriptor of a namespace, and wait for the connections of its servers."""
        inode = os.fstat(descriptor).st_ino
        found = {(Key(*key), str(address), int(port)) for key, address, port in servers}
        if inode in self._waiting:
            os.close(descriptor)
            self._waiting[inode][1].update(found)
        else:
            self._waiting[inode] = descriptor, found
        if self._look_at == math.inf:
            self._look_at = time.monotonic() + LOOK_S

    def look(self) -> None:
        """Take away what has no connections any more."""
        for inode, (descriptor, servers) in list(self._waiting.items()):
            left: list[tuple[Key, str, int]] = []
            try:
                setns(descriptor, CLONE_NEWNET)
                left = finish(servers)
            except OSError as error:
                self._log(f"real servers that drain: {error}")
            finally:
                setns(self._home, CLONE_NEWNET)
            if left:
                self._waiting[inode] = descriptor, set(left)
            else:
                # With the last descriptor a namespace that was removed goes.
                del self._waiting[inode]
                os.close(descriptor)
        self._look_at = time.monotonic() + LOOK_S if self._waiting else math.inf
