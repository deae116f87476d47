"""`netlab topology`: lists, shows, checks."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from netlab.cli.topology import topology
from netlab.problems import NetlabError
from netlab.topology import kubernetes, lab_document
from netlab.topology.load import load, shipped


def run(*arguments: str) -> Result:
    """`netlab topology ARGUMENTS`, as main runs it."""
    return CliRunner().invoke(topology, arguments, standalone_mode=False, catch_exceptions=False)


def test_ls() -> None:
    result = run("ls")
    assert re.search(r"^two-node-vxlan +Two nodes, pods on both", result.stdout, re.MULTILINE)
    rows = json.loads(run("ls", "-o", "json").stdout)
    assert [row["name"] for row in rows] == sorted(shipped())
    assert run("ls", "-o", "name").stdout.split() == sorted(shipped())


def test_show_prints_what_loads_again(tmp_path: Path) -> None:
    file = tmp_path / "copy.yaml"
    file.write_text(run("show", "two-node-vxlan").stdout)
    assert load(file).lab == load("two-node-vxlan").lab


def test_show_of_what_there_is_not() -> None:
    with pytest.raises(NetlabError, match="two-node-vxlan"):
        run("show", "two-node-vxlam")


def test_validate(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("apiVersion: v1\nkind: Pod\nmetadata: {name: A}\n---\nkind: Pod\n")
    result = run("validate", "two-node-vxlan", str(bad), "one-node")
    assert result.return_value == 2
    lines = result.stdout.splitlines()
    assert lines[0] == ("✓ two-node-vxlan: lab two-node-vxlan with 2 nodes, 4 pods, 2 services")
    assert lines[1].startswith("✓ one-node: lab one-node with 1 node, 3 pods, 1 service")
    assert f"{bad}:3:18: error[bad-name]" in result.stderr
    assert f"{bad}:5:1: error[missing-field]" in result.stderr
    assert run("validate", "two-node-vxlan").return_value == 0


def test_validate_as_json(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("kind: Pod\n")
    result = run("validate", "-o", "json", "one-node", str(bad))
    assert result.return_value == 2
    good, wrong = json.loads(result.stdout)
    assert (good["valid"], good["pods"], good["problems"]) == (True, 3, [])
    assert wrong["valid"] is False
    (problem,) = wrong["problems"]
    assert (problem["code"], problem["line"], problem["column"]) == ("missing-field", 1, 1)


# The schema


def schema() -> dict[str, object]:
    """The published schema."""
    found = json.loads(run("schema").stdout)
    assert isinstance(found, dict)
    return found


def test_schema_has_every_kind_and_no_dangling_reference() -> None:
    found = schema()
    text = json.dumps(found)
    definitions = found["$defs"]
    assert isinstance(definitions, dict)
    assert {name for _, name in kubernetes.KINDS} | {"Lab"} <= set(definitions)
    assert set(re.findall(r'"\$ref": "#/\$defs/([^"]+)"', text)) <= set(definitions)


def test_schema_is_as_strict_as_the_loader() -> None:
    definitions = schema()["$defs"]
    assert isinstance(definitions, dict)
    lab = definitions["LabSpec"]
    assert lab["additionalProperties"] is False
    assert list(lab["properties"]) == [
        field.encode_name for field in msgspec.structs.fields(lab_document.LabSpec)
    ]
    assert definitions["PodSpec"].get("additionalProperties") is not False
