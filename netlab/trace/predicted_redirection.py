"""What becomes of a new connection in userspace mode, by its semantics and not by its rules.

A node turns it to a port of its own, whichever that is, and a proxy opens another connection from
there, so that two ways are predicted.  Written from what kube-proxy v1.25 did
(pkg/proxy/userspace), as :mod:`predicted_services` is.
"""

from __future__ import annotations

from msgspec.structs import replace

from netlab.topology.model import Endpoint
from netlab.trace.declared_network import BRIDGE
from netlab.trace.model import PredictedWay, Translation
from netlab.trace.model_steps import Socket
from netlab.trace.predicted_services import Hook, Packet, Proxy, Refusal
from netlab.trace.predicted_services import Translation as Offer
from netlab.trace.proxies import Proxy as Program


class RedirectingProxy(Proxy):
    """The proxy of one node in userspace mode, for one family."""

    def before(self, packet: Packet) -> Refusal | None:
        """Nothing is refused."""
        return None

    def translate(self, packet: Packet) -> Offer | None:
        """To the node's own address, or the first of the device that it came by; port 0 is any."""
        for hit in self._hits(packet):
            if hit.port.protocol == "SCTP":
                continue
            is_own = self._network.is_local(self._place, packet.destination.ip)
            # externalIPs are for what comes from outside
            if hit.kind == "external" and packet.device in (None, BRIDGE) and not is_own:
                continue
            address = self._own_address(packet.device)
            end = Endpoint(address=address, port=0, node=self._node.name)
            return Offer(service=hit.service.key, endpoints=(end,), always=False)
        return None

    def after(self, packet: Packet, hook: Hook) -> Refusal | None:
        """What is for no Service goes its way."""
        return None

    def _own_address(self, device: str | None) -> str:
        if device:
            return self._network.address_on(self._place, device)
        is_six = self._network.family.bits == 128
        return next(ip for ip in self._node.addresses if (":" in ip) is is_six)

    def _takes_node_ports(self, address: str) -> bool:
        return self._network.is_local(self._place, address)


def joined(first: PredictedWay, second: PredictedWay, proxy: Program, to: Socket) -> PredictedWay:
    """One way of both: what becomes of it is what becomes of the second."""
    taken = first.delivered_to
    if taken is None:
        return first
    by_proxy = Translation(
        kind="proxy",
        node=proxy.place.node,
        before=Socket(ip=taken.ip, port=taken.port),
        after=to,
        rule=f"{proxy} for {proxy.serves}",
    )
    return replace(
        first,
        disposition=second.disposition,
        reason=second.reason,
        limited=second.limited,
        reason_unsaid=second.reason_unsaid,
        where=second.where,
        delivered_to=second.delivered_to,
        seen_source=second.seen_source,
        translations=[*first.translations, by_proxy, *second.translations],
        connections=[second],
    )


def closed(first: PredictedWay, proxy: Program) -> PredictedWay:
    """A connection that a proxy takes and has nobody for: over TCP it is closed."""
    is_stream = proxy.name != "nginx"
    return replace(
        first,
        disposition="rejected" if is_stream else "dropped",
        reason="no-endpoints",
        where=str(proxy.place),
        delivered_to=None,
        seen_source=None,
        reply=first.reply if is_stream else [],
        connections=[],
    )
