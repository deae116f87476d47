"""Connections made by hand, as `conntrack -I` and `-D` of the recorded sequences do it."""

from __future__ import annotations

import socket
from typing import Any

from netlab.kernel import conntrack
from netlab.kernel.namespaces import entered

_PROTOCOLS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP}


def carry_out(namespace: str | int, commands: str) -> None:
    """Commands of conntrack, separated by semicolons, as `shell` of a step has them."""
    for command in commands.split(";"):
        words = command.partition(">&2")[0].split()
        options = dict(zip(words[2::2], words[3::2], strict=True))
        if words[1] == "-I":
            _insert(namespace, options)
        else:
            _delete(namespace, options)


def _delete(namespace: str | int, options: dict[str, str]) -> None:
    port = options.get("--orig-port-dst")
    conntrack.delete(
        namespace,
        [
            entry
            for entry in conntrack.dump(namespace)
            if entry.protocol == _PROTOCOLS[options["-p"]]
            and port in (None, str(entry.original.destination_port))
        ],
    )


def _insert(namespace: str | int, options: dict[str, str]) -> None:
    """In pyroute2's encoding, so that it does not depend on what is tested."""
    from pyroute2 import NFCTSocket
    from pyroute2.netlink.nfnetlink import nfctsocket

    original, reply = (
        nfctsocket.NFCTAttrTuple(
            saddr=options[source],
            daddr=options[destination],
            proto=_PROTOCOLS[options["-p"]],
            sport=int(options[source_port]),
            dport=int(options[destination_port]),
        )
        for source, destination, source_port, destination_port in (
            ("-s", "-d", "--sport", "--dport"),
            ("-r", "-q", "--reply-port-src", "--reply-port-dst"),
        )
    )
    more: dict[str, Any] = {}
    if "--state" in options:
        state = getattr(nfctsocket, f"TCP_CONNTRACK_{options['--state']}")
        info = {"attrs": [["CTA_PROTOINFO_TCP_STATE", state]]}
        more["protoinfo"] = {"attrs": [["CTA_PROTOINFO_TCP", info]]}
    with entered(namespace), NFCTSocket() as netlink:
        netlink.entry(
            "add", tuple_orig=original, tuple_reply=reply, timeout=int(options["-t"]), **more
        )


def printed(namespace: str | int) -> list[str]:
    """What `conntrack -L` prints of TCP and UDP, without timeouts and marks, sorted."""
    lines = []
    for entry in conntrack.dump(namespace):
        name = {number: name for name, number in _PROTOCOLS.items()}[entry.protocol]
        state = f" {entry.state}" if entry.state else ""
        unreplied = "" if "seen-reply" in entry.status else " [UNREPLIED]"
        assured = " [ASSURED]" if "assured" in entry.status else ""
        original, reply = _printed(entry.original), _printed(entry.reply)
        start = f"{name:8} {entry.protocol}{state}"
        lines.append(f"{start} {original}{unreplied} {reply}{assured}")
    return sorted(lines)


def _printed(end: conntrack.Tuple) -> str:
    return (
        f"src={end.source} dst={end.destination} "
        f"sport={end.source_port} dport={end.destination_port}"
    )
