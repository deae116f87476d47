"""A packet that somebody else sends as the probe: it is waited for, and then known by its bytes.

What translation will make of it nobody knows beforehand, and only the first packet of a connection
meets the rules of nat.  So the witnesses are armed for every packet that opens or refuses a TCP
connection, and for pings, and what they saw is forgotten again as long as the awaited one does not
come.  Where the filter speaks of UDP, they are armed for datagrams as well.  Once it leaves its
source, it is known by what a probe of ours would be known by: its sequence number, or the first
bytes that a ping or a datagram carries, or a DNS query's number and question.
"""

from __future__ import annotations

import re
import select
import time
from collections.abc import Callable, Sequence
from typing import Literal

import msgspec
from msgspec.structs import replace

from netlab.capture.headers import TCP, UDP, Network, ethernet, network
from netlab.capture.targets import everything
from netlab.kernel import namespaces
from netlab.kernel.packet_sockets import WHOLE, Frame, Tap
from netlab.kernel.pcap_filter import Filter
from netlab.kernel.skb_events import pattern_of_word
from netlab.problems import Exit, NetlabError, Problem
from netlab.topology.model import Lab
from netlab.trace import canary, dissect
from netlab.trace.aim import DEFAULT_TIMEOUT_S, MOST_PODS, Aim, Request, aim, sender
from netlab.trace.correlate import Observed
from netlab.trace.family import IPV4, IPV6, Family, family_of
from netlab.trace.mark import COOKIE_BYTES, QUESTION_BYTES, Mark
from netlab.trace.model import ProbeProtocol, Trace
from netlab.trace.model_steps import Socket, Tuple
from netlab.trace.openings import (
    Openings,
    patterns,
    pcap,
    pcap_opening,
    pcap_tunnelled,
    pcap_word,
)
from netlab.trace.place import Place, place_of_node
from netlab.trace.probe import Answer, Outcome
from netlab.trace.run import Recorded, follow, require_namespaces, tell
from netlab.trace.unanswered import Sent, is_back
from netlab.trace.watch import Watch
from netlab.trace.witnesses.kernel import Kernel
from netlab.trace.witnesses.packets import Packets, Sighting, watched_words
from netlab.trace.witnesses.rules import Run

# How often it is forgotten what others did.
_FORGET_S = 0.1
_BUFFER = 4 << 20
_MORE_CANARIES = range(100, 110)
# What an answer may take after a witness told of a loss, as for a probe of ours.
_GRACE_S = 0.05
_UDP_WORD = re.compile(r"\budp\b")
_DNS, _DNS_HEADER, _ONE_QUESTION = 53, 12, b"\0\1"  # RFC 1035
_OUTCOMES: dict[str, Outcome] = {
    "answer": "answered",
    "refusal": "refused",
    "error": "unreachable",
}


class Wait(msgspec.Struct, frozen=True):
    """Whose packet is waited for, which one, and how long.

    `filter` is in pcap's language.  `lost`: a packet that was sent before and had no answer.
    """

    source: str
    filter: str = ""
    lost: bool = False
    wait_s: float | None = None
    namespace: str | None = None
    family: Literal[4, 6] | None = None  # None: the lab's primary one


def trace_next(
    lab: Lab,
    wait: Wait,
    recorded: list[Recorded] | None = None,
    armed: Callable[[Place], object] = str,
    declared: Lab | None = None,
) -> Trace:
    """Trace the next TCP connection that a pod or a node opens, by its first packet, or its ping.

    `armed` is called with the source when all witnesses are; `declared` is the lab without its
    faults.  NetlabError: exit 2 if that cannot
    be meant, 4 if none came in time; else as :func:`run.trace`.
    """
    source = sender(lab, Request(wait.source, "", wait.namespace))
    family = _family(lab, wait)
    datagrams_but = lab.overlay.port if _UDP_WORD.search(wait.filter) else None
    chosen = _chosen(wait.filter, family, datagrams_but)
    anything = _anything(lab, source, family)
    require_namespaces(lab, anything)
    with namespaces.entered(source.namespace):
        tap = Tap(Filter(pcap(family, datagrams_but), WHOLE).program, _BUFFER)
    try:
        before = Sent(wait.lost)
        with WideWatch(lab, anything, family, datagrams_but) as watch:
            tap.forget()
            armed(source)
            frame, ip = _await(tap, chosen, before, wait, watch)
            mark = mark_of(ip)
            sent = watch.sent_as(flow_of(ip), source)
            watch.adopt(decided := _decided(lab, wait, sent, mark.protocol, watch), mark)
            answer = answer_of(tap, watch, mark, frame, ip, sent.source, lab.overlay.port)
            followed = follow(lab, decided, answer, watch)
    finally:
        tap.close()
    if recorded is not None:
        recorded += map(Recorded, followed.observed.sightings, watch.frames)
    return tell(declared or lab, followed, watch)


class WideWatch(Watch):
    """Witnesses of every packet that might be the one; after `adopt` of the one."""

    def __init__(
        self,
        lab: Lab,
        aim: Aim,
        family: Family,
        datagrams_but: int | None = None,
        sources: Sequence[Place] = (),
    ) -> None:
        """`sources`: who else may be the sender, beside the source of the aim."""
        nodes = [place_of_node(lab, node) for node in lab.nodes]
        senders = (aim.source, *sources, *nodes)
        known = dict.fromkeys(end for place in senders for end in place.addresses)
        ends = tuple(end for end in known if family_of(end) is family)
        nothing = Openings("tcp", b"", family, ends=ends, datagrams_but=datagrams_but)
        datagrams = datagrams_but is not None
        super().__init__(lab, aim, nothing)
        port = lab.overlay.port
        words = watched_words(nothing, self._cookie)
        canaries = [
            pcap_word(each, offset, word)
            for each in (IPV4, IPV6)
            for offset, word in words
            if offset == each.header + 8
        ]
        text = " or ".join(
            f"({each})"
            for each in (
                pcap(family, datagrams_but),
                pcap_tunnelled(family, port, datagrams),
                *canaries,
            )
        )
        self._packets = Packets(nothing, port, Filter(text, WHOLE).program)
        flying = [pattern_of_word(offset, word) for offset, word in words]
        self._kernel = Kernel(nothing, port, [*patterns(family, port, datagrams), *flying])
        self._witnesses = [
            self._packets,
            self._rules,
            self._legacy_rules,
            self._connections,
            self._kernel,
            self.decisions,
        ]

    def __enter__(self) -> WideWatch:
        # There is time: nothing need be done beside the arming, and who was slow may try again.
        dissect.load()
        super().__enter__()
        for number in _MORE_CANARIES:
            if not self.blind:
                break
            self.blind = canary.fly(
                self._aim.places, self._witnesses, self._family, self._cookie, number
            )
        self.adopt(self.aim, Openings("tcp", b"", self._family, everything=True))
        return self

    @property
    def aim(self) -> Aim:
        """What is watched for."""
        return self._aim

    def age(self) -> None:
        """Drop what was seen before the last call."""
        for witness in (
            self._packets,
            self._rules,
            self._legacy_rules,
            self._connections,
            self._kernel,
        ):
            witness.age()

    def sent_as(self, flow: Tuple, source: Place) -> Tuple:
        """What a socket sent that left its source so: a node translates its own before that."""
        for entry in self._connections.events():
            if entry.place == source and entry.reply.reversed == flow:
                return entry.original
        return flow

    def adopt(self, aim: Aim, mark: Mark) -> None:
        """What bears this mark, now and before, is the probe."""
        self._aim = aim
        for witness in (self._packets, self._rules, self._legacy_rules, self._kernel):
            witness.adopt(mark)

    def observed(self, answer: Answer, is_last: bool = True) -> Observed:
        found = super().observed(answer, is_last)
        runs = [run for run in found.runs if run.ours or _explained(run, found.sightings)]
        return replace(found, runs=runs)


def _explained(run: Run, sightings: Sequence[Sighting]) -> bool:
    """Whether a packet whose mark is not in what the rules witness sees was seen on a device."""
    for each in sightings:
        outer = each.packet.outer
        if run.outer and outer:
            if (outer.id, outer.sport, outer.src) == (
                run.ip_id,
                run.flow.source.port,
                run.flow.source.ip,
            ):
                return True
        elif run.quoted and each.role == "error" and each.packet.flow == run.flow:
            return True
    return False


def _await(
    tap: Tap, chosen: Filter, before: Sent, wait: Wait, watch: WideWatch
) -> tuple[Frame, Network]:
    """The packet, once it leaves the source.

    Whatever happened to a packet is forgotten at the second :meth:`age` after it at the
    earliest, and its frame at the source is read before that.
    """
    poll = select.poll()
    poll.register(tap, select.POLLIN)
    addresses = watch.aim.source.addresses
    end = None if wait.wait_s is None else time.monotonic() + wait.wait_s
    forget = time.monotonic() + _FORGET_S
    while end is None or time.monotonic() < end:
        poll.poll(_FORGET_S * 1000)
        while frame := tap.read():
            ether = ethernet(frame.data)
            ip = network(ether) if ether else None
            if frame.direction == "in" and ip:
                before.answered(ip)
            if frame.direction != "out" or not chosen.matches(frame.data):
                continue
            ours = ip and ip.source in addresses and is_whole(ip)
            if ip and ours and before.is_chosen(frame, ip):
                return frame, ip
        if time.monotonic() >= forget:
            watch.age()
            forget = time.monotonic() + _FORGET_S
    raise _none_came(watch.aim.source, wait)


def _none_came(source: Place, wait: Wait) -> NetlabError:
    which = f' that "{wait.filter}" holds for' if wait.filter else ""
    datagrams = bool(_UDP_WORD.search(wait.filter))
    if wait.lost:
        words = ["no SYN again", "no ping", *(["no datagram"] if datagrams else [])]
        what = f"sent {' and '.join(words)} after one without an answer{which}"
    else:
        what = f"opened no TCP connection and sent no ping{' or datagram' * datagrams}{which}"
    return NetlabError(
        Problem(
            "no-packet",
            f"{source} {what} in {wait.wait_s:g} s",
            hint=f"`netlab capture {source.name}` shows what it sends",
        ),
        Exit.UNOBSERVED,
    )


def _chosen(text: str, family: Family, datagrams_but: int | None) -> Filter:
    opening = pcap_opening(family, datagrams_but)
    if not text:
        return Filter(opening, WHOLE)
    Filter(text, WHOLE)  # what is wrong with it is said of it alone
    return Filter(f"({text}) and {opening}", WHOLE)


def _family(lab: Lab, wait: Wait) -> Family:
    family = {4: IPV4, 6: IPV6}[wait.family] if wait.family else family_of(lab.pod_cidr)
    if family.name not in lab.families:
        message = f"lab {lab.name} has no {family.name}"
        raise NetlabError(Problem("other-family", message))
    return family


def mark_of(ip: Network) -> Mark:
    """What a packet of somebody else's will be known by."""
    if ip.protocol == TCP:
        return Mark("tcp", ip.body[4:8], ip.family)
    payload = ip.body[8:]
    if ip.protocol != UDP:
        return Mark("icmp", payload[:COOKIE_BYTES], ip.family)
    if ip.ports and ip.ports[1] == _DNS and payload[4:6] == _ONE_QUESTION:
        question = payload[_DNS_HEADER : _DNS_HEADER + QUESTION_BYTES]
        return Mark("udp", payload[:2], ip.family, question)
    return Mark("udp", payload[:COOKIE_BYTES], ip.family)


def is_whole(ip: Network) -> bool:
    """Whether a packet has what it is to be known by."""
    return ip.has_transport and len(ip.body) >= (20 if ip.protocol == TCP else 8 + COOKIE_BYTES)


def _anything(lab: Lab, source: Place, family: Family) -> Aim:
    """Whatever a source may send: all of the lab is on its way, of many pods the first."""
    places = [each.place for each in everything(lab) if each.place != source]
    pods = [place for place in places if place.kind == "pod"]
    unwatched = set(pods[MOST_PODS:])
    watched = (source, *(place for place in places if place not in unwatched))
    return Aim(source, None, family.unspecified, None, "tcp", watched, len(unwatched))


def flow_of(ip: Network) -> Tuple:
    """The ends of a packet."""
    source, destination = ip.ports or (None, None)
    return Tuple(
        source=Socket(ip=ip.source, port=source),
        destination=Socket(ip=ip.destination, port=destination),
    )


def _decided(lab: Lab, wait: Wait, sent: Tuple, protocol: ProbeProtocol, watch: WideWatch) -> Aim:
    """What a probe of ours to the same destination would be, with what is watched."""
    end = sent.destination
    decided = aim(lab, Request(wait.source, str(end), wait.namespace, protocol))
    port = "" if end.port is None else f":{end.port}"
    to = f"svc/{decided.service}{port}" if decided.service else str(end)
    return replace(decided, places=watch.aim.places, unwatched=watch.aim.unwatched, to=to)


def answer_of(
    tap: Tap,
    watch: WideWatch,
    mark: Mark,
    frame: Frame,
    ip: Network,
    source: Socket,
    vxlan_port: int,
) -> Answer:
    """What comes back to the source; of a datagram it is whatever comes from where it went."""
    poll = select.poll()
    for descriptor in (tap.fileno(), *watch.descriptors):
        poll.register(descriptor, select.POLLIN)
    end = time.monotonic() + DEFAULT_TIMEOUT_S
    while (left := end - time.monotonic()) > 0:
        poll.poll(left * 1000)
        while back := tap.read():
            if back.direction != "in":
                continue
            seen = dissect.dissect(back.data, mark, vxlan_port)
            outcome = _OUTCOMES.get(seen.role) if seen else None
            if mark.protocol == "udp" and is_back(back, ip):
                outcome = "answered"
            if outcome:
                return Answer(source, outcome, (back.t_ns - frame.t_ns) // 1000)
        if watch.dropped():
            end = min(end, time.monotonic() + _GRACE_S)
    elapsed_us = (time.time_ns() - frame.t_ns) // 1000
    return Answer(source, "no-answer", elapsed_us)
