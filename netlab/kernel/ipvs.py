"""Virtual servers of a namespace with their addresses and sets: made, changed, read, removed.

IPVS has no transactions.  What is there is read and only the difference is made, in an order in
which nothing that is asked for is missing: sets, addresses, servers; and the other way round where
something goes.  A real server of TCP that is no longer wanted keeps its connections: it gets weight
0 and is taken away when they have ended, which is the business of a lab's init.

Whose virtual servers are whose is told by the sets and the addresses: what neither of ours names is
somebody else's and stays.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from netlab.datapath.services.ipvs_listing import plain
from netlab.datapath.services.ipvs_sets import NAMES, node_ports
from netlab.datapath.state import (
    Balancing,
    BalancingUpdate,
    IpSet,
    RealServer,
    VirtualServer,
)
from netlab.kernel import dummy_device, ipset, rtnetlink
from netlab.kernel.ipvs_messages import (
    NETLINK_GENERIC,
    Destination,
    Ipvs,
    Key,
    Service,
    all_destinations,
    family_id,
    packed_key,
)
from netlab.kernel.namespaces import entered
from netlab.kernel.netlink import (
    NetlinkError,
    Socket,
)
from netlab.problems import Exit, NetlabError, Problem

Draining = tuple[Key, str, int]
"""A virtual server, and address and port of a real server that serves no new connections."""

_GRACEFUL = "tcp"  # connections of UDP and SCTP move at once
_BATCH = 4096  # messages that are held at a time


def require() -> None:
    """Raise NetlabError (exit 3) with everything that this machine lacks for virtual servers."""
    problems: list[Problem] = []
    try:
        with Socket(NETLINK_GENERIC) as channel:
            family_id(channel)
    except NetlinkError:
        problems.append(
            Problem(
                "missing-module",
                "this kernel has no IPVS: the module ip_vs is missing, and service proxy mode ipvs "
                "needs it",
                hint="`sudo modprobe ip_vs` (on Debian in linux-image-amd64, on Ubuntu in "
                "linux-modules-extra-$(uname -r)); or another mode: `--proxy iptables`",
            )
        )
    try:
        ipset.program()
    except NetlabError as error:
        problems += error.problems
    if problems:
        raise NetlabError(problems, Exit.MACHINE)


@dataclass(frozen=True, slots=True)
class Present:
    """What a namespace has of a `Balancing`, and of others' virtual servers."""

    device: int | None  # interface number
    addresses: frozenset[str]
    sets: Mapping[str, IpSet]
    services: Mapping[Key, Service]
    destinations: Mapping[Key, Sequence[Destination]]


def present(namespace: str | int, device: str, lab: str) -> Present:
    """Read what is there.  Raises NetlabError (exit 3) if the device is not ours."""
    sets = ipset.parsed(ipset.saved(namespace), NAMES)
    with entered(namespace):
        index = dummy_device.find(device, lab)
        addresses = dummy_device.addresses_of(index)
        with Ipvs() as channel:
            services = {each.key: each for each in channel.services()}
        return Present(index, addresses, sets, services, all_destinations() if services else {})


def differs(wanted: Balancing, found: Present) -> bool:
    """Whether something of a `Balancing` but its rules is missing, or too much."""
    if found.device is None or {*wanted.addresses} != found.addresses:
        return True
    if not all(_same_set(each, found.sets.get(each.name)) for each in wanted.sets):
        return True
    keys = {Key(*each.key) for each in wanted.servers}
    ours = _Ours(found)
    return any(_differs(each, found) for each in wanted.servers) or any(
        key not in keys and key in ours for key in found.services
    )


def apply(namespace: str | int, wanted: Balancing, lab: str) -> list[Draining]:
    """Make a namespace hold servers, addresses and sets; its rules are for others to load.

    Returns the real servers that have to go when their connections have ended.  Raises NetlabError
    (exit 3) with what the kernel refuses.
    """
    found = present(namespace, wanted.device, lab)
    keys = {Key(*each.key) for each in wanted.servers}
    ipset.restore(namespace, ipset.created(_missing(wanted.sets, found.sets)))
    with entered(namespace), Ipvs() as channel:
        index = found.device or dummy_device.make(wanted.device, lab)
        new = [ip for ip in wanted.addresses if ip not in found.addresses]
        dummy_device.change_addresses(index, new)
        work = _Work(channel)
        if any(wanted.timeouts_s):
            work.send([channel.set_timeouts(wanted.timeouts_s)])
        for each in wanted.servers:
            key = Key(*each.key)
            work.serve(each, found.services.get(key), found.destinations.get(key, ()))
        ours = _Ours(found)
        gone = [key for key in found.services if key not in keys and key in ours]
        work.send([channel.delete_service(key) for key in gone])
        work.flush()
        dummy_device.change_addresses(index, found.addresses - {*wanted.addresses}, add=False)
    ipset.restore(namespace, ipset.without(_surplus(wanted.sets, found.sets)))
    return work.result()


def change(namespace: str | int, update: BalancingUpdate, lab: str) -> list[Draining]:
    """The same for what an update says; all else is taken to be there."""
    ipset.restore(namespace, ipset.created(update.sets))
    with entered(namespace), Ipvs() as channel:
        index = dummy_device.find(update.device, lab) or dummy_device.make(update.device, lab)
        dummy_device.change_addresses(index, update.addresses)
        work = _Work(channel)
        for each in update.servers:
            key = Key(*each.key)
            there = channel.service(key)
            work.serve(each, there, channel.destinations(key) if there else ())
        work.send([channel.delete_service(Key(*each.key)) for each in update.no_servers])
        work.flush()
        dummy_device.change_addresses(index, update.no_addresses, add=False)
    ipset.restore(namespace, ipset.without(update.no_sets))
    return work.result()


def listed(namespace: str | int) -> tuple[list[IpSet], list[VirtualServer]]:
    """The sets of ours and all virtual servers of a namespace.  NetlabError (exit 3)."""
    sets = ipset.parsed(ipset.saved(namespace), NAMES)
    with entered(namespace), Ipvs() as channel:
        services = channel.services()
        destinations = all_destinations() if services else {}
    return list(sets.values()), [
        VirtualServer(
            protocol=each.key.protocol,
            address=each.key.address,
            port=each.key.port,
            scheduler=each.scheduler,
            persistent_s=each.persistent_s or None,
            by_port=each.by_port,
            real=tuple(
                RealServer(address=real.address, port=real.port, weight=real.weight)
                for real in destinations.get(each.key, ())
            ),
        )
        for each in services
    ]


def remove(namespace: str | int, device: str, lab: str) -> None:
    """Take away all that `apply` made; the device last, by which it is known that there is some."""
    found = present(namespace, device, lab)
    with entered(namespace), Ipvs() as channel:
        work = _Work(channel)
        ours = _Ours(found)
        work.send([channel.delete_service(key) for key in found.services if key in ours])
        work.flush()
        work.result()
    ipset.restore(namespace, ipset.destroyed(found.sets))
    if found.device:
        with entered(namespace), Socket() as netlink:
            netlink.request([rtnetlink.delete_link(found.device)])


def refuse_foreign(namespace: str | int, device: str, lab: str) -> None:
    """Raise NetlabError (exit 3) if a namespace has a device of that name which is not ours."""
    with entered(namespace):
        dummy_device.find(device, lab)


def is_there(namespace: str | int, device: str, lab: str) -> bool:
    """Whether something of `apply`'s is in a namespace; cheap to ask."""
    with entered(namespace):
        return dummy_device.is_there(device, lab)


class _Work:
    """Messages about servers on their way to the kernel, and what it refuses."""

    def __init__(self, channel: Ipvs) -> None:
        self._channel = channel
        self._messages: list[bytes] = []
        self._making: set[int] = set()  # which of them make a server
        self._unknown_scheduler = False
        self._refused: list[NetlinkError] = []
        self._schedulers: set[str] = set()
        self._draining: list[Draining] = []

    def serve(
        self, wanted: VirtualServer, there: Service | None, real: Sequence[Destination]
    ) -> None:
        """Make a virtual server what it should be."""
        key = Key(*wanted.key)
        service = _as_service(wanted)
        channel = self._channel
        self._schedulers.add(wanted.scheduler)
        if there != service:
            self._making.add(len(self._messages))
            make = channel.set_service if there else channel.add_service
            self.send([make(service)])
        name = packed_key(key)
        known = {(each.address, each.port): each for each in real}
        for each in wanted.real:
            found = known.pop((each.address, each.port), None)
            if found is not None and found.weight != each.weight:
                # As kube-proxy does: it has come back, and connections of before find it again.
                self.send([channel.delete_destination(name, each.address, each.port)])
                found = None
            if found is None:
                self.send([channel.add_destination(name, each.address, each.port, each.weight)])
        for old in known.values():
            self._retire(key, name, old)

    def _retire(self, key: Key, name: bytes, old: Destination) -> None:
        channel = self._channel
        if key.protocol != _GRACEFUL or not old.connections:
            self.send([channel.delete_destination(name, old.address, old.port)])
            return
        self._draining.append((key, old.address, old.port))
        if old.weight:
            self.send([channel.set_destination(name, old.address, old.port, 0)])

    def send(self, messages: Iterable[bytes]) -> None:
        """Messages, to go with others."""
        self._messages += messages
        if len(self._messages) >= _BATCH:
            self.flush()

    def flush(self) -> None:
        if self._messages:
            for refused in self._channel.request(self._messages):
                missing = refused.errno == errno.ENOENT
                if missing and refused.index in self._making:
                    self._unknown_scheduler = True
                # What went meanwhile, with its server or its connections, is gone.
                elif not missing and refused.errno not in (errno.ESRCH, errno.EEXIST):
                    self._refused.append(refused)
            self._messages = []
            self._making = set()

    def result(self) -> list[Draining]:
        """What is to be finished later.  Raises NetlabError if something was refused."""
        problems = []
        if self._unknown_scheduler:
            names = ", ".join(sorted(self._schedulers))
            modules = " ".join(f"ip_vs_{each}" for each in sorted(self._schedulers))
            problems.append(
                Problem(
                    "missing-module",
                    f"this kernel lacks the scheduler {names} of IPVS: the module {modules} is "
                    "missing",
                    hint=f"`sudo modprobe -a {modules}`; or another one as ipvs.scheduler",
                )
            )
        elif self._refused:
            problems.append(
                Problem(
                    "servers-refused",
                    f"a virtual server cannot be made: {self._refused[0].strerror}",
                    hint="`netlab doctor` tells what the kernel lacks",
                )
            )
        if problems:
            raise NetlabError(problems, Exit.MACHINE)
        return self._draining


def _as_service(server: VirtualServer) -> Service:
    return Service(Key(*server.key), server.scheduler, server.persistent_s or 0, server.by_port)


def _differs(wanted: VirtualServer, found: Present) -> bool:
    key = Key(*wanted.key)
    if found.services.get(key) != _as_service(wanted):
        return True
    there = {
        RealServer(address=each.address, port=each.port, weight=each.weight)
        for each in found.destinations.get(key, ())
        if each.weight or not each.connections  # else it goes when they have ended
    }
    return there != {*wanted.real}


class _Ours:
    """The virtual servers whose address and port our device or one of our sets has."""

    def __init__(self, found: Present) -> None:
        self._addresses = found.addresses
        self._entries: set[str] = set()
        self._node_ports: set[tuple[str, int, str]] = set()
        for name, each in found.sets.items():
            role, family = NAMES[name]
            if each.kind == "hash:ip,port":
                self._entries.update(each.entries)
            for protocol in ("tcp", "udp"):
                if role == node_ports(protocol, local=False):
                    self._node_ports.update((protocol, family, entry) for entry in each.entries)

    def __contains__(self, key: Key) -> bool:
        family = 6 if ":" in key.address else 4
        return (
            key.address in self._addresses
            or f"{key.address},{key.protocol}:{key.port}" in self._entries
            or (key.protocol, family, str(key.port)) in self._node_ports
        )


def _plain(each: IpSet) -> IpSet:
    return IpSet(
        name=each.name,
        kind=each.kind,
        family=each.family,
        entries=tuple(map(plain, each.entries)),
    )


def _same_set(wanted: IpSet, found: IpSet | None) -> bool:
    return found is not None and {*map(plain, wanted.entries)} == {*found.entries}


def _missing(wanted: Iterable[IpSet], found: Mapping[str, IpSet]) -> Iterator[IpSet]:
    """Sets that are not there, and entries."""
    for each in map(_plain, wanted):
        there = found.get(each.name)
        known = frozenset(there.entries) if there else ()
        entries = tuple(entry for entry in each.entries if entry not in known)
        if there is None or entries:
            yield IpSet(name=each.name, kind=each.kind, family=each.family, entries=entries)


def _surplus(wanted: Iterable[IpSet], found: Mapping[str, IpSet]) -> Iterator[IpSet]:
    """Entries that are not wanted."""
    for each in map(_plain, wanted):
        there = found.get(each.name)
        if there is not None:
            known = frozenset(each.entries)
            entries = tuple(entry for entry in there.entries if entry not in known)
            yield IpSet(name=each.name, kind=each.kind, family=each.family, entries=entries)
