"""One spelling for what versions of nft, and its options, print in several."""

from __future__ import annotations

import re

_DURATION = re.compile(r"(?<=timeout )(?:\d+[dhms])+\b")
_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}

# How versions of nft, and its options for numbers, spell the same otherwise; ours to the right.
_SPELLINGS = tuple(
    (re.compile(pattern), ours)
    for pattern, ours in (
        (r"\s+", " "),
        (r"\bmeta mark\b", "mark"),
        (r"\bmark set mark or\b", "mark set mark |"),
        (r"\bmark set mark xor\b", "mark set mark ^"),
        (r"\bmark and\b", "mark &"),
        (r" with icmp(v6|x)?( type)? port-unreachable", ""),
        (r" with icmpx? (code )?(3|1|4)\b", ""),
        (r"\bdnat ip6?( addr \. port)? to\b", "dnat to"),
        (r"\bct state 0x0*8\b", "ct state new"),
        (r"\bct status 0x0*20\b", "ct status dnat"),
        (r"\bpriority dstnat - 10\b", "priority -110"),
        (r"\bpriority dstnat\b", "priority -100"),
        (r"\bpriority srcnat\b", "priority 100"),
        (r"\bpriority filter\b", "priority 0"),
        (r"\bdaddr type 2\b", "daddr type local"),
        (r"\bsaddr type 2\b", "saddr type local"),
        (r"\{ 6, 17, 132 \}", "{ tcp, udp, sctp }"),
        (r"\{ ([^\s,:]+) \}", r"\1"),
        (r"(?<=\d)/32\b|(?<=:)/128\b", ""),
        (r"((?:^| \. |\bl4proto ))6(?= \. | dnat )", r"\1tcp"),
        (r"((?:^| \. |\bl4proto ))17(?= \. | dnat )", r"\1udp"),
        (r"((?:^| \. |\bl4proto ))132(?= \. | dnat )", r"\1sctp"),
    )
)
HEXADECIMAL = re.compile(r"\b0x[0-9a-f]+\b")


def spelled(text: str) -> str:
    """A line in one spelling, whatever version of nft has printed it, and with which options."""
    for pattern, ours in _SPELLINGS:
        text = pattern.sub(ours, text)
    text = _DURATION.sub(_seconds, text)
    return HEXADECIMAL.sub(lambda number: str(int(number[0], 16)), text)


def _seconds(duration: re.Match[str]) -> str:
    """`3h` as `10800s`, as `nft -n` prints it."""
    parts = re.findall(r"(\d+)([dhms])", duration[0])
    return f"{sum(int(count) * _UNITS[unit] for count, unit in parts)}s"
