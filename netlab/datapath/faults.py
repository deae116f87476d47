"""Faults to practise with: each is what a lab should hold, with something wrong in it.

A fault is declared like everything else of a lab (`Lab.faults`): `build` gives the state of the lab
with its faults, so that injecting one is a change of a running lab, clearing it another, and an
`up` of the file, which has none, repairs it.  Pure; one line in `FAULTS` for each.

A fault is met by the packets from one pod, the client, to another, the server, or to a Service.
They are of IPv4.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import msgspec
from msgspec.structs import replace

from netlab.datapath.fault_edits import (
    STALE_PORT,
    asymmetric,
    crowded,
    drop_chain,
    fault_table,
    in_namespace,
    no_endpoints,
    no_fdb,
    no_neighbour,
    no_route,
    not_accepting,
    not_listening,
    on_loopback,
    other_sources,
    other_vni,
    outraced,
    pod_link_is,
    remote_only,
    second_owner,
    server_is,
    stale_connection,
    sysctl_is,
    tunnel_is,
    unmasqueraded,
    with_sysctl,
    wrong_vtep,
)
from netlab.datapath.fault_places import (
    Choices,
    between_nodes,
    by_another_node,
    from_pods,
    pod_of,
    service_of,
    tcp_port,
    through_vxlan,
    to_a_neighbour,
    to_balancers,
    to_nodes,
    to_own_service,
    to_pods,
    to_remote_endpoints,
    to_services,
    to_strangers,
)
from netlab.datapath.state import (
    LabState,
    Sysctl,
)
from netlab.topology.model import Fault, Lab

# Sysctls that a lab has no word for but in a fault, as the kernel has them by itself.
_DEFAULTS = {"net/ipv4/ip_default_ttl": "64", "net/ipv4/conf/all/arp_ignore": "0"}


_SMALLER = 100  # bytes that an MTU is too small by


class Kind(msgspec.Struct, frozen=True):
    """A sort of fault.

    `edit` makes the lab's state wrong, `declare` the lab itself.  `options` are those of the trace
    that meets it, `feature` one that the kernel must have (netlab.kernel.features).
    """

    sentence: str
    needs: str
    choices: Choices
    edit: Callable[[LabState, Lab, Fault], LabState] | None = None
    declare: Callable[[Lab, Fault], Lab] | None = None
    options: Callable[[Lab, Fault], Sequence[str]] = lambda lab, fault: ()
    destination: Callable[[Lab, Fault], str] | None = None
    feature: str = ""


def faulty(lab: Lab) -> Lab:
    """A lab as its faults make it appear: the Services that they concern.  Idempotent."""
    for fault in lab.faults:
        declare = FAULTS[fault.name].declare
        lab = declare(lab, fault) if declare else lab
    return lab


def with_faults(state: LabState, lab: Lab) -> LabState:
    """The state of a lab with its faults in it."""
    for fault in lab.faults:
        edit = FAULTS[fault.name].edit
        state = edit(state, lab, fault) if edit else state
    return state


def without_faults(state: LabState, before: Lab | None) -> LabState:
    """The state with the kernel's defaults where `before` had faults that it has no more."""
    for fault in before.faults if before else ():
        edit = FAULTS[fault.name].edit
        was = edit(state, before, fault) if edit and before else state
        for old, new in zip(was.namespaces(), state.namespaces(), strict=True):
            paths = {sysctl.path for sysctl in new.sysctls}
            for sysctl in old.sysctls:
                if sysctl.path in _DEFAULTS and sysctl.path not in paths:
                    default = Sysctl(path=sysctl.path, value=_DEFAULTS[sysctl.path])
                    state = in_namespace(
                        state, new.name, functools.partial(with_sysctl, sysctl=default)
                    )
    return state


def lasting(lab: Lab) -> tuple[Fault, ...]:
    """The faults of what is still there."""
    there = {"", *(node.name for node in lab.nodes), *(pod.key for pod in lab.pods)}
    services = {"", *(service.key for service in lab.services)}
    hosts = {"", *(host.name for host in lab.hosts)}
    return tuple(
        fault
        for fault in lab.faults
        if {fault.node, fault.client, fault.server} <= there
        and fault.service in services
        and fault.host in hosts
    )


def trace_of(lab: Lab, fault: Fault) -> list[str]:
    """The arguments of a `netlab trace` that meets a fault."""
    kind = FAULTS[fault.name]
    if kind.destination:
        to = kind.destination(lab, fault)
    elif fault.service:
        to = f"svc/{fault.service}:{service_of(lab, fault).ports[0].port}"
    else:
        to = f"{fault.server}:{tcp_port(pod_of(lab, fault.server))}"
    return [fault.client, to, *kind.options(lab, fault)]


def _balancer_address(lab: Lab, fault: Fault) -> str:
    service = service_of(lab, fault)
    address = next(address for address in service.load_balancer_ips if "." in address)
    return f"{address}:{service.ports[0].port}"


def _node_port(lab: Lab, fault: Fault) -> str:
    return f"node/{fault.node}:{service_of(lab, fault).ports[0].node_port}"


def _host_port(lab: Lab, fault: Fault) -> str:
    host = next(host for host in lab.hosts if host.name == fault.host)
    return f"host/{host.name}:{next(port for name, port in host.listen if name == 'TCP')}"


def _server_itself(lab: Lab, fault: Fault) -> str:
    return fault.server


def _large(lab: Lab, fault: Fault) -> Sequence[str]:
    overhead = 50 if lab.overlay.type == "vxlan" else 0
    return ("--protocol", "icmp", "--size", str(lab.underlay.mtu - overhead - 20))


_TWO_NODES = "pods on two nodes, one of which listens"


_TUNNEL = "overlay vxlan, and pods on two nodes, one of which listens"


_LISTENER = "two pods, one of which listens on TCP"


FAULTS: Mapping[str, Kind] = {
    "no-route": Kind(
        "A node has no route to the pods of another one.", _TWO_NODES, between_nodes, no_route
    ),
    "forwarding-off": Kind(
        "A node does not forward packets.",
        _TWO_NODES,
        between_nodes,
        sysctl_is("net/ipv4/ip_forward", "0"),
    ),
    "rp-filter": Kind(
        "A node checks strictly that answers would leave by where requests come from, and they "
        "would not.",
        _TUNNEL,
        through_vxlan(to_nodes),
        asymmetric,
    ),
    "neighbour-unresolved": Kind(
        "A node does not know the MAC of another one's tunnel end.",
        _TUNNEL,
        through_vxlan(between_nodes),
        no_neighbour,
    ),
    "fdb-missing": Kind(
        "A node does not know behind which node a tunnel end is.",
        _TUNNEL,
        through_vxlan(between_nodes),
        no_fdb,
    ),
    "wrong-vtep": Kind(
        "A node takes the wrong address for another one's tunnel end.",
        _TUNNEL,
        through_vxlan(between_nodes),
        wrong_vtep,
    ),
    "wrong-vni": Kind(
        "A node's tunnel is of another VXLAN network than those of the others.",
        _TUNNEL,
        through_vxlan(between_nodes),
        tunnel_is(other_vni),
    ),
    "underlay-port-blocked": Kind(
        "The network between the nodes lets no VXLAN through.",
        _TUNNEL,
        through_vxlan(between_nodes),
        fault_table(drop_chain("forward", "udp dport $port drop"), "bridge", on_switch=True),
    ),
    "link-down": Kind(
        "The link of a pod is down.",
        _LISTENER,
        to_pods,
        pod_link_is(lambda link: replace(link, up=False)),
    ),
    "loss": Kind(
        "The link of a pod loses half of what is sent to it.",
        f"{_LISTENER}; and netem in the kernel (sch_netem)",
        to_pods,
        pod_link_is(lambda link: replace(link, loss=50)),
        options=lambda lab, fault: ("--count", "10"),
        feature="netem",
    ),
    "small-mtu": Kind(
        "A node's tunnel takes smaller packets than the pods send.",
        _TUNNEL,
        through_vxlan(between_nodes),
        tunnel_is(lambda link: replace(link, mtu=link.mtu - _SMALLER)),
        options=_large,
    ),
    "policy-drop": Kind(
        "A node's firewall drops what it does not know.",
        _TWO_NODES,
        to_nodes,
        fault_table(drop_chain("forward", "ct state established,related accept", policy="drop")),
    ),
    "source-range": Kind(
        "A load balancer's address serves only sources that the client is none of.",
        "a Service of type LoadBalancer with an address and endpoints",
        to_balancers,
        declare=other_sources,
        destination=_balancer_address,
    ),
    "no-endpoints": Kind(
        "No pod of a Service is ready.",
        "a Service with endpoints, and a pod that is none",
        to_services,
        declare=no_endpoints,
    ),
    "remote-only-local-policy": Kind(
        "A Service keeps to the client's node, and has no endpoint there.",
        "a Service with endpoints on another node than the client's",
        to_remote_endpoints,
        declare=remote_only,
    ),
    "missing-masquerade": Kind(
        "A node passes on what comes to a NodePort without putting itself in as the source.",
        "a NodePort whose endpoints are all on one node, and another pod there",
        by_another_node,
        unmasqueraded,
        destination=_node_port,
    ),
    "bridge-nf-off": Kind(
        "A node's bridge passes answers on without connection tracking.",
        "a Service whose endpoints are all on one node, and another pod there",
        to_a_neighbour,
        sysctl_is("net/bridge/bridge-nf-call-iptables", "0"),
    ),
    "stale-conntrack": Kind(
        "A node remembers a client's connection to a pod that is gone.",
        "a Service over TCP or UDP with endpoints, and a pod that is none",
        to_services,
        stale_connection,
        options=lambda lab, fault: ("--source-port", str(STALE_PORT)),
    ),
    "conntrack-full": Kind(
        "A node remembers as many connections as it may, all of which last.",
        _TWO_NODES,
        to_nodes,
        crowded,
    ),
    "source-port-race": Kind(
        "A node gives connections its address and lets them keep their ports, and another one is "
        "just a little faster.",
        "a Host that sees nodes in the place of pods, as in the topology egress; and queues of "
        "nftables in the kernel (nft_queue)",
        to_strangers,
        outraced,
        destination=_host_port,
        feature="nft queue",
    ),
    "conntrack-invalid": Kind(
        "A node tracks the answers of connections, but not their beginning.",
        _TWO_NODES,
        to_nodes,
        fault_table(
            "\tchain prerouting {\n\t\ttype filter hook prerouting priority -300; policy accept;\n"
            "\t\tip saddr $client tcp flags & (syn | ack) == syn notrack\n\t}\n"
            + drop_chain("forward", "ct state invalid drop")
        ),
    ),
    "port-closed": Kind(
        "Nothing listens on a pod's port.", _LISTENER, to_pods, server_is(not_listening)
    ),
    "wrong-listen-address": Kind(
        "A server listens on its loopback address alone.",
        _LISTENER,
        to_pods,
        server_is(on_loopback),
    ),
    "accept-queue-full": Kind(
        "A server listens, and accepts no connection.", _LISTENER, to_pods, server_is(not_accepting)
    ),
    "icmp-filtered": Kind(
        "A node's firewall drops ICMP.",
        _TWO_NODES,
        to_nodes,
        fault_table(drop_chain("forward", "meta l4proto icmp drop")),
        options=lambda lab, fault: ("--protocol", "icmp"),
        destination=_server_itself,
    ),
    "ttl": Kind(
        "A pod's packets may cross no router.",
        _TWO_NODES,
        from_pods,
        sysctl_is("net/ipv4/ip_default_ttl", "1", in_client=True),
    ),
    "martian": Kind(
        "A node has the address of a pod elsewhere.", _TWO_NODES, to_nodes, second_owner
    ),
    "arp-ignored": Kind(
        "A pod does not tell its MAC.",
        _LISTENER,
        to_pods,
        sysctl_is("net/ipv4/conf/all/arp_ignore", "8", in_server=True),
    ),
    "hairpin-off": Kind(
        "A bridge does not send a packet back to the pod that it came from.",
        "a Service whose only endpoint is a pod of the lab",
        to_own_service,
        pod_link_is(lambda link: replace(link, hairpin=False)),
    ),
}
