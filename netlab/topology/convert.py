"""From plain values to the classes of the kinds, with every mistake in an object and its place.

msgspec converts, and stops at the first mistake; then, and only then, the object is walked through
field by field to name them all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from netlab.problems import suggest
from netlab.topology.places import Complaints, Origin, Path

T = TypeVar("T")


def convert(value: Any, kind: type[T], name: str, origin: Origin, found: Complaints) -> T | None:
    """`value` as a `kind`; None if it is not one, after complaining of each reason."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        mistakes = list(_mistakes(value, inspect.type_info(kind), ()))
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


@dataclass(frozen=True, slots=True)
class _Mistake:
    code: str
    message: str
    path: Path
    hint: str | None = None


def _mistakes(value: Any, expected: inspect.Type, path: Path) -> Iterator[_Mistake]:
    if isinstance(expected, inspect.Metadata):
        yield from _mistakes(value, expected.type, path)
    elif isinstance(expected, inspect.UnionType):
        yield from _mistakes_of_union(value, expected, path)
    elif isinstance(expected, inspect.StructType):
        yield from _mistakes_of_struct(value, expected, path)
    elif isinstance(expected, inspect.DictType):
        if isinstance(value, dict):
            for key, each in value.items():
                yield from _mistakes(each, expected.value_type, (*path, key))
        else:
            yield _wrong_type(value, expected, path)
    elif isinstance(expected, inspect.ListType):
        if isinstance(value, list):
            for index, each in enumerate(value):
                yield from _mistakes(each, expected.item_type, (*path, index))
        else:
            yield _wrong_type(value, expected, path)
    else:
        yield from _mistakes_of_scalar(value, expected, path)


def _mistakes_of_union(value: Any, expected: inspect.UnionType, path: Path) -> Iterator[_Mistake]:
    options = [option for option in expected.types if not isinstance(option, inspect.NoneType)]
    if value is None and len(options) < len(expected.types):
        return
    if len(options) == 1:
        yield from _mistakes(value, options[0], path)
        return
    found = [list(_mistakes(value, option, path)) for option in options]
    if all(found):
        # Of the right type and wrong otherwise says more than of the wrong type.
        yield (
            min(
                (mistakes[0] for mistakes in found),
                key=lambda mistake: mistake.code == "wrong-type",
            )
            if any(mistakes[0].code != "wrong-type" for mistakes in found)
            else _wrong_type(value, expected, path)
        )


def _mistakes_of_struct(value: Any, expected: inspect.StructType, path: Path) -> Iterator[_Mistake]:
    if not isinstance(value, dict):
        yield _wrong_type(value, expected, path)
        return
    fields = {field.encode_name: field for field in expected.fields}
    for name, field in fields.items():
        if name in value:
            yield from _mistakes(value[name], field.type, (*path, name))
        elif field.required:
            yield _Mistake("missing-field", f"{shown_path((*path, name))} is missing", path)
    if expected.forbid_unknown_fields:
        known = {*fields, *([expected.tag_field] if expected.tag_field else [])}
        for name in value:
            if name not in known:
                yield _unknown_field(name, sorted(known), path)


def _unknown_field(name: str, known: list[str], path: Path) -> _Mistake:
    near = suggest(name, known)
    return _Mistake(
        "unknown-field",
        f"there is no field {shown_path((*path, name))}",
        (*path, name),
        f'did you mean "{near}"?' if near else f"the fields here are {', '.join(known)}",
    )


def _mistakes_of_scalar(value: Any, expected: inspect.Type, path: Path) -> Iterator[_Mistake]:
    if isinstance(expected, inspect.LiteralType):
        if value not in expected.values or isinstance(value, bool):
            yield _bad_value(value, expected, path)
    elif isinstance(expected, inspect.BoolType):
        if not isinstance(value, bool):
            yield _wrong_type(value, expected, path)
    elif isinstance(expected, inspect.IntType):
        if not isinstance(value, int) or isinstance(value, bool):
            yield _wrong_type(value, expected, path)
        elif _outside(value, expected):
            yield _bad_value(value, expected, path)
    elif isinstance(expected, inspect.StrType):
        if not isinstance(value, str):
            yield _wrong_type(value, expected, path)
        elif expected.max_length is not None and len(value) > expected.max_length:
            yield _bad_name(value, expected, path, f" ({len(value)} characters)")
        elif expected.pattern is not None and not re.search(expected.pattern, value):
            yield _bad_name(value, expected, path, "")


def _outside(value: int, expected: inspect.IntType) -> bool:
    return (expected.ge is not None and value < expected.ge) or (
        expected.le is not None and value > expected.le
    )


def _bad_name(value: str, expected: inspect.StrType, path: Path, size: str) -> _Mistake:
    # RFC 1123 names are the only texts with a pattern.
    limit = expected.max_length
    what = "label" if limit == 63 else "subdomain"
    dots = "" if limit == 63 else " and dots"
    return _Mistake(
        "bad-name",
        f"{shown_path(path)} {shown(value)}{size} is not a name",
        path,
        f"an RFC 1123 {what} has at most {limit} lower-case letters, digits, hyphens{dots}, "
        "and begins and ends in a letter or a digit",
    )


def _wrong_type(value: Any, expected: inspect.Type, path: Path) -> _Mistake:
    message = f"{shown_path(path)} is {shown(value)}; it takes {_described(expected)}"
    hint = None
    if isinstance(expected, inspect.StrType) and isinstance(value, (bool, int, float)):
        hint = "without quotes YAML reads numbers and words such as yes otherwise: put quotes on it"
    elif isinstance(expected, inspect.IntType) and isinstance(value, str) and value.isdecimal():
        hint = "write it without quotes"
    return _Mistake("wrong-type", message, path, hint)


def _bad_value(value: Any, expected: inspect.Type, path: Path) -> _Mistake:
    message = f"{shown_path(path)} is {shown(value)}; it takes {_described(expected)}"
    near = None
    if isinstance(expected, inspect.LiteralType) and isinstance(value, str):
        known = [str(known) for known in expected.values]
        near = next((word for word in known if word.lower() == value.lower()), None)
        near = near or suggest(value, known)
    return _Mistake("bad-value", message, path, f'did you mean "{near}"?' if near else None)


def _described(expected: inspect.Type) -> str:
    if isinstance(expected, inspect.Metadata):
        return _described(expected.type)
    if isinstance(expected, inspect.UnionType):
        return " or ".join(
            _described(option)
            for option in expected.types
            if not isinstance(option, inspect.NoneType)
        )
    if isinstance(expected, inspect.LiteralType):
        return " or ".join(str(value) for value in expected.values)
    if isinstance(expected, inspect.IntType):
        if expected.le is not None:
            return f"a number from {expected.ge} to {expected.le}"
        return "a whole number" if expected.ge is None else f"a whole number from {expected.ge}"
    words = {
        inspect.StrType: "a text",
        inspect.BoolType: "true or false",
        inspect.ListType: "a list",
    }
    return words.get(type(expected), "a mapping")


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
