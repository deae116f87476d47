"""What `netlab describe networkpolicy/NAME` tells, as data and as lines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from netlab.problems import NetlabError, Problem, suggest
from netlab.report.describe import SCHEMA, Facts
from netlab.topology import status
from netlab.topology.model import Lab, NetworkPolicy, PolicyRule, Ports

KINDS = ("networkpolicy", "networkpolicies", "netpol")
_MANY = 8


def named(lab: Lab, text: str, namespace: str | None) -> NetworkPolicy | None:
    """The policy that `networkpolicy/[NAMESPACE/]NAME` means; None if it is no such text.

    NetlabError (exit code 2) if there is none, or more than one.
    """
    kind, _, rest = text.partition("/")
    if kind.lower() not in KINDS or not rest:
        return None
    inside, slash, name = rest.rpartition("/")
    wanted = inside if slash else namespace
    hits = [each for each in lab.policies if each.name == name and wanted in (None, each.namespace)]
    if len(hits) == 1:
        return hits[0]
    known = [each.key for each in lab.policies]
    if hits:
        shown = ", ".join(f"networkpolicy/{each.key}" for each in hits)
        message = f'"{text}" is more than one thing in lab {lab.name}: {shown}'
        raise NetlabError(Problem("ambiguous-name", message, hint="write one of them out"))
    near = suggest(rest, [*known, *(each.name for each in lab.policies)])
    hint = f'did you mean "{near}"?' if near else f"there is {', '.join(known) or 'none'}"
    message = f'networkpolicy "{rest}" is not in lab {lab.name}'
    raise NetlabError(Problem("unknown-networkpolicy", message, hint=hint))


def policy(lab: Lab, described: NetworkPolicy) -> Facts:
    """A policy: whom it selects, and whom it lets through on which ports."""
    item = next(
        each
        for each in status.network_policies(lab)
        if (each["metadata"]["namespace"], each["metadata"]["name"])
        == (described.namespace, described.name)
    )
    return {
        "schema": SCHEMA,
        "kind": "NetworkPolicy",
        "object": item,
        "selects": list(described.selected),
        **{
            name: None if rules is None else [_rule(rule) for rule in rules]
            for name, rules in (("ingress", described.ingress), ("egress", described.egress))
        },
    }


def _rule(rule: PolicyRule) -> dict[str, Any]:
    return {
        "everybody": rule.pods is None,
        "pods": list(rule.pods or ()),
        "cidrs": list(rule.cidrs),
        "ports": [_port(each) for each in rule.ports],
    }


def _port(ports: Ports) -> str:
    if ports.name:
        return f"{ports.name}/{ports.protocol}"
    if not ports.first:
        return f"every/{ports.protocol}"
    last = f"-{ports.last}" if ports.last != ports.first else ""
    return f"{ports.first}{last}/{ports.protocol}"


def lines(facts: Mapping[str, Any]) -> Iterator[str]:
    """The same for people."""
    metadata = facts["object"]["metadata"]
    yield f"{'Name:':<28}{metadata['name']}"
    yield f"{'Namespace:':<28}{metadata['namespace']}"
    yield f"{'Selects:':<28}{_some(facts['selects']) or 'no pod'}"
    for name, words in (("ingress", "from"), ("egress", "to")):
        rules = facts[name]
        if rules is None:
            yield f"{f'{name.title()}:':<28}it says nothing of that"
            continue
        yield f"{f'{name.title()}:':<28}{'' if rules else 'nothing is allowed'}".rstrip()
        for rule in rules:
            peers = (
                "everybody"
                if rule["everybody"]
                else _some([*rule["pods"], *rule["cidrs"]]) or "nobody: no such pod"
            )
            yield f"  {words} {peers}: {', '.join(rule['ports']) or 'every port'}"


def _some(texts: Iterable[str]) -> str:
    shown = list(texts)
    more = f" and {len(shown) - _MANY} more" if len(shown) > _MANY else ""
    return f"{', '.join(shown[:_MANY])}{more}"
