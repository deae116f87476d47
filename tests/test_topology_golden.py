"""What was given to the real kube-proxy (tests/golden), read by the project's own loader.

The other tests of rules read it without the loader (services_golden.py): here the way from a file
to rules is one piece.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from msgspec.structs import replace

from netlab.datapath.services import iptables, nftables
from netlab.topology.load import load
from netlab.topology.model import Lab, Node
from services_golden import GOLDEN, NFTABLES_STATES, SECOND_ADDRESS, STATES

# Of the process, not of the rules; and what a limit of the whole machine's table is computed from.
_NOT_OF_A_LAB = ("apiVersion", "kind", "hostnameOverride")
_NOT_OF_A_LABS_CONNTRACK = ("maxPerCore", "min")


def _loaded(state: str, directory: Path) -> tuple[Lab, Node]:
    """The lab of a state's objects, with its configuration as `spec.serviceProxy`."""
    config: dict[str, Any] = yaml.safe_load((GOLDEN / state / "config.yaml").read_text())
    proxy = {name: value for name, value in config.items() if name not in _NOT_OF_A_LAB}
    for name in _NOT_OF_A_LABS_CONNTRACK:
        proxy["conntrack"].pop(name, None)
    proxy.setdefault("clusterCIDR", "")  # none; a lab that leaves it out has its own
    own = {
        "apiVersion": "netlab/v1",
        "kind": "Lab",
        "metadata": {"name": "golden"},
        "spec": {"serviceProxy": proxy},
    }
    file = directory / "t.yaml"
    objects = (GOLDEN / state / "objects.yaml").read_text()
    file.write_text(f"{json.dumps(own)}\n---\n{objects}")
    lab = load(file).lab
    node = lab.node(config["hostnameOverride"])
    if state in SECOND_ADDRESS:
        node = replace(node, other_addresses=(*node.other_addresses, *SECOND_ADDRESS[state]))
    return lab, node


def _read(state: str, name: str) -> str:
    return (GOLDEN / state / name).read_text()


@pytest.mark.parametrize("state", STATES)
def test_objects_of_a_file_give_the_iptables_rules_of_the_real_kube_proxy(
    state: str, tmp_path: Path
) -> None:
    rules = iptables.render(*_loaded(state, tmp_path))
    assert rules.ipv4.replace(" [0:0]", "") == _read(state, "iptables.txt")
    assert rules.ipv6.replace(" [0:0]", "") == _read(state, "ip6tables.txt")


@pytest.mark.parametrize("state", NFTABLES_STATES)
def test_objects_of_a_file_give_the_nftables_rules_of_the_real_kube_proxy(
    state: str, tmp_path: Path
) -> None:
    tables = nftables.render(*_loaded(state, tmp_path)).tables
    assert "".join(table.text for table in tables) == _read(state, "nftables.txt")
