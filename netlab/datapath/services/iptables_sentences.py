"""What rules of iptables mode do, in sentences."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

from netlab.datapath.services.iptables_save import comment_of, target_of, tokens
from netlab.datapath.services.reading import Block, Known, Line, Owner


class Sentence:
    """What one rule does, in a sentence."""

    def __init__(self, known: Known, owners: Mapping[str, Owner], block: Block, line: Line) -> None:
        self._known, self._owners = known, owners
        self._block, self._line = block, line
        self._chain = block.key.name
        self._given = tokens(line.text)
        self._comment = comment_of(line.text)
        self._jump = target_of(line.text)

    def text(self) -> str:
        """The sentence."""
        sentences = {
            "KUBE-SERVICES": self._of_services,
            "KUBE-EXTERNAL-SERVICES": self._of_services,
            "KUBE-NODEPORTS": self._of_node_ports,
            "KUBE-PROXY-FIREWALL": self._of_proxy_firewall,
            "KUBE-FORWARD": self._of_forward,
            "KUBE-FIREWALL": lambda: "packets to loopback that came from outside are dropped",
            "KUBE-MARK-MASQ": lambda: (
                f"sets bit {self._mark('--set-xmark')} of the packet's mark: to be masqueraded"
            ),
            "KUBE-POSTROUTING": self._of_postrouting,
            "KUBE-SVC": self._of_choice,
            "KUBE-SVL": self._of_choice,
            "KUBE-EXT": self._of_external,
            "KUBE-FW": self._of_firewall,
            "KUBE-SEP": self._of_endpoint,
        }
        kind = self._chain
        if kind not in sentences:
            kind = kind.rpartition("-")[0]
        said = sentences.get(kind, self._of_hook)()
        return said or f"{self._who()}: {self._verdict()}"

    def _of_hook(self) -> str:
        what = {
            ("nat", "PREROUTING"): "a new connection from a pod or from outside is looked up",
            ("nat", "OUTPUT"): "a new connection of the node itself is looked up",
            ("nat", "POSTROUTING"): "what leaves may have to be masqueraded",
            ("filter", "INPUT"): "what is for the node itself",
            ("filter", "FORWARD"): "what is forwarded, after the translation",
            ("filter", "OUTPUT"): "what the node itself sends, after the translation",
        }.get((self._block.key.table, self._chain), "")
        return f"{what}: on to {self._jump}" if what else ""

    def _of_services(self) -> str:
        if self._jump == "KUBE-NODEPORTS":
            where = self._given.get("-d")
            to = _address(where) if where else "any address of the node"
            return f"what is for {to} may be for a NodePort"
        if self._jump in ("REJECT", "DROP"):
            return f"{self._destination()}: {self._refusal()}"
        kind = self._comment.partition(" ")[2]
        name = {
            "cluster IP": "the cluster IP",
            "external IP": "the external IP",
            "loadbalancer IP": "the load balancer's address",
        }.get(kind, "")
        return f"{' '.join(('to', name)).strip()} {self._address_and_port()}: {self._verdict()}"

    def _of_node_ports(self) -> str:
        port = self._given.get("--dport", "")
        if self._block.key.table == "filter":
            return f"to the health check port {port} of the node: let in"
        on = " on loopback (counted for kube-proxy's metrics)" if "-d" in self._given else ""
        protocol = self._given.get("-p", "").upper()
        return f"to the NodePort {port}/{protocol}{on}: {self._verdict()}"

    def _of_proxy_firewall(self) -> str:
        return (
            f"still for {self._address_and_port()}, so its source is in no range of "
            "loadBalancerSourceRanges: dropped"
        )

    def _of_forward(self) -> str:
        if "INVALID" in self._given.get("--ctstate", ""):
            return "dropped if connection tracking cannot place it; a client would reset"
        if "--mark" in self._given:
            return "let through if it is to be masqueraded, whatever a firewall behind this says"
        if "RELATED" in self._given.get("--ctstate", ""):
            return "let through if it belongs to a known connection"
        return ""

    def _of_postrouting(self) -> str:
        if self._jump == "RETURN":
            return f"nothing to do without bit {self._mark('--mark')} of the mark"
        if self._jump == "MARK":
            return "the bit is taken off: the outer packet of a tunnel would inherit it"
        if self._jump == "MASQUERADE":
            return "the node's own address becomes the source, so that the answer comes back here"
        return ""

    def _of_choice(self) -> str:
        if self._jump == "KUBE-MARK-MASQ":
            return f"{self._who()} is marked for masquerade"
        endpoint = self._endpoint_behind()
        if "--rcheck" in self._given:
            seconds = self._given.get("--seconds")
            return f"a client that was served within {seconds} s goes there again: {endpoint}"
        if not self._jump.startswith("KUBE-SEP-"):
            return ""
        place, share, ways = self._share()
        if ways == 1:
            return f"the only endpoint{self._here()}: {endpoint}"
        chance = (
            "from what is left"
            if "--probability" not in self._given
            else (f"with probability {_fraction(self._given['--probability'])}")
        )
        of_all = "" if place == 1 else f", {share} of all"
        return f"endpoint {place} of {ways}{self._here()} is chosen {chance}{of_all}: {endpoint}"

    def _of_external(self) -> str:
        if self._jump == "KUBE-MARK-MASQ":
            if "--src-type" in self._given:
                return "what the node itself sends is marked for masquerade"
            return f"{self._who()} is marked for masquerade: the answer must come back this way"
        if "--src-type" in self._given:
            return "what the node itself sends may go to any endpoint"
        if self._given.keys() & {"-s", "-i"}:
            return f"{self._who()}, a pod, may go to any endpoint"
        if self._jump.startswith("KUBE-SVL-"):
            return "everything else goes to an endpoint on this node (externalTrafficPolicy Local)"
        return f"then {self._verdict()}"

    def _of_firewall(self) -> str:
        if "-s" in self._given:
            return f"a source in {self._given['-s']} may use the load balancer: {self._verdict()}"
        if not self._jump:
            return "any other source stays untranslated, and KUBE-PROXY-FIREWALL drops it"
        return ""

    def _of_endpoint(self) -> str:
        if self._jump == "KUBE-MARK-MASQ":
            return "if the endpoint itself is the client (hairpin), marked for masquerade"
        if self._jump != "DNAT":
            return ""
        target = self._known.endpoint(self._given.get("--to-destination", ""))
        remembered = " and the client is remembered" if "--set" in self._given else ""
        return f"DNAT to {target}{remembered}"

    def _who(self) -> str:
        if "! -s" in self._given:
            return f"a packet from outside the pod CIDR {self._given['! -s']}"
        if "! -i" in self._given:
            return f"a packet that does not come in by {self._given['! -i']}"
        if "-s" in self._given:
            return f"a packet from {_address(self._given['-s'])}"
        if "-i" in self._given:
            return f"a packet that comes in by {self._given['-i']}"
        return "every packet"

    def _verdict(self) -> str:
        if self._jump.startswith("KUBE-SVC-"):
            return "one of its endpoints is chosen"
        if self._jump.startswith("KUBE-SVL-"):
            return "one of its endpoints on this node is chosen"
        if self._jump.startswith("KUBE-FW-"):
            return "its source must be in loadBalancerSourceRanges"
        if self._jump.startswith("KUBE-EXT-"):
            return "as the external traffic policy says"
        if self._jump in ("REJECT", "DROP"):
            return self._refusal()
        return f"on to {self._jump}" if self._jump.startswith("KUBE-") else self._jump

    def _refusal(self) -> str:
        if self._jump == "REJECT":
            return "refused with an ICMP port unreachable, for it has no endpoints"
        if "no local endpoints" in self._comment:
            return "dropped, for no endpoint is on this node (policy Local)"
        return "dropped"

    def _destination(self) -> str:
        if "--dst-type" in self._given:
            return f"to the NodePort {self._given.get('--dport')}/{self._given['-p'].upper()}"
        return f"to {self._address_and_port()}"

    def _address_and_port(self) -> str:
        address = _address(self._given.get("-d", ""))
        if ":" in address:
            address = f"[{address}]"
        port = f":{self._given['--dport']}" if "--dport" in self._given else ""
        return f"{address}{port}/{self._given.get('-p', '').upper()}"

    def _mark(self, option: str) -> str:
        return (self._given.get(f"! {option}") or self._given.get(option, "")).partition("/")[0]

    def _here(self) -> str:
        return " on this node" if self._chain.startswith("KUBE-SVL-") else ""

    def _endpoint_behind(self) -> str:
        owner = self._owners.get(self._jump)
        return self._known.endpoint(owner.endpoint) if owner and owner.endpoint else self._jump

    def _share(self) -> tuple[int, Fraction, int]:
        """Place of the rule among those that choose, its share of all, and how many there are.

        Of a rule that is there: among those that are there; of a missing one as it should be.
        """
        other = "extra" if self._line.state == "missing" else "missing"
        left = Fraction(1)
        place, share, ways = 0, Fraction(0), 0
        for line in self._block.lines:
            chooses = "-j KUBE-SEP-" in line.text and "--rcheck" not in line.text
            if line.state == other or not chooses:
                continue
            ways += 1
            given = tokens(line.text).get("--probability")
            taken = left * (_fraction(given) if given else 1)
            if line is self._line:
                place, share = ways, taken
            left -= taken
        return place, share.limit_denominator(100_000), ways


def _fraction(text: str) -> Fraction:
    return Fraction(text).limit_denominator(10_000)


def _address(network: str) -> str:
    return network.removesuffix("/32").removesuffix("/128")
