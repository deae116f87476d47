"""YAML documents as plain values.

libyaml reads, event by event, and the values are built here rather than by PyYAML's constructors:
that is twice as fast, bounds nesting and aliases before they cost anything, finds a key that
stands twice, and reads scalars as Kubernetes does (`22:22` is a text, `yes` is true).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import isfinite
from typing import TYPE_CHECKING, Any

from netlab.problems import Place, Problem
from netlab.topology.places import (
    DEEPEST_NESTING,
    Complaints,
    Document,
    Origin,
    Source,
    c_loader,
    place_of_byte,
    too_deep,
)

if TYPE_CHECKING:
    from yaml import CSafeLoader, YAMLError
    from yaml.error import Mark

MOST_ALIASED_NODES = 100_000


def yaml_documents(data: bytes, path: str, complaints: Complaints) -> list[Document]:
    """All documents; behind one that is no YAML, reading goes on at the next `---`."""
    loader = c_loader()
    from yaml import YAMLError

    source = Source(path, data)
    found: list[Document] = []
    while True:
        try:
            for index, value in enumerate(_build(source, loader)):
                if value is not None:
                    found.append(Document(value, Origin(source, index)))
            return found
        except _Refused as refused:
            complaints.placed(refused.problem)
            line = (refused.problem.place.line or 1) if refused.problem.place else 1
        except YAMLError as error:
            problem = _syntax_problem(error, source)
            complaints.placed(problem)
            line = (problem.place.line or 1) if problem.place else 1
        rest = _next_document(source, line - source.first_line)
        if rest is None:
            return found
        source = rest


def _next_document(source: Source, line: int) -> Source | None:
    """The text from the first `---` on that stands in a line (counted from 1) or behind it."""
    lines = source.data.split(b"\n")
    for number in range(max(line - 1, 1), len(lines)):
        if re.match(rb"---(\s|$)", lines[number]):
            rest = b"\n".join(lines[number:])
            return Source(source.file, rest, source.first_line + number)
    return None


class _Refused(Exception):
    """YAML that is well-formed and not accepted."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem


_MERGE = object()
_NO_KEY = object()


def _build(source: Source, loader: type[CSafeLoader]) -> Iterator[Any]:
    """The value of each document, None for an empty one.

    Raises _Refused or yaml.YAMLError.
    """
    from yaml import events

    get_event = loader(source.data).get_event
    scalar, alias = events.ScalarEvent, events.AliasEvent
    mapping_start, sequence_start = events.MappingStartEvent, events.SequenceStartEvent
    mapping_end, sequence_end = events.MappingEndEvent, events.SequenceEndEvent
    document_start, document_end = events.DocumentStartEvent, events.DocumentEndEvent

    plain: dict[str, Any] = {}  # text to value; also makes equal texts one object
    keys: dict[str, str] = {}
    anchors: dict[str, tuple[Any, int]] = {}  # value, and how many nodes it stands for
    open_anchors: list[tuple[int, str, int]] = []  # depth, name, count at its start
    merges: dict[int, list[Any]] = {}  # by id() of the mapping
    count = aliased = 0
    stack: list[tuple[Any, Any]] = []
    current: Any = None
    key: Any = _NO_KEY
    while True:
        event: Any = get_event()
        kind = type(event)
        count += 1
        if kind is scalar:
            text = event.value
            if key is _NO_KEY and type(current) is dict:
                if text == "<<" and event.implicit[0]:
                    key = _MERGE
                    continue
                key = keys.setdefault(text, text)
                if event.anchor is not None:
                    anchors[event.anchor] = (text, 1)
                if key in current:
                    raise _refused(source, event, "duplicate-key", f'"{key}" stands twice here')
                continue
            if event.tag is not None:
                value = _tagged(source, event)
            elif event.implicit[0]:
                value = plain.get(text, _NO_KEY)
                if value is _NO_KEY:
                    value = plain[text] = plain_scalar(text)
            else:
                value = text
            if event.anchor is not None:
                anchors[event.anchor] = (value, 1)
        elif kind is mapping_start or kind is sequence_start:
            if len(stack) >= DEEPEST_NESTING:
                raise _Refused(too_deep(_place(source, event.start_mark)))
            if event.tag is not None:
                _check_collection_tag(source, event)
            if key is _NO_KEY and type(current) is dict:
                raise _refused(source, event, "bad-key", "a key must be a text, not a collection")
            stack.append((current, key))
            if event.anchor is not None:
                open_anchors.append((len(stack), event.anchor, count))
            current = {} if kind is mapping_start else []
            key = _NO_KEY
            continue
        elif kind is mapping_end or kind is sequence_end:
            value = current
            if merges and id(value) in merges:
                _merge(source, event, value, merges.pop(id(value)))
            if open_anchors and open_anchors[-1][0] == len(stack):
                _, name, start = open_anchors.pop()
                anchors[name] = (value, count - start)
            current, key = stack.pop()
        elif kind is alias:
            if key is _NO_KEY and type(current) is dict:
                raise _refused(source, event, "bad-key", "a key must be a text, not an alias")
            value, size = _aliased(source, event, anchors, open_anchors)
            count += size
            aliased += size
            if aliased > MOST_ALIASED_NODES:
                raise _refused(
                    source,
                    event,
                    "alias-explosion",
                    f"aliases make more than {MOST_ALIASED_NODES:,} values out of few",
                    "write the values out instead of using & and *",
                )
        elif kind is document_start:
            anchors.clear()
            current, key = [], _NO_KEY
            continue
        elif kind is document_end:
            yield current[0]
            continue
        elif kind is events.StreamEndEvent:
            return
        else:
            continue
        if key is _NO_KEY:
            current.append(value)
        elif key is _MERGE:
            merges.setdefault(id(current), []).append(value)
            key = _NO_KEY
        else:
            current[key] = value
            key = _NO_KEY


def _place(source: Source, mark: Mark) -> Place:
    return source.place(mark.line, mark.column)


def _refused(
    source: Source, event: Any, code: str, message: str, hint: str | None = None
) -> _Refused:
    return _Refused(Problem(code, message, _place(source, event.start_mark), hint))


def _aliased(
    source: Source,
    event: Any,
    anchors: dict[str, tuple[Any, int]],
    open_anchors: list[tuple[int, str, int]],
) -> tuple[Any, int]:
    name = event.anchor
    if any(name == open_name for _, open_name, _ in open_anchors):
        raise _refused(source, event, "self-reference", f"*{name} stands inside &{name} itself")
    if name not in anchors:
        raise _refused(source, event, "unknown-alias", f"no &{name} stands before *{name}")
    return anchors[name]


def _merge(source: Source, event: Any, mapping: dict[str, Any], merged: list[Any]) -> None:
    """`<<`: keys of other mappings, behind those that the mapping has itself."""
    for each in merged:
        for other in each if type(each) is list else [each]:
            if type(other) is not dict:
                raise _refused(source, event, "bad-merge", "<< takes a mapping or a list of them")
            for key, value in other.items():
                mapping.setdefault(key, value)


_YAML_TAG = "tag:yaml.org,2002:"


def _tagged(source: Source, event: Any) -> Any:
    """A scalar with a tag: `!!str 80`."""
    name = event.tag.removeprefix(_YAML_TAG)
    if name in ("!", "str"):
        return event.value
    types: dict[str, Any] = {"int": int, "float": (int, float), "bool": bool, "null": type(None)}
    if name not in types:
        raise _unknown_tag(source, event, name)
    value = plain_scalar(event.value)
    if not isinstance(value, types[name]):
        raise _refused(source, event, "bad-value", f'"{event.value}" is not a !!{name}')
    return value


def _check_collection_tag(source: Source, event: Any) -> None:
    name = event.tag.removeprefix(_YAML_TAG)
    if name not in ("!", "map", "seq"):
        raise _unknown_tag(source, event, name)


def _unknown_tag(source: Source, event: Any, name: str) -> _Refused:
    shown = name if name.startswith("!") else f"!!{name}"
    return _refused(source, event, "unknown-tag", f"the tag {shown} has no meaning here")


_WORDS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE", "yes", "Yes", "YES", "y", "Y"), True),
    **dict.fromkeys(("on", "On", "ON"), True),
    **dict.fromkeys(("false", "False", "FALSE", "no", "No", "NO", "n", "N"), False),
    **dict.fromkeys(("off", "Off", "OFF"), False),
}
_DECIMAL = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_OCTAL = re.compile(r"[-+]?0[0-7]+")
_BASED = re.compile(r"[-+]?0([bB][01]+|[oO][0-7]+|[xX][0-9a-fA-F]+)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_ODD_FLOAT = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


def plain_scalar(text: str) -> Any:
    """What a scalar without quotes is to Kubernetes, whose YAML is 1.1 (goyaml v2, resolve.go).

    Timestamps and numbers to the base 60 stay texts, as they do there where a text is expected.
    """
    if text in _WORDS:
        return _WORDS[text]
    if text[0] not in "0123456789+-." or len(text) > 64:
        return text
    number = text.replace("_", "")
    if _DECIMAL.fullmatch(number):
        return int(number)
    if _OCTAL.fullmatch(number):
        return int(number, 8)
    if _BASED.fullmatch(number):
        return int(number, 0)
    if _FLOAT.fullmatch(number):
        value = float(number)
        return value if isfinite(value) else text
    if _ODD_FLOAT.fullmatch(text):
        return float(text.replace(".", ""))
    return text


def _syntax_problem(error: YAMLError, source: Source) -> Problem:
    from yaml.error import MarkedYAMLError
    from yaml.reader import ReaderError

    if isinstance(error, ReaderError):
        place = place_of_byte(source, error.position)
        return Problem("yaml-syntax", f"not valid YAML: {error.reason}", place)
    if not isinstance(error, MarkedYAMLError) or error.problem_mark is None:
        return Problem("yaml-syntax", f"not valid YAML: {error}", Place(source.file))
    last = error.problem_mark
    first = error.context_mark.line if error.context_mark else last.line
    tabs = _tab_indentations(source)
    guilty = next((line for line in range(first, last.line + 1) if line in tabs), None)
    if guilty is not None:
        more = f", here and in {len(tabs) - 1} other lines" if len(tabs) > 1 else ""
        return Problem(
            "tab-indentation",
            "this line is indented with a tab; YAML indents with blanks only",
            source.place(guilty, tabs[guilty]),
            f"replace it with as many blanks as the lines around have{more}",
        )
    context = f" {error.context}" if error.context else ""
    if error.context_mark and error.context_mark.line != last.line:
        context += f" that begins in line {source.first_line + first + 1}"
    hint = "compare the indentation of this line with the lines above it"
    if tabs:
        line = source.first_line + min(tabs) + 1
        hint = f"line {line} is indented with a tab, which is wrong too: YAML indents with blanks"
    message = f"not valid YAML: {error.problem}{context}"
    return Problem("yaml-syntax", message, _place(source, last), hint)


def _tab_indentations(source: Source) -> dict[int, int]:
    """Lines that a tab indents, and its column, both counted from 0."""
    return {
        number: len(indentation.group()) - 1
        for number, line in enumerate(source.data.split(b"\n"))
        if (indentation := re.match(rb" *\t", line)) and line.strip()
    }
