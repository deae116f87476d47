"""The published JSON Schemas hold for real traces, and for nothing that is not one."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from msgspec.structs import replace

from labs import dual_stack_lab
from netlab.lab import lifecycle
from netlab.topology.model import Lab
from netlab.trace.aim import Request, aim
from netlab.trace.model import encode
from netlab.trace.model_steps import AnyStep, Data
from netlab.trace.run import trace
from netlab.trace.series import trace_to_endpoint, traces
from netlab.trace.tally import Tally
from test_cli import netlab
from test_trace_kernel import in_node
from test_trace_series import told
from trace_labs import trace_lab


def validator(*what: str) -> Draft202012Validator:
    """Of what the command prints."""
    done = netlab("trace", "--schema", *what)
    assert done.returncode == 0, done.stderr
    schema = json.loads(done.stdout)
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def plain(told: Data) -> Any:
    return json.loads(encode(told))


def test_a_schema_refuses_what_is_no_trace() -> None:
    schema = validator()
    good = plain(told(1, "p1"))
    schema.validate(good)
    later = {**good, "more": 1, "forward": [{**good["forward"][0], "more": []}]}
    schema.validate(later)
    unknown_step = {"kind": "teleport", "to": "n2"}
    for wrong in (
        {key: value for key, value in good.items() if key != "schema"},
        {**good, "schema": "netlab.trace/v2"},
        {**good, "disposition": "lost"},
        {**good, "forward": [{**good["forward"][0], "steps": [unknown_step]}]},
        {**good, "elapsed_us": "fast"},
        {**good, "probe": {**good["probe"], "source": "10.244.1.2"}},
    ):
        assert not schema.is_valid(wrong)


def test_every_kind_of_step_is_in_it() -> None:
    schema: Any = validator().schema
    kinds = {step.__name__: step.__struct_config__.tag for step in AnyStep.__args__}
    for name, tag in kinds.items():
        assert schema["$defs"][name]["properties"]["kind"]["enum"] == [tag]


@pytest.mark.kernel
@pytest.mark.parametrize("mode", ["iptables", "nftables"])
def test_real_traces_are_as_the_schema_says(
    up: Callable[[Lab], lifecycle.Outcome], mode: str
) -> None:
    lab = dual_stack_lab(trace_lab())
    lab = replace(lab, service_proxy=replace(lab.service_proxy, mode=mode))  # type: ignore[arg-type]
    up(lab)
    schema = validator()
    seen = set()
    for request in (
        Request("p0", "svc/remote"),
        Request("p0", "svc/itself"),
        Request("p0", "svc/empty"),
        Request("p0", "svc/datagrams"),
        Request("p0", "p3", protocol="icmp"),
        Request("p0", "svc/remote", family=6),
        Request("p0", "p1", protocol="udp", port=9),
        Request("p0", "192.0.2.1", protocol="icmp", timeout_s=0.1),
    ):
        found = trace(lab, request)
        schema.validate(plain(found))
        seen.add(found.disposition)
    schema.validate(plain(trace_to_endpoint(lab, Request("p0", "svc/remote"), "p1")))
    in_node(lab, "n2", "ip", "route", "del", "10.244.2.0/24")
    found = trace(lab, Request("p0", "svc/remote"))
    schema.validate(plain(found))
    assert seen | {found.disposition} == {"delivered", "rejected", "dropped"}


@pytest.mark.kernel
def test_a_real_series_is_as_its_schema_says(up: Callable[[Lab], lifecycle.Outcome]) -> None:
    lab = trace_lab()
    up(lab)
    schema = validator("series")
    for destination in ("svc/remote", "svc/empty", "p1"):
        request = Request("p0", destination)
        tally = Tally(lab, aim(lab, request), 3)
        schema.validate(plain(tally.series()))
        for each in traces(lab, request, 3):
            tally.add(each)
        found = plain(tally.series())
        schema.validate(found)
        assert not schema.is_valid({**found, "count": None})


def test_a_prediction_is_as_its_schema_says() -> None:
    schema = validator("prediction")
    for words in ("pod1 svc/myblog", "pod1 10.99.174.93:99", "node/k8s-slave1 svc/mysql"):
        topology = ("--predict", "--topology", "two-node-vxlan", "-o", "json")
        found = json.loads(netlab("trace", *words.split(), *topology).stdout)
        schema.validate(found)
        assert not schema.is_valid({**found, "schema": "netlab.trace/v1"})
        assert not schema.is_valid({**found, "prediction": None})
