"""Set-up: what is locked, what a second run does, what other distributions are told.

The script runs on a copy of the project with stand-ins for the programs that would install
something; where it would write to /usr/sbin, that is a file system of the test's own.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# Answers every question of the script, makes an "environment" and writes down what it was asked.
PYTHON = """#!/bin/sh
echo "$*" >>"$LOG"
case "$*" in
*sys.executable*) echo "$0" ;;
"-V") echo Python 3.11.99 ;;
"-m venv"*) mkdir -p .venv/bin && touch .venv/pyvenv.cfg && cp "$0" .venv/bin/python ;;
*--editable*) touch .venv/bin/netlab && chmod +x .venv/bin/netlab ;;
esac
"""

# Knows a package only after `update`; tells what policy-rc.d says while packages are installed.
APT_GET = """#!/bin/sh
case "$*" in
*update*) touch "$LOG.updated" ;;
*install*)
    [ -e "$LOG.updated" ] || exit 100
    echo "install $*" >>"$LOG"
    /usr/sbin/policy-rc.d some-daemon start; echo "policy $?" >>"$LOG"
    ;;
esac
"""


def locked(name: str) -> dict[str, str]:
    """Package and version of each line that pins one."""
    found = re.findall(r"^([a-z0-9-]+)==(\S+)", (ROOT / name).read_text(), re.MULTILINE)
    return dict(found)


def normal(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match
    return re.sub(r"[-_.]+", "-", match[0]).lower()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of what the script reads, and a place for stand-ins before everything in PATH."""
    copy = tmp_path / "project"
    copy.mkdir()
    for name in ("bootstrap.sh", "pyproject.toml", "requirements.lock", "requirements-dev.lock"):
        shutil.copy(ROOT / name, copy / name)
    (copy / "netlab").mkdir()
    (tmp_path / "bin").mkdir()
    return copy


def stand_in(project: Path, name: str, text: str) -> None:
    path = project.parent / "bin" / name
    path.write_text(text)
    path.chmod(0o755)


def asked(project: Path) -> str:
    log = project.parent / "log"
    text = log.read_text() if log.exists() else ""
    log.unlink(missing_ok=True)
    return text


def run(project: Path, *arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """Run the script; `before` is done first, in a mount namespace of its own."""
    bin_directory = project.parent / "bin"
    command = ["sh", str(project / "bootstrap.sh"), *arguments]
    if before:
        command = ["unshare", "--mount", "sh", "-ec", f'{before}\nexec "$@"', "sh", *command]
    return subprocess.run(
        command,
        env={
            "PATH": f"{bin_directory}:/usr/local/bin:/usr/bin:/bin",
            "LOG": str(project.parent / "log"),
            "PYTHON": str(bin_directory / "python"),
            "SUDO": "true",  # nothing of this is to happen on the machine itself
        },
        capture_output=True,
        text=True,
        check=False,
    )


def test_everything_that_the_project_names_is_locked_with_hashes() -> None:
    needed = {normal(name) for name in PROJECT["dependencies"]}
    assert needed <= set(locked("requirements.lock"))
    development = {normal(name) for name in PROJECT["optional-dependencies"]["dev"]}
    assert needed | development <= set(locked("requirements-dev.lock"))
    for name in ("requirements.lock", "requirements-dev.lock"):
        for block in re.split(r"\n(?=[a-z0-9-]+==)", (ROOT / name).read_text())[1:]:
            assert "--hash=sha256:" in block, block


def test_both_locks_agree() -> None:
    development = locked("requirements-dev.lock")
    for package, version in locked("requirements.lock").items():
        assert development[package] == version


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-dev.lock"])
def test_locks_name_no_server(name: str) -> None:
    text = (ROOT / name).read_text()
    assert "://" not in text
    assert "--index-url" not in text


def test_a_stage_must_be_named(project: Path) -> None:
    result = run(project)
    assert result.returncode == 2
    assert "./bootstrap.sh test" in result.stderr


def test_a_second_run_installs_nothing_and_a_changed_lock_does(project: Path) -> None:
    stand_in(project, "python", PYTHON)
    first = run(project, "use")
    assert first.returncode == 0, first.stderr
    said = asked(project)
    assert "--require-hashes --requirement requirements.lock" in said
    assert "--editable ." in said

    second = run(project, "use")
    assert (second.returncode, second.stderr) == (0, "")
    assert "-m pip" not in asked(project)

    with (project / "requirements.lock").open("a") as lock:
        lock.write("# changed\n")
    assert run(project, "use").returncode == 0
    assert "--require-hashes" in asked(project)


def test_what_tests_need_suffices_for_use(project: Path) -> None:
    stand_in(project, "python", PYTHON)
    assert run(project, "test").returncode == 0
    assert "--requirement requirements-dev.lock" in asked(project)
    assert run(project, "use").returncode == 0
    assert "-m pip" not in asked(project)


def test_failing_to_fetch_is_said_in_one_sentence(project: Path) -> None:
    stand_in(
        project, "python", PYTHON.replace('case "$*" in', 'case "$*" in\n*hashes*) exit 1 ;;', 1)
    )
    result = run(project, "use")
    assert result.returncode == 3
    assert "Is the network there?" in result.stderr
    # and is tried again the next time
    stand_in(project, "python", PYTHON)
    (project / ".venv/bin/python").unlink()
    assert run(project, "use").returncode == 0
    assert "--require-hashes" in asked(project)


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("release", "told"),
    [
        ("ID=fedora", "sudo dnf install iptables-nft"),
        ('ID=rocky\nID_LIKE="rhel centos fedora"', "sudo dnf install iptables-nft"),
        ("ID=arch", "sudo pacman -S --needed iptables"),
        ("ID=alpine", "sudo apk add iptables"),
        ('ID=opensuse-leap\nID_LIKE="suse opensuse"', "sudo zypper install iptables"),
        ("ID=other", "on Debian the packages are called iptables"),
    ],
)
def test_other_distributions_are_told_their_packages(
    project: Path, release: str, told: str
) -> None:
    stand_in(project, "python", PYTHON)
    (project.parent / "os-release").write_text(release + "\n")
    result = run(
        project,
        "use",
        before=f"mount --bind {project.parent}/os-release /etc/os-release\n"
        "mount -t tmpfs tmpfs /usr/sbin",
    )
    assert result.returncode == 3
    assert told in result.stderr


@pytest.mark.kernel
def test_another_distribution_goes_on_if_the_programs_are_there(project: Path) -> None:
    stand_in(project, "python", PYTHON)
    (project.parent / "os-release").write_text("ID=other\n")
    before = f"mount --bind {project.parent}/os-release /etc/os-release"
    result = run(project, "use", before=before)
    assert result.returncode == 0, result.stderr


@pytest.mark.kernel
def test_debian_packages_come_without_their_daemons_running(project: Path) -> None:
    stand_in(project, "apt-get", APT_GET)
    result = run(
        project,
        "packages",
        "some-daemon",
        before="mount -t tmpfs tmpfs /usr/sbin",
    )
    assert result.returncode == 0, result.stderr
    said = asked(project).splitlines()
    assert said[0].endswith("--no-install-recommends some-daemon")
    assert said[1] == "policy 101"


@pytest.mark.kernel
@pytest.mark.parametrize("fails", [False, True])
def test_the_policy_is_removed_whatever_happens(project: Path, fails: bool) -> None:
    stand_in(project, "apt-get", "#!/bin/sh\nexit 100\n" if fails else APT_GET)
    result = run(
        project,
        "packages",
        "some-daemon",
        before=f"mount -t tmpfs tmpfs /usr/sbin\n"
        f"sh {project}/bootstrap.sh packages other || test $? = 3\n"
        "test ! -e /usr/sbin/policy-rc.d",
    )
    assert result.returncode == (3 if fails else 0), result.stderr
    assert ("Is the network there?" in result.stderr) == fails


@pytest.mark.kernel
def test_a_policy_of_somebody_else_stays(project: Path) -> None:
    stand_in(project, "apt-get", APT_GET)
    theirs = "#!/bin/sh\\nexit 104\\n"
    result = run(
        project,
        "packages",
        "some-daemon",
        before="mount -t tmpfs tmpfs /usr/sbin\n"
        f"printf '{theirs}' >/usr/sbin/policy-rc.d; chmod +x /usr/sbin/policy-rc.d",
    )
    assert result.returncode == 0, result.stderr
    assert "policy 104" in asked(project)


@pytest.mark.kernel
def test_a_policy_left_by_a_kill_holds_no_daemon_back(project: Path) -> None:
    kill = APT_GET.replace("*update*)", "*install*) kill -9 $PPID; exit ;;\n*update*)")
    stand_in(project, "apt-get", kill)
    script = "\n".join(
        (
            "mount -t tmpfs tmpfs /usr/sbin",
            f"sh {project}/bootstrap.sh packages some-daemon || test $? = 137",
            "test -e /usr/sbin/policy-rc.d",
            "/usr/sbin/policy-rc.d some-daemon start",
        )
    )
    assert run(project, "anything", before=script).returncode == 2


def test_the_script_is_plain_shell() -> None:
    for shell in ("dash", "bash", "busybox"):
        path = shutil.which(shell)
        if path:
            command = [path, *(["sh"] if shell == "busybox" else []), "-n"]
            subprocess.run([*command, str(ROOT / "bootstrap.sh")], check=True)
    assert os.access(ROOT / "bootstrap.sh", os.X_OK)
