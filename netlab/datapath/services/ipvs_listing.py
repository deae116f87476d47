"""Virtual servers and sets as their tools list them: `ipvsadm-save -n` and `ipset save`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from netlab.datapath.state import IpSet, VirtualServer

_OPTIONS = {"tcp": "-t", "udp": "-u", "sctp": "--sctp-service"}
_FAMILIES = {4: "inet", 6: "inet6"}
_USUAL = "hashsize 1024 maxelem 65536"  # of a set that nobody gave other sizes


def listing(sets: Iterable[IpSet], servers: Iterable[VirtualServer]) -> dict[str, str]:
    """What both tools list, by family ("ip", "ip6"): sets by name, then servers."""
    lines: dict[str, list[str]] = {"ip": [], "ip6": []}
    for each in sorted(sets, key=lambda each: each.name):
        # (a set of ports alone tells its family by its name)
        family = "ip6" if each.family == 6 or each.name.startswith("KUBE-6-") else "ip"
        lines[family] += [creation(each), *sorted(f"add {each.name} {e}" for e in each.entries)]
    for server in sorted(servers, key=service):
        lines["ip6" if ":" in server.address else "ip"] += as_saved(server)
    return {family: "".join(f"{line}\n" for line in found) for family, found in lines.items()}


def creation(each: IpSet) -> str:
    """The line that makes a set."""
    if each.family is None:
        return f"create {each.name} {each.kind} range 0-65535"
    return f"create {each.name} {each.kind} family {_FAMILIES[each.family]} {_USUAL}"


def as_saved(server: VirtualServer) -> Iterator[str]:
    """A virtual server with its real ones, as input for `ipvsadm -R`."""
    persistent = f" -p {server.persistent_s}" if server.persistent_s else ""
    flags = f" -b {server.scheduler}-port" if server.by_port else ""
    name = service(server)
    yield f"-A {name} -s {server.scheduler}{persistent}{flags}"
    yield from sorted(
        f"-a {name} -r {socket(each.address, each.port)} -m -w {each.weight}"
        for each in server.real
    )


def service(server: VirtualServer) -> str:
    """How ipvsadm names a virtual server: `-t 10.96.0.1:443`."""
    return f"{_OPTIONS[server.protocol]} {socket(server.address, server.port)}"


def socket(address: str, port: int) -> str:
    """`10.96.0.1:443`, `[fd00::1]:443`."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def plain(entry: str) -> str:
    """An entry of a set as the tool prints it: a network of one address is that address.

    (There is one colon in an entry of IPv4, behind the protocol.)
    """
    address, _, length = entry.rpartition("/")
    return address if length == ("128" if address.count(":") > 1 else "32") else entry
