"""From a rule's handle to its text, its comment and the Kubernetes object that it serves.

The kernel reports handles.  iptables prints no handles, so a chain is read twice: by netlink, for
the handles in order, and by `iptables -S CHAIN`, for the texts in the same order.  Only chains in
which the probe matched a rule are read, all at once; a whole `iptables-save` takes seconds where
there are 10,000 Services.  Other tables are read with nftables itself (`nftables_text`).
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from typing import TYPE_CHECKING

from netlab.kernel.namespaces import entered
from netlab.kernel.netlink import NetlinkError, attributes, text
from netlab.kernel.netlink import Socket as Netlink
from netlab.kernel.nfnetlink import SUBSYSTEM_NFTABLES, request_body
from netlab.trace.family import IPV4, IPV6
from netlab.trace.model_steps import Rule
from netlab.trace.place import Place
from netlab.trace.witnesses.nftables_text import (
    KUBE_PROXY,
    Listing,
    Lookup,
    lookup_of,
    served_by_chain,
)
from netlab.trace.witnesses.rules import Match, Run

if TYPE_CHECKING:
    from subprocess import Popen

_NETLINK_NETFILTER = 12
_GET_CHAIN = SUBSYSTEM_NFTABLES << 8 | 4
_GET_RULE = SUBSYSTEM_NFTABLES << 8 | 7
_GET_GENERATION = SUBSYSTEM_NFTABLES << 8 | 16
_GENERATION = 1
_RULE_TABLE, _RULE_CHAIN, _RULE_HANDLE = 1, 2, 3
_CHAIN_TABLE, _CHAIN_NAME, _CHAIN_HOOK = 1, 3, 4
_HOOK_NUMBER = 1
_HOOKS = ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING")
_IPTABLES_TABLES = ("raw", "mangle", "nat", "filter", "security")

# kube-proxy's comments: "demo/myblog cluster IP", "demo/myblog:http -> 10.244.1.4:8002", "demo/x
# has no endpoints", and in endpoint chains the port's name alone.
_SERVED = re.compile(
    r"([a-z0-9.-]+/[a-z0-9.-]+)(:[a-z0-9-]+)?"
    r"(?: (?:cluster IP|external IP|loadbalancer IP|has no |->|traffic|pod traffic|route ).*)?"
)
_COMMENT = re.compile(r'--comment (?:"((?:[^"\\]|\\.)*)"|(\S+))')

# linux/netfilter.h, NFPROTO_*
_FAMILIES = {1: "inet", 2: "ip", 5: "netdev", 7: "bridge", 10: "ip6"}
_IPTABLES = {family.address_family: family.iptables for family in (IPV4, IPV6)}

Chain = tuple[Place, int, str, str]  # place, family, table, chain


class RuleTexts:
    """The texts of rules that runs matched, read when made.

    What was read `earlier` holds in a namespace while nobody has changed a rule there, which the
    number of its generation of rules tells.
    """

    def __init__(self, runs: Iterable[Run], earlier: RuleTexts | None = None) -> None:
        # Those of iptables-legacy bring their texts.
        runs = [run for run in runs if run.matches and not run.legacy]
        chains = {
            (run.place, run.family, run.table, match.chain) for run in runs for match in run.matches
        }
        self._texts: dict[Chain, dict[int, str]] = dict(earlier._texts) if earlier else {}
        self._elements: dict[tuple[Place, str, Lookup], str | None] = (
            dict(earlier._elements) if earlier else {}
        )
        self._hooks: dict[Chain, str] = dict(earlier._hooks) if earlier else {}
        self._generations: dict[Place, bytes] = dict(earlier._generations) if earlier else {}
        self._printing: list[tuple[Chain, list[int], Popen[str]]] = []
        self.failed: list[str] = []
        for place in dict.fromkeys(chain[0] for chain in chains):
            here = sorted(chain for chain in chains if chain[0] == place)
            try:
                self._read(place, here, [run for run in runs if run.place == place])
            except OSError as error:
                self.failed.append(f"rule texts of {place.name}: {error.strerror or error}")
        self._collect()

    def __call__(self, run: Run, match: Match) -> Rule:
        """What is known of a rule."""
        rule = self._text(run, match)
        comment = comment_of(rule) if rule else None
        lookup = lookup_of(rule, run) if rule else None
        element = self._elements.get((run.place, run.table, lookup)) if lookup else None
        return Rule(
            hook=self._hooks.get((run.place, run.family, run.table, run.chain), run.chain),
            table=run.table,
            chain=match.chain,
            handle=match.handle,
            verdict=f"{match.verdict} {match.target}" if match.target else match.verdict,
            rule=rule,
            element=element,
            comment=comment,
            object=served_object(comment or comment_of(element or "") or "")
            or self._served_in_nftables(run, match),
            family=_FAMILIES[run.family],
            outer=run.outer,
            legacy=run.legacy,
        )

    def _text(self, run: Run, match: Match) -> str | None:
        if run.legacy:
            return match.text
        return self._texts.get((run.place, run.family, run.table, match.chain), {}).get(
            match.handle
        )

    def _served_in_nftables(self, run: Run, match: Match) -> str | None:
        """By the name of a chain, or by the rule that led to a chain that Services share."""
        if run.table != KUBE_PROXY:
            return None
        found = served_by_chain(match.chain) or served_by_chain(match.target or "")
        if found:
            return found
        for led in run.matches[: run.matches.index(match)]:
            if (led.verdict, led.target) == ("goto", match.chain):
                return self(run, led).object
        return None

    def _read(self, place: Place, chains: list[Chain], runs: list[Run]) -> None:
        native: Listing | None = None
        with entered(place.namespace), Netlink(_NETLINK_NETFILTER) as netlink:
            self._forget_if_changed(place, _generation(netlink))
            for family, table, chain in {(run.family, run.table, run.chain) for run in runs}:
                if (place, family, table, chain) not in self._hooks:
                    self._hooks[place, family, table, chain] = _hook(netlink, family, table, chain)
            for each in chains:
                if each in self._texts:
                    continue
                _, family, table, chain = each
                iptables = _iptables(family) if table in _IPTABLES_TABLES else None
                if iptables:
                    handles = _handles(netlink, family, table, chain)
                    self._printing.append((each, handles, _print(iptables, table, chain)))
                else:
                    native = native or Listing()
                    self._texts[each] = native.rules(_FAMILIES[family], table, chain)
            self._look_up(place, runs, native)

    def _forget_if_changed(self, place: Place, generation: bytes) -> None:
        """Forget what was read earlier of a place whose rules are not the same any more."""
        if self._generations.get(place) == generation:
            return
        self._generations[place] = generation
        self._texts = {key: each for key, each in self._texts.items() if key[0] != place}
        self._hooks = {key: each for key, each in self._hooks.items() if key[0] != place}
        self._elements = {key: each for key, each in self._elements.items() if key[0] != place}

    def _look_up(self, place: Place, runs: list[Run], native: Listing | None) -> None:
        """Elements of verdict maps whose verdict does not name its Service by a chain's name."""
        for run in runs:
            for match in run.matches:
                text = self._text(run, match)
                lookup = lookup_of(text, run) if text else None
                known = (place, run.table, lookup) in self._elements
                if lookup and not known and not served_by_chain(match.target or ""):
                    native = native or Listing()
                    found = native.element(_FAMILIES[run.family], run.table, lookup)
                    self._elements[place, run.table, lookup] = found

    def _collect(self) -> None:
        for chain, handles, process in self._printing:
            output, _ = process.communicate()
            rules = [line for line in output.splitlines() if line.startswith("-A ")]
            # Rules that changed meanwhile cannot be told apart any more.
            if len(rules) == len(handles):
                self._texts[chain] = dict(zip(handles, rules, strict=True))
            else:
                self.failed.append(f"{chain[2]} {chain[3]} of {chain[0].name} changed meanwhile")


def comment_of(rule: str) -> str | None:
    """The comment in a rule's text, of iptables or nftables."""
    found = _COMMENT.search(rule) or re.search(r'comment "(.*?)"()', rule)
    return (found.group(1) or found.group(2)).replace('\\"', '"') if found else None


def served_object(comment: str) -> str | None:
    """`svc/NAMESPACE/NAME[:PORT]` if the comment is kube-proxy's of a Service port, else None."""
    found = _SERVED.fullmatch(comment)
    return f"svc/{found.group(1)}{found.group(2) or ''}" if found else None


def _generation(netlink: Netlink) -> bytes:
    """The number that every change of a namespace's nf_tables rules makes another one."""
    found = netlink.get(_GET_GENERATION, request_body(b"", 0))
    return attributes(found, 4)[_GENERATION]


def _hook(netlink: Netlink, family: int, table: str, chain: str) -> str:
    """A base chain's hook in the spelling of iptables; the chain's name if it is gone."""
    body = request_body(text(_CHAIN_TABLE, table) + text(_CHAIN_NAME, chain), family)
    try:
        found = attributes(netlink.get(_GET_CHAIN, body), 4)
    except NetlinkError:
        return chain
    number = attributes(found.get(_CHAIN_HOOK, b"")).get(_HOOK_NUMBER, b"")
    return _HOOKS[int.from_bytes(number, "big")] if number else chain


def _iptables(family: int) -> str | None:
    name = _IPTABLES.get(family)
    return (shutil.which(f"{name}-nft") or shutil.which(name)) if name else None


def _handles(netlink: Netlink, family: int, table: str, chain: str) -> list[int]:
    body = request_body(text(_RULE_TABLE, table) + text(_RULE_CHAIN, chain), family)
    rules = (attributes(rule, 4) for rule in netlink.dump(_GET_RULE, body))
    return [
        int.from_bytes(rule[_RULE_HANDLE], "big")
        for rule in rules
        # Kernels before 4.15 do not filter by chain.
        if rule[_RULE_CHAIN].rstrip(b"\0").decode() == chain
    ]


def _print(iptables: str, table: str, chain: str) -> Popen[str]:
    import subprocess

    return subprocess.Popen(
        [iptables, "-t", table, "-S", chain],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
