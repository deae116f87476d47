"""nftables tables of a namespace, loaded and read through libnftables.

libnftables runs in a forked child: it may abort the process that calls it (nft 1.0.6 does for some
maps), and what it takes for thousands of rules, hundreds of megabytes, goes back to the system with
the child.  The child only runs commands; whatever may load a library or take a lock of Python
happens before, so that a process with threads can fork it.  Most calls have a child of their own; a
`Session` keeps one, and with it what libnftables has read of the namespace, for small changes.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from netlab.datapath.state import Tables
from netlab.kernel import nft_batch
from netlab.kernel.namespaces import entered, scratch
from netlab.kernel.netlink import NetlinkError, Socket, attributes
from netlab.problems import Exit, NetlabError, Problem

_NETLINK_NETFILTER = 12
_NFT_MSG_GETTABLE = 10 << 8 | 1
_NFTA_TABLE_NAME = 1
_FAMILIES = {1: "inet", 2: "ip", 3: "arp", 5: "netdev", 7: "bridge", 10: "ip6"}

# A key of two parts in a printed set: an address and a number.
_KEY = re.compile(r"([0-9a-f.:]+) \. ([0-9a-f]+:[0-9a-f]+)")

# How nft begins a complaint about an included file: name, line, columns.
_POSITION = re.compile(r"/proc/self/fd/\d+:(\d+):[\d-]+: ")


_BIG = 100_000  # characters of rules, from where another way to send them may pay


def load(namespace: str | int, tables: Tables) -> None:
    """Replace tables in a namespace (a name under /run/netns or a descriptor).

    Packets meet what was in tables of these names before, and then the new rules, nothing between;
    if the load fails, all is as it was.  Raises NetlabError (exit 3) with nft's own words.
    """
    transaction = tables.transaction
    with entered(namespace):
        if len(transaction) > _BIG:
            ours = [f"{table.family} {table.name}" for table in tables.tables]
            new = names(namespace).isdisjoint(ours)
            try:
                _run([transaction], in_parts=new)
                return
            except NetlabError:  # sent plainly it is refused with the right words, or not at all
                if new:
                    delete(namespace, ours)
        _run([transaction])


def change(namespace: str | int, transaction: str) -> None:
    """Carry out input for nft, in one transaction: if it fails, all is as it was.

    Raises NetlabError (exit 3) with nft's own words.
    """
    with entered(namespace):
        _run([transaction])


def forget(namespace: str | int, endings: Sequence[str]) -> None:
    """Delete entries of sets whose keys end so: "ip netlab affinity 0:7" is a set and an ending.

    Raises NetlabError (exit 3) with nft's own words.
    """
    by_set: dict[str, set[str]] = {}
    for text in endings:
        name, _, ending = text.rpartition(" ")
        by_set.setdefault(name, set()).add(ending)
    with entered(namespace):
        for name, last in by_set.items():
            keys = _KEY.findall(_run([f"list set {name}\n"]))
            stale = ", ".join(f"{first} . {end}" for first, end in keys if end in last)
            if stale:
                # one that expires meanwhile is added and deleted
                commands = (f"{verb} element {name} {{ {stale} }}\n" for verb in ("add", "delete"))
                _run(["".join(commands)])


class Session:
    """A child that stays in a namespace and changes tables there; for one thread at a time."""

    def __init__(self, namespace: str | int) -> None:
        with entered(namespace):
            nft = _context()
            self._socket, theirs = socket.socketpair()
            self.pid = os.fork()
            if self.pid == 0:
                self._socket.close()
                _serve_session(nft, theirs)
        theirs.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def change(self, transaction: str) -> None:
        """As :func:`change`.  After a NetlabError in which the child died, the session is over."""
        data = transaction.encode()
        try:
            self._socket.sendall(_LENGTH.pack(len(data)) + data)
            code, said = msgspec.json.decode(_received(self._socket), type=tuple[int, str])
        except (ConnectionError, EOFError):
            raise _refused(_last_words(self._ended(), "")) from None
        if code:
            raise _refused(_explained(said, transaction))

    def close(self) -> None:
        """End the child."""
        if self.pid:
            with contextlib.suppress(OSError):  # it has ended by itself
                # a child that was forked later may hold this end open: say so in words
                self._socket.sendall(_LENGTH.pack(0))
            self._ended()

    def _ended(self) -> int:
        self._socket.close()
        pid, self.pid = self.pid, 0
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


_LENGTH = struct.Struct("=I")


def _received(connection: socket.socket) -> bytes:
    """A message; EOFError if the other end is gone."""
    with_length = _exactly(connection, _LENGTH.size)
    return _exactly(connection, _LENGTH.unpack(with_length)[0])


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise EOFError
        data += part
    return data


def _serve_session(nft: Any, connection: socket.socket) -> None:
    """The child of a session: never returns."""
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
        signal.signal(signal.SIGABRT, signal.SIG_DFL)
        file = os.memfd_create("nft")
        while transaction := _received(connection):
            os.ftruncate(file, 0)
            os.pwrite(file, transaction, 0)
            code, _, said = nft.cmd(f'include "/proc/self/fd/{file}"')
            answer = msgspec.json.encode((code, said))
            connection.sendall(_LENGTH.pack(len(answer)) + answer)
        status = 0
    except (EOFError, OSError):  # the parent has ended
        status = 0
    finally:
        os._exit(status)


def delete(namespace: str | int, tables: Sequence[str]) -> None:
    """Delete tables, named as :func:`names` does; one that is not there is fine."""
    with entered(namespace):
        _run(["".join(f"add table {table}\ndelete table {table}\n" for table in tables)])


def names(namespace: str | int) -> frozenset[str]:
    """Every table of a namespace, as "ip kube-proxy"; asks the kernel, not libnftables."""
    request = struct.pack("=BBH", socket.AF_UNSPEC, 0, 0)
    with entered(namespace), Socket(_NETLINK_NETFILTER) as netlink:
        try:
            found = netlink.dump(_NFT_MSG_GETTABLE, request)
        except NetlinkError:  # a kernel without nf_tables
            found = []
    return frozenset(
        f"{_FAMILIES.get(body[0], body[0])} "
        + attributes(body, 4)[_NFTA_TABLE_NAME].rstrip(b"\0").decode()
        for body in found
    )


def listing(namespace: str | int, tables: Sequence[str]) -> str:
    """What `nft list table` prints for tables, without counters; "" for those not there."""
    there = names(namespace)
    with entered(namespace):
        return _run([f"list table {table}\n" for table in tables if table in there])


def relisted(tables: Tables) -> str:
    """What :func:`listing` prints where these tables are loaded.

    Versions of nft spell the same rule differently: this is how the one on this machine does.
    """
    lists = [f"list table {table.family} {table.name}\n" for table in tables.tables]
    with scratch() as namespace, entered(namespace):
        return _run([tables.transaction, *lists])


def _run(commands: Sequence[str], in_parts: bool | None = None) -> str:
    """Run inputs of nft one after the other in the calling thread's namespace; their output.

    `in_parts` lets them be sent as :mod:`netlab.kernel.nft_batch` does, and says whether in parts.
    Raises NetlabError (exit 3) if one is refused, or if the library is missing or dies.
    """
    if not commands:
        return ""
    with contextlib.ExitStack() as files:
        nft = _context()
        redirection = None if in_parts is None else nft_batch.redirection(nft.nft_ctx_new)
        # Each input is a file: nft tells the lines of files only.
        inputs = [files.enter_context(_memory(text)) for text in commands]
        answer, complaint = files.enter_context(_memory()), files.enter_context(_memory())
        child = os.fork()
        if child == 0:
            _serve(nft, inputs, answer, complaint, redirection, bool(in_parts))
        _, status = os.waitpid(child, 0)
        if status:
            died = os.waitstatus_to_exitcode(status)
            raise _refused(_last_words(died, _contents(complaint)))
        output, done, said = msgspec.json.decode(_contents(answer))
    if done < len(commands):
        raise _refused(_explained(said, commands[done]))
    return str(output)


def _serve(
    nft: Any,
    inputs: Sequence[int],
    answer: int,
    complaint: int,
    redirection: nft_batch.Redirection | None,
    in_parts: bool,
) -> None:
    """The child: never returns."""
    status = 1
    try:
        if redirection:
            redirection.start(in_parts)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
        signal.signal(signal.SIGABRT, signal.SIG_DFL)  # a traceback of Python would tell nothing
        os.dup2(complaint, 2)
        outputs, said = [], ""
        for descriptor in inputs:
            code, output, said = nft.cmd(f'include "/proc/self/fd/{descriptor}"')
            if code:
                break
            outputs.append(output)
        os.write(answer, msgspec.json.encode(("".join(outputs), len(outputs), said)))
        status = 0
    finally:
        os._exit(status)


def _context() -> Any:
    try:
        import nftables

        nft = nftables.Nftables()
    except (ImportError, OSError) as error:
        raise NetlabError(
            Problem(
                "missing-library",
                f"libnftables cannot be used: {error}",
                hint="`apt-get install libnftables1` on Debian and Ubuntu",
            ),
            Exit.MACHINE,
        ) from None
    nft.set_stateless_output(True)
    return nft


@contextlib.contextmanager
def _memory(text: str = "") -> Iterator[int]:
    """A file in memory, with that content."""
    descriptor = os.memfd_create("nft")
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(text.encode())
        yield descriptor
    finally:
        os.close(descriptor)


def _contents(descriptor: int) -> str:
    with open(descriptor, "rb", closefd=False) as file:
        file.seek(0)
        return file.read().decode(errors="replace")


def _last_words(status: int, complaint: str) -> str:
    how = signal.Signals(-status).name if status < 0 else f"status {status}"
    said = f": {complaint.strip()}" if complaint.strip() else ""
    return f"libnftables ended its process ({how}){said}"


def _explained(said: str, command: str) -> str:
    """The first complaint with the line that it is about."""
    found = _POSITION.search(said)
    if found is None:
        return said.strip() or "no message"
    words = said[found.end() :].partition("\n")[0].removeprefix("Error: ")
    line = int(found[1])
    text = "".join(command.splitlines()[line - 1 : line]).strip()  # none at the end of the file
    return f'line {line}, "{text}": {words}'


def _refused(what: str) -> NetlabError:
    return NetlabError(
        Problem(
            "rules-refused",
            f"nft refused rules: {what}",
            hint="`netlab doctor` tells what the kernel lacks",
        ),
        Exit.MACHINE,
    )
