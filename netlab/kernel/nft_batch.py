"""Transactions of many anonymous sets, sent so that the kernel has less to do for them.

libnftables calls an anonymous set `__map%d` and leaves it to the kernel to find a free number, for
which the kernel reads the names of all sets of the table.  It asks for the set by that template
again to fill it, in vain, and goes by its id then.  And when a rule takes the set, the kernel walks
through everything that the transaction has done so far.  All of this grows with the square of the
number of sets.  So sets get the number that the kernel would have found, are filled by id alone,
and where the tables are not there yet, the transaction comes in parts: the first makes the tables
dormant, the last wakes them all at once.  What is there afterwards is the same.

libnftables has no place for that, so its calls of sendmsg(2) are redirected, in the table through
which a shared library finds functions of others: only in a process that does nothing else.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import mmap
import os
import re
import select
import socket
import struct
from collections import Counter
from collections.abc import Iterator
from typing import Any

from netlab.kernel.netlink import attribute

_BATCH_BEGIN, _BATCH_END = 16, 17
_NEWTABLE, _DELTABLE, _NEWRULE, _NEWSET, _NEWSETELEM = (10 << 8 | kind for kind in (0, 2, 6, 9, 12))

# Kinds of attributes; in all these messages the first kind is the name of the table.
_TABLE, _TABLE_FLAGS, _SET_NAME = 1, 2, 2
_AWAKE, _DORMANT = attribute(_TABLE_FLAGS, bytes(4)), attribute(_TABLE_FLAGS, b"\0\0\0\1")

_START = struct.Struct("=IH")  # length and kind, of a header of 16 bytes
_FAMILY = 16
_BODY = 20  # where attributes begin
_ATTRIBUTE = struct.Struct("=HH")
_KIND = 0x3FFF  # the other bits of a kind are flags

_TEMPLATE = re.compile(rb"__(?:map|set)%d\0")

_FEW = 600  # mentions of templates, three for each set: up to here there is little to gain
_PART = 2_000  # messages


def parts(batch: bytes, new: bool) -> list[bytes]:
    """Batches to be sent one after the other, which together do what a batch of libnftables does.

    One, or several if `new`: its tables are not there before.  None if there is little to gain, or
    something in the batch that is not known here.
    """
    if len(_TEMPLATE.findall(batch)) <= _FEW:
        return []
    begin, *messages, end = _messages(batch)
    if _kind(begin) != _BATCH_BEGIN or _kind(end) != _BATCH_END:
        return []
    part: list[bytes] = []
    bodies = [part]
    numbers: dict[bytes, Counter[bytes]] = {}  # the next one, by table and template
    waking: dict[bytes, bytes] = {}
    unused = 0  # anonymous sets that no rule has taken yet: a part must not end so
    for message in messages:
        if new and len(part) >= _PART and not unused:
            part = []
            bodies.append(part)
        kind = _kind(message)
        if kind == _NEWTABLE and new:
            found = _attributes(message)
            if found.get(_TABLE_FLAGS, _AWAKE) != _AWAKE:
                return []
            name = found[_TABLE]
            waking[_table(message)] = _with(message, {_TABLE: name, _TABLE_FLAGS: _AWAKE})
            message = _with(message, found | {_TABLE_FLAGS: _DORMANT})
        elif kind == _DELTABLE:
            numbers[_table(message)] = Counter()
            waking.pop(_table(message), None)
        elif kind == _NEWRULE:
            unused -= len(_TEMPLATE.findall(message))
        elif kind in (_NEWSET, _NEWSETELEM) and _TEMPLATE.search(message):
            found = _attributes(message)
            template = _text(found.pop(_SET_NAME))
            if b"%" not in template:
                return []
            if kind == _NEWSET:
                taken = numbers.get(_table(message))
                if taken is None:  # the table was there before, and some of its numbers are taken
                    return []
                unused += 1
                name = template.replace(b"%d", b"%d" % taken[template])
                taken[template] += 1
                found[_SET_NAME] = attribute(_SET_NAME, name + b"\0")
            message = _with(message, found)
        part.append(message)
    if new:
        bodies.append(list(waking.values()))
    # the first may say for which state of the rules it was made; the others meet a later one
    begins = [begin] + [_with(begin, {})] * (len(bodies) - 1)
    return [b"".join((begin, *body, end)) for begin, body in zip(begins, bodies, strict=True)]


def _messages(batch: bytes) -> Iterator[bytes]:
    start = 0
    while start < len(batch):
        length, _ = _START.unpack_from(batch, start)
        end = start + max(_aligned(length), _BODY)
        yield batch[start:end]
        start = end


def _kind(message: bytes) -> int:
    return int(_START.unpack_from(message)[1])


def _table(message: bytes) -> bytes:
    """Family and name."""
    return message[_FAMILY : _FAMILY + 1] + _text(_attributes(message)[_TABLE])


def _text(attribute: bytes) -> bytes:
    """A string in an attribute; behind it the library may leave whatever was in memory."""
    return attribute[_ATTRIBUTE.size :].partition(b"\0")[0]


def _attributes(message: bytes) -> dict[int, bytes]:
    """By kind, in order, with header and padding."""
    found = {}
    start = _BODY
    while start < len(message):
        length, kind = _ATTRIBUTE.unpack_from(message, start)
        end = start + max(_aligned(length), _ATTRIBUTE.size)
        found[kind & _KIND] = message[start:end]
        start = end
    return found


def _with(message: bytes, attributes: dict[int, bytes]) -> bytes:
    """A message with other attributes."""
    changed = b"".join((message[:_BODY], *attributes.values()))
    return struct.pack("=I", len(changed)) + changed[4:]


def _aligned(length: int) -> int:
    return length + 3 & ~3


class _Vector(ctypes.Structure):
    """struct iovec."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Message(ctypes.Structure):
    """The beginning of struct msghdr."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint32),
        ("vectors", ctypes.POINTER(_Vector)),
        ("count", ctypes.c_size_t),
    )


_libc = ctypes.CDLL(None, use_errno=True)
_PROTOTYPE = ctypes.CFUNCTYPE(
    ctypes.c_ssize_t, ctypes.c_int, ctypes.POINTER(_Message), ctypes.c_int, use_errno=True
)


class Redirection:
    """Where a loaded library finds sendmsg(2)."""

    def __init__(self, address: int) -> None:
        self._address = address
        self._entry = ctypes.c_size_t.from_address(address)
        self._sendmsg = _PROTOTYPE(self._entry.value)
        self._ours: Any = None  # must live as long as it may be called

    def start(self, new: bool) -> None:
        """From now on send what :func:`parts` makes of batches; not if memory stays read-only."""

        def sendmsg(descriptor: int, message: Any, flags: int) -> int:
            try:
                batch = _gathered(message.contents)
                batches = parts(batch, new)
            except Exception:  # an exception would not get through: it sends what there is
                batches = []
            if not batches:
                return int(self._sendmsg(descriptor, message, flags))
            try:
                _send(descriptor, batches)
            except Exception as error:  # the same: say that it failed
                ctypes.set_errno(getattr(error, "errno", None) or errno.EIO)
                return -1
            return len(batch)

        page = self._address & -mmap.PAGESIZE
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        size = ctypes.c_size_t(mmap.PAGESIZE)  # an entry lies in one page
        if _libc.mprotect(ctypes.c_void_p(page), size, protection) == 0:
            self._ours = _PROTOTYPE(sendmsg)
            self._entry.value = _address(self._ours)


def redirection(function: Any) -> Redirection | None:
    """That of the library which a ctypes function belongs to; nothing is changed yet.

    None if it is not found, as with a C library that cannot tell about others, or if the entry
    does not hold the address of sendmsg(2).
    """
    try:
        entries = _entries(_address(function), b"sendmsg")
        expected = _address(_libc.sendmsg)
    except (AttributeError, KeyError, ValueError, struct.error):
        return None
    found = [each for each in entries if ctypes.c_size_t.from_address(each).value == expected]
    return Redirection(found[0]) if len(found) == 1 else None


class _LinkMap(ctypes.Structure):
    """The beginning of struct link_map, <link.h>."""

    _fields_ = (
        ("base", ctypes.c_size_t),
        ("name", ctypes.c_char_p),
        ("dynamic", ctypes.POINTER(ctypes.c_size_t * 2)),
    )


_DL_LINKMAP = 2
# <elf.h>: sizes of the table of relocations for functions, and where things are
_PLTRELSZ, _STRTAB, _SYMTAB, _PLTREL, _JMPREL = 2, 5, 6, 20, 23
_RELA = 7
_RELOCATION = struct.Struct("=QQq")  # of 64-bit machines
_SYMBOL_SIZE = 24


def _entries(inside: int, name: bytes) -> list[int]:
    """Addresses of the entries for a function, in the library that an address belongs to."""
    about, found = (ctypes.c_void_p * 4)(), ctypes.POINTER(_LinkMap)()
    if not _libc.dladdr1(ctypes.c_void_p(inside), about, ctypes.byref(found), _DL_LINKMAP):
        raise KeyError(inside)
    library = found.contents
    tags: dict[int, int] = {}
    for tag, value in map(library.dynamic.__getitem__, itertools.count()):
        if tag == 0:
            break
        tags[tag] = value
    if tags[_PLTREL] != _RELA or ctypes.sizeof(ctypes.c_void_p) != 8:
        raise ValueError
    # on some machines the loader leaves these as the file has them
    at = {
        tag: value if value >= library.base else library.base + value for tag, value in tags.items()
    }
    relocations = ctypes.string_at(at[_JMPREL], tags[_PLTRELSZ])
    entries = []
    for offset, info, _ in _RELOCATION.iter_unpack(relocations):
        symbol = at[_SYMTAB] + (info >> 32) * _SYMBOL_SIZE
        text = at[_STRTAB] + ctypes.c_uint32.from_address(symbol).value
        if ctypes.string_at(text) == name:
            entries.append(library.base + offset)
    return entries


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _gathered(message: _Message) -> bytes:
    vectors = (message.vectors[i] for i in range(message.count))
    return b"".join(ctypes.string_at(vector.base, vector.length) for vector in vectors)


def _send(descriptor: int, batches: list[bytes]) -> None:
    """Send batches until one is complained about; the complaint is left for who reads next."""
    complaints = select.poll()
    complaints.register(descriptor, select.POLLIN)
    with socket.socket(fileno=os.dup(descriptor)) as netlink:
        for batch in batches:
            netlink.sendto(batch, (0, 0))
            if complaints.poll(0):
                break
