"""What a pod answers: bytes in, bytes out, no sockets.

Over TCP a client that begins like HTTP is spoken to in HTTP/1.1 (RFC 9112); any other gets the
pod's name in a line of its own and then back whatever it sends, so that `nc mysql 3306` sees who
is there.  Over UDP each datagram is answered by one.  The paths are those of Kubernetes' own test
server (agnhost netexec): /hostname, /clientip, /echo, /healthz.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from http import HTTPStatus
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit

METHODS = (b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"PATCH", b"OPTIONS", b"TRACE", b"CONNECT")
HEAD_LIMIT = 16 * 1024
BODY_LIMIT = 1024 * 1024
_CLOSE = "Connection: close\r\n"


class Pod(NamedTuple):
    """Who answers: "demo/myblog-1" and the node that it is on."""

    identity: str
    node: str

    @property
    def name(self) -> str:
        """The name alone, which is a pod's host name too."""
        return self.identity.rpartition("/")[2]


def datagram(data: bytes, pod: Pod, client: str) -> bytes:
    """The answer to one datagram from `client` ("10.244.1.4:40000", "[fd00:10:244:1::4]:40000")."""
    command, _, rest = data.strip().partition(b" ")
    if command == b"hostname" and not rest:
        return f"{pod.name}\n".encode()
    if command == b"clientip" and not rest:
        return f"{client}\n".encode()
    if command == b"echo" and rest:
        return rest + b"\n"
    return data


class Page(NamedTuple):
    """What is said instead to everybody, by a program that is no pod."""

    status: int
    fields: tuple[tuple[str, str], ...]
    body: str


class Conversation:
    """One TCP connection as the pod sees it."""

    def __init__(self, pod: Pod, client: str) -> None:
        self.over = False  # nothing more is said after what was returned last
        self._pod = pod
        self._client = client
        self._buffer = bytearray()
        self._http: bool | None = None  # not known yet
        self._head: _Head | None = None  # of the request whose body is awaited
        self._body = bytearray()

    def receive(self, data: bytes) -> bytes:
        """What is answered now to `data`; may be nothing."""
        if self._http is False:
            return data
        self._buffer += data
        if self._http is None:
            self._http = _begins_like_http(self._buffer)
            if self._http is None:
                return b""
            if not self._http:
                return self._introduction()
        answers = bytearray()
        while not self.over and (answer := self._next_answer()) is not None:
            answers += answer
        return bytes(answers)

    def end(self) -> bytes:
        """The last words after the client has said its last."""
        unanswered = self._http is None and bool(self._buffer)
        self.over = True
        return self._introduction() if unanswered else b""

    def _introduction(self) -> bytes:
        said = bytes(self._buffer)
        self._buffer.clear()
        return f"{self._pod.name}\n".encode() + said

    def _next_answer(self) -> bytes | None:
        """Answer the request at the start of the buffer; None if it is not complete yet."""
        try:
            if self._head is None:
                head = _take_head(self._buffer)
                if head is None:
                    return None
                self._head = head
                if head.expects_continue and not self._buffer:
                    return b"HTTP/1.1 100 Continue\r\n\r\n"
            if not _take_body(self._head, self._buffer, self._body):
                return None
        except _BadRequestError as bad:
            self.over = True
            return self._response(bad.status, f"{bad}\n".encode(), keep_alive=False)
        head, body = self._head, bytes(self._body)
        self._head = None
        self._body.clear()
        self.over = not head.keep_alive
        return self._answer(head, body)

    def _answer(self, head: _Head, body: bytes) -> bytes:
        return self._response(
            HTTPStatus.OK,
            self._content(head, body),
            keep_alive=head.keep_alive,
            only_head=head.method == "HEAD",
        )

    def _content(self, head: _Head, body: bytes) -> bytes:
        path, query = head.path, head.query
        if path == "/clientip":
            return f"{self._client}\n".encode()
        if path == "/healthz":
            return b"ok\n"
        if path == "/echo":
            message = parse_qs(query, keep_blank_values=True).get("msg")
            return f"{message[0]}\n".encode() if message else head.text + b"\r\n\r\n" + body
        return f"{self._pod.name}\n".encode()

    def _response(
        self, status: HTTPStatus, content: bytes, *, keep_alive: bool, only_head: bool = False
    ) -> bytes:
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\n"
            "Content-Type: text/plain; charset=utf-8\r\n"
            f"Content-Length: {len(content)}\r\n"
            f"X-Pod: {self._pod.identity}\r\n"
            f"X-Node: {self._pod.node}\r\n"
            f"Connection: {'keep-alive' if keep_alive else 'close'}\r\n\r\n"
        )
        return head.encode() + (b"" if only_head else content)


class Announcement(Conversation):
    """One connection to a program that answers every request alike, as a server in Go does.

    `page` is asked each time: it may change while the connection lasts.
    """

    def __init__(self, page: Callable[[], Page]) -> None:
        super().__init__(Pod("", ""), "")
        self._page = page
        self._http = True  # whatever it begins with

    def _answer(self, head: _Head, body: bytes) -> bytes:
        page = self._page()
        content = page.body.encode()
        fields = "".join(f"{name}: {value}\r\n" for name, value in page.fields)
        start = (
            f"HTTP/1.1 {page.status} {HTTPStatus(page.status).phrase}\r\n{fields}"
            f"Date: {time.strftime('%a, %d %b %Y %H:%M:%S GMT', time.gmtime())}\r\n"
            f"Content-Length: {len(content)}\r\n{'' if head.keep_alive else _CLOSE}\r\n"
        )
        return start.encode() + (b"" if head.method == "HEAD" else content)

    def _response(
        self, status: HTTPStatus, content: bytes, *, keep_alive: bool, only_head: bool = False
    ) -> bytes:
        """To what is no request."""
        reason = f"{status.value} {status.phrase}"
        kind = "Content-Type: text/plain; charset=utf-8\r\n"
        return f"HTTP/1.1 {reason}\r\n{kind}{_CLOSE}\r\n{reason}".encode()


class _BadRequestError(Exception):
    def __init__(self, status: HTTPStatus, why: str) -> None:
        super().__init__(why)
        self.status = status


class _Head(NamedTuple):
    """A request without its body. `length` is that of the body, None if it comes in chunks."""

    text: bytes
    method: str
    path: str
    query: str
    length: int | None
    keep_alive: bool
    expects_continue: bool


def _begins_like_http(buffer: bytearray) -> bool | None:
    """Whether a method stands first; None as long as one still may."""
    undecided = False
    for method in METHODS:
        start = method + b" "
        if buffer.startswith(start):
            return True
        undecided |= start.startswith(buffer)
    return None if undecided else False


def _take_head(buffer: bytearray) -> _Head | None:
    while buffer.startswith(b"\r\n"):  # (before a request line they are ignored, RFC 9112 2.2)
        del buffer[:2]
    end = buffer.find(b"\r\n\r\n")
    if end > HEAD_LIMIT or (end < 0 and len(buffer) > HEAD_LIMIT):
        raise _BadRequestError(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "head is too large")
    if end < 0:
        _refuse_old_http(buffer)
        return None
    text = bytes(buffer[:end])
    del buffer[: end + 4]
    request_line, *lines = text.decode("latin-1").split("\r\n")
    method, target, version = _request_line(request_line)
    fields = _fields(lines)
    if version == "HTTP/1.1" and "host" not in fields:
        raise _BadRequestError(HTTPStatus.BAD_REQUEST, "field Host is missing")
    try:
        url = urlsplit(target)
    except ValueError:
        raise _BadRequestError(HTTPStatus.BAD_REQUEST, "bad target") from None
    connection = fields.get("connection", "").lower()
    return _Head(
        text,
        method,
        url.path,
        url.query,
        _length(fields),
        "keep-alive" in connection if version == "HTTP/1.0" else "close" not in connection,
        fields.get("expect", "").lower() == "100-continue",
    )


def _refuse_old_http(buffer: bytearray) -> None:
    """Do not wait for the fields of a request line that can have none."""
    line, found, _ = buffer.partition(b"\r\n")
    if found:
        _request_line(line.decode("latin-1"))


def _request_line(line: str) -> tuple[str, str, str]:
    words = line.split(" ")
    if len(words) != 3 or words[2] not in ("HTTP/1.0", "HTTP/1.1"):
        raise _BadRequestError(HTTPStatus.BAD_REQUEST, "bad request line")
    if words[0].encode("latin-1") not in METHODS or not words[1]:
        raise _BadRequestError(HTTPStatus.BAD_REQUEST, "bad request line")
    return words[0], words[1], words[2]


def _fields(lines: list[str]) -> dict[str, str]:
    fields: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not name or name != name.strip():
            raise _BadRequestError(HTTPStatus.BAD_REQUEST, "bad header field")
        name = name.lower()
        if name in ("content-length", "host") and fields.get(name, value.strip()) != value.strip():
            raise _BadRequestError(HTTPStatus.BAD_REQUEST, f"several fields {name}")
        fields[name] = value.strip()
    return fields


def _length(fields: dict[str, str]) -> int | None:
    coding = fields.get("transfer-encoding")
    if coding is not None:
        if coding.lower() != "chunked" or "content-length" in fields:
            raise _BadRequestError(HTTPStatus.BAD_REQUEST, "bad Transfer-Encoding")
        return None
    length = fields.get("content-length", "0")
    if not (length.isascii() and length.isdecimal()):
        raise _BadRequestError(HTTPStatus.BAD_REQUEST, "bad Content-Length")
    if len(length) > 20 or int(length) > BODY_LIMIT:
        raise _BadRequestError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "body is too large")
    return int(length)


def _take_body(head: _Head, buffer: bytearray, body: bytearray) -> bool:
    """Move what is there of the body from `buffer` to `body`; whether that was the last of it."""
    if head.length is None:
        return _take_chunks(buffer, body)
    missing = head.length - len(body)
    body += buffer[:missing]
    del buffer[:missing]
    return len(body) == head.length


def _take_chunks(buffer: bytearray, body: bytearray) -> bool:
    """The same for a chunked body, RFC 9112 7.1."""
    while (end := buffer.find(b"\r\n", 0, HEAD_LIMIT)) >= 0:
        size = _chunk_size(bytes(buffer[:end]))
        if len(body) + size > BODY_LIMIT:
            raise _BadRequestError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "body is too large")
        start = end + 2
        if size == 0:
            return _take_trailer(buffer, start)
        after = start + size
        if len(buffer) < after + 2:
            return False
        if buffer[after : after + 2] != b"\r\n":
            raise _BadRequestError(HTTPStatus.BAD_REQUEST, "bad chunk")
        body += buffer[start:after]
        del buffer[: after + 2]
    if len(buffer) > HEAD_LIMIT:
        raise _BadRequestError(HTTPStatus.BAD_REQUEST, "bad chunk")
    return False


def _chunk_size(line: bytes) -> int:
    digits = line.partition(b";")[0].strip()
    if not digits or digits.strip(b"0123456789abcdefABCDEF") or len(digits) > 8:
        raise _BadRequestError(HTTPStatus.BAD_REQUEST, "bad chunk")
    return int(digits, 16)


def _take_trailer(buffer: bytearray, start: int) -> bool:
    if buffer[start : start + 2] == b"\r\n":
        del buffer[: start + 2]
        return True
    end = buffer.find(b"\r\n\r\n", start)
    if end < 0:
        if len(buffer) - start > HEAD_LIMIT:
            raise _BadRequestError(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "trailer too large")
        return False
    del buffer[: end + 4]
    return True
