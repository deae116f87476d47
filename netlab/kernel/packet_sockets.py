"""Packet sockets: each sees the devices of one network namespace, all of them or one, both ways.

`sll_ifindex` and `sll_pkttype` name the device and the direction.  A socket that is bound to no
device also sees those that come later; its order of arrival is the kernel's order in that
namespace.  A filter of classic BPF has the kernel drop what is not wanted, before it costs anybody
time.  Promiscuous mode is not needed and not set.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import socket
import struct
import threading
import time
from collections.abc import Iterable
from typing import Literal

import msgspec

from netlab.kernel.syscalls import bind

_ETH_P_ALL = 3
_SO_RCVBUFFORCE = 33
_SO_TIMESTAMPNS = 35
_SO_ATTACH_FILTER = 26
_SOL_PACKET = 263
_PACKET_STATISTICS = 6
_PACKET_AUXDATA = 8
_PACKET_OTHERHOST = 3
OUTGOING = 4  # the kind of what leaves a device
# struct sockaddr_ll of no device: packet(7)
_EVERY_DEVICE = struct.pack("=HHiHBB8x", socket.AF_PACKET, socket.htons(_ETH_P_ALL), 0, 0, 0, 0)
_TIMESPEC = struct.Struct("@qq")
# struct tpacket_auxdata: status, length on the wire, length that was kept, offsets, VLAN
_AUXDATA = struct.Struct("@IIIHHHH")
_ANCILLARY = socket.CMSG_SPACE(_TIMESPEC.size) + socket.CMSG_SPACE(_AUXDATA.size)

# Devices for IP in IP have no MAC header; what they carry gets an empty one, as on lo.
_ARPHRD_TUNNEL = 768
_NO_MAC = bytes(12) + b"\x08\x00"

# linux/filter.h
INSTRUCTION = struct.Struct("=HBBI")
RETURN = 0x06

# The longest IP packet behind an Ethernet header.
WHOLE = 14 + 65535
# Stamping begins to some milliseconds after it is asked for, from a work queue of the kernel.
_PATIENCE_S = 1.0


class Frame(msgspec.Struct, frozen=True):
    """What a socket saw: `length` bytes on `device`, of which `data` was kept."""

    data: bytes
    length: int
    device: str
    kind: int  # sll_pkttype
    t_ns: int  # wall clock

    @property
    def direction(self) -> Literal["in", "out"]:
        return "out" if self.kind == OUTGOING else "in"

    @property
    def stranger(self) -> bool:
        """Whether it is addressed to another MAC."""
        return self.kind == _PACKET_OTHERHOST


class Tap:
    """A socket in the calling thread's namespace that keeps what `program` says.

    Drops are counted by the kernel where `buffer` bytes do not suffice; memory is used only as
    packets come.  OSError if there is no such device, or no right to see packets.
    """

    def __init__(self, program: bytes, buffer: int, device: str | None = None) -> None:
        self._socket = socket.socket(
            socket.AF_PACKET,
            socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK,
        )
        try:
            attach(self._socket, program)
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
            self._socket.setsockopt(_SOL_PACKET, _PACKET_AUXDATA, 1)
            # Without CAP_NET_ADMIN outside the namespace the default size has to do.
            with contextlib.suppress(PermissionError):
                self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, buffer)
            # Not before the filter is there: it would take in everybody's frames.
            if device:
                self._socket.bind((device, _ETH_P_ALL))
            else:
                bind(self._socket.fileno(), _EVERY_DEVICE)
        except BaseException:
            self._socket.close()
            raise
        self._lost = 0

    def fileno(self) -> int:
        return self._socket.fileno()

    def read(self) -> Frame | None:
        """The next frame, or None if none waits."""
        try:
            data, ancillary, _, address = self._socket.recvmsg(WHOLE, _ANCILLARY)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno == errno.ENETDOWN:  # told once, of a device that was bound to
                return None
            raise
        device, _, kind, hardware = address[:4]
        t_ns, length = 0, len(data)
        for level, what, told in ancillary:
            if level == socket.SOL_SOCKET and what == _SO_TIMESTAMPNS:
                t_ns = _stamp(told)
            elif level == _SOL_PACKET and what == _PACKET_AUXDATA:
                length = _AUXDATA.unpack_from(told)[1]
        if hardware == _ARPHRD_TUNNEL:
            data, length = _NO_MAC + data, length + len(_NO_MAC)
        return Frame(data, length, device, kind, t_ns)

    def forget(self) -> None:
        """Throw away what waits: what came before the filter was there, or is not wanted."""
        while self.read() is not None:
            pass

    @property
    def lost(self) -> int:
        """How many frames did not fit the buffer until now."""
        # The kernel starts anew with each look.
        _, lost = struct.unpack("=II", self._socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))
        self._lost += lost
        return self._lost

    def close(self) -> None:
        self._socket.close()


def close_all(taps: Iterable[Tap]) -> None:
    """Close many at once: the kernel waits for a grace period in each, 8 to 16 ms."""
    closing = [threading.Thread(target=tap.close) for tap in taps]
    for thread in closing:
        thread.start()
    for thread in closing:
        thread.join()


def await_stamps() -> bool:
    """Wait until the kernel stamps arrivals; False if that could not be seen on `lo` here.

    Until then a frame gets the time at which it is read.  It goes on for as long as there is a
    socket that asks for it, as each tap does.
    """
    deadline = time.monotonic() + _PATIENCE_S
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as bird:
        bird.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        bird.settimeout(_PATIENCE_S)
        try:
            bird.bind(("127.0.0.1", 0))
            while time.monotonic() < deadline:
                bird.sendto(b"", bird.getsockname())
                before = time.clock_gettime_ns(time.CLOCK_REALTIME)
                _, ancillary, _, _ = bird.recvmsg(1, _ANCILLARY)
                if any(_stamp(data) < before for _, _, data in ancillary):
                    return True
        except OSError:  # lo is down, or a rule drops it
            return False
    return False


def _stamp(data: bytes) -> int:
    seconds, nanoseconds = _TIMESPEC.unpack_from(data)
    return int(seconds * 1_000_000_000 + nanoseconds)


def keep_all(snaplen: int) -> bytes:
    """A program that keeps that many bytes of every frame."""
    return INSTRUCTION.pack(RETURN, 0, 0, snaplen)


def attach(tap: socket.socket, program: bytes) -> None:
    """Have the kernel drop what the program does not keep, before it costs anybody time."""
    code = ctypes.create_string_buffer(program, len(program))
    count = len(program) // INSTRUCTION.size
    tap.setsockopt(
        socket.SOL_SOCKET,
        _SO_ATTACH_FILTER,
        struct.pack("@HP", count, ctypes.addressof(code)),
    )
