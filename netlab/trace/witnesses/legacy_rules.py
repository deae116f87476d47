"""Rules of iptables-legacy: what x_tables logs of the packets that the rules witness marks.

`nftrace` sets the very bit that the TRACE target sets, and x_tables reads it: each rule that
matched is logged with its table, chain and place in the chain, and with the packet.  So nothing is
added to these tables.  The namespace's logger is needed, of which there is one for everybody; the
lab's init holds it as long as some trace asks for it (:mod:`netlab.lab.rule_logs`).

What a rule then did, x_tables does not say: it stands in the rule.  Tables are listed once the
probe is through, each as a whole; for a single chain the tool would read all of it as well.

Source: net/ipv4/netfilter/ip_tables.c, trace_packet().
"""

from __future__ import annotations

import errno
import re
import socket
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import msgspec

from netlab.kernel import conntrack
from netlab.kernel.namespaces import entered
from netlab.kernel.netlink import attributes
from netlab.kernel.nfnetlink import messages
from netlab.kernel.xtables import legacy_tables, program
from netlab.lab.control import Init
from netlab.problems import NetlabError
from netlab.trace.mark import Mark
from netlab.trace.place import Place
from netlab.trace.witnesses import Canary
from netlab.trace.witnesses.rules import DeviceNames, Match, Run, run_of, text_of

if TYPE_CHECKING:
    from subprocess import Popen

_MESSAGE_PACKET = 4 << 8  # NFNL_SUBSYS_ULOG, NFULNL_MSG_PACKET
# enum nfulnl_attr_type
_HEADER, _MARK, _IN, _OUT, _PHYSICAL_IN, _PHYSICAL_OUT, _PAYLOAD, _PREFIX = 1, 2, 4, 5, 6, 7, 9, 10
_HOOK_AT = 2
_HOOKS = ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING")
_TRACED = re.compile(r"TRACE: (.+?):(.+):(rule|return|policy):(\d+) ")
_UDP_HEADER = 8
_RECEIVE = 1 << 16
_ASIDE_S = 1.0  # for init to put things back

_TARGET = re.compile(r" -([jg]) (\S+)")
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
_VERDICTS = {
    "ACCEPT": "accept",
    "DROP": "drop",
    "RETURN": "return",
    "QUEUE": "queue",
    "NFQUEUE": "queue",
    "REJECT": "drop",
    **dict.fromkeys(
        ("DNAT", "SNAT", "MASQUERADE", "REDIRECT", "NETMAP", "TPROXY", "SYNPROXY"), "accept"
    ),
}

Table = tuple[Place, str]


class Hit(msgspec.Struct, frozen=True):
    """One line of the log: the rule at `number` of `chain`, or what ends the chain."""

    chain: str
    kind: str  # "rule", "return" or "policy"
    number: int


class Chains(msgspec.Struct, frozen=True):
    """A table as `iptables-save` lists it: rules of each chain, policies of base chains."""

    rules: dict[str, list[str]]
    policies: dict[str, str]


class LegacyRules:
    """The rules witness where rules are those of iptables-legacy."""

    name = "rules"

    def __init__(self, lab: str, mark: Mark, vxlan_port: int, canary: bytes) -> None:
        self._init = Init(lab)
        self._mark = mark
        self._words = mark.words()
        self._vxlan_port = vxlan_port
        self._canary = canary
        self._channels: dict[Place, socket.socket] = {}
        self._devices = DeviceNames()
        self._runs: dict[Place, list[tuple[Run, list[Hit]]]] = {}
        self._open: dict[tuple[object, ...], list[Hit]] = {}
        self._canaries: set[tuple[Place, bytes]] = set()
        self._unseen: list[str] = []
        self._nodes = 0
        self._overrun = False
        self._failed: list[str] = []
        # What was logged while it was not known what the probe bears, and how much of it is old.
        self._waiting: list[tuple[Place, int, dict[int, bytes]]] = []
        self._old = 0

    def arm(self, places: Sequence[Place]) -> None:
        for place in places:
            if place.kind != "node":
                continue
            self._nodes += 1
            tables: list[str] = []
            try:
                with entered(place.namespace):
                    tables = sorted(legacy_tables(self._mark.family.address_family))
                if tables:
                    self._channels[place] = self._init.follow_rules(place.namespace)
                    self._runs[place] = []
            except (OSError, NetlabError) as error:
                self._unseen.append(f"{place.name} ({', '.join(tables)}): {_why(error)}")

    def saw(self, canary: Canary) -> bool:
        other_family = canary.end.ip != self._mark.family.loopback
        if canary.place not in self._channels or other_family:
            return True
        self._read(canary.place)
        if (canary.place, canary.cookie) in self._canaries:
            return True
        # Connection tracking comes before the tables that there are.
        return canary.refused and _is_full(canary.place)

    def events(self) -> list[Run]:
        """What the probe met, run by run, in the order of each namespace."""
        for place in self._channels:
            self._read(place)
        runs = [(run, hits) for found in self._runs.values() for run, hits in found]
        tables = self._listed({(run.place, run.table) for run, _ in runs})
        for run, hits in runs:
            resolve(run, hits, tables.get((run.place, run.table)))
        return [run for run, _ in runs]

    def age(self) -> None:
        """Drop what was read before the last call."""
        for place in self._channels:
            self._read(place)
        del self._waiting[: self._old]
        self._old = len(self._waiting)

    def adopt(self, mark: Mark) -> None:
        """Of what was seen, and from now on, what bears a mark is the probe."""
        for place in self._channels:
            self._read(place)
        self._mark, self._words = mark, mark.words()
        waiting, self._waiting = self._waiting, []
        for event in waiting:
            self._event(*event)

    def forget(self) -> None:
        for place in self._channels:
            self._read(place)
            self._runs[place] = []
        self._open.clear()
        self._canaries.clear()

    def _read(self, place: Place) -> None:
        channel = self._channels[place]
        while True:
            try:
                data = channel.recv(_RECEIVE, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            if not data:
                self._overrun = True
                return
            for kind, family, payload in messages(data):
                if kind == _MESSAGE_PACKET and family == self._mark.family.address_family:
                    self._event(place, family, attributes(payload))

    def _event(self, place: Place, family: int, event: dict[int, bytes]) -> None:
        traced = _TRACED.fullmatch(text_of(event.get(_PREFIX, b"")))
        packet = event.get(_PAYLOAD, b"")
        ip = self._mark.family
        if traced is None or len(packet) < ip.header or packet[0] >> 4 != ip.version:
            return
        header = (packet[0] & 0xF) * 4 if ip.version == 4 else ip.header
        transport = packet[header:]
        if transport.startswith(self._canary, _UDP_HEADER):
            self._canaries.add((place, transport[_UDP_HEADER:]))
            return
        if not self._words:
            self._waiting.append((place, family, event))
            return
        if not any(packet.startswith(word, offset) for offset, word in self._words):
            return
        table, chain, kind, number = traced.groups()
        run = run_of(
            self._mark,
            self._vxlan_port,
            packet[:header],
            transport[:20],
            place=place,
            table=table,
            chain=_HOOKS[event[_HEADER][_HOOK_AT]],
            iif=self._devices(place, event.get(_IN)),
            oif=self._devices(place, event.get(_OUT)),
            mark=int.from_bytes(event.get(_MARK, b""), "big"),
            family=family,
            legacy=True,
        )
        ports = event.get(_PHYSICAL_IN), event.get(_PHYSICAL_OUT)
        self._add(run, ports, Hit(chain, kind, int(number)))

    def _add(self, run: Run, ports: tuple[bytes | None, ...], hit: Hit) -> None:
        """Give a hit to the run that it continues, or to one that begins with it.

        Packets of several processors may be logged in turns.
        """
        key = run.place, run.table, run.chain, run.iif, run.oif, *ports, run.flow, run.key
        hits = self._open.get(key)
        # Within a run the base chain is never passed upwards.
        if hits is None or not _continues(hits, run.chain, hit):
            hits = self._open[key] = []
            self._runs[run.place].append((run, hits))
        hits.append(hit)

    def _listed(self, tables: Iterable[Table]) -> dict[Table, Chains]:
        found: dict[Table, Chains] = {}
        printing: dict[Table, Popen[str]] = {}
        try:
            tool = program(self._mark.family.iptables, "save", "legacy")
            for place, table in tables:
                with entered(place.namespace):
                    printing[place, table] = _print(tool, table)
        except (OSError, NetlabError) as error:
            self._failed.append(f"rule texts: {_why(error)}")
        for (place, table), process in printing.items():
            output, complaint = process.communicate()
            found[place, table] = chains_of(output)
            if process.returncode:
                self._failed.append(f"rule texts of {place.name}: {complaint.strip()}")
        return found

    def disarm(self) -> None:
        for channel in self._channels.values():
            channel.settimeout(_ASIDE_S)
            with channel:
                _leave(channel)
        self._channels.clear()

    @property
    def report(self) -> str:
        name = f"{self._mark.family.iptables}-legacy"
        problems = [f"rules of {name} on {each}" for each in self._unseen]
        if self._overrun:
            problems.append(f"rules of {name} came faster than they were read")
        problems += self._failed
        if not problems:
            return "ok"
        blind = self._unseen and len(self._unseen) == self._nodes
        return f"{'unavailable' if blind else 'partial'}: {'; '.join(problems)}"


def _is_full(place: Place) -> bool:
    count, most = conntrack.sizes(place.namespace)
    return count >= most > 0


def resolve(run: Run, hits: Sequence[Hit], chains: Chains | None) -> None:
    """Fill in a run's matches and policy: a hit says where, the table says what.

    A rule that matches everything is logged as the end of its chain is.  Without a listing, and of
    a rule that went away meanwhile, it is known only that it matched.
    """
    for hit in hits:
        rules = chains.rules.get(hit.chain, []) if chains else []
        if hit.number <= len(rules):
            text = rules[hit.number - 1]
            verdict, target = verdict_of(text, chains.rules if chains else {})
            run.matches.append(Match(hit.chain, hit.number, verdict, target, text))
        elif hit.kind == "rule" or chains is None:
            run.matches.append(Match(hit.chain, hit.number, "continue"))
        elif hit.kind == "policy":
            run.policy = chains.policies.get(hit.chain, "accept").lower()


def verdict_of(rule: str, chains: Iterable[str]) -> tuple[str, str | None]:
    """The verdict of a rule that matched, and the chain of a jump or goto."""
    found = _TARGET.search(_QUOTED.sub("", rule))
    if found is None:
        return "continue", None
    way, target = found.groups()
    if target in _VERDICTS:
        return _VERDICTS[target], None
    if target in chains:
        return ("jump" if way == "j" else "goto"), target
    return "continue", None


def chains_of(listing: str) -> Chains:
    """A table as `iptables-save` prints it."""
    rules: dict[str, list[str]] = {}
    policies = {}
    for line in listing.splitlines():
        if line.startswith(":"):
            chain, policy, _ = line[1:].split(" ", 2)
            rules[chain] = []
            if policy != "-":
                policies[chain] = policy
        elif line.startswith("-A "):
            rules[line.split(" ", 2)[1]].append(line)
    return Chains(rules, policies)


def _continues(hits: Sequence[Hit], base: str, hit: Hit) -> bool:
    last = next((each.number for each in reversed(hits) if each.chain == base), 0)
    return hit.chain != base or hit.number > last


def _why(error: OSError | NetlabError) -> str:
    if isinstance(error, NetlabError):
        return error.problems[0].message
    if error.errno in (errno.EPERM, errno.EBUSY):
        return "another process listens to NFLOG group 0"
    return error.strerror or str(error)


def _leave(channel: socket.socket) -> None:
    """Have init know that nobody follows here any more, and wait until it has put things back."""
    try:
        channel.shutdown(socket.SHUT_WR)
        while channel.recv(_RECEIVE):
            pass
    except OSError:  # it is gone, or slow; what there is to do, it does
        pass


def _print(tool: str, table: str) -> Popen[str]:
    import subprocess

    return subprocess.Popen(
        [tool, "-t", table], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
