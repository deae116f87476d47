"""Files by which names are found: what a pod, a node and a host see of /etc.

A pod's resolv.conf is kubelet's (pkg/kubelet/network/dns): the cluster's server and the search list
of its namespace, with `ndots:5`, as its dnsPolicy and dnsConfig want it.  Its hosts are kubelet's,
too (pkg/kubelet/kubelet_pods.go).  Nodes and hosts know each other from /etc/hosts and have no
server, so dnsPolicy `Default`, which gives a pod what its node has, gives it none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from ipaddress import ip_address

from netlab.datapath import docker
from netlab.datapath.outside_names import host_namespace
from netlab.datapath.state import File, View, namespace_name
from netlab.topology.model import Host, Lab, Node, Pod, Service

CLUSTER_DOMAIN = "cluster.local"
_LONGEST_HOST_NAME = 63  # what Kubernetes leaves of a pod's name
_NO_SERVER = "# There is no name server here.\n"
_NSSWITCH = """\
passwd:         files
group:          files
shadow:         files

hosts:          files dns
networks:       files

protocols:      files
services:       files
"""
_LOCAL = """\
127.0.0.1\tlocalhost
::1\tlocalhost ip6-localhost ip6-loopback
fe00::0\tip6-localnet
fe00::0\tip6-mcastprefix
fe00::1\tip6-allnodes
fe00::2\tip6-allrouters
"""


def views(lab: Lab) -> Callable[[str], View | None]:
    """Views of the lab by name; what they hold is worked out when one is asked for."""
    known: dict[str, Callable[[], View]] = {}

    def find(name: str) -> View | None:
        if not known:
            known.update(_by_name(lab))
        return known[name]() if name in known else None

    return find


def pod_view(lab: Lab, pod: Pod) -> View:
    """What a pod sees; one with `hostNetwork` has files of its own beside its node's."""
    name = pod_host_name(pod)
    return View(
        name=pod_view_name(lab, pod),
        namespace=namespace_name(lab.name, pod.node)
        if pod.host_network
        else pod_view_name(lab, pod),
        host_name=_kernel_host_name(pod, name),
        files=(
            *_files(_pod_resolv_conf(lab, pod), _pod_hosts(lab, pod, name), name),
            *(
                File(path=file.path, text=file.text)
                for container in pod.containers
                for file in container.files
            ),
        ),
    )


def pod_view_name(lab: Lab, pod: Pod) -> str:
    """Its name among views: that of the namespace, if it has one of its own."""
    return namespace_name(lab.name, pod.namespace, pod.name)


def node_view(lab: Lab, node: Node) -> View:
    """What a node sees."""
    name = namespace_name(lab.name, node.name)
    return _machine_view(lab, name, node.name)


def host_view(lab: Lab, host: Host) -> View:
    """What a host outside sees."""
    return _machine_view(lab, host_namespace(lab, host), host.name)


def pod_host_name(pod: Pod) -> str:
    """What a pod is called: its `hostname`, or as much of its name as fits."""
    if pod.host_network:
        return _shortened(pod.node)
    return pod.naming.host_name or _shortened(pod.name)


def pod_domain(pod: Pod) -> str:
    """The domain of a pod that has a `subdomain`; "" otherwise."""
    if not pod.naming.subdomain:
        return ""
    return f"{pod.naming.subdomain}.{pod.namespace}.svc.{CLUSTER_DOMAIN}"


def dns_service(lab: Lab) -> Service | None:
    """The Service that pods ask: kube-system/kube-dns, or one there with its label."""
    system = [each for each in lab.services if each.namespace == "kube-system"]
    return next(
        (each for each in system if each.name == "kube-dns"),
        next((each for each in system if each.labels.get("k8s-app") == "kube-dns"), None),
    )


def servers_of(lab: Lab) -> tuple[str, ...]:
    """The addresses of the cluster's name server; none if the lab has none."""
    service = dns_service(lab)
    return service.cluster_ips if service and service.cluster_ip != "None" else ()


def serves_names(lab: Lab) -> bool:
    """Whether the cluster's name server is one, and not the workload, if anything is behind it."""
    service = dns_service(lab)
    if service is None:
        return False
    servers = {pod.key for pod in lab.pods if pod.name_server}
    behind = (lab.endpoints_of(service, port) for port in service.ports)
    return all(end.pod in servers for ends in behind for end in ends)


def _by_name(lab: Lab) -> Iterator[tuple[str, Callable[[], View]]]:
    for pod in lab.pods:
        yield pod_view_name(lab, pod), lambda pod=pod: pod_view(lab, pod)  # type: ignore[misc]
    for node in lab.nodes:
        name = namespace_name(lab.name, node.name)
        yield name, lambda node=node: node_view(lab, node)  # type: ignore[misc]
    for host in lab.hosts:
        yield host_namespace(lab, host), lambda host=host: host_view(lab, host)  # type: ignore[misc]
    for each in lab.docker_containers:
        yield docker.view_name(lab, each), lambda each=each: docker.view(lab, each)  # type: ignore[misc]


def _machine_view(lab: Lab, namespace: str, name: str) -> View:
    hosts = _LOCAL + "".join(_lines_of_machines(lab))
    return View(
        name=namespace,
        namespace=namespace,
        host_name=_shortened(name),
        files=_files(_NO_SERVER, hosts, name),
    )


def _files(resolv_conf: str, hosts: str, host_name: str) -> tuple[File, ...]:
    return (
        File(path="/etc/resolv.conf", text=resolv_conf),
        File(path="/etc/hosts", text=hosts),
        File(path="/etc/hostname", text=f"{host_name}\n"),
        File(path="/etc/nsswitch.conf", text=_NSSWITCH),
    )


def _shortened(name: str) -> str:
    return name[:_LONGEST_HOST_NAME].rstrip("-.")


def _kernel_host_name(pod: Pod, name: str) -> str:
    domain = pod_domain(pod)
    whole = f"{name}.{domain}"
    # (Linux takes 64 bytes; kubelet refuses to start a pod whose name is longer.)
    return whole if pod.naming.as_fqdn and domain and len(whole) <= 64 else name


def _pod_resolv_conf(lab: Lab, pod: Pod) -> str:
    naming = pod.naming
    servers: tuple[str, ...] = ()
    searches: tuple[str, ...] = ()
    options: dict[str, str | None] = {}
    policy = naming.dns_policy
    by_cluster = policy == "ClusterFirstWithHostNet" or (
        policy == "ClusterFirst" and not pod.host_network
    )
    if by_cluster and (servers := servers_of(lab)):
        domain = f"svc.{CLUSTER_DOMAIN}"
        searches = (f"{pod.namespace}.{domain}", domain, CLUSTER_DOMAIN)
        options = {"ndots": "5"}
    servers = _each_once((*servers, *naming.name_servers))
    searches = _each_once((*searches, *naming.searches))
    options |= dict(naming.options)
    lines = [f"nameserver {server}" for server in servers] or [_NO_SERVER.rstrip("\n")]
    if searches:
        lines.append(f"search {' '.join(searches)}")
    if options:
        words = (name if value is None else f"{name}:{value}" for name, value in options.items())
        lines.append(f"options {' '.join(words)}")
    return "".join(f"{line}\n" for line in lines)


def _pod_hosts(lab: Lab, pod: Pod, name: str) -> str:
    if pod.host_network:
        lines = ["# Kubernetes-managed hosts file (host network).\n", _LOCAL]
        lines += _lines_of_machines(lab)
    else:
        domain = pod_domain(pod)
        names = f"{name}.{domain}\t{name}" if domain else name
        lines = ["# Kubernetes-managed hosts file.\n", _LOCAL]
        lines += (f"{address}\t{names}\n" for address in pod.addresses)
    if pod.naming.aliases:
        lines.append("\n# Entries added by HostAliases.\n")
        lines += ("\t".join((each.ip, *each.names)) + "\n" for each in pod.naming.aliases)
    return "".join(lines)


def _lines_of_machines(lab: Lab) -> Iterator[str]:
    machines: Iterable[Node | Host] = (*lab.nodes, *lab.hosts)
    for machine in machines:
        for address in sorted(machine.addresses, key=lambda text: ip_address(text).version):
            yield f"{address}\t{machine.name}\n"


def _each_once(words: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(words))
