"""Service proxy modes: what each puts on a node, and what a node keeps of another mode.

A mode is a pure rendering, one file each; a new one is a line in `MODES`.  How a rendering gets
into a namespace, and how what is there is read, depends on what it is made of (`Ruleset`,
`Tables`), not on the mode: that is `netlab.lab.rules`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from netlab.datapath.services import (
    iptables,
    iptables_save,
    ipvs,
    nftables,
    nftables_flat,
    userspace,
    userspace_programs,
)
from netlab.datapath.services.iptables_proxier import IPTablesProxier
from netlab.datapath.services.ipvs_proxier import IPVSProxier
from netlab.datapath.services.proxier import Proxier
from netlab.datapath.state import (
    Backend,
    Balancing,
    Change,
    Leftovers,
    Process,
    Rules,
    Ruleset,
    Server,
    Sysctl,
    Tables,
)
from netlab.topology.model import Lab, Node, ProxyMode

# Made for kubelet, not for the proxy: kube-proxy in nftables mode leaves it where it is.
_KUBELETS = frozenset({"KUBE-FIREWALL"})


@dataclass(frozen=True, slots=True)
class Mode:
    """What a service proxy mode gives a node; without rules Services are left to somebody else.

    A mode without `proxier` has its rules loaded whole at each change.
    """

    render: Callable[[Lab, Node], Rules | None]
    sysctls: Callable[[Lab, Node], tuple[Sysctl, ...]]
    servers: Callable[[Lab, Node], Sequence[Server]]  # what the proxy itself answers
    proxier: Callable[[Lab, Node], Proxier] | None = None
    reading: str = ""  # the class that explains its rules, "module:Class"; loaded when asked for
    processes: Callable[[Lab, Node], tuple[Process, ...]] = lambda lab, node: ()
    programs: tuple[tuple[str, str], ...] = ()  # to be installed: program or file, Debian package


MODES: Mapping[ProxyMode, Mode] = {
    "iptables": Mode(
        iptables.render,
        iptables.sysctls,
        iptables.servers,
        IPTablesProxier,
        reading="iptables_reading:IptablesReading",
    ),
    "nftables": Mode(
        nftables.render,
        nftables.sysctls,
        nftables.servers,
        nftables.proxier,
        reading="nftables_reading:NftablesReading",
    ),
    "nftables-flat": Mode(
        nftables_flat.render,
        nftables.sysctls,
        nftables.servers,
        nftables_flat.proxier,
        reading="nftables_flat_reading:FlatReading",
    ),
    "ipvs": Mode(
        ipvs.render,
        ipvs.sysctls,
        ipvs.servers,
        IPVSProxier,
        reading="ipvs_reading:IpvsReading",
    ),
    "userspace": Mode(
        userspace.render,
        userspace.sysctls,
        userspace.servers,
        reading="userspace_reading:UserspaceReading",
        processes=userspace_programs.processes,
        programs=userspace_programs.PROGRAMS,
    ),
    "none": Mode(lambda lab, node: None, lambda lab, node: (), lambda lab, node: ()),
}


def mode_of(lab: Lab) -> Mode:
    """The mode of a lab's nodes."""
    return MODES[lab.service_proxy.mode]


def replaced(namespace: str, wanted: Ruleset, saved: tuple[str, str]) -> list[Change]:
    """What of iptables mode is not gone when rules of ipvs mode replace its tables.

    `saved` is what the backend of the wanted rules prints.  With kubelet's chain goes what made
    `route_localnet` harmless.
    """
    ipv4, ipv6 = (iptables_save.removal(text, tables={"mangle"}) for text in saved)
    found = []
    if ipv4 or ipv6:
        item = Leftovers(ipv4=ipv4, ipv6=ipv6, backend=wanted.backend)
        found.append(Change(verb="delete", namespace=namespace, item=item))
    if any(f":{chain} " in text for text in saved for chain in _KUBELETS):
        closed = Sysctl(path=iptables.ROUTE_LOCALNET, value="0")
        found.append(Change(verb="set", namespace=namespace, item=closed))
    return found


def leftovers(
    namespace: str,
    wanted: Rules | None,
    saved: Mapping[Backend, tuple[str, str]],
    tables: frozenset[str],
    balancing: bool = False,
) -> list[Change]:
    """Removals of what a node still has of other modes than that of the rules that are wanted.

    `saved` is what `iptables-save` and `ip6tables-save` print there, by backend but for the one
    that wanted rules are loaded with; `tables` are the node's nftables tables; `balancing` says
    that it has what ipvs mode leaves.  kube-proxy leaves
    kubelet's chain and `route_localnet`, which that chain makes harmless; both go where no mode
    follows, and the chain where the one in another backend takes its place.
    """
    changes = []
    keep = _KUBELETS if isinstance(wanted, Tables) else frozenset()
    ours = (*nftables.TABLES, *nftables_flat.TABLES)
    wants = wanted.tables if isinstance(wanted, Tables) else ()
    gone = tables - {f"{table.family} {table.name}" for table in wants}
    old = [Leftovers(tables=tuple(name for name in ours if name in gone))]
    for backend, texts in saved.items():
        ipv4, ipv6 = (iptables_save.removal(text, keep) for text in texts)
        old.append(Leftovers(ipv4=ipv4, ipv6=ipv6, backend=backend))
    if balancing and not isinstance(wanted, Balancing):
        old.append(Leftovers(device=ipvs.DEVICE))  # last: rules ask its sets
    for item in old:
        if item.ipv4 or item.ipv6 or item.tables or item.device:
            changes.append(Change(verb="delete", namespace=namespace, item=item))
    if wanted is None and any(chain in item.ipv4 for item in old for chain in _KUBELETS):
        closed = Sysctl(path=iptables.ROUTE_LOCALNET, value="0")
        changes.append(Change(verb="set", namespace=namespace, item=closed))
    return changes
