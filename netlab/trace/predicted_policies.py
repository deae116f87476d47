"""What NetworkPolicies make of a new connection on one node, by the API's semantics.

Written from the API reference of NetworkPolicy v1, without the code that renders rules.  A node
asks for the pods that run on it: where the packet comes from one, its egress, then, where it goes
to one, that one's ingress.  A pod always reaches itself.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from ipaddress import ip_address, ip_network

from netlab.topology.model import Lab, NetworkPolicy, Pod, PolicyRule, Ports

REASON = {"egress": "egress-policy", "ingress": "ingress-policy"}
"""Reasons of traces, by direction."""


class Policies:
    """The policies of a lab."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab

    @functools.cached_property
    def _pods(self) -> dict[str, Pod]:
        pods = (pod for pod in self._lab.pods if not pod.host_network)
        return {address: pod for pod in pods for address in pod.addresses}

    def refuses(
        self, node: str, protocol: str, source: str, destination: str, port: int | None
    ) -> str | None:
        """The reason for which a node lets a connection go no further; None if it lets it.

        `protocol` is "TCP", "UDP" or "ICMP"; the ends are those behind DNAT.
        """
        if not self._lab.policies or source == destination:
            return None
        client, server = self._pods.get(source), self._pods.get(destination)
        for direction, pod, peer in (("egress", client, destination), ("ingress", server, source)):
            if pod is None or pod.node != node:
                continue
            found = isolating(self._lab, pod, direction)
            rules = [rule for policy in found for rule in _rules(policy, direction)]
            if found and not any(
                self._is_peer(rule, peer) and _is_port(rule.ports, protocol, port, server)
                for rule in rules
            ):
                return REASON[direction]
        return None

    def _is_peer(self, rule: PolicyRule, address: str) -> bool:
        if rule.pods is None:
            return True
        pod = self._pods.get(address)
        if pod is not None and pod.key in rule.pods:
            return True
        number = ip_address(address)
        return any(number in ip_network(cidr) for cidr in rule.cidrs)


def isolating(lab: Lab, pod: Pod, direction: str) -> list[NetworkPolicy]:
    """The policies that select a pod for a direction."""
    return [
        policy
        for policy in lab.policies
        if pod.key in policy.selected and getattr(policy, direction) is not None
    ]


def _rules(policy: NetworkPolicy, direction: str) -> Sequence[PolicyRule]:
    return (policy.ingress if direction == "ingress" else policy.egress) or ()


def _is_port(ports: Sequence[Ports], protocol: str, port: int | None, server: Pod | None) -> bool:
    if not ports:
        return True
    named = {
        each.name
        for each in (server.ports if server else ())
        if (each.port, each.protocol) == (port, protocol)
    }
    return any(
        each.protocol == protocol
        and (
            each.name in named
            if each.name
            else not each.first or each.first <= (port or 0) <= each.last
        )
        for each in ports
    )
