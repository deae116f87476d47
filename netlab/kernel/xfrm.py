"""IPsec policies (xfrm) of a namespace: which packets are blocked, and which need a key.

Source: linux/xfrm.h (struct xfrm_userpolicy_info).
"""

from __future__ import annotations

import socket
import struct
from ipaddress import ip_address, ip_network
from typing import Literal

import msgspec

from netlab.kernel.namespaces import entered
from netlab.kernel.netlink import Socket

_NETLINK_XFRM = 6
_GET_POLICY = 21
# Selector: destination, source, ports and masks, family, prefix lengths, protocol, device, user.
_SELECTOR = struct.Struct("=16s16sHHHHHBBBxxxiI")
_DIRECTION_AT = _SELECTOR.size + 64 + 32 + 8  # behind life times, priority and index
_BLOCK = 1

Direction = Literal["in", "out", "fwd"]
_DIRECTIONS: dict[int, Direction] = {0: "in", 1: "out", 2: "fwd"}


class Policy(msgspec.Struct, frozen=True):
    """A policy: networks, direction, and whether it blocks; else it may ask for IPsec."""

    source: str
    destination: str
    direction: Direction
    blocks: bool

    def covers(self, source: str, destination: str) -> bool:
        """Whether it is about packets with these addresses."""
        pairs = ((source, self.source), (destination, self.destination))
        return all(ip_address(end) in ip_network(of) for end, of in pairs)

    def __str__(self) -> str:
        return f"src {self.source} dst {self.destination} dir {self.direction}"


def policies(namespace: str | int) -> list[Policy]:
    """Those of a namespace, in the kernel's order.  Raises OSError."""
    with entered(namespace), Socket(_NETLINK_XFRM) as netlink:
        found = (_policy(body) for body in netlink.dump(_GET_POLICY, b""))
        return [policy for policy in found if policy]


def _policy(body: bytes) -> Policy | None:
    to, of, *_, family, to_bits, of_bits, _, _, _ = _SELECTOR.unpack_from(body)
    number, action = body[_DIRECTION_AT : _DIRECTION_AT + 2]
    if family not in (socket.AF_INET, socket.AF_INET6) or number not in _DIRECTIONS:
        return None  # of a socket
    size = 4 if family == socket.AF_INET else 16
    ends = [socket.inet_ntop(family, each[:size]) for each in (of, to)]
    return Policy(
        f"{ends[0]}/{of_bits}", f"{ends[1]}/{to_bits}", _DIRECTIONS[number], action == _BLOCK
    )
