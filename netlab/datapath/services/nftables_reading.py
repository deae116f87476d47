"""Rules of nftables mode as `nft list` prints them: whom they serve, and what they say."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction

from netlab.datapath.services.claims import settled_ports
from netlab.datapath.services.names import address_port, nftables_name, served_by
from netlab.datapath.services.nftables_list import is_dynamic, parse
from netlab.datapath.services.nftables_spelling import HEXADECIMAL, spelled
from netlab.datapath.services.reading import Block, Blocks, Key, Known, Line, Owner, Stage
from netlab.datapath.state import Rules, Tables
from netlab.topology.model import Lab, Node

_HEADER = re.compile(r"(type|typeof|comment|flags|size|timeout|gc-interval|policy|auto-merge)\b")
_REFERENCE = re.compile(r"\b(?:jump|goto) ([^\s,;}]+)|@([^\s,;}]+)")
_COMMENT = re.compile(r' comment "([^"]*)"')
_TARGET = re.compile(r"\d+ : ([^\s,}]+) \. (\d+)")
_DNAT = re.compile(r"dnat (?:ip6? )?to (\[[^\]]+\]:\d+|[\d.]+:\d+)")
_CHOSEN = re.compile(r"(\d+) : goto (endpoint-[^\s,}]+)")

_ANNOTATION = re.compile(r"[ \t]+# (?:handle|count) \d+.*$", re.M)


class NftablesReading:
    """See `Reading`."""

    table = "kube-proxy"
    stages: Sequence[Stage] = (
        Stage(
            "who may, before the translation",
            (
                ("kube-proxy", "filter-prerouting-pre-dnat"),
                ("kube-proxy", "filter-output-pre-dnat"),
            ),
        ),
        Stage(
            "where it goes",
            (("kube-proxy", "nat-prerouting"), ("kube-proxy", "nat-output")),
            translates=True,
        ),
        Stage(
            "what is let through",
            tuple(("kube-proxy", f"filter-{hook}") for hook in ("input", "forward", "output")),
        ),
        Stage(
            "what its source becomes", (("kube-proxy", "nat-postrouting"),), needs_translation=True
        ),
    )

    def __init__(self, lab: Lab, node: Node, *, whole: bool = True) -> None:
        self.known = Known(lab, node, settled_ports)
        self._whole = whole
        self._names: dict[str, Owner] = {}
        for infos in self.known.infos.values():
            for info in infos:
                self._names[nftables_name(info.name, info.protocol)] = Owner(info.name)
                for endpoint in info.reachable if info.affinity_s else ():
                    text = address_port(endpoint)
                    name = nftables_name(info.name, info.protocol, text)
                    self._names[name] = Owner(info.name, text)

    @classmethod
    def recognise(cls, text: str) -> Mapping[str, str] | None:
        """What `nft list ruleset` or `nft list table` have printed."""
        if not re.search(rf"^table ip6? {cls.table} \{{", text, re.M):
            return None
        text = _ANNOTATION.sub("", text)
        return {"ip": text, "ip6": text}

    def blocks(self, printed: Mapping[str, str]) -> Blocks:
        """Chains, sets and maps of the mode's tables."""
        found = {}
        for text in dict.fromkeys(printed.values()):
            for table, objects in parse(text, remembered=True).items():
                family, _, name = table.partition(" ")
                if name != self.table:
                    continue
                for label, lines in objects.items():
                    kind, _, of_block = label.partition(" ")
                    key = Key(family, name, kind or "table", of_block)
                    learned = is_dynamic(lines)
                    found[key] = Block(
                        key,
                        [Line(line, learned=learned and is_element(key, line)) for line in lines],
                        learns=learned,
                    )
        for key, block in found.items():
            self._learn(key, block)
        return found

    def _learn(self, key: Key, block: Block) -> None:
        """Whose addresses and endpoints are those that no Service of the lab has."""
        kind, _, name = key.name.partition("-")
        if key.name in ("service-ips", "no-endpoint-services"):
            known = self.known.by_address[key.family]
            for line in block.lines:
                for owner in self.owners(key, line.text):
                    known.setdefault(line.text.partition(" . ")[0], [Owner(owner.service)])
        elif kind in ("service", "local", "endpoint") and (served := self.by_name(key.name)):
            protocol = name.rsplit("__", 1)[0].split("/")[-2]
            for line in block.lines:
                for endpoint in self.endpoints(key, line.text):
                    known = self.known.by_endpoint[key.family]
                    known.setdefault(f"{endpoint}/{protocol}", [Owner(served.port, endpoint)])

    def rendered(self, rules: Rules) -> Mapping[str, str]:
        """What `nft list` prints of them."""
        assert isinstance(rules, Tables)
        return {table.family: table.text for table in rules.tables}

    def comparable(self, key: Key, line: str) -> object:
        """In one spelling; comments stay as they are."""
        text, comment, rest = line.partition(' comment "')
        if line.startswith("comment "):
            return line
        if comment and " : " in rest:  # an element's verdict comes behind its comment
            said, quote, verdict = rest.rpartition('"')
            return f"{spelled(text)}{comment}{said}{quote}{spelled(verdict)}"
        return f"{spelled(text)}{comment}{rest}"

    def is_shared(self, key: Key) -> bool:
        """No chain is."""
        return False

    def is_ignored(self, key: Key, line: str | None) -> bool:
        """The tables are wholly the proxy's."""
        return False

    def owners(self, key: Key, line: str) -> tuple[Owner, ...]:
        """By the names of chains and sets, else by an element's address and port."""
        if key.kind == "chain":
            owner = self.by_name(key.name)
            if owner is None:
                return ()
            behind = [o for name in references(line) if (o := self.by_name(name)) and o.endpoint]
            return (behind[0] if len(behind) == 1 else owner,)
        if not line or not is_element(key, line):
            owner = self.by_name(key.name)
            return (owner,) if owner else ()
        return self.owners_of_element(key, line)

    def owners_of_element(self, key: Key, element: str) -> tuple[Owner, ...]:
        """Whom an element of a set or map serves."""
        for name in references(element):
            if owner := self.by_name(name):
                return (owner,)
        if owner := self.by_name(key.name):
            return (owner,)
        text = key_of(element)
        if key.name == "cluster-ips":
            return tuple(self.known.by_address[key.family].get(text, ()))
        if key.name == "hairpin-connections":
            # on another node's listing it is told whose it is; here it may be a Service's that is
            # not looked at, which has the same endpoint
            known = self.known.by_endpoint if self._whole else self.known.by_local_endpoint
            return tuple(known[key.family].get(hairpin(text), ()))
        owner = self.known.by_port[key.family].get(text)
        if owner is None and (named := _COMMENT.search(element)) and "/" in named[1]:
            owner = Owner(named[1])
        return (owner,) if owner else ()

    def by_name(self, name: str) -> Owner | None:
        """Whom a chain or set with that name serves."""
        if "/" not in name:
            return None
        known = self._names.get(name.partition("-")[2])
        if known:
            return known
        found = served_by(name)
        return Owner(*found) if found else None

    def endpoints(self, key: Key, line: str) -> Iterable[str]:
        """Those that it translates to, or goes on to."""
        if key.name == "hairpin-connections":
            is_one = line and is_element(key, line)
            return {hairpin(key_of(line)).partition("/")[0]} if is_one else ()
        found = {address_of(ip, port) for ip, port in _TARGET.findall(line)}
        found |= set(_DNAT.findall(line))
        owners = [self.by_name(name) for name in (*references(line), key.name)]
        return found | {owner.endpoint for owner in owners if owner and owner.endpoint}

    def slot(self, key: Key, line: str) -> str | None:
        """The key of an element, the name of a property."""
        if key.kind == "chain":
            return None
        return key_of(line) if is_element(key, line) else line.partition(" ")[0]

    def targets(self, key: Key, line: str) -> Iterable[Key]:
        """Sets and maps that it asks, and the chains that it or their elements lead to."""
        if line.startswith("update @"):
            return
        for reference in _REFERENCE.finditer(_COMMENT.sub("", line)):
            chain, name = reference.groups()
            if chain:
                yield key._replace(kind="chain", name=chain)
            elif key.name != name:
                yield key._replace(kind="map", name=name)
                yield key._replace(kind="set", name=name)

    def is_told(self, key: Key, line: str) -> bool:
        """Of a set's properties for how long it remembers."""
        if key.kind == "chain":
            return not line.startswith(("type ", "comment "))
        return is_element(key, line) or line.startswith("timeout")

    def is_met(self, key: Key, line: str) -> bool:
        """Not the refusal of addresses that no Service has."""
        if key.kind != "chain":
            return key.name == "nodeport-ips" and is_element(key, line)
        return not (key.name == "cluster-ips-check" and "@" not in line)

    def sentence(self, block: Block, line: Line) -> str:
        """What a rule or an element does."""
        if block.key.kind != "chain":
            return self.sentence_of_element(block.key, line)
        said = self.sentence_of_frame(block.key, line.text)
        return said or self.sentence_of_service(block.key, line.text)

    def sentence_of_frame(self, key: Key, rule: str) -> str:
        """What a rule of the chains that all Services share does; "" if it is no such."""
        hooks = {
            "filter-prerouting-pre-dnat": "a new connection from a pod or from outside",
            "filter-output-pre-dnat": "a new connection of the node itself",
            "filter-input": "a new connection to the node itself",
            "filter-forward": "a new connection for somebody else, after the translation",
            "filter-output": "a new connection of the node itself, after the translation",
            "nat-prerouting": "a new connection from a pod or from outside is looked up",
            "nat-output": "a new connection of the node itself is looked up",
            "nat-postrouting": "what leaves may have to be masqueraded",
        }
        if key.name in hooks:
            return f"{hooks[key.name]}: on to {', '.join(references(rule)) or rule}"
        if key.name == "services":
            return self.sentence_of_services(rule)
        if key.name == "masquerading":
            if "@hairpin-connections" in rule:
                return "an endpoint of this node that reached itself is masqueraded"
            bit = HEXADECIMAL.search(rule)
            return (
                f"marked with {bit[0] if bit else 'the bit'}: the mark is taken off, and the "
                "node's own address becomes the source, so that the answer comes back here"
            )
        if key.name == "cluster-ips-check":
            if "@cluster-ips" in rule:
                return (
                    "still for a cluster IP, so for a port that its Service does not have: refused"
                )
            return "for a cluster IP that no Service has: dropped"
        if key.name == "firewall-check":
            return (
                "to a load balancer's address with loadBalancerSourceRanges: asked for its source"
            )
        if key.name.endswith("-endpoints-check"):
            return "to a Service that has no endpoints here: as its element says"
        if key.name == "reject-chain":
            return "refused with an ICMP port unreachable"
        if key.name.startswith("localhost-nodeport-reject-"):
            return "counted, and refused with an ICMP port unreachable"
        return ""

    def sentence_of_services(self, rule: str) -> str:
        """What a rule of chain `services` does."""
        if "mark set" in rule:
            return f"{_who(rule)} to a cluster IP is marked for masquerade"
        if "@service-ips" in rule:
            return "address, protocol and port are looked up"
        if "@service-nodeports" in rule:
            return "at an address of the node, protocol and port are looked up among the NodePorts"
        return ""

    def sentence_of_service(self, key: Key, rule: str) -> str:
        """What a rule of one Service's chain does."""
        if rule.startswith("update @"):
            return "the client is remembered"
        if "numgen" in rule:
            return self._choice(key, rule)
        if target := _DNAT.search(rule):
            only = "" if key.name.startswith("endpoint-") else f"the only endpoint{_here(key)}: "
            return f"{only}DNAT to {self.known.endpoint(target[1])}"
        if "@affinity-" in rule:
            owner = next(filter(None, map(self.by_name, references(rule))), None)
            endpoint = self.known.endpoint(owner.endpoint) if owner and owner.endpoint else "it"
            return f"a client that was served by it lately goes there again: {endpoint}"
        if key.name.startswith("firewall-"):
            source = rule.partition("saddr != ")[2].removesuffix(" drop")
            return f"a source that is not in {source} is dropped (loadBalancerSourceRanges)"
        if "mark set" in rule:
            if "fib saddr" in rule:
                return "what the node itself sends is marked for masquerade"
            return f"{_who(rule)} is marked for masquerade: the answer must come back this way"
        if "goto " in rule:
            return self._onward(rule)
        return "is nothing that the proxy writes"

    def _choice(self, key: Key, rule: str) -> str:
        targets = [address_of(ip, port) for ip, port in _TARGET.findall(rule)]
        verb = "DNAT to"
        if not targets:
            verb = "on to"
            owners = (self.by_name(name) for _, name in _CHOSEN.findall(rule))
            targets = [owner.endpoint or owner.port for owner in owners if owner]
        ways = re.search(r"numgen random mod (\d+)", rule)
        total = int(ways[1]) if ways else len(targets)
        chosen = (
            f"one of {len(targets)} endpoints{_here(key)} is chosen, each with probability "
            f"{Fraction(1, total or 1)}"
        )
        return f"{chosen}: {verb} {'; '.join(map(self.known.endpoint, targets))}"

    def _onward(self, rule: str) -> str:
        target = references(rule)[-1]
        if target.startswith("local-"):
            return "everything else goes to an endpoint on this node (externalTrafficPolicy Local)"
        if "fib saddr" in rule:
            return "what the node itself sends may go to any endpoint"
        if rule.startswith("goto "):
            return f"then {verdict(target)}"
        return f"{_who(rule)}, a pod, may go to any endpoint"

    def sentence_of_element(self, key: Key, line: Line) -> str:
        """What an element says."""
        text = key_of(line.text)
        if line.learned:
            return f"{text.partition(' ')[0]} is remembered"
        if line.text.startswith("timeout"):
            return f"each client is remembered for {line.text.partition(' ')[2]}"
        if not is_element(key, line.text):
            return "how the set is made"
        value = line.text.rpartition(" : ")[2] if " : " in line.text else ""
        if key.name == "cluster-ips":
            return f"{text} is a cluster IP"
        if key.name == "nodeport-ips":
            return f"{text}, an address of the node, takes NodePorts"
        if key.name == "hairpin-connections":
            return f"{hairpin(text)} is on this node, and may reach itself"
        to = f"to {destination(text)}"
        if value == "drop":
            return f"{to}: dropped, for no endpoint is on this node (policy Local)"
        names = references(value)
        return f"{to}: {verdict(names[0])}" if names else to


def is_element(key: Key, line: str) -> bool:
    """Whether a line of a set or map is an element, and not a property."""
    return key.kind in ("set", "map") and not _HEADER.match(line)


def references(line: str) -> list[str]:
    """Names of the sets and chains that a line names, in order."""
    found = _REFERENCE.findall(_COMMENT.sub("", line))
    return [chain or name for chain, name in found]


def key_of(element: str) -> str:
    """An element without comment, value and times."""
    text = _COMMENT.sub("", element).partition(" : ")[0]
    return re.sub(r" (timeout|expires) .*$", "", text).strip()


def hairpin(key: str) -> str:
    """`10.244.1.4:8002/tcp` of an element of hairpin-connections."""
    _, address, protocol, port = key.split(" . ")
    return f"{address_of(address, port)}/{protocol}"


def address_of(ip: str, port: str) -> str:
    """`10.244.1.4:8002`, `[fd00::4]:8002`."""
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"


def destination(key: str) -> str:
    """`10.99.174.93:80/TCP`, or `the NodePort 30080/TCP`, from an element's key."""
    match key.split(" . "):
        case [address, protocol, port, *_] if "." in address or ":" in address:
            return f"{address_of(address, port)}/{protocol.upper()}"
        case [protocol, port, *_]:
            return f"the NodePort {port}/{protocol.upper()}"
    return key


def verdict(target: str) -> str:
    """What going on to a chain means."""
    meanings: tuple[tuple[str, str], ...] = (
        ("service-", "one of its endpoints is chosen"),
        ("local-", "one of its endpoints on this node is chosen"),
        ("external-", "as the external traffic policy says"),
        ("firewall-", "its source must be in loadBalancerSourceRanges"),
        ("reject-chain", "refused, for it has no endpoints"),
        ("localhost-nodeport-reject-", "refused on loopback"),
    )
    return next((said for begins, said in meanings if target.startswith(begins)), f"on to {target}")


def _who(rule: str) -> str:
    if found := re.search(r"ip6? saddr (!= )?(\S+)", rule):
        return f"a packet from {'outside ' if found[1] else ''}the pod CIDR {found[2]}"
    if found := re.search(r'iifname (!= )?"([^"]+)"', rule):
        return f"a packet that {'does not come' if found[1] else 'comes'} in by {found[2]}"
    return "every packet"


def _here(key: Key) -> str:
    return " on this node" if key.name.startswith("local-") else ""
