"""BPF without a compiler: an assembler for a few instructions, maps, and raw tracepoints.

A program at a raw tracepoint may be typed: it knows what the tracepoint's arguments are and reads
the kernel's structures as C does, where others call a helper to copy each piece.  It needs numbers
of types, which a program of its own asks the kernel for.

A program is attached by a descriptor and goes with it: nothing is left by a process that is killed.

Source: linux/bpf.h, RFC 9669 (the instruction set), kernel/bpf/ringbuf.c (records of a ring).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
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
_MAP_CREATE, _MAP_LOOKUP, _MAP_UPDATE, _PROG_LOAD, _PROG_RUN = 0, 1, 2, 5, 10
_RAW_TRACEPOINT_OPEN, _MAP_FREEZE = 17, 22
_MAP_TYPE_ARRAY, _MAP_TYPE_RINGBUF = 2, 27
_PROG_TYPE_RAW_TRACEPOINT, _PROG_TYPE_TRACING, _PROG_TYPE_SYSCALL = 17, 26, 31
_TRACE_RAW_TRACEPOINT = 23  # enum bpf_attach_type
_F_RDONLY_PROG = 1 << 7
_F_SLEEPABLE = 1 << 4
_PSEUDO_MAP_FD, _PSEUDO_MAP_VALUE, _PSEUDO_KERNEL_FUNCTION = 1, 2, 2
# Of union bpf_attr for a program to be loaded: type, instructions, licence, log; flags, name; what
# it is attached to, and the number of that's type.
_TO_LOAD = struct.Struct("=IIQQIIQII16sIIIIQIIQII")
# For one to be run: program; size and address of its context.
_TO_RUN = struct.Struct("=I36xI4xQ8x")
_TYPE_NAME = 64
_ATTEMPTS = 5  # as many as libbpf's
_BUSY, _DISCARDED = 1 << 31, 1 << 30
_LOG_BYTES = 1 << 16

# Helper functions.
KTIME_GET_NS = 5
PROBE_READ_KERNEL = 113
RINGBUF_RESERVE, RINGBUF_SUBMIT = 131, 132
SNPRINTF = 165
_FIND_TYPE = 167
DYNPTR_READ = 201

# enum BTF_KIND
STRUCTURE, TYPEDEF, FUNCTION = 4, 8, 12

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

    def shift_right(self, to: int, bits: int) -> None:
        self._emit(0x77, to, immediate=bits)

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

    def jump_unless_word(self, register: int, value: int, label: str) -> None:
        """Jump if its lower four bytes differ from a value without sign."""
        self._jump(0x56, label, register, value - ((value & 1 << 31) << 1))

    def jump_if_any_bit(self, register: int, bits: int, label: str) -> None:
        """Jump if its lower four bytes have one of those bits."""
        self._jump(0x46, label, register, bits - ((bits & 1 << 31) << 1))

    def jump_if_more(self, register: int, value: int, label: str) -> None:
        """Jump if it is more than a value, without signs."""
        self._jump(0x25, label, register, value)

    def jump_unless_more(self, register: int, value: int, label: str) -> None:
        """Jump if it is a value or less, without signs."""
        self._jump(0xB5, label, register, value)

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

    def call_kernel(self, function: int) -> None:
        """Call a function of the kernel's that is no helper, by the number of its type."""
        self._emit(0x85, 0, _PSEUDO_KERNEL_FUNCTION, immediate=function)

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
    return _load(code, _PROG_TYPE_RAW_TRACEPOINT)


def load_typed(code: bytes, tracepoint: str) -> int:
    """The same for a program that knows the types of a tracepoint's arguments; or KeyError."""
    number = type_number(f"btf_trace_{tracepoint}", TYPEDEF)
    return _load(code, _PROG_TYPE_TRACING, attach_type=_TRACE_RAW_TRACEPOINT, attach_to=number)


def _load(code: bytes, kind: int, flags: int = 0, attach_type: int = 0, attach_to: int = 0) -> int:
    # Helpers that read kernel memory are for programs under the GPL.
    licence = ctypes.create_string_buffer(b"GPL")
    text = ctypes.create_string_buffer(code, len(code))

    def loaded(log_size: int = 0, log_at: int = 0) -> int:
        begin = kind, len(code) // 8, ctypes.addressof(text), ctypes.addressof(licence)
        log_level = int(bool(log_size))
        rest = 0, flags, b"", 0, attach_type, 0, 0, 0, 0, 0, 0, 0, attach_to
        return _bpf(_PROG_LOAD, _TO_LOAD.pack(*begin, log_level, log_size, log_at, *rest))

    try:
        # The verifier gives up when the thread has something else to do, such as a signal.
        for _ in range(_ATTEMPTS - 1):
            with contextlib.suppress(BlockingIOError):
                return loaded()
        return loaded()
    except PermissionError:
        raise
    except OSError as error:
        # What the verifier says costs time, so it is asked only then.
        log = ctypes.create_string_buffer(_LOG_BYTES)
        with contextlib.suppress(OSError):
            os.close(loaded(_LOG_BYTES, ctypes.addressof(log)))
        raise Refused(error, log.value.decode(errors="replace")) from error


@functools.cache
def type_number(name: str, kind: int) -> int:
    """The number of one of the kernel's types (linux/btf.h).

    Raises KeyError if it has none of that name, OSError without privilege or before Linux 5.14.
    """
    code = Assembler()
    code.move(6, 1)
    # The helper wants memory that the verifier knows the size of.
    for at in range(0, _TYPE_NAME, 8):
        code.load(DOUBLE, 1, 6, at)
        code.store(DOUBLE, 10, at - _TYPE_NAME, 1)
    code.move(1, 10)
    code.add(1, -_TYPE_NAME)
    code.set(2, _TYPE_NAME)
    code.set(3, kind)
    code.set(4, 0)
    code.call(_FIND_TYPE)
    code.store(DOUBLE, 6, _TYPE_NAME, 0)
    code.set(0, 0)
    code.exit()
    program = _load(code.assemble(), _PROG_TYPE_SYSCALL, _F_SLEEPABLE)
    try:
        size = _TYPE_NAME + 8
        context = ctypes.create_string_buffer(name.encode(), size)
        _bpf(_PROG_RUN, _TO_RUN.pack(program, size, ctypes.addressof(context)))
    finally:
        os.close(program)
    (found,) = struct.unpack_from("=q", context.raw, _TYPE_NAME)
    # The upper half is a descriptor of the module that the type is of.
    if not 0 < found < 1 << 32:
        raise KeyError(name)
    return int(found)


def attach(tracepoint: str, program: int) -> int:
    """Run a program at a raw tracepoint until the descriptor that this returns is closed."""
    name = ctypes.create_string_buffer(tracepoint.encode())
    return _bpf(_RAW_TRACEPOINT_OPEN, struct.pack("=QI", ctypes.addressof(name), program))


def attach_typed(program: int) -> int:
    """The same for a program that was loaded for a tracepoint."""
    return _bpf(_RAW_TRACEPOINT_OPEN, struct.pack("=QI", 0, program))


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
