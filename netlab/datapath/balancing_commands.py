"""Virtual servers as the commands that somebody would type: ipset, iproute2 and ipvsadm."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from netlab.datapath.services.ipvs_listing import as_saved, creation, service
from netlab.datapath.services.ipvs_sets import NAMES
from netlab.datapath.state import Balancing, BalancingUpdate, IpSet


def balancing_commands(ip: str, inside: str, item: Balancing | BalancingUpdate) -> Iterator[str]:
    """Commands for all but the rules; `ip` and `inside` are how a command enters the namespace."""
    update = item if isinstance(item, BalancingUpdate) else None
    if update is None:
        yield f"{ip} link add {item.device} type dummy"
    if item.sets:
        yield _input(f"{inside} ipset -exist restore", _restored(item.sets))
    if item.addresses:
        lines = (f"address add {_host(each)} dev {item.device}" for each in item.addresses)
        yield _input(f"{ip} -batch -", lines)
    servers = [line for each in item.servers for line in as_saved(each)]
    if update:
        yield from (f"{inside} ipvsadm -D {service(each)} || true" for each in update.servers)
    if servers:
        yield _input(f"{inside} ipvsadm -R", servers)
    if isinstance(item, Balancing) and any(item.timeouts_s):
        yield f"{inside} ipvsadm --set {' '.join(map(str, item.timeouts_s))}"
    if update:
        yield from (f"{inside} ipvsadm -D {service(each)}" for each in update.no_servers)
        lines = (f"address del {_host(each)} dev {item.device}" for each in update.no_addresses)
        if update.no_addresses:
            yield _input(f"{ip} -batch -", lines)
        if update.no_sets:
            gone = (f"del {each.name} {e}" for each in update.no_sets for e in each.entries)
            yield _input(f"{inside} ipset -exist restore", gone)


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


def _input(command: str, lines: Iterable[str]) -> str:
    text = "\n".join(lines)
    return f"{command} <<'EOF'\n{text}\nEOF"
