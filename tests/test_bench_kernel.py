"""`netlab bench` on the kernel: each benchmark, small; what is left of one that is interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from netlab.bench import lookup, sync, throughput, tracing
from netlab.bench.lifecycle import IN_PROCESS
from netlab.bench.schema import decode, schema
from netlab.lab import lifecycle
from netlab.report.bench_tables import as_csv

pytestmark = pytest.mark.kernel

NETLAB = str(Path(sys.executable).with_name("netlab"))


def bench(*arguments: str, exit_code: int = 0) -> tuple[str, str]:
    """What it says on both streams; no lab of it may be left."""
    running = subprocess.Popen(
        [NETLAB, "bench", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    output, said = running.communicate()
    assert running.returncode == exit_code, said
    assert "Traceback" not in said
    assert not left_by(running)
    return output, said


def left_by(process: subprocess.Popen[str]) -> list[str]:
    """Labs of a benchmark that ran as this process."""
    return [name for name in lifecycle.running() if name.startswith(f"bench-{process.pid}-")]


def measured(*arguments: str) -> Any:
    """The report on standard output, which is nothing but JSON."""
    text = bench(*arguments, "-o", "json")[0]
    jsonschema.validate(json.loads(text), schema())
    return decode(text.encode(), "stdout")


def test_first_and_established_packets(tmp_path: Path) -> None:
    file = tmp_path / "report.csv"
    modes = ("iptables:nft", "iptables:legacy", "nftables", "nftables-flat")
    found = measured(
        *("lookup", "--sizes", "20,60,200", "--modes", ",".join(modes)),
        *("--connections", "40", "--rounds", "4", "--report", str(file)),
    )
    assert found.complete
    for mode in modes:
        for services in (20, 60, 200):
            for what in (lookup.FIRST, lookup.PAST, lookup.ESTABLISHED):
                each = found.figure(what, mode, services)
                assert each, (what, mode, services)
                assert each.count == 40
                assert len(each.rounds) == 4
                assert 0 < each.quantiles.min <= each.value <= each.quantiles.max
    assert found.figure(lookup.FIRST, "none", 0)
    assert found.figure(lookup.FIRST_AGAIN, "none", 0)
    lines = {(fit.what, fit.mode) for fit in found.fits}
    assert (lookup.FIRST, "nftables") in lines
    assert (f"{lookup.BY_POSITION}, 200 Services", "iptables:legacy") in lines
    assert file.read_text() == as_csv([found])


def test_rules_loaded_and_changed() -> None:
    modes = ("iptables:nft", "iptables:legacy", "nftables", "nftables-flat")
    found = measured(
        *("sync", "--sizes", "30", "--modes", ",".join(modes), "--loads", "2", "--rounds", "2")
    )
    assert found.complete, found.ended_by
    for mode in modes:
        for what in (sync.LOAD, *sync.CHANGES.values()):
            for part in ("time", "CPU", "operations"):
                assert found.figure(f"{what}: {part}", mode, 30).value > 0
        whole = found.figure(f"{sync.LOAD}: operations", mode, 30)
        one = found.figure(f"{sync.CHANGES['replace']}: operations", mode, 30)
        assert one.value < whole.value / 4, "a change writes what it concerns"
        assert found.figure(f"{sync.LOAD}: peak memory of the loader", mode, 30).value > 1


def test_what_passes_through_a_service() -> None:
    found = measured(
        *("throughput", "--sizes", "20", "--modes", "nftables-flat,iptables:nft"),
        *("--rounds", "1", "--seconds", "0.05"),
    )
    assert found.complete, found.ended_by
    skipped = {each.mode for each in found.skipped}
    for mode in ("none", "nftables-flat", "iptables:nft"):
        for what in (throughput.CONNECTIONS, throughput.PACKETS, throughput.BULK):
            if what not in skipped:  # iperf3
                each = found.figure(f"{what} over vxlan", mode, 20)
                assert each.value > 0
                assert each.better == "more"


def test_pods_up_and_down() -> None:
    found = measured("lifecycle", "--pods", "4", "--rounds", "1")
    for who in ("netlab", IN_PROCESS, "the kernel's floor"):
        for part in ("up", "down"):
            assert found.figure(f"a pod {part}, of 4", who).value > 0


def test_a_trace_and_its_witnesses() -> None:
    found = measured("trace", "--pods", "2", "--rounds", "1", "--pings", "20")
    assert found.figure(f"{tracing.TRACE}, 2 pods", "").value > 0
    for name in ("packets", "rules", "conntrack", "kernel"):
        assert found.figure(f"{tracing.WITNESS}, 2 pods", name).value > 0
        assert found.figure(f"{tracing.PING}, 2 pods", name).count == 20


def test_connections_that_a_proxy_takes() -> None:
    """Both of each: from the client's first packet to that of the proxy's own connection."""
    modes = ("--sizes", "10,30", "--modes", "userspace")
    found = measured("lookup", *modes, "--connections", "80", "--rounds", "2")
    assert found.complete
    for what in (lookup.FIRST, lookup.PAST, lookup.ESTABLISHED):
        for services in (10, 30):
            assert found.figure(what, "userspace", services).value > 0
    found = measured("throughput", *modes, "--rounds", "2", "--seconds", "0.05")
    assert found.figure(f"{throughput.PACKETS} over vxlan", "userspace", 30).value > 0
    found = measured("sync", "--sizes", "10", "--modes", "nftables-flat,userspace", "--rounds", "1")
    assert [(each.mode, "loaded whole" in each.reason) for each in found.skipped] == [
        ("userspace", True)
    ]


def test_a_mode_that_is_lacking_is_skipped_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the tools of iptables the others are measured."""
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable))
    found = measured(
        *("lookup", "--sizes", "10", "--modes", "nftables-flat,userspace,ipvs"),
        *("--connections", "4", "--rounds", "2"),
    )
    assert found.figure(lookup.FIRST, "nftables-flat", 10)
    told = {each.mode for each in found.skipped}
    measured_modes = {each.mode for each in found.figures}
    assert told | measured_modes >= {"userspace", "ipvs"}
    assert not told & measured_modes
    for each in found.skipped:
        assert any(each.reason in sentence for sentence in found.sentences)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_reports_what_is_done(number: signal.Signals, tmp_path: Path) -> None:
    file = tmp_path / "partial.json"
    running = subprocess.Popen(
        [
            *(NETLAB, "bench", "lookup", "--sizes", "10", "--modes", "nftables-flat"),
            *("--connections", "1000000", "--rounds", "1000", "--report", str(file)),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert running.stderr
    # Told now and then: by the second line there are rounds.
    lines = iter(running.stderr.readline, "")
    assert any("first packet" in line for line in lines)
    running.send_signal(number)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 130, said
    found = decode(file.read_bytes(), "partial")
    assert not found.complete
    assert found.ended_by == "interrupted"
    assert found.figure(lookup.FIRST, "nftables-flat", 10).count >= 1000
    assert not left_by(running)


def test_what_is_left_by_a_kill_is_seen_and_removed() -> None:
    running = subprocess.Popen(
        [
            *(NETLAB, "bench", "lookup", "--sizes", "10", "--modes", "nftables-flat"),
            *("--connections", "1000000", "--rounds", "1000"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert running.stderr
    lines = iter(running.stderr.readline, "")
    assert any("first packet" in line for line in lines)
    running.kill()
    running.communicate()
    left = left_by(running)
    assert left, "labs that `netlab ls` lists"
    for name in left:
        assert lifecycle.down(name)
    assert not left_by(running)


def test_bad_input_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    for arguments, code in (
        (("lookup", "--sizes", "many"), 2),
        (("lookup", "--sizes", "0"), 2),
        (("lookup", "--sizes", "1000000"), 3),
        (("lookup", "--modes", "ipchains"), 2),
        (("sync", "--report", str(tmp_path / "none" / "report.html")), 3),
        (("sync", "--report", str(tmp_path / "report.doc")), 2),
        (("lifecycle", "--pods", "1"), 2),
        (("report", str(tmp_path / "none.json")), 2),
        (("compare", "/dev/null", "/dev/null"), 2),
    ):
        _, said = bench(*arguments, exit_code=code)
        assert said.startswith("error["), arguments
