"""Reports as files: written, read back, and their JSON Schema."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from netlab.bench.model import SCHEMA, Report
from netlab.problems import Exit, NetlabError, Problem


def schema() -> dict[str, Any]:
    """The JSON Schema of a report."""
    found = msgspec.json.schema(Report)
    found["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    found["title"] = SCHEMA
    found["description"] = "A run of `netlab bench` (docs/benchmarks.md)."
    return found


def read(path: str) -> Report:
    """A report from a file; NetlabError (exit 2) if it is none that this version understands."""
    return decode(contents(path), path)


def decode(data: bytes, name: str) -> Report:
    """The same of its contents."""
    found = parsed(data, name)
    said = found.get("schema") if isinstance(found, dict) else None
    if said != SCHEMA:
        what = f'is of schema "{said}"' if said else "says no schema"
        raise bad(name, f"{what}; this version reads {SCHEMA}", "measure anew with `netlab bench`")
    try:
        return msgspec.convert(found, Report)
    except msgspec.ValidationError as error:
        raise bad(name, f"is no report: {error}") from None


def parsed(data: bytes, name: str) -> Any:
    """JSON, whatever it says; NetlabError (exit 2) if it is none."""
    try:
        return msgspec.json.decode(data)
    except msgspec.DecodeError as error:
        raise bad(name, f"is no JSON: {error}") from None


def contents(path: str) -> bytes:
    """What is in a file; NetlabError (exit 2) if it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise bad(path, f"cannot be read: {error.strerror}") from None


def write(path: str, text: str) -> None:
    """Put a report into a file in one step: it is there whole or not at all.  NetlabError (exit 3).

    What is no regular file, such as /dev/stdout, is written to as it is.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        _trying(path, lambda: _written_to(path, text))
        return
    _trying(path, lambda: _replaced(path, text))


def check_writable(path: str) -> None:
    """NetlabError (exit 3) now rather than after the run, if there can be no such file."""
    directory = os.path.dirname(os.path.abspath(path))
    problem = ""
    if os.path.isdir(path):
        problem = "it is a directory"
    elif not os.path.isdir(directory):
        problem = f"there is no directory {directory}"
    elif not os.access(path if os.path.exists(path) else directory, os.W_OK):
        problem = "permission denied"
    if problem:
        raise NetlabError(Problem("report", f"{path} cannot be written: {problem}"), Exit.MACHINE)


def _trying(path: str, action: Callable[[], None]) -> None:
    try:
        action()
    except OSError as error:
        raise NetlabError(
            Problem(
                "report",
                f"{path} cannot be written: {error.strerror}",
                hint="what was there before is unchanged; the report is on standard output",
            ),
            Exit.MACHINE,
        ) from None


def _written_to(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def _replaced(path: str, text: str) -> None:
    directory = os.path.dirname(os.path.abspath(path))
    descriptor, temporary = tempfile.mkstemp(dir=directory, prefix=".netlab-bench-")
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def bad(name: str, what: str, hint: str | None = None) -> NetlabError:
    """A file that is not what it should be."""
    return NetlabError(Problem("bad-report", f"{name} {what}", hint=hint), Exit.USAGE)
