"""What a trace's own rules compare: all of the mark, and nothing behind it."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from netlab.trace.family import IPV4, IPV6
from netlab.trace.mark import Mark, bytes_at

_COMPARISON = re.compile(r"@th,(\d+),(\d+) (?:& (0x\w+) )?== (0x\w+)")


def holds(matches: str, data: bytes) -> bool:
    """As nftables would have it; what reaches behind the end does not hold."""
    for place, length, mask, value in _COMPARISON.findall(matches):
        first, last = int(place) // 8, (int(place) + int(length)) // 8
        if last > len(data):
            return False
        found = int.from_bytes(data[first:last], "big")
        if found & int(mask or "-1", 0) != int(value, 0):
            return False
    return True


@given(
    st.integers(1, 40).map(lambda half: 2 * half),
    st.sampled_from([4, 8]).flatmap(lambda size: st.binary(min_size=size, max_size=size)),
    st.integers(0, 7),
    st.binary(min_size=48, max_size=48),
)
def test_a_value_is_compared_byte_by_byte(offset: int, value: bytes, at: int, other: bytes) -> None:
    matches = bytes_at(offset, value, "udp dport 1")
    packet = other * 2
    packet = packet[:offset] + value
    assert holds(matches, packet)
    assert "udp dport 1" in matches
    wrong = bytearray(packet)
    wrong[offset + at % len(value)] ^= 1
    assert not holds(matches, bytes(wrong))


def test_what_comes_first_is_what_the_kernel_is_quick_at() -> None:
    for family in (IPV4, IPV6):
        for protocol in ("tcp", "udp", "icmp"):
            mark = Mark.random(protocol, family)  # type: ignore[arg-type]
            for condition in (*mark.conditions(), *mark.tunnelled_conditions()):
                first = _COMPARISON.match(condition)
                assert first is not None
                place, length = int(first[1]) // 8, int(first[2]) // 8
                assert length in (2, 4)
                assert place % length == 0
