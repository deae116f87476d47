"""Socket filters: classic BPF programs that keep frames with certain values at certain places.

Source: linux/filter.h, Documentation/networking/filter.rst.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from netlab.kernel.packet_sockets import INSTRUCTION, RETURN

_LOAD = {4: 0x20, 2: 0x28, 1: 0x30}  # from an offset into the frame
_SKIP_UNLESS_EQUAL, _SKIP_UNLESS_ANY_BIT = 0x15, 0x45


class Test(NamedTuple):
    """A comparison of `size` bytes at an offset into the frame."""

    offset: int
    size: int
    jump: int
    value: int

    @property
    def end(self) -> int:
        """Where the bytes end."""
        return self.offset + self.size

    @property
    def is_equality(self) -> bool:
        """Whether they are to be the value, and not to have one of its bits."""
        return self.jump == _SKIP_UNLESS_EQUAL


def equal(offset: int, size: int, value: int) -> Test:
    """Whether these bytes are `value`."""
    return Test(offset, size, _SKIP_UNLESS_EQUAL, value)


def any_bit(offset: int, size: int, bits: int) -> Test:
    """Whether any of `bits` is set in these bytes."""
    return Test(offset, size, _SKIP_UNLESS_ANY_BIT, bits)


def program(ways: Sequence[Sequence[Test]], longest: int) -> bytes:
    """A program that keeps what passes all tests of one of the ways, up to `longest` bytes.

    A load from behind the end of a frame ends the program, so that those ways come first that need
    the least of it.
    """
    code = b""
    for way in sorted(ways, key=lambda tests: max(each.end for each in tests)):
        for passed, test in enumerate(way):
            code += INSTRUCTION.pack(_LOAD[test.size], 0, 0, test.offset)
            # Over the other tests, two instructions each, and over the return.
            behind = 2 * (len(way) - passed - 1) + 1
            code += INSTRUCTION.pack(test.jump, 0, behind, test.value)
        code += INSTRUCTION.pack(RETURN, 0, 0, longest)
    return code + INSTRUCTION.pack(RETURN, 0, 0, 0)
