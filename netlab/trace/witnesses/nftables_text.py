"""Texts of nftables' own rules: chains with handles, elements of maps, and whom a chain serves.

In nftables mode a rule says little by itself: a map that all Services share decides, or a set, and
it is the element for the packet's destination that names the Service and the verdict.  So elements
are looked up one by one, for the packet that matched; a map of 10,000 Services is never listed.

Source: kube-proxy pkg/proxy/nftables/proxier.go; docs/services-nftables.md explains the names.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from netlab.datapath.services.names import served_by
from netlab.trace.witnesses.rules import Run

if TYPE_CHECKING:
    from nftables import Nftables

KUBE_PROXY, FLAT = "kube-proxy", "netlab"

_RULE = re.compile(r"^\s*(.*?)\s*# handle (\d+)$")
# Of sets only those that refuse have Services written on their elements.
_LOOKUP = re.compile(
    r"(ip6? daddr \. )?meta l4proto \. th dport (?:vmap @(\S+)|@(no-(?:local-)?endpoint-\S+))"
)
_ELEMENT = re.compile(r"elements = \{ (.*) \}\n")


class Lookup(NamedTuple):
    """What a rule asked a verdict map or a set for one packet."""

    map: str
    key: str


def lookup_of(rule: str, run: Run) -> Lookup | None:
    """The look-up that a rule makes for the packet of a run; None if it makes none."""
    found = _LOOKUP.search(rule)
    destination = run.flow.destination
    if found is None or destination.port is None:
        return None
    address = f"{destination.ip} . " if found.group(1) else ""
    return Lookup(found.group(2) or found.group(3), f"{address}{run.protocol} . {destination.port}")


def served_by_chain(chain: str) -> str | None:
    """`svc/NAMESPACE/NAME[:PORT]` if kube-proxy made the chain for one Service port, else None."""
    found = served_by(chain)
    return f"svc/{found[0]}" if found else None


class Listing:
    """What nft lists in the network namespace of the thread that makes this."""

    def __init__(self) -> None:
        import nftables

        self._nft: Nftables = nftables.Nftables()
        self._nft.set_handle_output(True)
        self._nft.set_stateless_output(True)

    def rules(self, family: str, table: str, chain: str) -> dict[int, str]:
        """Handle to text of a chain's rules; empty if it is gone."""
        _, listing, _ = self._nft.cmd(f"list chain {family} {table} {chain}")
        found = (_RULE.match(line) for line in listing.splitlines())
        return {int(rule.group(2)): rule.group(1) for rule in found if rule}

    def element(self, family: str, table: str, lookup: Lookup) -> str | None:
        """The element that a look-up found, as nft writes it; None if it is gone."""
        asked = f"get element {family} {table} {lookup.map} {{ {lookup.key} }}"
        _, listing, _ = self._nft.cmd(asked)
        found = _ELEMENT.search(listing)
        return found.group(1) if found else None
