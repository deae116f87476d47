"""JSON Schema of what `netlab trace -o json` prints, for those who read it by program."""

from __future__ import annotations

from typing import Any

import msgspec

from netlab.trace import model, tally
from netlab.trace.model import Trace


def trace_schema() -> dict[str, Any]:
    """The schema of one trace, draft 2020-12."""
    return _schema(Trace, model.SCHEMA, "One probe: what became of it, there and back")


def series_schema() -> dict[str, Any]:
    """The schema of a series of probes, as `--count` gives it."""
    return _schema(tally.Series, tally.SCHEMA, "A series of probes")


def prediction_schema() -> dict[str, Any]:
    """The schema of what should become of a probe, as `--predict` gives it."""
    return _schema(model.Foretold, model.PREDICTION_SCHEMA, "What should become of one probe")


def _schema(kind: type, name: str, description: str) -> dict[str, Any]:
    (reference,), definitions = msgspec.json.schema_components(
        [kind], ref_template="#/$defs/{name}"
    )
    root = definitions[kind.__name__]
    root["properties"]["schema"] = {"const": name}
    root["required"].insert(0, "schema")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": name,
        "description": description,
        **reference,
        "$defs": definitions,
    }
