"""What the rule that dropped a packet means: kube-proxy's refusals in its own words.

In iptables mode the comment of a rule says which Service is refused and why.  In nftables mode the
rule is the same for all Services, and the element of its verdict map says it; in flat maps that of
its set.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from netlab.topology.model import Service
from netlab.trace.balancer_refusals import of_balancer
from netlab.trace.case import Case, rules
from netlab.trace.family import IPV4, IPV6
from netlab.trace.model_steps import Rule, Socket
from netlab.trace.place import Place
from netlab.trace.policy_refusals import of_gateway, of_policy
from netlab.trace.steps import Chapter
from netlab.trace.witnesses.nftables_text import FLAT, KUBE_PROXY

# Of kube-proxy's chain cluster-ips-check.
_INVALID_PORT = "Reject traffic to invalid ports of ClusterIPs"
_UNALLOCATED = "Drop traffic to unallocated ClusterIPs"
# Of its chain KUBE-PROXY-FIREWALL.
_NOT_ACCEPTED = re.compile(r"(\S+) traffic not accepted by KUBE-FW-\w+")
_INVALID = re.compile(r"--ctstate INVALID\b|\bct state invalid\b")


class Doubt(NamedTuple):
    """What may have stopped a packet: a code, a sentence, what to do."""

    reason: str
    words: str
    fix: str | None


def said_by(rule: Rule, place: Place, case: Case) -> Doubt:
    """What a rule that dropped the packet says of it."""
    for known in (of_policy, of_gateway, of_balancer):
        if said := known(rule, place, case):
            return Doubt(*said)
    return (
        _of_service(rule, place)
        or _of_cluster_ips(rule, place, case)
        or _of_state(rule, place, case)
        or _of_any(rule, place)
    )


def missing_service(case: Case) -> Doubt:
    """What is known of the destination, an address of the Service CIDR that was not translated."""
    address = case.aim.destination
    at = Socket(ip=address, port=case.aim.port)
    for service in case.lab.services:
        if address in service.cluster_ips:
            known = ", ".join(f"{port.port}/{port.protocol}" for port in service.ports)
            if case.aim.protocol == "icmp":
                return Doubt(
                    "no-such-port",
                    f"a cluster IP does not answer ping: only the ports of svc/{service.key} are "
                    f"translated, {known}",
                    f"trace svc/{service.key}, or ping one of its pods: `netlab get endpoints`",
                )
            asked = case.aim.port, case.aim.protocol.upper()
            if asked in [(port.port, port.protocol) for port in service.ports]:
                return _not_translated(service, case)
            return Doubt(
                "no-such-port",
                f"no rule translates {at} over {case.aim.protocol}: svc/{service.key} has {known}",
                f"trace svc/{service.key}, or give the Service that port",
            )
    return Doubt(
        "no-such-service",
        f"no rule translates {at}: it is in the Service CIDR, but no Service has it",
        "`netlab get services` lists the Services and their cluster IPs",
    )


def _not_translated(service: Service, case: Case) -> Doubt:
    """The Service has the port, and the rules that the packet met left its destination alone."""
    chains = [
        rule.chain
        for _, rule in rules(case, "forward")
        if rule.hook in ("PREROUTING", "OUTPUT") and not rule.outer
    ]
    ways = [
        rule.verdict.partition(" ")[2]
        for _, rule in rules(case, "forward")
        if rule.hook in ("PREROUTING", "OUTPUT") and rule.verdict.startswith(("jump ", "goto "))
    ]
    met = " → ".join(dict.fromkeys([*chains, *ways]))
    node = case.aim.source.node
    through = f"it went through {met}, and no rule there translated it" if met else "none matched"
    if case.lab.service_proxy.mode == "none":
        fix = "the lab has no service proxy (mode none): give it one, or trace to a pod"
    else:
        fix = "`netlab up` completes the rules; `netlab status` shows what is missing"
    return Doubt(
        "not-translated",
        f"svc/{service.key} has port {case.aim.port}/{case.aim.protocol.upper()}, but the rules on "
        f"node {node} did not translate it: {through}",
        fix,
    )


def _of_service(rule: Rule, place: Place) -> Doubt | None:
    comment = rule.comment or ""
    served = rule.object or "the Service"
    refused = rule.element is not None and "@no-" in (rule.rule or "")
    rejected = rule.verdict != "drop" or rule.action == "reject"
    if "has no endpoints" in comment or (refused and rejected):
        return Doubt(
            "no-endpoints",
            f"{served} has no ready endpoint, so kube-proxy's rules on {place.name} refuse "
            "what is sent to it",
            f"let the selector of {served} match a ready pod: `netlab get endpoints`",
        )
    if "has no local endpoints" in comment or refused:
        return Doubt(
            "no-local-endpoints",
            f"the traffic policy of {served} is Local, and none of its ready endpoints is on "
            f"{place.name}",
            f"run an endpoint on {place.name}, or set the policy to Cluster",
        )
    outside = _NOT_ACCEPTED.fullmatch(comment)
    if outside:
        served = f"svc/{outside[1]}"
    if outside or (rule.chain.startswith("firewall-") and rule.table in (KUBE_PROXY, FLAT)):
        return Doubt(
            "dropped-by-rule",
            f"the loadBalancerSourceRanges of {served} do not contain the packet's source, so "
            f"kube-proxy's rules on {place.name} drop it",
            f"add the source to loadBalancerSourceRanges of {served}, or trace from within them",
        )
    return None


def _of_cluster_ips(rule: Rule, place: Place, case: Case) -> Doubt | None:
    if rule.comment not in (_INVALID_PORT, _UNALLOCATED):
        return None
    reason, words, fix = missing_service(case)
    done = "reject" if rule.comment == _INVALID_PORT else "drop"
    return Doubt(reason, f"{words}, so kube-proxy's rules on {place.name} {done} the packet", fix)


def _of_state(rule: Rule, place: Place, case: Case) -> Doubt | None:
    """A rule for what connection tracking takes for no part of a connection."""
    if not _INVALID.search(rule.rule or ""):
        return None
    words = (
        f"connection tracking of {place} does not know a connection that the packet could be of "
        f"(INVALID), and {rule.chain} drops that"
    )
    for leg in ("forward", "reply"):
        for chapter, untracked in rules(case, leg):
            if "notrack" in (untracked.rule or "").lower() and chapter and _is_at(chapter, place):
                return Doubt(
                    "conntrack-invalid",
                    f"{words}: it did not see the connection begin, for the rule "
                    f'"{untracked.rule}" kept that from it',
                    f"`ip netns exec {place.namespace} {_removal(untracked)}`",
                )
    return Doubt(
        "conntrack-invalid",
        words,
        f"let both directions of the connection pass {place}, tracked: is there another way, or a "
        f"rule with notrack? `ip netns exec {place.namespace} nft list ruleset`",
    )


def _is_at(chapter: Chapter, place: Place) -> bool:
    return any(run.place == place for run in chapter.runs)


def _accepting(rule: Rule) -> str:
    if (rule.rule or "").startswith("-P "):
        return f"{_iptables(rule)} -t {rule.table} -P {rule.chain} ACCEPT"
    return f"nft 'chain {rule.family} {rule.table} {rule.chain} {{ policy accept; }}'"


def _iptables(rule: Rule) -> str:
    tool = next(each.iptables for each in (IPV4, IPV6) if each.nft == rule.family)
    return f"{tool}-legacy" if rule.legacy else tool


def _of_any(rule: Rule, place: Place) -> Doubt:
    what = "rejected" if rule.action.lower() == "reject" else "dropped"
    stands = f"in chain {rule.chain} of table {rule.table} on {place}"
    if not rule.handle:
        return Doubt(
            f"{what}-by-rule",
            f"no rule {stands} accepted it, and the chain's policy is to drop",
            f"if that is not meant: `ip netns exec {place.namespace} {_accepting(rule)}`",
        )
    fix = f"if that is not meant: `ip netns exec {place.namespace} {_removal(rule)}`"
    return Doubt(f"{what}-by-rule", f"a rule {stands} {what} it", fix if rule.rule else None)


def _removal(rule: Rule) -> str:
    text = rule.rule or ""
    if text.startswith("-A "):
        return f"{_iptables(rule)} -t {rule.table} -D {text[3:]}"
    return f"nft delete rule {rule.family} {rule.table} {rule.chain} handle {rule.handle}"
