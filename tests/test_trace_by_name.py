"""Traces to names: what is asked for, in what order, what is told of it, what if nobody knows."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from labs import fresh_name, small_lab
from netlab.lab import lifecycle
from netlab.lab.change import scale
from netlab.problems import Exit, NetlabError
from netlab.topology.load import load
from netlab.topology.model import Lab
from netlab.trace import resolution
from netlab.trace.aim import Request
from netlab.trace.run import trace
from test_cli import netlab

DNS = load("dns").lab
DOMAIN = "svc.cluster.local."


@pytest.mark.parametrize(
    ("source", "destination", "is_one"),
    [
        ("client", "myblog", True),
        ("client", "myblog:80", True),
        ("pod1", "myblog.demo", True),
        ("client", "nobody", True),
        ("client", "db-0", False),  # a pod
        ("client", "k8s-slave1", False),
        ("client", "svc/myblog", False),
        ("client", "demo/myblog", False),
        ("client", "10.96.0.10", False),
        ("client", "10.96.0.10:53", False),
        ("client", "localhost:80", False),
        ("client", "http://myblog/", False),
        ("node/k8s-slave1", "myblog", False),  # has no name server
        ("deploy/coredns", "myblog", False),  # nor has a pod with dnsPolicy Default
    ],
)
def test_what_is_a_name(source: str, destination: str, is_one: bool) -> None:
    assert resolution.is_name(DNS, Request(source, destination)) is is_one


def test_a_namespace_says_where_names_are_looked_for_and_none_is_asked_for() -> None:
    assert not resolution.is_name(DNS, Request("client", "myblog", namespace="demo"))
    assert not resolution.is_name(small_lab(), Request("p0", "web"))


@pytest.mark.parametrize(
    ("source", "name", "asked", "address"),
    [
        ("client", "myblog:80", [f"myblog.demo.{DOMAIN}"], "10.105.228.101:80"),
        (
            "pod1",
            "myblog.demo",
            [f"myblog.demo.default.{DOMAIN}", f"myblog.demo.{DOMAIN}"],
            "10.105.228.101",
        ),
        ("pod1", f"myblog.demo.{DOMAIN}", [f"myblog.demo.{DOMAIN}"], "10.105.228.101"),
        (
            "client",
            "archive.example.com",
            [
                f"archive.example.com.demo.{DOMAIN}",
                f"archive.example.com.{DOMAIN}",
                "archive.example.com.cluster.local.",
                "archive.example.com.",
            ],
            "172.21.32.100",
        ),
    ],
)
def test_suffixes_are_tried_in_order(
    source: str, name: str, asked: list[str], address: str
) -> None:
    found = resolution.resolved(DNS, Request(source, name), resolution._declared(DNS))
    assert [each.name for each in found.questions] == asked
    assert [each.answer for each in found.questions[:-1]] == ["NXDOMAIN"] * (len(asked) - 1)
    assert found.request is not None
    assert found.request.destination == address
    assert resolution.foretold(DNS, Request(source, name)) == found.request


@pytest.mark.parametrize(
    ("source", "name", "hint"),
    [
        ("pod1", "myblog", "myblog.demo"),
        ("client", "myblgo", '"myblog"'),
        ("client", "something.else", "netlab get svc"),
    ],
)
def test_a_name_that_nobody_has_is_explained(source: str, name: str, hint: str) -> None:
    with pytest.raises(NetlabError) as caught:
        resolution.foretold(DNS, Request(source, name))
    (problem,) = caught.value.problems
    assert problem.code == "name-not-known"
    assert hint in (problem.hint or "")
    assert caught.value.exit_code == Exit.NO


# --- on the kernel -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    made = load("dns", name=fresh_name()).lab
    try:
        lifecycle.up(made)
        yield made
    finally:
        lifecycle.down(made.name)


@pytest.mark.kernel
def test_the_name_is_asked_for_and_then_the_address(lab: Lab) -> None:
    told = trace(lab, Request("pod1", "myblog.demo"))
    assert told.disposition == "delivered"
    assert told.probe.to == "myblog.demo (10.105.228.101)"
    assert told.resolution is not None
    first, second = told.resolution
    assert (first.name, first.answer, first.by) == (
        f"myblog.demo.default.{DOMAIN}",
        "NXDOMAIN",
        None,
    )
    assert (second.answer, second.data) == ("NOERROR", ["10.105.228.101"])
    assert second.by is not None
    assert second.by.name.startswith("kube-system/coredns")
    assert second.via[:3] == ["default/pod1", "k8s-slave1", "k8s-master"]
    assert told.prediction is not None
    assert told.prediction.differs == []


@pytest.mark.kernel
def test_an_alias_leads_to_a_host_outside(lab: Lab) -> None:
    told = trace(lab, Request("pod1", "archive.demo"))
    assert told.resolution is not None
    assert told.resolution[-1].data == ["archive.example.com.", "172.21.32.100"]
    assert told.endpoint == "archive"


@pytest.mark.kernel
def test_a_command_tells_it_and_ends_with_1_if_there_is_no_such_name(lab: Lab) -> None:
    told = netlab("trace", "client", "myblog", "--lab", lab.name)
    assert told.returncode == 0
    assert f"myblog.demo.{DOMAIN} A from 10.96.0.10: 10.105.228.101" in told.stdout
    data = json.loads(netlab("trace", "client", "db", "--lab", lab.name, "-o", "json").stdout)
    assert [each["name"] for each in data["resolution"]] == [f"db.demo.{DOMAIN}"]
    unknown = netlab("trace", "pod1", "myblog", "--lab", lab.name)
    assert (unknown.returncode, unknown.stdout) == (1, "")
    assert "name-not-known" in unknown.stderr
    assert "myblog.demo" in unknown.stderr
    foretold = netlab("trace", "--predict", "client", "myblog", "--lab", lab.name)
    assert foretold.returncode == 0


@pytest.mark.kernel
def test_where_nobody_answers_the_question_itself_is_traced(lab: Lab) -> None:
    lifecycle.change(lab.name, lambda running: scale(running, ["deploy/coredns"], 0, "kube-system"))
    try:
        made = scale(lab, ["deploy/coredns"], 0, "kube-system").lab
        told = trace(made, Request("client", "myblog"))
    finally:
        lifecycle.up(lab)
    assert told.disposition == "rejected"
    assert told.reason == "no-endpoints"
    assert told.resolution is not None
    assert [each.answer for each in told.resolution] == [None]
