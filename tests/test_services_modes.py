"""Labs in each mode of the service proxy, and from one mode to the other, on the real kernel."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Callable

import pytest
from msgspec.structs import replace

from labs import fresh_name, small_lab
from netlab.datapath.describe import shell, summary
from netlab.datapath.services import iptables_save, nftables_list
from netlab.datapath.services.modes import MODES
from netlab.datapath.state import Ruleset
from netlab.kernel import nft, xtables
from netlab.kernel.namespaces import entered
from netlab.lab import lifecycle
from netlab.lab.change import proxy
from netlab.problems import Exit, NetlabError, Problem
from netlab.topology.load import load
from netlab.topology.model import ConntrackProxy, Lab, ProxyMode, ServicePort
from services_golden import GOLDEN, read

pytestmark = pytest.mark.kernel

OURS = ("ip kube-proxy", "ip6 kube-proxy")
Up = Callable[..., lifecycle.Outcome]


def in_mode(mode: ProxyMode, lab: Lab | None = None) -> Lab:
    lab = lab or small_lab()
    return replace(lab, service_proxy=replace(lab.service_proxy, mode=mode))


def with_node_port(lab: Lab) -> Lab:
    """Service web on NodePort 30080 too."""
    web, empty = lab.services
    http, udp = web.ports
    port = ServicePort(name="http", port=80, target_port=8002, node_port=30080)
    assert http.name == port.name
    return replace(lab, services=(replace(web, type="NodePort", ports=(port, udp)), empty))


def ask(namespace: str, address: str, port: int, path: str = "/hostname") -> str:
    """Body of an HTTP answer, asked for from inside a namespace."""
    with entered(namespace), socket.create_connection((address, port), timeout=5) as connection:
        connection.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        answer = b""
        while chunk := connection.recv(4096):
            answer += chunk
    return answer.partition(b"\r\n\r\n")[2].decode().strip()


def datagram(namespace: str, address: str, port: int) -> str:
    with entered(namespace), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.settimeout(5)
        sender.connect((address, port))
        sender.send(b"hostname")
        return sender.recv(2048).decode().strip()


def ours(namespace: str) -> tuple[list[str], list[str]]:
    """KUBE-* chains and the tables of kube-proxy that a namespace has."""
    saved = "".join(xtables.save(namespace))
    chains = sorted({line.split()[0][1:] for line in saved.splitlines() if line[:6] == ":KUBE-"})
    return chains, sorted(nft.names(namespace) & set(OURS))


def test_services_are_reached_in_nftables_mode(up: Up) -> None:
    lab = with_node_port(in_mode("nftables"))
    up(lab)
    p0, p1, node = f"{lab.name}:demo:p0", f"{lab.name}:demo:p1", f"{lab.name}:n1"
    for client in (p0, p1, node):
        assert {ask(client, "10.99.0.1", 80) for _ in range(40)} == {"p1", "p2", "p3"}
    assert {datagram(p0, "10.99.0.1", 53) for _ in range(40)} == {"p1", "p2", "p3"}
    # A pod keeps its address; the endpoint that meets itself does not, nor does the node.
    assert {ask(p0, "10.99.0.1", 80, "/clientip").split(":")[0] for _ in range(20)} == {
        "10.244.1.2"
    }
    assert {ask(p1, "10.99.0.1", 80, "/clientip").split(":")[0] for _ in range(40)} == {
        "10.244.2.2",
        "10.244.2.1",
    }
    assert {ask(node, "10.99.0.1", 80, "/clientip").split(":")[0] for _ in range(40)} == {
        "10.244.1.1",
        "10.244.1.0",
    }
    outside = f"{lab.name}:_switch"
    assert {ask(outside, "172.21.32.12", 30080) for _ in range(40)} == {"p1", "p2", "p3"}


def test_what_is_refused_in_nftables_mode(up: Up) -> None:
    lab = with_node_port(in_mode("nftables"))
    up(lab)
    for client in (f"{lab.name}:demo:p0", f"{lab.name}:n1"):
        with pytest.raises(ConnectionRefusedError):
            ask(client, "10.99.0.2", 80)
        # Otherwise than in iptables mode: a port that a live ClusterIP does not have.
        with pytest.raises(ConnectionRefusedError):
            ask(client, "10.99.0.1", 81)
    # NodePorts are at the primary address, not at every one of the node.
    with pytest.raises(ConnectionRefusedError):
        ask(f"{lab.name}:demo:p0", "10.244.1.1", 30080)


def test_a_client_is_remembered_in_nftables_mode(up: Up) -> None:
    lab = in_mode("nftables")
    web, empty = lab.services
    up(replace(lab, services=(replace(web, session_affinity="ClientIP"), empty)))
    p0, p1 = f"{lab.name}:demo:p0", f"{lab.name}:demo:p1"
    assert len({ask(p0, "10.99.0.1", 80) for _ in range(20)}) == 1
    assert len({ask(p1, "10.99.0.1", 80) for _ in range(20)}) == 1
    # What packets left in the sets is no difference.
    assert (
        lifecycle.differences(
            replace(lab, services=(replace(web, session_affinity="ClientIP"), empty))
        )
        == []
    )


@pytest.mark.parametrize("node", ["slave1", "slave2"])
def test_tables_are_those_of_the_real_kube_proxy(up: Up, node: str) -> None:
    lab = in_mode("nftables", replace(load("two-node-vxlan").lab, name=fresh_name()))
    up(lab)
    recorded = read(f"seed-{node}", "nftables.txt")
    assert nftables_list.differences(recorded, nft.listing(f"{lab.name}:k8s-{node}", OURS)) == []


@pytest.mark.parametrize(
    "damage",
    [
        "nft flush chain ip kube-proxy services",
        "nft delete table ip6 kube-proxy",
        "nft add element ip kube-proxy cluster-ips { 10.99.0.9 }",
        "nft add chain ip kube-proxy mine",
    ],
)
def test_damage_in_nftables_mode_is_repaired(up: Up, damage: str) -> None:
    lab = in_mode("nftables")
    up(lab)
    assert up(lab).changes == ()
    subprocess.run(["ip", "netns", "exec", f"{lab.name}:n1", *damage.split()], check=True)
    (change,) = up(lab).changes
    assert summary(change) == f"~ {lab.name}:n1  rules in table ip kube-proxy and ip6 kube-proxy"
    assert up(lab).changes == ()
    assert ask(f"{lab.name}:demo:p0", "10.99.0.1", 80) in {"p1", "p2", "p3"}


def test_another_spelling_of_nft_is_no_difference(up: Up, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = in_mode("nftables")
    up(lab)
    in_the_kernel = nft._run
    monkeypatch.setattr(
        nft, "_run", lambda commands: in_the_kernel(commands).replace("0x00004000", "16384")
    )
    assert lifecycle.differences(lab) == []
    monkeypatch.setattr(nft, "relisted", lambda tables: "")
    assert len(lifecycle.differences(lab)) == 2


def test_from_mode_to_mode_nothing_is_left_over(up: Up) -> None:
    lab = small_lab()
    node = f"{lab.name}:n1"
    localnet = "/proc/sys/net/ipv4/conf/all/route_localnet"
    modes: tuple[ProxyMode, ...] = ("iptables", "nftables", "iptables", "nftables", "none")
    for mode in modes:
        outcome = up(in_mode(mode, lab))
        assert {change.namespace for change in outcome.changes} >= {node, f"{lab.name}:n2"}
        assert up(in_mode(mode, lab)).changes == ()
        chains, tables = ours(node)
        if mode == "iptables":
            assert "KUBE-SERVICES" in chains
        else:
            # kubelet's, which kube-proxy leaves too
            assert chains == (["KUBE-FIREWALL"] if mode == "nftables" else [])
        assert tables == (list(OURS) if mode == "nftables" else [])
        if mode != "none":
            assert ask(f"{lab.name}:demo:p0", "10.99.0.1", 80) in {"p1", "p2", "p3"}
    with entered(node), open(localnet) as value:
        assert value.read() == "0\n"
    up(in_mode("nftables", lab))
    up(in_mode("none", lab))
    assert ours(node) == ([], [])
    up(in_mode("iptables", lab))
    up(in_mode("none", lab))
    assert ours(node) == ([], [])


def test_connections_live_on_when_the_mode_changes(up: Up) -> None:
    lab = in_mode("iptables")
    up(lab)
    p0 = f"{lab.name}:demo:p0"
    modes = ("nftables", "nftables-flat", "iptables")
    # One for each mode, as the server closes after its answer; all are open from the beginning.
    with entered(p0), contextlib.ExitStack() as opened:
        address = ("10.99.0.1", 80)
        connections = [
            opened.enter_context(socket.create_connection(address, timeout=5)) for _ in modes
        ]
        keep = opened.pop_all()
    with keep:
        for mode, connection in zip(modes, connections, strict=True):
            _, outcome = lifecycle.change(lab.name, lambda lab, mode=mode: proxy(lab, mode))  # type: ignore[misc]
            assert outcome.changes
            connection.sendall(b"GET /hostname HTTP/1.0\r\n\r\n")
            assert connection.recv(4096).startswith(b"HTTP/1.")
            assert ask(p0, "10.99.0.1", 80) in {"p1", "p2", "p3"}


def test_the_proxy_of_the_user_is_left_alone_in_mode_none(up: Up) -> None:
    lab = in_mode("none")
    up(lab)
    node = f"{lab.name}:n1"
    theirs = MODES["nftables"].render(lab, lab.nodes[0])
    also_theirs = MODES["iptables"].render(lab, lab.nodes[0])
    assert theirs is not None
    nft.load(node, theirs)  # type: ignore[arg-type]
    xtables.restore(node, also_theirs)  # type: ignore[arg-type]
    before = ours(node)
    assert before[1] == list(OURS)
    assert up(lab).changes == ()
    assert ours(node) == before


def test_when_the_new_rules_are_refused_the_old_ones_stay(
    up: Up, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = in_mode("iptables")
    up(lab)

    def refuse(*_: object) -> None:
        raise NetlabError(Problem("rules-refused", "no"), Exit.MACHINE)

    with monkeypatch.context() as patch:
        patch.setattr(nft, "load", refuse)
        with pytest.raises(NetlabError, match="rules-refused"):
            up(in_mode("nftables", lab))
    assert ask(f"{lab.name}:demo:p0", "10.99.0.1", 80) in {"p1", "p2", "p3"}
    assert "KUBE-SERVICES" in ours(f"{lab.name}:n1")[0]


@pytest.mark.parametrize("change", [("iptables", "nftables"), ("nftables", "iptables")])
def test_shell_commands_change_the_mode_too(up: Up, change: tuple[ProxyMode, ProxyMode]) -> None:
    before, after = change
    lab = small_lab()
    up(in_mode(before, lab))
    outcome = lifecycle.up(in_mode(after, lab), dry_run=True)
    script = "\n".join(shell(outcome.changes, outcome.state.namespaces()))
    # nfacct objects want a program that is not everywhere; the first load has made them.
    script = "\n".join(line for line in script.splitlines() if " nfacct add " not in line)
    if after == "iptables":
        for node in outcome.state.nodes:
            assert isinstance(node.rules, Ruleset)
            with entered(node.namespace.name):
                for name in node.rules.nfacct:
                    xtables.create_nfacct(name)
    done = subprocess.run(["sh", "-e"], input=script, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert lifecycle.differences(in_mode(after, lab)) == []


def test_what_is_removed_is_what_kube_proxy_removes(up: Up) -> None:
    lab = in_mode("none")
    up(lab)
    node = f"{lab.name}:n1"
    steps = [
        [
            (GOLDEN / "seq-switch-mode" / "from-iptables" / f"step-{step}" / file).read_text()
            for file in files
        ]
        for step in (0, 1)
        for files in [("iptables.txt", "ip6tables.txt")]
    ]
    (ipv4, ipv6), after = steps
    names = ("ct_state_invalid_dropped_pkts", "localhost_nps_accepted_pkts")
    xtables.restore(node, Ruleset(ipv4=ipv4, ipv6=ipv6, nfacct=names))
    removals = [
        iptables_save.removal(text, frozenset({"KUBE-FIREWALL"})) for text in xtables.save(node)
    ]
    xtables.restore(node, Ruleset(ipv4=removals[0], ipv6=removals[1]), flush=False)
    for wanted, left in zip(after, xtables.save(node), strict=True):
        assert iptables_save.differences(wanted, left) == []
        assert iptables_save.differences(left, wanted) == []


def test_timeouts_of_connection_tracking_are_the_nodes(up: Up) -> None:
    lab = in_mode("nftables")
    conntrack = ConntrackProxy(tcpCloseWaitTimeout=3600, udpTimeout=45)
    lab = replace(lab, service_proxy=replace(lab.service_proxy, conntrack=conntrack))
    up(lab)
    assert up(lab).changes == ()
    for name, value in (("tcp_timeout_close_wait", "3600"), ("udp_timeout", "45")):
        path = f"/proc/sys/net/netfilter/nf_conntrack_{name}"
        with entered(f"{lab.name}:n1"), open(path) as setting:
            assert setting.read().strip() == value
