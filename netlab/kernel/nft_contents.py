"""What nf_tables holds in a namespace, counted: rules by chain, sets, elements.

Read by netlink, without texts: rules of iptables-nft are there too, those of iptables-legacy not.
Source: linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import msgspec

from netlab.kernel.namespaces import entered
from netlab.kernel.netlink import Socket, attribute_list, attributes, text
from netlab.kernel.nfnetlink import SUBSYSTEM_NFTABLES, request_body

_NETLINK_NETFILTER = 12
_GET_CHAIN, _GET_RULE, _GET_SET, _GET_ELEMENTS = (
    SUBSYSTEM_NFTABLES << 8 | number for number in (4, 7, 10, 13)
)
_CHAIN_TABLE, _CHAIN_NAME, _CHAIN_HOOK = 1, 3, 4
_HOOK_NUMBER, _HOOK_PRIORITY = 1, 2
_FAMILIES = {1: "inet", 2: "ip", 5: "netdev", 7: "bridge", 10: "ip6"}
_PREROUTING, _INGRESS = 0, 5  # of inet; netdev has ingress as its first
# NF_IP_PRI_CONNTRACK_DEFRAG; on a bridge NF_BR_PRI_BRNF, where br_netfilter calls it.
_REASSEMBLY = {"ip": -400, "ip6": -400, "inet": -400, "bridge": 0}
_RULE_TABLE, _RULE_CHAIN, _RULE_HANDLE = 1, 2, 3
_SET_TABLE, _SET_NAME, _SET_FLAGS = 1, 2, 3
_LIST_TABLE, _LIST_SET, _LIST_ELEMENTS = 1, 2, 3
_ELEMENT_FLAGS = 3
_ANONYMOUS = 1
_INTERVAL_END = 1  # what stands behind an interval of a set, and is no element to anybody
_OF_GENMSG = 4

Chain = tuple[int, str, str]
"""Family (NFPROTO_*), table, chain."""


class Contents(msgspec.Struct, frozen=True):
    """Handles of rules by chain, in order; how many sets and maps have names; all elements.

    Elements of sets without a name, which belong to one rule, are among them.
    """

    chains: dict[Chain, list[int]]
    sets: int
    elements: int


def contents(namespace: str | int, family: int) -> Contents:
    """What is there of a family (NFPROTO_*).  Raises NetlinkError."""
    body = request_body(b"", family)
    with entered(namespace), Socket(_NETLINK_NETFILTER) as netlink:
        chains: dict[Chain, list[int]] = {}
        for payload in netlink.dump(_GET_CHAIN, body):
            found = attributes(payload, _OF_GENMSG)
            chains[family, _word(found[_CHAIN_TABLE]), _word(found[_CHAIN_NAME])] = []
        for payload in netlink.dump(_GET_RULE, body):
            found = attributes(payload, _OF_GENMSG)
            chain = family, _word(found[_RULE_TABLE]), _word(found[_RULE_CHAIN])
            chains.setdefault(chain, []).append(int.from_bytes(found[_RULE_HANDLE], "big"))
        named = elements = 0
        for payload in netlink.dump(_GET_SET, body):
            found = attributes(payload, _OF_GENMSG)
            flags = int.from_bytes(found.get(_SET_FLAGS, b""), "big")
            named += not flags & _ANONYMOUS
            elements += _elements(
                netlink, family, _word(found[_SET_TABLE]), _word(found[_SET_NAME])
            )
    return Contents(chains, named, elements)


def before_reassembly(namespace: str | int) -> list[str]:
    """Base chains that see the fragments of a packet, "ip TABLE CHAIN".  Raises NetlinkError.

    Connection tracking puts them together at the prerouting hook; behind that nobody sees any.
    """
    found = []
    with entered(namespace), Socket(_NETLINK_NETFILTER) as netlink:
        for payload in netlink.dump(_GET_CHAIN, request_body(b"", 0)):
            family = _FAMILIES.get(payload[0], "")
            chain = attributes(payload, _OF_GENMSG)
            hook = attributes(chain.get(_CHAIN_HOOK, b""))
            if _HOOK_NUMBER not in hook or not family:
                continue
            number = int.from_bytes(hook[_HOOK_NUMBER], "big")
            priority = int.from_bytes(hook[_HOOK_PRIORITY], "big", signed=True)
            on_link = family == "netdev" or (family == "inet" and number == _INGRESS)
            if on_link or (number == _PREROUTING and priority < _REASSEMBLY[family]):
                found.append(f"{family} {_word(chain[_CHAIN_TABLE])} {_word(chain[_CHAIN_NAME])}")
    return found


def _elements(netlink: Socket, family: int, table: str, name: str) -> int:
    body = request_body(text(_LIST_TABLE, table) + text(_LIST_SET, name), family)
    count = 0
    for payload in netlink.dump(_GET_ELEMENTS, body):
        inside = attributes(payload, _OF_GENMSG).get(_LIST_ELEMENTS, b"")
        for _, element in attribute_list(inside):
            flags = int.from_bytes(attributes(element).get(_ELEMENT_FLAGS, b""), "big")
            count += not flags & _INTERVAL_END
    return count


def _word(value: bytes) -> str:
    return value.rstrip(b"\0").decode(errors="replace")
