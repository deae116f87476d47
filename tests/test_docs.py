"""Every command that the README and the pages show is run, in order, page by page.

Commands are the lines of `console` blocks that begin with "$ ".  A command succeeds unless it ends
in a comment such as `# exit 1`.  Blocks that are marked `console elsewhere` are for other places
(another distribution, a clone over the network) and are not run.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from labs import fresh_name
from netlab.lab import lifecycle

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    p for p in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")] if "$ " in p.read_text()
)
# `make test` runs this very test.
NOT_RUN = ("make test", "make bench")


def commands(page: Path) -> Iterator[tuple[str, int]]:
    """Commands of a page with the exit code that they should have."""
    for block in re.findall(r"^```console\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        for line in block.splitlines():
            if not line.startswith("$ "):
                continue
            command = line[2:].replace("sudo ", "")
            if command.startswith(NOT_RUN):
                continue
            expected = re.search(r"# exit (\d+)", command)
            yield command, int(expected[1]) if expected else 0


@pytest.mark.kernel
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands(page: Path, tmp_path: Path) -> None:
    name = fresh_name()
    # Where `make install` puts the command, instead of /usr/local.
    (tmp_path / "bin").mkdir()
    path = (
        f"{tmp_path}/bin",
        Path(sys.executable).parent,
        os.environ["PATH"],
        "/usr/sbin",
        "/sbin",
    )
    environment = {
        **os.environ,
        "PATH": ":".join(map(str, path)),
        "PREFIX": str(tmp_path),
        "NETLAB_LAB": name,
    }
    run = list(commands(page))
    assert run, f"{page.name} shows no command"
    try:
        for command, expected in run:
            done = subprocess.run(
                ["bash", "-c", command],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=120,
            )
            assert done.returncode == expected, (
                f"{command}\nexit {done.returncode}, not {expected}\n{done.stdout}{done.stderr}"
            )
    finally:
        lifecycle.down(name)
