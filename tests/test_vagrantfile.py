"""The Vagrantfile is one that Vagrant takes, with the nodes of the topology that it is for."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from netlab.topology.load import load

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(not shutil.which("vagrant"), reason="vagrant is not installed")
@pytest.mark.parametrize("nodes", [2, 5])
def test_vagrant_takes_it(nodes: int, tmp_path: Path) -> None:
    shutil.copy(ROOT / "Vagrantfile", tmp_path)
    environment = {**os.environ, "NETLAB_NODES": str(nodes), "VAGRANT_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        ["vagrant", "validate", "--ignore-provider"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"k8s-slave{nodes}:" in done.stdout
    assert "outside:" in done.stdout


def test_its_machines_are_the_nodes_of_the_topology() -> None:
    text = (ROOT / "Vagrantfile").read_text()
    for node in load("two-node-vxlan").lab.nodes:
        assert f'"{node.name}" => "{node.address}"' in text
