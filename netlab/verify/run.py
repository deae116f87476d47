"""A verification from beginning to end."""

from __future__ import annotations

import resource
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

from netlab.kernel import converge
from netlab.topology.model import Lab, Outcome
from netlab.verify.ask import Responders, ask
from netlab.verify.expected import CHANCE, Expected
from netlab.verify.model import TITLES, Answer, Demand, Part, Question, Result, Verified
from netlab.verify.questions import Ends, demands, outside, services
from netlab.verify.rounds import room, rounds, touched

TIMEOUT_S = 0.9  # before a SYN is sent again, after which DNAT may choose another way
_AGAIN_S = 2.5
_AGAIN = 400  # failures that are asked about again at once


def verify(
    lab: Lab,
    parts: Collection[Demand] = tuple(TITLES),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Verified:
    """Ask every question of a running lab, and compare the answers with what it declares.

    `progress` is told how many have been asked, and of how many.  What fails is asked again, more
    slowly, before it is believed.  Needs root; raises NetlabError if a namespace is missing.
    """
    start = time.perf_counter()
    left_out: list[str] = []
    ends = Ends(lab)
    questions = [each for each in demands(lab, ends) if each.demand in parts]
    if "outside" in parts:
        questions += outside(lab, ends)
    if "service" in parts:
        questions += services(lab, ends, left_out)
    expected = Expected(lab)
    due: dict[Question, tuple[Outcome, str]] = {}
    by_chance: Counter[tuple[str, str, str]] = Counter()
    for question in questions:
        outcome, why = expected.of(question)
        if outcome == CHANCE:
            by_chance[str(question.target), question.address, why] += 1
        else:
            due[question] = outcome, why
    questions = list(due)
    left_out += (
        f"{target} at {address} by {count} clients: whether they get through depends on the "
        f"endpoint that is chosen ({why})"
        for (target, address, why), count in by_chance.items()
    )
    # What is to get no answer is waited for once, all of it together.
    order = sorted(due, key=lambda each: (due[each][0] == "unreachable", each.source.namespace))
    _many_descriptors()
    wanted = {(each.target, each.address) for each in questions if each.port == 0}
    answers: dict[Question, Answer] = {}
    with Responders(wanted) as responders:
        counted = 0

        def asked(count: int) -> None:
            nonlocal counted
            counted += count
            progress(counted, len(questions))

        number = _ask_all(order, responders, TIMEOUT_S, answers, asked)
        number += _ask_again(order, due, responders, answers)
    results = [_result(each, answers[each], *due[each]) for each in questions]
    return Verified(
        lab=lab.name,
        as_declared=all(each.as_declared for each in results),
        demands=[_part(demand, results) for demand in TITLES if demand in parts],
        left_out=left_out,
        rounds=number,
        elapsed_s=round(time.perf_counter() - start, 3),
        results=results,
    )


def _ask_all(
    questions: Sequence[Question],
    responders: Responders,
    timeout_s: float,
    answers: dict[Question, Answer],
    asked: Callable[[int], None] = lambda count: None,
) -> int:
    """Ask in rounds, between which what was learned of neighbours is forgotten; how many."""
    number = 0
    names: set[str] = set()
    for part in rounds(questions, room()):
        if names:
            converge.forget_learned(sorted(names))
        names = touched(part)
        answers.update(zip(part, ask(part, responders, timeout_s, asked), strict=True))
        number += 1
    return number


def _ask_again(
    questions: Sequence[Question],
    due: Mapping[Question, tuple[Outcome, str]],
    responders: Responders,
    answers: dict[Question, Answer],
) -> int:
    """Ask again about what is not as declared, as long as that helps; how many rounds."""
    failed = [each for each in questions if answers[each].outcome != due[each][0]]
    number = 0
    while failed:
        part, failed = failed[:_AGAIN], failed[_AGAIN:]
        converge.forget_learned(sorted(touched(part)))
        number += _ask_all(part, responders, _AGAIN_S, answers)
        if all(answers[each].outcome != due[each][0] for each in part):
            break
    return number


def _result(question: Question, answer: Answer, due: Outcome, why: str) -> Result:
    return Result(
        demand=question.demand,
        source=str(question.source),
        target=str(question.target),
        address=question.address,
        port=question.port or None,
        protocol=question.protocol,
        outcome=answer.outcome,
        expected=due,
        as_declared=answer.outcome == due,
        why_expected=why,
        own=answer.own,
        seen=answer.seen,
        answered_by=answer.answered_by,
        detail=answer.detail,
    )


def _part(demand: Demand, results: Sequence[Result]) -> Part:
    found = [each for each in results if each.demand == demand]
    outcomes = [each.outcome for each in found]
    return Part(
        demand=demand,
        title=TITLES[demand],
        pairs=len(found),
        reached=outcomes.count("reached"),
        translated=outcomes.count("translated"),
        unreachable=outcomes.count("unreachable"),
        not_as_declared=sum(not each.as_declared for each in found),
    )


def _many_descriptors() -> None:
    """As many as we may have: each question is a socket."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
