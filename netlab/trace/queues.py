"""Queues that lose what a device is to send, as netem does when it is told to."""

from __future__ import annotations

from netlab.kernel import rtnetlink
from netlab.kernel.namespaces import entered
from netlab.kernel.netlink import NetlinkError, Socket
from netlab.kernel.observe import links_there
from netlab.trace.place import Place


def lossy_devices(place: Place) -> list[str]:
    """Devices of a namespace that send by a queue of netem; none if it does not tell."""
    try:
        with entered(place.namespace), Socket() as channel:
            lossy = rtnetlink.lossy_links(channel)
            return [name for name, index in links_there(channel).items() if index in lossy]
    except (NetlinkError, OSError):
        return []
