"""Questions in rounds, so that neighbour tables do not overflow.

All namespaces of a machine share one limit of entries (net.ipv4.neigh.default.gc_thresh3, usually
1,024, and the same again for IPv6); beyond it the kernel fails to send, without a word.  Pods of a
node have one for each other of them, so a hundred pods that all speak with each other need more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from netlab.verify.model import End, Question

MOST_SOCKETS = 1500  # at once: each is one here, and one where it is accepted
_SHARE = 0.6  # of the free entries: others on this machine want some
_LEAST = 128
_USUAL_LIMIT = 1024
_TABLES = {4: ("ipv4", "arp_cache"), 6: ("ipv6", "ndisc_cache")}


def rounds(questions: Iterable[Question], room: dict[int, int]) -> Iterator[list[Question]]:
    """Questions in their order, cut where a round would need more entries than there is room for.

    `room` is that of each family.
    """
    part: list[Question] = []
    entries: dict[int, set[tuple[str, str]]] = {4: set(), 6: set()}
    for question in questions:
        needed = set(_entries(question))
        known = entries[question.family]
        if part and (
            len(part) >= MOST_SOCKETS or len(known | needed) > room.get(question.family, _LEAST)
        ):
            yield part
            part = []
            entries = {4: set(), 6: set()}
            known = entries[question.family]
        known |= needed
        part.append(question)
    if part:
        yield part


def _entries(question: Question) -> Iterator[tuple[str, str]]:
    """Who knows whom afterwards: names of namespaces, "" for a pod's gateway."""
    source = question.source
    targets = question.near or (question.target,)
    if len(targets) > 1:
        # One of them is chosen, who knows which: it and the client may be news to four tables.
        chosen = f"{source.namespace} {question.address} {question.port}"
        yield from ((chosen, str(number)) for number in range(4))
        targets = (question.target,)
    for target in targets:
        for one, other in ((source, target), (target, source)):
            if one.kind == "pod":
                yield one.namespace, ""
                yield one.node, one.namespace
                if other.node == one.node and other.kind == "pod":
                    yield one.namespace, other.namespace
            elif one.kind != "svc":
                yield one.namespace, other.node


def touched(part: Iterable[Question]) -> set[str]:
    """Namespaces that a round leaves entries in, but those of nodes."""
    ends: set[End] = set()
    for question in part:
        ends |= {question.source, *(question.near or (question.target,))}
    return {end.namespace for end in ends if end.namespace}


def room() -> dict[int, int]:
    """How many entries of each family a round may need on this machine."""
    return {family: _room(*names) for family, names in _TABLES.items()}


def _room(protocol: str, table: str) -> int:
    limit, used = _USUAL_LIMIT, 0
    try:
        with open(f"/proc/sys/net/{protocol}/neigh/default/gc_thresh3") as file:
            limit = int(file.read())
        with open(f"/proc/net/stat/{table}") as file:
            used = int(file.readlines()[1].split()[0], 16)
    except (OSError, IndexError, ValueError):
        pass
    return max(_LEAST, int((limit - used) * _SHARE))
