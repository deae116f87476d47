"""What a comparison is: one probe as each service proxy mode treated it, and what that cost.

Plain frozen data, written as JSON by :func:`encode` under the schema `netlab.compare/v1`
(docs/compare.md).
"""

from __future__ import annotations

import statistics

import msgspec

from netlab.topology.model import IPTablesBackend, ProxyMode
from netlab.trace.effort import Effort
from netlab.trace.model import Disposition, Trace
from netlab.trace.model_steps import Data

SCHEMA = "netlab.compare/v1"


class Variant(msgspec.Struct, frozen=True):
    """A way to serve Services; without a backend it is that of the lab, or else of the machine."""

    mode: ProxyMode
    backend: IPTablesBackend | None = None

    def __str__(self) -> str:
        return f"{self.mode}:{self.backend}" if self.backend else self.mode


class RuleSet(Data, frozen=True, kw_only=True):
    """What netfilter holds on a node, of the probe's family: by whomever it was put there."""

    chains: int
    rules: int
    sets: int  # and maps, with names
    elements: int  # of all sets and maps


class Cost(Data, frozen=True, kw_only=True):
    """Times from the client's device to the endpoint's, one for each new connection, ns."""

    samples_ns: list[int]
    median_us: float
    low_us: float  # the lower quartile
    high_us: float  # the upper quartile

    @classmethod
    def of(cls, samples_ns: list[int]) -> Cost | None:
        """None without samples."""
        if not samples_ns:
            return None
        low, median, high = (
            statistics.quantiles(samples_ns, n=4, method="inclusive")
            if len(samples_ns) > 1
            else samples_ns * 3
        )
        return cls(
            samples_ns=samples_ns,
            median_us=round(median / 1000, 1),
            low_us=round(low / 1000, 1),
            high_us=round(high / 1000, 1),
        )


class Measured(Data, frozen=True, kw_only=True):
    """One mode in its twin of the lab."""

    twin: str
    trace: Trace
    tries: int  # traces until the endpoint was that of the first mode, or until giving up
    there: Effort | None  # null: the rules' trace does not tell
    back: Effort | None
    ruleset: RuleSet | None
    load_ms: float
    cost: Cost | None  # null: the probe was not delivered


class Column(Data, frozen=True, kw_only=True):
    """One mode.  `lacking`: why it is not on this machine; then nothing is measured."""

    mode: ProxyMode
    backend: IPTablesBackend | None
    lacking: str | None = None
    measured: Measured | None = None

    @property
    def name(self) -> str:
        """`iptables:legacy`."""
        return str(Variant(self.mode, self.backend))


class Comparison(Data, frozen=True, kw_only=True):
    """All modes.  `agree`: the same disposition, the same translations."""

    schema: str = SCHEMA
    lab: str
    from_: str = msgspec.field(name="from")
    to: str
    node: str  # whose rules are counted and loaded: the client's
    columns: list[Column] = msgspec.field(name="modes")
    agree: bool
    differences: list[str]  # a sentence each

    @property
    def dispositions(self) -> set[Disposition]:
        return {each.measured.trace.disposition for each in self.columns if each.measured}


def encode(comparison: Comparison) -> bytes:
    """A comparison as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(comparison), indent=2)
