"""NetworkPolicies of a node's pods as one nftables table, in the forward path.

A packet between pods, nodes and the world passes `forward` on the node of each pod that it comes
from or goes to, on a bridge too (bridge netfilter), and after DNAT: with a pod's own address and
port.  What a node sends to its own pods, or receives from them, does not pass there, and is always
allowed, as the API has it; so is what a pod sends to itself by way of a Service.

A pod that policies select for a direction has a chain, shared with all that the same ones select:
each rule of theirs returns what it allows, and the last one drops.  So being selected is what
isolates, and policies only ever add.  Established connections and what is related to them pass.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from ipaddress import collapse_addresses, ip_network
from typing import Literal

from netlab.datapath import podnet
from netlab.datapath.outside import COMMENT
from netlab.datapath.services.nftables_list import TableText
from netlab.datapath.state import Table
from netlab.topology.model import Lab, NetworkPolicy, Node, Pod, PolicyRule, Ports, Protocol

TABLE = "netlab-policy"
Direction = Literal["ingress", "egress"]

_FAMILIES = {4: "ip", 6: "ip6"}
_LONGEST_COMMENT = 120  # nft takes 128 bytes
_LONGEST_NAME = 200  # NFT_NAME_MAXLEN of linux/netfilter/nf_tables.h is 256
# Neighbour discovery of pods on one bridge: connection tracking leaves it out.
_DISCOVERY = (
    "icmpv6 type { nd-router-solicit, nd-router-advert, nd-neighbor-solicit, nd-neighbor-advert, "
    "nd-redirect } accept"
)


def enforcing(lab: Lab, node: Node) -> tuple[Table, ...]:
    """A node's table; none where no policy selects one of its pods."""
    if not lab.policies:
        return ()
    pods = [pod for pod in lab.pods if pod.node == node.name and not pod.host_network]
    return _Table(lab, pods).tables()


class _Table:
    def __init__(self, lab: Lab, pods: Sequence[Pod]) -> None:
        self._lab = lab
        self._own = pods
        self._pods = {pod.key: pod for pod in lab.pods if not pod.host_network}
        self._families = [podnet.family_of(cidr) for cidr in lab.pod_cidrs]
        self._text = TableText("inet", TABLE, COMMENT)

    def tables(self) -> tuple[Table, ...]:
        directions: tuple[Direction, ...] = ("egress", "ingress")
        groups = {each: list(self._groups(each)) for each in directions}
        if not any(groups.values()):
            return ()
        ways = [
            f"{_FAMILIES[family]} {_end(direction, peer=False)} vmap @{direction}-ipv{family}"
            for direction in directions
            if groups[direction]
            for family in self._families
        ]
        for family in self._families:
            address = f"ipv{family}_addr"
            self._text.set(f"itself-ipv{family}", f"{address} . {address}")
            for pod in self._own:
                for own in _of(family, pod.addresses):
                    self._text.element(f"itself-ipv{family}", f"{own} . {own}")
        itself = [
            f"{protocol} saddr . {protocol} daddr @itself-ipv{family} accept"
            for family in self._families
            for protocol in (_FAMILIES[family],)
        ]
        self._text.chain(
            "forward",
            "type filter hook forward priority filter + 10; policy accept;",
            "ct state established,related accept",
            *([_DISCOVERY] if 6 in self._families else []),
            *itself,
            *ways,
        )
        for direction in directions:
            for number, (policies, pods) in enumerate(groups[direction]):
                self._chain(direction, number, policies, pods)
        return (self._text.table(),)

    def _groups(
        self, direction: Direction
    ) -> Iterator[tuple[tuple[NetworkPolicy, ...], list[Pod]]]:
        """Pods of the node by the policies that select them."""
        found: dict[tuple[str, ...], tuple[tuple[NetworkPolicy, ...], list[Pod]]] = {}
        for pod in self._own:
            policies = selecting(self._lab, pod, direction)
            if policies:
                key = tuple(policy.key for policy in policies)
                found.setdefault(key, (policies, []))[1].append(pod)
        yield from found.values()

    def _chain(
        self,
        direction: Direction,
        number: int,
        policies: tuple[NetworkPolicy, ...],
        pods: Iterable[Pod],
    ) -> None:
        chain = f"{direction}/{number}"
        for family in self._families:
            name = f"{direction}-ipv{family}"
            self._text.set(name, f"ipv{family}_addr : verdict")
            for pod in pods:
                for own in _of(family, pod.addresses):
                    self._text.element(name, f"{own} : jump {chain}")
        rules = [rule for policy in policies for rule in self._allowed(policy, direction)]
        names = ", ".join(policy.key for policy in policies)
        self._text.chain(
            chain, *rules, f'drop comment "{_cut(f"{direction} not allowed by {names}")}"'
        )

    def _allowed(self, policy: NetworkPolicy, direction: Direction) -> Iterator[str]:
        for index, rule in enumerate(_rules(policy, direction)):
            name = _name(f"{direction}/{policy.key}/{index}")
            comment = f'return comment "{_cut(f"{policy.key} {direction} rule {index + 1}")}"'
            named = any(ports.name for ports in rule.ports)
            if rule.pods is None and not named:
                yield from (f"{ports}{comment}" for ports in _numbers(rule.ports))
                continue
            for family in self._families:
                peers = self._peers(rule, family, name, direction)
                if peers is not None:
                    for ports in (*_numbers(rule.ports), *self._named(rule.ports, family, name)):
                        yield f"{peers}{ports}{comment}"

    def _peers(self, rule: PolicyRule, family: int, name: str, direction: Direction) -> str | None:
        """The match of a rule's peers, "" for everybody; None if there is nobody."""
        if rule.pods is None:
            return ""
        pods = (self._pods[key] for key in rule.pods if key in self._pods)
        texts = [address for pod in pods for address in _of(family, pod.addresses)]
        texts += _of(family, rule.cidrs)
        if not texts:
            return None
        sets = f"peers/{name}/ipv{family}"
        self._text.set(sets, f"ipv{family}_addr", "flags interval")
        for network in collapse_addresses(map(ip_network, texts)):  # type: ignore[type-var]
            alone = network.prefixlen == network.max_prefixlen
            self._text.element(sets, str(network.network_address if alone else network))
        return f"{_FAMILIES[family]} {_end(direction, peer=True)} @{sets} "

    def _named(self, ports: Iterable[Ports], family: int, name: str) -> Iterator[str]:
        """Ports that each receiver calls by a name: its own number."""
        for protocol in dict.fromkeys(each.protocol for each in ports if each.name):
            wanted = {each.name for each in ports if each.name and each.protocol == protocol}
            ends = [
                f"{address} . {port.port}"
                for pod in self._pods.values()
                for port in pod.ports
                if port.name in wanted and port.protocol == protocol
                for address in _of(family, pod.addresses)
            ]
            if ends:
                lower = protocol.lower()
                sets = f"ports/{name}/{lower}-ipv{family}"
                self._text.set(sets, f"ipv{family}_addr . inet_service")
                for end in dict.fromkeys(ends):
                    self._text.element(sets, end)
                yield f"{_FAMILIES[family]} daddr . {lower} dport @{sets} "


def selecting(lab: Lab, pod: Pod, direction: Direction) -> tuple[NetworkPolicy, ...]:
    """The policies that isolate a pod in a direction."""
    return tuple(
        policy
        for policy in lab.policies
        if getattr(policy, direction) is not None and pod.key in policy.selected
    )


def _rules(policy: NetworkPolicy, direction: Direction) -> tuple[PolicyRule, ...]:
    return (policy.ingress if direction == "ingress" else policy.egress) or ()


def _numbers(ports: Sequence[Ports]) -> Iterator[str]:
    """Matches of ports that are numbers; "" where there are no ports at all."""
    if not ports:
        yield ""
    protocols: dict[Protocol, list[tuple[int, int]]] = {}
    for each in ports:
        if not each.name:
            protocols.setdefault(each.protocol, []).append((each.first, each.last))
    for protocol, ranges in protocols.items():
        if any(first == 0 for first, _ in ranges):
            yield f"meta l4proto {protocol.lower()} "
            continue
        texts = (str(a) if a == b else f"{a}-{b}" for a, b in _merged(ranges))
        yield f"{protocol.lower()} dport {{ {', '.join(texts)} }} "


def _merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges that do not touch: nft refuses a set whose intervals overlap."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = merged[-1][0], max(last, merged[-1][1])
        else:
            merged.append((first, last))
    return merged


def _end(direction: Direction, *, peer: bool) -> str:
    """Where a packet has the address of the pod, or of its peer."""
    return "saddr" if (direction == "ingress") == peer else "daddr"


def _of(family: int, texts: Iterable[str]) -> list[str]:
    return [text for text in texts if podnet.family_of(text) == family]


def _name(text: str) -> str:
    if len(text) <= _LONGEST_NAME:
        return text
    return f"{text[: _LONGEST_NAME - 17]}.{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_COMMENT else f"{text[: _LONGEST_COMMENT - 3]}..."
