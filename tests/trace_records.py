"""What witnesses saw once, kept as JSON, so that correlation is tested without a kernel.

`python tests/trace_records.py`, as root, records the files in tests/trace_records again.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from netlab.kernel.listeners import Listener
from netlab.kernel.xfrm import Policy
from netlab.topology.model import Lab
from netlab.trace import probe
from netlab.trace.aim import Aim, Request, aim
from netlab.trace.case import Case
from netlab.trace.correlate import Observed, Story, correlate
from netlab.trace.explain import Explained, explain
from netlab.trace.model_steps import Bridge, Neighbour, Route, Rule, Socket, Tuple
from netlab.trace.path import Tables
from netlab.trace.place import Place
from netlab.trace.probe import Answer
from netlab.trace.steps import Texts
from netlab.trace.watch import Watch
from netlab.trace.witnesses.conntrack import Entry
from netlab.trace.witnesses.decisions import Link
from netlab.trace.witnesses.kernel import Moment
from netlab.trace.witnesses.packets import Sighting
from netlab.trace.witnesses.rules import Match, Run

DIRECTORY = Path(__file__).with_suffix("")
_ANSWERS: dict[str, Any] = {
    "link": Link,
    "route": Route,
    "neighbour": Neighbour,
    "port": Bridge,
    "tunnel": Bridge,
    "ports": list[Link],
    "bridge_netfilter": bool,
    "early_chains": list[str],
    "policies": list[Policy],
    "off_by": str,
    "setting": str,
    "listeners": list[Listener],
    "remembered": Socket,
    "failed_inserts": int,
}


class Record(msgspec.Struct):
    """One probe as it was observed; `answers` and `texts` by question."""

    lab: Lab
    aim: Aim
    answer: Answer
    sent: Tuple
    sightings: list[Sighting]
    runs: list[Run]
    entries: list[Entry]
    answers: dict[str, Any]
    texts: dict[str, Rule]
    moments: list[Moment] = []


def _question(verb: str, place: Place, arguments: tuple[object, ...]) -> str:
    return " ".join([verb, place.namespace, *(str(each) for each in arguments)])


class Replayed:
    """Tables that answer as recorded; what was not asked then has no answer."""

    def __init__(self, record: Record) -> None:
        self._record = record

    def __getattr__(self, verb: str) -> Callable[..., object]:
        kind = _ANSWERS[verb]

        def ask(place: Place, *arguments: object) -> object:
            answer = self._record.answers.get(_question(verb, place, arguments))
            return None if answer is None else msgspec.convert(answer, kind)

        return ask


class _Recorder:
    def __init__(self, tables: Tables, answers: dict[str, Any]) -> None:
        self._tables = tables
        self._answers = answers

    def __getattr__(self, verb: str) -> Callable[..., object]:
        def ask(place: Place, *arguments: object) -> object:
            answer = getattr(self._tables, verb)(place, *arguments)
            self._answers[_question(verb, place, arguments)] = msgspec.to_builtins(answer)
            return answer

        return ask


def _rule(run: Run, match: Match) -> str:
    return f"{run.place.namespace} {run.table} {run.chain} {match.chain} {match.handle} {run.outer}"


def read(name: str) -> Record:
    """A record by its file name."""
    return msgspec.json.decode((DIRECTORY / f"{name}.json").read_bytes(), type=Record)


def told(name: str) -> tuple[Record, Story, Explained]:
    """A record by its file name, and what correlation and explanation make of it."""
    record = read(name)
    return record, *retold(record)


def retold(record: Record) -> tuple[Story, Explained]:
    """What correlation and explanation make of a record."""
    tables: Any = Replayed(record)
    observed = Observed(
        sent=record.sent,
        sightings=record.sightings,
        runs=record.runs,
        entries=record.entries,
        tables=tables,
        texts=lambda run, match: record.texts[_rule(run, match)],
        moments=record.moments,
        answer_ends=record.aim.answer_ends,
    )
    story = correlate(observed)
    case = Case(record.lab, record.aim, record.answer, story, tables, record.moments)
    return story, explain(case)


def record(lab: Lab, request: Request) -> Record:
    """Trace once and keep what was observed."""
    decided = aim(lab, request)
    mark = probe.new_mark(decided)
    answers: dict[str, Any] = {}
    texts: dict[str, Rule] = {}
    with Watch(lab, decided, mark) as watch:
        answer = probe.send(decided, mark, request.timeout_s, watch)
        observed = watch.observed(answer)
        tables: Any = _Recorder(observed.tables, answers)
        said: Texts = observed.texts

        def recorded(run: Run, match: Match) -> Rule:
            return texts.setdefault(_rule(run, match), said(run, match))

        observed = msgspec.structs.replace(observed, tables=tables, texts=recorded)
        story = correlate(observed)
        explain(Case(lab, decided, answer, story, tables, observed.moments))
    return Record(
        lab=lab,
        aim=decided,
        answer=answer,
        sent=observed.sent,
        sightings=list(observed.sightings),
        runs=list(observed.runs),
        entries=list(observed.entries),
        answers=answers,
        texts=texts,
        moments=list(observed.moments),
    )


def _record_all() -> None:
    from labs import ipv6_lab
    from trace_labs import trace_lab

    lab = trace_lab("recorded")
    _record_lab(lab, "")
    _record_lab(ipv6_lab(lab), "ipv6-")


def _record_lab(lab: Lab, prefix: str) -> None:
    """Records of a lab of one family, with files that are called `prefix` and what they hold."""
    from netlab.datapath.overlay import vtep_mac
    from netlab.datapath.overlays.vxlan import vxlan_device
    from netlab.lab import lifecycle
    from netlab.trace.family import family_of
    from trace_labs import namespace

    node = namespace(lab, "n1")
    family = family_of(lab.pod_cidr)
    p1 = next(pod for pod in lab.pods if pod.name == "p1")

    def run(*words: str) -> str:
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout

    def keep(name: str, *request: str, **options: Any) -> None:
        found = record(lab, Request(*request, **options))
        (DIRECTORY / f"{prefix}{name}.json").write_bytes(msgspec.json.encode(found) + b"\n")

    proxy = msgspec.structs.replace(lab.service_proxy, mode="nftables")
    lab = msgspec.structs.replace(lab, service_proxy=proxy)
    lifecycle.up(lab)
    try:
        keep("nftables-no-endpoints", "p0", "svc/empty")
        keep("nftables-hairpin", "p0", "svc/itself")
        proxy = msgspec.structs.replace(lab.service_proxy, mode="iptables")
        lab = msgspec.structs.replace(lab, service_proxy=proxy)
        lifecycle.up(lab)
        keep("remote-service", "p0", "svc/remote")
        keep("hairpin", "p0", "svc/itself")
        keep("masqueraded", "node/n1", "svc/remote")
        keep("no-endpoints", "p0", "svc/empty")
        keep("port-closed", "p0", "p1:99")
        drop = ["FORWARD", "-d", p1.address, "-j", "DROP"]
        run("ip", "netns", "exec", node, family.iptables, "-I", *drop)
        keep("rule-drop", "p0", "p1:8002")
        run("ip", "netns", "exec", node, family.iptables, "-D", *drop)
        device = vxlan_device(lab, family.version)
        entry = vtep_mac(lab.node("n2"), family.version), "dev", device
        run("bridge", "-n", node, "fdb", "del", *entry, "dst", lab.node("n2").address)
        keep("fdb-missing", "p0", "p1:8002")
        lifecycle.up(lab)
        pod = namespace(lab, "demo", "p1")
        chain = "{ type filter hook input priority 0; policy drop; }"
        table = f"add table ip closed; add chain ip closed input {chain}"
        run("ip", "netns", "exec", pod, "nft", table)
        keep("kernel-drop", "p0", "p1:8002")
    finally:
        lifecycle.down(lab.name)


if __name__ == "__main__":
    sys.exit(_record_all())
