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

LinkKind = Literal["veth", "bridge", "vxlan", "ipip"]
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
    remote: str = ""  # where frames go whose MAC it does not know: another end, or a group


class Peer(State, frozen=True):
    """The other end of a veth pair."""

    namespace: str
    link: str


class Ipip(State, frozen=True):
    """Attributes of a device that puts IPv4 packets into IPv4 packets; routes name the far end."""

    local: str
    device: str  # the link below, in the same namespace


class Link(State, frozen=True):
    """A network device. `master` names a bridge in the same namespace."""

    name: str
    kind: LinkKind
    mtu: int
    mac: str | None = None  # None: the kernel's choice
    master: str | None = None
    hairpin: bool = False
    own_entry: bool = True  # whether a bridge knows its own MAC, and so takes what is for it
    loss: int = 0  # percent of what it is to send (a queue of netem)
    up: bool = True
    peer: Peer | None = None  # not read back: the kernel names neither end to the other
    vxlan: Vxlan | None = None
    ipip: Ipip | None = None
    routed: bool = False  # the end of a pair that makes it, though in no bridge; not read back

    @property
    def makes_pair(self) -> bool:
        """Whether a pair is made from this end, with the other one."""
        return self.peer is not None and (self.master is not None or self.routed)

    @property
    def below(self) -> str | None:
        """The link that a tunnel sends by, with which it goes."""
        tunnel = self.vxlan or self.ipip
        return tunnel.device if tunnel else None


class Address(State, frozen=True):
    """An address with its prefix length, "10.244.1.1/24", on a link."""

    link: str
    address: str


MAIN_TABLE = 254


class Route(State, frozen=True):
    """A unicast route. Without `via` the destination is on the link."""

    destination: str
    link: str
    via: str | None = None
    onlink: bool = False
    table: int = MAIN_TABLE


class Policy(State, frozen=True):
    """A rule of policy routing: which table packets are looked up in, by their ends or mark.

    One of the ends tells the family.
    """

    priority: int  # the smallest is asked first; the main table is asked at 32766
    table: int
    source: str = ""  # networks, "10.244.1.4/32"; "" is any
    destination: str = ""
    mark: int = 0  # of packets that it is for; 0: of any


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

    @property
    def link(self) -> str | None:
        """The link that it is a setting of, "net/ipv4/conf/eth0/proxy_arp"; None: of no one."""
        kind, _, rest = self.path.partition("/")[2].partition("/")[2].partition("/")
        name = rest.partition("/")[0]
        return name if kind in ("conf", "neigh") and name not in ("all", "default") else None


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
    policies: tuple[Policy, ...] = ()
    sysctls: tuple[Sysctl, ...] = ()
    tables: tuple[Table, ...] = ()  # beside the service proxy's rules
    chains: Chains | None = None  # the same
    connections: tuple[Connection, ...] = ()
    crowded: bool = False  # it remembers as many connections as it may, none of which is any use


class Ruleset(State, frozen=True):
    """Rules of one namespace, one complete `iptables-restore` input for each family."""

    ipv4: str
    ipv6: str
    nfacct: tuple[str, ...] = ()  # accounting objects that must exist before
    backend: Backend | None = None  # None: the one that the machine uses


class Chains(State, frozen=True):
    """Chains of iptables in tables that others share, and what leads to them from the hooks.

    For each family input for `iptables-restore --noflush` where there are none yet.
    """

    ipv4: str = ""
    ipv6: str = ""
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
    device: str = ""  # of a `Balancing`, which goes with its servers and sets


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


class RealServer(State, frozen=True):
    """Where a virtual server sends connections; with weight 0 no new ones."""

    address: str
    port: int
    weight: int = 1


class VirtualServer(State, frozen=True):
    """An address and port at which the kernel's IPVS takes connections and spreads them."""

    protocol: str  # "tcp", "udp", "sctp"
    address: str
    port: int
    scheduler: str
    persistent_s: int | None = None  # a client goes for so long where it went last
    by_port: bool = False  # a scheduler that hashes clients takes their ports, too
    real: tuple[RealServer, ...] = ()

    @property
    def key(self) -> tuple[str, str, int]:
        """What there can be but one of."""
        return self.protocol, self.address, self.port


class IpSet(State, frozen=True):
    """A set of the kernel, or some entries of one, as `ipset save` writes them."""

    name: str
    kind: str  # "hash:ip,port"
    family: Literal[4, 6] | None  # None: the kind has no addresses
    entries: tuple[str, ...] = ()  # "10.96.0.10,udp:53"


class Balancing(State, frozen=True):
    """Rules of one namespace that leave the choice to IPVS.

    `addresses` are those of virtual servers that no other link of the namespace has.  They are on a
    dummy device, which makes them local; it is down, so that nobody outside hears of them.
    """

    device: str
    addresses: tuple[str, ...]
    servers: tuple[VirtualServer, ...]
    sets: tuple[IpSet, ...]
    rules: Ruleset
    timeouts_s: tuple[int, int, int] = (0, 0, 0)  # of TCP, its end and UDP; 0: as they are


class BalancingUpdate(State, frozen=True):
    """What turns a `Balancing` that is there into another one.

    Of sets only the entries that come or go stand here, of servers only those that do or change.
    """

    device: str
    addresses: tuple[str, ...] = ()
    servers: tuple[VirtualServer, ...] = ()
    sets: tuple[IpSet, ...] = ()
    no_addresses: tuple[str, ...] = ()
    no_servers: tuple[VirtualServer, ...] = ()
    no_sets: tuple[IpSet, ...] = ()
    ipv4: str = ""  # input for `iptables-restore --noflush`
    ipv6: str = ""  # and for `ip6tables-restore --noflush`
    backend: Backend | None = None  # of iptables, as in a Ruleset

    def __bool__(self) -> bool:
        return bool(
            self.addresses
            or self.servers
            or self.sets
            or self.no_addresses
            or self.no_servers
            or self.no_sets
            or self.ipv4
            or self.ipv6
        )


Rules = Ruleset | Tables | Balancing


class NodeState(State, frozen=True):
    """A node with its pods: what is shipped to wherever the node lives."""

    name: str
    namespace: Namespace
    pods: tuple[Namespace, ...] = ()
    rules: Rules | None = None
    processes: tuple[Process, ...] = ()


class File(State, frozen=True):
    """A file that processes of one namespace see, and nobody else: below /run, or in place of one.

    Below /run everything is the namespace's own; elsewhere it covers what is there.
    """

    path: str
    text: str
    owner: str = ""  # a user of the machine whose it is, and the directory it is in; "": root


class View(State, frozen=True):
    """What programs and commands in a place see of files, and how they are told it is called."""

    name: str  # unique in its network namespace; a node's, and a pod's of its own, is that's name
    namespace: str  # the network namespace
    host_name: str
    files: tuple[File, ...] = ()


class Process(State, frozen=True):
    """A program that runs in a namespace for as long as the lab does.

    It stays in the foreground, and is started again, each time later, when it ends.  It sees
    `files`, has a /run of its own (with its pid file and control socket) and is root: one that
    needs less gives it up itself, as its options say.
    """

    name: str  # "bird": unique in its namespace
    namespace: str
    command: tuple[str, ...]
    package: str = ""  # Debian's, which has the program; "": it is the user's own
    view: str = ""  # the name of the view it has; "": that of its network namespace
    files: tuple[File, ...] = ()
    directories: tuple[tuple[str, str], ...] = ()  # to be made below /run, with the owner of each
    directory: str = "/"
    environment: tuple[tuple[str, str], ...] = ()
    # Further variables, as they are when it starts: another value is no reason to start it again.
    at_start: tuple[tuple[str, str], ...] = ()
    reload: str = ""  # the signal after which it reads changed files; "": it is started again
    # It is ready when the namespace has these routes, whoever made them, and sockets listen, and
    # when Unix sockets have these abstract names.
    routes: tuple[Route, ...] = ()
    names: tuple[str, ...] = ()
    zone_serial: int | None = None  # that its name server gives for the root
    listens: tuple[tuple[Literal["TCP", "UDP"], int], ...] = ()


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


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """A question to a container, and how often it is asked; times in seconds."""

    kind: Literal["http", "tcp", "exec"]
    host: str = ""
    port: int = 0
    path: str = "/"
    tls: bool = False
    headers: tuple[tuple[str, str], ...] = ()
    command: tuple[str, ...] = ()
    delay_s: float
    period_s: float
    timeout_s: float
    successes: int
    failures: int


class ProbedContainer(msgspec.Struct, frozen=True, kw_only=True):
    """What a container is asked; `program` is its process's name, "" if the workload answers."""

    name: str
    program: str
    readiness: Check | None
    liveness: Check | None
    startup: Check | None
    environment: tuple[tuple[str, str], ...] = ()


class ProbedPod(msgspec.Struct, frozen=True, kw_only=True):
    """A pod whose containers are asked: over the network from its node, by commands inside."""

    key: str  # "namespace/name"
    identity: str  # that of what the workload answers
    namespace: str
    node_namespace: str
    view: str
    containers: tuple[ProbedContainer, ...]


class LabState(State, frozen=True):
    """Everything that `up` makes true."""

    lab: str
    switch: Namespace | None  # None: the nodes are on a network of their own
    nodes: tuple[NodeState, ...] = ()
    outside: tuple[Namespace, ...] = ()
    servers: tuple[Server, ...] = ()
    outside_processes: tuple[Process, ...] = ()

    @property
    def processes(self) -> tuple[Process, ...]:
        """What runs in the nodes, their pods and outside, beside the workload."""
        of_nodes = (process for node in self.nodes for process in node.processes)
        return (*of_nodes, *self.outside_processes)

    def namespaces(self) -> tuple[Namespace, ...]:
        """All namespaces: the switch, what is outside, then each node followed by its pods."""
        found = [*((self.switch,) if self.switch else ()), *self.outside]
        for node in self.nodes:
            found.append(node.namespace)
            found.extend(node.pods)
        return tuple(found)


class Found(State, frozen=True):
    """A namespace as it was read back from the kernel."""

    namespace: Namespace
    index: dict[str, int]  # interface numbers by link name
    marked: frozenset[str]  # links that carry our mark
    without_ipv6: frozenset[str] = frozenset()  # links that IPv6 is switched off on


Item = (
    Namespace
    | Link
    | Address
    | Route
    | Policy
    | Neighbour
    | FdbEntry
    | Sysctl
    | Rules
    | Chains
    | Update
    | BalancingUpdate
    | Leftovers
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
