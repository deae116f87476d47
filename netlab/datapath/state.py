"""What namespaces should hold, as plain data.

The pure functions of `datapath` turn a Lab into these; `kernel` makes a real kernel hold them and
reads them back into the same classes, so that what is there and what should be there are compared
with `==`.  No Kubernetes word stands here.

Networks and addresses are text in canonical form; a default route is "0.0.0.0/0".
"""

from __future__ import annotations

import hashlib
from typing import Literal

import msgspec

LinkKind = Literal["veth", "bridge", "vxlan"]
Backend = Literal["nft", "legacy"]  # of iptables


class State(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of all state; hashable."""


class Vxlan(State, frozen=True):
    """Attributes of a VXLAN device."""

    vni: int
    port: int
    local: str
    device: str  # the link below, in the same namespace
    learning: bool = False


class Peer(State, frozen=True):
    """The other end of a veth pair."""

    namespace: str
    link: str


class Link(State, frozen=True):
    """A network device. `master` names a bridge in the same namespace."""

    name: str
    kind: LinkKind
    mtu: int
    mac: str | None = None  # None: the kernel's choice
    master: str | None = None
    hairpin: bool = False
    up: bool = True
    peer: Peer | None = None  # not read back: the kernel names neither end to the other
    vxlan: Vxlan | None = None


class Address(State, frozen=True):
    """An address with its prefix length, "10.244.1.1/24", on a link."""

    link: str
    address: str


class Route(State, frozen=True):
    """A unicast route of the main table. Without `via` the destination is on the link."""

    destination: str
    link: str
    via: str | None = None
    onlink: bool = False


class Neighbour(State, frozen=True):
    """A permanent neighbour entry."""

    link: str
    address: str
    mac: str


class FdbEntry(State, frozen=True):
    """A static forwarding entry of a VXLAN device: this MAC is behind that remote address."""

    link: str
    mac: str
    destination: str


class Sysctl(State, frozen=True):
    """A sysctl by its path below /proc/sys, "net/ipv4/ip_forward", and its value as text."""

    path: str
    value: str


class Connection(State, frozen=True):
    """A connection that is remembered: what comes from the source is sent to `to` instead."""

    protocol: Literal["TCP", "UDP"]
    source: tuple[str, int]
    destination: tuple[str, int]
    to: tuple[str, int]


class Namespace(State, frozen=True):
    """A network namespace and everything in it that is ours. `lo` is always up."""

    name: str  # file name under /run/netns
    links: tuple[Link, ...] = ()
    addresses: tuple[Address, ...] = ()
    routes: tuple[Route, ...] = ()
    neighbours: tuple[Neighbour, ...] = ()
    fdb: tuple[FdbEntry, ...] = ()
    sysctls: tuple[Sysctl, ...] = ()
    tables: tuple[Table, ...] = ()  # beside the service proxy's rules
    connections: tuple[Connection, ...] = ()


class Ruleset(State, frozen=True):
    """Rules of one namespace, one complete `iptables-restore` input for each family."""

    ipv4: str
    ipv6: str
    nfacct: tuple[str, ...] = ()  # accounting objects that must exist before
    backend: Backend | None = None  # None: the one that the machine uses


class Table(State, frozen=True):
    """One nftables table: `table FAMILY NAME { ... }`, as nft prints it."""

    family: str
    name: str
    text: str


class Tables(State, frozen=True):
    """Rules of one namespace: nftables tables that are wholly ours."""

    tables: tuple[Table, ...]

    @property
    def transaction(self) -> str:
        """Input for nft that puts them in place of what was in tables of these names."""
        return "".join(
            # `add` makes `delete` succeed where there is no such table
            f"add table {table.family} {table.name}\n"
            f"delete table {table.family} {table.name}\n"
            f"{table.text}"
            for table in self.tables
        )


class Leftovers(State, frozen=True):
    """Rules that were ours and are no longer wanted, as what removes them from a namespace."""

    ipv4: str = ""  # input for `iptables-restore --noflush`
    ipv6: str = ""  # and for `ip6tables-restore --noflush`
    tables: tuple[str, ...] = ()  # nftables tables, "ip kube-proxy"
    backend: Backend | None = None  # of iptables, as in a Ruleset


class Update(State, frozen=True):
    """What turns rules that are loaded into others, written where little differs.

    Each text is one transaction for its tool, "" if there is nothing for it to do.
    """

    ipv4: str = ""  # input for `iptables-restore --noflush`
    ipv6: str = ""  # and for `ip6tables-restore --noflush`
    tables: str = ""  # input for nft
    # Entries that packets left in sets and that lose their meaning: those whose keys end so,
    # "ip netlab affinity 0:7".
    forget: tuple[str, ...] = ()
    backend: Backend | None = None  # of iptables, as in a Ruleset

    def __bool__(self) -> bool:
        return bool(self.ipv4 or self.ipv6 or self.tables)


Rules = Ruleset | Tables


class NodeState(State, frozen=True):
    """A node with its pods: what is shipped to wherever the node lives."""

    name: str
    namespace: Namespace
    pods: tuple[Namespace, ...] = ()
    rules: Rules | None = None


class Page(State, frozen=True):
    """The answer to every request over HTTP, whatever its path."""

    status: int
    fields: tuple[tuple[str, str], ...]
    body: str


class Server(State, frozen=True):
    """What answers in one namespace: the workload listens on these ports."""

    namespace: str
    identity: str  # what it says its name is
    node: str
    listen: tuple[tuple[str, int], ...] = ()  # ("TCP", 8002)
    addresses: tuple[str, ...] = ()  # to listen on; none: every one
    page: Page | None = None  # None: it tells who it is
    backends: tuple[tuple[str, int], ...] = ()  # TCP streams are passed on to one of these
    stuck: bool = False  # connections over TCP wait to be accepted, in a queue that is full
    sticky_s: int | None = None  # who comes within this time goes where the last one went


class LabState(State, frozen=True):
    """Everything that `up` makes true."""

    lab: str
    switch: Namespace
    nodes: tuple[NodeState, ...] = ()
    outside: tuple[Namespace, ...] = ()
    servers: tuple[Server, ...] = ()

    def namespaces(self) -> tuple[Namespace, ...]:
        """All namespaces: the switch, what is outside, then each node followed by its pods."""
        found = [self.switch, *self.outside]
        for node in self.nodes:
            found.append(node.namespace)
            found.extend(node.pods)
        return tuple(found)


class Found(State, frozen=True):
    """A namespace as it was read back from the kernel."""

    namespace: Namespace
    index: dict[str, int]  # interface numbers by link name
    marked: frozenset[str]  # links that carry our mark


Item = (
    Namespace | Link | Address | Route | Neighbour | FdbEntry | Sysctl | Rules | Update | Leftovers
)


class Change(State, frozen=True):
    """One difference to be made: an item of a namespace to add, to set right or to delete."""

    verb: Literal["add", "set", "delete"]
    namespace: str
    item: Item


# A file name may be 255 bytes long; a pod's name 253 and its namespace 63.
_LONGEST = 255


def namespace_name(lab: str, *parts: str) -> str:
    """File name under /run/netns: `LAB:NODE`, `LAB:NAMESPACE:POD`, `LAB:_switch`, `LAB:_host:NAME`.

    The parts cannot contain ":" (they are Kubernetes names), so no two labs or objects share a
    name.  One that would be too long ends in a hash of the whole.
    """
    name = ":".join((lab, *parts))
    if len(name) <= _LONGEST:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    return f"{name[: _LONGEST - 17]}~{digest}"
