"""What went wrong, said so that somebody can act on it.

Every failure that a user can meet is a :class:`Problem`: a code to search for, one sentence that
names the object and the value, the place where it stands, and what to do about it.  Errors travel
as :class:`NetlabError`, which carries as many problems as were found together with the exit code
of the command line.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass


class Exit(enum.IntEnum):
    """Exit codes of the command line (docs/design.md, "Command line")."""

    YES = 0
    NO = 1
    USAGE = 2
    MACHINE = 3
    UNOBSERVED = 4
    INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Place:
    """A position in a file; line and column count from 1."""

    file: str
    line: int | None = None
    column: int | None = None

    def __str__(self) -> str:
        return ":".join(
            str(part) for part in (self.file, self.line, self.column) if part is not None
        )


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong (or, as a warning, worth knowing)."""

    code: str
    message: str
    place: Place | None = None
    hint: str | None = None
    warning: bool = False

    def __str__(self) -> str:
        severity = "warning" if self.warning else "error"
        where = f"{self.place}: " if self.place else ""
        lines = [f"{where}{severity}[{self.code}]: {self.message}"]
        if self.hint:
            lines.append(f"  hint: {self.hint}")
        return "\n".join(lines)


class NetlabError(Exception):
    """Problems that end a command, and the exit code that says of what sort they are."""

    def __init__(self, problems: Problem | Sequence[Problem], exit_code: Exit = Exit.USAGE) -> None:
        self.problems: tuple[Problem, ...] = (
            (problems,) if isinstance(problems, Problem) else tuple(problems)
        )
        self.exit_code = exit_code
        super().__init__("\n".join(str(problem) for problem in self.problems))


def suggest(wrong: str, known: Sequence[str]) -> str | None:
    """The known name that is nearest to a mistyped one, or None."""
    import difflib

    near = difflib.get_close_matches(wrong, known, n=1, cutoff=0.6)
    return near[0] if near else None
