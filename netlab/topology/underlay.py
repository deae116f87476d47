"""The network that the nodes share, and their addresses in it.

For each family of the lab, IPv6 in parentheses:

* `spec.underlay.cidr`; else the smallest network of at least a /24 (/64) that holds all given
  node addresses; else 172.21.32.0/24 (fd00:172:21:32::/64).
* The gateway is `spec.underlay.gateway`, else the first free address; a node's address is the
  lowest free one.
"""

from __future__ import annotations

from collections.abc import Iterator

from netlab.topology import lab_document, model
from netlab.topology.addresses import (
    Address,
    Network,
    address,
    address_at,
    family,
    hosts,
    network_at,
    not_of_lab,
    smallest_network,
    split,
    width,
)
from netlab.topology.families import pod_addresses
from netlab.topology.model import Family
from netlab.topology.nodes import DraftNode
from netlab.topology.objects import Objects
from netlab.topology.places import Complaints, Path
from netlab.topology.usual import USUAL, Each, Given, and_more, spec_of, stated_cidrs


def stated_underlays(
    objects: Objects, families: tuple[Family, ...], nodes: list[DraftNode], found: Complaints
) -> Each:
    """The underlay of each family; one that was wrong is missing."""
    spec, title, origin = spec_of(objects)
    stated: Each = {}
    wrong: set[Family] = set()
    if spec.underlay and spec.underlay.cidr is not None:
        where = (title, origin, ("spec", "underlay", "cidr"))
        stated, right = stated_cidrs(spec.underlay.cidr, families, "the underlay", where, found)
        wrong = set() if right else set(families)
    return {
        each: stated.get(each) or _usual_underlay(each, nodes)
        for each in families
        if each in stated or each not in wrong
    }


def _usual_underlay(of: Family, nodes: list[DraftNode]) -> Given:
    usual = USUAL[of].underlay
    given = [node.addresses[of] for node in nodes if of in node.addresses]
    if not given:
        return Given(usual, f"the underlay {usual}")
    parts = [network_at(int(each), width(of), of) for each in given]
    cidr = smallest_network(parts, usual.prefixlen)
    while not all(int(each) in hosts(cidr) for each in given):
        cidr = cidr.supernet()
    return Given(cidr, f"the underlay {cidr} (it holds all node addresses)")


def allocate_underlay(
    objects: Objects,
    families: tuple[Family, ...],
    underlays: Each,
    nodes: list[DraftNode],
    found: Complaints,
) -> model.Underlay:
    """Decide the gateways and the addresses of nodes that have none."""
    spec, title, origin = spec_of(objects)
    stated = spec.underlay or lab_document.UnderlaySpec()
    path: Path = ("spec", "underlay", "gateway")
    gateways = split(stated.gateway, title, found, origin, path) if stated.gateway else {}
    for each, text in gateways.items():
        if each not in families:
            not_of_lab(text, families, title, found, origin, path)
    of_pods = set(pod_addresses(objects))
    made: list[tuple[str, str]] = []
    for each in families:
        cidr = underlays[each].network if each in underlays else USUAL[each].underlay
        owner = _check_node_addresses(each, underlays.get(each), nodes, found)
        gateway = None
        if each in gateways:
            gateway = address(gateways[each], title, found, origin, path)
            if gateway and gateway in owner:
                message = (
                    f"{title}: the gateway {gateway} is already the address of {owner[gateway]}"
                )
                found.error("duplicate-address", message, origin, *path)
            elif gateway and each in underlays and int(gateway) not in hosts(cidr):
                message = f"{title}: the gateway {gateway} is no host's in {underlays[each].title}"
                found.error("outside-cidr", message, origin, *path)
            if gateway:
                owner[gateway] = "the gateway"
        free = (
            host
            for number in hosts(cidr)
            if (host := address_at(number, each)) not in owner and str(host) not in of_pods
        )
        gateway = gateway or next(free, None)
        _allocate_node_addresses(cidr, free, nodes, found)
        if gateway is None:
            message = f"the underlay {cidr} has no address left for the gateway"
            found.error("exhausted-cidr", message, origin, hint="give the lab a wider one")
        made.append((str(cidr), str(gateway)))
    (cidr_text, gateway_text), *rest = made
    other_cidr, other_gateway = rest[0] if rest else ("", "")
    return model.Underlay(
        cidr=cidr_text,
        gateway=gateway_text,
        other_cidr=other_cidr,
        other_gateway=other_gateway,
        mtu=stated.mtu or 1500,
    )


def _check_node_addresses(
    of: Family, underlay: Given | None, nodes: list[DraftNode], found: Complaints
) -> dict[Address, str]:
    """Who has which of the given addresses."""
    owner: dict[Address, str] = {}
    for node in nodes:
        given = node.addresses.get(of)
        if given is None:
            continue
        where = (node.origin, "status", "addresses")
        if given in owner:
            message = f"{node.title}: {given} is already the address of {owner[given]}"
            found.error("duplicate-address", message, *where)
        elif underlay and int(given) not in hosts(underlay.network):
            message = f"{node.title}: its address {given} is no host's in {underlay.title}"
            found.error("outside-cidr", message, *where)
        owner[given] = node.title
    return owner


def _allocate_node_addresses(
    cidr: Network, free: Iterator[Address], nodes: list[DraftNode], found: Complaints
) -> None:
    of = family(cidr)
    waiting = [node for node in nodes if of not in node.addresses]
    for served, node in enumerate(waiting):
        chosen = next(free, None)
        if chosen is None:
            message = (
                f"the underlay {cidr} has no address left for {node.title}"
                f"{and_more(len(waiting) - served - 1)}"
            )
            hint = "give the lab a wider spec.underlay.cidr"
            found.error("exhausted-cidr", message, node.origin, hint=hint)
            break
        node.addresses[of] = chosen
