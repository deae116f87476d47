"""A lab once everything is decided: frozen data, every address known.

`topology` reads files and makes a :class:`Lab`; everything behind it (`datapath`, `trace`, `cli`)
only reads one.  All classes are plain msgspec structs, so a lab is shipped and stored as JSON with
`msgspec.json.encode` and `msgspec.json.decode(..., type=Lab)`.

Addresses are text in canonical form ("10.244.1.4"), networks too ("10.244.1.0/24").
"""

from __future__ import annotations

import functools
from functools import cached_property
from ipaddress import ip_address, ip_network
from typing import Any, Literal

import msgspec

Family = Literal["IPv4", "IPv6"]
Protocol = Literal["TCP", "UDP", "SCTP"]
ServiceType = Literal["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"]
TrafficPolicy = Literal["Cluster", "Local"]
TrafficDistribution = Literal["PreferClose", "PreferSameZone", "PreferSameNode"]
ProxyMode = Literal["iptables", "nftables", "nftables-flat", "ipvs", "userspace", "none"]
DnsPolicy = Literal["ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"]
IPTablesBackend = Literal["nft", "legacy"]
Masquerade = Literal["outside", "all", "none"]
BalancerMode = Literal["nat", "passthrough"]
Outcome = Literal["reached", "translated", "unreachable"]


ZONE_LABEL = "topology.kubernetes.io/zone"


class Frozen(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of everything in a lab."""


class Overlay(Frozen, frozen=True):
    """How packets for pods cross between nodes."""

    type: str = "vxlan"
    vni: int = 1  # of mesh that of the first two nodes; each further pair has one of its own
    port: int = 8472
    masquerade: Masquerade = "none"  # of what pods send: beyond the cluster, or to the nodes too
    group: str = "239.1.1.1"  # vxlan-multicast
    block_size: int = 26  # bgp: prefix length of what one node announces
    as_number: int = 64512  # bgp


class Underlay(Frozen, frozen=True):
    """The network that the nodes share: one switch, which also owns the gateway's address."""

    cidr: str
    gateway: str
    other_cidr: str = ""  # of the other family, in a dual-stack lab
    other_gateway: str = ""
    mtu: int = 1500

    @property
    def cidrs(self) -> tuple[str, ...]:
        """A network for each family, the primary one first."""
        return (self.cidr, self.other_cidr) if self.other_cidr else (self.cidr,)

    @property
    def gateways(self) -> tuple[str, ...]:
        """The switch's address in each."""
        return (self.gateway, self.other_gateway) if self.other_gateway else (self.gateway,)


class IPTablesProxy(Frozen, frozen=True):
    """`iptables` of KubeProxyConfiguration."""

    masqueradeAll: bool = False
    masqueradeBit: int = 14
    localhostNodePorts: bool = True


class NFTablesProxy(Frozen, frozen=True):
    """`nftables` of KubeProxyConfiguration."""

    masqueradeAll: bool = False
    masqueradeBit: int = 14


class IPVSProxy(Frozen, frozen=True):
    """`ipvs` of KubeProxyConfiguration; timeouts in seconds, 0 leaves them to the kernel."""

    scheduler: str = "rr"
    strictARP: bool = False
    tcpTimeout: int = 0
    tcpFinTimeout: int = 0
    udpTimeout: int = 0


class DetectLocal(Frozen, frozen=True):
    """`detectLocal` of KubeProxyConfiguration."""

    bridgeInterface: str = ""
    interfaceNamePrefix: str = ""


class ConntrackProxy(Frozen, frozen=True):
    """`conntrack` of KubeProxyConfiguration; timeouts in seconds, 0 leaves them to the kernel."""

    tcpBeLiberal: bool = False
    tcpEstablishedTimeout: int = 0
    tcpCloseWaitTimeout: int = 0
    udpTimeout: int = 0
    udpStreamTimeout: int = 0


class ServiceProxy(Frozen, frozen=True):
    """`spec.serviceProxy`: the fields of KubeProxyConfiguration under their own names."""

    mode: ProxyMode = "iptables"
    detectLocalMode: str = "ClusterCIDR"
    detectLocal: DetectLocal = DetectLocal()
    clusterCIDR: str = ""  # (load.py puts the lab's podCIDR here if it is left out)
    nodePortAddresses: tuple[str, ...] = ()
    iptables: IPTablesProxy = IPTablesProxy()
    nftables: NFTablesProxy = NFTablesProxy()
    ipvs: IPVSProxy = IPVSProxy()
    conntrack: ConntrackProxy = ConntrackProxy()
    featureGates: dict[str, bool] = {}


class Node(Frozen, frozen=True):
    """A node: its own network namespace, its InternalIP, and the CIDR that its pods live in."""

    name: str
    address: str
    pod_cidr: str
    other_pod_cidrs: tuple[str, ...] = ()  # of the other family, in a dual-stack lab
    labels: dict[str, str] = {}
    other_addresses: tuple[str, ...] = ()  # further ones, of either family

    @property
    def addresses(self) -> tuple[str, ...]:
        """Every address of the node, the primary one first."""
        return (self.address, *self.other_addresses)

    @property
    def pod_cidrs(self) -> tuple[str, ...]:
        """A CIDR for each family, the primary one first."""
        return (self.pod_cidr, *self.other_pod_cidrs)

    @property
    def bridge_address(self) -> str:
        """Address of `cbr0`, the pods' gateway: the first one of the pod CIDR."""
        return _first_two(self.pod_cidr)[1]

    @property
    def bridge_addresses(self) -> tuple[str, ...]:
        """The same for each pod CIDR."""
        return tuple(_first_two(cidr)[1] for cidr in self.pod_cidrs)

    @property
    def overlay_address(self) -> str:
        """Address of `flannel.1`: the network address of the pod CIDR, as flannel does."""
        return _first_two(self.pod_cidr)[0]

    @property
    def overlay_addresses(self) -> tuple[str, ...]:
        """The same for each pod CIDR."""
        return tuple(_first_two(cidr)[0] for cidr in self.pod_cidrs)


@functools.cache
def _first_two(cidr: str) -> tuple[str, str]:
    """The network's own address and the one after it; every pod asks."""
    network = ip_network(cidr)
    return str(network[0]), str(network[1])


class ContainerPort(Frozen, frozen=True):
    """A port that some container of a pod declares."""

    port: int
    protocol: Protocol = "TCP"
    name: str = ""
    host_port: int = 0  # the same for whoever asks the node; 0: none
    host_ip: str = ""  # the node's address for that; "": every one


class Variable(Frozen, frozen=True):
    """A variable of a container's environment; `$(NAME)` in it stands for another one."""

    name: str
    value: str


class MountedFile(Frozen, frozen=True):
    """A file of a volume where a container sees it."""

    path: str
    text: str


class Probe(Frozen, frozen=True):
    """How kubelet asks a container whether it is well; times in seconds.

    Over HTTP or TCP it asks from the node's namespace, by a command in the pod.
    """

    kind: Literal["http", "tcp", "exec"]
    host: str = ""  # "": the pod's address
    port: int = 0
    path: str = "/"
    tls: bool = False
    headers: tuple[tuple[str, str], ...] = ()
    command: tuple[str, ...] = ()
    delay_s: int = 0
    period_s: int = 10
    timeout_s: int = 1
    successes: int = 1  # in a row, after which it passes
    failures: int = 3  # in a row, after which it fails


class Container(Frozen, frozen=True):
    """A container of a pod; all of a pod share its network namespace.

    If it `runs`, its command is a process of the pod; else the built-in workload answers for it.
    """

    name: str
    image: str = ""  # as recorded: nothing is pulled
    command: tuple[str, ...] = ()  # what stands in place of the image's entry point
    args: tuple[str, ...] = ()
    directory: str = ""  # where the command begins
    env: tuple[Variable, ...] = ()  # in order; of equal names the last counts
    ports: tuple[ContainerPort, ...] = ()
    files: tuple[MountedFile, ...] = ()
    runs: bool = False  # decided: its program is on this machine
    readiness: Probe | None = None
    liveness: Probe | None = None
    startup: Probe | None = None
    pre_stop_s: int = 0  # how long it sleeps before it is told to end


class HostAlias(Frozen, frozen=True):
    """A line of a pod's /etc/hosts."""

    ip: str
    names: tuple[str, ...]


class Naming(Frozen, frozen=True):
    """What a pod is called, and how it finds names: fields of its spec."""

    host_name: str = ""  # as its spec has it
    subdomain: str = ""
    as_fqdn: bool = False  # whether its host name is all of it
    aliases: tuple[HostAlias, ...] = ()
    dns_policy: DnsPolicy = "ClusterFirst"
    # dnsConfig: what comes beside that of the policy
    name_servers: tuple[str, ...] = ()
    searches: tuple[str, ...] = ()
    options: tuple[tuple[str, str | None], ...] = ()


USUAL_NAMING = Naming()
NAME_SERVER, KNOT = "knotd", "knot"  # the program of a cluster's, and its package


class Pod(Frozen, frozen=True):
    """A pod: a network namespace on a node, and what answers in it."""

    namespace: str
    name: str
    node: str
    address: str
    other_addresses: tuple[str, ...] = ()  # of the other family, in a dual-stack lab
    labels: dict[str, str] = {}
    containers: tuple[Container, ...] = ()
    ports: tuple[ContainerPort, ...] = ()  # as its containers declare them
    listen: tuple[tuple[Protocol, int], ...] = ()  # decided: declared ports and target ports
    service_links: bool = True  # its containers have variables for the Services of its namespace
    host_network: bool = False
    ingress_controller: bool = False  # it runs nginx for the Ingress objects
    ready: bool = True
    owner: str = ""  # "Deployment/myblog", or "" for a pod that stands in the file itself
    naming: Naming = USUAL_NAMING
    name_server: bool = False  # decided: the cluster's name server runs in it
    terminating: bool = False  # it is being deleted: serves whom it has, and gets nobody new
    grace_s: int = 30  # from there to the end of what has not ended by itself

    @property
    def is_probed(self) -> bool:
        """Whether probes tell whether it is ready."""
        return any(each.readiness or each.liveness or each.startup for each in self.containers)

    @property
    def addresses(self) -> tuple[str, ...]:
        """Every address of the pod, the primary one first."""
        return (self.address, *self.other_addresses)

    @property
    def key(self) -> str:
        """`namespace/name`."""
        return f"{self.namespace}/{self.name}"

    @property
    def served(self) -> tuple[tuple[Protocol, int], ...]:
        """What the built-in workload answers on: not what programs of its containers do.

        A port that no container declares is a program's if all of them run one.
        """
        running = [container for container in self.containers if container.runs]
        if self.ingress_controller:
            return ()
        if self.name_server:
            return tuple(each for each in self.listen if each[1] != 53)
        if not running:
            return self.listen
        if len(running) == len(self.containers):
            return ()
        theirs = {(port.protocol, port.port) for each in running for port in each.ports}
        return tuple(each for each in self.listen if each not in theirs)


class ServicePort(Frozen, frozen=True):
    """One port of a Service."""

    port: int
    protocol: Protocol = "TCP"
    name: str = ""
    target_port: int | str = 0
    node_port: int | None = None


class Service(Frozen, frozen=True):
    """A Service as kube-proxy sees it. `cluster_ip` is "" for ExternalName, "None" if headless."""

    namespace: str
    name: str
    type: ServiceType = "ClusterIP"
    cluster_ip: str = ""
    other_cluster_ips: tuple[str, ...] = ()  # of the other family, in a dual-stack Service
    ip_families: tuple[Family, ...] = ()  # the primary one first; also if headless
    selector: dict[str, str] = {}
    ports: tuple[ServicePort, ...] = ()
    external_ips: tuple[str, ...] = ()
    load_balancer_ips: tuple[str, ...] = ()  # ingress addresses with ipMode VIP or none
    load_balancer_source_ranges: tuple[str, ...] = ()
    session_affinity: Literal["None", "ClientIP"] = "None"
    affinity_timeout_s: int = 10800
    external_traffic_policy: TrafficPolicy = "Cluster"
    internal_traffic_policy: TrafficPolicy = "Cluster"
    health_check_node_port: int | None = None
    external_name: str = ""
    publish_not_ready_addresses: bool = False
    labels: dict[str, str] = {}

    @property
    def cluster_ips(self) -> tuple[str, ...]:
        """An address for each family, the primary one first; ("None",) if headless, else ()."""
        return (self.cluster_ip, *self.other_cluster_ips) if self.cluster_ip else ()

    @property
    def key(self) -> str:
        """`namespace/name`."""
        return f"{self.namespace}/{self.name}"


class Endpoint(Frozen, frozen=True):
    """One address and port behind one port of a Service."""

    address: str
    port: int
    node: str | None = None
    pod: str | None = None  # "namespace/name" if it is a pod of this lab
    ready: bool = True
    serving: bool = True
    terminating: bool = False
    for_nodes: tuple[str, ...] = ()
    for_zones: tuple[str, ...] = ()


class ServiceEndpoints(Frozen, frozen=True):
    """Every endpoint of one port of one Service, whatever its condition."""

    namespace: str
    service: str
    port_name: str
    protocol: Protocol
    endpoints: tuple[Endpoint, ...] = ()


class Gateway(Frozen, frozen=True):
    """The way to the internet: it knows the nodes' addresses, and gives them its own outside."""

    name: str
    addresses: tuple[str, ...]  # its own in the internet, one for each family
    cidrs: tuple[str, ...]  # the internet's networks, in the same order


class Host(Frozen, frozen=True):
    """A machine outside the cluster."""

    name: str
    addresses: tuple[str, ...]
    names: tuple[str, ...] = ()  # further ones that the cluster's name server knows
    internet: bool = False  # behind the Gateway, not on the nodes' network
    listen: tuple[tuple[Protocol, int], ...] = ()


DockerMode = Literal["none", "host", "bridge"]


class DockerNetwork(Frozen, frozen=True):
    """A bridge of a node's Docker: the default one, called "bridge", or a user's own."""

    name: str
    node: str
    cidr: str
    bridge: str  # the link: "docker0", "br-0123456789ab"

    @property
    def gateway(self) -> str:
        """The bridge's own address."""
        return _first_two(self.cidr)[1]

    @property
    def is_default(self) -> bool:
        """Whether it is the one that Docker makes, in which nobody is found by name."""
        return self.name == "bridge"


class DockerContainer(Frozen, frozen=True):
    """A container that Docker runs on a node, beside its pods."""

    name: str
    node: str
    mode: DockerMode
    container: Container
    network: str = ""  # with mode bridge
    address: str = ""  # the same

    @property
    def listen(self) -> tuple[tuple[Protocol, int], ...]:
        """What it answers on."""
        return tuple((port.protocol, port.port) for port in self.container.ports)

    @property
    def published(self) -> tuple[ContainerPort, ...]:
        """Ports that its node has for it."""
        return tuple(port for port in self.container.ports if port.host_port and self.address)

    @property
    def addresses(self) -> tuple[str, ...]:
        """Its address, if it has one of its own."""
        return (self.address,) if self.address else ()


class HealthChecks(Frozen, frozen=True):
    """How a load balancer finds out which nodes to send to; times in seconds."""

    period_s: float = 0.5
    timeout_s: float = 0.5
    healthy: int = 1  # successes in a row after which a node is sent to again
    unhealthy: int = 2  # failures in a row after which it is not


class LoadBalancer(Frozen, frozen=True):
    """A box outside the cluster that gives Services of type LoadBalancer an address each."""

    name: str
    addresses: tuple[str, ...]  # its own on the underlay, one for each family
    pools: tuple[str, ...]  # networks that Services' addresses are of, one for each family
    mode: BalancerMode = "nat"
    checks: HealthChecks = HealthChecks()

    def serves(self, service: Service) -> tuple[str, ...]:
        """The addresses of a Service that are of its pools."""
        if service.type != "LoadBalancer":
            return ()
        pools = [ip_network(pool) for pool in self.pools]
        return tuple(
            ip for ip in service.load_balancer_ips if any(ip_address(ip) in each for each in pools)
        )


class Ports(Frozen, frozen=True):
    """Ports that a policy allows: a range, or those that pods call by a name."""

    protocol: Protocol
    first: int = 0  # 0: every port, unless there is a name
    last: int = 0
    name: str = ""


class PolicyRule(Frozen, frozen=True):
    """What a policy allows: these peers (None: everybody) on these ports (none: every one)."""

    pods: tuple[str, ...] | None = None  # "namespace/name", those that the selectors give
    cidrs: tuple[str, ...] = ()  # blocks without their exceptions
    ports: tuple[Ports, ...] = ()


class NetworkPolicy(Frozen, frozen=True):
    """A NetworkPolicy; None for a direction that it says nothing of."""

    namespace: str
    name: str
    selected: tuple[str, ...] = ()  # pods, "namespace/name"
    ingress: tuple[PolicyRule, ...] | None = None
    egress: tuple[PolicyRule, ...] | None = None

    @property
    def key(self) -> str:
        """`namespace/name`."""
        return f"{self.namespace}/{self.name}"


class IngressBackend(Frozen, frozen=True):
    """The Service and its port behind a path; None: there is no such Service or port."""

    service: str  # "namespace/name"
    port: ServicePort | None = None


class IngressPath(Frozen, frozen=True):
    """A path of a host: this very one, or with all that is below it."""

    path: str
    backend: IngressBackend
    exact: bool = False


class IngressRule(Frozen, frozen=True):
    """Paths of a host; "" is any, "*.example.com" any of one label more."""

    host: str
    paths: tuple[IngressPath, ...] = ()


class IngressTLS(Frozen, frozen=True):
    """Hosts that are served over TLS, with one certificate."""

    hosts: tuple[str, ...] = ()
    secret: str = ""


class Ingress(Frozen, frozen=True):
    """An Ingress that the controller serves."""

    namespace: str
    name: str
    rules: tuple[IngressRule, ...] = ()
    default_backend: IngressBackend | None = None
    tls: tuple[IngressTLS, ...] = ()
    redirects: bool = True  # from HTTP to HTTPS, where there is TLS

    @property
    def key(self) -> str:
        """`namespace/name`."""
        return f"{self.namespace}/{self.name}"


class Expectation(Frozen, frozen=True):
    """What `netlab verify` should find between those whose names match (fnmatch)."""

    source: str  # "pod/demo/*", "node/n1", "host/*"
    destination: str  # the same, and "svc/demo/myblog"
    outcome: Outcome


class Fault(Frozen, frozen=True):
    """Something wrong that was put into a running lab (netlab.datapath.faults says what).

    It is met by packets from the pod `client` to the pod `server`, to `service`, or to `host`.
    """

    name: str = ""
    node: str = ""  # where it is, or where what it is in is
    client: str = ""  # "namespace/name", as the others
    server: str = ""
    service: str = ""
    host: str = ""
    hidden: bool = False  # from who is to find it


class Lab(Frozen, frozen=True, dict=True):  # (dict: for the indexes below)
    """A whole lab, decided."""

    name: str
    pod_cidr: str
    service_cidrs: tuple[str, ...]
    underlay: Underlay
    other_pod_cidrs: tuple[str, ...] = ()  # of the other family, in a dual-stack lab
    overlay: Overlay = Overlay()
    service_proxy: ServiceProxy = ServiceProxy()
    iptables_backend: IPTablesBackend | None = None  # None: the one that this machine uses
    nodes: tuple[Node, ...] = ()
    pods: tuple[Pod, ...] = ()
    services: tuple[Service, ...] = ()
    endpoints: tuple[ServiceEndpoints, ...] = ()
    gateway: Gateway | None = None
    hosts: tuple[Host, ...] = ()
    docker_networks: tuple[DockerNetwork, ...] = ()
    docker_containers: tuple[DockerContainer, ...] = ()
    balancers: tuple[LoadBalancer, ...] = ()
    policies: tuple[NetworkPolicy, ...] = ()
    ingresses: tuple[Ingress, ...] = ()
    expected: tuple[Expectation, ...] = ()
    declared: tuple[dict[str, Any], ...] = ()  # the Kubernetes objects as the file has them
    # Kind, namespace, name of those in which commands changed something since `up`.
    changed: tuple[tuple[str, str, str], ...] = ()
    faults: tuple[Fault, ...] = ()
    unready: tuple[str, ...] = ()  # pods ("namespace/name") whose readiness probes do not pass
    stopped: tuple[str, ...] = ()  # nodes whose machine is off
    twin_of: str = ""  # the running lab that `netlab compare` made this one after, for its own time

    @property
    def pod_cidrs(self) -> tuple[str, ...]:
        """A CIDR for each family, the primary one first."""
        return (self.pod_cidr, *self.other_pod_cidrs)

    @cached_property
    def families(self) -> tuple[Family, ...]:
        """The families of the lab, the primary one first."""
        return tuple("IPv6" if ":" in cidr else "IPv4" for cidr in self.pod_cidrs)

    @cached_property
    def _node_by_name(self) -> dict[str, Node]:
        return {node.name: node for node in self.nodes}

    @cached_property
    def _endpoints_by_port(self) -> dict[tuple[str, str, str, str], tuple[Endpoint, ...]]:
        return {
            (entry.namespace, entry.service, entry.port_name, entry.protocol): entry.endpoints
            for entry in self.endpoints
        }

    def docker_network(self, container: DockerContainer) -> DockerNetwork | None:
        """The network that a container is in; None if in none of its own."""
        return next(
            (
                net
                for net in self.docker_networks
                if (net.node, net.name) == (container.node, container.network)
            ),
            None,
        )

    @cached_property
    def with_host_ports(self) -> dict[str, tuple[Pod, ...]]:
        """By node the pods, not of its own network, that have ports on it."""
        found: dict[str, tuple[Pod, ...]] = {}
        for pod in self.pods:
            if not pod.host_network and any(port.host_port for port in pod.ports):
                found[pod.node] = (*found.get(pod.node, ()), pod)
        return found

    def node(self, name: str) -> Node:
        """The node of that name; KeyError if there is none."""
        return self._node_by_name[name]

    def endpoints_of(self, service: Service, port: ServicePort) -> tuple[Endpoint, ...]:
        """Endpoints behind one port of a Service, in no particular order."""
        key = (service.namespace, service.name, port.name, port.protocol)
        return self._endpoints_by_port.get(key, ())
