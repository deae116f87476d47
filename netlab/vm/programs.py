"""Programs that the virtual machine needs, and the packages that have them."""

from __future__ import annotations

import os
import shutil

from netlab.problems import Exit, NetlabError, Problem

# By name: what it is for, and its package on Debian.
_PROGRAMS = {
    "qemu-system-x86_64": ("runs the virtual machine", "qemu-system-x86"),
    "busybox": ("starts it", "busybox-static"),
    "depmod": ("knows which module of the kernel needs which", "kmod"),
}


def program(name: str) -> str:
    """The path of a program."""
    found = _found(name)
    assert found, "asked for after `require`"
    return found


def require() -> None:
    """NetlabError (exit 3) with every program that is missing."""
    missing = [name for name in _PROGRAMS if not _found(name)]
    if missing:
        packages = " ".join(_PROGRAMS[name][1] for name in missing)
        raise NetlabError(
            [
                Problem(
                    "missing-program",
                    f"{name} is not installed: it {_PROGRAMS[name][0]}",
                    hint=f"`sudo apt-get install --no-install-recommends {packages}`",
                )
                for name in missing
            ],
            Exit.MACHINE,
        )


def _found(name: str) -> str | None:
    # /usr/sbin is not on the path of every user.
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin")
