"""Canaries: known datagrams that every witness must see, or nothing was observed.

Each watched namespace sends one to itself over `lo`, before the probe and after it.  Where IPv6 is
switched off it is one of IPv4, for the witnesses that see packets of either.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable, Sequence

import msgspec

from netlab.kernel.namespaces import entered
from netlab.trace.family import IPV4, Family
from netlab.trace.model_steps import Socket
from netlab.trace.place import Place
from netlab.trace.witnesses import Canary, Witness

COOKIE_BYTES = 8
# Delivery over `lo` is done when sendto returns; what may take longer is the kernel's beginning to
# stamp packets, and what init passes on, where the machine has much to do.
_PATIENCE_S = 2.0
_PAUSE_S = 0.0005
_ETH_P_IP = 0x0800
_DISCARD = 9  # a port that nobody has to have
# Canaries are told apart by a byte.  The last one is sent after the probe.
LAST = 255
_AT_ONCE, _STAMPS_PAUSE_S = 30, 0.002


class Blind(msgspec.Struct, frozen=True):
    """A witness that did not see the canary of a place."""

    witness: str
    place: Place

    def __str__(self) -> str:
        return f"the {self.witness} witness did not see its canary in {self.place}"


def new_cookie() -> bytes:
    """What all canaries of one trace begin with."""
    return os.urandom(COOKIE_BYTES)


def fly(
    places: Sequence[Place],
    witnesses: Sequence[Witness],
    family: Family,
    cookie: bytes,
    number: int,
) -> list[Blind]:
    """Send canary `number` in every place; who has not seen his."""
    waiting = [
        (witness, canary)
        for canary in [_send(place, family, cookie, number) for place in places]
        for witness in witnesses
    ]
    deadline = time.monotonic() + _PATIENCE_S
    while waiting := [(witness, canary) for witness, canary in waiting if not witness.saw(canary)]:
        if time.monotonic() > deadline:
            break
        time.sleep(_PAUSE_S)
    return [Blind(witness.name, canary.place) for witness, canary in waiting]


def fly_until_stamped(
    places: Sequence[Place],
    witnesses: Sequence[Witness],
    stamping: Callable[[], bool],
    family: Family,
    cookie: bytes,
) -> list[Blind]:
    """Send canaries in every place until the kernel stamps arrivals; who has not seen his.

    It begins to from a work queue, some milliseconds after it is asked to; on a machine that has
    much to do it takes longer.
    """
    blind: list[Blind] = []
    for number in range(LAST):
        blind = fly(places, witnesses, family, cookie, number)
        if blind or stamping():
            break
        if number >= _AT_ONCE:
            time.sleep(_STAMPS_PAUSE_S)
    return blind


def _send(place: Place, family: Family, cookie: bytes, number: int) -> Canary:
    payload = cookie + bytes([number])
    try:
        with entered(place.namespace):
            port = _send_here(family, payload)
    except PermissionError:
        # Netfilter refuses what is sent there: by a rule, or for want of room for a connection.
        family = IPV4
        with entered(place.namespace):
            port = _send_below_netfilter(payload)
        return Canary(place, payload, Socket(ip=family.loopback, port=port), refused=True)
    except OSError:
        if family is IPV4:
            raise
        return _send(place, IPV4, cookie, number)
    return Canary(place, payload, Socket(ip=family.loopback, port=port))


def _send_here(family: Family, payload: bytes) -> int:
    with socket.socket(family.address_family, socket.SOCK_DGRAM) as bird:
        bird.bind((family.loopback, 0))
        port: int = bird.getsockname()[1]
        bird.sendto(payload, (family.loopback, port))
        return port


def _send_below_netfilter(payload: bytes) -> int:
    """Put the same datagram on the loopback device itself."""
    address = socket.inet_aton(IPV4.loopback)
    length = 8 + len(payload)
    before, after = struct.pack("!BBHHHBB", 0x45, 0, 20 + length, 0, 0, 64, 17), address * 2
    total = sum(struct.unpack("!9H", before + after))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    # Of UDP the checksum may be left out.
    datagram = struct.pack("!4H", _DISCARD, _DISCARD, length, 0) + payload
    with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0) as bird:
        frame = before + struct.pack("!H", total ^ 0xFFFF) + after + datagram
        bird.sendto(frame, ("lo", _ETH_P_IP))
    return _DISCARD
