"""Labs and traces from Python, as docs/python.md shows them."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from html import unescape
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

import netlab
from labs import fresh_name
from netlab.kernel import namespaces
from netlab.lab import lifecycle
from netlab.report.html import WIDTH
from netlab.report.terminal import print_trace

PAGE = Path(__file__).parent.parent / "docs" / "python.md"
kernel = pytest.mark.kernel


def examples(name: str) -> Iterator[str]:
    """The Python of the page, with a lab name that nobody else has."""
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE):
        yield block.replace("ci-blog", name)


@kernel
def test_the_examples_hold(tmp_path: Path) -> None:
    name = fresh_name()
    script, tests = examples(name)
    exec(compile(script, str(PAGE), "exec"), {})
    assert not namespaces.names_of(name)
    file = tmp_path / "test_blog.py"
    file.write_text(tests)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "6 passed" in done.stdout
    assert not [each for each in lifecycle.running() if each.startswith(name)]


@kernel
def test_a_lab_that_was_up_stays_up() -> None:
    name = fresh_name()
    lab = netlab.Lab("two-node-vxlan", name, nodes=["k8s-slave1"])
    try:
        lab.up()
        with netlab.Lab("two-node-vxlan", name, nodes=["k8s-slave1"]) as again:
            assert [node.name for node in again.declared.nodes] == ["k8s-slave1"]
        running = netlab.Running(name)
        assert running.declared == lab.declared
        found = list(running.traces("pod1", "myblog-5c97d79cdb-jn7km", 2))
        assert [each.endpoint for each in found] == ["demo/myblog-5c97d79cdb-jn7km"] * 2
        running.down()
        assert not namespaces.names_of(name)
    finally:
        lab.down()
    with pytest.raises(netlab.NetlabError, match="unknown-lab"):
        lab.trace("pod1", "svc/myblog")


@kernel
def test_a_body_that_fails_leaves_nothing() -> None:
    name = fresh_name()

    def fail() -> None:
        with netlab.Lab("one-node", name):
            assert namespaces.names_of(name)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not namespaces.names_of(name)


@kernel
def test_a_notebook_shows_what_the_terminal_shows() -> None:
    with netlab.Lab("two-node-vxlan", fresh_name()) as lab:
        found = lab.trace("pod1", "svc/myblog")
    html = found._repr_html_()
    output = StringIO()
    print_trace(found, Console(file=output, width=WIDTH, highlight=False))
    assert unescape(re.sub(r"<[^>]*>", "", html)) == output.getvalue()
    # Safe to show, and all there: no script, nothing that is fetched.
    assert set(re.findall(r"<(\w+)", html)) == {"pre", "code", "span"}
    assert not re.search(r"(?:src|href|url)\s*[=(]", html)


def test_import_loads_next_to_nothing() -> None:
    script = "import netlab, sys; print(*sys.modules); dir(netlab); netlab.Trace"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert not {each for each in loaded if each.startswith("netlab.")}
    assert not loaded & {"msgspec", "scapy", "rich", "yaml", "asyncio"}
    assert set(netlab.__all__) <= set(dir(netlab))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        netlab.nothing  # noqa: B018
