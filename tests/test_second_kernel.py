"""The second kernel: commands on it, what it has, and how its tests are told."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from click.testing import CliRunner

import second_kernel
from netlab.cli.doctor import doctor
from netlab.cli.main import netlab
from netlab.problems import NetlabError
from netlab.vm import machine, packaged_kernel, programs
from netlab.vm.packaged_kernel import Kernel

ROOT = Path(__file__).parent.parent
NETLAB = str(Path(sys.executable).parent / "netlab")

Play = Callable[[list[str], Callable[[dict[str, object]], None]], None]
"""What a machine does with tests: it tells by its second argument."""


@pytest.mark.vm
def test_it_has_what_other_kernels_lack() -> None:
    told = json.loads(CliRunner().invoke(doctor, ["-o", "json"]).stdout)
    there = {check["name"] for check in told if check["ok"]}
    assert there >= {"ip_vs", "dummy", "netem", "ipip", "sctp", "BPF", "conntrack events"}


# -- the command ---------------------------------------------------------------------------------


@pytest.mark.vm("own kernel")
def test_this_is_another_kernel_with_the_same_files() -> None:
    assert Path("/proc/sys/kernel/hostname").read_text().strip() == "netlab-vm"


def test_a_command_has_its_streams_and_status(tmp_path: Path) -> None:
    try:
        programs.require()
    except NetlabError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    (tmp_path / "kept").mkdir()
    (tmp_path / "host").write_text("mine")
    script = (
        f"cat; echo err >&2; cat {tmp_path}/host; echo no > {tmp_path}/host; "
        f"echo yes > {tmp_path}/kept/file; id -u; command -v netlab; exit 7"
    )
    done = subprocess.run(
        [NETLAB, "vm", "-w", str(tmp_path / "kept"), "--", "sh", "-c", script],
        input="typed\n",
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
    )
    assert (done.returncode, done.stdout, done.stderr) == (7, f"typed\nmine0\n{NETLAB}\n", "err\n")
    assert (tmp_path / "kept" / "file").read_text() == "yes\n"
    assert (tmp_path / "host").read_text() == "mine"


def test_a_shell_needs_a_terminal() -> None:
    with pytest.raises(NetlabError, match="this is no terminal") as raised:
        CliRunner().invoke(netlab, ["vm"], catch_exceptions=False)
    assert raised.value.exit_code == 2


def test_what_is_missing_is_named_with_its_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "_found", lambda name: None)
    with pytest.raises(NetlabError) as raised:
        CliRunner().invoke(netlab, ["vm", "--", "true"], catch_exceptions=False)
    assert raised.value.exit_code == 3
    assert len(raised.value.problems) == 3
    hints = {problem.hint for problem in raised.value.problems}
    assert hints == {
        "`sudo apt-get install --no-install-recommends qemu-system-x86 busybox-static kmod`"
    }


def test_a_machine_that_ends_shows_its_console(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object) -> int:
        raise machine.Ended("it ended", b"one\nKernel panic\n", booted=False)

    monkeypatch.setattr(machine, "run", run)
    done = CliRunner().invoke(netlab, ["vm", "--", "true"])
    assert isinstance(done.exception, NetlabError)
    assert done.exception.exit_code == 3
    assert "Kernel panic" in done.stderr
    hint = done.exception.problems[0].hint
    assert hint is not None
    file = Path(hint.rpartition(" ")[2])
    assert file.read_text() == "one\nKernel panic\n"
    file.unlink()


# -- the kernel ----------------------------------------------------------------------------------


def test_modules_come_after_what_they_need(tmp_path: Path) -> None:
    (tmp_path / "modules.dep").write_text(
        "kernel/a.ko: kernel/b-c.ko kernel/d.ko\nkernel/b-c.ko: kernel/d.ko\nkernel/d.ko:\n"
    )
    found = Kernel("6.1", tmp_path, tmp_path).module_files("b_c", "a", "built_in")
    assert [file.name for file in found] == ["d.ko", "b-c.ko", "a.ko"]


@pytest.mark.parametrize("content", [b"", b"no package", b"!<arch>\n", b"!<arch>\n" + b"x" * 60])
def test_a_package_that_is_none_is_refused(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "given.deb").write_bytes(content)
    monkeypatch.setenv("NETLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NETLAB_VM_PACKAGE", str(tmp_path / "given.deb"))
    with pytest.raises(NetlabError, match="is no package that can be read") as raised:
        packaged_kernel.kernel()
    assert raised.value.exit_code == 3
    assert [path.name for path in (tmp_path / "cache" / "vm").iterdir()] == ["lock"]


def package(path: Path, **files: bytes) -> None:
    """A package of Debian with these files; "_" in their names stands for "/"."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo("./" + name.replace("_", "/"))
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    data = packed.getvalue()
    header = b"%-16s%-12d%-6d%-6d%-8s%-10d`\n" % (b"data.tar.xz", 0, 0, 0, b"100644", len(data))
    path.write_bytes(b"!<arch>\n" + header + data)


def test_a_package_is_unpacked_by_every_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python 3.11.2, that of Debian 12, has no filters of members."""

    def extract(self: tarfile.TarFile, member: tarfile.TarInfo, path: str = "") -> None:
        raise TypeError("extract() got an unexpected keyword argument 'filter'")

    monkeypatch.setattr(tarfile.TarFile, "extract", extract)
    monkeypatch.setattr(packaged_kernel, "_index_modules", lambda work, release: None)
    package(
        tmp_path / "given.deb",
        **{
            "boot_vmlinuz-6.1-x": b"kernel",
            "lib_modules_6.1-x_kernel_a.ko": b"module",
            "lib_modules_6.1-x_modules.order": b"kernel/a.ko",
        },
    )
    monkeypatch.setenv("NETLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NETLAB_VM_PACKAGE", str(tmp_path / "given.deb"))
    kernel = packaged_kernel.kernel()
    assert kernel.release == "6.1-x"
    assert kernel.image.read_bytes() == b"kernel"
    assert (kernel.modules / "kernel" / "a.ko").read_bytes() == b"module"
    assert (kernel.modules / "modules.order").read_bytes() == b"kernel/a.ko"


def test_a_package_writes_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path / "given.deb", **{"lib_modules_6.1-x_.._.._.._.._evil": b"x"})
    monkeypatch.setenv("NETLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NETLAB_VM_PACKAGE", str(tmp_path / "given.deb"))
    with pytest.raises(NetlabError, match="is no package that can be read"):
        packaged_kernel.kernel()
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "given.deb"}
    assert [path.name for path in (tmp_path / "cache" / "vm").iterdir()] == ["lock"]


# -- tests on it ---------------------------------------------------------------------------------


def told(play: Play, monkeypatch: pytest.MonkeyPatch) -> Mapping[str, tuple[list[str], str | None]]:
    """What is told of the tests a, b and c: when they were reported, and what went wrong."""

    def run(job: machine.Job, hear: Mapping[str, machine.Hear], *_: object) -> int:
        def tell(message: dict[str, object]) -> None:
            line = json.dumps(message).encode() + b"\n"
            hear["data"](line[:5])
            hear["data"](line[5:])

        play(json.loads(job.files["pytest.json"]), tell)
        return 0

    monkeypatch.setattr(machine, "run", run)
    results = second_kernel.Results(ROOT, [], ["a", "b", "c"])
    every = {test: results.of(test) for test in "cab"}
    return {
        test: ([report["when"] for report in reports], error)
        for test, (reports, error) in every.items()
    }


PHASES = ["setup", "call", "teardown"]


def passed(test: str, tell: Callable[[dict[str, object]], None]) -> None:
    tell({"start": test})
    for when in PHASES:
        tell({"report": {"nodeid": test, "when": when}})


def test_reports_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def play(tests: list[str], tell: Callable[[dict[str, object]], None]) -> None:
        for test in tests:
            passed(test, tell)

    assert told(play, monkeypatch) == dict.fromkeys("abc", (PHASES, None))


def test_a_test_that_ends_the_machine_is_an_error_and_the_next_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    boots: list[list[str]] = []

    def play(tests: list[str], tell: Callable[[dict[str, object]], None]) -> None:
        boots.append(tests)
        for test in tests:
            if test == "b":
                tell({"start": test})
                tell({"report": {"nodeid": test, "when": "setup"}})
                raise machine.Ended("it ended", b"Kernel panic", booted=True)
            passed(test, tell)

    found = told(play, monkeypatch)
    assert boots == [["a", "b", "c"], ["c"]]
    assert found["a"] == found["c"] == (PHASES, None)
    phases, error = found["b"]
    assert phases == ["setup"]
    assert error is not None
    assert "it ended" in error
    assert "Kernel panic" in error


def test_a_machine_that_does_not_start_fails_every_test_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    boots: list[list[str]] = []

    def play(tests: list[str], tell: Callable[[dict[str, object]], None]) -> None:
        boots.append(tests)
        raise machine.Ended("it did not start", b"no root", booted=False)

    for phases, error in told(play, monkeypatch).values():
        assert phases == []
        assert error is not None
        assert "it did not start" in error
        assert "no root" in error
    assert len(boots) == 1


def test_a_test_that_cannot_be_collected_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def play(tests: list[str], tell: Callable[[dict[str, object]], None]) -> None:
        tell({"uncollected": "no module named x"})
        passed("a", tell)

    found = told(play, monkeypatch)
    assert found["a"] == (PHASES, None)
    for test in "bc":
        error = found[test][1]
        assert error is not None
        assert "no module named x" in error
