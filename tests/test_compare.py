"""Comparisons without a kernel: modes by name, twins, rules counted, sentences, the table."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence

import pytest
from msgspec.structs import replace
from rich.console import Console

from labs import small_lab
from netlab.compare.differences import agree, differences
from netlab.compare.model import Column, Comparison, Cost, Measured, RuleSet, Variant, encode
from netlab.compare.twins import twin, variants
from netlab.datapath.services.modes import mode_of
from netlab.problems import NetlabError
from netlab.report.compare import print_comparison
from netlab.topology.model import Fault, Lab
from netlab.trace.aim import Request, aim
from netlab.trace.effort import Effort, compared, efforts, places_of
from netlab.trace.model import (
    Disposition,
    Hop,
    Loss,
    Probe,
    Receiver,
    Trace,
    Translation,
    Witnesses,
)
from netlab.trace.model_steps import AnyStep, Nat, Outer, Packet, Rule, Socket, Tuple
from netlab.trace.place import Place
from netlab.trace.witnesses.rules import Match, Run

CLIENT = Socket(ip="10.244.1.2", port=41000)
SERVICE = Socket(ip="10.99.0.1", port=80)
POD = Socket(ip="10.244.2.2", port=8002)
WEB = "svc/demo/web"


# Modes


def test_modes_are_named_with_backends() -> None:
    assert variants("iptables:legacy, nftables,") == (
        Variant("iptables", "legacy"),
        Variant("nftables"),
    )
    assert str(Variant("iptables", "nft")) == "iptables:nft"


@pytest.mark.parametrize(
    ("text", "code", "hint"),
    [
        ("iptable", "unknown-mode", 'did you mean "iptables"'),
        ("iptables:legcy", "bad-mode", 'did you mean "legacy"'),
        ("nftables:nft", "bad-mode", "iptables:nft"),
        (" , ", "no-mode", "iptables"),
    ],
)
def test_what_is_no_mode_is_an_error(text: str, code: str, hint: str) -> None:
    with pytest.raises(NetlabError) as caught:
        variants(text)
    (problem,) = caught.value.problems
    assert problem.code == code
    assert hint in str(problem.hint)


# Twins


def large_lab() -> Lab:
    return small_lab("large", pods=90, nodes=9)


def test_a_twin_is_the_lab_but_for_name_and_proxy() -> None:
    lab = replace(small_lab(), faults=(Fault(name="no-route", node="n1"),))
    made = twin(lab, Variant("iptables", "legacy"), aim(lab, Request("p0", "svc/web")))
    assert made.name.startswith(f"{lab.name}-compare-iptables-legacy-")
    assert made.twin_of == lab.name
    assert made.iptables_backend == "legacy"
    assert (made.nodes, made.pods, made.services, made.endpoints, made.faults) == (
        lab.nodes,
        lab.pods,
        lab.services,
        lab.endpoints,
        lab.faults,
    )
    long = replace(lab, name="a" * 63)
    named = twin(long, Variant("nftables-flat"), aim(long, Request("p0", "svc/web"))).name
    assert len(named) == 63
    assert "-compare-nftables-flat-" in named


def test_of_a_large_lab_a_twin_has_what_the_way_needs_with_all_rules() -> None:
    lab = large_lab()
    to_pod = twin(lab, Variant("nftables"), aim(lab, Request("p0", "p1")))
    assert [pod.name for pod in to_pod.pods] == ["p0", "p1"]
    assert [node.name for node in to_pod.nodes] == ["n1", "n2"]
    for mode in ("iptables", "nftables", "nftables-flat"):
        proxy = replace(lab.service_proxy, mode=mode)  # type: ignore[arg-type]
        whole = replace(lab, service_proxy=proxy)
        part = replace(to_pod, service_proxy=proxy)
        for node in to_pod.nodes:
            assert mode_of(whole).render(whole, node) == mode_of(part).render(part, node)
    to_service = twin(lab, Variant("nftables"), aim(lab, Request("p0", "svc/web")))
    assert to_service.pods == lab.pods
    faulty = replace(lab, faults=(Fault(name="link-down", client="demo/p3", server="demo/p4"),))
    kept = twin(faulty, Variant("nftables"), aim(lab, Request("p0", "p1")))
    assert [pod.name for pod in kept.pods] == ["p0", "p1", "p3", "p4"]
    elsewhere = twin(lab, Variant("nftables"), aim(lab, Request("p0", "10.244.9.200:80")))
    assert elsewhere.pods == lab.pods


# Rules counted

NODE = Place("lab:n1", "node", "n1", "n1")
HANDLES = {
    (2, "nat", "PREROUTING"): [1],
    (2, "nat", "SERVICES"): [10, 11, 12, 13],
    (2, "nat", "WEB"): [20, 21],
    (2, "nat", "MARK"): [30],
    (2, "nat", "END"): [40, 41],
}


def run(*matches: Match, policy: str | None = None, flow: Tuple | None = None) -> Run:
    return Run(
        place=NODE,
        table="nat",
        chain="PREROUTING",
        iif="veth0",
        oif=None,
        protocol="tcp",
        flow=flow or Tuple(source=CLIENT, destination=SERVICE),
        ip_id=1,
        quoted=b"",
        outer=False,
        ours=True,
        matches=list(matches),
        policy=policy,
    )


@pytest.mark.parametrize(
    ("matches", "count"),
    [
        pytest.param([], 1, id="none matches"),
        pytest.param([Match("PREROUTING", 1, "jump", "SERVICES")], 5, id="to the end of a chain"),
        pytest.param(
            [
                Match("PREROUTING", 1, "jump", "SERVICES"),
                Match("SERVICES", 12, "jump", "WEB"),
                Match("WEB", 20, "jump", "MARK"),
                Match("MARK", 30, "continue"),
                Match("WEB", 21, "jump", "END"),
                Match("END", 41, "accept"),
            ],
            1 + 3 + 1 + 1 + 1 + 2,
            id="jumps and an end",
        ),
        pytest.param(
            [Match("PREROUTING", 1, "goto", "WEB"), Match("WEB", 20, "return")],
            1 + 1,
            id="goto and return",
        ),
        pytest.param(
            [Match("PREROUTING", 1, "jump", "END"), Match("END", 40, "drop")], 2, id="drop"
        ),
    ],
)
def test_rules_before_those_that_matched_were_compared_too(
    matches: Sequence[Match], count: int
) -> None:
    assert compared(run(*matches), HANDLES) == count


def test_rules_that_changed_meanwhile_cannot_be_counted() -> None:
    assert compared(run(Match("PREROUTING", 9, "accept")), HANDLES) is None
    assert compared(run(Match("OTHER", 1, "accept")), HANDLES) is None
    assert compared(run(), {}) is None


def test_rules_are_counted_for_each_leg() -> None:
    back = Tuple(source=POD, destination=CLIENT)
    found = efforts(
        delivered(),
        [run(Match("PREROUTING", 1, "jump", "SERVICES")), run(flow=back)],
        {"lab:n1": HANDLES},
        {},
    )
    assert found == {
        "forward": Effort(compared=5, matched=1),
        "reply": Effort(compared=1, matched=0),
    }


def test_rules_of_iptables_legacy_are_counted_by_their_places() -> None:
    saved = "*nat\n:PREROUTING ACCEPT [0:0]\n:MINE - [0:0]\n-A PREROUTING -j MINE\n-A MINE -j A\n"
    places = places_of(saved + "-A MINE -j B\nCOMMIT\n", 2)
    assert places == {(2, "nat", "PREROUTING"): [1], (2, "nat", "MINE"): [1, 2]}
    met = run(Match("PREROUTING", 1, "jump", "MINE"), Match("MINE", 2, "accept"))
    met.legacy = True
    found = efforts(delivered(), [met], {"lab:n1": HANDLES}, {"lab:n1": places})
    assert found["forward"] == Effort(compared=3, matched=2)


# Sentences and the table


def rule(table: str, chain: str, verdict: str, text: str) -> Rule:
    return Rule(
        hook="PREROUTING",
        table=table,
        chain=chain,
        handle=1,
        verdict=verdict,
        rule=text,
        object=WEB if verdict == "accept" else None,
    )


def hop(namespace: str, device: str, *steps: AnyStep, node: str = "n1") -> Hop:
    packet = Packet(
        src=CLIENT.ip,
        dst=SERVICE.ip,
        sport=CLIENT.port,
        dport=SERVICE.port,
        protocol="tcp",
        ttl=64,
        length=60,
        flags="S",
    )
    return Hop(
        node=node,
        namespace=f"lab:{namespace}",
        device=device,
        direction="in",
        t_ns=0,
        packet=packet,
        steps=list(steps),
    )


DNAT = Nat(translation="dnat", reverse=False, before=SERVICE, after=POD)
IN_IPTABLES = (
    rule("nat", "PREROUTING", "jump KUBE-SERVICES", "-A PREROUTING -j KUBE-SERVICES"),
    rule("nat", "KUBE-SERVICES", "accept", "-A KUBE-SERVICES -p tcp -j DNAT --to 10.244.2.2:8002"),
    DNAT,
)
IN_NFTABLES = (
    rule("kube-proxy", "nat-prerouting", "jump services", "jump services"),
    rule("kube-proxy", "services", "accept", "dnat ip to 10.244.2.2:8002"),
    DNAT,
)


def delivered(*steps: AnyStep, masqueraded: bool = False, pod: str = "p1") -> Trace:
    seen = Socket(ip="10.244.1.1", port=9) if masqueraded else CLIENT
    translations = [
        Translation(
            kind="dnat", node="n1", before=SERVICE, after=Socket(ip=pod, port=8002), rule=None
        )
    ]
    if masqueraded:
        translations.append(
            Translation(kind="masquerade", node="n1", before=CLIENT, after=seen, rule=None)
        )
    return trace(
        "delivered",
        Receiver(kind="pod", name=f"demo/{pod}", node="n2", ip=pod, port=8002),
        seen,
        translations,
        [hop("demo:p0", "eth0"), hop("n1", "veth0", *steps), hop("demo:p1", "eth0", node="n2")],
    )


def rejected() -> Trace:
    return trace("rejected", None, None, [], [hop("n1", "veth0")])


def trace(
    disposition: Disposition,
    to: Receiver | None,
    seen: Socket | None,
    translations: list[Translation],
    forward: list[Hop],
) -> Trace:
    loss = Loss(
        direction="forward",
        node="n1",
        device="veth0",
        reason="no-such-port",
        where="node n1",
        rule=None,
        evidence=[],
        explanation=f"{WEB} has 80/TCP, so it is refused",
        fix=None,
    )
    return Trace(
        lab="lab",
        probe=Probe(
            from_="demo/p0", to="svc/web", protocol="tcp", source=CLIENT, destination=SERVICE
        ),
        disposition=disposition,
        delivered_to=to,
        seen_source=seen,
        translations=translations,
        drop=None if disposition == "delivered" else loss,
        forward=forward,
        reply=[],
        witnesses=Witnesses(packets="ok", rules="ok", conntrack="ok", kernel="ok", decisions="ok"),
        elapsed_us=1000,
    )


def column(
    mode: str, found: Trace, samples_us: Sequence[float] = (), tries: int = 1, sets: int = 0
) -> Column:
    return Column(
        mode=mode,  # type: ignore[arg-type]
        backend=None,
        measured=Measured(
            twin=f"lab-compare-{mode}-1",
            trace=found,
            tries=tries,
            there=Effort(compared=12, matched=4),
            back=Effort(compared=3, matched=0),
            ruleset=RuleSet(chains=9, rules=21, sets=sets, elements=sets * 2),
            load_ms=12.5,
            cost=Cost.of([round(each * 1000) for each in samples_us]),
        ),
    )


def comparison(*columns: Column) -> Comparison:
    return Comparison(
        lab="lab",
        from_="demo/p0",
        to="svc/web",
        node="n1",
        columns=list(columns),
        agree=agree(columns),
        differences=differences(columns),
    )


def test_modes_that_do_the_same_differ_in_nothing() -> None:
    columns = [column("iptables", delivered()), column("nftables", delivered())]
    assert agree(columns)
    assert differences(columns) == []


def test_other_endpoints_are_no_difference_but_are_told() -> None:
    columns = [column("iptables", delivered()), column("nftables", delivered(pod="p2"), tries=12)]
    assert agree(columns)
    assert differences(columns) == [
        "With nftables it went to demo/p2, not to demo/p1, in 12 tries: endpoints are chosen at "
        "random, and the ways may differ for that."
    ]


def test_other_outcomes_are_told_of_each_group() -> None:
    columns = [
        column("iptables", delivered()),
        column("nftables", rejected()),
        column("nftables-flat", rejected()),
    ]
    assert not agree(columns)
    assert differences(columns) == [
        "With iptables it is delivered to pod demo/p1 on n2 port 8002.",
        f"With nftables and nftables-flat it is rejected on n1: {WEB} has 80/TCP, so it is "
        "refused.",
        "With iptables: DNAT on n1, 10.99.0.1:80 → p1:8002.",
        "With nftables and nftables-flat: nothing is translated.",
    ]


def test_other_translations_are_a_difference() -> None:
    columns = [
        column("iptables", delivered(masqueraded=True)),
        column("nftables", delivered()),
    ]
    assert not agree(columns)
    assert differences(columns) == [
        "With iptables: DNAT on n1, 10.99.0.1:80 → p1:8002 and masquerade on n1, "
        "10.244.1.2:41000 → 10.244.1.1:9.",
        "With nftables: DNAT on n1, 10.99.0.1:80 → p1:8002.",
    ]


NOTHING = (
    "The times say nothing for or against a mode: they are small, scatter, and differ by no more "
    "than that."
)


@pytest.mark.parametrize(
    ("fast", "slow", "said"),
    [
        (
            [20] * 12,
            [40] * 12,
            "With nftables the first packet of a connection takes 2.0 times as long as with "
            "iptables from the client's device to the endpoint's.",
        ),
        ([20, 30] * 6, [25, 35] * 6, NOTHING),
        ([20.0] * 12, [21.0] * 12, NOTHING),
        ([20] * 3, [40] * 3, NOTHING),
    ],
)
def test_times_are_told_apart_where_they_differ_by_more_than_they_scatter(
    fast: Sequence[float], slow: Sequence[float], said: str
) -> None:
    columns = [
        column("iptables", delivered(), fast),
        column("nftables", delivered(), slow),
    ]
    assert differences(columns) == [said]


def test_cost_is_a_median_with_quartiles() -> None:
    cost = Cost.of([4000, 1000, 2000, 3000, 100_000])
    assert cost is not None
    assert (cost.low_us, cost.median_us, cost.high_us) == (2.0, 3.0, 4.0)
    single = Cost.of([7000])
    assert single is not None
    assert (single.low_us, single.median_us, single.high_us) == (7.0, 7.0, 7.0)
    assert Cost.of([]) is None


def printed(found: Comparison, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    print_comparison(found, console)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


BESIDE = """\
demo/p0 → svc/web, in twins of lab lab

                 iptables                         nftables
────────────────────────────────────────────────────────────────────────────────
result           ✓ delivered                      ✓ delivered
endpoint         demo/p1 on n2, port 8002         demo/p1 on n2, port 8002
it saw           the true source,                 10.244.1.1:9 (masquerade)
                 10.244.1.2:41000

there
n1               nat PREROUTING →                 kube-proxy nat-prerouting →
                 KUBE-SERVICES: DNAT              services: dnat (svc/demo/web)
                 (svc/demo/web)                     dnat ip to 10.244.2.2:8002
                   -A KUBE-SERVICES -p tcp -j     DNAT 10.99.0.1:80 →
                 DNAT --to 10.244.2.2:8002        10.244.2.2:8002
                 DNAT 10.99.0.1:80 →
                 10.244.2.2:8002

cost
rules compared   12 there, 3 back                 12 there, 3 back
that matched     4 there, 0 back                  4 there, 0 back
on n1            21 rules in 9 chains             21 rules in 9 chains
                                                  1 set or map, 2 elements
to load them     12.5 ms                          12.5 ms
first packet     20 µs (20 to 20), 2 probes

• With iptables: DNAT on n1, 10.99.0.1:80 → p1:8002.
• With nftables: DNAT on n1, 10.99.0.1:80 → p1:8002 and masquerade on n1,
10.244.1.2:41000 → 10.244.1.1:9.
The modes do not agree."""

STACKED = """\
demo/p0 → svc/web, in twins of lab lab

                 iptables
────────────────────────────────────────────────────────────
result           ✓ delivered
endpoint         demo/p1 on n2, port 8002
it saw           the true source, 10.244.1.2:41000

there
n1               nat PREROUTING → KUBE-SERVICES: DNAT
                 (svc/demo/web)
                   -A KUBE-SERVICES -p tcp -j DNAT --to
                 10.244.2.2:8002
                 DNAT 10.99.0.1:80 → 10.244.2.2:8002

cost
rules compared   12 there, 3 back
that matched     4 there, 0 back
on n1            21 rules in 9 chains
to load them     12.5 ms

                 iptables:legacy
────────────────────────────────────────────────────────────
                 not here: "iptables-legacy-restore" is not
                 installed

There is nothing to compare it with."""


def test_modes_stand_side_by_side() -> None:
    found = comparison(
        column("iptables", delivered(*IN_IPTABLES), [20, 20]),
        column("nftables", delivered(*IN_NFTABLES, masqueraded=True), sets=1),
    )
    assert printed(found, 80) == BESIDE


def test_where_it_is_narrow_they_stand_below_each_other_and_what_is_lacking_is_said() -> None:
    lacking = '"iptables-legacy-restore" is not installed'
    found = comparison(
        column("iptables", delivered(*IN_IPTABLES)),
        Column(mode="iptables", backend="legacy", lacking=lacking),
    )
    assert printed(found, 60) == STACKED


def test_json_has_the_traces_inside() -> None:
    found = comparison(column("iptables", delivered(), [20]), column("nftables", rejected()))
    data = json.loads(encode(found))
    assert data["schema"] == "netlab.compare/v1"
    assert data["agree"] is False
    first, second = data["modes"]
    assert first["mode"] == "iptables"
    assert first["measured"]["trace"]["schema"] == "netlab.trace/v1"
    assert first["measured"]["there"] == {"compared": 12, "matched": 4}
    assert first["measured"]["cost"]["samples_ns"] == [20_000]
    assert second["measured"]["cost"] is None


def test_the_outer_packet_of_a_tunnel_belongs_to_the_leg_that_it_carries() -> None:
    outer = Outer(
        src="172.21.32.11", dst="172.21.32.12", sport=1, dport=2, ttl=64, length=110, id=1, vni=1
    )
    carried = hop("n1", "eth0")
    carried = replace(carried, packet=replace(carried.packet, outer=outer))
    found = replace(delivered(), forward=[carried])
    there = Tuple(source=Socket(ip=outer.src, port=1), destination=Socket(ip=outer.dst, port=8472))
    outside = replace(run(flow=there), outer=True)
    assert efforts(found, [outside], {"lab:n1": HANDLES}, {})["forward"] == Effort(
        compared=1, matched=0
    )
    returning = replace(run(flow=there.reversed), outer=True)
    assert efforts(found, [returning], {"lab:n1": HANDLES}, {})["reply"] == Effort(
        compared=1, matched=0
    )
