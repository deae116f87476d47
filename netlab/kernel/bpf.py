"""BPF without a compiler: an assembler for a few instructions, maps, and raw tracepoints.

A program is attached by a descriptor and goes with it: nothing is left by a process that is killed.

Source: linux/bpf.h, RFC 9669 (the instruction set), kernel/bpf/ringbuf.c (records of a ring).
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import platform
import struct
from collections.abc import Iterator

_SYSCALL = {
    "x86_64": 321,
    "aarch64": 280,
    "riscv64": 280,
    "loongarch64": 280,
    "ppc64le": 361,
    "s390x": 351,
}
_MAP_CREATE, _MAP_LOOKUP, _MAP_UPDATE, _PROG_LOAD = 0, 1, 2, 5
_RAW_TRACEPOINT_OPEN, _MAP_FREEZE = 17, 22
_MAP_TYPE_ARRAY, _MAP_TYPE_RINGBUF = 2, 27
_PROG_TYPE_RAW_TRACEPOINT = 17
_F_RDONLY_PROG = 1 << 7
_PSEUDO_MAP_FD, _PSEUDO_MAP_VALUE = 1, 2
_BUSY, _DISCARDED = 1 << 31, 1 << 30
_LOG_BYTES = 1 << 16

# Helper functions.
KTIME_GET_NS = 5
PROBE_READ_KERNEL = 113
RINGBUF_RESERVE, RINGBUF_SUBMIT = 131, 132
SNPRINTF = 165

# Whether a record wakes the reader of a ring.
DO_NOT_WAKE, WAKE = 1, 2

# Sizes of loads and stores.
BYTE, HALF, WORD, DOUBLE = 0x10, 0x08, 0x00, 0x18

_libc = ctypes.CDLL(None, use_errno=True)


class Refused(OSError):
    """The kernel refused a program; `log` is what its verifier said."""

    def __init__(self, error: OSError, log: str) -> None:
        super().__init__(error.errno, error.strerror)
        self.log = log


class Assembler:
    """Instructions, one method each; jumps go forward to labels.

    Registers are numbers: 0 the result, 1-5 arguments, 6-9 kept over calls, 10 the frame.
    """

    def __init__(self) -> None:
        self._code: list[tuple[int, int, int, int, int]] = []
        self._jumps: list[tuple[int, str]] = []
        self._labels: dict[str, int] = {}

    def move(self, to: int, source: int) -> None:
        self._emit(0xBF, to, source)

    def set(self, to: int, value: int) -> None:
        self._emit(0xB7, to, immediate=value)

    def add(self, to: int, value: int) -> None:
        self._emit(0x07, to, immediate=value)

    def add_register(self, to: int, source: int) -> None:
        self._emit(0x0F, to, source)

    def mask(self, to: int, value: int) -> None:
        """Keep those bits alone."""
        self._emit(0x57, to, immediate=value)

    def load(self, size: int, to: int, source: int, offset: int) -> None:
        self._emit(0x61 | size, to, source, offset)

    def store(self, size: int, to: int, offset: int, source: int) -> None:
        self._emit(0x63 | size, to, source, offset)

    def count(self, to: int, offset: int, source: int) -> None:
        """Add a register to eight bytes of memory, atomically."""
        self._emit(0xDB, to, source, offset)

    def jump(self, label: str) -> None:
        self._jump(0x05, label)

    def jump_if(self, register: int, value: int, label: str) -> None:
        """Jump if it equals a value."""
        self._jump(0x15, label, register, value)

    def jump_unless(self, register: int, value: int, label: str) -> None:
        """Jump if it differs from a value."""
        self._jump(0x55, label, register, value)

    def label(self, name: str) -> None:
        self._labels[name] = len(self._code)

    def map(self, to: int, descriptor: int) -> None:
        """A map for a helper's argument."""
        self._wide(to, _PSEUDO_MAP_FD, descriptor)

    def map_value(self, to: int, descriptor: int) -> None:
        """The address of an array map's first element."""
        self._wide(to, _PSEUDO_MAP_VALUE, descriptor)

    def call(self, helper: int) -> None:
        self._emit(0x85, 0, immediate=helper)

    def exit(self) -> None:
        self._emit(0x95, 0)

    def assemble(self) -> bytes:
        """The program's bytes.  Raises KeyError for a label that is nowhere."""
        code = list(self._code)
        for at, label in self._jumps:
            operation, to, source, _, immediate = code[at]
            code[at] = operation, to, source, self._labels[label] - at - 1, immediate
        return b"".join(
            struct.pack("=BBhi", operation, source << 4 | to, offset, immediate)
            for operation, to, source, offset, immediate in code
        )

    def _emit(
        self, operation: int, to: int, source: int = 0, offset: int = 0, immediate: int = 0
    ) -> None:
        self._code.append((operation, to, source, offset, immediate))

    def _wide(self, to: int, kind: int, descriptor: int) -> None:
        self._emit(0x18, to, kind, immediate=descriptor)
        self._emit(0, 0)

    def _jump(self, operation: int, label: str, register: int = 0, value: int = 0) -> None:
        self._jumps.append((len(self._code), label))
        self._emit(operation, register, immediate=value)


def _bpf(command: int, attributes: bytes) -> int:
    """bpf(2); raises OSError."""
    number = _SYSCALL.get(platform.machine())
    if number is None:
        raise OSError(f"the number of bpf(2) on {platform.machine()} is not known")
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    result: int = _libc.syscall(number, command, buffer, len(attributes))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def _create(kind: int, key: int, value: int, entries: int, flags: int = 0) -> int:
    return _bpf(_MAP_CREATE, struct.pack("=IIIII", kind, key, value, entries, flags))


def constant(value: bytes) -> int:
    """The descriptor of a map of one element that never changes, such as a format string."""
    descriptor = _create(_MAP_TYPE_ARRAY, 4, len(value), 1, _F_RDONLY_PROG)
    key, buffer = ctypes.c_uint32(0), ctypes.create_string_buffer(value, len(value))
    addresses = ctypes.addressof(key), ctypes.addressof(buffer)
    _bpf(_MAP_UPDATE, struct.pack("=IxxxxQQQ", descriptor, *addresses, 0))
    _bpf(_MAP_FREEZE, struct.pack("=I", descriptor))
    return descriptor


def counter() -> int:
    """The descriptor of a map of one number, which programs count in."""
    return _create(_MAP_TYPE_ARRAY, 4, 8, 1)


def counted(descriptor: int) -> int:
    """What stands in a counter."""
    key, value = ctypes.c_uint32(0), ctypes.c_uint64(0)
    addresses = ctypes.addressof(key), ctypes.addressof(value)
    _bpf(_MAP_LOOKUP, struct.pack("=IxxxxQQQ", descriptor, *addresses, 0))
    return value.value


def load(code: bytes) -> int:
    """Have the kernel verify and take a program for raw tracepoints; its descriptor.

    Raises PermissionError without CAP_BPF and CAP_PERFMON, or Refused.
    """
    # Helpers that read kernel memory are for programs under the GPL.
    licence = ctypes.create_string_buffer(b"GPL")
    text = ctypes.create_string_buffer(code, len(code))
    head = struct.pack(
        "=IIQQ",
        _PROG_TYPE_RAW_TRACEPOINT,
        len(code) // 8,
        ctypes.addressof(text),
        ctypes.addressof(licence),
    )
    try:
        return _bpf(_PROG_LOAD, head)
    except PermissionError:
        raise
    except OSError as error:
        # What the verifier says costs time, so it is asked only then.
        log = ctypes.create_string_buffer(_LOG_BYTES)
        with contextlib.suppress(OSError):
            os.close(
                _bpf(_PROG_LOAD, head + struct.pack("=IIQ", 1, _LOG_BYTES, ctypes.addressof(log)))
            )
        raise Refused(error, log.value.decode(errors="replace")) from error


def attach(tracepoint: str, program: int) -> int:
    """Run a program at a raw tracepoint until the descriptor that this returns is closed."""
    name = ctypes.create_string_buffer(tracepoint.encode())
    return _bpf(_RAW_TRACEPOINT_OPEN, struct.pack("=QI", ctypes.addressof(name), program))


class Ring:
    """A ring buffer that programs write records into, and that is read here.

    `size`: bytes, a power of two and of whole pages.
    """

    def __init__(self, size: int) -> None:
        self.descriptor = _create(_MAP_TYPE_RINGBUF, 0, 0, size)
        self._size = size
        page = mmap.PAGESIZE
        self._consumed = mmap.mmap(self.descriptor, page)
        # The data is mapped twice in a row, so that no record is broken.
        self._produced = mmap.mmap(
            self.descriptor, page + 2 * size, prot=mmap.PROT_READ, offset=page
        )
        self._position = 0

    def fileno(self) -> int:
        """Readable while a record waits."""
        return self.descriptor

    def read(self) -> Iterator[bytes]:
        """The records that are there, oldest first."""
        page = mmap.PAGESIZE
        while self._position < struct.unpack_from("=Q", self._produced)[0]:
            at = page + self._position % self._size
            (head,) = struct.unpack_from("=I", self._produced, at)
            if head & _BUSY:
                return
            length = head & ~_DISCARDED
            record = None if head & _DISCARDED else self._produced[at + 8 : at + 8 + length]
            self._position += 8 + (length + 7 & ~7)
            self._consumed[:8] = struct.pack("=Q", self._position)
            if record is not None:
                yield record

    def close(self) -> None:
        self._consumed.close()
        self._produced.close()
        os.close(self.descriptor)
