"""Transactions of many anonymous sets: what is sent for them, and that the same is there then."""

from __future__ import annotations

import ctypes
import struct
import subprocess
from pathlib import Path

import pytest

from netlab.datapath.services.nftables import render
from netlab.datapath.state import Table, Tables
from netlab.kernel import nft, nft_batch
from netlab.kernel.namespaces import entered
from netlab.kernel.netlink import Socket, attribute, attributes, text
from netlab.problems import NetlabError
from netlab.topology.model import (
    Endpoint,
    Lab,
    Node,
    Service,
    ServiceEndpoints,
    ServicePort,
    ServiceProxy,
    Underlay,
)

NETFILTER = 12
NEWTABLE, DELTABLE, NEWCHAIN, NEWRULE, NEWSET, NEWSETELEM = 0, 2, 3, 6, 9, 12
NAME, FLAGS, SET_ID, ELEMENTS = 2, 2, 10, 3


def message(kind: int, *parts: bytes, sequence: int = 0) -> bytes:
    body = struct.pack("=BBH", 2, 0, 0) + b"".join(parts)
    return struct.pack("=IHHII", 16 + len(body), kind, 1, sequence, 0) + body


def batch(*messages: bytes) -> bytes:
    return b"".join((message(16, attribute(1, b"genr")), *messages, message(17)))


def of_nft(kind: int, *parts: bytes, sequence: int = 0) -> bytes:
    return message(10 << 8 | kind, text(1, "t"), *parts, sequence=sequence)


def transaction(sets: int, *, before: tuple[bytes, ...], flags: int = 0) -> bytes:
    """One rule for each set, after what comes before."""
    messages = [*before, of_nft(NEWTABLE, attribute(FLAGS, struct.pack(">I", flags)), sequence=7)]
    for number in range(sets):
        template = "__map%d" if number % 2 else "__set%d"
        messages += [
            of_nft(NEWSET, text(NAME, template), attribute(SET_ID, b"%04d" % number)),
            of_nft(NEWSETELEM, text(NAME, template), attribute(0x8000 | ELEMENTS, b"elem")),
            of_nft(NEWRULE, text(2, "chain"), attribute(4, text(1, template))),
        ]
    return batch(*messages)


def split(data: bytes) -> list[tuple[int, dict[int, bytes], bytes]]:
    """Kind, attributes and the whole of each message of a batch."""
    found = []
    while data:
        length, kind = struct.unpack_from("=IH", data)
        found.append((kind & 0xFF, attributes(data[:length], 20), data[:length]))
        data = data[length:]
    return found


DELETED = (of_nft(NEWTABLE), of_nft(DELTABLE))


def test_sets_have_the_lowest_numbers_and_are_filled_by_id() -> None:
    whole = transaction(1500, before=DELETED)
    (sent,) = nft_batch.parts(whole, new=False)
    before, after = split(whole), split(sent)
    assert [kind for kind, _, _ in before] == [kind for kind, _, _ in after]
    names = [found[NAME] for kind, found, _ in after if kind == NEWSET]
    assert names == [
        b"__%s%d\0" % (b"map" if number % 2 else b"set", number // 2) for number in range(1500)
    ]
    for (kind, was, plain), (_, found, changed) in zip(before, after, strict=True):
        if kind == NEWSET:
            assert {**found, NAME: was[NAME]} == was
        elif kind == NEWSETELEM:
            assert {**found, NAME: was[NAME]} == was
            assert attribute(0x8000 | ELEMENTS, b"elem") in changed
        else:
            assert changed == plain


def test_what_stands_in_memory_behind_a_name_is_no_part_of_it() -> None:
    """Attributes are filled up to four bytes, and not by all versions of libmnl with zeros."""
    whole = transaction(1500, before=DELETED)
    padded = text(1, "t")
    first, *rest = whole.split(padded)
    noise = (padded[:-2] + struct.pack("=H", number) + part for number, part in enumerate(rest))
    garbled = b"".join((first, *noise))
    assert len(garbled) == len(whole)
    assert len(nft_batch.parts(garbled, new=True)) == len(nft_batch.parts(whole, new=True)) > 2


def test_new_tables_come_in_parts_asleep_until_the_last() -> None:
    whole = transaction(1500, before=DELETED)
    (one,) = nft_batch.parts(whole, new=False)
    several = [split(part) for part in nft_batch.parts(whole, new=True)]
    assert len(several) == 4
    assert [part[0][1] for part in several] == [{1: b"genr"}, {}, {}, {}]
    asleep, awake = struct.pack(">I", 1), struct.pack(">I", 0)
    *loading, waking = [part[1:-1] for part in several]
    messages = [each for part in loading for each in part]
    assert [found[FLAGS] for kind, found, _ in messages if kind == NEWTABLE] == [asleep, asleep]
    others = [whole for kind, _, whole in messages if kind != NEWTABLE]
    assert others == [whole for kind, _, whole in split(one)[1:-1] if kind != NEWTABLE]
    ((kind, found, raw),) = waking
    assert (kind, found) == (NEWTABLE, {1: b"t\0", FLAGS: awake})
    assert struct.unpack_from("=I", raw, 8) == (7,)  # a complaint is about that command
    for part in loading:  # a set without a rule would not outlive a transaction
        kinds = [kind for kind, _, _ in part]
        assert kinds.count(NEWSET) == kinds.count(NEWRULE)


@pytest.mark.parametrize(
    "plain",
    [
        transaction(100, before=DELETED),  # not worth it
        transaction(300, before=()),  # numbers may be taken
        transaction(300, before=DELETED, flags=2),  # an owner's, for instance
        transaction(300, before=DELETED)[16:],  # not a batch
    ],
)
def test_what_is_small_or_not_known_is_left_alone(plain: bytes) -> None:
    assert nft_batch.parts(plain, new=True) == []


def many(services: int) -> Lab:
    """Services of both families; some with affinity, an external address or source ranges."""
    made, endpoints = [], []
    for number in range(services):
        six = number % 2
        high, low = divmod(number, 250)
        service = Service(
            namespace="demo",
            name=f"s{number}",
            type="LoadBalancer" if number % 5 == 0 else "ClusterIP",
            cluster_ip=f"fd00:96::{number + 1:x}" if six else f"10.96.{high}.{low + 1}",
            ip_families=("IPv6",) if six else ("IPv4",),
            ports=(ServicePort(name="http", port=80, target_port=8080),),
            load_balancer_ips=(f"fd00:97::{number + 1:x}" if six else f"10.97.{high}.{low + 1}",)
            if number % 5 == 0
            else (),
            load_balancer_source_ranges=(
                ("fd00:5::/64", "fd00:7::/64") if six else ("192.0.2.0/24", "198.51.100.0/24")
            )
            if number % 5 == 0
            else (),
            session_affinity="ClientIP" if number % 7 == 0 else "None",
        )
        made.append(service)
        addresses = [
            f"fd00:1::{number:x}:{place + 1:x}" if six else f"10.{128 + place}.{high}.{low + 1}"
            for place in range(2)
        ]
        endpoints.append(
            ServiceEndpoints(
                namespace="demo",
                service=service.name,
                port_name="http",
                protocol="TCP",
                endpoints=tuple(Endpoint(address=each, port=8080) for each in addresses),
            )
        )
    return Lab(
        name="many",
        pod_cidr="10.128.0.0/10",
        service_cidrs=("10.96.0.0/12", "fd00:96::/108"),
        underlay=Underlay(cidr="172.21.32.0/24", gateway="172.21.32.1"),
        service_proxy=ServiceProxy(clusterCIDR="10.128.0.0/10"),
        nodes=(Node(name="node0", address="172.21.32.11", pod_cidr="10.128.0.0/16"),),
        services=tuple(made),
        endpoints=tuple(endpoints),
    )


@pytest.fixture(scope="module")
def rules() -> Tables:
    lab = many(450)
    made = render(lab, lab.nodes[0])
    for what in ("numgen random mod 2 vmap", "update @affinity-", "ip6 saddr != { fd00:5::/64"):
        assert what in made.transaction
    return made


def transactions(namespace: int) -> int:
    """How many there were: the generation of the rules."""
    with entered(namespace), Socket(NETFILTER) as netlink:
        answer = netlink.get(10 << 8 | 16, struct.pack("=BBH", 0, 0, 0))
    return int.from_bytes(attributes(answer, 4)[1], "big")


def printed(namespace: int) -> str:
    with entered(namespace):
        command = ["nft", "-s", "list", "ruleset"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def by_tool(namespace: int, rules: Tables, directory: Path) -> str:
    """What is there after `nft -f` of the same."""
    file = directory / "rules"
    file.write_text(rules.transaction)
    with entered(namespace):
        subprocess.run(["nft", "-f", file], check=True)
    return printed(namespace)


@pytest.mark.kernel
def test_many_services_are_printed_as_after_the_tool(
    namespace: int, rules: Tables, tmp_path: Path
) -> None:
    assert not nft.names(namespace)
    start = transactions(namespace)
    nft.load(namespace, rules)
    in_parts = transactions(namespace) - start
    assert in_parts > 2
    ours = printed(namespace)
    nft.load(namespace, rules)
    assert transactions(namespace) == start + in_parts + 1
    assert printed(namespace) == ours
    assert by_tool(namespace, rules, tmp_path) == ours


@pytest.mark.kernel
def test_without_a_place_to_redirect_from_rules_are_loaded_plainly(
    namespace: int, rules: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nft_batch, "redirection", lambda _: None)
    start = transactions(namespace)
    nft.load(namespace, rules)
    assert transactions(namespace) == start + 1
    assert by_tool(namespace, rules, tmp_path) == printed(namespace)


@pytest.mark.kernel
def test_a_function_of_a_library_that_does_not_call_sendmsg_has_no_redirection() -> None:
    assert nft_batch.redirection(ctypes.CDLL("libnftnl.so.11").nftnl_batch_alloc) is None


@pytest.mark.kernel
@pytest.mark.parametrize("there", [False, True])
def test_a_wrong_rule_at_the_end_of_many_is_named_and_nothing_is_changed(
    namespace: int, rules: Tables, there: bool
) -> None:
    if there:
        nft.load(namespace, rules)
    before = printed(namespace)
    wrong = Table(family="ip6", name="w", text="table ip6 w {\n\tchain y {\n\t\tjump x\n\t}\n}\n")
    with pytest.raises(NetlabError) as caught:
        nft.load(namespace, Tables(tables=(*rules.tables, wrong)))
    (problem,) = caught.value.problems
    line = len(Tables(tables=(*rules.tables, wrong)).transaction.splitlines()) - 2
    assert f'line {line}, "jump x": ' in problem.message
    assert "No such file or directory" in problem.message
    assert printed(namespace) == before
