"""What cannot be meant is refused with exit code 2, by the command and from Python."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner

from labs import fresh_name, small_lab
from netlab.capture.targets import understand
from netlab.cli.main import netlab as command
from netlab.compare.twins import variants
from netlab.lab import lifecycle
from netlab.problems import NetlabError
from netlab.topology.load import load
from netlab.trace.aim import Request, aim
from test_cli import NETLAB, netlab

_LAB = small_lab("wrong")


def refusal(source: str, destination: str, **options: Any) -> str:
    with pytest.raises(NetlabError) as raised:
        aim(_LAB, Request(source, destination, **options))
    assert raised.value.exit_code == 2
    return str(raised.value)


@pytest.mark.parametrize("to", ["p1:8002", "10.244.2.2:8002", "pod/p1:8002", "svc/web:http"])
def test_one_port_may_be_named(to: str) -> None:
    assert "error[two-ports]" in refusal("p0", to, port=99)


def test_the_same_port_twice_and_one_that_is_left_open_are_no_contradiction() -> None:
    assert aim(_LAB, Request("p0", "p1:8002", port=8002)).port == 8002
    assert aim(_LAB, Request("p0", "svc/empty", port=81)).port == 81
    assert aim(_LAB, Request("p0", "p1:8002", protocol="icmp")).port is None
    assert aim(_LAB, Request("p0", "svc/web:http", port=80)).port == 80


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"family": 5}, "family cannot be 5"),
        ({"port": 0}, "port cannot be 0: a port is a number from 1 to 65535"),
        ({"port": 65536}, "port cannot be 65536"),
        ({"port": "80"}, "port cannot be '80'"),
        ({"source_port": 0}, "source_port cannot be 0"),
        ({"protocol": "sctp"}, "protocol cannot be 'sctp'"),
        ({"timeout_s": 0}, "not 0"),
        ({"timeout_s": -1.0, "protocol": "udp", "port": 9}, "not -1"),
        ({"size": "large"}, "size cannot be 'large'"),
        ({"fragment": "yes"}, "fragment cannot be 'yes'"),
    ],
)
def test_a_value_that_no_option_has_is_refused(options: dict[str, Any], words: str) -> None:
    assert words in refusal("p0", "p1", **options)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("trace -4 -6 pod1 svc/myblog", "-4 and -6: a packet is of one family"),
        ("trace -6 pod1 svc/myblog -4", "-4 and -6: a packet is of one family"),
        ("compare -4 -6 pod1 svc/myblog", "-4 and -6: a packet is of one family"),
        (
            "trace pod1 svc/myblog --predict --topology two-node-vxlan --lab x",
            "--topology and --lab both say which lab",
        ),
        ("trace pod1 svc/myblog --expect dropped --to pod1", "--to says who is to receive it"),
        ("trace pod1 svc/myblog --expect rejected --to pod1", "--to says who is to receive it"),
    ],
)
def test_options_that_contradict_each_other_are_wrong_usage(words: str, said: str) -> None:
    done = CliRunner().invoke(command, words.split())
    assert done.exit_code == 2
    assert said in done.output


def test_a_lab_of_the_environment_is_no_contradiction_to_a_topology() -> None:
    words = "trace pod1 svc/myblog --predict --topology two-node-vxlan"
    done = CliRunner().invoke(command, words.split(), env={"NETLAB_LAB": "another"})
    assert "should be delivered" in done.output


def test_a_mode_is_not_compared_with_itself() -> None:
    with pytest.raises(NetlabError, match="iptables is named twice"):
        variants("iptables,nftables,iptables")
    assert len(variants("iptables,iptables:legacy")) == 2


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["p0:"], "no-device"),
        (["p0", "p1:"], "no-device"),
        ([""], "empty-word"),
        (["p0", " "], "empty-word"),
    ],
)
def test_a_target_of_a_capture_has_a_name(words: list[str], code: str) -> None:
    doubt: NetlabError | None
    try:
        doubt = understand(_LAB, words).doubt
    except NetlabError as error:
        doubt = error
    assert doubt is not None
    assert doubt.problems[0].code == code


@pytest.fixture
def two_labs() -> Iterator[list[str]]:
    names = [fresh_name(), fresh_name()]
    try:
        for name in names:
            lifecycle.up(load("two-node-vxlan", name=name).lab)
        yield names
    finally:
        for name in names:
            lifecycle.down(name)


@pytest.mark.kernel
def test_what_to_try_next_names_the_lab_where_several_are_up(two_labs: list[str]) -> None:
    first = two_labs[0]
    pod = f"{first}:demo:pod1"
    subprocess.run(["ip", "-n", pod, "link", "set", "eth0", "down"], check=True)
    again = netlab("up", "two-node-vxlan", "--lab", first)
    assert f"next: netlab trace pod1 svc/myblog --lab {first}" in again.stderr
    broken = netlab("fault", "inject", "no-route", "--lab", first)
    (line,) = [each for each in broken.stderr.splitlines() if "next: netlab trace" in each]
    assert line.endswith(f"--lab {first}")
    named = netlab("fault", "clear", NETLAB_LAB=first)
    assert named.returncode == 0
    meant = netlab("fault", "inject", "no-route", NETLAB_LAB=first)
    assert "--lab" not in meant.stderr


@pytest.mark.kernel
def test_a_reader_of_a_comparison_may_go_away(two_labs: list[str]) -> None:
    compared = f"{NETLAB} compare pod1 svc/myblog --proxy iptables --count 1 --lab {two_labs[0]}"
    shell = f"{compared} | head -1; exit ${{PIPESTATUS[0]}}"
    assert subprocess.run(["bash", "-c", shell], capture_output=True).returncode == 141
