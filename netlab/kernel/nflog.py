"""NFLOG: what a namespace's packet logger tells, through netlink instead of the kernel's log.

x_tables has no trace of its own: of a packet that is marked to be traced, it hands each rule that
matched to the logger of the namespace, `nf_log`, and `nfnetlink_log` sends it to whoever listens
to group 0.  One socket of a namespace can, and while it does, what rules log there (LOG, `log`)
comes to it too.

Only the standard library is used: a lab's init runs this.

Source: net/netfilter/{nf_log,nfnetlink_log}.c, linux/netfilter/nfnetlink_log.h.
"""

from __future__ import annotations

import errno
import os
import socket
import struct

from netlab.kernel.netlink import NLM_F_ACK, NLMSG_ERROR, attribute, message
from netlab.kernel.nfnetlink import Listener, request_body

_CONFIG = 4 << 8 | 1  # NFNL_SUBSYS_ULOG, NFULNL_MSG_CONFIG
_COMMAND, _MODE = 1, 2  # NFULA_CFG_*
_BIND = b"\1"
_COPY_PACKET = 2
_GROUP = 0  # of what says no group, as traces do
# Headers, also those behind a tunnel's and those that an ICMP error quotes, and a cookie.
_COPIED = 256

_LOGGER = "nfnetlink_log"
_SETTINGS = "/proc/sys/net/netfilter/nf_log"
_FAMILIES = (socket.AF_INET, socket.AF_INET6)


class Log(Listener):
    """What the namespace of the calling thread logs, from now to `close`.

    Raises OSError: EPERM (or EBUSY) if somebody else listens there.
    """

    def __init__(self) -> None:
        super().__init__(())
        try:
            self._configure(attribute(_COMMAND, _BIND))
            self._configure(attribute(_MODE, struct.pack("!IBx", _COPIED, _COPY_PACKET)))
            self._loggers = {family: _logger(family) for family in _FAMILIES}
            for family in _FAMILIES:
                _set_logger(family, _LOGGER)
        except OSError:
            super().close()
            raise

    def restore(self) -> None:
        """Give the namespace, which the calling thread is in, its loggers back."""
        for family, logger in self._loggers.items():
            # Somebody may have chosen another meanwhile.
            if _logger(family) == _LOGGER:
                _set_logger(family, logger)

    def _configure(self, attributes: bytes) -> None:
        body = request_body(attributes, socket.AF_UNSPEC, _GROUP)
        self._socket.send(message(_CONFIG, NLM_F_ACK, body))
        # The kernel has answered when `send` returns, behind what was logged meanwhile.
        for data in self.datagrams():
            (kind,) = struct.unpack_from("=H", data, 4)
            if kind == NLMSG_ERROR:
                (refused,) = struct.unpack_from("=i", data, 16)
                if refused:
                    raise OSError(-refused, os.strerror(-refused))
                return


def _logger(family: int) -> str:
    try:
        with open(f"{_SETTINGS}/{family}", encoding="ascii") as setting:
            return setting.read().strip()
    except FileNotFoundError:
        raise OSError(errno.ENOENT, "the kernel has no nf_log") from None


def _set_logger(family: int, logger: str) -> None:
    with open(f"{_SETTINGS}/{family}", "w", encoding="ascii") as setting:
        setting.write(logger)
