"""Virtual servers as the commands that somebody would type: ipset, iproute2 and ipvsadm."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from netlab.datapath.services.ipvs_listing import as_saved, creation, service
from netlab.datapath.services.ipvs_sets import NAMES
from netlab.datapath.state import Balancing, BalancingUpdate, IpSet

_IPSET = ["ipset", "-exist", "restore"]
_IP = ["ip", "-batch", "-"]


def balancing_inputs(item: Balancing | BalancingUpdate) -> Iterator[tuple[list[str], str]]:
    """What makes sets, addresses and servers: commands and their input, run in the namespace."""
    if item.sets:
        yield _IPSET, _lines(_restored(item.sets))
    if item.addresses:
        yield _IP, _lines(f"address add {_host(ip)} dev {item.device}" for ip in item.addresses)
    if item.servers:
        yield ["ipvsadm", "-R"], _lines(line for each in item.servers for line in as_saved(each))


def balancing_commands(ip: str, inside: str, item: Balancing | BalancingUpdate) -> Iterator[str]:
    """Commands for all but the rules; `ip` and `inside` are how a command enters the namespace.

    A virtual server that changes is made anew, and so loses its connections.
    """
    if isinstance(item, Balancing):
        yield f"{ip} link add {item.device} type dummy"
    else:
        yield from (f"{inside} ipvsadm -D {service(each)} || true" for each in item.servers)
    yield from (_input(inside, command, text) for command, text in balancing_inputs(item))
    if isinstance(item, Balancing):
        if any(item.timeouts_s):
            yield f"{inside} ipvsadm --set {' '.join(map(str, item.timeouts_s))}"
        return
    yield from (f"{inside} ipvsadm -D {service(each)}" for each in item.no_servers)
    if item.no_addresses:
        lines = (f"address del {_host(each)} dev {item.device}" for each in item.no_addresses)
        yield _input(inside, _IP, _lines(lines))
    if item.no_sets:
        gone = (f"del {each.name} {entry}" for each in item.no_sets for entry in each.entries)
        yield _input(inside, _IPSET, _lines(gone))


def no_balancing_commands(ip: str, inside: str, device: str) -> Iterator[str]:
    """Commands that remove all of it, others' virtual servers, too."""
    yield f"{inside} ipvsadm -C"
    yield f"{ip} link del {device}"
    yield from (f"{inside} ipset destroy {name}" for name in NAMES)


def _restored(sets: Iterable[IpSet]) -> Iterator[str]:
    for each in sets:
        yield creation(each)
        yield from (f"add {each.name} {entry}" for entry in each.entries)


def _host(address: str) -> str:
    return f"{address}/{128 if ':' in address else 32}"


def _lines(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def _input(inside: str, command: list[str], text: str) -> str:
    return f"{inside} {' '.join(command)} <<'EOF'\n{text}EOF"
