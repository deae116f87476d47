"""Messages between a lab's init, its clients and its workload, over Unix stream sockets.

A message is a JSON object, bytes that go with it as they are, and open descriptors.  On the wire:
three lengths, the descriptors in batches of one byte each, the JSON, the bytes.  Every read asks
for exactly what comes next, because the kernel drops descriptors that a plain read runs over.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

_LENGTHS = struct.Struct("!III")
_UCRED = struct.Struct("=iII")  # struct ucred: pid, uid, gid
BATCH = 253  # SCM_MAX_FD of include/net/scm.h

# What a client that watches is sent, one byte each: nobody has to wait for it to read.
DECLARED = b"d"  # something was declared
ENDING = b"e"  # the lab goes down


class Message(NamedTuple):
    """What was received; the descriptors are the receiver's to close."""

    body: dict[str, Any]
    data: bytes
    descriptors: tuple[int, ...]


def send(
    channel: socket.socket,
    body: dict[str, Any],
    data: bytes = b"",
    descriptors: Sequence[int] = (),
) -> None:
    """Send one message; OSError if the other end is gone."""
    text = json.dumps(body).encode()
    channel.sendall(_LENGTHS.pack(len(text), len(data), len(descriptors)))
    for start in range(0, len(descriptors), BATCH):
        socket.send_fds(channel, [b"\0"], list(descriptors[start : start + BATCH]))
    channel.sendall(text + data)


def receive(channel: socket.socket) -> Message | None:
    """The next message, or None if the other end has closed the channel between two messages.

    ConnectionResetError if it ends within one; OSError(EMFILE) if the descriptors that come with
    it are more than this process may have.
    """
    lengths = _read(channel, _LENGTHS.size, may_end=True)
    if not lengths:
        return None
    text, data, count = _LENGTHS.unpack(lengths)
    descriptors: list[int] = []
    try:
        while len(descriptors) < count:
            expected = min(BATCH, count - len(descriptors))
            byte, batch, _, _ = socket.recv_fds(channel, 1, BATCH, socket.MSG_CMSG_CLOEXEC)
            descriptors.extend(batch)
            if not byte:
                raise ConnectionResetError(errno.ECONNRESET, "ended within a message")
            if len(batch) != expected:
                raise OSError(errno.EMFILE, "too many open descriptors (ulimit -n)")
        body = json.loads(_read(channel, text))
        return Message(body, _read(channel, data), tuple(descriptors))
    except BaseException:
        close(descriptors)
        raise


def close(descriptors: Sequence[int]) -> None:
    """Close descriptors that came with a message."""
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)


def peer(channel: socket.socket) -> tuple[int, int]:
    """PID and user ID of the process that connected to, or last listened for, this connection."""
    credentials = channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, _ = _UCRED.unpack(credentials)
    return pid, uid


def _read(channel: socket.socket, length: int, may_end: bool = False) -> bytes:
    read = bytearray()
    while len(read) < length:
        piece = channel.recv(min(length - len(read), 1 << 20))
        if not piece:
            if may_end and not read:
                return b""
            raise ConnectionResetError(errno.ECONNRESET, "ended within a message")
        read += piece
    return bytes(read)
