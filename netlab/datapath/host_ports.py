"""`hostPort` of pods, as the CNI plugin portmap opens it on their node.

What comes for one of the node's own addresses and that port is sent to the pod.  It is masqueraded
if it comes from the pods' network, for the pod itself might be asked by way of its node, or from
127.0.0.1, which no route leads back to.  Nobody listens on the node.

Source: containernetworking/plugins, plugins/meta/portmap (portmap_iptables.go, chain.go) and
pkg/utils (MustFormatChainNameWithPrefix).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from ipaddress import ip_address, ip_interface

from netlab.datapath import podnet
from netlab.datapath.overlays import type_of
from netlab.datapath.services.iptables_save import comment, host
from netlab.datapath.state import Sysctl
from netlab.topology.model import ContainerPort, Lab, Node, Pod

NETWORK = "cbr0"  # as flannel calls its network in /etc/cni/net.d
DNAT, SETMARK, MASQ = "CNI-HOSTPORT-DNAT", "CNI-HOSTPORT-SETMARK", "CNI-HOSTPORT-MASQ"
_MARK = "0x2000/0x2000"
_LONGEST_CHAIN = 28
_PORTS_IN_A_RULE = 15  # of the match multiport


def opened(lab: Lab, node: Node) -> list[tuple[Pod, tuple[ContainerPort, ...]]]:
    """The pods of a node that have ports there, with those ports."""
    return [
        (pod, tuple(port for port in pod.ports if port.host_port))
        for pod in lab.with_host_ports.get(node.name, ())
    ]


def chains(lab: Lab, node: Node, family: int) -> dict[str, list[str]]:
    """Rules of the table nat by chain; none if no pod of the node has such a port."""
    pods = opened(lab, node)
    if not pods or not any(podnet.family_of(cidr) == family for cidr in lab.pod_cidrs):
        return {}
    found = {
        SETMARK: [f"{comment('CNI portfwd masquerade mark')} -j MARK --set-xmark {_MARK}"],
        MASQ: [f"-m mark --mark {_MARK} -j MASQUERADE"],
        DNAT: [],
    }
    for pod, ports in pods:
        address = podnet.of_family(pod.addresses, family)
        if address:
            _add_pod(found, node, pod, address, ports)
    return found


def entries() -> dict[str, list[str]]:
    """What leads from the hooks of nat into those chains."""
    local = f"-m addrtype --dst-type LOCAL -j {DNAT}"
    masquerade = f"{comment('CNI portfwd requiring masquerade')} -j {MASQ}"
    return {"PREROUTING": [local], "OUTPUT": [local], "POSTROUTING": [masquerade]}


def sysctls(lab: Lab, node: Node) -> Iterable[Sysctl]:
    """The links of such pods may carry packets from 127.0.0.1."""
    pods = opened(lab, node)
    if pods and "IPv4" in lab.families:
        routed = type_of(lab).routed_pods
        links = [podnet.outer_link(pod) for pod, _ in pods] if routed else ["cbr0"]
        for link in links:
            yield Sysctl(path=f"net/ipv4/conf/{link}/route_localnet", value="1")


def chain_of(pod: Pod) -> str:
    """The chain of a pod's ports."""
    digest = hashlib.sha512(f"{NETWORK}{sandbox(pod)}".encode()).hexdigest()
    return f"CNI-DN-{digest}"[:_LONGEST_CHAIN]


def sandbox(pod: Pod) -> str:
    """What stands for the identifier that a container runtime gives to a pod."""
    return hashlib.sha256(pod.key.encode()).hexdigest()


def _add_pod(
    found: dict[str, list[str]],
    node: Node,
    pod: Pod,
    address: str,
    ports: Sequence[ContainerPort],
) -> None:
    version = ip_address(address).version
    chain = chain_of(pod)
    named = comment(f'dnat name: \\"{NETWORK}\\" id: \\"{sandbox(pod)}\\"')
    for protocol in sorted({port.protocol for port in ports}):
        numbers = [str(port.host_port) for port in ports if port.protocol == protocol]
        for start in range(0, len(numbers), _PORTS_IN_A_RULE):
            listed = ",".join(numbers[start : start + _PORTS_IN_A_RULE])
            match = f"-p {protocol.lower()} {named} -m multiport --dports {listed}"
            found[DNAT].append(f"{match} -j {chain}")
    rules = found.setdefault(chain, [])
    cidr = podnet.of_family(node.pod_cidrs, version)
    length = cidr.partition("/")[2] if cidr else ip_address(address).max_prefixlen
    network = ip_interface(f"{address}/{length}").network
    to = f"[{address}]" if version == 6 else address
    for port in ports:
        given = port.host_ip and not ip_address(port.host_ip).is_unspecified
        if port.host_ip and ip_address(port.host_ip).version != version:
            continue
        destination = f"-d {host(port.host_ip)} " if given else ""
        lower = port.protocol.lower()
        match = f"{destination}-p {lower} -m {lower} --dport {port.host_port}"
        rules.append(f"-s {network} {match} -j {SETMARK}")
        if version == 4:
            rules.append(f"-s 127.0.0.1/32 {match} -j {SETMARK}")
        rules.append(f"{match} -j DNAT --to-destination {to}:{port.port}")
