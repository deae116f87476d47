"""A packet that connection tracking gave up, for it knows as many connections as it may.

The kernel says no more than that netfilter dropped it, as by a rule, and no rule reports it.
Source: __nf_conntrack_alloc, net/netfilter/nf_conntrack_core.c.
"""

from __future__ import annotations

from netlab.trace.case import Case
from netlab.trace.place import Place
from netlab.trace.refusals import Doubt

_COUNT = "net/netfilter/nf_conntrack_count"
_LIMIT = "net/netfilter/nf_conntrack_max"


def full_table(case: Case) -> tuple[Place, Doubt, str] | None:
    """Where no more connections can be remembered, if the probe was lost there; the evidence."""
    drops = [each for each in case.moments if each.is_loss and each.reason == "NETFILTER_DROP"]
    if not drops:
        return None
    place = drops[-1].place
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
    return place, doubt, f"nf_conntrack_count is {count}, nf_conntrack_max {limit}"
