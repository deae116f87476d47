"""What is wrong with a topology is said with its code, its object, its value and its place."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from netlab.problems import Exit, NetlabError, Problem
from netlab.topology.load import load

NODE = """\
apiVersion: v1
kind: Node
metadata: {name: n1}
spec: {podCIDR: 10.244.1.0/24}
status: {addresses: [{type: InternalIP, address: 172.21.32.11}]}
---
"""


def problems(directory: Path, text: str | bytes, name: str = "t.yaml") -> list[Problem]:
    """The problems of a file with this text."""
    file = directory / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(NetlabError) as caught:
        load(file)
    assert caught.value.exit_code == Exit.USAGE
    for problem in caught.value.problems:
        assert problem.place is not None
        assert problem.place.file == str(file)
    return list(caught.value.problems)


def where(problem: Problem) -> tuple[str, int | None, int | None]:
    """Code, line and column."""
    assert problem.place is not None
    return problem.code, problem.place.line, problem.place.column


# One mistake each: the file, the code, the line and column, and words of the message.
MISTAKES = {
    "unknown field": (
        "apiVersion: netlab/v1\nkind: Lab\nmetadata: {name: a}\nspec:\n  overlay: {tpye: vxlan}\n",
        ("unknown-field", 5, 13),
        ["Lab a", "spec.overlay.tpye", 'did you mean "type"'],
    ),
    "number for a text": (
        "apiVersion: v1\nkind: Pod\nmetadata:\n  name: a\n  labels: {version: 3.0}\n",
        ("wrong-type", 5, 21),
        ["Pod a", "metadata.labels.version is 3.0", "quotes"],
    ),
    "yes for a text": (
        "apiVersion: v1\nkind: Pod\nmetadata:\n  name: a\n  labels: {public: yes}\n",
        ("wrong-type", 5, 20),
        ["metadata.labels.public is true", "quotes"],
    ),
    "text for a number": (
        'apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {ports: [{port: "80"}]}\n',
        ("wrong-type", 4, 23),
        ["Service a", 'spec.ports[0].port is "80"', "without quotes"],
    ),
    "list for a mapping": (
        "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: []\n",
        ("wrong-type", 4, 7),
        ["Pod a: spec is a list; it takes a mapping"],
    ),
    "port out of range": (
        "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {ports: [{port: 65536}]}\n",
        ("bad-value", 4, 23),
        ["65536", "1 to 65535"],
    ),
    "protocol in lower case": (
        "apiVersion: v1\nkind: Service\nmetadata: {name: a}\n"
        "spec: {ports: [{port: 80, protocol: tcp}]}\n",
        ("bad-value", 4, 37),
        ['"tcp"', 'did you mean "TCP"'],
    ),
    "traffic distribution of nobody": (
        "apiVersion: v1\nkind: Service\nmetadata: {name: a}\n"
        "spec: {ports: [{port: 80}], trafficDistribution: PreferSamZone}\n",
        ("bad-value", 4, 50),
        ['"PreferSamZone"', 'did you mean "PreferSameZone"'],
    ),
    "missing field": (
        "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec:\n  ports:\n  - name: http\n",
        ("missing-field", 6, 5),
        ["Service a: spec.ports[0].port is missing"],
    ),
    "slash in a name": (
        "apiVersion: v1\nkind: Pod\nmetadata:\n  name: a/b\n",
        ("bad-name", 4, 9),
        ['"a/b"', "RFC 1123"],
    ),
    "two dots in a name": (
        "apiVersion: v1\nkind: Pod\nmetadata: {name: ..}\n",
        ("bad-name", 3, 18),
        ['".."'],
    ),
    "long name": (
        f"apiVersion: v1\nkind: Pod\nmetadata: {{name: {'x' * 300}}}\n",
        ("bad-name", 3, 18),
        ["300 characters", "253"],
    ),
    "name with a line break": (
        'apiVersion: v1\nkind: Pod\nmetadata: {name: "a\\n"}\n',
        ("bad-name", 3, 18),
        ['"a\\n"'],
    ),
    "capital in a lab's name": (
        "apiVersion: netlab/v1\nkind: Lab\nmetadata: {name: Lab}\n",
        ("bad-name", 3, 18),
        ['"Lab"', "63 lower-case"],
    ),
    "no kind": ("metadata: {name: a}\n", ("missing-field", 1, 1), ["no apiVersion and no kind"]),
    "a list as document": ("- a\n- b\n", ("not-an-object", 1, 1), ["a list"]),
    "a text as document": ("hello\n", ("not-an-object", 1, 1), ['"hello"']),
    "misspelt kind": (
        "apiVersion: v1\nkind: Servce\nmetadata: {name: a}\n",
        ("unknown-kind", 2, 7),
        ["Servce", 'did you mean "Service"'],
    ),
    "kind of another group": (
        "apiVersion: v1\nkind: Deployment\nmetadata: {name: a}\n",
        ("unknown-version", 1, 13),
        ["apps/v1"],
    ),
    "lab of another version": (
        "apiVersion: netlab/v2\nkind: Lab\nmetadata: {name: a}\n",
        ("unknown-version", 1, 13),
        ["netlab/v1"],
    ),
    "unknown kind of netlab": (
        "apiVersion: netlab/v1\nkind: Labs\nmetadata: {name: a}\n",
        ("unknown-kind", 2, 7),
        ['did you mean "Lab"'],
    ),
    "two labs": (
        "apiVersion: netlab/v1\nkind: Lab\nmetadata: {name: a}\n---\n"
        "apiVersion: netlab/v1\nkind: Lab\nmetadata: {name: b}\n",
        ("duplicate-lab", 5, 1),
        ["Lab b"],
    ),
    "duplicate name": (
        "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\n---\n"
        "apiVersion: v1\nkind: Pod\nmetadata: {name: a, namespace: default}\n",
        ("duplicate-name", 7, 18),
        ["Pod default/a stands twice"],
    ),
    "overlay of later": (
        "apiVersion: netlab/v1\nkind: Lab\nmetadata: {name: a}\nspec: {overlay: {type: geneve}}\n",
        ("unsupported", 4, 24),
        ['"geneve"', "it builds vxlan, vxlan-multicast, host-gw"],
    ),
    "unknown scheduler": (
        "apiVersion: netlab/v1\nkind: Lab\nmetadata: {name: a}\n"
        "spec: {serviceProxy: {mode: ipvs, ipvs: {scheduler: rrr}}}\n",
        ("unknown-scheduler", 4, 53),
        ['"rrr"', 'did you mean "rr"', "mh"],
    ),
    "timeout of ipvs": (
        "apiVersion: netlab/v1\nkind: Lab\nmetadata: {name: a}\n"
        "spec: {serviceProxy: {ipvs: {tcpFinTimeout: soon}}}\n",
        ("bad-value", 4, 45),
        ["ipvs.tcpFinTimeout", '"soon"', "duration"],
    ),
    "feature gate of later": (
        "apiVersion: netlab/v1\nkind: Lab\nmetadata: {name: a}\n"
        "spec: {serviceProxy: {featureGates: {Magic: true}}}\n",
        ("unsupported", 4, 38),
        ["Magic"],
    ),
    "misspelt feature gate": (
        "apiVersion: netlab/v1\nkind: Lab\nmetadata: {name: a}\n"
        "spec: {serviceProxy: {featureGates: {AllowServiceExternalIP: true}}}\n",
        ("unsupported", 4, 38),
        ['did you mean "AllowServiceExternalIPs"'],
    ),
    "locked feature gate": (
        "apiVersion: netlab/v1\nkind: Lab\nmetadata: {name: a}\n"
        "spec: {serviceProxy: {featureGates: {NFTablesProxyMode: false}}}\n",
        ("bad-value", 4, 57),
        ["NFTablesProxyMode", "cannot be switched off"],
    ),
    "unknown mode": (
        "apiVersion: netlab/v1\nkind: Lab\nmetadata: {name: a}\n"
        "spec: {serviceProxy: {mode: nftable}}\n",
        ("bad-value", 4, 29),
        ['"nftable"', 'did you mean "nftables"'],
    ),
    "timeout that is none": (
        "apiVersion: netlab/v1\nkind: Lab\nmetadata: {name: a}\n"
        "spec: {serviceProxy: {conntrack: {udpTimeout: 45}}}\n",
        ("wrong-type", 4, 47),
        ["udpTimeout is 45", "a text"],
    ),
    "timeout below zero": (
        "apiVersion: netlab/v1\nkind: Lab\nmetadata: {name: a}\n"
        "spec: {serviceProxy: {conntrack: {udpTimeout: -45s}}}\n",
        ("bad-value", 4, 47),
        ["conntrack.udpTimeout", '"-45s"', "45s"],
    ),
    "bit of no mark": (
        "apiVersion: netlab/v1\nkind: Lab\nmetadata: {name: a}\n"
        "spec: {serviceProxy: {nftables: {masqueradeBit: 32}}}\n",
        ("bad-value", 4, 49),
        ["32", "0 to 31"],
    ),
    "unknown way to tell pods": (
        "apiVersion: netlab/v1\nkind: Lab\nmetadata: {name: a}\n"
        "spec: {serviceProxy: {detectLocalMode: NodeCidr}}\n",
        ("bad-value", 4, 40),
        ['"NodeCidr"', 'did you mean "NodeCIDR"'],
    ),
    "cluster CIDR that is none": (
        "apiVersion: netlab/v1\nkind: Lab\nmetadata: {name: a}\n"
        "spec: {serviceProxy: {clusterCIDR: 10.244.0.0}}\n",
        ("bad-cidr", 4, 36),
        ["10.244.0.0", "clusterCIDR"],
    ),
    "node port address that is no network": (
        "apiVersion: netlab/v1\nkind: Lab\nmetadata: {name: a}\n"
        "spec: {serviceProxy: {nodePortAddresses: [primary, 172.21.32.11]}}\n",
        ("bad-cidr", 4, 52),
        ["Lab a", "nodePortAddresses[1]", "172.21.32.11", "172.21.32.0/24"],
    ),
    "misspelt word for node port addresses": (
        "apiVersion: netlab/v1\nkind: Lab\nmetadata: {name: a}\n"
        "spec: {serviceProxy: {nodePortAddresses: [locahost]}}\n",
        ("bad-cidr", 4, 43),
        ['did you mean "localhost"'],
    ),
    "prefix mode without a prefix": (
        "apiVersion: netlab/v1\nkind: Lab\nmetadata: {name: a}\n"
        "spec: {serviceProxy: {detectLocalMode: InterfaceNamePrefix, detectLocal: {}}}\n",
        ("missing-field", 4, 40),
        ["detectLocal.interfaceNamePrefix"],
    ),
    "bridge mode without a bridge": (
        "apiVersion: netlab/v1\nkind: Lab\nmetadata: {name: a}\n"
        "spec: {serviceProxy: {detectLocalMode: BridgeInterface}}\n",
        ("missing-field", 4, 40),
        ["detectLocal.bridgeInterface"],
    ),
    "no address": (
        "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nstatus: {podIP: 10.244.1.256}\n",
        ("bad-address", 4, 17),
        ["Pod default/a", "10.244.1.256"],
    ),
    "multicast address": (
        "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nstatus: {podIP: 224.0.0.1}\n",
        ("bad-address", 4, 17),
        ["224.0.0.1"],
    ),
    "no CIDR": (
        "apiVersion: v1\nkind: Node\nmetadata: {name: a}\nspec: {podCIDR: 10.244.1.0}\n",
        ("bad-cidr", 4, 17),
        ["10.244.1.0", "prefix length"],
    ),
    "address inside a CIDR": (
        "apiVersion: v1\nkind: Node\nmetadata: {name: a}\nspec: {podCIDR: 10.244.1.7/24}\n",
        ("bad-cidr", 4, 17),
        ["did you mean 10.244.1.0/24"],
    ),
    "node CIDR without room": (
        "apiVersion: v1\nkind: Node\nmetadata: {name: a}\nspec: {podCIDR: 10.244.1.0/31}\n",
        ("bad-cidr", 4, 17),
        ["holds no pod"],
    ),
    "pod and Service CIDR": (
        "apiVersion: netlab/v1\nkind: Lab\nmetadata: {name: a}\n"
        "spec:\n  podCIDR: 10.0.0.0/8\n  serviceCIDR: 10.96.0.0/12\n",
        ("overlapping-cidr", 5, 12),
        ["10.0.0.0/8", "10.96.0.0/12"],
    ),
    "underlay and default pod CIDR": (
        "apiVersion: netlab/v1\nkind: Lab\nmetadata: {name: a}\n"
        "spec: {underlay: {cidr: 10.244.9.0/24}}\n",
        ("overlapping-cidr", 4, 25),
        ["10.244.9.0/24", "10.244.0.0/16"],
    ),
    "CIDRs of two nodes": (
        NODE
        + "apiVersion: v1\nkind: Node\nmetadata: {name: n2}\nspec: {podCIDR: 10.244.1.128/25}\n",
        ("overlapping-cidr", 10, 17),
        ["Node n2", "Node n1"],
    ),
    "addresses of two nodes": (
        NODE + "apiVersion: v1\nkind: Node\nmetadata: {name: n2}\n"
        "status: {addresses: [{type: InternalIP, address: 172.21.32.11}]}\n",
        ("duplicate-address", 10, 21),
        ["Node n2", "172.21.32.11", "Node n1"],
    ),
    "node outside the underlay": (
        "apiVersion: netlab/v1\nkind: Lab\nmetadata: {name: a}\n"
        "spec: {underlay: {cidr: 192.0.2.0/24}}\n---\n" + NODE,
        ("outside-cidr", 10, 21),
        ["Node n1", "172.21.32.11", "192.0.2.0/24"],
    ),
    "gateway outside the underlay": (
        "apiVersion: netlab/v1\nkind: Lab\nmetadata: {name: a}\n"
        "spec: {underlay: {cidr: 192.0.2.0/24, gateway: 192.0.3.1}}\n",
        ("outside-cidr", 4, 48),
        ["192.0.3.1"],
    ),
    "gateway is a node": (
        NODE + "apiVersion: netlab/v1\nkind: Lab\nmetadata: {name: a}\n"
        "spec: {underlay: {gateway: 172.21.32.11}}\n",
        ("duplicate-address", 10, 28),
        ["172.21.32.11", "Node n1"],
    ),
    "exhausted underlay": (
        "apiVersion: netlab/v1\nkind: Lab\nmetadata: {name: a}\n"
        "spec: {underlay: {cidr: 192.0.2.0/30}}\n---\n"
        "apiVersion: v1\nkind: Node\nmetadata: {name: n1}\n---\n"
        "apiVersion: v1\nkind: Node\nmetadata: {name: n2}\n---\n"
        "apiVersion: v1\nkind: Node\nmetadata: {name: n3}\n",
        ("exhausted-cidr", 10, 1),
        ["192.0.2.0/30", "Node n2 and 1 more"],
    ),
    "exhausted pod CIDR": (
        "apiVersion: netlab/v1\nkind: Lab\nmetadata: {name: a}\n"
        "spec: {podCIDR: 10.244.0.0/24}\n---\n"
        "apiVersion: v1\nkind: Node\nmetadata: {name: n1}\n---\n"
        "apiVersion: v1\nkind: Node\nmetadata: {name: n2}\n",
        ("exhausted-cidr", 4, 17),
        ["10.244.0.0/24", "Node n2"],
    ),
    "exhausted node CIDR": (
        "apiVersion: v1\nkind: Node\nmetadata: {name: n1}\nspec: {podCIDR: 10.244.1.0/30}\n---\n"
        "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\n---\n"
        "apiVersion: v1\nkind: Pod\nmetadata: {name: b}\n",
        ("exhausted-cidr", 10, 1),
        ["Pod default/b", "no node has an address left"],
    ),
    "exhausted CIDR of the given node": (
        "apiVersion: v1\nkind: Node\nmetadata: {name: n1}\nspec: {podCIDR: 10.244.1.0/30}\n---\n"
        "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {nodeName: n1}\n---\n"
        "apiVersion: v1\nkind: Pod\nmetadata: {name: b}\nspec: {nodeName: n1}\n",
        ("exhausted-cidr", 11, 1),
        ["Node n1", "Pod default/b"],
    ),
    "exhausted Service CIDR": (
        "apiVersion: netlab/v1\nkind: Lab\nmetadata: {name: a}\n"
        "spec: {serviceCIDR: 10.96.0.0/30}\n---\n"
        + "---\n".join(
            f"apiVersion: v1\nkind: Service\nmetadata: {{name: s{i}}}\n"
            "spec: {ports: [{port: 80}]}\n"
            for i in range(3)
        ),
        ("exhausted-cidr", 16, 1),
        ["10.96.0.0/30", "Service default/s2"],
    ),
    "replicas beyond all bridges": (
        "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: a}\n"
        "spec: {replicas: 2000000000, template: {}}\n",
        ("too-many-pods", 4, 18),
        ["1023"],
    ),
    "two pods with one address": (
        NODE + "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nstatus: {podIP: 10.244.1.9}\n---\n"
        "apiVersion: v1\nkind: Pod\nmetadata: {name: b}\nstatus: {podIP: 10.244.1.9}\n",
        ("duplicate-address", 15, 17),
        ["Pod default/b", "10.244.1.9", "Pod default/a"],
    ),
    "pod with its bridge's address": (
        NODE + "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nstatus: {podIP: 10.244.1.1}\n",
        ("duplicate-address", 10, 17),
        ["10.244.1.1", "cbr0 on n1"],
    ),
    "pod with a node's address": (
        NODE + "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nstatus: {podIP: 172.21.32.11}\n",
        ("duplicate-address", 10, 17),
        ["172.21.32.11", "Node n1"],
    ),
    "unknown node": (
        NODE + "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {nodeName: n11}\n",
        ("unknown-node", 10, 18),
        ["Pod default/a", '"n11"', 'did you mean "n1"'],
    ),
    "unknown node in a template": (
        NODE + "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: a}\n"
        "spec: {template: {spec: {nodeName: x}}}\n",
        ("unknown-node", 10, 36),
        ['"x"', "n1"],
    ),
    "no node for a nodeSelector": (
        NODE
        + "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {nodeSelector: {disk: ssd}}\n",
        ("no-node", 10, 22),
        ["disk=ssd"],
    ),
    "an interface with too long a name": (
        "apiVersion: netlab/v1\nkind: Lab\nmetadata: {name: a}\nspec: {serviceProxy: "
        "{detectLocalMode: BridgeInterface, detectLocal: {bridgeInterface: abcdefghijklmnop}}}\n",
        ("bad-value", 4, 88),
        ["Lab a: detectLocal.bridgeInterface", '"abcdefghijklmnop"', "15 characters"],
    ),
    "a prefix that leaves no room": (
        "apiVersion: netlab/v1\nkind: Lab\nmetadata: {name: a}\nspec: {serviceProxy: "
        "{detectLocalMode: InterfaceNamePrefix,\n"
        " detectLocal: {interfaceNamePrefix: abcdefghijklmno}}}\n",
        ("bad-value", 5, 37),
        ["detectLocal.interfaceNamePrefix", "14 characters"],
    ),
    "an interface with a quotation mark": (
        "apiVersion: netlab/v1\nkind: Lab\nmetadata: {name: a}\nspec: {serviceProxy: "
        "{detectLocalMode: NodeCIDR,\n detectLocal: {bridgeInterface: 'a\"b'}}}\n",
        ("bad-value", 5, 33),
        ["detectLocal.bridgeInterface"],
    ),
    "an ingress address of nobody's mode": (
        "apiVersion: v1\nkind: Service\nmetadata: {name: a}\n"
        "spec: {type: LoadBalancer, ports: [{port: 80}]}\n"
        "status: {loadBalancer: {ingress: [{ip: 192.0.2.1, ipMode: Vip}]}}\n",
        ("bad-value", 5, 59),
        ["ingress[0].ipMode", '"Vip"', 'did you mean "VIP"'],
    ),
    "an ingress address that is none": (
        "apiVersion: v1\nkind: Service\nmetadata: {name: a}\n"
        "spec: {type: LoadBalancer, ports: [{port: 80}]}\n"
        "status: {loadBalancer: {ingress: [{ip: 300.1.1.1, ipMode: Proxy}]}}\n",
        ("bad-address", 5, 40),
        ["300.1.1.1"],
    ),
    "an ExternalName of nothing": (
        "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {type: ExternalName}\n",
        ("missing-field", 4, 7),
        ["Service default/a: spec.externalName is missing"],
    ),
    "externalTrafficPolicy of what nobody reaches from outside": (
        "apiVersion: v1\nkind: Service\nmetadata: {name: a}\n"
        "spec: {externalTrafficPolicy: Local, ports: [{port: 80}]}\n",
        ("bad-value", 4, 31),
        ["Service default/a", "ClusterIP Service has no externalTrafficPolicy"],
    ),
    "one cluster IP twice": (
        "apiVersion: v1\nkind: Service\nmetadata: {name: a}\n"
        "spec: {clusterIP: 10.96.1.1, ports: [{port: 80}]}\n---\n"
        "apiVersion: v1\nkind: Service\nmetadata: {name: b}\n"
        "spec: {clusterIP: 10.96.1.1, ports: [{port: 80}]}\n",
        ("duplicate-address", 9, 19),
        ["Service default/b", "10.96.1.1", "Service default/a"],
    ),
    "one node port twice": (
        "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec:\n  type: NodePort\n"
        "  ports:\n  - {name: a, port: 80, nodePort: 30080}\n"
        "  - {name: b, port: 81, nodePort: 30080}\n",
        ("duplicate-port", 8, 35),
        ["30080/TCP"],
    ),
    "node port without NodePort": (
        "apiVersion: v1\nkind: Service\nmetadata: {name: a}\n"
        "spec: {ports: [{port: 80, nodePort: 30080}]}\n",
        ("bad-value", 4, 37),
        ["ClusterIP", "30080"],
    ),
    "health check of no load balancer": (
        "apiVersion: v1\nkind: Service\nmetadata: {name: a}\n"
        "spec: {type: LoadBalancer, healthCheckNodePort: 30080, ports: [{port: 80}]}\n",
        ("bad-value", 4, 49),
        ["30080", "externalTrafficPolicy: Local"],
    ),
    "source ranges of no load balancer": (
        "apiVersion: v1\nkind: Service\nmetadata: {name: a}\n"
        "spec: {ports: [{port: 80}], loadBalancerSourceRanges: [10.0.0.0/8]}\n",
        ("bad-value", 4, 55),
        ["Service default/a", "LoadBalancer"],
    ),
    "source range that is none": (
        "apiVersion: v1\nkind: Service\nmetadata: {name: a}\n"
        "spec: {type: LoadBalancer, ports: [{port: 80}], loadBalancerSourceRanges: [10.0.0.1]}\n",
        ("bad-cidr", 4, 76),
        ["spec.loadBalancerSourceRanges[0]", "10.0.0.1", "192.0.2.7/32"],
    ),
    "one port twice": (
        "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec:\n  ports:\n"
        "  - {name: a, port: 80}\n  - {name: b, port: 80}\n",
        ("duplicate-port", 7, 21),
        ["80/TCP"],
    ),
    "several ports, one without a name": (
        "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec:\n  ports:\n"
        "  - {name: a, port: 80}\n  - {port: 81}\n",
        ("missing-field", 7, 5),
        ["needs a name"],
    ),
    "no ports": (
        "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {selector: {a: b}}\n",
        ("missing-field", 4, 7),
        ["spec.ports"],
    ),
    "tab": (
        "apiVersion: v1\nkind: Pod\nmetadata:\n \tname: a\n\tx: b\n",
        ("tab-indentation", 4, 2),
        ["tab", "blanks", "1 other"],
    ),
    "no YAML": (
        "apiVersion: v1\nkind: [Pod\nmetadata: {name: a}\n",
        ("yaml-syntax", 3, 9),
        ["not valid YAML"],
    ),
    "one key twice": ("a: 1\nb: 2\na: 3\n", ("duplicate-key", 3, 1), ['"a"']),
    "key that is no text": ("[a]: 1\n", ("bad-key", 1, 1), ["key"]),
    "tag of Python": (
        "a: !!python/object:os.system x\n",
        ("unknown-tag", 1, 4),
        ["!!python/object:os.system"],
    ),
    "control character": ("a: \x07\n", ("yaml-syntax", 1, 4), ["control characters"]),
    "alias of itself": ("a: &x [*x]\n", ("self-reference", 1, 8), ["*x"]),
    "alias of nothing": ("a: *x\n", ("unknown-alias", 1, 4), ["*x"]),
    "merge of no mapping": ("a: {<<: 1}\n", ("bad-merge", 1, 10), ["<<"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake(mistake: str, tmp_path: Path) -> None:
    text, expected, words = MISTAKES[mistake]
    found = problems(tmp_path, text)
    assert [where(problem) for problem in found] == [expected]
    for word in words:
        assert word in str(found[0])


def test_everything_wrong_is_said_at_once(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        "apiVersion: v1\nkind: Pod\nmetadata: {name: A, labels: {a: 1}}\n"
        "spec: {hostNetwork: maybe}\n"
        "---\nkind: Pod\n---\napiVersion: v1\nkind: Node\nmetadata: {}\n",
    )
    assert [where(problem) for problem in found] == [
        ("bad-name", 3, 18),
        ("wrong-type", 3, 33),
        ("wrong-type", 4, 21),
        ("missing-field", 6, 1),
        ("missing-field", 10, 11),
    ]


def test_what_only_shows_between_objects_is_said_at_once(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        NODE + "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {nodeName: x}\n---\n"
        "apiVersion: v1\nkind: Service\nmetadata: {name: a}\n"
        "spec: {clusterIP: 192.0.2.256, ports: [{port: 80}]}\n---\n"
        "apiVersion: netlab/v1\nkind: Lab\nmetadata: {name: a}\nspec: {overlay: {type: x}}\n",
    )
    assert [problem.code for problem in found] == ["unknown-node", "bad-address", "unsupported"]


def test_reading_goes_on_behind_a_document_that_is_no_yaml(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        "apiVersion: v1\nkind: {\n---\napiVersion: v1\nkind: Pod\nmetadata: {name: A}\n"
        "---\na: b: c\n---\nx: 1\nx: 2\n---\nkind: Pod\n",
    )
    assert [where(problem) for problem in found] == [
        ("yaml-syntax", 3, 1),
        ("bad-name", 6, 18),
        ("yaml-syntax", 8, 5),
        ("duplicate-key", 11, 1),
        ("missing-field", 13, 1),
    ]


def test_places_inside_a_list_and_in_json(tmp_path: Path) -> None:
    item = '{"apiVersion": "v1", "kind": "Pod",\n   "metadata": {"name": "A"}}'
    json = f'{{"apiVersion": "v1", "kind": "List", "items": [\n  {item}]}}'
    for name in ("t.json", "t.yaml"):
        (found,) = problems(tmp_path, json, name)
        assert where(found) == ("bad-name", 3, 25)


def test_the_place_of_what_an_alias_brought_is_the_alias(tmp_path: Path) -> None:
    (found,) = problems(
        tmp_path,
        "x: &wrong {a: 1}\napiVersion: v1\nkind: Pod\nmetadata:\n  name: a\n  labels: *wrong\n",
    )
    assert where(found) == ("wrong-type", 6, 11)


@pytest.mark.parametrize(("text", "place"), [('{"a":\n [1, 2,}', (2, 8)), ('{"a"', (1, 5))])
def test_json_that_is_none(tmp_path: Path, text: str, place: tuple[int, int]) -> None:
    (found,) = problems(tmp_path, text, "t.json")
    assert where(found) == ("json-syntax", *place)


def test_json_that_is_no_yaml_still_has_its_mistakes_named(tmp_path: Path) -> None:
    item = '{"apiVersion": "v1", "kind": "Pod", "x": "\x7f", "metadata": {"name": "A"}}'
    (found,) = problems(tmp_path, item, "t.json")
    assert found.code == "bad-name"


def test_pyyaml_without_libyaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("yaml.CSafeLoader")
    (tmp_path / "t.yaml").write_text(NODE)
    with pytest.raises(NetlabError, match="no-libyaml") as caught:
        load(tmp_path / "t.yaml")
    assert caught.value.exit_code == Exit.MACHINE


DEEP = {
    "flow": "[" * 100_000,
    "closed": "[" * 1000 + "]" * 1000,
    "mappings": "{a: " * 100_000,
    "sequences": "- " * 100_000,
    "indented": "".join(f"{' ' * i}a:\n" for i in range(1000)),
}


@pytest.mark.parametrize("kind", DEEP)
def test_deep_yaml(tmp_path: Path, kind: str) -> None:
    (found,) = problems(tmp_path, DEEP[kind])
    assert found.code == "nesting"


@pytest.mark.parametrize("depth", [101, 1000, 100_000])
def test_deep_json(tmp_path: Path, depth: int) -> None:
    text = '{"a":' * (depth - 1) + "[]" + "}" * (depth - 1)
    (found,) = problems(tmp_path, text, "t.json")
    assert found.code == "nesting"


def test_lists_of_lists(tmp_path: Path) -> None:
    text = "kind: Pod\napiVersion: v1\nmetadata: {name: a}"
    for _ in range(9):
        indented = text.replace("\n", "\n  ")
        text = f"apiVersion: v1\nkind: List\nitems:\n- {indented}"
    (found,) = problems(tmp_path, text)
    assert found.code == "nesting"


@pytest.mark.parametrize("merge", [False, True])
def test_aliases_that_explode(tmp_path: Path, merge: bool) -> None:
    lines = ["a0: &a0 {x: 1}"]
    for i in range(1, 30):
        many = ", ".join([f"*a{i - 1}"] * 9)
        lines.append(f"a{i}: &a{i} {{<<: [{many}]}}" if merge else f"a{i}: &a{i} [{many}]")
    (found,) = problems(tmp_path, "\n".join(lines))
    assert found.code == "alias-explosion"


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "empty-file"),
        (b" \n\n", "empty-file"),
        (b"\xef\xbb\xbf", "empty-file"),
        (b"# only a comment\n---\n", "empty-file"),
        (b"\x7fELF\x02\x01\x01\x00\x00", "not-text"),
        (b"\x89PNG\r\n\x1a\n", "not-text"),
        (b"name: caf\xe9\n", "not-text"),
    ],
)
def test_files_that_are_no_topology(tmp_path: Path, content: bytes, code: str) -> None:
    (found,) = problems(tmp_path, content)
    assert found.code == code


@pytest.mark.parametrize("command", ["missing.yaml", "directory.yaml", "a\0b/c.yaml"])
def test_what_cannot_be_read(tmp_path: Path, command: str) -> None:
    (tmp_path / "directory.yaml").mkdir()
    with pytest.raises(NetlabError) as caught:
        load(f"{tmp_path}/{command}")
    assert caught.value.exit_code == Exit.USAGE
    (found,) = caught.value.problems
    assert found.code == {"missing.yaml": "no-such-file"}.get(command, "not-a-file")


def test_a_device_is_not_read() -> None:
    with pytest.raises(NetlabError, match="not-a-file"):
        load("/dev/zero")


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "t.yaml"
    file.write_text(NODE)
    file.chmod(0)
    if os.geteuid() == 0:
        # Root may read everything; what the kernel says to others is said for it here.
        def refuse(*_args: object, **_more: object) -> None:
            raise PermissionError(13, "Permission denied", str(file))

        monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(NetlabError) as caught:
        load(file)
    assert [problem.code for problem in caught.value.problems] == ["no-permission"]


def test_more_than_a_bridge_holds(tmp_path: Path) -> None:
    nodes = "---\n".join(
        f"apiVersion: v1\nkind: Node\nmetadata: {{name: n{i}}}\n" for i in range(1024)
    )
    lab = (
        "apiVersion: netlab/v1\nkind: Lab\nmetadata: {name: a}\n"
        "spec: {podCIDR: 10.128.0.0/9, underlay: {cidr: 172.16.0.0/16}}\n"
    )
    (found,) = problems(tmp_path, f"{nodes}---\n{lab}")
    assert found.code == "too-many-nodes"

    node = "apiVersion: v1\nkind: Node\nmetadata: {name: n1}\nspec: {podCIDR: 10.244.0.0/16}\n"
    pods = "---\n".join(
        f"apiVersion: v1\nkind: Pod\nmetadata: {{name: p{i}}}\nspec: {{nodeName: n1}}\n"
        for i in range(1024)
    )
    (found,) = problems(tmp_path, f"{node}---\n{pods}")
    assert found.code == "too-many-pods"
    assert "1024 pods" in found.message


def test_too_many_node_ports(tmp_path: Path) -> None:
    ports = "".join(f"  - {{name: p{i}, port: {i + 1}}}\n" for i in range(2769))
    text = "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec:\n  type: NodePort\n  ports:\n"
    (found,) = problems(tmp_path, text + ports)
    assert found.code == "exhausted-ports"


def warnings(directory: Path, text: str) -> list[Problem]:
    """The warnings of a file that loads."""
    file = directory / "t.yaml"
    file.write_text(text)
    found = load(file).warnings
    assert all(problem.warning for problem in found)
    return list(found)


SERVICE = """\
apiVersion: v1
kind: Service
metadata: {name: s}
spec: {selector: {app: web}, ports: [{port: 80}]}
---
"""


def test_selector_that_matches_nothing(tmp_path: Path) -> None:
    (found,) = warnings(
        tmp_path,
        SERVICE + "apiVersion: v1\nkind: Pod\nmetadata: {name: a, labels: {app: wbe}}\n",
    )
    assert where(found) == ("selects-nothing", 4, 18)
    assert "Service default/s" in found.message
    assert "app=web" in found.message
    assert found.hint is not None
    assert "app=wbe" in found.hint


def test_selector_that_matches_in_another_namespace(tmp_path: Path) -> None:
    (found,) = warnings(
        tmp_path,
        SERVICE
        + "apiVersion: v1\nkind: Pod\nmetadata: {name: a, namespace: x, labels: {app: web}}\n",
    )
    assert found.hint is not None
    assert "namespace x" in found.hint


def test_two_services_with_one_address_and_port(tmp_path: Path) -> None:
    def service(name: str, fields: str) -> str:
        ports = "ports: [{port: 80}]"
        return (
            f"---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\n"
            f"spec: {{{ports}, {fields}}}\n"
        )

    text = service("b", "externalIPs: [192.0.2.1, 10.96.0.77]")
    other = service("a", "externalIPs: [192.0.2.1]") + service("c", "clusterIP: 10.96.0.77")
    found = warnings(tmp_path, text + other)
    assert {problem.code for problem in found} == {"shared-address"}
    assert [(problem.message, where(problem)[1]) for problem in found] == [
        ("Service default/b: 192.0.2.1 port 80/TCP is also that of default/a", 5),
        ("Service default/c: 10.96.0.77 port 80/TCP is also that of default/b", 15),
    ]
    apart = service("a", "externalIPs: [192.0.2.1]").replace("80", "81")
    assert warnings(tmp_path, service("b", "externalIPs: [192.0.2.1]") + apart) == []


def test_named_target_port_that_no_pod_has(tmp_path: Path) -> None:
    pods = (
        "apiVersion: v1\nkind: Pod\nmetadata: {name: a, labels: {app: web}}\n"
        "spec: {containers: [{ports: [{containerPort: 53, name: http, protocol: UDP}]}]}\n"
    )
    text = SERVICE.replace("{port: 80}", "{port: 80, targetPort: http}")
    (found,) = warnings(tmp_path, text + pods)
    assert where(found) == ("no-target-port", 4, 61)
    assert "Service default/s" in found.message
    assert 'a TCP port named "http"' in found.message
    assert found.hint is not None
    assert "http (UDP)" in found.hint
    other = (
        "---\napiVersion: v1\nkind: Pod\nmetadata: {name: b, labels: {app: web}}\n"
        "spec: {containers: [{ports: [{containerPort: 8080, name: http}]}]}\n"
    )
    assert warnings(tmp_path, text + pods + other) == []


def test_source_ranges_are_read_as_by_kube_proxy(tmp_path: Path) -> None:
    file = tmp_path / "t.yaml"
    ranges = "[' 192.0.2.7/24', '203.0.113.9/32 ']"
    file.write_text(
        "apiVersion: v1\nkind: Service\nmetadata: {name: a}\n"
        f"spec: {{type: LoadBalancer, ports: [{{port: 80}}], loadBalancerSourceRanges: {ranges}}}\n"
    )
    (service,) = load(file).lab.services
    assert service.load_balancer_source_ranges == ("192.0.2.0/24", "203.0.113.9/32")


def test_cluster_ip_outside_the_service_cidr_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "t.yaml"
    file.write_text(
        "apiVersion: v1\nkind: Service\nmetadata: {name: a}\n"
        "spec: {clusterIP: 10.1.2.3, selector: {}, ports: [{port: 80}]}\n"
    )
    loaded = load(file)
    (found,) = loaded.warnings
    assert where(found) == ("outside-cidr", 4, 19)
    assert "Service default/a" in str(found)
    assert "10.96.0.0/12" in str(found)
    assert loaded.lab.services[0].cluster_ip == "10.1.2.3"


def test_pod_outside_its_nodes_cidr(tmp_path: Path) -> None:
    file = tmp_path / "t.yaml"
    file.write_text(
        NODE + "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {nodeName: n1}\n"
        "status: {podIP: 10.244.7.7}\n"
    )
    loaded = load(file)
    (found,) = loaded.warnings
    assert where(found) == ("outside-cidr", 11, 17)
    assert "/32" in str(found)
    assert loaded.lab.pods[0].address == "10.244.7.7"
    assert loaded.lab.pods[0].node == "n1"


def test_kinds_without_a_part_are_counted_in_one_line(tmp_path: Path) -> None:
    texts = [
        f"apiVersion: v1\nkind: {kind}\nmetadata: {{name: a{i}}}\n"
        for i, kind in enumerate(("Secret", "LimitRange", "Secret", "ServiceAccount"))
    ]
    (found,) = warnings(tmp_path, "---\n".join(texts))
    assert found.code == "no-part"
    assert "LimitRange (1), Secret (2), ServiceAccount (1)" in found.message


def test_what_is_not_built_is_said(tmp_path: Path) -> None:
    found = warnings(
        tmp_path,
        "apiVersion: batch/v1\nkind: Job\nmetadata: {name: a}\n",
    )
    assert {problem.code for problem in found} == {"not-built"}
    text = "\n".join(map(str, found))
    assert "Job makes no pods" in text


def test_a_thousand_warnings_are_cut_short(tmp_path: Path) -> None:
    services = "---\n".join(
        f"apiVersion: v1\nkind: Service\nmetadata: {{name: s{i}}}\n"
        "spec: {selector: {app: x}, ports: [{port: 80}]}\n"
        for i in range(100)
    )
    found = warnings(tmp_path, services)
    assert len(found) == 6
    assert found[-1].message == "95 more of this kind"


def _on_their_node(ports: str, of_cluster: bool = False, more: str = "") -> str:
    uid = ", uid: 7d5c" if of_cluster else ""
    return "---\n".join(
        f"apiVersion: v1\nkind: Pod\nmetadata: {{name: p{i}{uid}}}\n"
        f"spec: {{{more}containers: [{{ports: [{ports}]}}]}}\n"
        for i in range(2)
    )


def test_two_pods_of_a_cluster_on_one_port_of_a_node(tmp_path: Path) -> None:
    file = tmp_path / "t.yaml"
    file.write_text(_on_their_node("{containerPort: 80}", True, "hostNetwork: true, "))
    loaded = load(file)
    assert "port-taken" in [problem.code for problem in loaded.warnings]
    assert [pod.listen for pod in loaded.lab.pods] == [(("TCP", 80),), ()]


@pytest.mark.parametrize(
    ("ports", "more"),
    [
        ("{containerPort: 80}", "hostNetwork: true, "),
        ("{containerPort: 8, hostPort: 80}", ""),
        ("{containerPort: 8, hostPort: 80}", "nodeName: node1, "),
    ],
)
def test_two_pods_on_one_port_of_a_node(tmp_path: Path, ports: str, more: str) -> None:
    file = tmp_path / "t.yaml"
    file.write_text(_on_their_node(ports, more=more))
    with pytest.raises(NetlabError) as caught:
        load(file)
    (problem,) = caught.value.problems
    assert problem.code == "port-taken"
    assert "Pod default/p1: TCP 80 on node node1 is already Pod default/p0's" in problem.message
    assert problem.place is not None


def test_pods_with_a_port_of_their_nodes_go_to_different_nodes(tmp_path: Path) -> None:
    file = tmp_path / "t.yaml"
    nodes = "".join(
        f"apiVersion: v1\nkind: Node\nmetadata: {{name: n{i}}}\n---\n" for i in range(2)
    )
    filler = "apiVersion: v1\nkind: Pod\nmetadata: {name: f}\nspec: {nodeName: n1}\n---\n"
    ports = "{containerPort: 8, hostPort: 80}"
    file.write_text(nodes + filler * 1 + _on_their_node(ports))
    assert {pod.name: pod.node for pod in load(file).lab.pods} == {
        "f": "n1",
        "p0": "n0",
        "p1": "n1",
    }


def test_two_addresses_of_a_node_have_a_port_each(tmp_path: Path) -> None:
    file = tmp_path / "t.yaml"
    texts = _on_their_node("{containerPort: 8, hostPort: 80, hostIP: 172.21.32.X}").split("X")
    file.write_text("2".join(texts[:2]) + "3" + texts[2])
    assert [pod.ports[0].host_ip for pod in load(file).lab.pods] == ["172.21.32.2", "172.21.32.3"]


def test_a_word_that_is_no_topology() -> None:
    with pytest.raises(NetlabError) as caught:
        load("two-node-vxlen")
    (found,) = caught.value.problems
    assert found.code == "unknown-topology"
    assert found.hint is not None
    assert 'did you mean "two-node-vxlan"?' in found.hint


def test_a_name_for_the_lab_that_is_none() -> None:
    with pytest.raises(NetlabError, match="bad-name"):
        load("one-node", name="../x")


def test_mistakes_of_one_object_and_between_objects_come_together(tmp_path: Path) -> None:
    file = tmp_path / "lab.yaml"
    file.write_text(
        """\
kind: Pod
apiVersion: v1
metadata: {name: "../x"}
---
kind: Pod
apiVersion: v1
metadata: {name: p1}
spec: {nodeName: nowhere}
---
kind: Service
apiVersion: v1
metadata: {name: s}
spec: {clusterIP: 9.9.9, ports: [{port: 80}]}
"""
    )
    with pytest.raises(NetlabError) as caught:
        load(file)
    assert [problem.code for problem in caught.value.problems] == [
        "bad-name",
        "unknown-node",
        "bad-address",
    ]


def test_what_follows_from_a_node_that_cannot_be_read_is_not_told(tmp_path: Path) -> None:
    file = tmp_path / "lab.yaml"
    file.write_text(
        """\
kind: Node
apiVersion: v1
metadata: {name: n1}
spec: {podCIDR: nonsense}
---
kind: Pod
apiVersion: v1
metadata: {name: p1}
spec: {nodeName: n1}
"""
    )
    with pytest.raises(NetlabError) as caught:
        load(file)
    assert "unknown-node" not in [problem.code for problem in caught.value.problems]
