"""Network namespaces with names: made, marked, found, entered and removed.

A name is a file under /run/netns with the namespace bind-mounted on it, as `ip netns` makes them.
Three marks make one ours, each from before the moment at which a kill could orphan it:

* the file is born with a mode of its own (so that a file that nothing is mounted on is ours),
* `lo` carries the altname `netlab:LAB:lo` before the mount (so that a namespace without links is),
* each link carries an altname of the same shape.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterable, Iterator

from netlab.datapath.state import Sysctl
from netlab.kernel import rtnetlink
from netlab.kernel.netlink import NetlinkError, Socket, attribute_list, attributes
from netlab.kernel.syscalls import (
    CLONE_NEWNET,
    MNT_DETACH,
    MS_BIND,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_REC,
    MS_SHARED,
    mount,
    setns,
    umount,
    unshare,
)
from netlab.problems import Exit, NetlabError, Problem

RUN_DIR = "/run/netns"
THREAD_NAMESPACE = "/proc/thread-self/ns/net"

# Mode of the file before the namespace is mounted on it: sticky, which nobody gives an empty file.
# It comes with the name in one step, where contents would come after it.
_UNMOUNTED_MODE = stat.S_ISVTX | 0o444


def mark(lab: str, link: str) -> str:
    """The altname that says that a link belongs to a lab; at most 127 characters."""
    return f"netlab:{lab}:{link}"


def path(name: str) -> str:
    """The file of a named namespace."""
    return f"{RUN_DIR}/{name}"


def open_current() -> int:
    """A descriptor of the calling thread's network namespace."""
    return os.open(THREAD_NAMESPACE, os.O_RDONLY | os.O_CLOEXEC)


def open_named(name: str) -> int:
    """A descriptor of a named namespace; FileNotFoundError if there is none."""
    return os.open(path(name), os.O_RDONLY | os.O_CLOEXEC)


@contextlib.contextmanager
def entered(namespace: str | int) -> Iterator[None]:
    """Run the body with the calling thread inside a namespace, given by name or descriptor.

    Sockets opened in the body belong to that namespace for good, and children forked in it
    start there.  Only this thread moves.  NetlabError (exit 3) without the privilege to.
    """
    home = open_current()
    try:
        target = namespace if isinstance(namespace, int) else open_named(namespace)
        try:
            setns(target, CLONE_NEWNET)
        except PermissionError:
            raise _not_privileged() from None
        finally:
            if target is not namespace:
                os.close(target)
        try:
            yield
        finally:
            setns(home, CLONE_NEWNET)
    finally:
        os.close(home)


def require_privilege() -> None:
    """NetlabError (exit 3) without the privilege to enter namespaces, before anything is done."""
    home = open_current()
    try:
        with entered(home):
            pass
    finally:
        os.close(home)


def _not_privileged() -> NetlabError:
    return NetlabError(
        Problem(
            "missing-capability",
            "this root lacks CAP_SYS_ADMIN, which entering network namespaces needs",
            hint="in a container: run it with --privileged",
        ),
        Exit.MACHINE,
    )


@contextlib.contextmanager
def scratch() -> Iterator[int]:
    """A descriptor of a fresh namespace without a name, which ends with the body."""
    home = open_current()
    try:
        unshare(CLONE_NEWNET)
        fresh = open_current()
        setns(home, CLONE_NEWNET)
    finally:
        os.close(home)
    try:
        yield fresh
    finally:
        os.close(fresh)


def make(name: str, lab: str, sysctls: Iterable[Sysctl]) -> int:
    """Make a marked namespace with `lo` up, and leave the calling thread in it.

    Returns a descriptor of the namespace.  The thread stays because one that makes many would
    only lose time by going home in between.  FileExistsError if the name is taken.
    """
    unshare(CLONE_NEWNET)
    # Before lo comes up: IPv6 that never ran need not be taken down.
    write_sysctls(sysctls)
    with Socket() as netlink:
        for refused in netlink.request(
            [rtnetlink.add_altname(1, mark(lab, "lo")), rtnetlink.set_up(1)]
        ):
            raise refused
    name_current(name)
    return open_current()


def name_current(name: str) -> None:
    """Give the calling thread's namespace a name.  FileExistsError if it is taken."""
    flags = os.O_CREAT | os.O_EXCL | os.O_RDONLY | os.O_CLOEXEC
    os.close(os.open(path(name), flags, _UNMOUNTED_MODE))
    mount(THREAD_NAMESPACE, path(name), None, MS_BIND)


def remove(name: str) -> None:
    """Take the name away; the kernel frees the namespace when nobody uses it any more.

    A name that is gone already is fine.
    """
    with contextlib.suppress(FileNotFoundError):
        while True:
            try:
                umount(path(name), MNT_DETACH)
            except OSError as error:
                if error.errno == errno.EINVAL:  # nothing is mounted there
                    break
                raise
        os.unlink(path(name))


def write_sysctls(sysctls: Iterable[Sysctl]) -> None:
    """Set sysctls of the calling thread's namespace; one that this kernel lacks is passed over."""
    for sysctl in sysctls:
        try:
            descriptor = os.open(f"/proc/sys/{sysctl.path}", os.O_WRONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            os.write(descriptor, sysctl.value.encode())
        finally:
            os.close(descriptor)


def names_of(lab: str) -> list[str]:
    """Names under /run/netns that begin with the lab's; whose they are, `owner` tells."""
    try:
        return sorted(name for name in os.listdir(RUN_DIR) if name.startswith(f"{lab}:"))
    except FileNotFoundError:
        return []


def labs() -> list[str]:
    """Names of all labs that own a namespace here."""
    candidates: dict[str, list[str]] = {}
    with contextlib.suppress(FileNotFoundError):
        for name in sorted(os.listdir(RUN_DIR)):
            lab, colon, _ = name.partition(":")
            if colon:
                candidates.setdefault(lab, []).append(name)
    return [lab for lab, names in candidates.items() if any(is_ours(name, lab) for name in names)]


def is_ours(name: str, lab: str) -> bool:
    """Whether a name under /run/netns carries that lab's mark."""
    return _is_unmounted(name) or _has_mark(name, lab)


def _is_unmounted(name: str) -> bool:
    try:
        found = os.lstat(path(name))
    except FileNotFoundError:
        return False
    return found.st_size == 0 and found.st_mode == stat.S_IFREG | _UNMOUNTED_MODE


def _has_mark(name: str, lab: str) -> bool:
    try:
        with entered(name), Socket() as netlink:
            answer = netlink.get(rtnetlink.RTM_GETLINK, rtnetlink.link_message(1))
    except (NetlinkError, FileNotFoundError):
        return False
    except OSError as error:
        if error.errno == errno.EINVAL:  # a file that is no network namespace
            return False
        raise
    names = attributes(answer, 16).get(rtnetlink.IFLA_PROP_LIST, b"")
    wanted = mark(lab, "lo").encode() + b"\0"
    return any(value == wanted for _, value in attribute_list(names))


def is_mounted(name: str) -> bool:
    """Whether a namespace is there behind the name, not only the file of a killed start."""
    return os.path.lexists(path(name)) and not _is_unmounted(name)


# -- /run/netns itself ---------------------------------------------------------------------------
#
# `ip netns` makes it a shared mount point of its own when it is used first.  If that happened after
# our mounts were made, they would lie twice, one hidden below, and their files could never be
# removed (EBUSY).  So it is done here first, and undone by whoever leaves the directory empty if
# it was us: the flag says so.  Where /run is a disk, a file costs 0.3 ms; hence a tmpfs.

STATE_DIR = "/run/netlab"
_FLAG = f"{STATE_DIR}/made-run-netns"


@contextlib.contextmanager
def run_dir() -> Iterator[None]:
    """Keep /run/netns a shared mount point during the body, making it one first if need be.

    NetlabError (exit 3) without the privilege to.
    """
    require_privilege()
    lock = lock_directory(STATE_DIR, fcntl.LOCK_SH)
    try:
        while not _share_run_dir():
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _share_run_dir():
                _make_run_dir()
            # Not atomic, hence once more round.
            fcntl.flock(lock, fcntl.LOCK_SH)
        yield
    finally:
        os.close(lock)


def release_run_dir() -> None:
    """Undo what :func:`run_dir` made, if nothing is left in /run/netns and nobody is at work."""
    with contextlib.suppress(OSError):
        lock = lock_directory(STATE_DIR, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            _unmake_run_dir()
            os.rmdir(STATE_DIR)  # stays while another lab has files there
        finally:
            os.close(lock)


def _share_run_dir() -> bool:
    try:
        mount("", RUN_DIR, None, MS_SHARED | MS_REC)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOENT):  # no mount point, no directory
            return False
        raise
    return True


def _make_run_dir() -> None:
    made = "mount"
    with contextlib.suppress(FileExistsError):
        os.mkdir(RUN_DIR, mode=0o755)
        made = "directory"
    with open(_FLAG, "w") as flag:
        flag.write(made)
    if os.listdir(RUN_DIR):
        mount(RUN_DIR, RUN_DIR, None, MS_BIND | MS_REC)
    else:
        mount("netns", RUN_DIR, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC)
        os.chmod(RUN_DIR, 0o755)


def _unmake_run_dir() -> None:
    with contextlib.suppress(FileNotFoundError):
        with open(_FLAG) as flag:
            made = flag.read()
        if os.listdir(RUN_DIR):
            return
        umount(RUN_DIR, MNT_DETACH)
        os.unlink(_FLAG)
        if made == "directory":
            os.rmdir(RUN_DIR)


def lock_directory(directory: str, how: int) -> int:
    """Make a directory for root alone and lock it; returns the descriptor that holds the lock.

    The lock goes with the directory: who waited for one that was removed meanwhile starts again.
    `how` is that of fcntl.flock; with LOCK_NB BlockingIOError if somebody has it.
    """
    while True:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        try:
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, how)
            with contextlib.suppress(FileNotFoundError):
                if os.stat(directory).st_ino == os.fstat(descriptor).st_ino:
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
