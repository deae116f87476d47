"""Changes in words, and as the commands that somebody would type for them."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from ipaddress import ip_address

from netlab.datapath.balancing_commands import balancing_commands, no_balancing_commands
from netlab.datapath.state import (
    MAIN_TABLE,
    Address,
    Balancing,
    BalancingUpdate,
    Chains,
    Change,
    FdbEntry,
    Item,
    Leftovers,
    Link,
    Namespace,
    Neighbour,
    Peer,
    Policy,
    Route,
    Ruleset,
    Sysctl,
    Tables,
    Update,
)

_SIGNS = {"add": "+", "set": "~", "delete": "-"}


def describe(item: Item) -> str:
    """One item in the words of iproute2: "route 10.244.2.0/24 via 10.244.2.0 dev flannel.1"."""
    match item:
        case Namespace(name=name):
            return f"namespace {name}"
        case Link():
            master = f" master {item.master}" if item.master else ""
            tunnel = f" id {item.vxlan.vni} local {item.vxlan.local}" if item.vxlan else ""
            if item.vxlan and item.vxlan.remote:
                tunnel += f" remote {item.vxlan.remote}"
            if item.ipip:
                tunnel = f" local {item.ipip.local}"
            loss = f" loss {item.loss}%" if item.loss else ""
            down = "" if item.up else " down"
            return f"{item.kind} {item.name}{tunnel} mtu {item.mtu}{master}{loss}{down}"
        case Address(link=link, address=address):
            return f"address {address} dev {link}"
        case Route():
            via = f" via {item.via}" if item.via else ""
            return f"route {item.destination}{via} dev {item.link}{_table(item)}"
        case Policy():
            return f"rule {_selector(item)} priority {item.priority}"
        case Neighbour(link=link, address=address, mac=mac):
            return f"neighbour {address} lladdr {mac} dev {link}"
        case FdbEntry(link=link, mac=mac, destination=destination):
            return f"fdb {mac} dst {destination} dev {link}"
        case Sysctl(path=path, value=value):
            return f"sysctl {path.replace('/', '.')}={value}"
        case Ruleset():
            backend = f"iptables-{item.backend}, " if item.backend else ""
            return f"rules ({backend}{item.ipv4.count(chr(10) + '-A ')} for IPv4)"
        case Tables():
            return f"rules in table {' and '.join(_names(item))}"
        case Balancing():
            entries = sum(len(each.entries) for each in item.sets)
            return (
                f"{len(item.servers)} virtual servers, {len(item.addresses)} addresses of "
                f"{item.device}, {entries} entries of {len(item.sets)} sets, {describe(item.rules)}"
            )
        case BalancingUpdate():
            return _balancing_update(item)
        case Chains(ipv4=ipv4, ipv6=ipv6):
            return f"{(ipv4 + ipv6).count(chr(10) + ':')} chains beside the service proxy's"
        case Update(ipv4=ipv4, ipv6=ipv6, tables=tables):
            return f"rules of what changed ({(ipv4 + ipv6 + tables).count(chr(10))} lines)"
        case Leftovers():
            chains = (item.ipv4 + item.ipv6).count("\n-X ")
            parts = [f"{chains} chains of iptables"] if chains else []
            parts += (f"table {table}" for table in item.tables)
            parts += [f"virtual servers and {item.device}"] if item.device else []
            return f"rules that are not wanted: {', '.join(parts)}"


def _balancing_update(update: BalancingUpdate) -> str:
    parts = []
    for what, there, gone in (
        ("virtual servers", len(update.servers), len(update.no_servers)),
        (f"addresses of {update.device}", len(update.addresses), len(update.no_addresses)),
        (
            "entries of sets",
            sum(len(each.entries) for each in update.sets),
            sum(len(each.entries) for each in update.no_sets),
        ),
    ):
        parts += [f"{there} {what}"] if there else []
        parts += [f"{gone} {what} less"] if gone else []
    if update.ipv4 or update.ipv6:
        parts.append("rules")
    return f"of what changed {', '.join(parts)}"


def _table(route: Route) -> str:
    return f" table {route.table}" if route.table != MAIN_TABLE else ""


def _selector(policy: Policy) -> str:
    """A rule of policy routing but for its priority, as `ip rule` has it."""
    to = f" to {policy.destination}" if policy.destination else ""
    mark = f" fwmark {policy.mark:#x}" if policy.mark else ""
    return f"from {policy.source or 'all'}{to}{mark} lookup {policy.table}"


def _names(rules: Tables) -> list[str]:
    return [f"{table.family} {table.name}" for table in rules.tables]


def summary(change: Change) -> str:
    """One line of `up --dry-run`."""
    where = "" if isinstance(change.item, Namespace) else f"{change.namespace}  "
    return f"{_SIGNS[change.verb]} {where}{describe(change.item)}"


def shell(changes: Iterable[Change], desired: Iterable[Namespace]) -> Iterator[str]:
    """The changes as commands of iproute2, sysctl, iptables-restore and nft, ready for `sh`.

    They leave the same datapath, without our marks of ownership and without what answers in pods.
    """
    yield "# Needs iproute2, procps, iptables and, for kube-proxy's counters, nfacct."
    yield "# netlab does not know what this makes: `ip netns del` removes it."
    ends = {
        Peer(namespace=namespace.name, link=link.name): link
        for namespace in desired
        for link in namespace.links
    }
    for change in sorted(changes, key=_stage):
        yield from _commands(change, ends)


def _stage(change: Change) -> int:
    """Namespaces, bridges, pairs (made from the end in a bridge), then what needs them.

    What links are to be like is said before there are any.
    """
    match change.item:
        case Namespace():
            return 0 if change.verb == "add" else 9
        case Sysctl():
            return 4 if change.item.link else 0
        case Link(kind="bridge"):
            return 1
        case Link() if change.item.makes_pair:
            return 2
        case Link():
            return 3
        case Ruleset() | Tables() | Balancing() | Update() | BalancingUpdate():
            return 5
        case Leftovers():
            return 6
    return 4


def _commands(change: Change, ends: dict[Peer, Link]) -> Iterator[str]:
    quoted = shlex.quote(change.namespace)
    ip = f"ip -n {quoted}"
    inside = f"ip netns exec {quoted}"
    verb = "del" if change.verb == "delete" else "replace"
    match change.item:
        case Namespace() if change.verb == "delete":
            yield f"ip netns del {quoted}"
        case Namespace():
            yield f"ip netns add {quoted}"
            yield f"{ip} link set lo up"
        case Link() if change.verb == "delete":
            yield f"{ip} link del {change.item.name}"
        case Link():
            yield from _link_commands(ip, change.verb, change.item, ends)
        case Address(link=link, address=address):
            nodad = " nodad" if ":" in address and verb != "del" else ""
            yield f"{ip} address {verb} {address} dev {link}{nodad}"
        case Route():
            via = f" via {change.item.via}" if change.item.via else ""
            onlink = " onlink" if change.item.onlink else ""
            where = f"{change.item.destination}{via} dev {change.item.link}{onlink}"
            yield f"{ip} route {verb} {where}{_table(change.item)}"
        case Policy(priority=priority):
            # Rules may stand twice; `ip rule replace` there is none.
            action = "del" if verb == "del" else "add"
            yield f"{ip} rule {action} {_selector(change.item)} priority {priority} protocol boot"
        case Neighbour(link=link, address=address, mac=mac):
            yield f"{ip} neighbour {verb} {address} lladdr {mac} dev {link} nud permanent"
        case FdbEntry(link=link, mac=mac, destination=destination):
            yield f"bridge -n {quoted} fdb {verb} {mac} dev {link} dst {destination} self permanent"
        case Sysctl(path=path, value=value):
            yield f"{inside} sysctl -q -w {path}={value}"
        case Ruleset():
            yield from _rules_commands(inside, change.item)
        case Tables():
            yield _nft(inside, change.item.transaction)
        case Balancing() | BalancingUpdate():
            yield from balancing_commands(ip, inside, change.item)
            if isinstance(change.item, Balancing):
                yield from _rules_commands(inside, change.item.rules)
            else:
                yield from _restores(inside, change.item)
        case Chains():
            yield from _restores(inside, change.item)
        case Update(tables=tables):
            yield from _restores(inside, change.item)
            if tables:
                yield _nft(inside, tables)
        case Leftovers():
            yield from _restores(inside, change.item)
            for table in change.item.tables:
                yield f"{inside} nft delete table {table}"
            if change.item.device:
                yield from no_balancing_commands(ip, inside, change.item.device)


def _link_commands(ip: str, verb: str, link: Link, ends: dict[Peer, Link]) -> Iterator[str]:
    settings = f"mtu {link.mtu}" + (f" address {link.mac}" if link.mac else "")
    if verb == "add" and link.kind == "bridge":
        yield f"{ip} link add {link.name} {settings} type bridge"
    elif verb == "add" and link.vxlan:
        vxlan = link.vxlan
        yield (
            f"{ip} link add {link.name} {settings} type vxlan id {vxlan.vni} local {vxlan.local}"
            f" dev {vxlan.device} dstport {vxlan.port} {'' if vxlan.learning else 'no'}learning"
            + (f" {_remote_word(vxlan.remote)} {vxlan.remote}" if vxlan.remote else "")
        )
    elif verb == "add" and link.ipip:
        yield (
            f"{ip} link add {link.name} mtu {link.mtu} type ipip local {link.ipip.local}"
            f" dev {link.ipip.device}"
        )
    elif verb == "add" and link.peer and link.makes_pair:
        end = ends[link.peer]
        far = f"mtu {end.mtu}" + (f" address {end.mac}" if end.mac else "")
        yield (
            f"{ip} link add {link.name} {settings} type veth"
            f" peer name {end.name} netns {shlex.quote(link.peer.namespace)} {far}"
        )
    elif verb == "set":
        yield f"{ip} link set {link.name} {settings}"
        if link.kind == "bridge" and link.mac:
            own = f"{link.mac} dev {link.name} self permanent"
            yield f"bridge{ip.removeprefix('ip')} fdb replace {own}"
    if link.master:
        yield f"{ip} link set {link.name} master {link.master}"
        if link.hairpin:
            yield f"{ip} link set {link.name} type bridge_slave hairpin on"
    tc = f"tc{ip.removeprefix('ip')} qdisc"
    if link.loss:
        yield f"{tc} replace dev {link.name} root netem loss {link.loss}%"
    elif verb == "set":
        yield f"{tc} del dev {link.name} root 2> /dev/null || true"
    yield f"{ip} link set {link.name} {'up' if link.up else 'down'}"


def _remote_word(remote: str) -> str:
    return "group" if ip_address(remote).is_multicast else "remote"


def _rules_commands(inside: str, rules: Ruleset) -> Iterator[str]:
    for name in rules.nfacct:
        yield f"{inside} nfacct add {name}"
    yield from _restores(inside, rules, "")


def _restores(
    inside: str,
    rules: Ruleset | Chains | Update | BalancingUpdate | Leftovers,
    option: str = " --noflush",
) -> Iterator[str]:
    backend = f"-{rules.backend}" if rules.backend else ""
    for family, text in (("iptables", rules.ipv4), ("ip6tables", rules.ipv6)):
        if text:
            yield f"{inside} {family}{backend}-restore{option} <<'EOF'\n{text.rstrip()}\nEOF"


def _nft(inside: str, text: str) -> str:
    return f"{inside} nft -f - <<'EOF'\n{text}EOF"
