"""All that is wrong with the fields of an object: unknown, missing, of the wrong type or value."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from msgspec import inspect

from netlab.problems import suggest
from netlab.topology.convert import shown, shown_path
from netlab.topology.places import Path


@dataclass(frozen=True, slots=True)
class Mistake:
    """One of them, at `path` in the object."""

    code: str
    message: str
    path: Path
    hint: str | None = None


def mistakes_in(value: Any, kind: type) -> list[Mistake]:
    """Every reason why a value is not of a kind."""
    return list(_mistakes(value, inspect.type_info(kind), ()))


def _mistakes(value: Any, expected: inspect.Type, path: Path) -> Iterator[Mistake]:
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


def _mistakes_of_union(value: Any, expected: inspect.UnionType, path: Path) -> Iterator[Mistake]:
    options = [option for option in expected.types if not isinstance(option, inspect.NoneType)]
    if value is None and len(options) < len(expected.types):
        return
    if len(options) == 1:
        yield from _mistakes(value, options[0], path)
        return
    found = [list(_mistakes(value, option, path)) for option in options]
    if all(found):
        # Of the right type and wrong otherwise says more than of the wrong type.
        firsts = (mistakes[0] for mistakes in found if mistakes[0].code != "wrong-type")
        yield next(firsts, _wrong_type(value, expected, path))


def _mistakes_of_struct(value: Any, expected: inspect.StructType, path: Path) -> Iterator[Mistake]:
    if not isinstance(value, dict):
        yield _wrong_type(value, expected, path)
        return
    fields = {field.encode_name: field for field in expected.fields}
    for name, field in fields.items():
        if name in value:
            yield from _mistakes(value[name], field.type, (*path, name))
        elif field.required:
            yield Mistake("missing-field", f"{shown_path((*path, name))} is missing", path)
    if expected.forbid_unknown_fields:
        known = {*fields, *([expected.tag_field] if expected.tag_field else [])}
        for name in value:
            if name not in known:
                yield _unknown_field(name, sorted(known), path)


def _unknown_field(name: str, known: list[str], path: Path) -> Mistake:
    near = suggest(name, known)
    return Mistake(
        "unknown-field",
        f"there is no field {shown_path((*path, name))}",
        (*path, name),
        f'did you mean "{near}"?' if near else f"the fields here are {', '.join(known)}",
    )


def _mistakes_of_scalar(value: Any, expected: inspect.Type, path: Path) -> Iterator[Mistake]:
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


def _bad_name(value: str, expected: inspect.StrType, path: Path, size: str) -> Mistake:
    # RFC 1123 names are the only texts with a pattern.
    limit = expected.max_length
    what = "label" if limit == 63 else "subdomain"
    dots = "" if limit == 63 else " and dots"
    return Mistake(
        "bad-name",
        f"{shown_path(path)} {shown(value)}{size} is not a name",
        path,
        f"an RFC 1123 {what} has at most {limit} lower-case letters, digits, hyphens{dots}, "
        "and begins and ends in a letter or a digit",
    )


def _wrong_type(value: Any, expected: inspect.Type, path: Path) -> Mistake:
    message = f"{shown_path(path)} is {shown(value)}; it takes {_described(expected)}"
    hint = None
    if isinstance(expected, inspect.StrType) and isinstance(value, (bool, int, float)):
        hint = "without quotes YAML reads numbers and words such as yes otherwise: put quotes on it"
    elif isinstance(expected, inspect.IntType) and isinstance(value, str) and value.isdecimal():
        hint = "write it without quotes"
    return Mistake("wrong-type", message, path, hint)


def _bad_value(value: Any, expected: inspect.Type, path: Path) -> Mistake:
    message = f"{shown_path(path)} is {shown(value)}; it takes {_described(expected)}"
    near = None
    if isinstance(expected, inspect.LiteralType) and isinstance(value, str):
        known = [str(known) for known in expected.values]
        near = next((word for word in known if word.lower() == value.lower()), None)
        near = near or suggest(value, known)
    return Mistake("bad-value", message, path, f'did you mean "{near}"?' if near else None)


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
