"""What nodes log of the rules of iptables-legacy, for every trace that asks for it.

One socket of a namespace can listen, and its logger has to be set for that.  So a lab's init does
both: it hands on to any number of traces what comes, and when the last of them has gone, however
it went, the namespace gets the logger back that it had.

Init runs this: only the standard library can be imported here.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
from collections.abc import Iterator

from netlab.kernel.nflog import Log
from netlab.kernel.syscalls import CLONE_NEWNET, setns

_SO_SNDBUFFORCE = 32
# A trace reads when it has time; a message is less than half a kilobyte.
_BUFFER = 4 << 20


class RuleLogs:
    """Logs of namespaces, each as long as somebody follows it."""

    def __init__(self, poll: select.poll) -> None:
        self._poll = poll
        self._logs: dict[int, _Followed] = {}  # by inode of the namespace
        self._by_descriptor: dict[int, _Followed] = {}

    def follow(self, namespace: int) -> socket.socket:
        """The end of a new channel (SOCK_SEQPACKET) on which each logged datagram comes.

        It is closed when something was lost.  `namespace` is a descriptor, the caller's to close.
        Raises OSError: EPERM if another process listens in that namespace.
        """
        inode = os.fstat(namespace).st_ino
        log = self._logs.get(inode)
        if log is None:
            with _inside(namespace):
                log = _Followed(inode, os.dup(namespace), Log())
            self._logs[inode] = log
            self._add(log.log.fileno(), log)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _BUFFER)
        log.followers[ours.fileno()] = ours
        self._add(ours.fileno(), log)
        return theirs

    def _add(self, descriptor: int, log: _Followed) -> None:
        self._by_descriptor[descriptor] = log
        self._poll.register(descriptor, select.POLLIN)

    @property
    def descriptors(self) -> list[int]:
        """All that is open here."""
        return [*self._by_descriptor, *(log.namespace for log in self._logs.values())]

    def ready(self, descriptor: int) -> None:
        """Do what there is to do for a descriptor that poll(2) named; nothing if it is closed."""
        log = self._by_descriptor.get(descriptor)
        if log and descriptor not in log.followers:
            self._hand_on(log)
        elif log and _has_gone(log.followers[descriptor]):
            self._leave(log, descriptor)

    def _hand_on(self, log: _Followed) -> None:
        for data in log.log.datagrams():
            for descriptor, follower in list(log.followers.items()):
                try:
                    follower.send(data)
                except OSError:  # it is full, or its other end is closed
                    self._leave(log, descriptor)
        if log.log.overrun:
            for descriptor in list(log.followers):
                self._leave(log, descriptor)

    def _leave(self, log: _Followed, descriptor: int) -> None:
        follower = log.followers.pop(descriptor)
        self._remove(descriptor)
        if not log.followers and log.inode in self._logs:
            del self._logs[log.inode]
            self._remove(log.log.fileno())
            with contextlib.suppress(OSError), _inside(log.namespace):
                log.log.restore()
            log.log.close()
            os.close(log.namespace)
        # Who waits for this knows that all is as it was.
        follower.close()

    def _remove(self, descriptor: int) -> None:
        del self._by_descriptor[descriptor]
        self._poll.unregister(descriptor)


class _Followed:
    """The log of one namespace and who follows it."""

    def __init__(self, inode: int, namespace: int, log: Log) -> None:
        self.inode = inode
        self.namespace = namespace
        self.log = log
        self.followers: dict[int, socket.socket] = {}


def _has_gone(follower: socket.socket) -> bool:
    """Whether the other end is closed: nothing is ever sent from there."""
    try:
        follower.recv(1)
    except BlockingIOError:  # the descriptor was another follower's when poll(2) named it
        return False
    except ConnectionResetError:
        return True
    return True


@contextlib.contextmanager
def _inside(namespace: int) -> Iterator[None]:
    home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        setns(namespace, CLONE_NEWNET)
        try:
            yield
        finally:
            setns(home, CLONE_NEWNET)
    finally:
        os.close(home)
