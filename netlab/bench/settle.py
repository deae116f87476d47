"""Wait until the kernel has freed every network namespace that was let go of before.

The kernel frees namespaces in batches on one work queue, in the order in which they were let go.
A marker, a namespace with one end of a veth pair, is let go of and the end that is left behind
vanishes when the marker's batch is worked on: an event, nothing to poll.  The marker may be in the
last real batch, so a second one follows: it can only be in a later batch, which starts when the
one before it is done.
"""

from __future__ import annotations

import os
import socket
import struct
import threading

from netlab.bench import floor

RTM_DELLINK = 17
RTMGRP_LINK = 1


def wait() -> None:
    """Return when all namespaces released before the call are freed. At most 60 s, else OSError."""
    failure: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(2):
                _release_one()
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]


def _release_one() -> None:
    """Make a marker namespace, let go of it, and wait for its link to vanish."""
    marker = floor.unshare_network()
    os.close(floor.unshare_network())
    with floor.route_socket() as channel:
        peer = (
            floor.link_header(up=False)
            + floor.attribute(floor.IFLA_IFNAME, b"marker\0")
            + floor.attribute(floor.IFLA_NET_NS_FD, struct.pack("=i", marker))
        )
        data = floor.attribute(floor.VETH_INFO_PEER | floor.NESTED, peer)
        info = floor.attribute(floor.IFLA_INFO_KIND, b"veth") + floor.attribute(
            floor.IFLA_INFO_DATA | floor.NESTED, data
        )
        floor.send(
            channel,
            [floor.new_link(floor.attribute(floor.IFLA_LINKINFO | floor.NESTED, info), up=False)],
        )
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0) as events:
        events.bind((0, RTMGRP_LINK))
        events.settimeout(60)
        os.close(marker)
        while True:
            (kind,) = struct.unpack_from("=H", events.recv(65536), 4)
            if kind == RTM_DELLINK:
                return
