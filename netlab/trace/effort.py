"""How many rules a packet was held against, and how many matched.

The kernel reports the rules that matched.  Those before them in their chains were compared too, and
all that were left where a chain came to its end: counted here by the order of handles, or of
iptables-legacy by the places in a chain.  A look-up in a map is one rule, however many elements the
map has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from netlab.datapath.services.iptables_save import parse
from netlab.trace.model import Leg, Trace
from netlab.trace.model_steps import Data
from netlab.trace.witnesses.rules import Run

Chain = tuple[int, str, str]  # family (NFPROTO_*), table, chain
_LEGS: tuple[Leg, ...] = ("forward", "reply")
_ENDS = ("accept", "drop", "stolen", "queue", "repeat")


class Effort(Data, frozen=True, kw_only=True):
    """Rules that one packet was held against on all nodes of its way, and how many matched."""

    compared: int
    matched: int


def compared(run: Run, rules: Mapping[Chain, Sequence[int]]) -> int | None:
    """Rules that a run was held against; None if they are not those that it met.

    `rules` are handles by chain, in order.
    """
    count = 0
    # Chains that are under way, innermost last, each with the position of its next rule.
    way: list[tuple[str, int]] = [(run.chain, 0)]

    def handles(chain: str) -> Sequence[int]:
        return rules[run.family, run.table, chain]

    try:
        for match in run.matches:
            while way[-1][0] != match.chain:
                chain, position = way.pop()
                count += len(handles(chain)) - position
            chain, position = way.pop()
            after = handles(chain).index(match.handle, position) + 1
            count += after - position
            if match.verdict in _ENDS:
                return count
            if match.verdict not in ("goto", "return"):
                way.append((chain, after))
            if match.target:
                way.append((match.target, 0))
        return count + sum(len(handles(chain)) - position for chain, position in way)
    except (KeyError, ValueError, IndexError):  # no such chain, no such rule there, no way to it
        return None


def places_of(saved: str, family: int) -> dict[Chain, Sequence[int]]:
    """Rules by their places in what `iptables-legacy-save` prints."""
    return {
        (family, name, chain): [*range(1, len(table.rules.get(chain, ())) + 1)]
        for name, table in parse(saved).items()
        for chain in table.policies
    }


def efforts(
    trace: Trace,
    runs: Iterable[Run],
    rules: Mapping[str, Mapping[Chain, Sequence[int]]],
    legacy: Mapping[str, Mapping[Chain, Sequence[int]]],
) -> dict[Leg, Effort | None]:
    """What the probe and its answer met.

    `rules` and `legacy` (those of iptables-legacy) as in :func:`compared`, by namespace.  None for
    a leg of which something cannot be told.
    """
    found: dict[Leg, Effort | None] = {leg: Effort(compared=0, matched=0) for leg in _LEGS}
    way = _Way(trace)
    for run in runs:
        leg = way.leg(run)
        so_far = found[leg]
        count = compared(run, (legacy if run.legacy else rules).get(run.place.namespace, {}))
        if so_far is None or count is None:
            found[leg] = None
        else:
            found[leg] = Effort(
                compared=so_far.compared + count, matched=so_far.matched + len(run.matches)
            )
    return found


class _Way:
    """Which leg a run of rules belongs to, by the ends that were seen on each."""

    def __init__(self, trace: Trace) -> None:
        flows = [hop.packet.flow for hop in trace.forward]
        self._sources = {trace.probe.source, *(flow.source for flow in flows)}
        if trace.seen_source:
            self._sources.add(trace.seen_source)
        self._client = trace.probe.source.ip
        self._tunnels = {
            (hop.packet.outer.src, hop.packet.outer.dst)
            for hop in trace.forward
            if hop.packet.outer
        }

    def leg(self, run: Run) -> Leg:
        source, destination = run.flow.source, run.flow.destination
        if run.outer:
            return "forward" if (source.ip, destination.ip) in self._tunnels else "reply"
        if source in self._sources:
            return "forward"
        if destination in self._sources or destination.ip == self._client:
            return "reply"
        return "forward"
