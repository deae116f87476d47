"""Names of service ports and chains."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netlab.datapath.services.names import (
    address_port,
    chain_hash,
    nftables_name,
    served_by,
    service_port_name,
)
from netlab.topology.model import Endpoint
from services_golden import GOLDEN

VECTORS = json.loads((GOLDEN / "iptables-chain-hashes.json").read_text())
NFTABLES_VECTORS = json.loads((GOLDEN / "nftables-name-hashes.json").read_text())


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: v["prefix"] + v["hash"])
def test_hashes_are_those_of_kube_proxy(vector: dict[str, str | None]) -> None:
    name, protocol = vector["servicePortName"], vector["protocol"]
    assert name is not None
    assert protocol is not None
    assert chain_hash(name, protocol, vector["endpoint"] or "") == vector["hash"]


@settings(deadline=None)
@given(st.text(), st.sampled_from(["tcp", "udp", "sctp"]), st.text())
def test_a_chain_name_fits_the_28_characters_of_the_kernel(
    name: str, protocol: str, endpoint: str
) -> None:
    digest = chain_hash(name, protocol, endpoint)
    assert len("KUBE-SVC-" + digest) <= 28
    assert set(digest) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567")


def test_names_of_ports_and_endpoints() -> None:
    assert service_port_name("demo", "myblog", "") == "demo/myblog"
    assert service_port_name("demo", "myblog", "http") == "demo/myblog:http"
    assert address_port(Endpoint(address="10.244.1.4", port=8002)) == "10.244.1.4:8002"
    assert address_port(Endpoint(address="fd00::4", port=8002)) == "[fd00::4]:8002"


@pytest.mark.parametrize("vector", NFTABLES_VECTORS, ids=lambda v: v["hash"])
def test_names_in_nftables_are_those_of_kube_proxy(vector: dict[str, str]) -> None:
    service, _, endpoint = vector["name"].partition("__")
    namespace, name, protocol, port = service.split("/")
    address, _, number = endpoint.partition("/")
    if ".." in address or address.count(".") > 3:
        address = f"[{address.replace('.', ':')}]"
    text = f"{address}:{number}" if endpoint else ""
    named = nftables_name(service_port_name(namespace, name, port), protocol, text)
    assert named == f"{vector['hash']}-{vector['name']}"
    whose = service_port_name(namespace, name, port), text or None
    assert served_by(f"{'endpoint' if endpoint else 'service'}-{named}") == whose


@settings(deadline=None)
@given(st.integers(min_value=1, max_value=300), st.sampled_from(["", "10.42.1.90:8080"]))
def test_a_name_in_nftables_is_cut_where_kube_proxy_cuts_it(length: int, endpoint: str) -> None:
    name = nftables_name(f"shop/{'x' * length}:http", "tcp", endpoint)
    whole = f"shop/{'x' * length}/tcp/http{'__10.42.1.90/8080' if endpoint else ''}"
    if len(whole) + 9 <= 240:
        assert name[9:] == whole
    else:
        assert len(name) == 240
        assert name.endswith("...")
        assert whole.startswith(name[9:-3])
