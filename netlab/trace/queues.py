"""The queues that a device sends from.

Source: struct tcmsg, uapi/linux/rtnetlink.h.
"""

from __future__ import annotations

import struct

from netlab.kernel.namespaces import entered
from netlab.kernel.netlink import NetlinkError, Socket, attributes
from netlab.trace.case import Case
from netlab.trace.place import Place

_RTM_GETQDISC = 38
_TCMSG = struct.Struct("=BxxxiIII")
_TCA_KIND = 1


def queues(case: Case, place: Place, device: str) -> list[str]:
    """Kinds of the queues of a device, "netem"; none if it is gone or does not tell."""
    link = case.tables.link(place, device)
    if link is None:
        return []
    try:
        with entered(place.namespace), Socket() as channel:
            told = channel.dump(_RTM_GETQDISC, _TCMSG.pack(0, link.index, 0, 0, 0))
    except NetlinkError:
        return []
    return [
        attributes(body, _TCMSG.size)[_TCA_KIND].rstrip(b"\0").decode()
        for body in told
        if _TCMSG.unpack_from(body)[1] == link.index
    ]
