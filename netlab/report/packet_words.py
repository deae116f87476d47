"""A packet in one line, as tcpdump's readers know it; what a VXLAN tunnel carries stands behind.

As with `tcpdump -n -S`: addresses and ports in numbers, TCP sequence numbers as they are sent.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

from netlab.capture.headers import (
    ARP,
    TCP,
    UDP,
    Ethernet,
    Network,
    ethernet,
    flags,
    network,
    tunnelled,
)
from netlab.trace.dissect import icmp_name
from netlab.trace.family import IPV4, IPV6

_CUT = "[cut off]"
_ARP = {1: "Request who-has {3} tell {1}", 2: "Reply {1} is-at {0}"}
# tcpdump's letters: an acknowledgement is a dot.
_FLAGS = str.maketrans({"A": ".", "E": "E", "C": "W"})
_ECHOES = ("echo-request", "echo-reply")
_SOLICITED, _ADVERTISED = "neighbor-solicitation", "neighbor-advertisement"


def words(frame: bytes, vxlan_port: int) -> str:
    """What an Ethernet frame is; of one that was cut off, as much as can be told."""
    ether = ethernet(frame)
    if ether is None:
        return _CUT
    if ether.type == ARP:
        return f"ARP, {_arp(ether)}" if len(ether.body) >= 28 else f"ARP {_CUT}"
    ip = network(ether)
    return _ip(ip, vxlan_port) if ip else _unknown(ether)


def _unknown(ether: Ethernet) -> str:
    what = {0x0800: f"IP {_CUT}", 0x86DD: f"IP6 {_CUT}"}.get(ether.type)
    ends = f"{ether.source} > {ether.destination}"
    return what or f"{ends}, ethertype 0x{ether.type:04x}, length {len(ether.body)}"


def _arp(ether: Ethernet) -> str:
    operation = int.from_bytes(ether.body[6:8], "big")
    sender, address, target, wanted = struct.unpack_from("!6s4s6s4s", ether.body, 8)
    ends = sender.hex(":"), _dotted(address), target.hex(":"), _dotted(wanted)
    return _ARP.get(operation, f"operation {operation}").format(*ends)


def _dotted(address: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET, address)


def _ip(ip: Network, vxlan_port: int) -> str:
    name = "IP" if ip.family is IPV4 else "IP6"
    line = f"{name} {_ends(ip)}: "
    if inside := tunnelled(ip, vxlan_port):
        vni = "vni invalid" if inside.vni is None else f"vni {inside.vni}"
        return f"{line}VXLAN, {vni}: {words(inside.frame, vxlan_port)}"
    if not ip.has_transport:
        return f"{line}fragment of {ip.id} at {ip.offset}, length {ip.size}"
    more = f", first fragment of {ip.id}" if ip.more else ""
    try:
        return f"{line}{_transport(ip)}{more}"
    except (struct.error, IndexError):
        return f"{line}{_CUT}"


def _ends(ip: Network) -> str:
    if not ip.ports:
        return f"{ip.source} > {ip.destination}"
    source, destination = ip.ports
    return f"{ip.source}.{source} > {ip.destination}.{destination}"


def _transport(ip: Network) -> str:
    if ip.protocol == TCP:
        return _tcp(ip)
    if ip.protocol == UDP:
        return f"UDP, length {ip.size - 8}"
    if ip.protocol == ip.family.icmp_number:
        return _icmp(ip)
    return f"protocol {ip.protocol}, length {ip.size}"


def _tcp(ip: Network) -> str:
    sequence, acknowledged, offset, bits, window = struct.unpack_from("!IIBBH", ip.body, 4)
    header = 4 * (offset >> 4)
    size = ip.size - header
    has_data = size > 0
    shown = f"{sequence}:{(sequence + size) % 2**32}" if has_data else str(sequence)
    letters = flags(ip)
    parts = [f"Flags [{letters.translate(_FLAGS) or 'none'}]"]
    if has_data or set(letters) & set("SFR"):
        parts.append(f"seq {shown}")
    if bits & 0x10:
        parts.append(f"ack {acknowledged}")
    parts.append(f"win {window}")
    if options := ",".join(_options(ip.body[20:header])):
        parts.append(f"options [{options}]")
    return ", ".join([*parts, f"length {size}"])


def _options(data: bytes) -> Iterator[str]:
    """RFC 9293 and RFC 7323."""
    while data and data[0] != 0:
        kind = data[0]
        if kind == 1:
            yield "nop"
            data = data[1:]
            continue
        if len(data) < 2 or data[1] < 2:
            return
        value, data = data[2 : data[1]], data[data[1] :]
        if kind == 2 and len(value) == 2:
            yield f"mss {int.from_bytes(value, 'big')}"
        elif kind == 3 and len(value) == 1:
            yield f"wscale {value[0]}"
        elif kind == 4:
            yield "sackOK"
        elif kind == 8 and len(value) == 8:
            yield "TS val {} ecr {}".format(*struct.unpack("!II", value))
        else:
            yield f"option {kind}"


def _icmp(ip: Network) -> str:
    kind, code = ip.body[0], ip.body[1]
    name = icmp_name(ip.family, kind, code)
    said = f"{'ICMP' if ip.family is IPV4 else 'ICMP6'} {name.replace('-', ' ')}"
    if name in _ECHOES:
        identity, sequence = struct.unpack_from("!HH", ip.body, 4)
        said += f", id {identity}, seq {sequence}"
    elif ip.family is IPV6 and name in (_SOLICITED, _ADVERTISED):
        (packed,) = struct.unpack_from("!16s", ip.body, 8)
        address = socket.inet_ntop(socket.AF_INET6, packed)
        said += f", {'who has' if name == _SOLICITED else 'tgt is'} {address}"
    elif quoted := _quoted(ip, kind):
        said += f" for {_ends(quoted)}"
    return f"{said}, length {ip.size}"


def _quoted(ip: Network, kind: int) -> Network | None:
    """The packet that an error is about."""
    is_error = kind < 128 if ip.family is IPV6 else kind in (3, 11, 12)
    if not is_error:
        return None
    ether_type = 0x0800 if ip.family is IPV4 else 0x86DD
    return network(Ethernet("", "", ether_type, ip.body[8:]))
