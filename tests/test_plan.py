"""The plan: what must change between what is there and what should be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from labs import dual_stack_lab, ipv6_lab, small_lab
from netlab.datapath.build import build
from netlab.datapath.describe import describe, shell, summary
from netlab.datapath.plan import plan
from netlab.datapath.state import (
    Address,
    Change,
    FdbEntry,
    Found,
    LabState,
    Link,
    Namespace,
    Neighbour,
    Route,
    namespace_name,
)
from netlab.problems import NetlabError
from netlab.topology.load import load
from netlab.topology.model import Lab


def as_found(state: LabState) -> dict[str, Found]:
    """What would be read back if everything were as it should be."""
    found = {}
    for namespace in state.namespaces():
        links = tuple(
            replace(link, peer=None, mac=link.mac or "02:00:00:00:00:01")
            for link in namespace.links
        )
        index = {"lo": 1} | {link.name: n for n, link in enumerate(links, 2)}
        found[namespace.name] = Found(
            namespace=replace(namespace, links=links), index=index, marked=frozenset(index)
        )
    return found


def changed(found: Found, **fields: object) -> Found:
    return replace(found, namespace=replace(found.namespace, **fields))  # type: ignore[type-var]


def test_nothing_there_adds_everything() -> None:
    state = build(small_lab("l"))
    changes = plan(state, {})
    assert {change.verb for change in changes} == {"add"}
    assert [c.item for c in changes if isinstance(c.item, Namespace)] == list(state.namespaces())


@pytest.mark.parametrize("form", ["plan", "sh"])
@pytest.mark.parametrize("name", ["two-node-vxlan", "dual-stack"])
def test_the_whole_plan_of_an_example(name: str, form: str) -> None:
    """Golden text; after a wanted change: `netlab up NAME --dry-run`, with `--shell`."""
    lab = load(name).lab
    state = build(lab)
    changes = plan(state, {})
    lines = map(summary, changes) if form == "plan" else shell(changes, state.namespaces())
    golden = Path(__file__).parent / "golden" / "plans" / f"{name}.{form}"
    assert "\n".join([*lines, ""]) == golden.read_text()


@pytest.mark.parametrize("stack", [lambda lab: lab, dual_stack_lab, ipv6_lab])
def test_nothing_to_do(stack: Callable[[Lab], Lab]) -> None:
    state = build(stack(small_lab("l")))
    assert plan(state, as_found(state)) == []


def test_a_lab_without_ipv6_has_no_ipv6_address() -> None:
    lab = small_lab("l")
    dual = dual_stack_lab(lab)
    # A dump may tell addresses of a family that the lab does not have.
    mixed = replace(lab, nodes=dual.nodes, pods=dual.pods)
    mixed = replace(mixed, nodes=tuple(replace(n, other_pod_cidrs=()) for n in mixed.nodes))
    assert [n.namespace for n in build(mixed).nodes] == [n.namespace for n in build(lab).nodes]
    assert [n.pods for n in build(mixed).nodes] == [n.pods for n in build(lab).nodes]


@pytest.mark.parametrize(("stack", "vni"), [(lambda lab: lab, 10**8), (dual_stack_lab, 10**4)])
def test_a_vni_that_makes_a_device_name_too_long(stack: Callable[[Lab], Lab], vni: int) -> None:
    lab = stack(small_lab("l"))
    with pytest.raises(NetlabError, match=f"flannel.*{vni}.*at most 15 characters"):
        build(replace(lab, overlay=replace(lab.overlay, vni=vni)))


def test_half_a_start_is_completed() -> None:
    state = build(small_lab("l"))
    found = as_found(state)
    missing = state.nodes[0].pods[0].name
    del found[missing]
    changes = plan(state, found)
    outer = next(
        ln for ln in state.nodes[0].namespace.links if ln.peer and ln.peer.namespace == missing
    )
    # The outer end may still be there for a while: it goes first, then the pair is made again.
    deleted = [c for c in changes if c.verb == "delete"]
    assert [(c.namespace, c.item.name) for c in deleted if isinstance(c.item, Link)] == [
        ("l:n1", outer.name)
    ]
    assert Change(verb="add", namespace="l:n1", item=outer) in changes
    assert {c.namespace for c in changes} == {"l:n1", missing}


def test_a_vxlan_device_goes_with_the_one_below_it() -> None:
    state = build(small_lab("l"))
    found = as_found(state)
    del found["l:_switch"]
    verbs = [
        (c.verb, c.item.name)
        for c in plan(state, found)
        if c.namespace == "l:n1" and isinstance(c.item, Link)
    ]
    assert verbs == [
        ("delete", "eth0"),
        ("delete", "flannel.1"),
        ("add", "eth0"),
        ("add", "flannel.1"),
    ]


def test_a_pod_that_is_gone_from_the_file() -> None:
    before, after = build(small_lab("l", pods=5)), build(small_lab("l", pods=4))
    changes = plan(after, as_found(before))
    namespaces = [c for c in changes if isinstance(c.item, Namespace)]
    assert [(c.verb, c.namespace) for c in namespaces] == [("delete", "l:demo:p4")]
    links = [c for c in changes if isinstance(c.item, Link)]
    assert [(c.verb, c.namespace) for c in links] == [("delete", "l:n1")]


def test_only_what_differs_is_set_right() -> None:
    state = build(small_lab("l"))
    found = as_found(state)
    node = found["l:n1"]
    links = tuple(
        replace(ln, mtu=1400)
        if ln.name == "cbr0"
        else replace(ln, up=False)
        if ln.name == "flannel.1"
        else ln
        for ln in node.namespace.links
    )
    found["l:n1"] = changed(node, links=links, fdb=(), routes=node.namespace.routes[1:])
    changes = plan(state, found)
    assert [(c.verb, describe(c.item).split()[0:2]) for c in changes] == [
        ("set", ["vxlan", "flannel.1"]),
        ("set", ["bridge", "cbr0"]),
        ("add", ["fdb", "0e:" + changes[2].item.mac[3:]]),  # type: ignore[union-attr]
        ("add", ["route", "0.0.0.0/0"]),
    ]


def test_strangers_stay() -> None:
    state = build(small_lab("l"))
    found = as_found(state)
    node = found["l:n1"]
    stranger = Link(name="dummy0", kind="bridge", mtu=1500, mac="02:00:00:00:00:09")
    found["l:n1"] = replace(
        changed(
            node,
            links=(*node.namespace.links, stranger),
            addresses=(*node.namespace.addresses, Address(link="dummy0", address="192.0.2.1/24")),
            routes=(*node.namespace.routes, Route(destination="192.0.2.9/32", link="dummy0")),
        ),
        index={**node.index, "dummy0": 99},
    )
    assert plan(state, found) == []


def test_wrong_entries_of_ours_go() -> None:
    state = build(small_lab("l"))
    found = as_found(state)
    node = found["l:n1"]
    wrong = (
        Address(link="eth0", address="172.21.32.99/24"),
        Route(destination="10.244.9.0/24", link="eth0", via="172.21.32.9"),
        Neighbour(link="flannel.1", address="10.244.9.0", mac="02:00:00:00:00:05"),
        FdbEntry(link="flannel.1", mac="02:00:00:00:00:05", destination="172.21.32.9"),
    )
    namespace = node.namespace
    found["l:n1"] = changed(
        node,
        addresses=(*namespace.addresses, wrong[0]),
        routes=(*namespace.routes, wrong[1]),
        neighbours=(*namespace.neighbours, wrong[2]),
        fdb=(*namespace.fdb, wrong[3]),
    )
    changes = plan(state, found)
    assert {c.verb for c in changes} == {"delete"}
    assert {c.item for c in changes} == set(wrong)


def test_another_kind_of_device_is_made_again() -> None:
    vxlan, host_gw = build(small_lab("l")), build(small_lab("l", overlay="host-gw"))
    changes = [summary(c) for c in plan(host_gw, as_found(vxlan)) if c.namespace == "l:n1"]
    assert "- l:n1  vxlan flannel.1 id 1 local 172.21.32.11 mtu 1450" in changes
    assert "+ l:n1  route 10.244.2.0/24 via 172.21.32.12 dev eth0" in changes
    assert "~ l:n1  bridge cbr0 mtu 1500" in changes


def test_names_of_namespaces() -> None:
    assert namespace_name("l", "n1") == "l:n1"
    assert namespace_name("l", "demo", "pod1") == "l:demo:pod1"
    long = namespace_name("l" * 63, "n" * 63, "p" * 253)
    assert len(long) == 255
    assert long != namespace_name("l" * 63, "n" * 63, "p" * 252 + "q")
