"""What the probe asks for above its transport: an HTTP request, a DNS query, and their answers.

The request goes out on the connection that the traced handshake made; the query is the probe.
"""

from __future__ import annotations

import re
import select
import socket
import struct
import time
from typing import TYPE_CHECKING, Literal

from netlab.trace.form import Dns, Http
from netlab.trace.model import Application
from netlab.trace.model_steps import Socket

if TYPE_CHECKING:
    from netlab.trace.aim import Aim
    from netlab.trace.mark import Mark

_MOST = 1 << 20  # of an answer, bytes
_SHOWN = 80  # of what is not understood, characters
# RFC 9112, 4
_STATUS_LINE = re.compile(rb"HTTP/\d\.\d (\d{3})(?: [^\r\n]*)?\r?\n")
_IN, _ADDRESSES = 1, {4: 1, 6: 28}  # class, types A and AAAA: RFC 1035, RFC 3596
_DNS_HEADER = struct.Struct("!HHHHHH")
_RECURSION_DESIRED, _RESPONSE, _TRUNCATED = 0x0100, 0x8000, 0x0200
_RESPONSE_CODES = {
    0: "NOERROR",
    1: "FORMERR",
    2: "SERVFAIL",
    3: "NXDOMAIN",
    4: "NOTIMP",
    5: "REFUSED",
}


# --- HTTP ----------------------------------------------------------------------------------------


def get(connection: socket.socket, http: Http, aim: Aim, timeout_s: float) -> Application:
    """Send a GET on a connection that was just made, and read its answer to the end."""
    line = f"GET {http.path} HTTP/1.1"
    host = Socket(ip=aim.destination, port=None if aim.port == 80 else aim.port)
    name = f"[{host.ip}]" if host.port is None and ":" in host.ip else str(host)
    name = http.host or name
    head = f"{line}\r\nHost: {name}\r\nUser-Agent: netlab\r\nConnection: close\r\n\r\n"
    begin = time.monotonic()
    heard = b""
    try:
        # A new connection has room for more than a request.
        connection.sendall(head.encode())
        heard, problem = _all_of(connection, begin + timeout_s)
    except OSError as error:
        problem = error.strerror or str(error)
    return _understood_http(
        line, heard, problem, timeout_s, round((time.monotonic() - begin) * 1e6)
    )


def _all_of(connection: socket.socket, end: float) -> tuple[bytes, str | None]:
    """What is answered until the server closes, and what kept it from being all."""
    heard = bytearray()
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    while (left := end - time.monotonic()) > 0:
        if not poll.poll(left * 1000):
            continue
        try:
            data = connection.recv(1 << 16)
        except OSError as error:
            return bytes(heard), error.strerror
        heard += data
        if not data:
            return bytes(heard), None
        if len(heard) >= _MOST:
            return bytes(heard), f"longer than {_MOST} bytes, and not read to the end"
    return bytes(heard), "late"


def _understood_http(
    line: str, heard: bytes, problem: str | None, timeout_s: float, elapsed_us: int
) -> Application:
    found = _STATUS_LINE.match(heard)
    late = f"not all of it within {timeout_s:g} s" if heard else f"no answer within {timeout_s:g} s"
    if problem == "late":
        problem = late
    elif not found and problem is None:
        problem = "that is no answer of HTTP" if heard else "the connection was closed without one"
    first = heard.partition(b"\n")[0].rstrip(b"\r")[:_SHOWN]
    return Application(
        protocol="http",
        request=line,
        status=int(found[1]) if found else None,
        answer=_printable(first) if heard else None,
        size=len(heard),
        elapsed_us=elapsed_us,
        problem=problem,
    )


def _printable(said: bytes) -> str:
    return said.decode("ascii", "backslashreplace").encode("unicode_escape").decode()


# --- DNS -----------------------------------------------------------------------------------------


def question(dns: Dns, version: Literal[4, 6] | int) -> bytes:
    """The question for the addresses of a name, of the family that it is sent over."""
    labels = b"".join(bytes([len(label)]) + label.encode() for label in dns.name.split("."))
    return labels + struct.pack("!xHH", _ADDRESSES[version], _IN)


def query(dns: Dns, mark: Mark, version: int) -> bytes:
    """The message that asks it, with the number that the mark is."""
    number = int.from_bytes(mark.cookie, "big")
    return _DNS_HEADER.pack(number, _RECURSION_DESIRED, 1, 0, 0, 0) + question(dns, version)


def understood_dns(
    dns: Dns, version: int, heard: bytes | None, error: str | None, elapsed_us: int
) -> Application:
    """What an answer says; `heard` None: none came, for the kernel's `error` or in time."""
    kind = "A" if version == 4 else "AAAA"
    status, answer, problem = None, None, None
    addresses: list[str] = []
    if heard is None:
        problem = error or "no answer in time"
    elif len(heard) < _DNS_HEADER.size or not (flags := _DNS_HEADER.unpack_from(heard)[1]) & (
        _RESPONSE
    ):
        problem = "what came back is no answer of DNS"
    else:
        status = flags & 0xF
        answer = _RESPONSE_CODES.get(status, f"response code {status}")
        problem = "it did not fit a datagram (TC)" if flags & _TRUNCATED else None
        addresses = _addresses(heard, _ADDRESSES[version])
    return Application(
        protocol="dns",
        request=f"{dns.name} {kind}",
        status=status,
        answer=answer,
        addresses=addresses,
        size=len(heard or b""),
        elapsed_us=elapsed_us,
        problem=problem,
    )


def _addresses(message: bytes, kind: int) -> list[str]:
    from scapy.layers.dns import DNS, DNSRR

    return [
        record.rdata
        for record in DNS(message).an or ()
        if isinstance(record, DNSRR) and record.type == kind and isinstance(record.rdata, str)
    ]
