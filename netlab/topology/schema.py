"""JSON Schema of the documents of a topology file, for editors.

An object is checked by its apiVersion and kind; kinds that netlab does not read pass.
"""

from __future__ import annotations

from typing import Any

import msgspec

from netlab.topology import kubernetes as k8s
from netlab.topology import lab_document


def schema() -> dict[str, Any]:
    """The schema of one document, draft 2020-12."""
    kinds: dict[tuple[str, str], type] = {
        (lab_document.API_VERSION, kind): cls for kind, cls in lab_document.KINDS.items()
    }
    for (group, kind), cls in k8s.KINDS.items():
        kinds[f"{group}/v1".removeprefix("/"), kind] = cls
    references, definitions = msgspec.json.schema_components(
        list(kinds.values()), ref_template="#/$defs/{name}"
    )
    rules = [
        _when(version, kind, reference)
        for (version, kind), reference in zip(kinds, references, strict=True)
    ]
    a_list = {"properties": {"items": {"type": "array", "items": {"$ref": "#"}}}}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "netlab topology",
        "description": "One document of a netlab topology file",
        "type": "object",
        "properties": {"apiVersion": {"type": "string"}, "kind": {"type": "string"}},
        "required": ["apiVersion", "kind"],
        "allOf": [*rules, _when("v1", "List", a_list)],
        "$defs": definitions,
    }


def _when(version: str, kind: str, then: dict[str, Any]) -> dict[str, Any]:
    says = {"apiVersion": {"const": version}, "kind": {"const": kind}}
    return {"if": {"properties": says}, "then": then}
