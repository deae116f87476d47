"""What is asked for: sizes and modes, checked before anything is built."""

from __future__ import annotations

import re
from typing import get_args

from netlab.bench.machine import memory_kib
from netlab.bench.stage import NO_PROXY
from netlab.compare.model import Variant
from netlab.compare.twins import variants
from netlab.problems import Exit, NetlabError, Problem, suggest
from netlab.topology.model import ProxyMode
from netlab.topology.overlays import KINDS

ALL_MODES = "iptables:legacy,iptables:nft,nftables,nftables-flat,ipvs,userspace"
# A cluster's Service addresses, 10.96.0.0/12, are so many.
_MOST = (1 << 20) - 2
_LARGE = 100_000
_LEAST_PODS, _MOST_PODS = 2, 1000
# Measured: kernel memory of the rules, and the peak of what loads them, at 10,000 Services of two
# endpoints in the greediest mode.
_KERNEL_KIB, _LOADER_KIB = 16, 30


def modes(text: str) -> tuple[Variant, ...]:
    """`iptables:legacy,nftables`; NetlabError (exit 2) for what is no mode.

    Modes that this version does not build are taken: a report says that they are skipped.
    """
    found: list[Variant] = []
    for word in filter(None, map(str.strip, text.split(","))):
        unbuilt = [mode for mode in get_args(ProxyMode) if mode == word]
        found += [Variant(mode) for mode in unbuilt] or variants(word)
    if not found or NO_PROXY in found:
        raise NetlabError(
            Problem(
                "bad-mode", f'"{text}": no mode of a service proxy', hint=f"such as {ALL_MODES}"
            )
        )
    return tuple(dict.fromkeys(found))


def sizes(text: str, how_many_modes: int, force: bool) -> tuple[int, ...]:
    """`1000,10000`: numbers of Services, ascending.

    NetlabError: exit 2 if one is no number, zero, or more than there are addresses; exit 3 if they
    would take more memory than there is, or are beyond 100,000, unless `force`.
    """
    found = _numbers(text, "Services")
    if found[-1] > _MOST:
        raise NetlabError(
            Problem(
                "bad-sizes",
                f"{found[-1]:,} Services: a cluster has addresses for {_MOST:,}",
            )
        )
    if not force:
        _check_memory(found[-1], how_many_modes)
    return found


def overlay(name: str) -> str:
    """The type of an overlay; NetlabError (exit 2) if there is no such type."""
    if name not in KINDS:
        near = suggest(name, list(KINDS))
        message = f'"{name}" is no type of overlay'
        hint = f'did you mean "{near}"?' if near else f"one of {', '.join(KINDS)}"
        raise NetlabError(Problem("bad-overlay", message, hint=hint))
    return name


def pods(text: str) -> tuple[int, ...]:
    """`50,200`: numbers of pods; NetlabError (exit 2) if one is none, below two, or above 1,000."""
    found = _numbers(text, "pods")
    if found[0] < _LEAST_PODS or found[-1] > _MOST_PODS:
        raise NetlabError(
            Problem("bad-sizes", f"{text}: from {_LEAST_PODS} to {_MOST_PODS:,} pods are measured")
        )
    return found


def _numbers(text: str, of: str) -> tuple[int, ...]:
    """Numbers joined by commas, ascending, none of them zero."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    wrong = [word for word in words if not re.fullmatch(r"[0-9]{1,15}", word)]
    if wrong or not words:
        said = ", ".join(f'"{word}"' for word in wrong) or "nothing"
        raise NetlabError(
            Problem(
                "bad-sizes",
                f"{said} is no number of {of}",
                hint="numbers joined by commas, such as 1000,10000",
            )
        )
    found = tuple(sorted({int(word) for word in words}))
    if found[0] < 1:
        raise NetlabError(Problem("bad-sizes", f"0 {of}: there must be one"))
    return found


def _check_memory(services: int, how_many_modes: int) -> None:
    need = services * (_KERNEL_KIB * how_many_modes + _LOADER_KIB) / 1024**2
    have = memory_kib("MemAvailable") / 1024**2
    if services <= _LARGE and need < 0.8 * have:
        return
    raise NetlabError(
        Problem(
            "too-many-services",
            f"{services:,} Services in {how_many_modes} modes take about {need:.1f} GiB of memory, "
            f"of which {have:.1f} GiB are free",
            hint="fewer with --sizes or --modes; --force tries all the same",
        ),
        Exit.MACHINE,
    )
