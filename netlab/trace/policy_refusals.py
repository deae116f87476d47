"""What a drop by a NetworkPolicy's rules, or by the internet gateway's, means."""

from __future__ import annotations

from netlab.datapath import network_policy, outside
from netlab.topology.model import NetworkPolicy, Pod
from netlab.trace.case import Case
from netlab.trace.declared_outside import UNINVITED, UNKNOWN_TO_GATEWAY
from netlab.trace.model_steps import Rule, Tuple
from netlab.trace.place import Place
from netlab.trace.predicted_policies import REASON, isolating


def of_policy(rule: Rule, place: Place, case: Case) -> tuple[str, str, str | None] | None:
    """Reason, explanation and fix of a drop by policies; None if it is no such drop."""
    found = _selected(rule, case)
    if found is None:
        return None
    direction, pod, policies, flow = found
    names = " and ".join(f"NetworkPolicy {policy.key}" for policy in policies)
    verb, they = ("selects", "has") if len(policies) == 1 else ("select", "have")
    port = f" port {flow.destination.port}" if flow.destination.port else ""
    if direction == "ingress":
        peer, rest = _whose(case, flow.source.ip), f"lets it in on {case.aim.protocol}{port}"
        whom, field = flow.source.ip, "ingress[].from"
    else:
        peer, rest = _whose(case, flow.destination.ip), f"lets it out to {case.aim.protocol}{port}"
        whom, field = flow.destination.ip, "egress[].to"
    words = (
        f"{names} {verb} pod {pod.key} for {direction}, and {they} no rule for {whom}{peer} that "
        f"{rest}, so {place} drops it"
    )
    first = policies[0]
    fix = (
        f"name {whom} in {field} and the port in ports of NetworkPolicy {first.key} "
        f"(`netlab describe networkpolicy/{first.key}`), or "
        f"`netlab delete networkpolicy/{first.key}`"
    )
    return REASON[direction], words, fix


def of_gateway(rule: Rule, place: Place, case: Case) -> tuple[str, str, str | None] | None:
    """The same of a drop by the gateway's table."""
    if rule.table != outside.TABLE:
        return None
    if rule.comment == outside.REFUSES_CALLERS:
        return (
            UNINVITED,
            f"{place} lets in answers only, and this is the first packet of a connection",
            "trace from a pod or a node to the host; from outside only Services are reached",
        )
    source = case.story.forward[-1].end.source.ip if case.story.forward else case.aim.source.name
    return (
        UNKNOWN_TO_GATEWAY,
        f"{place} knows the nodes' addresses alone, and {source}{_whose(case, source)} is none of "
        "them: no node put its own address in its place",
        "let the nodes masquerade what leaves the cluster: overlay.masquerade: outside in kind Lab",
    )


def policy_object(rule: Rule, case: Case) -> str | None:
    """The policies that dropped it, as `NetworkPolicy demo/db`."""
    found = _selected(rule, case)
    return ", ".join(f"NetworkPolicy {policy.key}" for policy in found[2]) if found else None


def _selected(rule: Rule, case: Case) -> tuple[str, Pod, list[NetworkPolicy], Tuple] | None:
    """The direction, the pod that is isolated, by whom, and the packet's ends."""
    direction = rule.chain.partition("/")[0]
    if rule.table != network_policy.TABLE or direction not in REASON:
        return None
    # Where it was dropped behind DNAT, no device saw what it had become: its rules did.
    runs = [run for chapter in case.story.forward for run in chapter.runs]
    flow = next((run.flow for run in reversed(runs) if run.table == rule.table), None)
    if flow is None:
        return None
    address = flow.destination.ip if direction == "ingress" else flow.source.ip
    for pod in case.lab.pods:
        if address in pod.addresses and not pod.host_network:
            policies = isolating(case.lab, pod, direction)
            return (direction, pod, policies, flow) if policies else None
    return None


def _whose(case: Case, address: str) -> str:
    for kind, owners in (
        ("pod", case.lab.pods),
        ("node", case.lab.nodes),
        ("host", case.lab.hosts),
    ):
        for owner in owners:
            if address in owner.addresses:
                return f" ({kind} {getattr(owner, 'key', owner.name)})"
    return ""
