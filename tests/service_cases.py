"""What a node does with packets to Services: one table of cases for all modes of the proxy.

A case is a client, an address and port, and what is expected: the pods that answer, and whether
they see the client's own address; or a refusal; or silence.  Where modes differ the case says so,
with the source that does.  A new mode runs the table by being named in `MODES`
of test_services_flat_cases.py.

Two nodes, p0 and p2 on n1, p1 and p3 on n2; Services are reached by way of n1.  Every Service has
port 80 to 8002.  `outside` is a machine of the nodes' network.  Everything has an IPv6 address too
(`labs.six`), and each case holds over IPv6 as well.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from msgspec.structs import replace

from labs import dual_stack_lab, six, small_lab
from netlab.topology.model import (
    Endpoint,
    Lab,
    Pod,
    Protocol,
    ProxyMode,
    Service,
    ServiceEndpoints,
    ServicePort,
)

ZONE = "topology.kubernetes.io/zone"
REFUSED, DROPPED = "refused", "dropped"
NO_ROUTE_LOCALNET = "kube-proxy pkg/proxy/iptables/proxier.go: localhostNodePorts are of IPv4 only"
ALL, HERE, THERE = "p0 p1 p2 p3", "p0 p2", "p1 p3"

# The host part of a Service's addresses: 10.99.0.N, external 203.0.113.N, load balancer
# 203.0.113.100+N, NodePort 30000+N.
_NAMES = """
web empty cluster local remote internal internal-remote internal-external
ranges ranges-node ranges-empty sticky sticky-briefly sticky-local itself single zones draining
unready gone local-draining nodes nodes-elsewhere zones-missing zones-local internal-empty
both-local ranges-any ranges-local remote-itself another-proxys sticky-changing
"""
NUMBERS = {name: number for number, name in enumerate(_NAMES.split(), start=1)}


def cluster_ip(name: str) -> str:
    return f"10.99.0.{NUMBERS[name]}"


def external_ip(name: str) -> str:
    return f"203.0.113.{NUMBERS[name]}"


def load_balancer_ip(name: str) -> str:
    return f"203.0.113.{100 + NUMBERS[name]}"


def node_port(name: str) -> int:
    return 30000 + NUMBERS[name]


@dataclass(frozen=True)
class Case:
    """A client and a destination, and what becomes of the packet."""

    name: str
    client: str  # a pod, a node, or "outside"
    address: str
    expected: str  # pods that answer, with blanks between them; REFUSED or DROPPED
    port: int = 80
    protocol: Protocol = "TCP"
    # "own" or "masqueraded" address of the client, or the one that was "asked"; "": not told
    seen: str = ""
    seen_otherwise: dict[ProxyMode, str] = field(default_factory=dict)
    # Other results, by mode, and who says so; None: the packet leaves the node as it is
    otherwise: dict[ProxyMode, str | None] = field(default_factory=dict)
    source: str = ""
    ipv4_only: bool = False  # what it is over IPv6 another case tells, or there is no such thing

    def __post_init__(self) -> None:
        assert bool(self.otherwise) == bool(self.source), self.name

    def of_both_families(self) -> tuple[Case, ...]:
        """The case, and what it is with IPv6 addresses."""
        if self.ipv4_only or ":" in self.address:
            return (self,)
        address, otherwise, source = six(self.address), self.otherwise, self.source
        if address == "::1":
            otherwise, source = {**otherwise, "iptables": REFUSED}, NO_ROUTE_LOCALNET
        return self, dataclasses.replace(self, address=address, otherwise=otherwise, source=source)

    def of(self, mode: ProxyMode) -> str | None:
        return self.otherwise.get(mode, self.expected)

    def seen_in(self, mode: ProxyMode) -> str:
        return self.seen_otherwise.get(mode, self.seen)


def _case(name: str, client: str, address: str, expected: str, **more: Any) -> Case:
    return Case(name, client, address, expected, **more)


N1, N2 = "172.21.32.11", "172.21.32.12"

MIGRATING = "kubernetes.io/docs/reference/networking/virtual-ips: from iptables to nftables mode"
README = "kube-proxy pkg/proxy/nftables/README.md: differences from iptables mode"
HOOKS = "kube-proxy pkg/proxy/iptables/proxier.go: KUBE-EXTERNAL-SERVICES is not hooked on OUTPUT"
ORDER = "what kube-proxy wrote for tests/golden/lb-source-ranges-no-endpoints"
LOCALHOST = "kube-proxy pkg/proxy/nftables/proxier.go: the gate is of nftables mode only"
UNTRANSLATED: dict[ProxyMode, str | None] = {"iptables": None, "ipvs": None}
IPVS_LOCAL = "kube-proxy pkg/proxy/ipvs/proxier.go: syncEndpoint takes those here, or else all"
IPVS_EMPTY = "what kube-proxy wrote for tests/golden/ipvs/itp-local: a virtual server of none"
IPVS_SOURCE = f"{IPVS_LOCAL}; golden/ipvs/traffic: the node asks from the address that it asks"
IPVS_NODE_PORTS = f"{MIGRATING}; golden/ipvs/nodeport: a virtual server at every address but lo's"
HAIRPINS = "kube-proxy pkg/proxy/nftables/proxier.go: hairpin-connections has this node's endpoints"

CASES = [
    # 1.2, 1.4: ClusterIP
    _case("pod to ClusterIP", "p0", cluster_ip("web"), "p1 p2 p3", seen="own"),
    _case("node to ClusterIP", "n1", cluster_ip("web"), "p1 p2 p3", seen="masqueraded"),
    _case("outside to ClusterIP", "outside", cluster_ip("web"), "p1 p2 p3", seen="masqueraded"),
    _case("endpoint to its own Service", "p2", cluster_ip("web"), "p1 p2 p3", seen="own"),
    _case("the only endpoint to itself", "p2", cluster_ip("itself"), "p2", seen="masqueraded"),
    _case(
        "the only endpoint to itself by another node", "p1", N1, DROPPED,
        port=node_port("remote-itself"), otherwise={"iptables": "p1"}, source=HAIRPINS,
        seen="masqueraded",
    ),
    _case("one endpoint", "p0", cluster_ip("single"), "p3", seen="own"),
    _case(
        "UDP, pod to ClusterIP", "p0", cluster_ip("web"), "p1 p2 p3", protocol="UDP", seen="own"
    ),
    _case(
        "UDP, node to ClusterIP", "n1", cluster_ip("web"), "p1 p2 p3", protocol="UDP",
        seen="masqueraded",
    ),
    # 1.3, 3.8: refused and dropped
    _case("no endpoints, pod", "p0", cluster_ip("empty"), REFUSED),
    _case("no endpoints, node", "n1", cluster_ip("empty"), REFUSED),
    _case("no endpoints, outside", "outside", cluster_ip("empty"), REFUSED),
    _case("no endpoints, UDP", "p0", cluster_ip("empty"), REFUSED, protocol="UDP"),
    _case("no endpoints, external IP", "p0", external_ip("empty"), REFUSED),
    _case("no endpoints, external IP from outside", "outside", external_ip("empty"), REFUSED),
    _case(
        "no endpoints, external IP from the node", "n1", external_ip("empty"), REFUSED,
        otherwise={"iptables": None}, source=HOOKS,
    ),
    _case("no endpoints, load balancer IP", "p0", load_balancer_ip("empty"), REFUSED),
    _case("no endpoints, load balancer IP from outside", "outside", load_balancer_ip("empty"),
          REFUSED),
    _case(
        "no endpoints, load balancer IP from the node", "n1", load_balancer_ip("empty"), REFUSED,
        otherwise={"iptables": None}, source=HOOKS,
    ),
    _case("no endpoints, UDP NodePort from outside", "outside", N1, REFUSED,
          port=node_port("empty"), protocol="UDP"),
    _case("no endpoints, NodePort from the node", "n1", N1, REFUSED, port=node_port("empty")),
    _case("no endpoints, NodePort", "p0", N1, REFUSED, port=node_port("empty")),
    _case("no endpoints, NodePort from outside", "outside", N1, REFUSED, port=node_port("empty")),
    _case(
        "unused port of a ClusterIP, pod", "p0", cluster_ip("web"), REFUSED, port=81,
        otherwise={"iptables": None}, source=README,
    ),
    _case(
        "unused port of a ClusterIP, node", "n1", cluster_ip("web"), REFUSED, port=81,
        otherwise={"iptables": None}, source=README,
    ),
    _case(
        "unused protocol of a ClusterIP", "p0", cluster_ip("single"), REFUSED, protocol="UDP",
        otherwise={"iptables": None}, source=README,
    ),
    _case(
        "unallocated ClusterIP, pod", "p0", "10.99.9.9", DROPPED, otherwise=UNTRANSLATED,
        source=README,
    ),
    _case(
        "unallocated ClusterIP, node", "n1", "10.99.9.9", DROPPED, otherwise=UNTRANSLATED,
        source=README,
    ),
    # 1.2: which endpoints
    _case("internal policy Local, pod", "p0", cluster_ip("internal"), HERE),
    _case("internal policy Local, node", "n1", cluster_ip("internal"), HERE, seen="masqueraded"),
    _case("internal policy Local, other node", "p1", cluster_ip("internal"), THERE),
    *(
        _case(
            f"internal policy Local, none here, {what}", client, cluster_ip("internal-remote"),
            DROPPED, otherwise={"ipvs": REFUSED}, source=IPVS_EMPTY,
        )
        for what, client in (("pod", "p0"), ("node", "n1"))
    ),
    _case("internal policy Local, other node's", "p1", cluster_ip("internal-remote"), THERE),
    _case(
        "internal policy Local, none here, external IP", "p0", external_ip("internal-external"),
        THERE, seen="masqueraded",
    ),
    _case(
        "internal policy Local, none here, its ClusterIP", "p0", cluster_ip("internal-external"),
        DROPPED, otherwise={"ipvs": THERE}, source=IPVS_LOCAL,
    ),
    _case("internal policy Local, nowhere any", "p0", cluster_ip("internal-empty"), REFUSED),
    _case("internal policy Local, nowhere any, node", "n1", cluster_ip("internal-empty"), REFUSED),
    _case("both policies Local, ClusterIP", "p0", cluster_ip("both-local"), "p2", seen="own"),
    _case(
        "both policies Local, load balancer, pod", "p0", load_balancer_ip("both-local"), "p1 p2",
        otherwise={"ipvs": "p2"}, source=IPVS_LOCAL,
    ),
    _case("both policies Local, from outside", "outside", external_ip("both-local"), "p2"),
    _case("endpoints of the node's zone", "p0", cluster_ip("zones"), "p0 p1"),
    _case("endpoints of the other node's zone", "p1", cluster_ip("zones"), "p2 p3"),
    _case("endpoints of the zone, from outside", "outside", cluster_ip("zones"), "p0 p1"),
    _case("endpoints of the node itself", "p0", cluster_ip("nodes"), "p2"),
    _case("endpoints of the other node", "p1", cluster_ip("nodes"), "p3"),
    _case("hints for other nodes only: zones", "p0", cluster_ip("nodes-elsewhere"), "p0 p1"),
    _case("a ready endpoint without hint", "p0", cluster_ip("zones-missing"), ALL),
    _case("hints and policy Local, outside", "outside", external_ip("zones-local"), "p2"),
    _case(
        "hints and policy Local, pod", "p0", external_ip("zones-local"), "p1",
        otherwise={"ipvs": "p2"}, source=IPVS_LOCAL,
    ),
    _case("endpoints that terminate and serve", "p0", cluster_ip("draining"), "p1 p2"),
    _case("endpoints that are not ready", "p0", cluster_ip("unready"), "p3"),
    _case("endpoints that terminate and do not serve", "p0", cluster_ip("gone"), REFUSED),
    _case("they terminate here, outside", "outside", load_balancer_ip("local-draining"), HERE),
    _case(
        "they terminate here, pod", "p0", load_balancer_ip("local-draining"), THERE,
        otherwise={"ipvs": HERE}, source=IPVS_LOCAL,
    ),
    _case("they terminate here, ClusterIP", "p0", cluster_ip("local-draining"), THERE),
    _case(
        "Service of another proxy", "p0", cluster_ip("another-proxys"), DROPPED,
        otherwise=UNTRANSLATED, source=README,
    ),
    # 1.4: external addresses under policy Cluster
    *(
        _case(f"{what}, {client}", client, address, "p1 p2 p3", port=port, seen="masqueraded")
        for client in ("p0", "n1", "outside")
        for what, address, port in (
            ("external IP", external_ip("cluster"), 80),
            ("load balancer IP", load_balancer_ip("cluster"), 80),
            ("NodePort", N1, node_port("cluster")),
        )
    ),
    _case("UDP NodePort", "outside", N1, "p1 p2 p3", port=node_port("cluster"), protocol="UDP"),
    # 1.4: external addresses under policy Local
    *(
        _case(
            f"policy Local, {what}, {client}", client, address, pods, port=port, seen=seen,
            otherwise={} if client == "outside" else {"ipvs": HERE},
            source="" if client == "outside" else IPVS_SOURCE,
            seen_otherwise={"ipvs": "asked"} if client == "n1" else {},
        )
        for client, pods, seen in (
            ("p0", ALL, "own"),
            ("n1", ALL, "masqueraded"),
            ("outside", HERE, "own"),
        )
        for what, address, port in (
            ("external IP", external_ip("local"), 80),
            ("load balancer IP", load_balancer_ip("local"), 80),
            ("NodePort", N1, node_port("local")),
        )
    ),
    *(
        _case(
            f"policy Local, none here, {what}, {client}", client, address, pods, port=port,
            # the answer would be for an address that the other node does not know
            otherwise={"ipvs": DROPPED} if client == "n1" and address != N1 else {},
            source=IPVS_SOURCE if client == "n1" and address != N1 else "",
        )
        for client, pods in (("p0", THERE), ("n1", THERE), ("outside", DROPPED))
        for what, address, port in (
            ("external IP", external_ip("remote"), 80),
            ("load balancer IP", load_balancer_ip("remote"), 80),
            ("NodePort", N1, node_port("remote")),
        )
    ),
    _case("policy Local, ClusterIP", "p0", cluster_ip("remote"), THERE, seen="own"),
    # 3.2, 3.8: which addresses take NodePorts
    *(
        _case(
            f"NodePort at {address} from {client}", client, address, REFUSED,
            port=node_port("cluster"), source=IPVS_NODE_PORTS,
            otherwise={"iptables": "p1 p2 p3"}
            | ({} if address == "127.0.0.1" else {"ipvs": "p1 p2 p3"}),
            # the first address of an IPv6 network is that of any router (RFC 4291, 2.6.1)
            ipv4_only=address == "10.244.1.0",
        )
        for client, address in (
            ("p0", "10.244.1.1"), ("n1", "10.244.1.1"), ("n1", "127.0.0.1"), ("p0", "10.244.1.0"),
        )
    ),
    _case("NodePort that nobody has", "outside", N1, REFUSED, port=30999),
    _case("NodePort that nobody has, pod", "p0", N1, REFUSED, port=30999),
    _case("NodePort of another protocol", "outside", N1, REFUSED, port=node_port("remote-itself"),
          protocol="UDP"),
    _case("NodePort of the other node", "p0", N2, "p1 p2 p3", port=node_port("cluster")),
    # 1.5: source ranges
    _case("source in a range, pod", "p0", load_balancer_ip("ranges"), "p1 p2 p3"),
    _case("source in a range, outside", "outside", load_balancer_ip("ranges"), "p1 p2 p3"),
    _case("source in no range, pod", "p2", load_balancer_ip("ranges"), DROPPED),
    _case("source in no range, node", "n1", load_balancer_ip("ranges"), DROPPED),
    _case("source in no range, external IP", "p2", external_ip("ranges"), "p1 p2 p3"),
    _case("source in no range, ClusterIP", "p2", cluster_ip("ranges"), "p1 p2 p3"),
    _case("source in no range, NodePort", "p2", N1, "p1 p2 p3", port=node_port("ranges")),
    _case("the node in a range", "n1", load_balancer_ip("ranges-node"), "p1 p2 p3"),
    _case("the node in a range, pod", "p0", load_balancer_ip("ranges-node"), DROPPED),
    _case("everybody in a range", "p2", load_balancer_ip("ranges-any"), "p1 p2 p3"),
    _case("everybody in a range, outside", "outside", load_balancer_ip("ranges-any"), "p1 p2 p3"),
    _case("in a range, policy Local, outside", "outside", load_balancer_ip("ranges-local"), HERE,
          seen="own"),
    _case(
        "in a range, policy Local, pod", "p0", load_balancer_ip("ranges-local"), ALL,
        otherwise={"ipvs": HERE}, source=IPVS_LOCAL,
    ),
    _case("in no range, policy Local, pod", "p2", load_balancer_ip("ranges-local"), DROPPED),
    _case("in a range, UDP", "outside", load_balancer_ip("ranges"), "p1 p2 p3", protocol="UDP"),
    _case("in no range, UDP", "p2", load_balancer_ip("ranges"), DROPPED, protocol="UDP"),
    _case("in a range, no endpoints", "p0", load_balancer_ip("ranges-empty"), REFUSED),
    _case(
        "in no range, no endpoints", "p2", load_balancer_ip("ranges-empty"), DROPPED,
        otherwise={"iptables": REFUSED}, source=ORDER,
    ),
]  # fmt: skip


def cases_lab() -> Lab:
    """The lab that the cases are about, with IPv4 and IPv6."""
    lab = small_lab()
    n1, n2 = lab.nodes
    nodes = (replace(n1, labels={ZONE: "a"}), replace(n2, labels={ZONE: "b"}))
    made = _Services(lab)
    made.add("web", "p1 p2 p3")
    made.add("empty", "", external=True)
    made.add("cluster", "p1 p2 p3", external=True)
    local: dict[str, Any] = {"external_traffic_policy": "Local"}
    made.add("local", ALL, external=True, **local)
    made.add("remote", THERE, external=True, **local)
    internal: dict[str, Any] = {"internal_traffic_policy": "Local"}
    made.add("internal", ALL, **internal)
    made.add("internal-remote", THERE, **internal)
    made.add("internal-external", THERE, external=True, **internal)
    ranges = ("10.244.1.2/32", "172.21.32.0/29")
    made.add("ranges", "p1 p2 p3", external=True, load_balancer_source_ranges=ranges)
    near = ("172.21.32.0/24", "172.21.32.0/28", "192.0.2.7/32")
    made.add("ranges-node", "p1 p2 p3", external=True, load_balancer_source_ranges=near)
    made.add("ranges-empty", "", external=True, load_balancer_source_ranges=ranges)
    sticky: dict[str, Any] = {"session_affinity": "ClientIP"}
    made.add("sticky", ALL, external=True, **sticky)
    made.add("sticky-briefly", ALL, external=True, affinity_timeout_s=1, **sticky)
    made.add("sticky-local", ALL, external=True, **sticky, **local)
    made.add("sticky-changing", ALL, external=True, **sticky)
    made.add("itself", "p2")
    made.add("single", "p3", external=True, protocols=("TCP", "SCTP"))
    zones = {"p0": ("a",), "p1": ("a",), "p2": ("b",), "p3": ("b",)}
    made.add("zones", ALL, conditions={pod: {"for_zones": zone} for pod, zone in zones.items()})
    terminating = {"ready": False, "serving": True, "terminating": True}
    gone = {"ready": False, "serving": False, "terminating": True}
    made.add(
        "draining", ALL, conditions={"p0": gone, "p1": terminating, "p2": terminating, "p3": gone}
    )
    unready = {"ready": False, "serving": False}
    made.add("unready", ALL, conditions=dict.fromkeys(("p0", "p1", "p2"), unready))
    made.add("gone", ALL, conditions=dict.fromkeys(ALL.split(), gone))
    here = dict.fromkeys(HERE.split(), terminating)
    made.add("local-draining", ALL, external=True, conditions=here, **local)
    to_nodes = {
        pod: {"for_nodes": (node,), "for_zones": zones[pod]}
        for pod, node in (("p0", "n9"), ("p1", "n9"), ("p2", "n1"), ("p3", "n2"))
    }
    made.add("nodes", ALL, conditions=to_nodes)
    elsewhere = {pod: {**hints, "for_nodes": ("n9",)} for pod, hints in to_nodes.items()}
    made.add("nodes-elsewhere", ALL, conditions=elsewhere)
    but_one = {pod: {"for_zones": zone} for pod, zone in zones.items() if pod != "p3"}
    made.add("zones-missing", ALL, conditions=but_one)
    to_zones = {"p1": {"for_zones": ("a",)}, "p2": {"for_zones": ("b",)}}
    made.add("zones-local", "p1 p2", external=True, conditions=to_zones, **local)
    made.add("internal-empty", "", **internal)
    made.add("both-local", "p1 p2", external=True, **internal, **local)
    everybody = (*ranges, "0.0.0.0/0")
    made.add("ranges-any", "p1 p2 p3", external=True, load_balancer_source_ranges=everybody)
    made.add("ranges-local", ALL, external=True, load_balancer_source_ranges=ranges, **local)
    made.add("remote-itself", "p1", external=True, protocols=("TCP",), **local)
    another = {"service.kubernetes.io/service-proxy-name": "another"}
    made.add("another-proxys", ALL, labels=another)
    return dual_stack_lab(
        replace(lab, nodes=nodes, services=tuple(made.services), endpoints=tuple(made.endpoints))
    )


class _Services:
    """Services under construction."""

    def __init__(self, lab: Lab) -> None:
        self._pods = {pod.name: pod for pod in lab.pods}
        self.services: list[Service] = []
        self.endpoints: list[ServiceEndpoints] = []

    def add(
        self,
        name: str,
        pods: str,
        *,
        external: bool = False,
        protocols: tuple[Protocol, ...] = ("TCP", "UDP"),
        conditions: dict[str, dict[str, Any]] | None = None,
        **more: Any,
    ) -> None:
        """A Service in front of pods; `external`: with all kinds of external addresses."""
        ports = tuple(
            ServicePort(
                name=protocol.lower(),
                port=80,
                protocol=protocol,
                target_port=8002,
                node_port=node_port(name) if external else None,
            )
            for protocol in protocols
        )
        if external:
            more["type"] = "LoadBalancer"
            more["external_ips"] = (external_ip(name),)
            more["load_balancer_ips"] = (load_balancer_ip(name),)
        self.services.append(
            Service(namespace="demo", name=name, cluster_ip=cluster_ip(name), ports=ports, **more)
        )
        behind = tuple(
            _endpoint(self._pods[pod], (conditions or {}).get(pod, {})) for pod in pods.split()
        )
        self.endpoints += (
            ServiceEndpoints(
                namespace="demo",
                service=name,
                port_name=port.name,
                protocol=port.protocol,
                endpoints=behind,
            )
            for port in ports
        )


def _endpoint(pod: Pod, conditions: dict[str, Any]) -> Endpoint:
    return Endpoint(address=pod.address, port=8002, node=pod.node, pod=pod.key, **conditions)
