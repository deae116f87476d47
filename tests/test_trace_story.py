"""From what witnesses saw to a story: hops, steps and explanations, without a kernel."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import pytest

from labs import six
from netlab.trace.correlate import Story, hops
from netlab.trace.explain import Explained
from netlab.trace.model import Hop, Leg
from netlab.trace.model_steps import (
    Bridge,
    Conntrack,
    Decapsulate,
    Encapsulate,
    Neighbour,
    Route,
    Rule,
)
from trace_records import Record, told


class Version(NamedTuple):
    """Records of one family, and what addresses and devices are called there."""

    prefix: str
    text: Callable[[str], str]

    def told(self, name: str) -> tuple[Record, Story, Explained]:
        return told(self.prefix + name)


def _of_ipv6(text: str) -> str:
    bracketed = re.sub(r"([\d.]+)(:\d+)", r"[\1]\2", text)
    return six(bracketed).replace("flannel.1", "flannel-v6.1")


@pytest.fixture(params=[Version("", str), Version("ipv6-", _of_ipv6)], ids=["IPv4", "IPv6"])
def ip(request: pytest.FixtureRequest) -> Version:
    version: Version = request.param
    return version


def walk(story: Story, leg: Leg) -> list[Hop]:
    return hops(story.leg(leg), 0)


def devices(found: list[Hop]) -> list[str]:
    return [f"{hop.namespace.split(':')[-1]} {hop.device} {hop.direction}" for hop in found]


def steps(found: list[Hop], kind: type) -> list[str]:
    return [str(step) for hop in found for step in hop.steps if isinstance(step, kind)]


def test_a_remote_service_is_followed_over_every_device(ip: Version) -> None:
    record, story, explained = ip.told("remote-service")
    there = walk(story, "forward")
    veths = [hop.device for hop in there if hop.device.startswith("veth")]
    assert devices(there) == [
        "p0 eth0 out",
        f"n1 {veths[0]} in",
        "n1 cbr0 in",
        ip.text("n1 flannel.1 out"),
        "n1 eth0 out",
        "_switch n1 in",
        "_switch n2 out",
        "n2 eth0 in",
        ip.text("n2 flannel.1 in"),
        "n2 cbr0 out",
        f"n2 {veths[1]} out",
        "p1 eth0 in",
    ]
    assert explained.disposition == "delivered"
    assert explained.delivered_to is not None
    assert explained.delivered_to.name == "demo/p1"
    assert str(explained.seen_source) == str(record.sent.source)
    assert explained.drop is None


def test_the_rules_of_a_service_stand_where_the_packet_met_them(ip: Version) -> None:
    _, story, _ = ip.told("remote-service")
    entered = walk(story, "forward")[1]
    rules = [step for step in entered.steps if isinstance(step, Rule) and step.table == "nat"]
    assert [rule.chain.rsplit("-", 1)[0] for rule in rules] == [
        "PREROUTING",
        "KUBE",
        "KUBE-SVC",
        "KUBE-SEP",
    ]
    assert rules[1].comment == "demo/remote cluster IP"
    assert {rule.object for rule in rules[1:]} == {"svc/demo/remote"}
    assert rules[-1].verdict == "accept"
    assert rules[-1].rule is not None
    assert rules[-1].rule.endswith(ip.text("-j DNAT --to-destination 10.244.2.2:8002"))


def test_dnat_is_told_with_its_rule_and_its_connection_and_undone_on_the_way_back(
    ip: Version,
) -> None:
    record, story, explained = ip.told("remote-service")
    there, back = story.nats("forward"), story.nats("reply")
    assert [str(nat) for _, nat in there] == [ip.text("DNAT 10.99.0.1:80 → 10.244.2.2:8002")]
    assert "KUBE-SEP-" in (there[0][1].rule or "")
    assert [str(nat) for _, nat in back] == [
        ip.text("DNAT undone, source 10.244.2.2:8002 → 10.99.0.1:80")
    ]
    entry = next(
        step
        for hop in walk(story, "forward")
        for step in hop.steps
        if isinstance(step, Conntrack) and step.id == there[0][1].conntrack
    )
    assert entry.original == record.sent
    assert str(entry.reply.source) == ip.text("10.244.2.2:8002")
    assert back[0][1].conntrack == entry.id
    assert [each.kind for each in explained.translations] == ["dnat"]
    assert explained.translations[0].node == "n1"


def test_the_tunnel_is_told_with_the_entries_that_chose_it(ip: Version) -> None:
    _, story, _ = ip.told("remote-service")
    there = walk(story, "forward")
    assert steps(there, Encapsulate) == [
        ip.text("flannel.1 encapsulates: VNI 1, outer 172.21.32.11 → 172.21.32.12")
    ]
    assert steps(there, Decapsulate) == [
        ip.text("flannel.1 decapsulates: VNI 1, outer was 172.21.32.11 → 172.21.32.12")
    ]
    chosen = next(step for hop in there for step in hop.steps if isinstance(step, Encapsulate))
    entry = next(
        step
        for hop in there
        for step in hop.steps
        if isinstance(step, Bridge) and step.device == ip.text("flannel.1")
    )
    assert (entry.mac, entry.remote) == (chosen.mac, ip.text("172.21.32.12"))
    inside = [hop for hop in there if hop.packet.outer]
    assert [hop.device for hop in inside] == ["eth0", "n1", "n2", "eth0"]
    assert {hop.packet.dst for hop in inside} == {ip.text("10.244.2.2")}


def test_routes_are_those_of_after_dnat_with_the_prefix_that_matched(ip: Version) -> None:
    _, story, _ = ip.told("remote-service")
    routes = [
        step for hop in walk(story, "forward") for step in hop.steps if isinstance(step, Route)
    ]
    assert [(route.destination, route.matched, route.device) for route in routes] == [
        tuple(ip.text(text).split())
        for text in (
            "10.99.0.1 0.0.0.0/0 eth0",
            "10.244.2.2 10.244.2.0/24 flannel.1",
            "172.21.32.12 172.21.32.0/24 eth0",
            "10.244.2.2 10.244.2.0/24 cbr0",
        )
    ]
    assert all(" is at " in text for text in steps(walk(story, "forward"), Neighbour))


def test_time_never_runs_backwards(ip: Version) -> None:
    for name in ("remote-service", "masqueraded", "hairpin", "port-closed"):
        _, story, _ = ip.told(name)
        times = [hop.t_ns for leg in ("forward", "reply") for hop in walk(story, leg)]  # type: ignore[arg-type]
        assert times == sorted(times)


def test_a_node_is_masqueraded_and_the_pod_sees_the_overlay_address(ip: Version) -> None:
    record, story, explained = ip.told("masqueraded")
    kinds = [(nat.translation, nat.reverse) for _, nat in story.nats("forward")]
    assert kinds == [("dnat", False), ("masquerade", False)]
    back = [(nat.translation, nat.reverse) for _, nat in story.nats("reply")]
    assert sorted(back) == [("dnat", True), ("masquerade", True)]
    assert explained.seen_source is not None
    assert explained.seen_source.ip == ip.text("10.244.1.0")
    assert explained.seen_source != record.sent.source
    # The answer is turned back after the last device that saw it.
    assert story.reply[-1].end == record.sent.reversed


def test_a_pod_reaches_itself_through_its_service_masqueraded(ip: Version) -> None:
    _, story, explained = ip.told("hairpin")
    assert explained.disposition == "delivered"
    assert explained.delivered_to is not None
    assert explained.delivered_to.name == "demo/p0"
    assert explained.seen_source is not None
    assert explained.seen_source.ip == ip.text("10.244.1.1")
    there = devices(walk(story, "forward"))
    assert there[0] == "p0 eth0 out"
    assert there[-1] == "p0 eth0 in"
    assert [nat.translation for _, nat in story.nats("forward")] == ["dnat", "masquerade"]


@pytest.mark.parametrize(
    ("name", "disposition", "reason", "node"),
    [
        ("no-endpoints", "rejected", "no-endpoints", "n1"),
        ("nftables-no-endpoints", "rejected", "no-endpoints", "n1"),
        ("port-closed", "rejected", "port-closed", "n2"),
        ("rule-drop", "dropped", "dropped-by-rule", "n1"),
        ("fdb-missing", "dropped", "fdb-missing", "n1"),
    ],
)
def test_a_loss_has_its_place_and_reason(
    ip: Version, name: str, disposition: str, reason: str, node: str
) -> None:
    _, _, explained = ip.told(name)
    assert explained.disposition == disposition
    assert explained.delivered_to is None
    loss = explained.drop
    assert loss is not None
    assert (loss.direction, loss.reason, loss.node) == ("forward", reason, node)
    assert loss.explanation
    assert loss.fix
    assert loss.evidence


def test_in_nftables_mode_the_element_of_a_map_says_who_is_refused(ip: Version) -> None:
    _, story, explained = ip.told("nftables-no-endpoints")
    assert explained.drop is not None
    assert explained.drop.where == "chain service-endpoints-check of table kube-proxy on node n1"
    assert 'comment "demo/empty" : goto reject-chain' in explained.drop.evidence[0]
    met = [s for hop in walk(story, "forward") for s in hop.steps if isinstance(s, Rule)]
    assert [(rule.chain, rule.object) for rule in met[-2:]] == [
        ("service-endpoints-check", "svc/demo/empty"),
        ("reject-chain", "svc/demo/empty"),
    ]


def test_in_nftables_mode_a_statement_within_a_rule_translates(ip: Version) -> None:
    _, story, _ = ip.told("nftables-hairpin")
    assert [
        (nat.translation, (nat.rule or "").split()[-1]) for _, nat in story.nats("forward")
    ] == [
        ("dnat", ip.text("10.244.1.2:8002")),
        ("masquerade", "fully-random"),
    ]


def test_a_dropping_rule_is_quoted_with_the_way_to_remove_it(ip: Version) -> None:
    _, _, explained = ip.told("rule-drop")
    assert explained.drop is not None
    assert explained.drop.rule == ip.text("-A FORWARD -d 10.244.2.2/32 -j DROP")
    assert ip.text("-t filter -D FORWARD -d 10.244.2.2/32 -j DROP") in (explained.drop.fix or "")


def test_what_no_witness_explains_is_said_to_be_unknown(ip: Version) -> None:
    """The same loss without the rules witness."""
    from netlab.trace.case import Case
    from netlab.trace.correlate import Observed, correlate
    from netlab.trace.explain import explain
    from trace_records import Replayed

    record, _, _ = ip.told("rule-drop")
    tables = Replayed(record)
    observed = Observed(
        sent=record.sent,
        sightings=record.sightings,
        runs=[],
        entries=[],
        tables=tables,  # type: ignore[arg-type]
        texts=lambda run, match: pytest.fail("no rule was seen"),
    )
    story = correlate(observed)
    explained = explain(Case(record.lab, record.aim, record.answer, story, tables))  # type: ignore[arg-type]
    assert explained.disposition == "dropped"
    assert explained.drop is not None
    assert explained.drop.reason == "unknown"
    assert "not known" in explained.drop.explanation
