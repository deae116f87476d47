"""The cluster's name server: what its zone says, and what it answers while a lab changes."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from labs import fresh_name, small_lab
from netlab.datapath.name_server import config, processes, zone
from netlab.doctor import name_server_problems
from netlab.kernel import dns_message
from netlab.lab import control, lifecycle
from netlab.lab.change import apply, ready, scale
from netlab.lab.edits import Changed
from netlab.problems import NetlabError
from netlab.topology.load import load, read_objects
from netlab.topology.model import Lab
from test_cli import netlab

GOLDEN = Path(__file__).parent / "golden" / "names.zone"


def records(lab: Lab, owner: str) -> list[str]:
    """What a lab's zone says of one name."""
    lines = (line.split(maxsplit=1) for line in zone(lab)[0].splitlines())
    return [rest[0] for name, *rest in lines if name == owner]


def test_the_zone_of_the_shipped_topology() -> None:
    text, serial = zone(load("dns").lab)
    assert text == GOLDEN.read_text()
    assert f" {serial} " in text.splitlines()[1]


def test_two_families_have_records_of_both() -> None:
    lab = load("dual-stack").lab
    name = "myblog.demo.svc.cluster.local."
    kinds = {record.split()[0] for record in records(lab, name)}
    assert kinds == {"A", "AAAA"}


def test_a_serial_is_that_of_what_is_said() -> None:
    lab = load("dns").lab
    assert zone(lab) == zone(load("dns").lab)
    changed = scale(lab, ["deploy/coredns"], 2, "kube-system").lab
    assert zone(changed)[1] != zone(lab)[1]


def test_who_is_not_ready_is_not_told_unless_that_is_wanted(tmp_path: Path) -> None:
    lab = load("dns").lab
    headless = "db.demo.svc.cluster.local."
    assert len(records(lab, headless)) == 2
    unready = ready(lab, ["db-0"], False).lab
    assert records(unready, headless) == ["A 10.244.3.4"]
    assert records(unready, f"db-0.{headless}") == []
    file = tmp_path / "db.yaml"
    file.write_text(
        "apiVersion: v1\nkind: Service\nmetadata: {namespace: demo, name: db}\n"
        "spec: {clusterIP: None, selector: {app: db}, publishNotReadyAddresses: true,"
        " ports: [{name: mysql, port: 3306}]}\n"
    )
    told = apply(unready, read_objects([str(file)])[0]).lab
    assert len(records(told, headless)) == 2
    file.write_text(file.read_text().replace(", ports: [{name: mysql, port: 3306}]", ""))
    without_ports = apply(unready, read_objects([str(file)])[0]).lab
    assert len(records(without_ports, headless)) == 2


def test_a_lab_without_such_pods_has_none() -> None:
    assert processes(small_lab(), {}) == {}
    assert list(name_server_problems(small_lab())) == []


def test_what_is_missing_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = load("dns").lab
    monkeypatch.setattr("netlab.doctor._which", lambda name: None)
    (problem,) = name_server_problems(lab)
    assert "knotd" in problem.message
    assert "knot" in problem.hint
    with pytest.raises(NetlabError):
        lifecycle.up(lab)


def test_the_configuration_listens_in_every_family_of_the_lab() -> None:
    assert "listen: [ 0.0.0.0@53 ]" in config(small_lab())
    assert "listen: [ 0.0.0.0@53, ::@53 ]" in config(load("dual-stack").lab)


@pytest.mark.parametrize("name", ["two words", "a..b", "-a", "a\nb"])
def test_an_external_name_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    file = tmp_path / "lab.yaml"
    file.write_text(
        "apiVersion: v1\nkind: Node\nmetadata: {name: n1}\n---\n"
        "apiVersion: v1\nkind: Service\nmetadata: {name: a}\n"
        f"spec: {{type: ExternalName, externalName: {name!r}}}\n".replace("'", '"')
    )
    with pytest.raises(NetlabError) as caught:
        load(file)
    assert [problem.code for problem in caught.value.problems] == ["bad-value"]


# --- messages ------------------------------------------------------------------------------------


def test_a_message_that_leads_in_circles_or_ends_early_is_none() -> None:
    question = dns_message.query("a.example", "A")
    circle = question[:6] + b"\0\1" + question[8:] + b"\xc0\x1b" + bytes(10)
    for message in (b"", question[:20], circle):
        with pytest.raises(ValueError, match="no DNS message"):
            dns_message.decode(message)


# --- on the kernel -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    made = load("dns", name=fresh_name()).lab
    try:
        assert lifecycle.up(made).unready == ()
        yield made
    finally:
        lifecycle.down(made.name)


def asked(lab: Lab, *words: str, place: str = "pod1") -> list[list[str]]:
    """Records that a pod's own question brings: owner, TTL, kind, data."""
    said = netlab("exec", place, "--lab", lab.name, "--", "kdig", "+noall", "+answer", *words)
    assert (said.returncode, said.stderr) == (0, "")
    return [line.split(maxsplit=4) for line in said.stdout.splitlines() if line]


def inside(lab: Lab, place: str, *command: str) -> str:
    done = netlab("exec", place, "--lab", lab.name, "--", *command)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.kernel
def test_a_pod_finds_a_service_by_its_name(lab: Lab) -> None:
    assert inside(lab, "client", "curl", "-s", "http://myblog/hostname").startswith("myblog-")
    assert inside(lab, "pod1", "curl", "-s", "http://myblog.demo/hostname").startswith("myblog-")
    assert netlab("exec", "pod1", "--lab", lab.name, "--", "getent", "hosts", "myblog").returncode


@pytest.mark.kernel
@pytest.mark.parametrize("transport", ["+notcp", "+tcp"])
def test_each_kind_of_record_over_both_protocols(lab: Lab, transport: str) -> None:
    domain = "demo.svc.cluster.local"
    wanted = {
        ("A", f"myblog.{domain}"): {"10.105.228.101"},
        ("AAAA", f"myblog.{domain}"): set(),
        ("SRV", f"_http._tcp.myblog.{domain}"): {f"0 100 80 myblog.{domain}."},
        ("SRV", f"_mysql._tcp.db.{domain}"): {
            f"0 50 3306 db-0.db.{domain}.",
            f"0 50 3306 db-1.db.{domain}.",
        },
        ("PTR", "101.228.105.10.in-addr.arpa"): {f"myblog.{domain}."},
        ("A", f"archive.{domain}"): {"archive.example.com.", "172.21.32.100"},
        ("A", f"db.{domain}"): {"10.244.3.3", "10.244.3.4"},
        ("A", "10-244-3-3.demo.pod.cluster.local"): {"10.244.3.3"},
        ("A", f"nobody.{domain}"): set(),
    }
    for (kind, name), data in wanted.items():
        found = asked(lab, transport, name, kind)
        assert {record[4] for record in found} == data
        assert {record[1] for record in found} <= {"30"}


@pytest.mark.kernel
def test_answers_follow_within_the_command_and_no_question_is_lost(lab: Lab) -> None:
    name = "db.demo.svc.cluster.local"
    stop = threading.Event()
    lost: list[str] = []

    def ask_on() -> None:
        while not stop.is_set():
            done = netlab(
                *("exec", "pod1", "--lab", lab.name, "--"),
                *("kdig", "+short", "+time=1", "+retry=0", "myblog.demo.svc.cluster.local"),
            )
            if done.stdout != "10.105.228.101\n":
                lost.append(done.stdout + done.stderr)

    asking = threading.Thread(target=ask_on)
    asking.start()
    try:
        for is_ready in (False, True):

            def decide(running: Lab, is_ready: bool = is_ready) -> Changed:
                return ready(running, ["db-0"], is_ready)

            assert lifecycle.change(lab.name, decide)[1].unready == ()
            assert len(asked(lab, name)) == 1 + is_ready
    finally:
        stop.set()
        asking.join()
    assert lost == []


@pytest.mark.kernel
def test_it_runs_as_its_user_and_leaves_nothing_on_the_machine(lab: Lab) -> None:
    init = control.connect(lab.name)
    assert init is not None
    (running,) = [each for each in init.status().processes if each.name == "knotd"]
    owner = subprocess.run(
        ["ps", "-o", "user=", "-p", str(running.pid)], check=True, capture_output=True, text=True
    ).stdout
    assert owner.strip() == "knot"
    assert not Path("/run/knot/knot.conf").exists()


@pytest.mark.kernel
def test_outside_database(up: Callable[[Lab], lifecycle.Outcome]) -> None:
    made = load("outside-database", name=fresh_name()).lab
    up(made)
    said = inside(made, "pod1", "curl", "-s", "http://my-service/hostname")
    assert said.strip() == "database"
    assert inside(made, "pod1", "getent", "hosts", "database").split()[:2] == [
        "192.0.2.42",
        "db.example.com",
    ]
