"""What the kernel's tables say of the step that did not happen, from the surest to the least sure.

The tables are those of the last place that saw the packet, and of the place that has, or should
have, the address that it was on its way to.
"""

from __future__ import annotations

from collections.abc import Iterable

from netlab.datapath.overlay import vtep_mac
from netlab.datapath.overlays import tunnel_from, tunnels
from netlab.datapath.podnet import switch_port
from netlab.trace.case import Case, last_steps
from netlab.trace.family import IPV4, IPV6, Family, family_of, first_of
from netlab.trace.link_layer import unknown_to_itself
from netlab.trace.model import Leg
from netlab.trace.model_steps import REFUSING, Bridge, Neighbour, Route, Rule
from netlab.trace.place import Place
from netlab.trace.refusals import Doubt
from netlab.trace.witnesses.decisions import Link
from netlab.trace.witnesses.packets import Sighting

NO_ROUTE_FIX = "add the route that is missing; `netlab up` puts a lab's own routes back"


def neighbour_fix(family: Family) -> str:
    """What to look for where nobody tells a MAC."""
    fix = f"find out why {family.neighbours} is not answered: is the address there, is its link up?"
    # ARP is no IP and meets no rule of theirs.
    return f"{fix} Does a rule drop ICMPv6?" if family is IPV6 else fix


def doubts(case: Case, leg: Leg, last: Sighting) -> Iterable[Doubt]:
    """What may have stopped a packet that was last seen at `last`."""
    place = last.place
    steps = last_steps(case, leg)
    yield from switched_off(case, place, last.device)
    outer = last.packet.outer
    target = outer.dst if outer else case.story.leg(leg)[-1].end.destination.ip
    if last.direction == "in" and target in place.addresses:
        yield from _without_address(case, place, target)
        yield from _other_network(case, place, last)
        if leg == "forward" and not outer:
            yield from _without_way_back(case, place)
    for step in steps:
        if isinstance(step, Bridge):
            yield from wrong_tunnel(case, place, step)
    for step in steps:
        if isinstance(step, Route) and step.type in ("martian", "reverse-path"):
            yield from _bad_source(case, place, case.story.leg(leg)[-1].end.source.ip)
    yield from (refused(step, place) for step in steps if isinstance(step, Route) and step.refuses)
    for step in steps:
        if isinstance(step, Route) and step.device and not step.refuses:
            yield from down(case, place, step.device)
    # Before neighbours: a link that is down answers nobody who asks for its MAC.
    for address in [target, *(step.address for step in steps if isinstance(step, Neighbour))]:
        for owner in _owners(case, address):
            if owner != place:
                yield from down(case, owner, "eth0")
    for step in steps:
        if isinstance(step, Neighbour) and step.mac is None:
            yield _unresolved(case, place, step)
    if any(isinstance(step, Rule) and step.action.lower() == "dnat" for step in steps):
        yield from _without_neighbour(case, place)
    if not outer:
        yield from _no_hairpin(case, leg, last, target)
    if place.kind == "switch" and last.direction == "in" and outer:
        yield Doubt(
            "underlay-blocked",
            f"the network between the nodes took it in on {last.device} and did not pass it on: "
            f"something there stops UDP port {outer.dport}, or what is in it",
            f"let UDP port {outer.dport} (VXLAN) pass between the nodes; in this lab "
            f"`ip netns exec {place.namespace} nft list ruleset` shows what stops it",
        )


def _without_neighbour(case: Case, place: Place) -> Iterable[Doubt]:
    """A bridge sends what was translated to its own network by itself: by the neighbour's MAC.

    To whom it was translated is announced when it leaves, so one of the endpoints is asked for.
    """
    behind = (
        endpoint.address
        for entry in case.lab.endpoints
        if f"{entry.namespace}/{entry.service}" == case.aim.service
        for endpoint in entry.endpoints
    )
    for address in dict.fromkeys(behind):
        route = case.tables.route(place, address)
        if route and route.device and route.via is None and not route.refuses:
            neighbour = case.tables.neighbour(place, address, route.device)
            if neighbour and neighbour.mac is None and neighbour.state != "none":
                yield unanswered(case, place, neighbour)


def unanswered(case: Case, place: Place, step: Neighbour) -> Doubt:
    """Why nobody told the MAC of a next hop."""
    for owner in _owners(case, step.address):
        for doubt in down(case, owner, "eth0"):
            return doubt
    return _unresolved(case, place, step)


def refused(route: Route, place: Place) -> Doubt:
    """What a route or a rule that refuses means, and how it is taken away."""
    family = family_of(route.destination)
    ip = f"ip -n {place.namespace}{family.option}"
    if route.rule:
        words = f"a routing rule of {place} says {route.rule}"
        removal = f"`{ip} rule del {route.rule}`"
        return Doubt(route.type, words, f"if that is not meant: {removal}")
    if route.matched and route.type != "forwarding-off":
        article = "an" if route.type == "unreachable" else "a"
        words = f"{place} has {article} {route.type} route for {route.matched}"
        table = "" if route.table == "main" else f" table {route.table}"
        removal = f"`{ip} route del {route.type} {route.matched}{table}`"
        return Doubt(route.type, words, f"if that is not meant: {removal}")
    words, fix = {
        "forwarding-off": (
            f"has a route to {route.destination}, but forwarding is off",
            f"`ip netns exec {place.namespace} sysctl {family.forwarding}=1`, or `netlab up`",
        ),
        "unreachable": (f"says that {route.destination} cannot be reached", None),
        "prohibit": (f"is told by its routes not to send to {route.destination}", None),
        "martian": ("takes the addresses for impossible (a martian)", None),
        "reverse-path": (
            "would send the answer out of another device (rp_filter)",
            f"correct the route to the source, or `ip netns exec {place.namespace} sysctl "
            "net.ipv4.conf.all.rp_filter=2`; `netlab up` does both",
        ),
    }.get(route.type, (f"has no route to {route.destination}", NO_ROUTE_FIX))
    return Doubt(route.type, f"{place} {words}", fix)


def switched_off(case: Case, place: Place, device: str) -> Iterable[Doubt]:
    """IPv6 is off on a device, which then has no address of it."""
    sysctl = case.tables.off_by(place, device)
    if sysctl:
        command = f"`ip netns exec {place.namespace} sysctl {sysctl}=0`"
        yield Doubt(
            "ipv6-off",
            f"IPv6 is switched off on {device} of {place}: {sysctl} is 1",
            f"{command}, and `netlab up`, which puts addresses and routes back",
        )


def up_again(place: Place, device: str, family: Family) -> str:
    """How a device is set up, and what else that takes."""
    command = f"`ip -n {place.namespace} link set {device} up`"
    if family is IPV4:
        return command
    return f"`netlab up`: IPv6 addresses and routes went with the link, {command} brings none back"


def _owners(case: Case, address: str) -> list[Place]:
    return [place for place in case.aim.places if address in place.addresses]


def _without_address(case: Case, place: Place, address: str) -> Iterable[Doubt]:
    route = case.tables.route(place, address)
    if route and route.type != "local":
        yield Doubt(
            "address-missing",
            f"{place} does not have its address {address}, so it takes the packet for somebody "
            "else's",
            "`netlab up` puts the address back",
        )


def _without_way_back(case: Case, place: Place) -> Iterable[Doubt]:
    source = case.story.forward[-1].end.source.ip
    route = case.tables.route(place, source)
    if route and route.refuses:
        why = refused(route, place)
        yield Doubt(why.reason, f"it arrived, and cannot be answered: {why.words}", why.fix)
    elif route and route.device:
        next_hop = case.tables.neighbour(place, route.via or source, route.device)
        if next_hop and next_hop.mac is None and next_hop.state != "none":
            why = unanswered(case, place, next_hop)
            yield Doubt(why.reason, f"it arrived, and cannot be answered: {why.words}", why.fix)


def _bad_source(case: Case, place: Place, source: str) -> Iterable[Doubt]:
    """Why a place takes nothing from a source: it is its own, or its routes refuse it."""
    route = case.tables.route(place, source)
    if route and route.type in REFUSING:
        why = refused(route, place)
        words = f"{why.words}, so {place} takes nothing from there (rp_filter)"
        yield Doubt("reverse-path", words, why.fix)
    if route and route.type == "local":
        yield Doubt(
            "martian",
            f"{place} has the address {source} itself, and takes what comes from there for "
            "impossible (a martian)",
            f"`ip -n {place.namespace} address show to {source}` shows where, and `ip -n "
            f"{place.namespace} address del` or `netlab up` takes it away",
        )


def _other_network(case: Case, place: Place, last: Sighting) -> Iterable[Doubt]:
    """The sender's tunnel is not of the lab's VXLAN network."""
    outer = last.packet.outer
    if outer is None or place.node is None:
        return
    device, vni = tunnel_from(case.lab, place.node, outer.src, case.aim.family.version)
    if outer.vni != vni:
        sender = next((each for each in _owners(case, outer.src)), None)
        yield Doubt(
            "vni-unknown",
            f"{sender or outer.src} sent it with VNI {outer.vni}, and {device} of {place} is of "
            f"VNI {vni}",
            f"`netlab up` makes {device} of {sender or outer.src} again, with VNI {vni}",
        )


def _no_hairpin(case: Case, leg: Leg, last: Sighting, target: str) -> Iterable[Doubt]:
    """A bridge port that should send a packet back to where it came from."""
    place, seen = last.place, case.story.leg(leg)
    sightings = [each.passage.before for each in seen if each.passage.before]
    for sighting in reversed(sightings):
        if sighting.place != place or sighting.direction != "in":
            continue
        port = case.tables.link(place, sighting.device)
        if port is None or port.master is None or port.hairpin:
            return
        neighbour = case.tables.neighbour(place, target, port.master)
        there = case.tables.port(place, port.master, neighbour.mac or "") if neighbour else None
        if there and there.port == port.name:
            yield Doubt(
                "hairpin-off",
                f"{target} is behind {port.name}, by which it came, and the bridge {port.master} "
                f"of {place} sends nothing back out of there",
                f"`bridge -n {place.namespace} link set dev {port.name} hairpin on`, or "
                "`netlab up`",
            )
        return


def wrong_tunnel(case: Case, place: Place, entry: Bridge) -> Iterable[Doubt]:
    """An FDB entry that is missing, or leads to another node than the MAC's."""
    if entry.port or entry.flooded:
        return
    family = case.aim.family
    version = family.version
    node = next((each for each in case.lab.nodes if vtep_mac(each, version) == entry.mac), None)
    address = first_of(family, node.addresses) if node else None
    command = f"bridge -n {place.namespace} fdb replace {entry.mac} dev {entry.device} dst"
    fix = f"`{command} {address or 'NODE_ADDRESS'} self permanent`, or `netlab up`"
    if entry.remote is None:
        yield Doubt("fdb-missing", f"{entry}, so {place} cannot tell which node to send it to", fix)
    elif node and entry.remote != address:
        there = next((each for each in case.lab.nodes if entry.remote in each.addresses), None)
        whose = f"is node {there.name}'s" if there else "no node has"
        yield Doubt(
            "fdb-wrong",
            f"{entry}, an address that {whose}: the MAC is that of node {node.name}, {address}",
            fix,
        )


def _unresolved(case: Case, place: Place, step: Neighbour) -> Doubt:
    why = ""
    for owner in _owners(case, step.address):
        for off in switched_off(case, owner, "eth0"):
            return off
        for doubt in _without_address(case, owner, step.address):
            return Doubt(
                doubt.reason,
                f"{owner} does not have its address {step.address}, so "
                f"nobody told {place} a MAC for it",
                doubt.fix,
            )
        for path in ("all", "eth0"):
            ignored = case.tables.setting(owner, f"net/ipv4/conf/{path}/arp_ignore")
            if ":" not in step.address and ignored not in ("0", None):
                return Doubt(
                    "arp-ignored",
                    f"{owner} does not answer ARP for {step.address} (arp_ignore is {ignored}), so "
                    f"nobody told {place} a MAC for it",
                    f"`ip netns exec {owner.namespace} sysctl net.ipv4.conf.{path}.arp_ignore=0`",
                )
    # What is told comes back to the bridge's own MAC.
    bridge = case.tables.link(place, step.device)
    for doubt in unknown_to_itself(case, place, bridge):
        words = f"{doubt.words}, the answer to {case.aim.family.neighbours} for {step.address} too"
        return Doubt(doubt.reason, words, doubt.fix)
    lab = case.lab
    for node in lab.nodes:
        if step.address in node.overlay_addresses:
            version = case.aim.family.version
            return Doubt(
                "neighbour-unresolved",
                f"{place} does not know the MAC of {step.address}, the tunnel end of node "
                f"{node.name}, and on {step.device} nobody answers {case.aim.family.neighbours}",
                f"`ip -n {place.namespace} neigh replace {step.address} lladdr "
                f"{vtep_mac(node, version)} dev {step.device} nud permanent`, or `netlab up`",
            )
    known = {*lab.underlay.gateways, *(each for pod in lab.pods for each in pod.addresses)}
    for node in lab.nodes:
        known |= {*node.addresses, *node.bridge_addresses}
    fix = neighbour_fix(case.aim.family)
    if step.address not in known:
        why = "; no pod and no node of the lab has that address"
        fix = "`netlab get pods` lists the addresses that there are"
    return Doubt(
        "neighbour-unresolved",
        f"nobody told {place} the MAC of {step.address} on {step.device} ({step.state}){why}",
        fix,
    )


def down(case: Case, place: Place, device: str) -> Iterable[Doubt]:
    """A device that is down, or the one whose being down takes its carrier."""
    link = case.tables.link(place, device)
    if link is None or (link.up and link.carrier):
        return
    if not link.up:
        yield _is_down(case, place, link)
        return
    if link.kind == "bridge":
        for port in case.tables.ports(place, device):
            yield from down(case, place, port.name)
    for owner in case.aim.places:
        far = case.tables.link(owner, link.peer) if link.peer and owner != place else None
        if far and far.peer == link.index and not far.up:
            yield _is_down(case, owner, far)
    yield Doubt("link-down", f"{device} of {place} has no carrier: its other end is down", None)


def off_at(case: Case, place: Place) -> Iterable[Doubt]:
    """Devices of a node that are down, or have IPv6 switched off, and so have no routes."""
    devices: tuple[str, ...] = ()
    if place.kind == "node" and place.node:
        devices = tunnels(case.lab, case.lab.node(place.node), case.aim.family.version)
    for device in ("eth0", "cbr0", *devices):
        link = case.tables.link(place, device)
        if link and not link.up:
            yield _is_down(case, place, link)
        elif link and case.aim.family is IPV6:
            yield from switched_off(case, place, device)


def _is_down(case: Case, place: Place, link: Link) -> Doubt:
    family = case.aim.family
    for name in case.lab.stopped:
        node = case.lab.node(name)
        port = place.kind == "switch" and link.name == switch_port(node)
        if port or (place.kind == "node" and place.name == name):
            return Doubt(
                "node-stopped",
                f"node {name} is stopped: its machine is off",
                f"`netlab start node/{name}`",
            )
    bridge = f", a port of {link.master}," if link.master else ""
    # A port has no addresses.
    fix = up_again(place, link.name, IPV4 if link.master else family)
    return Doubt("link-down", f"{link.name} of {place}{bridge} is down", fix)
