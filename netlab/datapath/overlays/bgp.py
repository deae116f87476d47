"""`bgp`: as Calico without a tunnel, where a routing daemon in each node tells where pods are.

A node's pods have addresses of its blocks (/26), and it announces those, not single pods, to every
other one: BIRD's full mesh of one autonomous system (confd/etc/calico/confd/templates/bird.cfg).
What it hears it puts into the kernel as routes "proto bird" by way of the peer.  A pod is no port
of a bridge: its link is a routed one, by which the node answers ARP for whatever it is asked.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import ip_address, ip_network

from netlab.datapath.overlay import OverlayType, Part, PodsByNode, of, peers, strays
from netlab.datapath.state import File, Process, Route, namespace_name
from netlab.topology.model import Lab, Node

_CONFIG = "/run/bird/bird.conf"
_USER = "bird"  # Debian's package makes it


def blocks(lab: Lab, node: Node, pods: PodsByNode) -> tuple[str, ...]:
    """What a node announces: its blocks with pods in them, the first one in any case, then strays.

    Calico gives a node its first block with its first pod, and another when that is full.
    """
    cidr, size = ip_network(of(4, node.pod_cidrs)), lab.overlay.block_size
    found = {int(cidr.network_address)}
    mask = ~((1 << (32 - size)) - 1)
    found |= {
        int(address) & mask
        for pod in pods.get(node.name, ())
        if (address := ip_address(pod.address)) in cidr
    }
    whole = tuple(f"{ip_address(number)}/{size}" for number in sorted(found))
    return (*whole, *strays(node, pods, 4))


def _part(lab: Lab, node: Node, pods: PodsByNode) -> Part:
    learned = (
        Route(destination=block, link="eth0", via=of(4, peer.addresses))
        for peer in peers(lab, node, 4)
        for block in blocks(lab, peer, pods)
    )
    return Part(
        processes=(
            Process(
                name="bird",
                namespace=namespace_name(lab.name, node.name),
                command=(
                    *("bird", "-f", "-c", _CONFIG, "-P", "/run/bird/bird.pid"),
                    *("-u", _USER, "-g", _USER),
                ),
                package="bird2",
                files=(File(path=_CONFIG, text=_config(lab, node, pods)),),
                directories=(("/run/bird", _USER),),
                reload="SIGHUP",
                routes=tuple(learned),
            ),
        ),
    )


def _config(lab: Lab, node: Node, pods: PodsByNode) -> str:
    return "\n".join(_lines(lab, node, pods)) + "\n"


def _lines(lab: Lab, node: Node, pods: PodsByNode) -> Iterable[str]:
    yield "log stderr all;"
    yield f"router id {node.address};"
    # BIRD 2.0.12 may sleep for 3 s before it sends what it has to a new peer (io_loop() of
    # sysdep/unix/io.c); a timer wakes it.
    yield "protocol device { scan time 1; }"
    yield "protocol static blocks {"
    yield "  ipv4;"
    for block in blocks(lab, node, pods):
        # An address of the block that no pod has is refused here, and goes round no default route.
        yield f"  route {block} {'unreachable' if block.endswith('/32') else 'blackhole'};"
    yield "}"
    # Peers are the next hops of what they announce, and are looked up in this.
    yield 'protocol direct uplink { ipv4; interface "eth0"; }'
    yield "protocol kernel {"
    # A block is refused to the kernel as a whole; a pod outside it has a route to its link there.
    yield "  ipv4 {"
    yield "    import none;"
    yield '    export where source = RTS_BGP || (proto = "blocks" && net.len < 32);'
    yield "  };"
    yield "}"
    for peer in peers(lab, node, 4):
        there = of(4, peer.addresses)
        yield f"protocol bgp Mesh_{there.replace('.', '_')} {{"
        yield f"  local {of(4, node.addresses)} as {lab.overlay.as_number};"
        yield f"  neighbor {there} as {lab.overlay.as_number};"
        # One of two asks, the other waits to be asked: what is built at once does not collide.
        if node.address > peer.address:
            yield "  passive on;"
        yield "  connect delay time 1;"
        yield "  connect retry time 1;"
        yield "  error wait time 1, 5;"
        yield '  ipv4 { import all; export where proto = "blocks"; next hop self; };'
        yield "}"


TYPE = OverlayType(part=_part, routed_pods="proxy", programs=(("bird", "bird2"),))
