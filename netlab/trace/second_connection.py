"""A probe that a proxy takes, and the connection that the proxy opens for it: one path of two.

What the proxy sends is known by nothing of the probe's but, over UDP, by the payload that it passes
on.  So over TCP it is the next connection that the proxy opens to one of its backends once the
probe's has come to it: every packet that opens one is watched until then, as when a pod's next
connection is waited for (`waiting`).  Others that use the same proxy in that very moment may be
taken for the probe.  Over UDP the witnesses see both, and the ends of the packets tell them apart.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from ipaddress import ip_address

import msgspec
from msgspec.structs import replace

from netlab.capture.headers import Network, ethernet, network
from netlab.kernel import namespaces
from netlab.kernel.packet_sockets import WHOLE, Frame, Tap
from netlab.kernel.pcap_filter import Filter
from netlab.topology.model import Lab
from netlab.trace import probe
from netlab.trace.aim import Aim, Request
from netlab.trace.correlate import Observed
from netlab.trace.family import Family
from netlab.trace.model import Loss, Receiver, Trace, Translation
from netlab.trace.model_steps import Socket, Tuple
from netlab.trace.openings import pcap
from netlab.trace.path import Tables
from netlab.trace.place import Place
from netlab.trace.predicted_redirection import closed
from netlab.trace.predicted_redirection import joined as as_one
from netlab.trace.prediction import with_way
from netlab.trace.probe import Answer
from netlab.trace.proxies import Proxy, second_aim
from netlab.trace.run import Followed, Recorded, follow, require_namespaces, tell, understand
from netlab.trace.waiting import WideWatch, answer_of, flow_of, is_whole, mark_of
from netlab.trace.watch import Watch
from netlab.trace.witnesses.packets import Sighting

_BUFFER = 4 << 20
_SYN_SENT = "02"
# A proxy that is asked opens its connection in a millisecond or so; a busy machine takes longer.
_PATIENCE_S = 0.8


class _Opening(msgspec.Struct, frozen=True):
    """The first packet of a proxy's own connection, as it left the proxy's namespace."""

    proxy: Proxy
    frame: Frame
    ip: Network


def through(
    lab: Lab,
    request: Request,
    decided: Aim,
    behind: Sequence[Proxy],
    recorded: list[Recorded] | None,
    declared: Lab,
) -> tuple[Trace, Observed]:
    """A trace by one of these proxies, with what was seen of both connections; see `run.traced`."""
    places = dict.fromkeys((*decided.places, *_places(lab, decided, behind)))
    decided = replace(decided, places=tuple(places))
    require_namespaces(lab, decided)
    of_protocol = _streams if decided.protocol == "tcp" else _datagrams
    return of_protocol(lab, request, decided, behind, recorded, declared)


def _places(lab: Lab, decided: Aim, behind: Sequence[Proxy]) -> Iterator[Place]:
    """Where both connections may pass: what a probe from each proxy to each backend may."""
    for proxy in behind:
        yield proxy.place
        for address, port in proxy.backends:
            yield from second_aim(
                lab, proxy, Socket(ip=address, port=port), decided.protocol
            ).places


# --- over TCP ------------------------------------------------------------------------------------


def _streams(
    lab: Lab,
    request: Request,
    decided: Aim,
    behind: Sequence[Proxy],
    recorded: list[Recorded] | None,
    declared: Lab,
) -> tuple[Trace, Observed]:
    with contextlib.ExitStack() as stack:
        taps = {proxy: _tap(stack, proxy, decided.family) for proxy in behind}
        first_of = behind[0].place
        others = [place for place in decided.places if place != first_of]
        anything = Aim(first_of, None, decided.family.unspecified, None, "tcp", (first_of, *others))
        senders = [proxy.place for proxy in behind]
        wide = stack.enter_context(WideWatch(lab, anything, decided.family, sources=senders))
        watch = stack.enter_context(Watch(lab, decided, mark := probe.new_mark(decided)))
        for tap in taps.values():
            tap.forget()
        seen: list[tuple[_Opening, Followed]] = []
        waiting: dict[Proxy, list[Socket]] = {}

        def await_second(connection: socket.socket) -> None:
            if opening := _opening(taps, connection):
                second = _follow(lab, decided, opening, taps[opening.proxy], wide)
                seen.append((opening, second))
            else:
                waiting.update({each: _opening_sockets(each.place, each.backends) for each in taps})

        answer = probe.send(decided, mark, request.timeout_s, watch, await_second)
        first = follow(lab, decided, answer, watch)
        found = tell(declared, first, watch)
        if recorded is not None:
            recorded += map(Recorded, first.observed.sightings, watch.frames)
        if not seen:
            held = _held_back(found, waiting, watch.decisions)
            return without_second(found, behind, held), first.observed
        (opening, second) = seen[0]
        told = tell(declared, second, wide)
        if recorded is not None:
            recorded += map(Recorded, second.observed.sightings, wide.frames)
            recorded.sort(key=lambda each: each.sighting.t_ns)
    return joined(found, told, opening.proxy), _both(first.observed, second.observed)


def _tap(stack: contextlib.ExitStack, proxy: Proxy, family: Family) -> Tap:
    with namespaces.entered(proxy.place.namespace):
        tap = Tap(Filter(pcap(family), WHOLE).program, _BUFFER)
    stack.callback(tap.close)
    return tap


def _opening(taps: Mapping[Proxy, Tap], connection: socket.socket) -> _Opening | None:
    """The connection that a proxy opens; None if it closes the probe's, or does nothing."""
    poll = select.poll()
    for tap in taps.values():
        poll.register(tap, select.POLLIN)
    poll.register(connection, select.POLLIN | select.POLLRDHUP)
    end = time.monotonic() + _PATIENCE_S
    while (left := end - time.monotonic()) > 0:
        events = poll.poll(left * 1000)
        for proxy, tap in taps.items():
            while frame := tap.read():
                if opening := _chosen(proxy, frame):
                    return opening
        # (Whatever it opened before it said something here was read before.)
        if any(descriptor == connection.fileno() for descriptor, _ in events):
            return None
    return None


def _held_back(
    first: Trace, waiting: Mapping[Proxy, Sequence[Socket]], tables: Tables
) -> tuple[str, str] | None:
    """Why a connection that the proxy opens has sent nothing, as a code and in words.

    None if there is none: the kernel holds a SYN while nobody tells the next hop's MAC.
    """
    taken = first.delivered_to
    for proxy, sockets in waiting.items():
        if taken is None or not _is_at(taken, proxy.place):
            continue
        for to in sockets:
            way = tables.route(proxy.place, to.ip)
            hop = (way.via or to.ip) if way else to.ip
            known = tables.neighbour(proxy.place, hop, way.device) if way and way.device else None
            words = f"opens one to {to}, whose first packet has not left {proxy.place}"
            if known and not known.mac:
                return "neighbour-unresolved", f"{words}: nobody there tells the MAC of {hop}"
            return "not-passed-on", words
    return None


def _opening_sockets(place: Place, ends: Sequence[tuple[str, int]]) -> list[Socket]:
    """Those of the ends that a socket of a place has no answer from (proc(5), net/tcp)."""
    name = "tcp6" if any(":" in ip for ip, _ in ends) else "tcp"
    with namespaces.entered(place.namespace), open(f"/proc/thread-self/net/{name}") as table:
        rows = [line.split() for line in table.readlines()[1:]]
    found = []
    for row in rows:
        if row[3] == _SYN_SENT:
            address, _, port = row[2].partition(":")
            words = (bytes.fromhex(address[at : at + 8])[::-1] for at in range(0, len(address), 8))
            found.append(Socket(ip=str(ip_address(b"".join(words))), port=int(port, 16)))
    return [each for each in found if (each.ip, each.port) in ends]


def _chosen(proxy: Proxy, frame: Frame) -> _Opening | None:
    ether = ethernet(frame.data)
    ip = network(ether) if ether else None
    if frame.direction != "out" or ip is None or not is_whole(ip) or not ip.ports:
        return None
    to = (ip.destination, ip.ports[1])
    is_opening = ip.protocol == socket.IPPROTO_TCP and ip.body[13] & 0x12 == 0x02
    return _Opening(proxy, frame, ip) if is_opening and to in proxy.backends else None


def _follow(lab: Lab, decided: Aim, opening: _Opening, tap: Tap, wide: WideWatch) -> Followed:
    place = opening.proxy.place
    sent = wide.sent_as(flow_of(opening.ip), place)
    own = second_aim(lab, opening.proxy, sent.destination, decided.protocol)
    own = replace(own, places=(place, *(each for each in wide.aim.places if each != place)))
    wide.adopt(own, mark := mark_of(opening.ip))
    answer = answer_of(tap, wide, mark, opening.frame, opening.ip, sent.source, lab.overlay.port)
    return follow(lab, own, answer, wide)


# --- over UDP ------------------------------------------------------------------------------------


def _datagrams(
    lab: Lab,
    request: Request,
    decided: Aim,
    behind: Sequence[Proxy],
    recorded: list[Recorded] | None,
    declared: Lab,
) -> tuple[Trace, Observed]:
    with Watch(lab, decided, mark := probe.new_mark(decided)) as watch:
        answer = probe.send(decided, mark, request.timeout_s, watch)
        observed = watch.observed(answer)
        if recorded is not None:
            recorded += map(Recorded, observed.sightings, watch.frames)
        ends = {Socket(ip=ip, port=port) for proxy in behind for ip, port in proxy.backends}
        one, other = _split(observed, ends)
        first = understand(lab, decided, answer, one, watch.decisions)
        found = tell(declared, first, watch)
        opened = next((each for each in other.sightings if each.role == "probe"), None)
        proxy = next((each for each in behind if opened and each.place == opened.place), None)
        if opened is None or proxy is None:
            return without_second(found, behind), observed
        sent = _sent(opened, observed)
        own = second_aim(lab, proxy, sent.destination, decided.protocol)
        own = replace(own, places=decided.places, size=decided.size)
        back = [
            each.t_ns
            for each in other.sightings
            if each.role == "answer" and each.place == proxy.place and each.direction == "in"
        ]
        elapsed_us = ((back[-1] if back else other.sightings[-1].t_ns) - opened.t_ns) // 1000
        answer = Answer(sent.source, "answered" if back else "no-answer", elapsed_us)
        second = understand(lab, own, answer, replace(other, sent=sent), watch.decisions)
        told = tell(declared, second, watch)
    return joined(found, told, proxy), observed


def _split(observed: Observed, ends: set[Socket]) -> tuple[Observed, Observed]:
    """What was seen of the probe's connection, and of the one that has one of these ends."""
    client = observed.sent.source

    def is_second(flow: Tuple) -> bool:
        return client not in (flow.source, flow.destination) and bool(
            ends & {flow.source, flow.destination}
        )

    def flow_seen(sighting: Sighting) -> Tuple:
        return sighting.packet.quotes or sighting.packet.flow

    def part(second: bool) -> Observed:
        sightings = [each for each in observed.sightings if is_second(flow_seen(each)) is second]
        return replace(
            observed,
            sightings=sightings,
            runs=[run for run in observed.runs if run.outer or is_second(run.flow) is second],
            entries=[each for each in observed.entries if is_second(each.original) is second],
            moments=[
                each
                for each in observed.moments
                if each.packet is None or is_second(each.packet.flow) is second
            ],
        )

    return part(False), part(True)


def _sent(opened: Sighting, observed: Observed) -> Tuple:
    """What the proxy's socket sent: its node may have translated it before the first device."""
    for entry in observed.entries:
        if entry.place == opened.place and entry.reply.reversed == opened.packet.flow:
            return entry.original
    return opened.packet.flow


# --- both as one ---------------------------------------------------------------------------------


def joined(first: Trace, second: Trace, proxy: Proxy) -> Trace:
    """The trace of a probe, with the connection that a proxy opened for it.

    What became of it is what became of the second where that was lost; the translations are those
    of both, with the proxy's between them.
    """
    ended = first.forward[-1].packet.flow if first.forward else None
    taken = first.delivered_to
    before = Socket(ip=taken.ip, port=taken.port) if taken else ended and ended.destination
    lost = second if not second.delivered else first
    foreseen = first.prediction
    if foreseen and second.prediction:
        differs = [*foreseen.differs, *second.prediction.differs]
        way = as_one(foreseen, second.prediction, proxy, second.probe.destination)
        foreseen = replace(with_way(foreseen, way), differs=list(dict.fromkeys(differs)))
    return replace(
        first,
        prediction=foreseen,
        disposition=lost.disposition,
        drop=lost.drop,
        delivered_to=second.delivered_to,
        seen_source=second.seen_source,
        translations=[
            *first.translations,
            Translation(
                kind="proxy",
                node=proxy.place.node,
                before=before or first.probe.destination,
                after=second.probe.destination,
                rule=f"{proxy} for {proxy.serves}",
            ),
            *second.translations,
        ],
        connections=[second],
    )


def without_second(
    first: Trace, behind: Sequence[Proxy], held: tuple[str, str] | None = None
) -> Trace:
    """The trace of a probe for which no proxy opened a connection, if one has taken it.

    `held` is why one that it opens has sent nothing, as a code and in words.
    """
    taken = first.delivered_to
    proxy = next((each for each in behind if taken and _is_at(taken, each.place)), None)
    answered = first.delivered and first.probe.protocol == "udp"  # by whom nobody saw
    if proxy is None or proxy.needs_request or answered:
        return replace(first, connections=[])
    reason = held[0] if held else "not-passed-on" if proxy.backends else "no-endpoints"
    words = (
        held[1]
        if held
        else f"has opened no connection for it, though {proxy.serves} has ready endpoints"
        if proxy.backends
        else f"took it and closed it again, for {proxy.serves} has no ready endpoint"
    )
    foreseen = first.prediction
    if foreseen and not proxy.backends:
        foreseen = with_way(foreseen, closed(foreseen, proxy))
    fix = None if proxy.backends else f"`netlab describe {proxy.serves}` says why it has none"
    return replace(
        first,
        prediction=foreseen,
        disposition="dropped" if held else "rejected" if first.delivered else first.disposition,
        delivered_to=None,
        seen_source=None,
        drop=Loss(
            direction="forward",
            node=proxy.place.node,
            device=None,
            reason=reason,
            where=str(proxy.place),
            rule=None,
            evidence=[f"the probe came to port {taken.port} of {proxy.place}"] if taken else [],
            explanation=f"{proxy} {words}",
            fix=fix,
        ),
        connections=[],
    )


def _is_at(taken: Receiver, place: Place) -> bool:
    return (taken.kind, taken.name) == (place.kind, place.name)


def _both(first: Observed, second: Observed) -> Observed:
    return replace(
        first,
        sightings=[*first.sightings, *second.sightings],
        runs=[*first.runs, *second.runs],
        entries=[*first.entries, *second.entries],
    )
