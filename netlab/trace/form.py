"""The form of a probe, where the user asks for another than the usual one.

What can be asked for in a form, and what cannot be meant: a SYN carries no data, an answer to
somebody else's address does not come back.
"""

from __future__ import annotations

import re
from ipaddress import ip_address
from typing import TYPE_CHECKING, Literal

import msgspec

from netlab.problems import NetlabError, Problem
from netlab.topology.model import Service
from netlab.trace.family import Family
from netlab.trace.mark import COOKIE_BYTES
from netlab.trace.model import ProbeProtocol

if TYPE_CHECKING:
    from netlab.trace.aim import Request

AskedProtocol = Literal["tcp", "udp", "icmp", "http", "dns"]
TRANSPORTS: dict[AskedProtocol, ProbeProtocol] = {
    "tcp": "tcp",
    "udp": "udp",
    "icmp": "icmp",
    "http": "tcp",
    "dns": "udp",
}
LONGEST_S = 60
USUAL_PORTS = {"http": 80, "dns": 53}
USUAL_QUERY = "kubernetes.default.svc.cluster.local"
_TRANSPORT_HEADER = 8  # of UDP and of ICMP echo
_LONGEST_NAME, _LONGEST_LABEL = 253, 63  # RFC 1035


class Http(msgspec.Struct, frozen=True, tag="http"):
    """A GET behind the handshake; `host` is that of its field Host, else the address."""

    path: str
    host: str | None = None


class Dns(msgspec.Struct, frozen=True, tag="dns"):
    """A query for addresses instead of a random datagram; `name` without the final dot."""

    name: str


def application(
    protocol: AskedProtocol | None, path: str | None, query: str | None, host: str | None = None
) -> Http | Dns | None:
    """What is asked for above the transport.  Raises NetlabError (exit code 2)."""
    if path is not None and protocol != "http":
        raise _error("path-without-http", "--path is that of an HTTP request", _too("http"))
    if query is not None and protocol != "dns":
        raise _error("query-without-dns", "--query is that of a DNS query", _too("dns"))
    if protocol == "http":
        return Http(_checked_path("/" if path is None else path), host)
    if protocol == "dns":
        return Dns(_checked_name(USUAL_QUERY if query is None else query))
    return None


def _too(protocol: AskedProtocol) -> str:
    return f"write `--protocol {protocol}` too"


def _checked_path(path: str) -> str:
    if not re.fullmatch(r"/[!-~]*", path):
        message = f'"{path}" is not the path of a request: it begins with / and has no spaces'
        raise _error("bad-path", message, "what is no ASCII is written as %XX")
    return path


def _checked_name(name: str) -> str:
    """In lower case, so that it is the same in the answer of a server that prefers that."""
    plain = name.removesuffix(".").lower()
    labels = plain.split(".")
    if (
        not re.fullmatch(r"[!-~]+", plain)
        or len(plain) > _LONGEST_NAME
        or not all(0 < len(label) <= _LONGEST_LABEL for label in labels)
    ):
        message = f'"{name}" is not a name to ask for: labels of 1 to 63 letters with dots between'
        raise _error("bad-name", message)
    return plain


def sent_from(text: str) -> str:
    """An address that a packet can have as its source.  Raises NetlabError (exit code 2)."""
    try:
        number = ip_address(text)
    except ValueError:
        raise _error(
            "bad-address", f'"{text}" is not an address to send from', "as in 203.0.113.7"
        ) from None
    if number.is_multicast or number.is_unspecified or text == "255.255.255.255":
        raise _error("bad-address", f"{text} is the address of no host, and none sends from it")
    if number.is_loopback:
        raise _error("bad-address", f"{text} is every host's own: no packet leaves it from there")
    return str(number)


def require_transport(
    request: Request, service: Service, number: int | None, protocol: ProbeProtocol
) -> None:
    """Refuse HTTP to a port of UDP, and DNS to one of TCP.  Raises NetlabError (exit code 2)."""
    ports = [port for port in service.ports if number in (None, port.port)]
    if ports and not any(port.protocol == protocol.upper() for port in ports):
        known = ", ".join(f"{port.port}/{port.protocol}" for port in service.ports)
        name = (request.protocol or "").upper()
        raise _error(
            "other-transport",
            f"{name} goes over {protocol.upper()}, and svc/{service.key} has {known}",
            f"take a port of {protocol.upper()}, or another --protocol",
        )


def require_fields(request: Request) -> None:
    """Refuse what no request can have in a field.  Raises NetlabError (exit code 2)."""
    try:
        msgspec.convert(msgspec.structs.asdict(request), type(request))
    except msgspec.ValidationError as error:
        message, _, field = str(error).partition(" - at `$.")
        name = field.rstrip("`")
        given = getattr(request, name, None)
        raise _error("bad-option", f"{name} cannot be {given!r}: {message.lower()}") from None
    for name, port in (("port", request.port), ("source_port", request.source_port)):
        if port is not None and not 1 <= port <= 65535:
            raise _error("bad-port", f"{name} cannot be {port}: a port is a number from 1 to 65535")
    if not 0 < request.timeout_s <= LONGEST_S:
        message = f"a probe waits up to {LONGEST_S} s for its answer, not {request.timeout_s:g}"
        raise _error("bad-timeout", message)


def check_form(
    request: Request,
    protocol: ProbeProtocol,
    family: Family,
    said: Http | Dns | None,
    spoofed: bool,
) -> None:
    """Refuse a form that no packet can have.  Raises NetlabError (exit code 2)."""
    if request.ttl is not None and not 1 <= request.ttl <= 255:
        raise _error("bad-ttl", f"a packet is sent with a TTL of 1 to 255, not {request.ttl}")
    _check_size(request, protocol, family)
    if request.fragment and request.size is None:
        hint = "give its length with --size"
        raise _error("nothing-to-fragment", "a probe of the usual size needs no fragments", hint)
    if said and spoofed:
        raise _error(
            "answer-elsewhere",
            f"{request.source} does not have the address to send from, so that no answer comes "
            f"back to it, and {request.protocol} is about the answer",
            f"take `--protocol {protocol}`",
        )


def _check_size(request: Request, protocol: ProbeProtocol, family: Family) -> None:
    if request.size is None:
        return
    if protocol == "tcp":
        hint = "take `--protocol udp` or `icmp`"
        raise _error("tcp-size", "a TCP probe is a SYN, which carries no data", hint)
    if request.protocol == "dns":
        raise _error("dns-size", "a DNS query is as long as its name makes it", "leave out --size")
    least = family.header + _TRANSPORT_HEADER + COOKIE_BYTES
    if not least <= request.size <= 65535:
        message = f"a probe has {least} to 65535 bytes, not {request.size}"
        raise _error("bad-size", message, "it is the size of the IP packet")


def _error(code: str, message: str, hint: str | None = None) -> NetlabError:
    return NetlabError(Problem(code, message, hint=hint))
