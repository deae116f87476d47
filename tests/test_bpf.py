"""The assembler for BPF and the reader of BTF, without a kernel."""

from __future__ import annotations

import struct

import pytest

from netlab.kernel import bpf
from netlab.kernel.btf import Btf
from netlab.kernel.skb_events import _whole


def assembled(code: bpf.Assembler) -> list[str]:
    """One instruction in a line, as hexadecimal digits."""
    program = code.assemble()
    return [program[at : at + 8].hex(" ") for at in range(0, len(program), 8)]


def test_instructions_are_those_of_the_standard() -> None:
    """RFC 9669: opcode, source and destination, offset, immediate."""
    code = bpf.Assembler()
    code.move(6, 1)
    code.set(2, 384)
    code.add(1, -14)
    code.add_register(8, 1)
    code.load(bpf.DOUBLE, 3, 6, 8)
    code.load(bpf.HALF, 1, 10, -40)
    code.store(bpf.WORD, 7, 24, 1)
    code.count(1, 0, 2)
    code.call(bpf.KTIME_GET_NS)
    code.exit()
    assert assembled(code) == [
        "bf 16 00 00 00 00 00 00",
        "b7 02 00 00 80 01 00 00",
        "07 01 00 00 f2 ff ff ff",
        "0f 18 00 00 00 00 00 00",
        "79 63 08 00 00 00 00 00",
        "69 a1 d8 ff 00 00 00 00",
        "63 17 18 00 00 00 00 00",
        "db 21 00 00 00 00 00 00",
        "85 00 00 00 05 00 00 00",
        "95 00 00 00 00 00 00 00",
    ]


def test_jumps_count_from_behind_themselves_and_maps_take_two_places() -> None:
    code = bpf.Assembler()
    code.jump_unless(1, 7, "other")
    code.map(1, 5)
    code.jump("end")
    code.label("other")
    code.map_value(1, 6)
    code.label("end")
    code.exit()
    assert assembled(code) == [
        "55 01 03 00 07 00 00 00",
        "18 11 00 00 05 00 00 00",
        "00 00 00 00 00 00 00 00",
        "05 00 02 00 00 00 00 00",
        "18 21 00 00 06 00 00 00",
        "00 00 00 00 00 00 00 00",
        "95 00 00 00 00 00 00 00",
    ]


def test_a_jump_to_nowhere_is_an_error() -> None:
    code = bpf.Assembler()
    code.jump("nowhere")
    with pytest.raises(KeyError):
        code.assemble()


# --- BTF -----------------------------------------------------------------------------------------

_INT, _POINTER, _STRUCT, _UNION, _ENUM, _TYPEDEF, _TAG = 1, 2, 4, 5, 6, 8, 17


class Types:
    """A BTF blob, type by type."""

    def __init__(self) -> None:
        self._names = b"\0"
        self._types = b""

    def add(self, kind: int, name: str, size: int, *parts: tuple[object, ...]) -> None:
        """A type; a part begins with a name, or is numbers alone.

        A part of a structure: name, type, bit offset; of an enum: name, value.
        """
        count = len(parts) if kind in (_STRUCT, _UNION, _ENUM) else 0
        self._types += struct.pack("=III", self._name(name), kind << 24 | count, size)
        for part in parts:
            words = [self._name(each) if isinstance(each, str) else each for each in part]
            self._types += struct.pack(f"={len(words)}I", *words)

    def blob(self) -> bytes:
        sizes = 0, len(self._types), len(self._types), len(self._names)
        return struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, *sizes) + self._types + self._names

    def _name(self, name: str) -> int:
        if not name:
            return 0
        at = self._names.find(b"\0" + name.encode() + b"\0")
        if at < 0:
            at = len(self._names) - 1
            self._names += name.encode() + b"\0"
        return at + 1


def small_kernel() -> Types:
    types = Types()
    types.add(_INT, "int", 4, (32,))  # 1
    types.add(_POINTER, "", 3)  # 2
    types.add(_STRUCT, "net", 64, ("count", 1, 0), ("ns", 4, 128))  # 3
    types.add(_STRUCT, "ns_common", 16, ("ops", 2, 0), ("inum", 1, 64))  # 4
    types.add(_TAG, "user", 1, (0,))  # 5
    types.add(_TYPEDEF, "possible_net_t", 7)  # 6
    types.add(_STRUCT, "", 8, ("net", 2, 0))  # 7
    types.add(_UNION, "", 8, ("dev", 2, 0), ("dev_scratch", 1, 0))  # 8
    types.add(_STRUCT, "", 16, ("next", 2, 0), ("", 8, 64))  # 9
    types.add(_STRUCT, "sk_buff", 48, ("", 9, 64), ("len", 1, 192), ("nd_net", 6, 256))  # 10
    types.add(_ENUM, "reason", 4, ("NONE", 0), ("NO_SOCKET", 3))  # 11
    return types


def test_members_are_found_through_nameless_and_named_structures() -> None:
    types = Btf(small_kernel().blob())
    assert types.offset("sk_buff", "len") == 24
    assert types.offset("sk_buff", "dev") == 16
    assert types.offset("sk_buff", "nd_net", "net") == 32
    assert types.offset("net", "ns", "inum") == 24


def test_what_is_not_there_is_named() -> None:
    types = Btf(small_kernel().blob())
    with pytest.raises(KeyError, match=r"sk_buff\.mark"):
        types.offset("sk_buff", "mark")
    with pytest.raises(KeyError, match="sock"):
        types.offset("sock", "len")
    assert not types.has_enum("other")


def test_values_of_an_enum_have_names() -> None:
    assert Btf(small_kernel().blob()).enum("reason") == {0: "NONE", 3: "NO_SOCKET"}


def test_data_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="BTF"):
        Btf(bytes(64))


# --- frames --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "packet"),
    [
        ("0800", bytes([0x45, 0, 0, 24]) + bytes(16) + b"body"),
        ("86dd", bytes([0x60, 0, 0, 0, 0, 4]) + bytes(34) + b"body"),
    ],
)
def test_memory_behind_a_packet_does_not_count(kind: str, packet: bytes) -> None:
    """It may hold a packet of before, which would be taken for this one."""
    found = _whole(bytes(14) + packet + b"stale")
    assert found == bytes(12) + bytes.fromhex(kind) + packet
