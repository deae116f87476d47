"""The second kernel has what the others lack."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from netlab.cli.doctor import doctor


@pytest.mark.vm
def test_it_has_what_other_kernels_lack() -> None:
    told = json.loads(CliRunner().invoke(doctor, ["-o", "json"]).stdout)
    there = {check["name"] for check in told if check["ok"]}
    assert there >= {"ip_vs", "dummy", "netem", "ipip", "sctp", "BPF", "conntrack events"}
