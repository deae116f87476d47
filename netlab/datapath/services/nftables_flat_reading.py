"""Rules of nftables-flat mode as `nft list` prints them: whom they serve, and what they say."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fractions import Fraction

from netlab.datapath.services.nftables import settings_of
from netlab.datapath.services.nftables_flat import SITES
from netlab.datapath.services.nftables_flat_service import (
    Elements,
    Numbers,
    add_service,
    class_id,
    way_of,
)
from netlab.datapath.services.nftables_list import TableText, duration
from netlab.datapath.services.nftables_reading import (
    NftablesReading,
    address_of,
    destination,
    is_element,
    key_of,
)
from netlab.datapath.services.reading import Key, Line, Owner
from netlab.topology.model import Lab, Node

_SITES = {site.name for site in SITES}
# A set's or a chain's site, and what of it.
_OF_SITE = re.compile(r"((?:local-)?(?:service|nodeport))-(ways|chains|endpoints|affinity|\d.*)")


class FlatReading(NftablesReading):
    """See `Reading`."""

    table = "netlab"
    stages = tuple(
        stage._replace(chains=tuple(("netlab", name) for _, name in stage.chains))
        for stage in NftablesReading.stages
    )

    def __init__(self, lab: Lab, node: Node, *, whole: bool = True) -> None:
        super().__init__(lab, node, whole=whole)
        self._remembering: dict[tuple[str, str], Owner] = {}  # family and number of an endpoint
        self._ways: dict[tuple[str, str, str], set[Owner]] = {}  # family, map and number of a way
        for family, infos in self.known.infos.items():
            elements = Elements(TableText(family, self.table), Numbers())
            proxier = settings_of(lab, node, 4 if family == "ip" else 6)
            for info in infos:
                add_service(elements, proxier, info)
            for number, name in elements.numbers.names.items():
                port, _, endpoint = name.rsplit("/", 2)
                self._remembering[family, class_id(number)] = Owner(port, endpoint)
            if whole:
                continue  # so many endpoints as somebody has: a way is everybody's
            for site in SITES:
                for element in elements.table.elements[site.ways]:
                    key, _, way = element.partition(" : ")
                    owner = self.known.by_port[family][key]
                    self._ways.setdefault((family, site.chains, way), set()).add(owner)

    def owners_of_element(self, key: Key, element: str) -> tuple[Owner, ...]:
        """By the address and port that it begins with, or the number of an endpoint."""
        if key.name in ("cluster-ips", "hairpin-connections"):
            return super().owners_of_element(key, element)
        text = key_of(element)
        if key.name in ("affinity", "affinity-endpoints"):
            number = text.rpartition(" . ")[2]
            remembering = self._remembering.get((key.family, number))
            return (remembering,) if remembering else ()
        if key.name.endswith("-chains"):
            return tuple(sorted(self._ways.get((key.family, key.name, text), ())))
        parts = text.split(" . ")
        length = 2 if "nodeport" in key.name else 3
        owner = self.known.by_port[key.family].get(" . ".join(parts[:length]))
        if owner is None:
            return super().owners_of_element(key, element)
        if key.name.endswith("-endpoints") and " : " in element:
            endpoint = element.rpartition(" : ")[2].split(" . ")
            return (Owner(owner.port, address_of(*endpoint)),)
        if key.name.endswith("-affinity"):
            behind = self._remembering.get((key.family, element.rpartition(" : ")[2]))
            return (behind or owner,)
        return (owner,)

    def endpoints(self, key: Key, line: str) -> Iterable[str]:
        """Those of an element."""
        if key.kind == "chain" or not is_element(key, line):
            return ()
        if key.name.endswith("-endpoints") and " : " in line:
            return (address_of(*line.rpartition(" : ")[2].split(" . ")),)
        owners = (owner.endpoint for owner in self.owners_of_element(key, line))
        return [endpoint for endpoint in owners if endpoint]

    def sentence_of_services(self, rule: str) -> str:
        """What a rule of chain `services` does."""
        if "@masqueraded-services" in rule:
            return "to an external address under policy Cluster: marked for masquerade"
        if "@local-services" in rule:
            return "to an external address under policy Local: who sends it decides"
        if rule == "jump service":
            return "address, protocol and port are looked up"
        if rule.endswith("goto nodeports"):
            return "at an address of the node, protocol and port are looked up among the NodePorts"
        return super().sentence_of_services(rule)

    def sentence_of_frame(self, key: Key, rule: str) -> str:
        """What a rule does; all chains are shared here."""
        if key.name in _SITES or key.name in ("external-local", "nodeport-local"):
            return self._of_site(key, rule)
        if key.name == "nodeports":
            if "@masqueraded-nodeports" in rule:
                return "to a NodePort under policy Cluster: marked for masquerade"
            if "@local-nodeports" in rule:
                return "to a NodePort under policy Local: who sends it decides"
            return "protocol and port are looked up"
        if found := re.fullmatch(r"draw-(\d+)", key.name):
            if found[1] == "1":
                return "there is only one to choose"
            ways = Fraction(1, int(found[1]))
            return f"one of {found[1]} places is drawn, each with probability {ways}"
        if key.name.startswith("remember-"):
            lasts = key.name.removeprefix("remember-")
            if rule.startswith("update "):
                return f"the client is remembered for {lasts}"
            return "DNAT to the endpoint of that number"
        if _OF_SITE.fullmatch(key.name):
            if "numgen" in rule:
                return "none remembers the client: one of them is drawn, each as likely"
            place = re.search(r"priority set 0:([0-9a-f]+) ", rule)
            number = int(place[1], 16) if place else "?"
            return f"the endpoint in place {number} is chosen if it remembers the client"
        if key.name == "firewall-check":
            return "to a load balancer's address from a source in none of its ranges: dropped"
        if key.name.endswith("-endpoints-check"):
            return (
                "to what has no endpoints: refused"
                if rule.endswith("reject")
                else ("to what has no endpoint on this node (policy Local): dropped")
            )
        return super().sentence_of_frame(key, rule)

    def _of_site(self, key: Key, rule: str) -> str:
        if "vmap" in rule:
            return "how many endpoints there are says which chain draws one"
        if "dnat" in rule:
            return "DNAT to the endpoint in the place that was drawn"
        if "mark set" in rule:
            return "what the node itself sends is marked for masquerade"
        if "short-circuit" in rule:
            who = "the node itself" if "fib saddr" in rule else "a pod"
            return f"what {who} sends may go to any endpoint"
        return "everything else goes to an endpoint on this node"

    def sentence_of_element(self, key: Key, line: Line) -> str:
        """What an element says."""
        if line.learned or not is_element(key, line.text):
            return super().sentence_of_element(key, line)
        text = key_of(line.text)
        value = line.text.rpartition(" : ")[2]
        if key.name == "affinity-endpoints":
            endpoint = address_of(*value.split(" . "))
            return f"number {text} is {self.known.endpoint(endpoint)}"
        of_site = _OF_SITE.fullmatch(key.name)
        if of_site is None:
            return self._of_set(key, text) or super().sentence_of_element(key, line)
        if of_site[2] == "chains":
            endpoints, seconds = way_of(_number(text))
            remembered = f", remembered for {duration(seconds)}" if seconds else ""
            return f"one of {endpoints}{remembered}: on to {value.rpartition(' ')[2]}"
        if of_site[2] == "ways":
            return f"to {destination(text)}: {self._way(of_site[1], value)}"
        place = _number(text.rpartition(" . ")[2])
        if of_site[2] == "affinity":
            return f"place {place} is the endpoint of number {value}"
        return f"place {place} is {self.known.endpoint(address_of(*value.split(' . ')))}"

    def _way(self, site: str, value: str) -> str:
        endpoints, seconds = way_of(_number(value))
        here = " on this node" if site.startswith("local-") else ""
        remembered = f", and remembered for {duration(seconds)}" if seconds else ""
        if endpoints == 1:
            return f"its only endpoint{here} is chosen{remembered}"
        return (
            f"one of its {endpoints} endpoints{here} is chosen, each with probability "
            f"{Fraction(1, endpoints)}{remembered}"
        )

    def _of_set(self, key: Key, text: str) -> str:
        meanings = {
            "masqueraded-": "external, under policy Cluster",
            "local-": "external, under policy Local",
            "no-endpoint-": "refused, for it has no endpoints",
            "no-local-endpoint-": "dropped from outside, for no endpoint is on this node",
            "localhost-": "refused on loopback",
            "firewall-services": "its source must be in loadBalancerSourceRanges",
        }
        if key.name == "firewall-sources":
            allowed, _, source = text.rpartition(" . ")
            return f"to {destination(allowed)}: a source in {source} may use it"
        said = next((said for begins, said in meanings.items() if key.name.startswith(begins)), "")
        return f"to {destination(text)}: {said}" if said else ""


def _number(class_: str) -> int:
    """The number that nft prints as a `classid`."""
    high, _, low = class_.partition(":")
    return int(high or "0", 16) << 16 | int(low, 16)
