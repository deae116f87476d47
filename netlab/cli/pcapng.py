"""Where packets are written to: a file, or stdout for a program that reads them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import BinaryIO

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
    try:
        file = open(path, "wb")  # noqa: SIM115
    except OSError as error:
        raise NetlabError(
            Problem("pcapng-file", f'"{path}" cannot be written: {error.strerror}')
        ) from None
    with file:
        yield file
