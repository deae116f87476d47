"""What a change of a lab's objects changes, and what it leaves alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netlab.lab.change import apply, delete, delete_stated, label, proxy, ready, scale
from netlab.lab.edits import Changed
from netlab.lab.undone import undone
from netlab.problems import Exit, NetlabError
from netlab.topology.earlier import NOWHERE
from netlab.topology.load import load, read_objects
from netlab.topology.model import Endpoint, Lab, Pod
from netlab.topology.places import Document
from netlab.topology.status import endpoint_slices
from test_topology_allocation import allocated, topologies

Object = dict[str, Any]


def stated(*objects: Object) -> list[Document]:
    return [Document(each, NOWHERE) for each in objects]


def node(name: str, **spec: Any) -> Object:
    return {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}, "spec": spec}


def pod(name: str, app: str = "web", **spec: Any) -> Object:
    metadata = {"name": name, "labels": {"app": app}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def controller(
    name: str = "web", replicas: int = 3, kind: str = "Deployment", app: str = "web", **spec: Any
) -> Object:
    return {
        "apiVersion": "apps/v1",
        "kind": kind,
        "metadata": {"name": name},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": {"app": app}},
            "template": {"metadata": {"labels": {"app": app}}, "spec": spec},
        },
    }


def service(name: str = "web", app: str = "web", **spec: Any) -> Object:
    usual = {"selector": {"app": app}, "ports": [{"port": 80, "targetPort": 8080}]}
    metadata = {"name": name}
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": usual | spec}


def slice_(name: str, of: str, *addresses: str) -> Object:
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": name, "labels": {"kubernetes.io/service-name": of}},
        "addressType": "IPv4",
        "ports": [{"port": 8080}],
        "endpoints": [{"addresses": [address]} for address in addresses],
    }


def web(*more: Object) -> Lab:
    """Two nodes, a client, three pods of Deployment web and its Service, and what more there is."""
    client = pod("client", "client")
    return allocated([node("n1"), node("n2"), client, controller(), service(), *more])


def done(changed: Changed) -> list[str]:
    return [f"{result.reference} {result.done}" for result in changed.results]


def codes(caught: pytest.ExceptionInfo[NetlabError]) -> list[str]:
    assert caught.value.exit_code is Exit.USAGE
    return [problem.code for problem in caught.value.problems]


def pods_of(lab: Lab, name: str = "web") -> list[Pod]:
    return [each for each in lab.pods if each.owner.endswith(f"/{name}")]


def endpoints(lab: Lab, name: str = "web") -> tuple[Endpoint, ...]:
    found = next(each for each in lab.services if each.name == name)
    return lab.endpoints_of(found, found.ports[0])


def addresses(lab: Lab, name: str = "web") -> list[str]:
    return [each.address for each in endpoints(lab, name) if each.ready]


# apply


def test_apply_says_what_became_of_each_object() -> None:
    lab = web()
    changed = apply(lab, stated(controller(), service(sessionAffinity="ClientIP"), pod("new")))
    assert done(changed) == [
        "deployment/web unchanged",
        "service/web configured",
        "pod/new created",
    ]
    assert addresses(changed.lab) == [*addresses(lab), changed.lab.pods[-1].address]


def test_applying_the_files_objects_changes_nothing() -> None:
    lab = load("two-node-vxlan").lab
    objects, _ = read_objects(["two-node-vxlan"])
    changed = apply(lab, objects)
    assert {result.done for result in changed.results} == {"unchanged"}
    assert changed.lab == lab


def test_what_is_decided_for_new_objects_takes_nothing_from_others() -> None:
    lab = web(service("np", type="NodePort"))
    first = service("a", type="NodePort")
    changed = apply(lab, stated(node("n3"), pod("p"), first, controller("more", 4))).lab
    assert changed.pods[: len(lab.pods)] == lab.pods
    assert changed.nodes[:2] == lab.nodes
    assert changed.services[:2] == lab.services
    ports = [port.node_port for each in changed.services for port in each.ports]
    assert ports == [None, 30000, 30001]
    used = Counter(each.address for each in changed.pods)
    assert max(used.values()) == 1
    assert {each.node for each in pods_of(changed, "more")} == {"n1", "n2", "n3"}


def test_a_changed_object_keeps_what_it_does_not_say() -> None:
    lab = web(service("np", type="NodePort"), pod("p"))
    before = {each.name: each for each in (*lab.pods, *lab.services)}
    wanted = [{"port": 80, "targetPort": 9090}, {"port": 81, "name": "more"}]
    wanted[0]["name"] = "http"
    changed = apply(
        lab, stated(service("np", type="NodePort", ports=wanted), pod("p", "other"))
    ).lab
    after = {each.name: each for each in (*changed.pods, *changed.services)}
    assert after["np"].cluster_ip == before["np"].cluster_ip
    assert [port.node_port for port in after["np"].ports] == [30000, 30001]
    assert (after["p"].node, after["p"].address) == (before["p"].node, before["p"].address)
    assert after["p"].labels == {"app": "other"}


def test_a_service_that_changes_its_families_keeps_the_addresses_it_can() -> None:
    first = node("n1", podCIDRs=["10.244.1.0/24", "fd00:10:244:1::/64"])
    lab = allocated([first, service("a"), service("b", ipFamilyPolicy="RequireDualStack")])
    assert [each.cluster_ips for each in lab.services] == [
        ("10.96.0.11",),
        ("10.96.0.12", "fd00:10:96::b"),
    ]
    more = apply(lab, stated(service("a", ipFamilyPolicy="PreferDualStack"))).lab
    assert more.services[0].cluster_ips == ("10.96.0.11", "fd00:10:96::c")
    less = apply(more, stated(service("a"), service("b", ipFamilies=["IPv6"]))).lab
    assert [each.cluster_ips for each in less.services] == [("10.96.0.11",), ("fd00:10:96::b",)]


def test_a_pod_of_two_addresses_keeps_both_and_one_that_is_given_wins() -> None:
    first = node("n1", podCIDRs=["10.244.1.0/24", "fd00:10:244:1::/64"])
    lab = allocated([first, pod("p"), pod("q"), controller("web", 2)])
    assert lab.pods[0].addresses == ("10.244.1.2", "fd00:10:244:1::2")
    addressed = {**pod("q"), "status": {"podIPs": [{"ip": "FD00:10:244:1::77"}]}}
    changed = apply(lab, stated(node("n2"), pod("p", "other"), addressed)).lab
    after = {each.name: each.addresses for each in changed.pods}
    before = {each.name: each.addresses for each in lab.pods}
    assert after == before | {"q": (after["q"][0], "fd00:10:244:1::77")}
    assert changed.nodes[1].pod_cidrs == ("10.244.2.0/24", "fd00:10:244:2::/64")


def test_what_is_given_wins_over_what_was_decided() -> None:
    lab = web(pod("p"), pod("q"))
    moved = pod("p", nodeName="n2" if lab.pods[-2].node == "n1" else "n1")
    addressed = {**pod("q"), "status": {"podIP": "10.244.2.77"}}
    changed = apply(lab, stated(moved, addressed)).lab
    after = {each.name: each for each in changed.pods}
    assert after["p"].node == moved["spec"]["nodeName"]
    assert after["p"].address.startswith(f"10.244.{after['p'].node[1]}.")
    assert (after["q"].node, after["q"].address) == ("n2", "10.244.2.77")


def test_a_given_address_that_is_taken_is_refused() -> None:
    lab = web()
    thief = {**pod("thief"), "status": {"podIP": lab.pods[1].address}}
    with pytest.raises(NetlabError) as caught:
        apply(lab, stated(thief, service("x", clusterIP=lab.services[0].cluster_ip)))
    assert codes(caught) == ["duplicate-address", "duplicate-address"]


def test_problems_come_all_at_once_with_their_places(tmp_path: Path) -> None:
    file = tmp_path / "more.yaml"
    file.write_text(
        "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {nodeName: n9}\n---\n"
        "apiVersion: v1\nkind: Service\nmetadata: {name: b}\n"
        "spec: {clusterIP: 10.1.1.256, ports: [{port: 80}]}\n"
    )
    objects, _ = read_objects([file])
    with pytest.raises(NetlabError) as caught:
        apply(web(), objects)
    assert codes(caught) == ["unknown-node", "bad-address"]
    assert [(p.place.line, p.place.column) for p in caught.value.problems if p.place] == [
        (4, 18),
        (9, 19),
    ]


def test_problems_of_what_is_in_no_file_have_no_place() -> None:
    lab = web(pod("p", nodeName="n2"))
    with pytest.raises(NetlabError) as caught:
        delete(lab, ["node/n2"])
    assert codes(caught) == ["unknown-node"]
    assert caught.value.problems[0].place is None


def test_the_frame_of_a_lab_is_not_applied() -> None:
    lab = load("two-node-vxlan").lab
    frame = {"apiVersion": "netlab/v1", "kind": "Lab", "metadata": {"name": "two-node-vxlan"}}
    with pytest.raises(NetlabError) as caught:
        apply(lab, stated(frame))
    assert codes(caught) == ["lab-frame"]


def test_networks_that_were_derived_stay_when_the_objects_would_derive_others() -> None:
    lab = web()
    far = node("n3", podCIDR="10.99.7.0/24") | {
        "status": {"addresses": [{"type": "InternalIP", "address": "172.21.32.200"}]}
    }
    changed = apply(lab, stated(node("n3", podCIDR="10.250.7.0/24"))).lab
    assert (changed.pod_cidr, changed.underlay) == (lab.pod_cidr, lab.underlay)
    assert changed.service_proxy == lab.service_proxy
    with pytest.raises(NetlabError) as caught:  # inside the Service CIDR
        apply(lab, stated(far))
    assert codes(caught) == ["overlapping-cidr"]


def test_added_service_cidrs_leave_the_first_one() -> None:
    more = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "ServiceCIDR",
        "metadata": {"name": "more"},
        "spec": {"cidrs": ["10.200.0.0/24"]},
    }
    lab = apply(web(), stated(more)).lab
    assert lab.service_cidrs == ("10.96.0.0/12", "10.200.0.0/24")
    lab = apply(lab, stated(service("x", clusterIP="10.200.0.9"))).lab
    assert lab.service_cidrs == ("10.96.0.0/12", "10.200.0.0/24")
    changed = delete(lab, ["servicecidr/more"])
    assert changed.lab.service_cidrs == ("10.96.0.0/12",)
    assert changed.lab.services[-1].cluster_ip == "10.200.0.9"
    assert [problem.code for problem in changed.warnings] == ["outside-cidr"]


def test_service_cidrs_of_both_families_stay() -> None:
    of_both = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "ServiceCIDR",
        "metadata": {"name": "kubernetes"},
        "spec": {"cidrs": ["10.96.0.0/16", "FD00:10:96:0::/112"]},
    }
    of_ipv6 = {**of_both, "metadata": {"name": "more"}, "spec": {"cidrs": ["fd00:10:97::/112"]}}
    first = node("n1", podCIDRs=["10.244.1.0/24", "fd00:10:244:1::/64"])
    for objects in ([first], [first, of_both, of_ipv6]):
        lab = allocated([*objects, service("a", ipFamilyPolicy="RequireDualStack")])
        changed = apply(lab, stated(service("b", ipFamilyPolicy="RequireDualStack"))).lab
        assert changed.service_cidrs == lab.service_cidrs
        assert changed.underlay == lab.underlay
        assert changed.services[0] == lab.services[0]
        assert changed.services[1].cluster_ips == ("10.96.0.12", "fd00:10:96::c")


def test_a_namespace_for_objects_without_one() -> None:
    changed = apply(web(), stated(pod("p")), namespace="demo")
    assert changed.lab.pods[-1].key == "demo/p"
    assert done(delete_stated(changed.lab, stated(pod("p")), "demo")) == ["pod/p deleted"]


def test_a_lab_without_nodes_keeps_its_one() -> None:
    lab = allocated([pod("p"), service()])
    grown = apply(lab, stated(node("n2"))).lab
    assert [each.name for each in grown.nodes] == ["node1", "n2"]
    assert grown.nodes[0] == lab.nodes[0]
    shrunk = delete(grown, ["node/n2"]).lab
    assert (shrunk.nodes, shrunk.pods) == (lab.nodes, lab.pods)
    with pytest.raises(NetlabError) as caught:
        delete(lab, ["node/node1"])
    assert codes(caught) == ["last-node"]


# scale


def test_scale_up_adds_and_down_takes_the_newest() -> None:
    lab = web()
    up = scale(lab, ["deploy/web"], 5)
    assert done(up) == ["deployment/web scaled"]
    assert pods_of(up.lab)[:3] == pods_of(lab)
    assert len(addresses(up.lab)) == 5
    down = scale(up.lab, ["deploy/web"], 2).lab
    assert pods_of(down) == pods_of(lab)[:2]
    assert done(scale(down, ["deploy/web"], 2)) == ["deployment/web unchanged"]
    assert pods_of(scale(down, ["deploy/web"], 0).lab) == []
    assert scale(scale(lab, ["deploy/web"], 5).lab, ["deploy/web"], 3).lab.pods == lab.pods


def test_scale_leaves_the_pods_that_the_file_names_for_last() -> None:
    owner = {"apiVersion": "apps/v1", "kind": "Deployment", "name": "web", "controller": True}
    first = pod("web-first")
    first["metadata"]["ownerReferences"] = [owner]
    lab = web(first)
    assert len(pods_of(lab)) == 3
    down = scale(lab, ["deploy/web"], 1).lab
    assert [each.name for each in pods_of(down)] == ["web-first"]
    none = scale(lab, ["deploy/web"], 0).lab
    assert pods_of(none) == []
    assert "web-first" not in [each["metadata"]["name"] for each in none.declared]


@pytest.mark.parametrize(
    ("references", "wrong"),
    [
        (["deploy/nowhere"], ["unknown-deployment"]),
        (["svc/web"], ["not-scalable"]),
        (["deploy/web/x/y"], ["bad-reference"]),
        (["frog/web"], ["bad-reference"]),
        (["web"], ["bad-reference"]),
        (["deploy/wep", "svc/web"], ["unknown-deployment", "not-scalable"]),
    ],
)
def test_what_cannot_be_scaled(references: list[str], wrong: list[str]) -> None:
    with pytest.raises(NetlabError) as caught:
        scale(web(), references, 2)
    assert codes(caught) == wrong


def test_more_pods_than_there_is_room_for() -> None:
    lab = allocated([node("n1", podCIDR="10.244.1.0/29"), controller(replicas=2)])
    with pytest.raises(NetlabError) as caught:
        scale(lab, ["deploy/web"], 6)
    assert codes(caught) == ["exhausted-cidr"]


# delete


def test_the_controller_of_a_deleted_pod_makes_another() -> None:
    lab = web()
    old = pods_of(lab)[0]
    changed = delete(lab, [f"pod/{old.name}"]).lab
    assert pods_of(changed)[:2] == pods_of(lab)[1:]
    new = pods_of(changed)[2]
    assert new.name != old.name
    assert new.address != old.address
    assert old.address not in addresses(changed)
    again = delete(changed, [f"pod/{new.name}"]).lab
    assert len(pods_of(again)) == 3


def test_a_statefulset_makes_the_same_pod_again() -> None:
    lab = web(controller("db", 2, "StatefulSet", "db"))
    changed = delete(lab, ["pod/db-0"]).lab
    assert sorted(each.name for each in pods_of(changed, "db")) == ["db-0", "db-1"]


@pytest.mark.parametrize("kind", ["Deployment", "ReplicaSet", "StatefulSet", "DaemonSet"])
def test_pods_of_another_template_are_made_anew(kind: str) -> None:
    lab = allocated([node("n1"), node("n2"), pod("p"), controller("c", 2, kind)])
    ports = [{"name": "c", "ports": [{"containerPort": 9000}]}]
    changed = apply(lab, stated(controller("c", 2, kind, containers=ports))).lab
    assert [each.listen for each in pods_of(changed, "c")] == [(("TCP", 9000),)] * 2
    names = {each.name for each in pods_of(lab, "c")} & {
        each.name for each in pods_of(changed, "c")
    }
    assert bool(names) is (kind == "StatefulSet")
    assert changed.pods[0] == lab.pods[0]


def test_with_a_controller_go_its_pods_and_with_a_service_its_slices() -> None:
    lab = web(slice_("s", "web", "10.244.1.77"))
    named = label(lab, [f"pod/{pods_of(lab)[0].name}"], {"note": "x"}).lab
    assert len([value for value in named.declared if value["kind"] == "Pod"]) == 2
    gone = delete(named, ["deploy/web", "svc/web"])
    assert done(gone) == ["deployment/web deleted", "service/web deleted"]
    assert gone.warnings == ()
    assert [each.name for each in gone.lab.pods] == ["client"]
    assert [value["kind"] for value in gone.lab.declared] == ["Node", "Node", "Pod"]


def test_a_namespace_goes_with_all_that_is_in_it() -> None:
    lab = apply(web(), stated(pod("p"), controller("w"), service("s")), "demo").lab
    gone = delete(lab, ["ns/demo"]).lab
    assert gone.pods == web().pods
    assert [each.key for each in gone.services] == ["default/web"]
    with pytest.raises(NetlabError) as caught:
        delete(gone, ["ns/demo"])
    assert codes(caught) == ["unknown-namespace"]


def test_pods_of_a_deleted_node_go_where_there_is_one() -> None:
    lab = web(controller("each", kind="DaemonSet"))
    changed = delete(lab, ["node/n2"]).lab
    assert {each.node for each in changed.pods} == {"n1"}
    assert len(pods_of(changed)) == 3
    stayed = [each for each in lab.pods if each.node == "n1"]
    assert [each for each in changed.pods if each in stayed] == stayed
    assert len(pods_of(changed, "each")) == 1


def test_missing_objects_are_named_all_at_once() -> None:
    lab = apply(web(), stated(service("twice"))).lab
    lab = apply(lab, stated(service("twice")), "demo").lab
    with pytest.raises(NetlabError) as caught:
        delete(lab, ["pod/cliend", "svc/none", "svc/twice", "frog/x"])
    wrong = ["unknown-pod", "unknown-service", "ambiguous-name", "bad-reference"]
    assert codes(caught) == wrong
    assert caught.value.problems[0].hint == 'did you mean "client"?'
    assert done(delete(lab, ["svc/demo/twice"])) == ["service/twice deleted"]
    assert [e.key for e in delete(lab, ["svc/twice"], "demo").lab.services][-1] == "default/twice"
    with pytest.raises(NetlabError) as caught:
        delete_stated(lab, stated(pod("client"), pod("nobody")))
    assert codes(caught) == ["unknown-pod"]


def test_what_is_free_now_moves_nobody() -> None:
    lab = web(pod("p"), pod("q"), service("a", type="NodePort"), service("b", type="NodePort"))
    changed = delete(lab, ["pod/client", "svc/web", "svc/a"]).lab
    assert changed.pods == lab.pods[1:]
    assert changed.services == lab.services[2:]
    # The next to come may have it.
    again = apply(changed, stated(pod("new"), service("c", type="NodePort"))).lab
    assert again.pods[-1].address == lab.pods[0].address
    assert again.services[-1].cluster_ip == lab.services[0].cluster_ip


# label and ready


def test_endpoints_follow_labels() -> None:
    lab = web()
    more = label(lab, ["pod/client"], {"app": "web"})
    assert done(more) == ["pod/client labeled"]
    assert len(addresses(more.lab)) == 4
    less = label(more.lab, ["pod/client"], {"app": None})
    assert done(less) == ["pod/client unlabeled"]
    assert addresses(less.lab) == addresses(lab)
    assert done(label(less.lab, ["pod/client"], {"app": None})) == ["pod/client unchanged"]


def test_a_pod_that_is_not_selected_any_more_is_replaced() -> None:
    lab = web()
    old = pods_of(lab)[1]
    changed = label(lab, [f"pod/{old.name}"], {"app": "debug"}).lab
    kept = next(each for each in changed.pods if each.key == old.key)
    assert (kept.address, kept.owner, kept.labels["app"]) == (old.address, "", "debug")
    assert len(pods_of(changed)) == 3
    assert old.address not in addresses(changed)
    # Any other label leaves it where it is.
    same = label(lab, [f"pod/{old.name}"], {"note": "x"}).lab
    assert addresses(same) == addresses(lab)
    assert [each.key for each in pods_of(same)] == [each.key for each in pods_of(lab)]


def test_daemonsets_follow_the_labels_of_nodes() -> None:
    lab = web(controller("d", kind="DaemonSet", nodeSelector={"disk": "ssd"}))
    assert pods_of(lab, "d") == []
    lab = label(lab, ["node/n2"], {"disk": "ssd"}).lab
    assert [each.node for each in pods_of(lab, "d")] == ["n2"]
    lab = label(lab, ["node/n1", "node/n2"], {"disk": None}).lab
    assert pods_of(lab, "d") == []


@pytest.mark.parametrize("wrong", [{"a b": "x"}, {"a": "x y"}, {"a": "x" * 64}, {"-": "x"}])
def test_wrong_labels(wrong: dict[str, str]) -> None:
    with pytest.raises(NetlabError) as caught:
        label(web(), ["pod/client"], wrong)
    assert codes(caught) == ["bad-label"]


def test_pods_answer_on_what_they_answered_on_until_they_go() -> None:
    lab = web(service("more", "client"))
    assert {each.listen for each in lab.pods} == {(("TCP", 8080),)}
    without = delete(lab, ["svc/web", "svc/more"]).lab
    assert without.pods == lab.pods
    grown = scale(without, ["deploy/web"], 4).lab
    assert [each.listen for each in grown.pods if each not in lab.pods] == [()]
    ports = pod("client", "client", containers=[{"ports": [{"containerPort": 81}]}])
    changed = apply(without, stated(ports)).lab
    assert changed.pods[0].listen == (("TCP", 81),)


def test_endpoints_follow_readiness() -> None:
    lab = web()
    first = pods_of(lab)[0]
    changed = ready(lab, [first.name], ready=False)
    assert done(changed) == [f"pod/{first.name} not ready"]
    assert addresses(changed.lab) == addresses(lab)[1:]
    gone = next(each for each in endpoints(changed.lab) if each.address == first.address)
    assert (gone.ready, gone.serving) == (False, False)
    assert len(pods_of(changed.lab)) == 3
    back = ready(changed.lab, [f"pod/{first.name}"], ready=True).lab
    assert addresses(back) == addresses(lab)
    assert done(ready(back, [first.name], ready=True)) == [f"pod/{first.name} unchanged"]
    with pytest.raises(NetlabError) as caught:
        ready(lab, ["svc/web", "cliemt"], ready=False)
    assert codes(caught) == ["unknown-pod", "not-a-pod"]


# EndpointSlices of the file


@pytest.mark.parametrize(
    ("change", "stays"),
    [
        (lambda lab: apply(lab, stated(service("other", "client"))), True),
        (lambda lab: ready(lab, ["client"], ready=False), True),
        (lambda lab: ready(lab, [pods_of(lab)[0].name], ready=False), False),
        (lambda lab: label(lab, ["pod/client"], {"app": "web"}), False),
        (lambda lab: scale(lab, ["deploy/web"], 4), False),
        (lambda lab: apply(lab, stated(service(publishNotReadyAddresses=True))), False),
        (lambda lab: apply(lab, stated(pod("w"), slice_("s", "web", "10.9.9.9"))), True),
    ],
)
def test_slices_stay_until_a_pod_or_the_service_changes(
    change: Callable[[Lab], Changed], stays: bool
) -> None:
    lab = web(slice_("s", "web", "10.9.9.9"))
    assert addresses(lab) == ["10.9.9.9"]
    changed = change(lab).lab
    assert (addresses(changed) == ["10.9.9.9"]) is stays
    assert any(value["kind"] == "EndpointSlice" for value in changed.declared) is stays
    shown = [item["metadata"]["name"] for item in endpoint_slices(changed)]
    assert ("s" in shown, "web-1" in shown) == (stays, not stays)


def test_slices_of_a_service_without_selector_stay() -> None:
    plain = service()
    del plain["spec"]["selector"]
    lab = allocated([pod("p"), plain, slice_("s", "web", "10.9.9.9")])
    assert addresses(ready(lab, ["p"], ready=False).lab) == ["10.9.9.9"]


# Warnings


def test_only_what_is_new_is_warned_of() -> None:
    lab = web(service("nobody", "nobody"))
    assert ready(lab, ["client"], ready=False).warnings == ()
    changed = scale(lab, ["deploy/web"], 0)
    assert [warning.message for warning in changed.warnings] == [
        "Service default/web: no pod matches its selector app=web"
    ]


# What up takes back


def test_up_names_what_it_takes_back() -> None:
    lab = web()
    replica = pods_of(lab)[0].name
    changed = scale(lab, ["deploy/web"], 5).lab
    changed = ready(changed, [replica], ready=False).lab
    changed = label(changed, ["pod/client", "node/n1"], {"tier": "a"}).lab
    changed = apply(changed, stated(pod("new"), service(sessionAffinity="ClientIP"))).lab
    changed = delete(changed, [f"pod/{pods_of(lab)[1].name}"]).lab
    assert undone(changed, lab) == [
        "deployment/web scaled to 5",
        "node/n1 labeled tier=a",
        "pod/client labeled tier=a",
        "pod/new created",
        *sorted((f"pod/{replica} made not ready", f"pod/{pods_of(lab)[1].name} deleted")),
        "service/web configured",
    ]


def test_what_was_changed_back_needs_no_undoing() -> None:
    lab = web()
    changed = scale(scale(lab, ["deploy/web"], 5).lab, ["deploy/web"], 3).lab
    changed = ready(ready(changed, ["client"], ready=False).lab, ["client"], ready=True).lab
    changed = label(label(changed, ["pod/client"], {"a": "b"}).lab, ["pod/client"], {"a": None}).lab
    assert undone(changed, lab) == []


def test_what_only_the_file_changed_is_not_called_undone() -> None:
    changed = scale(web(), ["deploy/web"], 4).lab
    edited = web(pod("more"), controller("other"))
    assert undone(changed, edited) == ["deployment/web scaled to 4"]
    assert undone(web(), edited) == []
    assert undone(None, edited) == []


# Whatever is done


def apps(lab: Lab) -> list[Object]:
    return [value for value in lab.declared if value["apiVersion"] == "apps/v1"]


@st.composite
def changes(draw: st.DrawFn, lab: Lab, number: int) -> Callable[[Lab], Changed]:
    """Something that may be done to a lab."""
    names = st.sampled_from([each.name for each in lab.pods] or ["none"])
    kind = draw(st.sampled_from(["scale", "ready", "label", "delete", "node", "pod", "service"]))
    if kind == "scale" and apps(lab):
        chosen = draw(st.sampled_from(apps(lab)))
        reference = f"{chosen['kind']}/{chosen['metadata']['name']}"
        replicas = draw(st.integers(0, 9))
        return lambda lab: scale(lab, [reference], replicas)
    if kind == "ready":
        name, value = draw(names), draw(st.booleans())
        return lambda lab: ready(lab, [name], value)
    if kind == "label":
        name, app = draw(names), draw(st.sampled_from(["a", "b", "c", None]))
        return lambda lab: label(lab, [f"pod/{name}"], {"app": app})
    if kind == "delete":
        keys = [f"{each['kind']}/{each['metadata']['name']}" for each in lab.declared]
        chosen = draw(st.sampled_from([*keys, *(f"pod/{each.name}" for each in lab.pods)]))
        return lambda lab: delete(lab, [chosen])
    made = {
        "node": node(f"new{number}"),
        "pod": pod(f"new{number}", draw(st.sampled_from("ab"))),
        "service": service(
            f"new{number}", "a", type=draw(st.sampled_from(["ClusterIP", "NodePort"]))
        ),
    }
    return lambda lab: apply(lab, stated(made.get(kind, made["pod"])))


# In every lab, so that there is something to lose.
MORE = [
    *(pod(f"more{number}", "ab"[number % 2]) for number in range(4)),
    *(service(f"more{number}", "a", type="NodePort") for number in range(4)),
    controller("more", 3, app="a"),
]


@settings(max_examples=150, deadline=None)
@given(st.data(), topologies())
def test_whatever_is_changed_the_rest_stays(data: st.DataObject, objects: list[Object]) -> None:
    lab = allocated([*objects, *MORE])
    for number in range(data.draw(st.integers(3, 6))):
        try:
            changed = data.draw(changes(lab, number))(lab)
        except NetlabError:  # there is no room, or no such thing any more
            continue
        check(lab, changed.lab, {each.name for each in changed.results})
        lab = changed.lab


def check(before: Lab, after: Lab, named: set[str]) -> None:
    frames = [
        (e.name, e.pod_cidrs, e.service_cidrs, e.underlay, e.overlay) for e in (before, after)
    ]
    assert frames[0] == frames[1]
    taken = [ip for each in after.pods if not each.host_network for ip in each.addresses]
    taken += [ip for each in after.nodes for ip in (*each.addresses, *each.bridge_addresses)]
    taken += [ip for each in after.services for ip in each.cluster_ips]
    taken += [str(port.node_port) for e in after.services for port in e.ports if port.node_port]
    assert [text for text, count in Counter(taken).items() if count > 1] == []
    assert len({each.key for each in after.pods}) == len(after.pods)
    nodes = {each.name: each for each in before.nodes}
    for each in after.nodes:
        was_node = nodes.get(each.name, each)
        assert (each.addresses, each.pod_cidrs) == (was_node.addresses, was_node.pod_cidrs)
    services = {each.key: each for each in before.services}
    for one in after.services:
        was_service = services.get(one.key, one)
        assert one == was_service
    pods = {each.key: each for each in before.pods}
    remaining = {each.name for each in after.nodes}
    for pod_ in after.pods:
        was = pods.get(pod_.key)
        again = pod_.owner.startswith("StatefulSet/") and pod_.name in named
        if was and was.node in remaining and not again:
            assert (pod_.node, pod_.addresses, pod_.ports) == (was.node, was.addresses, was.ports)
            assert pod_.name in named or (pod_.labels, pod_.ready) == (was.labels, was.ready)
    for value in apps(after):
        if value["kind"] != "DaemonSet":
            owner = f"{value['kind']}/{value['metadata']['name']}"
            assert len([e for e in after.pods if e.owner == owner]) == value["spec"]["replicas"]


@settings(max_examples=60, deadline=None)
@given(topologies())
def test_stating_everything_again_changes_nothing(objects: list[Object]) -> None:
    lab = allocated(objects)
    assert lab == apply(lab, stated(*objects)).lab
    # What was decided can be stated, too.
    twice = json.loads(json.dumps(lab.declared))
    assert {each.done for each in apply(lab, stated(*twice)).results} == {"unchanged"}


# proxy


@pytest.mark.parametrize("file", [False, True])
def test_the_proxy_is_switched_and_stays_so(file: bool) -> None:
    frame = {
        "apiVersion": "netlab/v1",
        "kind": "Lab",
        "metadata": {"name": "x"},
        "spec": {"serviceProxy": {"mode": "nftables", "nftables": {"masqueradeBit": 5}}},
    }
    lab = web(*([frame] if file else []))
    changed = proxy(lab, "nftables-flat")
    assert done(changed) == [f"lab/{'x' if file else lab.name} switched to nftables-flat"]
    was, now = lab.service_proxy, changed.lab.service_proxy
    assert (now.mode, now.clusterCIDR, now.nftables) == (
        "nftables-flat",
        was.clusterCIDR,
        was.nftables,
    )
    scaled = scale(changed.lab, ["deploy/web"], 5).lab
    assert scaled.service_proxy == now
    # What is declared says so by itself.
    assert allocated(list(scaled.declared)).service_proxy == now
    assert proxy(scaled, "nftables-flat").lab is scaled
    assert undone(scaled, lab) == [
        "deployment/web scaled to 5",
        f"lab/{'x' if file else lab.name} switched to nftables-flat",
    ]
    back = proxy(scaled, was.mode).lab
    assert undone(back, lab) == ["deployment/web scaled to 5"]


@pytest.mark.parametrize(
    ("mode", "code", "words"),
    [
        ("nftable", "unknown-mode", 'did you mean "nftables"'),
        ("", "unknown-mode", "no mode"),
    ],
)
def test_a_mode_that_there_is_not(mode: str, code: str, words: str) -> None:
    with pytest.raises(NetlabError) as caught:
        proxy(web(), mode)
    assert codes(caught) == [code]
    (problem,) = caught.value.problems
    assert words in str(problem)
    assert "it builds iptables, nftables, nftables-flat, ipvs, userspace, none" in str(problem)
