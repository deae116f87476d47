"""DNS messages (RFC 1035) as they go over UDP: questions to a name server, and what it answers.

By hand, for `up` asks with every change of a lab, and to load scapy takes longer than all of it.
"""

from __future__ import annotations

import struct
from ipaddress import ip_address
from typing import NamedTuple

LARGEST = 4096  # bytes of an answer that is understood
_HEADER = struct.Struct("!6H")
_QUESTION = struct.Struct("!2H")
_RECORD = struct.Struct("!2HIH")
_RECURSION_DESIRED = 0x0100
_TRUNCATED = 0x0200
_TYPES = {"A": 1, "NS": 2, "CNAME": 5, "SOA": 6, "PTR": 12, "TXT": 16, "AAAA": 28, "SRV": 33}
_NAMES = {number: name for name, number in _TYPES.items()}
_CODES = {0: "NOERROR", 1: "FORMERR", 2: "SERVFAIL", 3: "NXDOMAIN", 4: "NOTIMP", 5: "REFUSED"}


class Record(NamedTuple):
    """One record of an answer; `data` as a master file has it, "" of a kind that is not known."""

    name: str
    kind: str
    ttl: int
    data: str
    serial: int | None = None  # of a SOA


class Answer(NamedTuple):
    """What a server says: a code such as "NXDOMAIN", and records."""

    number: int
    code: str
    truncated: bool
    answers: tuple[Record, ...]


def query(name: str, kind: str, number: int = 0) -> bytes:
    """A question for a name's records; "" is the root."""
    labels = (label.encode("idna") for label in name.rstrip(".").split(".") if label)
    owner = b"".join(bytes([len(label)]) + label for label in labels) + b"\0"
    header = _HEADER.pack(number, _RECURSION_DESIRED, 1, 0, 0, 0)
    return header + owner + _QUESTION.pack(_TYPES[kind], 1)


def decode(message: bytes) -> Answer:
    """What a message answers.  ValueError if it is none."""
    try:
        number, flags, questions, answers, _, _ = _HEADER.unpack_from(message)
        at = _HEADER.size
        for _ in range(questions):
            _, at = _name(message, at)
            at += _QUESTION.size
        records = []
        for _ in range(answers):
            record, at = _record(message, at)
            records.append(record)
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise ValueError(f"no DNS message: {error}") from None
    code = _CODES.get(flags & 15, f"code {flags & 15}")
    return Answer(number, code, bool(flags & _TRUNCATED), tuple(records))


def _record(message: bytes, at: int) -> tuple[Record, int]:
    name, at = _name(message, at)
    kind, _, ttl, length = _RECORD.unpack_from(message, at)
    at += _RECORD.size
    data, serial = "", None
    if kind in (_TYPES["A"], _TYPES["AAAA"]):
        data = str(ip_address(message[at : at + length]))
    elif kind in (_TYPES["CNAME"], _TYPES["PTR"], _TYPES["NS"]):
        data = _name(message, at)[0]
    elif kind == _TYPES["SRV"]:
        data = " ".join(map(str, struct.unpack_from("!3H", message, at)))
        data += f" {_name(message, at + 6)[0]}"
    elif kind == _TYPES["SOA"]:
        _, after = _name(message, at)
        data, after = _name(message, after)
        (serial,) = struct.unpack_from("!I", message, after)
    shown = _NAMES.get(kind, f"TYPE{kind}")
    return Record(name, shown, ttl, data, serial), at + length


def _name(message: bytes, at: int) -> tuple[str, int]:
    """A name, and where it ends; pointers lead back, so there is an end to them."""
    labels: list[str] = []
    end = 0
    before = len(message)
    while length := message[at]:
        if length >= 0xC0:
            end = end or at + 2
            at = (length & 0x3F) << 8 | message[at + 1]
            if at >= before:
                raise IndexError("a pointer that does not lead back")
            before = at
            continue
        labels.append(message[at + 1 : at + 1 + length].decode("ascii"))
        at += 1 + length
    return ".".join(labels) + ".", end or at + 1
