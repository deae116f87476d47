"""Rules of mode iptables in either backend: loaded, compared, switched, on the real kernel."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from labs import fresh_name, small_lab
from netlab.datapath.describe import shell, summary
from netlab.datapath.services.iptables import render
from netlab.datapath.services.iptables_save import differences, removal
from netlab.datapath.state import Backend, Ruleset
from netlab.kernel import xtables
from netlab.kernel.namespaces import entered
from netlab.lab import change, lifecycle, record
from netlab.problems import Exit, NetlabError
from netlab.topology.load import load
from netlab.topology.model import IPTablesBackend, Lab, ProxyMode
from netlab.trace.aim import Request
from netlab.trace.model import Trace
from netlab.trace.model_steps import Rule
from netlab.trace.run import trace
from services_golden import STATES, golden_lab
from test_cli import netlab
from trace_labs import trace_lab

pytestmark = pytest.mark.kernel

MYBLOG = "myblog-5c97d79cdb-jn7km"  # a pod of two-node-vxlan
Up = Callable[..., lifecycle.Outcome]


def in_backend(lab: Lab, backend: IPTablesBackend | None, mode: ProxyMode = "iptables") -> Lab:
    proxy = replace(lab.service_proxy, mode=mode)
    return replace(lab, service_proxy=proxy, iptables_backend=backend)


def chains_met(found: Trace) -> list[str]:
    """Chains in which the packet met a rule, in order."""
    hops = (*found.forward, *found.reply)
    return [step.chain for hop in hops for step in hop.steps if isinstance(step, Rule)]


def chains(namespace: str, backend: Backend) -> list[str]:
    """KUBE-* chains of a backend."""
    saved = "".join(xtables.save(namespace, backend=backend))
    return sorted({line.split()[0][1:] for line in saved.splitlines() if line[:6] == ":KUBE-"})


def ask(namespace: str) -> str:
    with entered(namespace), socket.create_connection(("10.99.0.1", 80), timeout=5) as connection:
        connection.sendall(b"GET /hostname HTTP/1.0\r\n\r\n")
        answer = b""
        while chunk := connection.recv(4096):
            answer += chunk
    return answer.partition(b"\r\n\r\n")[2].decode().strip()


@pytest.mark.parametrize("state", STATES)
def test_a_rendering_that_is_loaded_with_legacy_is_printed_as_itself(
    namespace: int, state: str
) -> None:
    ruleset = replace(render(*golden_lab(state)), backend="legacy")
    assert not xtables.in_use(namespace, "legacy")
    xtables.restore(namespace, ruleset)
    assert xtables.in_use(namespace, "legacy")
    assert not xtables.in_use(namespace, "nft")
    ipv4, ipv6 = xtables.save(namespace, backend="legacy")
    assert differences(ruleset.ipv4, ipv4) == []
    assert differences(ruleset.ipv6, ipv6) == []
    gone = Ruleset(ipv4=removal(ipv4), ipv6=removal(ipv6), backend="legacy")
    xtables.restore(namespace, gone, flush=False)
    # Tables of x_tables stay, but empty ones count as none.
    assert not xtables.in_use(namespace, "legacy")


@pytest.mark.parametrize("backend", xtables.BACKENDS)
def test_whatever_stands_in_rules_is_loaded_as_it_stands(namespace: int, backend: Backend) -> None:
    rules = [
        '-A INPUT -m comment --comment "*nat" -j A',
        '-A A -m comment --comment "a*b :C - [0:0]" -j B',
        "-A A -j RETURN",
        "-A B -j RETURN",
    ]
    chains_ = [":A - [0:0]", ":B - [0:0]"]
    hooks = [":INPUT ACCEPT [0:0]", ":FORWARD DROP [0:0]", ":OUTPUT ACCEPT [0:0]"]
    lines = ["*mangle", "COMMIT", "*filter", *hooks, *chains_, *rules, "COMMIT", ""]
    xtables.restore(namespace, Ruleset(ipv4="\n".join(lines), ipv6="", backend=backend))
    ipv4, _ = xtables.save(namespace, backend=backend)
    printed = [re.sub(r"\[\d+:\d+\]", "[0:0]", line) for line in ipv4.splitlines()]
    assert [line for line in printed if line.startswith(("-A", "["))] == rules
    assert {*hooks, *chains_} <= {*printed}


def test_a_lab_in_legacy_tables_is_repaired_and_stays_there(up: Up) -> None:
    lab = in_backend(small_lab(nodes=4, pods=8), "legacy")
    up(lab)  # four nodes load at once, and wait for one lock
    node = f"{lab.name}:n1"
    assert "KUBE-SERVICES" in chains(node, "legacy")
    assert chains(node, "nft") == []
    assert ask(f"{lab.name}:demo:p0") in {f"p{number}" for number in range(1, 8)}
    assert up(lab).changes == ()
    with entered(node):
        assert os.system("iptables-legacy -t nat -F KUBE-MARK-MASQ") == 0
    (change,) = up(lab).changes
    assert summary(change).startswith(f"~ {node}  rules (iptables-legacy, ")
    assert up(lab).changes == ()


def test_from_backend_to_backend_nothing_is_left_over(up: Up) -> None:
    lab = small_lab()
    node = f"{lab.name}:n1"
    backends: tuple[IPTablesBackend, ...] = ("nft", "legacy", "nft")
    for backend in backends:
        up(in_backend(lab, backend))
        (other,) = set(xtables.BACKENDS) - {backend}
        assert "KUBE-SERVICES" in chains(node, backend)
        assert chains(node, other) == []
        assert up(in_backend(lab, backend)).changes == ()
        assert ask(f"{lab.name}:demo:p0") in {"p1", "p2", "p3"}


def test_from_legacy_to_other_modes_nothing_is_left_over(up: Up) -> None:
    lab = small_lab()
    node = f"{lab.name}:n1"
    up(in_backend(lab, "legacy"))
    up(in_backend(lab, "legacy", "nftables"))
    assert chains(node, "legacy") == ["KUBE-FIREWALL"]  # kubelet's, which kube-proxy leaves too
    assert up(in_backend(lab, "legacy", "nftables")).changes == ()
    assert ask(f"{lab.name}:demo:p0") in {"p1", "p2", "p3"}
    up(in_backend(lab, "legacy", "none"))
    assert chains(node, "legacy") == []


def test_later_commands_keep_the_backend(up: Up) -> None:
    lab = in_backend(load("two-node-vxlan", fresh_name()).lab, "legacy")
    up(lab)
    node = f"{lab.name}:k8s-slave1"
    before = chains(node, "legacy")
    lifecycle.change(lab.name, lambda running: change.ready(running, [MYBLOG], ready=False))
    assert len(chains(node, "legacy")) == len(before) - 1
    assert chains(node, "nft") == []
    running = record.read(lab.name)
    assert running
    assert running.iptables_backend == "legacy"
    assert lifecycle.differences(running) == []


def test_the_backend_is_named_in_the_file_or_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "lab.yaml"
    file.write_text(
        "{apiVersion: netlab/v1, kind: Lab, metadata: {name: x}, spec: {iptablesBackend: legacy}}\n"
        "---\n{apiVersion: v1, kind: Node, metadata: {name: n1}}\n"
    )
    name = fresh_name()
    monkeypatch.setenv("NETLAB_LAB", name)
    try:
        for options, backend in (((), "legacy"), (("--iptables-backend", "nft"), "nft")):
            done = netlab("up", str(file), *options)
            assert done.returncode == 0, done.stderr
            running = record.read(name)
            assert running
            assert running.iptables_backend == backend
            assert [each for each in xtables.BACKENDS if chains(f"{name}:n1", each)] == [backend]
    finally:
        lifecycle.down(name)
    wrong = netlab("up", str(file), "--iptables-backend", "ebpf")
    assert wrong.returncode == Exit.USAGE
    assert "'ebpf' is not one of 'nft', 'legacy'" in wrong.stderr


def test_shell_commands_name_the_backend(up: Up) -> None:
    lab = small_lab()
    up(in_backend(lab, "nft"))
    outcome = lifecycle.up(in_backend(lab, "legacy"), dry_run=True)
    script = "\n".join(shell(outcome.changes, outcome.state.namespaces()))
    assert "iptables-legacy-restore <<" in script
    assert "ip6tables-nft-restore --noflush <<" in script


def test_a_trace_tells_the_rules_of_either_backend(up: Up) -> None:
    lab = trace_lab()
    told = []
    for backend in xtables.BACKENDS:
        up(in_backend(lab, backend))
        found = trace(lab, Request(source="p0", destination="svc/remote"))
        assert (found.disposition, found.witnesses.rules) == ("delivered", "ok")
        told.append(chains_met(found))
    assert told[0] == told[1]


def test_a_backend_that_is_not_installed_is_named(up: Up, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = in_backend(small_lab(), "legacy")
    which = xtables.which
    monkeypatch.setattr(xtables, "which", lambda name: None if "legacy" in name else which(name))
    with pytest.raises(NetlabError, match='"iptables-legacy-restore" is not installed') as caught:
        up(lab)
    assert caught.value.exit_code == Exit.MACHINE


@pytest.mark.parametrize(
    ("installed", "expected"),
    [
        ({"iptables": "xtables-nft-multi"}, "nft"),
        ({"iptables": "xtables-legacy-multi", "iptables-nft-restore": "x"}, "legacy"),
        ({"iptables-legacy-restore": "xtables-legacy-multi"}, "legacy"),
    ],
)
def test_the_backend_of_the_host_is_the_one_of_plain_iptables(
    monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], expected: str
) -> None:
    monkeypatch.setattr(xtables, "which", installed.get)
    monkeypatch.setattr(os.path, "realpath", lambda path: path)
    xtables.host_backend.cache_clear()
    try:
        assert xtables.host_backend() == expected
    finally:
        xtables.host_backend.cache_clear()
