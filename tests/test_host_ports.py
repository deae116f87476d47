"""`hostPort`: the rules of the CNI plugin portmap, and what becomes of packets."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest
from msgspec.structs import replace

from labs import dual_stack_lab, fresh_name, small_lab
from netlab.datapath import own_chains
from netlab.datapath.build import build
from netlab.lab import lifecycle
from netlab.topology.model import ContainerPort, Lab, ProxyMode
from netlab.trace.aim import Request
from netlab.trace.prediction import foretell
from predictions import differing

PORTS = (
    ContainerPort(port=8002, host_port=8080),
    ContainerPort(port=8002, protocol="UDP", host_port=5353),
)


def opened(lab: Lab) -> Lab:
    """Pod p1, on n2, has two ports there."""
    pods = [replace(pod, ports=PORTS) if pod.name == "p1" else pod for pod in lab.pods]
    return replace(lab, pods=tuple(pods))


RULES = """*nat
:CNI-DN-d1b7 - [0:0]
:CNI-HOSTPORT-DNAT - [0:0]
:CNI-HOSTPORT-MASQ - [0:0]
:CNI-HOSTPORT-SETMARK - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
-A OUTPUT -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
-I POSTROUTING -m comment --comment "CNI portfwd requiring masquerade" -j CNI-HOSTPORT-MASQ
-A CNI-DN-d1b7 -s 10.244.2.0/24 -p tcp -m tcp --dport 8080 -j CNI-HOSTPORT-SETMARK
-A CNI-DN-d1b7 -s 127.0.0.1/32 -p tcp -m tcp --dport 8080 -j CNI-HOSTPORT-SETMARK
-A CNI-DN-d1b7 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 10.244.2.2:8002
-A CNI-DN-d1b7 -s 10.244.2.0/24 -p udp -m udp --dport 5353 -j CNI-HOSTPORT-SETMARK
-A CNI-DN-d1b7 -s 127.0.0.1/32 -p udp -m udp --dport 5353 -j CNI-HOSTPORT-SETMARK
-A CNI-DN-d1b7 -p udp -m udp --dport 5353 -j DNAT --to-destination 10.244.2.2:8002
-A CNI-HOSTPORT-DNAT -p tcp -m comment --comment "dnat name: \\"cbr0\\" id: \\"ID\\"" \
-m multiport --dports 8080 -j CNI-DN-d1b7
-A CNI-HOSTPORT-DNAT -p udp -m comment --comment "dnat name: \\"cbr0\\" id: \\"ID\\"" \
-m multiport --dports 5353 -j CNI-DN-d1b7
-A CNI-HOSTPORT-MASQ -m mark --mark 0x2000/0x2000 -j MASQUERADE
-A CNI-HOSTPORT-SETMARK -m comment --comment "CNI portfwd masquerade mark" -j MARK \
--set-xmark 0x2000/0x2000
COMMIT
"""


def rules(lab: Lab, node: str) -> tuple[str, str]:
    chains = own_chains.of_node(lab, lab.node(node))
    return (chains.ipv4, chains.ipv6) if chains else ("", "")


def test_the_rules_are_those_of_portmap() -> None:
    from netlab.datapath.host_ports import chain_of, sandbox

    lab = opened(small_lab(name="t"))
    ipv4, ipv6 = rules(lab, "n2")
    (pod,) = lab.with_host_ports["n2"]
    assert len(chain_of(pod)) == 28
    named = ipv4.replace(chain_of(pod), "CNI-DN-d1b7").replace(sandbox(pod), "ID")
    assert named == RULES.replace("\\\n", "")
    assert ipv6 == ""
    assert rules(lab, "n1") == ("", "")


def test_both_families_have_them_but_no_loopback_of_ipv6() -> None:
    _, ipv6 = rules(opened(dual_stack_lab(small_lab(name="t"))), "n2")
    assert "--to-destination [fd00:10:244:2::2]:8002" in ipv6
    assert "127.0.0.1" not in ipv6
    assert "::1/128" not in ipv6


def test_a_host_ip_is_matched() -> None:
    port = ContainerPort(port=80, host_port=8080, host_ip="172.21.32.12")
    lab = small_lab(name="t")
    pods = tuple(replace(pod, ports=(port,)) for pod in lab.pods if pod.name == "p1")
    ipv4, _ = rules(replace(lab, pods=pods), "n2")
    assert "-d 172.21.32.12/32 -p tcp -m tcp --dport 8080 -j DNAT" in ipv4


def test_edits_lead_from_what_is_printed_to_what_is_wanted() -> None:
    ipv4, _ = rules(opened(small_lab(name="t")), "n2")
    foreign = "*nat\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -j ACCEPT\nCOMMIT\n"
    assert own_chains.edits(ipv4.replace("-I ", "-A "), ipv4) == ""
    assert own_chains.edits(foreign, "") == ""
    added = own_chains.edits(foreign, ipv4)
    assert "-A CNI-HOSTPORT-MASQ" in added
    gone = own_chains.edits(ipv4.replace("-I ", "-A "), "")
    assert gone.count("\n-X CNI-") == 4
    assert gone.count("\n-D ") == 3


def test_it_is_predicted() -> None:
    lab = opened(small_lab(name="t"))

    def said(source: str, to: str) -> tuple[str, str]:
        found = foretell(lab, Request(source, to)).prediction
        source_seen = found.seen_source
        return found.disposition, source_seen.ip if source_seen else ""

    assert said("p0", "node/n2:8080") == ("delivered", "10.244.1.2")
    assert said("p3", "node/n2:8080") == ("delivered", "10.244.2.1")
    assert said("p1", "node/n2:8080") == ("delivered", "10.244.2.1")
    assert said("node/n2", "127.0.0.1:8080") == ("delivered", "10.244.2.1")
    assert said("p0", "node/n1:8080")[0] == "rejected"


# --- on the kernel -------------------------------------------------------------------------------


def _requests() -> list[Request]:
    found = [Request(source, "node/n2:8080") for source in ("p0", "p1", "p3", "node/n1", "node/n2")]
    found += [Request(source, "node/n2:5353", protocol="udp") for source in ("p0", "p3")]
    return [*found, Request("node/n2", "127.0.0.1:8080"), Request("p0", "node/n1:8080")]


@pytest.mark.kernel
@pytest.mark.parametrize("mode", ["iptables", "nftables", "none"])
def test_everybody_reaches_it_as_predicted(
    up: Callable[[Lab], lifecycle.Outcome], mode: ProxyMode
) -> None:
    lab = small_lab()
    lab = opened(replace(lab, service_proxy=replace(lab.service_proxy, mode=mode)))
    up(lab)
    assert differing(lab, _requests()) == []
    assert up(lab).changes == ()


@pytest.mark.kernel
def test_routed_pods_are_reached_too(up: Callable[[Lab], lifecycle.Outcome]) -> None:
    lab = opened(small_lab(overlay="bgp"))
    up(lab)
    assert differing(lab, _requests()) == []


@pytest.mark.kernel
@pytest.mark.parametrize("mode", ["iptables", "nftables"])
def test_rules_come_and_go_and_what_is_others_stays(
    up: Callable[[Lab], lifecycle.Outcome], mode: ProxyMode
) -> None:
    lab = small_lab(name=fresh_name())
    lab = replace(lab, service_proxy=replace(lab.service_proxy, mode=mode))
    with_ports = opened(lab)
    up(lab)

    def printed(*command: str) -> str:
        full = ["ip", "netns", "exec", f"{lab.name}:n2", *command]
        return subprocess.run(full, check=True, capture_output=True, text=True).stdout

    printed("iptables", "-t", "nat", "-A", "PREROUTING", "-s", "192.0.2.1", "-j", "ACCEPT")
    assert [change.verb for change in up(with_ports).changes]
    assert up(with_ports).changes == ()
    assert printed("iptables-save", "-t", "nat").count("-j CNI-HOSTPORT-DNAT") == 2
    printed("iptables", "-t", "nat", "-F", "CNI-HOSTPORT-DNAT")
    assert up(with_ports).changes
    assert up(with_ports).changes == ()
    up(lab)
    after = printed("iptables-save", "-t", "nat")
    assert "CNI-" not in after
    assert "192.0.2.1" in after
    assert up(lab).changes == ()


def test_a_node_without_such_ports_has_nothing_of_it() -> None:
    state = build(small_lab(name="t"), rules=False)
    assert all(node.namespace.chains is None for node in state.nodes)
