"""Which endpoints serve a Service on a node; what kube-proxy was seen to choose is in golden."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from netlab.datapath.services.endpoints import ServicePortInfo, Verdict, service_ports
from netlab.datapath.services.names import address_port
from netlab.topology.model import (
    Endpoint,
    Lab,
    Node,
    Service,
    ServiceEndpoints,
    ServicePort,
    Underlay,
)

HERE = Node(
    name="here",
    address="192.0.2.1",
    pod_cidr="10.244.1.0/24",
    labels={"topology.kubernetes.io/zone": "east"},
)

_policies = st.sampled_from(["Cluster", "Local"])
_endpoints = st.lists(
    st.builds(
        Endpoint,
        address=st.sampled_from(["10.244.1.4", "10.244.1.31", "10.244.1.100", "fd00::4"]),
        port=st.sampled_from([80, 8080]),
        node=st.sampled_from([None, "here", "there"]),
        ready=st.booleans(),
        serving=st.booleans(),
        terminating=st.booleans(),
        for_nodes=st.lists(st.sampled_from(["here", "there"]), max_size=1).map(tuple),
        for_zones=st.lists(st.sampled_from(["east", "west"]), max_size=1).map(tuple),
    ),
    max_size=6,
).map(tuple)
_services = st.builds(
    Service,
    namespace=st.just("demo"),
    name=st.just("web"),
    type=st.sampled_from(["ClusterIP", "NodePort"]),
    cluster_ip=st.just("10.96.0.7"),
    ports=st.builds(ServicePort, port=st.just(80), node_port=st.sampled_from([None, 30080])).map(
        lambda port: (port,)
    ),
    external_traffic_policy=_policies,
    internal_traffic_policy=_policies,
)


def info_of(service: Service, endpoints: tuple[Endpoint, ...]) -> ServicePortInfo:
    lab = Lab(
        name="x",
        pod_cidr="10.244.0.0/16",
        service_cidrs=("10.96.0.0/12",),
        underlay=Underlay(cidr="192.0.2.0/24", gateway="192.0.2.254"),
        nodes=(HERE,),
        services=(service,),
        endpoints=(
            ServiceEndpoints(
                namespace="demo",
                service="web",
                port_name="",
                protocol="TCP",
                endpoints=endpoints,
            ),
        ),
    )
    (info,) = service_ports(lab, HERE, 4)
    return info


@given(_services, _endpoints)
def test_a_connection_is_forwarded_only_if_there_is_an_endpoint_for_it(
    service: Service, endpoints: tuple[Endpoint, ...]
) -> None:
    info = info_of(service, endpoints)
    inside = info.local if info.internal_local else info.cluster
    assert (info.internal is Verdict.FORWARD) == bool(inside)
    if info.externally_accessible:
        outside = info.local if info.external_local else info.cluster
        assert (info.external is Verdict.FORWARD) == bool(outside)


@given(_services, _endpoints)
def test_sets_hold_usable_endpoints_of_the_family_sorted_by_text(
    service: Service, endpoints: tuple[Endpoint, ...]
) -> None:
    info = info_of(service, endpoints)
    assert all(e.node == "here" for e in info.local)
    for chosen in (info.cluster, info.local, info.reachable):
        texts = [address_port(e) for e in chosen]
        assert texts == sorted(set(texts))
        assert all(e.ready or (e.serving and e.terminating) for e in chosen)
        assert all("." in e.address for e in chosen)
    both = {address_port(e) for e in info.cluster + info.local}
    assert {address_port(e) for e in info.reachable} == both


@given(_services, _endpoints)
def test_while_one_endpoint_is_ready_no_other_is_used(
    service: Service, endpoints: tuple[Endpoint, ...]
) -> None:
    info = info_of(service, endpoints)
    if any(e.ready for e in info.cluster):
        assert all(e.ready for e in info.cluster)


@given(_services, _endpoints, st.randoms())
def test_the_order_of_a_slice_means_nothing(
    service: Service, endpoints: tuple[Endpoint, ...], random: object
) -> None:
    distinct = tuple({address_port(e): e for e in endpoints}.values())
    shuffled = list(distinct)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert info_of(service, distinct) == info_of(service, tuple(shuffled))


def test_of_an_endpoint_in_two_slices_the_one_that_does_not_terminate_counts() -> None:
    service = Service(
        namespace="demo", name="web", cluster_ip="10.96.0.7", ports=(ServicePort(port=80),)
    )
    stays = Endpoint(address="10.244.1.4", port=80)
    goes = Endpoint(address="10.244.1.4", port=80, ready=False, terminating=True)
    assert info_of(service, (stays, goes)).cluster == (stays,)
    assert info_of(service, (goes, stays)).cluster == (stays,)
