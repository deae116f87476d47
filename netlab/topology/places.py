"""Where things stand in a file, and what is wrong with them.

Checks hand their findings to :class:`Complaints` with a path, `spec.ports[0].port` of the third
document, and go on.  Lines and columns are worked out once, at the end and only if something was
found, by reading the events of the text again: what is right is not made to pay for positions.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from netlab.problems import Exit, NetlabError, Place, Problem

if TYPE_CHECKING:
    from yaml import CSafeLoader

Path = tuple[str | int, ...]

DEEPEST_NESTING = 100  # Kubernetes' own schemas reach about 40

ASSUMED = "assumed"

# A warning that a thousand pods share is said this often, then counted.
_WARNINGS_OF_A_KIND = 5


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """YAML or JSON text in UTF-8, and how to call it; `first_line` counts from 0.

    Without data it is no file, and nothing has a place in it.
    """

    file: str
    data: bytes
    first_line: int = 0

    def place(self, line: int, column: int) -> Place:
        """A place by libyaml's marks, which count from 0 and from where the text begins."""
        return Place(self.file, self.first_line + line + 1, column + 1)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an object comes from: the document's number in its source, the path in the document."""

    source: Source
    document: int
    path: Path = ()


@dataclass(frozen=True, slots=True)
class Document:
    """One document of a file, as plain values, and where it stands."""

    value: Any
    origin: Origin


def place_of_byte(source: Source, offset: int) -> Place:
    """The place of a byte of the source's data."""
    before = source.data[:offset]
    start = before.rfind(b"\n") + 1
    return source.place(before.count(b"\n"), len(before[start:].decode(errors="replace")))


def too_deep(place: Place) -> Problem:
    """Nesting beyond DEEPEST_NESTING."""
    return Problem(
        "nesting",
        f"lists and mappings are nested more than {DEEPEST_NESTING} deep",
        place,
        "no Kubernetes object is nested so deeply",
    )


def c_loader() -> type[CSafeLoader]:
    """PyYAML's parser on libyaml.  NetlabError (exit code 3) if PyYAML came without it."""
    try:
        from yaml import CSafeLoader
    except ImportError:
        problem = Problem(
            "no-libyaml",
            "PyYAML was installed without its C loader (libyaml)",
            hint="install a PyYAML wheel from PyPI, or python3-yaml from the distribution",
        )
        raise NetlabError(problem, Exit.MACHINE) from None
    return CSafeLoader


@dataclass(slots=True)
class _Spot:
    """A node of the tree of paths that are looked for, and where it was found."""

    below: dict[str | int, _Spot] = field(default_factory=dict)
    key: Place | None = None
    value: Place | None = None


def _locate(source: Source, wanted: _Spot) -> None:
    """Note the places of all nodes in `wanted`, whose first level are the document numbers."""
    loader = c_loader()
    from yaml import YAMLError

    # JSON is not quite YAML (a key of 2,000 characters, a DEL in a text): what stands behind such
    # a thing has the place of what surrounds it.
    with contextlib.suppress(YAMLError):
        _walk(source, wanted, loader)


def _walk(source: Source, wanted: _Spot, loader: type[CSafeLoader]) -> None:
    from yaml import events

    parser = loader(source.data)
    document = -1
    last = max(int(number) for number in wanted.below)
    missing = _count(wanted) - 1  # (the first level is no node)
    # Each open collection: its spot (None off the wanted paths), the next index (None: a mapping),
    # and the spot of the value that the last key announced.
    stack: list[list[Any]] = []
    while True:
        event: Any = parser.get_event()
        kind = type(event)
        if kind is events.DocumentStartEvent:
            document += 1
            continue
        if kind is events.DocumentEndEvent and document == last:
            return
        if kind in (events.MappingEndEvent, events.SequenceEndEvent):
            stack.pop()
            continue
        if kind in (events.StreamStartEvent, events.DocumentEndEvent):
            continue
        opens = kind in (events.MappingStartEvent, events.SequenceStartEvent)
        spot = _spot_of(event, stack, wanted, document, source)
        if spot is not None and spot.value is None:
            spot.value = source.place(event.start_mark.line, event.start_mark.column)
            missing -= 1
            if not missing:
                return
        if opens:
            first = 0 if kind is events.SequenceStartEvent else None
            stack.append([spot, first, _KEY])


def _count(spot: _Spot) -> int:
    return 1 + sum(map(_count, spot.below.values()))


_KEY = object()  # in place of a value's spot: a key is awaited


def _spot_of(
    event: Any, stack: list[list[Any]], wanted: _Spot, document: int, source: Source
) -> _Spot | None:
    """The spot that a node is, None if nobody asked for it; a key only announces one."""
    if not stack:
        return wanted.below.get(document)
    frame = stack[-1]
    spot, index, announced = frame
    if index is not None:
        frame[1] = index + 1
        return spot.below.get(index) if spot is not None else None
    if announced is not _KEY:
        frame[2] = _KEY
        return announced  # type: ignore[no-any-return]
    following = spot.below.get(getattr(event, "value", None)) if spot is not None else None
    frame[2] = following
    if following is not None and following.key is None:
        following.key = source.place(event.start_mark.line, event.start_mark.column)
    return None


@dataclass(frozen=True, slots=True)
class _Complaint:
    problem: Problem
    origin: Origin | None
    path: Path
    at_key: bool


class Complaints:
    """Everything found wrong so far."""

    def __init__(self) -> None:
        self._found: list[_Complaint] = []

    def error(
        self,
        code: str,
        message: str,
        origin: Origin | None = None,
        *path: str | int,
        hint: str | None = None,
        at_key: bool = False,
    ) -> None:
        """Note an error at `path` inside the object at `origin`, or at the key before it."""
        problem = Problem(code, message, hint=hint)
        self._found.append(_Complaint(problem, origin, path, at_key))

    def warning(
        self,
        code: str,
        message: str,
        origin: Origin | None = None,
        *path: str | int,
        hint: str | None = None,
    ) -> None:
        """Note something worth knowing."""
        problem = Problem(code, message, hint=hint, warning=True)
        self._found.append(_Complaint(problem, origin, path, at_key=False))

    def assumption(self, message: str, origin: Origin | None = None, *path: str | int) -> None:
        """Note something that was decided, and that no object says; none is kept back."""
        self.warning(ASSUMED, message, origin, *path)

    def placed(self, problem: Problem) -> None:
        """Note a problem whose place is known."""
        self._found.append(_Complaint(problem, None, (), at_key=False))

    def has_errors(self) -> bool:
        """Whether anything found is more than a warning."""
        return any(not found.problem.warning for found in self._found)

    def raise_errors(self) -> None:
        """End here with all errors found, if there are any; warnings stay unsaid then."""
        errors = [found for found in self._found if not found.problem.warning]
        if errors:
            raise NetlabError(_with_places(errors))

    def warnings(self) -> tuple[Problem, ...]:
        """The warnings with their places; a code that comes often is cut short and counted."""
        said: list[_Complaint] = []
        count: Counter[str] = Counter()
        for found in dict.fromkeys(self._found):
            if found.problem.warning:
                count[found.problem.code] += 1
                if (
                    count[found.problem.code] <= _WARNINGS_OF_A_KIND
                    or found.problem.code == ASSUMED
                ):
                    said.append(found)
        more = [
            Problem(code, f"{number - _WARNINGS_OF_A_KIND} more of this kind", warning=True)
            for code, number in count.items()
            if number > _WARNINGS_OF_A_KIND and code != ASSUMED
        ]
        return (*_with_places(said), *more)


def _with_places(complaints: list[_Complaint]) -> list[Problem]:
    roots: dict[Source, _Spot] = {}
    for complaint in complaints:
        if complaint.origin and complaint.origin.source.data:
            spot = roots.setdefault(complaint.origin.source, _Spot())
            for step in _steps(complaint):
                spot = spot.below.setdefault(step, _Spot())
    for source, root in roots.items():
        _locate(source, root)
    problems = [_with_place(complaint, roots) for complaint in complaints]
    return sorted(problems, key=_order)


def _steps(complaint: _Complaint) -> Path:
    assert complaint.origin is not None
    return (complaint.origin.document, *complaint.origin.path, *complaint.path)


def _with_place(complaint: _Complaint, roots: dict[Source, _Spot]) -> Problem:
    if complaint.origin is None or not complaint.origin.source.data:
        return complaint.problem
    spot = roots[complaint.origin.source]
    place = Place(complaint.origin.source.file)
    for step in _steps(complaint):
        spot = spot.below[step]
        # What an alias or a merge brought in has no place of its own: its surroundings have.
        found = (spot.key if complaint.at_key else spot.value) or spot.value
        place = found or place
    problem = complaint.problem
    return Problem(problem.code, problem.message, place, problem.hint, problem.warning)


def _order(problem: Problem) -> tuple[str, int, int]:
    place = problem.place or Place("")
    return place.file, place.line or 0, place.column or 0
