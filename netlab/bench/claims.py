"""What others say of service rules, held against what was measured here.

Shapes carry over between machines, absolute values do not: so each claim is taken as a ratio, or as
an order, and the verdict says with which numbers.  Sources: the course notes that netlab grew from
(kubernetes-networking.zh.md), the Kubernetes blog, enhancement proposals and vendors' pages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from netlab.bench import lookup, sync, throughput
from netlab.bench.model import Claim, Figure, Fit, Kind, Report, Verdict, number
from netlab.bench.statistics import differs

NOTES = "the course notes (seed)"
BLOG = "Kubernetes blog, 28 Feb 2025, NFTables mode for kube-proxy"
FLAT = 1.15
SOME = 1_000  # below, other costs hide what a list adds
_WIDE = 5  # sizes so many times apart say something of growth

Answer = tuple[Verdict, str]
UNMEASURED: Verdict = "cannot be measured here"


class _Claim(NamedTuple):
    kind: Kind  # of the report that says something of it
    source: str
    text: str
    answer: Callable[[Report], Answer]


def claims(report: Report) -> list[Claim]:
    """Every claim that a report of this kind says something of."""
    found = []
    for each in _CLAIMS:
        if each.kind == report.kind:
            verdict, figure = each.answer(report)
            found.append(Claim(source=each.source, text=each.text, verdict=verdict, figure=figure))
    return found


def _linear(report: Report) -> Answer:
    """Of both backends, as far as they were measured: each larger list takes longer."""
    said = []
    held = []
    for fit in report.fits:
        if fit.what == lookup.FIRST and fit.mode.startswith("iptables") and _is_wide(fit):
            figures = settled(_curve(report, fit.what, fit.mode))
            said.append(
                f"{fit.mode}: {_ratio(figures[-1], figures[0])}, {number(fit.slope_ns)} ns "
                f"for each Service (R² {fit.r2:.4f})"
            )
            grows = [
                differs(after, before) and after.value > before.value
                for before, after in pairwise(figures)
            ]
            held.append(all(grows) and figures[-1].value >= 2 * figures[0].value)
    return _judged(held, said, "iptables with three sizes or more, five times apart")


def _hashes(mode: str) -> Callable[[Report], Answer]:
    def answer(report: Report) -> Answer:
        figures = settled(_curve(report, lookup.FIRST, mode))
        if len(figures) < 2 or figures[-1].services < _WIDE * figures[0].services:
            return UNMEASURED, _why(report, mode, "two sizes, five times apart")
        first, last = figures[0], figures[-1]
        slower = [
            each
            for each in report.figures
            if each.what == lookup.FIRST
            and each.mode.startswith("iptables")
            and each.services == last.services
        ]
        flat = last.value <= FLAT * first.value or not differs(last, first)
        ahead = all(each.value > last.value and differs(each, last) for each in slower)
        told = f"{_ratio(last, first)}" + "".join(
            f"; {each.mode} there {number(each.value)} {each.unit}" for each in slower
        )
        return _judged([flat and ahead], [told])

    return answer


def _blog_iptables(report: Report) -> Answer:
    held, said = [], []
    for mode in _modes(report, "iptables"):
        few = report.figure(lookup.FIRST, mode, 5_000)
        many = report.figure(lookup.FIRST, mode, 30_000)
        if few and many:
            held.append(3.0 <= many.value / few.value <= 7.5)
            said.append(f"{mode}: {_ratio(many, few)}")
    return _judged(held, said, "5,000 and 30,000 Services in mode iptables (--full)")


def _blog_nftables(report: Report) -> Answer:
    few = report.figure(lookup.FIRST, "nftables", 5_000)
    for services in (30_000, 10_000):
        many = report.figure(lookup.FIRST, "nftables", services)
        if few and many:
            flat = many.value <= FLAT * few.value or not differs(many, few)
            return _judged([flat], [f"nftables: {_ratio(many, few)}"])
    return UNMEASURED, _why(report, "nftables", "5,000 and 10,000 Services")


def _blog_worst_best(report: Report) -> Answer:
    held, said = [], []
    for mode in _modes(report, "iptables"):
        for services in (5_000, 10_000, 30_000):
            theirs = report.figure(lookup.FIRST, mode, services)
            ours = report.figure(lookup.FIRST, "nftables", services)
            if theirs and ours and ours.quantiles and theirs.quantiles:
                held.append(ours.quantiles.p99 < theirs.quantiles.p50)
                said.append(
                    f"{services:,}: nftables p99 {number(ours.quantiles.p99)}, {mode} p50 "
                    f"{number(theirs.quantiles.p50)} us"
                )
    return _judged(held, said, "nftables and iptables at 5,000 Services or more")


def _sets_and_maps(report: Report) -> Answer:
    verdict, said = _linear(report)
    flat, more = _hashes("nftables-flat")(report)
    if UNMEASURED in (verdict, flat):
        return UNMEASURED, said if verdict == UNMEASURED else more
    return _judged([verdict == flat == "reproduced"], [said, f"nftables-flat: {more}"])


def _keepalive(report: Report) -> Answer:
    kernels = [each for each in report.figures if each.mode not in ("none", "userspace")]
    figures = [each for each in kernels if each.what == lookup.ESTABLISHED]
    if not figures:
        return UNMEASURED, "needs packets of established connections"
    largest = max(each.services for each in figures)
    there = sorted((f for f in figures if f.services == largest), key=lambda f: f.value)
    least, most = there[0], there[-1]
    new = sorted(
        each.value for each in kernels if each.what == lookup.FIRST and each.services == largest
    )
    between = most.value / least.value
    told = (
        f"at {largest:,} Services {least.mode} {number(least.value)} to {most.mode} "
        f"{number(most.value)} us ({between:.3f} times); first packets "
        f"{number(new[0])} to {number(new[-1])} us"
    )
    return _judged([between <= 1.15 and between < new[-1] / new[0]], [told])


def _reloads(report: Report) -> Answer:
    held, said = [], []
    for mode in _modes(report, "iptables"):
        figures = _curve(report, f"{sync.CHANGES['replace']}: operations", mode)
        whole = _curve(report, f"{sync.LOAD}: operations", mode)
        times = _curve(report, f"{sync.CHANGES['replace']}: time", mode)
        if figures and whole and times:
            held.append(figures[-1].value > 0.5 * whole[-1].value)
            said.append(
                f"{mode}, {whole[-1].services:,} Services: {figures[-1].value:,.0f} lines of "
                f"{whole[-1].value:,.0f} are written; {_ratio(times[-1], times[0])}"
            )
    return _judged(held, said, "mode iptables")


def _partial(report: Report) -> Answer:
    held, said = [], []
    for mode in _modes(report, "iptables"):
        whole = _curve(report, f"{sync.LOAD}: time", mode)
        change = _curve(report, f"{sync.CHANGES['replace']}: time", mode)
        if whole and change:
            last, one = whole[-1], change[-1]
            held.append(last.value / one.value >= 2 and differs(last, one))
            said.append(
                f"{mode}, {last.services:,} Services: {number(last.value, 4)} ms whole, "
                f"{number(one.value, 4)} ms for one endpoint"
            )
    return _judged(held, said, "mode iptables")


def _short_connections(report: Report) -> Answer:
    held, said = [], []
    for mode in _modes(report, "iptables"):
        figures = _curve(report, f"{throughput.CONNECTIONS} over vxlan", mode)
        if len(figures) > 1 and figures[-1].services >= 30_000:
            lost = 1 - figures[-1].value / figures[0].value
            held.append(lost >= 0.5)
            said.append(f"{mode}: {100 * lost:.0f} % fewer at {figures[-1].services:,} Services")
    return _judged(held, said, "30,000 Services in mode iptables (--sizes 1,30000)")


def _packets_a_second(report: Report) -> Answer:
    ipvs = _curve(report, f"{throughput.PACKETS} over vxlan", "ipvs")
    lists = [
        each
        for mode in _modes(report, "iptables")
        for each in _curve(report, f"{throughput.PACKETS} over vxlan", mode)[:1]
    ]
    if not ipvs or not lists:
        return UNMEASURED, _why(report, "ipvs", "iptables and ipvs")
    ratio = lists[0].value / ipvs[0].value
    told = f"{lists[0].mode} {number(lists[0].value, 4)}, ipvs {number(ipvs[0].value, 4)}"
    return _judged(
        [ratio > 1 and differs(lists[0], ipvs[0])], [f"{told} packets a second ({ratio:.2f} times)"]
    )


def _never(why: str) -> Callable[[Report], Answer]:
    return lambda report: (UNMEASURED, why)


def settled(figures: Sequence[Figure]) -> list[Figure]:
    """Figures of sizes at which the Services may matter, where there are two at least."""
    large = [each for each in figures if each.services >= SOME]
    return large if len(large) > 1 else list(figures)


def _judged(held: list[bool], said: list[str], needs: str = "") -> Answer:
    if not held:
        return UNMEASURED, f"needs {needs}"
    return "reproduced" if all(held) else "not reproduced", "; ".join(said)


def _why(report: Report, mode: str, needs: str) -> str:
    skipped = [each.reason for each in report.skipped if each.mode == mode]
    return skipped[0] if skipped else f"needs {mode} with {needs}"


def _is_wide(fit: Fit) -> bool:
    return fit.last >= _WIDE * fit.first


def _modes(report: Report, prefix: str) -> list[str]:
    return list(dict.fromkeys(f.mode for f in report.figures if f.mode.startswith(prefix)))


def _curve(report: Report, what: str, mode: str) -> list[Figure]:
    found = [each for each in report.figures if each.what == what and each.mode == mode]
    return sorted(found, key=lambda each: each.services)


def _ratio(last: Figure, first: Figure) -> str:
    return (
        f"{number(last.value)} {last.unit} at {last.services:,} Services, "
        f"{last.value / first.value:.2f} times the {number(first.value)} at {first.services:,}"
    )


def _all() -> Iterator[_Claim]:
    yield _Claim(
        "lookup", NOTES, "iptables matches linearly, so it slows down as Services grow", _linear
    )
    yield _Claim(
        "lookup", NOTES, "ipvs uses hashes, so it is ahead where there are many", _hashes("ipvs")
    )
    yield _Claim(
        "lookup",
        BLOG,
        "iptables: p50 at 30,000 Services is 5.8 times that at 5,000",
        _blog_iptables,
    )
    yield _Claim(
        "lookup", BLOG, "nftables: p50 is the same at 5,000, 10,000 and 30,000", _blog_nftables
    )
    yield _Claim(
        "lookup",
        BLOG,
        "the p99 of nftables is below the p50 of iptables from 5,000 on",
        _blog_worst_best,
    )
    yield _Claim(
        "lookup",
        "Red Hat, Benchmarking nftables, 2017",
        "linear lists degrade, sets and verdict maps stay flat",
        _sets_and_maps,
    )
    yield _Claim(
        "lookup",
        "Tigera, Comparing kube-proxy modes",
        "with connections that are kept the mode hardly matters",
        _keepalive,
    )
    yield _Claim("sync", NOTES, "iptables writes all rules anew at each change", _reloads)
    yield _Claim(
        "sync",
        "KEP-3453, 5,000 nodes",
        "27 s to program the network with full restores, 13 s with partial ones: twice as fast",
        _partial,
    )
    yield _Claim(
        "sync",
        "Cilium blog, 17 Apr 2018, quoting Huawei",
        "160,000 iptables rules put in one by one take 5 hours",
        _never("rules are loaded in one transaction, as kube-proxy does; none is put in by itself"),
    )
    yield _Claim(
        "throughput",
        "imroc, TKE benchmark",
        "iptables: 71 % fewer short connections a second at 30,000 Services",
        _short_connections,
    )
    yield _Claim(
        "throughput",
        "Cilium 1.8 blog",
        "iptables forwards 1.14 times the packets of ipvs for one Service (XDP and tc more)",
        _packets_a_second,
    )
    yield _Claim(
        "throughput",
        "Cilium 1.6 blog",
        "HTTP GET through a Service: 292, 380, 577 us with 1, 1,000, 2,768 Services in iptables, "
        "300 us with eBPF",
        _never("no datapath of eBPF is built here; for growth see `netlab bench lookup`"),
    )
    yield _Claim(
        "throughput",
        "Tigera, Comparing kube-proxy modes",
        "iptables takes 35 % of a core more at 10,000 Services without keepalive, ipvs 8 %",
        _never("the load that it was measured under is not told; see the CPU of new connections"),
    )


_CLAIMS = tuple(_all())
