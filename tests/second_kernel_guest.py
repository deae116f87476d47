"""What runs in the virtual machine: pytest over the tests that were chosen, telling as it goes.

Each line to the host is JSON: `{"start": ID}` before a test, `{"report": ...}` for each report of
pytest, in the form that pytest itself gives them for other processes.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import pytest

DIRECTORY = "/run/netlab-vm"


class Tell:
    """Sends what happens to the host."""

    def __init__(self) -> None:
        self._channel = os.open(f"{DIRECTORY}/data", os.O_WRONLY)
        self._config: pytest.Config | None = None

    def pytest_configure(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._send({"start": nodeid})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._send({"report": self._plain(report)})

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._send({"uncollected": str(report.longrepr)})

    def _plain(self, report: pytest.TestReport) -> dict[str, Any] | None:
        assert self._config is not None
        plain: dict[str, Any] | None = self._config.hook.pytest_report_to_serializable(
            config=self._config, report=report
        )
        return plain

    def _send(self, message: dict[str, Any]) -> None:
        data = json.dumps(message, default=repr).encode() + b"\n"
        while data:
            data = data[os.write(self._channel, data) :]


if __name__ == "__main__":
    with open(f"{DIRECTORY}/pytest.json") as file:
        arguments = json.load(file)
    sys.exit(pytest.main(arguments, plugins=[Tell()]))
