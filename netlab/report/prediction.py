"""A prediction as a trace would be told: the same tree, then who would see what.

The ways by other endpoints of a Service are told in a line; `-o json` has them all.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from netlab.report.terminal import leg
from netlab.trace.family import family_of
from netlab.trace.model import Foretold, Hop, PredictedHop, PredictedWay, Prediction, Probe
from netlab.trace.model_steps import Outer, Packet

if TYPE_CHECKING:
    from rich.console import Console

_SHOWN = 8  # other endpoints
_ANY = "…"  # an address that is not predicted


def print_foretold(foretold: Foretold, console: Console) -> None:
    """Print what should become of a probe."""
    from rich.text import Text

    probe, way = foretold.probe, foretold.prediction
    console.print(Text(_headline(probe, way), style="bold"))
    if way.forward:
        there = [_as_hop(hop, probe.protocol, "S") for hop in way.forward]
        console.print()
        console.print(leg("there", f"{probe.source} → {probe.destination}", there))
    if way.reply:
        first = way.reply[0]
        icmp = family_of(first.destination.ip).icmp
        protocol = probe.protocol if first.source.ip else icmp
        back = [_as_hop(hop, protocol, "SA" if way.delivered_to else "RA") for hop in way.reply]
        source = first.source if first.source.ip else _ANY
        console.print()
        console.print(leg("back", f"{source} → {first.destination}", back))
    console.print()
    for line in _ending(way):
        console.print(Text(line))


def _headline(probe: Probe, way: PredictedWay) -> str:
    should = f"should be {way.disposition}: {probe.from_} → {probe.to}"
    if way.disposition == "delivered" and way.delivered_to:
        return f"{should}, to {way.delivered_to}"
    return f"{should} at {way.where}, {(way.reason or '').replace('-', ' ')}"


def _ending(prediction: Prediction) -> Iterable[str]:
    if prediction.seen_source:
        how = [each.kind for each in prediction.translations if each.kind != "dnat"]
        by = f" ({how[-1]})" if how else ", its true source"
        who = prediction.delivered_to
        yield f"{who and who.kind} {who and who.name} would see {prediction.seen_source}{by}."
    others = [
        f"{end.kind} {end.name} port {end.port} ({way.disposition})"
        for end, way in zip(prediction.endpoints[1:], prediction.others, strict=False)
    ]
    if others:
        left = len(prediction.endpoints) - 1 - _SHOWN
        more = f" and {left} more" if left > 0 else ""
        yield f"Chosen instead may be {', '.join(others[:_SHOWN])}{more}."
    yield "Nothing was sent: this is what follows from the declared lab."


def _as_hop(hop: PredictedHop, protocol: str, flags: str) -> Hop:
    """A hop for the tree, which tells neither times nor lengths."""
    outer = None
    if hop.outer:
        src, dst, vni = hop.outer.src, hop.outer.dst, hop.outer.vni
        outer = Outer(
            src=src,
            dst=dst,
            sport=0,
            dport=0,
            ttl=0,
            length=0,
            id=0,
            vni=vni,
            tunnel=hop.outer.tunnel,
        )
    packet = Packet(
        src=hop.source.ip or _ANY,
        dst=hop.destination.ip,
        sport=hop.source.port,
        dport=hop.destination.port,
        protocol=protocol,
        ttl=0,
        length=0,
        flags=flags if protocol == "tcp" else None,
        outer=outer,
    )
    return Hop(
        node=hop.node,
        namespace=hop.namespace,
        device=hop.device,
        direction=hop.direction,
        t_ns=0,
        packet=packet,
        steps=hop.steps,
    )
