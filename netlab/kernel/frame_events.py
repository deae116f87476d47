"""Frames that enter and leave devices, in all network namespaces, as typed BPF programs see them.

A packet socket has the kernel copy the head of each frame that goes out, whosever it is, before a
filter refuses it; a program at a raw tracepoint looks where the frame is.  There is one where a
frame comes in and one where it goes out, at the very places where packet sockets get theirs.  They
make the same tests as a socket's filter, and copy what passes, wherever its pieces are.  A
typed program reads memory without calling a helper, which makes it half as expensive as another.

It takes Linux 6.12 or newer.  Frames are those of Ethernet devices.

Source: include/trace/events/net.h, Documentation/bpf/kfuncs.rst, net/core/dev.c.
"""

from __future__ import annotations

import contextlib
import functools
import os
import struct
import sys
import time
from collections.abc import Iterator, Sequence

import msgspec

from netlab.kernel import bpf, btf
from netlab.kernel.packet_sockets import OUTGOING, Frame
from netlab.kernel.socket_filter import Test

# With where the packet begins behind that of the data: on its way in a frame lies before it.
_TRACEPOINTS = (("netif_receive_skb", 14), ("net_dev_start_xmit", 0))
_RING_BYTES = 4 << 20
# A record is as long as the smallest of these that holds its frame.
_ROOMS = (512, 2048, 9216)
# What is longer is cut off, and what is much longer may lie in pages that no test looks into.
LONGEST = _ROOMS[-1]
# Of a record: time; length of the frame and of what was kept of it; namespace, kind; the name of
# the device.  The frame follows.
_NAME = 16
_HEAD = struct.Struct(f"=QIIII{_NAME}s")
_AT_LENGTH, _AT_KEPT, _AT_NAMESPACE, _AT_KIND, _AT_NAME = 8, 12, 16, 20, 24

# A structure with an array of bytes, as which any memory may be read, and where in it that is.
_BYTES, _BYTES_FROM, _BYTES_TO = "sockaddr_un", 2, 110

# Registers that outlive calls, and what is kept in them.
_BUFFER, _FRAME, _EVENT, _LENGTH = 6, 7, 8, 9
_FRAME_POINTER = 10
_DYNPTR, _POINTER = -16, -24  # on the stack, of 16 bytes and of 8


class _Layout(msgspec.Struct, frozen=True):
    """Byte offsets in the kernel's structures, and numbers of what is called by number."""

    device: int
    data: int
    length: int
    kind: int
    name: int
    namespace: int
    inode: int
    cast: int
    bytes_: int
    of_buffer: int


@functools.cache
def _layout() -> _Layout:
    offset = btf.vmlinux().offset
    return _Layout(
        device=offset("sk_buff", "dev"),
        data=offset("sk_buff", "data"),
        length=offset("sk_buff", "len"),
        kind=offset("sk_buff", "pkt_type"),
        name=offset("net_device", "name"),
        namespace=offset("net_device", "nd_net"),
        inode=offset("net", "ns", "inum"),
        cast=bpf.type_number("bpf_rdonly_cast", bpf.FUNCTION),
        bytes_=bpf.type_number(_BYTES, bpf.STRUCTURE),
        of_buffer=bpf.type_number("bpf_dynptr_from_skb", bpf.FUNCTION),
    )


class FrameEvents:
    """Programs at work until `close`; the kernel ends them with the process at the latest.

    A frame is kept that passes all tests of one of the ways; one that ends before the bytes of a
    test may be kept, too.  Raises OSError without privilege or BPF, KeyError or ValueError if the
    kernel is too old for it.
    """

    def __init__(self, ways: Sequence[Sequence[Test]]) -> None:
        self._open = contextlib.ExitStack()
        layout = _layout()
        # The most, because the processor may be taken away in between.
        self._to_wall_ns = max(time.time_ns() - time.monotonic_ns() for _ in range(5))
        try:
            self._ring = bpf.Ring(_RING_BYTES)
            self._open.callback(self._ring.close)
            self._lost = self._kept(bpf.counter())
            for tracepoint, before in _TRACEPOINTS:
                code = _program(before, ways, layout, self._ring.descriptor, self._lost)
                with contextlib.ExitStack() as program:
                    descriptor = bpf.load_typed(code, tracepoint)
                    program.callback(os.close, descriptor)
                    self._kept(bpf.attach_typed(descriptor))
        except BaseException:
            self._open.close()
            raise

    def _kept(self, descriptor: int) -> int:
        self._open.callback(os.close, descriptor)
        return descriptor

    def read(self) -> Iterator[tuple[int, Frame]]:
        """What came since it was read last, each with the inode number of its namespace."""
        for record in self._ring.read():
            t_ns, length, kept, namespace, kind, name = _HEAD.unpack_from(record)
            yield (
                namespace,
                Frame(
                    data=record[_HEAD.size : _HEAD.size + kept],
                    length=length,
                    device=name.partition(b"\0")[0].decode(errors="replace"),
                    kind=kind,
                    t_ns=t_ns + self._to_wall_ns,
                ),
            )

    def now(self) -> int:
        """The time by the clock that frames are stamped by: the wall clock as it was going."""
        return time.monotonic_ns() + self._to_wall_ns

    @property
    def lost(self) -> int:
        """How many frames did not fit into the ring."""
        return bpf.counted(self._lost)

    def close(self) -> None:
        self._open.close()


def _program(
    before: int, ways: Sequence[Sequence[Test]], layout: _Layout, ring: int, lost: int
) -> bytes:
    """The program for one tracepoint: filter first, and report what passes."""
    code = bpf.Assembler()
    code.load(bpf.DOUBLE, _BUFFER, 1, 0)
    code.load(bpf.DOUBLE, _FRAME, _BUFFER, layout.data)
    code.add(_FRAME, -before)
    _filter(code, ways, layout)
    code.label("ours")
    _report(code, before, layout, ring, lost)
    code.label("end")
    code.set(0, 0)
    code.exit()
    return code.assemble()


def _filter(code: bpf.Assembler, ways: Sequence[Sequence[Test]], layout: _Layout) -> None:
    """Go on at "ours" if all tests of one of the ways hold, else at "end"."""
    begin: int | None = None  # of the bytes that can be read behind register 0
    for place, way in enumerate(ways):
        for number, test in enumerate(way):
            if begin is None or not begin <= test.offset <= test.end <= begin + _BYTES_TO:
                begin = test.offset - _BYTES_FROM
                code.move(1, _FRAME)
                code.add(1, begin)
                code.set(2, layout.bytes_)
                code.call_kernel(layout.cast)
            code.load(_SIZES[test.size], 1, 0, test.offset - begin)
            value = int.from_bytes(test.value.to_bytes(test.size, "big"), sys.byteorder)
            if test.is_equality:
                code.jump_unless_word(1, value, f"not {place}")
            else:
                code.jump_if_any_bit(1, value, f"passed {place}.{number}")
                code.jump(f"not {place}")
                code.label(f"passed {place}.{number}")
        code.jump("ours")
        code.label(f"not {place}")
        if len(way) > 1:
            begin = None  # it depends on which of the tests failed
    code.jump("end")


_SIZES = {4: bpf.WORD, 2: bpf.HALF, 1: bpf.BYTE}


def _report(code: bpf.Assembler, before: int, layout: _Layout, ring: int, lost: int) -> None:
    """Write a record: what the buffer and its device say, and the frame."""
    code.load(bpf.WORD, _LENGTH, _BUFFER, layout.length)
    for number, room in enumerate(_ROOMS):
        if number:
            code.label(f"more than {_ROOMS[number - 1]}")
        more = f"more than {room}"
        last = room == _ROOMS[-1]
        if last:
            code.jump_unless_more(_LENGTH, room - before, "fits")
            code.set(_LENGTH, room - before)
            code.label("fits")
        else:
            code.jump_if_more(_LENGTH, room - before, more)
        code.map(1, ring)
        code.set(2, _HEAD.size + room)
        code.set(3, 0)
        code.call(bpf.RINGBUF_RESERVE)
        code.move(_EVENT, 0)
        code.jump_unless(0, 0, f"reserved {room}")
        code.jump("full")
        code.label(f"reserved {room}")
        _copy(code, before, room, layout)
        code.jump("submit")
    code.label("full")
    code.map_value(1, lost)
    code.set(2, 1)
    code.count(1, 0, 2)
    code.jump("end")
    code.label("submit")
    _describe(code, before, layout)
    code.move(1, _EVENT)
    code.set(2, bpf.DO_NOT_WAKE)
    code.call(bpf.RINGBUF_SUBMIT)


def _copy(code: bpf.Assembler, before: int, room: int, layout: _Layout) -> None:
    """Copy the frame behind the head of a record that has room for it."""
    if before:
        code.move(3, _FRAME)
        _read(code, _EVENT, _HEAD.size, before)
    code.move(1, _BUFFER)
    code.set(2, 0)
    _at(code, 3, _FRAME_POINTER, _DYNPTR)
    code.call_kernel(layout.of_buffer)
    _at(code, 1, _EVENT, _HEAD.size + before)
    code.move(2, _LENGTH)
    _at(code, 3, _FRAME_POINTER, _DYNPTR)
    code.set(4, 0)
    code.set(5, 0)
    code.call(bpf.DYNPTR_READ)


def _describe(code: bpf.Assembler, before: int, layout: _Layout) -> None:
    """Fill the head of a record."""
    code.call(bpf.KTIME_GET_NS)
    code.store(bpf.DOUBLE, _EVENT, 0, 0)
    code.add(_LENGTH, before)
    code.store(bpf.WORD, _EVENT, _AT_KEPT, _LENGTH)
    code.load(bpf.WORD, 1, _BUFFER, layout.length)
    code.add(1, before)
    code.store(bpf.WORD, _EVENT, _AT_LENGTH, 1)
    if before:
        code.load(bpf.BYTE, 1, _BUFFER, layout.kind)
        if sys.byteorder == "big":
            code.shift_right(1, 5)
        code.mask(1, 7)
    else:
        code.set(1, OUTGOING)
    code.store(bpf.WORD, _EVENT, _AT_KIND, 1)
    # (By copies: for each typed step along a pointer the verifier searches all of its types.)
    _at(code, 3, _BUFFER, layout.device)
    _read(code, _FRAME_POINTER, _POINTER, 8)
    code.load(bpf.DOUBLE, _FRAME, _FRAME_POINTER, _POINTER)
    _at(code, 3, _FRAME, layout.name)
    _read(code, _EVENT, _AT_NAME, _NAME)
    _at(code, 3, _FRAME, layout.namespace)
    _read(code, _FRAME_POINTER, _POINTER, 8)
    code.load(bpf.DOUBLE, 3, _FRAME_POINTER, _POINTER)
    code.add(3, layout.inode)
    _read(code, _EVENT, _AT_NAMESPACE, 4)


def _read(code: bpf.Assembler, base: int, offset: int, length: int) -> None:
    """Copy kernel memory from the address in register 3 to `offset` behind `base`."""
    _at(code, 1, base, offset)
    code.set(2, length)
    code.call(bpf.PROBE_READ_KERNEL)


def _at(code: bpf.Assembler, to: int, base: int, offset: int) -> None:
    code.move(to, base)
    code.add(to, offset)
