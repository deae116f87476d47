"""Which netlab this is, so that two that differ do not speak to each other."""

from __future__ import annotations

import functools
import hashlib
import os

import netlab


@functools.cache
def identity() -> str:
    """The version, and eight digits of a hash of the source: "0.1.0 (source 5e0c1d2a)"."""
    from importlib.metadata import PackageNotFoundError, version

    root = os.path.dirname(netlab.__file__)
    digest = hashlib.sha256()
    for directory, directories, files in os.walk(root):
        directories[:] = sorted(each for each in directories if each != "__pycache__")
        for name in sorted(files):
            if name.endswith(".py"):
                digest.update(os.path.relpath(os.path.join(directory, name), root).encode())
                with open(os.path.join(directory, name), "rb") as file:
                    digest.update(file.read())
    try:
        number = version("netlab-datapath")
    except PackageNotFoundError:
        number = "of a checkout"
    return f"{number} (source {digest.hexdigest()[:8]})"
