"""What of a lab lives on one machine: a node in the machine's own namespace, and its pods.

Pure.  The machine has its link to the others, its addresses and its routes already; of what a node
has only the rest is made there, and settings that concern all links of the machine are left out.
"""

from __future__ import annotations

from msgspec.structs import replace

from netlab.datapath.state import LabState, Link, Namespace, NodeState, State, Sysctl
from netlab.problems import NetlabError, Problem
from netlab.topology.model import Lab

_UPLINK = "eth0"  # of a node that is a namespace
_ALL_LINKS = ("net/ipv6/conf/all/", "net/ipv6/conf/default/")


class Part(State, frozen=True):
    """Which node of a lab a machine is, and by which interface it reaches the others."""

    node: str
    interface: str


def part_of(state: LabState, part: Part) -> LabState:
    """The state of one machine; `state` has that node, and is of a lab that :func:`check` takes."""
    node = next(each for each in state.nodes if each.name == part.node)
    own = _on_machine(node, part)
    here = {own.namespace.name, *(pod.name for pod in own.pods)}
    servers = tuple(each for each in state.servers if each.namespace in here)
    return LabState(lab=state.lab, switch=None, nodes=(own,), servers=servers)


def check(lab: Lab) -> None:
    """Raise NetlabError (exit 2) if a lab has what cannot live on machines of their own."""
    problems = []

    def refuse(what: str) -> None:
        problems.append(
            Problem(
                "not-on-hosts",
                f"Lab {lab.name} {what}, which nodes on machines of their own do not have",
                hint="without --hosts its nodes are namespaces of this machine, and all of it is",
            )
        )

    if lab.overlay.type != "vxlan":
        refuse(f'has overlay.type "{lab.overlay.type}" and not vxlan')
    if any(":" in cidr for cidr in (*lab.pod_cidrs, *lab.service_cidrs)):
        refuse("has IPv6")
    if lab.hosts or lab.gateway:
        refuse("has machines outside the cluster (Host, Gateway, LoadBalancer)")
    if lab.docker_containers or lab.docker_networks:
        refuse("has Docker's containers beside pods")
    if any(port.host_port for pod in lab.pods for port in pod.ports):
        refuse("has pods with a hostPort")
    if any(pod.is_probed for pod in lab.pods):
        refuse("has pods with probes, whose results change Services on all nodes at once")
    if lab.faults:
        refuse("has faults")
    if problems:
        raise NetlabError(problems)


def _on_machine(node: NodeState, part: Part) -> NodeState:
    namespace = node.namespace
    links = tuple(_below(link, part) for link in namespace.links if link.name != _UPLINK)
    own = Namespace(
        name=namespace.name,
        links=links,
        addresses=tuple(each for each in namespace.addresses if each.link != _UPLINK),
        routes=tuple(each for each in namespace.routes if each.link != _UPLINK),
        neighbours=namespace.neighbours,
        fdb=namespace.fdb,
        policies=namespace.policies,
        sysctls=(
            *(each for each in namespace.sysctls if not each.path.startswith(_ALL_LINKS)),
            # Others on the machine may have IPv6.
            *(Sysctl(path=f"net/ipv6/conf/{each.name}/disable_ipv6", value="1") for each in links),
        ),
        tables=namespace.tables,
    )
    return replace(node, namespace=own)


def _below(link: Link, part: Part) -> Link:
    if link.vxlan is None:
        return link
    return replace(link, vxlan=replace(link.vxlan, device=part.interface))
