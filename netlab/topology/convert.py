"""From plain values to the classes of the kinds.

msgspec converts, and stops at the first mistake; then, and only then, `mistakes` walks through the
object field by field to name them all.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from netlab.topology.places import Complaints, Origin, Path

T = TypeVar("T")


def convert(value: Any, kind: type[T], name: str, origin: Origin, found: Complaints) -> T | None:
    """`value` as a `kind`; None if it is not one, after complaining of each reason."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        from netlab.topology.mistakes import mistakes_in

        mistakes = mistakes_in(value, kind)
        if not mistakes:
            found.error("bad-value", f"{name}: {error}", origin)
    for mistake in mistakes:
        found.error(
            mistake.code,
            f"{name}: {mistake.message}",
            origin,
            *mistake.path,
            hint=mistake.hint,
            at_key=mistake.code == "unknown-field",
        )
    return None


def shown(value: Any) -> str:
    """A value as messages show it, short."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        text = value if len(value) <= 60 else f"{value[:57]}..."
        return (
            '"' + text.encode("unicode_escape").decode() + '"'
            if not text.isprintable()
            else (f'"{text}"')
        )
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def shown_path(path: Path) -> str:
    """A path as Kubernetes writes it: `spec.ports[0].port`."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return text.removeprefix(".") or "it"
