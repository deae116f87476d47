"""What Docker makes on a node: bridges, containers in them or without a network, and name servers.

    node n1: eth0 ── (routing, iptables) ──┬── cbr0, the pods
                                           ├── docker0 172.17.0.1/16 ── containers
                                           └── br-0123456789ab 172.18.0.1/16 ── containers

In a network of its user's a container finds others by name: it asks 127.0.0.11, which rules of its
own namespace lead to a server that Docker keeps in there (moby daemon/libnetwork/resolver_unix.go).
Here that is a dnsmasq.  What is published for a container is turned by the node's rules
(`docker_rules`); docker-proxy takes what they leave, from the node itself by 127.0.0.1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

from netlab.datapath import environment, podnet
from netlab.datapath.docker_names import RESOLVER, container_namespace, outer_link
from netlab.datapath.state import (
    Address,
    Chains,
    File,
    Link,
    Namespace,
    Peer,
    Process,
    Route,
    Server,
    View,
    namespace_name,
)
from netlab.topology.model import Container, DockerContainer, DockerNetwork, Lab, Node

RESOLVER_PORT = 40053  # Docker's is any that is free
MTU = 1500
_NO_SERVER = "# There is no name server here.\n"


def on_node(lab: Lab, node: Node) -> list[DockerContainer]:
    """The containers of a node."""
    return [each for each in lab.docker_containers if each.node == node.name]


def networks_of(lab: Lab, node: Node) -> list[DockerNetwork]:
    """The networks of a node."""
    return [each for each in lab.docker_networks if each.node == node.name]


def mac_of(address: str) -> str:
    """02:42 and the four bytes of the address."""
    return "02:42:" + bytes(map(int, address.split("."))).hex(":")


def links(lab: Lab, node: Node) -> Iterator[Link]:
    """The bridges of a node and the outer ends of its containers' pairs."""
    for net in networks_of(lab, node):
        yield Link(name=net.bridge, kind="bridge", mtu=MTU, mac=mac_of(net.gateway))
    for container in on_node(lab, node):
        if own := lab.docker_network(container):
            yield Link(
                name=outer_link(container),
                kind="veth",
                mtu=MTU,
                master=own.bridge,
                peer=Peer(namespace=container_namespace(lab, container), link="eth0"),
            )


def addresses(lab: Lab, node: Node) -> Iterator[Address]:
    """The bridges' own."""
    for net in networks_of(lab, node):
        yield Address(link=net.bridge, address=_with_length(net.gateway, net))


def namespaces(lab: Lab, node: Node, by_name: Chains) -> Iterator[Namespace]:
    """The containers that do not live in their node's.

    `by_name` are the rules of those that find others by name.
    """
    for container in on_node(lab, node):
        if container.mode != "host":
            yield _namespace(lab, node, container, by_name)


def _namespace(lab: Lab, node: Node, container: DockerContainer, by_name: Chains) -> Namespace:
    name = container_namespace(lab, container)
    net = lab.docker_network(container)
    if net is None:
        return Namespace(name=name, sysctls=podnet.pod_sysctls(lab))
    return Namespace(
        name=name,
        links=(
            Link(
                name="eth0",
                kind="veth",
                mtu=MTU,
                mac=mac_of(container.address),
                peer=Peer(
                    namespace=namespace_name(lab.name, node.name), link=outer_link(container)
                ),
            ),
        ),
        addresses=(Address(link="eth0", address=_with_length(container.address, net)),),
        routes=(Route(destination=podnet.DEFAULT_ROUTES[4], link="eth0", via=net.gateway),),
        sysctls=podnet.pod_sysctls(lab),
        chains=None if net.is_default else by_name,
    )


def _with_length(address: str, net: DockerNetwork) -> str:
    return f"{address}/{net.cidr.partition('/')[2]}"


def servers(lab: Lab) -> Iterator[Server]:
    """What answers in containers that run no command, and on nodes for what is published."""
    for container in lab.docker_containers:
        if container.listen and not container.container.runs:
            yield Server(
                namespace=container_namespace(lab, container),
                identity=container.name,
                node=container.node,
                listen=container.listen,
                addresses=podnet.any_addresses(lab),
            )
        for port in container.published:
            if port.protocol == "TCP":  # (what relays carry)
                yield Server(
                    namespace=namespace_name(lab.name, container.node),
                    identity="docker-proxy",
                    node=container.node,
                    listen=((port.protocol, port.host_port),),
                    addresses=(port.host_ip or "0.0.0.0",),
                    backends=((container.address, port.port),),
                )


def processes(lab: Lab, node: Node) -> Iterator[Process]:
    """Commands of containers, and the servers of those that are found by name."""
    for container in on_node(lab, node):
        own, namespace = container.container, container_namespace(lab, container)
        if own.runs:
            variables = _variables(container)
            yield Process(
                name=f"container/{container.name}" if container.mode == "host" else own.name,
                namespace=namespace,
                command=environment.command(own, variables),
                view=view_name(lab, container) if container.mode == "host" else "",
                directory=own.directory or "/",
                environment=tuple(variables.items()),
                listens=tuple(
                    (port.protocol, port.port) for port in own.ports if port.protocol != "SCTP"
                ),
            )
        net = lab.docker_network(container)
        if net is not None and not net.is_default:
            yield _resolver(lab, net, namespace)


def _resolver(lab: Lab, net: DockerNetwork, namespace: str) -> Process:
    """Knows the containers of the network, and nobody else."""
    lines = [
        f"port={RESOLVER_PORT}",
        f"listen-address={RESOLVER}",
        *("bind-interfaces", "no-resolv", "no-hosts", "local-ttl=600"),
        "user=root",
        "pid-file=/run/docker-dns.pid",
        *(f"host-record={each.name},{each.address}" for each in _members(lab, net)),
    ]
    config = "/run/docker-dns.conf"
    return Process(
        name="docker-dns",
        namespace=namespace,
        command=("dnsmasq", "--keep-in-foreground", f"--conf-file={config}"),
        package="dnsmasq-base",
        files=(File(path=config, text="\n".join(lines) + "\n"),),
        listens=(("UDP", RESOLVER_PORT), ("TCP", RESOLVER_PORT)),
    )


def _members(lab: Lab, net: DockerNetwork) -> Iterable[DockerContainer]:
    return (each for each in lab.docker_containers if lab.docker_network(each) == net)


def _variables(container: DockerContainer) -> dict[str, str]:
    own: Container = container.container
    found = {"HOSTNAME": host_name(container)}
    for each in own.env:
        found[each.name] = environment.expanded(each.value, found)
    return found


def environment_of(container: DockerContainer) -> dict[str, str]:
    """What a command in a container finds."""
    return _variables(container)


def host_name(container: DockerContainer) -> str:
    """Docker's identifier of twelve digits; with mode host the node's name."""
    if container.mode == "host":
        return container.node
    return hashlib.sha256(container.name.encode()).hexdigest()[:12]


def view_name(lab: Lab, container: DockerContainer) -> str:
    """The name of what a container sees of files."""
    return namespace_name(lab.name, "_container", container.name)


def view(lab: Lab, container: DockerContainer) -> View:
    """What a container sees: its own name in /etc/hosts, its network's server if it has one."""
    net, name = lab.docker_network(container), host_name(container)
    resolv_conf = _NO_SERVER
    if net is not None and not net.is_default:
        resolv_conf = f"nameserver {RESOLVER}\noptions ndots:0\n"
    hosts = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"
    if container.address:
        hosts += f"{container.address}\t{name}\n"
    return View(
        name=view_name(lab, container),
        namespace=container_namespace(lab, container),
        host_name=name,
        files=(
            File(path="/etc/resolv.conf", text=resolv_conf),
            File(path="/etc/hosts", text=hosts),
            File(path="/etc/hostname", text=f"{name}\n"),
        ),
    )
