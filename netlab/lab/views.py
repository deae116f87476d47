"""Mount namespaces of a lab: what programs and commands in a pod, a node or a host see of files.

Each belongs to one network namespace and is made when something enters there for the first time.
/run in it is its own, and files elsewhere cover the machine's: a pod's resolv.conf, a daemon's
configuration.  A file is written in place when it changes, so that who is inside sees that.

A file can only be covered where there is one.  What is a link that leads to no file is made there,
if that is below /run, as systemd has it; where else none is, its directory is covered by one that
leads to everything that the machine's has.

It runs in init's bare interpreter: only the standard library can be imported here.
"""

from __future__ import annotations

import contextlib
import os
import pwd
from collections.abc import Iterable, Mapping
from typing import Any

from netlab.kernel.syscalls import (
    CLONE_NEWNS,
    MNT_DETACH,
    MS_BIND,
    MS_NODEV,
    MS_NOSUID,
    mount,
    setns,
    umount,
    unshare,
)
from netlab.lab.children import Children

_COVERS = "/run/.covers"  # files that cover others
_MACHINE = "/run/.machine"  # directories of the machine that are covered as a whole
_NETNS = "/run/netns"

Key = tuple[int, str]
"""The inode of a network namespace, and the name of a view of it."""


class Views:
    """The mount namespaces that there are, by key."""

    def __init__(self, children: Children) -> None:
        self._children = children
        self._mounts: dict[Key, int] = {}
        self._declared: dict[Key, Mapping[str, Any]] = {}

    @property
    def descriptors(self) -> list[int]:
        """Those that init holds for them."""
        return list(self._mounts.values())

    @property
    def keys(self) -> list[Key]:
        """Which there are."""
        return list(self._mounts)

    def find(self, key: Key) -> int | None:
        """A descriptor of one, if it is there."""
        return self._mounts.get(key)

    def host_name(self, key: Key) -> str:
        """The name that the machine has there; "" for its own."""
        name: str = self._declared.get(key, {}).get("host_name", "")
        return name

    def show(self, key: Key, declared: Mapping[str, Any]) -> int:
        """Have a view show its declared files; OSError if that cannot be."""
        found = self._there(key)
        if self._declared.get(key) != declared:
            self.furnish(key, declared.get("files", ()))
            self._declared[key] = declared
        return found

    def furnish(
        self, key: Key, files: Iterable[Mapping[str, Any]], directories: Iterable[list[str]] = ()
    ) -> None:
        """Make files and directories in a view.  OSError if it fails; the log says how."""
        mounts = self._there(key)

        def child() -> None:
            setns(mounts, CLONE_NEWNS)
            for path, owner in directories:
                os.makedirs(path, exist_ok=True)
                os.chown(path, *_owner(owner))
            for file in files:
                _furnish(file)

        _, status = os.waitpid(self._children.fork(child), 0)
        if status:
            raise OSError("its files could not be written")

    def forget(self, key: Key) -> None:
        """Let one go: it ends with whatever is inside."""
        os.close(self._mounts.pop(key))
        self._declared.pop(key, None)

    def _there(self, key: Key) -> int:
        if key not in self._mounts:
            self._mounts[key] = self._make()
        return self._mounts[key]

    def _make(self) -> int:
        """A mount namespace with an empty /run, made by a child that is held until it is ours."""
        ready, tell = os.pipe()
        held, let_go = os.pipe()

        def child() -> None:
            unshare(CLONE_NEWNS)
            with contextlib.suppress(OSError):  # (a copy of each namespace's mount for nothing)
                umount(_NETNS, MNT_DETACH)
            mount("tmpfs", "/run", "tmpfs", MS_NOSUID | MS_NODEV)
            os.chmod("/run", 0o755)
            os.write(tell, b"+")
            os.close(let_go)
            os.read(held, 1)

        try:
            pid = self._children.fork(child)
            os.close(tell)
            tell = -1
            try:
                if os.read(ready, 1) != b"+":
                    raise OSError("no mount namespace could be made")
                return os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
            finally:
                os.close(let_go)
                let_go = -1
                os.waitpid(pid, 0)
        finally:
            for descriptor in (ready, tell, held, let_go):
                if descriptor >= 0:
                    os.close(descriptor)


def _furnish(file: Mapping[str, Any]) -> None:
    """One file of this mount namespace."""
    path = file["path"]
    if path.startswith("/run/"):
        _write(path, file)
        return
    stand_in = f"{_COVERS}{path}"
    is_covered = os.path.exists(stand_in)
    _write(stand_in, file)
    if not is_covered:
        if not os.path.exists(path):
            _make_coverable(path)
        mount(stand_in, path, None, MS_BIND)


def _make_coverable(path: str) -> None:
    """Have a file where none is, that of the machine's own disk untouched."""
    target = os.path.realpath(path)
    if not target.startswith("/run/"):
        target = path
        _cover_directory(os.path.dirname(path))
        with contextlib.suppress(FileNotFoundError):  # (a link that leads nowhere)
            os.unlink(path)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    with open(target, "x", encoding="utf-8"):
        pass


def _cover_directory(path: str) -> None:
    """Lay another directory over one, in which everything of it is, by links."""
    original = f"{_MACHINE}{path}"
    if os.path.ismount(path) and os.path.ismount(original):
        return
    os.makedirs(original)
    mount(path, original, None, MS_BIND)
    mount("tmpfs", path, "tmpfs", MS_NOSUID | MS_NODEV)
    os.chmod(path, 0o755)
    with os.scandir(original) as entries:
        for entry in entries:
            target = os.readlink(entry) if entry.is_symlink() else entry.path
            os.symlink(target, os.path.join(path, entry.name))


def _write(path: str, file: Mapping[str, Any]) -> None:
    """In place: one that covers another is the same file for ever."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "a+", encoding="utf-8") as opened:
        opened.seek(0)
        if opened.read() != file["text"]:
            opened.truncate(0)
            opened.write(file["text"])
        os.fchown(opened.fileno(), *_owner(file.get("owner", "")))


def _owner(name: str) -> tuple[int, int]:
    """A user's numbers.  OSError if the machine has no such user."""
    if not name:
        return 0, 0
    try:
        found = pwd.getpwnam(name)
    except KeyError:
        raise OSError(f"there is no user {name}") from None
    return found.pw_uid, found.pw_gid
