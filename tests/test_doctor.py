"""The doctor says what is, also about a machine that lacks something, and leaves no trace."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from netlab import doctor
from netlab.cli.doctor import doctor as command
from netlab.kernel import features, xtables
from netlab.problems import Exit, NetlabError

# Test runners have threads; netlab has none when it examines the machine.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")

REQUIRED = {
    "netns",
    "altname",
    "veth",
    "bridge",
    "vxlan",
    "br_netfilter",
    "nat",
    "nfacct",
    "packet sockets",
    "conntrack events",
    "nft trace",
}


def as_nobody(function: Callable[[], str]) -> str:
    """What a function returns in a child without any privilege."""
    receive, send = os.pipe()
    pid = os.fork()
    if not pid:
        with contextlib.suppress(BaseException):
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            os.write(send, function().encode())
        os._exit(0)
    os.close(send)
    with open(receive, encoding="utf-8") as answer:
        said = answer.read()
    os.waitpid(pid, 0)
    return said


def check(name: str, ok: bool | None, required: bool = True) -> doctor.Check:
    return doctor.Check(name, ok, required, "detail", "reason", f"mend {name}")


@pytest.mark.kernel
def test_every_required_feature_works_here() -> None:
    outcomes = features.attempt(list(features.ATTEMPTS))
    assert {
        name: outcome for name, outcome in outcomes.items() if name in REQUIRED
    } == dict.fromkeys(REQUIRED, features.Outcome(True, ""))


@pytest.mark.kernel
def test_ipv6_is_there_where_the_machine_has_it() -> None:
    (outcome,) = features.attempt(["IPv6"]).values()
    assert outcome.ok is os.path.exists("/proc/sys/net/ipv6")


@pytest.mark.kernel
def test_a_link_kind_that_no_kernel_has_is_not_there() -> None:
    outcomes = features.run(
        {"none": lambda: features._link("netlab-none"), "veth": features.ATTEMPTS["veth"]}
    )
    assert outcomes["none"].ok is False
    assert outcomes["none"].detail == "Unknown device type"
    assert outcomes["veth"].ok


@pytest.mark.kernel
def test_attempts_leave_the_machine_as_it_was() -> None:
    def state() -> tuple[str, list[str]]:
        mounts = Path("/proc/self/mountinfo").read_text()
        links = Path("/proc/net/dev").read_text()
        # Other tests come and go under /run/netns.
        lines = [line for line in mounts.splitlines() if "/run/netns" not in line]
        return "\n".join(lines), [line.split(":")[0] for line in links.splitlines()]

    before = state()
    features.attempt(list(features.ATTEMPTS))
    assert state() == before


@pytest.mark.kernel
def test_a_crash_is_an_answer_and_spoils_no_other() -> None:
    def crash() -> str:
        signal.signal(signal.SIGABRT, signal.SIG_DFL)
        os.abort()

    outcomes = features.run({"crash": crash, "fine": lambda: "as it should"})
    assert outcomes["crash"] == features.Outcome(False, "the attempt was ended by SIGABRT")
    assert outcomes["fine"] == features.Outcome(True, "as it should")


@pytest.mark.kernel
def test_a_hang_is_ended_with_what_it_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "TIMEOUT_S", 0.2)
    alive, held = os.pipe()

    def hang() -> str:
        # The grandchild stands for a tool; both hold the pipe open for as long as they live.
        if os.fork():
            signal.pause()
        signal.pause()
        return ""

    outcome = features.run({"hang": hang})["hang"]
    os.close(held)
    assert outcome == features.Outcome(False, "no answer within 0.2 s")
    assert os.read(alive, 1) == b""
    os.close(alive)


@pytest.mark.kernel
def test_nat_names_the_rule_that_was_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "_NAT", "*nat\n-A POSTROUTING -j NETLABNONE\nCOMMIT\n")
    outcome = features.run({"nat": features.ATTEMPTS["nat"]})["nat"]
    assert outcome.ok is False
    assert "NETLABNONE" in outcome.detail


@pytest.mark.kernel
def test_without_root_the_missing_privilege_is_the_finding() -> None:
    doctor.examine()  # what is imported on the way may not be readable for nobody

    def examine() -> str:
        checks = doctor.examine()
        found = {check.name: check.ok for check in checks}
        return json.dumps([doctor.is_fit(checks), found["root"], found["veth"]])

    fit, root, veth = json.loads(as_nobody(examine))
    assert (fit, root) == (False, False)
    assert veth in (True, None)  # tried in a user namespace where the machine lets one have it


@pytest.mark.kernel
def test_preflight_is_silent_where_all_is_there() -> None:
    doctor.preflight()


@pytest.mark.kernel
def test_preflight_without_root_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/home/me/.venv/bin/netlab", "up", "two-node-vxlan"])

    def refused() -> str:
        with pytest.raises(NetlabError) as error:
            doctor.preflight()
        return f"{error.value.exit_code.name}\n{error.value}"

    said = as_nobody(refused)
    assert said.startswith("MACHINE\n")
    assert "error[not-root]" in said
    assert "`sudo /home/me/.venv/bin/netlab up two-node-vxlan`" in said


@pytest.mark.kernel
def test_preflight_tells_everything_that_is_missing_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    xtables.host_backend()  # known as soon as it was asked for once, whichever test asked
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    monkeypatch.setattr(doctor, "_BR_NETFILTER", str(tmp_path / "absent"))
    with pytest.raises(NetlabError) as error:
        doctor.preflight()
    assert error.value.exit_code == Exit.MACHINE
    said = str(error.value)
    assert "iptables-restore" in said
    assert "ip6tables-restore" in said
    assert "apt-get install iptables" in said
    assert "modprobe br_netfilter" in said


def test_a_container_root_without_capabilities_is_told_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "_missing_capabilities", lambda: ["CAP_SYS_ADMIN"])
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(NetlabError, match=r"CAP_SYS_ADMIN(.|\n)*--privileged"):
        doctor.preflight()


def test_programs_that_are_not_installed_are_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    found = {check.name: check for check in (*doctor._tools(),)}
    assert found["iptables"].ok is False
    assert found["iptables"].required
    assert found["curl"].ok is False
    assert not found["curl"].required


@pytest.mark.parametrize(
    ("says", "backend"),
    [
        ("iptables-restore v1.8.9 (nf_tables)", "1.8.9, backend nft"),
        ("iptables-restore v1.8.9 (legacy)", "1.8.9, backend legacy"),
        ("iptables-restore v1.6.1", "1.6.1, backend legacy"),
    ],
)
def test_the_backend_is_the_one_that_the_program_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, says: str, backend: str
) -> None:
    program = tmp_path / "iptables-restore"
    program.write_text(f"#!/bin/sh\necho '{says}'\n")
    program.chmod(0o755)
    monkeypatch.setattr(xtables, "program", lambda *_: str(program))
    assert doctor._iptables().detail == f"{backend}, {program}"


def test_the_report_tells_what_to_do_and_ends_with_3(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = [check("good", True), check("bad", False), check("extra", False, required=False)]
    monkeypatch.setattr(doctor, "examine", lambda: checks)
    result = CliRunner().invoke(command, [], standalone_mode=False)
    assert result.return_value == Exit.MACHINE
    lines = result.stdout.splitlines()
    assert [line[:7].strip() for line in lines] == ["✓ good", "✗ bad", "", "✗ extra", ""]
    assert "fix: mend bad" in lines[2]
    assert "optional: reason" in lines[3]
    assert "missing: bad" in result.stderr


def test_only_the_optional_missing_is_good_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = [check("good", True), check("extra", False, required=False)]
    monkeypatch.setattr(doctor, "examine", lambda: checks)
    result = CliRunner().invoke(command, ["-o", "json"], standalone_mode=False)
    assert result.return_value == Exit.YES
    assert json.loads(result.stdout) == [
        {
            "name": name,
            "ok": ok,
            "required": required,
            "detail": "detail",
            "why": "reason",
            "fix": f"mend {name}",
        }
        for name, ok, required in (("good", True, True), ("extra", False, False))
    ]


def test_what_could_not_be_tried_is_not_called_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: [check("unknown", None)])
    result = CliRunner().invoke(command, [], standalone_mode=False)
    assert result.return_value == Exit.MACHINE
    assert result.stdout.startswith("• unknown")
