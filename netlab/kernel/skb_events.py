"""What the kernel does with packets that carry certain bytes, as BPF programs see it.

Two raw tracepoints see each buffer (`struct sk_buff`) enter a device and be freed as lost.  (Those
where it leaves a device or is used up would cost the traffic of others as much again.)  A program
at each compares the packet with the words that are asked for and reports only those that match, so
that the traffic of others is hardly slowed.  Offsets into the kernel's structures are those that
the running kernel tells of itself.

Source: include/trace/events/{net,skb}.h, linux/skbuff.h.
"""

from __future__ import annotations

import contextlib
import functools
import os
import struct
import sys
from collections.abc import Sequence
from typing import Literal

import msgspec

from netlab.kernel import bpf, btf

Kind = Literal["in", "drop"]

# In the order of the numbers that the programs report.
_TRACEPOINTS: tuple[tuple[Kind, str], ...] = (
    ("in", "netif_receive_skb"),
    ("drop", "kfree_skb"),
)
_REASON_PREFIX = "SKB_DROP_REASON_"
_RING_BYTES = 1 << 20
_MAC_HEADER = 14
_FRAME = 256
_SYMBOL = 64
# Of an event: time, buffer; reason, kind, namespace, device; the device's name, the place in the
# code.  The frame follows.
_HEAD = struct.Struct(f"=QQIIII16s{_SYMBOL}s")
_AT_REASON, _AT_KIND, _AT_NAMESPACE, _AT_DEVICE = range(16, 32, 4)
_AT_NAME, _AT_SYMBOL = 32, 48

# Registers that outlive calls, and what is kept in them.
_CONTEXT, _EVENT, _NETWORK, _DEVICE = 6, 7, 8, 9
_FRAME_POINTER = 10


class SkbEvent(msgspec.Struct, frozen=True):
    """One moment of a buffer's life.

    `frame` begins with a MAC header, which a drop may have spoilt, and is cut off after 256 bytes.
    `namespace` is the inode number, 0 if the buffer belonged to no device and no socket.
    `function` says where it was freed, "ip_error+0x1c2/0x2f0"; `reason` why it was lost.
    """

    kind: Kind
    t_ns: int  # CLOCK_MONOTONIC
    buffer: int  # its address: the same during its life, and in another's later
    namespace: int
    index: int
    device: str
    frame: bytes
    reason: str | None = None
    function: str | None = None


class Half(msgspec.Struct, frozen=True):
    """Two bytes at an even offset from the start of an IP header, of which some bits are given."""

    offset: int
    mask: int  # big-endian, as on the wire
    value: int


# What a packet has all of.
Pattern = Sequence[Half]


def pattern_of_word(offset: int, word: bytes) -> Pattern:
    """The pattern of four bytes at an offset."""
    return [
        Half(offset + half, 0xFFFF, int.from_bytes(word[half : half + 2], "big")) for half in (0, 2)
    ]


class _Layout(msgspec.Struct, frozen=True):
    """Byte offsets in the kernel's structures, and whether drops have reasons (5.17 and newer)."""

    device: int
    socket: int
    head: int
    data: int
    network: int
    namespace: int
    index: int
    name: int
    inode: int
    socket_namespace: int
    reasons: bool

    @property
    def way(self) -> tuple[int, int]:
        """From where to where members lead to the packet, in whole words of eight bytes."""
        members = self.head, self.data, self.network
        return min(members) // 8 * 8, (max(members) // 8 + 1) * 8


@functools.cache
def _layout() -> _Layout:
    types = btf.vmlinux()
    offset = types.offset
    return _Layout(
        device=offset("sk_buff", "dev"),
        socket=offset("sk_buff", "sk"),
        head=offset("sk_buff", "head"),
        data=offset("sk_buff", "data"),
        network=offset("sk_buff", "network_header"),
        namespace=offset("net_device", "nd_net"),
        index=offset("net_device", "ifindex"),
        name=offset("net_device", "name"),
        inode=offset("net", "ns", "inum"),
        socket_namespace=offset("sock", "__sk_common", "skc_net"),
        reasons=types.has_enum("skb_drop_reason"),
    )


@functools.cache
def _reasons() -> dict[int, str]:
    return btf.vmlinux().enum("skb_drop_reason")


class SkbEvents:
    """Programs at work until `close`; the kernel ends them with the process at the latest.

    One of the patterns that holds makes a packet count.  Raises OSError without privilege or BPF,
    KeyError if the kernel's structures are not as they are expected to be.
    """

    def __init__(self, patterns: Sequence[Pattern]) -> None:
        self._open = contextlib.ExitStack()
        layout = _layout()
        try:
            self.ring = bpf.Ring(_RING_BYTES)
            self._open.callback(self.ring.close)
            self._lost = self._kept(bpf.counter())
            symbol = self._kept(bpf.constant(b"%pS\0"))
            for number, (_, tracepoint) in enumerate(_TRACEPOINTS):
                code = _program(number, patterns, layout, self.ring.descriptor, self._lost, symbol)
                with contextlib.ExitStack() as program:
                    descriptor = bpf.load(code)
                    program.callback(os.close, descriptor)
                    self._kept(bpf.attach(tracepoint, descriptor))
        except BaseException:
            self._open.close()
            raise

    def _kept(self, descriptor: int) -> int:
        self._open.callback(os.close, descriptor)
        return descriptor

    def read(self) -> list[SkbEvent]:
        """What happened since it was read last, in the order of the ring."""
        return [self._event(record) for record in self.ring.read()]

    def _event(self, record: bytes) -> SkbEvent:
        t_ns, buffer, reason, kind, namespace, index, device, symbol = _HEAD.unpack_from(record)
        return SkbEvent(
            kind=_TRACEPOINTS[kind][0],
            t_ns=t_ns,
            buffer=buffer,
            namespace=namespace,
            index=index,
            device=_text(device),
            frame=_whole(record[_HEAD.size : _HEAD.size + _FRAME]),
            reason=_reason(reason) if _TRACEPOINTS[kind][0] == "drop" else None,
            function=_text(symbol) or None,
        )

    @property
    def lost(self) -> int:
        """How many events did not fit into the ring."""
        return bpf.counted(self._lost)

    def close(self) -> None:
        self._open.close()


def _reason(number: int) -> str:
    if not number:
        return "NOT_SPECIFIED"
    name = _reasons().get(number)
    # A subsystem's own reasons have its number in their upper half.
    return name.removeprefix(_REASON_PREFIX) if name else f"reason {number:#x}"


def _text(value: bytes) -> str:
    return value.partition(b"\0")[0].decode(errors="replace")


def _whole(frame: bytes) -> bytes:
    """A frame without what stands in memory behind its packet, and with the type of that.

    Nothing if it is none of IP, such as ARP, behind which the packet may stand that asked for it.
    """
    version = frame[_MAC_HEADER] >> 4
    if version not in (4, 6):
        return b""
    at, more, kind = (4, 40, b"\x86\xdd") if version == 6 else (2, 0, b"\x08\x00")
    (length,) = struct.unpack_from("!H", frame, _MAC_HEADER + at)
    end = _MAC_HEADER + length + more
    return frame[: _MAC_HEADER - 2] + kind + frame[_MAC_HEADER:end]


def _program(
    number: int,
    patterns: Sequence[Pattern],
    layout: _Layout,
    ring: int,
    lost: int,
    symbol: int,
) -> bytes:
    """The program for one tracepoint: filter first, and report what passes."""
    kind = _TRACEPOINTS[number][0]
    last = max(half.offset for pattern in patterns for half in pattern)
    window = -(-(last + 2) // 8) * 8
    begin, end = layout.way
    packet = begin - end - window
    code = bpf.Assembler()
    code.move(_CONTEXT, 1)
    code.load(bpf.DOUBLE, 3, _CONTEXT, 0)
    code.add(3, begin)
    _read(code, _FRAME_POINTER, begin - end, end - begin)
    # What was just received has its network header at its data; the field is set later.
    if kind == "in":
        code.load(bpf.DOUBLE, _NETWORK, _FRAME_POINTER, layout.data - end)
    else:
        code.load(bpf.DOUBLE, _NETWORK, _FRAME_POINTER, layout.head - end)
        code.load(bpf.HALF, 1, _FRAME_POINTER, layout.network - end)
        code.add_register(_NETWORK, 1)
    code.move(3, _NETWORK)
    _read(code, _FRAME_POINTER, packet, window)
    for place, pattern in enumerate(patterns):
        # The stack may be read at its alignment only, and half a word is that of all headers.
        for half in pattern:
            code.load(bpf.HALF, 1, _FRAME_POINTER, packet + half.offset)
            if half.mask != 0xFFFF:
                code.mask(1, _as_loaded(half.mask))
            code.jump_unless(1, _as_loaded(half.value), f"not {place}")
        code.jump("ours")
        code.label(f"not {place}")
    code.jump("end")
    code.label("ours")
    _report(code, number, layout, ring, lost, symbol)
    code.label("end")
    code.set(0, 0)
    code.exit()
    return code.assemble()


def _as_loaded(value: int) -> int:
    """Two bytes from the wire as the processor reads them."""
    return int.from_bytes(value.to_bytes(2, "big"), sys.byteorder)


def _report(
    code: bpf.Assembler, number: int, layout: _Layout, ring: int, lost: int, symbol: int
) -> None:
    """Fill an event with what the program knows and the kernel's memory says."""
    kind = _TRACEPOINTS[number][0]
    code.map(1, ring)
    code.set(2, _HEAD.size + _FRAME)
    code.set(3, 0)
    code.call(bpf.RINGBUF_RESERVE)
    code.jump_unless(0, 0, "reserved")
    code.map_value(1, lost)
    code.set(2, 1)
    code.count(1, 0, 2)
    code.jump("end")
    code.label("reserved")
    code.move(_EVENT, 0)
    code.call(bpf.KTIME_GET_NS)
    code.store(bpf.DOUBLE, _EVENT, 0, 0)
    code.load(bpf.DOUBLE, 1, _CONTEXT, 0)
    code.store(bpf.DOUBLE, _EVENT, 8, 1)
    code.set(1, 0)
    if kind == "drop" and layout.reasons:
        code.load(bpf.DOUBLE, 1, _CONTEXT, 16)
    code.store(bpf.WORD, _EVENT, _AT_REASON, 1)
    code.set(1, number)
    code.store(bpf.WORD, _EVENT, _AT_KIND, 1)
    _at(code, 3, _NETWORK, -_MAC_HEADER)
    _read(code, _EVENT, _HEAD.size, _FRAME)
    _follow(code, layout.device)
    code.load(bpf.DOUBLE, _DEVICE, _FRAME_POINTER, -8)
    # Reads from address 0 fail and leave zeros.
    _at(code, 3, _DEVICE, layout.index)
    _read(code, _EVENT, _AT_DEVICE, 4)
    _at(code, 3, _DEVICE, layout.name)
    _read(code, _EVENT, _AT_NAME, 16)
    _at(code, 3, _DEVICE, layout.namespace)
    code.jump_unless(_DEVICE, 0, "owned")
    _follow(code, layout.socket)
    code.load(bpf.DOUBLE, 3, _FRAME_POINTER, -8)
    code.add(3, layout.socket_namespace)
    code.label("owned")
    _read(code, _FRAME_POINTER, -8, 8)
    code.load(bpf.DOUBLE, 3, _FRAME_POINTER, -8)
    code.add(3, layout.inode)
    _read(code, _EVENT, _AT_NAMESPACE, 4)
    if kind == "drop":
        code.load(bpf.DOUBLE, 1, _CONTEXT, 8)
        code.store(bpf.DOUBLE, _FRAME_POINTER, -8, 1)
        _at(code, 1, _EVENT, _AT_SYMBOL)
        code.set(2, _SYMBOL)
        code.map_value(3, symbol)
        _at(code, 4, _FRAME_POINTER, -8)
        code.set(5, 8)
        code.call(bpf.SNPRINTF)
    else:
        code.set(1, 0)
        code.store(bpf.DOUBLE, _EVENT, _AT_SYMBOL, 1)
    code.move(1, _EVENT)
    # Who waits, waits for a loss.
    code.set(2, bpf.WAKE if kind == "drop" else bpf.DO_NOT_WAKE)
    code.call(bpf.RINGBUF_SUBMIT)


def _at(code: bpf.Assembler, to: int, base: int, offset: int) -> None:
    code.move(to, base)
    code.add(to, offset)


def _follow(code: bpf.Assembler, member: int) -> None:
    """Copy a pointer of the buffer to the top of the frame."""
    code.load(bpf.DOUBLE, 3, _CONTEXT, 0)
    code.add(3, member)
    _read(code, _FRAME_POINTER, -8, 8)


def _read(code: bpf.Assembler, base: int, offset: int, length: int) -> None:
    """Copy kernel memory from the address in register 3 to `offset` behind `base`."""
    _at(code, 1, base, offset)
    code.set(2, length)
    code.call(bpf.PROBE_READ_KERNEL)
