"""Userspace mode without a kernel: its rules, the ports of its proxies, and what these are told."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from labs import dual_stack_lab, small_lab
from netlab.datapath.build import build
from netlab.datapath.services import userspace
from netlab.datapath.services.iptables_save import parse
from netlab.datapath.services.userspace_absent import absent
from netlab.datapath.services.userspace_programs import processes
from netlab.datapath.state import Ruleset
from netlab.problems import NetlabError
from netlab.topology.model import Lab, Service, ServicePort
from netlab.trace.aim import Request
from netlab.trace.prediction import foretell


def userspace_lab(lab: Lab | None = None) -> Lab:
    """A lab in mode userspace; Service web has a NodePort, an external and a balancer's address."""
    lab = lab or small_lab()
    web, empty = lab.services
    http, udp = web.ports
    web = replace(
        web,
        type="LoadBalancer",
        ports=(replace(http, node_port=30080), replace(udp, node_port=30053)),
        external_ips=("203.0.113.1",),
        load_balancer_ips=("203.0.113.101",),
    )
    proxy = replace(lab.service_proxy, mode="userspace")
    return replace(lab, service_proxy=proxy, services=(web, empty))


def rules(lab: Lab) -> dict[str, list[str]]:
    """Rules of n1 in IPv4, by chain."""
    ruleset = userspace.render(lab, lab.nodes[0])
    assert isinstance(ruleset, Ruleset)
    return {
        chain: found
        for table in parse(ruleset.ipv4).values()
        for chain, found in table.rules.items()
    }


def test_rules_are_those_of_the_historic_proxy() -> None:
    lab = userspace_lab()
    ports = userspace.proxy_ports(lab)
    http, udp = ports["tcp", "demo/web:http"], ports["udp", "demo/web:udp"]
    found = rules(lab)
    said = '-p tcp -m comment --comment "demo/web:http" -m tcp --dport'
    redirect = f"-j REDIRECT --to-ports {http}"
    dnat = f"-j DNAT --to-destination 172.21.32.11:{http}"
    container, host = "-A KUBE-PORTALS-CONTAINER", "-A KUBE-PORTALS-HOST"
    of_web = {chain: [each for each in found[chain] if "web:http" in each] for chain in found}
    local = "-m addrtype --dst-type LOCAL"
    assert of_web["KUBE-PORTALS-CONTAINER"] == [
        f"{container} -d 10.99.0.1/32 {said} 80 {redirect}",
        f"{container} -d 203.0.113.1/32 {said} 80 -m physdev ! --physdev-is-in {redirect}",
        f"{container} -d 203.0.113.1/32 {said} 80 {local} {redirect}",
        f"{container} -d 203.0.113.101/32 {said} 80 {redirect}",
    ]
    assert of_web["KUBE-PORTALS-HOST"] == [
        f"{host} -d 10.99.0.1/32 {said} 80 {dnat}",
        f"{host} -d 203.0.113.1/32 {said} 80 {local} {dnat}",
        f"{host} -d 203.0.113.101/32 {said} 80 {dnat}",
    ]
    assert of_web["KUBE-NODEPORT-CONTAINER"] == [
        f"-A KUBE-NODEPORT-CONTAINER {said} 30080 {redirect}"
    ]
    assert of_web["KUBE-NODEPORT-HOST"] == [f"-A KUBE-NODEPORT-HOST {said} 30080 {dnat}"]
    assert of_web["KUBE-NODEPORT-NON-LOCAL"] == [
        f"-A KUBE-NODEPORT-NON-LOCAL {said} {http} -m state --state NEW -j ACCEPT"
    ]
    assert [each.rpartition(" ")[2] for each in found["PREROUTING"]] == [
        "KUBE-PORTALS-CONTAINER",
        "KUBE-NODEPORT-CONTAINER",
    ]
    assert any(f"--dport 53 -j REDIRECT --to-ports {udp}" in each for each in found[container[3:]])


def test_a_proxy_takes_turns_among_the_endpoints_that_are_ready() -> None:
    lab = userspace_lab()
    http, udp = lab.endpoints
    first, *others = http.endpoints
    http = replace(http, endpoints=(replace(first, ready=False), *others))
    haproxy, nginx = processes(replace(lab, endpoints=(http, udp)), lab.nodes[0])
    told = haproxy.files[0].text
    section = told[told.index("listen demo.web.http") :]
    assert section.split()[2:4] == [
        "bind",
        f"0.0.0.0:{userspace.proxy_ports(lab)['tcp', 'demo/web:http']}",
    ]
    ends = [line.split()[2] for line in section.splitlines() if line.startswith("  server")]
    assert ends == [f"{each.address}:8002" for each in others]
    assert "stick" not in told
    # A Service without endpoints is taken all the same, and closed.
    assert (
        told[told.index("listen demo.empty") : told.index("listen demo.web")].count("server") == 0
    )
    assert nginx.files[0].text.count("max_fails=0") == 3


def test_a_client_is_remembered_as_long_as_its_service_says() -> None:
    lab = userspace_lab()
    web, empty = lab.services
    web = replace(web, session_affinity="ClientIP", affinity_timeout_s=600)
    haproxy, nginx = processes(replace(lab, services=(web, empty)), lab.nodes[0])
    assert "stick-table type ip size 100k expire 600s\n  stick on src" in haproxy.files[0].text
    assert "hash $remote_addr consistent;" in nginx.files[0].text


def test_each_family_has_a_listener_of_its_own() -> None:
    lab = userspace_lab()
    six = dual_stack_lab(lab)
    haproxy, nginx = processes(six, six.nodes[0])
    port = userspace.proxy_ports(six)["tcp", "demo/web:http"]
    assert f"bind 0.0.0.0:{port}\n" in haproxy.files[0].text
    assert f"bind :::{port} v6only\n" in haproxy.files[0].text
    assert "server [fd00:10:244:" in nginx.files[0].text
    assert ("TCP", port) in haproxy.listens
    assert "REDIRECT" in userspace.render(six, six.nodes[0]).ipv6
    assert "::" not in processes(lab, lab.nodes[0])[0].files[0].text


def test_a_node_without_services_has_no_proxy() -> None:
    lab = replace(userspace_lab(), services=(), endpoints=())
    assert [each.processes for each in build(lab).nodes] == [(), ()]


def test_both_connections_are_predicted() -> None:
    lab = userspace_lab()
    found = foretell(lab, Request("p0", "svc/web:80")).prediction
    assert [each.name for each in found.endpoints] == ["demo/p1", "demo/p2", "demo/p3"]
    assert (found.disposition, found.delivered_to) == ("delivered", found.endpoints[0])
    dnat, by_proxy = found.translations
    assert (dnat.kind, str(dnat.after)) == ("dnat", "10.244.1.1")
    assert (by_proxy.kind, by_proxy.node, str(by_proxy.after)) == ("proxy", "n1", "10.244.2.2:8002")
    assert found.seen_source
    assert found.seen_source.ip == "10.244.1.0"
    assert found.connections
    assert found.connections[0].forward[-1].namespace == f"{lab.name}:demo:p1"
    assert [each.disposition for each in found.others] == ["delivered"] * 2
    empty = foretell(lab, Request("node/n1", "svc/empty")).prediction
    assert (empty.disposition, empty.reason, empty.where) == (
        "rejected",
        "no-endpoints",
        "node n1",
    )
    # An address that is external is nothing that pods have a proxy for.
    external = foretell(lab, Request("p0", "203.0.113.1:80")).prediction
    assert external.translations == []
    assert foretell(lab, Request("p0", "203.0.113.101:80")).prediction.delivered_to


_NAMES = st.sets(st.from_regex(r"[a-z]{1,8}", fullmatch=True), min_size=1, max_size=40)


@given(_NAMES, st.sets(st.integers(10000, 10050)))
def test_ports_are_distinct_and_nobody_elses(names: set[str], taken: set[int]) -> None:
    lab = userspace_lab()
    port = ServicePort(port=80, target_port=8002)
    services = tuple(Service(namespace="a", name=name, ports=(port,)) for name in names)
    pod = replace(lab.pods[0], host_network=True, listen=tuple(("TCP", each) for each in taken))
    ports = userspace.proxy_ports(replace(lab, services=services, pods=(pod,)))
    assert len(set(ports.values())) == len(names)
    assert not taken & set(ports.values())
    assert all(10000 <= each < 30000 for each in ports.values())


def test_more_ports_than_there_are_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(userspace, "PORTS", 1)
    with pytest.raises(NetlabError, match="2 Service ports of TCP are more than the 1 ports"):
        userspace.proxy_ports(userspace_lab())


def test_what_the_mode_never_had_is_said() -> None:
    lab = userspace_lab()
    assert list(absent(lab)) == []
    web, empty = lab.services
    web = replace(
        web,
        load_balancer_source_ranges=("192.0.2.0/24",),
        external_traffic_policy="Local",
        internal_traffic_policy="Local",
        ports=(*web.ports, ServicePort(port=9, protocol="SCTP")),
    )
    http, udp = lab.endpoints
    http = replace(http, endpoints=(replace(http.endpoints[0], for_zones=("a",)),))
    lab = replace(lab, services=(web, empty), endpoints=(http, udp))
    assert [each.partition(": ")[0] for each in absent(lab)] == [
        "mode userspace never had loadBalancerSourceRanges (demo/web)",
        "mode userspace never had externalTrafficPolicy Local (demo/web)",
        "mode userspace never had internalTrafficPolicy Local (demo/web)",
        "mode userspace never had SCTP (demo/web)",
        "mode userspace never had hints of EndpointSlices (demo/web)",
    ]
    proxy = replace(lab.service_proxy, mode="iptables")
    assert list(absent(replace(lab, service_proxy=proxy))) == []
    assert ("sctp", "demo/web:") not in userspace.proxy_ports(lab)
