"""The kernel of the virtual machine: Debian's, unpacked once into a cache of ours.

Nothing is installed: the package is fetched by apt, which checks whose it is, and its kernel and
modules are unpacked beside each other.  The cache is `$NETLAB_CACHE`, or `netlab` in
`$XDG_CACHE_HOME` (`~/.cache`).  It may be removed at any time.
"""

from __future__ import annotations

import fcntl
import lzma
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

import msgspec

from netlab.problems import Exit, NetlabError, Problem
from netlab.vm.programs import program

_META = "linux-image-amd64"
_XZ = b"\xfd7zXZ\x00"
_FETCH_TIMEOUT_S = 600


class Kernel(msgspec.Struct, frozen=True):
    """A kernel that can be booted, and where its modules are.

    `image` is an ELF file that starts at once, or where the kernel is packed in a way that Python
    cannot undo, the file that unpacks itself.
    """

    release: str
    image: Path
    modules: Path

    def module_files(self, *names: str) -> list[Path]:
        """Files of modules with all that they need, in the order in which they can be loaded.

        Names of what is built into the kernel give nothing.  Source: modules.dep(5).
        """
        files: dict[str, list[str]] = {}
        for line in (self.modules / "modules.dep").read_text().splitlines():
            file, _, needed = line.partition(":")
            name = os.path.basename(file).partition(".")[0].replace("-", "_")
            files[name] = [*reversed(needed.split()), file]
        wanted = [file for name in names for file in files.get(name, ())]
        return [self.modules / file for file in dict.fromkeys(wanted)]


def cache_directory() -> Path:
    """Where what was fetched is kept."""
    given = os.environ.get("NETLAB_CACHE")
    if given:
        return Path(given).absolute() / "vm"
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base).absolute() / "netlab" / "vm"


def kernel() -> Kernel:
    """The kernel in the cache; fetched if none is there.

    NetlabError (exit 3) if it can neither be found nor fetched.
    """
    cache = cache_directory()
    found = _cached(cache)
    if found:
        return found
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _alone(cache):
            return _cached(cache) or _fetched(cache)
    except OSError as error:
        raise NetlabError(
            Problem(
                "vm-cache",
                f"the cache {cache} cannot be written to: {error.strerror or error}",
                hint="NETLAB_CACHE=DIRECTORY names another one",
            ),
            Exit.MACHINE,
        ) from None


def _cached(cache: Path) -> Kernel | None:
    """The newest kernel that is there; a directory has its name when all is in it."""
    for directory in sorted(cache.glob("kernel-*"), key=_version, reverse=True):
        release = directory.name.removeprefix("kernel-")
        images = [directory / "vmlinux", directory / "vmlinuz"]
        image = next((image for image in images if image.exists()), None)
        if image:
            return Kernel(release, image, directory / "modules")
    return None


def _version(directory: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", directory.name)]


@contextmanager
def _alone(cache: Path) -> Iterator[None]:
    """Hold what others who fetch wait for."""
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fetched(cache: Path) -> Kernel:
    for left_over in cache.glob("new-*"):  # by a process that was killed: we hold the lock
        shutil.rmtree(left_over, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix="new-", dir=cache))
    try:
        package = _package(work)
        release = _unpack(package, work)
        package.unlink()
        _index_modules(work, release)
        place = cache / f"kernel-{release}"
        os.rename(work, place)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    found = _cached(cache)
    if found is None:
        raise _no_kernel("the package has no kernel in it")
    return found


def _package(work: Path) -> Path:
    """The package's file, by this machine's lists of packages, or else by lists of our own."""
    given = os.environ.get("NETLAB_VM_PACKAGE")
    if given:
        try:
            return Path(shutil.copy(given, work / "given.deb"))
        except OSError as error:
            raise _no_kernel(f"{given}: {error.strerror}") from None
    if not shutil.which("apt-get"):
        raise _no_kernel("this machine has no apt-get to fetch it with")
    own = work / "apt"
    (own / "lists" / "partial").mkdir(parents=True)
    # The lists of a machine may be old or missing, and renewing them takes root.
    with_own_lists = (
        f"-oDir::State::lists={own}/lists",
        f"-oDir::Cache::pkgcache={own}/pkgcache.bin",
        f"-oDir::Cache::srcpkgcache={own}/srcpkgcache.bin",
    )
    said = ""
    for options in ((), with_own_lists):
        if options:
            said = _run(["apt-get", "-qq", *options, "update"], work) or said
        name = _package_name(options)
        said = (
            _run(["apt-get", "-qq", *options, "download", name], work)
            if name
            else f"there is no package {_META}"
        )
        for package in work.glob("linux-image-*.deb"):
            shutil.rmtree(own)
            return package
    raise _no_kernel(said)


def _package_name(options: tuple[str, ...]) -> str | None:
    """The package with the kernel itself: the one that the package for all releases needs."""
    shown = subprocess.run(
        ["apt-cache", *options, "show", _META],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    ).stdout
    found = re.search(r"^Depends:.*?\b(linux-image-[0-9][^\s,]*)", shown, re.MULTILINE)
    return found[1] if found else None


def _run(command: list[str], work: Path) -> str:
    """What a command said of its failure, "" if it succeeded."""
    try:
        done = subprocess.run(
            command,
            cwd=work,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=_FETCH_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return f"`{' '.join(command[:1])}` took more than {_FETCH_TIMEOUT_S} s"
    lines = [line for line in done.stderr.splitlines() if line.startswith("E:")]
    return "" if done.returncode == 0 else (lines or ["E: failed"])[0]


def _no_kernel(said: str) -> NetlabError:
    return NetlabError(
        Problem(
            "vm-kernel",
            f"the package of the virtual machine's kernel could not be fetched: {said}",
            hint="is the network there? NETLAB_VM_PACKAGE=FILE takes a linux-image-...-amd64.deb "
            "of Debian (packages.debian.org) instead",
        ),
        Exit.MACHINE,
    )


def _unpack(package: Path, work: Path) -> str:
    """Kernel and modules of a package into `vmlinux` and `modules`; the release of the kernel.

    Source: deb(5), ar(5).
    """
    release = ""
    try:
        with open(package, "rb") as file, _files(file) as data:
            for member in data:
                path = member.name.removeprefix("./").removeprefix("usr/")
                parts = path.split("/")
                if path.startswith("boot/vmlinuz-") and (content := data.extractfile(member)):
                    _unpack_kernel(content.read(), work)
                elif path.startswith("lib/modules/") and len(parts) > 3 and parts[3] != "build":
                    release = parts[2]
                    _keep(data, member, work.joinpath("modules", *parts[3:]), work)
    except (tarfile.TarError, lzma.LZMAError, EOFError, ValueError) as error:
        raise _no_kernel(f"{package.name} is no package that can be read: {error}") from None
    if not release:
        raise _no_kernel(f"{package.name} has no modules in it")
    return release


def _keep(data: tarfile.TarFile, member: tarfile.TarInfo, place: Path, work: Path) -> None:
    """Put a file of the archive into its place; links are not needed.

    By hand, for Python has checked where members want to go since 3.11.4 only.
    """
    if not Path(os.path.normpath(place)).is_relative_to(work / "modules"):
        raise ValueError(f"it has a file {member.name}")
    content = data.extractfile(member) if member.isreg() else None
    if content is not None:
        place.parent.mkdir(parents=True, exist_ok=True)
        with open(place, "wb") as file:
            shutil.copyfileobj(content, file)


def _files(file: BufferedReader) -> tarfile.TarFile:
    """The archive of the package's files."""
    if file.read(8) != b"!<arch>\n":
        raise ValueError("it does not begin as one")
    while header := file.read(60):
        name, size = header[:16].strip().rstrip(b"/"), int(header[48:58])
        if name == b"data.tar.xz":
            return tarfile.open(fileobj=file, mode="r|xz")
        file.seek(size + size % 2, os.SEEK_CUR)
    raise ValueError("it has no data.tar.xz")


def _unpack_kernel(image: bytes, work: Path) -> None:
    """The ELF file inside: an emulated processor takes 4 to 5 s of each boot to unpack it."""
    start = image.find(_XZ)
    if start >= 0:
        try:
            plain = lzma.LZMADecompressor().decompress(image[start:])
        except lzma.LZMAError:
            plain = b""
        if plain.startswith(b"\x7fELF"):
            (work / "vmlinux").write_bytes(plain)
            return
    (work / "vmlinuz").write_bytes(image)


def _index_modules(work: Path, release: str) -> None:
    """Have depmod write down which module needs which."""
    directory = work / "depmod" / "lib" / "modules"
    directory.mkdir(parents=True)
    os.symlink(work / "modules", directory / release)
    said = _run([program("depmod"), "-b", str(work / "depmod"), release], work)
    shutil.rmtree(work / "depmod")
    if said or not (work / "modules" / "modules.dep").stat().st_size:
        raise _no_kernel(f"depmod could not read its modules: {said}")
