"""What pods answer, and that the right sockets are open in the right namespaces."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab_processes import LabProcesses, eventually, lab_processes, process
from netlab.datapath.state import Server
from netlab.kernel import namespaces
from netlab.lab.answers import BODY_LIMIT, HEAD_LIMIT, Conversation, Pod, datagram

POD = Pod("demo/myblog-1", "k8s-slave1")
CLIENT = "10.244.1.4:40000"


def say(*pieces: bytes) -> tuple[bytes, Conversation]:
    conversation = Conversation(POD, CLIENT)
    return b"".join(conversation.receive(piece) for piece in pieces), conversation


def get(path: str, *fields: str, method: str = "GET", body: bytes = b"") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: x", *fields, "", ""]
    return "\r\n".join(lines).encode() + body


def content(answer: bytes) -> bytes:
    return answer.partition(b"\r\n\r\n")[2]


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


# Over HTTP


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/hostname", b"myblog-1\n"),
        ("/", b"myblog-1\n"),
        ("/some/other?path=1", b"myblog-1\n"),
        ("/clientip", b"10.244.1.4:40000\n"),
        ("/healthz", b"ok\n"),
        ("/echo?msg=hello%20there", b"hello there\n"),
    ],
)
def test_paths(path: str, expected: bytes) -> None:
    answer, conversation = say(get(path))
    assert status(answer) == 200
    assert content(answer) == expected
    assert not conversation.over


def test_answer_names_pod_and_node() -> None:
    answer, _ = say(get("/"))
    assert b"X-Pod: demo/myblog-1\r\n" in answer
    assert b"X-Node: k8s-slave1\r\n" in answer


def test_echo_gives_the_request_back() -> None:
    request = get("/echo", "X-Mine: 1", "Content-Length: 5", method="POST", body=b"hello")
    assert content(say(request)[0]) == request


def test_head_has_no_content_but_its_length() -> None:
    answer, _ = say(get("/hostname", method="HEAD"))
    assert content(answer) == b""
    assert b"Content-Length: 9\r\n" in answer


@given(st.lists(st.integers(1, 200), max_size=20))
def test_pieces_of_any_size_make_the_same_requests(cuts: list[int]) -> None:
    chunks = b"3\r\nabc\r\n4;x=y\r\ndefg\r\n0\r\nT: 1\r\n\r\n"
    requests = (
        get("/hostname")
        + get("/echo", "Content-Length: 3", method="PUT", body=b"xyz")
        + get("/echo", "Transfer-Encoding: chunked", method="POST", body=chunks)
        + get("/clientip", "Connection: close")
    )
    pieces = []
    rest = requests
    for cut in cuts:
        pieces.append(rest[:cut])
        rest = rest[cut:]
    answer, conversation = say(*filter(None, [*pieces, rest]))
    assert answer == say(requests)[0]
    assert answer.count(b"HTTP/1.1 200 OK\r\n") == 4
    assert b"\r\n\r\nabcdefg" in answer
    assert conversation.over


@pytest.mark.parametrize(
    ("request_", "over"),
    [
        (b"GET / HTTP/1.0\r\n\r\n", True),
        (b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", False),
        (b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", True),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", False),
    ],
)
def test_keep_alive(request_: bytes, over: bool) -> None:
    answer, conversation = say(request_)
    assert status(answer) == 200
    assert conversation.over is over


def test_clients_that_ask_may_send_their_body() -> None:
    conversation = Conversation(POD, CLIENT)
    head = get("/echo", "Content-Length: 3", "Expect: 100-continue", method="POST")
    assert conversation.receive(head) == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert content(conversation.receive(b"abc")).endswith(b"\r\n\r\nabc")


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (b"GET /\r\n", 400),
        (b"GET / HTTP/2.0\r\n\r\n", 400),
        (b"GET  / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET http://[ HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (get("/", "no colon"), 400),
        (get("/", "Name : space"), 400),
        (get("/", "Content-Length: -1"), 400),
        (get("/", "Content-Length: 1", "Content-Length: 2"), 400),
        (get("/", "Content-Length: 1", "Transfer-Encoding: chunked"), 400),
        (get("/", "Transfer-Encoding: gzip"), 400),
        (get("/", "Transfer-Encoding: chunked", body=b"x\r\n"), 400),
        (get("/", "Transfer-Encoding: chunked", body=b"1\r\nabc"), 400),
        (get("/", "Transfer-Encoding: chunked", body=b"7fffffff\r\n"), 413),
        (get("/", f"Content-Length: {BODY_LIMIT + 1}"), 413),
        (get("/", "Content-Length: " + "9" * 5000), 413),
        (get("/" + "a" * HEAD_LIMIT), 431),
        (b"GET /" + b"a" * (HEAD_LIMIT + 1), 431),
    ],
)
def test_bad_requests_are_refused_and_end_the_connection(request_: bytes, expected: int) -> None:
    answer, conversation = say(request_)
    assert status(answer) == expected
    assert conversation.over


@given(st.binary(max_size=300))
def test_no_bytes_break_it(data: bytes) -> None:
    for start in (b"", b"GET / HTTP/1.1\r\n", get("/", "Transfer-Encoding: chunked")):
        conversation = Conversation(POD, CLIENT)
        conversation.receive(start)
        if not conversation.over:
            conversation.receive(data)
        conversation.end()
    assert isinstance(datagram(data, POD, CLIENT), bytes)


# Over anything else


def test_others_learn_who_is_there_and_get_back_what_they_say() -> None:
    answer, conversation = say(b"hello\n", b"GET / HTTP/1.1\r\n\r\n")
    assert answer == b"myblog-1\nhello\nGET / HTTP/1.1\r\n\r\n"
    assert not conversation.over


def test_a_few_letters_of_a_method_are_answered_when_nothing_follows() -> None:
    conversation = Conversation(POD, CLIENT)
    assert conversation.receive(b"GE") == b""
    assert conversation.end() == b"myblog-1\nGE"
    assert Conversation(POD, CLIENT).end() == b""


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"hostname\n", b"myblog-1\n"),
        (b"hostname", b"myblog-1\n"),
        (b"clientip", b"10.244.1.4:40000\n"),
        (b"echo hello there\n", b"hello there\n"),
        (b"\x00\x01cookie \n", b"\x00\x01cookie \n"),
        (b"", b""),
    ],
)
def test_datagrams(data: bytes, expected: bytes) -> None:
    assert datagram(data, POD, CLIENT) == expected


# On the kernel


@pytest.fixture
def lab() -> Iterator[LabProcesses]:
    with lab_processes(LabProcesses) as made:
        yield made


def server(namespace: str, identity: str, *listen: tuple[str, int]) -> Server:
    return Server(namespace=namespace, identity=identity, node="n", listen=listen)


@contextlib.contextmanager
def client(namespace: str, port: int, kind: int = socket.SOCK_STREAM) -> Iterator[socket.socket]:
    with namespaces.entered(namespace):
        opened = socket.socket(socket.AF_INET, kind)
    with opened:
        opened.settimeout(20)
        opened.connect(("127.0.0.1", port))
        yield opened


def ask(namespace: str, port: int, path: str = "/hostname") -> bytes:
    """What is answered to a request by HTTP, without its head."""
    with client(namespace, port) as opened:
        opened.sendall(get(path, "Connection: close"))
        answer = b""
        while piece := opened.recv(65536):
            answer += piece
        return content(answer)


def refuses(namespace: str, port: int) -> bool:
    try:
        with client(namespace, port):
            return False
    except ConnectionRefusedError:
        return True


@pytest.mark.kernel
def test_each_pod_answers_in_its_own_namespace(lab: LabProcesses) -> None:
    a, b = lab.namespace("a"), lab.namespace("b")
    init = lab.start()
    listen = (("TCP", 80), ("TCP", 3306), ("UDP", 53))
    assert init.serve([server(a, "demo/a", *listen), server(b, "demo/b", *listen)]) == ()
    assert init.status().sockets == 6
    for namespace, name in ((a, b"a"), (b, b"b")):
        assert ask(namespace, 80) == name + b"\n"
        with client(namespace, 3306) as opened:
            opened.sendall(b"hi\n")
            opened.shutdown(socket.SHUT_WR)
            answer = b""
            while piece := opened.recv(100):
                answer += piece
            assert answer == name + b"\nhi\n"
        with client(namespace, 53, socket.SOCK_DGRAM) as opened:
            for said, expected in ((b"hostname", name + b"\n"), (b"cookie", b"cookie")):
                opened.send(said)
                assert opened.recv(100) == expected


@pytest.mark.kernel
def test_client_address_is_the_one_that_the_pod_sees(lab: LabProcesses) -> None:
    name = lab.namespace("a")
    lab.start().serve([server(name, "a", ("TCP", 80), ("UDP", 53))])
    with client(name, 80) as opened:
        opened.sendall(get("/clientip"))
        port = opened.getsockname()[1]
        assert content(opened.recv(1000)) == f"127.0.0.1:{port}\n".encode()


@pytest.mark.kernel
def test_datagrams_are_answered_from_the_address_that_was_asked(lab: LabProcesses) -> None:
    name = lab.namespace("a")
    lab.start().serve([server(name, "a", ("UDP", 53))])
    with namespaces.entered(name), socket.socket(type=socket.SOCK_DGRAM) as opened:
        opened.settimeout(20)
        opened.bind(("127.0.0.1", 0))
        opened.sendto(b"hi", ("127.0.0.9", 53))
        assert opened.recvfrom(100) == (b"hi", ("127.0.0.9", 53))


@pytest.mark.kernel
def test_a_second_list_changes_what_differs_only(lab: LabProcesses) -> None:
    a, b = lab.namespace("a"), lab.namespace("b")
    init = lab.start()
    init.serve([server(a, "a", ("TCP", 80), ("TCP", 81))])
    with client(a, 80) as kept, client(a, 81) as hung_up:
        for each in (kept, hung_up):
            each.sendall(get("/healthz"))
            assert content(each.recv(1000)) == b"ok\n"
        assert init.serve([server(a, "renamed", ("TCP", 80)), server(b, "b", ("TCP", 80))]) == ()
        assert hung_up.recv(1) == b""
        kept.sendall(get("/hostname"))
        assert content(kept.recv(1000)) == b"a\n"
    assert ask(a, 80) == b"renamed\n"
    assert ask(b, 80) == b"b\n"
    assert refuses(a, 81)
    assert init.status().sockets == 2
    assert init.serve([]) == ()
    assert refuses(a, 80)
    assert init.status().sockets == 0


@pytest.mark.kernel
def test_a_namespace_made_again_under_its_name_is_served(lab: LabProcesses) -> None:
    name = lab.namespace("a")
    init = lab.start()
    servers = [server(name, "a", ("TCP", 80))]
    init.serve(servers)
    namespaces.remove(name)
    lab.namespace("a")
    assert refuses(name, 80)
    assert init.serve(servers) == ()
    assert ask(name, 80) == b"a\n"
    assert init.status().sockets == 1


@pytest.mark.kernel
def test_what_cannot_be_opened_is_told_and_the_rest_answers(lab: LabProcesses) -> None:
    name, gone = lab.namespace("a"), f"{lab.name}:gone"
    init = lab.start()
    with namespaces.entered(name):
        taken = socket.socket()
    with taken:
        taken.bind(("", 81))
        taken.listen()
        unserved = init.serve(
            [
                server(name, "first", ("TCP", 80), ("TCP", 81)),
                server(gone, "gone", ("UDP", 53)),
                server(name, "second", ("TCP", 80), ("TCP", 82)),
            ]
        )
    assert sorted(unserved) == [
        (name, "first", "TCP", 81, "Address already in use"),
        (name, "second", "TCP", 80, "first has that port"),
        (gone, "gone", "UDP", 53, f"/run/netns/{gone}: No such file or directory"),
    ]
    assert ask(name, 80) == b"first\n"
    assert ask(name, 82) == b"second\n"
    assert init.serve([server(name, "first", ("TCP", 81))]) == ()
    assert ask(name, 81) == b"first\n"


@pytest.mark.kernel
def test_a_thousand_sockets(lab: LabProcesses) -> None:
    names = [lab.namespace(f"p{i}") for i in range(50)]
    ports = tuple((protocol, port) for port in range(1000, 1010) for protocol in ("TCP", "UDP"))
    init = lab.start()
    servers = [server(name, f"demo/p{i}", *ports) for i, name in enumerate(names)]
    assert init.serve(servers) == ()
    assert init.status().sockets == 1000
    assert ask(names[0], 1000) == b"p0\n"
    assert ask(names[49], 1009) == b"p49\n"
    assert sum(p.rss_kib for p in init.status().processes) < 60 * 1024


@pytest.mark.kernel
def test_more_namespaces_than_one_message_carries(lab: LabProcesses) -> None:
    names = [lab.namespace(f"p{i}") for i in range(300)]
    init = lab.start()
    assert init.serve([server(name, name, ("TCP", 80)) for name in names]) == ()
    assert init.status().sockets == 300
    assert ask(names[-1], 80) == f"{names[-1]}\n".encode()


@pytest.mark.kernel
def test_rounds_leave_no_descriptors(lab: LabProcesses) -> None:
    init = lab.start()
    names = [lab.namespace(f"p{i}") for i in range(3)]
    servers = [server(name, name, ("TCP", 80), ("UDP", 53)) for name in names]
    init.serve(servers)
    processes = (os.getpid(), init.pid, process(init, "netlab-workload"))

    def descriptors() -> list[int]:
        return [len(os.listdir(f"/proc/{pid}/fd")) for pid in processes]

    before = descriptors()
    for round_ in range(100):
        namespaces.remove(names[0])
        lab.namespace("p0")
        init.serve(servers[round_ % 3 :])
        assert ask(names[2], 80)
    init.serve(servers)
    assert ask(names[0], 80) == f"{names[0]}\n".encode()
    eventually(lambda: all(now <= then for now, then in zip(descriptors(), before, strict=True)))


@pytest.mark.kernel
def test_bad_clients_disturb_nobody(lab: LabProcesses) -> None:
    name = lab.namespace("a")
    init = lab.start()
    init.serve([server(name, "a", ("TCP", 80), ("TCP", 3306))])
    workload = process(init, "netlab-workload")
    with contextlib.ExitStack() as stack:
        for _ in range(300):  # they begin, and never go on
            stack.enter_context(client(name, 80)).sendall(b"GET /slow HTTP/1.1\r\n")
        deaf = stack.enter_context(client(name, 3306))  # sends, and does not listen
        deaf.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                deaf.send(b"x" * 65536)
        with client(name, 80) as rude:  # resets in the middle of an answer
            rude.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            rude.sendall(get("/echo", f"Content-Length: {BODY_LIMIT}", method="POST") + b"x" * 99)
        assert ask(name, 80) == b"a\n"
    assert ask(name, 80) == b"a\n"
    assert process(init, "netlab-workload") == workload


@pytest.mark.kernel
def test_large_bodies_come_back_whole(lab: LabProcesses) -> None:
    name = lab.namespace("a")
    lab.start().serve([server(name, "a", ("TCP", 80))])
    body = os.urandom(BODY_LIMIT)
    with client(name, 80) as opened:
        fields = (f"Content-Length: {len(body)}", "Connection: close")
        opened.sendall(get("/echo", *fields, method="POST", body=body))
        answer = b""
        while piece := opened.recv(1 << 20):
            answer += piece
    assert answer.endswith(body)


@pytest.mark.kernel
def test_refused_clients_get_the_answer_not_a_reset(lab: LabProcesses) -> None:
    name = lab.namespace("a")
    lab.start().serve([server(name, "a", ("TCP", 80))])
    with client(name, 80) as opened:
        too_large = b"x" * BODY_LIMIT * 2
        opened.sendall(get("/", f"Content-Length: {len(too_large)}", method="POST") + too_large)
        assert status(opened.recv(1000)) == 413


@pytest.mark.kernel
def test_when_descriptors_run_out_the_longest_idle_client_goes(lab: LabProcesses) -> None:
    name = lab.namespace("a")
    init = lab.start()
    init.serve([server(name, "a", ("TCP", 80))])
    workload = process(init, "netlab-workload")
    limit = len(os.listdir(f"/proc/{workload}/fd")) + 11
    resource.prlimit(workload, resource.RLIMIT_NOFILE, (limit, limit))
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(client(name, 80)) for _ in range(10)]
        for number, each in enumerate(idle):  # each has been accepted when it has its answer
            each.sendall(get(f"/echo?msg={number}"))
            assert content(each.recv(1000)) == f"{number}\n".encode()
        assert ask(name, 80) == b"a\n"
        assert idle[0].recv(1) == b""
        idle[9].sendall(get("/hostname"))
        assert content(idle[9].recv(1000)) == b"a\n"
