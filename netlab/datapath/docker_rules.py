"""Docker's rules of iptables: on a node, and in a container that finds others by name.

Source: moby libnetwork (drivers/bridge/setup_ip_tables_linux.go, iptables/iptables.go,
firewall_linux.go, resolver_unix.go) up to 27; what is inserted at a head stands here as it is
listed then, the newest network first.  Docker leaves the policy of FORWARD as it is where
forwarding was on before it came, as on a node of a cluster.
"""

from __future__ import annotations

from netlab.datapath.docker import RESOLVER_PORT, networks_of, on_node
from netlab.datapath.docker_names import RESOLVER
from netlab.datapath.services.iptables_save import host
from netlab.topology.model import DockerNetwork, Lab, Node

Rules = dict[str, dict[str, list[str]]]

_STAGES = ("DOCKER-ISOLATION-STAGE-1", "DOCKER-ISOLATION-STAGE-2")


def chains(lab: Lab, node: Node) -> Rules:
    """Rules of a node by table and chain, those of hooks among them; none without Docker."""
    nets = networks_of(lab, node)[::-1]
    if not nets:
        return {}
    local = "-m addrtype --dst-type LOCAL -j DOCKER"
    nat: dict[str, list[str]] = {
        "PREROUTING": [local],
        "OUTPUT": [f"! -d 127.0.0.0/8 {local}"],
        "POSTROUTING": [f"-s {net.cidr} ! -o {net.bridge} -j MASQUERADE" for net in nets],
        "DOCKER": [f"-i {net.bridge} -j RETURN" for net in nets],
    }
    filters: dict[str, list[str]] = {
        "FORWARD": ["-j DOCKER-USER", f"-j {_STAGES[0]}"],
        "DOCKER": [],
        _STAGES[0]: [f"-i {net.bridge} ! -o {net.bridge} -j {_STAGES[1]}" for net in nets],
        _STAGES[1]: [f"-o {net.bridge} -j DROP" for net in nets],
        "DOCKER-USER": ["-j RETURN"],
    }
    for stage in _STAGES:
        filters[stage].append("-j RETURN")
    for net in nets:
        filters["FORWARD"] += _forwarding(net)
    for container in on_node(lab, node):
        own = lab.docker_network(container)
        for port in container.published if own else ():
            assert own is not None
            protocol = port.protocol.lower()
            to = f"-p {protocol} -m {protocol} --dport"
            asked = f"-d {host(port.host_ip)} " if port.host_ip not in ("", "0.0.0.0") else ""
            address = host(container.address)
            nat["DOCKER"].append(
                f"{asked}! -i {own.bridge} {to} {port.host_port} -j DNAT "
                f"--to-destination {container.address}:{port.port}"
            )
            # Who asks itself by way of the node would not know the answer.
            nat["POSTROUTING"].append(f"-s {address} -d {address} {to} {port.port} -j MASQUERADE")
            filters["DOCKER"].append(
                f"-d {address} ! -i {own.bridge} -o {own.bridge} {to} {port.port} -j ACCEPT"
            )
    return {"nat": nat, "filter": filters}


def _forwarding(net: DockerNetwork) -> list[str]:
    name = net.bridge
    return [
        f"-o {name} -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
        f"-o {name} -j DOCKER",
        f"-i {name} ! -o {name} -j ACCEPT",
        f"-i {name} -o {name} -j ACCEPT",
    ]


def resolver_rules() -> Rules:
    """What leads a container's questions to its server, and gives the answers their port."""
    asked, answers = f"-d {RESOLVER}/32", f"-s {RESOLVER}/32"
    nat: dict[str, list[str]] = {
        "OUTPUT": [f"{asked} -j DOCKER_OUTPUT"],
        "POSTROUTING": [f"{asked} -j DOCKER_POSTROUTING"],
        "DOCKER_OUTPUT": [],
        "DOCKER_POSTROUTING": [],
    }
    for protocol in ("tcp", "udp"):
        match = f"-p {protocol} -m {protocol}"
        nat["DOCKER_OUTPUT"].append(
            f"{asked} {match} --dport 53 -j DNAT --to-destination {RESOLVER}:{RESOLVER_PORT}"
        )
        nat["DOCKER_POSTROUTING"].append(
            f"{answers} {match} --sport {RESOLVER_PORT} -j SNAT --to-source :53"
        )
    return {"nat": nat}
