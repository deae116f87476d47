"""`eni`: pods have further addresses of their node's own interface, as the AWS VPC CNI has it.

Nothing is encapsulated and no node has a route to another's pods: all addresses are of one network.
There the VPC knows which interface has an address; here the node answers ARP for its pods
(proxy_arp).  What a pod sends is looked up in a table of its own, whose only way is the network's
router, which is what makes the plugin's rules of policy routing: to a pod by the main table
(priority 512), from a pod by the interface's (1536).  With several interfaces that is what keeps
the answer on the one that has the address (amazon-vpc-cni-k8s, pkg/networkutils/network.go).
"""

from __future__ import annotations

from netlab.datapath import podnet
from netlab.datapath.overlay import OverlayType, Part, PodsByNode
from netlab.datapath.state import Policy, Route, Sysctl
from netlab.topology.model import Lab, Node

TO_POD, FROM_POD = 512, 1536  # priorities, as the plugin has them
TABLE = 2  # the plugin's first: the interface's number and one


def _part(lab: Lab, node: Node, pods: PodsByNode) -> Part:
    gateway = lab.underlay.gateway
    alone = [podnet.host_network(pod.address) for pod in pods[node.name]]
    return Part(
        routes=(
            Route(destination=podnet.host_network(gateway), link="eth0", table=TABLE),
            Route(destination="0.0.0.0/0", link="eth0", via=gateway, table=TABLE),
        ),
        policies=(
            *(Policy(priority=TO_POD, table=254, destination=each) for each in alone),
            *(Policy(priority=FROM_POD, table=TABLE, source=each) for each in alone),
        ),
        sysctls=(
            # In place of the VPC, which brings a frame to the interface that has its address.
            Sysctl(path="net/ipv4/conf/eth0/proxy_arp", value="1"),
            # The kernel would answer for others after a random time of up to 0.8 s.
            Sysctl(path="net/ipv4/neigh/eth0/proxy_delay", value="0"),
        ),
    )


TYPE = OverlayType(part=_part, routed_pods="permanent")
