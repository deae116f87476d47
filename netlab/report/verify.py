"""A verification on the terminal, and as JUnit XML for continuous integration."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from xml.sax.saxutils import quoteattr

from netlab.verify.model import Part, Result, Verified

_MARKS = {"reached": "✓", "translated": "N", "unreachable": "✗"}
_LEGEND = (
    "✓ reached, N reached and translated, ✗ not reached; as declared unless ! stands behind it"
)
_MOST_TOLD = 20
_WIDEST = 160


def terminal(verified: Verified) -> Iterator[str]:
    """Lines: a matrix of those who ask and who are asked, a line for each demand, what is wrong."""
    pairs = [each for each in verified.results if each.demand != "service"]
    if pairs:
        yield from _matrix(pairs)
        yield ""
    served = [each for each in verified.results if each.demand == "service"]
    if served:
        yield from _services(served)
        yield ""
    for part in verified.demands:
        yield _line(part)
    for text in verified.left_out:
        yield f"  • not asked: {text}"
    yield from _differences(verified.results)
    how = "as declared" if verified.as_declared else "not as declared"
    sign = "✓" if verified.as_declared else "✗"
    count = f"{len(verified.results)} pairs in {verified.rounds} rounds"
    yield f"{sign} {verified.lab} is {how}: {count}, {verified.elapsed_s:.2f} s"


def _line(part: Part) -> str:
    sign = "✗" if part.not_as_declared else "✓"
    more = [
        f"{count} {word}"
        for count, word in (
            (part.translated, "translated"),
            (part.unreachable, "not reached"),
            (part.not_as_declared, "not as declared"),
        )
        if count
    ]
    return f"{sign} {part.title}: {', '.join([f'{part.reached} of {part.pairs}', *more])}"


def _matrix(results: Sequence[Result]) -> Iterator[str]:
    """Who asks, line by line, and who is asked, column by column; by nodes where that is wide."""
    sources = list(dict.fromkeys(each.source for each in results))
    asked = dict.fromkeys(each.target for each in results)
    targets = list(dict.fromkeys((*(each for each in sources if each in asked), *asked)))
    left = max(len(_short(each)) for each in sources) + 4
    width = min(shutil.get_terminal_size((100, 24)).columns, _WIDEST)
    if left + 3 * len(targets) > max(width, 80):
        yield from _counts(results, targets, sources)
        return
    cells: dict[tuple[str, str], list[Result]] = {}
    for each in results:
        cells.setdefault((each.source, each.target), []).append(each)
    numbers = {target: str(index) for index, target in enumerate(targets, 1)}
    head = "FROM, TO".ljust(left)
    yield head + "".join(f"{number:>2} " for number in numbers.values())
    for source in sources:
        number = numbers.get(source, "")
        label = f"{number:>3} {_short(source)}" if number else f"    {_short(source)}"
        row = "".join(_cell(cells.get((source, each))) for each in targets)
        yield f"{label.ljust(left)}{row}".rstrip()
    for target in targets:
        if target not in sources:
            yield f"{numbers[target]:>3} {_short(target)}"
    yield _LEGEND


def _cell(found: list[Result] | None) -> str:
    """The worst of a pair's answers, one for each family."""
    if not found:
        return " · "
    worst = max(found, key=lambda each: (not each.as_declared, list(_MARKS).index(each.outcome)))
    return f" {_MARKS[worst.outcome]}{' ' if worst.as_declared else '!'}"


def _counts(
    results: Sequence[Result], targets: Sequence[str], sources: Sequence[str]
) -> Iterator[str]:
    """A line for each that asks: how many it reached."""
    yield f"{len(sources)} ask {len(targets)}; those that did not reach all without translation:"
    lines = 0
    by_source: dict[str, list[Result]] = {}
    for each in results:
        by_source.setdefault(each.source, []).append(each)
    for source, found in by_source.items():
        reached = sum(each.outcome == "reached" for each in found)
        if reached < len(found):
            lines += 1
            yield f"  {_short(source)}: {reached} of {len(found)}"
    if not lines:
        yield "  none"


def _services(results: Sequence[Result]) -> Iterator[str]:
    yield "SERVICE, at an address and port, by how many of its clients it was reached:"
    found: dict[tuple[str, str], list[Result]] = {}
    for each in results:
        where = f"[{each.address}]" if ":" in each.address else each.address
        found.setdefault((each.target, f"{where}:{each.port}/{each.protocol}"), []).append(each)
    for (service, where), part in found.items():
        reached = sum(each.outcome != "unreachable" for each in part)
        wrong = sum(not each.as_declared for each in part)
        sign = "✗" if wrong else "✓"
        expected = sum(each.expected == "unreachable" for each in part)
        notes = [f"{expected} are not to"] if expected else []
        notes += [f"{wrong} not as declared"] if wrong else []
        more = f" ({', '.join(notes)})" if notes else ""
        yield f"  {sign} {service} {where}: {reached} of {len(part)}{more}"


def _differences(results: Iterable[Result]) -> Iterator[str]:
    wrong = [each for each in results if not each.as_declared]
    for each in wrong[:_MOST_TOLD]:
        yield f"  ✗ {_told(each)}"
    if len(wrong) > _MOST_TOLD:
        yield f"  ... and {len(wrong) - _MOST_TOLD} more: `-o json` has them all"


def _told(each: Result) -> str:
    at = f":{each.port}" if each.port else ""
    where = f"[{each.address}]{at}" if ":" in each.address and at else f"{each.address}{at}"
    words = {"unreachable": "not reached"}
    was = words.get(each.outcome, each.outcome)
    due = words.get(each.expected, each.expected)
    because = f" ({each.why_expected})" if each.why_expected else ""
    detail = f": {each.detail}" if each.detail else ""
    return (
        f"{each.source} → {each.target} at {where} {each.protocol} was {was}{detail}; "
        f"it should have been {due}{because}"
    )


def _short(reference: str) -> str:
    return reference.removeprefix("pod/")


def junit(verified: Verified) -> Iterator[str]:
    """JUnit XML: a suite for each demand, a case for each pair."""
    failures = sum(part.not_as_declared for part in verified.demands)
    yield '<?xml version="1.0" encoding="UTF-8"?>'
    yield (
        f"<testsuites name={quoteattr(f'netlab verify {verified.lab}')} "
        f'tests="{len(verified.results)}" failures="{failures}" time="{verified.elapsed_s}">'
    )
    for part in verified.demands:
        yield (
            f"  <testsuite name={quoteattr(part.title)} "
            f'tests="{part.pairs}" failures="{part.not_as_declared}" errors="0" skipped="0">'
        )
        for each in verified.results:
            if each.demand == part.demand:
                yield from _case(each)
        yield "  </testsuite>"
    yield "</testsuites>"


def _case(each: Result) -> Iterator[str]:
    at = f"{each.address} port {each.port}" if each.port else each.address
    name = f"{each.source} to {each.target} at {at} {each.protocol}"
    case = f"    <testcase classname={quoteattr(each.demand)} name={quoteattr(name)}"
    if each.as_declared:
        yield f"{case}/>"
        return
    yield f"{case}>"
    yield f"      <failure type={quoteattr(each.outcome)} message={quoteattr(_told(each))}/>"
    yield "    </testcase>"
