"""Streams that are passed on: to whom, whole, and ended when one side ends."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from lab_processes import LabProcesses, lab_processes
from netlab.datapath.state import Server
from netlab.kernel.namespaces import entered
from netlab.lab.relay import Backends, Choice
from test_workload import client, content, get

A, B, C = ("10.0.0.1", 80), ("10.0.0.2", 80), ("10.0.0.3", 80)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_every_backend_is_chosen() -> None:
    choice = Choice(Backends((A, B, C)))
    assert {choice.next() for _ in range(100)} == {A, B, C}
    choice.change(Backends((B,)))
    assert choice.next() == B


def test_a_choice_is_kept_as_long_as_somebody_comes() -> None:
    clock = Clock()
    choice = Choice(Backends((A, B, C), 10), clock)
    first = choice.next()
    for _ in range(50):
        clock.now += 10
        assert choice.next() == first
    later = set()
    for _ in range(100):
        clock.now += 10.1
        later.add(choice.next())
    assert later == {A, B, C}


def test_a_choice_that_is_gone_is_made_again() -> None:
    choice = Choice(Backends((A, B, C), 10), Clock())
    first = choice.next()
    others = tuple(each for each in (A, B, C) if each != first)
    choice.change(Backends(others, 10))
    second = choice.next()
    assert second in others
    choice.change(Backends((A, B, C), 10))
    assert choice.next() == second


# On the kernel


@pytest.fixture
def lab() -> Iterator[LabProcesses]:
    with lab_processes(LabProcesses) as made:
        yield made


def pod(namespace: str, number: int) -> Server:
    return Server(
        namespace=namespace,
        identity=f"p{number}",
        node="n",
        listen=(("TCP", 8080),),
        addresses=(f"127.0.1.{number}",),
    )


def passing(namespace: str, *backends: tuple[str, int]) -> Server:
    return Server(
        namespace=namespace,
        identity="relay",
        node="n",
        listen=(("TCP", 30080),),
        addresses=("127.0.0.1",),
        backends=backends,
    )


def everything(opened: socket.socket) -> bytes:
    answer = b""
    while piece := opened.recv(1 << 20):
        answer += piece
    return answer


@pytest.mark.kernel
def test_streams_reach_the_backends_whole(lab: LabProcesses) -> None:
    name = lab.namespace("a")
    init = lab.start()
    backends = [("127.0.1.1", 8080), ("127.0.1.2", 8080)]
    servers = [pod(name, 1), pod(name, 2), passing(name, *backends)]
    assert init.serve(servers) == ()
    body = os.urandom(1 << 20)
    reached = set()
    for _ in range(40):
        with client(name, 30080) as opened:
            opened.sendall(get("/hostname"))
            reached.add(content(opened.recv(1000)))
    assert reached == {b"p1\n", b"p2\n"}
    with client(name, 30080) as opened:
        fields = (f"Content-Length: {len(body)}", "Connection: close")
        opened.sendall(get("/echo", *fields, method="POST", body=body))
        assert everything(opened).endswith(body)
    with client(name, 30080) as opened:  # who has said all still hears the answer
        opened.sendall(b"hello\n" + body)
        opened.shutdown(socket.SHUT_WR)
        assert everything(opened)[3:] == b"hello\n" + body
    assert init.serve([pod(name, 1), passing(name, backends[0])]) == ()
    with client(name, 30080) as opened:
        opened.sendall(get("/hostname"))
        assert content(opened.recv(1000)) == b"p1\n"
        assert init.serve([pod(name, 1)]) == ()
        assert opened.recv(1) == b""
    with pytest.raises(ConnectionRefusedError), client(name, 30080):
        pass


@pytest.mark.kernel
def test_a_side_that_ends_ends_the_other(lab: LabProcesses) -> None:
    name = lab.namespace("a")
    init = lab.start()
    with entered(name):
        backend = socket.create_server(("127.0.1.1", 8080))
    with backend:
        backend.settimeout(20)
        assert init.serve([passing(name, ("127.0.1.1", 8080))]) == ()
        with client(name, 30080) as opened:
            opened.sendall(b"one")
            far, _ = backend.accept()
            with far:
                far.settimeout(20)
                assert far.recv(100) == b"one"
                far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            assert everything(opened) == b""
        with client(name, 30080) as opened:
            opened.sendall(b"two")
            far, _ = backend.accept()
        with far:
            far.settimeout(20)
            assert everything(far) == b"two"
    with client(name, 30080) as opened:  # nobody is there any more
        assert everything(opened) == b""
    assert len([p for p in init.status().processes if p.name == "netlab-workload"]) == 1
