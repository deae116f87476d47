"""Where packets are written to: a file, or stdout for a program that reads them."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import BinaryIO, Literal

from netlab.problems import NetlabError, Problem


@contextlib.contextmanager
def pcapng_stream(path: str) -> Iterator[BinaryIO]:
    """The file of that path, made anew, or stdout for "-".  NetlabError (exit 2) otherwise."""
    if path == "-":
        if sys.stdout.isatty():
            raise NetlabError(
                Problem(
                    "pcapng-to-terminal",
                    "packets in pcapng are not for a terminal",
                    hint="name a file, or `| wireshark -k -i -`",
                )
            )
        yield sys.stdout.buffer
        return
    with _opened(path, "wb") as file:
        yield file


def require_writable(path: str) -> None:
    """Raise NetlabError (exit 2) before anything is sent whose packets could not be written."""
    if path != "-":
        is_new = not os.path.exists(path)
        _opened(path, "ab").close()
        if is_new:
            os.unlink(path)


def _opened(path: str, mode: Literal["wb", "ab"]) -> BinaryIO:
    try:
        return open(path, mode)
    except OSError as error:
        raise NetlabError(
            Problem("pcapng-file", f'"{path}" cannot be written: {error.strerror}')
        ) from None
