"""Whose source a node translates: flannel's rules (pkg/trafficmngr/nftables), and a narrower set.

What leaves the cluster gets the node's address, the only one that routers outside know.  flannel
started with --ip-masq translates all that pods send to what is no pod, other nodes too, which then
see the node in the pod's place.  With `masquerade: outside` Services and nodes are excepted.
"""

from __future__ import annotations

from netlab.datapath import podnet
from netlab.datapath.outside import COMMENT
from netlab.datapath.services.nftables_list import TableText
from netlab.datapath.state import Table
from netlab.topology.model import Lab, Node

_NAMES = {4: "flannel-ipv4", 6: "flannel-ipv6"}
_MULTICAST = {4: "224.0.0.0/4", 6: "ff00::/8"}
_PROTOCOLS = {4: "ip", 6: "ip6"}
_EXCEPT = "nodes and Services are not outside"


def masquerading(lab: Lab, node: Node) -> tuple[Table, ...]:
    """A node's tables, one for each family; none with `masquerade: none`."""
    if lab.overlay.masquerade == "none":
        return ()
    return tuple(_table(lab, node, podnet.family_of(cidr)) for cidr in node.pod_cidrs)


def _table(lab: Lab, node: Node, family: int) -> Table:
    protocol = _PROTOCOLS[family]
    cluster = podnet.of_family(lab.pod_cidrs, family)
    own = podnet.of_family(node.pod_cidrs, family)
    bit = lab.service_proxy.iptables.masqueradeBit
    if lab.service_proxy.mode.startswith("nftables"):
        bit = lab.service_proxy.nftables.masqueradeBit
    mark = f"0x{1 << bit:08x}"
    rules = [
        # kube-proxy translates these itself.
        f"meta mark & {mark} == {mark} return",
        f"{protocol} saddr {own} {protocol} daddr {cluster} return",
        f"{protocol} saddr {cluster} {protocol} daddr {own} return",
        f"{protocol} saddr != {own} {protocol} daddr {cluster} return",
    ]
    if lab.overlay.masquerade == "outside":
        rules.append(
            f'{protocol} saddr {cluster} {protocol} daddr @inside return comment "{_EXCEPT}"'
        )
    rules.append(
        f"{protocol} saddr {cluster} {protocol} daddr != {_MULTICAST[family]} "
        "masquerade fully-random"
    )
    table = TableText(protocol, _NAMES[family], COMMENT)
    if lab.overlay.masquerade == "outside":
        table.set("inside", f"ipv{family}_addr", "flags interval")
        for network in _inside(lab, family):
            table.element("inside", network)
    table.chain("postrtg", "type nat hook postrouting priority srcnat; policy accept;", *rules)
    return table.table()


def _inside(lab: Lab, family: int) -> list[str]:
    """Networks of Services, addresses of nodes: their neighbours are outside like all others."""
    nodes = (address for node in lab.nodes for address in node.addresses)
    return [each for each in (*lab.service_cidrs, *nodes) if podnet.family_of(each) == family]
