"""ipvs mode as its tools list it: rules, sets and virtual servers, and whom they serve.

A listing of a family is what `iptables-save`, `ipset save` and `ipvsadm-save -n` print, one after
the other; each set is a block, and so are all virtual servers together.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from netlab.datapath.services import ipvs
from netlab.datapath.services import ipvs_sets as sets
from netlab.datapath.services.claims import settled_ports
from netlab.datapath.services.iptables_reading import chains, listings
from netlab.datapath.services.iptables_save import matches, target_of
from netlab.datapath.services.ipvs_listing import listing, plain, service, socket
from netlab.datapath.services.ipvs_sentences import Sentence, matched_sets
from netlab.datapath.services.ipvs_service import parts
from netlab.datapath.services.reading import Block, Blocks, Key, Known, Line, Owner, Stage
from netlab.datapath.state import Balancing, Rules
from netlab.topology.model import Lab, Node

SERVERS = "virtual servers"
_OWN = "KUBE-"
_SERVER = re.compile(r"-[Aa] ((?:-t|-u|--sctp-service) (\S+):\d+)(?: -r (\S+))?")
_BARRED = re.compile(r"-s (\S+)/\d+ .*--vproto (\d+) .*--vport (\d+)")
_NUMBERS = {"6": "tcp", "17": "udp", "132": "sctp"}
_DRAINING = re.compile(r"-w 0\b")


class IpvsReading:
    """See `netlab.datapath.services.reading.Reading`."""

    stages: Sequence[Stage] = (
        Stage(
            "who it is for, and whether it will be masqueraded",
            (
                ("nat", "PREROUTING"),
                ("nat", "OUTPUT"),
            ),
        ),
        Stage("what is let through", (("filter", "INPUT"),)),
        Stage("where it goes", (("ipvs", SERVERS),), translates=True),
        Stage("what leaves", (("filter", "OUTPUT"), ("filter", "FORWARD"))),
        Stage("what its source becomes", (("nat", "POSTROUTING"),), needs_translation=True),
    )

    def __init__(self, lab: Lab, node: Node, *, whole: bool = True) -> None:
        self._known = Known(lab, node, settled_ports)
        self._entries: dict[tuple[str, str], list[Owner]] = {}  # by set and entry
        self._servers: dict[str, Owner] = {}  # as ipvsadm names them
        self._barred: dict[tuple[str, str, str], Owner] = {}
        self._bound: set[str] = set()  # addresses of ours in what was read
        for family in ipvs.FAMILIES:
            settings = ipvs.settings_of(lab, node, family)
            for info in self._known.infos["ip6" if family == 6 else "ip"]:
                made, owner = parts(settings, [info]), Owner(info.name)
                for role, entry in made.entries:
                    place = sets.set_name(role, family), plain(entry)
                    found = self._entries.setdefault(place, [])
                    if owner not in found:
                        found.append(owner)
                self._servers |= {service(server): owner for server in made.servers}
                for address, protocol, port in made.barred:
                    self._barred[address, protocol, str(port)] = owner

    @staticmethod
    def recognise(text: str) -> Mapping[str, str] | None:
        """What the tools have printed one after the other, in any order."""
        if ":KUBE-IPVS-FILTER " not in text:
            return None
        lines = text.splitlines()
        below = [line for line in lines if _is_below(line)]
        found = listings("\n".join(line for line in lines if not _is_below(line)))
        return {
            family: "\n".join([each, *(line for line in below if _is_of(line, family)), ""])
            for family, each in found.items()
        }

    def blocks(self, printed: Mapping[str, str]) -> Blocks:
        """KUBE-* chains with what leads there, sets of ours, and virtual servers."""
        return {
            block.key: block
            for family, text in printed.items()
            for block in self._of_family(family, text)
        }

    def _of_family(self, family: str, text: str) -> Iterator[Block]:
        lines = text.splitlines()
        below = [line for line in lines if _is_below(line)]
        rules = "\n".join(line for line in lines if not _is_below(line))
        for table, chain, found in chains(rules):
            if not chain.startswith(_OWN):
                found = [line for line in found if target_of(line.text).startswith(_OWN)]
                if not found:
                    continue
            yield Block(Key(family, table, "chain", chain), found)
        yield from self._below(family, below)

    def _below(self, family: str, lines: list[str]) -> Iterator[Block]:
        found: dict[str, Block] = {}
        servers = Block(Key(family, "ipvs", "chain", SERVERS), [])
        for line in lines:
            if line.startswith("create "):
                name = line.split()[1]
                if name in sets.NAMES:
                    found[name] = Block(Key(family, "ipset", "set", name), [])
            elif line.startswith("add "):
                _, name, entry = line.split(None, 2)
                if name in found:
                    found[name].lines.append(Line(plain(entry)))
                    if sets.NAMES[name][0] == sets.IPVS_IPS:
                        self._bound.add(entry)
            else:
                servers.lines.append(Line(line))
        yield from found.values()
        yield servers

    def rendered(self, rules: Rules) -> Mapping[str, str]:
        """What the tools print of them."""
        assert isinstance(rules, Balancing)
        below = listing(rules.sets, rules.servers)
        return {"ip": rules.rules.ipv4 + below["ip"], "ip6": rules.rules.ipv6 + below["ip6"]}

    def comparable(self, key: Key, line: str) -> object:
        """Its matches and its target; the order of matches differs between versions."""
        if key.table in ("ipset", "ipvs"):
            return line
        return "\n".join(" ".join(part) for part in matches(line))

    def is_shared(self, key: Key) -> bool:
        """Virtual servers, and load balancers that are barred, come in no order."""
        return key.table == "ipvs" or key.name == "KUBE-IPVS-OUT-FILTER"

    def is_ignored(self, key: Key, line: str | None) -> bool:
        """Virtual servers of others, and real ones that wait for their connections to end."""
        if key.table != "ipvs" or line is None:
            return False
        if _DRAINING.search(line):
            return True
        found = _SERVER.match(line)
        if found is None or found[1] in self._servers:
            return found is None
        return found[2].strip("[]") not in self._bound

    def owners(self, key: Key, line: str) -> tuple[Owner, ...]:
        """By the entry, the virtual server, or the load balancer that a rule names."""
        if key.table == "ipset":
            return tuple(self._entries.get((key.name, line), ()))
        if key.table == "ipvs":
            found = _SERVER.match(line)
            owner = self._servers.get(found[1]) if found else None
            if owner is None or found is None:
                return ()
            return (Owner(owner.port, found[3]) if found[3] else owner,)
        barred = _BARRED.search(line) if key.name == "KUBE-IPVS-OUT-FILTER" else None
        if barred is None:
            return ()
        owner = self._barred.get((barred[1], _NUMBERS.get(barred[2], ""), barred[3]))
        return (owner,) if owner else ()

    def endpoints(self, key: Key, line: str) -> Iterable[str]:
        """The real server that a line makes, or the endpoint that may reach itself."""
        if key.table == "ipvs":
            found = _SERVER.match(line)
            return {found[3]} if found and found[3] else set()
        role, _ = sets.NAMES.get(key.name, ("", 4))
        if role == sets.LOOP_BACK:
            address, port, _ = line.split(",")
            return {socket(address, int(port.rpartition(":")[2]))}
        return set()

    def slot(self, key: Key, line: str) -> str | None:
        """A virtual server, or an entry, is there once; a real one may be in another's place."""
        if key.table == "ipset":
            return line
        found = _SERVER.match(line) if key.table == "ipvs" else None
        return found[1] if found and not found[3] else None

    def targets(self, key: Key, line: str) -> Iterable[Key]:
        """The sets that it asks, and the chain that it jumps to."""
        if key.table in ("ipset", "ipvs"):
            return
        for name in matched_sets(line):
            yield Key(key.family, "ipset", "set", name)
        target = target_of(line)
        if target.startswith(_OWN):
            yield key._replace(name=target)

    def is_told(self, key: Key, line: str) -> bool:
        """All but what only leads from a built-in chain to ours."""
        return True

    def is_met(self, key: Key, line: str) -> bool:
        """What comes after all that asks sets is for those that none of them has."""
        if key.name == "KUBE-SERVICES" and line.endswith("-j RETURN"):
            return False  # loopback's own
        return key.table not in ("ipset", "ipvs")

    def sentence(self, block: Block, line: Line) -> str:
        """What a line does."""
        return Sentence(self._known, block, line).text()


def _is_below(line: str) -> bool:
    """Whether a line is of `ipset save` or `ipvsadm-save`."""
    return line.startswith(("create ", "add ")) or bool(_SERVER.match(line))


def _is_of(line: str, family: str) -> bool:
    """Whether such a line is of a family, told by the set or by the address."""
    found = _SERVER.match(line)
    is_six = found[2].startswith("[") if found else " KUBE-6-" in line
    return is_six is (family == "ip6")
