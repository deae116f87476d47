"""Packets that an earlier one had no answer before: those that somebody misses an answer to.

Of a TCP connection that is not answered the same SYN is sent again.  Who sends datagrams or pings
sends another one in the same conversation.
"""

from __future__ import annotations

from typing import Any

from netlab.capture.headers import TCP, Ethernet, Network, ethernet, network
from netlab.kernel.packet_sockets import Frame
from netlab.trace.family import IPV4

# Conversations that were seen to begin, and are remembered.
_MOST_BEGUN = 4096
# After that somebody who sends more waits no longer for the answer to what was sent before.
_UNANSWERED_NS = 200_000_000
_IPV4_TYPE, _IPV6_TYPE = 0x0800, 0x86DD

_Ends = tuple[str, str, tuple[int, int] | None, int]


def _ends(ip: Network) -> _Ends:
    """What the packets of one direction of a conversation share."""
    return ip.source, ip.destination, ip.ports, ip.protocol


def _back(ends: _Ends) -> _Ends:
    source, destination, ports, protocol = ends
    return destination, source, ports and (ports[1], ports[0]), protocol


def is_back(frame: Frame, sent: Network) -> bool:
    """Whether a frame comes from where a packet was sent to, to who had sent it."""
    ether = ethernet(frame.data)
    ip = network(ether) if ether else None
    return ip is not None and _ends(ip) == _back(_ends(sent))


class Sent:
    """What was sent before and not answered: of TCP it is sent again, of others something more."""

    def __init__(self, wanted: bool) -> None:
        self._wanted = wanted
        self._begun: dict[tuple[str, str, bytes], None] = {}
        self._waiting: dict[_Ends, int] = {}

    def is_chosen(self, frame: Frame, ip: Network) -> bool:
        """Whether this is the packet: any, or one that an earlier one had no answer before."""
        if not self._wanted:
            return True
        if ip.protocol != TCP:
            since = self._waiting.setdefault(_ends(ip), frame.t_ns)
            _limit(self._waiting)
            return frame.t_ns - since >= _UNANSWERED_NS
        key = frame.device, f"{ip.source} {ip.destination}", ip.body[:8]
        if key in self._begun:
            return True
        self._begun[key] = None
        _limit(self._begun)
        return False

    def answered(self, ip: Network) -> None:
        """Take note of what came in: an answer, or an error that tells what became of it."""
        if not self._wanted or not self._waiting:
            return
        self._waiting.pop(_back(_ends(ip)), None)
        if ip.protocol == ip.family.icmp_number and len(ip.body) > 8:
            kind = _IPV4_TYPE if ip.family is IPV4 else _IPV6_TYPE
            quoted = network(Ethernet("", "", kind, ip.body[8:]))
            if quoted:
                self._waiting.pop(_ends(quoted), None)


def _limit(known: dict[Any, Any]) -> None:
    if len(known) > _MOST_BEGUN:
        del known[next(iter(known))]
