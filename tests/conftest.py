"""What holds for all tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

import second_kernel
from netlab.kernel.namespaces import open_current
from netlab.kernel.syscalls import CLONE_NEWNET, setns, unshare
from netlab.lab import lifecycle
from netlab.topology.model import Lab


def pytest_addoption(parser: pytest.Parser) -> None:
    second_kernel.add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    second_kernel.register(config)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without root the pure tests still run; `make test` runs all as root."""
    if os.geteuid() == 0:
        return
    for item in items:
        if item.get_closest_marker("kernel"):
            item.add_marker(pytest.mark.skip(reason="needs root: makes network namespaces"))


@pytest.fixture
def namespace() -> Iterator[int]:
    """A descriptor of a fresh network namespace that has no name and ends with it."""
    home = open_current()
    unshare(CLONE_NEWNET)
    fresh = open_current()
    setns(home, CLONE_NEWNET)
    os.close(home)
    yield fresh
    os.close(fresh)


@pytest.fixture
def up() -> Iterator[Callable[[Lab], lifecycle.Outcome]]:
    """Bring labs up; they are taken down afterwards."""
    names: set[str] = set()

    def bring_up(lab: Lab) -> lifecycle.Outcome:
        names.add(lab.name)
        return lifecycle.up(lab)

    yield bring_up
    for name in names:
        lifecycle.down(name)
