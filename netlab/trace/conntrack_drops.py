"""Packets that connection tracking gave up: there was no room for another connection, or no place.

The kernel says no more than that netfilter dropped them, as by a rule, and no rule reports it.
Source: __nf_conntrack_alloc and __nf_conntrack_confirm, net/netfilter/nf_conntrack_core.c.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from netlab.trace.case import Case
from netlab.trace.place import Place
from netlab.trace.refusals import Doubt
from netlab.trace.witnesses.kernel import Moment

_COUNT = "net/netfilter/nf_conntrack_count"
_LIMIT = "net/netfilter/nf_conntrack_max"


class Untracked(NamedTuple):
    """Where a connection could not be remembered, why, and what shows it."""

    place: Place
    doubt: Doubt
    evidence: str


def untracked(case: Case) -> Untracked | None:
    """Why the probe's connection could not be remembered, if it was lost by that."""
    drops = [each for each in case.moments_of_loss if _is_of_netfilter(each)]
    if not drops:
        return None
    causes: tuple[Callable[[Case, Place], Untracked | None], ...] = (_full, _clash)
    found = (cause(case, drops[-1].place) for cause in causes)
    return next((each for each in found if each), None)


def _is_of_netfilter(moment: Moment) -> bool:
    """Of a packet that a queue gave back, older kernels have no reason to tell."""
    return moment.reason == "NETFILTER_DROP" or moment.code.startswith("nf_reinject")


def _full(case: Case, place: Place) -> Untracked | None:
    count, limit = case.tables.setting(place, _COUNT), case.tables.setting(place, _LIMIT)
    if count is None or limit is None or not 0 < int(limit) <= int(count):
        return None
    doubt = Doubt(
        "conntrack-full",
        f"connection tracking of {place} knows {count} connections, and may know {limit}: what "
        "would begin another one is dropped",
        "find out whose they are: `netlab conntrack`; if they are meant, let there be more: "
        f"`sysctl -w net.netfilter.nf_conntrack_max={2 * int(count)}` on the machine itself "
        "(conntrack.maxPerCore of kube-proxy)",
    )
    return Untracked(place, doubt, f"nf_conntrack_count is {count}, nf_conntrack_max {limit}")


def _clash(case: Case, place: Place) -> Untracked | None:
    """Two connections were translated to the same tuple before either was remembered."""
    failed = case.tables.failed_inserts(place)
    if not failed:
        return None
    doubt = Doubt(
        "conntrack-clash",
        f"another connection that {place} translated at the same moment was given the same address "
        "and port, and was remembered first: this one's packet is dropped (insert_failed)",
        "a client that sends again gets through; let the rule that translates the source choose "
        "ports at random, and two hardly ever meet: `masquerade fully-random` of nftables, "
        "`--random-fully` of iptables",
    )
    times = f"{failed} times" if failed > 1 else "once"
    return Untracked(place, doubt, f"insert_failed of {place} was counted {times} meanwhile")
