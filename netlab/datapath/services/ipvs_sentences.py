"""What rules, entries of sets and virtual servers of ipvs mode do, in sentences."""

from __future__ import annotations

import re

from netlab.datapath.services import ipvs_sets as sets
from netlab.datapath.services.iptables_save import target_of, tokens
from netlab.datapath.services.reading import Block, Known, Line

_SET = re.compile(r"--match-set (\S+) (\S+)")
_OPTION = re.compile(r" -(s|p|r|w|b) (\S+)")

_SCHEDULERS = {
    "rr": "each in turn",
    "wrr": "each in turn, by weight",
    "lc": "the one with the fewest connections",
    "wlc": "the one with the fewest connections for its weight",
    "sh": "chosen by the client's address",
    "dh": "chosen by the destination's address",
    "mh": "chosen by the client's address and port (Maglev)",
    "sed": "the one with the shortest expected delay",
    "nq": "one that is idle, else the one with the shortest expected delay",
}

_ROLES = {
    sets.CLUSTER_IP: "a cluster IP and its port",
    sets.EXTERNAL_IP: "an external IP and its port",
    sets.EXTERNAL_IP_LOCAL: "an external IP of a Service under externalTrafficPolicy Local",
    sets.HEALTH_CHECK: "a health check port",
    sets.IPVS_IPS: "an address of kube-ipvs0, at whatever port",
    sets.LOAD_BALANCER: "a load balancer's address and port",
    sets.FIREWALL: "a load balancer with loadBalancerSourceRanges",
    sets.LOAD_BALANCER_LOCAL: "a load balancer under externalTrafficPolicy Local",
    sets.SOURCE_CIDR: "a load balancer that its source may use",
    sets.SOURCE_IP: "a load balancer that the node may use from that very address",
    sets.LOOP_BACK: "an endpoint of this node, and from itself",
}


def matched_sets(rule: str) -> list[str]:
    """Names of the sets that a rule asks."""
    return [found[1] for found in _SET.finditer(rule)]


class Sentence:
    """What one line does, in a sentence."""

    def __init__(self, known: Known, block: Block, line: Line) -> None:
        self._known, self._key, self._text = known, block.key, line.text
        self._jump = target_of(line.text)
        named = (sets.NAMES.get(name) for name in matched_sets(line.text))
        self._asked = [found[0] for found in named if found]

    def text(self) -> str:
        """The sentence."""
        if self._key.table == "ipset":
            return self._entry()
        if self._key.table == "ipvs":
            return self._server()
        return self._by_chain() or f"{self._who()}: {self._verdict()}"

    def _entry(self) -> str:
        role, _ = sets.NAMES[self._key.name]
        if role.startswith("NODE-PORT"):
            local = " of a Service under externalTrafficPolicy Local" * ("-LOCAL-" in role)
            return f"NodePort {self._text}{local}"
        if role == sets.LOOP_BACK:
            address, port, _ = self._text.split(",")
            number = port.rpartition(":")[2]
            shown = f"[{address}]:{number}" if ":" in address else f"{address}:{number}"
            return f"an endpoint that may reach itself: {self._known.endpoint(shown)}"
        if role == sets.SOURCE_CIDR:
            return f"{self._text.rpartition(',')[2]} may use the load balancer"
        return _ROLES[role]

    def _server(self) -> str:
        given = dict(_OPTION.findall(self._text))
        if "r" in given:
            what = "no new connection goes to" if given["w"] == "0" else "a real server:"
            return f"{what} {self._known.endpoint(given['r'])}"
        chosen = _SCHEDULERS.get(given["s"], f"chosen by the scheduler {given['s']}")
        kept = f"; a client stays for {given['p']} s where it was sent" if "p" in given else ""
        return f"a virtual server; of its real servers {chosen}{kept}"

    def _by_chain(self) -> str:
        chain, jump = self._key.name, self._jump
        if not chain.startswith("KUBE-"):
            return self._of_hook()
        if chain == "KUBE-IPVS-OUT-FILTER":
            return "from the load balancer's own address, so from this node: in no source range"
        if chain == "KUBE-MARK-MASQ":
            return "sets the bit of the packet's mark: to be masqueraded"
        if chain == "KUBE-SOURCE-RANGES-FIREWALL" and not self._asked:
            return "its source is in no range of loadBalancerSourceRanges: dropped"
        if chain == "KUBE-LOAD-BALANCER" and not self._asked:
            return "every other load balancer: on to KUBE-MARK-MASQ"
        if chain == "KUBE-POSTROUTING" and not self._asked:
            return {
                "RETURN": "nothing to do without the bit of the mark",
                "MARK": "the bit is taken off: the outer packet of a tunnel would inherit it",
                "MASQUERADE": "the node's own address becomes the source, so that the answer "
                "comes back here",
            }.get(jump, "")
        if chain == "KUBE-FORWARD":
            if "--mark" in self._text:
                return "let through if it is to be masqueraded, whatever a firewall behind says"
            return "let through if it belongs to a known connection"
        if chain == "KUBE-IPVS-FILTER" and jump == "REJECT":
            return f"{self._who()} that no virtual server has: refused"
        return ""

    def _of_hook(self) -> str:
        what = {
            ("nat", "PREROUTING"): "a new connection from a pod or from outside is looked up",
            ("nat", "OUTPUT"): "a new connection of the node itself is looked up",
            ("nat", "POSTROUTING"): "what leaves may have to be masqueraded",
            ("filter", "INPUT"): "what is for an address of the node, as all virtual servers are",
            ("filter", "FORWARD"): "what is forwarded, answers to clients for one",
            ("filter", "OUTPUT"): "what the node sends, or IPVS for it, to a real server",
        }.get((self._key.table, self._key.name), "")
        return f"{what}: on to {self._jump}" if what else ""

    def _who(self) -> str:
        given = tokens(self._text)
        parts = []
        for role in self._asked:
            protocol = given.get("-p", "").upper()
            local = " under externalTrafficPolicy Local" * ("-LOCAL-" in role)
            parts.append(_ROLES.get(role, f"a NodePort of {protocol}{local}"))
        who = f"to {' and '.join(parts)}" if parts else "every packet"
        if not parts and given.get("--dst-type") == "LOCAL":
            who = "to any other address of the node"
        elif "src,dst" in self._text:
            who = f"from {who.removeprefix('to ')}"
        if outside := given.get("! -s"):
            who += f", from outside {outside}"
        elif outside := given.get("! -i"):
            who += f", not from {outside}"
        elif source := given.get("-s"):
            who = f"from {source}"
        if "! --physdev-is-in" in self._text:
            who += ", from neither a bridge port nor this node"
        elif self._asked and given.get("--dst-type") == "LOCAL":
            who += ", which is the node's"
        return who

    def _verdict(self) -> str:
        return {
            "ACCEPT": "nothing more to ask here",
            "RETURN": "nothing to do here",
            "DROP": "dropped",
            "MASQUERADE": "the node's own address becomes the source, or it would answer itself",
        }.get(self._jump, f"on to {self._jump}")
