"""From a file to plain values: its documents as dictionaries, lists, texts, numbers.

JSON is read by msgspec, YAML by `yaml_documents`.
"""

from __future__ import annotations

import os
import re
import stat
import sys
from typing import Any

import msgspec

from netlab.problems import NetlabError, Place, Problem
from netlab.topology.places import (
    DEEPEST_NESTING,
    Complaints,
    Document,
    Origin,
    Source,
    place_of_byte,
    too_deep,
)
from netlab.topology.yaml_documents import yaml_documents

LARGEST_FILE = 256 * 1024 * 1024  # bytes


def read(path: str) -> bytes:
    """The content of a file, or of standard input for "-", in UTF-8.

    Raises NetlabError: no-such-file, no-permission, not-a-file, file-too-large, not-text,
    empty-file.
    """
    data = sys.stdin.buffer.read(LARGEST_FILE + 1) if path == "-" else _read_file(path)
    if len(data) > LARGEST_FILE:
        raise _unreadable("file-too-large", f"{path} is larger than {LARGEST_FILE >> 20} MiB", path)
    return _as_utf8(data, path)


def _read_file(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
                raise _unreadable("not-a-file", f"{path} is a device, not a topology file", path)
            return file.read(LARGEST_FILE + 1)
    except FileNotFoundError:
        raise _unreadable(
            "no-such-file",
            f"there is no file {path}",
            path,
            "`netlab topology ls` lists the topologies that come with netlab",
        ) from None
    except IsADirectoryError:
        raise _unreadable(
            "not-a-file", f"{path} is a directory", path, "name one of the files in it"
        ) from None
    except PermissionError:
        raise _unreadable("no-permission", f"{path} may not be read by this user", path) from None
    except (OSError, ValueError) as error:
        raise _unreadable("not-a-file", f"{path!r} cannot be read: {error}", path) from None


def _as_utf8(data: bytes, path: str) -> bytes:
    """UTF-8 without byte order mark, whatever the file is in (PowerShell's `>` writes UTF-16)."""
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8"
    data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        what = f"byte 0x{data[error.start]:02x} at offset {error.start} is not {encoding.upper()}"
        raise _unreadable("not-text", f"{path} is not a text file: {what}", path) from None
    if "\0" in text:
        what = f"character {text.index(chr(0))} is NUL"
        raise _unreadable("not-text", f"{path} is not a text file: {what}", path)
    if not text.strip():
        raise _unreadable("empty-file", f"{path} is empty", path, _START_FROM)
    return text.encode() if encoding == "utf-16" else data


_START_FROM = "`netlab topology show two-node-vxlan` prints one to start from"


def _unreadable(code: str, message: str, path: str, hint: str | None = None) -> NetlabError:
    return NetlabError(Problem(code, message, Place(path), hint))


def documents(data: bytes, path: str, complaints: Complaints) -> list[Document]:
    """The documents of a file that are not empty; what cannot be read is complained of."""
    beginning = data[:4096].lstrip()[:1]
    if path.endswith(".json"):
        return _json(data, path, complaints)
    if beginning in (b"{", b"["):
        # `kubectl get -o json` under another name; if it is not JSON it may be YAML's flow style.
        found = _json(data, path, Complaints())
        if found:
            return found
    return yaml_documents(data, path, complaints)


def _json(data: bytes, path: str, complaints: Complaints) -> list[Document]:
    source = Source(path, data)
    try:
        value = msgspec.json.decode(data)
    except msgspec.DecodeError as error:
        offset = re.search(r"\(byte (\d+)\)", str(error))
        place = place_of_byte(source, int(offset.group(1)) if offset else len(data))
        reason = re.sub(r"^JSON is malformed: | \(byte \d+\)$", "", str(error))
        complaints.placed(Problem("json-syntax", f"not valid JSON: {reason}", place))
        return []
    except RecursionError:
        complaints.placed(too_deep(Place(path)))
        return []
    if _depth(value) > DEEPEST_NESTING:
        complaints.placed(too_deep(Place(path)))
        return []
    return [Document(value, Origin(source, 0))]


def _depth(value: Any) -> int:
    """How deep lists and objects are nested."""
    depth = 0
    level = [value] if type(value) in (dict, list) else []
    while level:
        depth += 1
        level = [
            below
            for each in level
            for below in (each.values() if type(each) is dict else each)
            if type(below) is dict or type(below) is list
        ]
    return depth
