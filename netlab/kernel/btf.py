"""What a kernel says of its own structures: offsets of members, names of enum values.

BTF stands under /sys/kernel/btf/vmlinux: a section of types, one after the other and of different
lengths, and a section of their names.  A walk over all types takes Python 50 ms; so a type is found
by its name's offset, and only the way to a nameless member's type is walked.

Source: Documentation/bpf/btf.rst, linux/btf.h.
"""

from __future__ import annotations

import functools
import struct
from array import array
from collections.abc import Iterator

VMLINUX = "/sys/kernel/btf/vmlinux"

_MAGIC = 0xEB9F
_HEADER = struct.Struct("=HBBIIIII")
_STRUCT, _UNION, _ENUM, _TYPEDEF = 4, 5, 6, 8
# Words behind the three that all types begin with: so many, and so many for each of its parts.
_FIXED = {1: 1, 3: 3, 14: 1, 17: 1}
_EACH = {4: 3, 5: 3, 6: 2, 13: 2, 15: 3, 19: 3}


class Btf:
    """The types of one kernel.  Raises ValueError for data that is no BTF of this machine."""

    def __init__(self, data: bytes) -> None:
        magic, _, _, length, types, type_bytes, names, name_bytes = _HEADER.unpack_from(data)
        if magic != _MAGIC:
            raise ValueError("not the BTF of a kernel of this machine")
        self._bytes = data[length + types : length + types + type_bytes]
        self._words = array("I", self._bytes)
        self._names = data[length + names : length + names + name_bytes]
        self._walked = [0, 0]  # where types begin, by id; there is no type 0

    def offset(self, structure: str, *path: str) -> int:
        """Bytes from the start of a structure to a member, through members that are structures.

        Members of nameless structures inside count as its own.  Raises KeyError.
        """
        for at in self._find(structure, _STRUCT):
            found = self._path(at, path)
            if found is not None:
                return found
        raise KeyError(".".join((structure, *path)))

    def enum(self, name: str) -> dict[int, str]:
        """Names of an enum's values.  Raises KeyError."""
        for at in self._find(name, _ENUM):
            parts = range(at + 3, at + 3 + 2 * self._count(at), 2)
            return {self._words[part + 1]: self._name(self._words[part]) for part in parts}
        raise KeyError(name)

    def has_enum(self, name: str) -> bool:
        return any(True for _ in self._find(name, _ENUM))

    def _find(self, name: str, kind: int) -> Iterator[int]:
        """Where types of that name and kind seem to begin, in words."""
        number = self._names.find(b"\0" + name.encode() + b"\0") + 1
        pattern = struct.pack("=I", number)
        at = self._bytes.find(pattern) if number else -1
        while at >= 0:
            if at % 4 == 0 and self._kind(at // 4) == kind:
                yield at // 4
            at = self._bytes.find(pattern, at + 1)

    def _path(self, at: int, path: tuple[str, ...]) -> int | None:
        """Bytes to the end of a path, which begins in the structure at `at`."""
        wide = self._words[at + 1] >> 31  # offsets with the sizes of bit fields above them
        for part in range(at + 3, at + 3 + 3 * self._count(at), 3):
            number, kind, bits = self._words[part : part + 3]
            name = self._name(number)
            here = (bits & 0xFFFFFF if wide else bits) // 8
            if name == path[0] and len(path) == 1:
                return here
            if name and name != path[0]:
                continue
            inside = self._structure(kind)
            rest = path[1:] if name else path
            found = self._path(inside, rest) if inside else None
            if found is not None:
                return here + found
        return None

    def _structure(self, number: int) -> int | None:
        """Where the structure or union with that id begins, behind typedefs."""
        at = self._position(number)
        while self._kind(at) == _TYPEDEF:
            at = self._position(self._words[at + 2])
        return at if self._kind(at) in (_STRUCT, _UNION) else None

    def _position(self, number: int) -> int:
        """Where the type with that id begins."""
        walked, words = self._walked, self._words
        at = walked[-1]
        while len(walked) <= number:
            info = words[at + 1]
            kind = info >> 24 & 31
            at += 3 + _FIXED.get(kind, 0) + _EACH.get(kind, 0) * (info & 0xFFFF)
            walked.append(at)
        return walked[number]

    def _kind(self, at: int) -> int:
        return self._words[at + 1] >> 24 & 31

    def _count(self, at: int) -> int:
        return self._words[at + 1] & 0xFFFF

    def _name(self, offset: int) -> str:
        return self._names[offset : self._names.find(b"\0", offset)].decode(errors="replace")


@functools.cache
def vmlinux() -> Btf:
    """That of the kernel that runs.  Raises OSError if it was built without."""
    with open(VMLINUX, "rb") as file:
        return Btf(file.read())
